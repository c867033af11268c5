"""Sources of your own images, in a folder or a zip archive: scaled to one size, or cut into tiles."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from unet_diffusion.data.batches import Entries, ImageSet
from unet_diffusion.data.beside import READERS, Fitted, in_few_bytes, label_pages, read_beside
from unet_diffusion.data.captions import TEXT_EXTENSIONS, Captions, read_captions
from unet_diffusion.data.checking import (
    CheckedImages,
    bad_files_message,
    check_images,
    decoded,
    in_threads,
    load_images,
)
from unet_diffusion.data.decoding import ImageFormat, decode_page
from unet_diffusion.data.described import USUAL, Table, check_only_images, check_used
from unet_diffusion.data.files import ImageFiles, classes_of, find_images
from unet_diffusion.data.scaling import to_float
from unet_diffusion.data.shards import INDEX, ShardIndex
from unet_diffusion.data.source import IN_MEMORY_BYTES, Source
from unet_diffusion.data.stored import stored_images
from unet_diffusion.data.stored_image import Kind
from unet_diffusion.data.value_ranges import (
    DeclaredRange,
    check_declared,
    check_shown,
    settled_range,
    shown_of,
    values_of,
)
from unet_diffusion.runtime.addresses import place_of
from unet_diffusion.runtime.cropping import Crop
from unet_diffusion.runtime.pixel_values import PixelValues

OnBadFile = Literal["error", "skip"]

LEAST_LOST = 0.01  # of an image's pixels; less than that is due to rounding


class Folder(Source):
    """Images from a folder (and those in it), a zip archive, or a folder inside one.

    Every image is scaled to cover image_size and cut to its centre; transparency is put on the background colour unless
    channels is 4. Files with 16 bits per channel keep them. Every file is decoded once before training starts, in
    threads.

    Args:
        root: A folder, archive.zip, or archive.zip/folder; or a data set: hf://owner/name, a folder that the library
            datasets saved, Parquet or Arrow files, or tar archives of the form of WebDataset, also behind an address.
        image_size: Height and width in pixels, or one number for both; no image may be smaller.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha), to which colours are converted; or the number that files hold.
        value_range: The numbers of files that become -1 and 1, two numbers; or "measured": the least and the largest
            number in all images. None suits 8 and 16 bits, whose range is that of their type. No number may be beyond.
        shown_channels: The channels that pictures show as red, green and blue, from 0. None: the first three, unless
            the channels are grey, RGB, or RGB and alpha.
        class_labels: Whether images have classes: the folder directly below root that a file lies in, or those of the
            data set.
        captions: Whether each image has a caption, see `captions.py`, or that of the data set.
        semantic_map: A folder or archive of label images of the same names and sizes as the images, for the condition
            `SemanticMap`. None: there are none.
        paired_image: A folder or archive of pictures of the same names and sizes as the images, for the condition
            `PairedImage`. None: there are none.
        boxes: A JSON file of COCO's form with boxes in the images, for the condition `BoxTokens`. None: there is none.
        background: The colour behind transparent pixels, a name or "#rrggbb"; it is not used if channels is 4.
        on_bad_file: What happens with files that cannot be decoded or are too small: "error", or "skip" with a warning.
        in_memory: Whether the decoded images stay in memory; otherwise workers decode them again every epoch. None
            keeps them if they take up to 2 GiB.
        table: Which split, columns or members of a data set are used. None: the usual ones, see `Table`.

    Attributes:
        crops: The part of its file that each image shows, once they are loaded. None: pack has scaled them before.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int | tuple[int, int] = (64, 64),
        channels: int = 3,
        value_range: DeclaredRange = None,
        shown_channels: tuple[int, ...] | None = None,
        class_labels: bool = False,
        captions: bool = False,
        semantic_map: str | Path | None = None,
        paired_image: str | Path | None = None,
        boxes: str | Path | None = None,
        background: str = "white",
        on_bad_file: OnBadFile = "error",
        in_memory: bool | None = None,
        table: Table | None = None,
    ) -> None:
        if on_bad_file not in get_args(OnBadFile):
            raise ValueError(f'on_bad_file must be "error" or "skip", got {on_bad_file!r}')
        check_declared(value_range)
        check_shown(shown_channels, channels)
        check_used(table or USUAL, class_labels=class_labels, captions=captions)
        self.root = root
        self.value_range, self.shown_channels = value_range, shown_channels
        self.image_format = ImageFormat.of_size(image_size, channels, background)
        self.image_shape = self.image_format.shape
        self.class_labels = class_labels
        self.captions = captions
        self.semantic_map = semantic_map
        self.paired_image = paired_image
        self.boxes = boxes
        self.on_bad_file = on_bad_file
        self.in_memory = in_memory
        self.table = table
        self._left_out = self._changed = ""

    def load(self, *, progress: bool = True) -> ImageSet:
        """Find and check all images.

        Args:
            progress: Whether a progress bar is shown.

        Raises:
            FileNotFoundError: If root does not exist.
            ValueError: If root holds no images or files that cannot be used, if class_labels is set and there are no
                classes, if captions is set and an image has none, or if a semantic map, paired image or box does not
                fit its image.
        """
        files = find_images(self.root, self.table or USUAL)
        if self.class_labels:
            classes_of(files, files.names, self.root)  # fails before the files are decoded, not after
        written = read_captions(files, files.names) if self.captions else None
        value_range = settled_range(
            self.value_range, [files], self.image_format.channels, progress=progress, kept_range=self.kept_range,
            on_bad_file=self.on_bad_file,
        )  # fmt: skip
        self.image_format = replace(self.image_format, value_range=value_range)
        in_memory = self.in_memory
        if in_memory is None:
            num_bytes = math.prod(self.image_format.shape) * self.image_format.dtype.itemsize
            in_memory = len(files.names) * num_bytes <= IN_MEMORY_BYTES
        checked = (load_images if in_memory else check_images)(files, self.image_format, progress=progress)
        self._report(checked)
        self.values = values_of(checked, self.image_format, self.shown_channels)
        size = self.image_format.height, self.image_format.width
        crops = [Crop.centred(before, size) for before in checked.sizes]
        self.crops = None if _holds_scaled_shards(self.root) else crops
        self._left_out = _left_out(files, checked, written)
        self._changed = _changed(checked.sizes, size)
        entries, class_names = entries_of(
            files, checked.names, self.root, class_labels=self.class_labels, captions=self.captions
        )
        fitted = Fitted(checked.names, checked.sizes, files.names, self.image_format)
        for key in READERS:
            if (place := getattr(self, key)) is not None:
                entries[key] = read_beside(key, place, fitted, progress=progress)
        return ImageSet(checked.images, entries, class_names, checked.names, checked.contents)

    def left_out(self) -> str:
        return self._left_out

    def changed(self) -> str:
        return self._changed

    def _report(self, checked: CheckedImages) -> None:
        if not checked.bad_files:
            return
        message = bad_files_message(checked.bad_files, len(checked.names) + len(checked.bad_files))
        if self.on_bad_file == "error" or not checked.names:
            fix = 'Mend or remove them, or set on_bad_file to "skip".' if checked.names else "None is left to train on."
            raise ValueError(f"{message}\n{fix}")
        rank_zero_warn(f"{message}\nThe others are used.")


