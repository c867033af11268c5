"""Files of each format, written by the library that owns it, read by that library and by ours: the largest difference.

    python benchmarks/formats.py

Numbers as stored are compared (`stored_images`), and where a format is written from samples, what comes back. What ours
does to numbers on purpose is done to the other side, too: rows for columns in NIfTI, inversion of MONOCHROME1.
"""

import argparse
import gzip
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import imagecodecs
import nibabel
import numpy as np
import pydicom
import tifffile
import torch
import webdataset
from measure import RESULTS, describe, environment, table, write_json
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels import apply_rescale
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from unet_diffusion.data import find_images
from unet_diffusion.data.stored import stored_images
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.runtime.tiff_files import tiff_of

HEIGHT, WIDTH = 61, 83  # odd, so that swapped sides are seen
RNG = np.random.default_rng(0)
Array = NDArray[Any]


class Case(NamedTuple):
    """A file, and what the other library reads of it, (C, H, W)."""

    file_format: str
    library: str
    compared: str
    content: bytes
    expected: Array


def numbers(dtype: Any, channels: int | None = None) -> Array:
    """Random numbers over the range of a type, or of floats about 0."""
    shape = (HEIGHT, WIDTH) if channels is None else (channels, HEIGHT, WIDTH)
    if np.dtype(dtype).kind == "f":
        return RNG.normal(0, 1000, size=shape).astype(dtype)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, size=shape, endpoint=True, dtype=dtype)


def written(save: Callable[..., object], *arguments: Any, **options: Any) -> bytes:
    """What a function writes to a file."""
    buffer = io.BytesIO()
    save(buffer, *arguments, **options)
    return buffer.getvalue()


def tiffs() -> Iterator[Case]:
    """Layouts and types of TIFF."""
    layouts: dict[str, dict[str, Any]] = {
        "OME-TIFF, 5 channels": {"ome": True, "metadata": {"axes": "CYX"}},
        "ImageJ TIFF, 5 channels": {"imagej": True, "metadata": {"axes": "CYX"}},
        "TIFF, 5 planes": {"photometric": "minisblack", "planarconfig": "separate"},
        "TIFF, 5 pages without metadata": {"photometric": "minisblack", "metadata": None},
    }
    for name, options in layouts.items():
        of_imagej, others = ("uint8", "uint16", "float32"), ("uint8", "uint16", "int16", "int32", "float32")
        for dtype in of_imagej if "imagej" in options else others:
            content = written(tifffile.imwrite, numbers(dtype, 5), **options)
            yield Case(name, "tifffile", dtype, content, tifffile.imread(io.BytesIO(content)))
    for compression in ("lzw", "zlib", "zstd"):
        content = written(tifffile.imwrite, numbers("uint16", 5), compression=compression, tile=(16, 16),
                          photometric="minisblack", planarconfig="separate")  # fmt: skip
        expected = tifffile.imread(io.BytesIO(content))
        yield Case("TIFF, 5 planes", "tifffile", f"uint16 in tiles, {compression}", content, expected)


def arrays() -> Iterator[Case]:
    """NumPy's own files."""
    for name, save in ((".npy, 5 channels", np.save), (".npz, 5 channels", np.savez_compressed)):
        for dtype in ("uint8", ">u2", "int32", "float32", "float64"):
            content = written(save, numbers(np.dtype(dtype).newbyteorder("="), 5).astype(dtype))
            loaded = np.load(io.BytesIO(content), allow_pickle=False)
            yield Case(name, "numpy", np.dtype(dtype).name, content,
                       loaded if save is np.save else loaded["arr_0"])  # fmt: skip


def niftis() -> Iterator[Case]:
    """Slices of NIfTI-1 and NIfTI-2."""
    for kind, name in ((nibabel.Nifti1Image, "NIfTI-1, compressed"), (nibabel.Nifti2Image, "NIfTI-2, compressed")):
        for dtype, slope in (("uint8", None), ("int16", None), ("int16", 0.5), ("float32", None)):
            image = kind(numbers(dtype).T, np.eye(4))
            image.header.set_slope_inter(slope, None if slope is None else -3)
            plain = image.to_bytes()
            expected = np.asanyarray(kind.from_bytes(plain).dataobj).T[None]
            scaled = "" if slope is None else " with slope and intercept"
            yield Case(name, "nibabel", f"{dtype}{scaled}", gzip.compress(plain), expected)


