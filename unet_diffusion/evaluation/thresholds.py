"""The threshold of the foreground's probability, and the least size of objects, that suit held-out images best."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unet_diffusion.data.segmentation import SegmentationDataModule
from unet_diffusion.evaluation.intervals import Values
from unet_diffusion.evaluation.scores_of_counts import average_precision_of, dice_of, mean_average_precision_of
from unet_diffusion.evaluation.segmented_images import ObjectMatches, Predicted, Truth, mask_counts, membrane_sums
from unet_diffusion.segmentation.labels import MIN_SIZE, THRESHOLD, Kind
from unet_diffusion.segmentation.scores import THRESHOLDS, v_rand_of

SIZES = (1, 4, 8, 16, 32, 64, 128)  # least numbers of pixels in an object
FITTED = {  # the scores that are fitted, each by itself, for they want different thresholds
    "ap_50": "AP at IoU 0.5",
    "ap_50_90": "AP, mean of IoU 0.5 to 0.9",
    "dice": "Dice",
    "v_rand": "V_rand",
}
# The score whose threshold training keeps, by kind
KEPT = {"instances": "ap_50_90", "affinities": "ap_50_90", "binary": "dice"}


@dataclass(frozen=True)
class ScoresByThreshold:
    """What one image scores at each of the challenge's thresholds and each of SIZES.

    Args:
        index: Number of the image in the data.
        mask: Counts of the mask's pixels, (T, 2, 3).
        objects: Counts of the objects that are found at each IoU of IOU_THRESHOLDS, (T, S, I, 3).
        membranes: Sums of `membrane_sums`, (T, 3, 3); None: borders are learnt as a class, and are not thinned.
    """

    index: int
    mask: Values
    objects: Values
    membranes: Values | None

    @classmethod
    def of(cls, index: int, maps: NDArray[np.float32], kind: Kind, truth: Truth) -> "ScoresByThreshold":
        """The scores of an image by the maps of a network, (K, H, W)."""
        masks, objects, membranes = [], [], []
        for predicted in Predicted.by_threshold(maps, kind, truth, THRESHOLDS, min_size=1):
            masks.append(mask_counts(truth, predicted, num_classes=2))
            matches = ObjectMatches.of(truth, predicted)
            objects.append(np.stack([matches.counts(size) for size in SIZES]))
            if kind != "instances":  # the watershed leaves crumbs, and the challenge took all components
                membranes.append(membrane_sums(truth, predicted, MIN_SIZE if kind == "affinities" else 1))
        return cls(index, np.stack(masks), np.stack(objects), np.stack(membranes) if membranes else None)

    @property
    def scores(self) -> dict[str, Values]:
        """Each score by threshold and size, (T, S) or, where size does not matter, (T, 1)."""
        scores = {
            "ap_50": average_precision_of(self.objects[..., 0, :]),
            "ap_50_90": mean_average_precision_of(self.objects),
            "dice": dice_of(self.mask)[:, None],
        }
        return scores if self.membranes is None else {**scores, "v_rand": v_rand_of(self.membranes)[:, None]}


@dataclass(frozen=True)
class FittedThreshold:
    """Where the mean of a score over images is best.

    Args:
        key: The score, one of FITTED.
        threshold: The threshold of the foreground's probability.
        min_size: Least number of pixels in an object; None: objects do not matter to the score.
    """

    key: str
    threshold: float
    min_size: int | None

    def score(self, image: ScoresByThreshold) -> float:
        """The score of an image here."""
        column = 0 if self.min_size is None else SIZES.index(self.min_size)
        return float(image.scores[self.key][THRESHOLDS.index(self.threshold), column])

    def instead(self, threshold: float, min_size: int) -> "FittedThreshold":
        """The nearest place of the same score to a threshold and size."""
        size = None if self.min_size is None else min(SIZES, key=lambda one: abs(np.log(one / min_size)))
        return FittedThreshold(self.key, min(THRESHOLDS, key=lambda one: abs(one - threshold)), size)


def kept_threshold(images: Sequence[ScoresByThreshold], kind: Kind) -> tuple[float, int]:
    """The threshold and the least size of objects that training keeps, fitted on images."""
    (fitted,) = (one for one in fitted_thresholds(images) if one.key == KEPT[kind])
    return fitted.threshold, MIN_SIZE if fitted.min_size is None else fitted.min_size


def fitted_thresholds(images: Sequence[ScoresByThreshold]) -> list[FittedThreshold]:
    """Where each score is best on images; of equally good places the one nearest to what is taken otherwise."""
    return [_fitted(key, np.stack([image.scores[key] for image in images])) for key in images[0].scores]


def images_to_fit_on(data: SegmentationDataModule, most: int) -> tuple[list[int], bool]:
    """Images that are not validated on, and whether the network was trained on them.

    Args:
        data: The images; those that are kept for it (num_fit) come first, then those that are neither trained nor
            validated on (num_train).
        most: How many images at most, evenly spaced.
    """
    trained = data.train_images.tolist()
    others = sorted({*range(len(data.images.images))} - {*trained, *data.val_indices.tolist()})
    images = data.fit_indices.tolist() or others or trained
    return evenly_spaced(images, most), images is trained


def evenly_spaced(images: list[int], most: int) -> list[int]:
    """At most so many of the images."""
    places = np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int)
    return [images[place] for place in places]


def _fitted(key: str, scores: Values) -> FittedThreshold:
    means = np.ma.masked_invalid(scores).mean(axis=0).filled(-1.0)  # (T, S)
    sizes: Sequence[int | None] = SIZES if means.shape[1] > 1 else [None]

    def rank(place: tuple[int, int]) -> tuple[float, float, float]:
        threshold, size = THRESHOLDS[place[0]], sizes[place[1]]
        far = 0.0 if size is None else abs(np.log(size / MIN_SIZE))
        return -round(float(means[place]), 12), abs(threshold - THRESHOLD), far

    row, column = min(np.ndindex(*means.shape), key=rank)
    return FittedThreshold(key, THRESHOLDS[row], sizes[column])
