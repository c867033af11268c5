"""The pages of a TIFF file, read by tifffile, whose tags say what their numbers mean.

See https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf; `tiff_axes` says which pages are channels of one
image.
"""

import io
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unet_diffusion.data.stored_image import Kind, Stored, StoredImage, check_dimensions
from unet_diffusion.data.stored_pillow import as_rgb, opened
from unet_diffusion.data.tiff_axes import Plane, images_of, what_pages_are

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

CONTIGUOUS = ("imagej", "shaped", "stk")  # kinds of stacks whose first page alone may have tags
# Compressions of TIFF that keep every number: none, CCITT, LZW, Deflate, PackBits, LZMA, Zstandard and PNG. Others,
# such as JPEG 2000, may or may not, and do not say so.
LOSSLESS = (1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 34926, 34933, 50000)
REDUCED_IMAGE = 2  # of tag 255, SubfileType, which is older than tag 254

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what is wrong with a file its reader is told


def stored_in_tiff(data: bytes, channels: int | None) -> Iterator[StoredImage]:
    """Each image of a TIFF file; see `stored.stored_images`."""
    tiff = _opened_tiff(data)
    if channels is None:
        yield from (plane.image for plane in _planes(tiff, data))
    else:
        yield from images_of(list(_planes(tiff, data)), tiff, channels)


def why_several(data: bytes, num_images: int) -> str:
    """Why a TIFF file holds several images, and what to do about it, in words; see `what_pages_are`."""
    return what_pages_are(_opened_tiff(data), num_images)


def _opened_tiff(data: bytes) -> "TiffFile":
    from tifffile import TiffFile  # other formats do without

    return TiffFile(io.BytesIO(data))  # open for as long as an image may be decoded


def _planes(tiff: "TiffFile", data: bytes) -> Iterator[Plane]:
    pages = list(_pages(tiff))
    whole = [page for page in pages if not (page.is_mask or page.is_reduced or _is_older_reduced(page))]
    for page in whole or pages:
        _check_tags(page)
        for image in _images_of_page(_stored_in_page(page, data), page, tiff, data):
            yield Plane(page.index, image)


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
    check_dimensions(*sides[:2])
    check_dimensions(*sides[2:])


def _is_older_reduced(page: "TiffPage") -> bool:
    return page.tags.valueof(255) == REDUCED_IMAGE


def _images_of_page(image: StoredImage, page: "TiffPage", tiff: "TiffFile", data: bytes) -> Iterator[StoredImage]:
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
        image = opened(data)
        image.seek(page.index)
        return as_rgb(image, {**common, "orientation": 1, "stored_size": (image.height, image.width)})
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
    kind = kinds[photometric]
    num_colours = {"grey": 1, "RGB": 3}.get(kind, num_samples)
    associated, straight = (EXTRASAMPLE.ASSOCALPHA,), (EXTRASAMPLE.UNASSALPHA,)
    is_alpha = {*associated, *straight} & {*page.extrasamples}
    # Of what is beside grey or RGB nothing is said, but a number beside RGB may be alpha.
    if num_samples > num_colours and not is_alpha and (kind, num_samples) != ("RGB", 4):
        kind = "channels"
    check_dimensions(height, width, num_samples)
    is_integer = page.dtype.kind in "ub"
    bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
    return StoredImage(
        **common,
        kind=kind,
        num_samples=num_samples,
        dtype=np.dtype(np.uint8) if page.dtype.kind == "b" else page.dtype,
        bits=bits,
        decode=lambda _: _numbers_of(page),
        white=2**bits - 1 if is_integer and bits <= 16 else None,
        is_inverted=photometric == PHOTOMETRIC.MINISWHITE,
        alpha="premultiplied" if extra == associated else "straight" if extra == straight else None,
        palette=_colour_map(page) if kind == "palette" else None,
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
