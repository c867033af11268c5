"""The settings of a run: written into its folder and its checkpoints, and compared when the run is resumed."""

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.folder_settings import RUN_HEADER
from unet_diffusion.runtime.shareable import shareable, without_secrets
from unet_diffusion.training.callbacks import run_folder
from unet_diffusion.training.checkpointing import LAST
from unet_diffusion.training.resuming import differences

CHECKPOINTS = "checkpoints"  # folder in the run folder
RUN_SETTINGS = "run_settings"  # in a checkpoint: the settings that are compared when the run is resumed
WHAT_IS_TRAINED = ("task", "model", "data", "seed_everything")  # settings that a resumed run keeps
STEP_SETTINGS = ("devices", "num_nodes", "precision", "accumulate_grad_batches", "gradient_clip_val")
# The images that are left are compared with those that were trained on; modules that are allowed train nothing.
NOT_COMPARED = ("on_bad_file", "allow")
MAX_SHOWN = 5  # settings that differ
AUTO = "auto"
LEFT_TO_THE_MACHINE = (("model", "speed"), ("trainer", "precision"))  # by "auto"


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole configuration to config.yaml in the run folder, and logs it.

    Where speed and precision were left to the machine, the file has what the machine chose.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet: the machine has not chosen."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.config.trainer.precision == AUTO:
            self.config.trainer.precision = trainer.precision
        if self.config.model.get("speed") == AUTO:
            self.config.model.speed = pl_module.chosen_speed
        settings = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        kept = {key: settings[key] for key in (*WHAT_IS_TRAINED, "ckpt_path")}
        self.kept_settings = {**kept, "trainer": _of_steps(settings["trainer"])}
        # They go out with the exported pipeline.
        wanted = {key: settings[key] for key in ("seed_everything", "model", "data", "trainer")}
        wanted["trainer"] = {key: value for key, value in wanted["trainer"].items() if key != "logger"}
        for name in {"base", "init_from"} & wanted["model"].keys():  # names on the hub are kept whole
            wanted["model"][name] = getattr(pl_module, name)
        pl_module.settings = shareable(wanted)
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, "fit")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the settings in the checkpoint: the user may edit config.yaml to start another run."""
        checkpoint[RUN_SETTINGS] = self.kept_settings

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_unset=False)
        with atomic_write(run_folder(trainer) / "config.yaml") as partial:
            partial.write_text(f"{RUN_HEADER}\n{text}", encoding="utf-8")
        for logger in trainer.loggers:
            logger.log_hyperparams(without_secrets(yaml.safe_load(text)))


def run_root(config: Any) -> Path:
    """The run folder that the settings of a command name."""
    return Path(config.trainer.default_root_dir or "runs/unnamed").expanduser()


def has_checkpoint(root: Path, ckpt_path: Any) -> bool:
    """Whether there is a checkpoint to continue from; a word of Lightning's, such as last, may name none."""
    return bool(ckpt_path) and (Path(ckpt_path).is_file() or any((root / CHECKPOINTS).glob("*.ckpt")))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that differs; speed and precision stay as they were where they are "auto" now.

    Args:
        before: The settings of the run so far.
        now: The settings of today.
    """
    for section, name in LEFT_TO_THE_MACHINE:
        old, new = before.get(section) or {}, now.get(section) or {}
        if new.get(name) == AUTO and old.get(name) is not None:
            now = {**now, section: {**new, name: old[name]}}
    return differences(before, now, but=NOT_COMPARED)


def step_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that differs and makes other steps of the same images."""
    return changes({"trainer": _of_steps(before.get("trainer"))}, {"trainer": _of_steps(now["trainer"])})


def refuse_other_settings(root: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse to continue a run with settings that train something else.

    Args:
        root: The run folder.
        before: The settings in the run's checkpoint.
        settings: The settings of today.

    Raises:
        FileExistsError: If they differ; it names them.
    """
    wanted = {key: settings[key] for key in WHAT_IS_TRAINED}
    if settings["ckpt_path"]:
        wanted["ckpt_path"] = settings["ckpt_path"]
    differ = changes({key: before.get(key) for key in wanted}, wanted)
    if differ:
        more = f"; and {len(differ) - MAX_SHOWN} more" if differ[MAX_SHOWN:] else ""
        raise FileExistsError(
            f"{root} holds a run of other settings ({'; '.join(differ[:MAX_SHOWN])}{more}). "
            f"Continue it with these by --ckpt_path {root / CHECKPOINTS / LAST}, or start another with "
            "--trainer.default_root_dir DIR"
        )


def _of_steps(trainer: Any) -> dict[str, Any]:
    """The settings of a trainer that make other steps of the same images."""
    return {name: trainer.get(name) for name in STEP_SETTINGS} if isinstance(trainer, dict) else {}
