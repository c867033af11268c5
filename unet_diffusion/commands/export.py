"""export: a checkpoint becomes a folder that diffusers loads."""

from typing import Annotated, Literal

from unet_diffusion.commands.arguments import Checkpoint, Folder, check_exists


def export(
    checkpoint: Checkpoint,
    folder: Folder,
    *,
    format: Literal["pipeline", "adapter", "onnx", "torch"] = "pipeline",
    overwrite: bool = False,
    autoencoder: Folder | None = None,
    allow: Annotated[list[str], "MODULE"] | None = None,
) -> None:
    """Write a checkpoint as a diffusers pipeline folder, or its networks for ONNX or torch.export.

        unet-diffusion export runs/digits pipeline

    The folder loads with diffusers, without this package. It is loaded again and compared with the checkpoint before
    the command ends. Where no pipeline of diffusers draws the same images, the folder holds the code of one that does.
    A checkpoint of an autoencoder becomes an autoencoder of diffusers.

    Args:
        checkpoint: The .ckpt file, run folder or diffusers pipeline folder to read.
        folder: The folder to make.
        format: What to write: "pipeline" is the whole model, "adapter" what was trained on a frozen base, such as a
            LoRA, which the base's pipeline of diffusers loads. "onnx" and "torch" are networks alone, for any batch and
            size: of a segmenter, of a denoiser and its decoder of latents, or the decoder of an autoencoder.
        overwrite: Replace the folder if it is an earlier export.
        autoencoder: The folder of the autoencoder of a denoiser of latents, if it is not where it was in training.
        allow: The modules of your own, or of somebody you trust, that the checkpoint may name.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        FileExistsError: If the folder exists and is not to be replaced, or holds other files.
        ValueError: If diffusers has no counterpart of the network.
    """
    check_exists("CHECKPOINT", checkpoint)
    from unet_diffusion.inference.autoencoder import Autoencoder
    from unet_diffusion.inference.denoiser import Denoiser
    from unet_diffusion.inference.loading import load

    model = load(checkpoint, allow=allow or (), autoencoder=autoencoder)
    if format == "adapter" and not isinstance(model, Denoiser):
        raise ValueError(f"{checkpoint} holds no denoiser, and adapters are of denoisers; leave out --format")
    model.export(folder, format=format, overwrite=overwrite)  # type: ignore[arg-type]  # "adapter" is of denoisers
    if format == "adapter":
        print(f"{folder} holds the adapter; the pipeline of its base loads it")
    elif format != "pipeline":
        print(f"{folder} holds what was exported; tried at another size, it gives the same output")
    else:
        kind = "autoencoder" if isinstance(model, Autoencoder) else "pipeline"
        print(f"{folder} holds the {kind}; loaded again with diffusers, it gives the same output")
