"""The weights of pixels in the U-Net paper: for thin background between cells, and for rare classes.

Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), equation 2: w(x) = w_c(x) + w0 exp(-(d1 + d2)^2 / (2
sigma^2)), d1 and d2 the distances to the nearest and the second nearest cell.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

NEGLIGIBLE = 1e-6  # weights below this share of w0 are left out
# d1 + d2 is at least d2, so a pixel further than this from its second nearest cell has a negligible weight.
CUTOFF = math.sqrt(-2 * math.log(NEGLIGIBLE))  # in units of sigma: exp(-CUTOFF^2 / 2) = NEGLIGIBLE


def border_weights(instances: NDArray[Any], *, w0: float = 10.0, sigma: float = 5.0) -> NDArray[np.float32]:
    """Return w0 exp(-(d1 + d2)^2 / (2 sigma^2)) on the background and 0 inside cells, (H, W).

    The error is at most 1e-6 w0. Distances to a cell are computed only near it, which makes hundreds of cells fast.

    Args:
        instances: Instance numbers, one for each cell and 0 for background, (H, W).
        w0: Weight between two cells that almost touch.
        sigma: Distance over which the weight falls off, in pixels.

    Raises:
        ValueError: If the array holds no instance numbers, or w0 or sigma is out of its range.
    """
    if instances.ndim != 2 or instances.dtype.kind not in "iu" or instances.min(initial=0) < 0:
        raise ValueError(
            f"instances must be whole numbers from 0, (H, W), got {instances.dtype} {instances.shape} "
            f"from {instances.min(initial=0)}"
        )
    if not (0 <= w0 < math.inf and 0 < sigma < math.inf):  # nor NaN
        raise ValueError(f"w0 must be 0 or more and sigma above 0, both finite, got {w0} and {sigma}")
    nearest, second = _two_distances(instances, reach=math.ceil(CUTOFF * sigma))
    # The second distance is infinite where no second cell is near; the weight is then 0.
    weights = w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
    return np.where(instances == 0, weights, 0).astype(np.float32)


def class_weights(
    labels: Sequence[NDArray[Any]], num_classes: int, ignore_label: int | None = None
) -> NDArray[np.float32]:
    """Return the inverse frequency of each class over all label images, scaled to a mean of 1 over all pixels: (K,).

    A class that does not occur has weight 0.

    Args:
        labels: Class indices, (H, W) each.
        num_classes: Number of classes K.
        ignore_label: Value of pixels that do not count; None counts all pixels.

    Raises:
        ValueError: If a label that counts is not a class.
    """
    counts = np.zeros(num_classes)
    for image in labels:
        counted = image if ignore_label is None else image[image != ignore_label]
        if counted.size and not 0 <= counted.min() <= counted.max() < num_classes:
            raise ValueError(
                f"labels must be from 0 to {num_classes - 1}, got {counted.min()} to {counted.max()}; "
                "raise num_classes or set ignore_label"
            )
        counts += np.bincount(counted.ravel(), minlength=num_classes)
    occurs = counts > 0
    weights = np.zeros(num_classes)
    weights[occurs] = counts.sum() / (occurs.sum() * counts[occurs])
    return weights.astype(np.float32)


def _two_distances(instances: NDArray[Any], reach: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the distances to the nearest and second nearest cell, in pixels; infinite beyond the reach."""
    nearest = np.full(instances.shape, np.inf, dtype=np.float32)
    second = nearest.copy()
    numbers, compact = np.unique(instances, return_inverse=True)
    if 0 not in numbers:  # there is no background to weight
        return nearest, second
    compact = compact.reshape(instances.shape)  # cells numbered from 1, without gaps
    for number, box in enumerate(scipy.ndimage.find_objects(compact), start=1):
        near = tuple(
            slice(max(part.start - reach, 0), min(part.stop + reach, side))
            for part, side in zip(box, instances.shape, strict=True)
        )
        distance = scipy.ndimage.distance_transform_edt(compact[near] != number).astype(np.float32)
        second[near] = np.minimum(second[near], np.maximum(nearest[near], distance))
        nearest[near] = np.minimum(nearest[near], distance)
    return nearest, second
