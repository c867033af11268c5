"""Tar archives of images in the form of WebDataset, on a disk or behind an address, read in any order.

Members whose names agree up to the first dot of the file name make a sample: 17.jpg, 17.txt and 17.cls are an image,
its caption and its class (https://github.com/webdataset/webdataset). Archives are gone through once, for the place of
each image in them; from then on an image is read alone, by its range of bytes.
"""

import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from posixpath import normpath
from typing import IO, Any

from unet_diffusion.data.described import (
    CAPTIONS,
    LABELS,
    DescribedFiles,
    Table,
    captions_of_values,
    classes_of_values,
)
from unet_diffusion.data.listing import HIDDEN, IMAGE_EXTENSIONS, LeftOut, composed, leads_outside, of_a_system, walk
from unet_diffusion.data.stores import Store
from unet_diffusion.runtime.addresses import is_address, missing_path, numbered, shown_place
from unet_diffusion.runtime.messages import first_few, similar_paths

TAR = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TEXT, CLASS, FIELDS = "txt", "cls", "json"  # endings of members with what is known of an image
MAX_TEXT_BYTES = 16 * 1024**2  # of such a member
NO_IMAGE = "samples without an image"
END_BYTES = 4 * tarfile.RECORDSIZE  # of zeros are looked at after the last member; there are at least two blocks


@dataclass
class _Sample:
    """Where the image of a sample lies, and what is known of it.

    Args:
        images: The first byte and the number of bytes of each image, by its ending.
        known: The contents of the members `.txt` and `.cls`, and the fields of `.json`, by their names.
    """

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    known: dict[str, Any] = field(default_factory=dict)


