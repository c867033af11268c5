"""The class of an image, as a token to attend to."""

import torch
from torch import Tensor, nn

from unet_diffusion.diffusion.conditions.condition import Condition


class ClassTokens(Condition):
    """A class for each image, (B,) int64, as one token to attend to, (B, 1, context_dim).

    Args:
        context_dim: as that of the network.
        num_classes: the null not counted.
        dropout: probability of the null in training; 0: there is no null.
    """

    batch_key, network_argument = "labels", "context"

    def __init__(self, context_dim: int, num_classes: int, *, dropout: float = 0.1):
        super().__init__(dropout)
        self.embedding = nn.Embedding(num_classes + 1, context_dim)  # as published: the null is the last row
        self.config = {"context_dim": context_dim, "num_classes": num_classes, "dropout": dropout}

    def null(self, given: Tensor) -> Tensor:
        return torch.full_like(given, self.config["num_classes"])

    def forward(self, given: Tensor) -> Tensor:
        return self.embedding(given)[:, None]
