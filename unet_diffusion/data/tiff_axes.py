"""Which pages of a TIFF file are channels of one image, and which are images of a stack.

A page is a plane; what several planes are is said, if at all, by metadata: OME, ImageJ, those of tifffile and of makers
of microscopes. tifffile reads them as a letter for each axis: C for channels, Z for depth, T for time, and I or Q where
nothing is said (https://github.com/cgohlke/tifffile). Channels are taken for channels, depth and time for images.
Pages of which nothing is said are channels only where the user says how many there must be, and as many there are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from unet_diffusion.data.stored_image import Stored, StoredImage, check_dimensions
from unet_diffusion.runtime.pixel_values import OF_COLOURS

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

CHANNELS, UNSAID, OF_A_PAGE = "C", "IQ", "YXS"  # letters of axes
SAY_SO = "write them as such: tifffile.imwrite(path, array, imagej=True, metadata={'axes': 'CYX'})"
NAMES = {"Z": "depth", "T": "time"}


@dataclass(frozen=True)
class Plane:
    """A page of a file, or an image of a stack whose first page alone has tags.

    Args:
        page: The number of the page.
        image: The image in it.
    """

    page: int
    image: StoredImage


def images_of(planes: Sequence[Plane], tiff: "TiffFile", channels: int) -> Iterator[StoredImage]:
    """The images of a file whose planes may be channels of one.

    Args:
        planes: The planes, without reduced copies and masks of others.
        tiff: The file.
        channels: The number of channels that images must have.

    Raises:
        ValueError: If planes that are channels of an image differ.
    """
    if len(planes) < 2:
        groups = [[plane] for plane in planes]
    elif any(CHANNELS in dict(_page_axes(series)) for series in tiff.series):
        groups = [group for series in tiff.series for group in _by_channel(series, planes, tiff)]
    elif len(planes) == channels and channels not in OF_COLOURS and _is_unsaid(tiff):
        groups = [list(planes)]
    else:
        groups = [[plane] for plane in planes]
    for group in groups:
        yield group[0].image if len(group) == 1 else _joined([plane.image for plane in group])


def what_pages_are(tiff: "TiffFile", num_images: int) -> str:
    """Why a file holds several images, and what to do about it, in words.

    Args:
        tiff: The file.
        num_images: The number of its images.
    """
    axes = {letter for series in tiff.series for letter, _ in _page_axes(series)} - {*UNSAID, CHANNELS}
    say_so = f"if they are channels, {SAY_SO}"
    if axes:
        kind = tiff.series[0].kind
        named = " and ".join(f"{letter} ({NAMES[letter]})" if letter in NAMES else letter for letter in sorted(axes))
        return f"{num_images} images along {named}, as its {kind} metadata say; save each as a file, or, {say_so}"
    can_be_said = num_images not in OF_COLOURS and _is_unsaid(tiff)
    fix = f"if they are channels, set channels to {num_images}" if can_be_said else say_so
    return f"{num_images} pages and does not say what they are; save each page as a file, or, {fix}"


def _page_axes(series: "TiffPageSeries") -> list[tuple[str, int]]:
    """Each axis along which a series has pages, and its length; channels within a page are samples."""
    sizes = zip(series.axes, series.shape, strict=True)  # a letter may come twice: "QQYX"
    return [(letter, size) for letter, size in sizes if letter not in OF_A_PAGE and size > 1]


def _is_unsaid(tiff: "TiffFile") -> bool:
    """Whether the file says of no page what it is, and its pages go along one axis at most."""
    return all(len(axes) < 2 and {letter for letter, _ in axes} <= {*UNSAID} for axes in map(_page_axes, tiff.series))


def _by_channel(series: "TiffPageSeries", planes: Sequence[Plane], tiff: "TiffFile") -> list[list[Plane]]:
    """The planes of a series, those of one image together."""
    if len(tiff.pages) == 1:
        members: list[Plane | None] = list(planes)
    else:
        of_page = {plane.page: plane for plane in planes}
        members = [of_page.get(page.index) if page is not None else None for page in series.pages]
    axes = _page_axes(series)
    letters, sizes = [letter for letter, _ in axes], [size for _, size in axes]
    if math.prod(sizes) != len(members) or None in members:
        raise ValueError(
            f"a file must hold all pages that its {series.kind} metadata speak of ({series.axes} of "
            f"{'x'.join(map(str, series.shape))}), and some are missing, or in other files; save the image in one file"
        )
    order, num_channels = np.arange(len(members)).reshape(sizes), 1
    if CHANNELS in letters:
        order, num_channels = np.moveaxis(order, letters.index(CHANNELS), -1), sizes[letters.index(CHANNELS)]
    return [[members[i] for i in row] for row in order.reshape(-1, num_channels).tolist()]  # type: ignore[misc]


def _joined(planes: Sequence[StoredImage]) -> StoredImage:
    """The image whose channels are planes."""
    first = planes[0]
    alike = [(one.stored_size, one.kind, one.num_samples, one.dtype, one.bits, one.is_inverted) for one in planes]
    if len({*alike}) > 1 or (first.kind, first.num_samples) != ("grey", 1):
        raise ValueError(
            f"channels of an image must be grey and alike, and this file has {len(planes)} pages of "
            f"{len({*alike})} kinds, the first {first.num_channels} {first.kind}; save them as one array"
        )
    check_dimensions(*first.stored_size, len(planes))

    def decode(reducible_to: int | None) -> Stored:
        return np.concatenate([plane.decode(None) for plane in planes], axis=-1)

    is_lossy = any(plane.is_lossy for plane in planes)
    return replace(first, kind="channels", num_samples=len(planes), decode=decode, is_lossy=is_lossy)
