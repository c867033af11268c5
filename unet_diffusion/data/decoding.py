"""From the bytes of an image file to a tensor of one shape, in 8 or 16 bits.

Pillow decodes, except for 16-bit PNG: Pillow reduces those with colour or alpha to 8 bits without a word, torchvision
keeps them. All arithmetic is float32, rounded once at the end. Colours are resized multiplied by alpha, so that what is
hidden under transparent pixels does not bleed into the visible ones (Porter & Duff 1984).
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageColor, ImageOps, ImageSequence
from torch import Tensor

Pixels = NDArray[Any]  # (1 to 4, H, W) uint8, uint16 or float32: grey or RGB, alpha last
Box = tuple[float, float, float, float]  # left, top, right, bottom

UINT8_TO_UINT16 = 257  # 65535 / 255: white stays white
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # red, green, blue; ITU-R BT.601, as Pillow
SMALLEST_ALPHA = 1 / 65535  # below one level of 16 bits there is no colour to recover
# Pillow goes by the content, not by the name, and hands PostScript to Ghostscript, which is a programming language.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_REMEDY = "reduce it, or cut it into parts"
PNG_BIT_DEPTH = 24  # position of that byte: 8 of signature, 8 of chunk header, 8 of width and height


@dataclass(frozen=True)
class ImageFormat:
    """What every image is turned into.

    Args:
        height: of the result, in pixels.
        width: of the result, in pixels.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha).
        background: colour put behind transparent pixels where there is no alpha channel; a name or "#rrggbb".

    Raises:
        ValueError: if one of them is out of range or no colour.
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
        rgb = ImageColor.getrgb(self.background)[:3]  # its ValueError names the value
        object.__setattr__(self, "background_rgb", tuple(level / 255 for level in rgb))


def decode_image(data: bytes, image_format: ImageFormat) -> Tensor:
    """The image in a file: scaled to cover height x width, cut to its centre, (channels, height, width).

    Reductions are antialiased. Nothing is enlarged. An EXIF orientation is applied. Of several frames the first counts.

    Args:
        data: contents of an image file.
        image_format: what to turn it into.

    Returns:
        uint8 in [0, 255], or uint16 in [0, 65535] if the file holds 16 bits a channel.

    Raises:
        ValueError: if the image is smaller than asked for in either direction, has more pixels than
            PIL.Image.MAX_IMAGE_PIXELS, or holds numbers that are no 8 or 16-bit colours.
        Exception: whatever a decoder raises on a damaged file.
    """
    pixels = _read_pixels(data, image_format)
    height, width = pixels.shape[1:]
    if height < image_format.height or width < image_format.width:
        raise ValueError(f"too small: {height}x{width}, must be at least {image_format.height}x{image_format.width}")
    fitted = _fit(pixels, image_format.height, image_format.width)
    converted = _convert_channels(fitted, image_format, white=np.iinfo(pixels.dtype).max)
    return torch.from_numpy(_round_to(converted, pixels.dtype))


def upright_size(data: bytes) -> tuple[int, int]:
    """Height and width of the image in a file, with its EXIF orientation applied; only its header is read.

    Raises:
        ValueError: if it has more pixels than PIL.Image.MAX_IMAGE_PIXELS.
        Exception: whatever a decoder raises on a damaged file.
    """
    with _opened(data) as image:
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter
        return (image.width, image.height) if is_turned else (image.height, image.width)


def decode_pages(data: bytes, channels: int) -> list[Tensor]:
    """Every page of an image file at its own size, (channels, H, W) uint8 or uint16 each; only TIFF has several.

    Args:
        data: contents of an image file.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha).

    Raises:
        ValueError: if a page has more pixels than PIL.Image.MAX_IMAGE_PIXELS, or numbers that are no 8 or 16-bit
            colours.
        Exception: whatever a decoder raises on a damaged file.
    """
    image_format = ImageFormat(1, 1, channels)
    converted = [
        _round_to(_convert_channels(pixels, image_format, white=np.iinfo(pixels.dtype).max), pixels.dtype)
        for pixels in _read_all_pages(data)
    ]
    return [torch.from_numpy(pixels) for pixels in converted]


def decode_label_pages(data: bytes) -> list[NDArray[np.int32]]:
    """Every page of a label image, (H, W) each: the numbers that it holds, or the indices into its palette.

    Args:
        data: contents of an image file, grey (1 to 32 bits), with a palette, or colour whose channels are equal.

    Raises:
        ValueError: if pixels are colours, or no whole numbers.
        Exception: whatever a decoder raises on a damaged file.
    """
    with _opened(data) as image:
        return [_numbers(np.asarray(page)) for page in _pages(image)]


