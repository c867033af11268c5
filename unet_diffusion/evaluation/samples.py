"""The samples that are evaluated: drawn into a folder by a denoiser, or images that somebody left in a folder."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.data.checking import bad_files_message, load_images
from unet_diffusion.data.decoding import ImageFormat
from unet_diffusion.data.described import USUAL, Table
from unet_diffusion.data.files import class_names_of, find_images, labels_of
from unet_diffusion.data.fingerprints import content_hash
from unet_diffusion.evaluation.held_out import HeldOutConditions
from unet_diffusion.evaluation.selections import Selection, classes_of, of_images
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.reading import contents_of
from unet_diffusion.inference.sample_options import SampleOptions, Sampling
from unet_diffusion.runtime.atomic_files import remove_left_behind
from unet_diffusion.runtime.folder_settings import CONTENTS, require_same_settings, settings_of
from unet_diffusion.runtime.image_files import NumberedImages
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.runtime.processes import ProcessGroup
from unet_diffusion.runtime.randomness import keyed_generator

Value = TypeVar("Value")

SAMPLES = "samples"  # the folder of the samples that are drawn, in that of the evaluation
CLASSES = "classes"  # in the settings that `sample` leaves: "3: three" for each class, which take turns
VALUES = "values"  # likewise: what the numbers in the files mean


@dataclass(frozen=True)
class SamplesToDraw:
    """The samples that a denoiser draws for a comparison with the data.

    Args:
        draw: Gives the samples of these numbers, (N, C, H, W) float32 on the CPU, in about [-1, 1]; calls its second
            argument, if it is not None, with the number of images that took a step.
        num_steps: The number of calls of the network per batch.
        contents: Gives what else decides the samples, as plain values by name.
        labels: The class of each sample, (num_images,) int64; None: they have none.
        captions: The caption of each sample; None: they have none.
        held_out: The conditions of held-out images that are drawn for; None: they are classes or captions alone.
    """

    draw: Callable[[Sequence[int], Callable[[int], object] | None], Tensor]
    num_steps: int
    contents: Callable[[], dict[str, Any]]
    labels: Tensor | None = None
    captions: list[str] | None = None
    held_out: HeldOutConditions | None = None


def samples_to_draw(denoiser: Denoiser, data: ImageDataModule, num_images: int, sampling: Sampling) -> SamplesToDraw:
    """The samples to draw for a comparison with the data.

    Classes are drawn as often as there are training images of them, and captions are those of held-out images, so that
    a difference to the training images is the model's. All other conditions, and several together, are those of
    held-out images.

    Args:
        denoiser: The denoiser that draws them.
        data: The data, loaded.
        num_images: The number of images.
        sampling: How they are drawn.

    Raises:
        ValueError: If the denoiser does not fit the data, or cannot draw like this.
    """
    conditions = denoiser.all_conditions
    keys = {condition.batch_key for condition in conditions}
    if denoiser.num_classes:
        _check_classes(denoiser, data)
    captions = _captions_of(data) if "captions" in keys else None
    if keys in (set(), {"labels"}, {"captions"}) and not any(one.is_asked_of_images for one in conditions):
        return _by_request(denoiser, data, num_images, sampling)
    held_out = HeldOutConditions(denoiser, data, sampling)
    numbers = held_out.numbers_of(range(num_images))
    labels = classes_of(data) if denoiser.num_classes else None
    return SamplesToDraw(
        held_out.draw,
        held_out.num_steps,
        lambda: {f"{CONTENTS}conditions": held_out.contents},
        None if labels is None else labels[numbers],
        None if captions is None else [captions[number] for number in numbers.tolist()],
        held_out,
    )


def _by_request(denoiser: Denoiser, data: ImageDataModule, num_images: int, sampling: Sampling) -> SamplesToDraw:
    """The samples of a denoiser that draws by classes, by captions, or by nothing."""
    labels = _labels_to_draw(data, num_images, sampling.seed) if denoiser.num_classes else None
    has_captions = any("captions" in one.options for one in denoiser.all_conditions)
    captions = _captions_to_draw(data, sampling.seed) if has_captions else None
    request = SampleOptions(
        num_images=num_images,
        labels=None if labels is None else labels.tolist(),
        captions=captions,
        **asdict(sampling),
    )
    drawing = denoiser.drawing(request)

    def contents() -> dict[str, Any]:
        of_labels = None if labels is None else _hash_of_labels(data)  # more images begin with the same
        return {"captions": captions, f"{CONTENTS}labels": of_labels}

    of_each = None if captions is None else _by_turns(captions, range(num_images))
    return SamplesToDraw(drawing.draw, drawing.num_steps, contents, labels, of_each)


def draw_samples(
    denoiser: Denoiser,
    to_draw: SamplesToDraw,
    folder: Path,
    num_images: int,
    sampling: Sampling,
    *,
    overwrite: bool = False,
    group: ProcessGroup,
) -> Selection:
    """Draw images as files; those that are there, drawn with the same settings, are kept.

    Args:
        denoiser: The denoiser that draws them.
        to_draw: The samples to draw.
        folder: Where the images go, as `NumberedImages`.
        num_images: The number of images.
        sampling: How they are drawn.
        overwrite: Whether images that were drawn with other settings are removed.
        group: The processes that share the work.

    Raises:
        FileExistsError: If the folder holds samples of other settings.
    """
    files = NumberedImages(denoiser.values, denoiser.image_shape[0])
    names = [files.name(i) for i in range(num_images)]

    def missing() -> list[int]:
        settings: dict[str, Any] = asdict(sampling)
        del settings["batch_size"]  # which no image depends on
        settings |= {"precision": denoiser.precision, f"{CONTENTS}model": contents_of(denoiser), **to_draw.contents()}
        return _missing(folder, settings, names, overwrite)

    todo = group.shard(group.on_rank_zero(missing))
    with tqdm(total=len(todo) * to_draw.num_steps, desc="drawing", unit="image step", disable=group.rank > 0) as bar:
        for first in range(0, len(todo), sampling.batch_size):
            indices = todo[first : first + sampling.batch_size]
            files.save(to_draw.draw(indices, bar.update), folder, indices=indices)
    group.barrier()
    pixels = [files.pixels(folder / name) for name in names]
    return of_images(torch.stack(pixels), to_draw.labels, to_draw.captions, denoiser.values)


def samples_in(
    folder: Path, data: ImageDataModule, image_shape: tuple[int, int, int], table: Table = USUAL
) -> Selection:
    """The images in a folder, scaled and cut to the size of the data where they have another.

    Classes and captions are known if `sample` drew them, and classes also if each lies in the folder of its class.

    Args:
        folder: The folder.
        data: The data, loaded.
        image_shape: (C, H, W) of the data's images.
        table: Which part of a data set is used.

    Raises:
        ValueError: If there are no images, images that cannot be used, or images that `sample` drew with another range
            of values than the data have.
    """
    channels, height, width = image_shape
    image_format = ImageFormat(height, width, channels, value_range=data.values.value_range)
    files = find_images(folder, table)
    try:
        settings = settings_of(folder, "images") or {}
    except FileExistsError:  # it was written by something else
        settings = {}
    if CLASSES in settings:
        files.names = [name for name in files.names if Path(name).stem.isdigit()]  # not grid.png
    if VALUES in settings:
        drawn_with = PixelValues.from_plain(settings[VALUES])
        data.values.require_range_of(drawn_with, f"the images in {folder} were drawn with")
    checked = load_images(files, image_format)
    if checked.bad_files:
        raise ValueError(f"{bad_files_message(checked.bad_files, len(files.names))}\nRemove them.")
    names, images = checked.names, checked.images
    assert isinstance(images, Tensor)
    if CLASSES in settings:
        numbers, labels = [int(Path(name).stem) for name in names], None
        if settings[CLASSES] and data.class_names:
            classes = [int(str(one).partition(":")[0]) for one in settings[CLASSES]]
            labels = torch.tensor(_by_turns(classes, numbers))
        captions = settings.get("captions")
        return of_images(images, labels, _by_turns(captions, numbers) if captions else None, data.values)
    if data.class_names and all(name.split("/")[0] in data.class_names and "/" in name for name in names):
        class_names_of(names, folder)
        return of_images(images, torch.tensor(labels_of(names, data.class_names)), values=data.values)
    return of_images(images, values=data.values)


def _check_classes(denoiser: Denoiser, data: ImageDataModule) -> None:
    """Refuse data without the classes of the denoiser."""
    if classes_of(data) is None or data.num_classes != denoiser.num_classes:
        raise ValueError(
            f"the data must have the {denoiser.num_classes} classes that the model was trained on, and have "
            f"{data.num_classes or 'none'}; set data.class_labels to true, or give the data of the run"
        )


def _labels_to_draw(data: ImageDataModule, num_images: int, seed: int) -> Tensor:
    """The classes of training images in random order, as often as needed, (num_images,)."""
    labels = classes_of(data)
    assert labels is not None
    train_labels = labels[data.train_indices]
    order = torch.randperm(len(train_labels), generator=keyed_generator(seed))
    return train_labels[order[torch.arange(num_images) % len(order)]]


def _captions_of(data: ImageDataModule) -> list[str]:
    """The caption of each image of the data."""
    captions = data.entries.get("captions")
    if not isinstance(captions, list):
        raise ValueError("the data must have captions, as the model draws by them; set data.captions to true")
    return captions


def _captions_to_draw(data: ImageDataModule, seed: int) -> list[str]:
    """The captions of the held-out images, in random order."""
    captions = _captions_of(data)
    order = torch.randperm(len(data.val_indices), generator=keyed_generator(seed))
    return [captions[i] for i in data.val_indices[order].tolist()]


def _missing(folder: Path, settings: dict[str, Any], names: Sequence[str], overwrite: bool) -> list[int]:
    """The numbers of the images that are to be drawn, once the folder is made or its settings are compared."""

    def remove_images() -> None:
        for path in (*folder.glob("*.png"), *folder.glob("*.tif")):
            path.unlink()

    require_same_settings(
        folder,
        settings,
        "samples of an evaluation",
        fix="choose another --output, or --overwrite",
        replace=remove_images if overwrite else None,
    )
    remove_left_behind(folder)
    return [i for i, name in enumerate(names) if not (folder / name).exists()]


def _by_turns(values: Sequence[Value], numbers: Iterable[int]) -> list[Value]:
    """The value of each image, by its number, where values take turns."""
    return [values[number % len(values)] for number in numbers]


def _hash_of_labels(data: ImageDataModule) -> str:
    """A hash of the classes of the training images, which with the seed decides those that are drawn."""
    labels = classes_of(data)
    assert labels is not None
    return content_hash(labels[data.train_indices].numpy().tobytes())
