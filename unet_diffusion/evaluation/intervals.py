"""Intervals of figures over images: the bootstrap, which draws as many images again and again."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]  # numbers

NUM_RESAMPLES = 1000
BOUNDS = (0.025, 0.975)  # of an interval of 95 %
FEW_IMAGES = 20  # with fewer an interval of the bootstrap is too narrow


def interval(score: Callable[[Values], Values], counts: Values) -> tuple[float, float] | None:
    """The 95 % interval of a score of all images (percentile bootstrap, Efron & Tibshirani 1993, section 13.3).

    Args:
        score: From the sums of the counts over images, (R, ...), to the score of each, (R,).
        counts: What is counted in each image, (N, ...).

    Returns:
        Its bounds; None: there are fewer than two images, or no score.
    """
    num_images = len(counts)
    if num_images < 2:
        return None
    shares = np.full(num_images, 1 / num_images)
    # How often each image is drawn; the same draws for all scores of the same images.
    draws = np.random.default_rng(0).multinomial(num_images, shares, size=NUM_RESAMPLES)
    sums = draws @ counts.reshape(num_images, -1).astype(float)
    scores = score(sums.reshape(NUM_RESAMPLES, *counts.shape[1:]))
    scores = scores[np.isfinite(scores)]
    return tuple(np.quantile(scores, BOUNDS).tolist()) if len(scores) else None


def mean(values: Values) -> float:
    """The mean of the values of images, (N,), without those that are NaN; NaN if all are."""
    return float(mean_of_sums(as_sums(values).sum(axis=0)))


def interval_of_mean(values: Values) -> tuple[float, float] | None:
    """The 95 % interval of the mean of the values of images, (N,), without those that are NaN."""
    return interval(mean_of_sums, as_sums(values))


def as_sums(values: Values) -> Values:
    """Values, (...), as counts that add up, (..., 2): the value and 1, or zeros for NaN."""
    return np.stack([np.nan_to_num(values), np.isfinite(values)], axis=-1)


def mean_of_sums(sums: Values) -> Values:
    """The means of sums of `as_sums`, (..., 2) -> (...); NaN where there was no value."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)
