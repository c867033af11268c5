"""Conditions whose network an exported pipeline has, too, as its `tokens` or `maps`."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Condition


class EncodedCondition(Condition):
    """A condition from files, whose `encoder` turns the entry into the network's argument.

    The encoder is a diffusers model in a file of its own, which imports torch and diffusers alone, and which becomes
    part of an exported folder. Its `argument` is the pipeline's argument for the condition and equals `pipeline_role`.
    Its constructor takes the arguments of the condition but dropout. `prepare` makes the entry of what the pipeline is
    given, `null` is the null of the entry, and `usage` is Python for the model card that makes such a value.

    Attributes:
        pipeline_part: Name of the encoder in a pipeline: "tokens" for "context", "maps" for "concat". A second one
            of maps becomes "maps_2".
        encoder: The encoder, which the constructor of the subclass sets.
    """

    pipeline_part: ClassVar[str]
    encoder: Any

    @classmethod
    def of_pipeline(cls, arguments: Mapping[str, Any], dropout: float) -> Self:
        """The condition of an exported pipeline, whose weights its `encoder` loads.

        Args:
            arguments: The configuration of the encoder in the pipeline.
            dropout: Probability of the null in training.
        """
        return cls(**arguments, dropout=dropout)  # type: ignore[call-arg]  # a subclass takes them

    @property
    def is_asked_of_images(self) -> bool:
        return True

    def null(self, entry: Tensor) -> Tensor:
        return self.encoder.null(entry)

    def forward(self, entry: Tensor) -> Tensor:
        return self.encoder(entry)

    def pipeline_parts(self) -> dict[str, Any]:
        return {self.pipeline_part: copy.deepcopy(self.encoder).cpu().float().eval()}

    def pipeline_outputs(self, pipeline: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """The outputs for an example; a pipeline of diffusers has no such part."""
        encoders = [part for part in pipeline.components.values() if hasattr(part, "argument")]
        theirs = next((part for part in encoders if part.argument == self.pipeline_role), None)
        if theirs is None:
            return {}
        ours, entry = self.pipeline_parts()[self.pipeline_part], self.example(2, (1, 8, 8)).cpu()
        both = torch.cat([entry, ours.null(entry)])
        return {f"{self.pipeline_part} of {self.pipeline_role}": (ours(both), theirs(both))}
