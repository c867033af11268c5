"""import: a diffusers pipeline becomes a checkpoint to train on, and the configuration of its network."""

from typing import TYPE_CHECKING, Any

from unet_diffusion.commands.arguments import Checkpoint, Folder, check_exists
from unet_diffusion.runtime.messages import UsageError

if TYPE_CHECKING:
    from unet_diffusion.diffusion.parts import DenoiserParts


def import_pipeline(folder: Folder, checkpoint: Checkpoint) -> None:
    """Make a checkpoint from a diffusers pipeline folder.

        unet-diffusion import pipeline imported/first.ckpt

    The pipeline may be an exported one or one such as Stable Diffusion 1. Beside the checkpoint the command writes the
    configuration of its network, so that training continues from it:

        unet-diffusion fit --config RECIPE --config imported/first.yaml --ckpt_path imported/first.ckpt

    Args:
        folder: The diffusers pipeline folder to read.
        checkpoint: The .ckpt file to make.

    Raises:
        UsageError: If the checkpoint has the name of the configuration.
        FileNotFoundError: If there is no such folder.
        FileExistsError: If one of the two files exists.
        ValueError: If the pipeline has parts that are not supported.
    """
    check_exists("DIR", folder)
    import yaml

    from unet_diffusion.diffusers_io import importing
    from unet_diffusion.inference.record import save_denoiser

    recipe = checkpoint.with_suffix(".yaml")
    if recipe == checkpoint:
        raise UsageError(f"CHECKPOINT must not end in .yaml, as the configuration beside it does, got {recipe}; "
                         "name it .ckpt")  # fmt: skip
    if recipe.exists():
        raise FileExistsError(f"{recipe} exists and is not overwritten; choose another path, or remove it")
    trained = importing.import_pipeline(folder)
    save_denoiser(trained, checkpoint)
    recipe.write_text(yaml.safe_dump(_settings(trained), sort_keys=False), encoding="utf-8")
    print(f"{checkpoint} continues with: unet-diffusion fit --config RECIPE --config {recipe} --ckpt_path {checkpoint}")


def _settings(trained: "DenoiserParts") -> dict[str, Any]:
    """The settings of `fit` that make a network of this kind."""
    from unet_diffusion.diffusers_io.importing import DROPOUT
    from unet_diffusion.inference.record import denoiser_record

    record = denoiser_record(trained)
    schedule = {"class_path": "unet_diffusion.diffusion.schedule.NoiseSchedule", "init_args": trained.schedule.config}
    settings: dict[str, Any] = {"model": {"unet": record["unet"], "schedule": schedule}}
    if trained.conditions:
        settings["model"]["conditions"] = record["conditions"]
    if trained.null_label is not None:
        settings["model"]["label_dropout"] = DROPOUT
    if (space := trained.codec.space) is not None and space.scaling_factor is not None:
        scale = {"init_args": {"scaling_factor": space.scaling_factor}}
        if any(condition.provides for condition in trained.all_conditions):  # such a denoiser is trained on images
            settings["model"]["codec"] = scale
        else:
            settings["data"] = {"init_args": {"source": scale}}
    return settings