def dicoms() -> Iterator[Case]:
    """Slices of DICOM."""
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        for dtype, bits, slope in (("uint8", 8, None), ("uint16", 12, None), ("uint16", 12, 1.0), ("int16", 16, 0.5)):
            array = numbers(dtype) if bits == 8 * np.dtype(dtype).itemsize else numbers(dtype) >> 4
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
            dataset.SOPClassUID = meta.MediaStorageSOPClassUID
            dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
            dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = HEIGHT, WIDTH, 1
            dataset.PhotometricInterpretation = photometric
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * array.itemsize, bits, bits - 1
            dataset.PixelRepresentation = int(array.dtype.kind == "i")
            if slope is not None:
                dataset.RescaleSlope, dataset.RescaleIntercept = slope, -1024
            dataset.PixelData = array.tobytes()
            content = written(lambda file, one: one.save_as(file, enforce_file_format=True), dataset)
            read = pydicom.dcmread(io.BytesIO(content))
            pixels = read.pixel_array.astype(np.int64)
            if photometric == "MONOCHROME1":
                pixels = (-1 if array.dtype.kind == "i" else 2**bits - 1) - pixels
            rescaled = "" if slope is None else f" with slope {slope:g}"
            expected = apply_rescale(pixels, read)[None]
            yield Case(f"DICOM, {photometric}", "pydicom", f"{bits} bits of {dtype}{rescaled}", content, expected)


def data_sets() -> Iterator[Case]:
    """Images in data sets, whose libraries decode them by Pillow."""
    pixels = numbers("uint8", 3).transpose(1, 2, 0)
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(pixels)]})
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        places = {name: str(Path(folder) / name) for name in ("set.parquet", "saved", "set.tar")}
        table.to_parquet(places["set.parquet"])
        table.save_to_disk(places["saved"])
        with webdataset.TarWriter(places["set.tar"]) as tar:
            tar.write({"__key__": "0", "png": Image.fromarray(pixels)})
        (sample,) = webdataset.WebDataset(places["set.tar"], shardshuffle=False, empty_check=False).decode("rgb8")
        reads = {
            "set.parquet": (
                "Parquet",
                "datasets",
                np.asarray(datasets.Dataset.from_parquet(places["set.parquet"])[0]["image"]),
            ),
            "saved": ("saved data set", "datasets", np.asarray(datasets.load_from_disk(places["saved"])[0]["image"])),
            "set.tar": ("WebDataset tar", "webdataset", sample["png"]),
        }
        for name, (kind, library, expected) in reads.items():
            files = find_images(places[name])
            yield Case(kind, library, "PNG, RGB of uint8", files.read(files.names[0]), expected.transpose(2, 0, 1))


def samples() -> Iterator[Case]:
    """What `sample` writes, read by tifffile: against the numbers that were to be written."""
    images = torch.rand(1, 5, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for values in (PixelValues("uint8", 0, 255), PixelValues("uint16", 0, 65535), PixelValues("int16", -1024, 3071),
                   PixelValues("float32", -3.5, 900), PixelValues("float64", 0, 1)):  # fmt: skip
        expected = values.numbers(images)[0]
        content = tiff_of(expected, are_colours=False)
        read = tifffile.imread(io.BytesIO(content))
        assert read.dtype == expected.dtype
        yield Case("samples, TIFF, 5 channels", "unet_diffusion", values.dtype, content, read)


def png() -> Iterator[Case]:
    """The formats of before, for comparison."""
    pixels = numbers("uint8", 3).transpose(1, 2, 0)
    content = written(Image.fromarray(np.ascontiguousarray(pixels)).save, format="PNG")
    yield Case("PNG", "Pillow", "RGB of uint8", content, np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1))
    deep = np.ascontiguousarray(numbers("uint16", 3).transpose(1, 2, 0))
    content = imagecodecs.png_encode(deep)
    yield Case("PNG", "imagecodecs", "RGB of uint16", content, imagecodecs.png_decode(content).transpose(2, 0, 1))


def difference(case: Case) -> float:
    """The largest difference of the numbers that ours reads, in float64."""
    (image,) = stored_images(case.content, len(case.expected))
    ours = image.numbers().transpose(2, 0, 1).astype(np.float64)
    if image.is_inverted:
        ours = (image.white or 0) - ours
    assert ours.shape == case.expected.shape, (case.file_format, case.compared, ours.shape)
    return float(np.abs(ours - case.expected.astype(np.float64)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=RESULTS / "formats.json")
    options = parser.parse_args()
    cases = [case for kind in (tiffs, arrays, niftis, dicoms, samples, png, data_sets) for case in kind()]
    columns = ("format", "written by", "compared", "largest difference")
    rows = [dict(zip(columns, (*one[:3], difference(one)), strict=True)) for one in cases]
    versions = {one.__name__: one.__version__ for one in (tifffile, np, nibabel, pydicom, datasets, webdataset)}
    record = {**environment(), "libraries": versions, "cases": rows}
    print(describe(record))
    print(table(rows))
    write_json(options.output, record)


if __name__ == "__main__":
    main()
