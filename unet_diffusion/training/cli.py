"""fit and validate: Lightning's command line around the modules and the data modules.

What is trained is the configuration's `task`: "denoise", the default, "segment" or "autoencode".

The run folder is `trainer.default_root_dir`. A run leaves there config.yaml, logs/, samples/ and samples.png,
checkpoints/ and the exported pipeline/ or autoencoder/; a folder that holds a run is never trained into again, except
to continue it.
"""

import argparse
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info

from unet_diffusion.data import ImageDataModule, SegmentationDataModule
from unet_diffusion.interop import export_autoencoder, export_pipeline, why_not_exported
from unet_diffusion.training.autoencoder import AutoencoderModule
from unet_diffusion.training.base import NetworkModule
from unet_diffusion.training.callbacks import (
    PictureGrid,
    ReconstructionGrid,
    RunProgressBar,
    SampleGrid,
    SegmentationGrid,
    run_folder,
)
from unet_diffusion.training.module import DiffusionModule
from unet_diffusion.training.segmentation import SegmentationModule

CHECKPOINTS = "checkpoints"
PATHS = {"default_root_dir", "root", "images", "labels", "init_from", "folder", "autoencoder"}  # of this machine


@dataclass(frozen=True)
class Task:
    """What a run trains, on what, and what it shows."""

    module: type[NetworkModule] | type[AutoencoderModule]
    data: type[LightningDataModule]
    pictures: type[PictureGrid]


TASKS = {
    "denoise": Task(DiffusionModule, ImageDataModule, SampleGrid),
    "segment": Task(SegmentationModule, SegmentationDataModule, SegmentationGrid),
    "autoencode": Task(AutoencoderModule, ImageDataModule, ReconstructionGrid),
}


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole configuration to run folder/config.yaml, and tells it to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        text = self.parser.dump(self.config, skip_unset=False)
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(text)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))


class TrainingCLI(LightningCLI):
    """Lightning's command line with this project's callbacks, run folder and last step: the exported pipeline.

    Args:
        task: what is trained; a key of TASKS.
        options: those of LightningCLI.
    """

    def __init__(self, task: str, **options: Any):
        self.task = TASKS[task]
        super().__init__(self.task.module, self.task.data, **options)

    @classmethod
    def run(cls, arguments: Sequence[str]) -> None:
        """Parse and carry out `fit ...` or `validate ...`.

        Raises:
            ValueError: if the settings contradict each other, or there is no such task.
            FileExistsError: if the run folder holds a run that is not being continued.
        """
        _silence_what_is_meant()
        cls(
            _task_of(arguments[1:]),
            subclass_mode_data=True,
            args=list(arguments),
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"enable_model_summary": False},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders"}
        return {"fit": skipped, "validate": skipped}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--task", choices=tuple(TASKS), default="denoise", help="what is trained")
        parser.add_lightning_class_args(self.task.pictures, "samples")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        # Without a version counter last.ckpt is always the last one, also in a run folder that was moved and continued.
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "step_{step:07d}",
                             "checkpoint.auto_insert_metric_name": False,
                             "checkpoint.enable_version_counter": False})  # fmt: skip

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir or "runs/unnamed").expanduser()
        config.trainer.default_root_dir = str(root)
        self.written = self.config.clone()  # what config.yaml holds: the paths below follow from the run folder
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(root / CHECKPOINTS)
        config.trainer.logger = _loggers(config.trainer.logger, root)
        if config.trainer.fast_dev_run:
            config.checkpoint.save_last = False  # Lightning would write it at the end all the same
        elif self.subcommand == "fit" and not _continues(root, config.ckpt_path):
            _refuse_to_overwrite(root)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.config = self.written
        trainer = self._get(self.config, "trainer")
        # Lightning refuses a bar that is turned off, and rates that nobody logs.
        bar = [] if trainer.enable_progress_bar is False else [RunProgressBar()]
        rates = [] if trainer.logger is False else [LearningRateMonitor()]
        self.trainer_defaults["callbacks"] = [*bar, *rates]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        self.model.is_continued = _has_checkpoint(run_folder(self.trainer), self.config.fit.ckpt_path)
        settings = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))[self.subcommand]
        # They go out with the exported pipeline: what was trained and how, and no paths of this machine.
        wanted = {key: settings[key] for key in ("seed_everything", "model", "data", "trainer")}
        del wanted["trainer"]["logger"]
        self.model.settings = _without(wanted, PATHS)

    def after_fit(self) -> None:
        if self.trainer.state.status != TrainerStatus.FINISHED or self.config.fit.trainer.fast_dev_run:
            return
        if isinstance(self.model, AutoencoderModule):  # on all processes: what is exported is of the last weights
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        if self.trainer.is_global_zero:
            folder = run_folder(self.trainer)
            rank_zero_info(f"{folder} holds samples.png, {CHECKPOINTS}/ and {self._hand_over(folder)}")

    def _hand_over(self, folder: Path) -> str:
        """Exports what has a counterpart in diffusers, and says what a user would do next."""
        if isinstance(self.model, SegmentationModule):
            return f"logs/; to segment: unet-diffusion segment {folder} IMAGES --output DIR"
        if isinstance(self.model, AutoencoderModule):
            export_autoencoder(self.model.trained, folder / "autoencoder", overwrite=True)
            return "autoencoder/, which diffusers loads"
        if why_not_exported(self.model.trained):  # export says it to whoever asks for a pipeline
            return f"logs/; to draw images: unet-diffusion sample {folder} --output DIR"
        export_pipeline(self.model.trained, folder / "pipeline", overwrite=True)
        return "pipeline/, which diffusers loads"


