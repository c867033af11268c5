"""What a configuration may name, as it may come from anyone: classes and functions of the kind that is asked for.

The parser, jsonargparse, imports whatever a class_path names. It checks its type where a class is asked for; where a
callable is, as of an optimiser, it would call any function, with arguments from the file; and where anything goes, it
would build any class. Neither happens here. Modules that run commands or open files cannot be named at all. A class of
one's own is imported from where Python finds it; so a configuration can run code only that is installed already.
"""

import inspect
import sys
from collections.abc import Iterator
from typing import Any, get_type_hints

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer

MADE_BY_FUNCTIONS = (nn.Module, Optimizer, LightningDataModule, Callback, Logger)


def refuse_dangerous_modules() -> None:
    """Have the parser refuse os, subprocess, pickle and the like, and build nothing where any value is accepted."""
    set_parsing_settings(import_path_denylist=[], instantiate_subclass_spec_in_any=False)  # adds none to its own list


def check_named_classes(settings: Any) -> None:
    """Refuse a parsed configuration that names anything to be called but a class, or a function that makes one.

    Args:
        settings: nested namespaces, dicts and lists.

    Raises:
        ValueError: naming it; nothing has been called then.
    """
    for path in _class_paths(settings):
        named = _imported(path)
        if not inspect.isclass(named) and not _makes_what_is_asked_for(named):
            kinds = ", ".join(kind.__name__ for kind in MADE_BY_FUNCTIONS)
            raise ValueError(
                f"class_path must name a class, or a function whose annotation says that it returns one of {kinds}; "
                f"got {path!r}, which was not called"
            )


def _class_paths(settings: Any) -> Iterator[str]:
    if isinstance(settings, Namespace):
        settings = vars(settings)
    if isinstance(settings, dict):
        if isinstance(settings.get("class_path"), str):
            yield settings["class_path"]
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        for one in settings:
            yield from _class_paths(one)


def _imported(path: str) -> Any:
    """What the parser has imported under that path; None if it has not."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        found: Any = sys.modules.get(".".join(parts[:end]))
        if found is not None:
            for name in parts[end:]:
                found = getattr(found, name, None)
            return found
    return None


def _makes_what_is_asked_for(function: Any) -> bool:
    try:
        made = get_type_hints(function).get("return")
    except (TypeError, NameError):
        return False
    return isinstance(made, type) and issubclass(made, MADE_BY_FUNCTIONS)
