"""Attention between pixels, and from pixels to tokens.

Self-attention stands where Ho et al. 2020 (https://arxiv.org/abs/2006.11239) have it; the spatial transformer comes
from Rombach et al. 2022 (https://arxiv.org/abs/2112.10752). Both are called `block(x, emb, context)` and add their
input. Submodules carry diffusers' names, so that weights fit without a key map.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_diffusion.models.layers import GroupNorm
from unet_diffusion.models.recomputing import RecomputedBlock

# Attention is plain products up to this number of scores (images x heads x pairs of pixels): 32 MiB in bfloat16.
MAX_SCORES = 2**24
TRANSFORMER_NORM_EPS = 1e-6  # of a spatial transformer's group norm, from Rombach et al.'s code
FEED_FORWARD_WIDTH = 4  # times the channels (Vaswani et al. 2017, section 3.3)


class SelfAttention(RecomputedBlock):
    """Attention of every pixel to every pixel, plus the input.

    Args:
        channels: Channels C of the input and of the output.
        num_heads: Number of heads; each is channels / num_heads wide.
        norm_num_groups: Groups of the norm before the attention.
        norm_eps: Number added to the variance in that norm.
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


class SpatialTransformer(RecomputedBlock):
    """Transformer blocks over all pixels, which attend to each other and to the context, plus the input.

    Args:
        channels: Channels C of the input and of the output.
        num_heads: Number of heads; each is channels / num_heads wide.
        context_dim: Length K of a token of the context.
        depth: Number of transformer blocks.
        norm_num_groups: Groups of the norm before them.
        linear_projection: Whether the projections before and after the blocks are linear layers (Stable Diffusion 2);
            otherwise they are 1x1 convolutions, whose weights differ in shape only.
        cross_only: Whether pixels attend to the context twice, and not to each other.
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
        channels: Length C of a token.
        num_heads: Number of heads; each is channels / num_heads wide.
        context_dim: Length K of a token of the context.
        cross_only: Whether the first attention is to the context, too.
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
        """Return the new tokens, (B, L, C).

        Args:
            tokens: Pixels as tokens, (B, L, C).
            context: Tokens to attend to, (B, M, K).
        """
        normed = self.norm1(tokens)
        tokens = tokens + self.attn1(normed, context if self.cross_only else normed)
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        return tokens + self.ff(self.norm3(tokens))


class CrossAttention(nn.Module):
    """Attention of tokens to a context.

    Args:
        channels: Length C of a token.
        num_heads: Number of heads; each is channels / num_heads wide.
        context_dim: Length K of a token of the context.
    """

    def __init__(self, channels: int, num_heads: int, *, context_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list because diffusers' key is to_out.0

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Return the values that each token attends to, projected, (B, L, C)."""
        return self.to_out[0](attend(self.to_q(tokens), self.to_k(context), self.to_v(context), self.num_heads))


class FeedForward(nn.Module):
    """A hidden layer, half of it gated by the other half (GEGLU, Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Args:
        channels: Length C of a token, in and out.
    """

    def __init__(self, channels: int):
        super().__init__()
        hidden = FEED_FORWARD_WIDTH * channels
        # diffusers' keys are net.0.proj and net.2; its layer between them, a dropout, has no weights
        gated = nn.ModuleDict({"proj": nn.Linear(channels, 2 * hidden)})
        self.net = nn.ModuleList([gated, nn.Identity(), nn.Linear(hidden, channels)])

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = cast(nn.ModuleDict, self.net[0])["proj"](tokens).chunk(2, dim=-1)
        return self.net[2](value * F.gelu(gate))


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Compute softmax(q k' / sqrt(d)) v in each head, d its width (Vaswani et al. 2017, eq. 1): (B, L, C).

    On a CPU plain products take 0.2 to 0.9 of the time of PyTorch's flash attention in training (49 to 256 pixels,
    bfloat16 and float32), and 0.5 to 0.9 without a backward pass, except for one small image.

    Args:
        q: Queries, (B, L, C); head i is the i-th of num_heads equal parts of C.
        k: Keys, (B, M, C).
        v: Values, (B, M, C).
        num_heads: Number of heads; must divide C.
    """
    q, k, v = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L or M, C / heads)
    num_scores = q.shape[0] * num_heads * q.shape[2] * k.shape[2]
    # an exported network is for any size
    if q.device.type == "cpu" and not torch.compiler.is_exporting() and num_scores <= MAX_SCORES:
        out = torch.softmax((q * q.shape[3] ** -0.5) @ k.transpose(2, 3), dim=3) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def pixels_as_tokens(x: Tensor) -> Tensor:
    """Rearrange (B, C, H, W) -> (B, H*W, C)."""
    return x.flatten(2).transpose(1, 2)


def tokens_as_pixels(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Rearrange (B, H*W, C) -> (B, C, H, W), for a size (H, W)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))


def _projected(layer: nn.Module, tokens: Tensor) -> Tensor:
    """Apply a linear layer, or a 1x1 convolution, to every token."""
    return F.linear(tokens, cast(Tensor, layer.weight).flatten(1), cast(Tensor, layer.bias))
