"""Tables with a column of images: Hugging Face data sets on the hub or saved to a folder, Parquet and Arrow files.

The library datasets reads them (https://huggingface.co/docs/datasets): as Arrow tables that stay on the disk, in which
row i is found at once. Images are handed on as the table stores them, in the bytes of a file, and decoded as files of a
folder are. Code in a data set is never run: datasets 4 and later refuse to.
"""

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from unet_diffusion.data.described import (
    CAPTIONS,
    LABELS,
    DescribedFiles,
    Table,
    captions_of_values,
    classes_of_values,
)
from unet_diffusion.data.hub_tables import USUAL_SPLIT, MissingSplit, check_split, load_from_hub
from unet_diffusion.data.listing import LeftOut, composed, walk
from unet_diffusion.runtime.addresses import PREFIX
from unet_diffusion.runtime.messages import first_few

if TYPE_CHECKING:
    from datasets import Dataset

TABLE_EXTENSIONS = (".parquet", ".arrow")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # in folders that save_to_disk wrote
NUMBERED = "names of images that come again, and are numbered"
ROW = "{:09d}"  # the name of a row where rows name no files; it stays the same when others are appended
SPLIT_IN_NAME = re.compile(r"[/_.-](train|validation|valid|val|dev|test)(?=[/_.-])")
SPLITS = {"valid": "validation", "val": "validation", "dev": "validation"}  # as the library names them


