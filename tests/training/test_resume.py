"""Runs that are killed, and started again by the same command, end as the run that nobody touched: bit for bit.

Each start is a process. A server that has imported everything forks them: an import takes many times as long as they.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

SERVER = """
import json, os, subprocess, sys

import forked
subprocess.Popen = forked.Forked  # of second processes, which Lightning starts

import unet_diffusion.commands.main
from unet_diffusion.commands.main import main

forked.import_everything()

for line in sys.stdin:
    arguments, log, environment = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ.update(environment)
        sys.argv = [unet_diffusion.commands.main.__file__, *arguments]
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        sys.exit(main(arguments))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
FAULTS = """
import os
import resource
import signal
from pathlib import Path

from lightning.pytorch import Callback
from PIL.Image import Image

from unet_diffusion.training import checkpointing


class FailsInValidation(Callback):
    '''Once.'''

    def on_validation_batch_end(self, trainer, *args):
        if trainer.global_step == 10 and not Path("failed").exists():
            Path("failed").touch()
            raise RuntimeError("the validation failed")


class FullDisk(Callback):
    '''Files can be no larger than a part of a checkpoint, from a step on; once.'''

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 8 and not Path("full").exists():
            Path("full").touch()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


class Killed(Callback):
    '''At the next of these moments, from a step on; one a start.'''

    moments = {
        "after the first of a step's two batches": 4,
        "when a file is written and not in its place": 6,
        "between previous.ckpt and last.ckpt": 9,
        "after a checkpoint and before anything else": 12,
        "in a validation": 15,
        "when a picture is written and not in its place": 21,
        "when all steps are done": 24,
    }

    def on_fit_start(self, trainer, *args):
        self.trainer, self.batches = trainer, 0
        checkpoints = trainer.checkpoint_callback
        checkpoints.save_now = self.after("after a checkpoint and before anything else", checkpoints.save_now)
        os.fsync = self.after("when a file is written and not in its place", os.fsync)
        checkpointing._put = self.after("between previous.ckpt and last.ckpt", checkpointing._put)
        Image.save = self.after("when a picture is written and not in its place", Image.save)

    def on_train_batch_end(self, *args):
        self.batches += 1
        if self.batches % 2:
            self.reach("after the first of a step's two batches")

    def on_validation_batch_end(self, *args):
        self.reach("in a validation")

    def on_train_end(self, *args):
        self.reach("when all steps are done")

    def after(self, moment, function):
        def followed(*args, **options):
            function(*args, **options)
            self.reach(moment)

        return followed

    def reach(self, moment):
        told = Path("killed").read_text().splitlines() if Path("killed").exists() else []
        if [moment] == [*self.moments][len(told) :][:1] and self.trainer.global_step >= self.moments[moment]:
            with open("killed", "a") as file:
                print(moment, file=file)
            os.kill(os.getpid(), signal.SIGKILL)


class Told(Callback):
    '''To stop: in a step, in the validation after one, and in another; one a start.'''

    moments = {("train", 6): signal.SIGTERM, ("validate", 10): signal.SIGINT, ("train", 13): signal.SIGINT}

    def tell(self, moment, step):
        signum, told = self.moments.get((moment, step)), Path(f"told_{moment}_{step}")
        if signum and not told.exists():
            told.touch()
            os.kill(os.getpid(), signum)

    def on_train_batch_start(self, trainer, *args):
        self.tell("train", trainer.global_step)

    def on_validation_batch_end(self, trainer, *args):
        self.tell("validate", trainer.global_step)


class PreemptedEarly(Callback):
    '''Before the first step; once.'''

    def on_fit_start(self, trainer, *args):
        if not Path("preempted").exists():
            Path("preempted").touch()
            os.kill(os.getpid(), signal.SIGUSR1)
"""
SLURM_JOB = {  # of one task
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
# An epoch is 9 steps of two batches; validation after each 5 and checkpoints after each 3 fall together now and then.
OVERLAY = """
model: {unet: {init_args: {dropout: 0.2}}}
data: {init_args: {num_val: 1221, batch_size: 32}}
trainer: {accumulate_grad_batches: 2, val_check_interval: 10, limit_val_batches: 2}
samples: {every_n_steps: 7, num_images: 4}
checkpoint: {every_n_train_steps: 3}
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Starts processes in a folder of its own; a list of a pid or status a line."""
    folder = tmp_path_factory.mktemp("resumed")
    (folder / "faults.py").write_text(FAULTS)
    (folder / "overlay.yaml").write_text(OVERLAY)
    path = f"{folder}:{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.folder = folder
        yield process
        process.stdin.close()


class Run:
    """One run folder, and the processes that work on it."""

    def __init__(self, parent: Path, arguments: list[str], name: str, max_steps: int, server=None) -> None:
        self.server, self.folder = server, parent / name
        self.arguments = ["fit", *arguments, "--config", "overlay.yaml", "--trainer.default_root_dir", name]
        self.arguments += ["--trainer.max_steps", str(max_steps)]
        self.log = parent / f"{name}.log"

    def start(self, **environment: str) -> int:
        """The process."""
        self.server.stdin.write(json.dumps([self.arguments, str(self.log), environment]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def status(self) -> int:
        """Of the process that was started last, when it has ended."""
        return int(self.server.stdout.readline())

    def last(self) -> dict:
        return torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=True)

    def saves(self, after: int) -> None:
        """Waits for a checkpoint of a step after that one."""
        deadline = time.monotonic() + 120
        while not ((self.folder / "checkpoints" / "last.ckpt").exists() and self.last()["global_step"] > after):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def trace(self, name: str) -> dict[int, set[str]]:
        """All values that were ever logged for each step."""
        values: dict[int, set[str]] = {}
        for file in self.folder.glob("logs/version_*/metrics.csv"):
            for row in csv.DictReader(file.open()):
                if row.get(name):
                    values.setdefault(int(row["step"]), set()).add(row[name])
        return values


@pytest.fixture
def run(server, tiny_digits):
    def make(name: str, max_steps: int, *more: str) -> Run:
        return Run(server.folder, [*tiny_digits, *more], name, max_steps, server)

    return make


@pytest.fixture(scope="module")
def untouched(server, tiny_digits):
    """Runs that nobody touched, by their number of steps."""
    made: dict[int, Run] = {}

    def get(max_steps: int) -> Run:
        if max_steps not in made:
            made[max_steps] = Run(server.folder, tiny_digits, f"untouched_{max_steps}", max_steps, server)
            made[max_steps].start()
            assert made[max_steps].status() == 0, made[max_steps].log.read_text()
        return made[max_steps]

    return get


def assert_same(one: Run, other: Run) -> None:
    """Weights, averages, optimiser, schedule of rates, and every loss that was logged."""
    for entry in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        torch.testing.assert_close(one.last()[entry], other.last()[entry], rtol=0, atol=0)
    for name in ("train/loss", "val/loss"):
        expected = other.trace(name)
        assert len(expected) > 1
        assert all(len(values) == 1 for values in expected.values())
        assert one.trace(name) == expected
    assert (one.folder / "samples.png").read_bytes() == (other.folder / "samples.png").read_bytes()


def test_run_that_is_killed_at_every_kind_of_moment_is_the_untouched_one(run, untouched):
    killed = run("killed_run", 24, "--allow=faults", "--trainer.callbacks+=faults.Killed")
    steps = []
    for _ in range(7):
        killed.start()
        assert killed.status() == -signal.SIGKILL, killed.log.read_text()
        steps.append(killed.last()["global_step"])
    assert steps == [3, 3, 6, 12, 12, 18, 24]  # a file that is not in its place, or only in one of two, is not there
    killed.start()
    assert killed.status() == 0, killed.log.read_text()
    assert not list((killed.folder / "checkpoints").glob(".*"))  # nothing is left of half-written files
    assert_same(killed, untouched(24))


def test_run_that_is_told_to_stop_saves_and_ends_with_the_status_of_the_signal(run, untouched):
    stopped = run("stopped", 24, "--allow=faults", "--trainer.callbacks+=faults.Told")
    for step, signum in ((7, signal.SIGTERM), (10, signal.SIGINT), (14, signal.SIGINT)):  # where none is due
        stopped.start()
        assert stopped.status() == 128 + signum, stopped.log.read_text()
        assert stopped.last()["global_step"] == step
        assert f"stopped at step {step}; the same command continues from there" in stopped.log.read_text()
    stopped.start()
    assert stopped.status() == 0, stopped.log.read_text()
    assert_same(stopped, untouched(24))


def test_streamed_run_that_is_stopped_and_killed_is_the_untouched_one(server, streamed_digits):
    """Its workers read shards, in a window of two; an epoch is 9 steps."""
    untouched, stopped = (
        Run(server.folder, [*streamed_digits[1]], f"{name}_stream", 30, server) for name in ("untouched", "stopped")
    )
    untouched.start()
    assert untouched.status() == 0, untouched.log.read_text()
    for signum, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
        before = stopped.last()["global_step"] if stopped.folder.exists() else 0
        process = stopped.start()
        stopped.saves(after=before)
        os.kill(process, signum)
        assert stopped.status() == status, stopped.log.read_text()
    assert stopped.last()["global_step"] < 30
    stopped.start()
    assert stopped.status() == 0, stopped.log.read_text()
    assert_same(stopped, untouched)


def test_run_that_fails_goes_on_from_its_checkpoint(run, untouched):
    failed = run(
        *("failed_run", 24, "--allow=faults", "--trainer.callbacks+=faults.FullDisk"),
        "--trainer.callbacks+=faults.FailsInValidation",
    )
    full = "make room, and the same command continues from the checkpoint before"
    for said, step in ((full, 6), ("the validation failed", 9)):
        failed.start()
        assert failed.status() == 1
        assert said in failed.log.read_text()
        assert failed.last()["global_step"] == step
        assert not list((failed.folder / "checkpoints").glob(".*"))
    failed.start()
    assert failed.status() == 0, failed.log.read_text()
    assert_same(failed, untouched(24))


def test_slurm_job_is_requeued_once_each_time_and_goes_on(run, untouched, tmp_path):
    """Preempted before its first step, and again after its first checkpoint."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "called"}\n')
    scontrol.chmod(0o755)
    job = {**SLURM_JOB, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    preempted = run("preempted_run", 24, "--allow=faults", "--trainer.callbacks+=faults.PreemptedEarly")
    for step in (1, 2):
        process = preempted.start(**job)
        if step > 1:
            preempted.saves(after=1)
            os.kill(process, signal.SIGUSR1)
        assert preempted.status() == 128 + signal.SIGUSR1, preempted.log.read_text()
        assert step <= preempted.last()["global_step"] < 24
        assert not list(preempted.folder.rglob("hpc_ckpt*"))  # which Lightning would have saved in the middle of a step
    preempted.start(**job)
    assert preempted.status() == 0, preempted.log.read_text()
    assert (tmp_path / "called").read_text() == 2 * "requeue 4242\n"
    assert_same(preempted, untouched(24))


def test_damaged_checkpoint_is_said_and_the_one_before_is_used(run, untouched):
    hurt, step = run("hurt", 24), 6
    last = hurt.folder / "checkpoints" / "last.ckpt"
    while not last.exists() or last.samefile(last.with_name("previous.ckpt")):  # killed between the two of a save
        process = hurt.start()
        hurt.saves(after=step)
        os.kill(process, signal.SIGKILL)
        hurt.status()
        step = hurt.last()["global_step"]
    before = torch.load(last.with_name("previous.ckpt"), weights_only=True)
    content = bytearray(last.read_bytes())
    with zipfile.ZipFile(last) as members:
        largest = max(members.infolist(), key=lambda member: member.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1  # of weights, and not between the members
    last.write_bytes(content)  # step_*.ckpt is the same file under another name
    hurt.start()
    assert hurt.status() == 0, hurt.log.read_text()
    assert re.search(rf"{last.relative_to(hurt.folder.parent)} is not used: .* is damaged", hurt.log.read_text())
    assert f"continues from step {before['global_step']} (previous.ckpt)" in hurt.log.read_text()
    assert before["global_step"] < step
    assert_same(hurt, untouched(24))


def test_two_processes_go_on_together(run):
    """Told to stop by SIGTERM, which reaches the first of them only; then killed, both."""
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.precision", "32-true"]
    untouched, stopped = (run(name, 30, *two) for name in ("untouched_two", "stopped_two"))
    untouched.start()
    assert untouched.status() == 0, untouched.log.read_text()
    process = stopped.start()
    stopped.saves(after=0)
    os.kill(process, signal.SIGTERM)
    assert stopped.status() == 128 + signal.SIGTERM, stopped.log.read_text()
    step = stopped.last()["global_step"]
    process = stopped.start()
    stopped.saves(after=step)
    os.killpg(process, signal.SIGKILL)
    assert stopped.status() == -signal.SIGKILL
    assert step < stopped.last()["global_step"] < 30
    stopped.start()
    assert stopped.status() == 0, stopped.log.read_text()
    assert_same(stopped, untouched)
