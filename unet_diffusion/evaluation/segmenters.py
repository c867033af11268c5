"""How good a segmenter is: its masks, its objects, its probabilities, and the threshold that suits it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from unet_diffusion.data.segmentation import SegmentationDataModule
from unet_diffusion.evaluation.intervals import FEW_IMAGES, Values
from unet_diffusion.evaluation.result import Evaluation, Picture, Section, Table
from unet_diffusion.evaluation.scores_of_counts import dice_of, mean_average_precision_of
from unet_diffusion.evaluation.segmented_images import ImageCounts, Predicted, Truth, counted, warped_shares
from unet_diffusion.evaluation.segmenter_pictures import outlined_errors
from unet_diffusion.evaluation.segmenter_sections import (
    calibration_section,
    mask_section,
    object_section,
    threshold_section,
)
from unet_diffusion.evaluation.thresholds import ScoresByThreshold, images_to_fit_on
from unet_diffusion.inference.segmenter import Segmentation, Segmenter
from unet_diffusion.runtime.processes import ALONE, ProcessGroup
from unet_diffusion.segmentation.scores import THRESHOLDS

NUM_WORST = 6
NUM_FIT = 24  # images that thresholds are fitted on, at most; none of them is validated on
FEW = (
    "There are only {} images to validate on: figures and intervals are rough, and a difference between two runs means "
    "little. Validate on more images (num_val), or on several splits."
)
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class SegmentedImage:
    """What was counted in one image.

    Args:
        counts: The counts at the threshold and least size of the segmenter.
        by_threshold: The scores at each threshold; None: classes have none.
        warped: See `warped_shares`; None: borders are learnt as a class, or the network has classes.
    """

    counts: ImageCounts
    by_threshold: ScoresByThreshold | None
    warped: Values | None


def evaluate_segmenter(
    segmenter: Segmenter,
    data: SegmentationDataModule,
    *,
    subject: str = "",
    views: bool = False,
    progress: Progress = lambda done, total: None,
    group: ProcessGroup = ALONE,
) -> Evaluation:
    """How good a segmenter is on the validation images.

    One image at a time is segmented; what is kept of it is counts. Processes share the images out, and each returns
    the whole evaluation.

    Args:
        segmenter: The segmenter.
        data: The labelled images that it was trained on, with the same split, or others.
        subject: What is evaluated, such as the run folder.
        views: Average over the eight rotated and mirrored views of each image; takes eight times as long.
        progress: Called after each image with how many this process has done, and of how many.
        group: The processes that share the work.

    Raises:
        ValueError: If the data have other classes, channels, grey values or another range than the segmenter.
    """
    data.setup("validate")
    _check(segmenter, data)
    has_threshold = segmenter.kind != "classes"
    fitted_on, were_trained_on = images_to_fit_on(data, NUM_FIT) if has_threshold else ([], False)
    shares = group.shard(fitted_on), group.shard(data.val_indices.tolist())
    total = sum(map(len, shares)) + min(NUM_WORST, len(data.val_indices))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    look = _Look(segmenter, data, views, step)
    fits = sorted(group.gather([look.by_threshold(index) for index in shares[0]]), key=lambda fit: fit.index)
    images = sorted(group.gather([look.measured(index) for index in shares[1]]), key=lambda image: image.counts.index)
    counts = [image.counts for image in images]
    sections = [
        mask_section(segmenter.kind, segmenter.class_names, counts),
        object_section(
            segmenter.kind,
            counts,
            membranes=[image.by_threshold.membranes for image in images if image.by_threshold is not None],
            warped=[image.warped for image in images],
        ),
        calibration_section(segmenter.kind, segmenter.class_names, counts),
    ]
    if fits:
        validated = [image.by_threshold for image in images if image.by_threshold is not None]
        sections.append(threshold_section(segmenter, fits, validated, were_trained_on=were_trained_on))
    sections.append(_worst_section(look, counts))
    if len(images) < FEW_IMAGES:
        sections[0].warnings.insert(0, FEW.format(len(images)))
    return Evaluation(subject, _protocol(segmenter, data, views, fitted_on), sections)


class _Look:
    """Segments images by number, and counts."""

    def __init__(
        self, segmenter: Segmenter, data: SegmentationDataModule, views: bool, step: Callable[[], None]
    ) -> None:
        self.segmenter, self.data, self.views, self.step = segmenter, data, views, step

    def segmented(self, index: int) -> Segmentation:
        segmenter = self.segmenter
        with torch.inference_mode():
            maps = segmenter.maps(self.data.whole(index)["images"], views=self.views).numpy()
        return Segmentation(maps, segmenter.kind, segmenter.class_names, segmenter.threshold, segmenter.min_size)

    def truth(self, index: int) -> Truth:
        classes = self.data.whole(index)["classes"].numpy()
        return Truth.of(self.data.targets, self.data.images.labels[index], classes)

    def by_threshold(self, index: int) -> ScoresByThreshold:
        fit = ScoresByThreshold.of(index, self.segmented(index).maps, self.segmenter.kind, self.truth(index))
        self.step()
        return fit

    def measured(self, index: int) -> SegmentedImage:
        segmented, truth, kind = self.segmented(index), self.truth(index), self.segmenter.kind
        image = SegmentedImage(
            counted(index, segmented, truth),
            ScoresByThreshold.of(index, segmented.maps, kind, truth) if kind != "classes" else None,
            warped_shares(segmented.maps, truth, THRESHOLDS) if kind in ("binary", "affinities") else None,
        )
        self.step()
        return image


def _worst_section(look: _Look, images: list[ImageCounts]) -> Section:
    kind, names = look.segmenter.kind, look.data.images.names
    dices = dice_of(np.stack([image.mask for image in images]))
    precisions = mean_average_precision_of(np.stack([image.objects.counts() for image in images]))
    tells_apart = kind in ("instances", "affinities")
    scores = np.nan_to_num(precisions if tells_apart else dices, nan=np.inf)
    score_name = "AP" if tells_apart else "Dice"
    worst = np.lexsort((dices, scores))[:NUM_WORST].tolist()
    rows: list[list[str | float | int | None]] = []
    pictures: list[Picture] = []
    for place in worst:
        image = images[place]
        truth = look.truth(image.index)
        segmented = look.segmented(image.index)
        predicted = Predicted.of(segmented.maps, kind, truth, segmented.threshold, segmented.min_size)
        shown = look.data.values.seen(look.data.whole(image.index)["images"][None])[0]
        num_true, num_predicted = len(image.objects.true_areas), len(image.objects.areas)
        rows.append([names[image.index], float(dices[place]), float(precisions[place]), num_true, num_predicted])
        scored = {"Dice": dices[place], "AP": precisions[place]}
        parts = [f"{name} {value:.2f}" for name, value in scored.items() if np.isfinite(value)]  # NaN without objects
        parts += [f"{num_true} objects in the label", f"{num_predicted} predicted"]
        caption = f"{names[image.index]}: {', '.join(parts)}."
        pictures.append(Picture(f"worst_{len(pictures)}", caption, outlined_errors(shown, truth, predicted)))
        look.step()
    columns = ["image", "Dice", "AP, IoU 0.5 to 0.9", "true objects", "predicted objects"]
    table = Table("worst", "The images with the lowest scores", columns, rows)
    about = (f"The {len(worst)} validation images with the lowest {score_name}. Blue outlines are of objects that are "
             "matched at an IoU of 0.5, orange ones of objects that are missed, or predicted where there is none of "
             "their shape. Look whether the label is right first.")  # fmt: skip
    return Section("Where does it fail?", about, tables=[table], pictures=pictures)


def _check(segmenter: Segmenter, data: SegmentationDataModule) -> None:
    targets = data.targets
    of_segmenter = (segmenter.unet.in_channels, segmenter.kind, tuple(segmenter.class_names), segmenter.stretch)
    of_data = (data.image_shape[0], targets.kind, tuple(targets.class_names), data.stretch)
    for name, ours, theirs in zip(("channels", "kind", "class_names", "stretch"), of_segmenter, of_data, strict=True):
        if ours != theirs:
            raise ValueError(
                f"the data must have the {name} that the segmenter was trained with, {ours}, and have {theirs}; set "
                "data.source, data.targets and data.stretch as in its run"
            )
    if not segmenter.stretch:  # which gives the same image whatever the range
        data.values.require_range_of(segmenter.values, "the segmenter was trained on")


def _protocol(
    segmenter: Segmenter, data: SegmentationDataModule, views: bool, fitted_on: list[int]
) -> dict[str, str | int | float]:
    protocol: dict[str, str | int | float] = {
        "network": repr(segmenter),
        "validation images": len(data.val_indices),
        "views": "eight rotated and mirrored" if views else "one",
        "grey values": "1st to 99.8th percentile of each image" if segmenter.stretch else "range of the type",
    }
    if segmenter.kind != "classes":
        protocol |= {
            "threshold": segmenter.threshold,
            "least object, pixels": segmenter.min_size,
            "images fitted on": len(fitted_on),
        }
    return {**protocol, "intervals": "95 %, bootstrap over images, 1,000 draws"}
