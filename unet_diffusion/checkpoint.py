"""A trained denoiser as one object, and the Lightning checkpoint that holds it.

A checkpoint is read with `weights_only=True`: it can hold tensors and plain values, never code. What is needed to build
the network again is the plain dictionary `checkpoint["denoiser"]`, beside the weights that Lightning saves.
"""

import importlib.util
import os
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unet_diffusion.schedule import NoiseSchedule
from unet_diffusion.unet import DenoiserUNet

PACKAGE = __name__.partition(".")[0]  # the only package whose classes a checkpoint may name
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
    """

    unet: DenoiserUNet
    schedule: NoiseSchedule
    image_shape: tuple[int, int, int]
    null_label: int | None = None
    class_names: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def denoiser_record(trained: TrainedDenoiser) -> dict[str, Any]:
    """What a checkpoint holds beside the weights, as plain values: the counterpart of `read_checkpoint`."""
    unet_class = type(trained.unet)
    return {
        "unet": {
            "class_path": f"{unet_class.__module__}.{unet_class.__qualname__}",
            "init_args": trained.unet.config,
        },
        "schedule": trained.schedule.config,
        "image_shape": list(trained.image_shape),
        "null_label": trained.null_label,
        "class_names": trained.class_names,
        "settings": trained.settings,
    }


def read_checkpoint(path: str | os.PathLike[str]) -> TrainedDenoiser:
    """The denoiser in a checkpoint, with its averaged (EMA) weights, on the CPU and in eval mode.

    Raises:
        OSError: if the file is missing or cannot be opened.
        ValueError: if the file is no checkpoint, is damaged, holds code, or was not written by this package.
    """
    checkpoint = load_plain(path)
    record = checkpoint.get("denoiser") if isinstance(checkpoint, dict) else None
    if not isinstance(record, dict):
        raise ValueError(
            f"{path} was not written by {PACKAGE}: a checkpoint must have an entry 'denoiser'; "
            "for another program's weights, convert them to a diffusers folder and import that"
        )
    try:
        trained = _build(record)
        trained.unet.load_state_dict(_ema_weights(checkpoint["state_dict"]))
    except (KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ValueError(f"{path} must hold a whole denoiser of this version, and does not: {error}") from error
    trained.unet.eval()
    return trained


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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        torch.save(checkpoint, partial)
        os.replace(partial, path)  # a reader sees the whole file or none
    finally:
        partial.unlink(missing_ok=True)


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


def _build(record: dict[str, Any]) -> TrainedDenoiser:
    channels, height, width = record["image_shape"]
    return TrainedDenoiser(
        unet=_unet_class(record["unet"]["class_path"])(**record["unet"]["init_args"]),
        schedule=NoiseSchedule(**record["schedule"]),
        image_shape=(channels, height, width),
        null_label=record["null_label"],
        class_names=record["class_names"],
        settings=record["settings"],
    )


def _unet_class(class_path: str) -> type[DenoiserUNet]:
    """The class of that path; only this package is looked into, as a checkpoint may come from anyone."""
    module, _, name = class_path.rpartition(".")
    if module.split(".")[0] == PACKAGE and importlib.util.find_spec(module):
        unet_class = getattr(importlib.import_module(module), name, None)
        if isinstance(unet_class, type) and issubclass(unet_class, DenoiserUNet):
            return unet_class
    raise ValueError(f"class_path of a denoiser must name a DenoiserUNet in {PACKAGE}, got {class_path!r}")


def _ema_weights(state_dict: dict[str, Any]) -> dict[str, Any]:
    prefix = "ema_unet."
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
