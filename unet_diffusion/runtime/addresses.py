"""Roots of data: paths, and addresses such as http://host/folder, s3://bucket/folder and hf://owner/name."""

import re
from pathlib import Path

ADDRESS = re.compile(r"([a-z][a-z0-9]+):/+")  # a drive of Windows has one letter


def is_address(root: str | Path) -> bool:
    """Return whether a root is an address and no path.

    Args:
        root: A path or an address.
    """
    return bool(ADDRESS.match(str(root)))


def place_of(root: str | Path) -> str:
    """Return an address as it was given, from which a Path drops a slash, or a path with the user's home folder.

    Args:
        root: A path or an address.
    """
    text = str(root)
    return ADDRESS.sub(r"\1://", text, count=1) if is_address(root) else str(Path(text).expanduser())


def absolute_place(root: str | Path) -> str:
    """Return an address as it was given, or a path from the top of the file system.

    Args:
        root: A path or an address.
    """
    return place_of(root) if is_address(root) else str(Path(root).resolve())
