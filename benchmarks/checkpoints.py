"""How long a checkpoint takes to write, and how large it is beside the weights: DDPM's CIFAR-10 network, 35.7 M.

    python benchmarks/checkpoints.py

The time is that in which training waits: until the whole file is on the disk (fsync) and has taken its place. Beside it
the weights alone by `torch.save`, as a file of plain PyTorch has them, without waiting for the disk.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from measure import MIB, describe, environment, table, write_json
from peers import NETWORKS

from unet_diffusion.data import ImageDataModule, ImageSet, Source
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.training import DiffusionModule
from unet_diffusion.training.checkpointing import WholeCheckpoints


class Black(Source):
    """Three images."""

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape

    def load(self, *, progress: bool = True) -> ImageSet:
        return ImageSet(torch.zeros(3, *self.shape, dtype=torch.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="cifar10", help="tiny only tries the program")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/checkpoints.json")
    options = parser.parse_args()
    machine = environment()
    print(describe(machine), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        record = measure(options.network, Path(folder), options.repeats)
    sizes = record["mib"]
    rows = [{"part": part, "MiB": f"{size:.1f}", "weights": f"{size / sizes['weights']:.2f}"}
            for part, size in sizes.items()]  # fmt: skip
    print(table(rows))
    times = [
        {"written": name, "median s": f"{statistics.median(taken):.2f}", "slowest s": f"{max(taken):.2f}"}
        for name, taken in record["seconds"].items()
    ]
    print(table(times))
    report = {"environment": machine, "network": options.network, **record}
    print(f"written: {write_json(options.output or 'checkpoints', report)}")


def measure(network: str, folder: Path, repeats: int) -> dict[str, Any]:
    """MiB of a checkpoint's parts, and the seconds of each writing."""
    trained = NETWORKS[network]
    module = DiffusionModule(trained.build(), NoiseSchedule())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", enable_checkpointing=False,
                      default_root_dir=folder, **quiet)  # fmt: skip
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    data = ImageDataModule(Black(trained.image_shape), num_val=1, batch_size=2, num_workers=0)
    trainer.fit(module, data)
    whole, weights = folder / "whole.ckpt", folder / "weights.pt"
    raw = module.unet.state_dict()
    seconds = {
        "checkpoint, on the disk": [seconds_of(lambda: trainer.save_checkpoint(whole)) for _ in range(repeats)],
        "weights by torch.save": [seconds_of(lambda: torch.save(raw, weights)) for _ in range(repeats)],
    }
    moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    return {
        "seconds": seconds,
        "mib": {
            "weights": mib(list(raw.values())),
            "moving average": mib(list(module.ema_unet.state_dict().values())),
            "optimiser's moments": mib(moments),
            "the file": whole.stat().st_size / MIB,
        },
    }


def mib(tensors: list[torch.Tensor]) -> float:
    return sum(one.numel() * one.element_size() for one in tensors) / MIB


def seconds_of(write: Callable[[], object]) -> float:
    start = time.perf_counter()
    write()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
