"""A table of the objects that were segmented: objects.csv, a row for each, beside the masks."""

import csv
import io
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import regionprops_table
from tifffile import TiffFile

from unet_diffusion.data.stored import stored_images
from unet_diffusion.data.stored_image import StoredImage
from unet_diffusion.inference.segment_files import ImagesToSegment, Outputs
from unet_diffusion.runtime.atomic_files import atomic_write

TABLE = "objects.csv"
COLUMNS = ("image", "page", "object", "area", "centre_y", "centre_x", "top", "left", "bottom", "right",
           "mean_intensity", "pixel_height_um", "pixel_width_um")  # fmt: skip
PROPERTIES = ("label", "area", "centroid", "bbox", "intensity_mean")
MICROMETRES = {  # in a unit, by its names in OME and ImageJ
    **dict.fromkeys(("µm", "\u03bcm", "um", "micron", "microns", "micrometer", "\\u00B5m"), 1.0),
    **dict.fromkeys(("nm", "nanometer"), 1e-3),
    **dict.fromkeys(("mm", "millimeter"), 1e3),
    **dict.fromkeys(("cm", "centimeter"), 1e4),
}
CENTIMETRE = 3  # of the tag ResolutionUnit; inches tell how a picture is printed, not how large its pixels are


def write_objects(images: ImagesToSegment, outputs: Outputs, channels: int) -> int:
    """Write objects.csv for all images whose objects are there, and return the number of rows.

    Areas are in pixels, centres and boxes in pixels from the upper left corner (bottom and right are just outside), and
    intensities are means of the numbers that the file stores, over its channels. The size of a pixel is in micrometres,
    and empty where the file does not hold it.

    Args:
        images: The images.
        outputs: Where their objects are.
        channels: The number of channels that images must have.
    """
    num_rows = 0
    with atomic_write(outputs.folder / TABLE) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for mask in images.sources:
            instances = outputs.folder / "instances" / mask
            if instances.is_file():
                rows = list(_rows_of(images, mask, instances, channels))
                writer.writerows(rows)
                num_rows += len(rows)
    return num_rows


def _rows_of(images: ImagesToSegment, mask: str, instances: Path, channels: int) -> Iterator[list[Any]]:
    files, name = images.sources[mask]
    pages, labels = images.pages(mask, channels), stored_images(instances.read_bytes())
    if isinstance(pages, str):  # the image was removed meanwhile
        return
    sizes = ["" if size is None else f"{size:.6g}" for size in pixel_size(files.read(name))]
    for number, (page, numbered) in enumerate(zip(pages, labels, strict=True)):
        for row in object_rows(numbered.numbers()[..., 0], intensities(page)):
            yield [name, number, *row, *sizes]


def intensities(page: StoredImage) -> NDArray[np.float64]:
    """The numbers that a file stores for an image, (H, W): their means over its channels, or over RGB of a palette.

    Args:
        page: The image.
    """
    numbers = page.numbers()
    channels = numbers[..., : page.num_channels] if page.palette is None else page.palette[numbers[..., 0]][..., :3]
    means: NDArray[np.float64] = channels.astype(np.float64).mean(axis=2)
    return means


def object_rows(instances: NDArray[Any], pixels: NDArray[Any]) -> list[tuple[Any, ...]]:
    """The number of each object, its area, centre (y, x), box (top, left, bottom, right) and mean intensity.

    Args:
        instances: The number of the object at each pixel, 0 for background, (H, W).
        pixels: The image, (H, W).
    """
    columns = regionprops_table(instances.astype(np.int32), pixels, properties=PROPERTIES)
    return [
        tuple(int(value) if float(value).is_integer() else round(float(value), 3) for value in row)
        for row in zip(*columns.values(), strict=True)
    ]


def pixel_size(data: bytes) -> tuple[float | None, float | None]:
    """The height and width of a pixel in micrometres, from the metadata of OME or ImageJ or the tags of a TIFF file.

    Args:
        data: The contents of a file; of other formats nothing is known.
    """
    if data[:2] not in (b"II", b"MM"):
        return None, None
    with TiffFile(io.BytesIO(data)) as tiff:
        if tiff.is_ome and tiff.ome_metadata:
            try:
                nodes = list(ElementTree.fromstring(tiff.ome_metadata).iter())
            except ElementTree.ParseError:  # the pixels can be read all the same
                return None, None
            pixels = next((node for node in nodes if node.tag.rpartition("}")[2] == "Pixels"), None)
            return (None, None) if pixels is None else (_of_ome(pixels, "Y"), _of_ome(pixels, "X"))
        tags, imagej = tiff.pages[0].aspage().tags, tiff.imagej_metadata or {}
        is_metric = tags.valueof("ResolutionUnit") == CENTIMETRE
        scale = MICROMETRES.get(str(imagej["unit"])) if "unit" in imagej else MICROMETRES["cm"] if is_metric else None
        height, width = (tags.valueof(f"{axis}Resolution") for axis in "YX")  # pixels in a unit, as fractions
        return _of_resolution(height, scale), _of_resolution(width, scale)


def _of_ome(pixels: ElementTree.Element, axis: str) -> float | None:
    size, unit = pixels.get(f"PhysicalSize{axis}", ""), pixels.get(f"PhysicalSize{axis}Unit", "µm")
    try:
        return float(size) * MICROMETRES[unit]
    except (KeyError, ValueError):  # an unknown unit, or no number
        return None


def _of_resolution(resolution: Any, scale: float | None) -> float | None:
    if scale is None or not resolution or not resolution[0]:
        return None
    return scale * resolution[1] / resolution[0]
