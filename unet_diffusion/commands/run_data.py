"""The data of a configuration by themselves: those of a run, for commands that look at what it was trained on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

import unet_diffusion.data
from unet_diffusion.commands.fit_arguments import check_arguments
from unet_diffusion.commands.named_classes import check_names, refuse_names_but
from unet_diffusion.commands.parser_errors import in_short
from unet_diffusion.commands.recipes import read_settings, recipe_path
from unet_diffusion.commands.run_parser import RunParser
from unet_diffusion.commands.training_cli import Task

CONFIG = "config.yaml"  # in a run folder


def config_of(path: Path) -> Path | None:
    """The configuration of the run that a folder, or a checkpoint in it, belongs to; None if there is none.

    Args:
        path: A run folder, a checkpoint file in its checkpoints/, or anything else.
    """
    run = path.parents[1] if path.is_file() and path.parent.name == "checkpoints" else path
    return run / CONFIG if (run / CONFIG).is_file() else None


def data_of(
    config: str | Path | None, options: Sequence[str], modules: Sequence[str], task: str
) -> LightningDataModule:
    """The data module of a configuration, not yet set up.

    Args:
        config: The file of the configuration, or the name of a recipe; None: the options say everything.
        options: Options of `fit` that change the data, such as ["--data.root", "images"].
        modules: Modules of the user's own that the configuration may name.
        task: What the data are for, where there is no configuration.

    Raises:
        UsageError: If there is no such option or recipe.
        FileNotFoundError: If a file or folder is missing.
        ValueError: If a value does not fit.
    """
    begin = ["--task", task] if config is None else ["--config", str(config)]
    checked = check_arguments(["fit", *begin, *options])
    refuse_names_but(modules)
    section = {} if config is None else read_settings(recipe_path(str(config))).get("data")
    data_class = Task.named(checked.task).data
    section = section or {"class_path": f"{data_class.__module__}.{data_class.__qualname__}"}
    for name in (*checked.data_classes, *_short_names(section)):
        getattr(unet_diffusion.data, name)  # imports it
    parser = RunParser()
    parser.add_lightning_class_args(data_class, "data", subclass_mode=True)
    words = [f"--data={json.dumps(section)}", *checked.words[1 + len(begin) :]]
    parsed = parser.parse_args(words)
    check_names(parsed, modules)
    try:
        made: LightningDataModule = parser.instantiate(parsed).data
    except (TypeError, ValueError) as error:
        raise ValueError(in_short(str(error), [])) from error
    return made


def _short_names(settings: Any) -> list[str]:
    """The classes of this package's data that settings name without their module."""
    if not isinstance(settings, dict):
        return [settings] if settings in unet_diffusion.data.__all__ else []
    return [name for value in settings.values() if isinstance(value, dict | str) for name in _short_names(value)]
