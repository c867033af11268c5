"""Writing shards: a folder of images becomes tar archives and an index, for `Shards`.

Images go into shards in an order drawn at random, so that each shard is a sample of the whole set: what is shuffled in
training, a few shards at a time, is then as mixed as the set. A shard appears whole or not at all, and its record after
it; the index, which makes the folder a set of shards, comes last, and goes before a shard is replaced by another.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unet_diffusion.data.batches import Entries
from unet_diffusion.data.checking import decoded, in_threads
from unet_diffusion.data.decoding import ImageFormat, check_channels, fitted_image, plain_numbers
from unet_diffusion.data.files import ImageFiles
from unet_diffusion.data.fingerprints import content_hash, is_of, text_digest
from unet_diffusion.data.listing import IMAGE_EXTENSIONS
from unet_diffusion.data.shards import CAPTION, CLASS, INDEX, Shard, ShardIndex, shard_name
from unet_diffusion.data.stored import only_image
from unet_diffusion.data.stored_image import StoredImage
from unet_diffusion.runtime.addresses import absolute_place
from unet_diffusion.runtime.atomic_files import atomic_write, read_json, remove_left_behind
from unet_diffusion.runtime.cropping import Crop, Size
from unet_diffusion.runtime.folder_settings import CONTENTS, require_same_settings
from unet_diffusion.runtime.messages import first_few
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.runtime.tiff_files import tiff_of

ORDER_KEY = 2  # keeps the order apart from the split of a folder
ZIP, GZIP = b"PK", b"\x1f\x8b"  # begin such files
COMPRESS_LEVEL = 1  # of PNG: fast; 9 saves a few per cent
KNOWN = {CAPTION: "captions", CLASS: "labels"}  # the entries that go into members of their own
PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of 8 bits, by channels


@dataclass(frozen=True)
class Packed:
    """An image as it goes into a shard.

    Args:
        content: The contents of the image file.
        extension: The extension of its name, such as ".png".
        size: Height and width in pixels.
        bits: Bits of a number.
        dtype: Type of the numbers.
        ends: The least and the largest number; None: the image has alpha or colours by index.
        are_colours: Whether the channels are grey, RGB, or RGB and alpha.
        crop: The part of its file that the image shows.
    """

    content: bytes
    extension: str
    size: Size
    bits: int
    dtype: np.dtype
    ends: tuple[float, float] | None
    are_colours: bool
    crop: Crop


def pack_images(
    files: ImageFiles,
    folder: Path,
    *,
    root: str | Path,
    shard_images: int = 1024,
    image_format: ImageFormat | None = None,
    channels: int = 3,
    entries: Entries | None = None,
    class_names: list[str] | None = None,
    skip_bad_files: bool = False,
    progress: Callable[[int], object] = lambda num_images: None,
    say: Callable[[str], object] = lambda line: None,
) -> list[str]:
    """Write shards of all images, going on where an earlier call with the same arguments was cut off.

    Args:
        files: The images.
        folder: The folder of the shards; it is made if it is not there.
        root: The place of the images, for messages and to tell them from others.
        shard_images: The number of images per shard; the last shard, and shards with images left out, hold fewer.
        image_format: The size and channels that each image is converted to, and kept as PNG, or as TIFF where PNG does
            not hold it. None keeps the files as they are.
        channels: The channels of the images where files are kept as they are, as in `ImageFormat`.
        entries: What is known of each image by name: numbers (N, ...), of which whole ones become int64, or N texts.
        class_names: The name of each class, or None.
        skip_bad_files: Whether files that cannot be decoded or are too small are left out. Otherwise no index is
            written if there are any.
        progress: The function that is called with the number of images that were done.
        say: The function that is called with a line for each shard that is packed again because images in it have
            changed.

    Returns:
        A line "name: reason" for each file that cannot be used.

    Raises:
        FileExistsError: If the folder holds something else, or shards of other images or settings.
        ValueError: If a number is out of range, or no image can be used.
    """
    if shard_images < 1:
        raise ValueError(f"shard_images must be at least 1, got {shard_images}")
    plain = {key: rows.tolist() if isinstance(rows, Tensor) else rows for key, rows in (entries or {}).items()}
    settings = {
        "images": absolute_place(root),
        "num_images": len(files.names),
        f"{CONTENTS}names": text_digest("\n".join(files.names)).hex(),
        "shard_images": shard_images,
        "image_format": str(image_format),
        "channels": channels if image_format is None else image_format.channels,
        "class_names": class_names,
        "entries": {f"{CONTENTS}{key}": text_digest(json.dumps(rows)).hex() for key, rows in plain.items()},
    }
    require_same_settings(folder, settings, "shards")
    remove_left_behind(folder)
    order = torch.randperm(len(files.names), generator=keyed_generator(ORDER_KEY)).tolist()
    records = []
    for number, start in enumerate(range(0, len(order), shard_images)):
        members = order[start : start + shard_images]
        record = _record(folder, number)
        changed = _changed(files, record) if record else []
        if changed:
            say(f"{shard_name(number)} is packed again, because images in it have changed: {first_few(changed)}")
        if record is None or changed or (record["bad_files"] and not skip_bad_files):
            before = record["shard"]["sha256"] if record else None
            record = _write_shard(folder, number, files, members, image_format or channels, plain, before)
        progress(len(members))
        records.append(record)
    bad_files = [line for record in records for line in record.pop("bad_files")]
    if not bad_files or skip_bad_files:
        _write_index(folder, records, class_names, image_format.channels if image_format else None)
    return bad_files


def _changed(files: ImageFiles, record: dict[str, Any]) -> list[str]:
    """The images of a shard that have changed."""
    return [name for name, before in record["made_of"].items() if not is_of(files, name, before)]


def _record(folder: Path, number: int) -> dict[str, Any] | None:
    path = _record_path(folder, number)
    return read_json(path) if path.is_file() else None


def _record_path(folder: Path, number: int) -> Path:
    return folder / "records" / f"{number:05d}.json"


def _write_shard(
    folder: Path,
    number: int,
    files: ImageFiles,
    members: list[int],
    image_format: ImageFormat | int,
    entries: Mapping[str, list[Any]],
    before: str | None,
) -> dict[str, Any]:
    """Write a shard and return its record.

    Args:
        folder: The folder of the shards.
        number: The number of the shard.
        files: The images.
        members: The numbers of the images in the shard.
        image_format: The format of the images, or the number of channels of files that are kept as they are.
        entries: What is known of each image.
        before: The checksum of the shard in its place, if that is known.
    """
    names = {files.names[i]: i for i in members}
    good: dict[int, Packed] = {}
    bad_files = []
    made_of = {name: [files.stamp(name), ""] for name in names}

    def pack(name: str) -> Packed | str:
        def packed(content: bytes) -> Packed:
            made_of[name][1] = content_hash(content)
            return _packed(content, name, image_format)

        return decoded(packed, files, name)

    for name, one in in_threads(pack, list(names), "pack", progress=False):
        if isinstance(one, str):
            bad_files.append(f"{name}: {one}")
        else:
            good[names[name]] = one
    with atomic_write(folder / shard_name(number)) as partial:
        _write_tar(partial, good, entries)
        with open(partial, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != before:  # what is said of the shard is true no longer
            (folder / INDEX).unlink(missing_ok=True)
            _record_path(folder, number).unlink(missing_ok=True)
    rows_of_good = {key: [rows[i] for i in good] for key, rows in entries.items()}
    shard = Shard(len(good), sha256, rows_of_good, [one.crop for one in good.values()])
    sizes = [one.size for one in good.values()]
    record = {
        "shard": asdict(shard),
        "smallest": [min(sides) for sides in zip(*sizes, strict=True)] if sizes else None,
        "bits": max((one.bits for one in good.values()), default=8),
        "dtypes": sorted({one.dtype.newbyteorder("=").name for one in good.values()}),
        "ends": [one.ends for one in good.values()],
        "are_colours": all(one.are_colours for one in good.values()),
        "bad_files": bad_files,
        "made_of": made_of,
    }
    with atomic_write(_record_path(folder, number)) as partial:
        partial.write_text(json.dumps(record))
    return record


def _packed(content: bytes, name: str, image_format: ImageFormat | int) -> Packed:
    """An image as it goes into a shard, after it was decoded to find damage.

    Raises:
        ValueError: If it cannot be used.
    """
    if isinstance(image_format, int):
        stored = only_image(content, image_format)
        extension = _extension(name, stored, content)
        are_colours = stored.kind != "channels"
        is_plain = stored.palette is None and stored.alpha is None and stored.transparent is None
        numbers = plain_numbers(stored) if is_plain else stored.numbers()
        check_channels(stored, image_format)
        if stored.white is not None:
            fitted_image(stored, ImageFormat(1, 1, image_format))  # refuses numbers that are no colours
        bits = 8 if stored.bits <= 8 else stored.bits
        ends = _ends(numbers) if is_plain else None
        crop = Crop.centred(stored.size, stored.size)
        return Packed(content, extension, stored.size, bits, numbers.dtype, ends, are_colours, crop)
    stored = only_image(content, image_format.channels)
    if stored.white is None:
        raise ValueError(f"{stored} have no range that is known, by which they could be scaled; leave --image_size "
                         "out, and set value_range in training")  # fmt: skip
    pixels = fitted_image(stored, image_format)
    size, bits = (image_format.height, image_format.width), 8 * pixels.itemsize
    are_colours = stored.kind != "channels"
    numbers = pixels.numpy()
    ends = None if are_colours and len(pixels) == 4 else _ends(numbers)
    is_png = bits == 8 and are_colours
    content, extension = (_png(pixels), ".png") if is_png else (tiff_of(numbers, are_colours=are_colours), ".tif")
    crop = Crop.centred(stored.size, size)
    return Packed(content, extension, size, bits, numbers.dtype, ends, are_colours, crop)


def _extension(name: str, stored: StoredImage, content: bytes) -> str:
    """The extension of the name, or, as the names of rows of a table have none, that of the format."""
    if known := [extension for extension in IMAGE_EXTENSIONS if name.lower().endswith(extension)]:
        return max(known, key=len)  # .nii.gz
    if stored.file_format == "NumPy":
        return ".npz" if content.startswith(ZIP) else ".npy"
    if stored.file_format == "NIfTI":
        return ".nii.gz" if content.startswith(GZIP) else ".nii"
    return f".{stored.file_format.rpartition(' ')[2].lower()}"


def _ends(numbers: NDArray[Any]) -> tuple[float, float]:
    return float(numbers.min()), float(numbers.max())


def _png(pixels: Tensor) -> bytes:
    """A (C, H, W) uint8 image as a file."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy(), PILLOW_MODES[len(pixels)])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=COMPRESS_LEVEL)
    return buffer.getvalue()


