"""fit and validate: Lightning's command line around the modules and the data modules.

What is trained is the configuration's `task`: "denoise", the default, "segment" or "autoencode".

The run folder is `trainer.default_root_dir`. A run leaves there config.yaml, logs/, samples/ and samples.png,
checkpoints/ and the exported pipeline/ or autoencoder/. The same command again goes on from the last checkpoint that is
whole; a folder that holds a run of other settings is never trained into, except to continue it by name.
"""

import atexit
import re
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

import unet_diffusion.data
from unet_diffusion.commands.fit_arguments import FINDS_CHECKPOINTS, TASKS, FitArguments
from unet_diffusion.commands.named_classes import check_names, check_written, refuse_names_but
from unet_diffusion.commands.parser_errors import TRIED_ALL, in_short
from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.data.known import KnownImages
from unet_diffusion.data.segmentation import SegmentationDataModule
from unet_diffusion.data.stream import CountReplaced
from unet_diffusion.inference.record import explained, read_denoiser
from unet_diffusion.inference.record_checks import check_weights
from unet_diffusion.runtime.atomic_files import RUN_HEADER, ClaimedFolder, atomic_write, check_replaceable
from unet_diffusion.runtime.messages import UsageError, did_you_mean
from unet_diffusion.runtime.safe_loading import load_plain
from unet_diffusion.runtime.signals import Interrupted
from unet_diffusion.training.callbacks import (
    DataSummary,
    PictureGrid,
    ReconstructionGrid,
    RunProgressBar,
    SampleGrid,
    SegmentationGrid,
    run_folder,
)
from unet_diffusion.training.checkpointing import LAST, RunCheckpoint, WholeCheckpoints, newest_good
from unet_diffusion.training.csv_log import RunCSVLogger
from unet_diffusion.training.health import SkipBadSteps, is_out_of_memory, memory_advice
from unet_diffusion.training.lightning_internals import (
    OpenCLI,
    callbacks_of,
    killer_of_processes,
    leave_requeue_to_callbacks,
    shard_over_all_processes,
)
from unet_diffusion.training.precision import RunTrainer, smaller_precision
from unet_diffusion.training.stalled import NameStalled
from unet_diffusion.training.stopping import StopOnSignal
from unet_diffusion.training.wandb_run import RunWandbLogger, continue_wandb_run, start_wandb_run

CHECKPOINTS = "checkpoints"
RUN_SETTINGS = "run_settings"  # in a checkpoint: those that a run which goes on by itself is compared in
PATHS = {"default_root_dir", "root", "images", "labels", "init_from", "folder", "autoencoder"}  # of this machine
WHAT_IS_TRAINED = ("task", "model", "data", "seed_everything")  # settings that a run keeps when it goes on by itself
STEP_SETTINGS = ("devices", "num_nodes", "precision", "accumulate_grad_batches", "gradient_clip_val")
MAX_SHOWN = 5  # settings that differ
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
    "checkpoint.every_n_train_steps": 0,
    "checkpoint.save_top_k": -1,
}
NOT_NOTHING = ("trainer.val_check_interval", "trainer.limit_train_batches")  # a share, or a number of batches
MOST_PICTURES = 1000  # in a grid
DEVICES = re.compile(r"auto|-1|[1-9]\d*|\d+(,\d+)*,|\d+(,\d+)+")  # how many, or their numbers with commas
DEFAULT_FOLDERS = (None, "", ".", "./mlruns")  # of loggers
AUTO = "auto"
LEFT_TO_THE_MACHINE = ("model.speed", "trainer.precision")  # by "auto"
COMMON = (  # of the trainer's options those that people set
    "",
    *("max_steps", "default_root_dir", "precision", "accelerator", "devices", "num_nodes", "strategy", "max_time"),
    *("val_check_interval", "log_every_n_steps", "accumulate_grad_batches", "gradient_clip_val", "logger"),
    *("enable_progress_bar", "fast_dev_run"),
)
HELP_ORDER = ("help", "model", "data", "trainer", "samples", "checkpoint", "ckpt_path")  # of the help, in this order


