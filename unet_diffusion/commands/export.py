"""export: a checkpoint becomes a folder that diffusers loads, or one file of weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from unet_diffusion.commands.arguments import Checkpoint, Folder, check_exists
from unet_diffusion.runtime.messages import UsageError

if TYPE_CHECKING:
    from unet_diffusion.inference.autoencoder import Autoencoder
    from unet_diffusion.inference.denoiser import Denoiser
    from unet_diffusion.inference.segmenter import Segmenter

Format = Literal["pipeline", "adapter", "onnx", "torch"]  # those of `denoiser.py`, which imports PyTorch


def export(
    checkpoint: Checkpoint,
    folder: Folder,
    *,
    format: Format = "pipeline",
    overwrite: bool = False,
    autoencoder: Folder | None = None,
    allow: Annotated[list[str], "MODULE"] | None = None,
    push_to_hub: Annotated[str, "OWNER/NAME"] | None = None,
    license: str | None = None,
    private: bool = False,
) -> None:
    """Write a checkpoint as a diffusers pipeline folder, as one file of weights, or for ONNX or torch.export.

        unet-diffusion export runs/digits pipeline

    The folder loads with diffusers, without this package. It is loaded again and compared with the checkpoint before
    the command ends. Where no pipeline of diffusers draws the same images, the folder holds the code of one that does.
    A checkpoint of an autoencoder becomes an autoencoder of diffusers. That of a segmenter becomes a folder with
    config.json and model.safetensors, which this package loads.

    A name that ends in .safetensors makes one file in the layout of latent diffusion or Stable Diffusion, without the
    tokenizer of captions:

        unet-diffusion export runs/latents model.safetensors

    --push_to_hub makes a model on the Hugging Face Hub of the folder, whose card has the training's settings, and the
    figures and samples of the run. Log in before with `hf auth login`.

        unet-diffusion export runs/digits pipeline --push_to_hub owner/name --license apache-2.0

    Args:
        checkpoint: The .ckpt file, run folder or diffusers pipeline folder to read.
        folder: The folder to make, or the .safetensors file.
        format: What to write: "pipeline" is the whole model, "adapter" what was trained on a frozen base, such as a
            LoRA, which the base's pipeline of diffusers loads. "onnx" and "torch" are networks alone, for any batch and
            size: of a segmenter, of a denoiser and its decoder of latents, or the decoder of an autoencoder.
        overwrite: Replace the folder or the file if it is an earlier export.
        autoencoder: The folder of the autoencoder of a denoiser of latents, if it is not where it was in training.
        allow: The modules of your own, or of somebody you trust, that the checkpoint may name.
        push_to_hub: The name of the model on the hub, which is made if it is not there.
        license: The licence of the model on the hub, in its words, such as apache-2.0.
        private: Make the model on the hub a private one.

    Raises:
        UsageError: If an option for the hub has no model there, or if what is to be pushed is not a whole folder.
        FileNotFoundError: If there is no such checkpoint, or the hub cannot be reached.
        FileExistsError: If the folder exists and is not to be replaced, or holds other files.
        ValueError: If diffusers has no counterpart of the network.
    """
    check_exists("CHECKPOINT", checkpoint)
    _check_push(folder, format, push_to_hub, license, private=private)
    from unet_diffusion.inference.denoiser import Denoiser
    from unet_diffusion.inference.loading import load

    model = load(checkpoint, allow=allow or (), autoencoder=autoencoder)
    if format == "adapter" and not isinstance(model, Denoiser):
        raise ValueError(f"{checkpoint} holds no denoiser, and adapters are of denoisers; leave out --format")
    model.export(folder, format=format, overwrite=overwrite)  # type: ignore[arg-type]  # "adapter" is of denoisers
    print(_said_of(model, folder, format))
    if push_to_hub is not None:
        from unet_diffusion.diffusers_io.publishing import publish

        run = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint
        try:
            print(f"pushed to {publish(folder, push_to_hub, run=run, licence=license, private=private)}")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}. {folder} is exported; the same command with --overwrite pushes it"
            ) from error


def _said_of(model: "Denoiser | Segmenter | Autoencoder", folder: Path, format: str) -> str:
    """A line about what was exported."""
    from unet_diffusion.inference.autoencoder import Autoencoder
    from unet_diffusion.inference.segmenter import Segmenter
    from unet_diffusion.runtime.tensor_files import is_single_file_name

    if is_single_file_name(folder):
        return f"{folder} holds the weights; read again, they are the same. {_how_to_import(model, folder)}"
    if format == "adapter":
        return f"{folder} holds the adapter; the pipeline of its base loads it"
    if format != "pipeline":
        return f"{folder} holds what was exported; tried at another size, it gives the same output"
    if isinstance(model, Segmenter):
        return f"{folder} holds the segmenter; read again, it is the same"
    kind = "autoencoder" if isinstance(model, Autoencoder) else "pipeline"
    return f"{folder} holds the {kind}; loaded again with diffusers, it gives the same output"


def _check_push(folder: Path, format: str, name: str | None, licence: str | None, *, private: bool) -> None:
    """Refuse options that do not fit, before seconds are spent."""
    from unet_diffusion.diffusers_io.publishing import check_licence
    from unet_diffusion.runtime.hub import check_hub_name
    from unet_diffusion.runtime.tensor_files import check_format, is_single_file_name

    check_format(folder, format, get_args(Format))
    if name is None:
        if licence is not None or private:
            raise UsageError("--license and --private are for --push_to_hub; add it, or leave them out")
        return
    check_hub_name(name)
    check_licence(licence)
    if format != "pipeline":
        raise UsageError(f"--push_to_hub pushes whole models, got --format {format}; leave one of the two out")
    if is_single_file_name(folder):
        raise UsageError(f"--push_to_hub pushes a folder, got {folder}; give a name without .safetensors")


def _how_to_import(model: "Denoiser | Segmenter | Autoencoder", file: Path) -> str:
    """The command that imports a file."""
    takes_captions = any(condition.batch_key == "captions" for condition in getattr(model, "all_conditions", ()))
    return f"It is read by: unet-diffusion import {file} CHECKPOINT{' --tokenizer DIR' if takes_captions else ''}"
