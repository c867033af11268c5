"""What the numbers in image files mean, so that images are written with the type and range that they were read with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

OF_COLOURS = (1, 3, 4)  # channels that are grey, RGB, or RGB and alpha
LARGEST = {"uint8": 255, "uint16": 65535}  # the number of white, where no range is declared
TYPES = (*LARGEST, "int8", "int16", "uint32", "int32", "float16", "float32", "float64")  # 64-bit integers are rounded


@dataclass(frozen=True)
class PixelValues:
    """The type of the numbers in files, and the numbers that become -1 and 1.

    Args:
        dtype: The type, as NumPy names it.
        low: The number that becomes -1.
        high: The number that becomes 1.
        shown: The channels that pictures show as red, green and blue, or one that they show as grey; of two channels
            there is no blue. None: the channels are grey, RGB, or RGB and alpha.

    Raises:
        ValueError: If a value is out of range.
    """

    dtype: str = "uint8"
    low: float = 0
    high: float = 255
    shown: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise ValueError(f"dtype of values must be one of {', '.join(TYPES)}, got {self.dtype!r}")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"values must go from a number to a larger one, got {self.low} to {self.high}")
        if self.shown is not None and (not 1 <= len(self.shown) <= 3 or min(self.shown) < 0):
            raise ValueError(f"shown must be one to three numbers of channels, from 0, got {list(self.shown)}")

    @classmethod
    def of_images(cls, dtype: torch.dtype, shown: tuple[int, ...] | None = None) -> Self:
        """The values of images of 8 or 16 bits that use the range of their type, or of floats in [-1, 1].

        Args:
            dtype: The type of the images; other types than uint8 and uint16 are floats in [-1, 1].
            shown: As in the constructor.
        """
        name = str(dtype).removeprefix("torch.")
        return cls(name, 0, LARGEST[name], shown) if name in LARGEST else cls("float32", -1, 1, shown)

    @classmethod
    def from_plain(cls, record: Mapping[str, Any]) -> Self:
        """The values of plain values: the inverse of `plain`."""
        shown = record["shown"]
        return cls(**{**record, "shown": None if shown is None else tuple(shown)})

    def plain(self) -> dict[str, Any]:
        """The fields as plain values, for a checkpoint or JSON."""
        return {**asdict(self), "shown": None if self.shown is None else list(self.shown)}

    @property
    def value_range(self) -> tuple[float, float] | None:
        """The numbers of files that become -1 and 1; None: all of 8 or 16 bits do."""
        has_range = (self.low, self.high) != (0, LARGEST.get(self.dtype))
        return (self.low, self.high) if has_range else None

    @property
    def is_whole(self) -> bool:
        """Whether the range is that of the type: all of 8 or 16 bits, or -1 to 1 of a source of one's own."""
        return self.value_range is None or (self.low, self.high) == (-1, 1)

    @property
    def ends(self) -> str:
        """The numbers that become -1 and 1, as errors show them."""
        return f"{self.low:.6g} to {self.high:.6g}"

    def require_range_of(self, trained: "PixelValues", made: str, fix: str = "") -> None:
        """Refuse these values of data where other numbers become -1 and 1 than in training.

        Args:
            trained: The values in training.
            made: What has them, and how, for the error, such as "the segmenter was trained on".
            fix: What the user can do; by default the range that the data must have is named.

        Raises:
            ValueError: If the ranges differ.
        """
        if (self.low, self.high) == (trained.low, trained.high) or (self.is_whole and trained.is_whole):
            return
        setting = f"set data.value_range to {[trained.low, trained.high]}"
        if trained.is_whole:
            setting = "leave data.value_range out, if the images use the whole range of their type"
        raise ValueError(f"{made} numbers of {trained.ends} as -1 to 1, and the data have {self.ends}; "
                         f"{fix or setting}")  # fmt: skip

    def fit_png(self, channels: int) -> bool:
        """Whether a PNG of 8 bits holds all of an image.

        Args:
            channels: The number of its channels.
        """
        return self.dtype == "uint8" and self.value_range is None and self.shown is None and channels in OF_COLOURS

    def numbers(self, images: Tensor) -> NDArray[Any]:
        """The numbers of images as files hold them, (N, C, H, W); what is beyond -1 and 1 is clipped.

        Args:
            images: Images, (N, C, H, W) in about [-1, 1].
        """
        numbers = (images.clamp(-1, 1).double().cpu().numpy() + 1) * ((self.high - self.low) / 2) + self.low
        dtype = np.dtype(self.dtype)
        return (np.rint(numbers) if dtype.kind in "ui" else numbers).astype(dtype)

    def unit_range(self, numbers: NDArray[Any]) -> Tensor:
        """Images, (N, C, H, W) float32, from the numbers of files: the inverse of `numbers`.

        Args:
            numbers: Numbers of files, (N, C, H, W).
        """
        images = (numbers.astype(np.float64) - self.low) * (2 / (self.high - self.low)) - 1
        return torch.from_numpy(images.astype(np.float32))

    def seen(self, images: Tensor) -> Tensor:
        """Images as pictures show them, (N, C, H, W) with C of 1, 3 or 4.

        Args:
            images: Images, (N, C, H, W) in about [-1, 1].
        """
        return images if self.shown is None else chosen_channels(images, self.shown)


def default_shown(channels: int) -> tuple[int, ...] | None:
    """The channels that pictures show if nobody chooses: the first three, unless they are colours.

    Args:
        channels: The number of channels.
    """
    return None if channels in OF_COLOURS else tuple(range(min(channels, 3)))


def as_colours(images: Tensor) -> Tensor:
    """Images as a picture shows them: those of other channels than 1, 3 or 4 by their first three.

    Args:
        images: Images, (N, C, H, W).
    """
    shown = default_shown(images.shape[1])
    return images if shown is None else chosen_channels(images, shown)


def chosen_channels(images: Tensor, shown: Sequence[int]) -> Tensor:
    """Some channels of images as grey, or as red, green and blue, (N, 1, H, W) or (N, 3, H, W).

    Args:
        images: Images, (N, C, H, W) in [-1, 1].
        shown: One to three numbers of channels; of two, blue is black.

    Raises:
        ValueError: If there is no such channel.
    """
    if max(shown) >= images.shape[1]:
        raise ValueError(f"shown channels must be from 0 to {images.shape[1] - 1}, got {list(shown)}; images have "
                         f"{images.shape[1]} channels")  # fmt: skip
    picked = images[:, list(shown)]
    return torch.cat([picked, torch.full_like(picked[:, :1], -1)], dim=1) if len(shown) == 2 else picked
