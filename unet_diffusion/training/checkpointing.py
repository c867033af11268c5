"""Checkpoints that are whole or not there, and the newest good one to resume from.

Lightning's ModelCheckpoint decides when to save, and what to keep. Here every file takes its place in one step and is
on the disk by then. last.ckpt is the newest checkpoint, and previous.ckpt the one before it, in case the newest is
damaged. Where a checkpoint and a validation are due at the same step, the checkpoint is written after the validation,
because a resumed run would not repeat the validation.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from unet_diffusion.runtime.atomic_files import atomic_write, remove_left_behind
from unet_diffusion.runtime.safe_loading import load_plain, step_of
from unet_diffusion.training.evaluating import EVALUATED, evaluated_at
from unet_diffusion.training.lightning_internals import (
    OpenModelCheckpoint,
    is_trial,
    is_within_step,
    log_step_now,
    validation_follows,
)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads tensors and plain values only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the place, wait for the disk, and take the place.

        Raises:
            OSError: If the file cannot be written, for example because the disk is full. An earlier file stays as it
                was.
        """
        try:
            with atomic_write(path) as partial, open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
            free = shutil.disk_usage(Path(path).parent).free
            raise OSError(
                f"the checkpoint {path} was not written ({error}; {free / 2**20:.0f} MiB are free there); make room, "
                "and the same command continues from the checkpoint before"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors, on the CPU, and plain values.

        Raises:
            ValueError: If the file is damaged, or holds anything that could run code.
        """
        return load_plain(path)


class RunCheckpoint(OpenModelCheckpoint):
    """ModelCheckpoint whose last.ckpt and previous.ckpt are the newest two, whatever else it keeps.

    Its arguments are ModelCheckpoint's. last.ckpt takes no room of its own while another file of the same step exists.
    Checkpoints are of whole steps: one that is due within a step is saved after it. The best checkpoints by a metric of
    the validation are of weights that were just validated.
    """

    _is_due = False
    _validated_at = -1  # step
    _has_warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None:
            remove_left_behind(Path(self.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to train where the disk has too little room for the checkpoints.

        Raises:
            OSError: If there is too little.
        """
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and self.dirpath is not None and not is_trial(trainer):
            num_kept = 3 + max(self.save_top_k if self.monitor else 0, 0)  # last, previous, one underway; and the best
            needed = num_kept * num_bytes(pl_module)
            check_room(Path(self.dirpath), needed, are_replaced=self.save_top_k != -1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if is_within_step(trainer):
            return
        step, every = trainer.global_step, self.interval
        is_last = step == trainer.max_steps  # later the epoch would count as done, and more steps begin another
        is_evaluated = str(self.monitor) in EVALUATED and evaluated_at(trainer) == step
        self._is_due = self._is_due or is_last or is_evaluated or bool(every and step % every == 0)
        self._is_due = self._time_is_over(trainer) or self._is_due
        if self._is_due and not validation_follows(trainer):
            self.save_after_batch(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated_at = trainer.global_step
        if is_within_step(trainer) and str(self.monitor).startswith("val/") and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"the validation after step {trainer.global_step} came before the next step had all its batches; no "
                "checkpoint is kept by the score of such a validation. Set trainer.val_check_interval to a number of "
                f"batches that is a multiple of trainer.accumulate_grad_batches, {trainer.accumulate_grad_batches}; "
                "an epoch should have such a number, too"
            )
        if not self.is_of_epoch_ends(trainer) and self.epoch_is_due(trainer):
            self._is_due = True
        if self._is_due and not is_within_step(trainer):
            self.save_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_of_epoch_ends(trainer) and self.epoch_is_due(trainer):
            self.save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_now(trainer)

    def save_after_batch(self, trainer: Trainer) -> None:
        """Log the step, and save it. Lightning logs later: a process killed in between would lose the step's losses."""
        log_step_now(trainer)
        self.save_now(trainer)

    def save_now(self, trainer: Trainer) -> None:
        """Save, unless there is a checkpoint of this step already; between two steps only."""
        self._is_due = False
        if self.must_not_save(trainer):
            return
        metrics = self.metrics(trainer)
        is_stale = self._measured_at(trainer) != trainer.global_step
        if self.monitor is None or (self.monitor in metrics and not is_stale):
            self.save_best(trainer, metrics)
        self.save_newest(trainer)

    def _measured_at(self, trainer: Trainer) -> int:
        """The step at which the metric that decides was measured; losses of training are always new."""
        kind = str(self.monitor).partition("/")[0]
        return {"val": self._validated_at, "eval": evaluated_at(trainer)}.get(kind, trainer.global_step)

    def _time_is_over(self, trainer: Trainer) -> bool:
        """Whether the first process's clock says that a checkpoint is due; all ask at the same step."""
        if self.seconds_between is None:
            return False
        now = time.monotonic()
        is_over = now - (self.last_checked or now) >= self.seconds_between
        if is_over := trainer.strategy.broadcast(is_over):
            self.last_checked = now
        return is_over

    def save_newest(self, trainer: Trainer) -> None:
        """Save last.ckpt, and keep the one before it as previous.ckpt."""
        if not self.save_last:
            return
        assert self.dirpath is not None
        last = Path(self.dirpath) / LAST
        if trainer.is_global_zero and last.exists():
            _put(last, last.with_name(PREVIOUS))
        self.last_model_path = str(last)
        if self.saved_step != trainer.global_step or self.saved_path == last:
            self.save_to(trainer, last)
        elif trainer.is_global_zero:
            _put(self.saved_path, last)
        trainer.strategy.barrier()


def newest_good(folder: Path) -> tuple[Path, int] | None:
    """The whole checkpoint of the last step in a folder, and its step; None if there are no checkpoints.

    The times of files say nothing: a copy of the folder has them in any order. A damaged checkpoint gives a warning.

    Raises:
        ValueError: If there are checkpoints, and all are damaged.
    """
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: (step_of(path), path.name == LAST))
    damaged = []
    for path in reversed(checkpoints):
        try:
            step = int(load_plain(path)["global_step"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            rank_zero_warn(f"{path} is not used: {error}")
            damaged.append(path.name)
        else:
            return path, step
    if damaged:
        raise ValueError(
            f"no checkpoint in {folder} is whole ({', '.join(damaged)}); remove the folder to start again, or choose "
            "another --trainer.default_root_dir"
        )
    return None


def num_bytes(module: LightningModule) -> int:
    """The approximate size of a checkpoint: all weights and averages, and two moments of each trained weight."""
    held = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    return held + 2 * sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def check_room(folder: Path, needed: int, *, are_replaced: bool = True) -> None:
    """Refuse a folder whose disk has too little room.

    Args:
        folder: The folder, which is made if it is not there.
        needed: The number of bytes that are needed.
        are_replaced: Whether the checkpoints in the folder will be replaced, so that their room counts as free.

    Raises:
        OSError: If there is too little room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = folder.glob("*.ckpt") if are_replaced else []
    held = sum({file.stat().st_ino: file.stat().st_size for file in there}.values())
    free = shutil.disk_usage(folder).free
    if free + held < needed:
        raise OSError(
            f"checkpoints in {folder} will take about {needed / 2**20:.0f} MiB, and {(free + held) / 2**20:.0f} MiB "
            "are free; make room, or choose a --trainer.default_root_dir on another disk"
        )


def _put(path: Path, place: Path) -> None:
    """Give a file a second name, in one step; file systems without such links get a copy."""
    if place.exists() and place.samefile(path):
        return
    with atomic_write(place) as partial:
        try:
            os.link(path.resolve(), partial)
        except OSError:
            shutil.copyfile(path, partial)
