"""Files and folders that appear whole or not at all, and JSON files that are read with errors in words."""

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unet_diffusion.runtime.messages import first_few

EXPORTED = ".exported.json"  # file in an exported folder with the names of its files, which may be replaced
JSON_NAMES: dict[type, str] = {dict: "fields", list: "a list", type(None): "nothing"}


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block that file replaces the wanted one in one step.

    A reader never sees half a file, and an error leaves the earlier file as it was.

    Args:
        path: Path of the file; its folder is created if it does not exist.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _open_to_others(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _open_to_others(path: Path) -> None:
    """Give a file the mode that new files of this user have: safetensors lets only the owner read its files."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def read_json(path: Path, kind: type = dict) -> Any:
    """Return the content of a JSON file.

    Args:
        path: Path of the file.
        kind: Type that the content must have, dict or list.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON, or has another type.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path} must hold JSON, and does not{where}; it is damaged: make it again") from error
    if not isinstance(content, kind):
        wanted, got = (JSON_NAMES.get(cls, f"a {cls.__name__}") for cls in (kind, type(content)))
        raise ValueError(f"{path} must hold {wanted}, and holds {got}; it is another file: make it again")
    return content


def field_of(record: dict[str, Any], name: str, path: Path) -> Any:
    """Return a field of a JSON file.

    Args:
        record: Content of the file.
        name: Name of the field.
        path: Path of the file, for the error.

    Raises:
        ValueError: If the file has no such field.
    """
    if name not in record:
        raise ValueError(f"{path} must have the field {name}, and has {', '.join(record) or 'none'}; make it again")
    return record[name]


def remove_left_behind(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files and folders of processes that were killed.

    Args:
        folder: Folder to search; it need not exist.
        name: Name of the file or folder that was being written, in this folder; None searches for all, and in all
            folders below, too.
    """
    left = folder.rglob(".*.partial") if name is None else folder.glob(f".{glob.escape(name)}.*.partial")
    for path in left:
        process = path.name.split(".")[-2]
        if not process.isdecimal() or _runs(int(process)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _runs(process: int) -> bool:
    """Return whether a process runs on this machine; always True on Windows, where asking would end the process."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def check_replaceable(folder: Path, *, overwrite: bool) -> None:
    """Check that a folder can be exported to, and remove the remains of exports that were killed.

    Args:
        folder: Folder to export to.
        overwrite: Whether an earlier export may be replaced.

    Raises:
        FileExistsError: If the path is a file, an export that may not be replaced, or a folder with other files.
    """
    for replaced in folder.parent.glob(f".{glob.escape(folder.name)}.replaced.*.partial"):
        if not folder.exists():  # the process was killed between two renames
            os.replace(replaced, folder)
    remove_left_behind(folder.parent, folder.name)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} must be a folder to export to, and is a file; choose another name")
    if not overwrite:
        raise FileExistsError(f"{folder} exists and is not overwritten; choose another folder, or give --overwrite")
    record = folder / EXPORTED
    exported = {*map(str, read_json(record, list)), EXPORTED} if record.is_file() else set()
    if others := sorted({*_files_below(folder)} - exported):
        raise FileExistsError(
            f"{folder} holds files that were not exported there ({first_few(others)}) and is not overwritten; choose "
            "another folder"
        )


def _files_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def put_folder(partial: Path, folder: Path) -> None:
    """Move a finished folder to its place, after `check_replaceable`, with a list of its files for the next export.

    Args:
        partial: The finished folder, beside its place.
        folder: Its place.
    """
    (partial / EXPORTED).write_text(json.dumps(sorted(_files_below(partial))))
    for path in partial.rglob("*"):
        if path.is_file():
            _open_to_others(path)
    if folder.exists():
        # A folder cannot be moved onto another one.
        replaced = partial.with_name(f".{folder.name}.replaced.{os.getpid()}.partial")
        os.replace(folder, replaced)
        os.replace(partial, folder)
        shutil.rmtree(replaced)
    else:
        os.replace(partial, folder)
