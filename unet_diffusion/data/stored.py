"""What an image file says of itself, for images and labels alike: numbers as they are stored, and what they mean.

TIFF is read by tifffile, whose tags say all of it (https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf). The
rest is read by Pillow, except where Pillow keeps 8 bits of 16: PNG with colours or alpha, and PPM.
"""

import io
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

Kind = Literal["grey", "RGB", "palette"]
Stored = NDArray[Any]  # (H, W, S) numbers as stored, S of them a pixel

# Pillow goes by the content, not by the name, and hands PostScript to Ghostscript, which is a programming language.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # + is BigTIFF
PNG_BIT_DEPTH = 24  # position of that byte: 8 of signature, 8 of chunk header, 8 of width and height
PNG_SAMPLES = {2: 3, 4: 2, 6: 4}  # numbers a pixel by the byte after that, the colour type
WEBP_LOSSLESS = b"VP8L"
CONTIGUOUS = ("imagej", "shaped", "stk")  # kinds of stacks whose first page alone may have tags
# Compressions of TIFF that keep every number: none, CCITT, LZW, Deflate, PackBits, LZMA, Zstandard and PNG. Others,
# such as JPEG 2000, may or may not, and do not say so.
LOSSLESS = (1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 34926, 34933, 50000)
REDUCED_IMAGE = 2  # of tag 255, SubfileType, which is older than tag 254
KINDS = {
    "u": "{}-bit integers",
    "i": "signed {}-bit integers",
    "f": "{}-bit floating-point numbers",
    "c": "{}-bit complex numbers",
}

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what is wrong with a file its reader is told


@dataclass(frozen=True)
class StoredImage:
    """One image of a file, of which nothing but the header has been read.

    Args:
        file_format: Its name, such as "PNG".
        stored_size: Height and width before it is turned upright.
        kind: What the numbers of a pixel are; with "palette" the first is an index.
        num_samples: Numbers a pixel, alpha included.
        dtype: Type of the numbers.
        bits: Bits of a number; the type may have more.
        decode: Reads the numbers, (H, W, S); it may reduce the image to no less than twice the side it is given.
        white: The number of full brightness, or of black if `is_inverted`; None: the numbers have no range.
        is_inverted: Whether 0 is white.
        alpha: Whether the last number is alpha, and whether colours are stored multiplied by it.
        transparent: The colour that stands for transparent pixels, one number for each sample.
        palette: Colours, (N, 3) or with alpha (N, 4), uint8.
        orientation: 1 to 8, as in EXIF and TIFF.
        is_lossy: Whether numbers may have been changed when the file was written.
    """

    file_format: str
    stored_size: tuple[int, int]
    kind: Kind
    num_samples: int
    dtype: np.dtype[Any]
    bits: int
    decode: Callable[[int | None], Stored]
    white: int | None = None
    is_inverted: bool = False
    alpha: Literal["straight", "premultiplied"] | None = None
    transparent: tuple[int, ...] | None = None
    palette: NDArray[np.uint8] | None = None
    orientation: int = 1
    is_lossy: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright image, in pixels."""
        height, width = self.stored_size
        return (width, height) if self.orientation in (5, 6, 7, 8) else (height, width)

    @property
    def num_channels(self) -> int:
        """Numbers a pixel but for alpha."""
        return self.num_samples - (self.alpha is not None)

    def __str__(self) -> str:
        """Such as "32-bit floating-point numbers"."""
        return KINDS.get(self.dtype.kind, "{}-bit numbers").format(self.bits)

    def numbers(self, reducible_to: int | None = None) -> Stored:
        """The numbers as they are stored, upright, (H, W, S) in the byte order of the machine.

        Args:
            reducible_to: The image may come smaller, but no side less than twice this; None: it comes whole.
        """
        numbers = self.decode(reducible_to)
        return _upright(numbers, self.orientation).astype(numbers.dtype.newbyteorder("="), copy=False)


def stored_images(data: bytes) -> Iterator[StoredImage]:
    """Each image of a file, one after the other.

    TIFF may have several: its pages, without reduced copies and masks of others. Of other formats the first counts:
    further frames are previews or animations.

    Args:
        data: Contents of an image file.

    Raises:
        ValueError: If the file is none, has an image of more than PIL.Image.MAX_IMAGE_PIXELS, or one that cannot be
            read.
        Exception: If the file is damaged; its type is the decoder's.
    """
    if data[:4] in TIFF_SIGNATURES:
        yield from _stored_in_tiff(data)
    else:
        image = _opened(data)
        yield _stored_in_pillow(image, data)


def _check_dimensions(height: int, width: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise ValueError(_too_large(f"{height}x{width}"))


def _too_large(size: str) -> str:
    return f"an image must have at most {Image.MAX_IMAGE_PIXELS} pixels, got {size}; reduce it, or cut it into parts"


def _opened(data: bytes) -> Image.Image:
    """Pillow's image, of which nothing but the header has been read; too large a one is refused."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # of twice the pixels; below, Pillow only warns
        raise ValueError(_too_large("more than twice as many")) from error
    except UnidentifiedImageError:
        begins = f"begins with {data[:8]!r}" if data else "is empty"
        raise ValueError(f"a file must be a whole image of one of {', '.join(FORMATS)}, and this one {begins}; "
                         "copy it again, or save the image as PNG") from None  # fmt: skip
    _check_dimensions(image.height, image.width)
    return image


