"""Weights & Biases: one run of it for each run folder, which goes on when training does, with a network or without."""

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
    """Lightning's WandbLogger, without which training goes on if W&B's own process fails."""

    _has_failed = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if self._has_failed:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # whatever it is, it is not worth the run
            self._has_failed = True
            rank_zero_warn(f"W&B has failed ({error!r}), and is told nothing more; training and the other logs go on")


def continue_wandb_run(init_args: Any, root: Path, *, is_continued: bool) -> None:
    """Give a W&B logger the id that the run in this folder has, if training goes on, and check its settings.

    Args:
        init_args: of Lightning's WandbLogger; changed.
        root: the run folder.
        is_continued: whether training goes on.

    Raises:
        ValueError: if checkpoints are to be uploaded, and nothing is.
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
    """Begin or continue the run, and note its id in the run folder; offline, with a warning, if W&B cannot be reached.

    Args:
        logger: before anything else has begun its run.
        root: the run folder.
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
            f"W&B cannot be reached, and this run is kept on disk; upload it with: wandb sync {Path(run.dir).parent} "
            f"({error})"
        )
    with atomic_write(root / ID_FILE) as partial:
        partial.write_text(f"{run.id}\n")
