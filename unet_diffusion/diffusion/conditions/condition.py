"""Conditions: knowledge about an image, such as its class or caption, with one class for each kind.

All follow one scheme (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.3): a condition reads an entry
of a batch and gives an argument of the network. The network adds it to the time embedding ("labels", "vector"), attends
to it ("context") or concatenates it with the noised image ("concat"). Each condition has its own dropout and its own
null, which stands for "not known". Conditions that give the same argument are joined.
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
"""encode(images) gives the x0 of images (B, C, H, W) in [-1, 1]: their normalised latents, or the images themselves."""

ReadImages = Callable[[str, Any, tuple[int, int, int]], Tensor]
"""read(name, value, shape) gives the files, folders or images in memory of a user's value for an option, scaled and
cropped to a shape (C, H, W). Pictures are (n, C, H, W) in [-1, 1], and label images whole numbers (n, 1, H, W)."""


CONDITION_KEY = 2  # keeps the random numbers of conditions apart from noise of the same seed
WIDTHS = {"context": "context_dim", "concat": "channels"}  # network argument -> the condition's argument for its width
JOINED_ALONG = {"context": 1, "vector": 1, "concat": 1}  # network argument -> dimension of tokens or channels


@dataclass(frozen=True)
class Request:
    """A user's request for images, as conditions see it.

    Args:
        num_images: N, the number of images.
        seed: Seed of the images.
        values: The user's values by the name of the option, such as labels.
        class_names: The name of each class; None: there are no names.
        image: The user's image, (1, C, H, W) in [-1, 1]; None: there is no image.
        mask: The area to paint, (1, 1, H, W) float32, 1 inside and 0 outside; None: there is no mask.
        encode: Function that gives the x0 of images.
        image_shape: (C, H, W) of the images to draw; None: they are those of a batch.
        sample_size: Height and width of the x0 to draw.
        read_pictures: Function that reads pictures.
        read_label_images: Function that reads label images.
    """

    num_images: int
    seed: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    encode: Encode = lambda images: images  # pixels
    image_shape: tuple[int, int, int] | None = None
    sample_size: tuple[int, int] = (0, 0)
    read_pictures: ReadImages | None = None
    read_label_images: ReadImages | None = None


class Condition(nn.Module):
    """A kind of knowledge about an image: a module that turns its entry of a batch into an argument of the network.

    For a new kind, write a subclass in a file of your own and name it in the configuration. Define `batch_key`,
    `network_argument`, `config`, `forward`, `null` and `example`, and for sampling `options` and `from_user`. `forward`
    takes the entry, (B, ...), and gives the network's argument, (B, ...).

    Args:
        dropout: Probability of the null in training; 0: there is no null, and no guidance.

    Attributes:
        batch_key: Name of the entry of a batch that the condition reads.
        network_argument: Name of the argument of the network that the condition gives.
        config: The constructor's arguments as plain values, from which a checkpoint builds the condition.
        provides: Names of the entries that the condition makes from the images; the data need not hold them.
        options: Names of the values that a user may give: keywords of `Denoiser.sample` and options of the command.
        needs: Those of `options`, "image" and "mask" that sampling requires.
        files: Those of `options` that are files, or folders of them.
        refuses: Options that make no sense together with the condition.
        scale_factor: Height of x0 divided by that of a small image to enlarge, which a user gives.
        purpose: Verb phrase for errors, as in "this denoiser paints into an image; give image and mask".
        pipeline_role: Name of the role in an exported pipeline, see `diffusers_io`; None: no pipeline takes it.

    Raises:
        ValueError: If dropout is not in [0, 1).
    """

    batch_key: str
    network_argument: str
    config: dict[str, Any]
    provides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    scale_factor: int = 1
    purpose: ClassVar[str] = "has conditions of its own"
    pipeline_role: ClassVar[str | None] = None

    def __init__(self, dropout: float):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"the dropout of a condition must be in [0, 1), got {dropout}; 0.1 is usual")
        self.dropout = dropout

    @property
    def network_arguments(self) -> tuple[str, ...]:
        """Names of all arguments of the network that `forward` gives: of several, it returns a dict."""
        return (self.network_argument,)

    @property
    def num_classes(self) -> int:
        """The number of classes to choose from, for a condition that reads "labels"."""
        return 0

    @property
    def has_null(self) -> bool:
        """Whether the network was also trained without this condition."""
        return self.dropout > 0

    def null(self, entry: Tensor) -> Tensor:
        """The entry that stands for "not known", of the shape of `entry`."""
        raise NotImplementedError(f"{type(self).__name__} must define null()")

    def drop(self, entry: Tensor, generator: torch.Generator) -> Tensor:
        """The entry, (B, ...), with the null in place of each image's value with probability `dropout`.

        Args:
            entry: The entry of a batch.
            generator: Generator of the choice, which takes B numbers, or none if dropout is 0.
        """
        if self.dropout == 0:
            return entry
        chosen = torch.rand(len(entry), generator=generator, device=generator.device, dtype=torch.float32)
        is_dropped = (chosen < self.dropout).to(entry.device).view(-1, *[1] * (entry.ndim - 1))
        return torch.where(is_dropped, self.null(entry), entry)

    def example(self, batch_size: int, sample_shape: tuple[int, int, int]) -> Tensor:
        """A valid entry for any images, (B, ...) on the CPU, to time and to trace the network with.

        Args:
            batch_size: B.
            sample_shape: (C, h, w) of x0.
        """
        raise NotImplementedError(f"{type(self).__name__} must define example()")

    def check_config(self) -> None:
        """Check that a checkpoint can build the condition again, and that its width is known.

        Raises:
            ValueError: If `config` does not hold the constructor's arguments, or lacks the width.
        """
        check_config(self)
        width = WIDTHS.get(self.network_argument)
        if width is not None and width not in self.config:
            raise ValueError(f"{type(self).__name__} gives the network {self.network_argument!r} and must have its "
                             f"width as an argument {width}")  # fmt: skip

    # ------------------------------------------------------------------------------------------------- data

    def bind_data(self, datamodule: Any) -> None:
        """Learn from the data before training, and refuse data that do not fit.

        By default, data that say what batches hold are refused if that is not what `read` takes.

        Args:
            datamodule: The data, set up.

        Raises:
            ValueError: If the data lack the entry that this condition reads.
        """
        is_made = self.batch_key in ("images", "index", "x0", *self.provides)  # whatever the data know
        if not is_made and type(self).read is Condition.read:
            self.numbers_of(datamodule)

    def numbers_of(self, datamodule: Any) -> Tensor | None:
        """The entry of all images of the data, (N, ...); None if the data do not say what batches hold.

        Raises:
            ValueError: If the data do not hold the entry, or hold texts.
        """
        entries = getattr(datamodule, "entries", None)
        if entries is None:
            return None
        rows = entries.get(self.batch_key)
        if not isinstance(rows, Tensor):
            known = [key if isinstance(rows, Tensor) else f"{key} (texts)" for key, rows in entries.items()]
            raise ValueError(
                f"the data must give numbers as {self.batch_key!r}, which the condition {type(self).__name__} reads, "
                f"and give {', '.join(known) or 'images alone'}; {self._how_to_give(datamodule)}, or remove the "
                "condition"
            )
        return rows

    def _how_to_give(self, datamodule: Any) -> str:
        source = getattr(datamodule, "source", None)
        if hasattr(source, self.batch_key):
            return f"set data.{self.batch_key}"
        if source is None or hasattr(source, "__getitem__"):  # of one's own
            return "let the items of the source hold it, define read()"
        return (f"{type(source).__name__} has none: train on the folder of the images with data.{self.batch_key}, if "
                "it is an option there, or on its latents")  # fmt: skip

    def bind_sample_shape(self, sample_shape: tuple[int, int, int]) -> None:
        """Take note of the shape (C, h, w) of x0, before training."""

    def copy_learned(self, other: "Condition") -> None:
        """Copy everything that another condition of this kind learned from the data, such as a tokenizer."""

    def notes(self) -> list[str]:
        """Lines about the data for the user, printed before training, such as how many captions were cut."""
        return []

    def read(self, batch: Mapping[str, Any], encode: Encode = lambda images: images) -> Tensor:
        """The condition's entry of a batch, (B, ...).

        Args:
            batch: A batch of the data. Images that it holds mirrored are those where its "is_mirrored" (B,) is True.
            encode: Function that gives the x0 of images: the mean, where a codec draws in training.

        Raises:
            ValueError: If the batch has no such entry.
        """
        if self.batch_key not in batch:
            raise ValueError(
                f"a batch must hold {self.batch_key!r}, which the condition {type(self).__name__} reads, and holds "
                f"{', '.join(map(str, batch)) or 'nothing'}; add it to the data, or remove the condition"
            )
        return batch[self.batch_key]

    def draw(self, shape: torch.Size, generator: torch.Generator) -> dict[str, Tensor]:
        """The random numbers behind the provided entries, (B, ...) each, on the generator's device.

        Args:
            shape: (B, C, H, W) of the images.
            generator: Generator of the numbers.
        """
        return {}

    def entries(self, images: Tensor, drawn: Mapping[str, Tensor], encode: Encode) -> dict[str, Tensor]:
        """The entries of a batch that the condition provides, (B, ...) each.

        Args:
            images: Images, (B, C, H, W) in [-1, 1].
            drawn: The random numbers from `draw`.
            encode: Function that gives the x0 of images.
        """
        return {}

    def seen(self, batch: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> Tensor | None:
        """Pictures of the network's view of images, (B, C, H, W); None: there is nothing to look at.

        Args:
            batch: A batch with "images", (B, C, H, W) in [-1, 1].
            entries: The results of `draw`, `entries` and `read`.
        """
        return None

    def meaning(self) -> Any:
        """Plain values that decide the meaning of an entry: conditions with equal values can share entries."""
        return None

    # ------------------------------------------------------------------------------------------------- users

    @property
    def is_asked_of_images(self) -> bool:
        """Whether its entry comes from images of the data or other files, not from a user's words or names."""
        return bool(self.provides) or type(self).from_user is Condition.from_user

    def values_of(self, indices: Sequence[int]) -> dict[str, Any]:
        """The values by option that a user would give to draw images like these images of the data, one an image.

        Args:
            indices: Numbers of N images of the data; `bind_data` must have been called.
        """
        return {}

    def image_names(self, value: Any) -> list[str]:
        """The names of the images that a user's value is about, if it has names other than those of files in a folder.

        Args:
            value: The value of an option of `files`.
        """
        return []

    def from_user(self, request: Request) -> dict[str, Tensor]:
        """The entries for a user's request, (N, ...) each on the CPU; fewer than N values are repeated in turn.

        Raises:
            ValueError: If a value does not fit; the message says which values do.
        """
        raise NotImplementedError(f"{type(self).__name__} must define from_user() to draw images")

    # ------------------------------------------------------------------------------------------------- pipelines

    def pipeline_parts(self) -> dict[str, Any]:
        """The parts and settings that the condition adds to an exported pipeline, by name."""
        return {}

    @property
    def pipeline_null(self) -> Any:
        """The value that stands for "not known" in an exported pipeline."""
        return None

    def pipeline_outputs(self, pipeline: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Outputs for the same input by name, as pairs: of the condition, and of its reloaded exported pipeline."""
        return {}


def mirrored_like_images(batch: Mapping[str, Any], entry: Tensor, mirrored: Tensor) -> Tensor:
    """The entry of a batch, (B, ...), with that of the mirror image where the batch holds an image mirrored.

    Args:
        batch: The batch.
        entry: The entry of the images as they are.
        mirrored: The entry of their mirror images.
    """
    if "is_mirrored" not in batch:
        return entry
    return torch.where(batch["is_mirrored"].view(-1, *[1] * (entry.ndim - 1)), mirrored, entry)


def by_turns(values: Tensor, count: int) -> Tensor:
    """The values, (n, ...), repeated in turn up to `count`, (count, ...)."""
    return values[torch.arange(count) % len(values)]


def network_inputs(
    conditions: Iterable[Condition], batch: Mapping[str, Tensor], *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The network's inputs beside x and t for a batch, (B, ...) each.

    Args:
        conditions: The conditions; those that give the same argument are joined in this order.
        batch: The entries as `read` and `from_user` give them, (B, ...) each, by the conditions' `batch_key`.
        generator: Generator of the dropout in training; None: no dropout.

    Raises:
        ValueError: If the batch lacks an entry.
    """
    inputs: dict[str, Tensor] = {}
    for condition in conditions:
        entry = Condition.read(condition, batch)  # a condition's own read() has read it before
        given = condition(entry if generator is None else condition.drop(entry, generator))
        for name, value in given.items() if isinstance(given, dict) else [(condition.network_argument, given)]:
            inputs[name] = torch.cat([inputs[name], value], dim=JOINED_ALONG[name]) if name in inputs else value
    return inputs


def unconditional_inputs(conditions: Iterable[Condition], batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """As `network_inputs`, with the null of each condition that has one; None if no condition has one."""
    conditions = list(conditions)
    if not any(condition.has_null for condition in conditions):
        return None
    nulled = [_Nulled(condition) if condition.has_null else condition for condition in conditions]
    return network_inputs(nulled, batch)


class _Nulled(Condition):
    """A condition that gives its null for every entry."""

    def __init__(self, condition: Condition):
        super().__init__(0.0)
        self.condition = condition
        self.batch_key, self.network_argument = condition.batch_key, condition.network_argument

    def forward(self, entry: Tensor) -> Tensor:
        return self.condition(self.condition.null(entry))
