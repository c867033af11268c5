"""Several processes that share the work of one command, as torchrun starts them; one process is all of them."""

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
    """Which of how many this one is.

    Args:
        rank: of this one, from 0.
        count: of all.
    """

    rank: int
    count: int

    def on_rank_zero(self, make: Callable[[], Result]) -> Result:
        """What the first process makes, on all of them; plain values only."""
        if self.count == 1:
            return make()
        made: list[Any] = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(made, src=0)
        return made[0]

    def shard(self, items: list[Item]) -> list[Item]:
        """This one's part of them."""
        return items[self.rank :: self.count]

    def gather(self, items: list[Item]) -> list[Item]:
        """Those of all processes, one after the other; plain values only."""
        if self.count == 1:
            return items
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    def barrier(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()


ALONE = ProcessGroup(0, 1)


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The processes that torchrun started, or this one alone."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield ALONE
        return
    # They tell each other little: what is drawn stays where it is. And one may draw for days while another is done.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield ProcessGroup(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


def own_device(device: str) -> str:
    """The device of this process: with several, "cuda" is one for each.

    Args:
        device: A device of PyTorch, or "auto": the first of cuda, mps and cpu that is there.

    Raises:
        ValueError: If there is no such device.
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
