"""Segmentation of files: masks for images in folders and archives."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tifffile import TiffWriter
from torch import Tensor

from unet_diffusion.data.checking import decoded, reason
from unet_diffusion.data.decoding import decode_page
from unet_diffusion.data.described import USUAL, Table
from unet_diffusion.data.files import ImageFiles, find_images_or_one
from unet_diffusion.data.fingerprints import MadeOf, fingerprint, is_of
from unet_diffusion.data.listing import TIFF_EXTENSIONS, without_ending
from unet_diffusion.data.scaling import to_float
from unet_diffusion.data.stored import stored_images
from unet_diffusion.data.stored_image import StoredImage
from unet_diffusion.inference.segmenter import Segmentation, Segmenter
from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.pictures import write_png
from unet_diffusion.runtime.processes import ALONE, ProcessGroup
from unet_diffusion.segmentation.pictures import outlined

PNG = ".png"  # extension of a mask whose image has a lossy or multi-purpose format
EXTRAS = ("probabilities", "overlays", "instances")  # folders beside the masks
INPUTS = "inputs.jsonl"  # file beside the masks that says from which image each was made


@dataclass(frozen=True)
class Outputs:
    """The files to write for each image, NAME.

    Args:
        folder: Folder of the masks, folder/NAME. Further outputs go to subfolders; there each page of a stack NAME has
            a file of its own, NAME/0000 and so on.
        probabilities: Write folder/probabilities/NAME.npy, float16 (K, H, W).
        overlays: Write folder/overlays/NAME.png, the image with outlines.
        instances: Write folder/instances/NAME, with a 16-bit number for each object.
    """

    folder: Path
    probabilities: bool = False
    overlays: bool = False
    instances: bool = False

    @property
    def made_of(self) -> MadeOf:
        """The record of the image that each mask was made from."""
        return MadeOf(self.folder / INPUTS)

    def remove(self, mask: str) -> None:
        """Remove a mask and the other outputs of its image."""
        stem = PurePosixPath(mask).with_suffix("")
        for folder in (self.folder / extra for extra in EXTRAS):
            pages = [path for path in (folder / stem).glob("*") if path.stem.isdecimal() and path.is_file()]
            for path in (folder / mask, folder / f"{stem}{PNG}", folder / f"{stem}.npy", *pages):
                path.unlink(missing_ok=True)
        (self.folder / mask).unlink(missing_ok=True)


class ImagesToSegment:
    """Images in files, folders and zip archives, and the names of their masks.

    Args:
        roots: Paths, each an image file, a folder, archive.zip or archive.zip/folder, or a data set.
        table: Which part of data sets is used.

    Attributes:
        sources: For each mask the collection that holds its image, and the image's name there.
        left_out: One line about files that are no images; "" if there are none.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a path holds no images, or two outputs would have the same name.
    """

    def __init__(self, roots: list[Path], table: Table = USUAL):
        self.sources: dict[str, tuple[ImageFiles, str]] = {}
        stems: dict[str, str] = {}
        folders: dict[str, str] = {}
        others = []
        for root in roots:
            files = find_images_or_one(root, table)
            others.append(files.left_out.described())
            for name in files.names:
                mask = mask_name(name)
                stem = without_ending(name)
                if stem in stems:
                    raise ValueError(
                        f"images must differ in more than their extension, got {stems[stem]} and {name}; "
                        "segment them into different folders"
                    )
                if PurePosixPath(name).parts[0] in EXTRAS:
                    raise ValueError(f"the mask of {name} would lie among other outputs; rename its folder")
                stems[stem] = name
                folders.update({str(folder): name for folder in PurePosixPath(stem).parents})
                self.sources[mask] = (files, name)
        if shared := next((stem for stem in stems if stem in folders), None):  # pages of a stack go there, too
            raise ValueError(f"{stems[shared]} and {folders[shared]} would both have outputs in a folder {shared}; "
                             "rename one, or segment them into different folders")  # fmt: skip
        self.left_out = "; ".join(filter(None, others))

    def __len__(self) -> int:
        return len(self.sources)

    def changed(self, outputs: Outputs) -> list[str]:
        """The masks whose image has changed since, or that were not finished."""
        made_of = outputs.made_of.read()
        there = [mask for mask in self.sources if mask in made_of and (outputs.folder / mask).exists()]
        return [mask for mask in there if not is_of(*self.sources[mask], made_of[mask])]

    def pages(self, mask: str, channels: int) -> list[StoredImage] | str:
        """The images in the file of a mask, or the reason why it cannot be read.

        Args:
            mask: The name of the mask.
            channels: The number of channels that images must have.
        """
        files, name = self.sources[mask]
        return decoded(lambda data: list(stored_images(data, channels)), files, name)


def segment_images(
    trained: Segmenter,
    images: ImagesToSegment,
    outputs: Outputs,
    *,
    predict: Callable[[Tensor], Segmentation],
    progress: Callable[[], object] = lambda: None,
    group: ProcessGroup = ALONE,
) -> list[str]:
    """Write a mask for each image that has none, and return "name: reason" for each image that failed.

    A file appears whole or not at all. The pages of a TIFF file become the pages of its mask.

    Args:
        trained: The segmenter, which says how images are scaled and what the classes mean.
        images: The images to segment.
        outputs: The files to write.
        predict: Function from an image, (C, H, W) in [-1, 1], to its segmentation.
        progress: Called after each image.
        group: The processes that share the images.
    """
    failed = []
    for mask in group.shard(list(images.sources)):
        if not (outputs.folder / mask).exists():
            made_of = fingerprint(*images.sources[mask])
            pages = images.pages(mask, trained.unet.in_channels)
            if isinstance(pages, list):
                outputs.made_of.note(mask, None)
                try:
                    _segment_pages(trained, pages, mask, outputs, predict)
                    outputs.made_of.note(mask, made_of)
                # Out of memory, which NumPy and torch say in ways of their own, or disk full: other images may work.
                except (ValueError, RuntimeError, OSError, MemoryError) as error:
                    pages = str(error)
            if isinstance(pages, str):
                failed.append(f"{images.sources[mask][1]}: {pages}")
        progress()
    return group.gather(failed)


def mask_name(name: str) -> str:
    """The name of an image's mask: the image's name, with .png if the image's format would spoil a mask."""
    keeps = name.lower().endswith((PNG, *TIFF_EXTENSIONS))
    return name if keeps else without_ending(name) + PNG