@dataclass(frozen=True)
class Task:
    """What a run trains, on what, and what it shows."""

    module: type[LightningModule]
    data: type[LightningDataModule]
    pictures: type[PictureGrid]

    @classmethod
    def named(cls, name: str) -> "Task":
        """One of TASKS. Only its own module is imported: that of autoencoders needs seconds of diffusers."""
        if name == "segment":
            from unet_diffusion.training.segmentation import SegmentationModule

            return cls(SegmentationModule, SegmentationDataModule, SegmentationGrid)
        if name == "autoencode":
            from unet_diffusion.training.autoencoder import AutoencoderModule

            return cls(AutoencoderModule, ImageDataModule, ReconstructionGrid)
        from unet_diffusion.training.module import DiffusionModule

        return cls(DiffusionModule, ImageDataModule, SampleGrid)


class RunParser(LightningArgumentParser):
    """Lightning's parser, with errors of a line and a help that begins with what people set."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As jsonargparse calls it.

        Raises:
            UsageError: always.
        """
        raise UsageError(in_short(message, self._option_string_actions)) from ex

    def format_help(self, *args: Any) -> str:
        if self.usage is None and any("trainer.max_steps" in _names(group) for group in self._action_groups):
            self._put_in_order()
            command = self.prog.split()[-1]
            options = "--config RECIPE [--config FILE] [--OPTION VALUE] ... [--allow MODULE]"
            self.usage = f"unet-diffusion {command} {options}"
            self.epilog = "--allow MODULE lets the configuration name classes and functions of a module of your own."
        return super().format_help(*args)

    def _put_in_order(self) -> None:
        """Sorts the sections of the help; the trainer's options that few set come last and in brief."""
        groups: Any = self._action_groups
        (trainer,) = (group for group in groups if "trainer.max_steps" in _names(group))
        common = [action for action in trainer._group_actions if (*action.dest.split("."), "")[1] in COMMON]
        rare = self.add_argument_group("The trainer's other options")
        rare._group_actions = [action for action in trainer._group_actions if action not in common]
        trainer._group_actions = sorted(common, key=lambda action: COMMON.index((*action.dest.split("."), "")[1]))
        for action in rare._group_actions:
            action.help = re.split(r"\.\s|\n\s*\n", (action.help or "").strip())[0]
        groups.sort(
            key=lambda group: max((HELP_ORDER.index(name) for name in _names(group) if name in HELP_ORDER), default=0)
        )
        groups.append(groups.pop(groups.index(rare)))


