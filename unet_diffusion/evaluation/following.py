"""Whether samples follow the conditions that they are drawn for: a figure for each, which falls if it is ignored.

Beside it is the same figure where each sample is compared with the condition of another, about as much as a denoiser
reaches that ignores its condition, and that of something that needs no denoiser.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.box_tokens import BoxTokens
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution, shrink
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.evaluation.following_pictures import side_by_side
from unet_diffusion.evaluation.following_scores import enlarged, filled_with_mean, others_of_another_kind
from unet_diffusion.evaluation.held_out import HeldOutConditions
from unet_diffusion.evaluation.image_quality import errors_as_sums, pooled_psnr, psnr
from unet_diffusion.evaluation.intervals import Values, interval, mean_of_sums
from unet_diffusion.evaluation.judge import Judge
from unet_diffusion.evaluation.result import SHUFFLED, Figure, Picture, Section
from unet_diffusion.evaluation.scores_of_counts import mean_iou_of
from unet_diffusion.evaluation.selections import Selection

AT_ONCE = 32  # images in memory, and what a segmenter sees in them
SHOWN = 8
KNOWN = ("labels", "captions", "noise_level")  # entries with figures of their own, or with none to be had

MAP_IOU, BOXES_HIT = "Mean IoU of map and segmentation", "Share of boxes hit"

Batch = dict[str, Any]
REAL_IMAGES = "real images"
REAL: dict[str, Callable[[Batch], Tensor]] = {REAL_IMAGES: lambda batch: batch["images"]}


@dataclass(frozen=True)
class Measure:
    """How a figure is worked out of images and what conditions read of held-out images.

    Args:
        key: Name of the figure in JSON.
        title: Its name for people.
        remark: A sentence that explains the figure.
        counts: Gives the counts of each image, (B, ...), of what is seen in it and the batch that it is compared with.
        score: Gives the figure of the sums of these counts.
        seen: Gives what is seen in images, (B, C, H, W).
        others: Images that need no denoiser, of a batch, by their names.
    """

    key: str
    title: str
    remark: str
    counts: Callable[[Any, Batch], Values]
    score: Callable[[Values], Values] = mean_of_sums
    seen: Callable[[Tensor], Any] = lambda images: images
    others: dict[str, Callable[[Batch], Tensor]] = field(default_factory=dict)


def following_section(samples: Selection, held_out: HeldOutConditions, judge: Judge | None = None) -> Section:
    """The section of an evaluation on how samples follow the conditions of held-out images.

    Args:
        samples: The samples, by their numbers.
        held_out: The conditions that they were drawn for.
        judge: The segmenter that sees maps and objects in images; None: figures that need it are left out.
    """
    labels = _labels(samples, held_out)
    kinds = torch.arange(len(samples)) % len(held_out) if labels is None else labels
    places, others = others_of_another_kind(kinds)
    section = Section(
        "Does it follow its condition?",
        f"Each of {len(samples)} samples is drawn for what is known of a held-out image, and compared with that. "
        + _about_shuffled(has_partners=len(places) > 0, has_classes=labels is not None),
    )
    for condition in held_out.conditions:
        measure = measure_of(condition, judge)
        if isinstance(measure, Figure):
            section.figures.append(measure)
        elif measure is not None:
            figure, is_followed = _figure_of(measure, samples, held_out, places, others)
            section.figures.append(figure)
            section.warnings += [] if is_followed else [_warning(figure, condition)]
    names = [
        _name_of(one) for one in held_out.conditions if measure_of(one, None) is None and one.batch_key not in KNOWN
    ]
    if held_out.denoiser.condition(MaskedImage) is not None:
        section.about += " PSNR is that in the hole of the mask, as the rest is pasted from the real image."
    if names:
        section.about += f" There is no figure for {' and '.join(names)}."
    section.pictures.append(_picture(samples, held_out))
    return section


def measure_of(condition: Condition, judge: Judge | None) -> Measure | Figure | None:
    """How it is measured whether images follow a condition.

    Args:
        condition: The condition.
        judge: The segmenter that sees maps and objects in images; None: there is none.

    Returns:
        The measure; a figure without a value, which says what it lacks; or None: there is none for this kind.
    """
    match condition:
        case PairedImage():
            return Measure(
                "paired_image_psnr", "PSNR to the real partner, dB",
                "Peak signal-to-noise ratio to the real image whose pair the sample was drawn from; pooled, so that it "
                "is that of the mean squared error over samples.",
                _errors, pooled_psnr,
            )  # fmt: skip
        case LowResolution():
            return Measure(
                "small_image_psnr", "PSNR to the real large image, dB",
                "Peak signal-to-noise ratio to the real image that was made small, pooled. A sharp sample may be below "
                "bicubic interpolation, which is smooth and errs little.",
                _errors, pooled_psnr,
                others={"bicubic": lambda batch: _bicubic(batch, condition)},
            )  # fmt: skip
        case MaskedImage():
            return Measure(
                "masked_image_psnr", "PSNR in the hole, dB",
                "Peak signal-to-noise ratio to the real image inside the mask; pooled, as holes in an empty background "
                "are filled nearly without error, and would raise a mean of ratios.",
                _errors, pooled_psnr,
                others={"mean of the rest": lambda batch: filled_with_mean(batch["images"], batch["mask"] == 1)},
            )  # fmt: skip
        case SemanticMap():
            if judge is None:
                return _without_judge("semantic_map_iou", MAP_IOU)
            return Measure(
                "semantic_map_iou", MAP_IOU,
                "Intersection over union of the map and what the segmenter sees in the sample, over the pixels of all "
                "samples, mean over classes; of foreground and background, that of the foreground.",
                lambda seen, batch: judge.counts_of_maps(seen, condition, batch["semantic_map"]),
                mean_iou_of, judge.seen, REAL,
            )  # fmt: skip
        case BoxTokens():
            if judge is None:
                return _without_judge("boxes_hit", BOXES_HIT)
            return Measure(
                "boxes_hit", BOXES_HIT,
                "The share of boxes with an IoU of at least 0.5 with the box around an object that the segmenter sees "
                f"in the sample{judge.of_names(condition)}.",
                lambda seen, batch: judge.counts_of_boxes(seen, condition, batch["boxes"]),
                seen=judge.seen, others=REAL,
            )  # fmt: skip
    return None


def _errors(images: Tensor, batch: Batch) -> Values:
    """The squared error of each image as counts that add up, (B, 2); inside the mask, if there is one.

    What a mask leaves is pasted from the real image, and says nothing of any condition.
    """
    where = batch["mask"] == 1 if MaskedImage.batch_key in batch else None
    return errors_as_sums(psnr(batch["images"], images, where).double().numpy())


def _without_judge(key: str, title: str) -> Figure:
    remark = "Left out, as it needs a segmenter of such images: give --segmenter RUN, a run of fit --task segment."
    return Figure(key, title, float("nan"), "higher", remark=remark)


def _bicubic(batch: Batch, condition: LowResolution) -> Tensor:
    """The small images without their noise, enlarged."""
    images, at_size_of_x0 = batch["images"], batch[condition.batch_key]
    height, width = (side // condition.scale_factor for side in at_size_of_x0.shape[2:])
    return enlarged(shrink(images, (height, width)), (images.shape[2], images.shape[3]))


def _labels(samples: Selection, held_out: HeldOutConditions) -> Tensor | None:
    """The class of the held-out image of each sample; None if they have no classes, or all the same."""
    if held_out.labels is None:
        return None
    labels = held_out.labels[torch.arange(len(samples)) % len(held_out)]
    return labels if len(labels.unique()) > 1 else None


def _about_shuffled(*, has_partners: bool, has_classes: bool) -> str:
    if not has_partners:
        return (
            "Nothing is shuffled, as all samples are drawn for the same held-out image; so nobody is warned of a model "
            "that ignores its condition."
        )
    of_class = ", of another class" if has_classes else ""
    return (
        f"Shuffled: each is compared with what is known of another image{of_class}; a model that ignores its condition "
        "reaches about as much."
    )


def _figure_of(
    measure: Measure, samples: Selection, held_out: HeldOutConditions, places: Tensor, others: Tensor
) -> tuple[Figure, bool]:
    """The figure of a condition, with the same of other things; and whether it is above the shuffled one for sure."""
    own, shuffled = [], []
    partners = torch.arange(len(samples)).index_put((places,), others)
    for rows in torch.arange(len(samples)).split(AT_ONCE):
        seen, batch = measure.seen(samples.take(rows)), held_out.batch(rows)
        own.append(measure.counts(seen, batch))
        shuffled.append(measure.counts(seen, _with_mask_of(batch, held_out.batch(partners[rows]))))
    counts = np.concatenate(own)
    bounds = interval(measure.score, _by_image(counts, held_out))
    beside, is_followed = dict[str, float](), True
    if len(places):
        pairs = np.zeros((len(counts), 2, *counts.shape[1:]))  # of a sample and its partner
        pairs[places] = np.stack([counts, np.concatenate(shuffled)], axis=1)[places]
        beside[SHUFFLED] = float(measure.score(pairs[:, 1].sum(axis=0)))
        is_followed = _is_above(measure.score, _by_image(pairs, held_out))
    num_drawn_for = min(len(samples), len(held_out))
    beside |= {name: _of_others(measure, images, held_out, num_drawn_for) for name, images in measure.others.items()}
    real = beside.pop(REAL_IMAGES, None)
    value = float(measure.score(counts.sum(axis=0)))
    return Figure(measure.key, measure.title, value, "higher", bounds, real, measure.remark, beside), is_followed


def _by_image(counts: Values, held_out: HeldOutConditions) -> Values:
    """The counts of the samples of each held-out image together: they are alike, and no independent draws."""
    sums = np.zeros((min(len(counts), len(held_out)), *counts.shape[1:]))
    np.add.at(sums, np.arange(len(counts)) % len(held_out), counts)
    return sums


def _is_above(score: Callable[[Values], Values], pairs: Values) -> bool:
    """Whether the score of the first of pairs of counts, (n, 2, ...), is above that of the second, beyond chance."""
    bounds = interval(lambda sums: score(sums[:, 0]) - score(sums[:, 1]), pairs)
    return bounds is None or bounds[0] > 0  # None: there is no score


def _with_mask_of(batch: Batch, of_partners: Batch) -> Batch:
    """The batch of the partners with the samples' own masks: beside its mask, a sample is pasted from a real image."""
    return of_partners | {"mask": batch["mask"]} if MaskedImage.batch_key in batch else of_partners


