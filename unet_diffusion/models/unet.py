"""The U: the wiring of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), and the base class of all networks.

`UNet` knows how maps flow down, across and up, and nothing of what is done to them. Two networks fill it:
`SegmentationUNet` with the double convolutions of the paper, `DenoiserUNet` with the residual blocks and attention of
Ho et al. 2020 (https://arxiv.org/abs/2006.11239). Each can do the other's work: given a timestep the first denoises,
and at a fixed timestep the second segments.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class UNet(nn.Module):
    """The wiring: every map made on the way down is a skip connection on the way up.

    Args:
        conv_in: Called `conv_in(x)`; its output is the first skip connection.
        down_blocks: Called `block(x, emb, context)`; each returns the list of its skip connections, the last of which
            flows on.
        mid_block: Called `block(x, emb, context)`.
        up_blocks: Called `block(x, skips, emb, context)`; each takes its own skip connections off the end of the list.
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
        """Return the map at the top of the expanding path, (B, C, H, W), before any head.

        Args:
            x: Images, (B, in_channels, H, W).
            emb: Embedding of timestep and class, (B, D), or None.
            context: Tokens to attend to, (B, L, K), or None.
        """
        skips = [self.conv_in(x)]
        for block in self.down_blocks:
            skips += block(skips[-1], emb, context)
        x = self.mid_block(skips[-1], emb, context)
        for block in self.up_blocks:
            x = block(x, skips, emb, context)
        return x


