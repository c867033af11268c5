"""A process that stalls, on a CPU: the others end, and name it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unet_diffusion.training.stalled import WAITED, Beat, describe, who_is_behind

CONFIGS = Path(__file__).parents[2] / "configs"
TIMEOUT = 16  # s; the processes must have met within it, too

STALLS = """
import os
import signal
import time
from pathlib import Path

from lightning.pytorch import Callback


class Stalls(Callback):
    '''The second process, after three steps: by a signal to itself, or for a while.'''

    def __init__(self, how: str):
        self.how = how

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            Path("pid").write_text(str(os.getpid()))
            time.sleep(2)  # a beat at least
            if self.how == "sleeps":
                time.sleep(600)
            os.kill(os.getpid(), signal.Signals[self.how])
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGSTOP", "is silent; its last step is 3, then"),
        ("sleeps", "is behind; its last step is 3, then"),
    ],
)
def test_process_that_stalls_is_named_and_the_run_ends(how, said, tiny_digits, tmp_path):
    (tmp_path / "stalls.py").write_text(STALLS)
    arguments = ["--config", str(CONFIGS / "trainer" / "ddp.yaml"), "--trainer.devices", "2"]
    arguments += ["--trainer.strategy.init_args.timeout", f"0:00:{TIMEOUT:02d}", "--trainer.precision", "32-true"]
    arguments += ["--trainer.max_steps", "50", "--trainer.default_root_dir", "run", "--samples.every_n_steps", "0"]
    arguments += ["--trainer.callbacks+=stalls.Stalls", "--trainer.callbacks.how", how]
    command = [sys.executable, "-m", "unet_diffusion.cli", "fit", *tiny_digits, *arguments]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    # The pipe stays open as long as any process holds it: none is left behind.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("unet-diffusion: error:")]
    pid = int((tmp_path / "pid").read_text())
    assert any(f"rank 1 (process {pid} on " in error and said in error for error in errors), errors
    assert f"no progress for {TIMEOUT / 2:.0f} s" in done.stderr
