"""Which files an output was made of, so that work is continued by content and not by path or count.

A file has a stamp, which costs no reading: size, times and number of a file, size and checksum of a member of an
archive. Where stamps differ, as after a copy, the hash of the contents decides. Stamp and hash make a fingerprint, a
list of the two that JSON can hold.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from unet_diffusion.data.files import ImageFiles
from unet_diffusion.runtime.atomic_files import atomic_write

Fingerprint = Sequence[str]


def content_hash(content: bytes) -> str:
    """The hash of the contents of a file."""
    return hashlib.sha256(content).hexdigest()


def text_digest(text: str) -> bytes:
    """The hash of a text, in bytes; a name that is no text in its file system has one, too."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def fingerprint(files: ImageFiles, name: str) -> list[str]:
    """The stamp and the hash of a file as it is now. It is to be taken before the file is used.

    The stamp comes first: if the file is replaced while it is read, its stamp will not fit the next time.
    """
    return [files.stamp(name), _hash_of(files, name)]


def is_of(files: ImageFiles, name: str, before: Fingerprint | None) -> bool:
    """Whether a file holds what it did when its fingerprint was taken; None: that was not noted."""
    if before is None:
        return False
    stamp, known = before
    return files.stamp(name) == stamp != "" or _hash_of(files, name) == known != ""


def fingerprints(files: ImageFiles, before: Mapping[str, Fingerprint]) -> dict[str, Fingerprint]:
    """The fingerprint of each file; those of before are kept, unread, where stamps are the same."""
    now = {name: before.get(name, ["", ""]) for name in files.names}
    return {name: old if files.stamp(name) == old[0] != "" else fingerprint(files, name) for name, old in now.items()}


def changes(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> list[str]:
    """The names of files that are new or gone, or hold something else than before; sorted."""
    hashes, new_hashes = ({name: one[1] for name, one in those.items()} for those in (before, now))
    return sorted(name for name in {*hashes, *new_hashes} if hashes.get(name) != new_hashes.get(name))


def _hash_of(files: ImageFiles, name: str) -> str:
    """ "" if it cannot be read."""
    try:
        return content_hash(files.read(name))
    except Exception:  # damaged and encrypted archives raise anything; who decodes the file says why
        return ""


def hash_of_all(hashes: Mapping[str, str]) -> str:
    """One hash of the names and the hashes of several files."""
    return content_hash(json.dumps(sorted(hashes.items())).encode())


def folder_hash(folder: Path) -> str:
    """One hash of the names and contents of all files in a folder; of one that is not there, that of an empty one."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return hash_of_all({path.relative_to(folder).as_posix(): content_hash(path.read_bytes()) for path in files})


class MadeOf:
    """A journal of outputs, and the fingerprint of the input of each; the last line about an output counts.

    Several processes may write to it. A line that was cut off counts as none.

    Args:
        path: The file, in JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Fingerprint | None]:
        """The fingerprint of the input of each output; None: it was begun and not ended."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return dict(entry for line in text.splitlines() if (entry := _entry(line)))

    def note(self, output: str, made_of: Fingerprint | None) -> None:
        """Note that an output is begun, with None, or what it was made of, once it is there."""
        line = "\n" + json.dumps([output, made_of])  # ends what a killed process may have left before it
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def doubt(self) -> None:
        """Note that it is not known any more what the outputs were made of: they count as begun."""
        with atomic_write(self.path) as partial:
            partial.write_text("\n".join(json.dumps([output, None]) for output in self.read()), encoding="utf-8")


def _entry(line: str) -> tuple[str, Fingerprint | None] | None:
    try:
        output, made_of = json.loads(line)
    except ValueError:
        return None
    return output, made_of
