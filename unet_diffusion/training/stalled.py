"""Names the process that the others wait for, where torch alone would only hang or time out.

Every few seconds a thread of each process writes how far training is into the store through which the processes met. It
has a connection of its own and does not ask the device. A process that falls silent is stopped, dead or cut off. A
process that keeps writing but is behind the others is busy, or stuck in what it last wrote of.
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from unet_diffusion.training.lightning_internals import strategy_timeout

MAX_BEAT_SECONDS = 2.0
BEATS_IN_TIMEOUT = 20  # at least
SILENT_BEATS = 3  # missed in a row
MAX_NAMED = 8  # processes
WAITED = "an operation of all processes failed"


class Beat(NamedTuple):
    """What a process writes about itself."""

    passed: int  # number of places in the loop that it passed; all processes pass them in the same order
    step: int  # the last step that it finished
    doing: str  # what it does since the last of those places
    where: str  # process and host
    number: int = 0  # of the beat
    ended: str = ""  # the error that ended it: WAITED, or one of its own

    @property
    def failed(self) -> bool:
        """Whether it ended by an error of its own."""
        return self.ended not in ("", WAITED)


class NameStalled(Callback):
    """Says which of several processes is stalled, on which host, and after which step.

    After half the strategy's timeout a process that waits prints it, because NCCL ends a process at the timeout before
    Python can say anything. It is also added to the error of an operation that timed out, or whose partner is gone.
    That error ends the run with status 1, and with it the processes that this one started.
    """

    def __init__(self) -> None:
        self._rank, self._world_size, self._timeout = 0, 1, 0.0  # s
        self._beat = Beat(0, 0, "setting up", f"process {os.getpid()} on {socket.gethostname()}")
        self._told = 0
        self._moved = time.monotonic()
        self._store: Any = None
        self._ended = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not dist.is_initialized():
            return
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        self._timeout = strategy_timeout(trainer).total_seconds()
        self._interval = min(MAX_BEAT_SECONDS, self._timeout / BEATS_IN_TIMEOUT)
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=SILENT_BEATS * self._interval))
        self._tell()
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self._pass(trainer, "the forward pass")

    def on_before_backward(self, trainer: Trainer, *args: Any) -> None:
        self._pass(trainer, "the backward pass")

    def on_after_backward(self, trainer: Trainer, *args: Any) -> None:
        self._pass(trainer, "the optimiser step")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._pass(trainer, "pictures, checkpoints or the next batch")

    def on_validation_start(self, trainer: Trainer, *args: Any) -> None:
        self._pass(trainer, "validation")

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self._pass(trainer, "pictures, checkpoints or the next batch")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._ended.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._store is None or isinstance(exception, SystemExit | KeyboardInterrupt):
            self._ended.set()
            return
        if is_of_all_processes(exception):
            exception.args = (f"{exception}; {describe(*self._two_readings())}",)
            self._beat = self._beat._replace(ended=WAITED)
        else:
            self._beat = self._beat._replace(ended=f"{type(exception).__name__}: {exception}")
        self._ended.set()
        self._tell()

    def _pass(self, trainer: Trainer, doing: str) -> None:
        self._beat = self._beat._replace(passed=self._beat.passed + 1, step=trainer.global_step, doing=doing)
        self._moved = time.monotonic()

    def _tell(self) -> None:
        self._told += 1
        with suppress(dist.DistError):  # the first process, where the store is, may be gone
            self._store.set(f"beat/{self._rank}", json.dumps(self._beat._replace(number=self._told)))

    def _read(self) -> list[Beat]:
        """The last beat of each process; none if the store, which is in the first process, does not answer."""
        try:
            return [Beat(*json.loads(self._store.get(f"beat/{rank}"))) for rank in range(self._world_size)]
        except dist.DistError:
            return []

    def _two_readings(self) -> tuple[list[Beat], list[Beat]]:
        """The beats of all processes twice; in between, each process that is not silent writes another one."""
        before = self._read()
        if any(one.failed for one in before):  # then it does not matter who is silent
            return before, before
        for _ in range(SILENT_BEATS):
            time.sleep(self._interval)
            self._tell()
        return before, self._read()

    def _watch(self) -> None:
        said_of = -1
        while not self._ended.wait(self._interval):
            self._tell()
            if time.monotonic() - self._moved > self._timeout / 2 and said_of != self._beat.passed:
                said_of = self._beat.passed
                self._say(*self._two_readings())

    def _say(self, before: list[Beat], now: list[Beat]) -> None:
        """Print who is behind, on one of the processes that wait; print nothing if nobody is."""
        behind = who_is_behind(before, now)
        if behind and self._rank == min(set(range(self._world_size)) - set(behind), default=-1):
            print(
                f"no progress for {self._timeout / 2:.0f} s, and after {self._timeout:.0f} s the run ends: "
                f"{describe(before, now)}",
                file=sys.stderr,
                flush=True,
            )


def is_of_all_processes(error: BaseException) -> bool:
    """Whether an error is of an operation of all processes; gloo has no error class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def who_is_behind(before: list[Beat], now: list[Beat]) -> list[int]:
    """The ranks of processes that failed by themselves, or else are silent, or else are behind; none if all wait.

    Args:
        before: The beat of each process, by rank.
        now: The same, some beats later.
    """
    if not before or not now:
        return []
    failed = [rank for rank, one in enumerate(now) if one.failed]
    silent = [rank for rank, one in enumerate(now) if not one.ended and one.number == before[rank].number]
    passed = [one.passed for one in now]
    behind = [rank for rank, count in enumerate(passed) if count == min(passed) < max(passed)]
    return failed or silent or behind


def describe(before: list[Beat], now: list[Beat]) -> str:
    """A sentence that says which process is behind, on which host, and since which step."""
    if not before or not now:
        return "rank 0, through which the processes know of each other, does not answer: it is stopped, dead or cut off"
    behind = who_is_behind(before, now)
    if not behind:
        return f"no process is behind (step {now[0].step}, {now[0].doing}): look at the network and the devices"
    named = []
    for rank in behind[:MAX_NAMED]:
        one = now[rank]
        alive = "is silent" if one.number == before[rank].number else "is behind"
        state = f"ended ({one.ended})" if one.ended else alive
        named.append(f"rank {rank} ({one.where}) {state}; its last step is {one.step}, then {one.doing}")
    more = f"; and {len(behind) - MAX_NAMED} more" if behind[MAX_NAMED:] else ""
    return "; ".join(named) + more
