"""Networks and pipelines from diffusers' folders.

Weights pass with a strict load and no key map; `configurations.py` translates the configuration. Code in a folder is
never run.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from unet_diffusion.diffusers_io.configurations import complete, config_from_diffusers, schedule_from_diffusers
from unet_diffusion.diffusers_io.weights import load_weights, read_weights
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.conditions.low_resolution import LOW_RES_SCHEDULE, LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.text import pretrained_text
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.latents.codec import Codec, LatentCodec, PixelCodec, latent_space_of
from unet_diffusion.models.autoencoders import CLASSES, downsampling, pretrained_autoencoder
from unet_diffusion.models.unet import DenoiserUNet
from unet_diffusion.runtime.atomic_files import field_of, read_json

StrPath = str | os.PathLike[str]

SAMPLER_FIELDS = {"variance_type": "fixed_small", "thresholding": False}  # of `scheduler_config`
AUTOENCODERS, TEXT = ("vae", "vqvae"), ("text_encoder", "tokenizer")  # parts of a pipeline
CLASS_TOKENS = "class_tokens"  # part of a pipeline with code of its own
DROPOUT = 0.1  # of an imported condition that has a null; usual
LOW_RES = "low_res_scheduler"  # part of an upscaler: the noise of its small image
LEFT_OUT = ("safety_checker", "feature_extractor", "watermarker")  # parts that do not draw


def from_diffusers(model_or_folder: UNet2DModel | UNet2DConditionModel | StrPath) -> DenoiserUNet:
    """The same network as one of diffusers: float32, on the CPU, in eval mode.

    Args:
        model_or_folder: a UNet2DModel or UNet2DConditionModel; or a folder with its config.json and weights
            (safetensors or .bin, whole or in shards; of a variant such as fp16 if there is no other), or with a
            subfolder unet that has them.

    Raises:
        FileNotFoundError: if the folder or a file in it is missing.
        ValueError: if the configuration is not supported, or the weights do not fit it.
    """
    if isinstance(model_or_folder, UNet2DModel | UNet2DConditionModel):
        kind = UNet2DModel if isinstance(model_or_folder, UNet2DModel) else UNet2DConditionModel
        config = {**model_or_folder.config, "_class_name": kind.__name__}
        weights = model_or_folder.state_dict()
    elif isinstance(model_or_folder, str | os.PathLike):
        folder = _unet_folder(Path(model_or_folder))
        config, weights = read_json(folder / "config.json"), {}
    else:
        got = type(model_or_folder).__name__
        raise ValueError(f"only a UNet2DModel, UNet2DConditionModel or a folder can be imported, got a {got}")
    model = DenoiserUNet(**config_from_diffusers(config)).eval()
    load_weights(model, weights or read_weights(folder))
    return model


def import_pipeline(folder: StrPath, *, autoencoder: StrPath | None = None) -> DenoiserParts:
    """The denoiser in a local pipeline folder of diffusers: what `export_pipeline` writes, or Stable Diffusion 1 or 2.

    Pipelines for inpainting and for upscaling are read, too. The text encoder is frozen, and latents keep the scale
    that the autoencoder's configuration names. Code in the folder is not run.

    Args:
        folder: The folder.
        autoencoder: Folder of the autoencoder of its latents; None: the one in the folder.

    Raises:
        FileNotFoundError: If the folder lacks a network, a scheduler or another part that its index names.
        ValueError: If a part of the pipeline, or a field of a configuration, is not supported.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if (folder / "model_index.json").is_file():
        field_of(index, "_class_name", folder / "model_index.json")
    parts = _parts(index)
    config = _network_config(folder, has_tokens=not parts.isdisjoint({*TEXT, CLASS_TOKENS}))
    scheduler_file = _scheduler_file(folder)
    scheduler_config = read_json(scheduler_file)
    field_of(scheduler_config, "_class_name", scheduler_file)
    sample_shape = _sample_shape(config)
    unconditional = index.get("unconditional", {"prompt": ""})  # Stable Diffusion names none
    maps = _maps(
        index, parts, drawn=sample_shape[0], taken=config["in_channels"], dropout=DROPOUT * ("concat" in unconditional)
    )
    if LOW_RES in parts:
        _check_low_res_schedule(folder / LOW_RES / "scheduler_config.json")
    codec = _codec(folder, parts, sample_shape, autoencoder)
    _warn_of_lost_fields(scheduler_config, clip_sample=codec.clip_sample)
    return DenoiserParts(
        unet=from_diffusers(folder),
        schedule=schedule_from_diffusers(scheduler_config),
        sample_shape=sample_shape,
        null_label=unconditional.get("class_labels"),
        class_names=index.get("class_names"),
        codec=codec,
        conditions=nn.ModuleList([*_tokens(folder, parts, unconditional), *maps]).eval(),
    )


