"""Labelled training data from a denoiser of masks: masks recombined from real ones, and an image drawn for each.

A pair is kept where a segmenter of real labels finds the mask in the image, as images that do not show their mask would
teach what is wrong. The output folder holds image/ and label/ with files of the same names, for `PairedFiles`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unet_diffusion.data.checking import decoded, in_threads
from unet_diffusion.data.decoding import decode_pages
from unet_diffusion.data.files import find_images_or_one
from unet_diffusion.data.label_decoding import decode_label_pages
from unet_diffusion.data.labelled import listed, match, mismatch
from unet_diffusion.data.scaling import to_float
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.reading import contents_of
from unet_diffusion.inference.sample_options import SampleOptions, Sampling
from unet_diffusion.inference.segment_files import sixteen_bits
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.runtime.atomic_files import atomic_write, read_json, remove_left_behind
from unet_diffusion.runtime.folder_settings import CONTENTS, require_same_settings
from unet_diffusion.runtime.pictures import picture_of, read_images, save_grid, scale_to_unit_range, to_uint8, write_png
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.segmentation.pictures import outlined
from unet_diffusion.segmentation.recombining import Mask, RecombinedMasks, pixels_at
from unet_diffusion.segmentation.scores import dice

StrPath = str | os.PathLike[str]
Labels = list[NDArray[np.int32]]
Progress = Callable[[int, int], object]

IMAGES, LABELS = "image", "label"  # folders of the output
RECORD, SHEET = "synthesize.json", "pairs.png"  # files beside them
MIN_DICE = 0.8
MOST_SHOWN, COLUMNS = 32, 8  # pairs on the sheet, and tiles in a row of it: each pair has two
BLANK = np.zeros((1, 1), dtype=np.int32)  # a mask of any size without objects
COLOURED = 16  # grey levels that the channels of a coloured image are apart, on average
ENLARGED = 2  # times, on the sheet, so that outlines are thin
COPIED_AT_ONCE = 64  # pairs; the record is written after them
OF_DRAWING = (  # settings
    *("scheduler", "num_inference_steps", "guidance_scale", "thresholding", "precision"),
    f"{CONTENTS}denoiser",
)


@dataclass
class Synthesis:
    """The pairs of a mask and an image that were made, and which of them were kept.

    Args:
        folder: The folder with the pairs.
        settings: What the pairs follow from, plain values.
        min_dice: A pair is kept if its Dice is at least this.
        dice: The Dice of the mask and what the segmenter finds in the image, by the name of each pair; None: there was
            no segmenter, and the pair was kept.
    """

    folder: Path
    settings: dict[str, Any]
    min_dice: float
    dice: dict[str, float | None] = field(default_factory=dict)

    @property
    def kept(self) -> list[str]:
        """The names of the pairs that were kept."""
        return [name for name, score in sorted(self.dice.items()) if score is None or score >= self.min_dice]

    @property
    def share_kept(self) -> float:
        """The share of the pairs that were kept."""
        return len(self.kept) / len(self.dice)

    def add(self, name: str, image: Tensor, labels: NDArray[np.int32], score: float | None) -> None:
        """Write a pair, if it is kept.

        Args:
            name: The name of the pair.
            image: The image, (C, H, W) uint8.
            labels: The number of the object at each pixel, (H, W).
            score: The Dice, as in `dice`.
        """
        self.dice[name] = score
        if score is None or score >= self.min_dice:
            write_png(Image.fromarray(sixteen_bits(labels)), self.folder / LABELS / f"{name}.png")
            write_png(picture_of(image), self.folder / IMAGES / f"{name}.png")

    def missing(self, num_images: int) -> list[int]:
        """The numbers of the pairs that are still to be made.

        Args:
            num_images: The number of all pairs.
        """
        return [number for number in range(num_images) if name_of(number) not in self.dice]

    def add_all(
        self, numbers: Sequence[int], masks: Sequence[Mask], images: Tensor, segmenter: Segmenter | None
    ) -> None:
        """Write those pairs that the segmenter lets be kept, and the record.

        Args:
            numbers: The numbers of the pairs.
            masks: Their masks.
            images: Their images, (N, C, H, W) uint8.
            segmenter: The segmenter; None: all pairs are kept.
        """
        for number, mask, image in zip(numbers, masks, images, strict=True):
            score = None if segmenter is None else _agreement(segmenter, image, mask.labels)
            self.add(name_of(number), image, mask.labels, score)
        self.save()

    def save(self) -> None:
        """Write the record, whole or not at all."""
        record = {"settings": self.settings, "num_images": len(self.dice), "num_kept": len(self.kept)}
        record |= {"share_kept": self.share_kept, "dice": dict(sorted(self.dice.items()))}
        with atomic_write(self.folder / RECORD) as partial:
            partial.write_text(json.dumps(record, indent=1))


def synthesize(
    denoiser: Denoiser,
    labels: StrPath,
    *,
    num_labels: int,
    output: StrPath,
    num_images: int = 64,
    segmenter: Segmenter | None = None,
    min_dice: float = MIN_DICE,
    image_size: tuple[int, int] | int | None = None,
    sampling: Sampling | None = None,
    progress: Progress = lambda done, total: None,
) -> Synthesis:
    """Write pairs of an image that is drawn and its label image, which training can use beside real ones.

    Mask i is a function of the label images, their size, the seed and i, and its image also of the denoiser and of how
    it draws. A call with the same settings continues where an earlier one was cut off.

    Args:
        denoiser: A denoiser with the condition `SemanticMap` of instances.
        labels: The label images that masks are made of, with a number for each object: a folder or archive.
        num_labels: The number of label files to use at most, the first by name, such as those that are not kept for a
            test.
        output: The folder for the pairs.
        num_images: Number of pairs to make; those that are not kept count.
        segmenter: A segmenter that was trained on real labels; None: all pairs are kept.
        min_dice: Pairs are kept whose Dice of the mask and what the segmenter finds is at least this.
        image_size: Height and width of the pairs in pixels, or one number for both; None: as in training.
        sampling: How images are drawn; its seed is also that of the masks. None: as `Sampling` has it.
        progress: Called with the number of image steps that are done, and of all that there are to do.

    Raises:
        FileNotFoundError: If there are no such labels.
        FileExistsError: If the output folder holds something else, or pairs of other settings.
        ValueError: If a number is out of range, if denoiser, segmenter and files do not fit each other, or if no pair
            was kept.
    """
    sampling = sampling or Sampling()
    options = SampleOptions(image_size=image_size, **vars(sampling))
    _check_denoiser(denoiser)
    _check_pairs(num_images, denoiser.image_shape[0], segmenter, min_dice)
    drawing = denoiser.drawing(replace(options, conditions={"semantic_map": BLANK}))  # checks the options
    _, height, width = denoiser.codec.image_shape(drawing.sample_shape)
    names, real = first_labels(labels, num_labels)
    masks = RecombinedMasks(real, (height, width), seed=sampling.seed, names=names)
    settings = _settings(real, [], segmenter, min_dice) | _settings_of_drawing(denoiser, sampling)
    settings |= {"num_labels": num_labels, "image_size": [height, width], "seed": sampling.seed}
    synthesis = _begun(Path(output), settings, min_dice, notes={"labels": str(labels)})
    todo = synthesis.missing(num_images)
    count = _counting(progress, len(todo) * drawing.num_steps)
    for numbers in [todo[i : i + sampling.batch_size] for i in range(0, len(todo), sampling.batch_size)]:
        made = [masks[number] for number in numbers]
        synthesis.add_all(numbers, made, _drawn(denoiser, options, made, numbers, count), segmenter)
    _finish(synthesis, "train the denoiser for longer")
    return synthesis


def copy_paste(
    images: StrPath,
    labels: StrPath,
    *,
    num_labels: int,
    output: StrPath,
    image_size: tuple[int, int],
    channels: Literal[1, 3],
    stretch: bool = False,
    num_images: int = 64,
    segmenter: Segmenter | None = None,
    min_dice: float = MIN_DICE,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Synthesis:
    """Write pairs whose pixels are copied from real images, and move with the objects; nothing is drawn.

    Ghiasi et al. 2021 augment instance segmentation in this way (https://arxiv.org/abs/2012.07177). The masks are those
    of `synthesize`, so that these pairs tell what drawing adds. Bright and dark images are not mixed, nor are grey and
    coloured ones. A call with the same settings continues where an earlier one was cut off.

    Args:
        images: The images that the labels belong to, with the same names: a folder or archive.
        labels: As in `synthesize`.
        num_labels: As in `synthesize`.
        output: The folder for the pairs.
        image_size: Height and width of the pairs in pixels.
        channels: Channels of the pairs: 1 for grey, 3 for colours.
        stretch: Whether the darkest value of each image becomes black and the brightest white.
        num_images: As in `synthesize`.
        segmenter: As in `synthesize`.
        min_dice: As in `synthesize`.
        seed: Seed of the masks.
        progress: Called with the number of pairs that are done, and of all that there are to do.

    Raises:
        FileNotFoundError: If there are no such labels or images.
        FileExistsError: If the output folder holds something else, or pairs of other settings.
        ValueError: If a number is out of range, if segmenter and files do not fit each other, or if no pair was kept.
    """
    _check_pairs(num_images, channels, segmenter, min_dice)
    if len(image_size) != 2 or min(image_size) < 1:
        raise ValueError(f"image_size must be a height and a width in pixels, got {tuple(image_size)}")
    names, real = first_labels(labels, num_labels)
    pixels = _images_of(images, labels, names, real, channels, stretch=stretch)
    kinds = [_kind_of(image) for image in pixels]
    masks = RecombinedMasks(real, image_size, seed=seed, names=names, kinds=kinds)
    settings = _settings(real, pixels, segmenter, min_dice)
    settings |= {"num_labels": num_labels, "image_size": list(image_size), "seed": seed}
    synthesis = _begun(Path(output), settings, min_dice, notes={"labels": str(labels)})
    todo = synthesis.missing(num_images)
    count = _counting(progress, len(todo))
    for numbers in [todo[i : i + COPIED_AT_ONCE] for i in range(0, len(todo), COPIED_AT_ONCE)]:
        made = [masks[number] for number in numbers]
        copied = torch.from_numpy(np.stack([pixels_at(pixels, mask) for mask in made]))
        synthesis.add_all(numbers, made, copied, segmenter)
        count(len(numbers))
    _finish(synthesis, "use images that the segmenter knows")
    return synthesis


def is_stretched(denoiser: Denoiser) -> bool:
    """Whether the images that a denoiser was trained on were stretched, as far as its settings say."""
    arguments = denoiser.settings
    for name in ("data", "source"):
        arguments = (arguments.get(name) or {}).get("init_args") or {}
    return bool(arguments.get("stretch"))


def name_of(number: int) -> str:
    """The name of the files of pair `number`, without the extension."""
    return f"{number:06d}"


def first_labels(root: StrPath, num_labels: int) -> tuple[list[str], Labels]:
    """The first label files by name: the name of each page, and the numbers of its objects, (H, W).

    Args:
        root: A folder, archive.zip, archive.zip/folder, or one file.
        num_labels: The number of files, at most.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the number is below 1, or a file cannot be read or holds negative numbers; the message lists it.
    """
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}; give the number of labels to train on")
    files = find_images_or_one(str(root))
    outcomes = list(in_threads(lambda name: decoded(decode_label_pages, files, name),
                               files.names[:num_labels], "loading labels", False))  # fmt: skip
    pages = [(name, page) for name, pages in outcomes if not isinstance(pages, str) for page in pages]
    wrong = [f"{name}: {why}" for name, why in outcomes if isinstance(why, str)]
    wrong += [
        f"{name}: numbers of objects must be 0 or more, got {page.min()}" for name, page in pages if page.min() < 0
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(outcomes)} label files cannot be used:{listed(wrong)}")
    return [name for name, _ in pages], [page for _, page in pages]


def _check_denoiser(denoiser: Denoiser) -> None:
    """Refuse a denoiser that draws no pictures from masks, before anything is read."""
    condition = denoiser.condition(SemanticMap)
    if condition is None or condition.config["label_format"] != "instances":
        raise ValueError("the denoiser must take masks of objects, and this one does not; train one with fit --config "
                         "nuclei_from_masks, whose condition is SemanticMap with label_format instances")  # fmt: skip
    if denoiser.values.value_range is not None:
        low, high = denoiser.values.value_range
        raise ValueError(f"the denoiser must be trained without a value_range, as pairs are pictures of 8 bits, and "
                         f"this one has {low:.6g} to {high:.6g}; train one on images of 8 or 16 bits")  # fmt: skip


def _check_pairs(num_images: int, channels: int, segmenter: Segmenter | None, min_dice: float) -> None:
    """Refuse numbers out of range, and a segmenter that does not fit the images, before anything is read."""
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if not 0 <= min_dice <= 1:
        raise ValueError(f"min_dice must be from 0 to 1, got {min_dice}; {MIN_DICE} is usual")
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, as pairs are pictures, got {channels}")
    if segmenter is None:
        return
    if segmenter.kind == "classes":
        raise ValueError("the segmenter must tell objects from background, and this one was trained on classes; use "
                         "one with label_format instances, 0/1 or 0/255")  # fmt: skip
    if segmenter.unet.in_channels != channels:
        raise ValueError(f"the segmenter must take the {channels} channels of the images of the pairs, and takes "
                         f"{segmenter.unet.in_channels}; train one with source.channels {channels}")  # fmt: skip
    if not segmenter.stretch:  # which gives the same image whatever the range
        fix = "give a segmenter of pictures of 8 or 16 bits"
        PixelValues().require_range_of(segmenter.values, "the segmenter was trained on", fix)


def _images_of(
    root: StrPath, labels_root: StrPath, names: Sequence[str], labels: Labels, channels: int, *, stretch: bool
) -> list[NDArray[np.uint8]]:
    """The image of each page of label files, (C, H, W), which must be as large as its label."""
    files, label_files = find_images_or_one(str(root)), find_images_or_one(str(labels_root))
    image_of = {label: image for image, label in match(files.names, label_files.names, can_have_suffix=False).values()}
    pages_of: dict[str, Labels] = {}
    for name, label in zip(names, labels, strict=True):
        pages_of.setdefault(name, []).append(label)

    def read(name: str) -> list[Tensor] | str:
        pages = decoded(lambda data: decode_pages(data, channels), files, image_of[name])
        return pages if isinstance(pages, str) else mismatch(pages, pages_of[name]) or pages

    outcomes = list(in_threads(read, list(pages_of), "loading images", False))
    if wrong := [f"{image_of[name]}: {why}" for name, why in outcomes if isinstance(why, str)]:
        raise ValueError(f"{len(wrong)} of {len(pages_of)} images cannot be used:{listed(wrong)}")
    pages = [page for _, pages in outcomes if not isinstance(pages, str) for page in pages]
    return [to_uint8(to_float(page, stretch=stretch)[None])[0].numpy() for page in pages]


def _kind_of(image: NDArray[np.uint8]) -> int:
    """A number for grey or coloured images, (C, H, W), on a dark or a bright ground, whose objects look alike."""
    return 2 * int(np.median(image) > np.iinfo(np.uint8).max / 2) + int(np.ptp(image, axis=0).mean() > COLOURED)


def _settings(
    labels: Labels, images: list[NDArray[np.uint8]], segmenter: Segmenter | None, min_dice: float
) -> dict[str, Any]:
    """Plain values that decide, with the sizes and seeds, what each pair is and whether it is kept.

    Args:
        labels: The numbers of the objects in each label image.
        images: The images whose pixels are copied; none where images are drawn.
        segmenter: The segmenter that finds the masks again.
        min_dice: The least Dice of a pair that is kept.
    """
    return {
        **dict.fromkeys(OF_DRAWING),
        "is_copied": bool(images),
        f"{CONTENTS}segmenter": None if segmenter is None else contents_of(segmenter),
        f"{CONTENTS}labels": _hash_of(labels),
        f"{CONTENTS}images": _hash_of(images),
        "min_dice": None if segmenter is None else min_dice,
    }


def _settings_of_drawing(denoiser: Denoiser, sampling: Sampling) -> dict[str, Any]:
    values = (sampling.scheduler, sampling.num_inference_steps, sampling.guidance_scale, sampling.thresholding)
    return dict(zip(OF_DRAWING, (*values, denoiser.precision, contents_of(denoiser)), strict=True))


def _hash_of(arrays: Sequence[NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _begun(folder: Path, settings: dict[str, Any], min_dice: float, notes: dict[str, Any]) -> Synthesis:
    """The pairs that a folder holds already, which must be of the same settings."""
    require_same_settings(folder, settings, "synthetic pairs", fix="choose another --output", notes=notes)
    remove_left_behind(folder)
    done = read_json(folder / RECORD)["dice"] if (folder / RECORD).exists() else {}
    return Synthesis(folder, settings, min_dice, done)


def _counting(progress: Progress, total: int) -> Callable[[int], object]:
    """A function that is told how many further steps are done, and reports all of them."""
    done = 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        progress(done, total)

    return count


def _finish(synthesis: Synthesis, how: str) -> None:
    """Write the picture of some pairs; without any that was kept, raise an error that says how there could be some."""
    if not synthesis.kept:
        best = max(score for score in synthesis.dice.values() if score is not None)
        raise ValueError(f"none of {len(synthesis.dice)} pairs was kept, as the best Dice is {best:.2f} and min_dice "
                         f"{synthesis.min_dice}; {how}, or lower min_dice")  # fmt: skip
    _save_sheet(synthesis)


def _drawn(
    denoiser: Denoiser,
    options: SampleOptions,
    masks: Sequence[Mask],
    numbers: Sequence[int],
    progress: Callable[[int], object],
) -> Tensor:
    """Images drawn for masks, (N, C, H, W) uint8, from the noise of these numbers."""
    conditions = {"semantic_map": [mask.labels for mask in masks]}
    drawing = denoiser.drawing(replace(options, num_images=len(masks), conditions=conditions), numbers)
    return to_uint8(drawing.draw(range(len(masks)), progress))


def _agreement(segmenter: Segmenter, image: Tensor, labels: NDArray[np.int32]) -> float:
    """The Dice of a mask and what the segmenter finds in its image, (C, H, W) uint8, which is not stretched again."""
    segmentation = segmenter.segment(scale_to_unit_range(image))
    return round(dice(labels > 0, segmentation.classes > 0), 4)


def _save_sheet(synthesis: Synthesis) -> None:
    """A picture of the first pairs that were kept: each image, and beside it the same with outlines of its objects."""
    tiles = []
    for name in synthesis.kept[:MOST_SHOWN]:
        image = read_images([synthesis.folder / IMAGES / f"{name}.png"])[0]
        with Image.open(synthesis.folder / LABELS / f"{name}.png") as file:
            labels = np.asarray(file).repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)
        large = image.repeat_interleave(ENLARGED, dim=1).repeat_interleave(ENLARGED, dim=2)
        marked = torch.from_numpy(np.asarray(outlined(large, labels)).copy()).permute(2, 0, 1)
        tiles += [large.expand(3, -1, -1), marked / 127.5 - 1]
    save_grid(torch.stack(tiles), synthesis.folder / SHEET, columns=COLUMNS)
