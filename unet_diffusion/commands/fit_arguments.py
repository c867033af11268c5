"""A check of the arguments of fit and validate before the imports, which take seconds: files, folders and sections.

Lightning's parser checks whether options are known and values fit, as that takes the classes that they belong to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import unet_diffusion.data
from unet_diffusion.commands.recipes import all_recipes, read_settings, recipe_path
from unet_diffusion.runtime.messages import UsageError, did_you_mean, similar_paths

SECTIONS = ("model", "data", "trainer", "samples", "checkpoint", "task", "seed_everything", "ckpt_path", "weights_only",
            "verbose")  # fmt: skip
NESTED = ("model", "trainer", "samples", "checkpoint")  # the sections that hold settings of their own
FLAGS = ("config", "print_config", "print_shtab", "help")
TASKS = ("denoise", "segment", "autoencode")
FINDS_CHECKPOINTS = ("last", "best", "hpc")  # Lightning's words for files that it finds in the run folder


@dataclass
class FitArguments:
    """The arguments of fit or validate.

    Args:
        words: The arguments for the parser, with the path of each recipe in place of its name.
        task: The task that is trained, one of TASKS.
        modules: The modules that --allow lets the configuration name, beside our own.
        data_classes: The data classes of this package that the configuration names without their package. The parser
            knows them once they are imported.
    """

    words: list[str]
    task: str = TASKS[0]
    modules: list[str] = field(default_factory=list)
    data_classes: list[str] = field(default_factory=list)


def check_arguments(arguments: Sequence[str]) -> FitArguments:
    """The arguments of fit or validate, after a check of the files, folders and sections that they name.

    Args:
        arguments: The arguments of the command line, the name of the command first.

    Raises:
        UsageError: If there is no such recipe, section or task, or a file is not YAML.
        FileNotFoundError: If a file or folder is missing.
    """
    checked, settings = FitArguments([arguments[0]]), dict[str, Any]()
    rest = list(arguments[1:])
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.partition("=")
        if not argument.startswith("-"):
            raise UsageError(f"{argument} belongs to no option{_as_recipe(argument)}")
        words = [argument]
        if not has_value and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            words.append(value)
        if name in ("--config", "-c") and value:
            path = recipe_path(value)
            checked.words += ["--config", str(path)]
            _update(settings, _read(path))
            continue
        if name == "--allow":
            _check_module(value)
            checked.modules.append(value)
            continue
        checked.words += words
        if name.startswith("--"):
            _check_section(name.removeprefix("--"), f"option {name}")
            _update(settings, {name.removeprefix("--"): _value(value)})
    if not any(argument in ("-h", "--help") or argument.startswith("--print_") for argument in checked.words):
        _check_paths(settings)
        if arguments[0] == "validate" and not settings.get("ckpt_path"):
            raise UsageError(
                "--ckpt_path must name what is validated: a file, or last or best of the run folder; without it the "
                "weights are random"
            )
    checked.data_classes = [value for value in settings.values() if value in unet_diffusion.data.__all__]
    checked.task = settings.get("task", checked.task)
    if checked.task not in TASKS:
        raise UsageError(f"task must be one of {', '.join(TASKS)}, got {checked.task}")
    return checked


def _check_module(name: str) -> None:
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"--allow takes the name of a module, such as mine or mine.networks, got {name!r}")


def _as_recipe(word: str) -> str:
    """The end of an error message about a word that may be the name of a recipe."""
    names = [recipe.name for recipe in all_recipes()]
    return f"; did you mean --config {word}?" if word in names else "; --help lists the options"


def _value(text: str) -> Any:
    """The value that the parser will read from a word."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read(path: Path) -> dict[str, Any]:
    """The settings in a file, by their names with dots, such as "trainer.max_steps"."""
    content = read_settings(path)
    for section, settings in content.items():
        _check_section(str(section), f"section {section!r} of {path}")
        if section in NESTED and not isinstance(settings, dict | None):
            raise UsageError(f"section {section} of {path} must hold settings, and holds {settings!r}")
    flat = _flat(content)
    for name, value in flat.items():
        if name.endswith("class_path") and not isinstance(value, str):
            raise UsageError(f"{name} in {path} must be the name of a class, got {value!r}")
    return flat


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {name: content}
    return {
        key: value
        for part, below in content.items()
        for key, value in _flat(below, f"{name}.{part}".strip(".")).items()
    }


def _update(settings: dict[str, Any], others: dict[str, Any]) -> None:
    """Replace earlier settings by later ones; another class of data drops the arguments of the one before."""
    for name, value in others.items():
        if name in ("data", "data.class_path"):
            for old in [known for known in settings if known.startswith("data.")]:
                del settings[old]
        settings[name.replace(".init_args", "")] = value


def _check_section(name: str, what: str) -> None:
    section = name.split(".")[0].removesuffix("+")
    if section not in (*SECTIONS, *FLAGS):
        similar = did_you_mean(section, SECTIONS) or f"; it must be one of {', '.join(SECTIONS)}"
        raise UsageError(f"there is no {what}{similar}")


def _check_paths(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if not isinstance(value, str) or not _is_input(name, settings):
            continue
        if not value:
            raise UsageError(f"{name} must be a folder or file, and is empty; set --{name}")
        path = Path(value).expanduser()
        in_archive = any(parent.is_file() for parent in path.parents)
        if "://" not in value and not path.exists() and not in_archive:
            fix = similar_paths(path) or f"; set --{name}"
            raise FileNotFoundError(f"{name} must be an existing folder or file, got {value}{fix}")
    checkpoint = settings.get("ckpt_path")
    if checkpoint and checkpoint not in FINDS_CHECKPOINTS and not Path(str(checkpoint)).is_file():
        words = ", ".join(FINDS_CHECKPOINTS)
        similar = similar_paths(Path(str(checkpoint)))
        raise FileNotFoundError(f"ckpt_path must be a file, or one of {words}, got {checkpoint}{similar}")
    root = settings.get("trainer.default_root_dir")
    if isinstance(root, str) and Path(root).expanduser().is_file():
        raise UsageError(f"trainer.default_root_dir must be a folder, and {root} is a file")


def _is_input(name: str, settings: dict[str, Any]) -> bool:
    """Whether a setting is a folder, file or archive that must exist, which is known for our own classes."""
    if name == "model.init_from":
        return True
    owner, _, argument = name.rpartition(".")
    if owner.split(".")[0] != "data" or argument not in ("root", "images", "labels") or settings.get("data.download"):
        return False
    owner_class = settings.get(f"{owner}.class_path") or settings.get(owner) or ""
    package, _, class_name = str(owner_class).rpartition(".")
    is_ours = class_name in unet_diffusion.data.__all__ and (not package or package.startswith("unet_diffusion."))
    return is_ours and (argument == "root" or class_name == "PairedFiles")