def _parts(index: Mapping[str, Any]) -> set[str]:
    """The parts of a pipeline that draw; refuses unknown ones, and warns of those that are LEFT_OUT."""
    known = {"unet", "scheduler", LOW_RES, CLASS_TOKENS, *AUTOENCODERS, *TEXT}
    parts = {
        name
        for name, value in index.items()
        if isinstance(value, list) and name not in ("_class_name", "class_names") and value and value[0]
    }
    if others := sorted(parts - known - {*LEFT_OUT}):
        raise ValueError(
            f"a pipeline must consist of {', '.join(sorted(known))} to be imported, got also {', '.join(others)}; "
            "from_diffusers reads the network alone"
        )
    if lost := sorted(parts & {*LEFT_OUT}):
        warnings.warn(f"not kept of the pipeline: {', '.join(lost)}", stacklevel=3)
    return parts & known


def _network_config(folder: Path, *, has_tokens: bool) -> dict[str, Any]:
    """The whole configuration of the network, which must be of the kind that takes what the pipeline gives it."""
    config = read_json(_unet_folder(folder) / "config.json")
    wanted, given = (UNet2DConditionModel, "captions or class tokens") if has_tokens else (UNet2DModel, "noise alone")
    got = config.get("_class_name", "UNet2DModel")
    if got != wanted.__name__:
        raise ValueError(
            f"only a {wanted.__name__} makes images from {given}, got a {got} in {folder}; "
            "from_diffusers reads the network alone"
        )
    return complete(wanted, config)


def _codec(folder: Path, parts: set[str], sample_shape: tuple[int, int, int], elsewhere: StrPath | None) -> Codec:
    """Of the autoencoder in the folder, with the scale that its configuration names; of pixels without one."""
    name = next((one for one in AUTOENCODERS if one in parts), None)
    if name is None:
        if elsewhere is not None:
            raise ValueError("autoencoder is for a denoiser of latents, and this one denoises images; leave it out")
        return PixelCodec()
    autoencoder = pretrained_autoencoder(folder / name)
    _, height, width = (downsampling(autoencoder) * side for side in sample_shape)
    space = latent_space_of(autoencoder, folder / name, (autoencoder.config["in_channels"], height, width))
    return LatentCodec.of(space, elsewhere)


def holds_autoencoder(folder: Path) -> bool:
    """Whether a diffusers folder is that of an autoencoder."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") in CLASSES


def _warn_of_lost_fields(config: Mapping[str, Any], *, clip_sample: bool) -> None:
    """Says which settings of the sampler, not of the schedule, are replaced by ours."""
    lost = [
        f"{field} {config[field]} (here {ours})"
        for field, ours in {**SAMPLER_FIELDS, "clip_sample": clip_sample}.items()
        if config.get(field, ours) != ours
    ]
    if lost:
        warnings.warn(f"not kept of the scheduler, so samples will differ: {', '.join(lost)}", stacklevel=3)


def _sample_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of what is drawn."""
    size = config["sample_size"]
    if size is None:
        raise ValueError("sample_size must be given in the network's config.json, got None; add the side of the images")
    height, width = (size, size) if isinstance(size, int) else size
    return config["out_channels"], height, width


def _maps(index: Mapping[str, Any], parts: set[str], *, drawn: int, taken: int, dropout: float) -> list[Condition]:
    """What the network takes beside the channels that it draws: nothing, a mask and a masked image, or a small image.

    A pipeline with code of its own says whether it is the second, and may have other maps.
    """
    if LOW_RES in parts:
        if taken <= drawn:
            raise ValueError(f"in_channels must be more than out_channels {drawn}, for a small image, got {taken}")
        return [LowResolution(taken - drawn)]
    takes_mask = index.get("takes_mask", taken != drawn and "text_encoder" in parts)
    if takes_mask and taken == 2 * drawn + 1:
        return [MaskedImage(taken - drawn)]
    if taken == drawn and not takes_mask:
        return []
    if takes_mask or taken < drawn or "takes_mask" not in index:
        raise ValueError(f"in_channels must be as out_channels {drawn}, or with captions {2 * drawn + 1}, for a mask "
                         f"and a masked image, got {taken}")  # fmt: skip
    return [Concat(taken - drawn, dropout=dropout)]


def _tokens(folder: Path, parts: set[str], unconditional: Mapping[str, Any]) -> list[Condition]:
    """What the network attends to."""
    conditions: list[Condition] = []
    if CLASS_TOKENS in parts:
        config = read_json(folder / CLASS_TOKENS / "config.json")
        dropout = DROPOUT * (CLASS_TOKENS in unconditional)
        conditions.append(ClassTokens(config["context_dim"], config["num_classes"], dropout=dropout))
        load_weights(conditions[0], read_weights(folder / CLASS_TOKENS))
    if not parts.isdisjoint(TEXT):
        conditions.append(pretrained_text(folder, dropout=DROPOUT * ("prompt" in unconditional)))
    return conditions


def _check_low_res_schedule(path: Path) -> None:
    """An upscaler's small images must have been noised as they are here."""
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
    raise FileNotFoundError(f"{folder} must have [scheduler/]scheduler_config.json, and has not")
