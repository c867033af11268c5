"""The U: the wiring of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), and the two networks that fill it.

`UNet` knows how maps flow down, across and up, and nothing of what is done to them. `SegmentationUNet` fills it with
the paper's own convolutions, `DenoiserUNet` with the residual blocks and attention of Ho et al. 2020
(https://arxiv.org/abs/2006.11239) or, where it is given tokens to attend to, with the spatial transformers of Rombach
et al. 2022 (https://arxiv.org/abs/2112.10752); its weights fit diffusers' UNet2DModel and UNet2DConditionModel. Each
can do the other's work: given a timestep the first denoises, and at a fixed timestep the second segments.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from unet_diffusion.models.blocks import (
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
    SpatialTransformer,
    TimestepEmbedding,
    UpBlock,
    UpConvBlock,
    Upsample,
    VectorEmbedding,
)

Padding = Literal["valid", "same"]
Norm = Literal["batch", "group"]

NORM_NUM_GROUPS = 32  # at most, of a SegmentationUNet's group norms (Wu & He 2018)


MOST_LAYERS = 100  # blocks a level; published networks have 4 at most


class UNet(nn.Module):
    """The wiring: every map made on the way down is a skip connection on the way up.

    Args:
        conv_in: called `conv_in(x)`; its output is the first skip.
        down_blocks: called `block(x, emb, context)`; each returns the list of maps that it keeps.
        mid_block: called `block(x, emb, context)`.
        up_blocks: called `block(x, skips, emb, context)`; each takes its own off the end of the list.
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
            x = block(x, skips, emb, context)
        return x


class PixelNetwork(nn.Module):
    """What is trained, sampled and segmented with: images in, a prediction for each pixel out.

    Called `network(x, t, labels)`, timesteps and labels given exactly if it has embeddings for them.

    Attributes:
        config: the constructor's arguments, plain values.
        margin: pixels that the output is smaller than the input on each side; 0 keeps the size.
        smallest_size: least height and width of an input; others are larger by a multiple of `size_step`.
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

    @property
    def size_step(self) -> int:
        """Pixels from one valid height or width to the next."""
        return self.stride

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
        return self.smallest_size + -(-max(at_least - self.smallest_size, 0) // self.size_step) * self.size_step

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if an input of that size does not fit; the error names the next size that does."""
        fit = [self.next_size(side) for side in (height, width)]
        if [height, width] != fit:
            levels = self.stride.bit_length()
            step = self.size_step
            rest = self.smallest_size % step
            rule = f"multiples of {step}" if not rest else f"{self.smallest_size} plus a multiple of {step}"
            raise ValueError(
                f"height and width must be {rule} for {levels} levels, got {height} x {width}; "
                f"the next size that fits is {fit[0]} x {fit[1]}"
            )


