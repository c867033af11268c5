"""The evaluation of a segmenter agrees with scikit-learn and torchmetrics, and each error moves the right figure."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from halves import Half
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score, jaccard_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from unet_diffusion.data import SegmentationDataModule
from unet_diffusion.data.labelled import LabelledSource
from unet_diffusion.evaluation.intervals import interval, interval_of_mean
from unet_diffusion.evaluation.scores_of_counts import calibration_error_of, challenge_pixel_error_of, reliability_of
from unet_diffusion.evaluation.segmented_images import Predicted, Truth, counted
from unet_diffusion.evaluation.segmenter_pictures import RIGHT, WRONG, outlined_errors
from unet_diffusion.evaluation.segmenter_pictures import SIDE as PICTURE_SIDE
from unet_diffusion.evaluation.segmenters import evaluate_segmenter
from unet_diffusion.evaluation.thresholds import images_to_fit_on
from unet_diffusion.inference.segmenter import Segmentation
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.segmentation.affinities import affinities_of
from unet_diffusion.segmentation.labels import MIN_SIZE, THRESHOLD, Targets
from unet_diffusion.segmentation.object_scores import average_precisions
from unet_diffusion.segmentation.scores import dice, membrane_scores, pixel_error, v_rand

SIDE = 48
NUM_VAL = 3
RADII = (3, 4, 6, 8)  # of the four cells of an image, one in each quarter
NEAR_ONE = 0.9


def cells(seed: int) -> np.ndarray:
    """Instance numbers of four discs, (48, 48); the two lower ones touch along a line."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    labels = np.zeros((SIDE, SIDE), dtype=np.int32)
    shift = np.random.default_rng(seed).integers(-2, 3, size=2)
    centres = np.array([(11, 11), (11, 35), (35, 17), (35, 28)]) + shift
    for number, ((row, column), radius) in enumerate(zip(centres, RADII, strict=True), start=1):
        labels[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = number
    return labels


class Labels(LabelledSource):
    """Images whose grey values are their labels, so that a stub knows the truth."""

    def __init__(self, labels: list[np.ndarray]):
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.labels[index].clip(0).astype(np.uint8), "label": self.labels[index]}


def data_of(labels: list[np.ndarray], **targets: Any) -> SegmentationDataModule:
    targets = {"label_format": "instances", "separate_borders": False, **targets}
    return SegmentationDataModule(Labels(labels), Targets(**targets), window_size=16, num_val=NUM_VAL)


@dataclass
class Stub:
    """Gives the maps that a function makes of labels, and keeps which images it was shown."""

    predict: Any
    kind: str = "binary"
    class_names: list[str] = field(default_factory=lambda: ["background", "cell"])
    stretch = False
    values = PixelValues()
    threshold = THRESHOLD
    min_size = MIN_SIZE
    unet = SimpleNamespace(in_channels=1)
    shown: list[np.ndarray] = field(default_factory=list)

    def maps(self, image: torch.Tensor, *, views: bool = False) -> torch.Tensor:
        labels = ((image[0] + 1) * 127.5).round().int().numpy()
        self.shown.append(labels)
        return torch.from_numpy(self.predict(labels)).float()

    def __repr__(self) -> str:
        return "Stub"


def foreground(share: np.ndarray) -> np.ndarray:
    """Probabilities of background and cell, (2, H, W), of those of cell."""
    return np.stack([1 - share, share]).astype(np.float32)


def binary(change=lambda labels: labels):
    """A stub that is sure of a changed truth."""
    return Stub(lambda labels: foreground((change(labels) > 0).astype(float)))


def cones(labels: np.ndarray) -> np.ndarray:
    """A map (H, W) with one peak an object, whatever its shape."""
    heights = np.zeros(labels.shape, dtype=np.float32)
    for number in np.unique(labels[labels > 0]):
        places = np.argwhere(labels == number)
        far = np.linalg.norm(places - places.mean(axis=0), axis=1)
        heights[tuple(places.T)] = 1 - far / (far.max() + 1)
    return heights


