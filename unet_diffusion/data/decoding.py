"""From the bytes of an image file to a tensor of one shape; `label_decoding` is for labels.

`stored` says what a file holds. Images are tensors of 8 or 16 bits, or with a range of values float32 in it. All
arithmetic is float32, rounded once at the end. Colours are resized multiplied by alpha, so that what is hidden under
transparent pixels does not bleed into the visible ones (Porter & Duff 1984).
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor

from unet_diffusion.data.stored import only_image, stored_images
from unet_diffusion.data.stored_image import Stored, StoredImage, colours_of
from unet_diffusion.runtime.cropping import centred_box
from unet_diffusion.runtime.pixel_values import OF_COLOURS

Levels = NDArray[Any]  # (C, H, W) uint8, uint16 or float32
ValueRange = tuple[float, float]  # the numbers of files that become -1 and 1
Box = tuple[float, float, float, float]  # left, top, right, bottom

UINT8_TO_UINT16 = 257  # 65535 / 255: white stays white
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # red, green, blue; ITU-R BT.601, as Pillow
STRIP_ROWS = 256  # of a large image that are scaled at once
SMALLEST_ALPHA = 1 / 65535  # below one level of 16 bits there is no colour to recover
WITHOUT_ALPHA = {"grey": 1, "RGB": 3, "palette": 1}  # numbers a pixel


@dataclass(frozen=True)
class ImageFormat:
    """The size and channels that every image is converted to.

    Args:
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        channels: 1 (grey), 3 (RGB), 4 (RGB and alpha), to which colours are converted; or the number that files hold.
        background: The colour behind transparent pixels where there is no alpha channel, a name or "#rrggbb".
        value_range: The numbers of files that become -1 and 1. None: 0 and the largest of 8 or 16 bits.

    Raises:
        ValueError: If one of them is out of range, or background is no colour.
    """

    height: int
    width: int
    channels: int = 3
    background: str = "white"
    value_range: ValueRange | None = None
    background_rgb: tuple[float, ...] = field(init=False, repr=False)  # in [0, 1]

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width of images must be at least 1, got {self.height}x{self.width}")
        check_num_channels(self.channels)
        if self.value_range is not None:
            check_range(self.value_range)
        if not isinstance(self.background, str):
            raise ValueError(f'background must be the name of a colour or "#rrggbb", in quotes, got {self.background}')
        rgb = ImageColor.getrgb(self.background)[:3]  # its ValueError names the value
        object.__setattr__(self, "background_rgb", tuple(level / 255 for level in rgb))

    @classmethod
    def of_size(
        cls, size: int | tuple[int, int], channels: int, background: str, value_range: ValueRange | None = None
    ) -> "ImageFormat":
        """The format for a height and width, or for one number that is both."""
        height, width = (size, size) if isinstance(size, int) else size
        return cls(height, width, channels, background, value_range)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the result."""
        return self.channels, self.height, self.width

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: float32 with a range of values; otherwise uint8, or uint16 for files of 16 bits."""
        return torch.uint8 if self.value_range is None else torch.float32


def check_num_channels(channels: int) -> None:
    """Refuse a number of channels below 1.

    Args:
        channels: The number of channels of images.

    Raises:
        ValueError: If it is below 1.
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1: 1 (grey), 3 (RGB), 4 (RGB and alpha), or the number that files "
                         f"hold, got {channels}")  # fmt: skip


def check_range(value_range: ValueRange) -> None:
    """Refuse a range of values that is none.

    Args:
        value_range: The numbers that become -1 and 1.

    Raises:
        ValueError: If they are not two finite numbers, the first of them smaller.
    """
    is_pair = isinstance(value_range, list | tuple) and len(value_range) == 2
    if not is_pair or not -math.inf < value_range[0] < value_range[1] < math.inf:
        raise ValueError(f"value_range must be two finite numbers, the lower first, got {value_range}; they become -1 "
                         "and 1")  # fmt: skip


def decode_image(data: bytes, image_format: ImageFormat) -> Tensor:
    """The image in a file: scaled to cover height x width, cut to its centre, (channels, height, width).

    Reductions are antialiased. Nothing is enlarged. The orientation that the file says is applied. Of several frames
    the first counts. A TIFF file of several images is refused; see `tiff_axes` for pages that are channels of one.

    Args:
        data: The contents of an image file.
        image_format: The size and channels that the image is converted to.

    Returns:
        uint8 in [0, 255], or uint16 in [0, 65535] if the file holds more than 8 bits a channel; with a range of values
        float32, in [-1, 1] where numbers are within the range. Nothing is clipped.

    Raises:
        ValueError: If the image is smaller than asked for in either direction, has more pixels than
            PIL.Image.MAX_IMAGE_PIXELS, other channels, or numbers without a range, or if there are several images.
        Exception: If the file is damaged; its type is the decoder's.
    """
    return fitted_image(only_image(data, image_format.channels), image_format)


