"""The parts that fill the U, called `block(x, emb, context)` each.

x is (B, C, H, W); emb (B, D) the embedding of timestep and class, or None; context (B, L, K) tokens to attend to, or
None. A part ignores what it does not need, so the wiring in `unet.py` never asks what a part is.

The double convolution is that of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597). The residual block is that
of Ho et al. 2020 (https://arxiv.org/abs/2006.11239), with the scale-shift norm and the resampling residual block of
Dhariwal & Nichol 2021 (https://arxiv.org/abs/2105.05233); the spatial transformer is that of Rombach et al. 2022
(https://arxiv.org/abs/2112.10752). The submodules of the denoiser's blocks carry diffusers' names, so that weights fit
its UNet2DModel and UNet2DConditionModel with a strict load and no key map.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_diffusion.models.kernels import double_by_copies, fused_group_norm, group_norm_by_channel, winograd_conv2d

MAX_SCORES = 2**24  # of all images, heads and pairs of pixels, for attention as plain products: 32 MiB in bfloat16
MAX_PERIOD = 10_000  # longest wavelength of the timestep embedding (Vaswani et al. 2017, section 3.5)
TRANSFORMER_NORM_EPS = 1e-6  # of a spatial transformer's group norm, as in Rombach et al.'s code
FEED_FORWARD_WIDTH = 4  # times the channels (Vaswani et al. 2017, section 3.3)


class DownBlock(nn.Module):
    """One level of the contracting path: residual blocks, each followed by its attention, then downsampling.

    Args:
        resnets: residual blocks.
        attentions: one for each residual block; `PassThrough` where there is none.
        downsampler: halves height and width; None on the lowest level.
    """

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], downsampler: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Tensor, emb: Tensor | None, context: Tensor | None) -> list[Tensor]:
        """Every map the level makes, in order: each is a skip connection, and the last flows on."""
        kept = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, emb, context), emb, context)
            kept.append(x)
        for downsampler in self.downsamplers:
            kept.append(downsampler(kept[-1], emb, context))
        return kept


class MidBlock(nn.Module):
    """The bottom of the U: a residual block, then attention and residual block by turns.

    Args:
        resnets: residual blocks, one more than attentions.
        attentions: `PassThrough` for none.
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
    """One level of the expanding path: concatenate a skip, residual block, attention; several times; then upsampling.

    Args:
        resnets: residual blocks; each takes one skip.
        attentions: one for each residual block; `PassThrough` where there is none.
        upsampler: enlarges to the size of the next skip; None on the highest level.
    """

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], upsampler: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor | None, context: Tensor | None) -> Tensor:
        """The level's map, (B, C, H, W); it takes its skips off the end of the list."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(crop_and_concat(x, skips.pop()), emb, context), emb, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, emb, context, size=skips[-1].shape[-2:])  # twice its own, or one less
        return x


class ResidualBlock(nn.Module):
    """norm, SiLU, [resample], conv, add or scale-shift by the embedding, norm, SiLU, dropout, conv; plus the input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; where they differ, a 1x1 convolution carries the input across.
        emb_channels: D, length of the embedding.
        dropout: probability of zeroing an activation before the second convolution; 0 is off.
        norm_num_groups: groups of both norms.
        norm_eps: added to the variance in both norms.
        scale_shift: the embedding scales and shifts the second norm, instead of being added before it.
        resample: such as `nn.AvgPool2d(2)`, without weights, applied in both branches; None keeps the size.
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
        """(B, out_channels, H, W), resampled by `resample`; `size`, which an upsampler is given, is not looked at."""
        h = self.conv1(self.resample(self.norm1(x)))
        emb = self.time_emb_proj(F.silu(emb))
        h = self.norm2(h, scale_shift=emb) if self.scale_shift else self.norm2(h, offset=emb)
        h = self.conv2(self.dropout(h))
        return self.conv_shortcut(self.resample(x)) + h


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution.

    Args:
        in_channels: C.
        out_channels: K.
        padded: zeros around the input keep height and width; otherwise both lose 2 pixels.
    """

    fused = False  # by `kernels.winograd_conv2d`; see `speed.set_speed`
    filters: Tensor | None = None  # for it, of a network that is not trained; see `speed.prepare_weights`

    def __init__(self, in_channels: int, out_channels: int, *, padded: bool = True):
        super().__init__(in_channels, out_channels, 3, padding=int(padded))

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return super().forward(x)
        filters = None if torch.is_grad_enabled() else self.filters
        padding, _ = cast(tuple[int, int], self.padding)
        return winograd_conv2d(x, self.weight, cast(Tensor, self.bias), padding=padding, filters=filters)


class GroupNorm(nn.GroupNorm):
    """Group norm. Its arguments are those of nn.GroupNorm."""

    fused = False  # by `kernels.fused_group_norm`; see `speed.set_speed`
    by_channel = False  # by `kernels.group_norm_by_channel`; see there too

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return fused_group_norm(x, self.num_groups, *self._scaled(None), self.eps, silu=False)
        return self._by_channel(x, None, None).to(x.dtype) if self.by_channel else super().forward(x)

    def _by_channel(self, x: Tensor, offset: Tensor | None, scale_shift: Tensor | None) -> Tensor:
        weight, bias = self._scaled(scale_shift)
        return group_norm_by_channel(x, self.num_groups, weight, bias, self.eps, offset=offset)

    def _scaled(self, scale_shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gain and shift of each channel, (C,), or of each channel of each image, (B, C)."""
        weight, bias = cast(Tensor, self.weight), cast(Tensor, self.bias)
        if scale_shift is None:
            return weight, bias
        scale, shift = scale_shift.chunk(2, dim=1)
        return weight * (1 + scale), bias * (1 + scale) + shift


