"""One training run in two real processes on the CPU, looked at from several sides."""

import csv
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"

RECORDER = """
import torch
from lightning.pytorch import Callback

import unet_diffusion.training.callbacks as callbacks


class Recorder(Callback):
    '''Writes what each process drew, drew a grid of, and ended with.'''

    def setup(self, trainer, module, stage):
        self.noise, self.t, self.grids, self.index = [], [], [], []
        add_noise, write_png = module.schedule.add_noise, callbacks.write_png

        def recorded_noise(x0, noise, t):
            if torch.is_grad_enabled():
                self.noise.append(noise)
                self.t.append(t)
            return add_noise(x0, noise, t)

        def recorded_grid(picture, path):
            self.grids.append(path.name)
            write_png(picture, path)

        module.schedule.add_noise, callbacks.write_png = recorded_noise, recorded_grid

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.index.append(batch["index"])

    def teardown(self, trainer, module, stage):
        names = ("noise", "t", "grids", "index")
        record = {name: getattr(self, name) for name in names}
        torch.save({**record, "weights": module.state_dict()}, f"rank{trainer.global_rank}.pt")
"""
NUM_STEPS = 3


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, tiny_digits):
    """The folder of a finished run, with rank0.pt and rank1.pt beside it."""
    import sys
    from pathlib import Path

    folder = tmp_path_factory.mktemp("distributed")
    (folder / "recorder.py").write_text(RECORDER)
    program = Path(sys.executable).parent / "unet-diffusion"
    command = [str(program)] if program.exists() else [sys.executable, "-m", "unet_diffusion.cli"]
    arguments = ["--config", str(CONFIGS / "trainer" / "ddp.yaml"), "--trainer.devices", "2"]
    arguments += ["--trainer.max_steps", str(NUM_STEPS), "--trainer.val_check_interval", str(NUM_STEPS)]
    arguments += ["--checkpoint.every_n_train_steps", "null", "--checkpoint.monitor", "val/loss"]
    arguments += ["--trainer.precision", "32-true"]
    arguments += ["--trainer.default_root_dir", "run", "--trainer.callbacks+=recorder.Recorder"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "fit", *tiny_digits, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(two_processes):
    return [torch.load(two_processes / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_weights_and_averages_are_equal_on_both_processes(ranks):
    torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)


def test_noise_and_timesteps_differ_between_processes(ranks):
    assert len(ranks[0]["noise"]) == len(ranks[1]["noise"]) == NUM_STEPS
    for step in range(NUM_STEPS):
        assert not torch.equal(ranks[0]["noise"][step], ranks[1]["noise"][step])
        assert not torch.equal(ranks[0]["t"][step], ranks[1]["t"][step])


def test_images_differ_between_processes(ranks):
    seen = torch.cat(ranks[0]["index"] + ranks[1]["index"])
    assert len(seen) == 2 * 32 * NUM_STEPS
    assert len(seen.unique()) == len(seen)


def test_grids_are_drawn_by_one_process(ranks, two_processes):
    assert ranks[0]["grids"] == ["step_0000002.png", "samples.png"]
    assert ranks[1]["grids"] == []
    assert (two_processes / "run" / "samples.png").is_file()


def test_one_run_is_left_with_its_pipeline(two_processes):
    run = two_processes / "run"
    assert [path.name for path in (run / "logs").iterdir()] == ["version_0"]
    assert (run / "pipeline" / "model_index.json").is_file()
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["devices"] == "2"


def test_validation_loss_is_that_of_a_single_process(two_processes, run_cli, tmp_path):
    run = two_processes / "run"
    with open(run / "logs" / "version_0" / "metrics.csv", newline="") as file:
        (logged,) = (float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"])
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"].update(devices=1, strategy="auto", callbacks=None, default_root_dir=str(tmp_path / "alone"))
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", tmp_path / "alone.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt"]
    status, _, err = run_cli("validate", *arguments)
    assert status == 0, err
    with open(tmp_path / "alone" / "logs" / "version_0" / "metrics.csv", newline="") as file:
        (alone,) = (float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"])
    assert logged == pytest.approx(alone, rel=1e-5)  # float32 sums in another order
