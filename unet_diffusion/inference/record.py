"""A trained denoiser, segmenter or autoencoder as one object, and the Lightning checkpoint that holds it.

A checkpoint is read with `weights_only=True`: it can hold tensors and plain values, never code. What is needed to build
the network again is the plain dictionary `checkpoint["denoiser"]` (or "segmenter", or "autoencoder"), beside the
weights that Lightning saves.
"""

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from unet_diffusion.diffusion.conditions.class_labels import ClassLabels
from unet_diffusion.diffusion.conditions.condition import Condition, network_inputs, unconditional_inputs
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.record_checks import built, check_record, check_weights, no_larger_than
from unet_diffusion.latents.space import LatentSpace, fingerprint
from unet_diffusion.models.speed import SPEEDS, Speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.messages import in_words
from unet_diffusion.runtime.safe_loading import load_plain

if TYPE_CHECKING:  # it imports diffusers, which most of this module does not need
    from unet_diffusion.models.autoencoders import Autoencoder

PACKAGE = __name__.partition(".")[0]  # the only package whose classes a checkpoint may name
Part = TypeVar("Part", bound=nn.Module)
Kind = TypeVar("Kind", bound=Condition)
SEGMENTER_FIELDS = ("kind", "class_names", "timestep", "stretch", "window_size", "settings")
LIGHTNING_VERSION = "2.6.0"  # whose checkpoint layout is written here; later versions of Lightning migrate it


