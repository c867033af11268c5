"""A callback for benchmarks: when each optimiser step ended.

unet-diffusion fit ... --allow step_times --trainer.callbacks+=step_times.StepTimes
"""

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

STEPS = "step_times.json"  # in the run folder: seconds since 1970


class StepTimes(Callback):
    """Writes the times when the run ends; without steps there is no file."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step > len(self.times):  # with accumulation, some batches end none
            self.times.append(time.time())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.times:
            Path(trainer.default_root_dir, STEPS).write_text(json.dumps(self.times))
