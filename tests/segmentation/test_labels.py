"""Label images become classes and weights; predictions become masks and instance numbers."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from unet_diffusion.segmentation import labels as labels_module
from unet_diffusion.segmentation.border_weights import border_weights
from unet_diffusion.segmentation.image_targets import ImageTargets
from unet_diffusion.segmentation.labels import (
    BACKGROUND,
    BORDER,
    CELL,
    NO_VALUE,
    REACH,
    Targets,
    edge_pieces,
    instances_by_threshold,
    instances_from,
    mask_from,
)
from unet_diffusion.segmentation.synthetic import synthetic_cells

TWO_SQUARES = np.zeros((20, 30), dtype=np.int32)  # that touch
TWO_SQUARES[4:16, 4:14] = 7
TWO_SQUARES[4:16, 14:26] = 300


def one_hot(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Probabilities of a network that is quite sure."""
    sure = np.moveaxis(np.eye(num_classes)[classes], 2, 0)
    return (0.9 * sure + 0.1 / num_classes).astype(np.float32)


@pytest.mark.parametrize(
    ("label_format", "values"),
    [("0/1", [0, 1]), ("0/255", [0, 255]), ("0/255", [255, 255]), ("classes", [0, 2]), ("instances", [0, 60000])],
)
def test_right_values_pass(label_format, values):
    num_classes = 3 if label_format == "classes" else None
    assert Targets(label_format=label_format, num_classes=num_classes).check(np.array([values])) is None


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        ({"label_format": "0/1"}, [0, 255], "with label_format 0/1 values must be 0 and 1, got 0, 255"),
        ({"label_format": "0/255"}, [0, 1], "values must be 0 and 255, got 0, 1"),
        ({"label_format": "0/255"}, [0, 3, 254, 255], "got 0, 3, 254, 255"),  # saved as JPEG
        ({"label_format": "classes", "num_classes": 3}, [0, 3], "values must be from 0 to 2, got 0, 3"),
        ({"label_format": "instances"}, [-1, 3], "values must be 0 or more, got -1, 3"),
        ({"label_format": "0/1"}, range(20), "got 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ..."),
    ],
)
def test_wrong_values_are_shown(options, values, message):
    assert message in Targets(**options).check(np.array([list(values)]))


INSTANCES = Targets(label_format="instances")
RESAMPLED = [
    (filter_name, scale)
    for filter_name in ("BILINEAR", "BICUBIC", "LANCZOS", "BOX")
    for scale in (0.3, 0.5, 0.8, 1.3, 2, 4)
    if (filter_name, scale) not in (("BOX", 1.3), ("BOX", 2), ("BOX", 4))  # repeats pixels
]


def resampled(numbers: np.ndarray, filter_name: str, scale: float) -> np.ndarray:
    image = Image.fromarray(numbers.astype(np.float32))
    size = [round(side * scale) for side in image.size]
    return np.asarray(image.resize(size, Image.Resampling[filter_name])).clip(0).round().astype(np.int32)


@pytest.mark.parametrize("seed", range(3))
def test_numbers_of_objects_that_touch_pass_at_any_scale(seed):
    cells = synthetic_cells((128, 128), seed=seed)[1]
    for scale in (0.25, 0.5, 1, 3):
        assert INSTANCES.check(resampled(cells, "NEAREST", scale)) is None


def test_objects_in_pieces_and_single_pixels_pass():
    labels = np.zeros((40, 40), dtype=np.int32)
    labels[::4, ::4] = np.arange(1, 101).reshape(10, 10)  # spots of a pixel
    assert INSTANCES.check(labels) is None
    assert INSTANCES.check(np.arange(1, 26).reshape(5, 5).repeat(3, axis=0).repeat(3, axis=1)) is None  # superpixels
    labels[2::4] = 7  # an object in ten pieces
    assert INSTANCES.check(labels) is None


