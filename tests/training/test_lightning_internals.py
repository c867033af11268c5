"""What this package takes from Lightning beyond its documented names: a new version that changes it fails here."""

import ast
import importlib
import inspect
import re
import signal
import subprocess
import sys
from datetime import timedelta
from functools import cache
from pathlib import Path

import lightning
import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch.distributed.constants import default_pg_timeout

from unet_diffusion.training import lightning_internals as internals

PACKAGE = Path(internals.__file__).parents[1]
UNDECLARED = {"callbacks", "datamodule", "fast_dev_run", "fit_loop", "launcher", "log_every_n_steps"}  # of the trainer
PRIVATE = r"_[a-z]\w*"


@cache
def private_names_of_lightning() -> set[str]:
    files = Path(lightning.__file__).parent.rglob("*.py")
    return {name for file in files for name in re.findall(rf"(?:def |self\.)({PRIVATE})", file.read_text())}


def our_files() -> list[Path]:
    """Those that may use Lightning; the room of the data cannot import the training."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "lightning_internals.py"]


def name_of(node: ast.AST) -> str:
    """The last name of an expression such as `self.trainer`."""
    return getattr(node, "attr", getattr(node, "id", ""))


@pytest.mark.parametrize("path", our_files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_file_touches_private_names_of_lightning(path):
    text = path.read_text()
    if "lightning" not in text and "trainer" not in text:
        return
    ours = set(re.findall(rf"(?:def |self\.|^)({PRIVATE})", text, re.MULTILINE))
    touched = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning"):
            touched |= {alias.name for alias in node.names if alias.name.startswith("_")}
        if not isinstance(node, ast.Attribute) or name_of(node.value) in ("self", "cls"):
            continue
        if re.fullmatch(PRIVATE, node.attr) and node.attr in private_names_of_lightning() - ours:
            touched.add(node.attr)
        is_trainer = name_of(node.value) == "trainer" and name_of(getattr(node.value, "value", None)) in ("", "self")
        if node.attr in UNDECLARED and is_trainer and path.parent.name != "data":
            touched.add(f"trainer.{node.attr}")
    assert not touched


def classes_on_lightning() -> list[type]:
    """Our classes that derive from one of Lightning's."""
    found = set()
    for path in our_files():
        if "lightning" not in path.read_text():
            continue
        module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                found |= {value for base in value.__mro__ if base.__module__.startswith("lightning.")}
    return sorted(found, key=lambda kind: (kind.__module__, kind.__name__))


@pytest.mark.slow
def test_no_class_of_ours_uses_or_replaces_a_private_name_of_its_base():
    for kind in classes_on_lightning():
        ours = set(re.findall(rf"(?:def |self\.|super\(\)\.)({PRIVATE})", inspect.getsource(kind)))
        bases = [base for base in kind.__mro__ if base.__module__.startswith("lightning.")]
        theirs = {
            name for base in bases for name in re.findall(rf"(?:def |self\.)({PRIVATE})", inspect.getsource(base))
        }
        assert not ours & theirs, kind


class AtEachBatch(Callback):
    """Keeps what a function gives at the end, or the start, of each training batch."""

    def __init__(self, ask, *, at_start=False):
        self.ask, self.at_start, self.got = ask, at_start, []

    def on_train_batch_start(self, trainer, *args):
        if self.at_start:
            self.got.append(self.ask(trainer))

    def on_train_batch_end(self, trainer, *args):
        if not self.at_start:
            self.got.append(self.ask(trainer))


