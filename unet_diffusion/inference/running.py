"""The device, precision and speed of a trained network."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from torch import nn

from unet_diffusion.models.speed import Speed, keep_freed_memory, set_speed, speed_for_use
from unet_diffusion.runtime.precision import Precision, autocast, chosen_precision
from unet_diffusion.runtime.processes import own_device


class Running:
    """Base class of trained models: `to` sets their device, precision and speed.

    A loaded model runs on the CPU in float32 until `to` is called.

    Attributes:
        device: The device of the model.
        precision: The precision of computation; None: that of the weights, or of the surrounding autocast.
    """

    device = torch.device("cpu")
    precision: Precision | None = None

    def to(
        self,
        device: torch.device | str = "auto",
        *,
        precision: Precision | Literal["auto"] = "auto",
        speed: Speed | None = None,
    ) -> Self:
        """The model itself, moved to a device.

        Args:
            device: A device such as "cuda", "cuda:1", "mps" or "cpu"; "auto": a GPU, if there is one.
            precision: Precision of computation; "auto": 16 bits if the hardware supports it, otherwise float32.
            speed: Speed of the network, see `models.speed`; None: as in training, but without torch.compile.

        Raises:
            ValueError: If there is no such device, or it does not support the precision.
        """
        self.device = torch.device(own_device(str(device)))
        self.precision = chosen_precision(precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        for module in self._modules_to_move():
            module.to(self.device)
        for network, trained_at in self._networks():
            set_speed(network, speed or speed_for_use(trained_at, self.device))
        return self

    def _context(self) -> AbstractContextManager[Any]:
        """The autocast context for the precision."""
        return nullcontext() if self.precision is None else autocast(self.device.type, getattr(torch, self.precision))

    def _modules_to_move(self) -> list[nn.Module]:
        raise NotImplementedError(f"{type(self).__name__} must define _modules_to_move()")

    def _networks(self) -> list[tuple[nn.Module, Speed]]:
        """The networks that have a speed, each with the speed of its training."""
        return []