def to_depth(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images as uint16 of the same brightness, if that is the dtype; otherwise unchanged."""
    if images.dtype == dtype:
        return images
    # torch has no uint16 arithmetic; what overflows int16 wraps to the same bits.
    return images.to(torch.int16).mul_(UINT8_TO_UINT16).view(dtype)


def _read_pixels(data: bytes, image_format: ImageFormat) -> Pixels:
    """All pixels of an image, upright, uint8 or uint16."""
    with _opened(data) as image:
        if image.format == "PNG" and data[PNG_BIT_DEPTH] == 16:
            return _read_16_bit_png(data)
        # Lets JPEG decode to a half, quarter or eighth, but not below twice of what is needed.
        twice = 2 * max(image_format.height, image_format.width)
        image.draft(None, (twice, twice))
        _check_mode(image)
        return _pixels_of(ImageOps.exif_transpose(image))


def _read_all_pages(data: bytes) -> list[Pixels]:
    with _opened(data) as image:
        if image.format == "PNG" and data[PNG_BIT_DEPTH] == 16:
            return [_read_16_bit_png(data)]
        pages = []
        for page in _pages(image):
            _check_mode(page)
            pages.append(_pixels_of(ImageOps.exif_transpose(page)))
        return pages


def _pages(image: Image.Image) -> Iterator[Image.Image]:
    """Those of a TIFF file; in other formats further frames are previews or animations, and the first counts."""
    for page in ImageSequence.Iterator(image) if image.format == "TIFF" else [image]:
        _check_dimensions(page)
        yield page


def _numbers(page: NDArray[Any]) -> NDArray[np.int32]:
    if page.dtype.kind == "f":
        raise ValueError("a label must be a whole number, and this file holds fractions; save it in 8 or 16 bits")
    if page.ndim == 3:
        colours = page[..., :3]
        if not (colours == colours[..., :1]).all():
            raise ValueError(
                "a label must be one number a pixel, and this file holds colours; save class indices or a palette image"
            )
        page = colours[..., 0]
    return page.astype(np.int32)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Pillow's image, of which nothing but the header has been read; too large a one is refused."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # of twice the pixels; below, Pillow only warns
        raise ValueError(f"{error} {_REMEDY}") from error
    with image:
        _check_dimensions(image)
        yield image


def _check_dimensions(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.height}x{image.width} must not be more than {limit} pixels; {_REMEDY}")


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no range that is known; save the image in 8 or 16 bits")
    tiles = getattr(image, "tile", [])  # how the file lays out its pixels, before Pillow converts them
    if not image.mode.startswith("I;16") and any(";16" in str(tile[3]) for tile in tiles):
        raise ValueError(f"16-bit colour in {image.format} cannot be read without loss; save the image as 16-bit PNG")


def _read_16_bit_png(data: bytes) -> Pixels:
    from torchvision.io import ImageReadMode, decode_png  # a second to import, and such files are rare

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_png(encoded, ImageReadMode.UNCHANGED, apply_exif_orientation=True).numpy()


def _pixels_of(image: Image.Image) -> Pixels:
    """Pillow's image as grey or RGB, with alpha if it has transparent pixels."""
    if image.mode.startswith("I;16"):
        return np.asarray(image)[None].astype(np.uint16)  # some are big-endian, which torch does not take
    if image.mode in ("1", "L") and not image.has_transparency_data:
        return np.asarray(image.convert("L"))[None]
    mode = "RGBA" if image.has_transparency_data else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # which copies, whatever the mode
    return np.asarray(image).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)


def _fit(pixels: Pixels, height: int, width: int) -> Pixels:
    """The largest centred part of that aspect, (C, height, width); untouched where nothing needs to be scaled."""
    full_height, full_width = pixels.shape[1:]
    scale = min(full_height / height, full_width / width)
    box_height, box_width = min(height * scale, full_height), min(width * scale, full_width)  # where rounded up
    top, left = (full_height - box_height) / 2, (full_width - box_width) / 2
    if scale == 1:  # cut at whole pixels: nothing is interpolated
        return pixels[:, int(top) : int(top) + height, int(left) : int(left) + width]
    box = (left, top, left + box_width, top + box_height)
    resize = _resize_under_alpha if _has_alpha(pixels) else _resize
    # One plane at a time: in float32, all of a large image take gigabytes.
    return resize(map(_in_unit_range, pixels), box, height, width) * np.float32(np.iinfo(pixels.dtype).max)


def _in_unit_range(plane: Pixels) -> Pixels:
    scaled = plane.astype(np.float32, order="C")
    scaled /= np.float32(np.iinfo(plane.dtype).max)  # in place
    return scaled


def _resize_under_alpha(planes: Iterable[Pixels], box: Box, height: int, width: int) -> Pixels:
    """As `_resize`, each colour weighted by its alpha."""
    *colours, alpha = planes
    resized = _resize((*(colour * alpha for colour in colours), alpha), box, height, width)
    colour = resized[:-1] / np.maximum(resized[-1:], SMALLEST_ALPHA)
    return np.concatenate([np.clip(colour, 0, 1), resized[-1:]])


def _resize(planes: Iterable[Pixels], box: Box, height: int, width: int) -> Pixels:
    """A box of the planes of an image, (H, W) each in [0, 1], bicubic and antialiased, (C, height, width)."""
    resized = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC, box) for plane in planes]
    return np.clip(np.stack([np.asarray(plane) for plane in resized]), 0, 1)  # bicubic overshoots


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