def _upright(numbers: Stored, orientation: int) -> Stored:
    """A view of the numbers with an orientation of EXIF or TIFF undone (TIFF 6.0, tag 274)."""
    if orientation in (5, 6, 7, 8):
        numbers = numbers.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        numbers = numbers[::-1]
    if orientation in (2, 3, 6, 7):
        numbers = numbers[:, ::-1]
    return numbers


def _stored_in_pillow(image: Image.Image, data: bytes) -> StoredImage:
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
        return _as_rgb(image, common)
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


def _as_rgb(image: Image.Image, common: dict[str, Any]) -> StoredImage:
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
        return _as_rgb(image, common)
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


def _stored_in_tiff(data: bytes) -> Iterator[StoredImage]:
    from tifffile import TiffFile  # other formats do without

    tiff = TiffFile(io.BytesIO(data))  # open for as long as an image may be decoded
    pages = list(_pages(tiff))
    whole = [page for page in pages if not (page.is_mask or page.is_reduced or _is_older_reduced(page))]
    for page in whole or pages:
        _check_tags(page)
        yield from _planes(_stored_in_page(page, data), page, tiff, data)


def _pages(tiff: "TiffFile") -> Iterator["TiffPage"]:
    offsets = set()
    for page in tiff.pages:
        if page.offset in offsets:
            raise ValueError("pages must follow one another, and in this file one leads back; save the image again")
        offsets.add(page.offset)
        yield page.aspage()
    if not offsets:
        raise ValueError("a TIFF file must hold a page, and this one is cut off before it; copy it again")


def _check_tags(page: "TiffPage") -> None:
    """Refuse tags of a damaged file, which may hold anything, and for which tifffile would allocate memory."""
    sides = (page.imagelength, page.imagewidth, page.tilelength, page.tilewidth)
    if not all(isinstance(side, int) for side in sides) or min(sides[:2]) < 1:
        raise ValueError(
            f"height and width must be whole numbers, got {sides[0]!r} and {sides[1]!r}; copy the file again"
        )
    _check_dimensions(*sides[:2])
    _check_dimensions(*sides[2:])


def _is_older_reduced(page: "TiffPage") -> bool:
    return page.tags.valueof(255) == REDUCED_IMAGE


def _planes(image: StoredImage, page: "TiffPage", tiff: "TiffFile", data: bytes) -> Iterator[StoredImage]:
    """The image; or, of a stack whose first page alone has tags, as ImageJ writes beyond 4 GB, each of its images."""
    series = tiff.series[0] if len(tiff.pages) == 1 else None
    num_planes = series.size // page.size if series is not None and series.kind.lower() in CONTIGUOUS else 1
    if num_planes < 2:
        yield image
        return
    if page.compression != 1 or not page.is_contiguous:
        raise ValueError(f"a stack of {num_planes} images with one page must be uncompressed; save it with a page each")
    _, _, height, width, num_samples = page.shaped
    dtype = np.dtype(tiff.byteorder + image.dtype.char)
    num_bytes = num_planes * height * width * num_samples * dtype.itemsize
    if page.dataoffsets[0] + num_bytes > len(data):
        raise ValueError(f"the file is cut off: {num_bytes} bytes of {num_planes} images must be in it; copy it again")
    for plane in range(num_planes):
        offset = page.dataoffsets[0] + plane * height * width * num_samples * dtype.itemsize

        def decode(reducible_to: int | None, offset: int = offset) -> Stored:
            count = height * width * num_samples
            return np.frombuffer(data, dtype, count, offset).reshape(height, width, num_samples)

        yield StoredImage(**{**vars(image), "decode": decode})


