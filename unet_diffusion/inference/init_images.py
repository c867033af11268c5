"""A user's image and mask, read, scaled and cropped to the size to draw in the same way as training images."""

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
class UserImage:
    """A user's image and the part of it that stays as it is.

    Args:
        pixels: The image, (1, C, H, W) in [-1, 1].
        keep_mask: True where the image stays as it is, (1, 1, H, W) bool; None: nowhere.
    """

    pixels: Tensor
    keep_mask: Tensor | None

    def pasted(self, images: Tensor) -> Tensor:
        """The images, (N, C, H, W), with the kept part of the user's image pasted in."""
        return images if self.keep_mask is None else torch.where(self.keep_mask, self.pixels, images)


def read_user_image(image: ImageLike, mask: ImageLike | None, image_shape: tuple[int, int, int]) -> UserImage:
    """A user's image and mask at the size to draw.

    Args:
        image: The image.
        mask: Mask of the size of the image; white is painted, black stays; None: there is no mask.
        image_shape: (C, H, W) of the images to draw.

    Raises:
        ValueError: If the image or the mask cannot be read, or does not fit.
    """
    pixels = _read("image", image, image_shape)
    if mask is None:
        return UserImage(pixels, None)
    keep_mask = _read("mask", mask, (1, *image_shape[1:])) < 0
    expected, got = "{}x{}".format(*size_of("image", image)), "{}x{}".format(*size_of("mask", mask))
    if got != expected:
        raise ValueError(f"mask must be as large as image, {expected}, got {got}; resize it")
    if keep_mask.all():
        name = f" {mask}" if isinstance(mask, str | os.PathLike) else " it"
        raise ValueError(f"mask must be white where the image is to be painted, and{name} has no white")
    return UserImage(pixels, keep_mask)


def size_of(name: str, image: ImageLike) -> tuple[int, int]:
    """The height and width of an image, upright.

    Args:
        name: Name of the image in errors.
        image: The image.

    Raises:
        ValueError: If the image cannot be read.
    """
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    size = _with(upright_size, image)
    if isinstance(size, str):
        raise ValueError(f"{name} {_path_of(image)}cannot be read as an image: {size}")
    return size


def read_at_its_own_size(image: ImageLike, channels: int) -> Tensor:
    """The image or its first page, upright and at its own size, (channels, H, W) uint8 or uint16.

    Args:
        image: A file, a PIL image or an array.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the image cannot be read.
    """
    check_file("image", image)
    pages = _with(lambda data: decode_pages(data, channels), image)
    if isinstance(pages, str):
        raise ValueError(f"image {_path_of(image)}cannot be read: {pages}")
    return pages[0]


def _read(name: str, image: ImageLike, shape: tuple[int, int, int]) -> Tensor:
    """The image scaled and cropped to a shape (C, H, W), as (1, C, H, W) in [-1, 1]."""
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
    """The result of a reader of files for an image, or the reason why it cannot read the image."""
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
