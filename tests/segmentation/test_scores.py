"""Scores agree with scikit-image and scikit-learn, with counting by hand, and with closed forms."""

import itertools
from dataclasses import asdict

import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import adapted_rand_error, variation_of_information
from sklearn.metrics import f1_score, jaccard_score, normalized_mutual_info_score

from unet_diffusion.segmentation.object_scores import (
    average_precision,
    average_precisions,
)
from unet_diffusion.segmentation.scores import (
    NEIGHBOURS,
    SIMPLE_POINTS,
    THRESHOLDS,
    dice,
    iou,
    membrane_scores,
    pixel_error,
    rand_error,
    thin_borders,
    v_info,
    v_rand,
    warped_truth,
    warping_error,
)

SEEDS = range(5)
EIGHT = np.ones((3, 3))  # scipy's structure for 8-connectivity; its default is 4
ROUNDING = 1e-12  # of sums in float64


def random_labels(seed: int, num_labels: int = 5, size: tuple[int, int] = (12, 15)) -> np.ndarray:
    """From 0 to num_labels - 1, in a draw for each pixel: pairs of segments overlap in every way."""
    return np.random.default_rng(seed).integers(num_labels, size=size)


def random_masks(seed: int, size: tuple[int, int] = (24, 30)) -> tuple[np.ndarray, np.ndarray]:
    """Blobs with holes, and the same with every twentieth pixel or so flipped."""
    rng = np.random.default_rng(seed)
    truth = ndimage.gaussian_filter(rng.random(size), 1) > 0.5
    return truth, truth ^ ndimage.binary_dilation(rng.random(size) < 0.03)


def two_cells(membrane: int = 10, width: int = 1, size: int = 21) -> np.ndarray:
    """A vertical membrane, that many pixels wide from that column, between two cells."""
    mask = np.ones((size, size), dtype=bool)
    mask[:, membrane : membrane + width] = False
    return mask


def num_components(mask: np.ndarray) -> tuple[int, int]:
    """4-connected components of cell and 8-connected ones of membrane, outside the image included."""
    return ndimage.label(mask)[1], ndimage.label(~np.pad(mask, 1), EIGHT)[1]


# Masks


def test_pixel_error_is_the_share_of_classes_that_differ():
    assert pixel_error(np.array([[0, 1, 2, 1]]), np.array([[0, 2, 2, 0]], dtype=np.uint8)) == 0.5


def test_pixel_error_of_masks_is_the_share_that_differs():
    assert pixel_error(np.array([[True, False, True, True]]), np.array([[True, False, True, False]])) == 0.25


@pytest.mark.parametrize("seed", SEEDS)
def test_dice_is_the_f1_score_of_scikit_learn(seed):
    truth, prediction = random_masks(seed)
    assert dice(truth, prediction) == pytest.approx(f1_score(truth.ravel(), prediction.ravel()), abs=ROUNDING)


@pytest.mark.parametrize("seed", SEEDS)
def test_iou_is_the_jaccard_score_of_scikit_learn(seed):
    truth, prediction = random_masks(seed)
    assert iou(truth, prediction) == pytest.approx(jaccard_score(truth.ravel(), prediction.ravel()), abs=ROUNDING)


@pytest.mark.parametrize("score", [dice, iou])
def test_two_empty_masks_are_equal(score):
    empty = np.zeros((3, 4), dtype=bool)
    assert score(empty, empty) == 1


@pytest.mark.parametrize("score", [dice, iou])
def test_masks_apart_score_zero(score):
    assert score(np.array([[True, False]]), np.array([[False, True]])) == 0


# Segments


@pytest.mark.parametrize("seed", SEEDS)
def test_rand_error_without_zeros_is_that_of_scikit_image(seed):
    truth, segments = random_labels(seed), random_labels(seed + 100) + 1
    assert rand_error(truth, segments) == pytest.approx(adapted_rand_error(truth, segments)[0], abs=ROUNDING)


@pytest.mark.parametrize("seed", SEEDS)
def test_rand_error_counts_pairs_of_pixels_and_none_with_a_zero(seed):
    truth, segments = random_labels(seed, 3, (4, 5)), random_labels(seed + 100, 3, (4, 5))
    in_truth, in_segments = [], []
    for (t, s), (u, v) in itertools.combinations(zip(truth.ravel(), segments.ravel(), strict=True), 2):
        if t and u:
            in_truth.append(t == u)
            in_segments.append(s == v != 0)
    expected = 1 - f1_score(in_truth, in_segments)
    assert rand_error(truth, segments) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("seed", SEEDS)
