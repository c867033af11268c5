"""Sources of labelled images: files, matched by name and read at their own size, or generated cells.

A TIFF file with several pages, as of the ISBI challenge, counts as as many images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unet_diffusion.data.checking import NUM_NAMED, decoded, in_threads
from unet_diffusion.data.decoding import ValueRange, check_num_channels, check_within, decode_page
from unet_diffusion.data.described import NOT_NAMED
from unet_diffusion.data.files import ImageFiles, find_images_or_one
from unet_diffusion.data.items import Item, ItemSource, read_items
from unet_diffusion.data.label_decoding import decode_label_pages
from unet_diffusion.data.listing import without_ending
from unet_diffusion.data.stored import stored_images
from unet_diffusion.data.stored_image import Kind
from unet_diffusion.data.value_ranges import (
    DeclaredRange,
    check_declared,
    check_shown,
    pixel_values,
    settled_range,
    shown_of,
)
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.segmentation.synthetic import synthetic_cells

CELLS_SIZE = (128, 128)  # of generated images, in pixels
ROUNDING = 1e-9  # of a share times a size: 0.29 of 100 is 28.999999999999996 in floating-point numbers


@dataclass
class LabelledImages:
    """Images with their label images, in the order of their names.

    Args:
        images: The images, uint8, uint16, or float32 in [-1, 1], (C, H, W) each.
        labels: The label images, whole numbers (H, W) each.
        names: The name of each image without its extension; names of a file's pages end in their number.
        left_out: A line about what else there was; "" if there was nothing.
        unlabelled: Images without a label, likewise.
        values: What the numbers in the files mean. None: they are those of the images.
    """

    images: list[Tensor]
    labels: list[NDArray[np.int32]]
    names: list[str]
    left_out: str = ""
    unlabelled: list[Tensor] = field(default_factory=list)
    values: PixelValues | None = None


class LabelledSource(ItemSource):
    """Images by number with a label image each, for `SegmentationDataModule`.

    A subclass defines `__len__`, and `__getitem__(index)`, which returns a dict with

    - `image`: An image as in `Source`; sizes may differ.
    - `label`: A PIL image, or an array or tensor (H, W) of whole numbers, as large as the image; `targets` says what
      the numbers mean.
    - `name`: What tells the image from others; without names the images are numbered. They are kept in the order of
      the items, and the last ones are validated on.

    The sources of this package define `load` instead, which reads files in threads.
    """

    def load(self, *, progress: bool = True) -> LabelledImages:
        """All images and their labels; `SegmentationDataModule` calls it once.

        Args:
            progress: Whether a progress bar is shown.

        Raises:
            ValueError: If an item is not as it must be.
        """
        loaded = LabelledImages([], [], [])
        for number, item in enumerate(read_items(self, progress)):
            others = item.values.keys() - {"label", "name"}
            if others:
                raise ValueError(f"{item.where} must hold no keys but image, label and name, got "
                                 f"{', '.join(sorted(others))}; remove them")  # fmt: skip
            label = _label_image(item)
            if differs := mismatch([item.image], [label]):
                raise ValueError(f"{item.where} must be as large as its label, and has {differs}")
            if len(item.image) != len((loaded.images or [item.image])[0]):
                raise ValueError(f"all images must have the same channels, and {item.where} has {len(item.image)} and "
                                 f"the first {len(loaded.images[0])}")  # fmt: skip
            loaded.images.append(item.image)
            loaded.labels.append(label)
            loaded.names.append(item.values.get("name", f"{number:06d}"))
        return loaded


class PairedFiles(LabelledSource):
    """Images and labels in two folders, zip archives or multi-page TIFF files; grey or colour, 8 or 16 bit.

    Args:
        images: A folder, archive.zip, archive.zip/folder, or one file.
        labels: The place of the labels, likewise; the label of an image has the same path there, but for the extension.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha), to which images are converted; or the number that files hold.
        value_range: As in `Folder`; measured over images with and without labels.
        shown_channels: As in `Folder`.
        label_suffix: The end that the names of labels have and those of images lack, such as "_mask".
        unlabelled: The place of images without labels, likewise, for `model.joint`; None: there are none.

    Raises:
        ValueError: If channels is below 1.
    """

    def __init__(
        self,
        images: str | Path,
        labels: str | Path,
        *,
        channels: int = 1,
        value_range: DeclaredRange = None,
        shown_channels: tuple[int, ...] | None = None,
        label_suffix: str = "",
        unlabelled: str | Path | None = None,
    ) -> None:
        check_declared(value_range)
        check_shown(shown_channels, channels)
        check_num_channels(channels)
        self.images = images
        self.labels = labels
        self.channels = channels
        self.value_range, self.shown_channels = value_range, shown_channels
        self.label_suffix = label_suffix
        self.unlabelled = unlabelled

    def load(self, *, progress: bool = True) -> LabelledImages:
        """Find, match and decode all files.

        Args:
            progress: Whether a progress bar is shown.

        Raises:
            FileNotFoundError: If a folder or file does not exist.
            ValueError: If a file has no partner, cannot be read, or differs from its partner in size or pages; the
                message lists such files.
        """
        image_files, label_files = (find_images_or_one(root, NOT_NAMED) for root in (self.images, self.labels))
        pairs = match(image_files.names, label_files.names, self.label_suffix)

        unlabelled = [] if self.unlabelled is None else [find_images_or_one(self.unlabelled, NOT_NAMED)]
        places = [image_files, *unlabelled]
        kinds = set[Kind]()
        value_range = settled_range(
            self.value_range, places, self.channels, progress=progress, kept_range=self.kept_range
        )

        def read(name: str) -> tuple[list[Tensor], list[NDArray[np.int32]]] | str:
            image_name, label_name = pairs[name]
            pages = self._pages(image_files, image_name, value_range, kinds)
            label_pages = decoded(decode_label_pages, label_files, label_name)
            if isinstance(pages, str) or isinstance(label_pages, str):
                return pages if isinstance(pages, str) else f"its label {label_name}: {label_pages}"
            return mismatch(pages, label_pages) or (pages, label_pages)

        loaded, bad = LabelledImages([], [], [], self._left_out(image_files, label_files)), []
        for name, outcome in in_threads(read, list(pairs), "loading images and labels", progress):
            if isinstance(outcome, str):
                bad.append(f"{name}: {outcome}")
                continue
            pages, label_pages = outcome
            loaded.images += pages
            loaded.labels += label_pages
            loaded.names += [name] if len(pages) == 1 else [f"{name}_{page:04d}" for page in range(len(pages))]
        if bad:
            raise ValueError(f"{len(bad)} of {len(pairs)} images cannot be used:{listed(bad)}")
        for files in unlabelled:
            loaded.unlabelled = self._load_unlabelled(files, value_range, kinds, progress)
        shown = self.shown_channels or shown_of(self.channels, "channels" not in kinds)
        values = PixelValues.of_images(loaded.images[0].dtype, shown)
        loaded.values = pixel_values([np.dtype(np.float32)], value_range, values)
        return loaded

    def _pages(
        self, files: ImageFiles, name: str, value_range: ValueRange | None, kinds: set[Kind]
    ) -> list[Tensor] | str:
        """The pages of a file, or the reason why it cannot be read; what their channels are is added to kinds."""

        def read(data: bytes) -> list[Tensor]:
            images = list(stored_images(data, self.channels))
            kinds.update(image.kind for image in images)
            return [check_within(decode_page(image, self.channels, value_range), value_range) for image in images]

        return decoded(read, files, name)

    def _load_unlabelled(
        self, files: ImageFiles, value_range: ValueRange | None, kinds: set[Kind], progress: bool
    ) -> list[Tensor]:
        def read(name: str) -> list[Tensor] | str:
            return self._pages(files, name, value_range, kinds)

        images, bad = list[Tensor](), []
        for name, outcome in in_threads(read, files.names, "loading images without labels", progress):
            if isinstance(outcome, str):
                bad.append(f"{name}: {outcome}")
            else:
                images += outcome
        if bad:
            raise ValueError(f"{len(bad)} of {len(files.names)} images without labels cannot be used:{listed(bad)}")
        return images

    def _left_out(self, images: ImageFiles, labels: ImageFiles) -> str:
        others = sum(not without_ending(name).endswith(self.label_suffix) for name in labels.names)
        parts = {
            "beside the images": images.left_out.described(),
            "beside the labels": labels.left_out.described(),
            f"images without {self.label_suffix} among the labels": str(others or ""),
        }
        return "; ".join(f"{what} {where}" for where, what in parts.items() if what)


@dataclass(frozen=True)
class SyntheticPairs:
    """Drawn images and their labels, which windows are taken of at times in place of real ones.

    Grey values are taken as they were drawn, also where those of real images are stretched: a denoiser of stretched
    images draws stretched ones.

    Args:
        root: The folder, which holds image and label, as `unet-diffusion synthesize` writes it.
        num_batches: Windows are of these images in so many batches at first. Later ones are real, so that training
            ends on what is to be segmented.
        share: The share of these windows in each batch, rounded down to a whole number of them; half at most, as real
            images are what is to be segmented.

    Raises:
        ValueError: If a number is out of range.
    """

    root: str | Path
    num_batches: int
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share of synthetic must be above 0 and at most 0.5, got {self.share}; 0.5 is usual")
        if self.num_batches < 1:
            raise ValueError(f"num_batches of synthetic must be at least 1, got {self.num_batches}")

    def num_in(self, batch_size: int) -> int:
        """The number of these windows in a batch.

        Args:
            batch_size: The number of windows in a batch of a process.

        Raises:
            ValueError: If there would be none.
        """
        number = math.floor(self.share * batch_size + ROUNDING)
        if number < 1:
            raise ValueError(
                f"share of synthetic must give a window in each batch, and {self.share} of {batch_size} is less than "
                f"one; raise data.batch_size to {math.ceil(1 / self.share)}, with as many windows in an epoch "
                "(data.windows_per_image)"
                + (f", or data.synthetic.share to {math.ceil(1000 / batch_size) / 1000}" if batch_size > 1 else "")
            )
        return number

    def described(self, num_images: int, batch_size: int) -> str:
        """A line about the images, and how many windows of a batch are of them."""
        share = f"{self.num_in(batch_size)} of {batch_size} windows in each of the first {self.num_batches} batches"
        return f"synthetic: {num_images} images, {share}"

    def load(self, channels: int, *, progress: bool = True) -> LabelledImages:
        """All images and labels, with the channels of the real ones; errors are those of `PairedFiles.load`.

        Args:
            channels: 1 (grey) or 3 (RGB); images are converted.
            progress: Whether a progress bar is shown.
        """
        root = Path(self.root).expanduser()
        return PairedFiles(root / "image", root / "label", channels=channels).load(progress=progress)


class SyntheticCells(LabelledSource):
    """Generated images of cells that touch, grey, 128x128, with instance numbers; the same ones every time.

    Args:
        num_images: The number of images.

    Raises:
        ValueError: If there are fewer than two.
    """

    def __init__(self, *, num_images: int = 64) -> None:
        if num_images < 2:
            raise ValueError(f"num_images must be at least 2, to train and to validate on, got {num_images}")
        self.num_images = num_images

    def load(self, *, progress: bool = True) -> LabelledImages:
        """The generated cells.

        Args:
            progress: Whether a progress bar is shown.
        """
        names = [f"{seed:04d}" for seed in range(self.num_images)]
        pairs = in_threads(
            lambda name: synthetic_cells(CELLS_SIZE, seed=int(name)), names, "generating cells", progress
        )
        loaded = LabelledImages([], [], names)
        for _, (image, instances) in pairs:
            loaded.images.append(torch.from_numpy(image)[None])
            loaded.labels.append(instances)
        return loaded


def _label_image(item: Item) -> NDArray[np.int32]:
    """The label image of an item.

    Raises:
        ValueError: If there is none, or it is no image of whole numbers.
    """
    if "label" not in item.values:
        raise ValueError(f"{item.where} must have a label, an image of whole numbers")
    label = item.values["label"]
    label = np.asarray(label.cpu() if isinstance(label, Tensor) else label)
    if label.ndim != 2 or label.dtype.kind not in "iub" or not label.size:
        raise ValueError(
            f"the label of {item.where} must be (H, W) of whole numbers, got {label.dtype} of the shape {label.shape}"
        )
    if not -(2**31) <= label.min() <= label.max() < 2**31:
        raise ValueError(f"the label of {item.where} must hold numbers below 2**31, got {label.max()}")
    return label.astype(np.int32)


def listed(lines: Sequence[str]) -> str:
    """The first few lines, each on a line of its own, and how many more there are."""
    more = [f"... and {len(lines) - NUM_NAMED} more"] if len(lines) > NUM_NAMED else []
    return "".join(f"\n  {line}" for line in [*lines[:NUM_NAMED], *more])


def match(
    images: Sequence[str],
    labels: Sequence[str],
    label_suffix: str = "",
    *,
    kind: str = "label",
    can_have_suffix: bool = True,
) -> dict[str, tuple[str, str]]:
    """The image and label file of each name; a single file on both sides matches whatever it is called.

    Args:
        images: The names of the image files.
        labels: The names of the label files.
        label_suffix: The end that the names of labels have and those of images lack.
        kind: The word for a label in errors.
        can_have_suffix: Whether the user can set label_suffix.

    Raises:
        ValueError: If a file has no partner; the message lists such files.
    """
    if len(images) == len(labels) == 1:
        return {without_ending(images[0]): (images[0], labels[0])}
    image_by_name = _by_name(images, "")
    label_by_name = _by_name(labels, label_suffix)
    without_label = [image_by_name[name] for name in image_by_name if name not in label_by_name]
    without_image = [label_by_name[name] for name in label_by_name if name not in image_by_name]
    if without_label or without_image:
        parts, has_suffix = [], " (and label_suffix)" if can_have_suffix else ""
        if without_label:
            parts.append(f"{len(without_label)} images have no {kind}:{listed(without_label)}")
        if without_image:
            parts.append(f"{len(without_image)} {kind}s have no image:{listed(without_image)}")
        raise ValueError(
            f"images and {kind}s must have the same names but for the extension{has_suffix}; "
            + "\n".join(parts)
            + f"\nadd the missing files{',' if has_suffix else ', or'} remove their partners"
            + (", or set label_suffix" if has_suffix else "")
        )
    return {name: (image_by_name[name], label_by_name[name]) for name in image_by_name}


def _by_name(names: Sequence[str], suffix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        stem = without_ending(name)
        if not stem.endswith(suffix):
            continue  # of another kind, such as the images themselves in the same folder
        stem = stem.removesuffix(suffix) if suffix else stem
        if stem in found:
            raise ValueError(
                f"names must differ in more than their extension, got {found[stem]} and {name}; rename one"
            )
        found[stem] = name
    return found


def mismatch(pages: Sequence[Tensor], label_pages: Sequence[NDArray[Any]]) -> str | None:
    """How an image differs from its label in pages or size, for the end of a sentence; None: it does not.

    Args:
        pages: The pages of the image, (C, H, W) each.
        label_pages: The pages of the label, (H, W) each.
    """
    if len(pages) != len(label_pages):
        return f"{len(pages)} pages, and {len(label_pages)} in its label"
    for image, label in zip(pages, label_pages, strict=True):
        if image.shape[1:] != label.shape:
            height, width = image.shape[1:]
            return f"{height}x{width} pixels, and {label.shape[0]}x{label.shape[1]} in its label"
    return None