def separated(change=lambda labels: labels):
    """A stub of cells and their borders that is sure of a changed truth."""
    targets = Targets("instances", separate_borders=True, border_width=1)

    def predict(labels):
        classes = np.eye(3, dtype=np.float32)[targets.classes(change(labels))].transpose(2, 0, 1)
        return np.concatenate([classes, cones(change(labels))[None]])

    return Stub(predict, "instances", ["background", "cell", "border"])


def paired(change=lambda labels: labels):
    """A stub of affinities that is sure of a changed truth."""

    def predict(labels):
        classes = foreground((change(labels) > 0).astype(float))
        return np.concatenate([classes, affinities_of(torch.from_numpy(change(labels))[None])[0][0]])

    return Stub(predict, "affinities")


def evaluated(stub, labels=None, **targets):
    if stub.kind == "affinities":
        targets = {"affinities": True, **targets}
    if stub.kind == "instances":
        targets = {"separate_borders": True, "border_width": 1, **targets}
    labels = [cells(seed) for seed in range(6)] if labels is None else labels
    return evaluate_segmenter(stub, data_of(labels, **targets))


def shifted(labels):
    return np.roll(labels, 4, axis=1)


def merged(labels):
    return np.where(labels == 4, 3, labels)


def without_small(labels):
    return np.where(labels == 1, 0, labels)


@pytest.mark.parametrize("stub", [binary, separated, paired])
def test_a_perfect_segmenter_has_the_best_scores(stub):
    result = evaluated(stub(), [np.where(cells(seed) == 4, 0, cells(seed)) for seed in range(6)])
    for key, figure in result.figures.items():
        if figure.better is not None:
            assert figure.value == pytest.approx(float(figure.better == "higher"), abs=1e-6), key
    assert result.warnings == [next(text for text in result.warnings if "only 3 images" in text)]


@pytest.mark.parametrize("stub", [separated, paired])
def test_a_shifted_prediction_lowers_every_score_of_shape(stub):
    perfect, result = evaluated(stub()).figures, evaluated(stub(shifted)).figures
    for key in ("dice_images", "iou_pooled", "ap_50_90_images", "v_rand_images"):
        assert result[key].value < NEAR_ONE * perfect[key].value, key


@pytest.mark.parametrize("stub", [separated, paired])
def test_a_merger_costs_objects_but_no_pixels(stub):
    result = evaluated(stub(merged)).figures
    assert result["dice_images"].value == 1
    assert result["ap_50_images"].value == pytest.approx(3 / 4)  # the larger cell has an IoU of over a half with both
    assert result["v_rand_images"].value < NEAR_ONE


def test_missed_small_objects_are_missed_in_the_row_of_their_size_alone():
    result = evaluated(separated(without_small))
    assert [row[2] for row in result.tables["by_size"].rows] == [0, 1, 1, 1]
    assert result.figures["dice_images"].value > NEAR_ONE
    assert result.figures["ap_50_images"].value == pytest.approx(3 / 4)


def test_many_missed_small_objects_are_told():
    result = evaluate_segmenter(
        separated(without_small),
        SegmentationDataModule(Labels([cells(seed) for seed in range(9)]),
                               Targets("instances", separate_borders=True, border_width=1), window_size=16, num_val=6),
    )  # fmt: skip
    assert any("Of the smallest quarter of the objects" in warning for warning in result.warnings)


def noisy(labels: np.ndarray) -> np.ndarray:
    """Probabilities of background and cell: the truth, smoothed, and noise that depends on the labels alone."""
    rng = np.random.default_rng(int(labels.sum()))
    smooth = scipy.ndimage.gaussian_filter((labels > 0).astype(float), 1.5)
    return foreground((smooth + rng.normal(scale=0.15, size=labels.shape)).clip(0, 1))