class TableFiles(DescribedFiles):
    """The images in a column of a table.

    An image has the name of its file, if the table holds it, otherwise the number of its row. Where several rows have a
    name, all but the first are numbered.

    Args:
        place: hf://owner/name, hf://owner/name@revision, a folder that save_to_disk wrote, a folder of Parquet or Arrow
            files, or one such file.
        table: The split and the columns.

    Raises:
        FileNotFoundError: If there is no such data set, or the hub cannot be reached.
        ImportError: If the package datasets is missing.
        ValueError: If the table has no such split or column, or it cannot be read.
    """

    def __init__(self, place: str, table: Table) -> None:
        self.place, self.table = place, table
        self.left_out = LeftOut()
        self._folder = _folder_of(place)
        self._rows = _loaded(place, table)
        self._column = self._image_column()
        self._images = self._undecoded()
        names = self._names()
        self._index = {name: index for index, name in enumerate(names)}
        self.names = sorted(names)

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The encoded contents of an image.

        Raises:
            FileNotFoundError: If there is no image of that name.
            ValueError: If its row holds no image.
        """
        if name not in self._index:
            raise FileNotFoundError(f"there is no image {name} in {self.place}")
        value = self._images[self._index[name]][self._column]
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, bytes):
            return content
        if isinstance(value, dict) and value.get("path"):
            return self._file_of_the_set(value["path"], max_bytes)
        raise ValueError("its row holds no image")

    def _file_of_the_set(self, path: str, max_bytes: int | None) -> bytes:
        """The contents of a file that a row names: one of the data set, as whoever wrote the table may name any."""
        file = (self._folder / path).resolve()
        if not file.is_relative_to(self._folder):
            raise ValueError(f"its row names {path}, which must lie below {self._folder}; move it there, or write the "
                             "images into the table")  # fmt: skip
        if not file.is_file():
            raise ValueError(f"its row names {path}, and there is no such file")
        if max_bytes is not None and file.stat().st_size > max_bytes:
            raise ValueError(f"it must be at most {max_bytes} bytes, and has {file.stat().st_size}")
        return file.read_bytes()

    def stamp(self, name: str) -> str:
        """Always "": a table does not say what a row holds unless it is read."""
        return ""

    def classes(self, names: Sequence[str]) -> tuple[list[int], list[str]]:
        """The class of each image, and the name of each class, which a table may hold beside the numbers."""
        column = self.table.label or self._first_of(LABELS) or self._only_column_of("ClassLabel")
        values = self._values(column, "label", "class_labels")
        class_names = getattr(self._rows.features[column], "names", None)
        return classes_of_values(values, names, class_names, f"the column {column} of {self.place}")

    def captions(self, names: Sequence[str]) -> list[str]:
        """The caption of each image."""
        column = self.table.caption or self._first_of(CAPTIONS)
        values = self._values(column, "caption", "captions")
        return captions_of_values(values, names, f"the column {column} of {self.place}")

    def _image_column(self) -> str:
        column = self.table.image or self._first_of(("image",)) or self._only_column_of("Image")
        if column is None or column not in self._rows.features:
            raise ValueError(f"{self._missing(column, 'image')}; {self.table.advice('image')} the one that holds "
                             "the images")  # fmt: skip
        return column

    def _undecoded(self) -> "Dataset":
        """The images in the bytes of their files: bytes with a path, or alone.

        Raises:
            ValueError: If the column holds no images.
        """
        import datasets

        images = self._rows.select_columns([self._column])
        feature = images.features[self._column]
        if isinstance(feature, datasets.Image):
            return images.cast_column(self._column, datasets.Image(decode=False))
        is_struct = isinstance(feature, dict) and "bytes" in feature
        if not is_struct and getattr(feature, "dtype", None) not in ("binary", "large_binary"):
            raise ValueError(
                f"the column {self._column} of {self.place} must hold images, in the bytes of their files, and holds "
                f"{_feature_name(feature)}; {self.table.advice('image')} another"
            )
        return images

    def _values(self, column: str | None, kind: str, option: str) -> dict[str, Any]:
        """What a column holds for each image, by its name."""
        if column is None or column not in self._rows.features:
            raise ValueError(f"{self._missing(column, kind)}; {self.table.advice(kind)} the one that holds them, or "
                             f"set {option} to false")  # fmt: skip
        values = self._rows.select_columns([column])[:][column]
        return {name: values[index] for name, index in self._index.items()}

    def _missing(self, column: str | None, kind: str) -> str:
        has = f"has no column {column}" if column else f"has no column that is known to be the {kind}"
        columns = [f"{name} ({_feature_name(feature)})" for name, feature in self._rows.features.items()]
        return f"{self.place} {has}, but {', '.join(columns)}"

    def _first_of(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self._rows.features), None)

    def _only_column_of(self, kind: str) -> str | None:
        columns = [name for name, feature in self._rows.features.items() if type(feature).__name__ == kind]
        return columns[0] if len(columns) == 1 else None

    def _names(self) -> list[str]:
        """The name of each row: that of its file, numbered if an earlier row has it, or else the number of the row."""
        rows = self._images.with_format("arrow")
        paths = [path for batch in rows.iter(1000) for path in _paths(batch[self._column])]
        files = [composed(PurePosixPath(path.replace("\\", "/")).name) if path else "" for path in paths]
        names, numbered = unique_names([name or ROW.format(index) for index, name in enumerate(files)])
        if numbered:
            self.left_out.names[NUMBERED] |= set(numbered)
        return names


def unique_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names, of which those that come again are numbered, and the numbered ones: a.png, a.png give a.png, a_2.png.

    A name depends on those before it alone, so that it stays the same when others are appended.

    Args:
        names: Names of files, some of them alike.
    """
    unique, numbered = dict[str, None](), list[str]()  # the keys are in order
    count: Counter[str] = Counter()
    for name in names:
        file, number = PurePosixPath(name), count[name] + 1
        while (new := name if number == 1 else f"{file.stem}_{number}{file.suffix}") in unique:
            number += 1
        count[name] = number
        unique[new] = None
        if number > 1:
            numbered.append(new)
    return list(unique), numbered


def is_table_file(path: Path) -> bool:
    """Return whether a path is a Parquet or Arrow file.

    Args:
        path: Any path.
    """
    return path.suffix.lower() in TABLE_EXTENSIONS and path.is_file()


