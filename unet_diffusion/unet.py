"""The U: the wiring of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), and the two networks that fill it.

`UNet` knows how maps flow down, across and up, and nothing of what is done to them. `SegmentationUNet` fills it with
the paper's own convolutions, `DenoiserUNet` with the residual blocks and attention of Ho et al. 2020
(https://arxiv.org/abs/2006.11239); the latter's weights fit diffusers' UNet2DModel. Each can do the other's work:
given a timestep the first denoises, and at a fixed timestep the second segments.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from unet_diffusion.blocks import (
    Conv3x3,
    DoubleConv,
    DownBlock,
    Downsample,
    GroupNormSiLU,
    MidBlock,
    PassThrough,
    PooledDoubleConv,
    PooledDownBlock,
    ResidualBlock,
    SelfAttention,
    TimestepEmbedding,
    UpBlock,
    UpConvBlock,
    Upsample,
)

Padding = Literal["valid", "same"]
Norm = Literal["batch", "group"]

NORM_NUM_GROUPS = 32  # at most, of a SegmentationUNet's group norms (Wu & He 2018)


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


class PixelNetwork(nn.Module):
    """What is trained, sampled and segmented with: images in, a prediction for each pixel out.

    Called `network(x, t, labels)`, timesteps and labels given exactly if it has embeddings for them.

    Attributes:
        config: the constructor's arguments, plain values.
        margin: pixels that the output is smaller than the input on each side; 0 keeps the size.
        smallest_size: least height and width of an input; others are larger by a multiple of `stride`.
        time_embedding: None if the network takes no timestep.
        class_embedding: None if it takes no class.
    """

    config: dict[str, Any]
    margin: int
    smallest_size: int
    time_embedding: TimestepEmbedding | None
    class_embedding: nn.Embedding | None

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.config["in_channels"]

    @property
    def stride(self) -> int:
        """Input pixels a pixel of the lowest level; a shift by it shifts the output alike."""
        return 2 ** (len(self.config["channels"]) - 1)

    def embed(self, t: Tensor | None, labels: Tensor | None = None) -> Tensor | None:
        """The embedding of timesteps (B,), plus that of labels (B,) if there are classes: (B, D), or None for neither.

        Raises:
            ValueError: if timesteps or labels are missing or not wanted.
        """
        if (t is None) != (self.time_embedding is None):
            have = "no timestep embedding" if self.time_embedding is None else "a timestep embedding"
            got = "none" if t is None else f"t of shape {tuple(t.shape)}"
            raise ValueError(
                f"t must be given exactly if the network has a timestep embedding: it has {have}, got {got}"
            )
        if (labels is None) != (self.class_embedding is None):
            have = "no classes" if self.class_embedding is None else f"{self.config['num_class_embeds']} classes"
            got = "none" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise ValueError(f"labels must be given exactly if the network has classes: it has {have}, got {got}")
        emb = None if self.time_embedding is None else self.time_embedding(t)
        return emb if self.class_embedding is None else emb + self.class_embedding(labels)

    def next_size(self, at_least: int) -> int:
        """The smallest height or width of an input, in pixels, that is valid and not less than that."""
        return self.smallest_size + -(-max(at_least - self.smallest_size, 0) // self.stride) * self.stride

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if an input of that size does not fit; the error names the next size that does."""
        fit = [self.next_size(side) for side in (height, width)]
        if [height, width] != fit:
            levels = self.stride.bit_length()
            rest = self.smallest_size % self.stride
            rule = (
                f"multiples of {self.stride}" if not rest else f"{self.smallest_size} plus a multiple of {self.stride}"
            )
            raise ValueError(
                f"height and width must be {rule} for {levels} levels, got {height} x {width}; "
                f"the next size that fits is {fit[0]} x {fit[1]}"
            )