def _of_others(
    measure: Measure, images: Callable[[Batch], Tensor], held_out: HeldOutConditions, num_drawn_for: int
) -> float:
    """The figure of images that need no denoiser, for the held-out images that samples were drawn for."""
    sums = []
    for rows in torch.arange(num_drawn_for).split(AT_ONCE):
        batch = held_out.batch(rows)
        sums.append(measure.counts(measure.seen(images(batch)), batch).sum(axis=0))
    return float(measure.score(np.sum(sums, axis=0)))


def _warning(figure: Figure, condition: Condition) -> str:
    name, shuffled = _name_of(condition), figure.beside[SHUFFLED]
    if figure.real is not None and not figure.real > shuffled:
        return (
            f"{figure.title} says nothing of the samples: it is {figure.real:.3g} for real images, and {shuffled:.3g} "
            f"with the conditions of other images. Either the segmenter does not see the {name} in such images, or the "
            f"{name} of the held-out images are alike."
        )
    return (
        f"The samples do not follow the {name} measurably: {figure.title} is {figure.value:.3g}, and {shuffled:.3g} "
        "with the conditions of other images. Train for longer, or draw for more held-out images."
    )


def _name_of(condition: Condition) -> str:
    return "small image" if isinstance(condition, LowResolution) else condition.batch_key.replace("_", " ")


def _picture(samples: Selection, held_out: HeldOutConditions) -> Picture:
    """Conditions, real image and drawn image of the first samples, a row each."""
    rows = list(range(min(SHOWN, len(held_out), len(samples))))
    batch, values = held_out.batch(rows), samples.values
    columns: dict[str, Tensor] = {}
    for condition in held_out.conditions:
        seen = condition.seen(batch, batch)
        if seen is not None:
            has_channels = seen.shape[1] == batch["images"].shape[1]
            columns[_name_of(condition)] = values.seen(seen) if has_channels else seen
    columns |= {"real image": values.seen(batch["images"]), "drawn image": samples.seen(rows)}
    caption = f"The first {len(rows)} samples: {', '.join(columns)}, from left to right."
    return Picture("conditions", caption, side_by_side(columns))
