"""import: a diffusers pipeline or a file of weights becomes a checkpoint, and the configuration of its network."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet_diffusion.commands.arguments import Checkpoint, Folder, Normalization, Pipeline, PredictionType, check_exists
from unet_diffusion.runtime.addresses import is_hub_name
from unet_diffusion.runtime.messages import UsageError

if TYPE_CHECKING:
    from unet_diffusion.diffusion.parts import DenoiserParts


def import_pipeline(
    pipeline: Pipeline,
    checkpoint: Checkpoint,
    *,
    tokenizer: Folder | None = None,
    prediction_type: PredictionType | None = None,
    image_size: int | None = None,
    num_heads: int | None = None,
    head_channels: int | None = None,
    scaling_factor: float | None = None,
    num_classes: int | None = None,
    normalization: Normalization | None = None,
    revision: str | None = None,
) -> None:
    """Make a checkpoint from a diffusers pipeline folder, or from one file of another program's weights.

        unet-diffusion import pipeline imported/first.ckpt

    The pipeline may be an exported one or one such as Stable Diffusion 1. Beside the checkpoint the command writes the
    configuration of its network, so that training continues from it:

        unet-diffusion fit --config RECIPE --config imported/first.yaml --ckpt_path imported/first.ckpt

    A file has the layout of latent diffusion, of Stable Diffusion, or of a U-Net for segmentation with the names inc,
    down1, up1 and outc. It does not say all of its model. The options say it; without them it is as in the published
    models of its layout, and printed.

    A folder may also be one that save_pretrained of segmentation_models_pytorch's Unet wrote.

    A name such as owner/name is a model on the hub, which is downloaded into its cache. Of several files of weights
    there, hf://owner/name/file.safetensors names one.

    Args:
        pipeline: The diffusers pipeline folder, the file of weights, or the model on the hub to read.
        checkpoint: The .ckpt file to make.
        tokenizer: The folder of CLIP's tokenizer, for a file of a model of captions.
        prediction_type: What the network in a file predicts.
        image_size: The side of the images in pixels of a model in a file, or of the tiles of a segmenter.
        num_heads: The number of attention heads of a network in a file.
        head_channels: The channels of each attention head of a network in a file, in place of num_heads.
        scaling_factor: The factor that brings the latents of a model in a file to unit variance.
        num_classes: The number of classes of a model of classes in a file; one row more of its embedding is the null.
        normalization: What a network of segmentation_models_pytorch was trained on: "unit" for images in [0, 1],
            "imagenet" for these normalised by ImageNet's mean and deviation.
        revision: The branch, tag or commit of a model on the hub.

    Raises:
        UsageError: If the checkpoint has the name of the configuration.
        FileNotFoundError: If there is no such folder or file, or the hub cannot be reached.
        FileExistsError: If one of the two files exists.
        ValueError: If the pipeline has parts that are not supported, or the layout of the file is not known.
    """
    if not is_hub_name(pipeline):
        check_exists("PIPELINE", pipeline)
    from unet_diffusion.inference.denoiser import Denoiser
    from unet_diffusion.inference.loading import is_checkpoint, is_single_file, load, local_model

    recipe = checkpoint.with_suffix(".yaml")
    if recipe == checkpoint:
        raise UsageError(f"CHECKPOINT must not end in .yaml, as the configuration beside it does, got {recipe}; "
                         "name it .ckpt")  # fmt: skip
    if recipe.exists():
        raise FileExistsError(f"{recipe} exists and is not overwritten; choose another path, or remove it")
    model_path = local_model(pipeline, revision)
    is_file = is_single_file(model_path)
    if not is_file and is_checkpoint(model_path):
        raise UsageError(f"{pipeline} is a checkpoint already; train on from it with fit --ckpt_path")
    model = load(
        model_path,
        tokenizer=tokenizer,
        prediction_type=prediction_type,
        image_size=image_size,
        num_heads=num_heads,
        head_channels=head_channels,
        scaling_factor=scaling_factor,
        num_classes=num_classes,
        normalization=normalization,
    )
    model.save(checkpoint)
    if not isinstance(model, Denoiser):
        print(f"{checkpoint} holds the model: {model}")
        return
    if is_file:
        _say_what_was_assumed(Path(model_path), model)
    _write_settings(model, recipe)
    print(f"{checkpoint} continues with: unet-diffusion fit --config RECIPE --config {recipe} --ckpt_path {checkpoint}")


def _say_what_was_assumed(file: Path, parts: "DenoiserParts") -> None:
    from unet_diffusion.diffusers_io.single_file.importing import assumptions

    print(assumptions(file, parts))


def _write_settings(parts: "DenoiserParts", recipe: Path) -> None:
    import yaml

    recipe.write_text(yaml.safe_dump(_settings(parts), sort_keys=False), encoding="utf-8")


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
