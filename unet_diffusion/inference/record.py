"""Checkpoints of models: a record of plain values and the weights, written and read safely.

A checkpoint is read with `weights_only=True`, so it can hold tensors and plain values but no code. The record is the
dictionary `checkpoint["denoiser"]` (or "segmenter", or "autoencoder") beside the weights that Lightning saves. It holds
everything needed to build the model again, which `reading.py` does.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from unet_diffusion.diffusion.adapters.adapter import Adapter
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.record_checks import built, check_record, check_weights
from unet_diffusion.latents.codec import Codec
from unet_diffusion.models.speed import SPEEDS, Speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.initial_weights import without_initial_weights
from unet_diffusion.runtime.messages import in_words
from unet_diffusion.runtime.named_class import PACKAGE, class_of
from unet_diffusion.runtime.safe_loading import load_plain
from unet_diffusion.runtime.weight_files import PIPELINE_FILES

StrPath = str | os.PathLike[str]
ModelKind = Literal["denoiser", "segmenter", "autoencoder"]
KINDS: tuple[ModelKind, ...] = get_args(ModelKind)
COMMANDS = {"denoiser": "draw from it with unet-diffusion sample", "segmenter": "use unet-diffusion segment",
            "autoencoder": "use unet-diffusion encode or export"}  # fmt: skip
LIGHTNING_VERSION = "2.6.0"  # version of the checkpoint layout; later versions of Lightning migrate it


def kind_of(checkpoint: Any, path: StrPath) -> ModelKind:
    """The kind of model in a checkpoint: "denoiser", "segmenter" or "autoencoder".

    Args:
        checkpoint: The contents of the file.
        path: The file, for errors.

    Raises:
        ValueError: If the checkpoint was not written by this package.
    """
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    kind = next((kind for kind in KINDS if isinstance(entries.get(kind), dict)), None)
    if kind is None:
        raise ValueError(
            f"{path} was not written by {PACKAGE}; unet-diffusion import makes a checkpoint of the weights of other "
            "programs that it knows"
        )
    return kind


def checkpoint_file(path: StrPath) -> Path:
    """The path itself if it is a file, or the checkpoints/last.ckpt of a run folder.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    path = Path(path)
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} must be a checkpoint file, or a run folder with checkpoints/last.ckpt")
    return file


def is_checkpoint(path: StrPath) -> bool:
    """Whether a path is a checkpoint file or a run folder with one, rather than a diffusers folder.

    Raises:
        FileNotFoundError: If it is none of these.
    """
    path = Path(path)
    if path.is_file() or (path / "checkpoints" / "last.ckpt").is_file():
        return True
    if any((path / name).is_file() for name in PIPELINE_FILES):
        return False
    raise FileNotFoundError(
        f"there is no model at {path}: it must be a checkpoint file, a run folder with checkpoints/last.ckpt, or a "
        "diffusers folder with model_index.json"
    )


def denoiser_record(parts: DenoiserParts) -> dict[str, Any]:
    """The plain values that a checkpoint holds beside the weights; `reading.read_denoiser` reads them."""
    return {
        "unet": network_record(parts.unet),
        "schedule": parts.schedule.config,
        "sample_shape": list(parts.sample_shape),
        "null_label": parts.null_label,
        "class_names": parts.class_names,
        "settings": parts.settings,
        "values": parts.values.plain(),
        "latent_space": parts.codec.space_record,
        "codec": codec_record(parts.codec),
        "conditions": [network_record(cast(Condition, condition)) for condition in parts.conditions],
    }


def save_denoiser(parts: DenoiserParts, path: StrPath) -> None:
    """Write a checkpoint at step 0, from which `Trainer.fit(ckpt_path=...)` continues with a new optimiser.

    Raises:
        FileExistsError: If the file exists; nothing is overwritten.
    """
    parts = parts.merged()
    write_checkpoint(path, "denoiser", denoiser_record(parts), {"unet": parts.unet, "conditions": parts.conditions})


def network_record(network: PixelNetwork | Condition | Codec | Adapter) -> dict[str, Any]:
    """The class and the constructor's arguments of a network, condition, codec or adapter, as plain values."""
    # With sharded weights, the first class is torch's own subclass.
    kind = next(cls for cls in type(network).__mro__ if not cls.__module__.startswith("torch."))
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": network.config}


def codec_record(codec: Codec) -> dict[str, Any] | None:
    """The `network_record` of a user's own codec; None for pixels and autoencoders."""
    return None if codec.config is None else network_record(codec)


