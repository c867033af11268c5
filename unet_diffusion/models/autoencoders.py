"""Autoencoders: diffusers' AutoencoderKL and VQModel, the first stage of latent diffusion.

An image becomes a smaller map of latents, which a small KL term or a codebook regularises (Rombach et al. 2022,
https://arxiv.org/abs/2112.10752). The package `latents` scales latents for diffusion.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel
from torch import Tensor

from unet_diffusion.models.single_file import single_file_autoencoder
from unet_diffusion.runtime.atomic_files import read_json
from unet_diffusion.runtime.safe_loading import check_safetensors

AutoencoderNetwork: TypeAlias = AutoencoderKL | VQModel
MOST_LAYERS = 100  # residual blocks in a level; published networks have 4 at most
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
    """Return an autoencoder whose latents are normal distributions, pulled towards the standard normal.

    Args:
        in_channels: Channels of the images.
        channels: Width of each level, from full resolution down; each further level halves height and width.
        latent_channels: Channels of the latents.
        layers_per_block: Residual blocks in a level of the encoder; the decoder has one more.
        attention_levels: Indices into channels of the levels with attention.
        mid_attention: Whether the lowest level has attention.
        norm_num_groups: Groups of every group norm; must divide every width.

    Raises:
        ValueError: If a width cannot be divided into groups, or a level does not exist.
    """
    config = _config(in_channels, channels, layers_per_block, attention_levels, mid_attention, norm_num_groups)
    # The scale is measured on latents once there are some; until then latents are not scaled.
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
    """Return an autoencoder whose decoder takes the nearest entries of a codebook in place of the latents.

    Args:
        in_channels: Channels of the images.
        channels: Width of each level, from full resolution down; each further level halves height and width.
        num_codes: Number of entries of the codebook.
        latent_channels: Channels of the latents, and length of an entry of the codebook.
        layers_per_block: Residual blocks in a level of the encoder; the decoder has one more.
        attention_levels: Indices into channels of the levels with attention.
        mid_attention: Whether the lowest level has attention.
        norm_num_groups: Groups of every group norm; must divide every width.

    Raises:
        ValueError: If a width cannot be divided into groups, or a level does not exist.
    """
    config = _config(in_channels, channels, layers_per_block, attention_levels, mid_attention, norm_num_groups)
    return VQModel(**config, latent_channels=latent_channels, num_vq_embeddings=num_codes, scaling_factor=1.0)


def pretrained_autoencoder(
    folder: str | os.PathLike[str],
) -> ModelMixin:  # no union, as YAML files name this function where they want a model
    """Load the autoencoder in a diffusers folder, or in the folder vae, vqvae or autoencoder inside it, or in a file.

    Args:
        folder: Path of the folder, or of a file of the layout of latent diffusion; see `single_file.py`.

    Raises:
        FileNotFoundError: If there is no autoencoder, or none with weights in safetensors.
        ValueError: If the model has another class, or weights are missing or left over.
    """
    if Path(folder).is_file():
        return single_file_autoencoder(folder)
    kind, path = autoencoder_class(folder)
    variant = check_safetensors(path, "diffusion_pytorch_model")
    autoencoder, report = kind.from_pretrained(
        path, output_loading_info=True, use_safetensors=True, local_files_only=True, variant=variant
    )
    if wrong := [f"{name}: {', '.join(map(str, keys))}" for name, keys in report.items() if keys]:
        raise ValueError(
            f"the weights in {path} do not fit its config.json: {'; '.join(wrong)}; export or download the folder again"
        )
    return autoencoder


def autoencoder_class(folder: str | os.PathLike[str]) -> tuple[type[AutoencoderNetwork], Path]:
    """Return the class of the autoencoder that `pretrained_autoencoder` loads, and the path of its own folder.

    Args:
        folder: Path of the diffusers folder.

    Raises:
        FileNotFoundError: If there is no autoencoder.
        ValueError: If the model has another class.
    """
    for candidate in (Path(folder), *(Path(folder) / name for name in ("autoencoder", "vae", "vqvae"))):
        if (candidate / "config.json").is_file():
            name = read_json(candidate / "config.json").get("_class_name")
            if name not in CLASSES:
                raise ValueError(f"{candidate} must hold an AutoencoderKL or a VQModel, and holds {name}")
            return CLASSES[name], candidate
    raise FileNotFoundError(
        f"{folder} must be a local diffusers folder with config.json, or hold such a folder named vae, vqvae or "
        "autoencoder; unet-diffusion export makes one of a checkpoint"
    )


def downsampling(autoencoder: AutoencoderNetwork) -> int:
    """Return how many pixels of the image lie along one side of a latent."""
    return 2 ** (len(autoencoder.config["block_out_channels"]) - 1)


def num_latent_channels(autoencoder: AutoencoderNetwork) -> int:
    """Return the number of channels of the latents."""
    return autoencoder.config.get("vq_embed_dim") or autoencoder.config["latent_channels"]


def num_codes(autoencoder: AutoencoderNetwork) -> int:
    """Return the number of codes in the codebook; 0 if there is no codebook, but a distribution of each latent."""
    return autoencoder.config.get("num_vq_embeddings", 0)


def quantize(autoencoder: VQModel, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes nearest to latents, (B, C, h, w), their loss, (), and their numbers, (B * h * w,) int64.

    The gradient of the codes passes unchanged to the latents. The loss pulls latents and codes together (van den Oord
    et al. 2017, https://arxiv.org/abs/1711.00937, eq. 3); diffusers' VQModel swaps the paper's weights and gives the
    pull on the latents 1 and the pull on the codes 0.25.

    Args:
        autoencoder: An autoencoder with a codebook.
        latents: Output of its encoder, (B, C, h, w).
    """
    codes, loss, (_, _, numbers) = autoencoder.quantize(latents)
    return codes, loss, numbers


def decode_codes(autoencoder: VQModel, codes: Tensor) -> Tensor:
    """Decode codes from `quantize`, (B, C, h, w), into images, (B, C, H, W)."""
    return autoencoder.decode(codes, force_not_quantize=True).sample


def reconstruct(autoencoder: AutoencoderNetwork, images: Tensor) -> Tensor:
    """Encode images and decode the means of their latents, or the codes nearest to them: (B, C, H, W)."""
    return autoencoder.decode(latent_moments(autoencoder, images)[0]).sample


def latent_moments(autoencoder: AutoencoderNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents of images, (B, c, h, w) each; a codebook has deviation 0."""
    if num_codes(autoencoder):
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
