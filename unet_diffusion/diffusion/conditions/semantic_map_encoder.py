"""The channels of a semantic map; an exported folder has them and this file in `maps/`."""

from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad

SHOWN = 8  # values in an error


class SemanticMapEncoder(ModelMixin, ConfigMixin):
    """The share of each class in the area of each pixel of x0, or a linear map of these shares to fewer channels.

    A 1x1 convolution of one-hot classes is a row of its weights for each class, so a table has them. The distance from
    the edge of an object may follow as one more channel.

    Args:
        channels: Number of channels, with that of the distance; if the others are not as many as the classes, a linear
            map gives them.
        num_classes: The number of classes, for label_format "classes" alone.
        label_format: Meaning of the numbers in a label image: "classes" for class indices; "0/1" or "0/255" for
            background and foreground; "instances" for object numbers from 1, which become background, object and edge
            of an object.
        ignore_label: Number of pixels whose class is not known; None: there are none.
        downsampling: The height of an image divided by the height of x0.
        max_distance: Distance in pixels that is 1 in the last channel, as larger ones are; None: there is no distance.
    """

    argument = "semantic_map"
    usage = 'from PIL import Image\n\nsemantic_map = Image.open("map.png")  # as the labels in training'

    @register_to_config
    def __init__(
        self,
        channels: int,
        num_classes: int | None = None,
        label_format: str = "classes",
        ignore_label: int | None = None,
        downsampling: int = 1,
        max_distance: int | None = None,
    ):
        super().__init__()
        width = channels - (max_distance is not None)
        self.num_classes: int = num_classes or {"instances": 3}.get(label_format, 2)
        self.table = nn.Embedding(self.num_classes + 1, width, padding_idx=self.num_classes)  # its row stays 0
        if width == self.num_classes:
            self.table = nn.Embedding.from_pretrained(torch.eye(width + 1, width))  # frozen

    def forward(self, entry: Tensor) -> Tensor:
        """The channels, (B, channels, h, w), for what `entry_of` gives, (B, 1 or 2, H, W) int64."""
        channels = self.table(entry[:, 0]).permute(0, 3, 1, 2)
        if (max_distance := self.config["max_distance"]) is not None:
            channels = torch.cat([channels, entry[:, 1:].to(channels) / max_distance], dim=1)
        return avg_pool2d(channels, self.config["downsampling"])

    def null(self, entry: Tensor) -> Tensor:
        """The entry of a map that is not known, whose channels are all 0."""
        null = torch.zeros_like(entry)
        null[:, 0] = self.num_classes
        return null

    def entry_of(self, labels: Tensor) -> Tensor:
        """The class of each pixel, and its distance if it is asked for, (B, 1 or 2, H, W) int64.

        Args:
            labels: The numbers of label images, (B, 1, H, W).
        """
        labels = labels.long()
        classes = self._classes(labels)
        return classes if self.config["max_distance"] is None else torch.cat([classes, self._distances(labels)], dim=1)

    def _classes(self, labels: Tensor) -> Tensor:
        label_format, ignore_label = self.config["label_format"], self.config["ignore_label"]
        classes = labels if label_format == "classes" else (labels > 0).long()
        if label_format == "instances":
            beside = pad(labels.float(), (1, 1, 1, 1), mode="replicate").long()
            around = [beside[..., 1:-1, :-2], beside[..., 1:-1, 2:], beside[..., :-2, 1:-1], beside[..., 2:, 1:-1]]
            is_edge = torch.stack([one != labels for one in around]).any(dim=0)
            classes = torch.where(is_edge & (labels > 0), 2, classes)
        return classes if ignore_label is None else torch.where(labels == ignore_label, self.num_classes, classes)

    def _distances(self, labels: Tensor) -> Tensor:
        """Steps, also diagonal ones, to the next pixel of another number; the border of the image is no edge.

        They are counted up to max_distance. Background has 0.
        """
        ignore_label = self.config["ignore_label"]
        is_object = labels > 0 if ignore_label is None else (labels > 0) & (labels != ignore_label)
        numbers = labels.float()
        is_inside = (is_object & (_most_around(numbers) == -_most_around(-numbers))).float()
        distances = is_object.long()
        for _ in range(self.config["max_distance"] - 1):
            distances += is_inside.long()
            is_inside = -_most_around(-is_inside)  # eroded
        return distances

    def why_wrong(self, labels: Tensor) -> str | None:
        """The reason why label images cannot be read in this format; None if they can."""
        label_format, ignore_label = self.config["label_format"], self.config["ignore_label"]
        values = [value for value in labels.unique().tolist() if value != ignore_label]
        if label_format == "instances":
            rule, wrong = "0 or more", [value for value in values if value < 0]
        elif label_format == "classes":
            last = self.num_classes - 1
            rule, wrong = f"from 0 to {last}", [value for value in values if not 0 <= value <= last]
        else:
            foreground = int(label_format[2:])
            rule, wrong = f"0 or {foreground}", [value for value in values if value not in (0, foreground)]
        shown = ", ".join(map(str, wrong[:SHOWN])) + (", ..." if len(wrong) > SHOWN else "")
        return f"labels must be {rule}, got {shown}" if wrong else None

    def prepare(self, maps: Any, size: tuple[int, int], encode: Any = None) -> Tensor:
        """The entry of label images in memory, (N, 1 or 2, *size) int64.

        Args:
            maps: A PIL image or an array (H, W) of whole numbers, or a list of these.
            size: Height and width; label images of another size are scaled.
            encode: Not used: a map is not encoded.

        Raises:
            ValueError: If a number has no meaning.
        """
        arrays = [np.asarray(one).astype(np.int64) for one in (maps if isinstance(maps, list | tuple) else [maps])]
        labels = [torch.from_numpy(one)[None, None] for one in arrays]
        stacked = torch.cat([interpolate(one.double(), size, mode="nearest-exact").long() for one in labels])
        if why := self.why_wrong(stacked):
            raise ValueError(f"semantic_map: {why}")
        return self.entry_of(stacked)


def _most_around(values: Tensor) -> Tensor:
    """The largest value among each pixel and its eight neighbours."""
    return max_pool2d(values, 3, stride=1, padding=1)
