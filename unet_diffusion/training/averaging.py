"""The exponential moving average (EMA) of weights (Ho et al. 2020, https://arxiv.org/abs/2006.11239, appendix B).

The average is a network of its own, which is what is sampled, validated and exported. The statistics of its batch norms
are computed anew for that, see `batch_norms.py`.
"""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def averaged_copy(network: Network) -> Network:
    """A network for the average of another's weights, equal to them at first; both share the frozen weights."""
    frozen = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, frozen).requires_grad_(False).eval()


class Averages:
    """The tensors that each step averages, found once a run: to look through all modules takes milliseconds.

    Args:
        pairs: Each average, and the network whose weights it follows.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        parameters = [both for ema, raw in pairs for both in zip(ema.parameters(), raw.parameters(), strict=True)]
        self._averaged: list[Tensor] = [ema for ema, parameter in parameters if parameter.requires_grad]
        self._raw: list[Tensor] = [parameter for _, parameter in parameters if parameter.requires_grad]
        self._buffers = [both for ema, raw in pairs for both in zip(ema.buffers(), raw.buffers(), strict=True)]

    def move(self, decay: float) -> None:
        """Move the averages towards the weights.

        Args:
            decay: The share of the average that stays.
        """
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, self._raw, 1 - decay)
            for ema_buffer, buffer in self._buffers:
                ema_buffer.copy_(buffer)  # statistics of batch norms, until `batch_norms.py` computes the average's own

    def restore_statistics(self) -> None:
        """Put back the statistics of batch norms that a forward pass has made infinite; the average has the last."""
        for ema_buffer, buffer in self._buffers:
            if buffer.is_floating_point():
                buffer.copy_(torch.where(torch.isfinite(buffer).all(), buffer, ema_buffer))
