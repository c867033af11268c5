"""A check of the arguments of fit and validate before the imports, which take seconds: files, folders and sections.

Lightning's parser checks whether options are known and values fit, as that takes the classes that they belong to.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import unet_diffusion.data
from unet_diffusion.commands.recipes import all_recipes, read_settings, recipe_path
from unet_diffusion.runtime.addresses import missing_path
from unet_diffusion.runtime.messages import UsageError, did_you_mean, similar_paths

SECTIONS = ("model", "data", "trainer", "samples", "evaluate", "checkpoint", "task", "seed_everything", "ckpt_path",
            "weights_only", "verbose")  # fmt: skip
NESTED = ("model", "trainer", "samples", "evaluate", "checkpoint")  # the sections that hold settings of their own
FLAGS = ("config", "print_config", "print_shtab", "help")
TASKS = ("denoise", "adapt", "segment", "autoencode")
ADAPTERS = {  # short names of model.adapter
    "lora": "unet_diffusion.diffusion.adapters.lora.LoRA",
    "textual_inversion": "unet_diffusion.diffusion.adapters.textual_inversion.TextualInversion",
}
OF_EACH = ("batch_size", "num_val", "num_workers", "seed")
OWN_ARGUMENTS = {  # of each data module; options of --data with other names are those of its source
    "ImageDataModule": ("source", "horizontal_flip", "groups", *OF_EACH),
    "SegmentationDataModule": ("source", "targets", "window_size", "windows_per_image", "num_train", "num_fit",
                               "object_share", "augmentation", "stretch", "synthetic", *OF_EACH),
}  # fmt: skip
OF_VALUES = ("channels", "value_range", "shown_channels")
OF_IMAGES = ("root", "image_size", *OF_VALUES, "class_labels", "captions", "background")
SOURCES = {  # and their arguments
    "Digits": (),
    "Folder": (*OF_IMAGES, "semantic_map", "paired_image", "boxes", "on_bad_file", "in_memory", "table"),
    "Latents": ("root", "scaling_factor"),
    "PairedFiles": ("images", "labels", *OF_VALUES, "label_suffix", "unlabelled"),
    "Shards": (*OF_IMAGES, "window", "num_lanes", "on_bad_shard", "num_retries"),
    "SyntheticCells": ("num_images",),
    "Tiles": ("root", "tile_size", "channels", "stretch", "num_images", "semantic_map", "table"),
    "Torchvision": ("dataset", "root", "download"),
}
OF_THE_PARSER = ("class_path", "dict_kwargs", "help")  # beside the arguments of a class
NUMBER = re.compile(r"\d+")
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
        if name.startswith("--data.") and len(words) == 2 and rest and all(map(NUMBER.fullmatch, (value, rest[0]))):
            value = words[1] = f"[{value}, {rest.pop(0)}]"  # height and width
        if name in ("--config", "-c") and value:
            path = recipe_path(value)
            checked.words += ["--config", str(path)]
            _update(settings, _read(path))
            continue
        if name == "--allow":
            _check_module(value)
            checked.modules.append(value)
            continue
        if name.startswith("--"):
            _check_section(name.removeprefix("--"), f"option {name}")
            if name == "--model.adapter" and value in ADAPTERS:
                value = ADAPTERS[value]
                words = [f"{name}={value}"]
                argument = words[0]
            option = _with_owner(name.removeprefix("--"), _value(value), settings)
            words[0] = words[0].replace(name, f"--{option}", 1)
            _update(settings, {option: _value(value)})
        checked.words += words
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


def _with_owner(option: str, value: Any, settings: dict[str, Any]) -> str:
    """An option of data with the name of whose it is: data.root becomes data.source.root.

    Args:
        option: The name of any option.
        value: Its value; a source may be chosen by `--data Folder` too.
        settings: The settings before it, which say what the class of the data is.

    Raises:
        UsageError: If the data have no such option.
    """
    if option == "data" and _bare(value) in SOURCES:
        return "data.source"
    owner, *rest = [part for part in option.split(".") if part != "init_args"]
    if owner != "data" or not rest:
        return option
    own = OWN_ARGUMENTS.get(_class_of("data", settings), ())
    if not own or rest[0].removesuffix("+") in (*own, *OF_THE_PARSER):
        return option
    of_source = SOURCES.get(_class_of(f"{owner}.source", settings))
    if of_source is not None and rest[0] not in (*of_source, *OF_THE_PARSER):
        short = f"{owner}.{'.'.join(rest)}"
        names = (*own, *of_source)
        similar = _of_other_sources(rest[0], settings) or did_you_mean(rest[0], names)
        raise UsageError(f"there is no option {short}" + (similar or f"; it must be one of {', '.join(names)}"))
    return f"{owner}.source.{'.'.join(rest)}"


def _of_other_sources(option: str, settings: dict[str, Any]) -> str:
    """The end of a message about an option that other sources of images have; "" if none has."""
    this = _class_of("data.source", settings)
    others = [name for name, options in SOURCES.items() if option in options and name != this]
    return f" of {this}; choose a source that has it by --data.source: {', '.join(others)}" if others else ""


def _class_of(owner: str, settings: dict[str, Any]) -> str:
    """The name of the class of a setting; without one, data are those of the task."""
    path = settings.get(f"{owner}.class_path") or settings.get(owner)
    if path is None and owner == "data":
        return "SegmentationDataModule" if settings.get("task") == "segment" else "ImageDataModule"
    return _bare(path)


def _bare(path: Any) -> str:
    """The name of a class, without its package if it is one of ours."""
    package, _, name = str(path or "").rpartition(".")
    return name if not package or package.startswith("unet_diffusion.") else str(path)


def _update(settings: dict[str, Any], others: dict[str, Any]) -> None:
    """Later settings replace earlier ones; another class has no use for the arguments of the one before."""
    for name, value in others.items():
        name = name.replace(".init_args", "")
        owner = name.removesuffix(".class_path")
        if owner in ("data", "data.source"):
            for old in [known for known in settings if known.startswith(f"{owner}.")]:
                del settings[old]
        settings[name] = value


def _check_section(name: str, what: str) -> None:
    section = name.split(".")[0].removesuffix("+")
    if section not in (*SECTIONS, *FLAGS):
        similar = did_you_mean(section, SECTIONS) or f"; it must be one of {', '.join(SECTIONS)}"
        raise UsageError(f"there is no {what}{similar}")


def _check_paths(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if not isinstance(value, str) or not _is_input(name, settings):
            continue
        name = name.replace(".source.", ".")  # the short form, as people type it
        if not value:
            raise UsageError(f"{name} must be a folder or file, and is empty; set --{name}")
        place = value if name in ("model.base", "model.init_from") else Path(value)  # these may be on the hub
        if (path := missing_path(place)) is not None:
            missing = "" if str(path) == str(Path(value).expanduser()) else f", and there is no {path}"
            fix = similar_paths(path) or f"; set --{name}"
            raise FileNotFoundError(f"{name} must be an existing folder or file, got {value}{missing}{fix}")
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
    if name in ("model.base", "model.init_from", "data.synthetic.root"):
        return True
    owner, _, argument = name.rpartition(".")
    if owner.split(".")[0] != "data" or settings.get(f"{owner}.download"):
        return False
    kind = _class_of(owner, settings)
    inputs = ("images", "labels", "unlabelled") if kind == "PairedFiles" else ("root",) if kind in SOURCES else ()
    return argument in inputs
