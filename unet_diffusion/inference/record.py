"""The checkpoint that holds a model: its plain record and its weights, written, read safely, and built again.

A checkpoint is read with `weights_only=True`: it can hold tensors and plain values, never code. What is needed to build
the model again is the plain dictionary `checkpoint["denoiser"]` (or "segmenter", or "autoencoder"), beside the weights
that Lightning saves. `reading.py` makes models of it.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.record_checks import built, check_record, check_weights
from unet_diffusion.latents.codec import Codec
from unet_diffusion.models.speed import SPEEDS, Speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.messages import in_words
from unet_diffusion.runtime.safe_loading import load_plain

StrPath = str | os.PathLike[str]
ModelKind = Literal["denoiser", "segmenter", "autoencoder"]
KINDS: tuple[ModelKind, ...] = get_args(ModelKind)
COMMANDS = {"denoiser": "draw from it with unet-diffusion sample", "segmenter": "use unet-diffusion segment",
            "autoencoder": "use unet-diffusion encode or export"}  # fmt: skip
PACKAGE = __name__.partition(".")[0]  # whose classes a checkpoint may name without being allowed
Part = TypeVar("Part")
LIGHTNING_VERSION = "2.6.0"  # whose checkpoint layout is written here; later versions of Lightning migrate it


def kind_of(checkpoint: Any, path: StrPath) -> ModelKind:
    """What a checkpoint is of.

    Args:
        checkpoint: What its file holds.
        path: The file.

    Raises:
        ValueError: If it was not written by this package.
    """
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    found = next((kind for kind in KINDS if isinstance(entries.get(kind), dict)), None)
    if found is None:
        raise ValueError(
            f"{path} was not written by {PACKAGE}; for another program's weights, convert them to a diffusers folder "
            "and import that"
        )
    return found


def checkpoint_file(path: StrPath) -> Path:
    """The file itself, or that of a run folder: its checkpoints/last.ckpt.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} must be a checkpoint file, or a run folder with checkpoints/last.ckpt")
    return file


def denoiser_record(parts: DenoiserParts) -> dict[str, Any]:
    """What a checkpoint holds beside the weights, as plain values: the counterpart of `reading.read_denoiser`."""
    return {
        "unet": network_record(parts.unet),
        "schedule": parts.schedule.config,
        "sample_shape": list(parts.sample_shape),
        "null_label": parts.null_label,
        "class_names": parts.class_names,
        "settings": parts.settings,
        "latent_space": None if parts.codec.space is None else parts.codec.space.plain(),
        "codec": codec_record(parts.codec),
        "conditions": [network_record(cast(Condition, one)) for one in parts.conditions],
    }


def save_denoiser(parts: DenoiserParts, path: StrPath) -> None:
    """Write a checkpoint at step 0, from which `Trainer.fit(ckpt_path=...)` trains on with a fresh optimiser.

    Raises:
        FileExistsError: If the file exists; nothing is overwritten.
    """
    write_checkpoint(path, "denoiser", denoiser_record(parts), {"unet": parts.unet, "conditions": parts.conditions})


def network_record(network: PixelNetwork | Condition | Codec) -> dict[str, Any]:
    """The class of a network, condition or codec and the arguments that build it, as plain values."""
    # Where weights are shared out over processes, a class of torch's comes first.
    kind = next(one for one in type(network).__mro__ if not one.__module__.startswith("torch."))
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": network.config}


def codec_record(codec: Codec) -> dict[str, Any] | None:
    """As `network_record`, of a codec of a user's own; None for pixels and autoencoders."""
    return None if codec.config is None else network_record(codec)


