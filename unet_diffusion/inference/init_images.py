"""A user's image and mask, read, scaled and cropped to the size to draw in the same way as training images."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from unet_diffusion.data.checking import decoded
from unet_diffusion.data.decoding import ImageFormat, ValueRange, check_within, decode_page, fitted_image
from unet_diffusion.data.files import OneFile
from unet_diffusion.data.items import pixels_of
from unet_diffusion.data.stored import only_image
from unet_diffusion.data.stored_image import StoredImage
from unet_diffusion.inference.sample_options import ImageLike, check_file
from unet_diffusion.runtime.pictures import in_unit_range
from unet_diffusion.runtime.pixel_values import OF_COLOURS


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


def read_user_image(
    image: ImageLike,
    mask: ImageLike | None,
    image_shape: tuple[int, int, int],
    value_range: ValueRange | None = None,
) -> UserImage:
    """A user's image and mask at the size to draw.

    Args:
        image: The image.
        mask: Mask of the size of the image; white is painted, black stays; a tensor may be bool, True where the image
            is painted; None: there is no mask.
        image_shape: (C, H, W) of the images to draw.
        value_range: The numbers of files that become -1 and 1, as in `ImageFormat`.

    Raises:
        ValueError: If the image or the mask cannot be read, or does not fit.
    """
    pixels = read_picture("image", image, image_shape, value_range)
    if mask is None:
        return UserImage(pixels, None)
    keep_mask = read_picture("mask", mask, (1, *image_shape[1:])) < 0
    expected = "{}x{}".format(*size_of("image", image, image_shape[0]))
    got = "{}x{}".format(*size_of("mask", mask, 1))
    if got != expected:
        raise ValueError(f"mask must be as large as image, {expected}, got {got}; resize it")
    if keep_mask.all():
        name = f" {mask}" if isinstance(mask, str | os.PathLike) else " it"
        raise ValueError(f"mask must be white where the image is to be painted, and{name} has no white")
    return UserImage(pixels, keep_mask)


def size_of(name: str, image: ImageLike, channels: int) -> tuple[int, int]:
    """The height and width of an image, upright.

    Args:
        name: Name of the image in errors.
        image: The image.
        channels: The number of channels that it must have, by which channels are told from images.

    Raises:
        ValueError: If the image cannot be read.
    """
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    size = _with(lambda stored: stored.size, name, image, channels, None)
    if isinstance(size, str):
        raise ValueError(f"{name} {_path_of(image)}cannot be read as an image: {size}")
    return size


def read_at_its_own_size(image: ImageLike, channels: int, value_range: ValueRange | None = None) -> Tensor:
    """The image, upright and at its own size, (channels, H, W), of the types of `decode_image`.

    Args:
        image: A file, a PIL image or an array.
        channels: As in `ImageFormat`.
        value_range: As in `ImageFormat`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the image cannot be read, or has several pages.
    """
    check_file("image", image)
    pixels = _with(lambda stored: decode_page(stored, channels, value_range), "image", image, channels, value_range)
    if isinstance(pixels, str):
        raise ValueError(f"image {_path_of(image)}cannot be read: {pixels}")
    return pixels


def check_tensor(name: str, image: Tensor, *, is_bounded: bool = True) -> None:
    """Refuse a tensor that is not in [-1, 1].

    Args:
        name: Name of the image in errors.
        image: The tensor, which is not empty.
        is_bounded: Whether values must be in [-1, 1]; stretched images go beyond.

    Raises:
        ValueError: If the tensor holds integers, or numbers below -1 or above 1.
    """
    if not image.is_floating_point():
        raise ValueError(f"{name} as a tensor must hold floats in [-1, 1], got {image.dtype}; scale it, or give an "
                         "array of 8 or 16 bits")  # fmt: skip
    low, high = (float(end) for end in image.detach().aminmax())
    limit = 1 if is_bounded else torch.finfo(torch.float32).max
    if not -limit <= low <= high <= limit:
        raise ValueError(f"{name} as a tensor must be in [-1, 1], got {low:.6g} to {high:.6g}; scale it, or clamp what "
                         "was drawn with .clamp(-1, 1)")  # fmt: skip


def read_picture(
    name: str, image: ImageLike, shape: tuple[int, int, int], value_range: ValueRange | None = None
) -> Tensor:
    """The image scaled and cropped to a shape (C, H, W), as (1, C, H, W) in [-1, 1].

    Args:
        name: Name of the image in errors.
        image: The image.
        shape: The shape.
        value_range: The numbers of files that become -1 and 1, as in `ImageFormat`; none may be beyond.

    Raises:
        ValueError: If the image cannot be read, or is too small.
    """
    channels, height, width = shape
    if isinstance(image, Tensor):
        if image.shape != shape:
            raise ValueError(f"{name} as a tensor must have the shape {shape}, got {tuple(image.shape)}; resize it")
        image = _signed(image) if name == "mask" else image
        check_tensor(name, image)
        return image.detach().float().cpu()[None]
    image_format = ImageFormat(height, width, channels, value_range=value_range)
    fitted = partial(fitted_image, image_format=image_format)
    pixels = _with(lambda stored: check_within(fitted(stored), value_range), name, image, channels, value_range)
    if isinstance(pixels, str):
        raise ValueError(f"{name} {_path_of(image)}cannot be read as an image of the size to draw: {pixels}")
    return in_unit_range(pixels[None])


def _signed(mask: Tensor) -> Tensor:
    """A mask in which -1 is black and 1 is white."""
    if mask.dtype == torch.bool:
        return mask.float() * 2 - 1
    if mask.is_floating_point() and 0 <= mask.min() < 1 and mask.max() <= 1:
        raise ValueError("mask as a tensor must be -1 where the image stays and 1 where it is painted, got "
                         f"{mask.min():.6g} to {mask.max():.6g}; give a mask of bool, or mask * 2 - 1")  # fmt: skip
    return mask


def _with(
    read: Callable[[StoredImage], Any], name: str, image: Any, channels: int, value_range: ValueRange | None
) -> Any:
    """What a function makes of the image of a file, or of an image in memory; or the reason why it cannot."""
    if isinstance(image, str | os.PathLike):
        file = OneFile(Path(image))
        return decoded(lambda data: read(only_image(data, channels)), file, file.names[0])
    stored = None if value_range is not None else _in_memory(name, image, channels)
    try:
        return read(stored or _numbers_in_memory(image, channels))
    except ValueError as error:
        return str(error)


def _numbers_in_memory(image: Any, channels: int) -> StoredImage:
    """A PIL image or an array whose numbers are those of files, as a file of NumPy's holds them."""
    content = BytesIO()
    np.save(content, np.asarray(image), allow_pickle=False)
    return only_image(content.getvalue(), channels)


def _in_memory(name: str, image: Any, channels: int) -> StoredImage:
    """A PIL image or an array as if it had been stored in a file."""
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if image.mode in ("1", "L", "RGB") and "transparency" in image.info:
            image = image.convert("RGBA")
    elif isinstance(image, np.ndarray) and image.dtype == np.bool_:
        image = image * np.uint8(255)
    numbers = pixels_of(image, name, channels).permute(1, 2, 0).numpy()  # (C, H, W) -> (H, W, C)
    height, width, num_samples = numbers.shape
    limits = np.iinfo(numbers.dtype)
    return StoredImage(
        file_format="",
        stored_size=(height, width),
        kind="grey" if num_samples == 1 else "RGB" if num_samples in OF_COLOURS else "channels",
        num_samples=num_samples,
        dtype=numbers.dtype,
        bits=limits.bits,
        decode=lambda _: numbers,
        white=limits.max,
        alpha="straight" if num_samples == 4 else None,
    )


def _path_of(image: Any) -> str:
    return f"{image} " if isinstance(image, str | os.PathLike) else ""
