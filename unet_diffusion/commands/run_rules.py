"""Rules for the settings of a run and for its folder that are checked before anything is built."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from unet_diffusion.commands.named_classes import check_names
from unet_diffusion.commands.run_settings import CHECKPOINTS
from unet_diffusion.runtime.folder_settings import RUN_HEADER
from unet_diffusion.runtime.messages import did_you_mean
from unet_diffusion.training.lightning_internals import callbacks_of

# Less is accepted by Lightning, which then does something else: it would climb the loss, or do nothing.
LEAST = {
    "trainer.max_epochs": -1,
    "trainer.max_steps": -1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.log_every_n_steps": 0,
    "trainer.limit_val_batches": 0,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.num_sanity_val_steps": -1,
    "trainer.num_nodes": 1,
    "samples.every_n_steps": 0,
    "samples.num_images": 1,
    "evaluate.every_n_steps": 0,
    "checkpoint.every_n_train_steps": 0,
    "checkpoint.save_top_k": -1,
}
NOT_NOTHING = ("trainer.val_check_interval", "trainer.limit_train_batches")  # a share, or a number of batches
MOST_PICTURES = 1000  # in a grid
DEVICES = re.compile(r"auto|-1|[1-9]\d*|\d+(,\d+)*,|\d+(,\d+)+")  # how many, or their numbers with commas


def check_settings(config: Any, modules: Sequence[str]) -> None:
    """Refuse what a configuration may not name, and numbers that Lightning takes without doing what they say.

    Args:
        config: All settings, of a command.
        modules: Modules of the user's own that it may name.

    Raises:
        ValueError: If there is one.
    """
    check_names(config, modules)
    allowed = config[config.subcommand].model.get("allow") or []  # of the base of an adapter
    if others := [module for module in allowed if module not in modules]:
        raise ValueError(f"model.allow names {others[0]}, and a configuration may not allow modules; if you trust it, "
                         f"add --allow {others[0]} to the command line")  # fmt: skip
    _check_numbers(config[config.subcommand])


def _check_numbers(config: Any) -> None:
    """Refuse numbers that Lightning takes without doing what they say.

    Raises:
        ValueError: If there is one.
    """
    for name, least in LEAST.items():
        value = config.get(name)
        if isinstance(value, int | float) and not value >= least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    for name in NOT_NOTHING:
        value = config.get(name)
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} must be more than 0, got {value}; leave it out for all")
    devices = config.trainer.devices
    if isinstance(devices, int | str) and not DEVICES.fullmatch(str(devices)):
        raise ValueError(f"trainer.devices must be a number from 1, or -1 or auto for all, got {devices}")
    if config.trainer.overfit_batches:
        raise ValueError(
            f"trainer.overfit_batches must be 0, got {config.trainer.overfit_batches}; to overfit, train on a folder "
            "with a few images"
        )
    if config.samples.get("num_images", 0) > MOST_PICTURES:
        raise ValueError(f"samples.num_images must be at most {MOST_PICTURES}, got {config.samples.num_images}")
    if config.trainer.max_steps == 0:
        raise ValueError(
            "trainer.max_steps must be 1 or more, or -1 for no end but that of max_epochs or max_time, got 0"
        )
    if config.checkpoint.filename is not None and not config.checkpoint.filename.strip():
        raise ValueError("checkpoint.filename must not be empty; leave it out")


def check_monitors(trainer: Trainer, logged: Sequence[str]) -> None:
    """Refuse callbacks that monitor what is never logged; Lightning would notice after an epoch, or not at all.

    Args:
        trainer: The trainer, whose callbacks may log, too.
        logged: What the module logs.

    Raises:
        ValueError: If there is one.
    """
    logged = [*logged, *(name for callback in callbacks_of(trainer) for name in getattr(callback, "logged", ()))]
    for callback in callbacks_of(trainer):
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in logged:
            similar = did_you_mean(monitor, logged)
            raise ValueError(
                f"monitor of {type(callback).__name__} must be one of {', '.join(logged)}, got {monitor!r}{similar}"
            )


def check_run_folder(root: Path) -> None:
    """Refuse a folder in which training would replace files that no run has written.

    Raises:
        FileExistsError: If it holds such files.
    """
    settings = root / "config.yaml"
    if settings.is_file() and settings.read_text(encoding="utf-8", errors="replace").startswith(RUN_HEADER):
        return
    names = ("config.yaml", "samples.png", "samples", "pipeline", "autoencoder")
    others = [name for name in names if (root / name).exists()]
    if others and not any((root / CHECKPOINTS).glob("*.ckpt")):
        raise FileExistsError(
            f"{root} holds {', '.join(others)} that no run has written there, and training would replace; choose "
            "another --trainer.default_root_dir"
        )


def refuse_images_in(data: Any, root: Path) -> None:
    """Refuse to put a run's pictures among the images that it is trained on; folders of runs below them are left out.

    Raises:
        ValueError: If the images, or their labels, are in the run folder.
    """
    for name, value in data.items():
        if name.rpartition(".")[2] not in ("root", "images", "labels") or not isinstance(value, str | Path):
            continue
        if Path(value).expanduser().resolve() == root.resolve():
            raise ValueError(f"{name} and trainer.default_root_dir must be two folders, got {value} for both; the run "
                             "would read its own pictures")  # fmt: skip