def at_each_batch(quiet_trainer, ask, *, at_start=False, ckpt_path=None, **options) -> list:
    callback = AtEachBatch(ask, at_start=at_start)
    trainer = quiet_trainer(callbacks=[callback], **{"limit_train_batches": 4, "limit_val_batches": 1, **options})
    trainer.fit(BoringModel(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "end.ckpt")
    return callback.got


def test_batches_are_counted_through_all_epochs_and_a_resumed_run_counts_on(quiet_trainer, tmp_path):
    options = {"ask": internals.total_batches, "at_start": True, "accumulate_grad_batches": 2}
    assert at_each_batch(quiet_trainer, max_epochs=2, **options) == list(range(8))
    assert at_each_batch(quiet_trainer, max_epochs=3, ckpt_path=tmp_path / "end.ckpt", **options) == list(range(8, 12))


def test_options_of_a_trainer_are_those_that_it_was_given(quiet_trainer):
    callback = Callback()
    trainer = quiet_trainer(log_every_n_steps=7, fast_dev_run=2, callbacks=[callback])
    assert internals.log_interval(trainer) == 7
    assert internals.is_trial(trainer)
    assert not internals.is_trial(quiet_trainer())
    assert callback in internals.callbacks_of(trainer)
    internals.replace_callbacks(trainer, [callback])
    assert internals.callbacks_of(trainer) == [callback]


def test_data_module_is_that_of_the_run(quiet_trainer):
    given: list[LightningDataModule | None] = [BoringDataModule(), None]
    for data in given:
        model, trainer = BoringModel(), quiet_trainer(max_steps=1, limit_val_batches=0)
        trainer.fit(model, data) if data else trainer.fit(model)
        assert internals.data_of(trainer) is data
    assert internals.data_of(quiet_trainer()) is None


def test_module_is_attached_to_the_trainer_that_has_it(quiet_trainer):
    model = BoringModel()
    assert not internals.is_attached(model)
    model.trainer = quiet_trainer()
    assert internals.is_attached(model)


def test_batch_is_within_a_step_until_gradients_are_accumulated(quiet_trainer):
    within = at_each_batch(
        quiet_trainer, internals.is_within_step, max_epochs=1, limit_train_batches=5, accumulate_grad_batches=2
    )
    assert within == [True, False, True, False, False]  # the last batch of an epoch ends a step


def test_validation_follows_the_batches_after_which_it_is_due(quiet_trainer):
    follows = at_each_batch(quiet_trainer, internals.validation_follows, max_epochs=1, val_check_interval=2)
    assert follows == [False, True, False, True]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 3}, [False, False, True]),
        ({"max_epochs": 2, "limit_train_batches": 2}, [False, False, False, True]),
        ({"max_epochs": 1, "limit_train_batches": 3, "accumulate_grad_batches": 2}, [False, False, True]),
    ],
)
def test_run_ends_at_its_last_batch(quiet_trainer, options, expected):
    assert at_each_batch(quiet_trainer, internals.ends_now, limit_val_batches=0, **options) == expected


def test_run_that_was_told_to_stop_ends_once_it_may(quiet_trainer):
    def stopped(trainer):
        trainer.should_stop = True
        return internals.ends_now(trainer)

    ends = at_each_batch(quiet_trainer, stopped, max_epochs=2, min_steps=6, limit_val_batches=0)
    assert ends == [*5 * [False], True]  # of four batches in an epoch


class KeepsRows(CSVLogger):
    def log_metrics(self, metrics, step=None):
        self.rows = [*getattr(self, "rows", []), (step, "loss" in metrics)]


class LogsLoss(BoringModel):
    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        self.log("loss", output["loss"])
        return output


def test_step_that_is_logged_early_is_logged_once(quiet_trainer, tmp_path):
    logger, seen = KeepsRows(tmp_path), []

    def log_now(trainer):
        if trainer.global_step == 2:
            internals.log_step_now(trainer)
            seen.extend(logger.rows)

    options = {"max_steps": 3, "limit_val_batches": 0, "log_every_n_steps": 1, "logger": logger}
    quiet_trainer(callbacks=[AtEachBatch(log_now)], **options).fit(LogsLoss())
    assert seen == [(0, True), (1, True)]
    assert logger.rows == [(0, True), (1, True), (2, True)]


def test_agreement_about_a_signal_is_one_call_in_each_step(quiet_trainer):
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    internals.leave_signals_to_callbacks(trainer)
    trainer.fit(BoringModel())


def test_job_is_not_requeued_by_lightning(quiet_trainer):
    assert "environment.auto_requeue" in inspect.getsource(_SignalConnector)
    environment = SLURMEnvironment(auto_requeue=True)
    internals.leave_requeue_to_callbacks(quiet_trainer(plugins=[environment]))
    assert not environment.auto_requeue
    internals.leave_requeue_to_callbacks(quiet_trainer())


def test_timeout_is_that_of_the_strategy(quiet_trainer):
    ddp = DDPStrategy(timeout=timedelta(seconds=5))
    assert internals.strategy_timeout(quiet_trainer(strategy=ddp, devices=2)) == timedelta(seconds=5)
    assert internals.strategy_timeout(quiet_trainer()) == default_pg_timeout


