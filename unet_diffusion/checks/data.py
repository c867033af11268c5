"""What is found in the data of a run: it looks at what the data module has loaded, and reads no file itself.

A quick look, as at the beginning of training, takes about a second: of large sets it takes some images, and of images
that are not in memory none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.checks.captions import caption_facts, caption_findings, cut_findings
from unet_diffusion.checks.duplicates import alike_findings, exact_findings, thumbnails
from unet_diffusion.checks.findings import Finding, Section
from unet_diffusion.checks.images import crop_findings, image_findings, value_ends, value_facts
from unet_diffusion.checks.labels import (
    class_findings,
    object_facts,
    object_findings,
    objects_of,
    pixel_findings,
)
from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.data.folder import Folder
from unet_diffusion.data.known import contents_of_pixels
from unet_diffusion.data.segmentation import SegmentationDataModule
from unet_diffusion.data.shards import ShardedImages
from unet_diffusion.diffusion.conditions.text import TextTokens

QUICK_VALUES = 2**23  # numbers of images that a quick look takes; a second passes at several times as many
QUICK_COMPARED = 2**26  # numbers of a set whose images a quick look compares
QUICK_PAIRS = 2**22  # of images to train on and to validate on
QUICK_CAPTIONS = 10_000
NUM_DECODED = 500  # of images that are not in memory


def data_sections(data: Any, *, texts: Sequence[TextTokens] = (), loss: str = "", quick: bool = False) -> list[Section]:
    """What is found in the data.

    Args:
        data: The data module, set up.
        texts: The conditions that read captions, with their tokenizers.
        loss: The loss of a segmenter.
        quick: Whether to look for about a second only.
    """
    if isinstance(data, SegmentationDataModule):
        return _of_labelled(data, loss, quick)
    if isinstance(data, ImageDataModule):
        return _of_images(data, texts, quick)
    return []


def _of_images(data: ImageDataModule, texts: Sequence[TextTokens], quick: bool) -> list[Section]:
    train, val = data.train_indices, data.val_indices
    facts, findings = data.summary(), list[Finding]()
    if (some := _some_images(data, quick)) is not None:
        facts += value_facts(some[0])
        findings += image_findings(*some)
    if isinstance(data.source, Folder) and data.source.crops is not None:
        findings += crop_findings([crop.size for crop in data.source.crops], data.image_shape[1:])
    sections = [Section("Data", facts, [*findings, *_duplicates(data, quick)])]
    labels, class_names, captions = data.entries.get("labels"), data.class_names, data.entries.get("captions")
    if isinstance(labels, Tensor) and class_names is not None:
        sections.append(Section("Classes", [], class_findings(labels, class_names, train, val)))
    if isinstance(captions, list) and not (quick and len(captions) > QUICK_CAPTIONS):
        cut = [one for text in texts for one in cut_findings(text.num_tokens(captions), text.config["max_length"])]
        found = [*cut, *caption_findings(captions, train, val)]
        sections.append(Section("Captions", caption_facts(captions), found))
    return sections


def _some_images(data: ImageDataModule, quick: bool) -> tuple[Any, list[str]] | None:
    """The images that are looked at, and their names; None if that takes too long, or they are latents."""
    images = data.image_set.images
    if isinstance(images, ShardedImages) or images.dtype.is_floating_point:
        return None
    names = _names(data)
    if isinstance(images, Tensor):
        step = max(images.numel() // QUICK_VALUES, 1) if quick else 1
        return images[::step], names[::step]
    step = max(len(images) // NUM_DECODED, 1)
    return None if quick else (images.index_select(0, torch.arange(0, len(images), step)), names[::step])


def _names(data: ImageDataModule) -> list[str]:
    return data.image_set.names or [str(number) for number in range(len(data.image_set.images))]


def _duplicates(data: ImageDataModule, quick: bool) -> list[Finding]:
    images, contents, names = data.image_set.images, data.image_set.contents, _names(data)
    train, val = data.train_indices, data.val_indices
    if not isinstance(images, Tensor):
        return [] if contents is None else exact_findings(contents, names, train, val)
    findings = list[Finding]()
    is_small = images.numel() <= QUICK_COMPARED
    if contents is not None or is_small or not quick:
        findings += exact_findings(contents or _contents(images), names, train, val)
    if not quick or (is_small and len(train) * len(val) <= QUICK_PAIRS):
        findings += alike_findings(thumbnails(images), names, train, val)
    return findings


def _contents(images: Tensor) -> list[str]:
    """A hash of each image; images of one colour are not counted as equal, as tiles without content are many."""
    ends = value_ends(images)
    hashes = contents_of_pixels(images)
    return [one if low != high else str(i) for i, (one, (low, high)) in enumerate(zip(hashes, ends, strict=True))]


def _of_labelled(data: SegmentationDataModule, loss: str, quick: bool) -> list[Section]:
    loaded, targets = data.images, data.targets
    num_values = sum(image.numel() for image in loaded.images)
    step = max(num_values // QUICK_VALUES, 1) if quick else 1
    images, labels, names = loaded.images[::step], loaded.labels[::step], loaded.names[::step]
    findings = image_findings(images, names)
    facts, of_labels = list[str](), list[Finding]()
    if step == 1:
        train, val = data.train_images, data.val_indices
        findings += exact_findings(contents_of_pixels(images), names, train, val)
        findings += alike_findings(thumbnails(images), names, train, val)
        of_labels += pixel_findings([data.classes(i) for i in train.tolist()], targets, loss)
    if targets.kind != "classes":
        objects = objects_of(labels, targets)
        facts = object_facts(objects, len(labels))
        of_labels += object_findings(objects, targets, len(labels), data.window_size)
    return [Section("Data", [*data.summary(), *value_facts(images)], findings), Section("Labels", facts, of_labels)]
