"""Border weights are those of the paper's equation, worked out at every pixel from every cell."""

import time

import numpy as np
import pytest

from unet_diffusion.segmentation.border_weights import border_weights, class_weights

CUT_OFF = 1e-6  # of w0, what border_weights may leave out


def from_every_cell(instances: np.ndarray, w0: float, sigma: float) -> np.ndarray:
    """Equation 2 of Ronneberger et al. 2015, each pixel against each pixel of each cell, in float64."""
    places = np.argwhere(np.ones(instances.shape, dtype=bool))  # (H*W, 2)
    distances = []
    for number in np.unique(instances[instances > 0]):
        cell = np.argwhere(instances == number)
        distances.append(np.linalg.norm(places[:, None] - cell[None], axis=2).min(axis=1))
    nearest, second = np.sort(distances, axis=0)[:2]
    weights = w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
    return np.where(instances == 0, weights.reshape(instances.shape), 0)


def rectangles(seed: int, numbers: tuple[int, ...] = (1, 2, 3, 4, 5, 6)) -> np.ndarray:
    """Cells that touch, reach the image's border, cover parts of each other, or are one pixel: (24, 19)."""
    rng = np.random.default_rng(seed)
    instances = np.zeros((24, 19), dtype=np.int64)
    for number in numbers:
        y, x = rng.integers(24), rng.integers(19)
        height, width = rng.integers(1, 7, size=2)
        instances[y : y + height, x : x + width] = number
    instances[rng.integers(24), rng.integers(19)] = max(numbers) + 1  # one pixel
    return instances


def bars(gap: int) -> np.ndarray:
    """Two cells as high as the image with so many pixels of background between them, (5, 8 + gap)."""
    instances = np.zeros((5, 8 + gap), dtype=np.int32)
    instances[:, :4], instances[:, -4:] = 1, 2
    return instances


def equal_to_every_cell(instances: np.ndarray, w0: float, sigma: float) -> None:
    weights = border_weights(instances, w0=w0, sigma=sigma)
    # float32 has distances to 1e-7 of their value, and equation 2 multiplies that by (d1 + d2)^2 / sigma^2 < 30
    np.testing.assert_allclose(weights, from_every_cell(instances, w0, sigma), rtol=1e-5, atol=CUT_OFF * w0)


@pytest.mark.parametrize("sigma", [0.5, 1.3, 5.0])  # reaches within the image, and beyond it
@pytest.mark.parametrize("seed", range(6))
def test_weights_are_those_of_the_equation_at_every_pixel(seed, sigma):
    equal_to_every_cell(rectangles(seed), 10.0, sigma)


@pytest.mark.parametrize("seed", range(3))
def test_numbers_may_have_gaps_and_be_large(seed):
    numbers = (3, 4, 900, 2**31, 2**40)
    equal_to_every_cell(rectangles(seed, numbers), 10.0, 1.3)


@pytest.mark.parametrize("seed", range(3))
def test_weights_of_one_pixel_cells_are_those_of_the_equation(seed):
    instances = np.zeros((17, 23), dtype=np.int32)
    places = np.random.default_rng(seed).choice(instances.size, 9, replace=False)
    instances.flat[places] = np.arange(1, 10)
    equal_to_every_cell(instances, 10.0, 2.0)


def test_parts_with_the_same_number_are_one_cell():
    instances = np.zeros((9, 30), dtype=np.int32)
    instances[:, [2, 12]], instances[:, 27] = 1, 2
    equal_to_every_cell(instances, 10.0, 5.0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint32, np.int64, np.uint64])
def test_weights_do_not_depend_on_the_integer_type(dtype):
    instances = rectangles(0)
    np.testing.assert_array_equal(border_weights(instances.astype(dtype)), border_weights(instances))


def test_weight_between_parallel_bars_is_that_of_their_distance():
    # at each of 6 pixels between them the two distances add up to 7
    between = border_weights(bars(gap=6), w0=10, sigma=5)[:, 4:-4]
    np.testing.assert_allclose(between, np.full((5, 6), 10 * np.exp(-49 / 50)), rtol=1e-6)


def test_weight_is_proportional_to_w0():
    np.testing.assert_allclose(border_weights(bars(6), w0=3), 0.3 * border_weights(bars(6), w0=10), rtol=1e-6)


def test_weights_inside_cells_are_zero():
    instances = rectangles(0)
    assert (border_weights(instances)[instances > 0] == 0).all()


