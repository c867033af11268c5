"""Every file is decoded once before training, so that a damaged one is found in a minute and not in the tenth hour."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from unet_diffusion.data.decoding import ImageFormat, decode_image, to_depth, upright_size
from unet_diffusion.data.files import ImageFiles
from unet_diffusion.usage import in_words, printable

T = TypeVar("T")

NUM_NAMED = 5  # bad files named in a message
LARGE_IMAGE = 2**24  # pixels: one of nine times as many takes a gigabyte to decode and scale
_one_at_a_time = Lock()


@dataclass
class StreamedImages:
    """Images that are decoded when they are asked for.

    Args:
        files: where they are read from.
        names: the file of each image.
        image_format: what each is turned into.
        dtype: torch.uint8, or torch.uint16 if any file holds 16 bits.
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
        """The images at index (B,), (B, C, H, W); called as a tensor's, so dim must be 0."""
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
    """What became of the files.

    Args:
        images: those that could be decoded, as a tensor (N, C, H, W) or streamed.
        names: the file of each image.
        bad_files: "name: reason" for each of the others.
    """

    images: Tensor | StreamedImages
    names: list[str]
    bad_files: list[str]


def load_images(files: ImageFiles, image_format: ImageFormat, *, progress: bool = True) -> CheckedImages:
    """Decode all files into one tensor: uint8, or uint16 if any file holds 16 bits (8-bit values are then times 257).

    Args:
        files: what to decode.
        image_format: what to turn each image into.
        progress: whether to show a progress bar.
    """
    size = (image_format.channels, image_format.height, image_format.width)
    images = torch.empty(len(files.names), *size, dtype=torch.uint8)
    names: list[str] = []
    bad_files: list[str] = []
    decode = _decoder(files, image_format)
    for name, image in in_threads(decode, files.names, "loading images", progress):
        if isinstance(image, str):
            bad_files.append(f"{name}: {image}")
            continue
        if image.dtype == torch.uint16:
            images = to_depth(images, torch.uint16)
        images[len(names)] = to_depth(image, images.dtype)
        names.append(name)
    return CheckedImages(images[: len(names)], names, bad_files)


def check_images(files: ImageFiles, image_format: ImageFormat, *, progress: bool = True) -> CheckedImages:
    """Decode all files once, keeping none of them in memory.

    Args:
        files: what to decode.
        image_format: what to turn each image into.
        progress: whether to show a progress bar.
    """
    decode = _decoder(files, image_format)

    def depth(name: str) -> torch.dtype | str:
        image = decode(name)
        return image if isinstance(image, str) else image.dtype

    outcomes = list(in_threads(depth, files.names, "checking images", progress))
    names = [name for name, outcome in outcomes if not isinstance(outcome, str)]
    bad_files = [f"{name}: {outcome}" for name, outcome in outcomes if isinstance(outcome, str)]
    dtype = torch.uint16 if any(outcome == torch.uint16 for _, outcome in outcomes) else torch.uint8
    return CheckedImages(StreamedImages(files, names, image_format, dtype), names, bad_files)


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
    """Each name with its result, in order. Decoders release Python's lock, so threads use all cores.

    Args:
        function: called with each name.
        names: what to call it with.
        title: of the progress bar.
        progress: whether to show one.
    """
    with ThreadPoolExecutor(num_cpus()) as pool:
        results = tqdm(pool.map(function, names), title, total=len(names), unit="file", disable=not progress)
        yield from zip(names, results, strict=True)


def decoded(decode: Callable[[bytes], T], files: ImageFiles, name: str) -> T | str:
    """What a file holds, or the reason why it cannot be read.

    Args:
        decode: from the contents of a file.
        files: where it is read from.
        name: of the file.
    """
    try:
        return decode(files.read(name))
    except Exception as error:  # on damaged files decoders raise anything, down to SyntaxError
        if isinstance(error, UnidentifiedImageError):
            return "no image of a format that can be read, or its beginning is damaged"
        is_sentence = isinstance(error, ValueError | OSError)
        return in_words(error) if is_sentence else f"damaged ({type(error).__name__}: {error})"


def _decoder(files: ImageFiles, image_format: ImageFormat) -> Callable[[str], Tensor | str]:
    def decode(data: bytes) -> Tensor:
        with _one_at_a_time if math.prod(upright_size(data)) > LARGE_IMAGE else nullcontext():
            return decode_image(data, image_format)

    return lambda name: decoded(decode, files, name)
