"""A segmenter that judges whether images show the maps and boxes that they were drawn for."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unet_diffusion.data.scaling import to_float
from unet_diffusion.diffusion.conditions.box_tokens import BoxTokens
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.evaluation.following_scores import boxes_hit
from unet_diffusion.evaluation.intervals import Values
from unet_diffusion.evaluation.segmented_images import class_counts, connected_parts
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.segmenter import Segmentation, Segmenter


class Judge:
    """A segmenter for the images of a denoiser.

    Args:
        segmenter: The segmenter.
        denoiser: The denoiser.

    Raises:
        ValueError: If the denoiser draws by neither maps nor boxes, or the segmenter is not for such images or classes.
    """

    def __init__(self, segmenter: Segmenter, denoiser: Denoiser) -> None:
        self.segmenter = segmenter
        judged = [one for one in denoiser.all_conditions if isinstance(one, SemanticMap | BoxTokens)]
        if not judged:
            raise ValueError("segmenter judges semantic maps and boxes, and this denoiser draws by neither; leave it "
                             "out")  # fmt: skip
        ours, theirs = segmenter.unet.in_channels, denoiser.image_shape[0]
        if ours != theirs:
            raise ValueError(
                f"segmenter must take images of {theirs} channels, as the denoiser draws, and takes {ours}"
            )
        denoiser.values.require_range_of(segmenter.values, "the segmenter was trained on", "give another segmenter")
        for condition in judged:
            if isinstance(condition, SemanticMap):
                self._check_classes(condition)

    def _check_classes(self, condition: SemanticMap) -> None:
        num_classes, kind = condition.config["num_classes"], self.segmenter.kind
        names = self.segmenter.class_names
        if num_classes is None and kind == "classes":
            raise ValueError(
                "segmenter must see foreground and background, as the maps have the label_format "
                f"{condition.config['label_format']}, and sees the classes {', '.join(names)}"
            )
        if num_classes is not None and (kind != "classes" or len(names) != num_classes):
            raise ValueError(f"segmenter must see the {num_classes} classes of the maps, in their order, and sees "
                             f"{', '.join(names)}")  # fmt: skip

    def seen(self, images: Tensor) -> list[Segmentation]:
        """What the segmenter sees in images, (B, C, H, W) in [-1, 1]."""
        stretch = self.segmenter.stretch
        return [self.segmenter.segment(to_float(image, stretch=stretch)) for image in images.clamp(-1, 1)]

    def counts_of_maps(self, seen: list[Segmentation], condition: SemanticMap, entry: Tensor) -> Values:
        """Of each class of each image, pixels that are right, of the map, and of the segmentation, (B, K, 3).

        Args:
            seen: The segmentations of B images.
            condition: The condition of the maps.
            entry: Its entry, (B, 1 or 2, H, W).
        """
        is_binary = condition.config["num_classes"] is None
        counts = []
        for segmented, classes in zip(seen, entry[:, 0].numpy(), strict=True):
            is_known = classes < condition.encoder.num_classes
            ours, theirs = classes[is_known], segmented.classes[is_known].astype(np.int64)
            pair = ((ours > 0).astype(np.int64), (theirs > 0).astype(np.int64)) if is_binary else (ours, theirs)
            counts.append(class_counts(*pair, 2 if is_binary else condition.encoder.num_classes))
        return np.stack(counts)

    def counts_of_boxes(self, seen: list[Segmentation], condition: BoxTokens, entry: Tensor) -> Values:
        """The boxes of each image that are hit, and all its boxes, (B, 2).

        Args:
            seen: The segmentations of B images.
            condition: The condition of the boxes.
            entry: Its entry, (B, M, 5).
        """
        counts = []
        for segmented, rows in zip(seen, entry.numpy(), strict=True):
            rows = rows[rows[:, 0] < condition.config["num_classes"]]
            height, width = segmented.classes.shape
            boxes = rows[:, 1:] * np.array([width, height, width, height])
            hits = np.zeros(len(rows), dtype=bool)
            for label in np.unique(rows[:, 0]):
                is_label = rows[:, 0] == label
                hits[is_label] = boxes_hit(self._objects(segmented, condition, int(label)), boxes[is_label])
            counts.append([hits.sum(), len(rows)])
        return np.array(counts)

    def of_names(self, condition: Condition) -> str:
        """Which objects count for a box, for a sentence that ends here."""
        return " as what the box names" if self._knows_names(condition) else ", whatever it is"

    def _knows_names(self, condition: Condition) -> bool:
        assert isinstance(condition, BoxTokens)
        return self.segmenter.kind == "classes" and {*condition.names} <= {*self.segmenter.class_names}

    def _objects(self, segmented: Segmentation, condition: BoxTokens, label: int) -> NDArray[np.int32]:
        """The objects that may hit a box with this name: those of its class, if the segmenter knows all names."""
        if segmented.kind != "classes":
            return segmented.instances
        classes = segmented.classes.astype(np.int64)
        if self._knows_names(condition):
            number = segmented.class_names.index(condition.names[label])
            return connected_parts((classes == number).astype(np.int64))
        return connected_parts(classes)