class GroupNormSiLU(GroupNorm):
    """Group norm, then SiLU. Its arguments are those of nn.GroupNorm."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, offset: Tensor | None = None, scale_shift: Tensor | None = None
    ) -> Tensor:
        """silu(norm(x + offset) * (1 + scale) + shift).

        Args:
            x: (B, C, H, W).
            offset: (B, C), or None for none.
            scale_shift: scale and shift, (B, 2C), or None for none.
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


class SelfAttention(nn.Module):
    """Attention of every pixel to every pixel, plus the input.

    Args:
        channels: C.
        num_heads: heads; each is channels / num_heads wide.
        norm_num_groups: groups of the norm before it.
        norm_eps: added to the variance in the norm.
    """

    def __init__(self, channels: int, num_heads: int, *, norm_num_groups: int = 32, norm_eps: float = 1e-5):
        super().__init__()
        self.num_heads = num_heads
        self.group_norm = GroupNorm(norm_num_groups, channels, eps=norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list because diffusers' key is to_out.0

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        tokens = pixels_as_tokens(self.group_norm(x))
        out = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), self.num_heads)
        return x + tokens_as_pixels(self.to_out[0](out), x.shape[-2:])


class SpatialTransformer(nn.Module):
    """Transformer blocks over all pixels, which attend to each other and to the context, plus the input.

    Args:
        channels: C.
        num_heads: heads; each is channels / num_heads wide.
        context_dim: K, length of a token.
        depth: number of transformer blocks.
        norm_num_groups: groups of the norm before them.
        linear_projection: the projections before and after are linear layers, as in Stable Diffusion 2, and not 1x1
            convolutions; the shape of their weights is all that differs.
        cross_only: pixels attend to the context twice, and not to each other.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        context_dim: int,
        depth: int = 1,
        norm_num_groups: int = 32,
        linear_projection: bool = False,
        cross_only: bool = False,
    ):
        super().__init__()
        project = nn.Linear if linear_projection else partial(nn.Conv2d, kernel_size=1)
        self.norm = GroupNorm(norm_num_groups, channels, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, context_dim=context_dim, cross_only=cross_only) for _ in range(depth)
        )
        self.proj_out = project(channels, channels)

    def forward(self, x: Tensor, emb: Tensor | None, context: Tensor) -> Tensor:
        tokens = _projected(self.proj_in, pixels_as_tokens(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + tokens_as_pixels(_projected(self.proj_out, tokens), x.shape[-2:])


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context and a feed-forward layer, each after a norm and added to its input.

    Args:
        channels: C, length of a token.
        num_heads: heads; each is channels / num_heads wide.
        context_dim: K, length of a token of the context.
        cross_only: the first attention is to the context too.
    """

    def __init__(self, channels: int, num_heads: int, *, context_dim: int, cross_only: bool = False):
        super().__init__()
        self.cross_only = cross_only
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = CrossAttention(channels, num_heads, context_dim=context_dim if cross_only else channels)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, num_heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Tokens, (B, L, C), of tokens (B, L, C) and context (B, M, K)."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, context if self.cross_only else normed)
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        return tokens + self.ff(self.norm3(tokens))


