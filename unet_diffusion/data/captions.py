"""Captions of image files: metadata.csv or metadata.jsonl in their folder or above, or a text file beside each.

The tables are those of Hugging Face's image folders, with the columns file_name, relative to the table, and text. An
image has one caption: two rows for it that differ are an error. A text file counts where no table has a row for its
image.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from posixpath import join, normpath
from typing import Any

from unet_diffusion.data.described import DescribedFiles
from unet_diffusion.data.files import MAX_TEXT_BYTES, ImageFiles
from unet_diffusion.data.listing import composed
from unet_diffusion.runtime.messages import MOST_NAMED, first_few

TABLES = ("metadata.csv", "metadata.jsonl")
TEXT_EXTENSIONS = (".csv", ".jsonl", ".txt")
COLUMNS = ("file_name", "text")
IS_ABSOLUTE = re.compile(r"([A-Za-z]:)?[/\\]")  # on Windows too


@dataclass(frozen=True)
class Captions:
    """The captions of images.

    Args:
        texts: The caption of each image, without white space around it.
        num_unused: The number of rows in tables whose image is not there.
        unused: A line "where: file_name" for each of the first such rows.
    """

    texts: list[str]
    num_unused: int
    unused: list[str]


def read_captions(files: ImageFiles, names: Sequence[str]) -> Captions:
    """The caption of each image.

    Args:
        files: The files below the root.
        names: The names of the images.

    Raises:
        ValueError: If images have no caption, which the message lists, or a table is malformed or too large.
    """
    if isinstance(files, DescribedFiles):
        return Captions(files.captions(names), 0, [])
    images = set(names)
    captions: dict[str, tuple[str, str]] = {}  # and where it stands
    num_unused = 0
    unused: list[str] = []
    for folder in sorted({str(folder) for name in names for folder in PurePosixPath(name).parents}):
        for where, name, text in _rows_below(files, folder, images):
            if name not in images:
                num_unused += 1
                unused += [f"{where}: {name}"] if num_unused <= MOST_NAMED else []
                continue
            before, first = captions.setdefault(name, (text, where))
            if before != text:
                raise ValueError(f"an image must have one caption, and {name} has one in {first} and another in "
                                 f"{where}; remove one")  # fmt: skip
    texts = {name: text for name, (text, _) in captions.items()}
    for name in names:
        if name not in texts and (beside := _content(files, str(PurePosixPath(name).with_suffix(".txt")))) is not None:
            texts[name] = beside.strip()
    missing = [name for name in names if name not in texts]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} images have no caption: {first_few(missing)}; each "
            "needs a row (file_name,text) in metadata.csv, a line in metadata.jsonl, or a text file of its name"
        )
    return Captions([texts[name] for name in names], num_unused, unused)


def _content(files: ImageFiles, path: str) -> str | None:
    try:
        content = files.read(path, MAX_TEXT_BYTES)
    except FileNotFoundError:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, and is not; save it in UTF-8") from error


def _rows_below(files: ImageFiles, folder: str, images: set[str]) -> Iterator[tuple[str, str, str]]:
    """The place, the image and the caption of each row in the tables of a folder."""
    for path in (str(PurePosixPath(folder) / table) for table in TABLES):
        content = _content(files, path)
        if content is None:
            continue
        rows = _csv_rows(content, path) if path.endswith(".csv") else _lines(content, path)
        for number, row in rows:
            if not (
                isinstance(row, dict) and all(isinstance(row.get(key), str) for key in COLUMNS) and row[COLUMNS[0]]
            ):
                raise ValueError(f"{path} must have file_name and text in each row, and line {number} has {row}")
            where, text = f"{path} line {number}", row["text"].strip()
            for line in text.splitlines()[1:] if path.endswith(".csv") else ():
                if "," in line and normpath(join(folder, composed(line.split(",")[0].strip()))) in images:
                    raise ValueError(f"{where} has a quote that goes on over the rows of other images; close it")
            yield where, _image(row["file_name"], folder, where, images), text


def _image(file_name: str, folder: str, where: str, images: set[str]) -> str:
    """The name of a row's image; backslashes count as slashes unless the name of an image holds them."""
    file_name = composed(file_name.strip())
    name = normpath(join(folder, file_name))
    if name in images:
        return name
    if IS_ABSOLUTE.match(file_name):
        raise ValueError(f"{where} must have the path of an image from its table on, got {file_name}")
    return normpath(join(folder, file_name.replace("\\", "/")))


def _csv_rows(content: str, path: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file below its head, with the numbers of the lines in which they begin.

    Raises:
        ValueError: If a row has more fields than the head, or quotes that do not match.
    """
    reader = csv.reader(_text_lines(content, newline=""), strict=True, skipinitialspace=True)
    head: list[str] = []
    number = 1
    try:
        for row in reader:
            if not head:
                head = [name.strip() for name in row]
                if any(head.count(name) > 1 for name in COLUMNS):
                    raise ValueError(
                        f"{path} must have one column file_name and one column text, got {', '.join(head)}"
                    )
            elif len(row) > len(head):
                raise ValueError(f"{path} line {number} has {len(row)} fields for {len(head)} columns; put double "
                                 "quotes around a text with a comma")  # fmt: skip
            elif row:
                yield number, dict(zip(head, row, strict=False))  # a field that is missing is refused where it is read
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path} line {number} has a double quote that is not closed, or not doubled within others "
                         f"({error})") from error  # fmt: skip


def _lines(content: str, path: str) -> Iterator[tuple[int, Any]]:
    """The values in a JSON lines file, with the numbers of their lines."""
    for number, line in enumerate(_text_lines(content, newline="\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path} must hold JSON in each line, and line {number} does not: {error}") from error


def _text_lines(content: str, newline: str) -> Iterator[str]:
    """The lines one by one, as all of them at once, and io.StringIO too, take many times the memory of the file."""
    return io.TextIOWrapper(io.BytesIO(content.encode()), encoding="utf-8", newline=newline)
