"""From the bytes of an image file to a tensor of one shape, in 8 or 16 bits; and of a label file to its numbers.

`stored` says what a file holds. All arithmetic is float32, rounded once at the end. Colours are resized multiplied by
alpha, so that what is hidden under transparent pixels does not bleed into the visible ones (Porter & Duff 1984).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor

from unet_diffusion.data.stored import Stored, StoredImage, stored_images
from unet_diffusion.runtime.cropping import centred_box

Pixels = NDArray[Any]  # (1 to 4, H, W) uint8, uint16 or float32: grey or RGB, alpha last
Box = tuple[float, float, float, float]  # left, top, right, bottom

UINT8_TO_UINT16 = 257  # 65535 / 255: white stays white
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # red, green, blue; ITU-R BT.601, as Pillow
STRIP_ROWS = 256  # of a large image that are scaled at once
SMALLEST_ALPHA = 1 / 65535  # below one level of 16 bits there is no colour to recover
MOST_SAMPLES = 4  # numbers a pixel of a label: RGB and alpha
WITHOUT_ALPHA = {"grey": 1, "RGB": 3, "palette": 1}  # numbers a pixel


@dataclass(frozen=True)
class ImageFormat:
    """The size and channels that every image is converted to.

    Args:
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha).
        background: The colour behind transparent pixels where there is no alpha channel, a name or "#rrggbb".

    Raises:
        ValueError: If one of them is out of range, or background is no colour.
    """

    height: int
    width: int
    channels: int = 3
    background: str = "white"
    background_rgb: tuple[float, ...] = field(init=False, repr=False)  # in [0, 1]

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width of images must be at least 1, got {self.height}x{self.width}")
        if self.channels not in (1, 3, 4):
            raise ValueError(f"channels must be 1 (grey), 3 (RGB) or 4 (RGB and alpha), got {self.channels}")
        if not isinstance(self.background, str):
            raise ValueError(f'background must be the name of a colour or "#rrggbb", in quotes, got {self.background}')
        rgb = ImageColor.getrgb(self.background)[:3]  # its ValueError names the value
        object.__setattr__(self, "background_rgb", tuple(level / 255 for level in rgb))

    @classmethod
    def of_size(cls, size: int | tuple[int, int], channels: int, background: str) -> "ImageFormat":
        """The format for a height and width, or for one number that is both."""
        height, width = (size, size) if isinstance(size, int) else size
        return cls(height, width, channels, background)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the result."""
        return self.channels, self.height, self.width


def decode_image(data: bytes, image_format: ImageFormat) -> Tensor:
    """The image in a file: scaled to cover height x width, cut to its centre, (channels, height, width).

    Reductions are antialiased. Nothing is enlarged. The orientation that the file says is applied. Of several frames
    the first counts. A TIFF file of several pages is refused, as they may be images or channels of one.

    Args:
        data: The contents of an image file.
        image_format: The size and channels that the image is converted to.

    Returns:
        uint8 in [0, 255], or uint16 in [0, 65535] if the file holds more than 8 bits a channel.

    Raises:
        ValueError: If the image is smaller than asked for in either direction, has more pixels than
            PIL.Image.MAX_IMAGE_PIXELS, or holds numbers that are no 8 or 16-bit colours, or if there are several pages.
        Exception: If the file is damaged; its type is the decoder's.
    """
    return fitted_image(only_image(data), image_format)


def only_image(data: bytes) -> StoredImage:
    """The image of a file that holds one.

    Args:
        data: The contents of an image file.

    Raises:
        ValueError: If there are several pages, which may be as many images, or channels of one.
        Exception: If the file is damaged; its type is the decoder's.
    """
    image, *others = stored_images(data)
    if others:
        raise ValueError(
            f"a file must hold one image, and this one has {1 + len(others)} pages; save each page as a file, or, if "
            "they are channels, one grey or RGB image of those that are to be used"
        )
    return image


def fitted_image(image: StoredImage, image_format: ImageFormat) -> Tensor:
    """An image of a file, converted as `decode_image` does it."""
    height, width = image.size
    if height < image_format.height or width < image_format.width:
        raise ValueError(f"too small: {height}x{width}, must be at least {image_format.height}x{image_format.width}")
    pixels = _colours(image, reducible_to=max(image_format.height, image_format.width))
    fitted = _fit(pixels, image_format.height, image_format.width)
    converted = _convert_channels(fitted, image_format, white=np.iinfo(pixels.dtype).max)
    return torch.from_numpy(_round_to(converted, pixels.dtype))


def decode_pages(data: bytes, channels: int) -> list[Tensor]:
    """Every page of an image file at its own size, (channels, H, W) uint8 or uint16 each; only TIFF has several.

    Args:
        data: The contents of an image file.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha).

    Raises:
        ValueError: If a page has more pixels than PIL.Image.MAX_IMAGE_PIXELS, or numbers that are no 8 or 16-bit
            colours.
        Exception: If the file is damaged; its type is the decoder's.
    """
    return [decode_page(image, channels) for image in stored_images(data)]


