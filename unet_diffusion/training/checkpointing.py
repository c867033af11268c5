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
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from unet_diffusion.runtime.atomic_files import atomic_write, remove_left_behind
from unet_diffusion.runtime.safe_loading import load_plain, step_of

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


class RunCheckpoint(ModelCheckpoint):
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
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined]  # Lightning sets it at runtime
        if trainer.is_global_zero and self.dirpath is not None and not is_trial:
            num_kept = 3 + max(self.save_top_k if self.monitor else 0, 0)  # last, previous, one underway; and the best
            needed = num_kept * num_bytes(pl_module)
            check_room(Path(self.dirpath), needed, are_replaced=self.save_top_k != -1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if is_within_step(trainer):
            return
        step, every = trainer.global_step, self._every_n_train_steps
        is_last = step == trainer.max_steps  # later the epoch would count as done, and more steps begin another
        self._is_due = self._is_due or is_last or bool(every and step % every == 0) or self._time_is_over(trainer)
        if self._is_due and not validation_follows(trainer):
            self.save_after_batch(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated_at = trainer.global_step
        if not self._should_save_on_train_epoch_end(trainer) and self._epoch_is_due(trainer):
            self._is_due = True
        if self._is_due and not is_within_step(trainer):
            self.save_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._should_save_on_train_epoch_end(trainer) and self._epoch_is_due(trainer):
            self.save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save_now(trainer)

    def save_after_batch(self, trainer: Trainer) -> None:
        """Log the step, and save it. Lightning logs later: a process killed in between would lose the step's losses."""
        connector = trainer._logger_connector
        connector.on_batch_end()
        connector.update_train_step_metrics()
        # When Lightning comes to it, the step is logged already: this once nothing is done.
        connector.update_train_step_metrics = lambda: delattr(  # type: ignore[method-assign]
            connector, "update_train_step_metrics"
        )
        self.save_now(trainer)

    def save_now(self, trainer: Trainer) -> None:
        """Save, unless there is a checkpoint of this step already; between two steps only."""
        self._is_due = False
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        is_stale = str(self.monitor).startswith("val/") and self._validated_at != trainer.global_step
        if self.monitor is None or (self.monitor in candidates and not is_stale):
            self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def _epoch_is_due(self, trainer: Trainer) -> bool:
        return self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def _time_is_over(self, trainer: Trainer) -> bool:
        """Whether the first process's clock says that a checkpoint is due; all ask at the same step."""
        if self._train_time_interval is None:
            return False
        now = time.monotonic()
        is_over = now - (self._last_time_checked or now) >= self._train_time_interval.total_seconds()
        if is_over := trainer.strategy.broadcast(is_over):
            self._last_time_checked = now
        return is_over

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if not self.save_last:
            return
        assert self.dirpath is not None
        last = Path(self.dirpath) / LAST
        if trainer.is_global_zero and last.exists():
            _put(last, last.with_name(PREVIOUS))
        self.last_model_path = str(last)
        saved = Path(self._last_checkpoint_saved)
        if self._last_global_step_saved != trainer.global_step or saved == last:
            self._save_checkpoint(trainer, str(last))
        elif trainer.is_global_zero:
            _put(saved, last)
        trainer.strategy.barrier()


def is_within_step(trainer: Trainer) -> bool:
    """Whether gradients are being accumulated, which no checkpoint holds; at the end of a training batch or later."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validation_follows(trainer: Trainer) -> bool:
    """Whether a validation comes next, at the end of a training batch."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


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
