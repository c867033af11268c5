"""How many images a second each kind of source gives, and how many a plain loop over the library that owns the format?

    python benchmarks/decoding.py --images DIR

The images of a folder or archive are written once in each format, at the size at which they are read: nothing is
scaled, so that what takes time is to find and to decode them. Both sides load shuffled batches in two workers, in whole
epochs, and nothing is trained. A source gives what it trains on, the library an array (C, H, W) of the same type.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tifffile
import torch
import webdataset
from measure import RESULTS, describe, environment, table, write_json
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unet_diffusion.data import Folder, ImageDataModule, ImageFormat, Shards, Source, decode_image, find_images
from unet_diffusion.data import pack_images as pack

NUM_WORKERS = 2
Loader = Callable[[], Iterable[Any]]


class Read(Dataset[Tensor]):
    """Each image of a list as a library reads it."""

    def __init__(self, keys: list[Any], read: Callable[[Any], np.ndarray]) -> None:
        self.keys, self.read = keys, read

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.read(self.keys[index])))


def write(images: list[np.ndarray], root: Path, num_channels: int) -> None:
    """The images, (H, W, 3) uint8, in each format."""
    for name in ("png", "jpeg", "tiff", "npy"):
        (root / name).mkdir()
    rows = []
    for number, pixels in enumerate(images):
        picture, buffer = Image.fromarray(pixels), BytesIO()
        picture.save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{number:06d}.png"}})
        (root / f"png/{number:06d}.png").write_bytes(buffer.getvalue())
        picture.save(root / f"jpeg/{number:06d}.jpg", quality=90)
        planes = np.resize(pixels.transpose(2, 0, 1), (num_channels, *pixels.shape[:2])).astype(np.uint16) * 257
        tifffile.imwrite(root / f"tiff/{number:06d}.tif", planes, photometric="minisblack", metadata={"axes": "CYX"})
        np.save(root / f"npy/{number:06d}.npy", planes)
    found = datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image()}))
    found.to_parquet(root / "set.parquet")
    found.save_to_disk(root / "saved")
    (root / "tars").mkdir()
    for part in range(NUM_WORKERS):  # the library hands out whole archives to workers
        with webdataset.TarWriter(str(root / f"tars/{part}.tar")) as tar:
            for number, row in enumerate(rows):
                if number % NUM_WORKERS == part:
                    tar.write({"__key__": f"{number:06d}", "png": row["image"]["bytes"]})
    pack(find_images(root / "png"), root / "shards", root=root / "png", shard_images=256)


def ours(root: Path, size: int, batch_size: int, num_channels: int) -> dict[str, Loader]:
    """A loader of each source."""

    def loader(source: Source) -> Loader:
        data = ImageDataModule(source, num_workers=NUM_WORKERS, batch_size=batch_size, num_val=1)
        data.setup()
        return data.train_dataloader

    def folder(place: str, channels: int = 3) -> Loader:
        return loader(Folder(root / place, image_size=size, channels=channels, in_memory=False))

    return {
        "folder of PNG": folder("png"),
        "folder of JPEG": folder("jpeg"),
        f"folder of TIFF, {num_channels} channels of uint16": folder("tiff", num_channels),
        f"folder of .npy, {num_channels} channels of uint16": folder("npy", num_channels),
        "shards of PNG": loader(Shards(root / "shards", image_size=size)),
        "Parquet of PNG": folder("set.parquet"),
        "saved data set of PNG": folder("saved"),
        "WebDataset tars of PNG": folder("tars"),
    }


def libraries(root: Path, batch_size: int) -> dict[str, tuple[str, Loader]]:
    """The library that owns the format of each source, in the same order, and a plain loop over it."""

    def pixels(picture: Any) -> np.ndarray:
        return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)

    def plain(images: Dataset[Tensor]) -> Loader:
        loader = DataLoader(images, batch_size, shuffle=True, num_workers=NUM_WORKERS, persistent_workers=True)
        return lambda: loader

    def files(folder: str, read: Callable[[Any], np.ndarray]) -> Loader:
        return plain(Read(sorted((root / folder).iterdir()), read))

    def rows(found: Any) -> Loader:
        return plain(Read(list(range(len(found))), lambda index: pixels(found[index]["image"])))

    def tars(urls: list[str]) -> Loader:
        found = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        found = found.shuffle(1000).decode("pil").map(lambda one: torch.from_numpy(pixels(one["png"]).copy()))
        loader = DataLoader(found, batch_size, num_workers=NUM_WORKERS, persistent_workers=True)
        return lambda: loader

    parquet = datasets.load_dataset("parquet", data_files=str(root / "set.parquet"), cache_dir=str(root / "cache"))
    return {
        "folder of PNG": ("Pillow", files("png", lambda path: pixels(Image.open(path)))),
        "folder of JPEG": ("Pillow", files("jpeg", lambda path: pixels(Image.open(path)))),
        "folder of TIFF": ("tifffile", files("tiff", tifffile.imread)),
        "folder of .npy": ("numpy", files("npy", np.load)),
        "shards of PNG": ("webdataset", tars(sorted(map(str, (root / "shards").glob("*.tar"))))),
        "Parquet of PNG": ("datasets", rows(parquet["train"])),
        "saved data set of PNG": ("datasets", rows(datasets.load_from_disk(str(root / "saved")))),
        "WebDataset tars of PNG": ("webdataset", tars(sorted(map(str, (root / "tars").glob("*.tar"))))),
    }


def rate(make: Loader, epochs: int) -> int:
    """Images a second, the median over epochs after a first."""
    taken, loader = [], make()
    for epoch in range(epochs + 1):
        start, count = time.perf_counter(), 0
        for batch in loader:
            count += len(batch["images"] if isinstance(batch, dict) else batch)
        if epoch > 0:
            taken.append(count / (time.perf_counter() - start))
    return round(statistics.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder or archive")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--num_images", type=int, help="the first so many; all by default")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_channels", type=int, default=5, help="of TIFF and .npy")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", default=str(RESULTS / "decoding.json"))
    options = parser.parse_args()
    datasets.disable_progress_bars()
    files, size = find_images(options.images), ImageFormat(options.image_size, options.image_size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        datasets.config.HF_DATASETS_CACHE = root / "cache"
        images = [decode_image(files.read(name), size) for name in files.names[: options.num_images]]
        write([image.permute(1, 2, 0).numpy() for image in images], root, options.num_channels)
        sources = ours(root, options.image_size, options.batch_size, options.num_channels)
        peers = libraries(root, options.batch_size)
        rows = [
            {"images from": name, "images/s": rate(make, options.epochs), "library": library,
             "its images/s": rate(plain, options.epochs)}
            for (name, make), (library, plain) in zip(sources.items(), peers.values(), strict=True)
        ]  # fmt: skip
    libraries_used = {one.__name__: one.__version__ for one in (datasets, tifffile, webdataset, np)}
    record = {**environment(), "libraries": libraries_used, "num_images": len(images), "results": rows}
    print(describe(record))
    print(table(rows))
    print(f"written: {write_json(options.output, record)}")


if __name__ == "__main__":
    main()
