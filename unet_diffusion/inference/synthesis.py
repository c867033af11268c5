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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unet_diffusion.data.checking import decoded, in_threads
from unet_diffusion.data.decoding import decode_pages
from unet_diffusion.data.files import find_images_or_one
from unet_diffusion.data.label_decoding import decode_label_pages
from unet_diffusion.data.labelled import listed, match
from unet_diffusion.data.scaling import to_float
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.reading import contents_of
from unet_diffusion.inference.sample_options import SampleOptions
from unet_diffusion.inference.segment_files import sixteen_bits
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.runtime.atomic_files import atomic_write, read_json, remove_left_behind
from unet_diffusion.runtime.folder_settings import CONTENTS, require_same_settings
from unet_diffusion.runtime.pictures import picture_of, read_images, save_grid, scale_to_unit_range, to_uint8, write_png
from unet_diffusion.segmentation.pictures import outlined
from unet_diffusion.segmentation.recombining import Mask, RecombinedMasks, pixels_at
from unet_diffusion.segmentation.scores import dice

StrPath = str | os.PathLike[str]
Labels = list[NDArray[np.int32]]

IMAGES, LABELS = "image", "label"  # folders of the output
RECORD, SHEET = "synthesize.json", "pairs.png"  # files beside them
MIN_DICE = 0.8
MOST_SHOWN, COLUMNS = 32, 8  # pairs on the sheet, and tiles in a row of it: each pair has two
BLANK = np.zeros((1, 1), dtype=np.int32)  # a mask of any size without objects
COLOURED = 16  # grey levels that the channels of a coloured image are apart, on average
ENLARGED = 2  # times, on the sheet, so that outlines are thin


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
    copy_from: StrPath | None = None,
    image_size: tuple[int, int] | int | None = None,
    scheduler: Any = "DPMSolverMultistepScheduler",
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Synthesis:
    """Write pairs of an image and its label image that training can use beside real ones.

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
        copy_from: The images that the labels belong to: their pixels move with the objects, stretched if those that the
            denoiser was trained on were, and nothing is drawn. Bright and dark images are not mixed, nor are grey and
            coloured ones. Of the denoiser only the size, the channels and the stretch count. None: images are drawn.
        image_size: Height and width of the pairs in pixels, or one number for both; None: as in training.
        scheduler: A diffusers scheduler, or the name of its class.
        num_inference_steps: Denoising steps.
        guidance_scale: Strength of the pull towards the mask; 1 is off.
        seed: Seed of masks and noise.
        batch_size: Number of images drawn at once.
        progress: Called with the number of image steps that are done, and of all that there are to do.

    Raises:
        FileNotFoundError: If there are no such labels or images.
        FileExistsError: If the output folder holds something else, or pairs of other settings.
        ValueError: If a number is out of range, if denoiser, segmenter and files do not fit each other, or if no pair
            was kept.
    """
    options = SampleOptions(
        image_size=image_size, scheduler=scheduler, num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    _check(denoiser, segmenter, num_images, min_dice)
    drawing = denoiser.drawing(replace(options, conditions={"semantic_map": BLANK}))  # checks the options
    _, *size = denoiser.codec.image_shape(drawing.sample_shape)
    names, real = first_labels(labels, num_labels)
    images = None if copy_from is None else _images_of(copy_from, labels, num_labels, denoiser)
    kinds = None if images is None else [_kind_of(image) for image in images]
    masks = RecombinedMasks(real, (size[0], size[1]), seed=seed, names=names, kinds=kinds)
    settings = _settings(denoiser, options, real, images, segmenter)
    settings |= {"num_labels": num_labels, "image_size": size, "seed": seed}
    settings["min_dice"] = None if segmenter is None else min_dice

    synthesis = _begun(Path(output), settings, min_dice, notes={"labels": str(labels)})
    todo = [number for number in range(num_images) if name_of(number) not in synthesis.dice]
    total = len(todo) * (1 if images else drawing.num_steps)
    done = 0

    def count(num_images: int) -> None:
        nonlocal done
        done += num_images
        progress(done, total)

    for numbers in [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]:
        made = [masks[number] for number in numbers]
        pixels = _copied(images, made, count) if images else _drawn(denoiser, options, made, numbers, count)
        for number, mask, image in zip(numbers, made, pixels, strict=True):
            score = None if segmenter is None else _agreement(segmenter, image, mask.labels)
            synthesis.add(name_of(number), image, mask.labels, score)
        synthesis.save()
    if not synthesis.kept:
        best = max(score for score in synthesis.dice.values() if score is not None)
        raise ValueError(f"none of {len(synthesis.dice)} pairs was kept, as the best Dice is {best:.2f} and min_dice "
                         f"{min_dice}; train the denoiser for longer, or lower min_dice")  # fmt: skip
    _save_sheet(synthesis)
    return synthesis


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


def _check(denoiser: Denoiser, segmenter: Segmenter | None, num_images: int, min_dice: float) -> None:
    """Refuse numbers out of range, and networks that do not fit each other, before anything is read."""
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    if not 0 <= min_dice <= 1:
        raise ValueError(f"min_dice must be from 0 to 1, got {min_dice}; {MIN_DICE} is usual")
    condition = denoiser.condition(SemanticMap)
    if condition is None or condition.config["label_format"] != "instances":
        raise ValueError("the denoiser must take masks of objects, and this one does not; train one with fit --config "
                         "nuclei_from_masks, whose condition is SemanticMap with label_format instances")  # fmt: skip
    channels = denoiser.image_shape[0]
    if channels not in (1, 3):
        raise ValueError(f"the denoiser must draw images of 1 or 3 channels, as pairs are pictures, got {channels}")
    if denoiser.values.value_range is not None:
        low, high = denoiser.values.value_range
        raise ValueError(f"the denoiser must be trained without a value_range, as pairs are pictures of 8 bits, and "
                         f"this one has {low:.6g} to {high:.6g}; train one on images of 8 or 16 bits")  # fmt: skip
    if segmenter is None:
        return
    if segmenter.kind == "classes":
        raise ValueError("the segmenter must tell objects from background, and this one was trained on classes; use "
                         "one with label_format instances, 0/1 or 0/255")  # fmt: skip
    if segmenter.unet.in_channels != channels:
        raise ValueError(f"the segmenter must take the {channels} channels of the images that the denoiser draws, and "
                         f"takes {segmenter.unet.in_channels}; train one with source.channels {channels}")  # fmt: skip


def _images_of(root: StrPath, labels_root: StrPath, num_labels: int, denoiser: Denoiser) -> list[NDArray[np.uint8]]:
    """The image of each page of the first label files, (C, H, W), stretched if those of the denoiser were."""
    channels = denoiser.image_shape[0]
    stretch = bool(_of_source(denoiser).get("stretch"))
    files, label_files = find_images_or_one(str(root)), find_images_or_one(str(labels_root))
    image_of = {label: image for image, label in match(files.names, label_files.names, can_have_suffix=False).values()}
    names = [image_of[name] for name in label_files.names[:num_labels]]

    def read(name: str) -> list[Tensor] | str:
        return decoded(lambda data: decode_pages(data, channels), files, name)

    outcomes = list(in_threads(read, names, "loading images", False))
    if wrong := [f"{name}: {why}" for name, why in outcomes if isinstance(why, str)]:
        raise ValueError(f"{len(wrong)} of {len(names)} images cannot be used:{listed(wrong)}")
    pages = [page for _, pages in outcomes if not isinstance(pages, str) for page in pages]
    return [to_uint8(to_float(page, stretch=stretch)[None])[0].numpy() for page in pages]


def _of_source(denoiser: Denoiser) -> dict[str, Any]:
    """The settings of the source of images that a denoiser was trained on, where they are known."""
    arguments = denoiser.settings
    for name in ("data", "source"):
        arguments = (arguments.get(name) or {}).get("init_args") or {}
    return arguments


def _kind_of(image: NDArray[np.uint8]) -> int:
    """A number for grey or coloured images, (C, H, W), on a dark or a bright ground, whose objects look alike."""
    return 2 * int(np.median(image) > np.iinfo(np.uint8).max / 2) + int(np.ptp(image, axis=0).mean() > COLOURED)


def _settings(
    denoiser: Denoiser,
    options: SampleOptions,
    labels: Labels,
    images: list[NDArray[np.uint8]] | None,
    segmenter: Segmenter | None,
) -> dict[str, Any]:
    """Plain values that decide, with the sizes and seeds, what each pair is and whether it is kept."""
    scheduler = options.scheduler if isinstance(options.scheduler, str) else repr(options.scheduler)
    of_drawing = {
        "scheduler": scheduler,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "precision": denoiser.precision,
        f"{CONTENTS}denoiser": contents_of(denoiser),
    }
    return {
        **(of_drawing if images is None else dict.fromkeys(of_drawing)),
        "is_copied": images is not None,
        f"{CONTENTS}segmenter": None if segmenter is None else contents_of(segmenter),
        f"{CONTENTS}labels": _hash_of(labels),
        f"{CONTENTS}images": _hash_of(images or []),
    }


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


def _copied(images: Sequence[NDArray[np.uint8]], masks: Sequence[Mask], progress: Callable[[int], object]) -> Tensor:
    """The real pixels that belong to masks, (N, C, H, W) uint8."""
    progress(len(masks))
    return torch.from_numpy(np.stack([pixels_at(images, mask) for mask in masks]))


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