def check_callbacks(checkpoint: Mapping[str, Any]) -> None:
    """Refuse paths in callback states that lead out of the run folder, because Lightning removes these files.

    Raises:
        ValueError: If there is such a path; the message names it.
    """
    for text in _texts(checkpoint.get("callbacks", {})):
        if ".." in PurePath(text).parts or "://" in text:
            raise ValueError(f"a checkpoint must name files in its run folder, got {text!r}; do not use it")


def _texts(state: Any) -> Iterator[str]:
    """All strings in nested plain values."""
    if isinstance(state, str):
        yield state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from (*_texts(key), *_texts(value))
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _texts(value)


@contextmanager
def explained(path: StrPath, kind: str) -> Iterator[None]:
    """A context in which errors about a record or its weights become errors that name the file.

    Args:
        path: The file.
        kind: The kind of model in it.

    Raises:
        ValueError: If such an error occurs.
    """
    try:
        yield
    # ModuleNotFoundError: a class's module is missing. Other ImportErrors already say which package to install.
    except (ValueError, KeyError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        raise ValueError(f"{path} is not a complete {kind} of this version: {in_words(error)}") from error


def read_record(path: Path, kind: ModelKind) -> tuple[dict[str, Any], dict[str, Tensor], Speed]:
    """The record of a checkpoint, its weights, and the speed of its training.

    Args:
        path: The checkpoint file.
        kind: The kind of model that the file must hold.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If the file is no checkpoint, is damaged, holds code, or holds no such model of this package.
    """
    checkpoint = load_plain(path)
    actual = kind_of(checkpoint, path)
    record = checkpoint[actual]
    if actual != kind:
        raise ValueError(f"{path} holds a{'n' * (actual[0] == 'a')} {actual}, not a{'n' * (kind[0] == 'a')} {kind}; "
                         f"{COMMANDS[actual]}")  # fmt: skip
    with explained(path, kind):
        weights, speed = checkpoint.get("state_dict"), checkpoint.get("speed", "plain")
        if speed not in SPEEDS:
            raise ValueError(f"speed must be one of {', '.join(SPEEDS)}, got {speed!r}")
        check_weights(weights)
        check_record(record, kind)
        return record, weights, speed


def write_checkpoint(path: StrPath, kind: ModelKind, record: dict[str, Any], parts: Mapping[str, nn.Module]) -> None:
    """Write a checkpoint at step 0 with a model's record and its weights, which become both raw and averaged weights.

    Args:
        path: The file to make.
        kind: The kind of the model.
        record: The plain values from which the model is built again.
        parts: The model's networks by name.

    Raises:
        FileExistsError: If the file exists; nothing is overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten; choose another path, or remove it")
    checkpoint = {
        kind: record,
        "state_dict": {
            f"{prefix}{name}.{key}": value
            for prefix in ("", "ema_")
            for name, part in parts.items()
            for key, value in part.state_dict().items()
        },
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "epoch": 0,
        "global_step": 0,
        "optimizer_states": [],  # Lightning restores one optimiser per entry; without entries all start afresh
        "lr_schedulers": [],
    }
    with atomic_write(path) as partial:
        torch.save(checkpoint, partial)


def averaged_weights(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights of one part of a model, from all weights of a checkpoint."""
    prefix = f"ema_{part}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def network_with_weights(record: dict[str, Any], weights: dict[str, Tensor], allow: Sequence[str]) -> PixelNetwork:
    """The network of a record with its averaged weights, in eval mode.

    Args:
        record: The record of the network, from `network_record`.
        weights: All weights of the checkpoint.
        allow: Further modules whose classes the record may name.

    Raises:
        ValueError: If the network cannot be built.
    """
    with without_initial_weights(allow):
        network = _build(record, allow)
    network.load_state_dict(averaged_weights("unet", weights))
    return network.eval()


def _build(record: dict[str, Any], allow: Sequence[str]) -> PixelNetwork:
    """The network of a record; inner networks and noise schedules among its arguments are built first."""
    arguments = dict(record["init_args"])
    for name, value in arguments.items():
        if isinstance(value, dict) and "class_path" in value:
            arguments[name] = _build(value, allow)
        elif name == "schedule":
            arguments[name] = schedule_of(value)
    return built(class_of(record["class_path"], PixelNetwork, allow), arguments)


def schedule_of(record: dict[str, Any]) -> NoiseSchedule:
    """The noise schedule of a record, which must hold all settings of a schedule."""
    schedule = built(NoiseSchedule, record)
    if missing := schedule.config.keys() - record.keys():
        raise ValueError(f"its schedule must have {', '.join(sorted(missing))}")
    return schedule
