"""The checkpoint that holds a denoiser, a segmenter or an autoencoder: read, built again, and written.

A checkpoint is read with `weights_only=True`: it can hold tensors and plain values, never code. What is needed to build
the model again is the plain dictionary `checkpoint["denoiser"]` (or "segmenter", or "autoencoder"), beside the weights
that Lightning saves.
"""

import importlib.util
import json
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
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.record_checks import built, check_record, check_weights, no_larger_than
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.latents.codec import Codec, LatentCodec, PixelCodec
from unet_diffusion.latents.space import LatentSpace, fingerprint
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
Part = TypeVar("Part", bound=nn.Module)
SEGMENTER_FIELDS = ("kind", "class_names", "timestep", "stretch", "window_size", "settings")
LIGHTNING_VERSION = "2.6.0"  # whose checkpoint layout is written here; later versions of Lightning migrate it


def kind_of(checkpoint: Any, path: StrPath) -> ModelKind:
    """What a checkpoint is of.

    Args:
        checkpoint: What its file holds.
        path: The file.

    Raises:
        ValueError: If it was not written by this package.
    """
    found = next((kind for kind in KINDS if isinstance(checkpoint, dict) and kind in checkpoint), None)
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


# ------------------------------------------------------------------------------------------------------------ denoisers


def denoiser_record(parts: DenoiserParts) -> dict[str, Any]:
    """What a checkpoint holds beside the weights, as plain values: the counterpart of `read_denoiser`."""
    return {
        "unet": network_record(parts.unet),
        "schedule": parts.schedule.config,
        "sample_shape": list(parts.sample_shape),
        "null_label": parts.null_label,
        "class_names": parts.class_names,
        "settings": parts.settings,
        "latent_space": None if parts.codec.space is None else parts.codec.space.plain(),
        "conditions": [network_record(cast(Condition, one)) for one in parts.conditions],
    }


def read_denoiser(path: StrPath, *, allow: Sequence[str] = (), autoencoder: StrPath | None = None) -> Denoiser:
    """The denoiser in a checkpoint, with its averaged (EMA) weights, on the CPU and in eval mode.

    Args:
        path: A checkpoint file, or a run folder.
        allow: Modules of one's own whose classes the checkpoint may name.
        autoencoder: Folder of the autoencoder of its latents; None: where it was in training.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ImportError: If the denoiser takes captions, and the package transformers is not there.
        ValueError: If the file is no checkpoint, is damaged, holds code, or holds no denoiser of this package.
    """
    file = checkpoint_file(path)
    record, weights, speed = _read(file, "denoiser")
    with explained(file, "denoiser"), no_larger_than(weights):
        channels, height, width = record["sample_shape"]
        conditions = nn.ModuleList(
            built(_class_of(one["class_path"], Condition, allow), one["init_args"]) for one in record["conditions"]
        )
        conditions.load_state_dict(_below("conditions", weights))
        unet = _network_with_weights(record["unet"], weights, allow)
        beside = channels_beside(conditions)
        if unet.in_channels != channels + beside:
            raise ValueError(
                f"sample_shape in its record must have the {unet.in_channels - beside} channels that the network "
                f"takes, got {record['sample_shape']}"
            )
        unet.check_size(height, width)
        return Denoiser(
            unet=unet,
            schedule=_schedule(record["schedule"]),
            sample_shape=(channels, height, width),
            null_label=record["null_label"],
            class_names=record["class_names"],
            settings=record["settings"],
            codec=_codec(record["latent_space"], autoencoder),
            conditions=conditions.eval(),
            speed=speed,
        )


def save_denoiser(parts: DenoiserParts, path: StrPath) -> None:
    """Write a checkpoint at step 0, from which `Trainer.fit(ckpt_path=...)` trains on with a fresh optimiser.

    Raises:
        FileExistsError: If the file exists; nothing is overwritten.
    """
    _save(path, "denoiser", denoiser_record(parts), {"unet": parts.unet, "conditions": parts.conditions})