def test_scores_of_masks_are_those_of_scikit_learn_and_of_the_package():
    labels = [cells(seed) for seed in range(6)]
    result = evaluated(Stub(noisy), labels).figures
    truths = [one > 0 for one in labels[-NUM_VAL:]]
    masks = [noisy(one)[0] < 0.5 for one in labels[-NUM_VAL:]]
    flat = [np.concatenate([mask.ravel() for mask in some]) for some in (truths, masks)]
    assert result["dice_pooled"].value == pytest.approx(f1_score(*flat))
    assert result["iou_pooled"].value == pytest.approx(jaccard_score(*flat))
    pairs = list(zip(truths, masks, strict=True))
    assert result["dice_images"].value == pytest.approx(np.mean([dice(*pair) for pair in pairs]))
    assert result["pixel_error_images"].value == pytest.approx(np.mean([pixel_error(*pair) for pair in pairs]))


def test_scores_of_membranes_are_those_of_the_challenge():
    labels = [(cells(seed) > 0).astype(np.int32) for seed in range(6)]
    result = evaluated(Stub(noisy), labels, label_format="0/1").figures
    expected = membrane_scores([one > 0 for one in labels[-NUM_VAL:]], [noisy(one)[1] for one in labels[-NUM_VAL:]])
    for name in ("rand_error", "v_rand", "v_info", "warping_error"):
        assert result[f"{name}_images"].value == pytest.approx(getattr(expected, name), abs=1e-6), name


def test_the_challenges_pixel_error_is_the_best_f_score_of_all_thresholds():
    rng = np.random.default_rng(0)
    probability, truth = rng.integers(100, size=5000) / 100 + 0.005, rng.random(5000) < 0.4
    bins = np.stack([np.bincount((probability * 100).astype(int), weights, 100) for weights in
                     (None, probability, truth)], axis=1)  # fmt: skip
    best = max(f1_score(truth, probability >= threshold / 100) for threshold in range(100))
    assert challenge_pixel_error_of(bins) == pytest.approx(1 - best)


def test_average_precision_is_that_of_the_package():
    labels = [cells(seed) for seed in range(6)]
    result = evaluated(separated(shifted), labels).figures
    expected = [average_precisions(one, shifted(one), (0.5, 0.6, 0.7, 0.8, 0.9)) for one in labels[-NUM_VAL:]]
    assert result["ap_50_images"].value == pytest.approx(np.mean(expected, axis=0)[0], abs=0.15)
    assert result["ap_50_90_images"].value == pytest.approx(np.mean(expected), abs=0.15)


def test_pooled_scores_of_segments_are_those_of_images_side_by_side():
    labels = [cells(seed) for seed in range(6)]
    result = evaluated(separated(merged), labels).figures
    truth = np.hstack([np.where(one > 0, one + 10 * k, 0) for k, one in enumerate(labels[-NUM_VAL:])])
    predicted = np.hstack([np.where(one > 0, merged(one) + 10 * k, 0) for k, one in enumerate(labels[-NUM_VAL:])])
    assert result["v_rand_pooled"].value == pytest.approx(v_rand(truth, predicted))


def test_pooled_and_mean_differ_where_images_differ():
    full, one = cells(0), np.where(cells(0) == 4, 4, 0)
    labels = [full, full, full, full, full, one]
    blind_to_it = separated(lambda seen: np.where((seen == one).all(), 0, seen))
    result = evaluated(blind_to_it, labels)
    assert result.figures["ap_50_images"].value == pytest.approx(2 / 3)
    assert result.figures["ap_50_pooled"].value == pytest.approx(8 / 9)


