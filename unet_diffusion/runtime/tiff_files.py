"""Images of any number of channels as TIFF: what PNG cannot hold, and what ImageJ and tifffile read as channels."""

import io
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from unet_diffusion.runtime.atomic_files import atomic_write

OF_IMAGEJ = ("uint8", "uint16", "float32")  # types that ImageJ's own kind of TIFF holds; others say the axes in JSON
RGBA = 4  # channels


def tiff_of(numbers: NDArray[Any], *, are_colours: bool) -> bytes:
    """The contents of a TIFF file; equal images give equal bytes.

    Colours are samples of a pixel. Channels are pages, and the metadata call their axis C, so that nobody needs to
    guess: ImageJ's metadata for the types that it has, and otherwise tifffile's.

    Args:
        numbers: The image, (C, H, W).
        are_colours: Whether the channels are grey, RGB, or RGB and alpha.
    """
    import tifffile  # PNG does without

    buffer = io.BytesIO()
    if are_colours or len(numbers) == 1:
        pixels = numbers.transpose(1, 2, 0) if len(numbers) > 1 else numbers[0]
        photometric = "rgb" if len(numbers) > 1 else "minisblack"
        extra = ["unassalpha"] if len(numbers) == RGBA else None
        tifffile.imwrite(buffer, pixels, photometric=photometric, extrasamples=extra, metadata=None)
    elif numbers.dtype.name in OF_IMAGEJ:
        tifffile.imwrite(buffer, numbers, imagej=True, metadata={"axes": "CYX"})
    else:
        tifffile.imwrite(buffer, numbers, photometric="minisblack", metadata={"axes": "CYX"})
    return buffer.getvalue()


def write_tiff(numbers: NDArray[Any], path: Path, *, are_colours: bool) -> None:
    """Write a TIFF file, whole or not at all, replacing an earlier file; see `tiff_of`."""
    with atomic_write(path) as partial:
        partial.write_bytes(tiff_of(numbers, are_colours=are_colours))


def read_tiff(path: Path) -> NDArray[Any]:
    """The numbers of a file that `write_tiff` wrote, (C, H, W)."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        numbers: NDArray[Any] = tiff.asarray()
        numbers = numbers.astype(numbers.dtype.newbyteorder("="), copy=False)  # ImageJ's are big-endian
        if numbers.ndim == 2:
            return numbers[None]
        return numbers.transpose(2, 0, 1) if tiff.series[0].axes.endswith("S") else numbers
