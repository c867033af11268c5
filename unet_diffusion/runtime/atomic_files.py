"""Files that appear whole or not at all, and folders for work that can be gone on with."""

import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

from unet_diffusion.runtime.messages import first_few

SETTINGS = "settings.json"
RUN_HEADER = "# Settings of the run in this folder, written by unet-diffusion."  # first line of a run's config.yaml
OF_RUNS = ("config.yaml", "checkpoints", "logs", "samples", "samples.png", "wandb")  # what a run writes into its folder
LOCK = ".lock"  # in a folder in which a process is at work
EXPORTED = ".exported.json"  # in an exported folder: the names of its files, which may be replaced
CONTENTS = "contents of "  # begins the names of settings that are hashes, which say nothing to people
MOST_SHOWN = 100  # characters of a setting in an error, which may be all captions


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside the wanted one to write to; what was written takes the wanted place at the end, in one step.

    So whoever reads the path never sees half a file, and an error leaves what was there before.

    Args:
        path: of the file to make or to replace; its folder is made if it is not there.
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
    """Give a file the mode that files have for this user: safetensors makes its own for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        kind: What it must hold, a dict or a list.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path} must hold JSON, and does not{where}; it is damaged: make it again") from error
    if not isinstance(content, kind):
        names: dict[type, str] = {dict: "fields", list: "a list", type(None): "nothing"}
        wanted, got = (names.get(one, f"a {one.__name__}") for one in (kind, type(content)))
        raise ValueError(f"{path} must hold {wanted}, and holds {got}; it is another file: make it again")
    return content


def field_of(record: dict[str, Any], name: str, path: Path) -> Any:
    """A field of a JSON file.

    Args:
        record: What the file holds.
        name: The field.
        path: The file.

    Raises:
        ValueError: If it is not there.
    """
    if name not in record:
        raise ValueError(f"{path} must have the field {name}, and has {', '.join(record) or 'none'}; make it again")
    return record[name]


class ClaimedFolder:
    """A folder in which one process at a time is at work; released when it is closed or the process dies.

    Args:
        folder: Made if it is not there.

    Raises:
        FileExistsError: If another process is at work there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._missing = [path for path in (folder, *folder.parents) if not path.exists()]
        self._was_empty = not folder.exists() or not any(folder.iterdir())
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(folder / LOCK, "ab")  # noqa: SIM115  # open as long as the folder is claimed
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's is kept by workers of a killed process
            is_ours = os.path.samestat(os.fstat(self._file.fileno()), (folder / LOCK).stat())  # not just given up
        except (BlockingIOError, PermissionError, FileNotFoundError):
            is_ours = False
        except OSError:  # a file system without locks
            return
        if not is_ours:
            self._file.close()
            raise FileExistsError(
                f"another process is at work in {folder}; wait until it has ended, or choose another folder"
            )

    def close(self) -> None:
        """Release the folder, and remove it again if the claim made it and nothing came of it."""
        if fcntl is None:
            self._file.close()  # Windows removes no file that is open
        (self.folder / LOCK).unlink(missing_ok=True)
        self._file.close()
        with suppress(OSError):  # it holds something
            for path in self._missing:
                path.rmdir()

    def clear(self) -> None:
        """Remove what the run has made since, if there was nothing before."""
        if not self._was_empty:
            return
        for path in (self.folder / name for name in OF_RUNS):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.exists() and path.name != LOCK:
                path.unlink()
        self.close()


