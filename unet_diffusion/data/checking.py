"""Every file is decoded once before training, so that a damaged file is found in a minute and not in the tenth hour."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unet_diffusion.data.decoding import ImageFormat, check_within, decode_image, fitted_image, to_depth
from unet_diffusion.data.files import ImageFiles
from unet_diffusion.data.fingerprints import content_hash
from unet_diffusion.data.stored import only_image
from unet_diffusion.runtime.messages import in_words, printable

T = TypeVar("T")

NUM_NAMED = 5  # bad files named in a message
LARGE_IMAGE = 2**24  # pixels: one of nine times as many takes a gigabyte to decode and scale
_one_at_a_time = Lock()


@dataclass
class StreamedImages:
    """Images that are decoded when a batch asks for them.

    Args:
        files: The files below the root.
        names: The name of each image's file.
        image_format: The size and channels that each image is converted to.
        dtype: torch.uint8, or torch.uint16 if any file holds 16 bits; torch.float32 with a range of values.
    """

    files: ImageFiles
    names: list[str]
    image_format: ImageFormat
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W), as of a tensor."""
        return len(self), self.image_format.channels, self.image_format.height, self.image_format.width

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The images at index (B,), (B, C, H, W). The signature is that of a tensor, and dim must be 0."""
        assert dim == 0
        return torch.stack([to_depth(self._image(self.names[i]), self.dtype) for i in index.tolist()])

    def _image(self, name: str) -> Tensor:
        image = decoded(lambda data: decode_image(data, self.image_format), self.files, name)
        if isinstance(image, str):
            raise ValueError(f"{name} could be read before, and cannot be now: {image}; put it back as it was, and run "
                             "the same command again")  # fmt: skip
        return image


@dataclass
class CheckedImages:
    """The images that could be decoded, and the files that could not.

    Args:
        images: The images (N, C, H, W), as a tensor or decoded when a batch asks for them.
        names: The name of each image's file.
        bad_files: A line "name: reason" for each of the other files.
        sizes: Height and width of each upright image before it was scaled and cut.
        contents: The hash of each image's file as it was decoded.
        dtypes: The types of the numbers in the files.
        are_colours: Whether the channels of all images are grey, RGB, or RGB and alpha.
    """

    images: Tensor | StreamedImages
    names: list[str]
    bad_files: list[str]
    sizes: list[tuple[int, int]]
    contents: list[str]
    dtypes: set[np.dtype] = field(default_factory=set)
    are_colours: bool = True


def load_images(files: ImageFiles, image_format: ImageFormat, *, progress: bool = True) -> CheckedImages:
    """Decode all files into one tensor: uint8, or uint16 if any file holds 16 bits (8-bit values are then times 257).

    With a range of values it is float32 in [-1, 1].

    Args:
        files: The files to decode.
        image_format: The size and channels that each image is converted to.
        progress: Whether a progress bar is shown.
    """
    size = (image_format.channels, image_format.height, image_format.width)
    images = torch.empty(len(files.names), *size, dtype=image_format.dtype)
    checked = CheckedImages(images, [], [], [], [])
    decode = _decoder(files, image_format)
    for name, outcome in in_threads(decode, files.names, "loading images", progress):
        if isinstance(outcome, str):
            checked.bad_files.append(f"{name}: {outcome}")
            continue
        if outcome.image.dtype == torch.uint16:
            images = to_depth(images, torch.uint16)
        images[len(checked.names)] = to_depth(outcome.image, images.dtype)
        _add(checked, name, outcome)
    checked.images = images[: len(checked.names)]
    return checked


def check_images(files: ImageFiles, image_format: ImageFormat, *, progress: bool = True) -> CheckedImages:
    """Decode all files once and keep no image in memory.

    Args:
        files: The files to decode.
        image_format: The size and channels that each image is converted to.
        progress: Whether a progress bar is shown.
    """
    decode = _decoder(files, image_format)

    def check(name: str) -> _Decoded | str:
        outcome = decode(name)
        # Of the pixels only their depth matters from here on.
        return (
            outcome if isinstance(outcome, str) else replace(outcome, image=torch.empty(0, dtype=outcome.image.dtype))
        )

    images = StreamedImages(files, [], image_format, image_format.dtype)
    checked = CheckedImages(images, images.names, [], [], [])
    for name, outcome in in_threads(check, files.names, "checking images", progress):
        if isinstance(outcome, str):
            checked.bad_files.append(f"{name}: {outcome}")
            continue
        if outcome.image.dtype == torch.uint16:
            images.dtype = torch.uint16
        _add(checked, name, outcome)
    return checked


def bad_files_message(bad_files: Sequence[str], num_files: int) -> str:
    """How many files cannot be used, and the first few of them with the reason."""
    lines = [f"{len(bad_files)} of {num_files} image files cannot be used:", *bad_files[:NUM_NAMED]]
    if len(bad_files) > NUM_NAMED:
        lines.append(f"... and {len(bad_files) - NUM_NAMED} more")
    return printable("\n  ".join(lines))


def num_cpus() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(
    function: Callable[[str], T], names: Sequence[str], title: str, progress: bool
) -> Iterator[tuple[str, T]]:
    """Each name with the result of a function, in order. Decoders release Python's lock, so threads use all cores.

    Args:
        function: The function, which is called with each name.
        names: The names.
        title: The title of the progress bar.
        progress: Whether a progress bar is shown.
    """
    with ThreadPoolExecutor(num_cpus()) as pool:
        results = tqdm(pool.map(function, names), title, total=len(names), unit="file", disable=not progress)
        yield from zip(names, results, strict=True)


def decoded(decode: Callable[[bytes], T], files: ImageFiles, name: str) -> T | str:
    """The decoded contents of a file, or the reason why it cannot be read.

    Args:
        decode: The function that decodes the contents of a file.
        files: The files below the root.
        name: The name of the file.
    """
    try:
        return decode(files.read(name))
    except Exception as error:  # on damaged files decoders raise anything, down to SyntaxError
        return reason(error)


def reason(error: Exception) -> str:
    """The reason why a file cannot be read; the message of a decoder says little without its type."""
    is_sentence = isinstance(error, ValueError | OSError)
    return in_words(error) if is_sentence else f"damaged ({type(error).__name__}: {error})"


@dataclass
class _Decoded:
    """An image, its size before it was scaled and cut, the hash of its file, and what its numbers are."""

    image: Tensor
    size: tuple[int, int]
    content: str
    dtype: np.dtype
    are_colours: bool


def _decoder(files: ImageFiles, image_format: ImageFormat) -> Callable[[str], _Decoded | str]:
    def decode(data: bytes) -> _Decoded:
        stored = only_image(data, image_format.channels)
        with _one_at_a_time if math.prod(stored.size) > LARGE_IMAGE else nullcontext():
            image = check_within(fitted_image(stored, image_format), image_format.value_range)
        return _Decoded(image, stored.size, content_hash(data), stored.dtype, stored.kind != "channels")

    return lambda name: decoded(decode, files, name)


def _add(checked: CheckedImages, name: str, outcome: _Decoded) -> None:
    checked.names.append(name)
    checked.sizes.append(outcome.size)
    checked.contents.append(outcome.content)
    checked.dtypes.add(outcome.dtype.newbyteorder("="))
    checked.are_colours &= outcome.are_colours
