"""What W&B gets, read back from the files that it keeps of runs offline."""

import csv
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from forked import run_python
from PIL import Image
from wandb_files import config, history, read_records, whole_records
from wandb_server import WandbServer

from unet_diffusion.training import DiffusionModule
from unet_diffusion.training.wandb_run import ID_FILE

wandb = pytest.importorskip("wandb")

OVERLAY = Path(__file__).parents[2] / "configs" / "logger" / "wandb.yaml"
NOBODY_LISTENS = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "0", "WANDB_INIT_TIMEOUT": "1"}


@pytest.fixture
def fit(run_cli, tiny_digits, tmp_path, monkeypatch):
    """Trains with W&B, in this process; gives the exit status and what was written to stderr."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")  # and put back what was there
    monkeypatch.setenv("WANDB__STATS_SAMPLING_INTERVAL", "0.1")  # seconds; 15 is usual

    def fit(*arguments, run="run") -> tuple[int, str]:
        folder = ("--trainer.default_root_dir", tmp_path / run)
        status, _, err = run_cli("fit", *tiny_digits, "--config", OVERLAY, *folder, *arguments)
        wandb.finish()
        wandb.teardown()  # forgets the variables
        return status, err

    return fit


def continued(tmp_path) -> tuple:
    return ("--ckpt_path", tmp_path / "run" / "checkpoints" / "last.ckpt", "--trainer.max_steps", 6)


def kept_runs(run) -> list[Path]:
    return sorted(run.glob("wandb/offline-run-*/run-*.wandb"))


def by_step(rows, step, key) -> dict[int, float]:
    return {int(row[step]): float(row[key]) for row in rows if row.get(key) not in (None, "")}


def test_losses_and_rates_are_those_of_the_csv_file(fit, tmp_path):
    status, err = fit()
    assert status == 0, err
    (kept,) = kept_runs(tmp_path / "run")
    logged = history(read_records(kept))
    with open(tmp_path / "run" / "logs" / "version_0" / "metrics.csv", newline="") as file:
        expected = list(csv.DictReader(file))
    for name, num_values in {"train/loss": 4, "val/loss": 2, "lr-AdamW": 4}.items():
        values = by_step(logged, "trainer/global_step", name)
        assert len(values) == num_values
        assert values == pytest.approx(by_step(expected, "step", name))


def test_grids_are_the_pictures_in_the_run_folder(fit, tmp_path):
    fit()
    (kept,) = kept_runs(tmp_path / "run")
    grids = [row for row in history(read_records(kept)) if "samples/filenames" in row]
    assert [row["trainer/global_step"] for row in grids] == [2, 4]
    for row in grids:
        (name,) = row["samples/filenames"]
        expected = tmp_path / "run" / "samples" / f"step_{row['trainer/global_step']:07d}.png"
        with Image.open(kept.parent / "files" / name) as logged, Image.open(expected) as picture:
            np.testing.assert_array_equal(np.asarray(logged), np.asarray(picture))


def test_configuration_and_system_metrics_are_there(fit, tmp_path):
    fit()
    (kept,) = kept_runs(tmp_path / "run")
    records = read_records(kept)
    expected = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    logged = config(records)
    assert {key: logged[key] for key in ("model", "data", "seed_everything")} == {
        key: expected[key] for key in ("model", "data", "seed_everything")
    }
    measured = {item.key for record in records for item in record.stats.item}
    assert "memory_percent" in measured


@pytest.mark.slow
def test_run_goes_on_under_the_same_id(fit, tmp_path):
    assert fit()[0] == 0
    status, err = fit(*continued(tmp_path))
    assert status == 0, err
    assert fit(run="other")[0] == 0
    (first, second), (other,) = kept_runs(tmp_path / "run"), kept_runs(tmp_path / "other")
    ids = [
        next(record.run.run_id for record in read_records(path) if record.run.run_id) for path in (first, second, other)
    ]
    assert ids[0] == ids[1] == (tmp_path / "run" / ID_FILE).read_text().strip()
    assert ids[2] != ids[0]
    assert set(by_step(history(read_records(second)), "trainer/global_step", "train/loss")) == {4, 5}


def test_id_that_is_asked_for_is_taken(fit, tmp_path):
    fit("--trainer.logger.init_args.id", "mine")
    assert (tmp_path / "run" / ID_FILE).read_text() == "mine\n"


@pytest.mark.slow
def test_training_goes_on_offline_if_nobody_answers(fit, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    for name, value in NOBODY_LISTENS.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=r"W&B cannot be reached.*upload it with: wandb sync .*offline-run"):
        status, err = fit("--trainer.logger.init_args.offline", "false")
    assert status == 0, err
    (kept,) = kept_runs(tmp_path / "run")
    assert len(by_step(history(read_records(kept)), "trainer/global_step", "train/loss")) == 4
    monkeypatch.delenv("WANDB_MODE")
    with pytest.warns(UserWarning, match="W&B cannot be reached"):
        status, err = fit("--trainer.logger.init_args.offline", "false", *continued(tmp_path))
    assert status == 0, err
    assert len({path.name for path in kept_runs(tmp_path / "run")}) == 1  # they are named after the id


@pytest.mark.slow
def test_network_that_goes_down_in_the_middle_neither_stops_nor_slows_training(fit, tmp_path, monkeypatch):
    server, step = WandbServer(), DiffusionModule.training_step
    monkeypatch.setenv("WANDB_BASE_URL", server.address)
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    monkeypatch.delenv("WANDB_MODE")
    began = []

    def cut_in_the_middle(module, batch, batch_idx):
        began.append(time.monotonic())
        if module.trainer.global_step == 2:
            server.cut()
        return step(module, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", cut_in_the_middle)
    status, err = fit("--trainer.logger.init_args.offline", "false", "--trainer.max_steps", 40)
    assert status == 0, err
    (kept,) = (tmp_path / "run").glob("wandb/run-*/run-*.wandb")  # for wandb sync
    assert set(server.began) == {(tmp_path / "run" / ID_FILE).read_text().strip()}
    assert len(by_step(history(whole_records(kept)), "trainer/global_step", "train/loss")) == 40
    assert began[-1] - began[2] < 20  # seconds; W&B itself tries for an hour


def test_training_goes_on_if_the_process_of_wandb_fails(fit, tmp_path, monkeypatch):
    from wandb.wandb_run import Run

    log, told = Run.log, []

    def fail_at_the_third(run, data, *arguments, **options):
        told.append(data)
        if len(told) == 3:
            raise ConnectionResetError("Connection lost")
        log(run, data, *arguments, **options)

    monkeypatch.setattr(Run, "log", fail_at_the_third)
    with pytest.warns(UserWarning, match="W&B has failed .*Connection lost.* training and the other logs continue"):
        status, err = fit()
    assert status == 0, err
    assert len(told) == 3
    assert (tmp_path / "run" / "samples" / "step_0000004.png").is_file()
    with open(tmp_path / "run" / "logs" / "version_0" / "metrics.csv", newline="") as file:
        assert set(by_step(csv.DictReader(file), "step", "train/loss")) == {0, 1, 2, 3}


@pytest.mark.parametrize("offline", ["true", "false"])
def test_upload_of_checkpoints_without_a_network_is_refused_before_training(fit, tmp_path, offline):
    status, err = fit("--trainer.logger.init_args.log_model", "all", "--trainer.logger.init_args.offline", offline)
    assert status == 1
    assert "log_model all uploads checkpoints, and W&B is offline" in err
    assert not (tmp_path / "run").exists()


def test_wandb_is_imported_only_where_it_is_used():
    code = "import sys, unet_diffusion.commands.training_cli; assert 'wandb' not in sys.modules"
    assert run_python([sys.executable, "-c", code]).returncode == 0


def test_two_processes_log_one_run(tiny_digits, tmp_path):
    run = tmp_path / "run"
    devices = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.default_root_dir", str(run))
    command = [
        sys.executable,
        "-m",
        "unet_diffusion",
        "fit",
        *tiny_digits,
        "--config",
        str(OVERLAY),
        *devices,
    ]
    done = run_python(command, env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    (kept,) = kept_runs(run)
    assert kept.stem == f"run-{(run / ID_FILE).read_text().strip()}"
    losses = [row for row in history(read_records(kept)) if "train/loss" in row]
    assert [row["trainer/global_step"] for row in losses] == [0, 1, 2, 3]
