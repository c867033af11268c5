"""The parts of a denoiser, which training, sampling, import and export share."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar, cast

from torch import Tensor, nn

from unet_diffusion.diffusion.adapters.adapter import TrainedAdapter
from unet_diffusion.diffusion.conditions.class_labels import NOISE_LEVEL_ENTRY, ClassLabels
from unet_diffusion.diffusion.conditions.condition import Condition, network_inputs, unconditional_inputs
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.latents.codec import Codec, PixelCodec
from unet_diffusion.models.speed import Speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.pixel_values import OF_COLOURS, PixelValues

Kind = TypeVar("Kind", bound=Condition)


@dataclass(repr=False)
class DenoiserParts:
    """A network with everything needed to sample from it, to continue its training and to export it.

    Args:
        unet: The network, called as `unet(x_t, t, **inputs)`, with its averaged (EMA) weights if it has any.
        schedule: The noise schedule that the network was trained with.
        sample_shape: (C, h, w) of the x0 that the network was trained on.
        codec: The codec between images and x0; pixels by default.
        null_label: The label that stands for no class, for guidance; None: there is no null label.
        class_names: The name of each class; None: there are no classes, or they have no names.
        settings: The settings of the training as plain values, for the model card.
        conditions: The conditions beside the class labels that the network itself embeds.
        speed: The speed that the network was trained at.
        adapter: The adapter that was trained on a frozen denoiser, whose weights these are; None: there is none.
        values: What the numbers in the files of its images mean, and which channels pictures show.

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
    adapter: TrainedAdapter | None = None
    values: PixelValues = field(default_factory=PixelValues)

    def __post_init__(self) -> None:
        rows = self.unet.config.get("num_class_embeds")
        if self.null_label is not None and not 0 <= self.null_label < (rows or 0):
            raise ValueError(f"null_label must be one of the network's {rows or 0} labels, got {self.null_label}")
        if self.class_names is not None and self.num_classes and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names must name each of the {self.num_classes} classes, got {len(self.class_names)} names"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the denoiser was trained on, in pixels."""
        return self.codec.image_shape(self.sample_shape)

    @property
    def are_pictures(self) -> bool:
        """Whether images are grey, RGB, or RGB and alpha, with the range of 8 or 16 bits."""
        is_of_colours = self.image_shape[0] in OF_COLOURS and self.values.shown is None
        return is_of_colours and self.values.value_range is None

    @property
    def all_conditions(self) -> list[Condition]:
        """All conditions: the class labels, if the network embeds them itself, then `conditions`."""
        return all_conditions(self.unet, self.conditions, self.null_label)

    def condition(self, kind: type[Kind]) -> Kind | None:
        """The condition of this class, or None."""
        return next((condition for condition in self.all_conditions if isinstance(condition, kind)), None)

    @property
    def num_classes(self) -> int:
        """The number of classes to choose from, without the null label; 0: there are no classes."""
        return next((one.num_classes for one in self.all_conditions if one.batch_key == "labels"), 0)

    def merged(self) -> Self:
        """The same denoiser with its adapter in its weights: itself, or a copy if the adapter stands beside them."""
        if self.adapter is None or self.adapter.is_merged:
            return self
        unet, conditions = copy.deepcopy(self.unet), copy.deepcopy(self.conditions)
        self.adapter.adapter.merge(unet, conditions)
        made = copy.copy(self)
        made.unet, made.conditions, made.adapter = unet, conditions, replace(self.adapter, is_merged=True)
        return made

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The network's inputs beside x and t, and the unconditional ones; None if no condition has a null.

        Args:
            batch: The entries that the conditions read, (B, ...) each, on the conditions' device.
        """
        return network_inputs(self.all_conditions, batch), unconditional_inputs(self.all_conditions, batch)


def all_conditions(
    unet: PixelNetwork, others: nn.ModuleList, null_label: int | None, label_dropout: float = 0.0
) -> list[Condition]:
    """All conditions of a network: the class labels, if the network embeds them itself, then the others.

    Args:
        unet: The network.
        others: The other conditions.
        null_label: The label that stands for no class; None: there is no null label.
        label_dropout: Probability of the null label in training.
    """
    rows = unet.config.get("num_class_embeds")
    conditions = cast(list[Condition], list(others))
    if rows is None:
        return conditions
    enlarges = any(NOISE_LEVEL_ENTRY in condition.provides for condition in conditions)
    entry = NOISE_LEVEL_ENTRY if enlarges else "labels"
    return [ClassLabels(rows, null_label, label_dropout, batch_key=entry), *conditions]


def channels_beside(conditions: Iterable[nn.Module]) -> int:
    """The number of channels that conditions put beside the noised image."""
    typed = [cast(Condition, condition) for condition in conditions]
    return sum(condition.config["channels"] for condition in typed if condition.network_argument == "concat")
