"""Places: paths, addresses such as http://host/folder, s3://bucket/folder and hf://owner/name, and names on the hub.

The rules here decide for every command which of them a text is, and whether what a path names is there.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from unet_diffusion.runtime.shareable import address_without_secrets, shareable, without_secrets

StrPath = str | os.PathLike[str]
# A drive of Windows has one letter. Addresses chained by ::, as fsspec has them, are addresses, too.
ADDRESS = re.compile(r"(?:[a-z][\w+.-]*::)*[a-z][a-z0-9]+:/+", re.IGNORECASE)
SHORTENED = re.compile(
    r"((?:[a-z][\w+.-]*::)*[a-z][a-z0-9]+):/(?!/)", re.IGNORECASE
)  # what a Path makes of two slashes and more
PREFIX = "hf://"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # {000..127}, as WebDataset has it
FILES = (  # a name that ends so is that of a file; a number, as in owner/model-v1.5, is no such end
    *(".bin", ".ckpt", ".msgpack", ".onnx", ".pickle", ".pkl", ".pt", ".pth", ".safetensors"),  # weights
    *(".7z", ".bz2", ".gz", ".rar", ".tar", ".tbz", ".tgz", ".txz", ".xz", ".zip", ".zst"),  # archives
    *(".arrow", ".csv", ".h5", ".hdf5", ".json", ".jsonl", ".parquet", ".tsv", ".txt", ".yaml", ".yml"),  # tables
    *(".bmp", ".dcm", ".gif", ".jpeg", ".jpg", ".nii", ".npy", ".npz", ".png", ".tif", ".tiff", ".webp"),  # images
)


def is_address(root: str | Path) -> bool:
    """Return whether a root is an address and no path.

    Args:
        root: A path or an address.
    """
    return bool(ADDRESS.match(str(root)))


def is_hub_name(path: StrPath) -> bool:
    """Return whether a path is the name of a model on the hub.

    Args:
        path: A pathlib.Path, which is never a name; or a string: hf://owner/name, or owner/name, which is a path if
            there is a folder owner or if it ends as a file does (`FILES`). Nor is a name what begins with a dot, a
            slash or ~.
    """
    if not isinstance(path, str):
        return False
    if path.startswith(PREFIX):
        return True
    if path.lower().endswith(FILES):
        return False
    return bool(NAME.fullmatch(path)) and not Path(path).exists() and not Path(path).parent.exists()


def missing_path(place: StrPath) -> Path | None:
    """Return the path of what is not there, or None; who reads from the hub or an address says it by itself.

    A folder within an archive counts as there if the archive is.

    Args:
        place: A path, an address, the name of a model on the hub, or a path with {000..127}, of which each must be
            there.
    """
    if is_hub_name(place) or is_address(str(place)):
        return None
    paths = map(Path, numbered(place_of(str(place))))
    return next((path for path in paths if not path.exists() and not any(map(Path.is_file, path.parents))), None)


def numbered(place: str) -> Iterator[str]:
    """Give the places that one with {000..127} stands for, or the place itself.

    Args:
        place: A path, an address or a name.

    Raises:
        ValueError: If the second number is below the first.
    """
    match = RANGE.search(place)
    if match is None:
        yield place
        return
    if int(match[1]) > int(match[2]):
        raise ValueError(f"numbers in braces must not go down, got {match[0]}; write the lower one first")
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from numbered(f"{place[: match.start()]}{number:0{len(match[1])}d}{place[match.end() :]}")


def place_of(root: str | Path) -> str:
    """Return an address with the slashes that a Path drops, or a path with the user's home folder in full.

    Args:
        root: A path or an address.
    """
    text = str(root)
    if not is_address(root):
        return str(Path(text).expanduser())
    if match := SHORTENED.match(text):
        return f"{match[1]}://{'/' * (match[1].lower() == 'file')}{text[match.end() :]}"
    return text


def shown_place(root: str | Path) -> str:
    """Return a root as messages show it: a path, or an address that has neither user and password nor query.

    Args:
        root: A path or an address.
    """
    return address_without_secrets(place_of(root)) if is_address(root) else without_secrets(str(root))


def absolute_place(root: str | Path) -> str:
    """Return a root as settings beside outputs record it: a path from the top of the file system, or an address.

    Of an address they hold neither user and password nor query.

    Args:
        root: A path or an address.
    """
    return shareable(place_of(root)) if is_address(root) else str(Path(root).resolve())