class TarFiles(DescribedFiles):
    """The images in tar archives.

    An image has the name of its member, below that of its archive if there are several archives.

    Args:
        place: archive.tar, a folder of such archives, or the address of either; {000..127} stands for these numbers.
        table: Which image, caption and class of a sample are used.

    Raises:
        FileNotFoundError: If there are no archives.
        OSError: If one cannot be read.
        ValueError: If an archive is damaged or compressed, a name comes twice in it, or a sample has several images.
    """

    def __init__(self, place: str, table: Table) -> None:
        self.place, self.table = place, table
        self.left_out = LeftOut()
        self._store, archives = _archives(place)
        self._query = place.removeprefix(_without_query(place))
        self._members: dict[str, tuple[str, int, int]] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self._keys: dict[str, None] = {}  # all that samples have, in their order
        for archive in archives:
            prefix = "" if len(archives) == 1 else f"{archive}/"
            for key, sample in self._samples(archive).items():
                self._add(archive, prefix, key, sample)
        self._stamps = {archive: _stamp(place, archive) for archive in archives}
        if not self._members:
            raise ValueError(
                f"the tar archives of {shown_place(place)} must hold images, and hold none "
                f"({self.left_out.described()})"
            )
        self.names = sorted(self._members)

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The encoded contents of an image; may be called from several threads.

        Raises:
            FileNotFoundError: If there is no image of that name.
            OSError: If the archive cannot be read, or holds less than before.
        """
        if name not in self._members:
            raise FileNotFoundError(f"there is no image {name} in {shown_place(self.place)}")
        archive, start, size = self._members[name]

        def read() -> bytes:
            content = self._store.read(archive + self._query, start, start + size)
            if len(content) != size:
                raise ValueError(f"{size} bytes were asked for, and {len(content)} came; the archive is cut off, or "
                                 "the server does not answer ranges: copy the archives here")  # fmt: skip
            return content

        try:
            content = self._store.tried(read, f"{self._store.shown}/{archive}")
        except OSError:
            self._store.num_retries = 0  # a store that is gone is not waited for at each image
            raise
        self._store.num_retries = _num_retries(self.place)
        return content

    def stamp(self, name: str) -> str:
        """Size and times of the archive, and the place of the image in it; "" behind an address."""
        archive, start, size = self._members[name]
        return self._stamps[archive] and f"{self._stamps[archive]} {start} {size}"

    def classes(self, names: Sequence[str]) -> tuple[list[int], list[str]]:
        """The class of each image, a number or a name, and the name of each class."""
        key = self._key(self.table.label, (CLASS, *LABELS), "label", "class_labels")
        values = {name: _number(known.get(key)) for name, known in self._known.items()}
        return classes_of_values(values, names, None, f"{key} in the tar archives of {shown_place(self.place)}")

    def captions(self, names: Sequence[str]) -> list[str]:
        """The caption of each image."""
        key = self._key(self.table.caption, (TEXT, *CAPTIONS), "caption", "captions")
        values = {name: known.get(key) for name, known in self._known.items()}
        return captions_of_values(values, names, f"{key} in the tar archives of {shown_place(self.place)}")

    def _key(self, chosen: str | None, usual: Sequence[str], kind: str, option: str) -> str:
        key = chosen or next((key for key in usual if key in self._keys), None)
        if key is None or key not in self._keys:
            has = f"no {kind} named {key}" if key else f"nothing that is known to be the {kind}"
            there = ", ".join(self._keys) or "images alone"
            raise ValueError(f"the samples of {shown_place(self.place)} have {has}, but {there}; "
                             f"{self.table.advice(kind)} one of them, or set {option} to false")  # fmt: skip
        return key

    def _add(self, archive: str, prefix: str, key: str, sample: _Sample) -> None:
        endings = [ending for ending in sample.images if self.table.image in (None, ending)]
        if len(endings) > 1:
            raise ValueError(f"sample {key} of {archive} must have one image, and has {first_few(endings)}; "
                             f"{self.table.advice('image')} the one to use, such as {endings[0]}")  # fmt: skip
        if not endings:
            self.left_out.names[NO_IMAGE].add(f"{prefix}{key}")
            return
        name = f"{prefix}{composed(key)}.{endings[0]}"
        if name in self._members:
            raise ValueError(f"{archive} holds two images named {name}; write it again with a name for each")
        self._members[name] = (archive, *sample.images[endings[0]])
        self._known[name] = sample.known

    def _samples(self, archive: str) -> dict[str, _Sample]:
        """The samples of an archive by their names, in its order."""
        place = f"{self._store.shown}/{archive}"

        def read() -> dict[str, _Sample] | str:
            samples: dict[str, _Sample] = {}
            try:
                with self._store.open(archive + self._query) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        self._note(samples, member, partial(_content, tar, member))
                    _check_end(file, tar.offset, len(tar.getmembers()))
            except _Refused as error:
                return str(error)
            except (tarfile.TarError, EOFError) as error:
                return f"it must be a whole tar archive, uncompressed, and is not ({error}); copy it again"
            return samples

        samples = self._store.tried(read, place)
        if isinstance(samples, str):
            raise ValueError(f"{place} cannot be used: {samples}")
        return samples

    def _note(self, samples: dict[str, _Sample], member: tarfile.TarInfo, content: Callable[[], bytes]) -> None:
        """Add a member to its sample."""
        if not member.isreg() or member.issparse():
            if not member.isdir():
                self.left_out.names["no files in tar archives"].add(member.name)
            return
        if leads_outside(member.name):  # outputs are named after inputs
            raise _Refused(f"names must be paths within it, got {member.name!r}")
        name = normpath(member.name)  # `tar -cf a.tar .` writes ./a.png
        if hidden := of_a_system(name):
            self.left_out.names[HIDDEN].add(hidden)
            return
        folder, slash, file = name.rpartition("/")
        first, _, ending = file.partition(".")
        ending = ending.lower()  # as the library has it
        sample = samples.setdefault(f"{folder}{slash}{first}", _Sample())
        if f".{ending}".endswith(IMAGE_EXTENSIONS):
            if ending in sample.images:
                raise _Refused(f"{member.name} comes twice")
            sample.images[ending] = (member.offset_data, member.size)
        elif ending in (TEXT, CLASS, self.table.caption, self.table.label):
            self._learn(sample, {ending: _text(content(), member.name)})
        elif ending == FIELDS:
            self._learn(sample, _fields(content(), member.name))
        else:
            self.left_out.extensions[f".{ending}" if ending else ""] += 1

    def _learn(self, sample: _Sample, known: dict[str, Any]) -> None:
        """Keep of what is known of a sample that which may be asked for."""
        self._keys |= dict.fromkeys(known)
        wanted = {TEXT, CLASS, *CAPTIONS, *LABELS, self.table.caption, self.table.label}
        sample.known |= {key: value for key, value in known.items() if key in wanted}


class _Refused(ValueError):
    """What is in an archive cannot be used; reading it again changes nothing."""


def is_tar(place: str) -> bool:
    """Return whether a path or address is that of tar archives, not of a folder of them.

    Args:
        place: A path or an address.
    """
    lower = _without_query(place).lower()
    if lower.endswith(COMPRESSED):
        raise ValueError("tar archives must be uncompressed, as images in others cannot be read alone, got "
                         f"{shown_place(place)}; "
                         "unpack it")  # fmt: skip
    return lower.endswith(TAR) and (is_address(place) or not Path(place).is_dir())


def _without_query(place: str) -> str:
    """A path, or an address without the query that may follow it over http, such as a signature."""
    return place.partition("?")[0] if place.startswith(("http://", "https://")) else place


def _archives(place: str) -> tuple[Store, list[str]]:
    """The folder of archives, and their names in it."""
    if not is_tar(place):
        _refuse_query(place)
        store = Store(place, num_retries=_num_retries(place))
        archives = store.tried(lambda: store.names(f"*{TAR}"), place) if is_address(place) else _below(Path(place))
        if not archives:
            shown = shown_place(place)
            raise FileNotFoundError(f"there are no tar archives in {shown}; over http a server must list them, or give "
                                    f"their names, such as {shown}/name-{{000..127}}.tar")  # fmt: skip
        return store, archives
    if (missing := missing_path(Path(place))) is not None:
        raise FileNotFoundError(f"there is no tar archive {missing}, looked for {missing.absolute()}"
                                f"{similar_paths(missing)}")  # fmt: skip
    folder, slash, name = _without_query(place).rpartition("/")
    folder = folder or ("/." if slash else ".")
    return Store(folder, num_retries=_num_retries(place)), list(numbered(name))


def _refuse_query(folder: str) -> None:
    """Refuse the address of a folder with a query, such as a signature, which is that of a file."""
    if _without_query(folder) != folder:
        shown = shown_place(folder).rstrip("/")
        raise ValueError("the address of a folder of tar archives must have no query, such as a signature, got one "
                         f"after {shown}; name the archives, such as {shown}/name-{{000..127}}.tar?...")  # fmt: skip


def _below(folder: Path) -> list[str]:
    """The archives in a folder, however deep, by their paths in it."""
    files = [path for path in walk(folder, LeftOut()) if path.name.lower().endswith(TAR)]
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _num_retries(place: str) -> int:
    return 4 if is_address(place) else 0


def _stamp(place: str, archive: str) -> str:
    if is_address(place):
        return ""
    path = Path(place)
    state = (path / archive if path.is_dir() else path.with_name(archive)).stat()
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def _check_end(file: IO[bytes], offset: int, num_members: int) -> None:
    """Refuse an archive that goes on where tarfile stopped: tarfile takes a damaged header for the end."""
    file.seek(offset)
    rest = file.read(END_BYTES)
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise _Refused(
            f"after {num_members} members it is cut off or damaged, or another archive follows; copy or write it again"
        )


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None or member.size > MAX_TEXT_BYTES:
        raise _Refused(f"{member.name} must be at most {MAX_TEXT_BYTES} bytes, and has {member.size}")
    return file.read()


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Refused(f"{name} must be text in UTF-8, and is not") from error


def _fields(content: bytes, name: str) -> dict[str, Any]:
    """The texts and numbers of a JSON object."""
    try:
        fields = json.loads(_text(content, name))
    except (ValueError, RecursionError) as error:
        raise _Refused(f"{name} must be JSON, and is not: {error}") from error
    if not isinstance(fields, dict):
        return {}
    return {str(key): value for key, value in fields.items() if isinstance(value, str | int)}


def _number(value: Any) -> Any:
    """A number that was written as text."""
    text = value.strip() if isinstance(value, str) else value
    return int(text) if isinstance(text, str) and text.isdecimal() else text
