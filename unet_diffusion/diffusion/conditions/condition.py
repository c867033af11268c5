"""Conditions: what is known of an image, dropped in training at times, for guidance.

One algebra for all of them (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, section 3.3): a condition is called
with what a batch holds of it and gives an argument of the network, which adds it to the time embedding ("labels",
"vector"), attends to it ("context") or has it beside the noised image ("concat"). Each has a null, which stands for not
known, and its own dropout; several of one kind are joined.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
"""Arguments of a network beside x and t, (B, ...) each: any of "labels", "context", "vector" and "concat"."""


JOINED_ALONG = {"context": 1, "vector": 1, "concat": 1}  # dimension: tokens, or channels


class Condition(nn.Module):
    """Something known of an image, and the argument of the network that it becomes.

    Called with what a batch holds of it, (B, ...). A subclass defines `forward` and `null`.

    Args:
        dropout: probability of the null in training; 0: there is no null, and no guidance.

    Attributes:
        batch_key: entry of a batch that it is called with.
        network_argument: argument of the network that it gives.
        config: arguments that build it again, plain values.

    Raises:
        ValueError: if dropout is not in [0, 1).
    """

    batch_key: str
    network_argument: str
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
        if condition.batch_key not in given:
            raise ValueError(f"the model is conditioned on {condition.batch_key}, and they are not given")
        one = given[condition.batch_key]
        value, name = (
            condition(one if generator is None else condition.drop(one, generator)),
            condition.network_argument,
        )
        inputs[name] = torch.cat([inputs[name], value], dim=JOINED_ALONG[name]) if name in inputs else value
    return inputs


def unconditional_inputs(conditions: Iterable[Condition], given: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """As `network_inputs`, with the null for each condition that has one; None if none has."""
    conditions = list(conditions)
    if not any(one.has_null for one in conditions):
        return None
    return network_inputs([_Nulled(one) if one.has_null else one for one in conditions], given)


class _Nulled(Condition):
    """A condition of which nothing is known, whatever is given."""

    def __init__(self, condition: Condition):
        super().__init__(0.0)
        self.condition, self.batch_key, self.network_argument = (
            condition,
            condition.batch_key,
            condition.network_argument,
        )

    def forward(self, given: Tensor) -> Tensor:
        return self.condition(self.condition.null(given))