def entries_of(
    files: ImageFiles, names: list[str], root: str | Path, *, class_labels: bool, captions: bool
) -> tuple[Entries, list[str] | None]:
    """What folders and files say of each image, by name, and the name of each class.

    Args:
        files: The files below the root.
        names: The names of the images.
        root: The root, for messages.
        class_labels: Whether images have classes, see `Folder`.
        captions: Whether images have captions, see `Folder`.

    Raises:
        ValueError: If there are no classes, or an image has no caption.
    """
    labels, class_names = classes_of(files, names, root) if class_labels else ([], None)
    entries: Entries = {"labels": torch.tensor(labels)} if class_names else {}
    return entries | ({"captions": read_captions(files, names).texts} if captions else {}), class_names


def _holds_scaled_shards(root: str | Path) -> bool:
    """Whether pack has scaled the images, so that the files in its archives do not have the size of the real ones."""
    index = Path(place_of(root)) / INDEX
    try:
        return index.is_file() and ShardIndex.from_json(index.read_bytes(), str(index)).channels is not None
    except ValueError:  # an index of something else
        return False


def _left_out(files: ImageFiles, checked: CheckedImages, captions: Captions | None) -> str:
    """A line about the files, and the rows of tables, that are not used."""
    parts = [files.left_out.described(but=TEXT_EXTENSIONS if captions else ())]
    if checked.bad_files:
        parts.append(f"{len(checked.bad_files)} images that cannot be used")
    if captions and captions.num_unused:
        more = ", ..." if captions.num_unused > len(captions.unused) else ""
        parts.append(
            f"{captions.num_unused} captions of images that are not there ({', '.join(captions.unused)}{more})"
        )
    return "; ".join(filter(None, parts)) or "nothing"


def _changed(sizes: list[tuple[int, int]], size: tuple[int, int]) -> str:
    """A line about how many images are scaled to a size, and how many are cropped."""
    scales = [min(one / other for one, other in zip(before, size, strict=True)) for before in sizes]
    lost = [1 - scale**2 * math.prod(size) / math.prod(before) for scale, before in zip(scales, sizes, strict=True)]
    scaled, cropped = sum(scale > 1 for scale in scales), sum(one > LEAST_LOST for one in lost)
    parts = [f"{scaled} images scaled down, up to {max(scales):.3g} times"] if scaled else []
    parts += [f"{cropped} cropped to their centre, which cuts off up to {100 * max(lost):.0f} %"] if cropped else []
    return ", ".join(parts) or "nothing"


