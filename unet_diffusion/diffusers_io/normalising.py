"""Autoencoders that bring latents to mean 0 and standard deviation 1, as pipelines of diffusers take them."""

import copy
import math
from typing import Any

import torch
from diffusers import VQModel

from unet_diffusion.latents.space import MOMENTS, LatentSpace
from unet_diffusion.models.autoencoders import AutoencoderNetwork


def _has_scale(space: LatentSpace, scaling_factor: float | None) -> bool:
    """Whether all channels of the latents have this scale; None: have any one scale."""
    scale = space.scaling_factor
    return scale is not None and (scaling_factor is None or math.isclose(scale, scaling_factor))


def takes_scale(autoencoder: AutoencoderNetwork, space: LatentSpace, scaling_factor: float | None) -> bool:
    """Whether `normalised_autoencoder` works for these arguments."""
    if _has_scale(space, scaling_factor):
        return True
    if isinstance(autoencoder, VQModel):
        # The nearest code stays the nearest if all channels have one scale. Spatial norms see the codes themselves.
        return len(set(space.std)) == 1 and autoencoder.config["norm_type"] == "group"
    return autoencoder.quant_conv is not None and autoencoder.post_quant_conv is not None


def with_scale(autoencoder: AutoencoderNetwork, **fields: Any) -> AutoencoderNetwork:
    """A copy whose configuration has these fields, no other moments of the latents, and no folder of this machine."""
    autoencoder = copy.deepcopy(autoencoder)
    cleared = {"_name_or_path": "", **dict.fromkeys(MOMENTS)}  # a VQModel has no moments
    fields = {**{name: value for name, value in cleared.items() if name in autoencoder.config}, **fields}
    autoencoder.register_to_config(**fields)
    return autoencoder


def with_moments(autoencoder: AutoencoderNetwork, space: LatentSpace) -> AutoencoderNetwork:
    """A copy whose configuration has the mean and standard deviation of each channel of the latents."""
    mean, std = MOMENTS
    return with_scale(autoencoder, scaling_factor=1.0, **{mean: list(space.mean), std: list(space.std)})


@torch.no_grad()
def normalised_autoencoder(
    autoencoder: AutoencoderNetwork, space: LatentSpace, scaling_factor: float | None = None
) -> AutoencoderNetwork:
    """A copy of the autoencoder whose scaling_factor alone normalises the latents, for pipelines that know no moments.

    If all channels have one scale, as with a codebook, it becomes scaling_factor. Otherwise, or if scaling_factor is
    another, quant_conv and post_quant_conv, the 1x1 convolutions after the encoder and before the decoder, absorb the
    moments, and so do the codes of a codebook.

    Args:
        autoencoder: The autoencoder.
        space: The space of its latents.
        scaling_factor: The scaling_factor of the copy; None: any.

    Raises:
        ValueError: If the autoencoder lacks these convolutions and needs them, or if its codes would be told apart
            otherwise.
    """
    if not takes_scale(autoencoder, space, scaling_factor):
        raise ValueError("an autoencoder must have quant_conv and post_quant_conv to absorb a scale for each channel, "
                         "or codes that take one scale")  # fmt: skip
    if _has_scale(space, scaling_factor):
        return with_scale(autoencoder, scaling_factor=scaling_factor or space.scaling_factor)
    scaling_factor = scaling_factor or 1.0
    autoencoder = with_scale(autoencoder, scaling_factor=scaling_factor)
    last, first = autoencoder.quant_conv, autoencoder.post_quant_conv
    mean, std = torch.tensor(space.mean), torch.tensor(space.std) * scaling_factor
    first.bias += first.weight.flatten(1) @ mean
    first.weight *= std[:, None, None]
    if isinstance(autoencoder, VQModel):
        codes = autoencoder.quantize.embedding.weight
        codes -= mean
        codes /= std
        last.bias -= mean
        scale = std
    else:
        last.bias -= torch.cat([mean, 2 * std.log()])
        scale = torch.cat([std, torch.ones_like(std)])  # for the means; for the logarithms of the variances
    last.bias /= scale
    last.weight /= scale[:, None, None, None]
    return autoencoder
