"""Processes that share the work of one command, started by torchrun; without it there is one process."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among all processes of the command.

    Args:
        rank: Number of this process, from 0.
        count: Number of processes.
    """

    rank: int
    count: int

    def on_rank_zero(self, make: Callable[[], Result]) -> Result:
        """Call a function in the first process and return its result, a plain value, in every process."""
        if self.count == 1:
            return make()
        made: list[Any] = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]

    def shard(self, items: list[Item]) -> list[Item]:
        """Return the part of the items that this process works on."""
        return items[self.rank :: self.count]

    def gather(self, items: list[Item]) -> list[Item]:
        """Return the items of all processes, process by process; they must be plain values."""
        if self.count == 1:
            return items
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            dist.barrier()


ALONE = ProcessGroup(0, 1)


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Yield the group of the processes that torchrun started, or of this process alone."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield ALONE
        return
    # Processes exchange little, as images stay where they are drawn. One may draw for days after another has ended.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield ProcessGroup(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """Return the name of the device of this process: with "cuda" every process gets a GPU of its own.

    Args:
        device: Name of a device of PyTorch, or "auto" for the first of cuda, mps and cpu that the machine has.

    Raises:
        ValueError: If the machine has no such device.
    """
    gpus = (
        ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    )
    known = ["auto", "cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
    if device not in known:
        raise ValueError(f"--device must be one of {', '.join(known)} on this machine, got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