class PixelNetwork(nn.Module):
    """The base class of every network that is trained, sampled or segmented with: images in, a prediction a pixel out.

    A network of your own needs three things: a constructor that calls `super().__init__()` first, a `config` to build
    it again from a checkpoint, and `forward`. This one denoises images of any size::

        class Stack(PixelNetwork):
            def __init__(self, in_channels: int, width: int = 32):
                super().__init__()
                self.config = {"in_channels": in_channels, "width": width}
                self.time_embedding = TimestepEmbedding(width, width)
                self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
                self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)

            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                h = self.conv_in(x) + self.time_embedding(t)[:, :, None, None]
                return self.conv_out(F.silu(h))

    `forward(x, t, **inputs)` is called with

    - x: Images or latents, (B, in_channels, H, W), of a size that `check_size` accepts.
    - t: Timesteps, (B,), integer or fractional; None for a network without `time_embedding`.
    - labels: Classes, (B,) int64; only for a network with `class_embedding`.
    - the `network_argument` of each condition that the network is trained with, such as `context`, the tokens to attend
      to, (B, L, context_dim), or `concat`, maps of the height and width of x, whose channels count in in_channels.

    It returns the prediction, (B, out_channels, H - 2 margin, W - 2 margin): noise, image or v for a denoiser, class
    scores before the softmax for a segmenter. A denoiser needs a `time_embedding`, a margin of 0, and as many
    out_channels as an image has.

    Attributes:
        config: The constructor's arguments by name, each a plain value: a number, a text, True, False, None, or a list
            or dict of such values. `type(network)(**network.config)` builds the network again. Its entries
            "in_channels", "out_channels", "context_dim" and "vector_dim" say what the network takes and gives; a class
            without an argument `in_channels` defines that attribute, such as `in_channels = 3`.
        time_embedding: The module that embeds timesteps; None for a network without timesteps, which is the default.
        class_embedding: The embedding of classes; None for a network without classes, which is the default.
        margin: Pixels that the output is smaller than the input on each side; 0, the default, keeps the size. With a
            margin, a shift of the input by `size_step` must shift the output alike.
        size_step: Pixels from one valid height or width to the next; 1, the default, takes every size. The smallest
            valid size is one step, unless the class overrides the property `smallest_size`.
    """

    config: dict[str, Any]
    margin: int = 0
    size_step: int = 1

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding: nn.Module | None = None
        self.class_embedding: nn.Embedding | None = None

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.config["in_channels"]

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: the entry "out_channels" of `config`, otherwise in_channels."""
        return self.config.get("out_channels") or self.in_channels

    @property
    def num_class_embeds(self) -> int | None:
        """Rows of the class embedding, including that of the null label; None for a network without classes."""
        return None if self.class_embedding is None else self.class_embedding.num_embeddings

    @property
    def context_dim(self) -> int | None:
        """Length of the tokens that the network attends to; None for a network that attends to none."""
        return self.config.get("context_dim")

    @property
    def vector_dim(self) -> int | None:
        """Length of the vector that the network embeds; None for a network that takes none."""
        return self.config.get("vector_dim")

    @property
    def smallest_size(self) -> int:
        """The least height and width of an input, in pixels; larger ones differ by multiples of `size_step`."""
        return self.size_step

    def next_size(self, at_least: int) -> int:
        """Return the smallest valid height or width of an input that is not less than `at_least` pixels."""
        return self.smallest_size + -(-max(at_least - self.smallest_size, 0) // self.size_step) * self.size_step

    def check_size(self, height: int, width: int) -> None:
        """Check that the network takes an input of a size.

        Raises:
            ValueError: If it does not; the error names the next size that it takes.
        """
        fit = [self.next_size(side) for side in (height, width)]
        if [height, width] != fit:
            smallest, step = self.smallest_size, self.size_step
            rule = f"{smallest} plus a multiple of {step}" if smallest % step else f"multiples of {step}"
            raise ValueError(
                f"height and width must be {rule}, got {height} x {width}; the next size that fits is "
                f"{fit[0]} x {fit[1]}"
            )

    def check_config(self) -> None:
        """Check that a checkpoint can build the network again from `config`.

        Raises:
            ValueError: If `config` is missing, holds other arguments than the constructor takes, holds a value that is
                not plain, or has no "in_channels" and the class does not define `in_channels` either.
        """
        check_config(self)
        if "in_channels" not in self.config and type(self).in_channels is PixelNetwork.in_channels:
            raise ValueError(
                f"{type(self).__name__} must have an argument in_channels, or define the attribute in_channels"
            )

    def embed(self, t: Tensor | None, labels: Tensor | None = None) -> Tensor | None:
        """Return the embedding of timesteps, plus that of labels: (B, D), or None for a network without embeddings.

        Args:
            t: Timesteps, (B,), or None.
            labels: Classes, (B,) int64, or None.

        Raises:
            ValueError: If timesteps or labels are missing, or given to a network without an embedding of them.
        """
        _check_embedded("t", t, "timestep embedding", self.time_embedding)
        _check_embedded("labels", labels, "class embedding", self.class_embedding)
        emb = None if self.time_embedding is None else self.time_embedding(t)
        return emb if self.class_embedding is None else emb + self.class_embedding(labels)


def check_config(part: Any) -> None:
    """Check that a checkpoint can build a network, condition or codec again from its `config`.

    Args:
        part: The network, condition or codec.

    Raises:
        ValueError: If `config` is missing, holds other arguments than the constructor takes, or holds a value that is
            not plain.
    """
    name, config = type(part).__name__, getattr(part, "config", None)
    if not isinstance(config, dict):
        got = "nothing" if config is None else f"a {type(config).__name__}"
        raise ValueError(f"{name} must set self.config to a dict of its constructor's arguments, got {got}")
    arguments = inspect.signature(type(part)).parameters.values()
    names = [one.name for one in arguments if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    takes_others = any(one.kind == one.VAR_KEYWORD for one in arguments)
    missing = [argument for argument in names if argument not in config]
    unknown = [] if takes_others else [key for key in config if key not in names]
    if missing or unknown:
        raise ValueError(
            f"the config of {name} must hold exactly the arguments of its constructor ({', '.join(names)}), got "
            f"{', '.join(map(str, config)) or 'none'}"
        )
    for key, value in config.items():
        if not _is_plain(value):
            raise ValueError(
                f"{key} in the config of {name} must be a plain value (a number, a text, True, False, None, or a "
                f"list or dict of them), got a {type(value).__name__}"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _check_embedded(name: str, value: Tensor | None, what: str, embedding: nn.Module | None) -> None:
    if embedding is None and value is not None:
        raise ValueError(f"the network has no {what}, got {name} of shape {tuple(value.shape)}; leave {name} out")
    if embedding is not None and value is None:
        raise ValueError(f"the network has a {what} and needs {name}, got none")
