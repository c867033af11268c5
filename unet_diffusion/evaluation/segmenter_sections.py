"""The sections of a segmenter's evaluation: what was counted in its images becomes figures, and what they mean.

Each score has two means, which differ where images differ in what they hold: over images, where each image counts
alike, and pooled, where each pixel or object does.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from unet_diffusion.evaluation.intervals import Values, as_sums, interval, interval_of_mean, mean, mean_of_sums
from unet_diffusion.evaluation.plots import reliability_plot
from unet_diffusion.evaluation.result import Figure, Picture, Section, Table
from unet_diffusion.evaluation.scores_of_counts import (
    average_precision_of,
    calibration_error_of,
    challenge_pixel_error_of,
    dice_by_class,
    dice_of,
    f1_of,
    iou_by_class,
    iou_of,
    mean_average_precision_of,
    overconfidence_of,
    pixel_error_of,
    reliability_of,
)
from unet_diffusion.evaluation.segmented_images import IOU_THRESHOLDS, ImageCounts
from unet_diffusion.evaluation.thresholds import FITTED, FittedThreshold, ScoresByThreshold, fitted_thresholds
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.segmentation.labels import Kind
from unet_diffusion.segmentation.scores import rand_error_of, v_info_of, v_rand_of

Better = Literal["lower", "higher"]
Score = Callable[[Values], Values]
Row = list[str | float | int | None]

NUM_SIZES = 4  # of objects, each with as many true ones
MOST_SHOWN_CLASSES = 8  # in a plot
FAR_OFF = 0.05  # of a calibration error
FEW_OBJECTS = 20  # less say nothing about a size
MUCH_LESS = 0.5  # of the largest objects' share that is found
BEST_OF = "Best of nine thresholds as in the ISBI 2012 challenge; chosen on these images, which flatters a little."
BEST_F = "1 - the best F-score of pixels over all thresholds; the threshold is chosen on these images."
OVER = "Above 0: probabilities are too near to 0 and 1. Below 0: they are too near to a half."

ABOUT_MASKS = (
    "Pixels of the mask that the command segment writes. The mean over images counts each image alike. Pooled, each "
    "pixel counts alike, so that images full of foreground decide. Dice and IoU are of all classes but the first; an "
    "image counts for the classes that occur in its label or its mask."
)
ABOUT_OBJECTS = (
    "AP is TP / (TP + FP + FN), as in the Data Science Bowl 2018. An object is found if a predicted one has an IoU of "
    "at least 0.5 with it; 0.5 to 0.9 asks for exact shapes, too. A merger of two objects costs both."
)
ABOUT_SEGMENTS = (
    "V_rand, V_info (1 is best) and the Rand error weigh objects by their pixels: one merger of two large objects "
    "costs as much as many of small ones."
)
ABOUT_SIZES = "By size, each row has as many true objects; what is falsely predicted counts by its own size."
PARTS = {
    "classes": "The connected parts of a class are its objects here.",
    "binary": "The connected parts of the foreground are its objects.",
    "affinities": "The mutex watershed divides the foreground into objects.",
}
TRAINED_ON = (
    "The network was trained on them, which may make them too easy: keep some from training (data.num_train) for a "
    "better fit."
)
RELIABILITY = (
    "A point below the dashed line: the class is there less often than its probability says. Below, the share of "
    "pixels with such a probability, on a logarithmic scale."
)


def mask_section(kind: Kind, class_names: Sequence[str], images: Sequence[ImageCounts]) -> Section:
    """How much of the pixels is right.

    Args:
        kind: The meaning of the classes.
        class_names: The name of each class.
        images: The counts of each image.
    """
    mask, classes = (np.stack([getattr(image, name) for image in images]) for name in ("mask", "classes"))
    figures = [
        *_both("dice", "Dice", "higher", mask, dice_of),
        *_both("iou", "IoU", "higher", mask, iou_of),
        *_both("pixel_error", "Pixel error", "lower", mask, pixel_error_of),
    ]
    if kind in ("binary", "affinities"):
        foreground = np.stack([image.reliability[0] for image in images])
        title = "Pixel error of the ISBI 2012 challenge"
        figures.append(_pooled("challenge_pixel_error", title, "lower", foreground, challenge_pixel_error_of, BEST_F))
    table, warnings = _class_table(class_names, classes), _lost(class_names, classes)
    return Section("Are the masks right?", ABOUT_MASKS, figures, [table], warnings=warnings)


def object_section(
    kind: Kind, images: Sequence[ImageCounts], *, membranes: Sequence[Values | None], warped: Sequence[Values | None]
) -> Section:
    """How many objects are found, kept apart, and of the right shape.

    Args:
        kind: The meaning of the classes.
        images: The counts of each image.
        membranes: Sums of `membrane_sums` of each image, for kinds "binary" and "affinities".
        warped: `warped_shares` of each image, for these kinds, too.
    """
    objects = np.stack([image.objects.counts() for image in images])  # (N, T, 3)
    figures = [
        *_both("ap_50", "AP at IoU 0.5", "higher", objects[:, 0], average_precision_of),
        *_both("ap_50_90", "AP, mean of IoU 0.5 to 0.9", "higher", objects, mean_average_precision_of),
        *_both("f1_50", "F1 at IoU 0.5", "higher", objects[:, 0], f1_of),
    ]
    if kind == "instances":
        segments = np.stack([image.segments for image in images])
        for key, title, better, score in SEGMENT_SCORES:
            figures += _both(key, title, better, segments, _where_counted(score))
    if kind in ("binary", "affinities"):
        sums = np.stack([one for one in membranes if one is not None])
        for key, title, better, score in SEGMENT_SCORES:
            figures += _best(key, title, better, sums, _where_counted(score))
        wrong = np.stack([one for one in warped if one is not None])
        figures += _best("warping_error", "Warping error", "lower", wrong, mean_of_sums)
    about = [PARTS.get(kind, ""), ABOUT_OBJECTS, "" if kind == "classes" else ABOUT_SEGMENTS, ABOUT_SIZES]
    sizes = _sizes(images)
    tables = [_iou_table(objects), _size_table(images, sizes)]
    return Section(
        "Are objects found and kept apart?",
        " ".join(filter(None, about)),
        figures,
        tables,
        warnings=_missed_small(tables[1]),
    )


SEGMENT_SCORES: tuple[tuple[str, str, Better, Score], ...] = (
    ("v_rand", "V_rand", "higher", v_rand_of),
    ("v_info", "V_info", "higher", v_info_of),
    ("rand_error", "Rand error", "lower", rand_error_of),
)


def calibration_section(kind: Kind, class_names: Sequence[str], images: Sequence[ImageCounts]) -> Section:
    """Whether probabilities come true as often as they say.

    Args:
        kind: The meaning of the classes.
        class_names: The name of each class.
        images: The counts of each image.
    """
    bins = np.stack([image.reliability for image in images])  # (N, P, B, 3)
    of = "the likeliest class" if kind == "classes" else "foreground"
    error = _pooled("calibration_error", "Expected calibration error", "lower", bins[:, 0], calibration_error_of)
    over = _pooled("overconfidence", "Overconfidence", None, bins[:, 0], overconfidence_of, OVER)
    sums = bins.sum(axis=0)
    names = [of] if kind != "classes" else [of, *class_names]
    curves = {name: reliability_of(one) for name, one in zip(names, sums, strict=True)}
    shown = dict(list(curves.items())[: MOST_SHOWN_CLASSES + 1])
    tables = []
    if kind == "classes":
        rows: list[Row] = [[name, float(calibration_error_of(one)), float(overconfidence_of(one))]
                           for name, one in zip(class_names, sums[1:], strict=True)]  # fmt: skip
        tables.append(Table("calibration", "By class", ["class", "calibration error", "overconfidence"], rows))
    warnings = []
    if error.value > FAR_OFF and abs(over.value) > error.value / 2:
        way = "too near to 0 and 1 (overconfident)" if over.value > 0 else "too near to a half"
        warnings.append(
            f"Probabilities of {of} are off by {error.value:.2f} in the mean, {way}. Use them to rank and for "
            "thresholds, but do not read them as they stand."
        )
    about = (
        f"Where {of} has a probability of 0.8, 80 % of the pixels should be {of}. The expected calibration error is "
        f"the mean distance from that over the pixels of all images, in {len(curves[of][0])} bins. Most pixels are "
        "easy; the plot shows the others."
    )
    picture = Picture("reliability", RELIABILITY, reliability_plot(shown, of=of))
    return Section("Can its probabilities be believed?", about, [error, over], tables, [picture], warnings)


def threshold_section(
    segmenter: Segmenter,
    fits: Sequence[ScoresByThreshold],
    images: Sequence[ScoresByThreshold],
    *,
    were_trained_on: bool,
) -> Section:
    """What a threshold that was fitted on other images changes on the validation images.

    Args:
        segmenter: The segmenter, with the threshold and the least size that it takes.
        fits: The images that thresholds are fitted on.
        images: The validation images.
        were_trained_on: Whether the network has seen the images that thresholds are fitted on.
    """
    figures, rows, warnings = [], [], []
    for fitted in fitted_thresholds(fits):
        own = fitted.instead(segmenter.threshold, segmenter.min_size)
        before, after = (np.array([place.score(image) for image in images]) for place in (own, fitted))
        change = interval_of_mean(after - before)
        title, size = FITTED[fitted.key], "" if fitted.min_size is None else f", objects from {fitted.min_size} pixels"
        rows.append([title, fitted.threshold, fitted.min_size, mean(before), mean(after), *(change or (None, None))])
        name, remark = f"{title}, mean over images, with a fitted threshold", f"Threshold {fitted.threshold:g}{size}."
        figures.append(
            Figure(f"{fitted.key}_fitted", name, mean(after), "higher", interval_of_mean(after), remark=remark)
        )
        if change is not None and change[0] > 0:
            warnings.append(_advice(fitted, title, mean(before), mean(after)))
    about = (
        "Foreground is where its probability is above a threshold, and objects below a least size are left out. Both "
        f"are fitted on {len(fits)} images that are not validated on, for each score by itself. "
        + (TRAINED_ON if were_trained_on else "The network was not trained on them.")
        + " The change is on the validation images, with its interval."
    )
    columns = ["score", "threshold", "least object, pixels", "before", "after", "change from", "to"]
    table = Table("thresholds", "Fitted thresholds, and scores on the validation images", columns, rows)
    return Section("Would another threshold be better?", about, figures, [table], warnings=warnings)


def _advice(fitted: FittedThreshold, title: str, before: float, after: float) -> str:
    size = "" if fitted.min_size is None else f" --instances --min_size {fitted.min_size}"
    return (f"{title} rises from {before:.3f} to {after:.3f} with the threshold {fitted.threshold:g}: "
            f"unet-diffusion segment RUN IMAGES --output DIR --threshold {fitted.threshold:g}{size}")  # fmt: skip


def _both(key: str, title: str, better: Better, counts: Values, score: Score) -> list[Figure]:
    """A score as the mean over images, and of the sums over them."""
    values = score(counts)
    over = Figure(f"{key}_images", f"{title}, mean over images", mean(values), better, interval_of_mean(values))
    return [over, _pooled(f"{key}_pooled", f"{title}, pooled", better, counts, score)]


def _pooled(key: str, title: str, better: Better | None, counts: Values, score: Score, remark: str = "") -> Figure:
    return Figure(key, title, float(score(counts.sum(axis=0))), better, interval(score, counts), remark=remark)


def _best(key: str, title: str, better: Better, counts: Values, score: Score) -> list[Figure]:
    """As `_both`, at the threshold, the second axis of the counts, that is best for all images."""
    best = np.max if better == "higher" else np.min

    def of_means(sums: Values) -> Values:
        return best(mean_of_sums(sums), axis=-1)

    def of_sums(sums: Values) -> Values:
        return best(score(sums), axis=-1)

    values = as_sums(score(counts))  # (N, T, 2)
    over, remark = float(of_means(values.sum(axis=0))), BEST_OF
    return [
        Figure(f"{key}_images", f"{title}, mean over images", over, better, interval(of_means, values), remark=remark),
        _pooled(f"{key}_pooled", f"{title}, pooled", better, counts, of_sums, remark),
    ]


def _where_counted(score: Score) -> Score:
    """The score of sums of `segment_sums`; NaN where there are none, as in an image without objects."""
    return lambda sums: np.where(sums[..., 0, 0] > 0, score(sums), np.nan)


def _class_table(class_names: Sequence[str], classes: Values) -> Table:
    dice, iou = dice_by_class(classes), iou_by_class(classes)
    sums = classes.sum(axis=0)
    pooled, shares = (dice_by_class(sums), iou_by_class(sums)), sums[:, 1] / max(sums[:, 1].sum(), 1)
    rows: list[Row] = [
        [name, int((classes[:, number, 1] > 0).sum()), float(100 * shares[number]), mean(dice[:, number]),
         float(pooled[0][number]), mean(iou[:, number]), float(pooled[1][number])]
        for number, name in enumerate(class_names)
    ]  # fmt: skip
    columns = ["class", "images with it", "% of pixels", "Dice, images", "Dice, pooled", "IoU, images", "IoU, pooled"]
    return Table("classes", "By class of the network, the likeliest one of each pixel", columns, rows)


def _lost(class_names: Sequence[str], classes: Values) -> list[str]:
    right, truth, _ = classes.sum(axis=0).T
    lost = [name for name, hit, all_of in zip(class_names, right, truth, strict=True) if all_of and not hit]
    text = (
        f"No pixel of {', '.join(lost)} is found. Train for longer, weight classes (data.targets.class_balance), or "
        "set model.loss to both."
    )
    return [text] if lost else []


def _iou_table(objects: Values) -> Table:
    sums = objects.sum(axis=0)
    rows: list[Row] = [
        [f"{threshold:g}", mean(average_precision_of(objects[:, number])), float(average_precision_of(sums[number])),
         mean(f1_of(objects[:, number])), float(f1_of(sums[number])), *map(int, sums[number])]
        for number, threshold in enumerate(IOU_THRESHOLDS)
    ]  # fmt: skip
    columns = ["IoU", "AP, images", "AP, pooled", "F1, images", "F1, pooled", "found", "falsely predicted", "missed"]
    return Table("by_iou", "By the least IoU of a match", columns, rows)


def _sizes(images: Sequence[ImageCounts]) -> Values:
    """The areas between sizes of objects, so that each size has as many true ones; fewer where areas are equal."""
    areas = np.concatenate([image.objects.true_areas for image in images])
    inner = np.quantile(areas, np.arange(1, NUM_SIZES) / NUM_SIZES) if len(areas) else np.zeros(0)
    return np.unique(np.floor(inner))


def _size_table(images: Sequence[ImageCounts], sizes: Values) -> Table:
    parts = [
        np.concatenate([getattr(image.objects, name) for image in images])
        for name in ("true_areas", "true_ious", "areas", "ious")
    ]
    of_true, of_predicted = (np.searchsorted(sizes, areas) for areas in (parts[0], parts[2]))
    rows: list[Row] = []
    for number in range(len(sizes) + 1):
        ious = parts[1][of_true == number]
        found = int((ious > 0).sum())
        false = int(((of_predicted == number) & (parts[3] == 0)).sum())
        total = len(ious) + false
        shape = float(ious[ious > 0].mean()) if found else None
        low, high = (int(sizes[number - 1]) + 1 if number else 1), (int(sizes[number]) if number < len(sizes) else None)
        name = f"{low:,} to {high:,}" if high is not None else f"{low:,} and more"
        rows.append([name, len(ious), found / len(ious) if len(ious) else None, false,
                     found / total if total else None, shape])  # fmt: skip
    columns = ["pixels", "true objects", "share found", "falsely predicted", "AP at IoU 0.5", "mean IoU of those found"]
    return Table("by_size", "By size of the object", columns, rows)


def _missed_small(sizes: Table) -> list[str]:
    found = [row[2] for row in sizes.rows if isinstance(row[2], float)]
    if sum(int(row[1] or 0) for row in sizes.rows) < FEW_OBJECTS or len(found) < NUM_SIZES:
        return []
    smallest, largest = found[0], found[-1]
    if smallest >= MUCH_LESS * largest:
        return []
    return [
        f"Of the smallest quarter of the objects ({sizes.rows[0][0]} pixels) {smallest:.0%} are found, of the largest "
        f"{largest:.0%}. Enlarge the images, or lower data.targets.border_width if small objects are all border."
    ]
