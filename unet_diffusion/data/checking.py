"""Every file is decoded once before training, so that a damaged one is found in a minute and not in the tenth hour."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from unet_diffusion.data.decoding import ImageFormat, decode_image, to_depth, upright_size
from unet_diffusion.data.files import ImageFiles
from unet_diffusion.usage import printable

T = TypeVar("T")

NUM_NAMED = 5  # bad files named in a message


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
        read = (self.files.read(self.names[i]) for i in index.tolist())
        return torch.stack([to_depth(decode_image(data, self.image_format), self.dtype) for data in read])


@dataclass
class CheckedImages:
    """What became of the files.

    Args:
        images: those that could be decoded, as a tensor (N, C, H, W) or streamed.
        names: the file of each image.
        bad_files: "name: reason" for each of the others.
        sizes: height and width of each image, upright, before it was scaled and cut.
    """

    images: Tensor | StreamedImages
    names: list[str]
    bad_files: list[str]
    sizes: list[tuple[int, int]]


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
    sizes: list[tuple[int, int]] = []
    decode = _decoder(files, image_format)
    for name, outcome in in_threads(decode, files.names, "loading images", progress):
        if isinstance(outcome, str):
            bad_files.append(f"{name}: {outcome}")
            continue
        image, image_size = outcome
        if image.dtype == torch.uint16:
            images = to_depth(images, torch.uint16)
        images[len(names)] = to_depth(image, images.dtype)
        names.append(name)
        sizes.append(image_size)
    return CheckedImages(images[: len(names)], names, bad_files, sizes)


def check_images(files: ImageFiles, image_format: ImageFormat, *, progress: bool = True) -> CheckedImages:
    """Decode all files once, keeping none of them in memory.

    Args:
        files: what to decode.
        image_format: what to turn each image into.
        progress: whether to show a progress bar.
    """
    decode = _decoder(files, image_format)

    def depth_and_size(name: str) -> tuple[torch.dtype, tuple[int, int]] | str:
        outcome = decode(name)
        return outcome if isinstance(outcome, str) else (outcome[0].dtype, outcome[1])

    outcomes = list(in_threads(depth_and_size, files.names, "checking images", progress))
    good = {name: outcome for name, outcome in outcomes if not isinstance(outcome, str)}
    bad_files = [f"{name}: {outcome}" for name, outcome in outcomes if isinstance(outcome, str)]
    dtype = torch.uint16 if any(depth == torch.uint16 for depth, _ in good.values()) else torch.uint8
    images = StreamedImages(files, list(good), image_format, dtype)
    return CheckedImages(images, list(good), bad_files, [size for _, size in good.values()])


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
        return reason(error)


def reason(error: Exception) -> str:
    """What is wrong with a file; words of a decoder say little without their kind."""
    return str(error) if type(error) is ValueError else f"it cannot be read ({type(error).__name__}: {error})"


def _decoder(files: ImageFiles, image_format: ImageFormat) -> Callable[[str], tuple[Tensor, tuple[int, int]] | str]:
    """From a name to the image and the size that it has in its file."""
    return lambda name: decoded(lambda data: (decode_image(data, image_format), upright_size(data)), files, name)
