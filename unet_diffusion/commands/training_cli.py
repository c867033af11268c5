"""fit and validate: Lightning's command line around the modules and the data modules.

What is trained is the configuration's `task`: "denoise", the default, "adapt", "segment" or "autoencode".

The run folder is `trainer.default_root_dir`. A run leaves there config.yaml, logs/, samples/ and samples.png,
checkpoints/ and the exported pipeline/ or autoencoder/. The same command again continues from the last checkpoint that
is whole. A folder with a run of other settings is refused, unless --ckpt_path names a checkpoint to continue from.
"""

import atexit
import logging
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

import unet_diffusion.data
from unet_diffusion.commands.fit_arguments import FINDS_CHECKPOINTS, TASKS, FitArguments
from unet_diffusion.commands.named_classes import check_written, refuse_names_but
from unet_diffusion.commands.parser_errors import TRIED_ALL, in_short
from unet_diffusion.commands.run_loggers import loggers_of
from unet_diffusion.commands.run_parser import RunParser
from unet_diffusion.commands.run_rules import check_monitors, check_run_folder, check_settings, refuse_images_in
from unet_diffusion.commands.run_settings import (
    CHECKPOINTS,
    RUN_SETTINGS,
    SaveRunConfig,
    has_checkpoint,
    refuse_other_settings,
    run_root,
    step_changes,
)
from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.data.known import KnownImages
from unet_diffusion.data.segmentation import SegmentationDataModule
from unet_diffusion.data.stream import CountReplaced
from unet_diffusion.data.value_ranges import MEASURED, keep_range
from unet_diffusion.inference.reading import read_denoiser
from unet_diffusion.inference.record import explained
from unet_diffusion.inference.record_checks import check_weights
from unet_diffusion.runtime.atomic_files import check_replaceable
from unet_diffusion.runtime.folder_settings import ClaimedFolder
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.runtime.safe_loading import load_plain
from unet_diffusion.runtime.signals import Interrupted
from unet_diffusion.training.base import NetworkModule
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
from unet_diffusion.training.evaluating import EvaluateSamples
from unet_diffusion.training.health import SkipBadSteps, is_out_of_memory, memory_advice
from unet_diffusion.training.lightning_internals import (
    OpenCLI,
    killer_of_processes,
    leave_requeue_to_callbacks,
    shard_over_all_processes,
)
from unet_diffusion.training.planning import FirstLook
from unet_diffusion.training.precision import RunTrainer, smaller_precision
from unet_diffusion.training.stalled import NameStalled
from unet_diffusion.training.stopping import StopOnSignal
from unet_diffusion.training.wandb_run import RunWandbLogger, start_wandb_run


@dataclass(frozen=True)
class Task:
    """The classes of the module, the data and the pictures of a run."""

    module: type[NetworkModule]
    data: type[LightningDataModule]
    pictures: type[PictureGrid]

    @classmethod
    def named(cls, name: str) -> "Task":
        """The task of that name, one of TASKS; only its own module is imported, because diffusers takes seconds."""
        if name == "segment":
            from unet_diffusion.training.segmentation import SegmentationModule

            return cls(SegmentationModule, SegmentationDataModule, SegmentationGrid)
        if name == "autoencode":
            from unet_diffusion.training.autoencoder import AutoencoderModule

            return cls(AutoencoderModule, ImageDataModule, ReconstructionGrid)
        if name == "adapt":
            from unet_diffusion.training.adapting import AdapterModule

            return cls(AdapterModule, ImageDataModule, SampleGrid)
        from unet_diffusion.training.module import DiffusionModule

        return cls(DiffusionModule, ImageDataModule, SampleGrid)


