"""What is counted in one segmented image: pixels, objects and segments, in numbers that add up over images.

A score then follows twice: of each image, and of the sums over all images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import skimage
from numpy.typing import NDArray

from unet_diffusion.evaluation.intervals import Values
from unet_diffusion.inference.segmenter import Segmentation
from unet_diffusion.segmentation.labels import (
    BACKGROUND,
    NO_VALUE,
    Kind,
    Targets,
    instances_by_threshold,
    mask_from,
    without_small,
)
from unet_diffusion.segmentation.object_scores import matched_pairs, object_ious
from unet_diffusion.segmentation.scores import FOUR_CONNECTED, segment_sums, thin_borders, warping_error

IOU_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)  # least IoU of an object that is found
NUM_BINS = 100  # of the foreground's probability, at whose edges it may be a threshold
NUM_RELIABILITY_BINS = 10  # of which a bin is told how often its probability came true


@dataclass(frozen=True)
class Truth:
    """What an image shows, by its label.

    Args:
        classes: The class of each pixel, (H, W); NO_VALUE where there is none.
        mask: The mask, like `segment`'s: 0 and 1, or the class of each pixel; 0 where there is none.
        objects: A number for each object, 0 for the background; of classes the connected parts.
    """

    classes: NDArray[np.int64]
    mask: NDArray[np.int64]
    objects: NDArray[np.int32]

    @classmethod
    def of(cls, targets: Targets, labels: NDArray[Any], classes: NDArray[np.int64]) -> "Truth":
        """What a label image says, whose classes are known already."""
        if targets.kind == "classes":
            mask = np.where(classes == NO_VALUE, 0, classes)
            return cls(classes, mask, connected_parts(mask))
        return cls(classes, (classes > 0).astype(np.int64), np.where(classes == NO_VALUE, 0, targets.instances(labels)))


@dataclass(frozen=True)
class Predicted:
    """What a segmenter sees in an image, where its label has a class.

    Args:
        mask: The mask, as in `Truth`.
        objects: The objects, as in `Truth`.
    """

    mask: NDArray[np.int64]
    objects: NDArray[np.int32]

    @classmethod
    def of(
        cls,
        maps: NDArray[np.float32],
        kind: Kind,
        truth: Truth,
        threshold: float,
        min_size: int,
    ) -> "Predicted":
        """The mask and the objects of maps, (K, H, W); classes have no threshold and no least size."""
        if kind == "classes":
            mask = np.where(truth.classes == NO_VALUE, 0, mask_from(maps, kind).astype(np.int64))
            return cls(mask, connected_parts(mask))
        return next(cls.by_threshold(maps, kind, truth, (threshold,), min_size))

    @classmethod
    def by_threshold(
        cls, maps: NDArray[np.float32], kind: Kind, truth: Truth, thresholds: Sequence[float], min_size: int
    ) -> Iterator[Self]:
        """The mask and the objects of maps, (K, H, W), at each threshold; there are none for classes."""
        has_class = truth.classes != NO_VALUE
        each = instances_by_threshold(maps, kind, thresholds, min_size=min_size)
        for threshold, objects in zip(thresholds, each, strict=True):
            mask = (mask_from(maps, kind, threshold=threshold) > 0) & has_class
            yield cls(mask.astype(np.int64), np.where(has_class, objects, 0))


@dataclass(frozen=True)
class ObjectMatches:
    """Which objects of an image are found: true and predicted ones are matched one to one at an IoU of at least 0.5.

    Args:
        true_areas: Pixels of each true object, (R,).
        true_ious: IoU of each with its match, (R,); 0 if it has none.
        areas: Pixels of each predicted object, (C,).
        ious: IoU of each with its match, (C,); 0 if it has none.
    """

    true_areas: Values
    true_ious: Values
    areas: Values
    ious: Values

    @classmethod
    def of(cls, truth: Truth, predicted: Predicted) -> "ObjectMatches":
        """The matches of an image; objects of different classes do not match."""
        (true_areas, true_classes), (areas, classes) = (_objects_of(one) for one in (truth, predicted))
        ious = object_ious(truth.objects, predicted.objects)
        ious = np.where(true_classes[:, None] == classes, ious, 0)
        rows, columns = matched_pairs(ious, IOU_THRESHOLDS[0])
        matched = np.zeros(len(true_areas)), np.zeros(len(areas))
        matched[0][rows] = matched[1][columns] = ious[rows, columns]
        return cls(true_areas, matched[0], areas, matched[1])

    def counts(self, min_size: int = 0) -> Values:
        """True positives, false positives and false negatives at each IoU, (T, 3), of predicted objects not too small.

        No object has two partners with an IoU above 0.5, so a higher threshold changes no match.
        """
        ious = self.ious[self.areas >= min_size]
        found = (ious >= np.array(IOU_THRESHOLDS)[:, None]).sum(axis=1)
        return np.stack([found, len(ious) - found, len(self.true_ious) - found], axis=1)


@dataclass(frozen=True)
class ImageCounts:
    """All counts of one image.

    Args:
        index: Number of the image in the data.
        mask: The number of pixels of each class of the mask that are right, of the truth, and of the prediction,
            (M, 3).
        classes: The same numbers of each class of the network, by the likeliest one, (K, 3).
        reliability: The number of pixels in each bin of a probability, the sum of the probability, and the number of
            pixels for which it came true, (P, B, 3). The probabilities are that of the foreground, or that of the
            likeliest class and then that of each class.
        objects: The objects.
        segments: The sums of `segment_sums`, (3, 3); zeros where truth has no object.
    """

    index: int
    mask: Values
    classes: Values
    reliability: Values
    objects: ObjectMatches
    segments: Values


def counted(index: int, segmented: Segmentation, truth: Truth) -> ImageCounts:
    """The counts of one image, in the mask and the objects that `segment` would write.

    Args:
        index: Number of the image in the data.
        segmented: What the segmenter sees in it.
        truth: What the image shows.
    """
    kind, probabilities = segmented.kind, segmented.probabilities
    predicted = Predicted.of(segmented.maps, kind, truth, segmented.threshold, segmented.min_size)
    has_class = truth.classes != NO_VALUE
    num_classes = len(probabilities)
    return ImageCounts(
        index=index,
        mask=mask_counts(truth, predicted, num_classes if kind == "classes" else 2),
        classes=class_counts(truth.classes[has_class], probabilities.argmax(axis=0)[has_class], num_classes),
        reliability=_reliability(probabilities[:, has_class], kind, truth.classes[has_class]),
        objects=ObjectMatches.of(truth, predicted),
        segments=_segments(truth.objects, predicted.objects),
    )


def mask_counts(truth: Truth, predicted: Predicted, num_classes: int) -> Values:
    """Of each class of the mask, pixels that are right, of the truth, and of the prediction, (M, 3)."""
    has_class = truth.classes != NO_VALUE
    return class_counts(truth.mask[has_class], predicted.mask[has_class], num_classes)


def class_counts(truth: NDArray[Any], predicted: NDArray[Any], num_classes: int) -> Values:
    """Of each class, pixels that are right, of the truth, and of the prediction, (num_classes, 3)."""
    parts = truth[truth == predicted], truth.ravel(), predicted.ravel()
    return np.stack([np.bincount(part, minlength=num_classes) for part in parts], axis=1)


def membrane_sums(truth: Truth, predicted: Predicted, min_size: int) -> Values:
    """Sums of `segment_sums` as in the ISBI 2012 challenge, with thinned borders, (3, 3)."""
    return _segments(truth.objects, thin_borders(without_small(predicted.objects, min_size)))


def warped_shares(probabilities: NDArray[np.float32], truth: Truth, thresholds: tuple[float, ...]) -> Values:
    """The pixels with a class that are wrong by `warping_error`, and all of them, at each threshold, (T, 2)."""
    has_class = truth.classes != NO_VALUE
    masks = [(mask_from(probabilities, "binary", threshold=threshold) > 0) & has_class for threshold in thresholds]
    size, num_counted = has_class.size, np.count_nonzero(has_class)
    return np.array([(size * warping_error(truth.mask > 0, mask), num_counted) for mask in masks])


def connected_parts(classes: NDArray[np.int64]) -> NDArray[np.int32]:
    """A number for each connected part of a class but 0, (H, W)."""
    return skimage.measure.label(classes, background=0, connectivity=FOUR_CONNECTED).astype(np.int32)


def _objects_of(image: Truth | Predicted) -> tuple[Values, Values]:
    """The area and the class of each object, in the order of their numbers."""
    numbers, first, areas = np.unique(image.objects, return_index=True, return_counts=True)
    is_object = numbers > 0
    return areas[is_object], image.mask.ravel()[first[is_object]].astype(np.int64)


def _reliability(probabilities: NDArray[np.float32], kind: Kind, classes: NDArray[np.int64]) -> Values:
    """See `ImageCounts`; probabilities are (K, N), and classes (N,)."""
    num_bins = NUM_BINS
    if kind == "classes":
        num_bins, likeliest = NUM_RELIABILITY_BINS, probabilities.argmax(axis=0)
        pairs = [(probabilities.max(axis=0), likeliest == classes)]
        pairs += [(share, classes == number) for number, share in enumerate(probabilities)]
    else:
        pairs = [(1 - probabilities[BACKGROUND], classes > 0)]
    return np.stack([_binned(share.astype(float), is_true, num_bins) for share, is_true in pairs])


def _binned(probability: Values, is_true: NDArray[np.bool_], num_bins: int) -> Values:
    # By hand, as torchmetrics and scikit-learn want the probabilities of all pixels of all images at once.
    bins = np.clip((probability * num_bins).astype(np.int64), 0, num_bins - 1)
    weights = (None, probability, is_true)
    return np.stack([np.bincount(bins, weights=weight, minlength=num_bins) for weight in weights], axis=1)


def _segments(truth: NDArray[np.int32], predicted: NDArray[Any]) -> Values:
    return segment_sums(truth, predicted) if truth.any() else np.zeros((3, 3))
