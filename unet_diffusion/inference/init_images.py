"""An image that a user gives, and its mask: read, scaled and cut to the size to draw, as images are for training."""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.data.checking import decoded
from unet_diffusion.data.decoding import ImageFormat, decode_image, decode_pages, upright_size
from unet_diffusion.data.files import OneFile
from unet_diffusion.data.scaling import scale_to_unit_range
from unet_diffusion.inference.sample_options import ImageLike, check_file


@dataclass(frozen=True)
class GivenImage:
    """An image and where it is to stay as it is.

    Args:
        pixels: (1, C, H, W) in [-1, 1].
        keep_mask: (1, 1, H, W) bool, True where it is to stay; None: nowhere.
    """

    pixels: Tensor
    keep_mask: Tensor | None

    def pasted(self, images: Tensor) -> Tensor:
        """The images, (N, C, H, W), with the given image where it is to stay."""
        return images if self.keep_mask is None else torch.where(self.keep_mask, self.pixels, images)


def read_given_image(image: ImageLike, mask: ImageLike | None, image_shape: tuple[int, int, int]) -> GivenImage:
    """The image to start from, and its mask, at the size to draw.

    Args:
        image: The image.
        mask: Of the size of the image: white is painted anew, black stays; None: there is none.
        image_shape: (C, H, W) of the images to draw.

    Raises:
        ValueError: If one cannot be read, or does not fit.
    """
    pixels = _read("image", image, image_shape)
    if mask is None:
        return GivenImage(pixels, None)
    keep_mask = _read("mask", mask, (1, *image_shape[1:])) < 0
    wanted, got = ("{}x{}".format(*size_of(name, one)) for name, one in (("image", image), ("mask", mask)))
    if got != wanted:
        raise ValueError(f"mask must be as large as image, {wanted}, got {got}; resize it")
    if keep_mask.all():
        name = f" {mask}" if isinstance(mask, str | os.PathLike) else ""
        raise ValueError(f"mask must be white where the image is to be painted, and{name} has no white")
    return GivenImage(pixels, keep_mask)


def size_of(name: str, image: ImageLike) -> tuple[int, int]:
    """Height and width of an image, upright.

    Args:
        name: What it is called in an error.
        image: The image.

    Raises:
        ValueError: If it cannot be read.
    """
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    size = _with(upright_size, image)
    if isinstance(size, str):
        raise ValueError(f"{name} {_path_of(image)}cannot be read as an image: {size}")
    return size


def read_at_its_own_size(image: ImageLike, channels: int) -> Tensor:
    """The image, upright and at its own size, as uint8 or uint16 (channels, H, W); of several pages the first.

    Args:
        image: A file, a PIL image or an array.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
    """
    check_file("image", image)
    pages = _with(lambda data: decode_pages(data, channels), image)
    if isinstance(pages, str):
        raise ValueError(f"image {_path_of(image)}cannot be read: {pages}")
    return pages[0]


def _read(name: str, image: ImageLike, shape: tuple[int, int, int]) -> Tensor:
    """The image, scaled and cut to a shape (C, H, W), as (1, C, H, W) in [-1, 1]."""
    channels, height, width = shape
    if isinstance(image, Tensor):
        if image.shape != shape:
            raise ValueError(f"{name} as a tensor must have the shape {shape}, got {tuple(image.shape)}; resize it")
        return image.detach().float().cpu()[None]
    image_format = ImageFormat(height, width, channels)
    pixels = _with(lambda data: decode_image(data, image_format), image)
    if isinstance(pixels, str):
        raise ValueError(f"{name} {_path_of(image)}cannot be read as an image of the size to draw: {pixels}")
    return scale_to_unit_range(pixels[None])


def _with(read: Callable[[bytes], Any], image: Any) -> Any:
    """What a reader of files makes of an image, or why it cannot."""
    if isinstance(image, str | os.PathLike):
        file = OneFile(Path(image))
        return decoded(read, file, file.names[0])
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).save(buffer, format="PNG")
    try:
        return read(buffer.getvalue())
    except ValueError as error:
        return str(error)


def _path_of(image: Any) -> str:
    return f"{image} " if isinstance(image, str | os.PathLike) else ""
