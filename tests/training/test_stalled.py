"""A process that stalls, on a CPU: the others end, and name it."""

import os
import sys
from pathlib import Path

import pytest
from forked import run_python

from unet_diffusion.training.stalled import WAITED, Beat, describe, who_is_behind

CONFIGS = Path(__file__).parents[2] / "configs"
TIMEOUT = 16  # s, once the processes have met

STALLS = """
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from lightning.pytorch import Callback


class Stalls(Callback):
    '''The second process, after three steps: by a signal to itself, or for a while; then the first may fail.'''

    def __init__(self, how: str, timeout: int):
        self.how, self.timeout = how, timedelta(seconds=timeout)

    def setup(self, trainer, *args, **options):
        trainer.strategy._timeout = self.timeout
        dist.distributed_c10d._set_pg_timeout(self.timeout)

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            Path("pid").write_text(str(os.getpid()))
            time.sleep(2)  # a beat at least
            if self.how in ("sleeps", "while the first fails"):
                time.sleep(600)
            os.kill(os.getpid(), signal.Signals[self.how])
        if trainer.global_rank == 0 and trainer.global_step == 3 and self.how == "while the first fails":
            raise OSError("the disk is full")
"""


def beat(**fields) -> Beat:
    return Beat(**{"passed": 10, "step": 3, "doing": "validation", "where": "process 7 on a", "number": 5, **fields})


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ([beat(), beat()], [beat(number=8), beat(number=8)], []),  # all alive, and in the same place
        ([beat(), beat()], [beat(number=8), beat()], [1]),  # silent
        ([beat(passed=9), beat()], [beat(number=8, passed=9), beat(number=8)], [0]),  # behind
        ([beat(passed=9), beat()], [beat(number=8, passed=9), beat()], [1]),  # perhaps because of the silent one
        ([beat(), beat()], [beat(ended="ValueError: no"), beat(number=8)], [0]),
        ([beat(), beat(ended=WAITED), beat()], [beat(number=8), beat(ended=WAITED), beat()], [2]),
        ([], [], []),  # the store did not answer
    ],
)
def test_who_is_behind(before, now, expected):
    assert who_is_behind(before, now) == expected
    assert ("does not answer" if not now else "rank" if expected else "no process is behind") in describe(before, now)


def ended(how: str, tiny_digits, tmp_path) -> str:
    """What a run of two processes said that ended by itself with status 1, and left no process behind."""
    (tmp_path / "stalls.py").write_text(STALLS)
    arguments = ["--config", str(CONFIGS / "trainer" / "ddp.yaml"), "--trainer.devices", "2"]
    arguments += ["--trainer.precision", "32-true"]
    arguments += ["--trainer.max_steps", "50", "--trainer.default_root_dir", "run", "--samples.every_n_steps", "0"]
    arguments += ["--allow=stalls", "--trainer.callbacks+=stalls.Stalls", "--trainer.callbacks.how", how]
    arguments += ["--trainer.callbacks.timeout", str(TIMEOUT)]
    command = [sys.executable, "-m", "unet_diffusion", "fit", *tiny_digits, *arguments]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    # The pipe stays open as long as any process holds it: none is left behind.
    done = run_python(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert done.returncode == 1, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGSTOP", "is silent; its last step is 3, then"),
        ("sleeps", "is behind; its last step is 3, then"),
    ],
)
def test_process_that_stalls_is_named_and_the_run_ends(how, said, tiny_digits, tmp_path):
    stderr = ended(how, tiny_digits, tmp_path)
    errors = [line for line in stderr.splitlines() if line.startswith("unet-diffusion: error:")]
    pid = int((tmp_path / "pid").read_text())
    assert any(f"rank 1 (process {pid} on " in error and said in error for error in errors), errors
    assert f"no progress for {TIMEOUT / 2:.0f} s" in stderr


@pytest.mark.slow
def test_error_of_the_first_process_ends_the_others(tiny_digits, tmp_path):
    assert "the disk is full" in ended("while the first fails", tiny_digits, tmp_path)