class Tiles(Source):
    """Tiles cut from images of any size, at the size of their pixels: nothing is scaled. For textures and microscopy.

    Tiles cover each image, and overlap where its size is no multiple of theirs. All tiles stay in memory.

    Args:
        root: A folder, archive.zip, archive.zip/folder, or a data set, as in `Folder`.
        tile_size: Height and width of a tile in pixels; no image may be smaller.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha), to which colours are converted; or the number that files hold.
        stretch: Whether each image's grey values are scaled from its 1st and 99.8th percentile, not from the range of
            its type.
        num_images: The number of images to use, the first by name, such as those that are not kept for a test. None
            takes all. Tiles that are validated on may be of an image that other tiles are trained on.
        semantic_map: A folder or archive of label images of the same names and sizes as the images, for the condition
            `SemanticMap`; they are cut as the images are. None: there are none.
        table: As in `Folder`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        tile_size: int = 64,
        channels: int = 3,
        stretch: bool = False,
        num_images: int | None = None,
        semantic_map: str | Path | None = None,
        table: Table | None = None,
    ) -> None:
        if tile_size < 1:
            raise ValueError(f"tile_size must be at least 1, got {tile_size}")
        if num_images is not None and num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}; leave it out for all")
        self.image_shape = ImageFormat(tile_size, tile_size, channels).shape  # refuses other numbers of channels
        self.root = root
        self.tile_size = tile_size
        self.channels = channels
        self.stretch = stretch
        self.num_images = num_images
        self.semantic_map = semantic_map
        self.table = table or USUAL
        check_only_images(self.table)
        self._left_out = self._changed = ""

    def load(self, *, progress: bool = True) -> ImageSet:
        """Decode all images and cut them.

        Args:
            progress: Whether a progress bar is shown.

        Raises:
            FileNotFoundError: If root does not exist.
            ValueError: If root holds no images, or images that cannot be used, or if a semantic map does not fit its
                image; the message lists them.
        """
        files = find_images(self.root, self.table)
        names = files.names[: self.num_images]
        maps_of = None if self.semantic_map is None else label_pages(self.semantic_map, files.names)
        kinds = set[Kind]()

        def pages_of(data: bytes) -> list[Tensor]:
            images = list(stored_images(data, self.channels))
            kinds.update(image.kind for image in images)
            return [decode_page(image, self.channels) for image in images]

        def tiles_of(name: str) -> list[tuple[Tensor, Tensor | None]] | str:
            pages = decoded(pages_of, files, name)
            if isinstance(pages, str):
                return pages
            sizes = [(page.shape[1], page.shape[2]) for page in pages]
            if small := [size for size in sizes if min(size) < self.tile_size]:
                height, width = small[0]
                return f"too small: {height}x{width}, must be at least {self.tile_size}x{self.tile_size}"
            maps = None if maps_of is None else maps_of(name, sizes)
            if isinstance(maps, str):
                return f"its semantic map {maps}"
            return [
                (cut(self._as_bytes(page), self.tile_size), None if maps is None else cut(maps[i], self.tile_size))
                for i, page in enumerate(pages)
            ]

        outcomes = list(in_threads(tiles_of, names, "cutting images", progress))
        bad = [f"{name}: {outcome}" for name, outcome in outcomes if isinstance(outcome, str)]
        if bad:
            raise ValueError(f"{bad_files_message(bad, len(names))}\nRemove them, or lower tile_size.")
        tiles, maps, tile_names = list[Tensor](), list[Tensor](), list[str]()
        for name, outcome in outcomes:
            for page, (tiles_of_page, maps_of_page) in enumerate(outcome if isinstance(outcome, list) else []):
                tiles.append(tiles_of_page)
                maps += [] if maps_of_page is None else [maps_of_page]
                tile_names += [f"{name}, page {page}, tile {tile}" for tile in range(len(tiles_of_page))]
        unasked = len(files.names) - len(names)
        self.values = PixelValues.of_images(torch.uint8, shown_of(self.channels, "channels" not in kinds))
        more = f"{unasked} images beyond num_images" if unasked else ""
        self._left_out = "; ".join(filter(None, (files.left_out.described(), more))) or "nothing"
        self._changed = f"{len(names)} images are cut into {len(tile_names)} tiles, which overlap where they must"
        entries: Entries = {"semantic_map": in_few_bytes(torch.cat(maps))} if maps else {}
        return ImageSet(torch.cat(tiles), entries, names=tile_names)

    def left_out(self) -> str:
        return self._left_out

    def changed(self) -> str:
        return self._changed

    def _as_bytes(self, page: Tensor) -> Tensor:
        """A page as uint8: sets may mix depths, and 8 bits are enough for what is noised anyway."""
        return ((to_float(page, stretch=self.stretch).clamp_(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def cut(image: Tensor, tile_size: int) -> Tensor:
    """Evenly spaced tiles that cover an image, (N, C, tile_size, tile_size).

    Args:
        image: An image (C, H, W) with H and W at least tile_size.
        tile_size: Height and width of a tile in pixels.
    """
    tops, lefts = (
        [round(i * (side - tile_size) / max(count - 1, 1)) for i in range(count)]
        for side in image.shape[1:]
        for count in [-(-side // tile_size)]
    )
    return torch.stack([image[:, top : top + tile_size, left : left + tile_size] for top in tops for left in lefts])
