"""A callback for benchmarks with a budget of time: a run that ends at a time, not after a number of steps.

unet-diffusion fit ... --allow until_time --trainer.callbacks+=until_time.UntilTime --trainer.callbacks.end 1790000000
"""

import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

STEPS = "steps.txt"  # in the run folder: how many steps were made


class UntilTime(Callback):
    """Lets learning rates fall by half a cosine of the time, to 0 at the end, and stops the run there.

    For recipes with a constant rate: a warm-up stays. The clock runs from the first step, so that what comes before it
    costs steps and not the shape of the decay.

    Args:
        end: seconds since 1970; the last step ends at about this time.

    Raises:
        RuntimeError: if it is over before the first step.
    """

    def __init__(self, end: float):
        self.end = end
        self.begin = self.step_begin = math.nan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin = time.time()
        if self.begin > self.end:
            raise RuntimeError(f"the time was over {self.begin - self.end:.0f} s before the first step; give it more")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.step_begin = time.time()
        share = (self.step_begin - self.begin) / max(self.end - self.begin, 1.0e-3)
        factor = 0.5 * (1 + math.cos(math.pi * min(share, 1)))
        for config in trainer.lr_scheduler_configs:
            groups = config.scheduler.optimizer.param_groups
            for group, rate in zip(groups, config.scheduler.get_last_lr(), strict=True):
                group["lr"] = rate * factor

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        now = time.time()
        if now + (now - self.step_begin) > self.end:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path(trainer.default_root_dir, STEPS).write_text(str(trainer.global_step))
