"""Checkpoints that are whole or not there, and the newest good one to go on from.

Lightning's ModelCheckpoint decides when to save, and what to keep. Here every file takes its place in one step and is
on the disk by then; last.ckpt is the newest that was saved, and previous.ckpt the one before it, should the newest be
damaged. A checkpoint that is due every so many steps, when a validation is due too, is written after it: a resumed run
would not make up for it.
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
            OSError: if it cannot be written, as when the disk is full; what was there is left as it was.
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
                "and the same command goes on from the checkpoint before"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors on the CPU, and plain values.

        Raises:
            ValueError: if the file is damaged, or holds anything that could run code.
        """
        return load_plain(path)


class RunCheckpoint(OpenModelCheckpoint):
    """ModelCheckpoint whose last.ckpt and previous.ckpt are the newest two, whatever else it keeps.

    Its arguments are ModelCheckpoint's. last.ckpt takes no room of its own while the same step is kept by name too.
    Checkpoints are of whole steps: what is due within one is saved after it. The best by a validation's metric are
    those that were just validated.
    """

    _is_due = False
    _validated_at = -1  # step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None:
            remove_left_behind(Path(self.dirpath))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks whether what will be kept has room.

        Raises:
            OSError: if there is too little.
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
        self._is_due = self._is_due or is_last or bool(every and step % every == 0) or self._time_is_over(trainer)
        if self._is_due and not validation_follows(trainer):
            self.save_after_batch(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated_at = trainer.global_step
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
        is_stale = str(self.monitor).startswith("val/") and self._validated_at != trainer.global_step
        if self.monitor is None or (self.monitor in metrics and not is_stale):
            self.save_best(trainer, metrics)
        self.save_newest(trainer)

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
    """The checkpoint of the last step in a folder that is whole, and its step; None if there are none.

    Times of files say nothing: a copy of the folder has them in any order. Warns of damaged ones.

    Raises:
        ValueError: if there are checkpoints, and all are damaged.
    """
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: (step_of(path), path.name == LAST))
    damaged = []
    for path in reversed(checkpoints):
        try:
            step = int(load_plain(path)["global_step"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            rank_zero_warn(f"{path} is passed over: {error}")
            damaged.append(path.name)
        else:
            return path, step
    if damaged:
        raise ValueError(
            f"no checkpoint in {folder} is whole ({', '.join(damaged)}); remove the folder to start afresh, or choose "
            "another --trainer.default_root_dir"
        )
    return None


def num_bytes(module: LightningModule) -> int:
    """Size of a checkpoint, about: all weights and averages, and two moments of each weight that is trained."""
    held = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    return held + 2 * sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def check_room(folder: Path, needed: int, *, are_replaced: bool = True) -> None:
    """Raises OSError if a folder's disk has less room, with that of the checkpoints there if they will be replaced."""
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
    """The same file under another name too, or a copy where the file system has no such links; in one step."""
    if place.exists() and place.samefile(path):
        return
    with atomic_write(place) as partial:
        try:
            os.link(path.resolve(), partial)
        except OSError:
            shutil.copyfile(path, partial)
