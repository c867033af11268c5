"""Captions of image files: metadata.csv or metadata.jsonl in a folder of theirs or above, or a text file beside each.

The tables are those of Hugging Face's image folders: file_name, relative to the table, and text.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from unet_diffusion.data.checking import NUM_NAMED
from unet_diffusion.data.files import ImageFiles

TABLES = ("metadata.csv", "metadata.jsonl")


def read_captions(files: ImageFiles, names: Sequence[str]) -> list[str]:
    """The caption of each image, without white space around it.

    Args:
        files: where the images are.
        names: of the images.

    Raises:
        ValueError: listing images without a caption, or if a table is not as it must be.
    """
    folders = sorted({str(folder) for name in names for folder in PurePosixPath(name).parents})
    captions: dict[str, str] = {}
    for folder in folders:
        for table in TABLES:
            path = str(PurePosixPath(folder) / table)
            content = _content(files, path)
            if content is not None:
                captions |= {str(PurePosixPath(folder) / name): text for name, text in _rows(content, path)}
    for name in names:
        if name not in captions and (text := _content(files, str(PurePosixPath(name).with_suffix(".txt")))) is not None:
            captions[name] = text.strip()
    missing = [name for name in names if name not in captions]
    if missing:
        more = ", ..." if len(missing) > NUM_NAMED else ""
        raise ValueError(
            f"{len(missing)} of {len(names)} images have no caption: {', '.join(missing[:NUM_NAMED])}{more}; each "
            "needs a row (file_name,text) in metadata.csv, a line in metadata.jsonl, or a text file of its name"
        )
    return [captions[name] for name in names]


def _content(files: ImageFiles, path: str) -> str | None:
    try:
        content = files.read(path)
    except (FileNotFoundError, KeyError):  # of a folder; of a zip archive
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, and is not; save it as such") from error


def _rows(content: str, path: str) -> Iterable[tuple[str, str]]:
    rows = enumerate(csv.DictReader(io.StringIO(content)), start=2) if path.endswith(".csv") else _lines(content, path)
    for number, row in rows:
        if not (isinstance(row, dict) and row.get("file_name") and isinstance(row.get("text"), str)):
            raise ValueError(f"{path} must have file_name and text in each row, and line {number} has {row}")
        yield row["file_name"], row["text"].strip()


def _lines(content: str, path: str) -> Iterable[tuple[int, Any]]:
    """The values in a JSON lines file, with the numbers of their lines."""
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} must hold JSON in each line, and line {number} does not: {error}") from error