@pytest.mark.parametrize(("filter_name", "scale"), RESAMPLED)
@pytest.mark.parametrize("kind", ["numbers", "mask"])
def test_numbers_that_were_interpolated_are_refused(kind, filter_name, scale):
    cells = synthetic_cells((128, 128), seed=0)[1]
    smooth = resampled(cells if kind == "numbers" else 255 * (cells > 0), filter_name, scale)
    problem = INSTANCES.check(smooth)
    assert "each number must be an object" in problem
    assert "scale them without interpolation" in problem
    classes = Targets(label_format="classes", num_classes=256)
    assert classes.check(smooth.clip(0, 255)) is None  # said of objects alone


def test_numbers_out_of_a_jpeg_are_refused_with_one_of_them_and_its_place():
    buffer = io.BytesIO()
    Image.fromarray(255 * (synthetic_cells((128, 128), seed=0)[1] > 0).astype(np.uint8)).save(buffer, "JPEG")
    labels = np.asarray(Image.open(buffer)).astype(np.int32)
    problem = INSTANCES.check(labels)
    num_pieces = sum(ndimage.label(labels == number, np.ones((3, 3)))[1] for number in np.unique(labels) if number)
    assert f"got {num_pieces} pieces" in problem
    _, edges, _ = edge_pieces(labels)
    y, x = edges[0]
    assert f"such as {labels[y, x]} in row {y}, column {x};" in problem


def test_edges_are_thin_and_lie_against_other_numbers():
    labels = np.zeros((12, 20), dtype=np.int32)
    labels[2:8, 2:8] = 90
    labels[2:8, 8] = 40  # an edge of 90
    labels[1, 2:8] = 120  # another, larger number
    labels[10, 2:8] = 55  # thin, and by itself
    labels[2:8, 12:18] = 30
    num_pieces, edges, is_between = edge_pieces(labels)
    assert num_pieces == 5
    found = {int(labels[y, x]): bool(between) for (y, x), between in zip(edges, is_between, strict=True)}
    assert found == {40: True, 120: False}


def test_real_nuclei_pass(shared_labels):
    for path in shared_labels:
        assert INSTANCES.check(np.asarray(Image.open(path)).astype(np.int32)) is None


@pytest.fixture
def shared_labels():
    """Files of real labels next to the repository."""
    paths = sorted((Path(__file__).parents[3] / "shared" / "data" / "nuclei" / "label").glob("*.png"))
    if not paths:
        pytest.skip("real data is not there")
    return paths


def test_ignored_value_is_no_wrong_value_and_is_not_learnt():
    targets = Targets(label_format="classes", num_classes=2, ignore_label=255)
    labels = np.array([[0, 1, 255]])
    assert targets.check(labels) is None
    assert targets.classes(labels).tolist() == [[0, 1, NO_VALUE]]
    assert targets.weights(labels, np.array([1, 2], dtype=np.float32)).tolist() == [[1, 2, 0]]


def test_binary_labels_are_background_and_foreground():
    assert Targets(label_format="0/255").classes(np.array([[0, 255]])).tolist() == [[0, 1]]
    assert Targets(label_format="instances").classes(np.array([[0, 9]])).tolist() == [[0, 1]]


def test_border_is_as_wide_as_told_on_both_sides_of_a_touching_edge():
    classes = Targets(label_format="instances", separate_borders=True, border_width=2).classes(TWO_SQUARES)
    assert classes[10].tolist() == [0] * 4 + [2] * 2 + [1] * 6 + [2] * 4 + [1] * 8 + [2] * 2 + [0] * 4


def test_every_object_keeps_an_inside_however_small():
    labels = np.zeros((9, 9), dtype=np.int32)
    labels[1, 1] = 1
    labels[4:7, 4:7] = 2
    classes = Targets(label_format="instances", separate_borders=True, border_width=3).classes(labels)
    assert classes[1, 1] == CELL
    assert classes[5, 5] == CELL
    assert (classes[4:7, 4:7] == BORDER).sum() == 8


def test_ignored_pixels_are_no_object_whose_border_is_learnt():
    labels = np.zeros((12, 12), dtype=np.int32)
    labels[2:10, 2:10], labels[:, 10:] = 5, 9
    targets = Targets(label_format="instances", separate_borders=True, ignore_label=9)
    classes = targets.classes(labels)
    assert (classes[:, 10:] == NO_VALUE).all()
    assert set(np.unique(classes[:, :10])) == {0, CELL, BORDER}