def test_v_rand_counts_ordered_pairs_of_pixels_with_themselves(seed):
    truth, segments = random_labels(seed, 3, (4, 5)), random_labels(seed + 100, 3, (4, 5)) + 1
    t, s = truth[truth > 0], segments[truth > 0]
    same_truth, same_segment = t[:, None] == t, s[:, None] == s
    expected = f1_score(same_truth.ravel(), same_segment.ravel())
    assert v_rand(truth, segments) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("seed", SEEDS)
def test_v_info_is_the_normalised_mutual_information_of_scikit_learn(seed):
    truth, segments = random_labels(seed), random_labels(seed + 100) + 1
    expected = normalized_mutual_info_score(truth[truth > 0], segments[truth > 0], average_method="arithmetic")
    assert v_info(truth, segments) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("seed", SEEDS)
def test_v_info_follows_from_the_conditional_entropies_of_scikit_image(seed):
    truth, segments = random_labels(seed), random_labels(seed + 100) + 1
    t, s = truth[truth > 0], segments[truth > 0]
    nothing = np.ones_like(t)
    entropies = sum(variation_of_information(nothing, t)) + sum(variation_of_information(nothing, s))
    expected = 1 - sum(variation_of_information(t, s)) / entropies
    assert v_info(truth, segments) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize(("score", "best"), [(rand_error, 0), (v_rand, 1), (v_info, 1)])
def test_segments_equal_to_the_truth_are_best(score, best):
    labels = random_labels(0)
    assert score(labels, labels) == pytest.approx(best, abs=ROUNDING)


@pytest.mark.parametrize(("score", "best"), [(rand_error, 0), (v_rand, 1), (v_info, 1)])
def test_one_segment_in_both_is_best(score, best):
    one = np.ones((3, 4), dtype=int)
    assert score(one, one) == best


@pytest.mark.parametrize("score", [rand_error, v_rand, v_info])
def test_what_lies_on_zeros_of_the_truth_does_not_count(score):
    truth, segments = random_labels(0), random_labels(1)
    others = np.where(truth > 0, segments, random_labels(2, 9))
    assert score(truth, others) == score(truth, segments)


@pytest.mark.parametrize("score", [rand_error, v_rand, v_info])
def test_each_zero_of_the_segments_counts_as_a_segment(score):
    truth, segments = random_labels(0), random_labels(1)
    numbered = np.where(segments > 0, segments, 100 + np.arange(segments.size).reshape(segments.shape))
    assert score(truth, segments) == pytest.approx(score(truth, numbered), abs=ROUNDING)


@pytest.mark.parametrize(("score", "worst"), [(rand_error, 1), (v_rand, 2 / (12 + 1))])
def test_no_segments_at_all_score_as_pixels_apart(score, worst):
    truth = np.ones((3, 4), dtype=int)
    assert score(truth, np.zeros_like(truth)) == pytest.approx(worst, abs=ROUNDING)


@pytest.mark.parametrize("score", [rand_error, v_rand, v_info])
def test_other_numbers_for_the_same_segments_change_nothing(score):
    truth, segments = random_labels(0), random_labels(1)
    of_truth, of_segments = np.array([0, 7, 3, 60000, 1]), np.array([0, 4, 2, 1, 3])
    expected = score(truth, segments)
    assert score(of_truth[truth], of_segments[segments]) == pytest.approx(expected, abs=ROUNDING)


HALVES = np.repeat([[1, 2]], 10, axis=1)  # 1 ten times, then 2
WHOLE = np.ones_like(HALVES)


@pytest.mark.parametrize(("truth", "segments"), [(HALVES, WHOLE), (WHOLE, HALVES)])
def test_two_equal_cells_merged_and_one_cell_split_have_a_v_rand_of_two_thirds(truth, segments):
    assert v_rand(truth, segments) == pytest.approx(0.5 / (0.5 * 1 + 0.5 * 0.5), abs=ROUNDING)


