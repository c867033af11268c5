"""The classes that a configuration may name: those of this package and a few others. It may come from anyone.

The parser, jsonargparse, imports the classes that a configuration names, and builds them with arguments from there. It
does so only for classes below ALLOWED. Any other class, also one of the user's own, is refused before it is imported,
unless the user allows its module on the command line. The parser checks that a class is of the required kind. Functions
are neither called nor passed on, except for FACTORIES and functions of modules that the user allows.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from jsonargparse import Path as ParsedPath

# Classes whose arguments do no harm, by the name that users know and by the module that defines them. Others of
# Lightning's write where their arguments say, or hand settings on to programs.
ALLOWED = (
    "unet_diffusion",
    "torch.optim",
    *(
        f"lightning.pytorch.{name}"
        for names in (
            ("callbacks.DeviceStatsMonitor", "callbacks.device_stats_monitor"),
            ("callbacks.EarlyStopping", "callbacks.early_stopping"),
            ("callbacks.GradientAccumulationScheduler", "callbacks.gradient_accumulation_scheduler"),
            ("callbacks.LearningRateMonitor", "callbacks.lr_monitor"),
            ("callbacks.ModelCheckpoint", "callbacks.model_checkpoint"),
            ("callbacks.ModelSummary", "callbacks.model_summary"),
            ("callbacks.OnExceptionCheckpoint", "callbacks.on_exception_checkpoint"),
            ("callbacks.RichModelSummary", "callbacks.rich_model_summary"),
            ("callbacks.RichProgressBar", "callbacks.TQDMProgressBar", "callbacks.progress"),
            ("callbacks.Timer", "callbacks.timer"),
            ("loggers.CSVLogger", "loggers.csv_logs"),
            ("loggers.TensorBoardLogger", "loggers.tensorboard"),
            ("loggers.WandbLogger", "loggers.wandb"),
            ("profilers.SimpleProfiler", "profilers.simple"),
            ("strategies.DDPStrategy", "strategies.ddp"),
            ("strategies.ModelParallelStrategy", "strategies.model_parallel"),
        )
        for name in names
    ),
)
FACTORIES = (
    "unet_diffusion.models.autoencoders.kl_autoencoder",
    "unet_diffusion.models.autoencoders.vq_autoencoder",
    "unet_diffusion.models.autoencoders.pretrained_autoencoder",
    "unet_diffusion.training.optimizers.adam_of_gans",  # the last two are defaults
    "unet_diffusion.training.optimizers.default_optimizer",
)
WRITE = ("checkpoint", *(f"trainer.{name}" for name in ("callbacks", "logger", "profiler", "plugins", "strategy")))
FOLDERS = ("dirpath", "save_dir", "root_dir", "log_dir", "dir")  # arguments that are relative to the current folder
OTHER_FILE_SYSTEM = re.compile(r"\w[\w+.-]+:")  # s3://, local:, reference::, which Lightning hands on to fsspec
PLACEHOLDER = re.compile(r"\{[\w/-]+(:\d*(\.\d+)?[df]?)?\}")  # of a step or a metric in the name of a file
OF_WANDB = (  # others choose the server, run git, or send files
    *("name", "save_dir", "version", "offline", "dir", "id", "project", "log_model", "prefix", "checkpoint_name"),
    *("add_file_policy", "entity", "group", "tags", "notes", "job_type", "mode", "resume"),
)

_once_allowed: set[str] = set()


def refuse_names_but(modules: Sequence[str]) -> None:
    """Have the parser import only from ALLOWED and these modules, and build no class where any value is accepted.

    Args:
        modules: Modules of the user's own.

    Raises:
        ValueError: If a module has no valid name.
    """
    before = sorted(_once_allowed - {*ALLOWED, *modules})  # the parser adds to what it was told
    set_parsing_settings(
        import_path_denylist=["*", *before],
        import_path_allowlist=[*ALLOWED, *modules],
        instantiate_subclass_spec_in_any=False,
    )
    _once_allowed.update(modules)


def check_names(settings: Any, modules: Sequence[str]) -> None:
    """Refuse a parsed configuration that names a function.

    Args:
        settings: Nested namespaces, dicts and lists.
        modules: Modules of the user's own, whose functions are allowed.

    Raises:
        ValueError: If it names a function; no function has been called then.
    """
    for place, value in _named(settings):
        path = f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', value)}"
        is_class = isinstance(value, type) and place.endswith("class_path")
        if not is_class and path not in FACTORIES and not any(_is_below(path, module) for module in modules):
            raise ValueError(
                f"{place} names {path}, and a configuration may name classes only; if you trust it, add --allow "
                f"{path.rpartition('.')[0]} to the command line"
            )


def check_written(settings: Any, run: Path) -> None:
    """Refuse a parsed configuration whose callbacks, loggers and the like could write outside the run folder.

    Args:
        settings: A namespace of all settings.
        run: The run folder.

    Raises:
        ValueError: If one could.
    """
    if OTHER_FILE_SYSTEM.match(str(run)):
        raise ValueError(f"trainer.default_root_dir must be a folder, got {run}")
    loggers = settings.trainer.logger if isinstance(settings.trainer.logger, list) else []
    for logger in loggers:
        if isinstance(logger, Namespace) and logger.class_path.endswith("WandbLogger"):
            _check_wandb(logger)
    for section in WRITE:
        for place, value in _leaves(settings.get(section), section):
            if value is not None and _leads_out(place.rpartition(".")[2], str(value), run):
                raise ValueError(f"{place} must lie in the run folder {run}, got {value}; leave it out")


def _check_wandb(logger: Namespace) -> None:
    arguments = {**vars(logger.get("init_args", Namespace())), **(logger.get("dict_kwargs") or {})}
    others = [name for name, value in arguments.items() if value and name not in OF_WANDB]
    if others:
        raise ValueError(f"trainer.logger must not set {', '.join(others)} of W&B, only {', '.join(OF_WANDB)}")


def _leads_out(name: str, value: str, run: Path) -> bool:
    path = Path(value).expanduser()
    is_outside = not path.resolve().is_relative_to(run.resolve())
    if name in FOLDERS and (is_outside or OTHER_FILE_SYSTEM.match(value)):
        return True
    has_placeholders = name == "filename" and re.search(r"[{}]", PLACEHOLDER.sub("", value))
    return bool((path.is_absolute() and is_outside) or ".." in path.parts or "$" in value or has_placeholders)


def _is_below(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


def _leaves(settings: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested settings, with the names that lead to it, joined by dots."""
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


def _named(settings: Any) -> Iterator[tuple[str, Any]]:
    """Each class or function that a configuration names, with its place in the configuration."""
    for place, value in _leaves(settings):
        if place.rpartition(".")[2] == "class_path" and isinstance(value, str):
            yield place, _loaded(value)
        elif callable(value) and not isinstance(value, ParsedPath):  # jsonargparse's paths of files can be called
            yield place, value


def _loaded(path: str) -> Any:
    """The object of that name in the modules that are loaded; None if there is none. Nothing is imported."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        value: Any = sys.modules.get(".".join(parts[:end]))
        if value is not None:
            for name in parts[end:]:
                value = getattr(value, name, None)
            return value
    return None