def _names(group: Any) -> list[str]:
    return [action.dest for action in group._group_actions]


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole configuration to run folder/config.yaml, and tells it to the loggers.

    Speed and precision that were left to the machine stand there as it chose them.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: the machine has not chosen."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.trainer.precision == AUTO:
            self.config.trainer.precision = trainer.precision
        if self.config.model.get("speed") == AUTO:
            self.config.model.speed = pl_module.chosen_speed
        settings = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        kept = {key: settings[key] for key in (*WHAT_IS_TRAINED, "ckpt_path")}
        self.kept_settings = {**kept, "trainer": _of_steps(settings["trainer"])}
        # They go out with the exported pipeline: what was trained and how, and no paths of this machine.
        wanted = {key: settings[key] for key in ("seed_everything", "model", "data", "trainer")}
        wanted["trainer"] = {key: value for key, value in wanted["trainer"].items() if key != "logger"}
        pl_module.settings = _without(wanted, PATHS)
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint knows the settings that it was trained with: config.yaml may be edited to start another run."""
        checkpoint[RUN_SETTINGS] = self.kept_settings

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_unset=False)
        with atomic_write(run_folder(trainer) / "config.yaml") as partial:
            partial.write_text(f"{RUN_HEADER}\n{text}", encoding="utf-8")
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))


class TrainingCLI(OpenCLI):
    """Lightning's command line with this project's callbacks, run folder and last step: the exported pipeline.

    Args:
        task: what is trained; one of TASKS.
        modules: Modules of the user's own that the configuration may name.
        options: those of LightningCLI.
    """

    goes_on_by_itself = False  # from a checkpoint that was found in the run folder, and not asked for
    writes = True  # into the run folder, which it claims

    def __init__(self, task: str, modules: Sequence[str], **options: Any):
        self.modules = modules
        self.task, self.pictures = task, Task.named(task).pictures
        self.claimed: ClaimedFolder | None = None  # the run folder, on the first process
        try:
            super().__init__(Task.named(task).module, Task.named(task).data, **options)
        except BaseException as error:
            if (
                self.claimed
                and isinstance(error, Exception)
                and not (hasattr(self, "trainer") and self.trainer.global_step)
            ):
                self.claimed.clear()  # nothing was trained
            kill = killer_of_processes(self.trainer) if hasattr(self, "trainer") else None
            if kill is not None:
                # The other processes would wait for this one. Last, as Lightning ends this one soon after another.
                atexit.register(kill, signal.SIGKILL)
            if not isinstance(error, RuntimeError | MemoryError) or not is_out_of_memory(error):
                raise
            batch_size = getattr(getattr(self, "datamodule", None), "batch_size", None)
            accumulated = self.trainer.accumulate_grad_batches if hasattr(self, "trainer") else 1
            precision = smaller_precision(self.trainer) if hasattr(self, "trainer") else None
            raise MemoryError(memory_advice(error, batch_size, accumulated, precision)) from error
        finally:
            if self.claimed:
                self.claimed.close()

    @classmethod
    def run(cls, arguments: FitArguments) -> "TrainingCLI":
        """Parse and carry out `fit ...` or `validate ...`.

        Args:
            arguments: Those of the command, its name first, after `check_arguments`.

        Raises:
            ValueError: if the settings contradict each other.
            FileExistsError: if the run folder holds a run of other settings.
            MemoryError: if memory does not suffice.
            Interrupted: if a signal ended it.
        """
        _silence_what_is_meant()
        try:
            return cls._run(arguments)
        except SIGTERMException as error:  # before the first step, when Lightning has the signal
            raise Interrupted(signal.SIGTERM) from error
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning ends with status 1
                raise KeyboardInterrupt from None
            raise
        except (TypeError, ValueError) as error:
            if TRIED_ALL in str(error):  # of a class that refuses its arguments
                raise ValueError(in_short(str(error), [])) from error
            raise

    @classmethod
    def _run(cls, arguments: FitArguments) -> "TrainingCLI":
        refuse_names_but(arguments.modules)
        for name in arguments.data_classes:
            getattr(unet_diffusion.data, name)  # imports it
        return cls(
            arguments.task,
            arguments.modules,
            trainer_class=RunTrainer,
            subclass_mode_data=True,
            args=arguments.words,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"enable_model_summary": False},
            parser_class=RunParser,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders"}
        return {"fit": skipped, "validate": skipped}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--task", choices=TASKS, default="denoise", help="what is trained")
        parser.add_lightning_class_args(self.pictures, "samples")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "step_{step:07d}",
                             "checkpoint.auto_insert_metric_name": False,
                             "checkpoint.enable_version_counter": False})  # fmt: skip

    def check_checkpoint(self) -> None:
        """Refuse a checkpoint that could run code.

        Raises:
            ValueError: If it could, or is not a checkpoint of a run.
        """
        config = self.config[self.config.subcommand]
        if config.weights_only is False:
            raise ValueError("weights_only must be true, got false, which lets a file run code; leave it out")
        if config.ckpt_path in FINDS_CHECKPOINTS:
            files = sorted((_root(config) / CHECKPOINTS).glob("*.ckpt"))
        else:
            files = [Path(config.ckpt_path)] if config.ckpt_path else []
        for file in files:
            checkpoint = load_plain(file)
            if not (isinstance(checkpoint, dict) and "pytorch-lightning_version" in checkpoint):
                raise ValueError(f"{file} must be a checkpoint of a run of fit, or made by import, and is neither")
            with explained(file, "run"):
                check_weights(checkpoint.get("state_dict"))

    def before_instantiate_classes(self) -> None:
        check_settings(self.config, self.modules)
        config = self.config[self.subcommand]
        root = _root(config)
        config.trainer.default_root_dir = str(root)
        self.written = self.config.clone()  # what config.yaml holds: the paths below follow from the run folder
        config.trainer.logger = _loggers(config.trainer.logger, root)
        check_written(config, root)
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(root / CHECKPOINTS)
        if config.trainer.fast_dev_run:
            config.checkpoint.save_last = False  # Lightning would write it at the end all the same
        elif self.subcommand == "fit":
            _check_run_folder(root)
            _refuse_images_in(config.data, root)
            config.ckpt_path = self._checkpoint_to_go_on_from(root)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.config = self.written
        settings = self.setting(self.config, "trainer")
        # Lightning refuses a bar that is turned off, and rates that nobody logs.
        bar = [] if settings.enable_progress_bar is False else [RunProgressBar()]
        rates = [] if settings.logger is False else [LearningRateMonitor()]
        watching = [DataSummary(), NameStalled(), SkipBadSteps(), CountReplaced(), StopOnSignal()]
        self.trainer_defaults["callbacks"] = [*bar, *rates, *watching]
        if settings.benchmark is None and not settings.deterministic:
            kwargs["benchmark"] = True  # cuDNN tries convolutions, whose shapes are the same in each step
        made = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit" and made.is_global_zero and not settings.fast_dev_run and self.writes:
            self.claimed = ClaimedFolder(Path(settings.default_root_dir))
        made.strategy.checkpoint_io = WholeCheckpoints()
        leave_requeue_to_callbacks(made)
        shard_over_all_processes(made)
        return made

    def _settings(self) -> dict[str, Any]:
        """All settings as plain values, as config.yaml has them."""
        return yaml.safe_load(self.parser.dump(self.written, skip_unset=False))[self.subcommand]

    def _checkpoint_to_go_on_from(self, root: Path) -> str | None:
        """The one asked for, or the newest good one of a run of these settings in the folder, or None.

        Raises:
            FileExistsError: if the folder holds a run of other settings.
            ValueError: if all its checkpoints are damaged.
        """
        asked = self.written[self.subcommand].ckpt_path
        if asked and (not Path(asked).is_file() or root.resolve() in Path(asked).resolve().parents):
            return asked  # one of its own, or a word of Lightning's, like last
        found = newest_good(root / CHECKPOINTS)
        if found is None:
            return asked
        path, step = found
        before = load_plain(path).get(RUN_SETTINGS)
        if before is None:
            raise FileExistsError(
                f"{root} holds a run whose checkpoint does not say its settings; train it on by --ckpt_path {path}, or "
                "start another with --trainer.default_root_dir DIR"
            )
        _refuse_other_settings(root, before, self._settings())
        changed = _differences(_of_steps(before.get("trainer")), _of_steps(self._settings()["trainer"]), "trainer")
        if changed:
            rank_zero_warn(f"{root} goes on with other settings than it had: {'; '.join(changed)}")
        self.goes_on_by_itself = True
        rank_zero_info(f"{root} holds this run; it goes on from step {step} ({path.name})")
        return str(path)

    def after_instantiate_classes(self) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                start_wandb_run(logger, run_folder(self.trainer))

    def before_fit(self) -> None:
        if isinstance(self.datamodule, KnownImages):
            self.datamodule.must_be_same = self.goes_on_by_itself
        _check_monitors(self.trainer, self.model.logged)
        if self.task != "segment" and self.trainer.is_global_zero:
            name = "autoencoder" if self.task == "autoencode" else "pipeline"
            check_replaceable(run_folder(self.trainer).resolve() / name, overwrite=True)
        self.model.is_continued = _has_checkpoint(run_folder(self.trainer), self.config_init.fit.ckpt_path)

    def after_fit(self) -> None:
        if self.trainer.state.status != TrainerStatus.FINISHED or self.config.fit.trainer.fast_dev_run:
            return
        if self.task == "autoencode":  # on all processes: what is exported is of the last weights
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        folder = run_folder(self.trainer)
        if not self.trainer.strategy.broadcast((folder / "samples.png").exists()):
            # A run that had all its steps was killed before that.
            self.setting(self.config_init, "samples").on_train_end(self.trainer, self.model)
        if self.trainer.is_global_zero:
            rank_zero_info(f"{folder} holds samples.png, {CHECKPOINTS}/ and {self._hand_over(folder)}")

    def _hand_over(self, folder: Path) -> str:
        """Exports what has a counterpart in diffusers, and says what a user would do next."""
        if self.task == "segment":
            return f"logs/; to segment: unet-diffusion segment {folder} IMAGES --output DIR"
        from unet_diffusion.diffusers_io.exporting import why_not_exported

        if self.task == "autoencode":
            self.model.trained.export(folder / "autoencoder", overwrite=True)
            return "autoencoder/, which diffusers loads"
        # A network that was shared out is whole in its checkpoint only.
        trained = read_denoiser(folder / CHECKPOINTS / LAST) if self.model.is_sharded else self.model.trained
        if why_not_exported(trained):  # export says it to whoever asks for a pipeline
            return f"logs/; to draw images: unet-diffusion sample {folder} --output DIR"
        trained.export(folder / "pipeline", overwrite=True)
        return "pipeline/, which diffusers loads"


class BuildOnly(TrainingCLI):
    """fit, but it ends when everything is built: nothing is trained or written."""

    writes = False

    def before_instantiate_classes(self) -> None:
        check_settings(self.config, self.modules)
        self.config[self.subcommand].trainer.logger = False
        self.written = self.config.clone()

    def carry_out(self, subcommand: str) -> None:
        """Do nothing."""


def _silence_what_is_meant() -> None:
    """Hides Lightning's warnings about things that are as they should be here."""
    for message in (
        "LightningCLI's args parameter is intended",
        r"Found \d+ module\(s\) in eval mode",  # the averaged network
        "Using ModelCheckpoint with manual optimization",  # of GANs with steps of several optimisers
        "Checkpoint directory .* exists and is not empty",  # a run goes on
        "The number of training batches .* is smaller than the logging interval",  # steps are counted, not epochs
        ".*does not have many workers",  # the images are in memory
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", message)


def _check_run_folder(root: Path) -> None:
    """Refuse a folder in which training would replace files that no run has written.

    Raises:
        FileExistsError: If it holds such.
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


def _refuse_images_in(data: Any, root: Path) -> None:
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


def check_settings(config: Any, modules: Sequence[str]) -> None:
    """Refuse what a configuration may not name, and numbers that Lightning takes without doing what they say.

    Args:
        config: All settings, of a command.
        modules: Modules of the user's own that it may name.

    Raises:
        ValueError: If there is one.
    """
    check_names(config, modules)
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


def _check_monitors(trainer: Trainer, logged: Sequence[str]) -> None:
    """Refuse callbacks that wait for what is never logged: Lightning finds out after an epoch, or not at all.

    Raises:
        ValueError: If there is one.
    """
    for callback in callbacks_of(trainer):
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and monitor not in logged:
            similar = did_you_mean(monitor, logged)
            raise ValueError(
                f"monitor of {type(callback).__name__} must be one of {', '.join(logged)}, got {monitor!r}{similar}"
            )


def _root(config: Any) -> Path:
    """The run folder that the settings of a command name."""
    return Path(config.trainer.default_root_dir or "runs/unnamed").expanduser()


def _has_checkpoint(root: Path, ckpt_path: Any) -> bool:
    """Whether there is one to continue from: with a word of Lightning's and no checkpoint, a run starts afresh."""
    return bool(ckpt_path) and (Path(ckpt_path).is_file() or any((root / CHECKPOINTS).glob("*.ckpt")))


def _without(settings: Any, keys: set[str]) -> Any:
    """Nested settings without these keys, wherever they are, unless there are settings below them."""
    if not isinstance(settings, dict):
        return settings
    return {key: _without(value, keys) for key, value in settings.items() if key not in keys or isinstance(value, dict)}


def _of_steps(trainer: Any) -> dict[str, Any]:
    """Of the trainer's settings those that make other steps of the same images."""
    return {name: trainer.get(name) for name in STEP_SETTINGS} if isinstance(trainer, dict) else {}


def _refuse_other_settings(root: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises FileExistsError if the settings that a run had before train something else."""
    wanted = {key: settings[key] for key in WHAT_IS_TRAINED}
    if settings["ckpt_path"]:
        wanted["ckpt_path"] = settings["ckpt_path"]
    differ = _differences({key: before.get(key) for key in wanted}, wanted)
    if differ:
        more = f"; and {len(differ) - MAX_SHOWN} more" if differ[MAX_SHOWN:] else ""
        raise FileExistsError(
            f"{root} holds a run of other settings ({'; '.join(differ[:MAX_SHOWN])}{more}). "
            f"Train it on with these by --ckpt_path {root / CHECKPOINTS / LAST}, or start another with "
            "--trainer.default_root_dir DIR"
        )


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """A line for each nested setting that is not the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [line for key in keys for line in _differences(before.get(key), now.get(key), f"{name}.{key}")]
    name = name.lstrip(".")
    is_kept = name in LEFT_TO_THE_MACHINE and now == AUTO and before is not None  # what was chosen then is kept
    return [] if before == now or is_kept else [f"{name} was {before}, is {now}"]


def _loggers(wanted: Any, root: Path) -> Any:
    """The loggers asked for, writing into the run folder, after a CSV file that is always there."""
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
