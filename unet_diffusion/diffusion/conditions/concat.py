"""Concat of an image's size, which the network has beside the noised image."""

from collections.abc import Callable

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Condition

MAPS_KEY = 2  # keeps what is drawn here apart from noise, which has the same seed

Encode = Callable[[Tensor], Tensor]
"""encode(images): what is denoised for images (B, C, H, W) in [-1, 1]: their normalised latents, or they themselves."""


class Concat(Condition):
    """Concat of an image's size, (B, channels, H, W), that the network has beside the noised image; null is 0.

    The network's in_channels count them.

    Args:
        channels: of the maps.
        dropout: probability of the null in training; 0: there is no null.
    """

    batch_key = network_argument = "concat"

    def __init__(self, channels: int, *, dropout: float = 0.0):
        super().__init__(dropout)
        self.config = {"channels": channels, "dropout": dropout}

    def null(self, given: Tensor) -> Tensor:
        return torch.zeros_like(given)

    def forward(self, given: Tensor) -> Tensor:
        if given.shape[1] != self.config["channels"]:
            raise ValueError(f"maps must have {self.config['channels']} channels, got {given.shape[1]}")
        return given
