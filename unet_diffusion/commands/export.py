"""export: a checkpoint becomes a folder that diffusers loads, or one file of weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unet_diffusion.commands.arguments import Checkpoint, Folder, check_exists

if TYPE_CHECKING:
    from unet_diffusion.inference.autoencoder import Autoencoder
    from unet_diffusion.inference.denoiser import Denoiser
    from unet_diffusion.inference.segmenter import Segmenter


def export(
    checkpoint: Checkpoint,
    folder: Folder,
    *,
    overwrite: bool = False,
    autoencoder: Folder | None = None,
    allow: Annotated[list[str], "MODULE"] | None = None,
) -> None:
    """Write a checkpoint as a diffusers pipeline folder, or as one file of weights.

        unet-diffusion export runs/digits pipeline

    The folder loads with diffusers, without this package. It is loaded again and compared with the checkpoint before
    the command ends. Where no pipeline of diffusers draws the same images, the folder holds the code of one that does.
    A checkpoint of an autoencoder becomes an autoencoder of diffusers.

    A name that ends in .safetensors makes one file in the layout of latent diffusion or Stable Diffusion, without the
    tokenizer of captions:

        unet-diffusion export runs/latents model.safetensors

    Args:
        checkpoint: The .ckpt file, run folder or diffusers pipeline folder to read.
        folder: The folder to make, or the .safetensors file.
        overwrite: Replace the folder or the file if it is an earlier export.
        autoencoder: The folder of the autoencoder of a denoiser of latents, if it is not where it was in training.
        allow: The modules of your own, or of somebody you trust, that the checkpoint may name.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        FileExistsError: If the folder exists and is not to be replaced, or holds other files.
        ValueError: If diffusers has no counterpart of the network.
    """
    check_exists("CHECKPOINT", checkpoint)
    from unet_diffusion.inference.autoencoder import Autoencoder
    from unet_diffusion.inference.loading import load
    from unet_diffusion.runtime.tensor_files import is_single_file_name

    model = load(checkpoint, allow=allow or (), autoencoder=autoencoder)
    model.export(folder, overwrite=overwrite)
    if is_single_file_name(folder):
        print(f"{folder} holds the weights; read again, they are the same. {_how_to_import(model, folder)}")
        return
    kind = "autoencoder" if isinstance(model, Autoencoder) else "pipeline"
    print(f"{folder} holds the {kind}; loaded again with diffusers, it gives the same output")


def _how_to_import(model: "Denoiser | Segmenter | Autoencoder", file: Path) -> str:
    """The command that imports a file, with all that its weights do not say."""
    from unet_diffusion.inference.denoiser import Denoiser

    command = f"It is read by: unet-diffusion import {file} CHECKPOINT"
    if not isinstance(model, Denoiser):
        return command
    from unet_diffusion.diffusers_io.single_file.exporting import untold_by

    said = {name: value for name, value in vars(untold_by(model)).items() if value is not None}
    if any(condition.batch_key == "captions" for condition in model.all_conditions):
        said["tokenizer"] = "DIR"
    return f"{command} {' '.join(f'--{name} {value}' for name, value in said.items())}"