def _task_of(arguments: Sequence[str]) -> str:
    """The task on the command line, or else in the last configuration file that names one.

    Which options there are depends on it, so it is looked for before they are parsed.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    parser.add_argument("--config", "-c", action="append", default=[])
    found, _ = parser.parse_known_args(list(arguments))
    tasks = ["denoise"]
    for path in found.config:
        if Path(path).is_file():  # a missing one is an error of the parser that comes next
            content = yaml.safe_load(Path(path).read_text())
            tasks += [content["task"]] if isinstance(content, dict) and "task" in content else []
    task = found.task or tasks[-1]
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return task


def _silence_what_is_meant() -> None:
    """Hides Lightning's warnings about things that are as they should be here."""
    for message in (
        "LightningCLI's args parameter is intended",
        r"Found \d+ module\(s\) in eval mode",  # the averaged network
        "Using ModelCheckpoint with manual optimization",  # of GANs with steps of several optimisers
        "The number of training batches .* is smaller than the logging interval",  # steps are counted, not epochs
        ".*does not have many workers",  # the images are in memory
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", message)


def _continues(root: Path, ckpt_path: Any) -> bool:
    """Whether a run goes on from a checkpoint of its own: a file in its folder, or a word of Lightning's, like last."""
    return bool(ckpt_path) and (not Path(ckpt_path).is_file() or root.resolve() in Path(ckpt_path).resolve().parents)


def _has_checkpoint(root: Path, ckpt_path: Any) -> bool:
    """Whether there is one to continue from: with a word of Lightning's and no checkpoint, a run starts afresh."""
    return bool(ckpt_path) and (Path(ckpt_path).is_file() or any((root / CHECKPOINTS).glob("*.ckpt")))


def _without(settings: Any, keys: set[str]) -> Any:
    """Nested settings without these keys, wherever they are, unless there are settings below them."""
    if not isinstance(settings, dict):
        return settings
    return {key: _without(value, keys) for key, value in settings.items() if key not in keys or isinstance(value, dict)}


def _refuse_to_overwrite(root: Path) -> None:
    """A run is not trained over. Other ranks than the first start later, when the run may have begun."""
    checkpoints = sorted((root / CHECKPOINTS).glob("*.ckpt"))
    if checkpoints and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        raise FileExistsError(
            f"{root} holds a run already; continue it with --ckpt_path {root / CHECKPOINTS / 'last.ckpt'}, "
            "or start another with --trainer.default_root_dir DIR"
        )


def _loggers(wanted: Any, root: Path) -> Any:
    """The loggers asked for, writing into the run folder, after a CSV file that is always there."""
    if wanted is False:
        return False
    csv = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        # A version of its own each time it starts: a continued run would otherwise delete the log it continues.
        "init_args": {"save_dir": str(root), "name": "logs"},
    }
    others = [] if wanted in (None, True) else wanted if isinstance(wanted, list) else [wanted]
    for logger in others:
        if "save_dir" in logger.init_args and logger.init_args.save_dir in (None, "."):
            logger.init_args.save_dir = str(root)
    return [csv, *others]
