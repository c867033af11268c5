"""Objects of one size: images are scaled until their typical object has the diameter that a network is trained on.

Where images are of different magnifications, a network need not learn each object at many sizes (as Stringer et al.
2021, https://doi.org/10.1038/s41592-020-01018-x). The diameter of an object is that of a disc of its area.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

MOST_SCALING = 4.0  # and its inverse: beyond, an image has too few pixels, or too many


def median_diameter(instances: NDArray[np.int32]) -> float | None:
    """Return the median diameter of objects in pixels; None if there is no object.

    Args:
        instances: The number of the object at each pixel, (H, W); 0 is background.
    """
    areas = np.bincount(instances.ravel())[1:]
    return float(np.median(2 * np.sqrt(areas[areas > 0] / np.pi))) if areas.any() else None


def scale_to(wanted: float, diameter: float | None) -> float:
    """Return the factor for height and width that gives objects a wanted diameter, from 1/4 to 4; 1 without objects.

    Args:
        wanted: The wanted diameter in pixels.
        diameter: The diameter that they have; None: there are none.
    """
    return 1.0 if diameter is None else min(max(wanted / diameter, 1 / MOST_SCALING), MOST_SCALING)


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return height and width, at least 1, of a scaled image."""
    height, width = (max(round(side * factor), 1) for side in size)
    return height, width


def scaled_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image or maps of another size, (C, H, W), of the same type; whole numbers are rounded.

    Args:
        image: (C, H, W), numbers of any type.
        size: The new height and width.
    """
    if tuple(image.shape[1:]) == size:
        return image
    scaled = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)[0]
    return scaled if image.is_floating_point() else scaled.round().to(image.dtype)


def scaled_labels(labels: NDArray[np.int32], size: tuple[int, int]) -> NDArray[np.int32]:
    """Return a label image of another size, (H, W), whose numbers are those of the nearest pixels."""
    as_maps = torch.from_numpy(labels)[None, None].double()  # which holds every int32
    return F.interpolate(as_maps, size=size, mode="nearest-exact")[0, 0].numpy().astype(labels.dtype)