def _segment_pages(
    trained: Segmenter,
    pages: list[StoredImage],
    mask: str,
    outputs: Outputs,
    predict: Callable[[Tensor], Segmentation],
) -> None:
    """Write the outputs page by page; the mask appears last, as it marks the image as done."""
    if len(pages) > 1 and PurePosixPath(mask).suffix.lower() not in TIFF_EXTENSIONS:
        raise ValueError(f"a file of {len(pages)} pages must be named .tif, so that its mask has pages, too; rename it")
    stem = PurePosixPath(mask).with_suffix("")
    stems = [stem] if len(pages) == 1 else [stem / f"{number:04d}" for number in range(len(pages))]
    has_objects = trained.kind != "classes"
    with ExitStack() as files:
        write_mask = files.enter_context(_whole_pages(outputs.folder / mask))
        if outputs.instances and has_objects:
            write_instances = files.enter_context(_whole_pages(outputs.folder / "instances" / mask))
        for page, stem in zip(pages, stems, strict=True):
            image = to_float(_decoded_page(page, trained), stretch=trained.stretch)
            prediction = predict(image)
            write_mask(prediction.classes)
            if outputs.instances and has_objects:
                write_instances(sixteen_bits(prediction.instances))
            if outputs.probabilities:
                with atomic_write(outputs.folder / "probabilities" / f"{stem}.npy") as partial:
                    _save_array(partial, prediction.probabilities.astype(np.float16))
            if outputs.overlays:
                outline = prediction.instances if has_objects else prediction.classes
                seen = trained.values.seen(image[None])[0]
                write_png(outlined(seen, outline), outputs.folder / "overlays" / f"{stem}.png")


def _decoded_page(page: StoredImage, trained: Segmenter) -> Tensor:
    try:
        return decode_page(page, trained.unet.in_channels, trained.values.value_range)
    except Exception as error:  # decoders raise anything for damaged files
        raise ValueError(reason(error)) from error


def sixteen_bits(numbers: NDArray[np.int32]) -> NDArray[np.uint16]:
    """The numbers of objects as they are written.

    Args:
        numbers: The number of the object at each pixel.

    Raises:
        ValueError: If there are more objects than 16 bits can number.
    """
    limit = np.iinfo(np.uint16).max
    if numbers.max(initial=0) > limit:
        raise ValueError(f"an image must have at most {limit} objects, got {numbers.max()}; cut the image into parts")
    return numbers.astype(np.uint16)


@contextmanager
def _whole_pages(path: Path) -> Iterator[Callable[[NDArray[Any]], object]]:
    """A function that writes the next page to a file, which appears after the last page; a PNG has one page."""
    with atomic_write(path) as partial:
        if path.suffix.lower() in TIFF_EXTENSIONS:
            with TiffWriter(partial) as tiff:
                yield lambda page: tiff.write(page, photometric="minisblack", compression="lzw", metadata=None)
        else:
            yield lambda page: Image.fromarray(page).save(partial, format="PNG")


def _save_array(path: Path, array: NDArray[np.float16]) -> None:
    with open(path, "wb") as file:  # numpy would add an extension to a path
        np.save(file, array)
