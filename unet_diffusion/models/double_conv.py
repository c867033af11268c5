"""The blocks of the U-Net of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597): double convolutions.

Every block is called `block(x, emb, context)`, where x is (B, C, H, W), emb (B, D) the embedding of timestep and class,
or None, and context is ignored.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from unet_diffusion.models.layers import Conv3x3, crop_and_concat
from unet_diffusion.models.recomputing import RecomputedBlock


class DoubleConv(RecomputedBlock):
    """conv, [norm], [add the embedding], ReLU, conv, [norm], ReLU, dropout (Ronneberger et al. 2015, figure 1).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        padded: Whether zeros around the input keep height and width; without them both lose 4 pixels.
        make_norm: Function that makes the norm for a number of channels.
        emb_channels: Length D of the embedding; None for a block without one.
        dropout: Probability of zeroing an activation of the output; 0 is off.
        mid_channels: Channels between the convolutions; None: those of the output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        padded: bool,
        make_norm: Callable[[int], nn.Module],
        emb_channels: int | None = None,
        dropout: float = 0.0,
        mid_channels: int | None = None,
    ):
        super().__init__()
        mid_channels = mid_channels or out_channels
        self.conv1 = Conv3x3(in_channels, mid_channels, padded=padded)
        self.norm1 = make_norm(mid_channels)
        self.time_emb_proj = None if emb_channels is None else nn.Linear(emb_channels, mid_channels)
        self.conv2 = Conv3x3(mid_channels, out_channels, padded=padded)
        self.norm2 = make_norm(out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        h = self.norm1(self.conv1(x))
        if self.time_emb_proj is not None and emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.norm2(self.conv2(F.relu(h)))
        return self.dropout(F.relu(h))


class PooledDoubleConv(nn.Module):
    """The bottom of the U: 2x2 max-pooling, which halves height and width, then a double convolution.

    Args:
        double_conv: The double convolution.
    """

    def __init__(self, double_conv: DoubleConv):
        super().__init__()
        self.double_conv = double_conv

    def forward(self, x: Tensor, emb: Tensor | None, context: Tensor | None) -> Tensor:
        return self.double_conv(F.max_pool2d(x, 2), emb, context)


class PooledDownBlock(nn.Module):
    """A level of the contracting path: 2x2 max-pooling, then a double convolution, whose map is a skip connection.

    Args:
        double_conv: The double convolution.
    """

    def __init__(self, double_conv: DoubleConv):
        super().__init__()
        self.double_conv = double_conv

    def forward(self, x: Tensor, emb: Tensor | None, context: Tensor | None) -> list[Tensor]:
        """Return the only map of the level, in a list."""
        return [self.double_conv(F.max_pool2d(x, 2), emb, context)]


class InterpolatedUpBlock(nn.Module):
    """A level of the expanding path: bilinear doubling with aligned corners, the skip concatenated, double convolution.

    Args:
        double_conv: The double convolution; it takes the channels from below and of the skip.
    """

    def __init__(self, double_conv: DoubleConv):
        super().__init__()
        self.double_conv = double_conv

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor | None, context: Tensor | None) -> Tensor:
        doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.double_conv(crop_and_concat(doubled, skips.pop()), emb, context)


class UpConvBlock(nn.Module):
    """A level of the expanding path: 2x2 up-convolution, the cropped skip concatenated, double convolution.

    Args:
        in_channels: Channels of the map from below; the paper has twice the channels of the skip, and any number works.
        double_conv: The double convolution; it takes twice the channels of the skip, and the up-convolution makes half
            of them.
    """

    def __init__(self, in_channels: int, double_conv: DoubleConv):
        super().__init__()
        self.up_conv = nn.ConvTranspose2d(in_channels, double_conv.conv1.in_channels // 2, 2, stride=2)
        self.double_conv = double_conv

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor | None, context: Tensor | None) -> Tensor:
        return self.double_conv(crop_and_concat(self.up_conv(x), skips.pop()), emb, context)
