"""Import of networks and pipelines from diffusers folders.

Weights load strictly and without a key map; `configurations.py` translates the configuration. Code in a folder never
runs.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from unet_diffusion.diffusers_io.configurations import complete, config_from_diffusers, schedule_from_diffusers
from unet_diffusion.diffusers_io.pipeline_code import ENCODER_PARTS
from unet_diffusion.diffusers_io.single_file.network import read_unet
from unet_diffusion.diffusers_io.super_resolution import ENLARGED_SCALE
from unet_diffusion.diffusers_io.values_file import read_values
from unet_diffusion.diffusers_io.weights import load_weights, read_weights
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.conditions.encoded import EncodedCondition
from unet_diffusion.diffusion.conditions.low_resolution import LOW_RES_SCHEDULE, LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.text import pretrained_text
from unet_diffusion.diffusion.conditions.xl_text import pretrained_xl_text
from unet_diffusion.diffusion.parts import DenoiserParts, channels_beside
from unet_diffusion.latents.codec import Codec, LatentCodec, PixelCodec, latent_space_of
from unet_diffusion.models.autoencoders import CLASSES, downsampling, pretrained_autoencoder
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.runtime.atomic_files import field_of, read_json
from unet_diffusion.runtime.initial_weights import WithoutInitialWeights
from unet_diffusion.runtime.named_class import class_of

StrPath = str | os.PathLike[str]

SAMPLER_FIELDS = {"variance_type": "fixed_small", "thresholding": False}  # values that `scheduler_config` sets
AUTOENCODERS, TEXT = ("vae", "vqvae"), ("text_encoder", "tokenizer")  # parts of a pipeline
XL_TEXT = ("text_encoder_2", "tokenizer_2")  # parts of Stable Diffusion XL
CLASS_TOKENS = "class_tokens"  # part of a ConditionalPipeline
NO_PARTS = ("_class_name", "class_names", "conditions")  # lists in an index that are no parts of a pipeline
DROPOUT = 0.1  # the usual dropout, for imported conditions that have a null
LOW_RES = "low_res_scheduler"  # part of an upscaler, which noises its small image
PAIRED = "StableDiffusionInstructPix2PixPipeline"
ENLARGING = "LDMSuperResolutionPipeline"
OWN_PARTS = [part for parts in ENCODER_PARTS.values() for part in parts]  # of a ConditionalPipeline
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")  # parts that sampling does not need


def from_diffusers(model_or_folder: UNet2DModel | UNet2DConditionModel | StrPath) -> DenoiserUNet:
    """The DenoiserUNet that equals a diffusers network, float32 on the CPU and in eval mode.

    Args:
        model_or_folder: A UNet2DModel or UNet2DConditionModel, or a folder that holds one directly or in its subfolder
            unet. Weights are safetensors or .bin files, whole or in shards. A variant such as fp16 is read only if
            there is no other. A .safetensors or .ckpt file has the layout of latent diffusion or Stable Diffusion.

    Raises:
        FileNotFoundError: If the folder or a file in it is missing.
        ValueError: If the configuration is not supported, or the weights do not fit it.
    """
    if isinstance(model_or_folder, UNet2DModel | UNet2DConditionModel):
        kind = UNet2DModel if isinstance(model_or_folder, UNet2DModel) else UNet2DConditionModel
        config = {**model_or_folder.config, "_class_name": kind.__name__}
        weights = model_or_folder.state_dict()
    elif isinstance(model_or_folder, str | os.PathLike) and Path(model_or_folder).is_file():
        return read_unet(model_or_folder)
    elif isinstance(model_or_folder, str | os.PathLike):
        folder = _unet_folder(Path(model_or_folder))
        config, weights = read_json(folder / "config.json"), {}
    else:
        got = type(model_or_folder).__name__
        raise ValueError(f"only a UNet2DModel, UNet2DConditionModel or a folder can be imported, got a {got}")
    with WithoutInitialWeights():
        model = DenoiserUNet(**config_from_diffusers(config))
    load_weights(model, weights or read_weights(folder))
    return model.eval()


def import_pipeline(folder: StrPath, *, autoencoder: StrPath | None = None) -> DenoiserParts:
    """The denoiser in a local diffusers pipeline folder: from `export_pipeline`, or of Stable Diffusion 1, 2 or XL.

    Pipelines for inpainting and upscaling can be imported, too. The text encoder is frozen. Latents are normalised as
    the autoencoder's configuration says. Code in the folder does not run.

    Args:
        folder: The pipeline folder.
        autoencoder: Folder of the autoencoder of the latents; None: the autoencoder in the pipeline folder.

    Raises:
        FileNotFoundError: If the folder lacks a network, a scheduler or another part that its index names.
        ValueError: If a part of the pipeline, or a field of a configuration, is not supported.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if (folder / "model_index.json").is_file():
        field_of(index, "_class_name", folder / "model_index.json")
    parts = _parts(index)
    config = _network_config(folder, has_tokens=not parts.isdisjoint({*TEXT, CLASS_TOKENS, "tokens"}))
    scheduler_file = _scheduler_file(folder)
    scheduler_config = read_json(scheduler_file)
    field_of(scheduler_config, "_class_name", scheduler_file)
    sample_shape = _sample_shape(config)
    unconditional = index.get("unconditional", {"prompt": ""})  # Stable Diffusion has no such field
    scale = ENLARGED_SCALE if index.get("_class_name") == ENLARGING else None
    codec = _codec(folder, parts, sample_shape, autoencoder, scale)
    if "conditions" in index or index.get("_class_name") == ["pipeline", "ConditionalPipeline"]:
        _check_listed(index.get("conditions"), folder)
        conditions = _listed_conditions(folder, index, config["in_channels"], sample_shape[0], codec)
    else:
        conditions = [*_tokens(folder, parts), *_maps(index, parts, config["in_channels"], sample_shape[0])]
    if LOW_RES in parts:
        _check_low_res_schedule(folder / LOW_RES / "scheduler_config.json")
    unet = from_diffusers(folder)
    if not parts.isdisjoint(XL_TEXT) and not index.get("force_zeros_for_empty_prompt", True):
        raise ValueError("force_zeros_for_empty_prompt must be true in model_index.json, got false: the null would be "
                         "another")  # fmt: skip
    if index.get("_class_name") == PAIRED:
        take_scaled_latents(unet, codec)
    _warn_of_lost_fields(scheduler_config, clip_sample=codec.clip_sample)
    return DenoiserParts(
        unet=unet,
        schedule=schedule_from_diffusers(scheduler_config),
        sample_shape=sample_shape,
        null_label=unconditional.get("class_labels"),
        class_names=index.get("class_names"),
        codec=codec,
        values=read_values(folder, codec.image_shape(sample_shape)[0]),
        conditions=nn.ModuleList(conditions).eval(),
    )