def decode_page(image: StoredImage, channels: int) -> Tensor:
    """An image at its own size, (channels, H, W) uint8 or uint16.

    Args:
        image: An image of a file.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha).

    Raises:
        ValueError: If it holds numbers that are no 8 or 16-bit colours.
        Exception: If the file is damaged; its type is the decoder's.
    """
    pixels = _colours(image)
    converted = _convert_channels(pixels, ImageFormat(1, 1, channels), white=np.iinfo(pixels.dtype).max)
    return torch.from_numpy(_round_to(converted, pixels.dtype))


def decode_label_pages(data: bytes) -> list[NDArray[np.int32]]:
    """Every page of a label image, (H, W) each: the numbers as they are stored, whatever the file calls white.

    Of a file with a palette they are the indices, unless all colours of the palette are grey: then a grey picture was
    stored that way, and its greys count. Alpha is left out.

    Args:
        data: The contents of an image file: grey, with a palette, or colour with equal channels, of any depth.

    Raises:
        ValueError: If pixels are colours or no whole numbers of 32 bits, or the file is of a kind that changes them.
        Exception: If the file is damaged; its type is the decoder's.
    """
    return [_label(image) for image in stored_images(data)]


def fitted_label(label: NDArray[np.int32], height: int, width: int) -> NDArray[np.int32]:
    """A label image (H, W), scaled and cut as `decode_image` does it; each pixel is the nearest one of the file.

    Args:
        label: The label image.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
    """
    full_height, full_width = label.shape
    top, left, box_height, box_width = centred_box((full_height, full_width), (height, width))
    rows = (top + (np.arange(height) + 0.5) * box_height / height).astype(int)
    columns = (left + (np.arange(width) + 0.5) * box_width / width).astype(int)
    return label[rows[:, None], columns]