def remove_left_behind(folder: Path, name: str | None = None) -> None:
    """Remove partial files and folders of processes that were killed.

    Args:
        folder: Where they would be; one that is not there has none.
        name: What they were to become, in this folder; None: anything, in folders below it, too.
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
    """Whether there is such a process on this machine; on Windows, where asking would end it, it counts as there."""
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
    """Refuse to export into a place where something else is; remove what exports that were killed have left beside it.

    Args:
        folder: Where to export to.
        overwrite: Whether an earlier export is to be replaced.

    Raises:
        FileExistsError: If there is a file, or an export that is not to be replaced, or a folder with other files.
    """
    for replaced in folder.parent.glob(f".{glob.escape(folder.name)}.replaced.*.partial"):
        if not folder.exists():  # killed between two renames
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
    """Put a folder that is written in its place, after `check_replaceable`, with a note of what it holds.

    Args:
        partial: The folder, beside its place.
        folder: Its place.
    """
    (partial / EXPORTED).write_text(json.dumps(sorted(_files_below(partial))))
    for path in partial.rglob("*"):
        if path.is_file():
            _open_to_others(path)
    if folder.exists():
        replaced = partial.with_name(f".{folder.name}.replaced.{os.getpid()}.partial")  # none is moved onto another
        os.replace(folder, replaced)
        os.replace(partial, folder)
        shutil.rmtree(replaced)
    else:
        os.replace(partial, folder)


def require_same_settings(
    folder: Path,
    settings: Mapping[str, Any],
    what: str,
    *,
    fix: str = "choose another folder, or remove that one",
    notes: Mapping[str, Any] | None = None,
    replace: Callable[[], object] | None = None,
    among_others: bool = False,
) -> None:
    """Write down the settings of the work that begins in a folder; a folder with such work must have the same settings.

    Args:
        folder: The folder, which is made if it is not there.
        settings: Plain values that decide what the results are. Work of one kind has the same names every time.
        what: The results, such as "latents".
        fix: What the user can do where settings differ.
        notes: Plain values to write with the settings, which are not compared.
        replace: A function that removes earlier results, so that work begins again with these settings; None: earlier
            results are kept, and must have the same settings.
        among_others: Allow other files in a folder where the work begins.

    Raises:
        FileExistsError: If the folder holds something else, or was begun with other settings.
    """
    plain = json.loads(json.dumps({**settings, **(notes or {})}))
    before = settings_of(folder, what)
    if before is not None:
        if before.keys() != plain.keys():
            raise FileExistsError(_of_something_else(folder, what))
        if replace is None:
            refuse_other_settings(folder, before, {name: plain[name] for name in settings}, what, fix)
        else:
            replace()
    elif not among_others and _holds_files(folder):
        raise FileExistsError(f"{folder} holds files that are no {what}; choose another folder")
    if before != plain:
        with atomic_write(folder / SETTINGS) as partial:
            partial.write_text(json.dumps(plain, indent=1))


def settings_of(folder: Path, what: str) -> dict[str, Any] | None:
    """The settings and notes that `require_same_settings` wrote; None if there are none.

    Args:
        folder: The folder.
        what: The results that it should hold, such as "latents".

    Raises:
        FileExistsError: If the file of the settings holds something else.
    """
    if not (folder / SETTINGS).exists():
        return None
    try:
        settings: dict[str, Any] = read_json(folder / SETTINGS)
    except ValueError as error:
        raise FileExistsError(_of_something_else(folder, what)) from error
    return settings


def refuse_other_settings(
    folder: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    what: str,
    fix: str,
    details: Mapping[str, str] | None = None,
) -> None:
    """Compare settings with those that results were made with.

    Args:
        folder: The folder of the results.
        before: The settings that the results were made with.
        now: The settings of today; those that it does not name are not compared.
        what: The results, such as "latents".
        fix: What the user can do where settings differ.
        details: What to say of a setting instead of its two values.

    Raises:
        FileExistsError: If settings differ; it names them.
    """
    differ = [
        (details or {}).get(name) or _difference(name, before.get(name), value)
        for name, value in now.items()
        if before.get(name) != value
    ]
    if differ:
        raise FileExistsError(f"the {what} in {folder} were made with other settings ({'; '.join(differ)}); {fix}")


def _of_something_else(folder: Path, what: str) -> str:
    return f"{folder / SETTINGS} was not written for {what} and is not replaced; choose another folder"


def _holds_files(folder: Path) -> bool:
    """Whether there are files that a process did not leave there before it began."""
    left = (LOCK, f".{SETTINGS}.*.partial")  # the latter of a process that was killed
    return folder.exists() and not all(any(path.match(name) for name in left) for path in folder.iterdir())


def _difference(name: str, before: Any, now: Any) -> str:
    """The name of a setting with both values; of long lists the entries of one of the two, of hashes the name alone."""
    if name.startswith(CONTENTS):
        return name
    if isinstance(before, list) and isinstance(now, list) and len(str(now)) > MOST_SHOWN:
        in_one = sorted({*map(str, before)} ^ {*map(str, now)})
        if in_one:
            return f"{name}: {first_few(in_one)}"
    return f"{name}: {_short(before)} there, {_short(now)} here"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