def fitted_image(image: StoredImage, image_format: ImageFormat) -> Tensor:
    """An image of a file, converted as `decode_image` does it."""
    height, width = image.size
    if height < image_format.height or width < image_format.width:
        raise ValueError(f"too small: {height}x{width}, must be at least {image_format.height}x{image_format.width}")
    pixels = _pixels(image, image_format, reducible_to=max(image_format.height, image_format.width))
    return _tensor(_fit(pixels, image_format.height, image_format.width), image_format, pixels.levels.dtype)


def decode_pages(data: bytes, channels: int, value_range: ValueRange | None = None) -> list[Tensor]:
    """Every image of a file at its own size, (channels, H, W) each, of the types of `decode_image`.

    Args:
        data: The contents of an image file; only TIFF has several images.
        channels: As in `ImageFormat`.
        value_range: As in `ImageFormat`.

    Raises:
        ValueError: If an image has more pixels than PIL.Image.MAX_IMAGE_PIXELS, other channels, or numbers without a
            range.
        Exception: If the file is damaged; its type is the decoder's.
    """
    return [decode_page(image, channels, value_range) for image in stored_images(data, channels)]


def decode_page(image: StoredImage, channels: int, value_range: ValueRange | None = None) -> Tensor:
    """An image at its own size, (channels, H, W), of the types of `decode_image`.

    Args:
        image: An image of a file.
        channels: As in `ImageFormat`.
        value_range: As in `ImageFormat`.

    Raises:
        ValueError: If it has other channels, or numbers without a range.
        Exception: If the file is damaged; its type is the decoder's.
    """
    image_format = ImageFormat(1, 1, channels, value_range=value_range)
    pixels = _pixels(image, image_format)
    return _tensor(pixels, image_format, pixels.levels.dtype)


def check_within(image: Tensor, value_range: ValueRange | None) -> Tensor:
    """The image, once it is known to lie within a range of values.

    Args:
        image: An image as it was decoded, in [-1, 1] where its numbers are within the range.
        value_range: The range; None: there is none to lie within.

    Raises:
        ValueError: If numbers are beyond the range. They would be clipped in what is drawn.
    """
    if value_range is not None:
        low, high = value_range
        ends = [(float(end) + 1) / 2 * (high - low) + low for end in image.aminmax()]
        if float(image.min()) < -1 or float(image.max()) > 1:
            raise ValueError(f"numbers must be within value_range, {low:.6g} to {high:.6g}, and go from {ends[0]:.6g} "
                             f"to {ends[1]:.6g}; leave the image out, or begin another run, with a range that holds "
                             "them")  # fmt: skip
    return image


