"""Folders for work that is continued where it was cut off: one process at a time, with the same settings."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

from unet_diffusion.runtime.atomic_files import atomic_write, read_json
from unet_diffusion.runtime.messages import first_few

SETTINGS = "settings.json"
RUN_HEADER = "# Settings of the run in this folder, written by unet-diffusion."  # first line of a run's config.yaml
RUN_OUTPUTS = (
    "config.yaml",
    "checkpoints",
    "logs",
    "samples",
    "samples.png",
    "evaluation",
    "wandb",
)  # names that a run writes
LOCK = ".lock"  # name of the file that says that a process is working in a folder
OPTIONAL = "table."  # names of settings that begin with it are missing where nothing is named
CONTENTS = "contents of "  # names of settings that begin with it hold hashes, which are not shown to people
MOST_SHOWN = 100  # characters of a setting in an error; a setting may hold all names


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
        settings: Plain values that decide what the results are. Work of one kind has the same names every time. A
            folder may lack those that begin with table. or with "contents of ", which are None then.
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
        if _kind_of(before) != _kind_of(plain):
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


class ClaimedFolder:
    """A folder in which only this process works, until `close` or the end of the process.

    Args:
        folder: The folder; it is created if it does not exist.

    Raises:
        FileExistsError: If another process is working in the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._missing = [path for path in (folder, *folder.parents) if not path.exists()]
        self._was_empty = not folder.exists() or not any(folder.iterdir())
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = open(folder / LOCK, "ab")  # noqa: SIM115  # stays open while the folder is claimed
        if not self._lock():
            self._file.close()
            raise FileExistsError(
                f"another process is at work in {folder}; wait until it has ended, or choose another folder"
            )

    def _lock(self) -> bool:
        """Lock the file; False if another process holds the lock. Systems without locks never refuse."""
        if fcntl is None:
            return True
        try:
            # Not flock: workers of a killed process would keep its lock.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had the lock may have removed the file in the meantime.
            return os.path.samestat(os.fstat(self._file.fileno()), (self.folder / LOCK).stat())
        except (BlockingIOError, PermissionError, FileNotFoundError):
            return False
        except OSError:  # a file system without locks
            return True

    def close(self) -> None:
        """Let other processes work in the folder; remove it if the claim created it and it is still empty."""
        if fcntl is None:
            self._file.close()  # Windows removes no file that is open
        (self.folder / LOCK).unlink(missing_ok=True)
        self._file.close()
        with suppress(OSError):  # it holds something
            for path in self._missing:
                path.rmdir()

    def clear(self) -> None:
        """Remove the outputs of the run, and the folder with them, if the folder was empty before."""
        if not self._was_empty:
            return
        for path in (self.folder / name for name in RUN_OUTPUTS):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.exists() and path.name != LOCK:
                path.unlink()
        self.close()


def _of_something_else(folder: Path, what: str) -> str:
    return f"{folder / SETTINGS} was not written for {what} and is not replaced; choose another folder"


def _kind_of(settings: Mapping[str, Any]) -> set[str]:
    """The names of settings that work of this kind always has."""
    return {name for name in settings if not name.startswith((OPTIONAL, CONTENTS))}


def _holds_files(folder: Path) -> bool:
    """Whether there are files that a process did not leave there before it began."""
    left = (LOCK, f".{SETTINGS}.*.partial")  # the latter of a process that was killed
    return folder.exists() and not all(any(path.match(name) for name in left) for path in folder.iterdir())


def _difference(name: str, before: Any, now: Any) -> str:
    """Describe how a setting differs: both values, of long lists the entries in only one, and nothing for hashes."""
    if name.startswith(CONTENTS):
        return name
    if isinstance(before, dict) and isinstance(now, dict):
        differ = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return "; ".join(_difference(key, before.get(key), now.get(key)) for key in differ)
    if isinstance(before, list) and isinstance(now, list) and len(str(now)) > MOST_SHOWN:
        in_one = sorted({*map(str, before)} ^ {*map(str, now)})
        if in_one:
            return f"{name}: {first_few(in_one)}"
    return f"{name}: {_short(before)} there, {_short(now)} here"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