class DenoiserUNet(UNet, PixelNetwork):
    """Predicts noise, image or v from a noised image and its timestep.

    The counterpart of diffusers' UNet2DModel; with `context_dim`, of its UNet2DConditionModel.

    Args:
        in_channels: channels of the noised image.
        channels: width of each level, from full resolution down; each level halves height and width.
        out_channels: channels of the prediction; None: as in_channels.
        layers_per_block: residual blocks a level on the way down; one more on the way up.
        attention_levels: indices into channels of the levels with attention; 0 is full resolution.
        head_channels: width of an attention head; None: as num_heads says, or one head.
        num_heads: attention heads, of all levels or of each; needs context_dim.
        mid_attention: attention at the bottom.
        context_dim: length of the tokens to attend to; None: pixels attend to each other only.
        transformer_depth: blocks of each spatial transformer, of all levels or of each; with context_dim.
        linear_projection: of spatial transformers, see there.
        cross_only_levels: levels on which pixels attend to the context only, and not to each other; never at the
            bottom.
        num_class_embeds: rows of the class embedding, a null label included if there is one; None: no classes.
        vector_dim: length of a vector that is embedded and added to the timestep's embedding, such as SDXL's pooled
            text and sizes; None: there is none.
        scale_shift: the embedding scales and shifts a norm, instead of being added.
        resample: "conv" (strided convolution, nearest and convolution) or "resnet" (a residual block that resamples).
        downsample_padding: of the strided convolution; 1, or 0 for DDPM's zeros at the bottom and right only.
        dropout: in the residual blocks; 0 is off.
        norm_num_groups: groups of every group norm; must divide every width.
        norm_eps: added to the variance in every group norm but those of spatial transformers.
        flip_sin_to_cos: cosines before sines in the timestep embedding; False in Ho et al. 2020.
        freq_shift: of the timestep embedding's frequencies; 1 in Ho et al. 2020.

    Raises:
        ValueError: if the widths cannot be divided into groups, heads or sinusoids, a level does not exist, or an
            argument needs context_dim.
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
        num_heads: int | Sequence[int] | None = None,
        mid_attention: bool = True,
        context_dim: int | None = None,
        transformer_depth: int | Sequence[int] = 1,
        linear_projection: bool = False,
        cross_only_levels: Sequence[int] = (),
        num_class_embeds: int | None = None,
        vector_dim: int | None = None,
        scale_shift: bool = False,
        resample: Literal["conv", "resnet"] = "conv",
        downsample_padding: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
    ):
        out_channels = in_channels if out_channels is None else out_channels
        config = {
            "in_channels": in_channels,
            "channels": list(channels),
            "out_channels": out_channels,
            "layers_per_block": layers_per_block,
            "attention_levels": sorted(attention_levels),
            "head_channels": head_channels,
            "num_heads": _plain(num_heads),
            "mid_attention": mid_attention,
            "context_dim": context_dim,
            "transformer_depth": _plain(transformer_depth),
            "linear_projection": linear_projection,
            "cross_only_levels": sorted(cross_only_levels),
            "num_class_embeds": num_class_embeds,
            "vector_dim": vector_dim,
            "scale_shift": scale_shift,
            "resample": resample,
            "downsample_padding": downsample_padding,
            "dropout": dropout,
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "flip_sin_to_cos": flip_sin_to_cos,
            "freq_shift": freq_shift,
        }
        _check_denoiser(config)
        emb_channels = 4 * channels[0]  # Ho et al. 2020, appendix B
        residual = partial(
            ResidualBlock,
            emb_channels=emb_channels,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            scale_shift=scale_shift,
        )
        attention = partial(_attention, config)

        def attentions(level: int, count: int) -> list[nn.Module]:
            make = partial(attention, level) if level in attention_levels else PassThrough
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
                [attention(-1) if mid_attention else PassThrough()],
            ),
            up_blocks=_up_blocks(channels, layers_per_block, residual, attentions, upsampler),
        )
        self.time_embedding = TimestepEmbedding(
            channels[0], emb_channels, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift
        )
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, emb_channels)
        self.add_embedding = None if vector_dim is None else VectorEmbedding(vector_dim, emb_channels)
        self.conv_norm_out = GroupNormSiLU(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_out = Conv3x3(channels[0], out_channels)
        _initialise(self)
        self.config = config
        self.margin, self.smallest_size = 0, self.size_step

    @property
    def size_step(self) -> int:
        """Pixels from one valid height or width to the next.

        Strided convolutions round odd sizes up, and nearest upsampling makes any size: with tokens to attend to every
        size is valid, as in diffusers' UNet2DConditionModel. Its UNet2DModel takes multiples only.
        """
        takes_any = self.config["resample"] == "conv" and self.config["downsample_padding"] == 1
        return 1 if takes_any and self.config["context_dim"] is not None else self.stride

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        context: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        """The prediction, (B, out_channels, H, W).

        Args:
            x: noised images, (B, in_channels less those of maps, H, W), H and W as `next_size` gives them.
            t: timesteps, (B,), integer or fractional.
            labels: classes, (B,) int64 in [0, num_class_embeds); None exactly if the network has no classes.
            context: tokens to attend to, (B, L, context_dim); None exactly if the network attends to none.
            vector: (B, vector_dim); None exactly if the network takes none.
            concat: maps beside x, of its height and width, such as a masked image; None: none.

        Raises:
            ValueError: if the size does not fit, or labels, context, vector or maps are missing, not wanted or of
                another shape.
        """
        self.check_size(*x.shape[-2:])
        x = x if concat is None else torch.cat([x, concat], dim=1)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"the network takes {self.in_channels} channels, maps included, got {x.shape[1]}")
        _check_condition("context", context, None, self.config["context_dim"])
        _check_condition("vector", vector, self.config["vector_dim"])
        emb = self.embed(t, labels)
        emb = emb if self.add_embedding is None else emb + self.add_embedding(vector)
        return self.conv_out(self.conv_norm_out(self.wire(x, emb, context)))


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


def _attention(config: dict[str, Any], level: int) -> nn.Module:
    """One attention of a level, -1 for the bottom, with its input added."""
    width = config["channels"][level]
    norm_num_groups, context_dim = config["norm_num_groups"], config["context_dim"]
    num_heads = _heads(config, level)
    if context_dim is None:
        return SelfAttention(width, num_heads, norm_num_groups=norm_num_groups, norm_eps=config["norm_eps"])
    return SpatialTransformer(
        width,
        num_heads,
        context_dim=context_dim,
        depth=_of_level(config["transformer_depth"], level),
        norm_num_groups=norm_num_groups,
        linear_projection=config["linear_projection"],
        cross_only=level in config["cross_only_levels"],
    )


def _heads(config: dict[str, Any], level: int) -> int:
    if config["num_heads"] is not None:
        return _of_level(config["num_heads"], level)
    width = config["channels"][level]
    return width // (config["head_channels"] or width)


def _of_level(value: int | list[int], level: int) -> int:
    return value if isinstance(value, int) else value[level]


def _plain(value: int | Sequence[int] | None) -> int | list[int] | None:
    return value if value is None or isinstance(value, int) else list(value)


def _initialise(model: nn.Module) -> None:
    """The initialisation of Ho et al.'s code: fan-average uniform weights, zero biases, residuals that end in zeros.

    Every residual block, attention and spatial transformer then starts as the identity, and the network predicts 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    last = [module.to_out[0] for module in model.modules() if isinstance(module, SelfAttention)]
    last += [module.conv2 for module in model.modules() if isinstance(module, ResidualBlock)]
    last += [module.proj_out for module in model.modules() if isinstance(module, SpatialTransformer)]
    for layer in cast(list[nn.Module], [*last, model.conv_out]):
        nn.init.zeros_(cast(Tensor, layer.weight))


