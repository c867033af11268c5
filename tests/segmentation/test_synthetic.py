"""Generated cells are what a data set of touching cells must be."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import label as connected_components

from unet_diffusion.segmentation.synthetic import synthetic_cells

SIZES = [(96, 96), (64, 100), (33, 50)]
SEEDS = range(12)


@pytest.fixture(scope="module")
def cells() -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and instances of the embedded data set's size."""
    return [synthetic_cells((128, 128), seed=seed) for seed in SEEDS]


def least_gap(instances: np.ndarray) -> float:
    """Distance in pixels of the nearest two cells; 1: they touch."""
    gaps = []
    for number in range(1, instances.max() + 1):
        distance = ndimage.distance_transform_edt(instances != number)
        others = distance[(instances > 0) & (instances != number)]
        gaps.append(others.min(initial=np.inf))
    return min(gaps)


def test_same_seed_gives_the_same_cells():
    first, again = (synthetic_cells((64, 64), seed=3) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])


def test_cells_do_not_depend_on_global_random_state():
    first = synthetic_cells((64, 64), seed=3)[0]
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(synthetic_cells((64, 64), seed=3)[0], first)


def test_other_seed_gives_other_cells():
    assert (synthetic_cells((64, 64), seed=0)[1] != synthetic_cells((64, 64), seed=1)[1]).any()


@pytest.mark.parametrize("size", SIZES)
def test_image_and_instances_have_the_size_and_type(size):
    image, instances = synthetic_cells(size, num_cells=5)
    assert (image.shape, image.dtype) == (size, np.uint8)
    assert (instances.shape, instances.dtype) == (size, np.int32)


def test_numbers_are_without_gaps(cells):
    for _, instances in cells:
        np.testing.assert_array_equal(np.unique(instances), np.arange(instances.max() + 1))


def test_each_cell_is_connected(cells):
    for _, instances in cells:
        parts = [connected_components(instances == n, connectivity=1).max() for n in range(1, instances.max() + 1)]
        assert parts == [1] * instances.max()


def test_each_cell_has_at_least_30_pixels(cells):
    for _, instances in cells:
        assert np.bincount(instances.ravel()).min() >= 30


def test_most_cells_asked_for_are_there(cells):
    counts = [instances.max() for _, instances in cells]
    assert max(counts) <= 20
    assert min(counts) >= 15


@pytest.mark.parametrize("num_cells", [1, 2, 5])
def test_as_many_cells_as_asked_for_where_there_is_room(num_cells):
    counts = [synthetic_cells((96, 96), num_cells=num_cells, seed=seed)[1].max() for seed in range(30)]
    assert counts == [num_cells] * 30


def test_cells_are_as_many_as_fit_in_a_small_image():
    instances = synthetic_cells((32, 32), num_cells=20)[1]
    assert 1 <= instances.max() < 20


def test_most_images_have_cells_that_touch(cells):
    touching = [least_gap(instances) < 3 for _, instances in cells]
    assert np.mean(touching) > 0.8


def test_some_background_is_left(cells):
    for _, instances in cells:
        assert 0.2 < (instances == 0).mean() < 0.9


def test_cells_differ_in_size(cells):
    areas = np.concatenate([np.bincount(instances.ravel())[1:] for _, instances in cells])
    assert areas.std() > 0.2 * areas.mean()


def test_cells_are_brighter_than_the_background(cells):
    for image, instances in cells:
        assert image[instances > 0].mean() > image[instances == 0].mean() + 20


def test_cells_differ_in_brightness(cells):
    for image, instances in cells:
        means = ndimage.mean(image, instances, np.arange(1, instances.max() + 1))
        assert np.std(means) > 5


def test_threshold_merges_touching_cells(cells):
    merged = [connected_components(image > threshold_otsu(image)).max() for image, _ in cells]
    assert sum(merged) < 0.8 * sum(instances.max() for _, instances in cells)


def test_faint_border_is_darker_than_the_cells_it_parts(cells):
    differences = []
    for image, instances in cells:
        smooth = ndimage.gaussian_filter(image.astype(float), 0.7)  # of single pixels' noise
        inner = ndimage.minimum_filter(instances, 3) == ndimage.maximum_filter(instances, 3)
        without_background = ndimage.minimum_filter(instances, 3) > 0
        deep = ndimage.binary_erosion(inner & (instances > 0), iterations=2)
        border = ~inner & without_background & (instances > 0)  # between two cells
        differences.append(smooth[deep].mean() - smooth[border].mean())
    assert np.mean(differences) > 8


def test_grey_values_are_not_cut_off(cells):
    for image, _ in cells:
        assert ((image == 0) | (image == 255)).mean() < 0.01


def test_border_of_the_image_is_not_the_rim_of_the_cells_it_cuts(cells):
    differences = []
    for image, instances in cells:
        of_one_cell = ndimage.minimum_filter(instances, 9) == ndimage.maximum_filter(instances, 9)  # mirrored outside
        deep = of_one_cell & (instances > 0)
        at_border = deep.copy()
        at_border[1:-1, 1:-1] = False
        for number in np.unique(instances[at_border]):
            cell = deep & (instances == number)
            differences.append(image[cell & ~at_border].mean() - image[cell & at_border].mean())
    assert len(differences) > 10
    # noise and texture leave 1 grey value in the mean over so many cells; a rim would be 30 % darker, 20 or more
    assert abs(np.mean(differences)) < 5


@pytest.mark.parametrize(("size", "num_cells"), [((31, 64), 20), ((64, 31), 20), ((64, 64), 0), ((64, 64), -1)])
def test_too_small_sizes_and_numbers_are_an_error(size, num_cells):
    with pytest.raises(ValueError, match="size must be at least 32 pixels a side and num_cells at least 1"):
        synthetic_cells(size, num_cells=num_cells)
