"""Scores of whether images follow their conditions, image by image, and images to compare with, without a denoiser.

Every figure here falls if the condition is ignored: that is what the comparison with the conditions of other images
shows, see `others_of_another_kind`.
"""

from collections.abc import Sequence

import numpy as np
import skimage
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from unet_diffusion.runtime.randomness import keyed_generator

LEAST_IOU = 0.5  # of a box with that around an object that hits it


def others_of_another_kind(kinds: Tensor) -> tuple[Tensor, Tensor]:
    """The places of images, and for each that of another image, drawn at random, which is of another kind, (n,) each.

    Images without such a partner are left out: some of a kind to which more than half of the images belong.

    Args:
        kinds: The kind of each image, such as its class, (N,) int64 from 0.
    """
    order = torch.randperm(len(kinds), generator=keyed_generator(len(kinds)))
    order = order[kinds[order].argsort(stable=True)]
    others = torch.empty_like(order)
    others[order] = order.roll(-int(torch.bincount(kinds).max()))  # beyond the last of its kind
    places = torch.nonzero(kinds != kinds[others])[:, 0]
    return places, others[places]


def enlarged(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Small images at a larger size (H, W) by bicubic interpolation, (B, C, H, W) in [-1, 1]."""
    return interpolate(images, size, mode="bicubic").clamp(-1, 1)


def filled_with_mean(images: Tensor, mask: Tensor) -> Tensor:
    """Images with the mean of the rest inside the mask, channel by channel, (B, C, H, W).

    Args:
        images: Images, (B, C, H, W).
        mask: The area to fill, (B, 1, H, W) bool, which is nowhere a whole image.
    """
    rest = (~mask).expand_as(images).float()
    means = (images * rest).sum(dim=(2, 3), keepdim=True) / rest.sum(dim=(2, 3), keepdim=True)
    return torch.where(mask, means, images)


def boxes_hit(
    objects: NDArray[np.integer], boxes: Sequence[Sequence[float]] | NDArray[np.floating]
) -> NDArray[np.bool_]:
    """Whether the box around an object has an IoU of at least 0.5 with each box, (M,).

    Args:
        objects: A number for each object, 0 for the background, (H, W).
        boxes: M boxes, (left, top, right, bottom) in pixels each.
    """
    from torchvision.ops import box_iou  # torchvision takes a second to import

    around = [region.bbox for region in skimage.measure.regionprops(objects)]  # top, left, bottom, right
    if not len(boxes) or not around:
        return np.zeros(len(boxes), dtype=bool)
    sides = torch.tensor(around, dtype=torch.float64)[:, [1, 0, 3, 2]]
    ious = box_iou(torch.as_tensor(np.asarray(boxes, dtype=np.float64)), sides)
    return (ious >= LEAST_IOU).any(dim=1).numpy()