def _check_denoiser(config: dict[str, Any]) -> None:
    channels, num_levels = config["channels"], len(config["channels"])
    _check_widths(channels, config["norm_num_groups"])
    if config["resample"] not in ("conv", "resnet"):
        raise ValueError(f"resample must be 'conv' or 'resnet', got {config['resample']!r}")
    if config["downsample_padding"] not in (0, 1):
        raise ValueError(f"downsample_padding must be 0 or 1, got {config['downsample_padding']}")
    if not 1 <= config["layers_per_block"] <= MOST_LAYERS:
        raise ValueError(f"layers_per_block must be from 1 to {MOST_LAYERS}, got {config['layers_per_block']}")
    if not 0 <= config["dropout"] <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {config['dropout']}")
    for name in ("attention_levels", "cross_only_levels"):
        for level in config[name]:
            if not 0 <= level < num_levels:
                raise ValueError(f"{name} must be in [0, {num_levels}), got {level}")
    _check_transformers(config)
    _check_heads(config)


def _check_widths(channels: Sequence[int], norm_num_groups: int) -> None:
    if not channels:
        raise ValueError("channels must hold the width of at least one level, got none")
    if min(*channels, norm_num_groups) < 1:
        raise ValueError(f"channels and norm_num_groups must be at least 1, got {list(channels)} and {norm_num_groups}")
    if channels[0] % 2:
        raise ValueError(f"channels[0] must be even, as half of the timestep embedding is sines, got {channels[0]}")
    for width in channels:
        if width % norm_num_groups:
            raise ValueError(
                f"every width in channels must be a multiple of norm_num_groups {norm_num_groups}, got {width}; "
                f"change the width, or use norm_num_groups {math.gcd(norm_num_groups, *channels)}"
            )


def _check_transformers(config: dict[str, Any]) -> None:
    off: dict[str, Any] = {
        "num_heads": None,
        "transformer_depth": 1,
        "linear_projection": False,
        "cross_only_levels": [],
    }
    set_without = [name for name, value in off.items() if config[name] != value]
    if config["context_dim"] is None and set_without:
        raise ValueError(
            f"{set_without[0]} is of spatial transformers, got {config[set_without[0]]} without context_dim; "
            "set context_dim to the length of a token, or leave it out"
        )
    if config["num_heads"] is not None and config["head_channels"] is not None:
        raise ValueError(
            f"num_heads and head_channels say the same, got {config['num_heads']} and {config['head_channels']}; "
            "leave one out"
        )
    for name in ("num_heads", "transformer_depth"):
        value = 1 if config[name] is None else config[name]
        values = value if isinstance(value, list) else [value] * len(config["channels"])
        if len(values) != len(config["channels"]) or min(values) < 1:
            raise ValueError(
                f"{name} must be a positive number, or {len(config['channels'])}, one a level, got {config[name]}"
            )


def _check_heads(config: dict[str, Any]) -> None:
    bottom = [len(config["channels"]) - 1] if config["mid_attention"] else []
    name = "head_channels" if config["num_heads"] is None else "num_heads"
    for level in {*config["attention_levels"], *bottom}:
        width = config["channels"][level]
        divisor = _of_level(config[name], level) if config[name] else width
        if width % divisor:
            raise ValueError(f"every width with attention must be a multiple of {name} {divisor}, got {width}")


def _check_condition(name: str, value: Tensor | None, *sizes: int | None) -> None:
    """Sizes after the batch: None for any; if the last one is None, the network takes no such condition."""
    length = sizes[-1]
    fits = value is None if length is None else value is not None and value.ndim == len(sizes) + 1
    if not fits or (value is not None and value.shape[-1] != length):
        shape = ", ".join("L" if size is None else str(size) for size in sizes)
        takes = f"takes none, as {name}_dim is None" if length is None else f"takes {name}_dim {length}, (B, {shape}),"
        got = "none" if value is None else f"shape {tuple(value.shape)}"
        raise ValueError(f"the network {takes} for {name}, got {got}")


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
    if min(channels) < 1:
        raise ValueError(f"channels must be at least 1, got {list(channels)}")
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
