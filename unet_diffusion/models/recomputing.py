"""Gradient checkpointing (Chen et al. 2016, https://arxiv.org/abs/1604.06174): less memory for more computation.

A block keeps its input alone for the backward pass, which computes everything inside the block again. Gradients are the
same, dropout included, because the second computation draws the random numbers of the first.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # of one process, or of all together
from torch.utils.checkpoint import checkpoint


class RecomputedBlock(nn.Module):
    """The base class of blocks that a backward pass can compute again, once `recompute_blocks` has said so."""

    recomputes = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.recomputes and torch.is_grad_enabled()):
            return super().__call__(*args, **kwargs)
        # A compiler sees both computations as one graph, in which the statistics move once.
        options: Any = {} if torch.compiler.is_compiling() else {"context_fn": lambda: (nullcontext(), _at_rest(self))}
        return checkpoint(super().__call__, *args, use_reentrant=False, **options, **kwargs)


def recompute_blocks(network: nn.Module) -> None:
    """Have all blocks of a network keep their inputs alone for the backward pass, in place."""
    for module in network.modules():
        if isinstance(module, RecomputedBlock):
            module.recomputes = True


@contextmanager
def _at_rest(block: nn.Module) -> Iterator[None]:
    """A context in which batch norms do not move their running statistics, which the first computation has moved."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