class CrossAttention(nn.Module):
    """Attention of tokens to a context.

    Args:
        channels: C, length of a token.
        num_heads: heads; each is channels / num_heads wide.
        context_dim: K, length of a token of the context.
    """

    def __init__(self, channels: int, num_heads: int, *, context_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list because diffusers' key is to_out.0

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """What the tokens find in the context, (B, L, C)."""
        return self.to_out[0](attend(self.to_q(tokens), self.to_k(context), self.to_v(context), self.num_heads))


class FeedForward(nn.Module):
    """A hidden layer, half of it gated by the other half (GEGLU, Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        channels: C, in and out.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = FEED_FORWARD_WIDTH * channels
        # diffusers' keys are net.0.proj and net.2; what stands between has no weights
        gated = nn.ModuleDict({"proj": nn.Linear(channels, 2 * hidden)})
        self.net = nn.ModuleList([gated, nn.Identity(), nn.Linear(hidden, channels)])

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = cast(nn.ModuleDict, self.net[0])["proj"](tokens).chunk(2, dim=-1)
        return self.net[2](value * F.gelu(gate))


class PassThrough(nn.Module):
    """Stands where a level has no attention: returns x."""

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return x


class Downsample(nn.Module):
    """A strided 3x3 convolution that halves height and width.

    Args:
        channels: C, in and out.
        padding: 1 on every side, or 0: one row and column of zeros at the bottom and right only, as the first
            TensorFlow implementation of DDPM pads.
    """

    def __init__(self, channels: int, *, padding: int = 1):
        super().__init__()
        self.pad = nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        return self.conv(self.pad(x))


class Upsample(nn.Module):
    """Nearest-neighbour doubling of height and width, then a 3x3 convolution.

    Args:
        channels: C, in and out.
    """

    by_copies = False  # by `kernels.double_by_copies`; see `speed.set_speed`

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(
        self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None, *, size: Sequence[int]
    ) -> Tensor:
        """(B, C, *size): `size` is twice the height and width, or less by 1 where an odd number was halved."""
        return self.conv(double_by_copies(x, size) if self.by_copies else F.interpolate(x, size=size, mode="nearest"))


class DoubleConv(nn.Module):
    """conv, [norm], [add the embedding], ReLU, conv, [norm], ReLU, dropout (Ronneberger et al. 2015, figure 1).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        padded: zeros around the input keep height and width; otherwise both lose 4 pixels.
        make_norm: makes the norm of that many channels.
        emb_channels: D, length of the embedding; None: there is none.
        dropout: probability of zeroing an activation of the output; 0 is off.
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
    ):
        super().__init__()
        self.conv1 = Conv3x3(in_channels, out_channels, padded=padded)
        self.norm1 = make_norm(out_channels)
        self.time_emb_proj = None if emb_channels is None else nn.Linear(emb_channels, out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels, padded=padded)
        self.norm2 = make_norm(out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        h = self.norm1(self.conv1(x))
        if self.time_emb_proj is not None and emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.norm2(self.conv2(F.relu(h)))
        return self.dropout(F.relu(h))


class PooledDoubleConv(nn.Module):
    """The bottom of the U of 2015: 2x2 max-pooling, which halves height and width, then a double convolution.

    Args:
        double_conv: the convolutions.
    """

    def __init__(self, double_conv: DoubleConv):
        super().__init__()
        self.double_conv = double_conv

    def forward(self, x: Tensor, emb: Tensor | None, context: Tensor | None) -> Tensor:
        return self.double_conv(F.max_pool2d(x, 2), emb, context)


class PooledDownBlock(nn.Module):
    """A level of its contracting path: the same, and the map is kept for the way up.

    Args:
        double_conv: the convolutions.
    """

    def __init__(self, double_conv: DoubleConv):
        super().__init__()
        self.double_conv = double_conv

    def forward(self, x: Tensor, emb: Tensor | None, context: Tensor | None) -> list[Tensor]:
        """The one map that the level keeps, in a list."""
        return [self.double_conv(F.max_pool2d(x, 2), emb, context)]


class UpConvBlock(nn.Module):
    """A level of the expanding path: 2x2 up-convolution, the cropped skip concatenated, double convolution.

    Args:
        in_channels: channels of the map from below; twice those of the skip in the paper, any number here.
        double_conv: takes the skip's channels twice, as the up-convolution makes as many.
    """

    def __init__(self, in_channels: int, double_conv: DoubleConv):
        super().__init__()
        self.up_conv = nn.ConvTranspose2d(in_channels, double_conv.conv1.in_channels // 2, 2, stride=2)
        self.double_conv = double_conv

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor | None, context: Tensor | None) -> Tensor:
        return self.double_conv(crop_and_concat(self.up_conv(x), skips.pop()), emb, context)


class VectorEmbedding(nn.Module):
    """Two linear layers: (B, channels) -> (B, emb_channels).

    Args:
        channels: length of the vector.
        emb_channels: length of the embedding.
    """

    def __init__(self, channels: int, emb_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, emb_channels)
        self.linear_2 = nn.Linear(emb_channels, emb_channels)

    def forward(self, vector: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(vector.to(self.linear_1.weight.dtype))))


