"""The training images nearest to drawn ones, in pixels, beside how near held-out images come to the training images."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.evaluation.memorisation import pixels_of
from unet_diffusion.evaluation.selections import of_data, of_images, some_of
from unet_diffusion.explore.views import in_rows

NUM_NEAREST = 3  # below each image
MOST_SEARCHED = 20_000  # training images, so that the search takes seconds
MOST_HELD_OUT = 200  # images that say which distance is usual


@dataclass(frozen=True)
class NearestImages:
    """Drawn images above their nearest training images.

    Args:
        picture: The picture of them.
        words: What the distances are, and what is usual.
    """

    picture: Image.Image
    words: str


def nearest_images(images: Tensor, data: ImageDataModule) -> NearestImages:
    """The training images nearest to images by the distance of their pixels, averaged down to at most 32 x 32.

    Args:
        images: The images, (N, C, H, W) in about [-1, 1]; other sizes than the data's are scaled.
        data: The data, set up.

    Raises:
        ValueError: If the data have no images to compare with.
    """
    train, held_out = of_data(data)
    searched = some_of(train, MOST_SEARCHED)
    if data.horizontal_flip:
        searched = searched.with_mirrored()
    if len(searched) < NUM_NEAREST:
        raise ValueError(f"there must be {NUM_NEAREST} training images to compare with, got {len(searched)}")
    images = images.clamp(-1, 1)
    if images.shape[-2:] != searched.image_shape[1:]:
        images = interpolate(images, searched.image_shape[1:], mode="bilinear", antialias=True)
    points = pixels_of(searched)
    found = torch.cdist(pixels_of(of_images(images)), points).topk(NUM_NEAREST, largest=False)
    rows = {"drawn": images}
    for number, column in enumerate(found.indices.T, start=1):
        rows["nearest" if number == 1 else f"nearest but {number - 1}"] = searched.take(column)
    distances = ", ".join(f"{distance:.2f}" for distance in found.values[:, 0].tolist())
    of = f"{len(searched)} of {len(train)}" if len(searched) < len(train) else f"all {len(searched)}"
    words = f"Distance to the nearest of {of} training images: {distances}."
    if len(held_out):
        usual = torch.cdist(pixels_of(some_of(held_out, MOST_HELD_OUT)), points).amin(1)
        low, middle = usual.quantile(0.05), usual.median()
        words += (
            f" Held-out images, which were not trained on, come as near as {middle:.2f} (median), and one in twenty "
            f"nearer than {low:.2f}. Drawn images that are much nearer than that are likely to be remembered."
        )
    return NearestImages(in_rows(rows), words)