def _parts(index: Mapping[str, Any]) -> set[str]:
    """The parts that sampling needs; unknown parts raise an error, and parts in LEFT_OUT give a warning."""
    known = {"unet", "scheduler", LOW_RES, CLASS_TOKENS, *OWN_PARTS, *AUTOENCODERS, *TEXT, *XL_TEXT}
    parts = {
        name for name, value in index.items() if isinstance(value, list) and name not in NO_PARTS and value and value[0]
    }
    if others := sorted(parts - known - {*LEFT_OUT}):
        raise ValueError(
            f"a pipeline must consist of {', '.join(sorted(known))} to be imported, got also {', '.join(others)}; "
            "use from_diffusers to read the network alone"
        )
    if lost := sorted(parts & {*LEFT_OUT}):
        warnings.warn(f"parts of the pipeline that are not imported: {', '.join(lost)}", stacklevel=3)
    return parts & known


def _network_config(folder: Path, *, has_tokens: bool) -> dict[str, Any]:
    """The complete configuration of the network, which must be of the class that the pipeline's inputs need."""
    config = read_json(_unet_folder(folder) / "config.json")
    expected, source = (UNet2DConditionModel, "captions or class tokens") if has_tokens else (UNet2DModel, "noise")
    got = config.get("_class_name", "UNet2DModel")
    if got != expected.__name__:
        raise ValueError(
            f"a pipeline from {source} to images must have a {expected.__name__}, got a {got} in {folder}; "
            "use from_diffusers to read the network alone"
        )
    return complete(expected, config)


