"""The class of an image, as a label that the network embeds itself."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Condition, Request, by_turns

NOISE_LEVEL_ENTRY = "noise_level"  # entry of a batch that a network which enlarges embeds in place of classes


class ClassLabels(Condition):
    """The class of each image, (B,) int64, which the network itself embeds and adds to the time embedding.

    Args:
        num_embeddings: Number of rows of the network's class embedding, with the null label.
        null_label: The label that stands for no class; None: there is no null label.
        dropout: Probability of null_label in training.
        batch_key: Name of the entry of a batch that holds the labels.
    """

    network_argument = "labels"
    options = ("labels",)
    pipeline_role = "class_labels"

    def __init__(self, num_embeddings: int, null_label: int | None, dropout: float = 0.0, *, batch_key: str = "labels"):
        super().__init__(dropout)
        self.num_embeddings, self.null_label, self.batch_key = num_embeddings, null_label, batch_key

    @property
    def num_classes(self) -> int:
        """The number of classes to choose from, without the null label."""
        return self.num_embeddings - (self.null_label is not None)

    @property
    def has_null(self) -> bool:
        return self.null_label is not None

    def null(self, entry: Tensor) -> Tensor:
        assert self.null_label is not None
        return torch.full_like(entry, self.null_label)

    def forward(self, entry: Tensor) -> Tensor:
        return entry

    def example(self, batch_size: int, sample_shape: tuple[int, int, int]) -> Tensor:
        return torch.zeros(batch_size, dtype=torch.int64)

    def bind_data(self, datamodule: Any) -> None:
        num_classes, num_null = datamodule.num_classes, int(self.has_null)
        if num_classes is None:
            raise ValueError(
                f"the network has {self.num_embeddings} class embeddings and the data have no classes; set "
                "data.class_labels to true, give the items of your own source a label, or set "
                "model.unet.num_class_embeds to null"
            )
        if self.num_embeddings != num_classes + num_null:
            raise ValueError(
                f"num_class_embeds must be {num_classes + num_null} ({num_classes} classes and {num_null} null labels, "
                f"as label_dropout is {self.dropout}), got {self.num_embeddings}"
            )

    def meaning(self) -> Any:
        return self.num_classes

    def from_user(self, request: Request) -> dict[str, Tensor]:
        return {"labels": labels_by_turns(request, self.num_classes)}

    @property
    def pipeline_null(self) -> Any:
        return self.null_label


def labels_by_turns(request: Request, num_classes: int) -> Tensor:
    """The label of each image that a user asks for, (N,) int64; if the user names no class, all classes in turn."""
    numbers = label_numbers(request.values.get("labels"), num_classes, request.class_names)
    return by_turns(torch.tensor(numbers), request.num_images)


def label_numbers(
    labels: Sequence[str | int] | str | int | None, num_classes: int, class_names: Sequence[str] | None
) -> list[int]:
    """The numbers of the classes in `labels`, or of all classes if labels is None.

    Args:
        labels: Names or numbers of classes. A numeric string is a number only if no class has that name.
        num_classes: The number of classes.
        class_names: The name of each class; None: they have no names.

    Raises:
        ValueError: If there is no such class.
    """
    if labels is None:
        return list(range(num_classes))
    names, numbers = list(class_names or []), []
    labels = labels.tolist() if hasattr(labels, "tolist") else labels  # of tensors and arrays
    labels = [labels] if isinstance(labels, str | int) else labels
    if not labels:
        raise ValueError("labels must hold at least one class, got none; leave it out for all classes in turn")
    for label in labels:
        text = str(label)
        number = names.index(text) if text in names else int(text) if text.isdecimal() else -1
        if not 0 <= number < num_classes:
            known = f"names of classes ({', '.join(names)}), or " if names else ""
            raise ValueError(f"labels must be {known}numbers from 0 to {num_classes - 1}, got {text!r}")
        numbers.append(number)
    return numbers
