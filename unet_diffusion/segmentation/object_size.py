"""Objects of one size: images are scaled until their typical object has the diameter that a network is trained on.

Where images are of different magnifications, a network need not learn each object at many sizes (as Stringer et al.
2021, https://doi.org/10.1038/s41592-020-01018-x). The diameter of an object is that of a disc of its area.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from unet_diffusion.runtime.messages import first_few

MOST_SCALING = 4.0  # and its inverse: beyond, an image has too few pixels, or too many
NEARLY = 0.05  # objects that are nearly of the wanted size keep it, as each scaling blurs


def median_diameter(instances: NDArray[np.int32]) -> float | None:
    """Return the median diameter of objects in pixels; None if there is no object.

    Args:
        instances: The number of the object at each pixel, (H, W); 0 is background.
    """
    areas = np.unique(instances[instances > 0], return_counts=True)[1]
    return float(np.median(2 * np.sqrt(areas / np.pi))) if len(areas) else None


def scale_to(wanted: float, diameter: float | None) -> float:
    """Return the factor for height and width that gives objects a wanted diameter, from 1/4 to 4.

    It is 1 without objects, and for objects that differ by 5 % at most.

    Args:
        wanted: The wanted diameter in pixels.
        diameter: The diameter that they have; None: there are none.
    """
    if diameter is None or abs(wanted / diameter - 1) <= NEARLY:
        return 1.0
    return min(max(wanted / diameter, 1 / MOST_SCALING), MOST_SCALING)


def to_one_size(
    image: Tensor, labels: NDArray[np.int32], instances: NDArray[np.int32], wanted: float
) -> tuple[Tensor, NDArray[np.int32]]:
    """Return a labelled image that is scaled until the median diameter of its objects is the wanted one.

    Args:
        image: The image, (C, H, W).
        labels: Its label image, (H, W).
        instances: The number of the object at each pixel, (H, W); 0 is background.
        wanted: The wanted diameter in pixels.
    """
    size = scaled_size(labels.shape, scale_to(wanted, median_diameter(instances)))
    return scaled_image(image, size), scaled_labels(labels, size)


def scales_described(factors: Mapping[str, float], wanted: float) -> str:
    """Return a line about images that were scaled, and how many would have needed more.

    Args:
        factors: The factor of each image by its name.
        wanted: The wanted diameter in pixels.
    """
    beyond = [name for name, factor in factors.items() if not 1 / MOST_SCALING < factor < MOST_SCALING]
    more = f"; {len(beyond)} would need more ({first_few(beyond)})" if beyond else ""
    least, most = min(factors.values()), max(factors.values())
    return (f"scaled: labelled images to train on, by {least:.2g} to {most:.2g}, until the median diameter of their "
            f"objects is {wanted:g} pixels{more}")  # fmt: skip


def scaled_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return height and width, at least 1, of a scaled image."""
    height, width = (max(round(side * factor), 1) for side in size)
    return height, width


def scaled_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an image or maps of another size, (C, H, W): float32, or whole numbers of the same type, rounded.

    Args:
        image: (C, H, W), float32 or whole numbers.
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