def to_depth(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images as uint16 of the same brightness, if that is the dtype; otherwise unchanged."""
    if images.dtype == dtype:
        return images
    # torch has no uint16 arithmetic; what overflows int16 wraps to the same bits.
    return images.to(torch.int16).mul_(UINT8_TO_UINT16).view(dtype)


@dataclass(frozen=True)
class _Pixels:
    """All pixels of an image, upright.

    Args:
        levels: (C, H, W) uint8, uint16 or float32, alpha last.
        top: The level of full brightness and opacity.
        has_alpha: Whether the last channel is alpha.
        are_colours: Whether the channels are grey or RGB.
    """

    levels: Levels
    top: float
    has_alpha: bool
    are_colours: bool


def _pixels(image: StoredImage, image_format: ImageFormat, reducible_to: int | None = None) -> _Pixels:
    """The pixels of an image: on a scale of 8 or 16 bits, or of a range of values, whose ends become 0 and 1."""
    check_channels(image, image_format.channels)
    if image_format.value_range is not None:
        levels = _in_range(image, image_format.value_range, reducible_to)
        return _Pixels(levels, 1.0, False, image.kind != "channels")
    if image.white is None:
        raise ValueError(
            f"{image} have no range that is known; save the image in 8 or 16 bits, or train with value_range: the two "
            "numbers that are to become -1 and 1, or measured"
        )
    colour, alpha, white = _colours(image, image.white, reducible_to)
    levels = colour if alpha is None else np.concatenate([colour, alpha], axis=-1)
    return _Pixels(levels.transpose(2, 0, 1), white, alpha is not None, image.kind != "channels")


def check_channels(image: StoredImage, channels: int) -> None:
    """Refuse an image whose channels cannot become those asked for without a guess.

    Args:
        image: An image of a file.
        channels: The channels that are asked for, as in `ImageFormat`.

    Raises:
        ValueError: If they cannot.
    """
    if image.kind == "channels" and image.num_channels == channels:
        return
    alpha = " and alpha" if image.alpha is not None else ""
    if image.kind == "channels" or channels not in OF_COLOURS:
        kind = "" if image.kind == "channels" else f"{image.kind} "
        s = "s" * (image.num_channels > 1)
        raise ValueError(
            f"an image must have {channels} channels, as channels says, and this file has {image.num_channels} {kind}"
            f"channel{s}{alpha}; set channels to what the files hold, or save those that are to be used"
        )
    if image.num_channels != WITHOUT_ALPHA[image.kind]:
        raise ValueError(
            f"an image must be grey or RGB, with alpha or without, or of channels that are no colours, and this file "
            f"has {image.num_channels} {image.kind} channels{alpha}; save it with photometric minisblack if the "
            "channels are no colours, or with alpha marked as such"
        )


def _colours(
    image: StoredImage, image_white: int, reducible_to: int | None
) -> tuple[Stored, Stored | None, Literal[255, 65535]]:
    """Colours and alpha, (H, W, C) and (H, W, 1), uint8 or uint16, and the level of white."""
    numbers = image.numbers(reducible_to)
    white: Literal[255, 65535] = 255 if image_white <= 255 else 65535
    alpha = _to_white(numbers[..., -1:], image_white, white) if image.alpha is not None else None
    colour = numbers if alpha is None else numbers[..., :-1]
    if image.transparent is not None:
        is_opaque = (colour != np.array(image.transparent)).any(axis=-1, keepdims=True)
        alpha = (is_opaque * white).astype(np.uint16 if white > 255 else np.uint8)
    if image.palette is not None:
        colour = colours_of(colour[..., 0], image.palette)
        if colour.shape[-1] == 4:
            colour, alpha = colour[..., :3], colour[..., 3:]
    else:
        colour = _to_white(colour, image_white, white)
    if image.is_inverted:
        colour = white - colour
    if alpha is not None and image.alpha == "premultiplied":
        whole = colour.astype(np.float32) * white / np.maximum(alpha, 1)
        colour = np.clip(whole.round(), 0, white).astype(colour.dtype)
    return colour, alpha, white


def _in_range(image: StoredImage, value_range: ValueRange, reducible_to: int | None) -> Levels:
    """Channels, (C, H, W) float32, the ends of a range of values as 0 and 1; nothing is clipped."""
    numbers = plain_numbers(image, reducible_to)
    low, high = value_range
    levels = (numbers.astype(np.float64) - low) / (high - low)
    return levels.astype(np.float32).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)


def plain_numbers(image: StoredImage, reducible_to: int | None = None) -> Stored:
    """The numbers of an image for which a range of values is declared or measured, (H, W, C).

    Args:
        image: An image of a file.
        reducible_to: As in `StoredImage.numbers`.

    Raises:
        ValueError: If they are indices, have alpha, or are complex or not finite, or if 0 is white and nothing black.
    """
    if image.palette is not None or image.alpha is not None or image.transparent is not None:
        beside = "a palette" if image.palette is not None else "alpha"
        raise ValueError(f"with value_range an image must hold plain numbers, and this one has {beside}; leave "
                         "value_range out, or save the image without")  # fmt: skip
    numbers = image.numbers(reducible_to)
    if numbers.dtype.kind == "c":
        raise ValueError(f"{image} have no order; save their magnitude, or parts, as channels")
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise ValueError(f"numbers must be finite, and {np.count_nonzero(~np.isfinite(numbers))} of {numbers.size} are "
                         "not; replace them in the file")  # fmt: skip
    if not image.is_inverted:
        return numbers
    if image.white is None:
        raise ValueError(f"{image} of which 0 is white have no number that is black; save them with 0 as black")
    return image.white - numbers


def _to_white(numbers: Stored, white: int, new_white: int) -> Stored:
    """The numbers on a scale on which white is 255 or 65535."""
    if white == new_white:
        return numbers
    if (largest := numbers.max(initial=0)) > white:
        raise ValueError(f"numbers must be at most {white}, which the file says is white, got {largest}; save it again")
    scaled = (numbers.astype(np.uint32) * new_white + white // 2) // white  # rounded
    return scaled.astype(np.uint16 if new_white > 255 else np.uint8)


def _fit(pixels: _Pixels, height: int, width: int) -> _Pixels:
    """The largest centred part of that aspect, (C, height, width); untouched where nothing needs to be scaled."""
    levels = pixels.levels
    full_height, full_width = levels.shape[1:]
    top, left, box_height, box_width = centred_box((full_height, full_width), (height, width))
    if (box_height, box_width) == (height, width):  # cut at whole pixels: nothing is interpolated
        return replace(pixels, levels=levels[:, int(top) : int(top) + height, int(left) : int(left) + width])
    starts = range(0, full_height, STRIP_ROWS)
    strips = [replace(pixels, levels=levels[:, start : start + STRIP_ROWS]) for start in starts]
    narrow = np.concatenate([_narrowed(strip, (left, left + box_width), width) for strip in strips], axis=1)
    box = (0, top, width, top + box_height)
    resized = np.stack([_resize(plane, box, height, width) for plane in narrow])
    if levels.dtype == np.float32:  # bicubic overshoots; numbers beyond a range of values stay as far beyond
        least, most = (levels.min(axis=(1, 2), keepdims=True), levels.max(axis=(1, 2), keepdims=True))
        return replace(pixels, levels=np.clip(resized, least, most))
    resized = np.clip(resized, 0, 1)
    if pixels.has_alpha:
        colour = resized[:-1] / np.maximum(resized[-1:], SMALLEST_ALPHA)
        resized = np.concatenate([np.clip(colour, 0, 1), resized[-1:]])
    return replace(pixels, levels=resized * np.float32(pixels.top))


def _narrowed(rows: _Pixels, ends: tuple[float, float], width: int) -> Levels:
    """Rows in [0, 1], each scaled to a width, (C, rows, width); colours multiplied by alpha.

    Rows and columns can be scaled one after the other, as Pillow does: so a large image is never in memory as numbers
    of 32 bits.
    """
    levels = rows.levels.astype(np.float32, order="C") / np.float32(rows.top)
    if rows.has_alpha:
        levels[:-1] *= levels[-1:]
    height = levels.shape[1]
    return np.stack([_resize(plane, (ends[0], 0, ends[1], height), height, width) for plane in levels])


def _resize(plane: Levels, box: Box, height: int, width: int) -> Levels:
    """A box of a plane, bicubic and antialiased, (height, width)."""
    return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC, box))


def _tensor(pixels: _Pixels, image_format: ImageFormat, dtype: np.dtype) -> Tensor:
    """The pixels with the asked for channels, of a type; of float32 the levels 0 and 1 become -1 and 1."""
    levels = _converted(pixels, image_format) if pixels.are_colours else pixels.levels
    if dtype == np.float32:
        return torch.from_numpy(np.ascontiguousarray(levels * np.float32(2) - np.float32(1)))
    return torch.from_numpy(_round_to(levels, dtype))


def _converted(pixels: _Pixels, image_format: ImageFormat) -> Levels:
    """Colours with the asked for channels."""
    levels, top = pixels.levels, pixels.top
    colour, alpha = (levels[:-1], levels[-1:]) if pixels.has_alpha else (levels, np.full_like(levels[:1], top))
    if image_format.channels == 4:
        return np.concatenate([_as_rgb(colour), alpha])
    if pixels.has_alpha:
        opacity = alpha / np.float32(top)
        background = np.array(image_format.background_rgb, dtype=np.float32)[:, None, None] * top
        colour = _as_rgb(colour) * opacity + background * (1 - opacity)
    return _as_rgb(colour) if image_format.channels == 3 else _as_grey(colour)


def _as_rgb(colour: Levels) -> Levels:
    return colour.repeat(3, axis=0) if len(colour) == 1 else colour


def _as_grey(colour: Levels) -> Levels:
    return colour if len(colour) == 1 else np.tensordot(LUMA, colour.astype(np.float32), axes=1)[None]


def _round_to(levels: Levels, dtype: np.dtype) -> Levels:
    """Contiguous levels of a type, owned by nobody else, so that torch may write to them."""
    if levels.dtype == dtype:
        return levels.copy()
    return np.clip(levels.round(), 0, np.iinfo(dtype).max).astype(dtype, order="C")
