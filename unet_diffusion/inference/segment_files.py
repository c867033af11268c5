"""Segments images with a trained network: class probabilities of an image, and masks for a folder of them."""

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
from unet_diffusion.data.files import ImageFiles, find_images_or_one
from unet_diffusion.data.fingerprints import MadeOf, fingerprint, is_of
from unet_diffusion.data.listing import TIFF_EXTENSIONS
from unet_diffusion.data.scaling import to_float
from unet_diffusion.data.stored import StoredImage, stored_images
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.pictures import write_png
from unet_diffusion.runtime.processes import ALONE, ProcessGroup
from unet_diffusion.segmentation.labels import instances_from, mask_from
from unet_diffusion.segmentation.pictures import outlined

PNG = ".png"  # of outputs whose input has a lossy or multi-purpose format
EXTRAS = ("probabilities", "overlays", "instances")  # folders beside the masks
INPUTS = "inputs.jsonl"  # beside the masks: which image each is of


@dataclass(frozen=True)
class Outputs:
    """What is written for each image, under its own name.

    Args:
        folder: masks go to folder/NAME; what else is asked for to folders inside it. Of a stack, each page has a file
            there in a folder named as the stack.
        probabilities: folder/probabilities/NAME.npy, float16 (K, H, W).
        overlays: folder/overlays/NAME.png, the image with outlines.
        instances: folder/instances/NAME, a 16-bit number for each object.
    """

    folder: Path
    probabilities: bool = False
    overlays: bool = False
    instances: bool = False

    @property
    def made_of(self) -> MadeOf:
        """Of which image each mask is."""
        return MadeOf(self.folder / INPUTS)

    def remove(self, mask: str) -> None:
        """Remove a mask, and what was written with it."""
        stem = PurePosixPath(mask).with_suffix("")
        for folder in (self.folder / extra for extra in EXTRAS):
            pages = [path for path in (folder / stem).glob("*") if path.stem.isdecimal() and path.is_file()]
            for path in (folder / mask, folder / f"{stem}{PNG}", folder / f"{stem}.npy", *pages):
                path.unlink(missing_ok=True)
        (self.folder / mask).unlink(missing_ok=True)


class ImagesToSegment:
    """Files, folders and zip archives of images, each with the name that its mask is to have.

    Args:
        roots: an image file, a folder, archive.zip or archive.zip/folder each.

    Attributes:
        sources: where the image of each mask is, and its name there.
        left_out: what else there is, in a line; "" if there is nothing.

    Raises:
        FileNotFoundError: if one does not exist.
        ValueError: if one holds no images, or two outputs would have the same name.
    """

    def __init__(self, roots: list[Path]):
        self.sources: dict[str, tuple[ImageFiles, str]] = {}
        stems: dict[str, str] = {}
        folders: dict[str, str] = {}
        others = []
        for root in roots:
            files = find_images_or_one(root)
            others.append(files.left_out.described())
            for name in files.names:
                mask = mask_name(name)
                stem = str(PurePosixPath(name).with_suffix(""))
                if stem in stems:
                    raise ValueError(
                        f"images must differ in more than their extension, got {stems[stem]} and {name}; "
                        "segment them into different folders"
                    )
                if PurePosixPath(name).parts[0] in EXTRAS:
                    raise ValueError(f"{name} would lie among other outputs; rename its folder")
                stems[stem] = name
                folders.update({str(folder): name for folder in PurePosixPath(stem).parents})
                self.sources[mask] = (files, name)
        if both := next((stem for stem in stems if stem in folders), None):  # of a stack's pages, too
            raise ValueError(f"{stems[both]} and {folders[both]} would both have outputs in a folder {both}; rename "
                             "one, or segment them into different folders")  # fmt: skip
        self.left_out = "; ".join(filter(None, others))

    def __len__(self) -> int:
        return len(self.sources)

    def changed(self, outputs: Outputs) -> list[str]:
        """Masks whose image has changed since, or that were not finished."""
        made_of = outputs.made_of.read()
        there = [mask for mask in self.sources if mask in made_of and (outputs.folder / mask).exists()]
        return [mask for mask in there if not is_of(*self.sources[mask], made_of[mask])]

    def pages(self, mask: str) -> list[StoredImage] | str:
        """The pages of the image that the mask is of, or why there are none."""
        files, name = self.sources[mask]
        return decoded(lambda data: list(stored_images(data)), files, name)


