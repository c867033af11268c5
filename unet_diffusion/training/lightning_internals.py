"""The only place that touches private names of Lightning, and names that it sets at runtime and does not declare.

Each function says what it gives, and tests/training/test_lightning_internals.py has a test for each, which fails when a
new version of Lightning changes what stands behind it. Written for Lightning 2.6.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed.constants import default_pg_timeout


def total_batches(trainer: Trainer) -> int:
    """The number of the current training batch in the whole run, from 0; a resumed run counts on."""
    return trainer.fit_loop.total_batch_idx


def log_interval(trainer: Trainer) -> int:
    """The number of steps from one row of the log to the next; 0: there is no log."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined]


def is_trial(trainer: Trainer) -> bool:
    """Whether the run is a trial of a few batches that must write nothing (fast_dev_run)."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def data_of(trainer: Trainer) -> Any:
    """The trainer's data module; None if it was given data loaders."""
    return getattr(trainer, "datamodule", None)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks, in the order in which they are called."""
    return trainer.callbacks  # type: ignore[attr-defined]


def replace_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Give the trainer these callbacks in place of its own."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


def is_attached(module: LightningModule) -> bool:
    """Whether a trainer has the module; without one, `module.trainer` raises an error."""
    return module._trainer is not None


def is_within_step(trainer: Trainer) -> bool:
    """Whether gradients are being accumulated, which no checkpoint holds; at the end of a training batch or later."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validation_follows(trainer: Trainer) -> bool:
    """Whether a validation comes next, at the end of a training batch."""
    loop = trainer.fit_loop
    return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def ends_now(trainer: Trainer) -> bool:
    """Whether the run ends with this step, at the end of its last training batch or later."""
    is_over = trainer.global_step >= trainer.estimated_stepping_batches
    return is_over or (trainer.should_stop and trainer.fit_loop._can_stop_early)


def log_step_now(trainer: Trainer) -> None:
    """Log the losses of a step at the end of its batch, where Lightning would do so after all callbacks."""
    connector = trainer._logger_connector
    connector.on_batch_end()
    connector.update_train_step_metrics()
    # When Lightning comes to it, the step is logged already: this once nothing is done.
    connector.update_train_step_metrics = lambda: delattr(  # type: ignore[method-assign]
        connector, "update_train_step_metrics"
    )


def leave_signals_to_callbacks(trainer: Trainer) -> None:
    """Turn off Lightning's agreement of all processes about a SIGTERM, which waits for the device at each step."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def leave_requeue_to_callbacks(trainer: Trainer) -> None:
    """Turn off Lightning's handler of SLURM's signal, which saves in the middle of a step."""
    cluster = trainer._accelerator_connector.cluster_environment
    if isinstance(cluster, SLURMEnvironment):
        cluster.auto_requeue = False


def strategy_timeout(trainer: Trainer) -> timedelta:
    """How long an operation of all processes may take."""
    return getattr(trainer.strategy, "_timeout", None) or default_pg_timeout


def shard_over_all_processes(trainer: Trainer) -> None:
    """Have ModelParallelStrategy share weights out over all processes, and write checkpoints of one file."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    strategy._save_distributed_checkpoint = False  # any number of processes can continue from one file
    if strategy._data_parallel_size == "auto":
        # Lightning's own choice is tensor parallelism within a node, which no network here is made for.
        strategy._data_parallel_size, strategy._tensor_parallel_size = trainer.world_size, 1


def killer_of_processes(trainer: Trainer) -> Callable[[int], None] | None:
    """A function that sends a signal to the processes that this one started; None if it starts none."""
    launcher = trainer.strategy.launcher
    return launcher.kill if isinstance(launcher, _SubprocessScriptLauncher) else None


class OpenModelCheckpoint(ModelCheckpoint):
    """ModelCheckpoint with public names for its parts; a subclass defines `save_newest`."""

    @property
    def interval(self) -> int:
        """The number of optimiser steps from one checkpoint to the next; 0: steps do not decide."""
        return self._every_n_train_steps

    @property
    def seconds_between(self) -> float | None:
        """The time from one checkpoint to the next; None: time does not decide."""
        return None if self._train_time_interval is None else self._train_time_interval.total_seconds()

    @property
    def last_checked(self) -> float | None:
        """The monotonic clock when a checkpoint was last due by time, in seconds; None before training."""
        return self._last_time_checked

    @last_checked.setter
    def last_checked(self, seconds: float) -> None:
        self._last_time_checked = seconds

    @property
    def saved_path(self) -> Path:
        """The file that was saved last."""
        return Path(self._last_checkpoint_saved)

    @property
    def saved_step(self) -> int:
        """The step at which a file was saved last."""
        return self._last_global_step_saved

    def is_of_epoch_ends(self, trainer: Trainer) -> bool:
        """Whether checkpoints are due at the ends of training epochs, not of validations."""
        return self._should_save_on_train_epoch_end(trainer)

    def epoch_is_due(self, trainer: Trainer) -> bool:
        """Whether a checkpoint is due at the end of this epoch."""
        return self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def must_not_save(self, trainer: Trainer) -> bool:
        """Whether this is a trial or a sanity check, or the step was saved already."""
        return self._should_skip_saving_checkpoint(trainer)

    def metrics(self, trainer: Trainer) -> dict[str, Any]:
        """The values that may be monitored, by name."""
        return self._monitor_candidates(trainer)

    def save_best(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Save if the monitored metric is among the best, and remove what no longer is."""
        self._save_topk_checkpoint(trainer, metrics)

    def save_to(self, trainer: Trainer, path: Path) -> None:
        """Save to a file."""
        self._save_checkpoint(trainer, str(path))

    def save_newest(self, trainer: Trainer) -> None:
        """Save the newest checkpoint; Lightning calls it for last.ckpt, also after an exception."""
        raise NotImplementedError(f"{type(self).__name__} must define save_newest()")

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        self.save_newest(trainer)


class OpenCSVWriter(ExperimentWriter):
    """What writes a CSVLogger's file; a subclass defines `widen`."""

    def widen(self, columns: list[str]) -> None:
        """Rewrite the file, which has rows already, with these columns."""
        raise NotImplementedError(f"{type(self).__name__} must define widen()")

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.widen(fieldnames)


class OpenCSVLogger(CSVLogger):
    """CSVLogger whose file is written by `writer`."""

    writer: type[OpenCSVWriter]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The object that writes the file, on the first process; the others have one that does nothing."""
        if self._experiment is None:
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = self.writer(log_dir=self.log_dir)
        return self._experiment


class OpenCLI(LightningCLI):
    """LightningCLI with public names for the steps that a subclass changes."""

    def setting(self, config: Any, name: str) -> Any:
        """A setting of the subcommand; where classes were instantiated, the object."""
        return self._get(config, name)

    def check_checkpoint(self) -> None:
        """Look at the checkpoint that was asked for, before anything is built."""

    def carry_out(self, subcommand: str) -> None:
        """Run the subcommand."""
        super()._run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        """In place of Lightning's own, by which a checkpoint's settings would replace those given here."""
        self.check_checkpoint()

    def _run_subcommand(self, subcommand: str) -> None:
        self.carry_out(subcommand)
