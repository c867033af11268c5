"""The training images nearest to drawn ones, in pixels, beside how near held-out images come to the training images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.evaluation.memorisation import pixels_of
from unet_diffusion.evaluation.selections import Selection, of_data, of_images, some_of
from unet_diffusion.explore.views import in_rows

ROWS = ("nearest", "second", "third")  # below each image
MOST_SEARCHED = 20_000  # training images, so that the search takes seconds
MOST_HELD_OUT = 200  # images that say which distance is usual
BATCH = 256  # images that are read at once


@dataclass(frozen=True)
class NearestImages:
    """Drawn images above their nearest training images.

    Args:
        picture: The picture of them.
        words: What the distances are, and what is usual.
    """

    picture: Image.Image
    words: str


class TrainingPixels:
    """The training images of a run as points, and how near held-out images come to them.

    Args:
        data: The data, set up.
        progress: Called with the share of the images that has been read.

    Raises:
        ValueError: If there are fewer training images than are shown.
    """

    def __init__(self, data: ImageDataModule, progress: Callable[[float], object] = lambda share: None) -> None:
        train, held_out = of_data(data)
        self.num_train = len(train)
        images = some_of(train, MOST_SEARCHED)
        self.images = images.with_mirrored() if data.horizontal_flip else images
        if len(images) < len(ROWS):
            raise ValueError(f"there must be {len(ROWS)} training images to compare with, got {len(images)}")
        self.points = self._points(progress)
        self.usual: Tensor | None = None  # distances of held-out images
        if len(held_out):
            self.usual = torch.cdist(pixels_of(some_of(held_out, MOST_HELD_OUT)), self.points).amin(1)

    def nearest_to(self, images: Tensor) -> NearestImages:
        """The training images nearest to images by the distance of their pixels, averaged down to at most 32 x 32.

        Args:
            images: The images, (N, C, H, W) in about [-1, 1]; other sizes than the data's are scaled.
        """
        images = images.clamp(-1, 1)
        if images.shape[-2:] != self.images.image_shape[1:]:
            images = interpolate(images, self.images.image_shape[1:], mode="bilinear", antialias=True)
        nearest = torch.cdist(pixels_of(of_images(images)), self.points).topk(len(ROWS), largest=False)
        rows = {name: self.images.take(column) for name, column in zip(ROWS, nearest.indices.T, strict=True)}
        return NearestImages(in_rows({"drawn": images, **rows}), self._words(nearest.values[:, 0]))

    def _words(self, distances: Tensor) -> str:
        searched = self.images.indices[self.images.indices >= 0].unique()
        share = f"all {self.num_train}" if len(searched) == self.num_train else f"{len(searched)} of {self.num_train}"
        listed = ", ".join(f"{distance:.2f}" for distance in distances.tolist())
        words = f"Distance to the nearest of {share} training images: {listed}."
        if self.usual is None:
            return words
        low, middle = self.usual.quantile(0.05), self.usual.median()
        return (
            f"{words} Held-out images, which were not trained on, come as near as {middle:.2f} (median), and one in "
            f"twenty nearer than {low:.2f}. Drawn images that are much nearer than that are likely to be remembered."
        )

    def _points(self, progress: Callable[[float], object]) -> Tensor:
        parts = []
        for rows in torch.arange(len(self.images)).split(BATCH):
            parts.append(pixels_of(_in_memory(self.images, rows)))
            progress((int(rows[-1]) + 1) / len(self.images))
        return torch.cat(parts)


def _in_memory(images: Selection, rows: Tensor) -> Selection:
    return of_images(images.take(rows))
