"""Image files that come with what is known of each: rows of a table, or samples of a tar archive."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unet_diffusion.data.listing import LeftOut
from unet_diffusion.runtime.messages import first_few

CAPTIONS = ("caption", "text")  # names of columns, and of keys in JSON, that are looked for
LABELS = ("label", "labels")


@dataclass(frozen=True)
class Table:
    """Which part of a data set is used: its columns, or in tar archives the members and the keys of `.json` members.

    Args:
        image: The column of the images; in tar archives the ending of their members, such as jpg. By default "image",
            or else the only column of images.
        label: The column of the classes. By default "label" or "labels", or else the only column of named classes; in
            tar archives the member .cls, or else these keys.
        caption: The column of the captions. By default "caption" or "text"; in tar archives the member .txt, or else
            these keys.
        split: The split, such as test. By default the only one, or else "train".
        config: The configuration, of a data set on the hub that has several.
    """

    image: str | None = None
    label: str | None = None
    caption: str | None = None
    split: str | None = None
    config: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """What is named, by the name of the field."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def words(self, prefix: str = "--") -> list[str]:
        """The options of a command line that name the same.

        Args:
            prefix: How they begin, such as "--data.".
        """
        return [f"{prefix}table.{name}={value}" for name, value in self.named.items()]

    def settings(self) -> dict[str, str | None]:
        """The fields as settings beside outputs record them."""
        return {f"table.{name}": value for name, value in vars(self).items()}

    def advice(self, name: str) -> str:
        """How the user chooses another column or split, for the end of a message.

        Args:
            name: The name of the field.
        """
        return f"set table.{name} to"


class UsualTable(Table):
    """The usual parts of a data set, where no option names others."""

    def advice(self, name: str) -> str:
        """How the user chooses another column or split, for the end of a message.

        Args:
            name: The name of the field.
        """
        return f"no option names another {name} here; write the data set again, with the usual name for"


USUAL = Table()
NOT_NAMED = UsualTable()  # for readers that have no options


def check_only_images(table: Table) -> None:
    """Refuse the name of a column of classes or captions where only images are read.

    Args:
        table: The names.

    Raises:
        ValueError: If such a column is named.
    """
    for name in ("label", "caption"):
        if name in table.named:
            raise ValueError(f"table.{name} is {table.named[name]}, and only images are read here; leave it out")


def check_used(table: Table, *, class_labels: bool, captions: bool) -> None:
    """Refuse the name of a column of classes or captions where images have none.

    Args:
        table: The names.
        class_labels: Whether images have classes.
        captions: Whether images have captions.

    Raises:
        ValueError: If such a column is named.
    """
    options = {"label": ("class_labels", class_labels), "caption": ("captions", captions)}
    for name, (option, is_set) in options.items():
        if getattr(table, name) is not None and not is_set:
            raise ValueError(f"table.{name} is {getattr(table, name)}, and {option} is false; set {option} to true, or "
                             f"leave table.{name} out")  # fmt: skip


class DescribedFiles(ABC):
    """`ImageFiles` that know the classes and the captions of their images.

    Attributes:
        names: The names of the images, sorted.
        left_out: What else there is.
    """

    names: list[str]
    left_out: LeftOut

    @abstractmethod
    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The encoded contents of an image; see `ImageFiles`."""

    @abstractmethod
    def stamp(self, name: str) -> str:
        """A text that changes with the contents of an image, but needs no reading; "": that is not known."""

    @abstractmethod
    def classes(self, names: Sequence[str]) -> tuple[list[int], list[str]]:
        """The class of each image, and the name of each class.

        Raises:
            ValueError: If an image has no class, or there are fewer than two.
        """

    @abstractmethod
    def captions(self, names: Sequence[str]) -> list[str]:
        """The caption of each image.

        Raises:
            ValueError: If an image has none.
        """


def classes_of_values(
    values: Mapping[str, Any], names: Sequence[str], class_names: Sequence[str] | None, where: str
) -> tuple[list[int], list[str]]:
    """The class of each image, and the name of each class, from numbers or from texts.

    Args:
        values: A whole number, or the name of a class, for each image that there is.
        names: The names of the images that are used.
        class_names: The name of each class. None: the values are the names, or the numbers are.
        where: Where the values are from, for messages.

    Raises:
        ValueError: If they are neither, or there are fewer than two classes.
    """
    written = values
    values = {name: (value.strip() or None) if isinstance(value, str) else value for name, value in values.items()}
    texts = {value for value in values.values() if isinstance(value, str)}
    if class_names is None and texts:
        class_names = sorted(texts, key=natural_order)
        number_of = {name: number for number, name in enumerate(class_names)}
        values = {name: number_of.get(value) for name, value in values.items()}
    most = math.inf if class_names is None else len(class_names)
    wrong = [name for name in names if not (_is_number(values[name]) and values[name] < most)]
    if wrong:
        up_to = "" if class_names is None else f" to {len(class_names) - 1}"
        raise ValueError(
            f"{where} must hold the name or the number of a class, from 0{up_to}, for every image, and does not for "
            f"{len(wrong)}: {first_few([f'{name} ({written[name]})' for name in wrong])}; correct it, leave these "
            "images out, or set class_labels to false"
        )
    if class_names is None:
        class_names = [str(number) for number in range(max(filter(_is_number, values.values())) + 1)]
    if len(class_names) < 2:
        raise ValueError(
            f"with class_labels there must be at least 2 classes in {where}, found {class_names[0]!r} only"
        )
    return [values[name] for name in names], list(class_names)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def natural_order(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """A key to sort by: runs of digits count as numbers, and of 1 and 01 one comes first."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(False, int(part), "") if part.isdecimal() else (True, 0, part) for part in parts], name


def captions_of_values(values: Mapping[str, Any], names: Sequence[str], where: str) -> list[str]:
    """The captions, without white space around them.

    Args:
        values: The caption of each image that there is.
        names: The names of the images that are used.
        where: Where the captions are from, for messages.

    Raises:
        ValueError: If one is missing, or no text.
    """
    wrong = [f"{name} has {_kind(values[name])}" for name in names if not isinstance(values[name], str)]
    if wrong:
        raise ValueError(
            f"{where} must hold a text for every image, and {len(wrong)} of {len(names)} have none: "
            f"{first_few(wrong)}; name other captions by table.caption, or set captions to false"
        )
    return [values[name].strip() for name in names]


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
