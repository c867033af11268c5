"""A discriminator of image patches, which makes the reconstructions of an autoencoder sharp.

It is the PatchGAN of Isola et al. 2017 (https://arxiv.org/abs/1611.07004, appendix 6.1.2) with the hinge loss, as in
Esser et al. 2021 (https://arxiv.org/abs/2012.09841) and Rombach et al. 2022. Group norms replace their batch norms, so
that small batches and many processes change nothing.
"""

import torch.nn.functional as F
from torch import Tensor, nn

MAX_WIDENING = 8  # a layer is at most so many times as wide as the first
NUM_GROUPS = 32
NEGATIVE_SLOPE = 0.2
INITIAL_STD = 0.02  # standard deviation of the first weights (Isola et al. 2017, appendix 6.2)


class PatchDiscriminator(nn.Module):
    """Scores how real each patch of an image looks: (B, C, H, W) -> (B, 1, h, w), above 0 for real.

    With three layers a patch is 70 pixels wide, and images must be at least 24 pixels wide.

    Args:
        in_channels: Channels C of the images.
        channels: Width of the first layer; a multiple of 32.
        num_layers: Number of strided convolutions; each further one doubles the size of a patch.

    Attributes:
        smallest_size: The least height and width of an image, in pixels.

    Raises:
        ValueError: If the width is no multiple of 32, or there is no layer.
    """

    def __init__(self, in_channels: int = 3, *, channels: int = 64, num_layers: int = 3):
        super().__init__()
        if channels < NUM_GROUPS or channels % NUM_GROUPS:
            raise ValueError(f"channels must be a multiple of {NUM_GROUPS}, got {channels}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        widths = [channels * min(2**layer, MAX_WIDENING) for layer in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1)]
        for layer in range(1, num_layers + 1):
            stride = 2 if layer < num_layers else 1
            layers += [
                nn.LeakyReLU(NEGATIVE_SLOPE),
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(NUM_GROUPS, widths[layer]),
            ]
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(NEGATIVE_SLOPE), nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.in_channels = in_channels
        self.smallest_size = 3 * 2**num_layers  # such an image has one patch
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return half the sum of mean(max(0, 1 - real)) and mean(max(0, 1 + fake)), ().

    This loss of the discriminator (Lim & Ye 2017, https://arxiv.org/abs/1705.02894) is 0 if it scores all real patches
    above 1 and all others below -1, and 1 if it scores every patch 0.

    Args:
        real: Scores of images.
        fake: Scores of reconstructions.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
