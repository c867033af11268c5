"""From grey values of a file to the float32 in [-1, 1] that networks take."""

import numpy as np
from torch import Tensor

from unet_diffusion.runtime.pictures import in_unit_range
from unet_diffusion.runtime.pictures import scale_to_unit_range as scale_to_unit_range

# That become -1 and 1 when grey values are stretched, as in StarDist (Schmidt et al. 2018, https://arxiv.org/abs/1806.03535).
# In sparse images objects are brighter than the 99th percentile.
PERCENTILES = (1, 99.8)
LEAST_RANGE = 2 / 65535  # between the ends of floats: a level of 16 bits, as the least of whole numbers is a level


def to_float(image: Tensor, *, stretch: bool) -> Tensor:
    """An image as float32: in [-1, 1] by the range of its type, or stretched so that two percentiles become -1 and 1.

    Args:
        image: An image, uint8, uint16, or floats in about [-1, 1], (C, H, W).
        stretch: Whether grey values are stretched; values beyond the percentiles then lie beyond -1 and 1.
    """
    return in_unit_range(image) if not stretch else stretch_to_unit_range(image, percentiles(image))


def percentiles(image: Tensor) -> tuple[float, float]:
    """The two PERCENTILES of an image's grey values, over all its channels."""
    low, high = np.percentile(image.numpy(), PERCENTILES)
    return float(low), float(high)


def stretch_to_unit_range(image: Tensor, ends: tuple[float, float]) -> Tensor:
    """An image as float32, so scaled that the two ends become -1 and 1; nothing is clipped.

    Args:
        image: An image, uint8, uint16 or floats in about [-1, 1].
        ends: The two grey values.
    """
    low, high = ends
    least = LEAST_RANGE if image.is_floating_point() else 1.0
    return (image.float() - low) * (2 / max(high - low, least)) - 1
