"""The class of an image, as a label that the network embeds itself."""

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Condition


class ClassLabels(Condition):
    """A class for each image, (B,) int64, that the network itself embeds and adds to the time embedding.

    Args:
        null_label: the class that stands for none; None: there is none.
        dropout: probability of null_label in training.
    """

    batch_key = network_argument = "labels"

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
