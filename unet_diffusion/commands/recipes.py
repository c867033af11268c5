"""The recipes, and the command that lists, shows and copies them.

A recipe is a complete configuration; an overlay, such as `logger/wandb`, adds to one. They are the files of `configs/`,
which lies beside the package in a clone and inside it once installed. A recipe begins with a comment: three lines say
what it trains, needs and takes, and the rest how to use it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from unet_diffusion.commands.arguments import File
from unet_diffusion.runtime.messages import UsageError, did_you_mean, similar_paths

HEADINGS = ("Trains", "Needs", "Takes")
MAX_VALUES = 100_000  # values of a file, counting those that its aliases repeat: a few lines could stand for millions


def list_recipes() -> None:
    """List, show and copy the recipes that fit can train.

        unet-diffusion recipes
        unet-diffusion recipes show digits
        unet-diffusion recipes copy digits mine.yaml

    Without an action the command prints a line for each recipe, and the names of the overlays, which a second --config
    adds. A copied recipe is yours to change: unet-diffusion fit --config mine.yaml.
    """
    recipes = all_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        if summary := recipe.summary:
            what, needs, takes = (summary[heading].rstrip(".") for heading in HEADINGS)
            print(f"{recipe.name:{width}}  {what}; needs {needs}; {takes}")
    print(f"overlays, with another --config: {', '.join(recipe.name for recipe in recipes if not recipe.summary)}")


def show_recipe(name: str) -> None:
    """Print a recipe.

        unet-diffusion recipes show digits

    Args:
        name: The name of the recipe.

    Raises:
        UsageError: If there is no such recipe.
    """
    print(recipe_path(name).read_text(encoding="utf-8"), end="")


def copy_recipe(name: str, file: File) -> None:
    """Write a recipe to a file.

        unet-diffusion recipes copy digits mine.yaml

    Args:
        name: The name of the recipe.
        file: The file to make.

    Raises:
        UsageError: If there is no such recipe.
        FileExistsError: If the file exists.
    """
    text = recipe_path(name).read_text(encoding="utf-8")
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError as error:
        raise FileExistsError(f"{file} exists and is not overwritten; choose another file") from error
    print(f"to train with it: unet-diffusion fit --config {file}")


@dataclass(frozen=True)
class Recipe:
    """A recipe and what its first lines say.

    Args:
        name: The name of the recipe, `folder/name` for an overlay.
        path: The file of the recipe.
    """

    name: str
    path: Path

    @property
    def summary(self) -> dict[str, str]:
        """What the recipe trains, needs and takes, by HEADINGS; {} for an overlay."""
        lines = [line[2:] for line in self.path.read_text(encoding="utf-8").splitlines()[: len(HEADINGS)]]
        summary = dict(line.split(": ", 1) for line in lines if ": " in line)
        return summary if tuple(summary) == HEADINGS else {}


def folder() -> Path:
    """The folder of the recipes."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def all_recipes() -> list[Recipe]:
    """All recipes in order of their names, and the overlays after them."""
    files = [(path.relative_to(folder()).with_suffix("").as_posix(), path) for path in folder().rglob("*.yaml")]
    return [Recipe(name, path) for name, path in sorted(files, key=lambda file: ("/" in file[0], file[0]))]


def recipe_path(name: str) -> Path:
    """The file that a name or path stands for; a file that exists comes before a recipe of that name.

    Args:
        name: The name of a recipe, or the path of a file.

    Raises:
        UsageError: If there is neither.
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

    Args:
        path: The file.

    Raises:
        UsageError: If the file is not YAML, or holds no settings, a name twice, or more values than MAX_VALUES.
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
    """A loader that refuses a name that occurs twice in a mapping, where PyYAML takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        names = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                raise yaml.MarkedYAMLError(problem=f"{key.value} occurs twice", problem_mark=key.start_mark)
            names.add(str(key.value))
        return node


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values that a node stands for; those of its aliases count each time."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # an alias of itself would never end
        parts = node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in node.value]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]
