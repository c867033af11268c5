"""A trained denoiser, segmenter or autoencoder as one object, and the Lightning checkpoint that holds it.

A checkpoint is read with `weights_only=True`: it can hold tensors and plain values, never code. What is needed to build
the network again is the plain dictionary `checkpoint["denoiser"]` (or "segmenter", or "autoencoder"), beside the
weights that Lightning saves.
"""

import importlib.util
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from unet_diffusion.latents import LatentSpace
from unet_diffusion.schedule import NoiseSchedule
from unet_diffusion.unet import PixelNetwork
from unet_diffusion.whole_file import whole_file

if TYPE_CHECKING:  # it imports diffusers, which most of this module does not need
    from unet_diffusion.codecs import Autoencoder

PACKAGE = __name__.partition(".")[0]  # the only package whose classes a checkpoint may name
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
    """

    unet: PixelNetwork
    schedule: NoiseSchedule
    image_shape: tuple[int, int, int]
    null_label: int | None = None
    class_names: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    latent_space: LatentSpace | None = None


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
    """

    unet: PixelNetwork
    kind: Literal["binary", "classes", "instances"]
    class_names: list[str]
    timestep: int | None
    stretch: bool
    window_size: int
    settings: dict[str, Any] = field(default_factory=dict)


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
    from unet_diffusion.codecs import CLASSES  # imports diffusers, which only this needs

    record, state_dict = _read(_file_of(path), "autoencoder")
    with _explained(path, "autoencoder"):
        autoencoder = CLASSES[record["class_name"]](**record["config"])
        autoencoder.load_state_dict(state_dict)
        channels, height, width = record["image_shape"]
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
    record, state_dict = _read(path, "segmenter")
    with _explained(path, "segmenter"):
        fields = {name: record[name] for name in SEGMENTER_FIELDS}
        return TrainedSegmenter(unet=_network_with_weights(record["unet"], state_dict), **fields)


def holds_autoencoder(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint file, or that of a run folder, is of an autoencoder."""
    path = _file_of(path)
    checkpoint = load_plain(path) if path.is_file() else None
    return isinstance(checkpoint, dict) and "autoencoder" in checkpoint


def network_record(network: PixelNetwork) -> dict[str, Any]:
    """The class of a network and the arguments that build it, plain values."""
    kind = type(network)
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
    }


def read_checkpoint(path: str | os.PathLike[str]) -> TrainedDenoiser:
    """The denoiser in a checkpoint, with its averaged (EMA) weights, on the CPU and in eval mode.

    Raises:
        OSError: if the file is missing or cannot be opened.
        ValueError: if the file is no checkpoint, is damaged, holds code, or was not written by this package.
    """
    record, state_dict = _read(path, "denoiser")
    with _explained(path, "denoiser"):
        channels, height, width = record["image_shape"]
        return TrainedDenoiser(
            unet=_network_with_weights(record["unet"], state_dict),
            schedule=NoiseSchedule(**record["schedule"]),
            image_shape=(channels, height, width),
            null_label=record["null_label"],
            class_names=record["class_names"],
            settings=record["settings"],
            latent_space=LatentSpace.from_plain(record["latent_space"]) if record["latent_space"] else None,
        )


def write_initial_checkpoint(trained: TrainedDenoiser, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint at step 0, from which `Trainer.fit(ckpt_path=...)` trains on with a fresh optimiser.

    Raises:
        FileExistsError: if the file exists; nothing is overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten; choose another path, or remove it")
    weights = trained.unet.state_dict()
    checkpoint = {
        "denoiser": denoiser_record(trained),
        "state_dict": {f"{prefix}.{key}": value for prefix in ("unet", "ema_unet") for key, value in weights.items()},
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "epoch": 0,
        "global_step": 0,
        "optimizer_states": [],  # Lightning restores one state for each entry: none, so all start afresh
        "lr_schedulers": [],
    }
    with whole_file(path) as partial:
        torch.save(checkpoint, partial)


def load_plain(path: str | os.PathLike[str]) -> Any:
    """Tensors and plain values from a file written by `torch.save`, on the CPU.

    Raises:
        OSError: if the file is missing or cannot be opened.
        ValueError: if the file is something else, is damaged, or holds anything that could run code when loaded.
    """
    with open(path, "rb") as file:
        is_whole = zipfile.is_zipfile(file)  # the directory of a zip file is at its end: a cut file has none
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_whole)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if not is_whole:
            reason = "is no checkpoint, or only a part of one: it must be a file written by torch.save"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "was not loaded: it must hold only tensors and plain values, got objects that could run code"
        else:
            reason = "is damaged; copy or download it again"
        raise ValueError(f"{path} {reason}") from error


def _file_of(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path / "checkpoints" / "last.ckpt" if path.is_dir() else path


def _read(path: str | os.PathLike[str], key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record of that key in a checkpoint, and its averaged weights."""
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
    with _explained(path, key):
        prefix = "ema_autoencoder." if key == "autoencoder" else "ema_unet."
        weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return record, weights


@contextmanager
def _explained(path: str | os.PathLike[str], key: str) -> Iterator[None]:
    """Says of which file it is, if a record or its weights are not as they must be."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ValueError(f"{path} must hold a whole {key} of this version, and does not: {error}") from error


def _network_with_weights(record: dict[str, Any], weights: dict[str, Tensor]) -> PixelNetwork:
    network = _build(record)
    network.load_state_dict(weights)
    return network.eval()


def _build(record: dict[str, Any]) -> PixelNetwork:
    """The network of a record; networks within it, and their noise schedule, are built first."""
    arguments = dict(record["init_args"])
    for name, value in arguments.items():
        if isinstance(value, dict) and "class_path" in value:
            arguments[name] = _build(value)
        elif name == "schedule":
            arguments[name] = NoiseSchedule(**value)
    return _network_class(record["class_path"])(**arguments)


def _network_class(class_path: str) -> type[PixelNetwork]:
    """The class of that path; only this package is looked into, as a checkpoint may come from anyone."""
    module, _, name = class_path.rpartition(".")
    if module.split(".")[0] == PACKAGE and importlib.util.find_spec(module):
        network_class = getattr(importlib.import_module(module), name, None)
        if isinstance(network_class, type) and issubclass(network_class, PixelNetwork):
            return network_class
    raise ValueError(f"class_path of a network must name a PixelNetwork in {PACKAGE}, got {class_path!r}")
