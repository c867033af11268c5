"""Where and how a trained network runs: device, precision and speed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from torch import nn

from unet_diffusion.models.speed import Speed, keep_freed_memory, set_speed, speed_for_use
from unet_diffusion.runtime.precision import Precision, autocast, chosen_precision
from unet_diffusion.runtime.processes import own_device


class Running:
    """What trained models have in common: they run on a device, in a precision, at a speed.

    A model that was loaded runs on the CPU in float32 until `to` says otherwise.

    Attributes:
        device: Where it is.
        precision: What it computes in; None: its weights' own, or what the context around it says.
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
        """Run on a device from now on; gives the model itself.

        Args:
            device: A device such as "cuda", "cuda:1", "mps" or "cpu"; "auto": a GPU, if there is one.
            precision: What the network computes in; "auto": 16 bits where the hardware has them, else float32.
            speed: How the network runs, see `models.speed`; None: as in training, but nothing is compiled as a whole.

        Raises:
            ValueError: If there is no such device, or it does not have the precision.
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
        """The context in which the network computes in the precision."""
        return nullcontext() if self.precision is None else autocast(self.device.type, getattr(torch, self.precision))

    def _modules_to_move(self) -> list[nn.Module]:
        raise NotImplementedError(f"{type(self).__name__} must define _modules_to_move()")

    def _networks(self) -> list[tuple[nn.Module, Speed]]:
        """The networks that have a speed, and the speed that each was trained at."""
        return []
