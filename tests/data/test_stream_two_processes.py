"""Two processes with two workers each train on shards from a server that fails now and then, are killed, and go on."""

import csv
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from forked import run_python
from shard_servers import FaultyServer

pytestmark = pytest.mark.slow

RECORDER = """
import json
import os
import signal
from pathlib import Path

from lightning.pytorch import Callback


class Recorder(Callback):
    '''Writes which images each process was trained on, at which step.'''

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        with open(f"{trainer.default_root_dir}_{trainer.global_rank}.txt", "a") as file:
            print(json.dumps([trainer.global_step, batch["index"].tolist()]), file=file)


class Killed(Callback):
    '''With the other process and all workers, in the middle of an epoch, after a checkpoint; once.'''

    def on_train_batch_start(self, trainer, *args):
        if trainer.is_global_zero and trainer.global_step == 7 and not Path("killed_once").exists():
            Path("killed_once").touch()
            os.killpg(0, signal.SIGKILL)
"""
NUM_STEPS = 24  # more than an epoch of 20


class Run:
    """A run of two processes, in a folder."""

    def __init__(self, parent: Path, name: str, arguments: list[str]) -> None:
        self.parent, self.name = parent, name
        self.last = parent / name / "checkpoints" / "last.ckpt"
        self.arguments = ["fit", *arguments, "--trainer.default_root_dir", name]
        self.log = ""

    def start(self) -> int:
        """The exit status."""
        path = os.pathsep.join([str(self.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "unet_diffusion", *self.arguments]
        done = run_python(command, cwd=self.parent, env={**os.environ, "PYTHONPATH": path}, timeout=180)
        self.log += done.stderr
        return done.returncode

    def finish(self) -> None:
        assert self.start() == 0, self.log
        assert self.step == NUM_STEPS

    @property
    def step(self) -> int:
        return torch.load(self.last, weights_only=True)["global_step"]

    def trained_on(self, rank: int) -> dict[int, set[str]]:
        """The batches that were ever trained on at each step; repeated after a kill, they must be the same."""
        steps: dict[int, set[str]] = {}
        for line in (self.parent / f"{self.name}_{rank}.txt").read_text().splitlines():
            step, _, indices = line.strip("[]").partition(", ")
            steps.setdefault(int(step), set()).add(indices)
        return steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory, streamed_digits):
    """One that nobody touched and one that was killed, with what the server was asked for by the first."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "recorder.py").write_text(RECORDER)
    shards, arguments = streamed_digits
    with FaultyServer(shards) as server:
        address = ["--data.root", server.address, "--data.on_bad_shard", "skip"]
        address += [
            "--data.num_retries",
            "1",
            "--data.num_val",
            "197",
            "--data.window",
            "1",
        ]
        address += ["--data.batch_size", "40", "--trainer.max_steps", str(NUM_STEPS)]
        address += ["--trainer.val_check_interval", "10", "--samples.every_n_steps", "0"]
        address += [
            "--checkpoint.every_n_train_steps",
            "3",
            "--allow=recorder",
            "--trainer.callbacks+=recorder.Recorder",
        ]
        address += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.precision", "32-true"]
        untouched = Run(folder, "untouched", [*arguments, *address])
        killed = Run(
            folder, "killed", [*arguments, *address, "--allow=recorder", "--trainer.callbacks+=recorder.Killed"]
        )
        server.faults = {f"shard_{number:05d}.tar": ["refuse"] for number in range(10, 20)}  # once, and then no more
        server.faults["shard_00007.tar"] = ["corrupt"] * 1000
        untouched.finish()
        asked = list(server.asked)
        assert killed.start() == -signal.SIGKILL, killed.log
        assert killed.step == 6
        killed.finish()
    return untouched, killed, asked


def test_order_and_weights_are_those_of_the_run_that_nobody_touched(runs):
    untouched, killed, _ = runs
    for rank in (0, 1):
        assert all(len(batches) == 1 for batches in killed.trained_on(rank).values())
        assert killed.trained_on(rank) == untouched.trained_on(rank)
        assert len(untouched.trained_on(rank)) == NUM_STEPS
    one, other = (torch.load(run.last, weights_only=True) for run in (untouched, killed))
    torch.testing.assert_close(other["state_dict"], one["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(other["optimizer_states"], one["optimizer_states"], rtol=0, atol=0)


def test_processes_and_workers_read_shards_of_their_own(runs):
    untouched, _, asked = runs
    batches = [untouched.trained_on(rank)[step] for rank in (0, 1) for step in range(20)]
    drawn = [int(index) for (batch,) in batches for index in batch.strip("[]").split(", ")]
    assert len(drawn) == 20 * 2 * 40
    assert len(set(drawn)) >= 1600 - 50  # but for those that took the place of a shard
    # 36 shards in each of two epochs, of which the second is not finished; 7 cuts, retries, validation by 4 workers.
    reads = [name for name in asked if name.startswith("shard") and int(name[6:11]) >= 20]
    assert len(reads) <= 2 * (16 + 7)


def test_bad_shard_is_told_and_counted_over_both_processes(runs):
    untouched, *_ = runs
    assert "shard_00007.tar cannot be read" in untouched.log
    assert "shard_00012.tar" not in untouched.log  # it failed once
    with open(untouched.parent / "untouched" / "logs" / "version_0" / "metrics.csv") as file:
        counts = [float(row["train/replaced_images"]) for row in csv.DictReader(file) if row["train/replaced_images"]]
    assert counts == sorted(counts)
    assert 50 <= counts[-1] <= 100  # a shard of 50 an epoch