def _loaded(place: str, table: Table) -> "Dataset":
    """The rows of a split.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If there is no such split, or the data set cannot be read.
    """
    datasets = _library(place)
    with _explained(place):
        loaded = _all_splits(datasets, place, table)
    if isinstance(loaded, datasets.Dataset):
        if table.split is not None:
            raise ValueError(f"{place} has no splits, got table.split {table.split}; leave it out")
        return loaded.with_format(None)
    split = table.split or (next(iter(loaded)) if len(loaded) == 1 else USUAL_SPLIT)
    check_split(split, loaded, place, table)
    return loaded[split].with_format(None)


def _all_splits(datasets: ModuleType, place: str, table: Table) -> Any:
    if place.startswith(PREFIX):
        return load_from_hub(datasets, place, table)
    path = Path(place)
    if path.is_file():
        kind = path.suffix.lower().removeprefix(".")
        return datasets.load_dataset(kind, data_files=glob.escape(str(path)))
    if (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file():
        return datasets.load_from_disk(str(path))
    kind, files = _files_of_splits(path)
    return datasets.load_dataset(kind, data_files=files)


def _files_of_splits(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """The format of the table files in a folder, and the files of each split, which are told by their names.

    Raises:
        ValueError: If files are of two formats, if only some have the name of a split, or if a folder below was saved
            as a data set of its own.
    """
    paths = sorted(path for path in walk(folder, LeftOut()) if path.suffix.lower() in TABLE_EXTENSIONS)
    saved = sorted({path.parent.name for path in paths if (path.parent / SAVED).is_file()})
    if saved:
        raise ValueError(
            f"{folder} holds data sets that were saved each by itself: {first_few(saved)}; give one of them"
        )
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds {' and '.join(sorted(kinds))} files; give one kind, or one file")
    splits: dict[str, list[str]] = {}
    for path in paths:
        found = SPLIT_IN_NAME.search(f"/{path.relative_to(folder).as_posix()}")
        splits.setdefault(SPLITS.get(found[1], found[1]) if found else "", []).append(glob.escape(str(path)))
    if len(splits) > 1 and "" in splits:
        loose = first_few([Path(file).name for file in splits.pop("")])
        raise ValueError(f"{folder} holds files of the splits {', '.join(sorted(splits))}, and others whose names tell "
                         f"none: {loose}; rename or move these")  # fmt: skip
    return kinds.pop().removeprefix("."), {split or "train": files for split, files in splits.items()}


def _folder_of(place: str) -> Path:
    """The folder in which the image files lie that a table may name."""
    if place.startswith(PREFIX):
        from huggingface_hub.constants import HF_HOME

        return Path(HF_HOME).resolve()
    return (Path(place).parent if Path(place).is_file() else Path(place)).resolve()


def _library(place: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'to read {place}, the package datasets is needed; install it with pip install "unet-diffusion[datasets]"'
        ) from error
    return datasets


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Turn errors of the library into an error that says what to do."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except MissingSplit:  # which says by itself what to do
        raise
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{place} cannot be had from the hub: {_first_line(error)} Correct the name, or log in "
                                "with: hf auth login") from error  # fmt: skip
    except (ConnectionError, HfHubHTTPError) as error:
        raise FileNotFoundError(f"the hub cannot be reached for {place}; connect to the network, set HF_HUB_OFFLINE=1 "
                                "if the data set is in its cache, or give a local folder") from error  # fmt: skip
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{place} cannot be read as a data set: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(filter(str.strip, str(error).splitlines()), type(error).__name__)


def _paths(column: Any) -> list[str | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    has_paths = pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0
    return pc.struct_field(column, "path").to_pylist() if has_paths else [None] * len(column)


def _feature_name(feature: Any) -> str:
    """Such as "ClassLabel", "string", or "bytes, path" of a struct."""
    if isinstance(feature, dict):
        return ", ".join(feature)
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind
