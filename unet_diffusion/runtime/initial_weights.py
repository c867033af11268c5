"""Networks that get their weights from a file: drawing random ones for them first takes most of the time of loading."""

from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

# Names of methods of tensors and of functions of `torch.nn.init`, for which transformers has some of its own.
DRAWS = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_",
         "xavier_normal_")  # fmt: skip


class WithoutInitialWeights(TorchFunctionMode):
    """A context in which parameters are not filled with random numbers; a strict load must give all of them values.

    Buffers and other tensors are drawn as ever, as a state dict need not hold them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        filled = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", None) in DRAWS and isinstance(filled, nn.Parameter):
            return filled
        return func(*args, **(kwargs or {}))
