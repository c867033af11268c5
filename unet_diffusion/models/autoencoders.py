"""Autoencoders: diffusers' AutoencoderKL and VQModel, the first stage of latent diffusion.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752): an image becomes a smaller map of latents, regularised by a
small KL term or by a codebook. What brings latents to the scale that diffusion takes is in `latents.py`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel
from torch import Tensor

from unet_diffusion.runtime.atomic_files import read_json
from unet_diffusion.runtime.safe_loading import check_safetensors

AutoencoderNetwork: TypeAlias = AutoencoderKL | VQModel
MOST_LAYERS = 100  # blocks a level
CLASSES: dict[str, type[AutoencoderNetwork]] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


def kl_autoencoder(
    in_channels: int,
    channels: Sequence[int],
    *,
    latent_channels: int = 4,
    layers_per_block: int = 2,
    attention_levels: Sequence[int] = (),
    mid_attention: bool = True,
    norm_num_groups: int = 32,
) -> AutoencoderKL:
    """An autoencoder whose latents are a normal distribution each, pulled towards the standard normal.

    Args:
        in_channels: of the images.
        channels: width of each level, from full resolution down; each further level halves height and width.
        latent_channels: of the latents.
        layers_per_block: residual blocks a level of the encoder; one more in the decoder.
        attention_levels: indices into channels of the levels with attention.
        mid_attention: attention at the bottom.
        norm_num_groups: groups of every group norm; must divide every width.

    Raises:
        ValueError: if a width cannot be divided into groups, or a level does not exist.
    """
    config = _config(in_channels, channels, layers_per_block, attention_levels, mid_attention, norm_num_groups)
    # The scale is measured once there are latents to measure; until then it is none.
    return AutoencoderKL(**config, latent_channels=latent_channels, scaling_factor=1.0)


def vq_autoencoder(
    in_channels: int,
    channels: Sequence[int],
    *,
    num_codes: int,
    latent_channels: int = 3,
    layers_per_block: int = 2,
    attention_levels: Sequence[int] = (),
    mid_attention: bool = True,
    norm_num_groups: int = 32,
) -> VQModel:
    """An autoencoder whose decoder takes the nearest entries of a codebook in place of the latents.

    Args:
        in_channels: of the images.
        channels: width of each level, from full resolution down; each further level halves height and width.
        num_codes: entries of the codebook.
        latent_channels: of the latents, and length of an entry.
        layers_per_block: residual blocks a level of the encoder; one more in the decoder.
        attention_levels: indices into channels of the levels with attention.
        mid_attention: attention at the bottom.
        norm_num_groups: groups of every group norm; must divide every width.

    Raises:
        ValueError: if a width cannot be divided into groups, or a level does not exist.
    """
    config = _config(in_channels, channels, layers_per_block, attention_levels, mid_attention, norm_num_groups)
    return VQModel(**config, latent_channels=latent_channels, num_vq_embeddings=num_codes, scaling_factor=1.0)


def pretrained_autoencoder(folder: str | os.PathLike[str]) -> ModelMixin:  # not a union: configurations name it
    """The autoencoder in a diffusers folder, or in the folder vae, vqvae or autoencoder inside it.

    Raises:
        FileNotFoundError: if there is none, or none in safetensors.
        ValueError: if it is of another class, or weights are missing or left over.
    """
    kind, path = autoencoder_class(folder)
    check_safetensors(path, "diffusion_pytorch_model")
    autoencoder, report = kind.from_pretrained(
        path, output_loading_info=True, use_safetensors=True, local_files_only=True
    )
    if wrong := [f"{name}: {', '.join(map(str, keys))}" for name, keys in report.items() if keys]:
        raise ValueError(f"the weights in {path} must be those of its config.json; {'; '.join(wrong)}")
    return autoencoder


def autoencoder_class(folder: str | os.PathLike[str]) -> tuple[type[AutoencoderNetwork], Path]:
    """The class of the autoencoder that `pretrained_autoencoder` loads, and the folder where it is.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another class.
    """
    for candidate in (Path(folder), *(Path(folder) / name for name in ("autoencoder", "vae", "vqvae"))):
        if (candidate / "config.json").is_file():
            name = read_json(candidate / "config.json").get("_class_name")
            if name not in CLASSES:
                raise ValueError(f"{candidate} must hold an AutoencoderKL or a VQModel, and holds {name}")
            return CLASSES[name], candidate
    raise FileNotFoundError(
        f"{folder} must be a local diffusers folder with config.json, or hold vae, vqvae or autoencoder with one; "
        "unet-diffusion export makes one of a checkpoint"
    )


def downsampling(autoencoder: AutoencoderNetwork) -> int:
    """Pixels of the image, along a side, for one of the latents."""
    return 2 ** (len(autoencoder.config["block_out_channels"]) - 1)


def num_latent_channels(autoencoder: AutoencoderNetwork) -> int:
    """Channels of what `encode` gives."""
    return autoencoder.config.get("vq_embed_dim") or autoencoder.config["latent_channels"]


def quantize(autoencoder: VQModel, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest codes in place of the latents, (B, C, h, w), their loss, (), and their numbers, (B * h * w,) int64.

    The gradient of the codes is passed on to the latents as it is. The loss pulls latents and codes together, as in van
    den Oord et al. 2017 (https://arxiv.org/abs/1711.00937, eq. 3), but diffusers' VQModel weights the pull on the
    latents 1 and that on the codes 0.25, which is the other way round.
    """
    codes, loss, (_, _, numbers) = autoencoder.quantize(latents)
    return codes, loss, numbers


