"""One image of a file as the file stores it: numbers, and what they mean."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unet_diffusion.runtime.pixel_values import OF_COLOURS

Kind = Literal["grey", "RGB", "palette", "channels"]
Stored = NDArray[Any]  # (H, W, S) numbers as stored, S of them a pixel

KINDS = {
    "u": "{}-bit integers",
    "i": "signed {}-bit integers",
    "f": "{}-bit floating-point numbers",
    "c": "{}-bit complex numbers",
}


@dataclass(frozen=True)
class StoredImage:
    """One image of a file, of which nothing but the header has been read.

    Args:
        file_format: Its name, such as "PNG".
        stored_size: Height and width before it is turned upright.
        kind: What the numbers of a pixel are; with "palette" the first is an index, and "channels" are no colours.
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


def check_dimensions(height: int, width: int, num_samples: int = 1) -> None:
    """Refuse an image for which too much memory would be allocated.

    Args:
        height: Its height in pixels.
        width: Its width in pixels.
        num_samples: Numbers a pixel; each four of them count as a pixel.

    Raises:
        ValueError: If it has more pixels than PIL.Image.MAX_IMAGE_PIXELS.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width * -(-num_samples // OF_COLOURS[-1]) > limit:
        channels = f" of {num_samples} channels" if num_samples > OF_COLOURS[-1] else ""
        raise ValueError(too_large(f"{height}x{width}{channels}"))


def too_large(size: str) -> str:
    """Why an image is too large, in words.

    Args:
        size: Its size, in words.
    """
    return f"an image must have at most {Image.MAX_IMAGE_PIXELS} pixels, got {size}; reduce it, or cut it into parts"


def _upright(numbers: Stored, orientation: int) -> Stored:
    """A view of the numbers with an orientation of EXIF or TIFF undone (TIFF 6.0, tag 274)."""
    if orientation in (5, 6, 7, 8):
        numbers = numbers.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        numbers = numbers[::-1]
    if orientation in (2, 3, 6, 7):
        numbers = numbers[:, ::-1]
    return numbers


def colours_of(indices: Stored, palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The colours of indices.

    Args:
        indices: Numbers of colours of the palette.
        palette: The colours, (N, 3) or (N, 4).

    Raises:
        ValueError: If a number is beyond the palette.
    """
    if (largest := int(indices.max(initial=0))) >= len(palette):
        raise ValueError(f"indices must be less than the {len(palette)} colours of the palette, got {largest}; "
                         "save the image again")  # fmt: skip
    return palette[indices]