def random_classes(seed: int) -> np.ndarray:
    return (
        np.random.default_rng(seed).integers(3, size=(SIDE // 8, SIDE // 8)).repeat(8, 0).repeat(8, 1).astype(np.int32)
    )


def classes_stub(sharpness: float):
    def predict(labels):
        rng = np.random.default_rng(int(labels.sum()))
        scores = np.eye(3)[labels].transpose(2, 0, 1) * 2 + rng.normal(size=(3, *labels.shape))
        return scipy.special.softmax(sharpness * scores, axis=0).astype(np.float32)

    return Stub(predict, "classes", ["0", "1", "2"])


def test_classes_have_scores_each_and_calibration_as_of_torchmetrics():
    labels = [random_classes(seed) for seed in range(6)]
    stub = classes_stub(2.0)
    result = evaluated(stub, labels, label_format="classes", num_classes=3)
    truth = np.concatenate([one.ravel() for one in labels[-NUM_VAL:]])
    probabilities = np.concatenate([stub.predict(one).reshape(3, -1) for one in labels[-NUM_VAL:]], axis=1)
    rows = result.tables["classes"].rows
    expected = f1_score(truth, probabilities.argmax(axis=0), average=None)
    assert [row[4] for row in rows] == pytest.approx(expected.tolist())
    assert result.figures["dice_pooled"].value == pytest.approx(expected[1:].mean())
    theirs = multiclass_calibration_error(torch.tensor(probabilities.T), torch.tensor(truth).long(), 3, n_bins=10)
    assert result.figures["calibration_error"].value == pytest.approx(theirs.item(), abs=1e-5)
    assert "thresholds" not in result.tables


def binned(probability: np.ndarray, truth: np.ndarray) -> np.ndarray:
    labels = Truth(truth[None].astype(int), truth[None].astype(int), truth[None].astype(np.int32))
    return counted(0, Segmentation(foreground(probability[None]), "binary", []), labels).reliability[0]


@pytest.mark.parametrize("power", [1.0, 0.4])
def test_calibration_is_that_of_torchmetrics_and_scikit_learn(power):
    rng = np.random.default_rng(0)
    probability = rng.random(20_000).astype(np.float32)
    truth = rng.random(20_000) < probability**power
    bins = binned(probability, truth)
    theirs = binary_calibration_error(torch.tensor(probability), torch.tensor(truth).int(), n_bins=10)
    assert calibration_error_of(bins) == pytest.approx(theirs.item(), abs=1e-4)
    is_true, mean = calibration_curve(truth, probability, n_bins=10)
    np.testing.assert_allclose(reliability_of(bins)[2], is_true, atol=1e-3)
    np.testing.assert_allclose(reliability_of(bins)[1], mean, atol=1e-3)


def random_truth(sharpness: float):
    """A stub whose pixels are foreground as often as it says (at sharpness 1), as labels hold the probability."""

    def predict(labels):
        odds = np.log(labels.clip(1, 99) / 100) - np.log1p(-labels.clip(1, 99) / 100)
        return foreground(scipy.special.expit(sharpness * odds))

    return Stub(predict)


class Chances(LabelledSource):
    """Images of the probability with which each pixel is foreground, in per cent."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        chances = rng.integers(1, 100, size=(SIDE, SIDE))
        drawn = rng.random((SIDE, SIDE)) < chances / 100
        return {"image": chances.astype(np.uint8), "label": drawn.astype(np.int32)}


@pytest.mark.parametrize(("sharpness", "error", "is_over"), [(1.0, (0, 0.03), None), (4.0, (0.1, 0.3), True),
                                                             (0.3, (0.1, 0.3), False)])  # fmt: skip
def test_probabilities_that_are_too_sure_are_told_from_those_that_are_right(sharpness, error, is_over):
    data = SegmentationDataModule(Chances(), Targets("0/1"), window_size=16, num_val=NUM_VAL)
    result = evaluate_segmenter(random_truth(sharpness), data)
    assert error[0] <= result.figures["calibration_error"].value <= error[1]
    told = [warning for warning in result.warnings if "Probabilities" in warning]
    assert len(told) == (is_over is not None)
    if is_over is not None:
        assert ("overconfident" in told[0]) == is_over == (result.figures["overconfidence"].value > 0)


def biased(labels: np.ndarray) -> np.ndarray:
    """Right at a threshold of 0.3, and blind at 0.5."""
    return foreground(np.where(labels > 0, 0.35, 0.22))


def test_a_fitted_threshold_is_better_than_a_half_for_a_biased_network():
    result = evaluated(Stub(biased))
    rows = {row[0]: row for row in result.tables["thresholds"].rows}
    assert rows["Dice"][1] == 0.3
    assert rows["Dice"][3:5] == [0, pytest.approx(1)]
    assert result.figures["dice_fitted"].value == pytest.approx(1)
    command = "unet-diffusion segment RUN IMAGES --output DIR --threshold 0.3"
    assert f"Dice rises from 0.000 to 1.000 with the threshold 0.3: {command}" in result.warnings
    assert any(f"{command} --instances --min_size 16" in warning for warning in result.warnings)


def test_a_least_size_is_fitted_to_specks():
    def with_specks(labels):
        specks = labels.copy()
        specks[::12, ::12] = np.where(labels[::12, ::12] > 0, labels[::12, ::12], 9)
        specks[:4, :5] = specks[-4:, :5] = 5  # 20 pixels: more than the least size that is taken otherwise
        return specks

    result = evaluated(separated(with_specks))
    row = result.tables["thresholds"].rows[0]
    assert row[0] == "AP at IoU 0.5"
    assert row[1] == 0.5
    assert row[2] == 32  # costs the smallest cell, of 29 pixels, and spares two specks
    assert row[3:5] == pytest.approx([4 / 6, 3 / 4])


def test_thresholds_never_depend_on_labels_that_are_validated_on():
    labels = [cells(seed) for seed in range(6)]
    turned = [*labels[:-NUM_VAL], *(np.where(one > 0, 0, 1).astype(np.int32) for one in labels[-NUM_VAL:])]
    rows = [evaluated(Stub(noisy), some).tables["thresholds"].rows for some in (labels, turned)]
    assert [row[:3] for row in rows[0]] == [row[:3] for row in rows[1]]


def test_thresholds_are_fitted_on_images_that_were_not_trained_on_if_there_are_any():
    data = data_of([cells(seed) for seed in range(8)])
    data.num_train = 2
    data.setup("fit")
    indices, were_trained_on = images_to_fit_on(data, 24)
    assert len(indices) == 3
    assert not were_trained_on
    assert not {*indices} & {*data.train_images.tolist(), *data.val_indices.tolist()}
    data = data_of([cells(seed) for seed in range(8)])
    data.setup("fit")
    indices, were_trained_on = images_to_fit_on(data, 4)
    assert (len(indices), were_trained_on) == (4, True)
    assert not {*indices} & {*data.val_indices.tolist()}


def test_pixels_without_a_class_count_for_nothing():
    labels = [cells(seed) for seed in range(6)]
    ignored = [np.where(np.arange(SIDE)[:, None] < 24, one, 99) for one in labels]

    def half(seen):
        return foreground(np.where(seen == 99, 1, seen > 0).astype(float))

    result = evaluated(Stub(half), ignored, ignore_label=99).figures
    assert result["dice_images"].value == result["ap_50_images"].value == 1
    assert result["pixel_error_pooled"].value == result["warping_error_pooled"].value == 0

    def lost(seen):
        return foreground(np.zeros(seen.shape))

    wrong = evaluated(Stub(lost), ignored, ignore_label=99).figures["warping_error_pooled"].value
    alone = evaluated(Stub(lost), [one[:24] for one in labels]).figures["warping_error_pooled"].value
    assert wrong == pytest.approx(alone)
    assert alone > 0


def test_two_processes_give_what_one_gives():
    labels = [cells(seed) for seed in range(8)]
    alone = evaluate_segmenter(Stub(noisy), data_of(labels))
    first = Half(0, 2)
    evaluate_segmenter(Stub(noisy), data_of(labels), group=first)
    both = evaluate_segmenter(Stub(noisy), data_of(labels), group=Half(1, 2, first.own))
    assert both.plain() == alone.plain()
    assert [one.data_url for section in both.sections for one in section.pictures] == [
        one.data_url for section in alone.sections for one in section.pictures
    ]


def test_progress_ends_at_all_images():
    seen = []
    evaluate_segmenter(binary(), data_of([cells(seed) for seed in range(6)]),
                       progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert seen[-1] == (len(seen), len(seen)) == (9, 9)  # three are fitted on, three measured, and three drawn


def test_the_worst_images_come_first():
    labels = [cells(seed) for seed in range(6)]
    result = evaluated(separated(lambda seen: seen if (seen != labels[4]).any() else shifted(seen)), labels)
    assert result.tables["worst"].rows[0][0] == "000004"
    pictures = [one for section in result.sections for one in section.pictures if one.key.startswith("worst")]
    assert len(pictures) == NUM_VAL
    assert pictures[0].caption.startswith("000004")


def test_dice_that_an_image_without_objects_lacks_is_left_out_of_its_caption():
    labels = [np.zeros((SIDE, SIDE), dtype=np.int32) if seed == 5 else cells(seed) for seed in range(6)]
    result = evaluated(separated(), labels)
    captions = [one.caption for section in result.sections for one in section.pictures if one.key.startswith("worst")]
    assert captions[-1] == "000005: AP 1.00, 0 objects in the label, 0 predicted."
    assert all(": Dice 1.00, AP 1.00, " in caption for caption in captions[:-1])


def test_outlines_say_which_objects_are_matched():
    labels = cells(0)
    truth, predicted = (Predicted((one > 0).astype(int), one) for one in (labels, without_small(labels)))
    pixels = np.asarray(outlined_errors(torch.zeros(1, SIDE, SIDE), truth, predicted))[-PICTURE_SIDE:]
    tiles = (pixels[:, left : left + PICTURE_SIDE] for left in
                                (0, PICTURE_SIDE + 2, 2 * (PICTURE_SIDE + 2)))  # fmt: skip
    assert [[(tile == colour).all(axis=-1).any() for colour in (RIGHT, WRONG)] for tile in tiles] == [
        [False, False], [True, True], [True, False],
    ]  # fmt: skip


def test_images_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="must have the kind that the segmenter was trained with, instances"):
        evaluate_segmenter(separated(), data_of([cells(seed) for seed in range(6)]))


def test_images_of_another_range_of_values_are_refused():
    data = data_of([cells(seed) for seed in range(6)])
    data.setup("fit")
    data.images.values = PixelValues("uint16", 0, 4095)
    message = r"segmenter was trained on numbers of 0 to 255 as -1 to 1, and .* 0 to 4095; leave data.value_range out"
    with pytest.raises(ValueError, match=message):
        evaluate_segmenter(binary(), data)
    stub = binary()
    stub.values = data.values
    assert evaluate_segmenter(stub, data).figures["dice_images"].value == 1


def test_stretched_images_may_be_of_any_range_of_values():
    targets = Targets("instances", separate_borders=False)
    data = SegmentationDataModule(Labels([cells(seed) for seed in range(6)]), targets, window_size=16, num_val=NUM_VAL,
                                  stretch=True)  # fmt: skip
    data.setup("fit")
    data.images.values = PixelValues("uint16", 0, 4095)
    stub = Stub(lambda labels: foreground(np.zeros(labels.shape)))
    stub.stretch = True
    assert evaluate_segmenter(stub, data).figures["dice_images"].value < NEAR_ONE


def test_the_worst_images_are_shown_by_the_chosen_channels():
    class FiveChannels(Labels):
        def __getitem__(self, index):
            labels = torch.from_numpy(self.labels[index]).to(torch.uint8)
            levels = [torch.full_like(labels, level) for level in (50, 100, 150, 200)]
            return {"image": torch.stack([labels, *levels]), "label": self.labels[index]}

    targets = Targets("instances", separate_borders=False)
    data = SegmentationDataModule(
        FiveChannels([cells(seed) for seed in range(6)]), targets, window_size=16, num_val=NUM_VAL
    )
    data.setup("fit")
    data.images.values = PixelValues(shown=(4, 2, 1))
    stub = binary()
    stub.unet = SimpleNamespace(in_channels=5)
    result = evaluate_segmenter(stub, data)
    picture = next(one for section in result.sections for one in section.pictures if one.key == "worst_0")
    assert picture.image.getpixel((PICTURE_SIDE // 2, PICTURE_SIDE // 2)) == (200, 100, 50)


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(0).random(40)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert interval_of_mean(values) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert interval(lambda sums: sums, np.ones(1)) is None  # of one image
