"""A class as a token to attend to: what an exported folder has in `class_tokens/`, this file with it."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class ClassTokenEmbedding(ModelMixin, ConfigMixin):
    """A token for each class, (B,) int64 to (B, 1, context_dim).

    Args:
        context_dim: width of a token.
        num_classes: how many classes there are; the row after theirs stands for none.
    """

    @register_to_config
    def __init__(self, context_dim: int, num_classes: int):
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, context_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """The token of each label."""
        return self.embedding(labels)[:, None]
