"""What a denoiser consists of, whoever made it and whatever is done with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from unet_diffusion.diffusion.conditions.class_labels import ClassLabels
from unet_diffusion.diffusion.conditions.condition import Condition, network_inputs, unconditional_inputs
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.latents.codec import Codec, PixelCodec
from unet_diffusion.models.speed import Speed
from unet_diffusion.models.unet import PixelNetwork

Kind = TypeVar("Kind", bound=Condition)


@dataclass(repr=False)
class DenoiserParts:
    """A network, and all that is needed to draw with it, to train it on and to export it.

    Args:
        unet: The network, called `unet(x_t, t, **inputs)`; the averaged (EMA) weights, where there are any.
        schedule: The noise schedule that it was trained with.
        sample_shape: (C, h, w) of what it was trained to denoise.
        codec: Between images and what is denoised; pixels by default.
        null_label: The label that stands for no class, for guidance; None: it was trained without.
        class_names: The name of each class; None: there are no classes, or they have no names.
        settings: How it was trained, as plain values, for the model card.
        conditions: What it is conditioned on, beside the class labels that the network embeds itself.
        speed: The speed that it was trained at.

    Raises:
        ValueError: If null_label or class_names do not fit the network.
    """

    unet: PixelNetwork
    schedule: NoiseSchedule
    sample_shape: tuple[int, int, int]
    codec: Codec = field(default_factory=PixelCodec)
    null_label: int | None = None
    class_names: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    conditions: nn.ModuleList = field(default_factory=nn.ModuleList)
    speed: Speed = "plain"

    def __post_init__(self) -> None:
        rows = self.unet.config.get("num_class_embeds")
        if self.null_label is not None and not 0 <= self.null_label < (rows or 0):
            raise ValueError(f"null_label must be one of the {rows or 0} labels of the network, got {self.null_label}")
        if self.class_names is not None and self.num_classes and len(self.class_names) != self.num_classes:
            raise ValueError(f"there must be {self.num_classes} class_names, one a class, got {len(self.class_names)}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that it was trained on, in pixels."""
        return self.codec.image_shape(self.sample_shape)

    @property
    def all_conditions(self) -> list[Condition]:
        """The class labels that the network embeds itself, if it does, and the other conditions."""
        return all_conditions(self.unet, self.conditions, self.null_label)

    def condition(self, kind: type[Kind]) -> Kind | None:
        """The condition of that class; None: there is none."""
        return next((one for one in self.all_conditions if isinstance(one, kind)), None)

    @property
    def num_classes(self) -> int:
        """Classes to choose from, the null label not counted; 0: there are none."""
        provided = {entry for one in self.all_conditions for entry in one.provides}
        return next((one.num_classes for one in self.all_conditions
                     if one.batch_key == "labels" and "labels" not in provided), 0)  # fmt: skip

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """What the network is called with beside x and t, and the same without conditions, if it was trained without.

        Args:
            batch: What the conditions read, (B, ...) each, on their device.
        """
        return network_inputs(self.all_conditions, batch), unconditional_inputs(self.all_conditions, batch)


def all_conditions(
    unet: PixelNetwork, others: nn.ModuleList, null_label: int | None, label_dropout: float = 0.0
) -> list[Condition]:
    """The class labels that a network embeds itself, if it does, and the other conditions.

    Args:
        unet: The network.
        others: The other conditions.
        null_label: The label that stands for no class; None: there is none.
        label_dropout: Probability of the null label in training.
    """
    rows = unet.config.get("num_class_embeds")
    labels = [] if rows is None else [ClassLabels(rows, null_label, label_dropout)]
    return [*labels, *cast(list[Condition], list(others))]


def channels_beside(conditions: nn.ModuleList) -> int:
    """Channels that the network has beside the noised image, by its conditions."""
    found = [cast(Condition, one) for one in conditions]
    return sum(one.config["channels"] for one in found if one.network_argument == "concat")
