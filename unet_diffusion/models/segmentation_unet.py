"""The segmenter of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597): the U with double convolutions."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, cast, get_args

from torch import Tensor, nn

from unet_diffusion.models.double_conv import (
    DoubleConv,
    InterpolatedUpBlock,
    PooledDoubleConv,
    PooledDownBlock,
    UpConvBlock,
)
from unet_diffusion.models.embeddings import TimestepEmbedding
from unet_diffusion.models.recomputing import recompute_blocks
from unet_diffusion.models.unet import PixelNetwork, UNet

Padding = Literal["valid", "same"]
Norm = Literal["batch", "group"]
Upsampling = Literal["transposed", "bilinear"]

NORM_NUM_GROUPS = 32  # at most (Wu & He 2018)


class SegmentationUNet(UNet, PixelNetwork):
    """The network of Ronneberger et al. 2015: class scores of each pixel; given a timestep, also a denoiser.

    `SegmentationUNet(1, 2, dropout=0.5)` is the paper's, with 31,030,658 parameters; it maps 572 x 572 to 388 x 388.

    Args:
        in_channels: Channels of the image.
        out_channels: Number of classes; for a denoiser, channels of the prediction.
        channels: Width of each level, from full resolution down; each further level halves height and width.
        padding: Padding of the 3x3 convolutions. "valid" is the paper's and adds nothing: every output pixel has seen
            real pixels only, and the output is smaller by `margin` on each side. "same" adds zeros, so that the output
            has the size of the input.
        norm: Norm after each 3x3 convolution: "batch", "group", or None for none, like the paper.
        dropout: Probability of zeroing an activation at the end of the last two levels of the contracting path; 0 is
            off, the paper's code has 0.5.
        timestep_embedding: Whether forward takes timesteps, whose embedding is added within every double convolution
            except the first.
        num_class_embeds: Rows of the class embedding, which is added to the timestep's; None for no classes.
        upsampling: "transposed" for the paper's up-convolution, or "bilinear" for interpolation, after which the double
            convolution of a level gives the width of the level above; the last two widths must then be equal.
        unit_range: Whether the first convolution sees images in [0, 1]; forward takes them in [-1, 1] either way.
        gradient_checkpointing: Whether training keeps the inputs of blocks alone and computes the rest again in the
            backward pass: gradients stay the same, memory falls, and a step takes about a third longer.

    Raises:
        ValueError: If there are fewer than two levels, or an argument is out of its range.
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
        upsampling: Upsampling = "transposed",
        unit_range: bool = False,
        gradient_checkpointing: bool = False,
    ):
        _check_upsampling(channels, upsampling)
        _check_arguments(channels, padding, norm, timestep_embedding, num_class_embeds)
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
            up_blocks=_up_blocks(channels, upsampling, double_conv),
        )
        if emb_channels is not None:
            self.time_embedding = TimestepEmbedding(channels[0], emb_channels)
            self.class_embedding = nn.Embedding(num_class_embeds, emb_channels) if num_class_embeds else None
        self.conv_out = nn.Conv2d(channels[0], out_channels, 1)
        _initialise(self)
        if gradient_checkpointing:
            recompute_blocks(self)
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "padding": padding,
            "norm": norm,
            "dropout": dropout,
            "timestep_embedding": timestep_embedding,
            "num_class_embeds": num_class_embeds,
            "upsampling": upsampling,
            "unit_range": unit_range,
            "gradient_checkpointing": gradient_checkpointing,
        }
        self.size_step = 2 ** (len(channels) - 1)
        self.margin = 0 if padding == "same" else 6 * self.size_step - 4  # see `smallest_size`

    @property
    def smallest_size(self) -> int:
        """The least height and width of an input, in pixels; larger ones differ by multiples of `size_step`.

        Without padding a bottom of b pixels needs an input of size_step * b + 4 (size_step - 1), as each level above
        takes 4 pixels off and then halves; it gives size_step * (b - 4) - 4 (size_step - 1), as each level doubles and
        then takes 4 off. The difference of the two is twice the margin.
        """
        if self.config["padding"] == "same":
            return self.size_step
        smallest_bottom = 5 + 4 * (self.size_step - 1) // self.size_step  # leaves at least one pixel
        return self.size_step * smallest_bottom + 4 * (self.size_step - 1)

    def forward(self, x: Tensor, t: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return the prediction, (B, out_channels, H - 2 margin, W - 2 margin): scores before the softmax, or noise.

        Args:
            x: Images, (B, in_channels, H, W), of a size that `check_size` accepts.
            t: Timesteps, (B,); None exactly if the network has no timestep embedding.
            labels: Classes, (B,) int64; None exactly if the network has no classes.

        Raises:
            ValueError: If the network does not take the size, or timesteps or labels are missing or not wanted.
        """
        self.check_size(*x.shape[-2:])
        x = (x + 1) / 2 if self.config["unit_range"] else x
        return self.conv_out(self.wire(x, self.embed(t, labels)))


def _up_blocks(
    channels: Sequence[int], upsampling: Upsampling, double_conv: Callable[..., DoubleConv]
) -> Sequence[nn.Module]:
    """The levels of the expanding path, from the lowest up."""
    if upsampling == "transposed":
        return [
            UpConvBlock(below, double_conv(2 * width, width)) for width, below in reversed(list(pairwise(channels)))
        ]
    above = [channels[0], *channels[:-2]]
    return [
        InterpolatedUpBlock(double_conv(2 * width, out, mid_channels=width))
        for width, out in reversed(list(zip(channels[:-1], above, strict=True)))
    ]


def _norm_maker(norm: Norm | None) -> Callable[[int], nn.Module]:
    if norm == "batch":
        return nn.BatchNorm2d
    if norm == "group":
        return lambda width: nn.GroupNorm(math.gcd(NORM_NUM_GROUPS, width), width)
    return lambda width: nn.Identity()


def _initialise(model: nn.Module) -> None:
    """Draw weights of standard deviation sqrt(2 / N), N incoming connections a unit (the paper's section 3)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # A pixel of an up-convolution is reached by one of the kernel's four places: N is the channels alone.
            places = 1 if isinstance(module, nn.ConvTranspose2d) else math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / (places * module.in_channels)))
            nn.init.zeros_(cast(Tensor, module.bias))


def _check_upsampling(channels: Sequence[int], upsampling: str) -> None:
    if upsampling not in get_args(Upsampling):
        raise ValueError(f"upsampling must be 'transposed' or 'bilinear', got {upsampling!r}")
    if upsampling == "bilinear" and len(channels) > 1 and channels[-1] != channels[-2]:
        raise ValueError(f"the last two channels must be equal for bilinear upsampling, got {list(channels)}")


def _check_arguments(
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