def test_object_that_fills_the_image_has_no_border():
    classes = Targets(label_format="instances", separate_borders=True).classes(np.full((6, 6), 3))
    assert (classes == CELL).all()


def test_huge_numbers_take_no_more_memory_than_small_ones():
    labels = np.where(TWO_SQUARES == 7, 2**31 - 1, TWO_SQUARES)
    targets = Targets(label_format="instances", separate_borders=True)
    assert np.array_equal(targets.classes(labels), targets.classes(TWO_SQUARES))


def test_border_weights_are_those_of_the_connected_cells():
    labels = np.zeros((20, 20), dtype=np.int32)
    labels[3:17, 2:9] = labels[3:17, 12:18] = 255
    targets = Targets(label_format="0/255", border_weight=10, border_sigma=5)
    cells, count = ndimage.label(labels)
    assert count == 2
    expected = 1 + border_weights(cells, w0=10, sigma=5)
    np.testing.assert_allclose(targets.weights(labels, np.ones(2, dtype=np.float32)), expected, rtol=1e-6)


def test_balance_makes_classes_count_alike():
    labels = [np.array([[0, 0, 0, 1]])]
    targets = Targets(label_format="0/1", class_balance=True)
    weights = targets.weights(labels[0], targets.balance(labels))
    assert weights[0, :3].sum() == pytest.approx(weights[0, 3])
    assert Targets(label_format="0/1").balance(labels).tolist() == [1, 1]


def near_edges(targets: Targets, labels: np.ndarray) -> np.ndarray:
    """The distances that a network learns, (1, H, W)."""
    return np.minimum(targets.distances(labels) / REACH, 1)[None]


def perfect(targets: Targets, labels: np.ndarray) -> np.ndarray:
    """The maps of a network that is right everywhere."""
    return np.concatenate([one_hot(targets.classes(labels), 3), near_edges(targets, labels)])


@pytest.mark.parametrize("border_width", [1, 2])
def test_objects_come_back_from_a_perfect_prediction(border_width):
    targets = Targets(label_format="instances", separate_borders=True, border_width=border_width)
    found = instances_from(perfect(targets, TWO_SQUARES), "instances")
    assert set(np.unique(found)) == {0, 1, 2}
    for number in (7, 300):
        inside = found[number == TWO_SQUARES]
        assert (inside == np.bincount(inside).argmax()).mean() > 0.9  # the border belongs to either
    assert ((found > 0) == (TWO_SQUARES > 0)).all()


def test_foreground_without_borders_is_cut_into_connected_parts():
    mask = np.zeros((20, 20), dtype=int)
    mask[2:8, 2:8] = mask[10:18, 10:18] = 1
    found = instances_from(one_hot(mask, 2), "binary")
    assert found[3, 3] != found[12, 12]
    assert ((found > 0) == (mask > 0)).all()


def test_specks_are_left_out_and_numbers_have_no_gaps():
    mask = np.zeros((20, 20), dtype=int)
    mask[0, 0] = mask[2:8, 2:8] = mask[10:18, 10:18] = 1
    assert np.unique(instances_from(one_hot(mask, 2), "binary")).tolist() == [0, 1, 2]


def test_cell_all_of_which_looks_like_border_is_an_object_all_the_same():
    classes = np.zeros((20, 20), dtype=int)
    classes[5:10, 5:10] = BORDER
    maps = np.concatenate([one_hot(classes, 3), np.zeros((1, 20, 20), dtype=np.float32)])
    assert instances_from(maps, "instances").max() == 1


def test_distances_are_pixels_to_the_next_one_outside_the_object():
    labels = np.zeros((3, 12), dtype=np.int32)
    labels[:, 1:6], labels[:, 6:9] = 4, 5  # the border of the image is no edge
    distances = Targets("instances", separate_borders=True).distances(labels)
    assert distances[1].tolist() == [0, 1, 2, 3, 2, 1, 1, 2, 1, 0, 0, 0]