@pytest.mark.parametrize(("truth", "segments"), [(HALVES, WHOLE), (WHOLE, HALVES)])
def test_two_equal_cells_merged_and_one_cell_split_share_no_information(truth, segments):
    assert v_info(truth, segments) == pytest.approx(0, abs=ROUNDING)


def test_two_equal_cells_merged_have_the_rand_error_of_their_pairs():
    assert rand_error(HALVES, WHOLE) == pytest.approx(1 - 2 * 90 / (90 + 190), abs=ROUNDING)


def test_four_equal_cells_merged_in_twos_have_a_v_info_of_two_thirds():
    quarters = np.repeat([[1, 2, 3, 4]], 5, axis=1)
    assert v_info(quarters, HALVES) == pytest.approx(2 / 3, abs=ROUNDING)


def test_pixels_all_apart_in_both_have_no_rand_error():
    assert rand_error(np.array([[1, 2, 3]]), np.array([[3, 0, 0]])) == 0


# Borders


@pytest.mark.parametrize("width", [1, 3, 7])
def test_thinned_segments_have_no_border(width):
    assert thin_borders(ndimage.label(two_cells(width=width))[0]).all()


def test_thinning_keeps_what_is_a_segment():
    segments = random_labels(0)
    thinned = thin_borders(segments)
    np.testing.assert_array_equal(thinned[segments > 0], segments[segments > 0])


