"""The files that images of a model are written to: PNG, or TIFF where PNG would hold less than the images were read of.

PNG holds 1, 3 or 4 channels of 8 bits. Other images become TIFF of the type and the range of those that the model was
trained on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.runtime import pictures
from unet_diffusion.runtime.pixel_values import OF_COLOURS, PixelValues
from unet_diffusion.runtime.tiff_files import read_tiff, write_tiff


@dataclass(frozen=True)
class NumberedImages:
    """Files 000000.png and so on, or 000000.tif.

    Args:
        values: What the numbers in files mean.
        channels: The number of channels of the images.
    """

    values: PixelValues
    channels: int

    @property
    def are_png(self) -> bool:
        """Whether the files are PNG."""
        return self.values.fit_png(self.channels)

    def name(self, index: int) -> str:
        """The name of the file of image `index`.

        Args:
            index: The number of the image, from 0.
        """
        return f"{index:06d}{'.png' if self.are_png else '.tif'}"

    def save(self, images: Tensor, folder: Path, *, indices: Sequence[int], overwrite: bool = False) -> list[Path]:
        """Write images, and return the paths of the files; a file appears whole or not at all.

        Args:
            images: Images, (N, C, H, W) in about [-1, 1]; what is beyond is clipped.
            folder: Folder to write to; it is created if it does not exist.
            indices: N numbers for the file names.
            overwrite: Whether files that exist are replaced.

        Raises:
            FileExistsError: If a file exists and may not be replaced; nothing is written then.
            ValueError: If there are not N indices.
        """
        if self.are_png:
            return pictures.save_images(images, folder, indices=indices, overwrite=overwrite)
        paths = pictures.free_paths(folder, [self.name(index) for index in indices], len(images), overwrite)
        are_colours = self.values.shown is None and self.channels in OF_COLOURS
        for numbers, path in zip(self.values.numbers(images), paths, strict=True):
            write_tiff(numbers, path, are_colours=are_colours)
        return paths

    def pixels(self, path: Path) -> Tensor:
        """The image in a file, (C, H, W): uint8 of PNG, and otherwise float32 in [-1, 1].

        Args:
            path: The file.
        """
        if self.are_png:
            from torchvision.transforms.functional import pil_to_tensor

            with Image.open(path, formats=["PNG"]) as image:
                return pil_to_tensor(image)
        return self.values.unit_range(read_tiff(path))

    def read(self, paths: Iterable[Path]) -> Tensor:
        """The images in files, (N, C, H, W) float32 in [-1, 1]: the inverse of `save`.

        Args:
            paths: The files.
        """
        return pictures.in_unit_range(torch.stack([self.pixels(path) for path in paths]))
