"""An exported folder as a model on the hub: its card completed by licence, figures and pictures of the run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unet_diffusion.runtime.atomic_files import EXPORTED, read_json
from unet_diffusion.runtime.hub import check_hub_name, push

CARD, PLACEHOLDER = "README.md", "path/to/this/folder"
LICENCE = re.compile(r"\n## Licence\n.*\Z", re.DOTALL)
LICENCE_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # of the hub, such as apache-2.0
PICTURES = {"samples.png": "Samples at the end of training."}  # of a run folder, and what they show


def publish(folder: Path, name: str, *, run: Path, licence: str | None = None, private: bool = False) -> str:
    """Push an exported folder to the hub, and return its address.

    Args:
        folder: The exported folder, with its README.md.
        name: owner/name.
        run: The run folder, whose evaluation and pictures are added if it has them; any other path adds nothing.
        licence: The licence in the words of the hub, such as "apache-2.0"; None: none is stated.
        private: Whether a new repository is private.

    Raises:
        ValueError: If the name or the licence is not of the form that the hub takes.
        FileNotFoundError: If the hub cannot be reached, or refuses.
    """
    name = check_hub_name(name)
    check_licence(licence)
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (EXPORTED, CARD)
    }
    pictures = {f"pictures/{file}": run / file for file in PICTURES if (run / file).is_file()}
    evaluation = run / "evaluation" / "evaluation.json"
    figures = read_json(evaluation).get("figures", {}) if evaluation.is_file() else {}
    card = (folder / CARD).read_text(encoding="utf-8")
    completed = completed_card(card, name, licence=licence, figures=figures, pictures=[*pictures])
    return push(name, {**files, **pictures, CARD: completed.encode()}, private=private)


def check_licence(licence: str | None) -> None:
    """Refuse what is no word of the hub for a licence.

    Raises:
        ValueError: If it is none.
    """
    if licence is not None and not LICENCE_NAME.fullmatch(licence):
        raise ValueError(f"a licence must be a word of the hub, such as apache-2.0, mit or cc-by-4.0, got {licence!r}")


def completed_card(
    card: str, name: str, *, licence: str | None, figures: Mapping[str, Any], pictures: list[str]
) -> str:
    """The card of a folder with its name on the hub, its licence, and the figures and pictures of its run.

    Args:
        card: The README.md of an exported folder.
        name: owner/name.
        licence: The licence in the words of the hub; None: the card stays as it is.
        figures: Figures of evaluation.json by key.
        pictures: Paths of pictures in the repository.
    """
    added = _evaluation(figures) + _pictures(pictures)
    card = card.replace(PLACEHOLDER, name)
    if licence is None:
        return LICENCE.sub(lambda match: added + match[0], card)
    card = card.replace("---\n", f"---\nlicense: {licence}\n", 1)
    return LICENCE.sub(lambda match: f"{added}\n## Licence\n{licence}\n", card)


def _evaluation(figures: Mapping[str, Any]) -> str:
    rows = [
        f"| {figure['title']} | {figure['value']:.4g} | {_interval(figure['interval'])} | {figure['better'] or ''} |"
        for figure in figures.values()
        if figure["value"] is not None
    ]
    head = "| figure | value | 95 % interval | better |\n| --- | --- | --- | --- |\n"
    return f"\n## Evaluation\n{head}{chr(10).join(rows)}\n" if rows else ""


def _interval(bounds: list[float | None] | None) -> str:
    return " to ".join(f"{bound:.4g}" for bound in bounds if bound is not None) if bounds else ""


def _pictures(pictures: list[str]) -> str:
    shown = "".join(f"![{PICTURES[Path(path).name]}]({path})\n" for path in pictures)
    return f"\n## Pictures\n{shown}" if shown else ""
