"""The arguments of fit and validate, looked at before what takes seconds to import: files, folders and sections.

Whether options are known and values fit is told by the parser, which needs the classes that they are arguments of.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from unet_diffusion.recipes import recipe_path
from unet_diffusion.usage import UsageError, did_you_mean, similar_paths

SECTIONS = ("model", "data", "trainer", "samples", "checkpoint", "task", "seed_everything", "ckpt_path", "weights_only")
FLAGS = ("config", "print_config", "print_shtab", "help")
FINDS_CHECKPOINTS = ("last", "best", "hpc")  # words of Lightning's for files that it finds in the run folder
OF_DATA = ("root", "images", "labels")  # arguments of data that are folders, files or archives


def check_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the path of each recipe in place of its name.

    Args:
        arguments: Those of the command, its name first.

    Raises:
        UsageError: if there is no such recipe or section, or a file is not YAML.
        FileNotFoundError: if a file or folder is missing.
    """
    checked, settings = [arguments[0]], dict[str, Any]()
    rest = list(arguments[1:])
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.partition("=")
        if name in ("--config", "-c") and (has_value or rest):
            path = recipe_path(value if has_value else rest.pop(0))
            checked += ["--config", str(path)]
            _update(settings, _read(path))
            continue
        checked.append(argument)
        if not name.startswith("--"):
            continue
        if not has_value and rest and not rest[0].startswith("--"):
            value = rest[0]
        _check_section(name.removeprefix("--"), f"option {name}")
        _update(settings, {name.removeprefix("--"): value})
    if not any(flag in argument for argument in arguments for flag in ("--help", "-h", "--print_")):
        _check_paths(settings)
    return checked


def _read(path: Path) -> dict[str, Any]:
    """The settings in a file, by their names with dots."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(
            f"{path} must be YAML, and is not: {getattr(error, 'problem', None) or error}{where}"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold settings, such as `trainer:`, and holds {type(content).__name__}")
    for section in content:
        _check_section(str(section), f"section {section!r} of {path}")
    return _flat(content)


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {name: content}
    return {
        key: one for part, below in content.items() for key, one in _flat(below, f"{name}.{part}".strip(".")).items()
    }


def _update(settings: dict[str, Any], others: dict[str, Any]) -> None:
    """Later settings replace earlier ones; another class of data has no use for the arguments of the one before."""
    for name, value in others.items():
        if name in ("data", "data.class_path"):
            for old in [one for one in settings if one.startswith("data.")]:
                del settings[old]
        settings[name.replace(".init_args", "")] = value


def _check_section(name: str, what: str) -> None:
    section = name.split(".")[0].removesuffix("+")
    if section not in (*SECTIONS, *FLAGS):
        similar = did_you_mean(section, SECTIONS) or f"; it must be one of {', '.join(SECTIONS)}"
        raise UsageError(f"there is no {what}{similar}")


def _check_paths(settings: dict[str, Any]) -> None:
    paths = {name: value for name, value in settings.items() if _is_input(name) and isinstance(value, str) and value}
    if settings.get("data.download") in (True, "true"):
        paths.pop("data.root", None)
    for name, value in paths.items():
        path = Path(value).expanduser()
        in_archive = any(parent.is_file() for parent in path.parents)
        if "://" not in value and not path.exists() and not in_archive:
            fix = similar_paths(path) or f"; set --{name}"
            raise FileNotFoundError(f"{name} must be an existing folder or file, got {value}{fix}")
    asked = settings.get("ckpt_path")
    if asked and asked not in ("null", *FINDS_CHECKPOINTS) and not Path(asked).is_file():
        words = ", ".join(FINDS_CHECKPOINTS)
        raise FileNotFoundError(f"ckpt_path must be a file, or one of {words}, got {asked}{similar_paths(Path(asked))}")
    root = settings.get("trainer.default_root_dir")
    if isinstance(root, str) and Path(root).expanduser().is_file():
        raise UsageError(f"trainer.default_root_dir must be a folder, and {root} is a file")


def _is_input(name: str) -> bool:
    parts = name.split(".")
    return name == "model.init_from" or (parts[0] == "data" and parts[-1] in OF_DATA)
