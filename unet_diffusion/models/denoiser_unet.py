"""The denoiser: the U of `unet.py` with the residual blocks and attention of Ho et al. 2020.

Self-attention is that of Ho et al. (https://arxiv.org/abs/2006.11239); a network with tokens to attend to has the
spatial transformers of Rombach et al. 2022 (https://arxiv.org/abs/2112.10752) instead. Its weights fit diffusers'
UNet2DModel and UNet2DConditionModel.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unet_diffusion.models.attention import SelfAttention, SpatialTransformer
from unet_diffusion.models.denoiser_config import check_denoiser_config, num_heads_of, value_of
from unet_diffusion.models.embeddings import TimestepEmbedding, VectorEmbedding
from unet_diffusion.models.layers import Conv3x3, Downsample, GroupNormSiLU, Upsample
from unet_diffusion.models.recomputing import recompute_blocks
from unet_diffusion.models.residual_blocks import DownBlock, MidBlock, PassThrough, ResidualBlock, UpBlock
from unet_diffusion.models.unet import PixelNetwork, UNet


class DenoiserUNet(UNet, PixelNetwork):
    """Predicts noise, image or v from a noised image and its timestep.

    It is the counterpart of diffusers' UNet2DModel, and with `context_dim` of UNet2DConditionModel.

    Args:
        in_channels: Channels of the noised image, including those of maps that are concatenated to it.
        channels: Width of each level, from full resolution down; each further level halves height and width.
        out_channels: Channels of the prediction; None takes in_channels.
        layers_per_block: Residual blocks in a level of the contracting path; the expanding path has one more.
        attention_levels: Indices into channels of the levels with attention; 0 is full resolution.
        head_channels: Width of an attention head; None takes num_heads, or a single head.
        num_heads: Number of attention heads, for all levels or for each; needs context_dim.
        mid_attention: Whether the bottom of the U has attention.
        context_dim: Length of the tokens to attend to; None lets pixels attend to each other only.
        transformer_depth: Blocks of a spatial transformer, for all levels or for each; needs context_dim.
        linear_projection: Whether spatial transformers project with linear layers instead of 1x1 convolutions; needs
            context_dim.
        cross_only_levels: Indices of the levels on which pixels attend to the context only, and not to each other; the
            bottom is never among them.
        num_class_embeds: Rows of the class embedding, including that of the null label; None for no classes.
        vector_dim: Length of a vector that is embedded and added to the timestep's embedding, such as SDXL's pooled
            text and sizes; None for no vector.
        scale_shift: Whether the embedding scales and shifts a norm, instead of being added.
        resample: Kind of resampling: "conv" (strided convolution, and nearest-neighbour doubling with a convolution) or
            "resnet" (a residual block that resamples).
        downsample_padding: Padding of the strided convolution: 1, or 0 for DDPM's zeros at the bottom and right only.
        dropout: Probability of zeroing an activation in the residual blocks; 0 is off.
        norm_num_groups: Groups of every group norm; must divide every width.
        norm_eps: Number added to the variance in every group norm except those of spatial transformers.
        flip_sin_to_cos: Whether cosines come before sines in the timestep embedding; False in Ho et al. 2020.
        freq_shift: Shift of the timestep embedding's frequencies; 1 in Ho et al. 2020.
        gradient_checkpointing: Whether training keeps the inputs of blocks alone and computes the rest again in the
            backward pass: gradients stay the same, memory falls, and a step takes about a third longer.

    Raises:
        ValueError: If the widths cannot be divided into groups, heads or sinusoids, a level does not exist, an argument
            is out of its range, or an argument needs context_dim.
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
        gradient_checkpointing: bool = False,
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
            "gradient_checkpointing": gradient_checkpointing,
        }
        check_denoiser_config(config)
        blocks = _Blocks(config)
        super().__init__(
            Conv3x3(in_channels, channels[0]), blocks.down(), mid_block=blocks.mid(), up_blocks=blocks.up()
        )
        self.time_embedding = TimestepEmbedding(
            channels[0], blocks.emb_channels, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift
        )
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, blocks.emb_channels)
        self.add_embedding = None if vector_dim is None else VectorEmbedding(vector_dim, blocks.emb_channels)
        self.conv_norm_out = GroupNormSiLU(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_out = Conv3x3(channels[0], out_channels)
        _initialise(self)
        if gradient_checkpointing:
            recompute_blocks(self)
        self.config = config
        # Strided convolutions round odd sizes up, and nearest-neighbour upsampling makes any size: with tokens to
        # attend to every size is valid, as in diffusers' UNet2DConditionModel. Its UNet2DModel takes multiples only.
        takes_any = resample == "conv" and downsample_padding == 1
        self.size_step = 1 if takes_any and context_dim is not None else 2 ** (len(channels) - 1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        context: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction, (B, out_channels, H, W).

        Args:
            x: Noised images, (B, in_channels - channels of concat, H, W), of a size that `check_size` accepts.
            t: Timesteps, (B,), integer or fractional.
            labels: Classes, (B,) int64 in [0, num_class_embeds); None exactly if the network has no classes.
            context: Tokens to attend to, (B, L, context_dim); None exactly if the network attends to none.
            vector: Vectors to embed, (B, vector_dim); None exactly if the network takes none.
            concat: Maps of the height and width of x that are concatenated to it, such as a masked image, or None.

        Raises:
            ValueError: If the network does not take the size, or labels, context, vector or concat are missing, not
                wanted or have another shape.
        """
        self.check_size(*x.shape[-2:])
        x = x if concat is None else torch.cat([x, concat], dim=1)
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"the network takes {self.in_channels} channels, those of concat included, got {x.shape[1]}"
            )
        _check_condition("context", context, None, self.config["context_dim"])
        _check_condition("vector", vector, self.config["vector_dim"])
        emb = self.embed(t, labels)
        emb = emb if self.add_embedding is None else emb + self.add_embedding(vector)
        return self.conv_out(self.conv_norm_out(self.wire(x, emb, context)))


class _Blocks:
    """Makes the blocks of a DenoiserUNet.

    Args:
        config: The arguments of the network, checked.
    """

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.channels: list[int] = config["channels"]
        self.layers_per_block: int = config["layers_per_block"]
        self.emb_channels = 4 * self.channels[0]  # Ho et al. 2020, appendix B

    def down(self) -> list[nn.Module]:
        """Return the levels of the contracting path, from full resolution down."""
        blocks: list[nn.Module] = []
        for level, width in enumerate(self.channels):
            inputs = [self.channels[max(level - 1, 0)]] + [width] * (self.layers_per_block - 1)
            is_lowest = level == len(self.channels) - 1
            resnets = [self._residual(n, width) for n in inputs]
            attentions = self._attentions(level, len(inputs))
            blocks.append(DownBlock(resnets, attentions, None if is_lowest else self._downsampler(width)))
        return blocks

    def mid(self) -> nn.Module:
        """Return the bottom of the U."""
        width = self.channels[-1]
        resnets = [self._residual(width, width) for _ in range(2)]
        return MidBlock(resnets, [self._attention(-1) if self.config["mid_attention"] else PassThrough()])

    def up(self) -> list[nn.Module]:
        """Return the levels of the expanding path, from the lowest up."""
        blocks: list[nn.Module] = []
        below = self.channels[-1]
        for level, width in reversed(list(enumerate(self.channels))):
            # The last skip of a level is the map that entered it: it has the width of the level above.
            skips = [width] * self.layers_per_block + [self.channels[max(level - 1, 0)]]
            inputs = [below] + [width] * self.layers_per_block
            resnets = [self._residual(n + skip, width) for n, skip in zip(inputs, skips, strict=True)]
            attentions = self._attentions(level, len(inputs))
            blocks.append(UpBlock(resnets, attentions, self._upsampler(width) if level else None))
            below = width
        return blocks

    def _residual(self, in_channels: int, out_channels: int, resample: nn.Module | None = None) -> nn.Module:
        names = ("dropout", "norm_num_groups", "norm_eps", "scale_shift")
        options = {name: self.config[name] for name in names}
        return ResidualBlock(in_channels, out_channels, emb_channels=self.emb_channels, resample=resample, **options)

    def _attentions(self, level: int, count: int) -> list[nn.Module]:
        has_attention = level in self.config["attention_levels"]
        return [self._attention(level) if has_attention else PassThrough() for _ in range(count)]

    def _attention(self, level: int) -> nn.Module:
        """Return an attention of a level; -1 is the bottom of the U."""
        config, width, num_heads = self.config, self.channels[level], num_heads_of(self.config, level)
        groups = config["norm_num_groups"]
        if config["context_dim"] is None:
            return SelfAttention(width, num_heads, norm_num_groups=groups, norm_eps=config["norm_eps"])
        return SpatialTransformer(
            width,
            num_heads,
            context_dim=config["context_dim"],
            depth=value_of(config["transformer_depth"], level),
            norm_num_groups=groups,
            linear_projection=config["linear_projection"],
            cross_only=level in config["cross_only_levels"],
        )

    def _downsampler(self, width: int) -> nn.Module:
        if self.config["resample"] == "resnet":
            return self._residual(width, width, nn.AvgPool2d(2))
        return Downsample(width, padding=self.config["downsample_padding"])

    def _upsampler(self, width: int) -> nn.Module:
        if self.config["resample"] == "resnet":
            return self._residual(width, width, nn.Upsample(scale_factor=2.0, mode="nearest"))
        return Upsample(width)


def _initialise(model: nn.Module) -> None:
    """Initialise weights like Ho et al.'s code: fan-average uniform, zero biases, zeros in the last layer of residuals.

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


def _plain(value: int | Sequence[int] | None) -> int | list[int] | None:
    return value if value is None or isinstance(value, int) else list(value)


def _check_condition(name: str, value: Tensor | None, *sizes: int | None) -> None:
    """Check the shape of a condition.

    Args:
        name: Name of the argument; the network's argument `{name}_dim` is its length.
        value: The condition, (B, *sizes), or None.
        sizes: Sizes after the batch; None stands for any. If the last one is None, the network takes no such condition.

    Raises:
        ValueError: If the condition is missing, not wanted or has another shape.
    """
    length = sizes[-1]
    if length is None:
        if value is not None:
            raise ValueError(
                f"the network takes no {name}, as its {name}_dim is None, got shape {tuple(value.shape)}; leave {name} "
                "out"
            )
        return
    if value is None or value.ndim != len(sizes) + 1 or value.shape[-1] != length:
        shape = ", ".join("L" if size is None else str(size) for size in sizes)
        got = "none" if value is None else f"shape {tuple(value.shape)}"
        raise ValueError(f"the network has {name}_dim {length} and takes {name} of shape (B, {shape}), got {got}")
