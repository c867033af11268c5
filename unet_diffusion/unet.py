"""The U: the wiring of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), and the denoiser that fills it.

`UNet` knows how maps flow down, across and up, and nothing of what is done to them. `DenoiserUNet` fills it with the
residual blocks and attention of Ho et al. 2020 (https://arxiv.org/abs/2006.11239); its weights fit diffusers'
UNet2DModel.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor, nn

from unet_diffusion.blocks import (
    Conv3x3,
    DownBlock,
    Downsample,
    GroupNormSiLU,
    MidBlock,
    PassThrough,
    ResidualBlock,
    SelfAttention,
    TimestepEmbedding,
    UpBlock,
    Upsample,
)


class UNet(nn.Module):
    """The wiring: every map made on the way down is a skip connection on the way up.

    Args:
        conv_in: called `conv_in(x)`; its output is the first skip.
        down_blocks: called `block(x, emb, context)`; each returns the list of maps that it keeps.
        mid_block: called `block(x, emb, context)`.
        up_blocks: called `block(x, skips, emb, context)`; each takes the last `block.num_skips` skips that are left.
    """

    def __init__(
        self,
        conv_in: nn.Module,
        down_blocks: Sequence[nn.Module],
        *,
        mid_block: nn.Module,
        up_blocks: Sequence[nn.Module],
    ):
        super().__init__()
        self.conv_in = conv_in
        self.down_blocks = nn.ModuleList(down_blocks)
        self.mid_block = mid_block
        self.up_blocks = nn.ModuleList(up_blocks)

    def wire(self, x: Tensor, emb: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The map at the top of the expanding path, (B, C, H, W), before any head.

        Args:
            x: image, (B, in_channels, H, W).
            emb: embedding of timestep and class, (B, D), or None.
            context: tokens to attend to, (B, L, K), or None.
        """
        skips = [self.conv_in(x)]
        for block in self.down_blocks:
            skips += block(skips[-1], emb, context)
        x = self.mid_block(skips[-1], emb, context)
        for block in self.up_blocks:
            x = block(x, [skips.pop() for _ in range(cast(int, block.num_skips))], emb, context)
        return x


