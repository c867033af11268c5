"""Weights & Biases (W&B): one run of theirs for each run folder, which continues when training does."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from unet_diffusion.runtime.atomic_files import atomic_write

ID_FILE = "wandb_id.txt"  # in the run folder
PATIENCE = {  # seconds to wait for the network, unless these variables are set; W&B's own are 90, and for ever
    "WANDB_INIT_TIMEOUT": "20",
    "WANDB_FINISH_TIMEOUT": "300",  # for what is not uploaded yet when training is done; it stays on disk
}


class RunWandbLogger(WandbLogger):
    """Lightning's WandbLogger; training continues without it if W&B's own process fails."""

    _has_failed = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if self._has_failed:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # whatever it is, it is not worth the run
            self._has_failed = True
            rank_zero_warn(f"W&B has failed ({error!r}) and gets no more losses; training and the other logs continue")


def continue_wandb_run(init_args: Any, root: Path, *, is_continued: bool) -> None:
    """Give a W&B logger the id of the run in this folder, if training is resumed, and check its settings.

    Args:
        init_args: The arguments of Lightning's WandbLogger, which are changed.
        root: The run folder.
        is_continued: Whether training is resumed.

    Raises:
        ValueError: If checkpoints are to be uploaded while W&B is offline.
    """
    is_offline = init_args.offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    if init_args.log_model and is_offline:
        raise ValueError(
            f"log_model {init_args.log_model} uploads checkpoints, and W&B is offline (offline: true, or WANDB_MODE); "
            "set log_model to false, or go online"
        )
    if is_continued and (root / ID_FILE).is_file() and not (init_args.id or init_args.version):
        init_args.id = (root / ID_FILE).read_text().strip()


@rank_zero_only
def start_wandb_run(logger: RunWandbLogger, root: Path) -> None:
    """Begin or continue the run, and write its id into the run folder.

    If W&B cannot be reached, a warning says so, and the run stays on the disk.

    Args:
        logger: The logger, whose run nothing else has begun.
        root: The run folder.
    """
    import wandb

    for name, seconds in PATIENCE.items():
        os.environ.setdefault(name, seconds)
    try:
        run = logger.experiment
    except wandb.errors.CommError as error:
        wandb.teardown()  # what has just failed would still hold the id
        os.environ["WANDB_MODE"] = "offline"
        run = logger.experiment
        rank_zero_warn(
            f"W&B cannot be reached, and this run stays on the disk; upload it with: wandb sync {Path(run.dir).parent} "
            f"({error})"
        )
    with atomic_write(root / ID_FILE) as partial:
        partial.write_text(f"{run.id}\n")
