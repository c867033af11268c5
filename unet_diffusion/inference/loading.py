"""Loading of any trained or exported model: a denoiser, a segmenter or an autoencoder."""

import os
from collections.abc import Sequence
from pathlib import Path

from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.reading import read_autoencoder, read_denoiser, read_segmenter
from unet_diffusion.inference.record import checkpoint_file, kind_of
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.runtime.safe_loading import load_plain

StrPath = str | os.PathLike[str]
PIPELINE_FILES = ("model_index.json", "unet/config.json", "config.json")  # a diffusers folder has one of them


def load(
    path: StrPath, *, allow: Sequence[str] = (), autoencoder: StrPath | None = None
) -> Denoiser | Segmenter | Autoencoder:
    """The model in a run folder, a checkpoint file or a diffusers folder; print it to see a summary.

    No code in the files is run. The model is on the CPU, in float32 and in eval mode; `to` moves it.

    Args:
        path: A run folder (its checkpoints/last.ckpt), a .ckpt file, or a local diffusers folder.
        allow: Further modules that you trust, whose classes a checkpoint may name.
        autoencoder: Current folder of the autoencoder of a denoiser of latents; None: its folder in training.

    Raises:
        FileNotFoundError: If there is no model at the path.
        ValueError: If the model cannot be read, is damaged, or is not of this package.
    """
    if not is_checkpoint(path):
        return _from_diffusers(Path(path), autoencoder)
    file = checkpoint_file(path)
    kind = kind_of(load_plain(file), file)
    if kind == "denoiser":
        return read_denoiser(file, allow=allow, autoencoder=autoencoder)
    return read_segmenter(file, allow=allow) if kind == "segmenter" else read_autoencoder(file)


def load_denoiser(path: StrPath, *, allow: Sequence[str] = (), autoencoder: StrPath | None = None) -> Denoiser:
    """The denoiser at a path, with the arguments of `load`.

    Raises:
        FileNotFoundError: If there is no model at the path.
        ValueError: If the model is not a denoiser, or cannot be read.
    """
    if is_checkpoint(path):
        return read_denoiser(path, allow=allow, autoencoder=autoencoder)
    model = _from_diffusers(Path(path), autoencoder)
    if not isinstance(model, Denoiser):
        raise ValueError(f"{path} holds an autoencoder, not a denoiser; use unet-diffusion encode")
    return model


def is_checkpoint(path: StrPath) -> bool:
    """Whether a path is a checkpoint file or a run folder with one, rather than a diffusers folder.

    Raises:
        FileNotFoundError: If it is none of these.
    """
    path = Path(path)
    if path.is_file() or (path / "checkpoints" / "last.ckpt").is_file():
        return True
    if any((path / name).is_file() for name in PIPELINE_FILES):
        return False
    raise FileNotFoundError(
        f"there is no model at {path}: it must be a checkpoint file, a run folder with checkpoints/last.ckpt, or a "
        "diffusers folder with model_index.json"
    )


def _from_diffusers(folder: Path, autoencoder: StrPath | None) -> Denoiser | Autoencoder:
    from unet_diffusion.diffusers_io.importing import holds_autoencoder, import_pipeline
    from unet_diffusion.diffusers_io.values_file import read_values
    from unet_diffusion.models.autoencoders import pretrained_autoencoder

    if holds_autoencoder(folder):
        network = pretrained_autoencoder(folder).eval()
        size = network.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        channels = network.config["in_channels"]
        return Autoencoder(network, (channels, height, width), values=read_values(folder, channels))
    return Denoiser(**vars(import_pipeline(folder, autoencoder=autoencoder)))
