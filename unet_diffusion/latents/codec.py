"""Latents of images and back: an autoencoder, and the scale that diffusion takes."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from unet_diffusion.latents.space import MOMENTS, LatentSpace, fingerprint
from unet_diffusion.models.autoencoders import Autoencoder, downsampling, num_latent_channels, pretrained_autoencoder


def latent_space_of(
    autoencoder: Autoencoder,
    folder: str | os.PathLike[str],
    image_shape: Sequence[int],
    *,
    scaling_factor: float | None = None,
) -> LatentSpace:
    """That of an autoencoder, with the scale that its configuration names, or one scale for all channels.

    Args:
        autoencoder: float32, on the CPU.
        folder: where it is.
        image_shape: (C, H, W) of the images.
        scaling_factor: the scale; None: that of its configuration, and its mean and deviation of each channel.

    Raises:
        ValueError: if it does not take such images.
    """
    channels, height, width = image_shape
    factor, takes = downsampling(autoencoder), autoencoder.config["in_channels"]
    if channels != takes or height % factor or width % factor:
        raise ValueError(
            f"images must have {takes} channels and multiples of {factor} pixels for the autoencoder in {folder}, got "
            f"{channels} channels of {height}x{width}; set channels and image_size of the images"
        )
    count = num_latent_channels(autoencoder)
    path = str(Path(folder).resolve())
    prints = fingerprint(autoencoder, autoencoder.config)
    space = LatentSpace(path, prints, (channels, height, width), mean=(0.0,) * count, std=(1.0,) * count)
    if scaling_factor is not None:
        return space.rescaled(scaling_factor)
    # As diffusers' pipelines for Stable Diffusion XL do: latents * latents_std / scaling_factor + latents_mean.
    mean, std = (autoencoder.config.get(name) for name in MOMENTS)
    scale = autoencoder.config["scaling_factor"]
    return replace(space, mean=tuple(mean or space.mean), std=tuple(one / scale for one in std or space.std))


def autoencoder_of(space: LatentSpace, folder: str | os.PathLike[str] | None = None) -> Autoencoder:
    """The autoencoder that latents are of, on the CPU and in eval mode.

    Args:
        space: of the latents.
        folder: where it is now; None: where it was.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if another one is there.
    """
    path = space.autoencoder if folder is None else folder
    try:
        autoencoder = pretrained_autoencoder(path).eval()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; say where the autoencoder is now with --autoencoder DIR") from error
    if fingerprint(autoencoder, autoencoder.config) != space.fingerprint:
        raise ValueError(
            f"the autoencoder in {path} is not the one that the latents are of: it was trained on or replaced; "
            "bring the old one back, or encode the images and train the denoiser again"
        )
    return autoencoder


@torch.no_grad()
def decode_latents(autoencoder: Autoencoder, space: LatentSpace, latents: Tensor, batch_size: int = 16) -> Tensor:
    """The images of normalised latents, (N, C, H, W) float32 on the CPU, in about [-1, 1].

    Args:
        autoencoder: on any device.
        space: of the latents.
        latents: (N, c, h, w).
        batch_size: images at once: a decoder takes more memory than a denoiser.
    """
    device = next(autoencoder.parameters()).device
    raw = space.denormalise(latents.float())
    return torch.cat([autoencoder.decode(part.to(device)).sample.float().cpu() for part in raw.split(batch_size)])
