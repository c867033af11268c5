"""What other files know of the images of a folder: label images and pictures, matched by name, and boxes.

Each becomes an entry of the data, for the condition that reads it. All files are read before training, so that a
missing partner or a box outside its image is found at once, and what they hold stays in memory.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unet_diffusion.data.checking import decoded, in_threads, load_images
from unet_diffusion.data.decoding import ImageFormat
from unet_diffusion.data.described import NOT_NAMED
from unet_diffusion.data.files import ImageFiles, find_images
from unet_diffusion.data.label_decoding import decode_label_pages, fitted_label
from unet_diffusion.data.labelled import listed, match
from unet_diffusion.diffusion.conditions.coco import coco_boxes, fitted_boxes
from unet_diffusion.runtime.atomic_files import read_json
from unet_diffusion.runtime.cropping import Size


@dataclass(frozen=True)
class Fitted:
    """The images of a folder, as they were found, scaled and cut.

    Args:
        names: The names of the images that are used.
        sizes: Height and width of each of them in its file.
        all_names: The names of all images that were found.
        image_format: The size and channels that they were converted to.
    """

    names: Sequence[str]
    sizes: Sequence[Size]
    all_names: Sequence[str]
    image_format: ImageFormat

    @property
    def size(self) -> Size:
        """Height and width of the images once they are scaled and cut."""
        return self.image_format.height, self.image_format.width


def read_beside(key: str, place: str | Path, images: Fitted, *, progress: bool) -> Tensor | list[str]:
    """The entry of images from other files, a row for each image: numbers (N, ...), or N texts.

    Args:
        key: The name of the entry, a key of READERS.
        place: The folder, archive or file to read.
        images: The images.
        progress: Whether a progress bar is shown.

    Raises:
        FileNotFoundError: If the place does not exist.
        ValueError: If an image has no partner, or the other way round, or if a partner does not fit its image; the
            message lists such files.
    """
    try:
        return READERS[key](place, images, progress)
    except ValueError as error:
        raise ValueError(f"data.{key} {place}: {error}") from error


def semantic_maps(root: str | Path, images: Fitted, progress: bool) -> Tensor:
    """Label images of the same names and sizes, (N, 1, H, W) uint8 or int32: the numbers that the files hold."""
    files, partners = _partners(root, images, "semantic map")

    def read(name: str) -> NDArray[np.int32] | str:
        pages = decoded(decode_label_pages, files, partners[name])
        if isinstance(pages, str):
            return pages
        if len(pages) != 1:
            return f"{len(pages)} pages, and must have one"
        return _other_size(pages[0].shape, sizes[name]) or fitted_label(pages[0], *images.size)

    sizes = dict(zip(images.names, images.sizes, strict=True))
    outcomes = list(in_threads(read, images.names, "loading semantic maps", progress))
    _refuse([f"{partners[name]}: {row}" for name, row in outcomes if isinstance(row, str)], len(images.names))
    return in_few_bytes(torch.from_numpy(np.stack([row for _, row in outcomes if not isinstance(row, str)]))[:, None])


def in_few_bytes(labels: Tensor) -> Tensor:
    """Label images as uint8 where their numbers fit, otherwise as they are."""
    return labels.to(torch.uint8) if labels.min() >= 0 and labels.max() <= 255 else labels


def label_pages(root: str | Path, names: Sequence[str]) -> Callable[[str, Sequence[Size]], list[Tensor] | str]:
    """A function that gives the label pages of an image, (1, H, W) int32 each, or the reason why there are none.

    It takes the name of the image, and the height and width of each of its pages.

    Args:
        root: A folder or archive of label images.
        names: The names of all images.

    Raises:
        FileNotFoundError: If the root does not exist.
        ValueError: If an image has no partner, or the other way round; the message lists such files.
    """
    files = find_images(root, NOT_NAMED)
    partners = dict(match(names, files.names, kind="semantic map", can_have_suffix=False).values())

    def read(name: str, sizes: Sequence[Size]) -> list[Tensor] | str:
        pages = decoded(decode_label_pages, files, partners[name])
        if not isinstance(pages, str) and len(pages) != len(sizes):
            pages = f"{len(pages)} pages, and its image {len(sizes)}"
        if isinstance(pages, str):
            return f"{partners[name]}: {pages}"
        mismatches = [_other_size(page.shape, size) for page, size in zip(pages, sizes, strict=True)]
        if mismatch := next(filter(None, mismatches), None):
            return f"{partners[name]}: {mismatch}"
        return [torch.from_numpy(page)[None] for page in pages]

    return read


def paired_images(root: str | Path, images: Fitted, progress: bool) -> Tensor:
    """Pictures of the same names and sizes, (N, C, H, W) uint8 or uint16, with the channels of the images."""
    files, partners = _partners(root, images, "paired image")
    chosen = _Chosen(files, [partners[name] for name in images.names])
    loaded = load_images(chosen, images.image_format, progress=progress)
    wrong = list(loaded.bad_files)
    sizes = {partners[name]: size for name, size in zip(images.names, images.sizes, strict=True)}
    for name, size in zip(loaded.names, loaded.sizes, strict=True):
        if mismatch := _other_size(size, sizes[name]):
            wrong.append(f"{name}: {mismatch}")
    _refuse(wrong, len(images.names))
    assert isinstance(loaded.images, Tensor)
    return loaded.images


def boxes(file: str | Path, images: Fitted, progress: bool) -> list[str]:
    """The boxes of each image in a file of COCO's form, as JSON of [name, left, top, width, height] in pixels."""
    found = coco_boxes(read_json(Path(file).expanduser()))
    wrong, rows = list(found.wrong), []
    for name, size in zip(images.names, images.sizes, strict=True):
        if name not in found.boxes:
            wrong.append(f"{name} is not among the images of the file")
            continue
        if mismatch := _other_size(found.sizes[name], size):
            wrong.append(f"{name}: {mismatch}")
        moved = fitted_boxes(found.boxes[name], size, images.size)
        rows.append(json.dumps([[label, *(round(side, 2) for side in sides)] for label, *sides in moved]))
    _refuse(wrong, len(images.names))
    return rows


READERS: dict[str, Callable[[str | Path, Fitted, bool], Tensor | list[str]]] = {
    "semantic_map": semantic_maps,
    "paired_image": paired_images,
    "boxes": boxes,
}


class _Chosen:
    """Some of the image files below a root, in an order of their own; what else is asked is asked of all."""

    def __init__(self, files: ImageFiles, names: list[str]) -> None:
        self.files, self.names, self.left_out = files, names, files.left_out

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        return self.files.read(name, max_bytes)

    def stamp(self, name: str) -> str:
        return self.files.stamp(name)


def _partners(root: str | Path, images: Fitted, kind: str) -> tuple[ImageFiles, dict[str, str]]:
    """The files below a root, and the name of the one that belongs to each image."""
    files = find_images(root, NOT_NAMED)
    return files, dict(match(images.all_names, files.names, kind=kind, can_have_suffix=False).values())


def _other_size(size: Size, expected: Size) -> str | None:
    if tuple(size) == tuple(expected):
        return None
    return f"{size[0]}x{size[1]} pixels, and its image {expected[0]}x{expected[1]}"


def _refuse(wrong: Sequence[str], count: int) -> None:
    if wrong:
        raise ValueError(f"{len(wrong)} errors in what belongs to {count} images:{listed(wrong)}")
