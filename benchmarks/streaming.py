"""How many images a second come out of memory, a folder, and shards; and is the order that of before after a resume?

    python benchmarks/streaming.py --images DIR

Shuffled training batches, decoded by two workers, in whole epochs; nothing is trained. The peers are litdata and
Hugging Face datasets, where they are installed: from a disk, with the same images, the same number in a shard, and the
same decoder. Resumed is a new loader with the state of one that was left in the middle of an epoch.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, environment, table, write_json
from torch import Tensor
from torch.utils.data import DataLoader

from unet_diffusion.data import (
    Folder,
    ImageDataModule,
    ImageFormat,
    Shards,
    ShardStore,
    Source,
    decode_image,
    find_images,
)
from unet_diffusion.data import (
    pack_images as pack,
)

NUM_WORKERS = 2
PEERS = ("litdata", "datasets")
Loader = Callable[[], Any]  # makes one anew


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder or archive")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--shard_images", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", default=str(RESULTS / "streaming.json"))
    options = parser.parse_args()
    size = ImageFormat(options.image_size, options.image_size)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = find_images(options.images)
        for name, image_format in (("scaled", size), ("files", None)):
            pack(files, root / name, root=options.images, shard_images=options.shard_images, image_format=image_format)
        command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            try:
                assert server.stdout is not None
                port = server.stdout.readline().split("port ")[1].split()[0]
                ways = ours(options, root, f"http://127.0.0.1:{port}") | peers(options, root, size)
                rows = [
                    {"images from": name} | rates(make, options.epochs) | {"resumed order": resumed(make)}
                    for name, make in ways.items()
                ]
            finally:
                server.terminate()
    print(table(rows))
    print(f"written: {write_json(options.output, {'environment': environment(), 'results': rows})}")


def rates(make: Loader, epochs: int) -> dict[str, Any]:
    """Images a second, the median over epochs after a first; and seconds to the first batch of all."""
    loader, begun, first, taken = make(), time.perf_counter(), 0.0, []
    for epoch in range(epochs + 1):
        start, count = time.perf_counter(), 0
        for batch in loader:
            first = first or time.perf_counter() - begun
            count += len(batch["index"])
        if epoch > 0:
            taken.append(count / (time.perf_counter() - start))
    return {"images/s": round(statistics.median(taken)), "first batch, s": round(first, 2)}


def resumed(make: Loader) -> str:
    """Whether a new loader with the state of an epoch's middle gives the batches of its rest."""
    loader, whole, state = make(), [], None
    for batch in loader:
        whole.append(batch["index"].tolist())
        if len(whole) == 5:
            state = loader.state_dict()
    again = make()
    again.load_state_dict(state)
    try:
        rest = [batch["index"].tolist() for batch in again]
    except Exception as error:  # of a peer
        return f"none: {type(error).__name__}"
    if rest == whole[5:]:
        return "the same"
    seen = [index for batch in whole[:5] + rest for index in batch]
    return f"another; {len(seen) - len(set(seen))} images twice, {len(set(chain(*whole)) - set(seen))} never"


def ours(options: argparse.Namespace, root: Path, address: str) -> dict[str, Loader]:
    def loader(source: Source, workers: int) -> DataLoader[Any]:
        data = ImageDataModule(source, num_workers=workers, batch_size=options.batch_size, num_val=1)
        data.setup()
        return data.train_dataloader()

    def folder(in_memory: bool, workers: int) -> DataLoader[Any]:
        return loader(Folder(options.images, image_size=options.image_size, in_memory=in_memory), workers)

    def shards(place: Path | str) -> DataLoader[Any]:
        return loader(Shards(place, image_size=options.image_size), NUM_WORKERS)

    return {
        "memory": lambda: folder(True, 0),
        "the folder": lambda: folder(False, NUM_WORKERS),
        "shards of files, disk": lambda: shards(root / "files"),
        "shards of files, http": lambda: shards(f"{address}/files"),
        "shards of scaled images, disk": lambda: shards(root / "scaled"),
        "shards of scaled images, http": lambda: shards(f"{address}/scaled"),
    }


def peers(options: argparse.Namespace, root: Path, size: ImageFormat) -> dict[str, Loader]:
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if missing:
        return {}
    import datasets
    import litdata
    from litdata.streaming.writer import BinaryWriter
    from torchdata.stateful_dataloader import StatefulDataLoader

    store = ShardStore(root / "scaled")
    shards = [store.images_of(number, shard) for number, shard in enumerate(store.index().shards)]
    starts = store.index().starts
    writer = BinaryWriter(str(root / "litdata"), chunk_size=options.shard_images)
    (root / "datasets").mkdir()
    for number, contents in enumerate(shards):
        columns = {"index": list(range(starts[number], starts[number + 1])), "content": contents}
        datasets.Dataset.from_dict(columns).to_parquet(root / "datasets" / f"{number:05}.parquet")
        for index, content in zip(columns["index"], contents, strict=True):
            writer[index] = {"index": index, "content": content}
    writer.done()
    writer.merge(1)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = torch.stack([decode_image(row["content"], size) for row in rows])
        return {"images": images, "index": torch.tensor([row["index"] for row in rows])}

    common: dict[str, Any] = {"batch_size": options.batch_size, "num_workers": NUM_WORKERS, "collate_fn": collate}

    def hugging_face() -> Any:
        found = datasets.load_dataset(
            "parquet", data_files=str(root / "datasets" / "*.parquet"), split="train", streaming=True
        )
        return StatefulDataLoader(found.shuffle(seed=0, buffer_size=2 * options.shard_images), **common)

    def lit() -> Any:
        return litdata.StreamingDataLoader(
            litdata.StreamingDataset(str(root / "litdata"), shuffle=True, seed=0), **common
        )

    return {f"litdata {litdata.__version__}": lit, f"datasets {datasets.__version__}": hugging_face}


if __name__ == "__main__":
    main()