def test_a_border_pixel_goes_to_the_nearest_segment():
    row = np.array([5, 0, 0, 0, 0, 0, 0, 2, 0])
    expected = np.array([5, 5, 5, 5, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(thin_borders(np.tile(row, (4, 1))), np.tile(expected, (4, 1)))


@pytest.mark.parametrize("seed", SEEDS)
def test_no_other_segment_is_nearer_by_a_pixel(seed):
    segments = ndimage.label(random_masks(seed, (60, 60))[0])[0]
    distances = np.stack([ndimage.distance_transform_edt(segments != n) for n in range(1, segments.max() + 1)])
    chosen = np.take_along_axis(distances, thin_borders(segments)[None] - 1, axis=0)[0]
    assert (chosen - distances.min(axis=0)).max() < 1


def test_no_segments_stay_none():
    assert not thin_borders(np.zeros((5, 6), dtype=np.int32)).any()


def test_the_input_is_not_written_to():
    segments = np.zeros((5, 6), dtype=np.int32)
    thin_borders(segments)[:] = 1
    assert not segments.any()


def test_thinning_keeps_the_type_of_labels():
    assert thin_borders(np.array([[0, 60000]], dtype=np.uint16)).dtype == np.uint16


# Topology


def test_simple_points_are_those_of_counting_components():
    for code, is_simple in enumerate(SIMPLE_POINTS):
        patch = np.zeros((3, 3), dtype=bool)
        for bit, (row, column) in enumerate(NEIGHBOURS):
            patch[1 + row, 1 + column] = code >> bit & 1
        ring = EIGHT.astype(bool)
        ring[1, 1] = False
        cells = ndimage.label(patch)[0]
        beside = set(cells[[0, 1, 1, 2], [1, 0, 2, 1]]) - {0}
        membranes = ndimage.label(~patch & ring, EIGHT)[1]
        assert is_simple == (len(beside) == 1 and membranes == 1), f"{code:08b}"


@pytest.mark.parametrize("seed", SEEDS)
def test_warping_keeps_the_number_of_cells_and_of_holes(seed):
    truth, prediction = random_masks(seed)
    assert num_components(warped_truth(truth, prediction)) == num_components(truth)


@pytest.mark.parametrize("seed", SEEDS)
def test_warping_changes_only_what_differs(seed):
    truth, prediction = random_masks(seed)
    warped = warped_truth(truth, prediction)
    assert ((warped == prediction) | (warped == truth)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_no_pixel_is_left_that_could_be_flipped(seed):
    truth, prediction = random_masks(seed)
    warped = warped_truth(truth, prediction)
    for pixel in zip(*np.nonzero(warped != prediction), strict=True):
        flipped = warped.copy()
        flipped[pixel] ^= True
        assert num_components(flipped) != num_components(warped)


def test_the_truth_is_not_written_to():
    truth, prediction = random_masks(0)
    before = truth.copy()
    warping_error(truth, prediction)
    np.testing.assert_array_equal(truth, before)


def test_an_equal_mask_has_no_warping_error():
    truth, _ = random_masks(0)
    assert warping_error(truth, truth) == 0


@pytest.mark.parametrize(("membrane", "width"), [(11, 1), (9, 1), (8, 5), (10, 6)])
def test_a_membrane_moved_or_widened_has_no_warping_error(membrane, width):
    assert warping_error(two_cells(), two_cells(membrane, width)) == 0


def test_a_membrane_clear_of_that_of_the_truth_is_a_merger_and_a_split():
    truth = two_cells(10)
    left = warped_truth(truth, two_cells(14)) != two_cells(14)
    assert left.sum(axis=0).tolist() == [0] * 10 + [21, 0, 0, 0, 1] + [0] * 6


@pytest.mark.parametrize("width", [1, 3, 4])
@pytest.mark.parametrize("row", [0, 7, 20])
def test_a_gap_in_a_membrane_leaves_one_pixel(row, width):
    truth = two_cells(width=width)
    prediction = truth.copy()
    prediction[row] = True
    assert warping_error(truth, prediction) == pytest.approx(1 / truth.size, abs=ROUNDING)


def test_a_cell_split_by_a_line_leaves_one_pixel_of_it():
    truth = np.zeros((9, 9), dtype=bool)
    truth[1:-1, 1:-1] = True
    prediction = truth.copy()
    prediction[:, 4] = False
    assert warping_error(truth, prediction) == pytest.approx(1 / truth.size, abs=ROUNDING)


@pytest.mark.parametrize("side", [1, 3])
def test_a_hole_is_left_whole(side):
    truth = np.ones((9, 9), dtype=bool)
    prediction = truth.copy()
    prediction[3 : 3 + side, 3 : 3 + side] = False
    assert warping_error(truth, prediction) == pytest.approx(side**2 / truth.size, abs=ROUNDING)


@pytest.mark.parametrize("side", [1, 3])
def test_a_speck_is_left_whole(side):
    truth = np.zeros((9, 9), dtype=bool)
    prediction = truth.copy()
    prediction[3 : 3 + side, 3 : 3 + side] = True
    assert warping_error(truth, prediction) == pytest.approx(side**2 / truth.size, abs=ROUNDING)


def test_a_notch_in_the_border_of_the_image_is_no_hole():
    truth = np.ones((9, 9), dtype=bool)
    prediction = truth.copy()
    prediction[0:3, 4] = False
    assert warping_error(truth, prediction) == 0


# Membranes


def scores_of_one(truth, probability, **options):
    return membrane_scores([truth], [probability], **options)


def test_a_sure_and_right_probability_has_the_best_scores():
    truth = two_cells()
    scores = scores_of_one(truth, truth.astype(np.float32))
    expected = {
        "pixel_error": 0,
        "challenge_pixel_error": 0,
        "rand_error": 0,
        "v_rand": 1,
        "v_info": 1,
        "warping_error": 0,
    }
    assert asdict(scores) == pytest.approx(expected, abs=ROUNDING)


def faint_membrane() -> tuple[np.ndarray, np.ndarray]:
    """Two cells whose membrane is seen at thresholds of 0.7 and more, three pixels wide, and not at 0.5."""
    return two_cells(), np.where(two_cells(9, width=3), 0.95, 0.65)


@pytest.mark.parametrize(("name", "best"), [("rand_error", 0), ("v_rand", 1), ("v_info", 1), ("warping_error", 0)])
def test_scores_are_the_best_over_the_thresholds(name, best):
    assert getattr(scores_of_one(*faint_membrane()), name) == pytest.approx(best, abs=ROUNDING)


def test_the_pixel_error_of_the_challenge_is_that_of_the_best_f_score_of_cells():
    truth, probability = faint_membrane()
    noisy = np.random.default_rng(0).normal(probability, 0.1).clip(0, 1)
    f_scores = [f1_score(truth.ravel(), noisy.ravel() > threshold) for threshold in THRESHOLDS]
    assert scores_of_one(truth, noisy).challenge_pixel_error == pytest.approx(1 - max(f_scores))


def test_a_stack_is_scored_at_one_threshold_for_all_its_images():
    truth, probability = faint_membrane()  # whose membrane is seen at 0.7 and more
    cells = np.where(truth, 0.6, 0.05)  # and this at 0.1 to 0.5: at 0.7 all is membrane
    stack = membrane_scores([truth, truth], [probability, cells], thresholds=[0.5, 0.7])
    by_threshold = [
        np.mean([scores_of_one(truth, each, thresholds=[t]).v_rand for each in (probability, cells)])
        for t in (0.5, 0.7)
    ]
    assert stack.v_rand == pytest.approx(max(by_threshold))
    assert stack.v_rand < 1


def test_as_many_truths_as_probabilities_are_wanted():
    with pytest.raises(ValueError, match="as many truths as probabilities, and at least one, got 1 and 0"):
        membrane_scores([MASK], [])


@pytest.mark.parametrize("threshold", [0.1, 0.9])
def test_the_pixel_error_is_at_one_half_whatever_the_thresholds(threshold):
    truth = two_cells()
    assert scores_of_one(truth, np.where(truth, 0.51, 0.49), thresholds=[threshold]).pixel_error == 0


def test_a_threshold_is_that_of_the_cell():
    truth, probability = faint_membrane()
    assert scores_of_one(truth, probability, thresholds=[0.1, 0.5]).v_rand == pytest.approx(2 / 3, abs=ROUNDING)


def test_the_warping_error_of_cells_merged_everywhere_is_the_whole_membrane():
    truth, probability = faint_membrane()
    scores = scores_of_one(truth, probability, thresholds=[0.5])
    assert scores.warping_error == pytest.approx(1 / 21, abs=ROUNDING)


def test_cells_that_touch_at_a_corner_are_two():
    truth = np.kron(np.eye(2), np.ones((5, 5))) > 0
    assert scores_of_one(truth, truth.astype(float)).v_info == pytest.approx(1, abs=ROUNDING)


def test_a_probability_below_every_threshold_scores_as_no_segments():
    truth = two_cells()
    assert scores_of_one(truth, np.zeros(truth.shape)).rand_error == 1


# Objects

THRESHOLDS_OF_STARDIST = [0.5, 0.6, 0.7, 0.8, 0.9]


def objects(*lengths: int) -> np.ndarray:
    """Rows of ten pixels: object k fills the first so many of row k."""
    return (np.arange(10) < np.array(lengths)[:, None]) * np.arange(1, len(lengths) + 1)[:, None]


@pytest.mark.parametrize("threshold", THRESHOLDS_OF_STARDIST)
def test_an_object_of_just_the_iou_is_matched(threshold):
    assert average_precision(objects(10), objects(round(10 * threshold)), threshold) == 1


@pytest.mark.parametrize("threshold", THRESHOLDS_OF_STARDIST)
def test_an_object_of_less_than_the_iou_is_not_matched(threshold):
    assert average_precision(objects(10), objects(round(10 * threshold) - 1), threshold) == 0


@pytest.mark.parametrize(("threshold", "num_matched"), [(0.5, 5), (0.6, 4), (0.7, 3), (0.8, 2), (0.9, 1)])
def test_average_precision_falls_with_the_threshold(threshold, num_matched):
    truth, prediction = objects(10, 10, 10, 10, 10), objects(5, 6, 7, 8, 9)
    expected = num_matched / (num_matched + 2 * (5 - num_matched))
    assert average_precision(truth, prediction, threshold) == pytest.approx(expected, abs=ROUNDING)


def test_several_thresholds_at_once_are_the_thresholds_one_by_one():
    truth, prediction = (np.random.default_rng(seed).integers(0, 4, (12, 12)) for seed in range(2))
    thresholds = [0.05, 0.1, 0.2]
    one_by_one = [average_precision(truth, prediction, threshold) for threshold in thresholds]
    assert average_precisions(truth, prediction, thresholds) == one_by_one
    assert len(set(one_by_one)) > 1


@pytest.mark.parametrize("threshold", THRESHOLDS_OF_STARDIST)
def test_average_precision_is_symmetric(threshold):
    truth, prediction = objects(10, 10, 10, 0, 8), objects(5, 7, 9, 4, 0)
    assert average_precision(truth, prediction, threshold) == average_precision(prediction, truth, threshold)


def test_other_numbers_for_the_same_objects_change_nothing_in_the_matching():
    truth, prediction = objects(10, 10, 10, 0, 8), objects(5, 7, 9, 4, 0)
    renumbered = np.array([0, 4, 60000, 2, 9, 1])
    assert average_precision(truth, renumbered[prediction], 0.6) == average_precision(truth, prediction, 0.6)


def test_as_many_objects_as_possible_are_matched():
    truth = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 0, 0]])
    prediction = np.array([[7, 5, 5, 5, 5, 5, 5, 5, 0, 7]])
    # 1 and 5 overlap most (5/8), but then 2 and 7 are left without a match.
    assert average_precision(truth, prediction, 0.1) == 1


