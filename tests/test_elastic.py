"""One of two processes that torchrun started is killed: both start again, and end as those that nobody touched."""

import os
import sys
from pathlib import Path

import pytest
import torch
from forked import run_python

CONFIGS = Path(__file__).parents[1] / "configs"
NUM_STEPS = 12  # of 3 epochs of 4 steps; checkpoints after each 2

KILLED = """
import os
import signal
from pathlib import Path

from lightning.pytorch import Callback


class Killed(Callback):
    '''The second process, in the middle of an epoch, after a checkpoint; once.'''

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_rank == 1 and trainer.global_step == 7 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def fit(folder: Path, arguments: list[str], name: str, *more: str) -> tuple[dict, str]:
    """The last checkpoint, and what was said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max_restarts", "1", "-m", "unet_diffusion", "fit", *arguments]
    command += [
        "--config",
        str(CONFIGS / "trainer" / "ddp.yaml"),
        "--config",
        str(CONFIGS / "trainer" / "torchrun.yaml"),
    ]
    command += ["--trainer.devices", "2", "--trainer.precision", "32-true", "--trainer.max_steps", str(NUM_STEPS)]
    command += ["--data.num_val", "1541", "--trainer.default_root_dir", name, *more]
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = run_python(command, cwd=folder, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True), done.stderr


@pytest.mark.slow
def test_processes_of_torchrun_start_again_and_end_as_if_untouched(tiny_digits, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    untouched, _ = fit(tmp_path, tiny_digits, "untouched")
    restarted, said = fit(tmp_path, tiny_digits, "restarted", "--allow=killed", "--trainer.callbacks+=killed.Killed")
    assert (tmp_path / "killed").exists()
    assert "restarted holds this run; it continues from step 6 (last.ckpt)" in said
    assert "rank 1 (process" in said  # the other one says who is gone
    for entry in ("state_dict", "optimizer_states", "global_step", "epoch"):
        torch.testing.assert_close(restarted[entry], untouched[entry], rtol=0, atol=0)
