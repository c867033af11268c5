"""Stops a run at a signal: the run finishes its step and saves a checkpoint, from which the same command continues.

Lightning's own handling ends with exit status 0. Under SLURM it saves from within the signal's handler, in the middle
of a step (TrainingCLI turns that off). If only one process gets the signal, the processes stop at different batches.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from unet_diffusion.runtime.signals import Interrupted
from unet_diffusion.training.checkpointing import RunCheckpoint
from unet_diffusion.training.lightning_internals import (
    ends_now,
    is_within_step,
    leave_signals_to_callbacks,
    strategy_timeout,
    validation_follows,
)


class StopOnSignal(Callback):
    """Stops at SIGINT, at SIGTERM, and at the signal before a SLURM job is preempted, which is then requeued.

    A second signal ends the run at once, without a checkpoint. A step and its validation belong together: if a
    validation is due, the checkpoint is saved after it. With several processes, each of which may get the signal, all
    stop at the same step: they exchange the signal over the host's network at each step, and read the answer a step
    later, so that no device waits for it.
    """

    def __init__(self) -> None:
        self._signum = 0  # of the first signal here
        self._leaving = 0  # the signal that all leave for, once the checkpoint is written
        self._group: Any = None  # of all processes, on their CPUs
        self._asked: tuple[torch.Tensor, Any] | None = None  # signals of all, still underway

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and (requeue := _requeue_signal()):  # which ends a process that has no handler
            signal.signal(requeue, self._receive)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=strategy_timeout(trainer))
            leave_signals_to_callbacks(trainer)
        for signum in _signals():
            signal.signal(signum, self._receive)  # Lightning puts back what was there at the end

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        # The last step is saved by RunCheckpoint, after what other callbacks do at the end.
        if not is_within_step(trainer) and not validation_follows(trainer) and not ends_now(trainer):
            self._save_if_asked(trainer, RunCheckpoint.save_after_batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not is_within_step(trainer):
            self._save_if_asked(trainer, RunCheckpoint.save_now)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """End the run; not right after the checkpoint, because Lightning logs the losses of its step later."""
        if self._leaving:
            if self._leaving == _requeue_signal() and trainer.is_global_zero:
                _requeue()
            rank_zero_info(f"stopped at step {trainer.global_step}; the same command continues from there")
            # Lightning kills the first process if another one that it started ends with a status.
            raise Interrupted(self._leaving) if trainer.local_rank == 0 else SystemExit(0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._asked is not None:
            self._asked[1].wait()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._signum:
            raise Interrupted(signum)
        self._signum = signum
        said = f"{signal.Signals(signum).name}: stopping after this step; once more stops at once\n"
        os.write(2, said.encode())  # not print, which fails if the signal came in the middle of one

    def _save_if_asked(self, trainer: Trainer, save: Callable[[RunCheckpoint, Trainer], None]) -> None:
        self._leaving = self._leaving or self._agreed()
        if self._leaving:
            for one in trainer.checkpoint_callbacks:
                if isinstance(one, RunCheckpoint):
                    save(one, trainer)

    def _agreed(self) -> int:
        """The signal that any process had a step ago, or 0; the same on all processes."""
        if self._group is None:
            return self._signum
        before, now = self._asked, torch.tensor(self._signum)
        self._asked = (now, dist.all_reduce(now, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])


def _signals() -> tuple[int, ...]:
    requeue = _requeue_signal()
    return (signal.SIGINT, signal.SIGTERM, *([requeue] if requeue else []))


def _requeue_signal() -> int:
    """The signal that SLURM sends before it preempts a job, with #SBATCH --signal=SIGUSR1@90; 0 outside of SLURM."""
    return signal.SIGUSR1 if SLURMEnvironment.detect() else 0


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    scontrol = shutil.which("scontrol")
    status = subprocess.run([scontrol, "requeue", job]).returncode if scontrol else None
    if status != 0:
        rank_zero_warn(f"job {job} was not requeued (scontrol: {status if scontrol else 'not found'}); submit it again")