def channels_beside(conditions: nn.ModuleList) -> int:
    """Channels that the network has beside the noised image, by its conditions."""
    found = [cast(Condition, one) for one in conditions]
    return sum(one.config["channels"] for one in found if one.network_argument == "concat")


def _codec(space: dict[str, Any] | None, autoencoder: StrPath | None) -> Codec:
    if space is not None:
        return LatentCodec.of(LatentSpace.from_plain(space), autoencoder)
    if autoencoder is not None:
        raise ValueError("autoencoder is for a denoiser of latents, and this one denoises images; leave it out")
    return PixelCodec()


# ----------------------------------------------------------------------------------------------------------- segmenters


def segmenter_record(segmenter: Segmenter) -> dict[str, Any]:
    """What a checkpoint holds beside the weights, as plain values: the counterpart of `read_segmenter`."""
    fields = {name: getattr(segmenter, name) for name in SEGMENTER_FIELDS}
    return {"unet": network_record(segmenter.unet), **fields}


def read_segmenter(path: StrPath, *, allow: Sequence[str] = ()) -> Segmenter:
    """The segmenter in a checkpoint, with its averaged (EMA) weights, on the CPU and in eval mode.

    Args:
        path: A checkpoint file, or a run folder.
        allow: Modules of one's own whose classes the checkpoint may name.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If the file is no checkpoint, is damaged, holds code, or holds no segmenter of this package.
    """
    file = checkpoint_file(path)
    record, weights, speed = _read(file, "segmenter")
    with explained(file, "segmenter"), no_larger_than(weights):
        fields = {name: record[name] for name in SEGMENTER_FIELDS}
        return Segmenter(unet=_network_with_weights(record["unet"], weights, allow), **fields, speed=speed)


def save_segmenter(segmenter: Segmenter, path: StrPath) -> None:
    """Write a checkpoint at step 0, from which `Trainer.fit(ckpt_path=...)` trains on with a fresh optimiser.

    Raises:
        FileExistsError: If the file exists; nothing is overwritten.
    """
    _save(path, "segmenter", segmenter_record(segmenter), {"unet": segmenter.unet})


# --------------------------------------------------------------------------------------------------------- autoencoders


def autoencoder_record(autoencoder: Autoencoder) -> dict[str, Any]:
    """What a checkpoint holds beside the weights, as plain values: the counterpart of `read_autoencoder`."""
    network = autoencoder.autoencoder
    return {
        "class_name": type(network).__name__,
        "config": {name: value for name, value in json.loads(network.to_json_string()).items() if name[0] != "_"},
        "image_shape": list(autoencoder.image_shape),
        "settings": autoencoder.settings,
    }


def read_autoencoder(path: StrPath) -> Autoencoder:
    """The autoencoder in a checkpoint, with its averaged (EMA) weights, on the CPU and in eval mode.

    Args:
        path: A checkpoint file, or a run folder.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If the file is no checkpoint, is damaged, holds code, or holds no autoencoder of this package.
    """
    from unet_diffusion.models.autoencoders import CLASSES  # imports diffusers, which only this needs

    file = checkpoint_file(path)
    record, weights, _ = _read(file, "autoencoder")
    with explained(file, "autoencoder"), no_larger_than(weights):
        network = built(CLASSES[record["class_name"]], record["config"])
        network.load_state_dict(_below("autoencoder", weights))
        channels, height, width = record["image_shape"]
        step = 2 ** (len(network.config["block_out_channels"]) - 1)
        if channels != network.config["in_channels"] or height % step or width % step:
            raise ValueError(
                f"image_shape in its record must have {network.config['in_channels']} channels and sides that are "
                f"multiples of {step}, got {record['image_shape']}"
            )
        return Autoencoder(network.eval(), (channels, height, width), settings=record["settings"])


def save_autoencoder(autoencoder: Autoencoder, path: StrPath) -> None:
    """Write a checkpoint that `read_autoencoder` reads.

    Raises:
        FileExistsError: If the file exists; nothing is overwritten.
    """
    _save(path, "autoencoder", autoencoder_record(autoencoder), {"autoencoder": autoencoder.autoencoder})