def to_depth(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images as uint16 of the same brightness, if that is the dtype; otherwise unchanged."""
    if images.dtype == dtype:
        return images
    # torch has no uint16 arithmetic; what overflows int16 wraps to the same bits.
    return images.to(torch.int16).mul_(UINT8_TO_UINT16).view(dtype)


def _colours(image: StoredImage, reducible_to: int | None = None) -> Pixels:
    """All pixels of an image, upright, uint8 or uint16: grey or RGB, with alpha if it has transparent pixels."""
    if image.white is None:
        raise ValueError(f"{image} have no range that is known; save the image in 8 or 16 bits")
    if image.num_channels != WITHOUT_ALPHA[image.kind]:
        raise ValueError(
            f"an image must be grey or RGB, with alpha or without, and this file has {image.num_channels} "
            f"{image.kind} channels; save those that are to be used as grey or RGB"
        )
    numbers = image.numbers(reducible_to)
    white = 255 if image.white <= 255 else 65535
    alpha = _to_white(numbers[..., -1:], image.white, white) if image.alpha is not None else None
    colour = numbers if alpha is None else numbers[..., :-1]
    if image.transparent is not None:
        is_opaque = (colour != np.array(image.transparent)).any(axis=-1, keepdims=True)
        alpha = (is_opaque * white).astype(np.uint16 if white > 255 else np.uint8)
    if image.palette is not None:
        colour = _of_palette(colour[..., 0], image.palette)
        if colour.shape[-1] == 4:
            colour, alpha = colour[..., :3], colour[..., 3:]
    else:
        colour = _to_white(colour, image.white, white)
    if image.is_inverted:
        colour = white - colour
    if alpha is not None and image.alpha == "premultiplied":
        whole = colour.astype(np.float32) * white / np.maximum(alpha, 1)
        colour = np.clip(whole.round(), 0, white).astype(colour.dtype)
    pixels = colour if alpha is None else np.concatenate([colour, alpha], axis=-1)
    return pixels.transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)


def _to_white(numbers: Stored, white: int, new_white: int) -> Stored:
    """The numbers on a scale on which white is 255 or 65535."""
    if white == new_white:
        return numbers
    if (largest := numbers.max(initial=0)) > white:
        raise ValueError(f"numbers must be at most {white}, which the file says is white, got {largest}; save it again")
    scaled = (numbers.astype(np.uint32) * new_white + white // 2) // white  # rounded
    return scaled.astype(np.uint16 if new_white > 255 else np.uint8)


def _of_palette(indices: Stored, palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if (largest := int(indices.max(initial=0))) >= len(palette):
        raise ValueError(f"indices must be less than the {len(palette)} colours of the palette, got {largest}; "
                         "save the image again")  # fmt: skip
    return palette[indices]


def _label(image: StoredImage) -> NDArray[np.int32]:
    if image.is_lossy:
        raise ValueError(
            f"a label must be of a format that keeps each number, and {image.file_format} blurs them; save it as PNG"
        )
    if image.is_inverted and image.bits == 1:
        raise ValueError(
            "a label of 1 bit must say that 1 is white, and in this file 0 is, so that objects might be either; "
            "save it in 8 bits"
        )
    if image.num_samples > MOST_SAMPLES:
        raise ValueError(f"a label must be one number a pixel, and this file has {image.num_samples}; save one of them")
    numbers = image.numbers()[..., : image.num_channels]
    if image.palette is not None and (image.palette[:, :3] == image.palette[:, :1]).all():
        numbers = _of_palette(numbers[..., 0], image.palette)[..., :1]
    if numbers.shape[-1] > 1 and (numbers != numbers[..., :1]).any():
        raise ValueError(
            "a label must be one number a pixel, and this file holds colours; save class indices or a palette image"
        )
    return _as_int32(numbers[..., 0])


def _as_int32(numbers: Stored) -> NDArray[np.int32]:
    if numbers.dtype.kind == "c" or (numbers.dtype.kind == "f" and not (numbers == np.rint(numbers)).all()):
        raise ValueError("a label must be a whole number, and this file holds fractions; save it in 8 or 16 bits")
    limits = np.iinfo(np.int32)
    for end in (numbers.min().item(), numbers.max().item()):
        if not limits.min <= end <= limits.max:
            raise ValueError(f"a label must be from {limits.min} to {limits.max}, got {end}; number the objects anew")
    return numbers.astype(np.int32)


def _fit(pixels: Pixels, height: int, width: int) -> Pixels:
    """The largest centred part of that aspect, (C, height, width); untouched where nothing needs to be scaled."""
    full_height, full_width = pixels.shape[1:]
    top, left, box_height, box_width = centred_box((full_height, full_width), (height, width))
    if (box_height, box_width) == (height, width):  # cut at whole pixels: nothing is interpolated
        return pixels[:, int(top) : int(top) + height, int(left) : int(left) + width]
    strips = np.split(pixels, range(STRIP_ROWS, full_height, STRIP_ROWS), axis=1)
    narrow = np.concatenate([_narrowed(strip, (left, left + box_width), width) for strip in strips], axis=1)
    box = (0, top, width, top + box_height)
    resized = np.clip([_resize(plane, box, height, width) for plane in narrow], 0, 1)  # bicubic overshoots
    if _has_alpha(pixels):
        colour = resized[:-1] / np.maximum(resized[-1:], SMALLEST_ALPHA)
        resized = np.concatenate([np.clip(colour, 0, 1), resized[-1:]])
    return resized * np.float32(np.iinfo(pixels.dtype).max)


def _narrowed(rows: Pixels, ends: tuple[float, float], width: int) -> Pixels:
    """Rows in [0, 1], each scaled to a width, (C, rows, width); colours multiplied by alpha.

    Rows and columns can be scaled one after the other, as Pillow does: so a large image is never in memory as numbers
    of 32 bits.
    """
    levels = rows.astype(np.float32, order="C") / np.float32(np.iinfo(rows.dtype).max)
    if _has_alpha(rows):
        levels[:-1] *= levels[-1:]
    height = levels.shape[1]
    return np.stack([_resize(plane, (ends[0], 0, ends[1], height), height, width) for plane in levels])


def _resize(plane: Pixels, box: Box, height: int, width: int) -> Pixels:
    """A box of a plane, bicubic and antialiased, (height, width)."""
    return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC, box))


def _convert_channels(pixels: Pixels, image_format: ImageFormat, white: int) -> Pixels:
    """The pixels with the asked for channels; white is the level of full brightness and opacity."""
    colour, alpha = (pixels[:-1], pixels[-1:]) if _has_alpha(pixels) else (pixels, np.full_like(pixels[:1], white))
    if image_format.channels == 4:
        return np.concatenate([_as_rgb(colour), alpha])
    if _has_alpha(pixels):
        opacity = alpha / np.float32(white)
        background = np.array(image_format.background_rgb, dtype=np.float32)[:, None, None] * white
        colour = _as_rgb(colour) * opacity + background * (1 - opacity)
    return _as_rgb(colour) if image_format.channels == 3 else _as_grey(colour)


def _has_alpha(pixels: Pixels) -> bool:
    return len(pixels) in (2, 4)


def _as_rgb(colour: Pixels) -> Pixels:
    return colour.repeat(3, axis=0) if len(colour) == 1 else colour


def _as_grey(colour: Pixels) -> Pixels:
    return colour if len(colour) == 1 else np.tensordot(LUMA, colour.astype(np.float32), axes=1)[None]


def _round_to(pixels: Pixels, dtype: np.dtype) -> Pixels:
    """Contiguous pixels of a dtype, owned by nobody else, so that torch may write to them."""
    if pixels.dtype == dtype:
        return pixels.copy()
    return np.clip(pixels.round(), 0, np.iinfo(dtype).max).astype(dtype, order="C")