def _stored_in_page(page: "TiffPage", data: bytes) -> StoredImage:
    from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC

    planar, depth, height, width, contiguous = page.shaped
    photometric, num_samples = page.photometric, planar * contiguous
    orientation = page.tags.valueof(274, default=1)
    is_jpeg = page.compression in (COMPRESSION.OJPEG, COMPRESSION.JPEG)
    is_lossy = page.compression not in LOSSLESS
    name = getattr(page.compression, "name", page.compression)
    common: dict[str, Any] = {
        "file_format": f"{name} in TIFF" if is_lossy else "TIFF",
        "stored_size": (height, width),
        "orientation": orientation,
    }
    if page.dtype is None:
        raise ValueError(f"numbers must be of 8, 16, 32 or 64 bits, got {page.bitspersample} of sample format "
                         f"{page.sampleformat}; save the image in 8 or 16 bits")  # fmt: skip
    if depth != 1:
        raise ValueError(f"a page must hold one image, got a volume of {depth}; save them as pages")
    if photometric == PHOTOMETRIC.SEPARATED or (photometric == PHOTOMETRIC.YCBCR and not is_jpeg):
        if page.bitspersample != 8:
            raise ValueError(f"CMYK and YCbCr must have 8 bits, got {page.bitspersample}; save the image as RGB")
        image = _opened(data)
        image.seek(page.index)
        return _as_rgb(image, {**common, "orientation": 1, "stored_size": (image.height, image.width)})
    kinds: dict[int, Kind] = {
        PHOTOMETRIC.MINISWHITE: "grey",
        PHOTOMETRIC.MINISBLACK: "grey",
        PHOTOMETRIC.RGB: "RGB",
        PHOTOMETRIC.YCBCR: "RGB",  # JPEG is decoded to RGB
        PHOTOMETRIC.PALETTE: "palette",
        PHOTOMETRIC.MASK: "grey",
    }
    if photometric not in kinds:
        name = getattr(photometric, "name", photometric)
        raise ValueError(f"colours must be grey, RGB, CMYK or of a palette, got {name}; save the image as RGB")
    extra = page.extrasamples[-1:]
    associated, straight = (EXTRASAMPLE.ASSOCALPHA,), (EXTRASAMPLE.UNASSALPHA,)
    is_integer = page.dtype.kind in "ub"
    bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
    return StoredImage(
        **common,
        kind=kinds[photometric],
        num_samples=num_samples,
        dtype=np.dtype(np.uint8) if page.dtype.kind == "b" else page.dtype,
        bits=bits,
        decode=lambda _: _numbers_of(page),
        white=2**bits - 1 if is_integer and bits <= 16 else None,
        is_inverted=photometric == PHOTOMETRIC.MINISWHITE,
        alpha="premultiplied" if extra == associated else "straight" if extra == straight else None,
        palette=_colour_map(page) if kinds[photometric] == "palette" else None,
        is_lossy=is_lossy,
    )


def _numbers_of(page: "TiffPage") -> Stored:
    if not all(page.databytecounts):  # tifffile would fill those in with zeros
        missing, num = page.databytecounts.count(0), len(page.databytecounts)
        raise ValueError(f"{missing} of {num} strips or tiles were never written; save the image again")
    numbers = page.asarray(squeeze=False)[:, 0]  # (planar, H, W, contiguous)
    numbers = numbers.astype(np.uint8) if numbers.dtype == np.bool_ else numbers
    planar, height, width, contiguous = numbers.shape
    return numbers.transpose(1, 2, 0, 3).reshape(height, width, planar * contiguous)


def _colour_map(page: "TiffPage") -> NDArray[np.uint8]:
    """The colours of a page, (N, 3): stored in 16 bits, but some programs write 8."""
    if page.colormap is None:
        raise ValueError("a page of colour indices must have a colour map; save the image as RGB")
    colours = np.asarray(page.colormap).T
    return (colours if colours.max() < 256 else colours >> 8).astype(np.uint8)