def check_callbacks(checkpoint: Mapping[str, Any]) -> None:
    """Refuse paths in the states of callbacks that lead out of their folder: Lightning removes what they name.

    Raises:
        ValueError: If there is one; it is named.
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
        for value in state:
            yield from _texts(value)


@contextmanager
def explained(path: StrPath, kind: str) -> Iterator[None]:
    """Within it, errors about a record or its weights name the file.

    Args:
        path: The file.
        kind: What it is a checkpoint of.

    Raises:
        ValueError: If there is such an error.
    """
    try:
        yield
    # A class of a module that is not there; an ImportError is of a package that is to be installed, and says so.
    except (ValueError, KeyError, TypeError, RuntimeError, ModuleNotFoundError) as error:
        raise ValueError(f"{path} must hold a whole {kind} of this version, and does not: {in_words(error)}") from error


def read_record(path: Path, kind: ModelKind) -> tuple[dict[str, Any], dict[str, Tensor], Speed]:
    """The record of a checkpoint, its weights, and the speed of the training.

    Args:
        path: The checkpoint file.
        kind: What it must be a checkpoint of.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If the file is no checkpoint, is damaged, holds code, or holds no such model of this package.
    """
    checkpoint = load_plain(path)
    found = kind_of(checkpoint, path)
    record = checkpoint[found]
    if found != kind:
        raise ValueError(f"{path} holds a{'n' * (found[0] == 'a')} {found}, not a{'n' * (kind[0] == 'a')} {kind}; "
                         f"{COMMANDS[found]}")  # fmt: skip
    with explained(path, kind):
        weights, speed = checkpoint.get("state_dict"), checkpoint.get("speed", "plain")
        if speed not in SPEEDS:
            raise ValueError(f"speed must be one of {', '.join(SPEEDS)}, got {speed!r}")
        check_weights(weights)
        check_record(record, kind)
        return record, weights, speed


def write_checkpoint(path: StrPath, kind: ModelKind, record: dict[str, Any], parts: Mapping[str, nn.Module]) -> None:
    """Write a checkpoint at step 0 of the parts of a model, each as raw and as averaged weights, with its record.

    Args:
        path: The file to make.
        kind: What the model is.
        record: What builds it again, as plain values.
        parts: Its networks, by name.

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
        "optimizer_states": [],  # Lightning restores one state for each entry: none, so all start afresh
        "lr_schedulers": [],
    }
    with atomic_write(path) as partial:
        torch.save(checkpoint, partial)


def averaged_weights(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights of one part of a model, of those of a checkpoint."""
    prefix = f"ema_{part}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def network_with_weights(record: dict[str, Any], weights: dict[str, Tensor], allow: Sequence[str]) -> PixelNetwork:
    """The network of a record with its averaged weights, in eval mode.

    Args:
        record: Its class and the arguments that build it.
        weights: All weights of the checkpoint.
        allow: Modules of one's own whose classes the record may name.

    Raises:
        ValueError: If it cannot be built.
    """
    network = _build(record, allow)
    network.load_state_dict(averaged_weights("unet", weights))
    return network.eval()


def _build(record: dict[str, Any], allow: Sequence[str]) -> PixelNetwork:
    """The network of a record; networks within it, and their noise schedule, are built first."""
    arguments = dict(record["init_args"])
    for name, value in arguments.items():
        if isinstance(value, dict) and "class_path" in value:
            arguments[name] = _build(value, allow)
        elif name == "schedule":
            arguments[name] = schedule_of(value)
    return built(class_of(record["class_path"], PixelNetwork, allow), arguments)


def schedule_of(record: dict[str, Any]) -> NoiseSchedule:
    """The noise schedule of a record, all of whose settings must be there."""
    schedule = built(NoiseSchedule, record)
    if missing := schedule.config.keys() - record.keys():
        raise ValueError(f"schedule in its record must have {', '.join(sorted(missing))}, and has not")
    return schedule


def class_of(class_path: str, base: type[Part], allow: Sequence[str]) -> type[Part]:
    """The class of that path, in this package or in an allowed module: a checkpoint may come from anyone."""
    module, _, name = class_path.rpartition(".")
    is_allowed = module.split(".")[0] == PACKAGE or any(module == one or module.startswith(f"{one}.") for one in allow)
    if not is_allowed:
        raise ValueError(
            f"class_path must name a class of {PACKAGE}, got {class_path!r}; if you trust its module, allow it with "
            f"--allow {module or class_path}, or allow=[{module!r}] in Python"
        )
    if importlib.util.find_spec(module):
        found = getattr(importlib.import_module(module), name, None)
        if isinstance(found, type) and issubclass(found, base):
            return found
    raise ValueError(f"class_path must name a {base.__name__}, got {class_path!r}")