class DenoiserUNet(UNet):
    """Predicts noise, image or v from a noised image and its timestep; the counterpart of diffusers' UNet2DModel.

    Args:
        in_channels: channels of the noised image.
        channels: width of each level, from full resolution down; each level halves height and width.
        out_channels: channels of the prediction; None: as in_channels.
        layers_per_block: residual blocks a level on the way down; one more on the way up.
        attention_levels: indices into channels of the levels with self-attention; 0 is full resolution.
        head_channels: width of an attention head; None: one head.
        mid_attention: attention at the bottom.
        num_class_embeds: rows of the class embedding, a null label included if there is one; None: no classes.
        scale_shift: the embedding scales and shifts a norm, instead of being added.
        resample: "conv" (strided convolution, nearest and convolution) or "resnet" (a residual block that resamples).
        downsample_padding: of the strided convolution; 1, or 0 for DDPM's zeros at the bottom and right only.
        dropout: in the residual blocks; 0 is off.
        norm_num_groups: groups of every group norm; must divide every width.
        norm_eps: added to the variance in every group norm.
        flip_sin_to_cos: cosines before sines in the timestep embedding; False in Ho et al. 2020.
        freq_shift: of the timestep embedding's frequencies; 1 in Ho et al. 2020.

    Raises:
        ValueError: if the widths cannot be divided into groups, heads or sinusoids, or a level does not exist.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        *,
        out_channels: int | None = None,
        layers_per_block: int = 2,
        attention_levels: Sequence[int] = (),
        head_channels: int | None = None,
        mid_attention: bool = True,
        num_class_embeds: int | None = None,
        scale_shift: bool = False,
        resample: Literal["conv", "resnet"] = "conv",
        downsample_padding: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
    ):
        attended = {*attention_levels, len(channels) - 1} if mid_attention else {*attention_levels}
        _check_widths(channels, attended, head_channels or 1, norm_num_groups)
        if resample not in ("conv", "resnet"):
            raise ValueError(f"resample must be 'conv' or 'resnet', got {resample!r}")
        if downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding must be 0 or 1, got {downsample_padding}")
        if layers_per_block < 1:
            raise ValueError(f"layers_per_block must be at least 1, got {layers_per_block}")
        out_channels = in_channels if out_channels is None else out_channels
        emb_channels = 4 * channels[0]  # Ho et al. 2020, appendix B

        residual = partial(
            ResidualBlock,
            emb_channels=emb_channels,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            scale_shift=scale_shift,
        )

        def attention(width: int) -> nn.Module:
            num_heads = width // (head_channels or width)
            return SelfAttention(width, num_heads, norm_num_groups=norm_num_groups, norm_eps=norm_eps)

        def attentions(level: int, count: int) -> list[nn.Module]:
            make = partial(attention, channels[level]) if level in attention_levels else PassThrough
            return [make() for _ in range(count)]

        def downsampler(width: int) -> nn.Module:
            if resample == "resnet":
                return residual(width, width, resample=nn.AvgPool2d(2))
            return Downsample(width, padding=downsample_padding)

        def upsampler(width: int) -> nn.Module:
            if resample == "resnet":
                return residual(width, width, resample=nn.Upsample(scale_factor=2.0, mode="nearest"))
            return Upsample(width)

        super().__init__(
            Conv3x3(in_channels, channels[0]),
            _down_blocks(channels, layers_per_block, residual, attentions, downsampler),
            mid_block=MidBlock(
                [residual(channels[-1], channels[-1]) for _ in range(2)],
                [attention(channels[-1]) if mid_attention else PassThrough()],
            ),
            up_blocks=_up_blocks(channels, layers_per_block, residual, attentions, upsampler),
        )
        self.time_embedding = TimestepEmbedding(
            channels[0], emb_channels, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift
        )
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, emb_channels)
        self.conv_norm_out = GroupNormSiLU(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_out = Conv3x3(channels[0], out_channels)
        _initialise(self)

        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "channels": list(channels),
            "out_channels": out_channels,
            "layers_per_block": layers_per_block,
            "attention_levels": sorted(attention_levels),
            "head_channels": head_channels,
            "mid_attention": mid_attention,
            "num_class_embeds": num_class_embeds,
            "scale_shift": scale_shift,
            "resample": resample,
            "downsample_padding": downsample_padding,
            "dropout": dropout,
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "flip_sin_to_cos": flip_sin_to_cos,
            "freq_shift": freq_shift,
        }

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The prediction, (B, out_channels, H, W).

        Args:
            x: noised images, (B, in_channels, H, W); H and W multiples of 2 ** (levels - 1).
            t: timesteps, (B,), integer or fractional.
            labels: classes, (B,) int64 in [0, num_class_embeds); None exactly if the network has no classes.
            context: for blocks that attend to tokens; none of this network's does.

        Raises:
            ValueError: if the size does not fit, or labels are missing or not wanted.
        """
        self._check_size(x)
        x = self.wire(x, self.embed(t, labels), context)
        return self.conv_out(self.conv_norm_out(x))

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The embedding of timesteps (B,), plus that of labels (B,) if there are classes: (B, 4 * channels[0])."""
        emb = self.time_embedding(t)
        if (labels is None) != (self.class_embedding is None):
            have = "no classes" if self.class_embedding is None else f"{self.config['num_class_embeds']} classes"
            got = "none" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise ValueError(f"labels must be given exactly if the network has classes: it has {have}, got {got}")
        return emb if self.class_embedding is None else emb + self.class_embedding(labels)

    def _check_size(self, x: Tensor) -> None:
        multiple = 2 ** (len(self.down_blocks) - 1)
        height, width = x.shape[-2:]
        if height % multiple or width % multiple:
            fit = " x ".join(str(-(-side // multiple) * multiple) for side in (height, width))
            raise ValueError(
                f"height and width must be multiples of {multiple} for {len(self.down_blocks)} levels, "
                f"got {height} x {width}; the next size that fits is {fit}"
            )


def _down_blocks(
    channels: Sequence[int],
    layers_per_block: int,
    residual: Callable[..., nn.Module],
    attentions: Callable[[int, int], list[nn.Module]],
    downsampler: Callable[[int], nn.Module],
) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for level, width in enumerate(channels):
        inputs = [channels[max(level - 1, 0)]] + [width] * (layers_per_block - 1)
        is_lowest = level == len(channels) - 1
        resnets = [residual(n, width) for n in inputs]
        blocks.append(DownBlock(resnets, attentions(level, len(inputs)), None if is_lowest else downsampler(width)))
    return blocks


def _up_blocks(
    channels: Sequence[int],
    layers_per_block: int,
    residual: Callable[..., nn.Module],
    attentions: Callable[[int, int], list[nn.Module]],
    upsampler: Callable[[int], nn.Module],
) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    below = channels[-1]
    for level, width in reversed(list(enumerate(channels))):
        # The last skip of a level is the map that entered it: as wide as the level above.
        skips = [width] * layers_per_block + [channels[max(level - 1, 0)]]
        inputs = [below] + [width] * layers_per_block
        resnets = [residual(n + skip, width) for n, skip in zip(inputs, skips, strict=True)]
        blocks.append(UpBlock(resnets, attentions(level, len(inputs)), upsampler(width) if level else None))
        below = width
    return blocks


def _initialise(model: nn.Module) -> None:
    """The initialisation of Ho et al.'s code: fan-average uniform weights, zero biases, residuals that end in zeros.

    Every residual block and attention then starts as the identity, and the network predicts 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(cast(Tensor, module.bias))
    for name, module in model.named_modules():
        if name.endswith((".conv2", ".to_out.0")) or name == "conv_out":
            nn.init.zeros_(cast(Tensor, module.weight))


def _check_widths(channels: Sequence[int], attended: set[int], head_channels: int, norm_num_groups: int) -> None:
    if not channels:
        raise ValueError("channels must hold the width of at least one level, got none")
    if channels[0] % 2:
        raise ValueError(f"channels[0] must be even, as half of the timestep embedding is sines, got {channels[0]}")
    for width in channels:
        if width % norm_num_groups:
            raise ValueError(
                f"every width in channels must be a multiple of norm_num_groups {norm_num_groups}, got {width}; "
                f"change the width, or use norm_num_groups {math.gcd(norm_num_groups, *channels)}"
            )
    for level in sorted(attended):
        if not 0 <= level < len(channels):
            raise ValueError(f"attention_levels must be in [0, {len(channels)}), got {level}")
        if channels[level] % head_channels:
            raise ValueError(
                f"every width with attention must be a multiple of head_channels {head_channels}, got {channels[level]}"
            )