def test_weights_are_shared_out_over_all_processes_and_saved_in_one_file(quiet_trainer):
    strategy = ModelParallelStrategy()
    assert strategy._save_distributed_checkpoint
    assert strategy._data_parallel_size == "auto"
    internals.shard_over_all_processes(quiet_trainer(strategy=strategy, devices=2))
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (2, 1)
    assert not strategy._save_distributed_checkpoint
    text = inspect.getsource(ModelParallelStrategy)
    assert all(f"self.{name}" in text for name in ("_data_parallel_size", "_save_distributed_checkpoint"))
    internals.shard_over_all_processes(quiet_trainer())


def test_processes_that_were_started_can_be_killed(quiet_trainer):
    assert internals.killer_of_processes(quiet_trainer()) is None
    trainer = quiet_trainer(strategy="ddp", devices=2)
    sleeper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    trainer.strategy.launcher.procs.append(sleeper)
    internals.killer_of_processes(trainer)(signal.SIGKILL)
    assert sleeper.wait(timeout=10) == -signal.SIGKILL


class Newest(internals.OpenModelCheckpoint):
    calls = 0

    def save_newest(self, trainer):
        self.calls += 1


def test_parts_of_a_checkpoint_callback_have_names(quiet_trainer, tmp_path):
    callback = Newest(tmp_path, every_n_train_steps=2, save_last=True, save_top_k=-1, monitor="loss")
    assert (callback.interval, callback.seconds_between, callback.last_checked) == (2, None, None)
    assert Newest(tmp_path, train_time_interval=timedelta(minutes=1)).seconds_between == 60
    trainer = quiet_trainer(max_steps=5, limit_val_batches=0, enable_checkpointing=True, callbacks=[callback])
    trainer.fit(LogsLoss())
    assert callback.calls == 2  # after two steps, and after four
    assert callback.last_checked is not None
    callback.last_checked = 0.0
    assert callback.last_checked == 0
    assert callback.saved_path.parent == tmp_path
    assert callback.saved_step == 4
    assert callback.metrics(trainer).keys() >= {"loss", "step", "epoch"}


def test_checkpoints_by_epoch_are_due_at_the_ends_of_epochs(quiet_trainer, tmp_path):
    callback = Newest(tmp_path, every_n_epochs=2, save_on_train_epoch_end=True)
    due, states = [], []
    options = {"max_epochs": 2, "limit_val_batches": 0, "enable_checkpointing": True}

    class Asks(Callback):
        def on_train_epoch_end(self, trainer, module):
            due.append(callback.epoch_is_due(trainer))
            states.append((callback.is_of_epoch_ends(trainer), callback.must_not_save(trainer)))
            callback.save_to(trainer, tmp_path / "here.ckpt")
            states.append(callback.must_not_save(trainer))

    quiet_trainer(limit_train_batches=1, callbacks=[Asks(), callback], **options).fit(BoringModel())
    assert due == [False, True]
    assert states == [(True, False), True] * 2
    assert (callback.saved_path, callback.saved_step) == (tmp_path / "here.ckpt", 2)


def test_best_checkpoint_is_saved_by_its_metric(quiet_trainer, tmp_path):
    callback = Newest(tmp_path / "best", monitor="loss", filename="{step}")
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0, enable_checkpointing=True, callbacks=[callback])
    trainer.fit(LogsLoss())
    for loss in (-1e6, 1e6):
        callback.save_best(trainer, {**callback.metrics(trainer), "loss": trainer.callback_metrics["loss"] * 0 + loss})
    assert callback.best_model_score == -1e6


def test_wider_file_of_losses_is_written_by_its_writer(tmp_path):
    class Writer(internals.OpenCSVWriter):
        def widen(self, columns):
            widened.append(columns)

    class Rows(internals.OpenCSVLogger):
        writer = Writer

    widened: list[list[str]] = []
    logger = Rows(tmp_path, name="logs")
    for metrics in ({"one": 1.0}, {"two": 2.0}):
        logger.log_metrics(metrics, 0)
        logger.save()
    assert widened == [["one", "step", "two"]]
    assert logger.experiment is logger.experiment


def test_command_line_looks_at_the_checkpoint_and_carries_out_the_subcommand(tmp_path):
    calls = []

    class CLI(internals.OpenCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.set_defaults({"trainer.accelerator": "cpu", "trainer.logger": False})

        def check_checkpoint(self):
            calls.append(self.config.fit.ckpt_path)

        def carry_out(self, subcommand):
            calls.append((subcommand, self.setting(self.config_init, "model") is self.model))

    CLI(BoringModel, args=["fit", "--ckpt_path", "last"], save_config_callback=None)
    assert calls == ["last", ("fit", True)]
