"""The loggers of a run, which write into its folder."""

from pathlib import Path
from typing import Any

from unet_diffusion.commands.run_settings import CHECKPOINTS
from unet_diffusion.training.csv_log import RunCSVLogger
from unet_diffusion.training.wandb_run import RunWandbLogger, continue_wandb_run

DEFAULT_FOLDERS = (None, "", ".", "./mlruns")  # of loggers


def loggers_of(wanted: Any, root: Path) -> Any:
    """The settings of a CSV logger, which every run has, and of the loggers asked for; all write into the run folder.

    Args:
        wanted: The setting `trainer.logger`; False: there are no loggers.
        root: The run folder.
    """
    if wanted is False:
        return False
    csv = {
        "class_path": f"{RunCSVLogger.__module__}.{RunCSVLogger.__name__}",
        # A version of its own each time it starts: a continued run would otherwise delete the log it continues.
        # Each row is written at once: a process that is killed leaves what it logged.
        "init_args": {"save_dir": str(root), "name": "logs", "flush_logs_every_n_steps": 1},
    }
    others = [] if wanted in (None, True) else wanted if isinstance(wanted, list) else [wanted]
    for logger in others:
        if "save_dir" in logger.init_args and logger.init_args.save_dir in DEFAULT_FOLDERS:
            logger.init_args.save_dir = str(root)
        if logger.class_path.startswith("lightning.") and logger.class_path.endswith(".WandbLogger"):
            logger.class_path = f"{RunWandbLogger.__module__}.{RunWandbLogger.__name__}"
            is_continued = any((root / CHECKPOINTS).glob("*.ckpt"))  # a run is never trained over
            continue_wandb_run(logger.init_args, root, is_continued=is_continued)
    return [csv, *others]
