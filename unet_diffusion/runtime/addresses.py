"""Roots of data: paths, and addresses such as http://host/folder, s3://bucket/folder and hf://owner/name."""

import re
from pathlib import Path

from unet_diffusion.runtime.shareable import shareable

ADDRESS = re.compile(r"([a-z][a-z0-9]+):/+")  # a drive of Windows has one letter
SHORTENED = re.compile(r"([a-z][a-z0-9]+):/(?!/)")  # what a Path makes of two slashes and more


def is_address(root: str | Path) -> bool:
    """Return whether a root is an address and no path.

    Args:
        root: A path or an address.
    """
    return bool(ADDRESS.match(str(root)))


def place_of(root: str | Path) -> str:
    """Return an address with the slashes that a Path drops, or a path with the user's home folder in full.

    Args:
        root: A path or an address.
    """
    text = str(root)
    if not is_address(root):
        return str(Path(text).expanduser())
    if match := SHORTENED.match(text):
        return f"{match[1]}://{'/' * (match[1] == 'file')}{text[match.end() :]}"
    return text


def absolute_place(root: str | Path) -> str:
    """Return a root as settings beside outputs record it: a path from the top of the file system, or an address.

    Of an address they hold neither user and password nor query.

    Args:
        root: A path or an address.
    """
    return shareable(place_of(root)) if is_address(root) else str(Path(root).resolve())
