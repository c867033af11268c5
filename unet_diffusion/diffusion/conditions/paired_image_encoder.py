"""The x0 of a paired image; an exported folder has this file in `maps/`."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


class PairedImageEncoder(ModelMixin, ConfigMixin):
    """The x0 of an image, which the network takes beside the noised one.

    Args:
        channels: Number of channels of x0.
    """

    argument = "paired_image"
    usage = 'from diffusers.utils import load_image\n\npaired_image = load_image("image.png")'

    @register_to_config
    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("no_image", torch.zeros(channels, 1, 1))  # a folder without any weights would not load

    def forward(self, x0: Tensor) -> Tensor:
        """The x0 itself, (B, channels, h, w)."""
        return x0

    def null(self, x0: Tensor) -> Tensor:
        """The x0 that stands for no image."""
        return self.no_image.expand_as(x0)

    def prepare(self, images: Any, size: tuple[int, int], encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The x0 of images in memory, (N, channels, h, w).

        Args:
            images: A PIL image, an array or a tensor in [0, 1], or a list of these, with the channels of the images to
                draw.
            size: Height and width; images of another size are scaled.
            encode: Function that gives the x0 of images in [-1, 1].
        """
        return encode(VaeImageProcessor(vae_scale_factor=1).preprocess(images, *size))