def test_object_that_fills_the_image_is_as_far_from_an_edge_as_the_middle_of_a_large_one():
    targets = Targets("instances", separate_borders=True)
    large = np.zeros((64, 64), dtype=np.int32)
    large[8:56, 8:56] = 1
    centre = torch.stack(torch.meshgrid(torch.arange(28, 36), torch.arange(28, 36), indexing="ij")).float()
    learnt = [
        ImageTargets.of(targets, labels, np.ones(3, dtype=np.float32)).sampled(centre)["distances"]
        for labels in (large, np.ones_like(large))
    ]
    assert torch.equal(learnt[1], learnt[0])
    assert not targets.distances(np.zeros_like(large)).any()


def test_touching_objects_without_a_border_between_them_are_told_apart_by_their_distances():
    targets = Targets("instances", separate_borders=True)
    classes = np.where(TWO_SQUARES > 0, CELL, 0)
    maps = np.concatenate([one_hot(classes, 3), near_edges(targets, TWO_SQUARES)])
    assert instances_from(maps, "instances").max() == 2


def test_low_peaks_of_the_distance_are_no_objects():
    maps = np.zeros((4, 9, 30), dtype=np.float32)
    maps[CELL, 2:7, 2:28] = 1
    maps[0] = 1 - maps[CELL]
    maps[3, :, 2:28] = 0.8 + 0.05 * np.cos(np.arange(26))  # smoothed, peaks are 0.06 above the valleys
    assert instances_from(maps, "instances").max() == 1
    maps[3, :, 2:28] = 0.7 + 0.3 * np.cos(np.arange(26))
    assert instances_from(maps, "instances", min_size=1).max() == 5


def test_objects_at_several_thresholds_have_seeds_that_are_found_once(monkeypatch):
    maps = perfect(Targets("instances", separate_borders=True), TWO_SQUARES)
    maps[BACKGROUND] = np.select([TWO_SQUARES == 7, TWO_SQUARES == 300], [0.1, 0.5], 0.95)
    sought, peaks = [], labels_module._peaks
    monkeypatch.setattr(labels_module, "_peaks", lambda distances: sought.append(1) or peaks(distances))
    both, left, none = instances_by_threshold(maps, "instances", (0.2, 0.7, 0.95))
    assert len(sought) == 1
    assert ((both > 0) == (TWO_SQUARES > 0)).all()
    assert ((left > 0) == (TWO_SQUARES == 7)).all()
    assert [each.max() for each in (both, left, none)] == [2, 1, 0]


def test_masks_are_0_and_255_or_class_indices():
    classes = np.array([[0, 1, 2]])
    assert mask_from(one_hot(classes, 3), "instances").tolist() == [[0, 255, 255]]
    assert mask_from(one_hot(classes, 3), "classes").tolist() == [[0, 1, 2]]


def test_instances_of_classes_are_refused():
    with pytest.raises(ValueError, match="trained on classes"):
        instances_from(one_hot(np.zeros((4, 4), dtype=int), 3), "classes")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_format": "0-255"}, "label_format must be one of 0/1, 0/255, classes, instances, got '0-255'"),
        ({"label_format": "classes"}, "num_classes goes with label_format classes and with no other"),
        ({"label_format": "0/1", "num_classes": 2}, "num_classes goes with label_format classes"),
        ({"label_format": "classes", "num_classes": 300}, "num_classes must be from 2 to 256, got 300"),
        ({"label_format": "0/255", "separate_borders": True}, "needs label_format instances"),
        ({"label_format": "instances", "border_width": 0}, "border_width must be at least 1"),
        ({"label_format": "classes", "num_classes": 3, "border_weight": 1.0}, "border_weight needs objects"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Targets(**options)


def test_small_objects_that_touch_are_right_labels():
    labels = np.zeros((60, 60), np.int32)
    for number in range(100):
        y, x = divmod(number, 10)
        labels[6 * y : 6 * y + 2, 6 * x : 6 * x + 2] = 2 * number + 1
        labels[6 * y : 6 * y + 2, 6 * x + 2 : 6 * x + 4] = 2 * number + 2
    assert Targets("instances").check(labels) is None
    bundles = np.zeros((60, 63), np.int32)  # of three fibres each
    bundles[5:55] = np.where(np.arange(63) % 9 < 3, np.arange(63) + 1, 0)
    assert Targets("instances").check(bundles) is None