def test_weights_are_float32_of_the_same_shape():
    weights = border_weights(bars(6))
    assert (weights.dtype, weights.shape) == (np.float32, (5, 14))


@pytest.mark.parametrize("number", [0, 7])
def test_fewer_than_two_cells_have_no_weights(number):
    instances = np.zeros((12, 9), dtype=np.int32)
    instances[3:6, 3:6] = number
    assert not border_weights(instances).any()


def test_image_without_background_has_no_weights():
    instances = np.ones((6, 8), dtype=np.int32)
    instances[:, 4:] = 2
    assert not border_weights(instances).any()


@pytest.mark.parametrize("size", [(0, 5), (1, 1), (1, 9)])
def test_tiny_images_have_weights_of_their_size(size):
    assert border_weights(np.zeros(size, dtype=np.int32)).shape == size


def test_instances_are_left_as_they_were():
    instances = rectangles(0)
    border_weights(instances)
    np.testing.assert_array_equal(instances, rectangles(0))


def test_hundred_cells_of_a_large_image_take_less_than_a_second():
    y, x = np.mgrid[:512, :512]
    inside = (y % 51 < 40) & (x % 51 < 40) & (y < 510) & (x < 510)
    instances = np.where(inside, 1 + y // 51 * 10 + x // 51, 0)
    assert len(np.unique(instances)) == 101
    times = []
    for _ in range(3):  # the machine may do other things
        start = time.perf_counter()
        border_weights(instances)
        times.append(time.perf_counter() - start)
    assert min(times) < 1


@pytest.mark.parametrize(
    "instances",
    [
        np.zeros((4, 4), dtype=np.float32),
        np.zeros((4, 4), dtype=bool),
        np.zeros((1, 4, 4), dtype=np.int32),
        np.zeros(4, dtype=np.int32),
        np.array([[0, -1]]),
    ],
    ids=["float", "bool", "three dimensions", "one dimension", "negative"],
)
def test_what_is_not_instance_numbers_is_an_error(instances):
    with pytest.raises(ValueError, match="instances must be whole numbers from 0"):
        border_weights(instances)


@pytest.mark.parametrize(
    "options", [{"sigma": 0}, {"sigma": -1.0}, {"sigma": float("nan")}, {"w0": -0.1}, {"w0": float("nan")}]
)
def test_weights_out_of_range_are_an_error(options):
    with pytest.raises(ValueError, match="w0 must be 0 or more and sigma above 0"):
        border_weights(bars(6), **options)


# ------------------------------------------------------------------------------------------------------- class weights


def test_class_weights_are_inverse_frequencies():
    labels = [np.array([[0, 0, 0, 0], [0, 1, 1, 2]]), np.array([[0], [1]])]  # 6, 3 and 1 of 10 pixels
    np.testing.assert_allclose(class_weights(labels, 3), [10 / 18, 10 / 9, 10 / 3], rtol=1e-6)


def test_mean_class_weight_over_the_pixels_is_one():
    labels = [np.random.default_rng(seed).integers(4, size=(9, 7)) ** 2 // 3 for seed in range(3)]  # 0, 1 and 3
    weights = class_weights(labels, 4)
    mean = np.concatenate([weights[image].ravel() for image in labels]).mean(dtype=np.float64)
    assert mean == pytest.approx(1, rel=1e-6)  # float32 weights


def test_class_that_never_occurs_has_weight_zero():
    np.testing.assert_allclose(class_weights([np.array([[0, 0, 2, 2]])], 4), [1, 0, 1, 0])


@pytest.mark.parametrize("ignore_label", [0, 1, 255])
def test_ignored_pixels_do_not_count(ignore_label):
    others = [label for label in (0, 1, 2) if label != ignore_label]
    labels = np.array([others + [ignore_label] * 5], dtype=np.uint8)
    weights = class_weights([labels], 3, ignore_label)
    np.testing.assert_allclose(weights[others], np.ones(len(others)), rtol=1e-6)


def test_class_weights_of_no_pixels_are_zero():
    assert class_weights([np.full((2, 2), 255)], 2, ignore_label=255).tolist() == [0, 0]


@pytest.mark.parametrize("labels", [[[0, 3]], [[0, -1]]])
def test_class_outside_of_the_range_is_an_error(labels):
    with pytest.raises(ValueError, match="labels must be from 0 to 1"):
        class_weights([np.array(labels)], 2)
