"""Finding image files: in a folder, in a zip archive, or in a folder inside a zip archive.

A listing is sorted by name, so it is the same on every machine, and leaves out hidden files and what macOS adds to
archives. Which files are images is told from their extension; whether they can be decoded `checking` finds out.
"""

import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

MAX_FILE_BYTES = 1024**3  # of an image file in an archive, unpacked; a few kilobytes can unpack to any size
IMAGE_EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)


class ImageFiles(Protocol):
    """Image files below a root, by name.

    Attributes:
        names: paths relative to the root, with forward slashes, sorted.
    """

    names: list[str]

    def read(self, name: str) -> bytes:
        """The encoded contents of one of the names."""


def find_images(root: str | Path) -> ImageFiles:
    """The image files below a root, however deep.

    Args:
        root: a folder, a zip archive, or a folder inside one (archive.zip/train).

    Raises:
        FileNotFoundError: if the root does not exist.
        ValueError: if the root is a file but not a zip archive, or holds no images.
    """
    root = Path(root).expanduser()
    files = FolderFiles(root) if root.is_dir() else ZipFiles(*_split_at_archive(root))
    if not files.names:
        raise ValueError(
            f"root must hold images, found none below {root}; expected files that end in {', '.join(IMAGE_EXTENSIONS)}"
        )
    return files


def find_images_or_one(root: str | Path) -> ImageFiles:
    """As `find_images`, or, if the root is a file and no zip archive, that file alone."""
    path = Path(root).expanduser()
    if path.is_file() and not zipfile.is_zipfile(path):
        return OneFile(path)
    return find_images(path)


def class_names_of(names: list[str], root: str | Path) -> list[str]:
    """The folders directly below root, sorted, with 2 before 10.

    Raises:
        ValueError: if there are files outside of them, or fewer than two.
    """
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(
            f"with class_labels every image must lie in the folder of its class, but {len(loose)} lie directly in "
            f"{root}: {', '.join(loose[:3])}; move them or set class_labels to false"
        )
    class_names = sorted({name.split("/")[0] for name in names}, key=_in_natural_order)
    if len(class_names) < 2:
        raise ValueError(
            f"with class_labels there must be at least 2 class folders below {root}, found {class_names[0]!r} only; "
            f"is the root {root}/{class_names[0]}?"
        )
    return class_names


def _in_natural_order(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """A key to sort by: runs of digits count as numbers, and of 1 and 01 one comes first."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in parts], name


def labels_of(names: list[str], class_names: list[str]) -> list[int]:
    """The class of each file."""
    number = {name: i for i, name in enumerate(class_names)}
    return [number[name.split("/")[0]] for name in names]


class FolderFiles:
    """The image files below a folder. Links to folders are followed.

    Args:
        root: an existing folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        paths = (path.relative_to(root).as_posix() for path in _walk(root, frozenset()))
        self.names = _image_names(paths)

    def read(self, name: str) -> bytes:
        """The encoded contents of one of the names."""
        return (self.root / name).read_bytes()


class OneFile(FolderFiles):
    """An image file by itself, whatever else lies in its folder.

    Args:
        path: of an existing file.
    """

    def __init__(self, path: Path) -> None:
        self.root = path.parent
        self.names = [path.name]


class ZipFiles:
    """The image files in a zip archive, read without unpacking it.

    Args:
        archive: path of the archive.
        folder: a folder inside it, or "" for all of it.

    Raises:
        ValueError: if the archive is damaged, holds no such folder, or has files that would lie outside of it.
    """

    def __init__(self, archive: Path, folder: str = "") -> None:
        self.archive = archive
        self.folder = folder
        self._prefix = f"{folder}/" if folder else ""
        self._open()
        members = [name for name in self._zip.namelist() if name.startswith(self._prefix)]
        if not members:
            raise ValueError(f"no folder {folder!r} in {archive}; at its top are {_top_level(self._zip)}")
        if outside := [name for name in members if _leads_outside(name)]:  # outputs are named after inputs
            raise ValueError(f"names in {archive} must be paths within it, got {outside[0]!r}; pack the images again")
        self.names = _image_names(name.removeprefix(self._prefix) for name in members)

    def __reduce__(self) -> tuple[type["ZipFiles"], tuple[Path, str]]:
        return ZipFiles, (self.archive, self.folder)

    def read(self, name: str) -> bytes:
        """The encoded contents of one of the names; may be called from several threads.

        Raises:
            ValueError: if they unpack to more than 1 GiB.
        """
        if self._process != os.getpid():  # a forked process would share, and move, the position in the file
            self._open()
        size = self._zip.getinfo(self._prefix + name).file_size  # no more is read, whatever is packed
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{name} in an archive must unpack to at most {MAX_FILE_BYTES} bytes, got {size}; "
                             "unpack it into a folder")  # fmt: skip
        return self._zip.read(self._prefix + name)

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.archive)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.archive} is a damaged zip archive ({error}); copy or download it again") from error
        self._process = os.getpid()


def _walk(folder: Path, ancestors: frozenset[Path]) -> Iterator[Path]:
    """Every file below a folder; a link back to a folder that it lies in is not followed."""
    real = folder.resolve()
    if real in ancestors:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, ancestors | {real})
        else:
            yield path


def _image_names(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.lower().endswith(IMAGE_EXTENSIONS) and not _is_hidden(name))


def _leads_outside(name: str) -> bool:
    """Whether a name in an archive, joined to a folder, would leave it; on Windows too."""
    path = PureWindowsPath(name)  # takes both kinds of slashes
    return bool(path.anchor) or ".." in path.parts


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _split_at_archive(root: Path) -> tuple[Path, str]:
    """The zip archive that a path leads into, and the folder inside it."""
    for path in (root, *root.parents):
        if path.is_file():
            if not zipfile.is_zipfile(path):
                if path.suffix.lower() == ".zip":
                    raise ValueError(f"{path} is no zip archive, or only a part of one; copy or download it again")
                raise ValueError(f"root must be a folder or a zip archive, but {path} is neither; give its folder")
            return path, root.relative_to(path).as_posix().removeprefix(".")
    raise FileNotFoundError(f"root must be an existing folder or zip archive, got {root}, looked for {root.absolute()}")


def _top_level(archive: zipfile.ZipFile) -> str:
    tops = sorted({name.split("/")[0] for name in archive.namelist()})
    return ", ".join(tops[:5]) + (", ..." if len(tops) > 5 else "")