def decode_codes(autoencoder: VQModel, codes: Tensor) -> Tensor:
    """The images, (B, C, H, W), of what `quantize` gave."""
    return autoencoder.decode(codes, force_not_quantize=True).sample


def reconstruct(autoencoder: AutoencoderNetwork, images: Tensor) -> Tensor:
    """Images there and back, (B, C, H, W): through the means of their latents, or the codes nearest to them."""
    if isinstance(autoencoder, VQModel):
        return autoencoder.decode(autoencoder.encode(images).latents).sample
    return autoencoder.decode(autoencoder.encode(images).latent_dist.mean).sample


def latent_moments(autoencoder: AutoencoderNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent of images, (B, c, h, w) each; the latter 0 for a codebook."""
    if isinstance(autoencoder, VQModel):
        latents = autoencoder.encode(images).latents
        return latents, torch.zeros_like(latents)
    posterior = autoencoder.encode(images).latent_dist
    return posterior.mean, posterior.std


def _config(
    in_channels: int,
    channels: Sequence[int],
    layers_per_block: int,
    attention_levels: Sequence[int],
    mid_attention: bool,
    norm_num_groups: int,
) -> dict[str, Any]:
    if not channels:
        raise ValueError("channels must hold the width of at least one level, got none")
    if min(*channels, in_channels, norm_num_groups) < 1 or not 1 <= layers_per_block <= MOST_LAYERS:
        raise ValueError(
            "in_channels, channels and norm_num_groups must be at least 1, and layers_per_block from 1 to "
            f"{MOST_LAYERS}, got {in_channels}, {list(channels)}, {norm_num_groups} and {layers_per_block}"
        )
    for width in channels:
        if width % norm_num_groups:
            raise ValueError(f"every width in channels must be a multiple of norm_num_groups {norm_num_groups}, "
                             f"got {width}")  # fmt: skip
    levels = range(len(channels))
    for level in attention_levels:
        if level not in levels:
            raise ValueError(f"attention_levels must be in [0, {len(channels)}), got {level}")
    attended = [level in attention_levels for level in levels]
    return {
        "in_channels": in_channels,
        "out_channels": in_channels,
        "block_out_channels": tuple(channels),
        "layers_per_block": layers_per_block,
        "down_block_types": tuple("AttnDownEncoderBlock2D" if on else "DownEncoderBlock2D" for on in attended),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if on else "UpDecoderBlock2D" for on in reversed(attended)),
        "mid_block_add_attention": mid_attention,
        "norm_num_groups": norm_num_groups,
    }
