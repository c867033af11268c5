"""When RunCheckpoint saves, and what it takes for the best; that files are whole is shown in test_resume.py."""

import warnings
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger

from unet_diffusion.training.checkpointing import RunCheckpoint, WholeCheckpoints, newest_good
from unet_diffusion.training.lightning_internals import is_within_step


@pytest.fixture
def checkpoints(tmp_path):
    def make(**options) -> RunCheckpoint:
        return RunCheckpoint(tmp_path, filename="{step}", save_last=True, **options)

    return make


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        {"train_time_interval": timedelta(0)},
        {"every_n_train_steps": 1},
    ],
)
def test_nothing_is_saved_within_a_step(tiny_module, tiny_images, quiet_trainer, checkpoints, monkeypatch, options):
    """Of two batches, with a validation after each batch."""
    within, save = [], RunCheckpoint._save_checkpoint

    def recorded(self, trainer, path):
        within.append((trainer.global_step, is_within_step(trainer)))
        save(self, trainer, path)

    monkeypatch.setattr(RunCheckpoint, "_save_checkpoint", recorded)
    trainer = quiet_trainer(
        max_steps=6,
        accumulate_grad_batches=2,
        val_check_interval=1,
        enable_checkpointing=True,
        callbacks=[checkpoints(**options)],
    )
    trainer.fit(tiny_module(), tiny_images())
    assert {step for step, _ in within} == set(range(1, 7))
    assert not any(is_within for _, is_within in within)


def cut(content: bytes) -> bytes:
    return content[:-1000]


def flip_a_bit(content: bytes, place: int | None = None) -> bytes:
    place = len(content) // 2 if place is None else place
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def flip_a_bit_of_the_list_of_its_files(content: bytes) -> bytes:
    return flip_a_bit(content, content.index(b"PK\x01\x02"))


def mark_its_first_file_as_encrypted(content: bytes) -> bytes:
    return flip_a_bit(content, content.index(b"PK\x01\x02") + 8)


@pytest.mark.parametrize(
    "damage", [cut, flip_a_bit, flip_a_bit_of_the_list_of_its_files, mark_its_first_file_as_encrypted]
)
def test_newest_checkpoint_that_is_whole_is_found(tmp_path, damage):
    for step, name in enumerate(("previous.ckpt", "last.ckpt"), start=1):
        WholeCheckpoints().save_checkpoint({"global_step": step, "weights": torch.zeros(1000)}, tmp_path / name)
    last = tmp_path / "last.ckpt"
    assert newest_good(tmp_path) == (last, 2)
    last.write_bytes(damage(last.read_bytes()))
    with pytest.warns(UserWarning, match=r"last\.ckpt is not used: .*(is damaged|only a part of one)"):
        assert newest_good(tmp_path) == (tmp_path / "previous.ckpt", 1)
    (tmp_path / "previous.ckpt").unlink()
    with (
        pytest.warns(UserWarning, match="not used"),
        pytest.raises(ValueError, match=r"is whole \(last\.ckpt\); remove the folder"),
    ):
        newest_good(tmp_path)


class Steps(Logger):
    """Keeps the steps whose loss it was told."""

    name, version = "steps", 0

    def __init__(self):
        super().__init__()
        self.told = []

    def log_metrics(self, metrics, step=None):
        self.told += [step] if "train/loss" in metrics else []

    def log_hyperparams(self, *args, **options):
        """There are none to keep."""


def test_loggers_are_told_of_a_step_once_though_a_checkpoint_tells_them_early(
    tiny_module, tiny_images, quiet_trainer, checkpoints
):
    logger = Steps()
    trainer = quiet_trainer(
        max_steps=5,
        logger=logger,
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[checkpoints(every_n_train_steps=2)],
    )
    trainer.fit(tiny_module(), tiny_images())
    assert logger.told == [0, 1, 2, 3, 4]


class SavesAt(Callback):
    """Saves as a signal would."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.checkpoint_callback.save_now(trainer)


def test_weights_are_not_taken_for_the_best_by_a_validation_of_others(
    tiny_module, tiny_images, quiet_trainer, checkpoints, tmp_path
):
    best = checkpoints(monitor="val/loss", mode="max", save_top_k=9, every_n_epochs=1)
    trainer = quiet_trainer(max_steps=4, val_check_interval=2, enable_checkpointing=True, callbacks=[SavesAt(3), best])
    trainer.fit(tiny_module(), tiny_images())
    assert {path.rsplit("=", 1)[-1] for path in best.best_k_models} == {"2.ckpt", "4.ckpt"}
    assert torch.load(tmp_path / "previous.ckpt", weights_only=True)["global_step"] == 3
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def fit_steps_of_two_batches(make_module, make_data, make_trainer, best, *, num_batches):
    """Four steps, with a validation after so many batches."""
    options = {"val_check_interval": num_batches, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer = make_trainer(
        max_steps=4, accumulate_grad_batches=2, enable_checkpointing=True, callbacks=[best], **options
    )
    trainer.fit(make_module(), make_data())
    return {path.rsplit("=", 1)[-1] for path in best.best_k_models}


def test_validations_between_steps_decide_what_is_kept(tiny_module, tiny_images, quiet_trainer, checkpoints):
    best = checkpoints(monitor="val/loss", mode="max", save_top_k=9, every_n_epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*val_check_interval")
        kept = fit_steps_of_two_batches(tiny_module, tiny_images, quiet_trainer, best, num_batches=4)
    assert kept == {"2.ckpt", "4.ckpt"}


def test_validations_within_a_step_are_told_once_not_to_count(tiny_module, tiny_images, quiet_trainer, checkpoints):
    best = checkpoints(monitor="val/loss", mode="max", save_top_k=9, every_n_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = fit_steps_of_two_batches(tiny_module, tiny_images, quiet_trainer, best, num_batches=1)
    told = [str(one.message) for one in caught if "Set trainer.val_check_interval to" in str(one.message)]
    assert len(told) == 1
    assert "is a multiple of trainer.accumulate_grad_batches, 2" in told[0]
    assert kept == {"1.ckpt", "2.ckpt", "3.ckpt", "4.ckpt"}  # by the validations after whole steps


def test_last_is_the_newest_even_if_others_are_better(tiny_module, tiny_images, quiet_trainer, checkpoints, tmp_path):
    falls = checkpoints(monitor="val/loss", mode="max", every_n_epochs=1)  # the first stays the best
    module = tiny_module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0e-3))
    trainer = quiet_trainer(max_steps=8, val_check_interval=2, enable_checkpointing=True, callbacks=[falls])
    trainer.fit(module, tiny_images())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 8


def test_run_that_goes_on_with_other_steps_says_so(tiny_digits, run_cli, tmp_path):
    arguments = [*tiny_digits, "--trainer.default_root_dir", tmp_path / "run", "--samples.every_n_steps", 0]
    assert run_cli("fit", *arguments)[0] == 0
    arguments += ["--trainer.max_steps", 6, "--trainer.accumulate_grad_batches", 2, "--trainer.devices", 1]
    changed = "trainer.accumulate_grad_batches was 1, is 2; trainer.devices was auto, is 1"
    with pytest.warns(UserWarning, match=f"continues with other settings than it had: {changed}$"):
        status, _, err = run_cli("fit", *arguments)
    assert status == 0, err