class DenoiserUNet(UNet, PixelNetwork):
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

        self.config = {
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
        self.margin, self.smallest_size = 0, self.stride

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
        self.check_size(*x.shape[-2:])
        x = self.wire(x, self.embed(t, labels), context)
        return self.conv_out(self.conv_norm_out(x))


class SegmentationUNet(UNet, PixelNetwork):
    """The network of Ronneberger et al. 2015: class scores of each pixel; given a timestep, also a denoiser.

    `SegmentationUNet(1, 2, dropout=0.5)` is the paper's, with 31,030,658 parameters; it maps 572 x 572 to 388 x 388.

    Args:
        in_channels: channels of the image.
        out_channels: classes; of a denoiser, channels of the prediction.
        channels: width of each level, from full resolution down; each level halves height and width.
        padding: of the 3x3 convolutions. "valid": none, as in the paper; every output pixel has seen real pixels only,
            and is by `margin` further inside. "same": zeros, so that the output is as large as the input.
        norm: after each 3x3 convolution: "batch", "group" or None, as in the paper.
        dropout: at the end of the contracting path, after its last two levels; 0 is off, the paper's code has 0.5.
        timestep_embedding: forward takes timesteps, whose embedding is added within every double convolution but the
            first.
        num_class_embeds: rows of the class embedding, which is added to the timestep's; None: no classes.

    Raises:
        ValueError: if there are fewer than two levels, or an argument is none of its choices.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int] = (64, 128, 256, 512, 1024),
        padding: Padding = "valid",
        norm: Norm | None = None,
        dropout: float = 0.0,
        timestep_embedding: bool = False,
        num_class_embeds: int | None = None,
    ):
        _check_segmentation(channels, padding, norm, timestep_embedding, num_class_embeds)
        emb_channels = 4 * channels[0] if timestep_embedding else None
        first_conv = partial(DoubleConv, padded=padding == "same", make_norm=_norm_maker(norm))
        double_conv = partial(first_conv, emb_channels=emb_channels)
        dropouts = [0.0] * (len(channels) - 2) + [dropout] * 2  # of each level
        super().__init__(
            first_conv(in_channels, channels[0], dropout=dropouts[0]),
            [
                PooledDownBlock(double_conv(above, width, dropout=p))
                for above, width, p in zip(channels[:-2], channels[1:-1], dropouts[1:-1], strict=True)
            ],
            mid_block=PooledDoubleConv(double_conv(channels[-2], channels[-1], dropout=dropouts[-1])),
            up_blocks=[
                UpConvBlock(below, double_conv(2 * width, width)) for width, below in reversed(list(pairwise(channels)))
            ],
        )
        self.time_embedding = TimestepEmbedding(channels[0], emb_channels) if emb_channels else None
        self.class_embedding = (
            nn.Embedding(num_class_embeds, emb_channels) if num_class_embeds and emb_channels else None
        )
        self.conv_out = nn.Conv2d(channels[0], out_channels, 1)
        _initialise_as_2015(self)

        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "padding": padding,
            "norm": norm,
            "dropout": dropout,
            "timestep_embedding": timestep_embedding,
            "num_class_embeds": num_class_embeds,
        }
        self.margin, self.smallest_size = (0, self.stride) if padding == "same" else _valid_geometry(self.stride)

    def forward(
        self, x: Tensor, t: Tensor | None = None, labels: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Class scores (before the softmax) or a denoiser's prediction, (B, out_channels, H - 2 margin, W - 2 margin).

        Args:
            x: images, (B, in_channels, H, W), H and W as `next_size` gives them.
            t: timesteps, (B,); None exactly if there is no timestep embedding.
            labels: classes, (B,) int64; None exactly if there are none.
            context: for blocks that attend to tokens; none of this network's does.

        Raises:
            ValueError: if the size does not fit, or timesteps or labels are missing or not wanted.
        """
        self.check_size(*x.shape[-2:])
        return self.conv_out(self.wire(x, self.embed(t, labels), context))


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


def _valid_geometry(stride: int) -> tuple[int, int]:
    """Margin and smallest input of unpadded double convolutions, in pixels.

    A bottom of b pixels needs an input of stride * b + 4 (stride - 1), as each level above takes 4 pixels off and then
    halves; and it gives stride * (b - 4) - 4 (stride - 1), as each level doubles and then takes 4 off.
    """
    smallest_bottom = 5 + 4 * (stride - 1) // stride  # leaves at least one pixel
    return 6 * stride - 4, stride * smallest_bottom + 4 * (stride - 1)


def _norm_maker(norm: Norm | None) -> Callable[[int], nn.Module]:
    if norm == "batch":
        return nn.BatchNorm2d
    if norm == "group":
        return lambda width: nn.GroupNorm(math.gcd(NORM_NUM_GROUPS, width), width)
    return lambda width: nn.Identity()


def _initialise_as_2015(model: nn.Module) -> None:
    """Weights of standard deviation sqrt(2 / N), N incoming connections a unit (Ronneberger et al. 2015, section 3)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # A pixel of an up-convolution is reached by one of the kernel's four places: N is the channels alone.
            places = 1 if isinstance(module, nn.ConvTranspose2d) else math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / (places * module.in_channels)))
            nn.init.zeros_(cast(Tensor, module.bias))


def _check_segmentation(
    channels: Sequence[int], padding: str, norm: str | None, timestep_embedding: bool, num_class_embeds: int | None
) -> None:
    if len(channels) < 2:
        raise ValueError(f"channels must hold the widths of at least 2 levels, got {list(channels)}")
    if padding not in get_args(Padding):
        raise ValueError(f"padding must be 'valid' or 'same', got {padding!r}")
    if norm is not None and norm not in get_args(Norm):
        raise ValueError(f"norm must be 'batch', 'group' or None, got {norm!r}")
    if num_class_embeds is not None and not timestep_embedding:
        raise ValueError(
            f"num_class_embeds {num_class_embeds} needs a timestep embedding to be added to; set timestep_embedding"
        )
    if timestep_embedding and channels[0] % 2:
        raise ValueError(f"channels[0] must be even, as half of the timestep embedding is sines, got {channels[0]}")
