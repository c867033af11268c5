"""What is wrong with classes and label images: balance, what is missing, empty ones, objects and how they touch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unet_diffusion.checks.findings import Finding, percent
from unet_diffusion.runtime.messages import first_few
from unet_diffusion.segmentation.labels import NO_VALUE, Targets

FEW = 10  # images of a class; with fewer it is learnt by heart
UNBALANCED = 20  # times as many images in the largest class as in the smallest
RARE = 0.01  # of the pixels
MANY_EMPTY = 0.3  # of the label images
MANY_TOUCHING = 0.05  # of the objects


def class_findings(labels: Tensor, class_names: Sequence[str], train: Tensor, val: Tensor) -> list[Finding]:
    """Classes that are missing, too small, or much smaller than others.

    Args:
        labels: The class of each image, (N,) int64.
        class_names: The name of each class.
        train: The images to train on, (N,) int64.
        val: The images to validate on, (M,) int64.
    """
    counts, held_out = (labels[side].bincount(minlength=len(class_names)).tolist() for side in (train, val))
    named = list(zip(class_names, counts, strict=True))
    findings = []
    if missing := [name for name, number in named if not number]:
        text = f"{len(missing)} of {len(named)} classes have no image to train on ({first_few(missing)})"
        findings.append(Finding("warning", text, "add images, or remove the classes"))
    if few := [f"{name}: {number}" for name, number in named if 0 < number < FEW]:
        text = f"{len(few)} of {len(named)} classes have fewer than {FEW} images to train on ({first_few(few)})"
        findings.append(Finding("advice", f"{text}: they are learnt by heart", "add images, or merge classes"))
    least, most = (min(named, key=lambda one: one[1] or np.inf), max(named, key=lambda one: one[1]))
    if most[1] > UNBALANCED * max(least[1], 1):
        text = (
            f"class {most[0]} has {most[1] / max(least[1], 1):.0f} times as many images as {least[0]} ({most[1]} and "
            f"{least[1]}), and is shown as much more often"
        )
        findings.append(Finding("advice", text, "add images of the small classes, or leave out some of the large ones"))
    if absent := [name for name, number in zip(class_names, held_out, strict=True) if not number]:
        text = f"{len(absent)} of {len(named)} classes have no image to validate on ({first_few(absent)})"
        findings.append(Finding("note", text, "--data.num_val N, a larger one"))
    return findings


@dataclass(frozen=True)
class Objects:
    """The objects of label images.

    Args:
        areas: The area of each in pixels, of all images.
        num_touching: How many touch another one.
        num_empty: How many label images hold none.
    """

    areas: NDArray[np.int64]
    num_touching: int
    num_empty: int


def objects_of(labels: Sequence[NDArray[np.int32]], targets: Targets) -> Objects:
    """The objects of label images, by their numbers or as connected regions.

    Args:
        labels: The label images, (H, W) each.
        targets: What their numbers mean.
    """
    areas, num_touching, num_empty = [np.zeros(0, dtype=np.int64)], 0, 0
    for label in labels:
        numbers = targets.instances(label)
        sizes = np.unique(numbers[numbers > 0], return_counts=True)[1]
        areas.append(sizes)
        num_empty += not len(sizes)
        num_touching += len(touching(numbers))
    return Objects(np.concatenate(areas), num_touching, num_empty)


def touching(numbers: NDArray[np.int32]) -> set[int]:
    """The numbers of objects that have a neighbouring pixel, above, below or beside, of another object.

    Args:
        numbers: The number of each pixel's object, 0 for background, (H, W).
    """
    found: set[int] = set()
    for one, other in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        meet = (one != other) & (one > 0) & (other > 0)
        found |= {*one[meet].tolist(), *other[meet].tolist()}
    return found


def object_facts(objects: Objects, num_images: int) -> list[str]:
    """Lines about the number and the size of objects."""
    if not len(objects.areas):
        return []
    least, median, most = np.quantile(objects.areas, (0.05, 0.5, 0.95))
    return [
        f"{len(objects.areas):,} objects, {len(objects.areas) / num_images:.3g} an image; areas of {least:.0f} to "
        f"{most:.0f} pixels, half of them below {median:.0f}; {objects.num_touching:,} touch another"
    ]


def object_findings(objects: Objects, targets: Targets, num_images: int, window_size: int) -> list[Finding]:
    """What is wrong with objects: none, touching ones that are learnt as one, and some larger than a window.

    Args:
        objects: The objects.
        targets: What is learnt.
        num_images: The number of label images.
        window_size: Height and width of a training window in pixels.
    """
    findings = []
    if objects.num_empty > MANY_EMPTY * num_images:
        text = f"{objects.num_empty} of {num_images} label images hold no object, and many windows only background"
        findings.append(Finding("advice", text, "fewer of them"))
    share = objects.num_touching / max(len(objects.areas), 1)
    if share > MANY_TOUCHING and targets.label_format == "instances" and targets.kind == "binary":
        text = f"{percent(share)} of the objects touch another, and are learnt as one with it"
        findings.append(Finding("advice", text, "--data.targets.separate_borders true, and one more out_channels"))
    # Images that are scaled to objects of one size have objects of that size in windows.
    if len(objects.areas) and (large := targets.object_diameter or np.median(objects.areas) ** 0.5) > window_size:
        text = f"half of the objects are wider than a window of {window_size} pixels (about {large:.0f})"
        findings.append(Finding("advice", text, "--data.window_size N, a larger one, or smaller images"))
    return findings


def pixel_findings(classes: Sequence[Tensor], targets: Targets, loss: str) -> list[Finding]:
    """Classes of few pixels, which cross-entropy alone ignores, and classes of none.

    Args:
        classes: The class of each pixel of the images to train on, (H, W) each.
        targets: What is learnt.
        loss: The loss, "cross_entropy", "dice" or "both".
    """
    names = targets.class_names
    counts = sum(one[one != NO_VALUE].long().bincount(minlength=len(names)) for one in classes)
    assert isinstance(counts, Tensor)
    shares = (counts / counts.sum()).tolist()
    findings = []
    if missing := [name for name, share in zip(names, shares, strict=True) if not share]:
        text = f"{len(missing)} of {len(names)} classes have no pixel to train on ({first_few(missing)})"
        findings.append(Finding("warning", text, "--data.targets.num_classes, or labels that hold them"))
    rare = [f"{name}: {percent(share)}" for name, share in zip(names, shares, strict=True) if 0 < share < RARE]
    if rare and loss == "cross_entropy" and not targets.class_balance:
        text = (
            f"{len(rare)} classes have under {percent(RARE)} of the pixels ({first_few(rare)}): the loss ignores them"
        )
        findings.append(Finding("advice", text, "--model.loss both, or --data.targets.class_balance true"))
    return findings