def _codec(
    folder: Path, parts: set[str], sample_shape: tuple[int, int, int], elsewhere: StrPath | None, scale: float | None
) -> Codec:
    """The codec of the autoencoder in the folder, normalised by a scale or as it says itself; pixels without one."""
    name = next((part for part in AUTOENCODERS if part in parts), None)
    if name is None:
        if elsewhere is not None:
            raise ValueError("autoencoder is for a denoiser of latents, and this one denoises images; leave it out")
        return PixelCodec()
    autoencoder = pretrained_autoencoder(folder / name)
    _, height, width = (downsampling(autoencoder) * side for side in sample_shape)
    shape = (autoencoder.config["in_channels"], height, width)
    space = latent_space_of(autoencoder, folder / name, shape, scaling_factor=scale)
    return LatentCodec.of(space, elsewhere)


def holds_autoencoder(folder: Path) -> bool:
    """Whether a diffusers folder holds an autoencoder."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") in CLASSES


def _warn_of_lost_fields(config: Mapping[str, Any], *, clip_sample: bool) -> None:
    """Warn of settings of the sampler, not of the noise schedule, that are replaced."""
    lost = [
        f"{field} {config[field]} (here {ours})"
        for field, ours in {**SAMPLER_FIELDS, "clip_sample": clip_sample}.items()
        if config.get(field, ours) != ours
    ]
    if lost:
        warnings.warn(f"samples will differ, as the scheduler's settings are replaced: {', '.join(lost)}", stacklevel=3)


def _sample_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, h, w) of x0."""
    size = config["sample_size"]
    if size is None:
        raise ValueError("sample_size must be set in the network's config.json, got None; add the size of its output")
    height, width = (size, size) if isinstance(size, int) else size
    return config["out_channels"], height, width


def _maps(index: Mapping[str, Any], parts: set[str], in_channels: int, out_channels: int) -> list[Condition]:
    """The condition on the channels beyond x in a pipeline of diffusers: a small or paired image, a mask, or none."""
    if LOW_RES in parts:
        if in_channels <= out_channels:
            raise ValueError(
                f"in_channels must be more than out_channels {out_channels}, for a small image, got {in_channels}"
            )
        return [LowResolution(in_channels - out_channels)]
    if in_channels == out_channels:
        return []
    if index.get("_class_name") == ENLARGING and in_channels == 2 * out_channels:
        return [LowResolution(out_channels, noise=False)]
    if index.get("_class_name") == PAIRED and in_channels == 2 * out_channels:
        return [PairedImage(out_channels, dropout=DROPOUT)]
    if "text_encoder" in parts and in_channels == 2 * out_channels + 1:
        return [MaskedImage(in_channels - out_channels)]
    raise ValueError(f"in_channels must be {out_channels}, as out_channels, or with captions "
                     f"{2 * out_channels + 1}, for a mask and a masked image, got {in_channels}")  # fmt: skip


@torch.no_grad()
def take_scaled_latents(unet: DenoiserUNet, codec: Codec) -> None:
    """Have a network of paired images take the normalised latents of the image; PAIRED gives it them as encoded.

    Args:
        unet: The network, whose first convolution is changed.
        codec: The codec of the latents.

    Raises:
        ValueError: If the latents are normalised by more than one scale.
    """
    assert codec.space is not None
    if any(codec.space.mean):
        raise ValueError(f"the autoencoder of a {PAIRED} must have a scaling_factor alone, got latents_mean")
    weight = cast(Tensor, unet.conv_in.weight)
    weight[:, unet.out_channels :] *= torch.tensor(codec.space.std).view(-1, 1, 1)


def _tokens(folder: Path, parts: set[str]) -> list[Condition]:
    """The conditions that the network of a pipeline of diffusers attends to."""
    if not parts.isdisjoint(XL_TEXT):
        return [pretrained_xl_text(folder, dropout=DROPOUT)]
    return [pretrained_text(folder, dropout=DROPOUT)] if not parts.isdisjoint(TEXT) else []