class TimestepEmbedding(VectorEmbedding):
    """Sinusoids of t, then two linear layers: (B,) -> (B, emb_channels).

    Args:
        channels: number of sinusoids, even.
        emb_channels: length of the embedding.
        flip_sin_to_cos: as of `sinusoids`.
        freq_shift: as of `sinusoids`.
    """

    def __init__(self, channels: int, emb_channels: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0):
        super().__init__(channels, emb_channels)
        self.channels = channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.freq_shift = freq_shift

    def forward(self, t: Tensor) -> Tensor:
        waves = sinusoids(t, self.channels, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        return super().forward(waves)


def sinusoids(t: Tensor, channels: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sines and cosines of t at frequencies from 1 to 1 / MAX_PERIOD (Vaswani et al. 2017): (B, channels) float32.

    Args:
        t: (B,).
        channels: number of sinusoids, even.
        flip_sin_to_cos: cosines before sines.
        freq_shift: subtracted from the number of frequencies in the exponent's divisor; 1 reaches 1 / MAX_PERIOD.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / (half - freq_shift))
    angles = t[:, None].float() * frequencies
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """softmax(q k' / sqrt(d)) v in each head, d its width (Vaswani et al. 2017, eq. 1): (B, L, C).

    On a CPU plain products take 0.2 to 0.9 of the time of its flash attention in training (49 to 256 pixels, bfloat16
    and float32), and 0.5 to 0.9 without a backward pass, but for one small image.

    Args:
        q: (B, L, C); head i is the i-th of num_heads equal parts of C.
        k: (B, M, C).
        v: (B, M, C).
        num_heads: must divide C.
    """
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L or M, C / heads)
    num_scores = q.shape[0] * num_heads * q.shape[2] * k.shape[2]
    if q.device.type == "cpu" and num_scores <= MAX_SCORES:
        out = torch.softmax((q * q.shape[3] ** -0.5) @ k.transpose(2, 3), dim=3) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def pixels_as_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return x.flatten(2).transpose(1, 2)


def tokens_as_pixels(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), for a size (H, W)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))


def crop_and_concat(x: Tensor, skip: Tensor) -> Tensor:
    """x and the centre of the skip that is as large as x, concatenated: (B, C + C_skip, H, W).

    The skip is larger only behind unpadded convolutions (Ronneberger et al. 2015); otherwise nothing is cropped.
    """
    height, width = x.shape[-2:]
    top, left = (skip.shape[-2] - height) // 2, (skip.shape[-1] - width) // 2
    return torch.cat([x, skip[..., top : top + height, left : left + width]], dim=1)


def _projected(layer: nn.Module, tokens: Tensor) -> Tensor:
    """A linear layer, or a 1x1 convolution, of every token."""
    return F.linear(tokens, cast(Tensor, layer.weight).flatten(1), cast(Tensor, layer.bias))
