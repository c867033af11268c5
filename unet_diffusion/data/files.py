"""Finding images: in a folder, in a zip archive, in a folder inside one, or in a data set (see `tables` and `tars`).

A listing is sorted by name, so it is the same on every machine; `listing` says what it leaves out. The extension of a
file tells whether it is an image; `checking` finds out whether it can be decoded.
"""

import os
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

from unet_diffusion.data.described import USUAL, DescribedFiles, Table, natural_order
from unet_diffusion.data.listing import (
    ARRAY_EXTENSIONS,
    IMAGE_EXTENSIONS,
    METADATA,
    LeftOut,
    composed,
    image_names,
    leads_outside,
    walk,
)
from unet_diffusion.data.tables import TABLE_EXTENSIONS, TableFiles, is_table_file
from unet_diffusion.data.tars import TAR, TarFiles, is_tar
from unet_diffusion.runtime.addresses import PREFIX, is_address, place_of
from unet_diffusion.runtime.folder_settings import RUN_HEADER
from unet_diffusion.runtime.messages import first_few

MAX_FILE_BYTES = 1024**3  # of an image file in an archive, unpacked; a few kilobytes can unpack to any size
MAX_TEXT_BYTES = 256 * 1024**2  # of a table of texts, or a record: it is read whole


class ImageFiles(Protocol):
    """Image files below a root, by name.

    Attributes:
        names: The sorted paths of the images relative to the root, composed (see `listing`), with forward slashes.
        left_out: The other files.
    """

    names: list[str]
    left_out: LeftOut

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The encoded contents of an image, or of another file below the root.

        Args:
            name: The name of the file.
            max_bytes: A larger file is refused. None allows the size that images may have.
        """

    def stamp(self, name: str) -> str:
        """A text that changes with the contents of a file, but needs no reading; see `fingerprints.py`."""


def find_images(root: str | Path, table: Table = USUAL) -> ImageFiles:
    """The images below a root, however deep.

    Args:
        root: A folder, a zip archive, or a folder inside one (archive.zip/train); or a data set: hf://owner/name, a
            folder that the library datasets saved, Parquet or Arrow files, or tar archives, also behind an address.
        table: Which part of a data set is used.

    Raises:
        FileNotFoundError: If the root does not exist.
        ImportError: If a package for such a data set is missing.
        ValueError: If the root is a file of another kind, is a run folder, or holds no images.
    """
    place = place_of(root)
    if place.startswith(PREFIX):
        return TableFiles(place, table)
    if is_tar(place) or is_address(place):
        return TarFiles(place, table)
    path = Path(place)
    if is_table_file(path):
        return TableFiles(place, table)
    _refuse_run_folder(path)
    files: ImageFiles = FolderFiles(path) if path.is_dir() else ZipFiles(*_split_at_archive(path))
    if path.is_dir():
        _refuse_two_kinds(files, path)
        files = files if files.names else _data_set_in(path, files.left_out, table) or files
    if not files.names:
        others = f" ({others})" if (others := files.left_out.described()) else ""
        raise ValueError(
            f"root must hold images, found none below {root}{others}; expected files that end in "
            f"{', '.join(IMAGE_EXTENSIONS)}, or a data set: .parquet, .arrow or .tar"
        )
    _check_named(table, files, root)
    return files


def _check_named(table: Table, files: ImageFiles, root: str | Path) -> None:
    if table.named and not isinstance(files, DescribedFiles):
        raise ValueError(f"table names the parts of a data set, and {root} holds image files; leave it out")


def _refuse_two_kinds(files: ImageFiles, folder: Path) -> None:
    """Refuse a folder of image files that holds tables or archives, too: some of them would be left out.

    Raises:
        ValueError: If it does.
    """
    kinds = {kind: files.left_out.extensions[kind] for kind in (*TABLE_EXTENSIONS, TAR)}
    kinds[PurePosixPath(METADATA).suffix] -= files.left_out.num_metadata  # which is about the image files
    others = [f"{number} {kind}" for kind, number in kinds.items() if number]
    if files.names and others:
        raise ValueError(
            f"{folder} holds {len(files.names)} image files ({first_few(files.names[:2])}) and "
            f"{' and '.join(others)} files, and only one kind can be read; give the path of a "
            "table or archive, or of a folder with one kind, or move the others away"
        )


def _data_set_in(folder: Path, left_out: LeftOut, table: Table) -> ImageFiles | None:
    """The images of a data set, if a folder without image files holds one."""
    has_tables = any(extension in left_out.extensions for extension in TABLE_EXTENSIONS)
    has_tars = TAR in left_out.extensions
    if has_tables and has_tars:
        raise ValueError(f"{folder} holds tables and tar archives ({left_out.described()}); give one kind")
    if not (has_tables or has_tars):
        return None
    files = TableFiles(str(folder), table) if has_tables else TarFiles(str(folder), table)
    for extension in set(left_out.extensions) - {*TABLE_EXTENSIONS, TAR}:
        files.left_out.extensions[extension] += left_out.extensions[extension]
    return files


def find_images_or_one(root: str | Path, table: Table = USUAL) -> ImageFiles:
    """The images below a root as `find_images` has them, or the root alone if it is an image file.

    Args:
        root: A root as in `find_images`, or an image file.
        table: Which part of a data set is used.

    Raises:
        Exception: As `find_images` raises it.
    """
    path = Path(root).expanduser()
    is_data_set = is_table_file(path) or path.name.lower().endswith(TAR)
    if path.is_file() and not is_data_set and (
        path.name.lower().endswith(ARRAY_EXTENSIONS) or not zipfile.is_zipfile(path)
    ):  # fmt: skip
        _check_named(table, OneFile(path), root)
        return OneFile(path)
    return find_images(root, table)


def classes_of(files: ImageFiles, names: list[str], root: str | Path) -> tuple[list[int], list[str]]:
    """The class of each image, and the name of each class: those of a data set, or else the folders below the root.

    Args:
        files: The images below the root.
        names: The names of the images that are used.
        root: The root, for messages.

    Raises:
        ValueError: If an image has no class, or there are fewer than two classes.
    """
    if isinstance(files, DescribedFiles):
        return files.classes(names)
    class_names = class_names_of(names, root)
    return labels_of(names, class_names), class_names


def class_names_of(names: list[str], root: str | Path) -> list[str]:
    """The folders directly below root, sorted, with 2 before 10.

    Raises:
        ValueError: If an image lies in none of them, or there are fewer than two.
    """
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(
            f"with class_labels every image must lie in the folder of its class, but {len(loose)} lie directly in "
            f"{root}: {', '.join(loose[:3])}; move them or set class_labels to false"
        )
    class_names = sorted({name.split("/")[0] for name in names}, key=natural_order)
    if len(class_names) < 2:
        raise ValueError(
            f"with class_labels there must be at least 2 class folders below {root}, found {class_names[0]!r} only; "
            f"is the root {root}/{class_names[0]}?"
        )
    return class_names


def labels_of(names: list[str], class_names: list[str]) -> list[int]:
    """The class of each file."""
    number = {name: i for i, name in enumerate(class_names)}
    return [number[name.split("/")[0]] for name in names]


class FolderFiles:
    """The image files below a folder. Links to folders are followed.

    Args:
        root: An existing folder.

    Raises:
        ValueError: If two names differ only in how accents are encoded.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out = LeftOut()
        stored = [path.relative_to(root).as_posix() for path in walk(root, self.left_out)]
        self._stored = _stored_by_name(((composed(name), name) for name in stored), root)
        self.names = image_names(map(composed, stored), self._read_text, self.left_out)

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The encoded contents of an image, or of another file below the root.

        Raises:
            FileNotFoundError: If the file is not there.
            ValueError: If it is no regular file, or too large.
        """
        path = self.root / self._stored.get(name, name)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} must be a file, and is a folder, a pipe or a device; remove it")
        if max_bytes is not None:
            _check_size(name, status.st_size, max_bytes)
        return path.read_bytes()

    def _read_text(self, name: str) -> bytes:
        return self.read(name, MAX_TEXT_BYTES)

    def stamp(self, name: str) -> str:
        """Size, times and number of a file, which even one that is moved here cannot share; "" if there is none."""
        try:
            state = (self.root / self._stored.get(name, name)).stat()
        except OSError:
            return ""
        return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


class OneFile(FolderFiles):
    """An image file by itself, whatever else lies in its folder.

    Args:
        path: The path of an existing file.
    """

    def __init__(self, path: Path) -> None:
        self.root = path.parent
        self.left_out = LeftOut()
        self._stored = {}
        self.names = [path.name]


class ZipFiles:
    """The image files in a zip archive, read without unpacking it.

    Args:
        archive: The path of the archive.
        folder: A folder inside the archive, or "" for all of it.

    Raises:
        ValueError: If the archive is damaged, holds no such folder, has files that would lie outside of it, or two
            files of one name.
    """

    def __init__(self, archive: Path, folder: str = "") -> None:
        self.archive = archive
        self.folder = folder
        self._prefix = f"{composed(folder)}/" if folder else ""
        self._open()
        members = [name for name in self._zip.namelist() if _in_archive(name).startswith(self._prefix)]
        if not members:
            raise ValueError(f"no folder {folder!r} in {archive}; at its top are {_top_level(self._zip)}")
        if outside := [name for name in members if leads_outside(name)]:  # outputs are named after inputs
            raise ValueError(f"names in {archive} must be paths within it, got {outside[0]!r}; pack the images again")
        stored = [(_in_archive(name).removeprefix(self._prefix), name) for name in members]
        stored = [(name, member) for name, member in stored if name and not name.endswith("/")]  # no folders
        self._stored = _stored_by_name(stored, archive)
        self.left_out = LeftOut()
        self.names = image_names((name for name, _ in stored), self._read_text, self.left_out)

    def __reduce__(self) -> tuple[type["ZipFiles"], tuple[Path, str]]:
        return ZipFiles, (self.archive, self.folder)

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The encoded contents of one of the names, or of another file there; may be called from several threads.

        Raises:
            FileNotFoundError: If the file is not there.
            ValueError: If it unpacks to more than 1 GiB, or max_bytes.
        """
        if self._process != os.getpid():  # a forked process would share, and move, the position in the file
            self._open()
        member = self._stored.get(name, self._prefix + name)
        try:
            size = self._zip.getinfo(member).file_size  # no more is read, whatever is packed
        except KeyError as error:
            raise FileNotFoundError(f"there is no {name} in {self.archive}") from error
        if max_bytes is not None:
            _check_size(name, size, max_bytes)
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{name} in an archive must unpack to at most {MAX_FILE_BYTES} bytes, got {size}; "
                             "unpack it into a folder")  # fmt: skip
        return self._zip.read(member)

    def _read_text(self, name: str) -> bytes:
        return self.read(name, MAX_TEXT_BYTES)

    def stamp(self, name: str) -> str:
        """Size and checksum of a member."""
        member = self._zip.getinfo(self._stored.get(name, self._prefix + name))
        return f"{member.file_size} {member.CRC:08x}"

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.archive)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.archive} is a damaged zip archive ({error}); copy or download it again") from error
        self._process = os.getpid()


