"""Reading of models from checkpoints: with averaged weights, on the CPU and in eval mode."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from unet_diffusion.diffusion.adapters.adapter import Adapter, TrainedAdapter, merge_trained
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.parts import channels_beside
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.onnx_segmenter import onnx_file, read_onnx_segmenter
from unet_diffusion.inference.record import (
    averaged_weights,
    checkpoint_file,
    denoiser_record,
    explained,
    is_checkpoint,
    network_record,
    network_with_weights,
    read_record,
    schedule_of,
)
from unet_diffusion.inference.record_checks import built, no_larger_than
from unet_diffusion.inference.segmenter import Segmenter, fields_of
from unet_diffusion.latents.codec import Codec, LatentCodec, PixelCodec
from unet_diffusion.latents.space import LatentSpace, fingerprint
from unet_diffusion.models.speed import Speed
from unet_diffusion.runtime.addresses import is_hub_name
from unet_diffusion.runtime.hub import download, with_prefix
from unet_diffusion.runtime.initial_weights import WithoutInitialWeights, without_initial_weights
from unet_diffusion.runtime.named_class import class_of
from unet_diffusion.runtime.pixel_values import PixelValues

StrPath = str | os.PathLike[str]


def read_denoiser(path: StrPath, *, allow: Sequence[str] = (), autoencoder: StrPath | None = None) -> Denoiser:
    """The denoiser in a checkpoint, with its averaged (EMA) weights, on the CPU and in eval mode.

    Args:
        path: A checkpoint file, or a run folder.
        allow: Further modules whose classes the checkpoint may name.
        autoencoder: Current folder of the autoencoder of the latents; None: its folder in training.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ImportError: If the denoiser takes texts, and the package transformers is missing.
        ValueError: If the file is no checkpoint, is damaged, holds code, or holds no denoiser of this package.
    """
    file = checkpoint_file(path)
    record, weights, speed = read_record(file, "denoiser")
    if "adapter" in record:
        return _adapted(file, record, weights, speed=speed, allow=allow, autoencoder=autoencoder)
    with explained(file, "denoiser"), no_larger_than(weights):
        channels, height, width = record["sample_shape"]
        with without_initial_weights(allow):
            conditions = nn.ModuleList(
                built(class_of(condition["class_path"], Condition, allow), condition["init_args"])
                for condition in record["conditions"]
            )
        conditions.load_state_dict(averaged_weights("conditions", weights))
        unet = network_with_weights(record["unet"], weights, allow)
        beside = channels_beside(conditions)
        if unet.in_channels != channels + beside:
            raise ValueError(
                f"sample_shape must have the network's {unet.in_channels - beside} channels, "
                f"got {record['sample_shape']}"
            )
        unet.check_size(height, width)
        return Denoiser(
            unet=unet,
            schedule=schedule_of(record["schedule"]),
            sample_shape=(channels, height, width),
            null_label=record["null_label"],
            class_names=record["class_names"],
            settings=record["settings"],
            values=PixelValues.from_plain(record["values"]),
            codec=_codec(record, allow, autoencoder),
            conditions=conditions.eval(),
            speed=speed,
        )


def read_base(path: StrPath, *, allow: Sequence[str] = (), autoencoder: StrPath | None = None) -> Denoiser:
    """The denoiser that an adapter is trained on: a checkpoint, a run or diffusers folder, or a model on the hub.

    Args:
        path: Its path, or its name on the hub.
        allow: Further modules whose classes its checkpoint may name.
        autoencoder: Current folder of the autoencoder of the latents; None: its folder in training.

    Raises:
        FileNotFoundError: If there is no model at the path, or the hub cannot be reached.
        ValueError: If it is no denoiser, cannot be read, or is a base with an adapter itself.
    """
    if is_hub_name(path):
        path = download(str(path))
    if not is_checkpoint(path):
        from unet_diffusion.diffusers_io.importing import import_pipeline

        return Denoiser(**vars(import_pipeline(path, autoencoder=autoencoder)))
    if "adapter" in read_record(checkpoint_file(path), "denoiser")[0]:
        raise ValueError(f"{path} holds an adapter, and a base must be a whole denoiser; export it, and use that")
    return read_denoiser(path, allow=allow, autoencoder=autoencoder)


def base_record(base: Denoiser, path: StrPath) -> dict[str, str]:
    """What a checkpoint of an adapter says of its base: where it is, and a hash of its weights and settings.

    Args:
        base: The denoiser, as it was read.
        path: Its path, or its name on the hub.
    """
    # Settings at 0, None or False do not count: a later version may have further ones, which are off. Nor do those that
    # change nothing of what is drawn.
    settings = {**base.unet.config, **base.schedule.config, "null_label": base.null_label}
    settings |= {"value_range": base.values.value_range, "gradient_checkpointing": None, "dropout": None}
    settings["conditions"] = [network_record(cast(Condition, condition)) for condition in base.conditions]
    parts = nn.ModuleList([base.unet, base.conditions])
    return {
        "path": with_prefix(path) if is_hub_name(path) else str(Path(path).resolve()),
        "fingerprint": fingerprint(parts, {name: value for name, value in settings.items() if value}),
    }


def _adapted(
    file: Path,
    record: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    speed: Speed,
    allow: Sequence[str],
    autoencoder: StrPath | None,
) -> Denoiser:
    """The denoiser of a checkpoint of an adapter: its base, with the adapter merged into the weights.

    Raises:
        FileNotFoundError: If the base is missing.
        ValueError: If the base is another one now, or the adapter does not fit it.
    """
    path = record["base"]["path"]
    try:
        base = read_base(path, allow=allow, autoencoder=autoencoder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} holds an adapter of {path}, which is needed too: {error}") from error
    if base_record(base, path)["fingerprint"] != record["base"]["fingerprint"]:
        raise ValueError(f"{file} holds an adapter of {path}, which was trained further or replaced since; restore it, "
                         "or train the adapter again")  # fmt: skip
    with explained(file, "denoiser"):
        adapter = built(class_of(record["adapter"]["class_path"], Adapter, allow), record["adapter"]["init_args"])
        adapter.attach(base.unet, base.conditions)
        averaged = {
            f"{part}.{name}": value
            for part in ("unet", "conditions")
            for name, value in averaged_weights(part, weights).items()
        }
        merge_trained(adapter, averaged, base.unet, base.conditions)
        base.sample_shape, base.class_names = tuple(record["sample_shape"]), record["class_names"]
        base.codec = _codec(record, allow, autoencoder)
        base.values = PixelValues.from_plain(record["values"])
    base.settings, base.speed = record["settings"], speed
    base.adapter = TrainedAdapter(adapter, averaged)
    return base


def read_segmenter(path: StrPath, *, allow: Sequence[str] = ()) -> Segmenter:
    """The segmenter in a checkpoint, with its averaged (EMA) weights, on the CPU and in eval mode.

    Args:
        path: A checkpoint file, a run folder, or a segmenter.onnx or its folder.
        allow: Further modules whose classes the checkpoint may name.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ImportError: If the segmenter is in a file of ONNX, and ONNX Runtime is missing.
        ValueError: If the file is no checkpoint, is damaged, holds code, or holds no segmenter of this package.
    """
    if exported := onnx_file(path):
        return read_onnx_segmenter(exported)
    file = checkpoint_file(path)
    record, weights, speed = read_record(file, "segmenter")
    with explained(file, "segmenter"), no_larger_than(weights):
        network = network_with_weights(record["unet"], weights, allow)
        return Segmenter(unet=network, **fields_of(record), speed=speed)


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
    record, weights, _ = read_record(file, "autoencoder")
    with explained(file, "autoencoder"), no_larger_than(weights):
        with WithoutInitialWeights():
            network = built(CLASSES[record["class_name"]], record["config"])
        network.load_state_dict(averaged_weights("autoencoder", weights))
        channels, height, width = record["image_shape"]
        step = 2 ** (len(network.config["block_out_channels"]) - 1)
        if channels != network.config["in_channels"] or height % step or width % step:
            raise ValueError(
                f"image_shape must have {network.config['in_channels']} channels and sides that are multiples of "
                f"{step}, got {record['image_shape']}"
            )
        values = PixelValues.from_plain(record["values"])
        return Autoencoder(network.eval(), (channels, height, width), settings=record["settings"], values=values)


def contents_of(model: Denoiser | Segmenter) -> str:
    """A hash of the averaged weights and the configuration of a model, which does not depend on its file.

    Args:
        model: The model on the CPU, as it was read.
    """
    record = denoiser_record(model) if isinstance(model, Denoiser) else model.record()
    parts = nn.ModuleList([model.unet, *getattr(model, "conditions", [])])
    return fingerprint(parts, {name: value for name, value in record.items() if name != "settings"})


def _codec(record: dict[str, Any], allow: Sequence[str], autoencoder: StrPath | None) -> Codec:
    space, own = record["latent_space"], record["codec"]
    if space is not None:
        return LatentCodec.of(LatentSpace.from_plain(space), autoencoder)
    if autoencoder is not None:
        raise ValueError(f"autoencoder is for a denoiser of latents, and this one "
                         f"{'denoises images' if own is None else 'has a codec of its own'}; leave it out")  # fmt: skip
    return PixelCodec() if own is None else built(class_of(own["class_path"], Codec, allow), own["init_args"])
