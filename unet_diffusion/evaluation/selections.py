"""Images that an evaluation looks at: some of a data set, or samples in a folder, read when they are asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.runtime.pictures import in_unit_range
from unet_diffusion.runtime.pixel_values import PixelValues, as_colours
from unet_diffusion.runtime.randomness import keyed_generator

BATCH = 256  # images in memory at once as float32


@dataclass(frozen=True)
class Selection:
    """Some images.

    Args:
        read: Gives the images of these numbers, float32 (N, C, H, W) in [-1, 1].
        indices: The numbers of the images, (N,) int64.
        labels: The class of each, (N,) int64; None: there are no classes.
        captions: The caption of each; None: there are no captions.
        values: Which channels pictures show.
    """

    read: Callable[[list[int]], Tensor]
    indices: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None
    values: PixelValues = field(default_factory=PixelValues)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.take([0]).shape
        return channels, height, width

    def take(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Images by their place in the selection, (n, C, H, W) float32 in [-1, 1]."""
        return self.read(self.indices[torch.as_tensor(rows)].tolist())

    def seen(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Images by their place in the selection as pictures show them, (n, C, H, W) with C of 1, 3 or 4."""
        return as_colours(self.values.seen(self.take(rows)))

    def select(self, rows: Tensor) -> "Selection":
        """Some of these images, by their place."""
        labels = None if self.labels is None else self.labels[rows]
        captions = None if self.captions is None else [self.captions[row] for row in rows.tolist()]
        return replace(self, indices=self.indices[rows], labels=labels, captions=captions)

    def shuffled(self) -> "Selection":
        """The same images in a random order, the same one every time."""
        return self.select(torch.randperm(len(self), generator=keyed_generator(len(self))))

    def with_mirrored(self) -> "Selection":
        """These images, and behind them each of them mirrored left to right."""

        def read(numbers: list[int]) -> Tensor:
            images = self.read([number if number >= 0 else -1 - number for number in numbers])
            is_mirrored = (torch.tensor(numbers) < 0)[:, None, None, None]
            return torch.where(is_mirrored, images.flip(-1), images)

        labels = None if self.labels is None else torch.cat([self.labels, self.labels])
        captions = None if self.captions is None else [*self.captions, *self.captions]
        indices = torch.cat([self.indices, -1 - self.indices])
        return Selection(read, indices, labels, captions, self.values)

    def batches(self, size: int = BATCH) -> Iterator[Tensor]:
        """All images in order, some at a time, each (n, C, H, W)."""
        for rows in torch.arange(len(self)).split(size):
            yield self.take(rows)


def of_images(
    images: Tensor,
    labels: Tensor | None = None,
    captions: list[str] | None = None,
    values: PixelValues | None = None,
) -> Selection:
    """A selection of all of these images.

    Args:
        images: The images (N, C, H, W): uint8 or uint16, or float in [-1, 1].
        labels: The class of each image, (N,) int64; None: there are no classes.
        captions: The caption of each image; None: there are no captions.
        values: Which channels pictures show; None: the first three, unless they are colours.
    """
    numbers = torch.arange(len(images))
    values = values or PixelValues()
    return Selection(lambda rows: in_unit_range(images[torch.tensor(rows)]), numbers, labels, captions, values)


def of_data(data: ImageDataModule) -> tuple[Selection, Selection]:
    """The images that a data module trains on, and those that it holds out for validation.

    Latents are shown as the images that their autoencoder makes of them.

    Args:
        data: The data, which are loaded if they are not yet.
    """
    data.setup("fit")
    batches, labels, captions = data.source.batches(data.image_set), classes_of(data), data.entries.get("captions")

    def read(numbers: list[int]) -> Tensor:
        return images_of(data, data.source.on_device(batches[numbers], None))

    whole = Selection(
        read,
        torch.arange(len(data.image_set.images)),
        labels,
        captions if isinstance(captions, list) else None,
        data.values,
    )
    return whole.select(data.train_indices), whole.select(data.val_indices)


def images_of(data: ImageDataModule, batch: dict[str, Any]) -> Tensor:
    """The images of a batch of the data, (B, C, H, W) in [-1, 1]; of latents those that their autoencoder makes."""
    return batch["images"] if data.codec is None else data.codec.decode(batch["x0"]).clamp(-1, 1)


def some_of(images: Selection, most: int) -> Selection:
    """Random images of a selection, the same ones every time; all of them if there are no more than that."""
    if len(images) <= most:
        return images
    return images.select(torch.randperm(len(images), generator=keyed_generator(most))[:most].sort().values)


def classes_of(data: ImageDataModule) -> Tensor | None:
    """The class of each image of a data module that is set up, (N,) int64; None if there are no classes."""
    labels = data.entries.get("labels")
    return labels if isinstance(labels, Tensor) and data.class_names is not None else None