def _refuse_run_folder(root: Path) -> None:
    settings = root / "config.yaml"
    if not settings.is_file():
        return
    with open(settings, "rb") as file:
        begins = file.read(len(RUN_HEADER))
    if begins == RUN_HEADER.encode():
        raise ValueError(f"root must hold images of yours, and {root} is the folder of a run; give theirs")


def _stored_by_name(pairs: Iterable[tuple[str, str]], where: Path) -> dict[str, str]:
    """The stored names, by the names in a listing, of files for which the two differ.

    Raises:
        ValueError: If two files have the same name in the listing.
    """
    stored: dict[str, str] = {}
    seen = set()
    for name, as_stored in pairs:
        if name in seen:
            raise ValueError(
                f"{where} holds two files named {name}, or names that differ only in how accents or slashes are "
                "encoded; remove or rename one"
            )
        seen.add(name)
        if name != as_stored:
            stored[name] = as_stored
    return stored


def _in_archive(name: str) -> str:
    """The name of a file in an archive, composed; some programs of Windows write backslashes."""
    return composed(name).replace("\\", "/")


def _check_size(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(f"{name} must be at most {max_bytes} bytes, got {size}; split it")


def _split_at_archive(root: Path) -> tuple[Path, str]:
    """The zip archive that a path leads into, and the folder inside it."""
    for path in (root, *root.parents):
        if path.is_file():
            if not zipfile.is_zipfile(path):
                if path.suffix.lower() == ".zip":
                    raise ValueError(f"{path} is no zip archive, or only a part of one; copy or download it again")
                raise ValueError(f"root must be a folder or a zip archive, but {path} is neither; give its folder")
            return path, "" if root == path else root.relative_to(path).as_posix()
    raise FileNotFoundError(f"root must be an existing folder or zip archive, got {root}, looked for {root.absolute()}")


def _top_level(archive: zipfile.ZipFile) -> str:
    tops = sorted({name.split("/")[0] for name in archive.namelist()})
    return ", ".join(tops[:5]) + (", ..." if len(tops) > 5 else "")