class TrainingCLI(OpenCLI):
    """Lightning's command line with this project's callbacks, run folder and last step: the exported pipeline.

    Args:
        task: The name of the task, one of TASKS.
        modules: Modules of the user's own that the configuration may name.
        options: The options of LightningCLI.
    """

    resumes_by_itself = False  # whether the run continues from a checkpoint in the run folder that nobody asked for
    writes = True  # whether it writes into the run folder, which it then claims
    parser_class = RunParser

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
            raise MemoryError(self._memory_advice(error)) from error
        finally:
            if self.claimed:
                self.claimed.close()

    def _memory_advice(self, error: BaseException) -> str:
        batch_size = getattr(getattr(self, "datamodule", None), "batch_size", None)
        if not hasattr(self, "trainer"):
            return memory_advice(error, batch_size, 1, None)
        can_accumulate = self.model.automatic_optimization  # otherwise Lightning refuses it
        accumulated = self.trainer.accumulate_grad_batches if can_accumulate else None
        precision = smaller_precision(self.trainer, can_scale_losses=self.model.can_scale_losses)
        return memory_advice(error, batch_size, accumulated, precision)

    @classmethod
    def run(cls, arguments: FitArguments) -> "TrainingCLI":
        """Parse and carry out `fit ...` or `validate ...`.

        Args:
            arguments: The arguments of the command, its name first, after `check_arguments`.

        Raises:
            ValueError: If the settings contradict each other.
            FileExistsError: If the run folder holds a run of other settings.
            MemoryError: If memory does not suffice.
            Interrupted: If a signal ended it.
        """
        _silence_expected_messages()
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
            parser_class=cls.parser_class,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders"}
        return {"fit": skipped, "validate": skipped}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--task", choices=TASKS, default="denoise", help="The task that the network is trained for."
        )
        parser.add_lightning_class_args(self.pictures, "samples")
        if self.task in ("denoise", "adapt"):
            parser.add_lightning_class_args(EvaluateSamples, "evaluate")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "step_{step:07d}",
                             "checkpoint.auto_insert_metric_name": False,
                             "checkpoint.enable_version_counter": False})  # fmt: skip

    def check_checkpoint(self) -> None:
        """Refuse a checkpoint that could run code, or is of another task.

        Raises:
            ValueError: If it could, or is not a checkpoint of a run.
        """
        config = self.config[self.config.subcommand]
        if config.weights_only is False:
            raise ValueError("weights_only must be true, got false, which lets a file run code; leave it out")
        if config.ckpt_path in FINDS_CHECKPOINTS:
            files = sorted((run_root(config) / CHECKPOINTS).glob("*.ckpt"))
        else:
            files = [Path(config.ckpt_path)] if config.ckpt_path else []
        for file in files:
            checkpoint = load_plain(file)
            if not (isinstance(checkpoint, dict) and "pytorch-lightning_version" in checkpoint):
                raise ValueError(f"{file} must be a checkpoint of `fit` or of `import`, and is neither")
            with explained(file, "run"):
                check_weights(checkpoint.get("state_dict"))
            Task.named(self.task).module.record_in(checkpoint)

    def before_instantiate_classes(self) -> None:
        check_settings(self.config, self.modules)
        config = self.config[self.subcommand]
        root = run_root(config)
        config.trainer.default_root_dir = str(root)
        self.written = self.config.clone()  # what config.yaml holds: the paths below follow from the run folder
        config.trainer.logger = loggers_of(config.trainer.logger, root)
        check_written(config, root)
        if self.task == "adapt":
            config.model.allow = list(self.modules)
        config.checkpoint.dirpath = config.checkpoint.dirpath or str(root / CHECKPOINTS)
        if config.trainer.fast_dev_run:
            config.checkpoint.save_last = False  # Lightning would write it at the end all the same
        elif self.subcommand == "fit":
            check_run_folder(root)
            refuse_images_in(config.data, root)
            config.ckpt_path = self._checkpoint_to_resume_from(root)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.config = self.written
        settings = self.setting(self.config, "trainer")
        # Lightning refuses a bar that is turned off, and rates that nobody logs.
        bar = [] if settings.enable_progress_bar is False else [RunProgressBar()]
        rates = [] if settings.logger is False else [LearningRateMonitor()]
        watching = [DataSummary(), FirstLook(), NameStalled(), SkipBadSteps(), CountReplaced(), StopOnSignal()]
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

    def _checkpoint_to_resume_from(self, root: Path) -> str | None:
        """The checkpoint asked for, or the newest good one of a run of these settings in the folder, or None.

        Raises:
            FileExistsError: If the folder holds a run of other settings.
            ValueError: If all its checkpoints are damaged.
        """
        asked = self.written[self.subcommand].ckpt_path
        if asked and (not Path(asked).is_file() or root.resolve() in Path(asked).resolve().parents):
            return asked  # a checkpoint of the run itself, or a word of Lightning's, like last
        newest = newest_good(root / CHECKPOINTS)
        if newest is None:
            return asked
        path, step = newest
        before = load_plain(path).get(RUN_SETTINGS)
        if before is None:
            raise FileExistsError(
                f"{root} holds a run whose checkpoint does not say its settings; continue it with --ckpt_path {path}, "
                "or start another with --trainer.default_root_dir DIR"
            )
        refuse_other_settings(root, before, self._settings())
        changed = step_changes(before, self._settings())
        if changed:
            rank_zero_warn(f"{root} continues with other settings than it had: {'; '.join(changed)}")
        self.resumes_by_itself = True
        rank_zero_info(f"{root} holds this run; it continues from step {step} ({path.name})")
        return str(path)

    def after_instantiate_classes(self) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                start_wandb_run(logger, run_folder(self.trainer))

    def before_fit(self) -> None:
        if isinstance(self.datamodule, KnownImages):
            self.datamodule.must_be_same = self.resumes_by_itself
        self._keep_range()
        check_monitors(self.trainer, self.model.logged)
        if self.task != "segment" and self.trainer.is_global_zero:
            name = {"autoencode": "autoencoder", "adapt": "adapter"}.get(self.task, "pipeline")
            check_replaceable(run_folder(self.trainer).resolve() / name, overwrite=True)
        self.model.is_continued = has_checkpoint(run_folder(self.trainer), self.config_init.fit.ckpt_path)

    def before_validate(self) -> None:
        self._keep_range()

    def _keep_range(self) -> None:
        """Have a measured range of values be that of the checkpoint: new images do not change what was learnt."""
        if getattr(getattr(self.datamodule, "source", None), "value_range", None) != MEASURED:
            return
        asked = self.config_init[self.subcommand].ckpt_path
        if asked in FINDS_CHECKPOINTS:
            asked, _ = newest_good(run_folder(self.trainer) / CHECKPOINTS) or (None, 0)
        if asked and Path(asked).is_file():
            record = Task.named(self.task).module.record_in(load_plain(Path(asked)))
            keep_range(self.datamodule, PixelValues.from_plain(record["values"]))

    def after_fit(self) -> None:
        if self.trainer.state.status != TrainerStatus.FINISHED or self.config.fit.trainer.fast_dev_run:
            return
        if self.task == "autoencode":  # on all processes: the export holds the scale of the last weights' latents
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        folder = run_folder(self.trainer)
        if not self.trainer.strategy.broadcast((folder / "samples.png").exists()):
            # An earlier run had all its steps, and was killed before it drew them.
            self.setting(self.config_init, "samples").on_train_end(self.trainer, self.model)
        if self.trainer.is_global_zero:
            rank_zero_info(f"{folder} holds samples.png, {CHECKPOINTS}/ and {self._export(folder)}")

    def _export(self, folder: Path) -> str:
        """Export the model if diffusers has a counterpart; return a text that says what to do next."""
        if self.task == "segment":
            return f"logs/; to segment: unet-diffusion segment {folder} IMAGES --output DIR"
        if self.task == "adapt":
            from unet_diffusion.diffusers_io.adapter_files import why_adapter_not_exported

            adapted = self.model.trained
            if why_adapter_not_exported(adapted):  # export says it to whoever asks for an adapter
                return self._how_to_sample(folder)
            adapted.export(folder / "adapter", format="adapter", overwrite=True)
            return "adapter/, which the base's pipeline of diffusers loads"
        from unet_diffusion.diffusers_io.exporting import why_not_exported

        if self.task == "autoencode":
            self.model.trained.export(folder / "autoencoder", overwrite=True)
            return "autoencoder/, which diffusers loads"
        # A network that is shared out over processes is whole in its checkpoint only.
        trained = read_denoiser(folder / CHECKPOINTS / LAST) if self.model.is_sharded else self.model.trained
        if why_not_exported(trained):  # export says it to whoever asks for a pipeline
            return self._how_to_sample(folder)
        trained.export(folder / "pipeline", overwrite=True)
        return "pipeline/, which diffusers loads"

    def _how_to_sample(self, folder: Path) -> str:
        allowed = "".join(f" --allow {module}" for module in self.modules)
        return f"logs/; to draw images: unet-diffusion sample {folder}{allowed} --output DIR"


class BuildOnly(TrainingCLI):
    """`fit` that ends when everything is built: it trains and writes nothing."""

    writes = False

    def before_instantiate_classes(self) -> None:
        check_settings(self.config, self.modules)
        self.config[self.subcommand].trainer.logger = False
        self.written = self.config.clone()

    def carry_out(self, subcommand: str) -> None:
        """Do nothing."""


def _silence_expected_messages() -> None:
    """Hide Lightning's advertisements, and its warnings about things that are as they should be here."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for message in (
        "LightningCLI's args parameter is intended",
        r"Found \d+ module\(s\) in eval mode",  # the averaged network
        "Using ModelCheckpoint with manual optimization",  # of GANs with steps of several optimisers
        "Checkpoint directory .* exists and is not empty",  # a run is resumed
        "The number of training batches .* is smaller than the logging interval",  # steps are counted, not epochs
        ".*does not have many workers",  # the images are in memory
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
    ):
        warnings.filterwarnings("ignore", message)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()
