"""From the bytes of an image file to a tensor of one shape, in 8 or 16 bits.

Pillow decodes, except for 16-bit PNG: Pillow reduces those with colour or alpha to 8 bits without a word, torchvision keeps
them. All arithmetic is float32, rounded once at the end. Colours are resized multiplied by alpha, so that what is hidden
under transparent pixels does not bleed into the visible ones (Porter & Duff 1984).
"""

import io
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_png

Pixels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]  # (H, W, 1 to 4): grey or RGB, alpha last

UINT8_TO_UINT16 = 257  # 65535 / 255: white stays white
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # red, green, blue; ITU-R BT.601, as Pillow
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

    Reductions are antialiased. Nothing is enlarged. An EXIF orientation is applied; of several frames, the first counts.

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
    height, width = pixels.shape[:2]
    if height < image_format.height or width < image_format.width:
        raise ValueError(f"too small: {height}x{width}, must be at least {image_format.height}x{image_format.width}")
    fitted = _fit(pixels, image_format.height, image_format.width)
    converted = _convert_channels(fitted, image_format, white=int(np.iinfo(pixels.dtype).max))
    return torch.from_numpy(_round_to(converted, pixels.dtype).transpose(2, 0, 1).copy())


def to_depth(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images as uint16 of the same brightness, if that is the dtype; otherwise unchanged."""
    if images.dtype == dtype:
        return images
    return (images.int() * UINT8_TO_UINT16).to(dtype)  # torch has no uint16 arithmetic


def _read_pixels(data: bytes, image_format: ImageFormat) -> Pixels:
    """All pixels of an image, upright, uint8 or uint16."""
    with Image.open(io.BytesIO(data)) as image:
        _check_dimensions(image)
        if image.format == "PNG" and data[PNG_BIT_DEPTH] == 16:
            return _read_16_bit_png(data)
        # Lets JPEG decode to a half, quarter or eighth, but not below twice of what is needed.
        twice = 2 * max(image_format.height, image_format.width)
        image.draft(None, (twice, twice))
        _check_mode(image)
        return _pixels_of(ImageOps.exif_transpose(image))


def _check_dimensions(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{image.height}x{image.width} must not be more than {limit} pixels; reduce it, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no range that is known; save the image in 8 or 16 bits")
    tile = image.tile[0] if image.tile else None
    if tile is not None and not image.mode.startswith("I;16") and ";16" in str(tile[3]):
        raise ValueError(f"16-bit colour in {image.format} cannot be read without loss; save the image as 16-bit PNG")


def _read_16_bit_png(data: bytes) -> NDArray[np.uint16]:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image = decode_png(encoded, ImageReadMode.UNCHANGED, apply_exif_orientation=True)
    return image.permute(1, 2, 0).numpy()


def _pixels_of(image: Image.Image) -> Pixels:
    """Pillow's image as grey or RGB, with alpha if it has transparent pixels."""
    if image.mode.startswith("I;16"):
        return np.asarray(image)[..., None].astype(np.uint16)  # some are big-endian, which torch does not take
    if image.mode in ("1", "L") and not image.has_transparency_data:
        return np.asarray(image.convert("L"))[..., None]
    if image.mode in ("LA", "La"):
        return np.asarray(image.convert("LA"))
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _fit(pixels: Pixels, height: int, width: int) -> Pixels:
    """The largest centred part of that aspect, (height, width, C); untouched where nothing needs to be scaled."""
    scale = min(pixels.shape[0] / height, pixels.shape[1] / width)
    box_height, box_width = height * scale, width * scale
    # Whole pixels, so that a crop without scaling does not interpolate.
    top, left = int((pixels.shape[0] - box_height) / 2), int((pixels.shape[1] - box_width) / 2)
    if scale == 1:
        return pixels[top : top + height, left : left + width]
    box = (left, top, left + box_width, top + box_height)
    white = np.float32(np.iinfo(pixels.dtype).max)
    if not _has_alpha(pixels):
        return np.clip(_resize(pixels, box, height, width), 0, white)  # bicubic overshoots
    return _resize_under_alpha(pixels, box, height, width, white)


def _resize_under_alpha(
    pixels: Pixels, box: tuple[float, float, float, float], height: int, width: int, white: np.float32
) -> NDArray[np.float32]:
    alpha = pixels[..., -1:] / white
    resized = _resize(np.concatenate([pixels[..., :-1] * alpha, alpha], axis=-1), box, height, width)
    alpha = np.clip(resized[..., -1:], 0, 1)
    colour = resized[..., :-1] / np.maximum(alpha, 1 / white)  # less than one level of alpha: nothing to see
    return np.concatenate([np.clip(colour, 0, white), alpha * white], axis=-1)


def _resize(
    pixels: Pixels, box: tuple[float, float, float, float], height: int, width: int
) -> NDArray[np.float32]:
    """Each channel of a box (left, top, right, bottom), bicubic and antialiased."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    resized = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC, box) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized], axis=-1)


def _convert_channels(pixels: Pixels, image_format: ImageFormat, white: int) -> Pixels:
    """The pixels with the asked for channels, (H, W, channels); white is the level of full brightness and opacity."""
    if image_format.channels == 4:
        opaque = np.full_like(pixels[..., :1], white)
        return np.concatenate([_as_rgb(_colour(pixels)), pixels[..., -1:] if _has_alpha(pixels) else opaque], axis=-1)
    if _has_alpha(pixels):
        alpha = pixels[..., -1:] / np.float32(white)
        background = np.array(image_format.background_rgb, dtype=np.float32) * white
        pixels = _as_rgb(_colour(pixels)) * alpha + background * (1 - alpha)
    return _as_rgb(pixels) if image_format.channels == 3 else _as_grey(pixels)


def _has_alpha(pixels: Pixels) -> bool:
    return pixels.shape[-1] in (2, 4)


def _colour(pixels: Pixels) -> Pixels:
    return pixels[..., :-1] if _has_alpha(pixels) else pixels


def _as_rgb(colour: Pixels) -> Pixels:
    return colour.repeat(3, axis=-1) if colour.shape[-1] == 1 else colour


def _as_grey(colour: Pixels) -> Pixels:
    return colour if colour.shape[-1] == 1 else (colour @ LUMA)[..., None]


def _round_to(pixels: Pixels, dtype: np.dtype) -> Pixels:
    return pixels if pixels.dtype == dtype else np.clip(pixels.round(), 0, np.iinfo(dtype).max).astype(dtype)
