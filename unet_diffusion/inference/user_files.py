"""What a user gives for a condition: files, folders or images in memory, read at the size to draw."""

import os
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from unet_diffusion.data.checking import decoded
from unet_diffusion.data.decoding import ValueRange
from unet_diffusion.data.described import DescribedFiles
from unet_diffusion.data.files import FolderFiles, OneFile, find_images
from unet_diffusion.data.label_decoding import decode_label_pages, fitted_label
from unet_diffusion.data.listing import composed, without_ending
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.inference.init_images import read_picture
from unet_diffusion.runtime.messages import first_few


def read_pictures(name: str, value: Any, shape: tuple[int, int, int], value_range: ValueRange | None = None) -> Tensor:
    """Pictures scaled and cropped to a shape (C, H, W), as (n, C, H, W) in [-1, 1].

    Args:
        name: Name of the option in errors.
        value: A file, a folder, an image in memory as for `Denoiser.sample`, or a list of these.
        shape: The shape.
        value_range: The numbers of files that become -1 and 1, as in `ImageFormat`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a picture cannot be read, or is too small.
    """
    return torch.cat([read_picture(name, one, shape, value_range) for one in _each(name, value)])


def read_label_images(name: str, value: Any, shape: tuple[int, int, int]) -> Tensor:
    """Label images scaled and cropped to a shape (1, H, W), as (n, 1, H, W) int32; each pixel is the nearest one.

    Args:
        name: Name of the option in errors.
        value: A file, a folder, a PIL image, an array or tensor (H, W) of whole numbers, or a list of these.
        shape: The shape.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a label image cannot be read.
    """
    labels = [fitted_label(_label(name, one), *shape[1:]) for one in _each(name, value)]
    return torch.from_numpy(np.stack(labels))[:, None]


def check_same_images(conditions: Iterable[Condition], values: Mapping[str, Any]) -> None:
    """Refuse folders and tables of several images that share some names and not all: turns would pair other images.

    Args:
        conditions: The conditions that the values are for.
        values: The user's values by the name of the option.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If they are about different images, or a file cannot be read.
    """
    given = {option: condition for condition in conditions for option in condition.files if option in values}
    if len(given) < 2:
        return
    names_of = {option: _image_names(values[option], condition) for option, condition in given.items()}
    for (first, names), (second, others) in combinations(names_of.items(), 2):
        if any("/" in name for name in names) != any("/" in name for name in others):  # a table may name folders
            names, others = ([PurePosixPath(name).name for name in some] for some in (names, others))
        if min(len(names), len(others)) > 1 and {*names} & {*others} and names != others:
            different = first_few(sorted({*names} ^ {*others})) or "their order"
            raise ValueError(f"{first} and {second} must be of the same images, as they take turns together, and they "
                             f"differ in {different}; add, remove or rename files")  # fmt: skip


def _image_names(value: Any, condition: Condition) -> list[str]:
    """The names without endings of the images that a value is about, in turn; those of a folder are its images."""
    names = condition.image_names(value)
    if not names and isinstance(value, str | os.PathLike) and (folder := Path(value).expanduser()).is_dir():
        names = FolderFiles(folder).names
    return [without_ending(composed(name)) for name in names]


def _each(name: str, value: Any) -> list[Any]:
    """Each of the images that a user gives; those of a folder in the order of their names."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{name} must hold at least one image, got none")
        return [one for part in value for one in _each(name, part)]
    if not isinstance(value, str | os.PathLike):
        return [value]
    path = Path(value).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{name} must be an image file or a folder of them, and there is none at {path}")
    if not path.is_dir():
        return [path]
    files = find_images(path)
    if isinstance(files, DescribedFiles):
        raise ValueError(f"{name} must be image files, and {path} is a data set; save the images that are to be used")
    return [path / file_name for file_name in files.names]


def _label(name: str, image: Any) -> np.ndarray:
    if isinstance(image, Path):
        file = OneFile(image)
        pages = decoded(decode_label_pages, file, file.names[0])
        if isinstance(pages, str) or len(pages) != 1:
            why = pages if isinstance(pages, str) else f"{len(pages)} pages, and must have one"
            raise ValueError(f"{name} {image} cannot be read as a label image: {why}")
        return pages[0]
    label = np.asarray(image if isinstance(image, Image | np.ndarray) else image.cpu())
    if label.ndim != 2 or label.dtype.kind not in "iub" or not label.size:
        raise ValueError(f"{name} must be (H, W) of whole numbers, got {label.dtype} of the shape {label.shape}")
    return label.astype(np.int32)