def test_a_merged_object_matches_one_at_most():
    truth = np.array([[1, 1, 1, 2, 2, 2]])
    assert average_precision(truth, np.ones_like(truth), 0.5) == 1 / 2


def test_no_objects_in_either_are_equal():
    nothing = np.zeros((3, 4), dtype=np.int32)
    assert average_precision(nothing, nothing, 0.5) == 1


@pytest.mark.parametrize(("truth", "prediction"), [(objects(10), objects(0)), (objects(0), objects(10))])
def test_objects_in_one_only_score_zero(truth, prediction):
    assert average_precision(truth, prediction, 0.5) == 0


def test_images_full_of_objects_have_no_background_to_match():
    full = np.array([[1, 1, 2, 2]])
    assert average_precision(full, full, 1.0) == 1


# Errors

MASK, LABELS = np.ones((3, 4), dtype=bool), np.ones((3, 4), dtype=int)
AT_HALF = {"threshold": 0.5}
ALL = [
    (pixel_error, MASK, {}),
    (pixel_error, LABELS, {}),
    (dice, MASK, {}),
    (iou, MASK, {}),
    (warping_error, MASK, {}),
    (scores_of_one, MASK, {}),
    (rand_error, LABELS, {}),
    (v_rand, LABELS, {}),
    (v_info, LABELS, {}),
    (average_precision, LABELS, AT_HALF),
]


