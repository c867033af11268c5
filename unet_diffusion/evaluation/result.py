"""What an evaluation found: figures with what they mean, tables and pictures, as JSON and as one page.

A figure never stands alone: beside it are its interval, the same figure of real images against real images where that
exists, and a remark where the number of images cannot carry it.
"""

import base64
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader
from PIL import Image

from unet_diffusion.runtime.atomic_files import atomic_write

JSON_NAME, PAGE_NAME = "evaluation.json", "evaluation.html"
SHUFFLED = "shuffled"  # the samples, each compared with the condition of another, which differs from its own


@dataclass(frozen=True)
class Figure:
    """A number that says how good something is.

    Args:
        key: Name in JSON and in logs, such as "fd".
        title: Name for people, such as "Fréchet distance".
        value: The number; NaN if there is none, which `remark` explains.
        better: Which values are better; None: neither.
        interval: The bounds of a 95 % confidence interval; None: they are not known.
        real: The same figure of as many real images, compared with other real images; None: there is none.
        remark: What a reader must know to use the number; "" if nothing.
        beside: The same figure of other things, by their names: "shuffled" is that of the samples, each compared with
            the condition of another.
    """

    key: str
    title: str
    value: float
    better: Literal["lower", "higher"] | None = None
    interval: tuple[float, float] | None = None
    real: float | None = None
    remark: str = ""
    beside: dict[str, float] = field(default_factory=dict)

    @property
    def compared_with(self) -> str:
        """The same figure of real images and of other things, in words; "" if there is none."""
        values = {} if self.real is None else {"real images": self.real}
        return ", ".join(f"{name}: {number_text(value)}" for name, value in {**values, **self.beside}.items())


@dataclass(frozen=True)
class Table:
    """Figures of several things, such as of each class.

    Args:
        key: Name in JSON.
        title: Heading.
        columns: Names of the columns; the first is of what a row is about.
        rows: A row has one value for each column: text, a number, or None where there is no value.
    """

    key: str
    title: str
    columns: list[str]
    rows: list[list[str | float | int | None]]


@dataclass(frozen=True)
class Picture:
    """A picture that explains a figure.

    Args:
        key: Name of the picture, and of its place on the page.
        caption: What it shows, as a sentence.
        image: The picture.
    """

    key: str
    caption: str
    image: Image.Image

    @property
    def data_url(self) -> str:
        """The picture as a PNG within an address, so that the page needs no other file."""
        stored = io.BytesIO()
        self.image.save(stored, "PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}"


@dataclass
class Section:
    """One question, and what answers it.

    Args:
        title: The question in a few words, such as "Is it memorised?".
        about: How it was measured and how to read it: sentences.
        figures: Its figures.
        tables: Its tables.
        pictures: Its pictures.
        warnings: What is wrong, and what to do about it: a sentence each.
    """

    title: str
    about: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Evaluation:
    """All that an evaluation found.

    Args:
        subject: What was evaluated, such as "runs/digits".
        protocol: How it was evaluated, as plain values: numbers of images, seeds, features, resizing, scheduler, steps.
        sections: What was found.
    """

    subject: str
    protocol: dict[str, Any]
    sections: list[Section] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, Figure]:
        """All figures by key."""
        return {figure.key: figure for section in self.sections for figure in section.figures}

    @property
    def tables(self) -> dict[str, Table]:
        """All tables by key."""
        return {table.key: table for section in self.sections for table in section.tables}

    @property
    def warnings(self) -> list[str]:
        """All warnings, in order."""
        return [warning for section in self.sections for warning in section.warnings]

    def plain(self) -> dict[str, Any]:
        """All but the pictures as plain values; a number that is not finite is None."""
        return {
            "subject": self.subject,
            "protocol": self.protocol,
            "figures": {key: _plain(asdict(figure)) for key, figure in self.figures.items()},
            "tables": {key: _plain(asdict(table)) for key, table in self.tables.items()},
            "warnings": self.warnings,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write evaluation.json, and evaluation.html, one page that holds its pictures and needs no network.

        Args:
            folder: The folder, which is made if it is not there. Files of an evaluation before are replaced.
        """
        with atomic_write(Path(folder) / PAGE_NAME) as partial:
            partial.write_text(self.page(), encoding="utf-8")
        with atomic_write(Path(folder) / JSON_NAME) as partial:
            partial.write_text(json.dumps(self.plain(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def page(self) -> str:
        """The page, HTML."""
        loader = PackageLoader("unet_diffusion.evaluation", ".")
        environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters["number"] = number_text
        return environment.get_template("page.html.j2").render(evaluation=self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        for section in self.sections:
            yield section.title
            for figure in section.figures:
                interval = f" [{', '.join(map(number_text, figure.interval))}]" if figure.interval else ""
                others = f"  ({figure.compared_with})" if figure.compared_with else ""
                yield f"  {figure.title}: {number_text(figure.value)}{interval}{others}"
                if figure.remark:
                    yield f"      {figure.remark}"
            yield from (f"  ! {warning}" for warning in section.warnings)


def number_text(value: Any) -> str:
    """A number in at most four significant digits; a hyphen for None and for numbers that are not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