@dataclass
class TrainedDenoiser:
    """A network and all that is needed to sample from it.

    Args:
        unet: called `unet(x_t, t, labels)`; the averaged (EMA) weights, where there are any.
        schedule: the one it was trained with.
        image_shape: (C, H, W) of the images it was trained on.
        null_label: the label that stands for no class, for guidance; None: trained without.
        class_names: the name of each label from 0; None: no classes, or no names.
        settings: of the training, plain values; for the model card.
        latent_space: of the latents that it denoises, and image_shape is the shape of; None: it denoises images.
        conditions: what it is conditioned on beside the class labels that it embeds itself; averaged (EMA) weights.
        speed: it was trained at.
    """

    unet: PixelNetwork
    schedule: NoiseSchedule
    image_shape: tuple[int, int, int]
    null_label: int | None = None
    class_names: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    latent_space: LatentSpace | None = None
    conditions: nn.ModuleList = field(default_factory=nn.ModuleList)
    speed: Speed = "plain"

    def __post_init__(self) -> None:
        rows = self.unet.config["num_class_embeds"]
        if self.null_label is not None and not 0 <= self.null_label < (rows or 0):
            raise ValueError(f"null_label must be one of the {rows or 0} labels of the network, got {self.null_label}")
        if self.class_names is not None and self.num_classes and len(self.class_names) != self.num_classes:
            raise ValueError(f"there must be {self.num_classes} class_names, one a class, got {len(self.class_names)}")

    @property
    def all_conditions(self) -> list[Condition]:
        """The class labels that the network embeds itself, if it does, and the others."""
        labels = [] if self.unet.class_embedding is None else [ClassLabels(self.null_label)]
        return [*labels, *cast(list[Condition], list(self.conditions))]

    def condition(self, kind: type[Kind]) -> Kind | None:
        """The condition of that class; None: there is none."""
        return next((one for one in self.all_conditions if isinstance(one, kind)), None)

    @property
    def num_classes(self) -> int:
        """Classes to choose from, the null label not counted; 0: there are none."""
        rows = self.unet.config["num_class_embeds"]
        if rows is not None:
            return rows - (self.null_label is not None)
        return next((one.config["num_classes"] for one in self.all_conditions if one.batch_key == "labels"), 0)

    def inputs(self, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """What the network is called with beside x and t, and the same without conditions, if it was trained without.

        Args:
            given: "labels", "captions" (token ids), "concat": (B, ...) each, on the device of the conditions.
        """
        return network_inputs(self.all_conditions, given), unconditional_inputs(self.all_conditions, given)


@dataclass
class TrainedSegmenter:
    """A network and all that is needed to segment with it.

    Args:
        unet: called `unet(x, t)`, gives class scores; the averaged (EMA) weights.
        kind: "binary" (background and foreground), "classes", or "instances" (background, cell and cell border).
        class_names: of each score.
        timestep: that a denoiser's network is given; None: it takes none.
        stretch: scale each image's grey values from its 1st and 99th percentile, not from the range of its type.
        window_size: height and width of the windows it was trained on, in pixels.
        settings: of the training, plain values.
        speed: it was trained at.
    """

    unet: PixelNetwork
    kind: Literal["binary", "classes", "instances"]
    class_names: list[str]
    timestep: int | None
    stretch: bool
    window_size: int
    settings: dict[str, Any] = field(default_factory=dict)
    speed: Speed = "plain"

    def __post_init__(self) -> None:
        num_scores = self.unet.config["out_channels"] or self.unet.in_channels
        wanted = {"binary": 2, "instances": 3}.get(self.kind, num_scores)
        if num_scores != wanted or len(self.class_names) != num_scores:
            raise ValueError(
                f"there must be {wanted} class_names, one a score of the network, got {len(self.class_names)} and "
                f"{num_scores} scores"
            )
        if (self.timestep is None) != (self.unet.time_embedding is None):
            raise ValueError(f"timestep must be given if the network takes one, and only then, got {self.timestep}")


@dataclass
class TrainedAutoencoder:
    """An autoencoder and what is known of its latents.

    Args:
        autoencoder: diffusers' AutoencoderKL or VQModel; the averaged (EMA) weights.
        image_shape: (C, H, W) of the images it was trained on.
        latent_std: of all latents of the images it was validated on; None: not known, as in a checkpoint, which may
            be older or newer than the last validation.
        settings: of the training, plain values.
    """

    autoencoder: "Autoencoder"
    image_shape: tuple[int, int, int]
    latent_std: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def contents_of(trained: TrainedDenoiser | TrainedSegmenter) -> str:
    """A hash of all that decides what a network makes: averaged weights and configuration, whatever file they are in.

    Args:
        trained: On the CPU, as it was read.
    """
    record = denoiser_record(trained) if isinstance(trained, TrainedDenoiser) else segmenter_record(trained)
    parts = nn.ModuleList([trained.unet, *getattr(trained, "conditions", [])])
    return fingerprint(parts, {name: value for name, value in record.items() if name != "settings"})


def autoencoder_record(trained: TrainedAutoencoder) -> dict[str, Any]:
    """What a checkpoint holds beside the weights, as plain values: the counterpart of `read_autoencoder`."""
    autoencoder = trained.autoencoder
    return {
        "class_name": type(autoencoder).__name__,
        "config": {name: value for name, value in json.loads(autoencoder.to_json_string()).items() if name[0] != "_"},
        "image_shape": list(trained.image_shape),
        "settings": trained.settings,
    }


def read_autoencoder(path: str | os.PathLike[str]) -> TrainedAutoencoder:
    """The autoencoder in a checkpoint file, or in a run folder's checkpoints/last.ckpt, on the CPU and in eval mode.

    Raises:
        OSError: if the file is missing or cannot be opened.
        ValueError: if the file is no checkpoint, is damaged, holds code, or holds no autoencoder of this package.
    """
    from unet_diffusion.models.autoencoders import CLASSES  # imports diffusers, which only this needs

    record, weights, _ = _read(_file_of(path), "autoencoder")
    with explained(path, "autoencoder"), no_larger_than(weights):
        autoencoder = built(CLASSES[record["class_name"]], record["config"])
        autoencoder.load_state_dict(_below("autoencoder", weights))
        channels, height, width = record["image_shape"]
        step = 2 ** (len(autoencoder.config["block_out_channels"]) - 1)
        if channels != autoencoder.config["in_channels"] or height % step or width % step:
            raise ValueError(
                f"image_shape in its record must have {autoencoder.config['in_channels']} channels and sides that are "
                f"multiples of {step}, got {record['image_shape']}"
            )
        return TrainedAutoencoder(autoencoder.eval(), (channels, height, width), settings=record["settings"])


def segmenter_record(trained: TrainedSegmenter) -> dict[str, Any]:
    """What a checkpoint holds beside the weights, as plain values: the counterpart of `read_segmenter`."""
    fields = {name: getattr(trained, name) for name in SEGMENTER_FIELDS}
    return {"unet": network_record(trained.unet), **fields}


def read_segmenter(path: str | os.PathLike[str]) -> TrainedSegmenter:
    """The segmenter in a checkpoint file, or in a run folder's checkpoints/last.ckpt, on the CPU and in eval mode.

    Raises:
        OSError: if the file is missing or cannot be opened.
        ValueError: if the file is no checkpoint, is damaged, holds code, or holds no segmenter of this package.
    """
    path = _file_of(path)
    record, weights, speed = _read(path, "segmenter")
    with explained(path, "segmenter"), no_larger_than(weights):
        fields = {name: record[name] for name in SEGMENTER_FIELDS}
        return TrainedSegmenter(unet=_network_with_weights(record["unet"], weights), **fields, speed=speed)


def holds_autoencoder(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint file, or that of a run folder, is of an autoencoder."""
    path = _file_of(path)
    checkpoint = load_plain(path) if path.is_file() else None
    return isinstance(checkpoint, dict) and "autoencoder" in checkpoint


def network_record(network: PixelNetwork | Condition) -> dict[str, Any]:
    """The class of a network or condition and the arguments that build it, plain values."""
    # Where weights are shared out over processes, a class of torch's comes first.
    kind = next(one for one in type(network).__mro__ if not one.__module__.startswith("torch."))
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": network.config}


def denoiser_record(trained: TrainedDenoiser) -> dict[str, Any]:
    """What a checkpoint holds beside the weights, as plain values: the counterpart of `read_checkpoint`."""
    return {
        "unet": network_record(trained.unet),
        "schedule": trained.schedule.config,
        "image_shape": list(trained.image_shape),
        "null_label": trained.null_label,
        "class_names": trained.class_names,
        "settings": trained.settings,
        "latent_space": None if trained.latent_space is None else trained.latent_space.plain(),
        "conditions": [network_record(cast(Condition, one)) for one in trained.conditions],
    }


def read_checkpoint(path: str | os.PathLike[str]) -> TrainedDenoiser:
    """The denoiser in a checkpoint, with its averaged (EMA) weights, on the CPU and in eval mode.

    Raises:
        OSError: if the file is missing or cannot be opened.
        ImportError: if the denoiser takes captions, and the package transformers is not there.
        ValueError: if the file is no checkpoint, is damaged, holds code, or was not written by this package.
    """
    record, weights, speed = _read(path, "denoiser")
    with explained(path, "denoiser"), no_larger_than(weights):
        channels, height, width = record["image_shape"]
        conditions = nn.ModuleList(
            built(_class_in_package(one["class_path"], Condition), one["init_args"]) for one in record["conditions"]
        )
        conditions.load_state_dict(_below("conditions", weights))
        unet = _network_with_weights(record["unet"], weights)
        in_maps = sum(
            one.config["channels"] for one in cast(list[Condition], list(conditions)) if one.batch_key == "concat"
        )
        if unet.in_channels != channels + in_maps:
            raise ValueError(
                f"image_shape in its record must have the {unet.in_channels - in_maps} channels that the network "
                f"takes, got {record['image_shape']}"
            )
        unet.check_size(height, width)
        return TrainedDenoiser(
            unet=unet,
            schedule=_schedule(record["schedule"]),
            image_shape=(channels, height, width),
            null_label=record["null_label"],
            class_names=record["class_names"],
            settings=record["settings"],
            latent_space=LatentSpace.from_plain(record["latent_space"]) if record["latent_space"] else None,
            conditions=conditions.eval(),
            speed=speed,
        )


def write_initial_checkpoint(trained: TrainedDenoiser, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint at step 0, from which `Trainer.fit(ckpt_path=...)` trains on with a fresh optimiser.

    Raises:
        FileExistsError: if the file exists; nothing is overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten; choose another path, or remove it")
    parts = {"unet": trained.unet, "conditions": trained.conditions}
    checkpoint = {
        "denoiser": denoiser_record(trained),
        "state_dict": {
            f"{prefix}{name}.{key}": value
            for prefix in ("", "ema_")
            for name, part in parts.items()
            for key, value in part.state_dict().items()
        },
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "epoch": 0,
        "global_step": 0,
        "optimizer_states": [],  # Lightning restores one state for each entry: none, so all start afresh
        "lr_schedulers": [],
    }
    with atomic_write(path) as partial:
        torch.save(checkpoint, partial)


def check_callbacks(checkpoint: Mapping[str, Any]) -> None:
    """Refuses paths in the states of callbacks that lead out of their folder: Lightning removes what they name.

    Raises:
        ValueError: naming one.
    """
    for text in _texts(checkpoint.get("callbacks", {})):
        if ".." in PurePath(text).parts or "://" in text:
            raise ValueError(f"a checkpoint must name files in the folder of its run, got {text!r}; do not use it")


def _texts(state: Any) -> Iterator[str]:
    """Every string in nested plain values."""
    if isinstance(state, str):
        yield state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from (*_texts(key), *_texts(value))
    elif isinstance(state, list | tuple):
        for one in state:
            yield from _texts(one)


def _file_of(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} must be a checkpoint file, or a run folder with checkpoints/last.ckpt")
    return file


def _read(path: str | os.PathLike[str], key: str) -> tuple[dict[str, Any], dict[str, Tensor], Speed]:
    """The record of that key in a checkpoint, its weights, and the speed of the training."""
    checkpoint = load_plain(path)
    record = checkpoint.get(key) if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict):
        others = {"denoiser", "segmenter", "autoencoder"} - {key}
        held = [name for name in others if isinstance(checkpoint, dict) and name in checkpoint]
        reason = (
            f"it holds the entry {held[0]!r}; use the command for that"
            if held
            else f"it was not written by {PACKAGE}; "
            "for another program's weights, convert them to a diffusers folder and import that"
        )
        raise ValueError(f"{path}: a checkpoint must have an entry {key!r} here, and {reason}")
    with explained(path, key):
        weights, speed = checkpoint.get("state_dict"), checkpoint.get("speed", "plain")
        if speed not in SPEEDS:
            raise ValueError(f"speed must be one of {', '.join(SPEEDS)}, got {speed!r}")
        check_weights(weights)
        check_record(record, key)
        return record, weights, speed


def _below(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights of one part of a module."""
    prefix = f"ema_{part}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


@contextmanager
def explained(path: str | os.PathLike[str], key: str) -> Iterator[None]:
    """Within it, what is wrong with a record or its weights is said of their file.

    Args:
        path: The file.
        key: Of what it is a checkpoint.

    Raises:
        ValueError: If something is.
    """
    try:
        yield
    # A class of a module that is not there; an ImportError is of a package that is to be installed, and says so.
    except (ValueError, KeyError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        raise ValueError(f"{path} must hold a whole {key} of this version, and does not: {in_words(error)}") from error


def _network_with_weights(record: dict[str, Any], weights: dict[str, Tensor]) -> PixelNetwork:
    network = _build(record)
    network.load_state_dict(_below("unet", weights))
    return network.eval()


def _build(record: dict[str, Any]) -> PixelNetwork:
    """The network of a record; networks within it, and their noise schedule, are built first."""
    arguments = dict(record["init_args"])
    for name, value in arguments.items():
        if isinstance(value, dict) and "class_path" in value:
            arguments[name] = _build(value)
        elif name == "schedule":
            arguments[name] = _schedule(value)
    return built(_class_in_package(record["class_path"], PixelNetwork), arguments)


def _schedule(record: dict[str, Any]) -> NoiseSchedule:
    schedule = built(NoiseSchedule, record)
    if missing := schedule.config.keys() - record.keys():
        raise ValueError(f"schedule in its record must have {', '.join(sorted(missing))}, and has not")
    return schedule


def _class_in_package(class_path: str, base: type[Part]) -> type[Part]:
    """The class of that path; only this package is looked into, as a checkpoint may come from anyone."""
    module, _, name = class_path.rpartition(".")
    if module.split(".")[0] == PACKAGE and importlib.util.find_spec(module):
        found = getattr(importlib.import_module(module), name, None)
        if isinstance(found, type) and issubclass(found, base):
            return found
    raise ValueError(f"class_path of a network must name a {base.__name__} in {PACKAGE}, got {class_path!r}")
