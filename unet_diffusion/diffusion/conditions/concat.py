"""Maps of the size of x0, which the network takes as channels beside the noised image."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Condition, Encode, mirrored_like_images


class Concat(Condition):
    """Maps of the size of x0, (B, channels, h, w), as further channels of the network's input; the null is 0.

    The network's in_channels includes them. The data must hold them as the entry "concat" of a batch.

    Args:
        channels: Number of channels of the maps.
        dropout: Probability of the null in training; 0: there is no null.
    """

    batch_key = network_argument = "concat"
    pipeline_role = "concat"

    def __init__(self, channels: int, *, dropout: float = 0.0):
        super().__init__(dropout)
        self.channels = channels
        self.config = {"channels": channels, "dropout": dropout}

    def bind_data(self, datamodule: Any) -> None:
        if self.batch_key not in self.provides:
            self.numbers_of(datamodule)

    def read(self, batch: Mapping[str, Any], encode: Encode = lambda images: images) -> Tensor:
        maps = super().read(batch)
        return maps if self.provides else mirrored_like_images(batch, maps, maps.flip(-1))

    def null(self, entry: Tensor) -> Tensor:
        return torch.zeros_like(entry)

    def forward(self, entry: Tensor) -> Tensor:
        if entry.shape[1] != self.channels:
            raise ValueError(f"{self.batch_key} must have {self.channels} channels, got {entry.shape[1]}")
        return entry

    def example(self, batch_size: int, sample_shape: tuple[int, int, int]) -> Tensor:
        return torch.zeros(batch_size, self.channels, *sample_shape[1:])

    @property
    def pipeline_null(self) -> Any:
        return 0.0