@pytest.mark.parametrize(("score", "image", "options"), ALL)
def test_images_of_two_shapes_are_refused(score, image, options):
    with pytest.raises(ValueError, match=r"must have one shape .* got \(3, 4\) and \(2, 4\)"):
        score(image, image[1:], **options)


@pytest.mark.parametrize(("score", "image", "options"), ALL)
def test_stacks_of_images_are_refused(score, image, options):
    with pytest.raises(ValueError, match=r"must have one shape \(H, W\)"):
        score(image[None], image[None], **options)


@pytest.mark.parametrize("score", [dice, iou, warping_error, scores_of_one])
def test_masks_that_are_not_bool_are_refused(score):
    with pytest.raises(ValueError, match="masks must be bool, got uint8"):
        score(MASK.astype(np.uint8) * 255, MASK)


def test_a_mask_against_classes_is_refused():
    with pytest.raises(ValueError, match="got bool and uint8"):
        pixel_error(MASK, MASK.astype(np.uint8) * 255)


@pytest.mark.parametrize("score", [rand_error, v_rand, v_info])
@pytest.mark.parametrize(
    ("image", "message"),
    [(MASK, "integers, got bool"), (LABELS * 1.0, "integers, got float64"), (LABELS - 2, "0 or more, got -1")],
)
def test_what_are_no_labels_is_refused(score, image, message):
    with pytest.raises(ValueError, match=f"labels must be {message}"):
        score(LABELS, image)


@pytest.mark.parametrize("score", [rand_error, v_rand, v_info])
def test_a_truth_without_segments_is_refused(score):
    with pytest.raises(ValueError, match="truth must have at least one segment"):
        score(LABELS * 0, LABELS)


@pytest.mark.parametrize("threshold", [0, 1.1, -0.5, float("nan")])
def test_a_threshold_of_iou_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be above 0 and at most 1"):
        average_precision(LABELS, LABELS, threshold)


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_a_probability_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"cell_probability must be in \[0, 1\], got"):
        scores_of_one(MASK, np.where(np.arange(4) == 2, value, 0.5 * MASK))


@pytest.mark.parametrize(("thresholds", "got"), [([], "none"), ([0.5, 50], "0.5 to 50.0")])
def test_thresholds_of_probability_out_of_range_are_refused(thresholds, got):
    with pytest.raises(ValueError, match=rf"thresholds must be in \[0, 1\], got {got}"):
        scores_of_one(MASK, 0.5 * MASK, thresholds=thresholds)
