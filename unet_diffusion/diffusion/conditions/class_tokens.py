"""The class of an image as a token to attend to."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from unet_diffusion.diffusion.conditions.class_labels import labels_by_turns
from unet_diffusion.diffusion.conditions.condition import Condition, Request


class ClassTokens(Condition):
    """The class of each image, (B,) int64, as one token to attend to, (B, 1, context_dim).

    Args:
        context_dim: Width of a token, which must be the network's context_dim.
        num_classes: The number of classes, without the null.
        dropout: Probability of the null in training; 0: there is no null.
    """

    batch_key, network_argument = "labels", "context"
    options = ("labels",)
    pipeline_role = "class_tokens"

    def __init__(self, context_dim: int, num_classes: int, *, dropout: float = 0.1):
        super().__init__(dropout)
        self.embedding = nn.Embedding(num_classes + 1, context_dim)  # the last row is the null
        self.config = {"context_dim": context_dim, "num_classes": num_classes, "dropout": dropout}

    @property
    def num_classes(self) -> int:
        return int(self.config["num_classes"])

    def null(self, entry: Tensor) -> Tensor:
        return torch.full_like(entry, self.num_classes)

    def forward(self, entry: Tensor) -> Tensor:
        return self.embedding(entry)[:, None]

    def example(self, batch_size: int, sample_shape: tuple[int, int, int]) -> Tensor:
        return torch.zeros(batch_size, dtype=torch.int64)

    def bind_data(self, datamodule: Any) -> None:
        if datamodule.num_classes != self.num_classes:
            raise ValueError(
                f"num_classes of ClassTokens must be {datamodule.num_classes}, as in the data, got {self.num_classes}"
            )

    def meaning(self) -> Any:
        return self.num_classes

    def from_user(self, request: Request) -> dict[str, Tensor]:
        return {"labels": labels_by_turns(request, self.num_classes)}

    def pipeline_parts(self) -> dict[str, Any]:
        from unet_diffusion.diffusion.conditions.class_token_embedding import ClassTokenEmbedding

        embedding = ClassTokenEmbedding(self.config["context_dim"], self.num_classes)
        embedding.load_state_dict(self.state_dict())
        return {"class_tokens": embedding.eval()}

    @property
    def pipeline_null(self) -> Any:
        return self.num_classes

    def pipeline_outputs(self, pipeline: Any) -> dict[str, tuple[Tensor, Tensor]]:
        labels = torch.arange(self.num_classes + 1)
        ours = copy.deepcopy(self).cpu().float()
        return {"tokens of classes": (ours(labels), pipeline.class_tokens(labels))}
