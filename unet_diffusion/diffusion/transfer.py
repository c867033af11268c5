"""From a denoiser without conditions to one with maps beside the noised image, which starts with its weights.

The input convolution gets channels with weights of 0, so that at first the network predicts what the other one does,
whatever the maps hold (as Brooks et al. 2023, https://arxiv.org/abs/2211.09800, section 3.2).
"""

import torch
from torch import Tensor

from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.unet import PixelNetwork

INPUT = "conv_in.weight"  # (width, in_channels, 3, 3)


def load_unconditional_weights(network: PixelNetwork, denoiser: DenoiserParts, schedule: NoiseSchedule) -> str:
    """Copy the weights of a denoiser without conditions, in place, and return a sentence about what was copied.

    Schedules may differ: then the network learns to predict something else, from the same features.

    Args:
        network: The network to start; it may take more channels than the denoiser's.
        denoiser: The trained denoiser.
        schedule: The schedule that the network is trained with.

    Raises:
        ValueError: If the denoiser has conditions, or if the networks differ in more than the channels of the input;
            the error names a difference, and nothing is copied.
    """
    if denoiser.conditions:
        kinds = ", ".join(type(one).__name__ for one in denoiser.conditions)
        raise ValueError(f"init_from must be a denoiser without conditions, and this one has {kinds}")
    own, weights = network.state_dict(), dict(denoiser.unet.state_dict())
    num_new = 0
    if INPUT in own and INPUT in weights and own[INPUT].shape[1] > weights[INPUT].shape[1]:
        num_new = own[INPUT].shape[1] - weights[INPUT].shape[1]
        zeros = weights[INPUT].new_zeros(len(weights[INPUT]), num_new, *weights[INPUT].shape[2:])
        weights[INPUT] = torch.cat([weights[INPUT], zeros], dim=1)
    shapes, own_shapes = _shapes(weights), _shapes(own)
    names = sorted(shapes.keys() | own_shapes.keys())
    if differ := [name for name in names if shapes.get(name) != own_shapes.get(name)]:
        raise ValueError(
            f"the network must be that of init_from, and {len(differ)} tensors differ, such as {differ[0]}: "
            f"{shapes.get(differ[0], 'none')} in init_from, {own_shapes.get(differ[0], 'none')} here; give model.unet "
            "the arguments that init_from was trained with, but for in_channels and out_channels"
        )
    network.load_state_dict(weights)
    millions = sum(value.numel() for value in weights.values()) / 1e6
    copied = (
        f"copied all {millions:.2f} M weights of the denoiser; those of {num_new} channels of conditions begin at 0"
    )
    is_same = schedule.config == denoiser.schedule.config
    return copied if is_same else f"{copied}; the schedule is another, so what to predict is learnt anew"


def _shapes(weights: dict[str, Tensor]) -> dict[str, str]:
    return {name: "x".join(map(str, value.shape)) or "a number" for name, value in weights.items()}
