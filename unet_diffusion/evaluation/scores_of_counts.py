"""Scores that follow from what was counted in one image, or from sums over images; leading axes are free."""

import numpy as np

from unet_diffusion.evaluation.intervals import Values
from unet_diffusion.evaluation.segmented_images import NUM_RELIABILITY_BINS

CERTAIN = 0.5  # the foreground's probability from which its pixels are taken for foreground


def dice_of(mask: Values) -> Values:
    """The mean Dice score of the classes that occur, but for the background: (..., M, 3) -> (...); NaN without any.

    Args:
        mask: The number of pixels of each class that are right, of the truth, and of the prediction.
    """
    return _mean_over_classes(dice_by_class(mask)[..., 1:])


def iou_of(mask: Values) -> Values:
    """The mean IoU of the classes that occur, but for the background: (..., M, 3) -> (...); NaN without any."""
    return _mean_over_classes(iou_by_class(mask)[..., 1:])


def mean_iou_of(mask: Values) -> Values:
    """The mean IoU of all classes that occur, of two that of the second: (..., M, 3) -> (...); NaN without any."""
    return iou_of(mask) if np.shape(mask)[-2] == 2 else _mean_over_classes(iou_by_class(mask))


def dice_by_class(mask: Values) -> Values:
    """The Dice score of each class, (..., M, 3) -> (..., M); NaN where neither truth nor prediction has it."""
    right, truth, predicted = np.moveaxis(np.asarray(mask, dtype=float), -1, 0)
    return _ratio(2 * right, truth + predicted)


def iou_by_class(mask: Values) -> Values:
    """The IoU of each class, (..., M, 3) -> (..., M); NaN where neither truth nor prediction has it."""
    right, truth, predicted = np.moveaxis(np.asarray(mask, dtype=float), -1, 0)
    return _ratio(right, truth + predicted - right)


def pixel_error_of(mask: Values) -> Values:
    """The share of pixels whose class is wrong, (..., M, 3) -> (...)."""
    sums = np.asarray(mask, dtype=float).sum(axis=-2)
    return 1 - _ratio(sums[..., 0], sums[..., 1])


def average_precision_of(objects: Values) -> Values:
    """TP / (TP + FP + FN) of objects, (..., 3) -> (...); 1 if there are none."""
    return _ratio(objects[..., 0], objects.sum(axis=-1), empty=1.0)


def mean_average_precision_of(objects: Values) -> Values:
    """The mean of `average_precision_of` over the least IoUs of a match, (..., T, 3) -> (...)."""
    return average_precision_of(objects).mean(axis=-1)


def f1_of(objects: Values) -> Values:
    """2 TP / (2 TP + FP + FN) of objects, (..., 3) -> (...); 1 if there are none."""
    return _ratio(2 * objects[..., 0], objects.sum(axis=-1) + objects[..., 0], empty=1.0)


def challenge_pixel_error_of(foreground: Values) -> Values:
    """1 - the best F-score of pixels over all thresholds, as the ISBI 2012 challenge had it, (..., B, 3) -> (...).

    Args:
        foreground: The number of pixels in each bin of the foreground's probability, the sum of that probability, and
            the number of these pixels that are foreground.
    """
    predicted, right = (foreground[..., ::-1, column].cumsum(axis=-1) for column in (0, 2))
    return 1 - _ratio(2 * right, predicted + right[..., -1:]).max(axis=-1)


def reliability_of(bins: Values) -> tuple[Values, Values, Values]:
    """The share of pixels in each of NUM_RELIABILITY_BINS, their mean probability, and how often it came true.

    Args:
        bins: The number of pixels in each finer bin, the sum of their probability, and the number of those for which it
            came true, (..., B, 3).

    Returns:
        Arrays (..., NUM_RELIABILITY_BINS), the last two NaN for bins without pixels.
    """
    coarse = bins.reshape(*bins.shape[:-2], NUM_RELIABILITY_BINS, -1, 3).sum(axis=-2)
    pixels, probability, true = np.moveaxis(coarse, -1, 0)
    return _ratio(pixels, pixels.sum(axis=-1, keepdims=True)), _ratio(probability, pixels), _ratio(true, pixels)


def calibration_error_of(bins: Values) -> Values:
    """The expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599, eq. 3): (..., B, 3) -> (...).

    It is the mean over pixels of how far a probability is from how often it came true.
    """
    share, probability, true = reliability_of(bins)
    return np.nansum(share * np.abs(probability - true), axis=-1)


def overconfidence_of(bins: Values) -> Values:
    """By how much probabilities are too near to 0 and 1, in the mean over pixels; below 0: too near to a half."""
    share, probability, true = reliability_of(bins)
    return np.nansum(share * np.sign(probability - CERTAIN) * (probability - true), axis=-1)


def _mean_over_classes(scores: Values) -> Values:
    occurs = np.isfinite(scores)
    return _ratio(np.where(occurs, scores, 0).sum(axis=-1), occurs.sum(axis=-1))


def _ratio(part: Values, whole: Values, empty: float = np.nan) -> Values:
    part, whole = np.broadcast_arrays(np.asarray(part, dtype=float), np.asarray(whole, dtype=float))
    return np.divide(part, whole, out=np.full(part.shape, empty), where=whole > 0)
