"""The blocks of the denoiser: levels of residual blocks, each of which may be followed by attention.

The residual block comes from Ho et al. 2020 (https://arxiv.org/abs/2006.11239), its scale-shift norm and its resampling
from Dhariwal & Nichol 2021 (https://arxiv.org/abs/2105.05233). Submodules carry diffusers' names, so that weights fit
its UNet2DModel and UNet2DConditionModel with a strict load and no key map.

Every block is called `block(x, emb, context)`, where x is (B, C, H, W), emb (B, D) the embedding of timestep and class,
or None, and context (B, L, K) the tokens to attend to, or None. A block ignores what it does not need, so the wiring in
`unet.py` never asks for the kind of a block.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from unet_diffusion.models.layers import Conv3x3, GroupNormSiLU, crop_and_concat
from unet_diffusion.models.recomputing import RecomputedBlock


class DownBlock(nn.Module):
    """One level of the contracting path: residual blocks, each followed by its attention, then downsampling.

    Args:
        resnets: The residual blocks.
        attentions: An attention for each residual block; `PassThrough` for none.
        downsampler: The layer that halves height and width; None on the lowest level.
    """

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], downsampler: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Tensor, emb: Tensor | None, context: Tensor | None) -> list[Tensor]:
        """Return every map that the level makes, in order: each is a skip connection, and the last flows on."""
        maps = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, emb, context), emb, context)
            maps.append(x)
        for downsampler in self.downsamplers:
            maps.append(downsampler(maps[-1], emb, context))
        return maps


class MidBlock(nn.Module):
    """The bottom of the U: a residual block, then attention and residual block in turn.

    Args:
        resnets: The residual blocks, one more than there are attentions.
        attentions: The attentions between them; `PassThrough` for none.
    """

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: Tensor, emb: Tensor | None, context: Tensor | None) -> Tensor:
        x = self.resnets[0](x, emb, context)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, emb, context), emb, context)
        return x


class UpBlock(nn.Module):
    """One level of the expanding path: several times skip, residual block and attention, then upsampling.

    Args:
        resnets: The residual blocks; each takes one skip connection.
        attentions: An attention for each residual block; `PassThrough` for none.
        upsampler: The layer that enlarges to the size of the next skip; None on the highest level.
    """

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], upsampler: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor | None, context: Tensor | None) -> Tensor:
        """Return the map of the level, (B, C, H, W); its skips are taken off the end of the list."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(crop_and_concat(x, skips.pop()), emb, context), emb, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, emb, context, size=skips[-1].shape[-2:])  # twice its own, or one less
        return x


class ResidualBlock(RecomputedBlock):
    """norm, SiLU, [resample], conv, add or scale-shift by the embedding, norm, SiLU, dropout, conv; plus the input.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; where they differ from the input's, a 1x1 convolution carries the input
            across.
        emb_channels: Length D of the embedding.
        dropout: Probability of zeroing an activation before the second convolution; 0 is off.
        norm_num_groups: Groups of both norms.
        norm_eps: Number added to the variance in both norms.
        scale_shift: Whether the embedding scales and shifts the second norm; otherwise it is added before that norm.
        resample: Layer without weights that resamples both branches, such as `nn.AvgPool2d(2)`; None keeps the size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        scale_shift: bool = False,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNormSiLU(norm_num_groups, in_channels, eps=norm_eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = GroupNormSiLU(norm_num_groups, out_channels, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.resample = nn.Identity() if resample is None else resample

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | None = None, *, size: Sequence[int] | None = None
    ) -> Tensor:
        """Return (B, out_channels, H, W), resampled by `resample`; `size` is there for upsamplers and ignored here."""
        h = self.conv1(self.resample(self.norm1(x)))
        emb = self.time_emb_proj(F.silu(emb))
        h = self.norm2(h, scale_shift=emb) if self.scale_shift else self.norm2(h, offset=emb)
        h = self.conv2(self.dropout(h))
        return self.conv_shortcut(self.resample(x)) + h


class PassThrough(nn.Module):
    """Return x unchanged; stands where a level has no attention."""

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return x