# --------------------------------------------------------------------------------------------------------------- common


def network_record(network: PixelNetwork | Condition) -> dict[str, Any]:
    """The class of a network or condition and the arguments that build it, as plain values."""
    # Where weights are shared out over processes, a class of torch's comes first.
    kind = next(one for one in type(network).__mro__ if not one.__module__.startswith("torch."))
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": network.config}


def contents_of(model: DenoiserParts | Segmenter) -> str:
    """A hash of all that decides what a model makes: averaged weights and configuration, whatever file they are in.

    Args:
        model: The model, on the CPU, as it was read.
    """
    record = denoiser_record(model) if isinstance(model, DenoiserParts) else segmenter_record(model)
    parts = nn.ModuleList([model.unet, *getattr(model, "conditions", [])])
    return fingerprint(parts, {name: value for name, value in record.items() if name != "settings"})


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


def _read(path: Path, kind: ModelKind) -> tuple[dict[str, Any], dict[str, Tensor], Speed]:
    """The record of a checkpoint, its weights, and the speed of the training."""
    checkpoint = load_plain(path)
    found = kind_of(checkpoint, path)
    record = checkpoint[found]
    if found != kind:
        raise ValueError(f"{path} holds a{'n' * (found[0] == 'a')} {found}, not a{'n' * (kind[0] == 'a')} {kind}; "
                         f"{COMMANDS[found]}")  # fmt: skip
    with explained(path, kind):
        if not isinstance(record, dict):
            raise ValueError(f"its record must be a dict, got {type(record).__name__}")
        weights, speed = checkpoint.get("state_dict"), checkpoint.get("speed", "plain")
        if speed not in SPEEDS:
            raise ValueError(f"speed must be one of {', '.join(SPEEDS)}, got {speed!r}")
        check_weights(weights)
        check_record(record, kind)
        return record, weights, speed


def _save(path: StrPath, kind: ModelKind, record: dict[str, Any], parts: Mapping[str, nn.Module]) -> None:
    """Write the parts of a model, each as raw and as averaged weights, with its record."""
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


def _below(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights of one part of a module."""
    prefix = f"ema_{part}."
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _network_with_weights(record: dict[str, Any], weights: dict[str, Tensor], allow: Sequence[str]) -> PixelNetwork:
    network = _build(record, allow)
    network.load_state_dict(_below("unet", weights))
    return network.eval()


def _build(record: dict[str, Any], allow: Sequence[str]) -> PixelNetwork:
    """The network of a record; networks within it, and their noise schedule, are built first."""
    arguments = dict(record["init_args"])
    for name, value in arguments.items():
        if isinstance(value, dict) and "class_path" in value:
            arguments[name] = _build(value, allow)
        elif name == "schedule":
            arguments[name] = _schedule(value)
    return built(_class_of(record["class_path"], PixelNetwork, allow), arguments)


def _schedule(record: dict[str, Any]) -> NoiseSchedule:
    schedule = built(NoiseSchedule, record)
    if missing := schedule.config.keys() - record.keys():
        raise ValueError(f"schedule in its record must have {', '.join(sorted(missing))}, and has not")
    return schedule


def _class_of(class_path: str, base: type[Part], allow: Sequence[str]) -> type[Part]:
    """The class of that path, in this package or in an allowed module: a checkpoint may come from anyone."""
    module, _, name = class_path.rpartition(".")
    is_allowed = module.split(".")[0] == PACKAGE or any(module == one or module.startswith(f"{one}.") for one in allow)
    if not is_allowed:
        raise ValueError(
            f"it names the class {class_path}, which is not of {PACKAGE}; if you trust that module, allow it: "
            f"--allow {module or class_path}, or allow=[{module!r}] in Python"
        )
    if importlib.util.find_spec(module):
        found = getattr(importlib.import_module(module), name, None)
        if isinstance(found, type) and issubclass(found, base):
            return found
    raise ValueError(f"class_path must name a {base.__name__}, got {class_path!r}")
