"""Image files that Pillow reads, except where it keeps 8 bits of 16: PNG with colours or alpha, and PPM."""

import io
import re
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from unet_diffusion.data.stored_image import Stored, StoredImage, check_dimensions, too_large

# Pillow goes by the content, not by the name, and hands PostScript to Ghostscript, which is a programming language.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PNG_BIT_DEPTH = 24  # position of that byte: 8 of signature, 8 of chunk header, 8 of width and height
PNG_SAMPLES = {2: 3, 4: 2, 6: 4}  # numbers a pixel by the byte after that, the colour type
WEBP_LOSSLESS = b"VP8L"


def opened(data: bytes) -> Image.Image:
    """Pillow's image, of which nothing but the header has been read; too large a one is refused."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # of twice the pixels; below, Pillow only warns
        raise ValueError(too_large("more than twice as many")) from error
    except UnidentifiedImageError:
        begins = f"begins with {data[:8]!r}" if data else "is empty"
        raise ValueError(f"a file must be a whole image of one of {', '.join(FORMATS)}, and this one {begins}; "
                         "copy it again, or save the image as PNG") from None  # fmt: skip
    check_dimensions(image.height, image.width)
    return image


def stored_in_pillow(image: Image.Image, data: bytes) -> StoredImage:
    """The image that Pillow has opened.

    Args:
        image: Pillow's image, as `opened` gives it.
        data: The contents of its file.
    """
    # For EXIF Pillow reads the whole of a PNG, where it may come last.
    may_have_exif = image.format != "PNG" or any(mark in data for mark in (b"eXIf", b"xmp", b"Raw profile type exif"))
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if may_have_exif else 1
    common: dict[str, Any] = {
        "file_format": image.format or "",
        "stored_size": (image.height, image.width),
        "orientation": orientation,
        "is_lossy": image.format in ("AVIF", "JPEG", "MPO")
        or (image.format == "WEBP" and WEBP_LOSSLESS not in (data[12:16], data[30:34])),
    }
    if image.format == "PNG" and data[PNG_BIT_DEPTH] == 16 and image.mode not in ("L", "I;16"):
        return _colours_of_16_bit_png(data, "transparency" in image.info, common)
    if image.format == "PPM":
        return _stored_in_ppm(image, data, common)
    mode = image.mode
    if mode in ("P", "PA"):
        return _indices(image, common)
    if mode not in ("1", "L", "LA", "I;16", "RGB", "RGBA"):
        return as_rgb(image, common)
    bits = {"1": 1, "I;16": 16}.get(mode, 8)
    if image.format == "PNG" and mode == "L":
        bits = data[PNG_BIT_DEPTH]

    def decode(reducible_to: int | None) -> Stored:
        numbers = _array_of(image, reducible_to)
        return numbers // (255 // (2**bits - 1)) if bits in (2, 4) else numbers  # Pillow scales those to 8 bits

    key = image.info.get("transparency")
    if isinstance(key, int):
        key = (int(key > 0) if mode == "1" else key,)
    return StoredImage(
        **common,
        kind="RGB" if mode.startswith("RGB") else "grey",
        num_samples=len(image.getbands()),
        dtype=np.dtype(np.uint16 if bits == 16 else np.uint8),
        bits=bits,
        decode=decode,
        white=2**bits - 1,
        alpha="straight" if mode in ("LA", "RGBA") else None,
        transparent=key,
    )


def _array_of(image: Image.Image, reducible_to: int | None = None) -> Stored:
    if reducible_to is not None:  # lets JPEG decode to a half, quarter or eighth
        image.draft(None, (2 * reducible_to, 2 * reducible_to))
    array = np.asarray(image)
    array = array if array.ndim == 3 else array[..., None]
    return array.astype(np.uint8) if array.dtype == np.bool_ else array


def _indices(image: Image.Image, common: dict[str, Any]) -> StoredImage:
    image.load()  # some formats have their palette only then
    num_samples = len(image.getbands())

    def decode(reducible_to: int | None) -> Stored:
        return indices

    indices = _array_of(image)
    image.apply_transparency()
    colours = np.array(image.getpalette("RGBA"), dtype=np.uint8).reshape(-1, 4)
    return StoredImage(
        **common,
        kind="palette",
        num_samples=num_samples,
        dtype=np.dtype(np.uint8),
        bits=8,
        decode=decode,
        white=255,
        alpha="straight" if num_samples == 2 else None,
        palette=colours if (colours[:, 3] < 255).any() else colours[:, :3],
    )


def as_rgb(image: Image.Image, common: dict[str, Any]) -> StoredImage:
    """The pixels of colours in another system, such as CMYK, and of numbers without a range."""
    if image.mode in ("I", "F"):
        dtype = np.dtype(np.int32 if image.mode == "I" else np.float32)
        return StoredImage(
            **common, kind="grey", num_samples=1, dtype=dtype, bits=32, decode=lambda _: _array_of(image)
        )

    def decode(reducible_to: int | None) -> Stored:
        if reducible_to is not None:
            image.draft(None, (2 * reducible_to, 2 * reducible_to))
        return np.asarray(image.convert("RGB"))

    return StoredImage(**common, kind="RGB", num_samples=3, dtype=np.dtype(np.uint8), bits=8, decode=decode, white=255)


def _colours_of_16_bit_png(data: bytes, has_transparent_colour: bool, common: dict[str, Any]) -> StoredImage:
    """Grey with alpha, or RGB with or without; a transparent colour is decoded to alpha."""
    num_samples = PNG_SAMPLES[data[PNG_BIT_DEPTH + 1]] + has_transparent_colour

    def decode(reducible_to: int | None) -> Stored:
        import imagecodecs  # such files are rare

        return imagecodecs.png_decode(data)

    return StoredImage(
        **common,
        kind="grey" if num_samples == 2 else "RGB",
        num_samples=num_samples,
        dtype=np.dtype(np.uint16),
        bits=16,
        decode=decode,
        white=2**16 - 1,
        alpha="straight" if num_samples in (2, 4) else None,
    )


def _stored_in_ppm(image: Image.Image, data: bytes, common: dict[str, Any]) -> StoredImage:
    """Portable bitmap, grey map or pixel map, whose header says the number of white (netpbm.sourceforge.net/doc)."""
    if image.mode not in ("1", "L", "I", "RGB"):
        return as_rgb(image, common)
    decoder, _, offset, arguments = getattr(image, "tile")[0]  # noqa: B009 (how the file lays out its pixels)
    is_raw = decoder == "raw"
    white = 1 if image.mode == "1" else {"I": 65535}.get(image.mode, 255) if is_raw else arguments[1]
    dtype = np.dtype(np.uint16 if white > 255 else np.uint8)

    def decode(reducible_to: int | None) -> Stored:
        if image.mode == "RGB" and white > 255:
            return _pixel_map(data, offset, (image.height, image.width), is_plain=decoder == "ppm_plain")
        pillows_white = 65535 if white > 255 else 1 if image.mode == "1" else 255
        return ((_array_of(image).astype(np.uint32) * white + pillows_white // 2) // pillows_white).astype(dtype)

    num_samples = len(image.getbands())
    return StoredImage(
        **common,
        kind="RGB" if num_samples == 3 else "grey",
        num_samples=num_samples,
        dtype=dtype,
        bits=white.bit_length(),
        decode=decode,
        white=white,
    )


def _pixel_map(data: bytes, offset: int, size: tuple[int, int], *, is_plain: bool) -> Stored:
    """RGB of 16 bits, of which Pillow keeps 8."""
    count = 3 * size[0] * size[1]
    if not is_plain and len(data) < offset + 2 * count:
        raise ValueError(f"the file is cut off: {count} numbers of 16 bits must follow its header; copy it again")
    if is_plain:
        numbers = np.array(re.sub(rb"#[^\r\n]*", b"", data[offset:]).split()[:count], dtype=np.uint16)
    else:
        numbers = np.frombuffer(data, ">u2", count, offset)
    return numbers.reshape(*size, 3)
