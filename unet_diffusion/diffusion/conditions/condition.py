"""Conditions: what is known of an image, and all that concerns it, in one class a kind.

One algebra for all of them (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.3): a condition reads an
entry of a batch and gives an argument of the network, which adds it to the time embedding ("labels", "vector"), attends
to it ("context") or has it beside the noised image ("concat"). Each has a null, which stands for "not known", and a
dropout of its own; several conditions that give the same argument are joined.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unet_diffusion.models.unet import check_config

Inputs = Mapping[str, Tensor]
"""Arguments of a network beside x and t, (B, ...) each: any of "labels", "context", "vector" and "concat"."""

Encode = Callable[[Tensor], Tensor]
"""encode(images): the x0 of images (B, C, H, W) in [-1, 1]: their normalised latents, or the images themselves."""

CONDITION_KEY = 2  # keeps what conditions draw apart from noise, which has the same seed
WIDTHS = {"context": "context_dim", "concat": "channels"}  # arguments of conditions, by what they give the network
JOINED_ALONG = {"context": 1, "vector": 1, "concat": 1}  # dimension: tokens, or channels


@dataclass(frozen=True)
class Request:
    """What a user asks for, as conditions see it.

    Args:
        num_images: N, how many images.
        seed: Seed of the images.
        values: What the user gave, by the name of the option: labels, ...
        class_names: The name of each class; None: there are no names.
        image: The given image, (1, C, H, W) in [-1, 1]; None: there is none.
        mask: Where to paint into it, (1, 1, H, W) float32, 1 where, 0 elsewhere; None: there is none.
        encode: Gives the x0 of images.
    """

    num_images: int
    seed: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    encode: Encode = lambda images: images  # pixels


class Condition(nn.Module):
    """Something known of an image, and the argument of the network that it becomes.

    A kind of your own is a subclass in a file of your own that the configuration names. It defines `batch_key`,
    `network_argument`, `config`, `forward`, `null`, `example` and, to be sampled with, `options` and `from_user`. It is
    called with its entry of a batch, (B, ...), and gives the network's argument, (B, ...).

    Args:
        dropout: Probability of the null in training; 0: there is no null, and no guidance.

    Attributes:
        batch_key: Entry of a batch that it reads.
        network_argument: Argument of the network that it gives.
        config: Arguments that build it again, as plain values.
        provides: Entries of a batch that it makes itself, of the images; the data need not have them.
        options: What a user gives to draw with it: keywords of `Denoiser.sample`, options of the command.
        needs: Those of its options, and of "image" and "mask", without which it cannot draw.
        refuses: Options that make no sense beside it.
        purpose: What a denoiser with it does, in an error: "... as this denoiser paints into an image".
        pipeline_role: What it is in an exported pipeline, see `diffusers_io`; None: no pipeline knows it.

    Raises:
        ValueError: If dropout is not in [0, 1).
    """

    batch_key: str
    network_argument: str
    config: dict[str, Any]
    provides: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[tuple[str, ...]] = ()
    purpose: ClassVar[str] = "was trained on them"
    pipeline_role: ClassVar[str | None] = None

    def __init__(self, dropout: float):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"the dropout of a condition must be in [0, 1), got {dropout}; 0.1 is usual")
        self.dropout = dropout

    @property
    def num_classes(self) -> int:
        """Classes to choose from, of a condition that reads "labels"."""
        return 0

    @property
    def has_null(self) -> bool:
        """Whether the network was trained without this condition, too."""
        return self.dropout > 0

    def null(self, entry: Tensor) -> Tensor:
        """The entry of images of which this is not known, of the shape of `entry`."""
        raise NotImplementedError(f"{type(self).__name__} must define null()")

    def drop(self, entry: Tensor, generator: torch.Generator) -> Tensor:
        """The entry of a batch, (B, ...), with the null in place of each image's with probability dropout.

        Args:
            entry: What the batch holds.
            generator: Draws the choice: B numbers, or none if dropout is 0.
        """
        if self.dropout == 0:
            return entry
        chosen = torch.rand(len(entry), generator=generator, device=generator.device, dtype=torch.float32)
        is_dropped = (chosen < self.dropout).to(entry.device).view(-1, *[1] * (entry.ndim - 1))
        return torch.where(is_dropped, self.null(entry), entry)

    def example(self, batch_size: int, sample_shape: tuple[int, int, int]) -> Tensor:
        """An entry of a batch of any images, (B, ...) on the CPU, to time and to trace the network with.

        Args:
            batch_size: B.
            sample_shape: (C, h, w) of what is denoised.
        """
        raise NotImplementedError(f"{type(self).__name__} must define example()")

    def check_config(self) -> None:
        """Check that a checkpoint can build the condition again, and that its width is known.

        Raises:
            ValueError: If `config` does not hold its constructor's arguments, or lacks the width of what it gives.
        """
        check_config(self)
        width = WIDTHS.get(self.network_argument)
        if width is not None and width not in self.config:
            raise ValueError(f"{type(self).__name__} gives the network {self.network_argument!r}, and must have an "
                             f"argument {width} that says how wide it is")  # fmt: skip

    # ------------------------------------------------------------------------------------------------- data

    def bind_data(self, datamodule: Any) -> None:
        """Take from the data what it needs to know of them before training, and refuse data that do not fit.

        By default, data that say what batches hold are refused if that is not what `read` takes.

        Args:
            datamodule: The data, set up.

        Raises:
            ValueError: If the data lack what this condition reads.
        """
        entries = getattr(datamodule, "entries", None)
        is_made = self.batch_key in ("images", "index", "x0", *self.provides)  # whatever the data know
        if entries is None or is_made or type(self).read is not Condition.read:
            return
        if not isinstance(entries.get(self.batch_key), Tensor):
            known = [key if isinstance(rows, Tensor) else f"{key} (texts)" for key, rows in entries.items()]
            raise ValueError(
                f"the data must give numbers as {self.batch_key!r}, which the condition {type(self).__name__} reads, "
                f"and give {', '.join(known) or 'images alone'}; let the items of the source hold it, define read(), "
                "or remove the condition"
            )

    def bind_sample_shape(self, sample_shape: tuple[int, int, int]) -> None:
        """Take note of the shape (C, h, w) of what is denoised, before training."""

    def copy_learned(self, other: "Condition") -> None:
        """Take over what another condition of this kind learned from the data, such as a tokenizer."""

    def notes(self) -> list[str]:
        """What a user should know of the data as this condition reads them, a line each; said before training."""
        return []

    def read(self, batch: Mapping[str, Any]) -> Tensor:
        """Its entry of a batch of the data, (B, ...).

        Raises:
            ValueError: If the batch has no such entry.
        """
        if self.batch_key not in batch:
            raise ValueError(
                f"a batch must hold {self.batch_key!r}, which the condition {type(self).__name__} reads, and holds "
                f"{', '.join(map(str, batch)) or 'nothing'}; let the data give it, or remove the condition"
            )
        return batch[self.batch_key]

    def draw(self, shape: torch.Size, generator: torch.Generator) -> dict[str, Tensor]:
        """What is random in the entries that it provides, (B, ...) each, on the generator's device.

        Args:
            shape: (B, C, H, W) of the images.
            generator: Draws the numbers.
        """
        return {}

    def entries(self, images: Tensor, drawn: Mapping[str, Tensor], encode: Encode) -> dict[str, Tensor]:
        """The entries of a batch that it provides.

        Args:
            images: (B, C, H, W) in [-1, 1].
            drawn: What `draw` gave.
            encode: Gives the x0 of images.
        """
        return {}

    def seen(self, images: Tensor, entries: Mapping[str, Tensor]) -> Tensor | None:
        """What the network is shown of images, as images of the same size to look at; None: nothing to look at.

        Args:
            images: (B, C, H, W) in [-1, 1].
            entries: What `draw` and `entries` gave.
        """
        return None

    def meaning(self) -> Any:
        """What decides what its entries mean, as plain values: two conditions with the same can share them."""
        return None

    # ------------------------------------------------------------------------------------------------- users

    @property
    def is_asked_of_images(self) -> bool:
        """Whether only images of the data say what it reads, and no words or names of a user."""
        return bool(self.provides) or type(self).from_user is Condition.from_user

    def values_of(self, indices: Sequence[int]) -> dict[str, Any]:
        """What a user would give to draw images like those of the data, a value an image, by option.

        Args:
            indices: Numbers of N images of the data, after `bind_data`.
        """
        return {}

    def from_user(self, request: Request) -> dict[str, Tensor]:
        """The entries of a batch that a user's request means, (N, ...) each on the CPU, an entry each image by turns.

        Raises:
            ValueError: If a value does not fit; it says what would.
        """
        raise NotImplementedError(f"{type(self).__name__} must define from_user() to draw images")

    # ------------------------------------------------------------------------------------------------- pipelines

    def pipeline_parts(self) -> dict[str, Any]:
        """The parts and settings of an exported pipeline that it becomes, by name."""
        return {}

    @property
    def pipeline_null(self) -> Any:
        """What an exported pipeline takes for "not known"."""
        return None

    def pipeline_outputs(self, pipeline: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """What it and an exported pipeline that was loaded again make of the same, to be compared, by name."""
        return {}


def by_turns(values: Tensor, count: int) -> Tensor:
    """The values, (n, ...), one after the other and again, (count, ...)."""
    return values[torch.arange(count) % len(values)]


def network_inputs(
    conditions: Iterable[Condition], batch: Mapping[str, Tensor], *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """What the network is called with beside x and t, for a batch.

    Args:
        conditions: The conditions; what several of them give for one argument is joined in their order.
        batch: What the batch holds, (B, ...) each.
        generator: In training, drops each condition of each image by its own probability; None: all are kept.

    Raises:
        ValueError: If the batch lacks an entry.
    """
    inputs: dict[str, Tensor] = {}
    for condition in conditions:
        entry = condition.read(batch)
        value = condition(entry if generator is None else condition.drop(entry, generator))
        name = condition.network_argument
        inputs[name] = torch.cat([inputs[name], value], dim=JOINED_ALONG[name]) if name in inputs else value
    return inputs


def unconditional_inputs(conditions: Iterable[Condition], batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """As `network_inputs`, with the null for each condition that has one; None if none has."""
    conditions = list(conditions)
    if not any(one.has_null for one in conditions):
        return None
    return network_inputs([_Nulled(one) if one.has_null else one for one in conditions], batch)


class _Nulled(Condition):
    """A condition of which nothing is known, whatever a batch holds."""

    def __init__(self, condition: Condition):
        super().__init__(0.0)
        self.condition = condition
        self.batch_key, self.network_argument = condition.batch_key, condition.network_argument

    def forward(self, entry: Tensor) -> Tensor:
        return self.condition(self.condition.null(entry))
