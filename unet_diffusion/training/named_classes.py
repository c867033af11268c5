"""What a configuration may name, as it may come from anyone: the classes of a few packages, and a few functions.

The parser, jsonargparse, imports what a configuration names, and builds it with arguments from there. It does so only
for names below ALLOWED; those of other packages, a user's own too, are refused before they are imported, unless the
user allows the package on the command line. The parser checks that a class is of the kind that is asked for. A function
is neither called nor handed on, but for FACTORIES and those of packages that the user allows.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from jsonargparse import Path as ParsedPath

ALLOWED = (
    "unet_diffusion",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.fabric.plugins",  # where some of those above are defined
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)
FACTORIES = (
    "unet_diffusion.codecs.kl_autoencoder",
    "unet_diffusion.codecs.vq_autoencoder",
    "unet_diffusion.codecs.pretrained_autoencoder",
    "unet_diffusion.training.autoencoder.adam_of_gans",  # the last two are defaults
    "unet_diffusion.training.base.default_optimizer",
)
WRITES = (
    "checkpoint",
    "trainer.callbacks",
    "trainer.logger",
    "trainer.profiler",
    "trainer.plugins",
    "trainer.strategy",
)
FOLDERS = ("dirpath", "save_dir", "root_dir", "log_dir", "dir")  # arguments that are relative to the current folder


def refuse_names_but(modules: Sequence[str]) -> None:
    """Have the parser import only what lies below ALLOWED or these modules, and build nothing where any value will do.

    Raises:
        ValueError: If one is no name of a module.
    """
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED, *modules],
        instantiate_subclass_spec_in_any=False,
    )


def check_names(settings: Any, modules: Sequence[str]) -> None:
    """Refuse a parsed configuration that names a function.

    Args:
        settings: Nested namespaces, dicts and lists.
        modules: Those whose functions the user allows.

    Raises:
        ValueError: If it names one; nothing has been called then.
    """
    for place, named in _imported(settings):
        path = f"{getattr(named, '__module__', None)}.{getattr(named, '__qualname__', named)}"
        is_built = isinstance(named, type) and place.endswith("class_path")
        if not is_built and path not in FACTORIES and not any(_is_below(path, module) for module in modules):
            raise ValueError(
                f"{place} names {path}, which is no class that is built here; if you trust it, add --allow "
                f"{path.rpartition('.')[0]} to the command line"
            )


def check_written(settings: Any, run: Path) -> None:
    """Refuse a parsed configuration whose callbacks, loggers and the like would write outside the run folder.

    Args:
        settings: A namespace of all settings.
        run: The run folder.

    Raises:
        ValueError: If one would.
    """
    for section in WRITES:
        for place, value in _leaves(settings.get(section), section):
            if not isinstance(value, str) or not value:
                continue
            path = Path(value.removeprefix("file:")).expanduser()
            is_path = place.rsplit(".", 1)[-1] in FOLDERS or path.is_absolute() or value.startswith("file:")
            if (is_path and not path.resolve().is_relative_to(run.resolve())) or ".." in path.parts:
                raise ValueError(f"{place} must lie in the run folder {run}, got {value}; leave it out")


def _is_below(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _leaves(settings: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with the names that lead to it, dots between them."""
    if isinstance(settings, Namespace):
        settings = vars(settings)
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _leaves(value, f"{place}.{name}".lstrip("."))
    elif isinstance(settings, list | tuple | set):
        for value in settings:
            yield from _leaves(value, place)
    else:
        yield place, settings


def _imported(settings: Any) -> Iterator[tuple[str, Any]]:
    """What the parser has imported because it was named, with the place where it is named."""
    for place, value in _leaves(settings):
        if place.rsplit(".", 1)[-1] == "class_path" and isinstance(value, str):
            yield place, _found(value)
        elif callable(value) and not isinstance(value, ParsedPath):  # of files
            yield place, value


def _found(path: str) -> Any:
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        module = sys.modules.get(".".join(parts[:end]))
        if module is not None:
            found: Any = module
            for name in parts[end:]:
                found = getattr(found, name, None)
            return found
    return None
