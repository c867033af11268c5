"""A map of classes, such as road and sky, as a condition for semantic synthesis.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, section 4.3.1): the map of one-hot classes is scaled to the size
of x0, brought to a few channels by a 1x1 convolution, and concatenated with the noised image.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Encode, Request, by_turns, mirrored_like_images
from unet_diffusion.diffusion.conditions.encoded import EncodedCondition
from unet_diffusion.runtime.messages import first_few

COLOUR_STEPS = (37, 91, 151)  # from one class to the next in red, green and blue, modulo 256


class SemanticMap(EncodedCondition):
    """The class of each pixel, (B, 1, H, W) int64, as maps of the size of x0, (B, channels, h, w).

    With max_distance the entry is (B, 2, H, W): the distance from the edge of the object follows the class.

    The data hold label images as "semantic_map", see `data.Folder`. To sample, a user gives label images, or a folder
    of them. They are read at the size of the images to draw.

    Args:
        channels: Number of channels: one for each class, or fewer, which a learned linear map gives; and one for the
            distance.
        num_classes: The number of classes, for label_format "classes" alone.
        label_format: Meaning of the numbers in a label image: "classes" for class indices; "0/1" or "0/255" for
            background and foreground; "instances" for object numbers from 1, which become background, object and edge
            of an object.
        ignore_label: Number of pixels whose class is not known; None: there are none.
        downsampling: The height of an image divided by the height of x0: 1 for pixels.
        dropout: Probability of the null in training, a map of which nothing is known; 0: there is no null.
        max_distance: Distance from the edge of an object in pixels, diagonal steps count 1, that is 1 in the last
            channel, as larger ones are; None: the maps hold no distance.

    Raises:
        ValueError: If num_classes or max_distance does not go with label_format, or max_distance is out of range.
    """

    batch_key, network_argument = "semantic_map", "concat"
    options = needs = files = ("semantic_map",)
    purpose = "draws from a semantic map"
    pipeline_role, pipeline_part = "semantic_map", "maps"

    def __init__(
        self,
        channels: int,
        num_classes: int | None = None,
        *,
        label_format: Literal["classes", "0/1", "0/255", "instances"] = "classes",
        ignore_label: int | None = None,
        downsampling: int = 1,
        dropout: float = 0.1,
        max_distance: int | None = None,
    ):
        super().__init__(dropout)
        if (num_classes is not None) != (label_format == "classes"):
            raise ValueError(f"num_classes goes with label_format classes and with no other, got {num_classes} with "
                             f"{label_format}")  # fmt: skip
        if max_distance is not None and (max_distance < 1 or label_format == "classes" or channels < 2):
            raise ValueError(
                "max_distance must be at least 1 pixel, with objects as label_format and a channel more, got "
                f"{max_distance} with label_format {label_format} and {channels} channels; 6 is usual"
            )
        from unet_diffusion.diffusion.conditions.semantic_map_encoder import SemanticMapEncoder  # imports diffusers

        network: dict[str, Any] = {"channels": channels, "num_classes": num_classes, "label_format": label_format}
        network |= {"ignore_label": ignore_label, "downsampling": downsampling, "max_distance": max_distance}
        self.config = {**network, "dropout": dropout}
        self.encoder = SemanticMapEncoder(**network)
        self._sample_size = (0, 0)

    def example(self, batch_size: int, sample_shape: tuple[int, int, int]) -> Tensor:
        height, width = (side * self.config["downsampling"] for side in sample_shape[1:])
        num_entries = 1 if self.config["max_distance"] is None else 2
        return torch.zeros(batch_size, num_entries, height, width, dtype=torch.int64)

    def bind_sample_shape(self, sample_shape: tuple[int, int, int]) -> None:
        self._sample_size = sample_shape[1:]

    def bind_data(self, datamodule: Any) -> None:
        """Check the label images.

        Raises:
            ValueError: If there are none, they are of another size, or they hold numbers without a meaning.
        """
        rows = self.numbers_of(datamodule)
        if rows is None:
            return
        size, downsampling = tuple(rows.shape[-2:]), self.config["downsampling"]
        if size != tuple(side * downsampling for side in self._sample_size):
            fits = size[0] / self._sample_size[0]
            raise ValueError(
                f"downsampling of SemanticMap must be {fits:g}, as its maps have {size[0]}x{size[1]} pixels and what "
                f"is denoised {self._sample_size[0]}x{self._sample_size[1]}, got {downsampling}"
            )
        names = getattr(getattr(datamodule, "image_set", None), "names", None) or range(len(rows))
        reasons = {str(name): self.encoder.why_wrong(row) for name, row in zip(names, rows, strict=True)}
        if wrong := [f"{name} ({why})" for name, why in reasons.items() if why]:
            raise ValueError(
                f"{len(wrong)} of {len(rows)} semantic maps do not fit label_format {self.config['label_format']}: "
                f"{first_few(wrong)}; set label_format, num_classes or ignore_label to what the files hold"
            )

    def read(self, batch: Mapping[str, Any], encode: Encode = lambda images: images) -> Tensor:
        labels = super().read(batch)
        return self.encoder.entry_of(mirrored_like_images(batch, labels, labels.flip(-1)))

    def seen(self, batch: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> Tensor:
        """Each class in a colour of its own, in as many channels as images have; in grey images, in a grey."""
        classes = entries[self.batch_key][:, :1]
        channels = batch["images"].shape[1]
        if channels == 1:
            return classes / max(self.encoder.num_classes - 1, 1) * 2 - 1
        steps = [COLOUR_STEPS[channel % len(COLOUR_STEPS)] for channel in range(channels)]
        colours = classes * torch.tensor(steps, device=classes.device).view(-1, 1, 1) % 256 / 127.5 - 1
        if channels == len(COLOUR_STEPS) + 1:
            colours[:, -1] = 1.0  # opaque
        return colours

    def meaning(self) -> Any:
        meaning = [self.encoder.num_classes, self.config["label_format"]]
        return meaning if self.config["max_distance"] is None else [*meaning, self.config["max_distance"]]

    def from_user(self, request: Request) -> dict[str, Tensor]:
        assert request.read_label_images is not None
        assert request.image_shape is not None
        labels = request.read_label_images(
            "semantic_map", request.values["semantic_map"], (1, *request.image_shape[1:])
        )
        if why := self.encoder.why_wrong(labels):
            raise ValueError(f"semantic_map does not fit what the denoiser was trained on: {why}")
        return {self.batch_key: by_turns(self.encoder.entry_of(labels), request.num_images)}
