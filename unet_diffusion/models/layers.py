"""The layers that the blocks of both networks are made of; `speed.set_speed` switches them to their fast forms.

A layer that stands where a block may stand is called `layer(x, emb, context)` and ignores what it does not need.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_diffusion.models.kernels import double_by_copies, fused_group_norm, group_norm_by_channel, winograd_conv2d


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        padded: Whether zeros around the input keep height and width; without them both lose 2 pixels.
    """

    fused = False  # True: computed by `kernels.winograd_conv2d`
    filters: Tensor | None = None  # made ahead by `speed.prepare_weights` for a network that is not trained

    def __init__(self, in_channels: int, out_channels: int, *, padded: bool = True):
        super().__init__(in_channels, out_channels, 3, padding=int(padded))

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return super().forward(x)
        filters = None if torch.is_grad_enabled() else self.filters
        padding, _ = cast(tuple[int, int], self.padding)
        return winograd_conv2d(x, self.weight, cast(Tensor, self.bias), padding=padding, filters=filters)


class GroupNorm(nn.GroupNorm):
    """Group norm, with the arguments of nn.GroupNorm."""

    fused = False  # True: computed by `kernels.fused_group_norm`
    by_channel = False  # True: computed by `kernels.group_norm_by_channel`

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return fused_group_norm(x, self.num_groups, *self._scaled(None), self.eps, silu=False)
        return self._by_channel(x, None, None).to(x.dtype) if self.by_channel else super().forward(x)

    def _by_channel(self, x: Tensor, offset: Tensor | None, scale_shift: Tensor | None) -> Tensor:
        weight, bias = self._scaled(scale_shift)
        return group_norm_by_channel(x, self.num_groups, weight, bias, self.eps, offset=offset)

    def _scaled(self, scale_shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gain and shift of each channel, (C,), or of each channel of each image, (B, C)."""
        weight, bias = cast(Tensor, self.weight), cast(Tensor, self.bias)
        if scale_shift is None:
            return weight, bias
        scale, shift = scale_shift.chunk(2, dim=1)
        return weight * (1 + scale), bias * (1 + scale) + shift


class GroupNormSiLU(GroupNorm):
    """Group norm followed by SiLU, with the arguments of nn.GroupNorm."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, offset: Tensor | None = None, scale_shift: Tensor | None = None
    ) -> Tensor:
        """Compute silu(norm(x + offset) * (1 + scale) + shift), (B, C, H, W).

        Args:
            x: The input, (B, C, H, W).
            offset: What is added to each channel before the norm, (B, C); None adds nothing.
            scale_shift: Scale and shift of each channel after the norm, (B, 2C); None changes nothing.
        """
        if self.fused:
            weight, bias = self._scaled(scale_shift)
            return fused_group_norm(x, self.num_groups, weight, bias, self.eps, offset=offset, silu=True)
        if self.by_channel:
            return F.silu(self._by_channel(x, offset, scale_shift)).to(x.dtype)
        h = super().forward(x if offset is None else x + offset[:, :, None, None])
        if scale_shift is not None:
            scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return F.silu(h)


class Downsample(nn.Module):
    """A strided 3x3 convolution that halves height and width.

    Args:
        channels: Channels of the input and of the output.
        padding: 1 pads every side with zeros; 0 pads the bottom and the right only, like the first TensorFlow
            implementation of DDPM.
    """

    def __init__(self, channels: int, *, padding: int = 1):
        super().__init__()
        self.pad = nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self.conv(self.pad(x))


class Upsample(nn.Module):
    """Nearest-neighbour doubling of height and width, followed by a 3x3 convolution.

    Args:
        channels: Channels of the input and of the output.
    """

    by_copies = False  # True: doubled by `kernels.double_by_copies`

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(
        self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None, *, size: Sequence[int]
    ) -> Tensor:
        """Return (B, C, *size); size is twice the height and width, or 1 less where an odd number was halved."""
        return self.conv(double_by_copies(x, size) if self.by_copies else F.interpolate(x, size=size, mode="nearest"))


def crop_and_concat(x: Tensor, skip: Tensor) -> Tensor:
    """Concatenate x and the central part of the skip connection that has its size: (B, C + C_skip, H, W).

    The skip is larger only behind unpadded convolutions (Ronneberger et al. 2015); otherwise nothing is cropped.
    """
    height, width = x.shape[-2:]
    top, left = (skip.shape[-2] - height) // 2, (skip.shape[-1] - width) // 2
    return torch.cat([x, skip[..., top : top + height, left : left + width]], dim=1)
