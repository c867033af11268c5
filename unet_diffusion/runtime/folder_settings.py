"""Folders for work that is continued where it was cut off: one process at a time, with the same settings."""

import json
import os
import shutil
from collections.abc import Mapping
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
RUN_OUTPUTS = ("config.yaml", "checkpoints", "logs", "samples", "samples.png", "wandb")  # names that a run writes
LOCK = ".lock"  # name of the file that says that a process is working in a folder
CONTENTS = "contents of "  # names of settings that begin with it hold hashes, which are not shown to people
MOST_SHOWN = 100  # characters of a setting in an error; a setting may hold all captions


def require_same_settings(
    folder: Path, settings: Mapping[str, Any], what: str, fix: str = "choose another folder, or remove that one"
) -> None:
    """Write the settings of a job into its folder if it is new, and otherwise require that they are the same.

    Args:
        folder: Folder of the job; it is created if it does not exist.
        settings: Plain values that decide the result of the job.
        what: Name of the results, in plural, such as "latents".
        fix: Advice to the user for settings that differ.

    Raises:
        FileExistsError: If the folder holds other files, or was begun with other settings.
    """
    plain = json.loads(json.dumps(settings))
    # A process that was killed may have left a part of the settings file, and nothing else.
    if folder.exists() and not all(path.match(f".{SETTINGS}.*.partial") for path in folder.iterdir()):
        if not (folder / SETTINGS).is_file():
            raise FileExistsError(f"{folder} holds files that are no {what}; choose another folder")
        before = read_json(folder / SETTINGS)
        differ = [_difference(key, before.get(key), value) for key, value in plain.items() if before.get(key) != value]
        if differ:
            raise FileExistsError(f"the {what} in {folder} were made with other settings ({'; '.join(differ)}); {fix}")
        return
    with atomic_write(folder / SETTINGS) as partial:
        partial.write_text(json.dumps(plain, indent=1))


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
        """Let other processes work in the folder."""
        if fcntl is None:
            self._file.close()  # Windows removes no file that is open
        (self.folder / LOCK).unlink(missing_ok=True)
        self._file.close()

    def clear(self) -> None:
        """Remove the outputs of the run, and the folder with them, if the folder was empty before."""
        if not self._was_empty:
            return
        for path in (self.folder / name for name in RUN_OUTPUTS):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.exists() and path.name != LOCK:
                path.unlink()
        if [path.name for path in self.folder.iterdir()] != [LOCK]:
            return
        self.close()
        with suppress(OSError):  # another program has written there in the meantime
            for path in self._missing:
                path.rmdir()


def _difference(name: str, before: Any, now: Any) -> str:
    """Describe how a setting differs: both values, of long lists the entries in only one, and nothing for hashes."""
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