def _write_tar(path: Path, images: Mapping[int, Packed], entries: Mapping[str, list[Any]]) -> None:
    """Write images by their numbers, each followed by its caption and its class, as the library webdataset has it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for position, (number, image) in enumerate(images.items()):
            texts = {ending: str(entries[key][number]).encode() for ending, key in KNOWN.items() if key in entries}
            for ending, content in {image.extension: image.content, **texts}.items():
                member = tarfile.TarInfo(f"{position:06d}{ending}")  # without a date: the same bytes every time
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _write_index(
    folder: Path, records: list[dict[str, Any]], class_names: list[str] | None, channels: int | None
) -> None:
    sizes = [record["smallest"] for record in records if record["smallest"]]
    if not sizes:
        raise ValueError(f"none of the images can be used, so {folder} is left without an index")
    height, width = (min(sides) for sides in zip(*sizes, strict=True))
    ends = [pair for record in records for pair in record["ends"]]
    index = ShardIndex(
        shards=[Shard(**record["shard"]) for record in records],
        class_names=class_names,
        smallest=(height, width),
        bits=max(record["bits"] for record in records),
        channels=channels,
        dtype=np.result_type(*{np.dtype(name) for record in records for name in record["dtypes"]}).name,
        ends=None if None in ends else [min(low for low, _ in ends), max(high for _, high in ends)],
        are_colours=all(record["are_colours"] for record in records),
    )
    with atomic_write(folder / INDEX) as partial:
        partial.write_text(json.dumps(asdict(index)))