def segment_images(
    trained: Segmenter,
    images: ImagesToSegment,
    outputs: Outputs,
    *,
    predict: Callable[[Tensor], Tensor],
    progress: Callable[[], object] = lambda: None,
    group: ProcessGroup = ALONE,
) -> list[str]:
    """Write a mask for each image that has none, and return "name: reason" for those that could not be.

    A file appears whole or not at all. The pages of a TIFF file become the pages of its mask.

    Args:
        trained: says how images are scaled and what the classes mean.
        images: what to segment.
        outputs: what to write, and where.
        predict: from an image, (C, H, W) in [-1, 1], to class probabilities, (K, H, W).
        progress: called after each image.
        group: the processes that share the images out.
    """
    failed = []
    for mask in group.shard(list(images.sources)):
        if not (outputs.folder / mask).exists():
            made_of = fingerprint(*images.sources[mask])
            pages = images.pages(mask)
            if isinstance(pages, list):
                outputs.made_of.note(mask, None)
                try:
                    _segment_pages(trained, pages, mask, outputs, predict)
                    outputs.made_of.note(mask, made_of)
                except (ValueError, RuntimeError, OSError) as error:  # out of memory, disk full: others may do
                    pages = str(error)
            if isinstance(pages, str):
                failed.append(f"{images.sources[mask][1]}: {pages}")
        progress()
    return group.gather(failed)


def mask_name(name: str) -> str:
    """The name of the mask of an image: the same, or with .png where the image's format would spoil a mask."""
    path = PurePosixPath(name)
    keeps = path.suffix.lower() in (PNG, *TIFF_EXTENSIONS)
    return str(path if keeps else path.with_suffix(PNG))


def _segment_pages(
    trained: Segmenter,
    pages: list[StoredImage],
    mask: str,
    outputs: Outputs,
    predict: Callable[[Tensor], Tensor],
) -> None:
    """Writes what is asked for, one page after the other; the mask last, as it says that the image is done."""
    if len(pages) > 1 and PurePosixPath(mask).suffix.lower() not in TIFF_EXTENSIONS:
        raise ValueError(f"a file of {len(pages)} pages must be named .tif, for its masks to be pages too; rename it")
    stem = PurePosixPath(mask).with_suffix("")
    stems = [stem] if len(pages) == 1 else [stem / f"{number:04d}" for number in range(len(pages))]
    has_objects = trained.kind != "classes"
    with ExitStack() as files:
        write_mask = files.enter_context(_whole_pages(outputs.folder / mask))
        if outputs.instances and has_objects:
            write_instances = files.enter_context(_whole_pages(outputs.folder / "instances" / mask))
        for page, stem in zip(pages, stems, strict=True):
            image = to_float(_decoded_page(page, trained.unet.in_channels), stretch=trained.stretch)
            prediction = predict(image).numpy()
            outline: NDArray[Any] = mask_from(prediction, trained.kind)
            write_mask(outline)
            if has_objects and (outputs.instances or outputs.overlays):
                outline = instances_from(prediction, trained.kind)
            if outputs.instances and has_objects:
                write_instances(_sixteen_bits(outline))
            if outputs.probabilities:
                with atomic_write(outputs.folder / "probabilities" / f"{stem}.npy") as partial:
                    _save_array(partial, prediction.astype(np.float16))
            if outputs.overlays:
                write_png(outlined(image, outline), outputs.folder / "overlays" / f"{stem}.png")


def _decoded_page(page: StoredImage, channels: int) -> Tensor:
    try:
        return decode_page(page, channels)
    except Exception as error:  # on damaged files decoders raise anything
        raise ValueError(reason(error)) from error


def _sixteen_bits(numbers: NDArray[np.int32]) -> NDArray[np.uint16]:
    limit = np.iinfo(np.uint16).max
    if numbers.max(initial=0) > limit:
        raise ValueError(f"instance numbers must fit 16 bits, got {numbers.max()} objects; cut the image into parts")
    return numbers.astype(np.uint16)


@contextmanager
def _whole_pages(path: Path) -> Iterator[Callable[[NDArray[Any]], object]]:
    """Writes one page after the other to a file, which appears when all are written; of PNG there is one."""
    with atomic_write(path) as partial:
        if path.suffix.lower() in TIFF_EXTENSIONS:
            with TiffWriter(partial) as tiff:
                yield lambda page: tiff.write(page, photometric="minisblack", compression="lzw", metadata=None)
        else:
            yield lambda page: Image.fromarray(page).save(partial, format="PNG")


def _save_array(path: Path, array: NDArray[np.float16]) -> None:
    with open(path, "wb") as file:  # given a path, numpy would add an extension
        np.save(file, array)
