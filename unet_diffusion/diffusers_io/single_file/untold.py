"""What the weights in one file do not say of a model: a user says it, or a file that was exported here stores it."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from unet_diffusion.diffusion.schedule import PredictionType


@dataclass(frozen=True)
class Untold:
    """What a user says of a file that its weights do not; None: as in the published models of its layout.

    Args:
        tokenizer: Folder of CLIP's tokenizer, for a denoiser that takes captions.
        prediction_type: What the network predicts: "epsilon", "v_prediction" or "sample".
        image_size: Side of the images in pixels.
        num_heads: Number of attention heads.
        head_channels: Channels of each attention head, in place of num_heads.
        scaling_factor: Factor that brings the latents to unit variance.
        num_classes: Number of classes; one row more of their embedding is the null.

    Raises:
        ValueError: If a value is out of its range, or num_heads and head_channels are both given.
    """

    tokenizer: str | os.PathLike[str] | None = None
    prediction_type: PredictionType | None = None
    image_size: int | None = None
    num_heads: int | None = None
    head_channels: int | None = None
    scaling_factor: float | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "num_heads", "head_channels", "num_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.scaling_factor is not None and not 0 < self.scaling_factor < math.inf:
            raise ValueError(f"scaling_factor must be above 0, got {self.scaling_factor}; leave it out to use the "
                             "file's own, or that of its layout")  # fmt: skip
        if self.prediction_type not in (None, *get_args(PredictionType)):
            raise ValueError(f"prediction_type must be one of {', '.join(get_args(PredictionType))}, got "
                             f"{self.prediction_type!r}")  # fmt: skip
        if self.num_heads is not None and self.head_channels is not None:
            raise ValueError(f"num_heads and head_channels both set the attention heads, got {self.num_heads} and "
                             f"{self.head_channels}; give one of them")  # fmt: skip

    def given(self) -> dict[str, Any]:
        """The values that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def or_stored(self, settings: Mapping[str, Any]) -> "Untold":
        """The same, completed by what a file stores.

        Args:
            settings: The settings that `read_settings` reads from the file.
        """
        names = {field.name for field in fields(self)} - self.given().keys()
        if self.num_heads is not None or self.head_channels is not None:
            names -= {"num_heads", "head_channels"}
        return replace(self, **{name: settings[name] for name in names & settings.keys()})
