"""Networks that get their weights from a file: drawing random ones for them first takes most of the time of loading."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

# Names of methods of tensors and of functions of `torch.nn.init`, for which transformers has some of its own.
DRAWS = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_",
         "xavier_normal_")  # fmt: skip


class WithoutInitialWeights(TorchFunctionMode):
    """A context in which parameters are not filled with random numbers; a strict load must give all of them values.

    It suits networks of this package and of libraries alone. A class of a user's own may compute buffers from its first
    weights, or from random numbers that are others once the weights are not drawn before them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        filled = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", None) in DRAWS and isinstance(filled, nn.Parameter):
            return filled
        return func(*args, **(kwargs or {}))


def without_initial_weights(allow: Sequence[str]) -> AbstractContextManager[Any]:
    """Return `WithoutInitialWeights`, or a context that changes nothing where classes of a user's own may be built.

    Args:
        allow: The modules of these classes.
    """
    return nullcontext() if allow else WithoutInitialWeights()
