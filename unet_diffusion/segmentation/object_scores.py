"""Scores of objects, each of which is found or not (Data Science Bowl 2018): instance numbers, (H, W) numpy arrays."""

from collections.abc import Sequence

import numpy as np
import scipy
from numpy.typing import NDArray

from unet_diffusion.segmentation.scores import Labels, check_labels, contingency


def average_precision(truth: Labels, prediction: Labels, threshold: float) -> float:
    """Return TP / (TP + FP + FN) of objects; 1 if neither image has objects.

    The Data Science Bowl 2018 and StarDist call it average precision, although it is no area under a curve. Objects are
    matched one to one at IoU >= threshold, as many as possible; among such matchings, one with the greatest sum of IoU
    is taken. Above a threshold of 0.5 there is a single matching.

    Args:
        truth: True instance numbers, 0 for background.
        prediction: Predicted instance numbers.
        threshold: Least IoU of a match, in (0, 1].

    Raises:
        ValueError: If the shapes differ, labels are not integers of 0 or more, or a threshold is out of its range.
    """
    return average_precisions(truth, prediction, [threshold])[0]


def average_precisions(truth: Labels, prediction: Labels, thresholds: Sequence[float]) -> list[float]:
    """Return `average_precision` at each of several thresholds, for which objects are overlaid once.

    Args:
        truth: True instance numbers, 0 for background.
        prediction: Predicted instance numbers.
        thresholds: Least IoU of a match, each in (0, 1].

    Raises:
        ValueError: If the shapes differ, labels are not integers of 0 or more, or a threshold is out of its range.
    """
    ious = object_ious(truth, prediction)
    counts = [_matched(ious, threshold) for threshold in thresholds]
    return [matched[0] / sum(matched) if any(matched) else 1.0 for matched in counts]


def object_ious(truth: Labels, prediction: Labels) -> NDArray[np.float64]:
    """Return the IoU of each object of truth with each object of the prediction, (R, C), in the order of numbers.

    Args:
        truth: True instance numbers, 0 for background.
        prediction: Predicted instance numbers.

    Raises:
        ValueError: If the shapes differ, or labels are not integers of 0 or more.
    """
    check_labels(truth, prediction)
    rows, columns, table = contingency(truth, prediction)
    of_truth, of_prediction = table.sum(axis=1)[rows > 0], table.sum(axis=0)[columns > 0]
    both = table[rows > 0][:, columns > 0].toarray()
    return both / (of_truth[:, None] + of_prediction - both)


def matched_pairs(ious: NDArray[np.float64], threshold: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the rows and the columns of the objects that are matched, (M,) each.

    Args:
        ious: IoU of each true object with each predicted one, (R, C).
        threshold: Least IoU of a match, in (0, 1].

    Raises:
        ValueError: If the threshold is out of its range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}; 0.5 is usual")
    # Without objects that match none, of which noise may have thousands; matching takes the cube of their number.
    rows, columns = (np.flatnonzero(np.any(ious >= threshold, axis=axis)) for axis in (1, 0))
    ious = ious[np.ix_(rows, columns)]
    matches = ious >= threshold
    # The sum of all IoU weighs less than a single match.
    pairs = scipy.optimize.linear_sum_assignment(matches + ious / (2 * max(1, *ious.shape)), maximize=True)
    is_match = matches[pairs]
    return rows[pairs[0][is_match]], columns[pairs[1][is_match]]


def _matched(ious: NDArray[np.float64], threshold: float) -> tuple[int, int, int]:
    """Return true positives, false positives and false negatives at IoU >= threshold."""
    true_positives = len(matched_pairs(ious, threshold)[0])
    num_truth, num_predicted = ious.shape
    return true_positives, num_predicted - true_positives, num_truth - true_positives
