"""Autoencoders in the files of latent diffusion and Stable Diffusion, alone or beside a denoiser.

The code of Rombach et al. 2022 (https://github.com/CompVis/latent-diffusion) names the weights. Their shapes say all
sizes; what they do not say is the same in all published configurations: 32 groups, and images of 256 pixels.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL, VQModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from unet_diffusion.runtime.initial_weights import WithoutInitialWeights
from unet_diffusion.runtime.tensor_files import is_single_file_name, read_metadata, read_tensors

PREFIXES = ("first_stage_model.", "vae.", "")  # of an autoencoder's weights; none where it is alone in its file
SIGN = "decoder.conv_in.weight"  # every autoencoder has it, and no other network
RESOLUTION = 256  # side in pixels of the images that all published autoencoders were trained on
# Weights of its training. Beside a denoiser an average (EMA) is one of them: the denoiser's latents are those of the
# weights themselves, with which the code of latent diffusion encodes and decodes (`encode_first_stage`).
LEFT_OUT = re.compile(r"loss\..*|model_ema\..*|colorize")
CODEBOOK = "quantize.embedding.weight"
LEVEL_ATTENTION = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.attn\.(\d+)\.(norm|q|k|v|proj_out)\.(weight|bias)")
SETTINGS = "unet_diffusion"  # entry of the metadata of a file that was exported here, as JSON
SETTING_TYPES = {
    "prediction_type": str,
    "image_size": int,
    "num_heads": int,
    "head_channels": int,
    "scaling_factor": float,
    "num_classes": int,
    "class_names": list,
    "unconditional": list,
    "kind": str,
    "threshold": float,
    "min_size": int,
}
ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def holds_autoencoder(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether an autoencoder is among tensors by name."""
    return any(prefix + SIGN in tensors for prefix in PREFIXES)


def single_file_autoencoder(path: str | os.PathLike[str]) -> AutoencoderKL | VQModel:
    """Return the autoencoder in a file of the layout of latent diffusion, float32 and on the CPU.

    The arguments and errors are those of `autoencoder_in`.

    Raises:
        OSError: If the file is missing or cannot be opened.
    """
    return autoencoder_in(read_tensors(path), path)


def autoencoder_in(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> AutoencoderKL | VQModel:
    """Return the autoencoder in a file of the layout of latent diffusion, float32 and on the CPU.

    Its scaling_factor is the one in the file; None if the file has none.

    Args:
        tensors: The tensors in the file by name.
        path: Path of the .safetensors or .ckpt file.

    Raises:
        ValueError: If the file has no autoencoder of this layout.
    """
    if not holds_autoencoder(tensors):
        raise ValueError(f"{path} must hold an autoencoder of the layout of latent diffusion, with "
                         f"{PREFIXES[0]}{SIGN}, and has {', '.join(sorted(tensors)[:3]) or 'nothing'}")  # fmt: skip
    prefix = next(prefix for prefix in PREFIXES if prefix + SIGN in tensors)
    weights = {
        name: value
        for key, value in tensors.items()
        if key.startswith(prefix) and not LEFT_OUT.fullmatch(name := key.removeprefix(prefix))
    }
    scale = tensors.get("scale_factor", read_settings(path).get("scaling_factor"))
    return autoencoder_of(weights, path, scaling_factor=None if scale is None else float(scale))


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file that was exported here stores beside its weights, by the names of `SETTING_TYPES`.

    Args:
        path: Path of the file; other files give nothing.

    Raises:
        ValueError: If the settings are damaged.
    """
    text = read_metadata(path).get(SETTINGS, "{}") if is_single_file_name(path) else "{}"
    try:
        settings = dict(json.loads(text))
        wrong = [name for name, value in settings.items() if not _is_of_type(value, SETTING_TYPES[name])]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the settings in the metadata of {path} are damaged ({error}); export it again") from error
    if wrong:
        kind = SETTING_TYPES[wrong[0]].__name__
        raise ValueError(f"{wrong[0]} in the metadata of {path} must be a {kind}, got {settings[wrong[0]]!r}; export "
                         "it again")  # fmt: skip
    return settings


def _is_of_type(value: Any, kind: type) -> bool:
    """Whether a value of JSON is of a type; whole numbers are not negative here, and lists hold texts."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if kind is list:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return isinstance(value, kind)


def autoencoder_of(
    weights: Mapping[str, Tensor], path: str | os.PathLike[str], *, scaling_factor: float | None
) -> AutoencoderKL | VQModel:
    """Return the autoencoder of weights under the names of latent diffusion, without a prefix.

    Args:
        weights: The weights by name.
        path: Path of their file, for errors.
        scaling_factor: Scale of its latents; None: it is not known.

    Raises:
        ValueError: If weights are missing or left over, or the latents have another width than the decoder's input.
    """
    try:
        config = autoencoder_config(weights)
        converted = convert_ldm_vae_checkpoint(dict(weights), config)
    except (KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} must hold a whole autoencoder of latent diffusion, and lacks {error}") from error
    for key in [key for key in converted if ".attn." in key]:
        del converted[key]  # diffusers knows attention in the mid block alone
    converted |= _level_attention(weights, len(config["block_out_channels"]))
    if CODEBOOK in weights:
        converted[CODEBOOK] = weights[CODEBOOK]
    kind = VQModel if CODEBOOK in weights else AutoencoderKL
    with WithoutInitialWeights():
        autoencoder = kind(**config)
    autoencoder.register_to_config(scaling_factor=scaling_factor)
    try:
        autoencoder.load_state_dict(converted)
    except RuntimeError as error:
        raise ValueError(f"the autoencoder in {path} does not fit its own sizes: {error}") from error
    return autoencoder.eval()


def autoencoder_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKL or VQModel, read off the shapes of the weights.

    Args:
        weights: The weights under the names of latent diffusion, without a prefix.

    Raises:
        ValueError: If the latents have another width than the decoder's input.
    """
    levels = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.down."))
    blocks = {key.split(".")[4] for key in weights if key.startswith("encoder.down.0.block.")}
    attended = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(levels)]
    latent_channels = weights[SIGN].shape[1]
    config = {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "block_out_channels": tuple(
            weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
        ),
        "layers_per_block": len(blocks),
        "down_block_types": tuple("AttnDownEncoderBlock2D" if on else "DownEncoderBlock2D" for on in attended),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if on else "UpDecoderBlock2D" for on in reversed(attended)),
        "latent_channels": latent_channels,
        "norm_num_groups": 32,
        "sample_size": RESOLUTION,
    }
    width = weights["post_quant_conv.weight"].shape[1]
    if CODEBOOK in weights:
        num_codes, width = weights[CODEBOOK].shape
        return {**config, "num_vq_embeddings": num_codes, "vq_embed_dim": width}
    if width != latent_channels:
        raise ValueError("post_quant_conv of an AutoencoderKL must have as many channels in as out, "
                         f"{latent_channels}, got {width}; diffusers has no such autoencoder")  # fmt: skip
    return config


def _level_attention(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Return the weights of attention inside levels under diffusers' names; 1x1 convolutions become linear."""
    converted = {}
    for key, value in weights.items():
        if match := LEVEL_ATTENTION.fullmatch(key):
            side, level, layer, name, parameter = match.groups()
            block = f"{side}_blocks.{level if side.endswith('down') else levels - 1 - int(level)}"
            name = f"{block}.attentions.{layer}.{ATTENTION_NAMES[name]}.{parameter}"
            converted[name] = value.flatten(1) if value.ndim > 1 else value
    return converted
