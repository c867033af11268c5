"""A critic of image patches, for autoencoders whose reconstructions are to look sharp.

PatchGAN (Isola et al. 2017, https://arxiv.org/abs/1611.07004, appendix 6.1.2) with the hinge loss, as Esser et al. 2021
(https://arxiv.org/abs/2012.09841) and Rombach et al. 2022 train it. Norms are of groups of channels instead of the
batch, so that small batches and many processes change nothing.
"""

import torch.nn.functional as F
from torch import Tensor, nn

MAX_WIDENING = 8  # times the first width
NUM_GROUPS = 32
NEGATIVE_SLOPE = 0.2
INITIAL_STD = 0.02  # of the weights (Isola et al. 2017, appendix 6.2)


class PatchDiscriminator(nn.Module):
    """How real each patch of an image looks: (B, C, H, W) -> (B, 1, h, w), above 0 for real.

    With three layers a patch is 70 pixels wide, and images must be at least 24 pixels wide.

    Args:
        in_channels: C.
        channels: width of the first layer; a multiple of 32.
        num_layers: strided convolutions; each further one doubles the patch.

    Attributes:
        smallest_size: least height and width of an image, in pixels.

    Raises:
        ValueError: if the width or the number of layers does not fit.
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
        self.smallest_size = 3 * 2**num_layers  # leaves one patch
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, (): 0 if every patch is told apart by a margin of 1, and 1 if it cannot tell any.

    Half the sum of mean(max(0, 1 - real)) and mean(max(0, 1 + fake)) (Lim & Ye 2017,
    https://arxiv.org/abs/1705.02894).

    Args:
        real: its output for images.
        fake: its output for reconstructions.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
