"""Conditions: what is known of an image, dropped in training at times, and guidance wrapped around a denoiser.

One algebra for all of them (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.3): a condition is called
with what a batch holds of it and gives an argument of the network, which adds it to the time embedding ("labels",
"vector"), attends to it ("context") or has it beside the noised image ("maps"). Each has a null, which stands for not
known, and its own dropout; several of one kind are joined.

Classifier-free diffusion guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598): a network trained with some
of its conditions replaced by their null predicts with and without them; the difference, amplified, pulls towards the
conditions. As in diffusers, and unlike in the paper, scale 1 is the conditional prediction itself: theirs is 1 + w.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
"""Arguments of a network beside x and t, (B, ...) each: any of "labels", "context", "vector" and "maps"."""

MAX_GUIDANCE = 100.0  # more than that is noise
Denoiser = Callable[..., Tensor]
"""denoiser(x, t, **inputs): the network's prediction (B, C, H, W) for x (B, C, H, W) and t (B,)."""

Predictor = Callable[[Tensor, Tensor], Tensor]
"""predictor(x, t): a denoiser whose conditions are settled, as the sampling loop calls it."""

TINY = 1e-8  # of a standard deviation
JOINED_ALONG = {"context": 1, "vector": 1, "maps": 1}  # dimension: tokens, or channels


class Condition(nn.Module):
    """Something known of an image, and the argument of the network that it becomes.

    Called with what a batch holds of it, (B, ...). A subclass defines `forward` and `null`.

    Args:
        dropout: probability of the null in training; 0: there is no null, and no guidance.

    Attributes:
        given: entry of a batch that it is called with.
        enters: argument of the network that it gives.
        config: arguments that build it again, plain values.

    Raises:
        ValueError: if dropout is not in [0, 1).
    """

    given: str
    enters: str
    config: dict[str, Any]

    def __init__(self, dropout: float):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"the dropout of a condition must be in [0, 1), got {dropout}; 0.1 is usual")
        self.dropout = dropout

    @property
    def has_null(self) -> bool:
        """Whether the network was trained without this, too."""
        return self.dropout > 0

    def null(self, given: Tensor) -> Tensor:
        """What is given for images of which this is not known, of the shape of `given`."""
        raise NotImplementedError(f"{type(self).__name__} must define null()")

    def drop(self, given: Tensor, generator: torch.Generator) -> Tensor:
        """The batch, (B, ...), each image's entry replaced by the null with probability dropout.

        Args:
            given: what the batch holds.
            generator: of the choice; B numbers are drawn from it, or none if dropout is 0.
        """
        if self.dropout == 0:
            return given
        chosen = torch.rand(len(given), generator=generator, device=generator.device, dtype=torch.float32)
        is_dropped = (chosen < self.dropout).to(given.device).view(-1, *[1] * (given.ndim - 1))
        return torch.where(is_dropped, self.null(given), given)


class ClassLabels(Condition):
    """A class for each image, (B,) int64, that the network itself embeds and adds to the time embedding.

    Args:
        null_label: the class that stands for none; None: there is none.
        dropout: probability of null_label in training.
    """

    given = enters = "labels"

    def __init__(self, null_label: int | None, dropout: float = 0.0):
        super().__init__(dropout)
        self.null_label = null_label

    @property
    def has_null(self) -> bool:
        return self.null_label is not None

    def null(self, given: Tensor) -> Tensor:
        assert self.null_label is not None
        return torch.full_like(given, self.null_label)

    def forward(self, given: Tensor) -> Tensor:
        return given


class ClassTokens(Condition):
    """A class for each image, (B,) int64, as one token to attend to, (B, 1, context_dim).

    Args:
        context_dim: as that of the network.
        num_classes: the null not counted.
        dropout: probability of the null in training; 0: there is no null.
    """

    given, enters = "labels", "context"

    def __init__(self, context_dim: int, num_classes: int, *, dropout: float = 0.1):
        super().__init__(dropout)
        self.embedding = nn.Embedding(num_classes + 1, context_dim)  # as published: the null is the last row
        self.config = {"context_dim": context_dim, "num_classes": num_classes, "dropout": dropout}

    def null(self, given: Tensor) -> Tensor:
        return torch.full_like(given, self.config["num_classes"])

    def forward(self, given: Tensor) -> Tensor:
        return self.embedding(given)[:, None]


class Maps(Condition):
    """Maps of an image's size, (B, channels, H, W), that the network has beside the noised image; null is 0.

    The network's in_channels count them.

    Args:
        channels: of the maps.
        dropout: probability of the null in training; 0: there is no null.
    """

    given = enters = "maps"

    def __init__(self, channels: int, *, dropout: float = 0.0):
        super().__init__(dropout)
        self.config = {"channels": channels, "dropout": dropout}

    def null(self, given: Tensor) -> Tensor:
        return torch.zeros_like(given)

    def forward(self, given: Tensor) -> Tensor:
        if given.shape[1] != self.config["channels"]:
            raise ValueError(f"maps must have {self.config['channels']} channels, got {given.shape[1]}")
        return given


