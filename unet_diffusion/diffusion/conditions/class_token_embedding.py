"""The embedding of classes as tokens; an exported folder has it and this file in `class_tokens/`."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class ClassTokenEmbedding(ModelMixin, ConfigMixin):
    """A token for each label, (B,) int64 to (B, 1, context_dim).

    Args:
        context_dim: Width of a token.
        num_classes: The number of classes; label num_classes stands for no class.
    """

    @register_to_config
    def __init__(self, context_dim: int, num_classes: int):
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, context_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """The token of each label, (B, 1, context_dim)."""
        return self.embedding(labels)[:, None]
