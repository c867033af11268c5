"""The recipes, by name: a complete configuration each, and overlays that add to one, such as `logger/wandb`.

They are the files of `configs/`, which lies beside the package in a clone and inside it once installed. A recipe begins
with a comment: three lines say what it trains, needs and takes, and the rest how to use it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unet_diffusion.runtime.messages import UsageError, did_you_mean, similar_paths

HEADINGS = ("Trains", "Needs", "Takes")
MAX_VALUES = 100_000  # of a file, with what its aliases repeat: a few lines of them can stand for any number


@dataclass(frozen=True)
class Recipe:
    """A recipe and what its first lines say.

    Args:
        name: Its name, `folder/name` for an overlay.
        path: The file.
    """

    name: str
    path: Path

    @property
    def summary(self) -> dict[str, str]:
        """What it trains, needs and takes, by HEADINGS; {} for an overlay."""
        lines = [line[2:] for line in self.path.read_text(encoding="utf-8").splitlines()[: len(HEADINGS)]]
        summary = dict(line.split(": ", 1) for line in lines if ": " in line)
        return summary if tuple(summary) == HEADINGS else {}


def folder() -> Path:
    """Where the recipes are."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def all_recipes() -> list[Recipe]:
    """Recipes by name, and the overlays after them."""
    files = [(path.relative_to(folder()).with_suffix("").as_posix(), path) for path in folder().rglob("*.yaml")]
    return [Recipe(name, path) for name, path in sorted(files, key=lambda file: ("/" in file[0], file[0]))]


def recipe_path(name: str) -> Path:
    """The file that a name or path stands for; a file that exists comes before a recipe of that name.

    Raises:
        UsageError: if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = {recipe.name: recipe.path for recipe in all_recipes()}
    if name in known:
        return known[name]
    if Path(name).is_dir():
        raise UsageError(f"a configuration must be a file, or the name of a recipe, and {name} is a folder")
    similar = did_you_mean(name, known) or similar_paths(Path(name))
    raise UsageError(f"there is no recipe or file {name}{similar or '; `unet-diffusion recipes` lists the recipes'}")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a configuration file.

    Raises:
        UsageError: If it is not YAML, or holds no settings, a name twice, or more values than any configuration has.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is not None and _num_values(root, {}) > MAX_VALUES:
            raise UsageError(f"{path} must hold at most {MAX_VALUES} values, and its aliases (*) stand for more")
        content = None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it is no text in UTF-8, or too deep"
        raise UsageError(f"{path} must be YAML, and is not: {reason}{where}") from error
    if not isinstance(content, dict):
        got = "nothing" if content is None else f"a {type(content).__name__}"
        raise UsageError(f"{path} must hold settings, such as `trainer:`, and holds {got}")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses a name that occurs twice in a mapping, of which PyYAML takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        names = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.MarkedYAMLError(problem=f"{key.value} occurs twice", problem_mark=key.start_mark)
            names.add(str(key.value))
        return node


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, with those of its aliases each time."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # if it stands for itself, too, there is no end to it
        parts = node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in node.value]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]