def network_inputs(
    conditions: Iterable[Condition], given: Mapping[str, Tensor], *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """What the network is called with beside x and t, for a batch.

    Args:
        conditions: tokens, vectors and maps of several are joined in their order.
        given: what the batch holds, (B, ...) each.
        generator: in training, drops each condition of each image by its own probability; None: all are kept.

    Raises:
        ValueError: if something is not given.
    """
    inputs: dict[str, Tensor] = {}
    for condition in conditions:
        if condition.given not in given:
            raise ValueError(f"the model is conditioned on {condition.given}, and they are not given")
        one = given[condition.given]
        value, name = condition(one if generator is None else condition.drop(one, generator)), condition.enters
        inputs[name] = torch.cat([inputs[name], value], dim=JOINED_ALONG[name]) if name in inputs else value
    return inputs


def null_inputs(conditions: Iterable[Condition], given: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """As `network_inputs`, with the null for each condition that has one; None if none has."""
    conditions = list(conditions)
    if not any(one.has_null for one in conditions):
        return None
    return network_inputs([_Nulled(one) if one.has_null else one for one in conditions], given)


class _Nulled(Condition):
    """A condition of which nothing is known, whatever is given."""

    def __init__(self, condition: Condition):
        super().__init__(0.0)
        self.condition, self.given, self.enters = condition, condition.given, condition.enters

    def forward(self, given: Tensor) -> Tensor:
        return self.condition(self.condition.null(given))


@dataclass(frozen=True)
class Guidance:
    """How far samples are pulled towards their conditions, and where.

    Args:
        scale: 1 is off, 0 ignores the conditions, more than 1 amplifies them.
        rescale: share in [0, 1] by which the prediction gets back the standard deviation that it has without guidance,
            against washed-out or glaring pictures (Lin et al. 2023, https://arxiv.org/abs/2305.08891, section 3.4).
        interval: lowest and highest timestep that is guided; None: all (Kynkäänniemi et al. 2024,
            https://arxiv.org/abs/2404.07724).
        weaker: a worse denoiser, such as an earlier checkpoint of the run, to be led away from with its conditions, in
            place of the same denoiser without conditions (Karras et al. 2024, https://arxiv.org/abs/2406.02507).

    Raises:
        ValueError: if a number is out of range.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[int, int] | None = None
    weaker: Denoiser | None = None

    def __post_init__(self) -> None:
        if not abs(self.scale) <= MAX_GUIDANCE:  # nan neither
            raise ValueError(
                f"the scale of guidance must be at most {MAX_GUIDANCE}, got {self.scale}; 1 to 15 is usual"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"the rescale of guidance must be in [0, 1], got {self.rescale}; 0.7 is usual")
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1]:
            raise ValueError(
                f"the interval of guidance must be two timesteps from low to high, got {self.interval[0]} to "
                f"{self.interval[1]}"
            )


def guide(denoiser: Denoiser, inputs: Inputs, nulls: Inputs | None, guidance: Guidance) -> Predictor:
    """A predictor of worse + scale * (better - worse) for these conditions, float32.

    Both predictions come from one doubled batch, the conditioned half first; from two passes where there is a weaker
    denoiser. Where the scale is 1, or no timestep is in the interval, there is a single pass.

    Args:
        denoiser: called as denoiser(x, t, **inputs).
        inputs: for the batches to come, on the denoiser's device.
        nulls: the same without conditions, or those of the weaker denoiser; None if there are none.
        guidance: how much, and where.

    Raises:
        ValueError: if there is nothing to guide between.
    """
    check_guidance(inputs, nulls, guidance)

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t, **inputs)

    if guidance.scale == 1:
        return plain
    pair = _pair(denoiser, inputs, nulls, guidance.weaker)

    def guided_everywhere(x: Tensor, t: Tensor) -> Tensor:
        better, worse = pair(x, t)
        guided = worse + guidance.scale * (better - worse)
        if guidance.rescale > 0:
            spread, before = (one.std(dim=(1, 2, 3), keepdim=True) for one in (guided, better))
            guided = guided * (1 - guidance.rescale + guidance.rescale * before / spread.clamp(min=TINY))
        return guided

    return guided_everywhere if guidance.interval is None else _within(guidance.interval, guided_everywhere, plain)


def _within(interval: tuple[int, int], inside: Predictor, outside: Predictor) -> Predictor:
    """The one predictor at the timesteps of an interval and the other elsewhere, each called only where it counts."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        is_inside = (t >= interval[0]) & (t <= interval[1])
        at = is_inside.tolist()  # waits for a GPU, which costs less than a doubled batch
        if all(at) or not any(at):
            return (inside if all(at) else outside)(x, t).float()
        return torch.where(is_inside.view(-1, 1, 1, 1), inside(x, t), outside(x, t).float())

    return predict


def check_guidance(inputs: Inputs, nulls: Inputs | None, guidance: Guidance) -> None:
    """Refuses guidance without a pair of predictions to guide between.

    Raises:
        ValueError: if the scale is not 1, and there are no conditions or no null; or if the scale is 1 and something
            else is asked for.
    """
    if guidance.scale == 1:
        if guidance.rescale or guidance.interval or guidance.weaker:
            raise ValueError(
                "guidance is off where guidance_scale is 1; set it to another value, or leave the rest out"
            )
        return
    if guidance.weaker is None and not inputs:
        raise ValueError(f"guidance_scale must be 1 without labels or captions, got {guidance.scale}; give them")
    if nulls is None and inputs:
        raise ValueError(
            f"guidance_scale must be 1 without a null, got {guidance.scale}; "
            "guidance needs a network that was trained with dropout of its labels or captions"
        )


def _pair(
    denoiser: Denoiser, inputs: Inputs, nulls: Inputs | None, weaker: Denoiser | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gives the better and the worse prediction, float32: bfloat16 would round their difference."""
    nulls = nulls or {}
    if weaker is not None:
        return lambda x, t: (denoiser(x, t, **inputs).float(), weaker(x, t, **nulls).float())
    doubled = {name: torch.cat([value, nulls[name]]) for name, value in inputs.items()}

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        better, worse = denoiser(torch.cat([x, x]), torch.cat([t, t]), **doubled).float().chunk(2)
        return better, worse

    return pair