def _listed_conditions(
    folder: Path, index: Mapping[str, Any], in_channels: int, out_channels: int, codec: Codec
) -> list[Condition]:
    """The conditions of a ConditionalPipeline, in the order in which its index lists them."""
    listed = {str(role): str(name) for role, name in index["conditions"]}
    dropouts = {role: DROPOUT * (role in index["unconditional"]) for role in listed}
    free = {kind: list(places) for kind, places in ENCODER_PARTS.items()}
    makers: dict[str, Callable[[], Condition]] = {
        CLASS_TOKENS: lambda: _class_tokens(folder / CLASS_TOKENS, dropouts[CLASS_TOKENS]),
        "prompt": lambda: pretrained_text(folder, dropout=dropouts["prompt"]),
        "mask": lambda: MaskedImage(1 + out_channels),
        "low_res": lambda: LowResolution(
            codec.image_shape((out_channels, 1, 1))[0],
            option="small_image" if "mask" in listed else "image",
            noise=LOW_RES in _parts(index),
            scale_factor=index.get("scale_factor", 1),
        ),
    }
    made: dict[str, Condition] = {}
    for role in (role for role in listed if role not in ("class_labels", "concat")):  # the network embeds the classes
        made[role] = makers[role]() if role in makers else _encoded(folder, listed[role], dropouts[role], free)
    beside = channels_beside(made.values())
    rest = in_channels - out_channels - beside
    if rest < 0 or (rest > 0) != ("concat" in listed):
        raise ValueError(
            f"in_channels must be {out_channels + beside}, for {out_channels} channels of x and {beside} of the maps "
            f"{', '.join(listed)}, got {in_channels}"
        )
    if "concat" in listed:
        made["concat"] = Concat(rest, dropout=dropouts["concat"])
    return [made[role] for role in listed if role in made]


def _check_listed(listed: Any, folder: Path) -> None:
    """Refuse conditions of a ConditionalPipeline that are no list of pairs, a role and a class."""
    if not isinstance(listed, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in listed):
        raise ValueError(f"conditions in {folder / 'model_index.json'} must be a list of pairs of a role and a class, "
                         f"got {listed}; an earlier version wrote this folder: export the run again")  # fmt: skip


def _class_tokens(folder: Path, dropout: float) -> ClassTokens:
    config = read_json(folder / "config.json")
    condition = ClassTokens(config["context_dim"], config["num_classes"], dropout=dropout)
    load_weights(condition, read_weights(folder))
    return condition


def _encoded(folder: Path, class_path: str, dropout: float, free: dict[str, list[str]]) -> EncodedCondition:
    """A condition whose encoder is the next of the parts of its kind, built from the configuration of this part."""
    kind = class_of(class_path, EncodedCondition, ())
    part = folder / free[kind.pipeline_part].pop(0)
    arguments = {key: value for key, value in read_json(part / "config.json").items() if key[0] != "_"}
    condition = kind.of_pipeline(arguments, dropout=dropout)
    load_weights(condition.encoder, read_weights(part))
    return condition


def _check_low_res_schedule(path: Path) -> None:
    """Refuse an upscaler whose small images were noised by another schedule than LOW_RES_SCHEDULE."""
    alphas = schedule_from_diffusers(read_json(path)).alphas_cumprod
    ours = LOW_RES_SCHEDULE.alphas_cumprod
    if alphas.shape != ours.shape or not torch.allclose(alphas, ours):
        raise ValueError(f"{path} must have the noise schedule of Stable Diffusion's upscaler, "
                         f"{LOW_RES_SCHEDULE.config}, and has another")  # fmt: skip


def _unet_folder(folder: Path) -> Path:
    for candidate in (folder / "unet", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder} must be a local folder with unet/config.json or config.json, and has neither; "
        "download a published model first"
    )


def _scheduler_file(folder: Path) -> Path:
    for candidate in (folder / "scheduler", folder):
        if (candidate / "scheduler_config.json").is_file():
            return candidate / "scheduler_config.json"
    raise FileNotFoundError(f"{folder} must have scheduler/scheduler_config.json or scheduler_config.json")
