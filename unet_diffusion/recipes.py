"""The recipes, by name: a complete configuration each, and overlays that add to one, such as `logger/wandb`.

They are the files of `configs/`, which lies beside the package in a clone and inside it once installed. A recipe begins
with a comment: three lines say what it trains, needs and takes, and the rest how to use it.
"""

from dataclasses import dataclass
from pathlib import Path

from unet_diffusion.usage import UsageError, did_you_mean, similar_paths

HEADINGS = ("Trains", "Needs", "Takes")


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
    package = Path(__file__).resolve().parent
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
