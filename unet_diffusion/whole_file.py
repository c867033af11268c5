"""Files that appear whole or not at all, and folders for work that can be gone on with."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS = "settings.json"
MOST_SHOWN = 100  # characters of a setting in an error, which may be all captions


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
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
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def claim_folder(
    folder: Path, settings: Mapping[str, Any], what: str, fix: str = "choose another folder, or remove that one"
) -> None:
    """Note in an empty folder the settings of the work that begins there; one with work in it must have the same.

    Args:
        folder: is made if it is not there.
        settings: plain values that decide what is made.
        what: is made, such as "latents".
        fix: what to do where they differ.

    Raises:
        FileExistsError: if the folder holds something else, or was begun with other settings.
    """
    plain = json.loads(json.dumps(settings))
    # A process that was killed may have left a part of the note, and nothing else.
    if folder.exists() and not all(path.match(f".{SETTINGS}.*.partial") for path in folder.iterdir()):
        if not (folder / SETTINGS).is_file():
            raise FileExistsError(f"{folder} holds files that are no {what}; choose another folder")
        before = json.loads((folder / SETTINGS).read_text())
        differ = [
            f"{key}: {_short(before.get(key))} there, {_short(value)} here"
            for key, value in plain.items()
            if before.get(key) != value
        ]
        if differ:
            raise FileExistsError(f"the {what} in {folder} were made with other settings ({'; '.join(differ)}); {fix}")
        return
    with whole_file(folder / SETTINGS) as partial:
        partial.write_text(json.dumps(plain, indent=1))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
