"""Loading of any trained or exported model: a denoiser, a segmenter or an autoencoder."""

import os
from collections.abc import Sequence
from pathlib import Path

from unet_diffusion.diffusers_io.segmenter_folder import holds_segmenter as holds_segmenter_folder
from unet_diffusion.diffusers_io.single_file.untold import Untold
from unet_diffusion.diffusion.schedule import PredictionType
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.encoder_segmenters import Normalization, encoder_segmenter, holds_encoder_unet
from unet_diffusion.inference.onnx_segmenter import onnx_file
from unet_diffusion.inference.reading import read_autoencoder, read_denoiser, read_segmenter
from unet_diffusion.inference.record import KINDS, checkpoint_file, is_checkpoint, kind_of
from unet_diffusion.inference.segmentation_files import segmenter_of
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.runtime.addresses import is_hub_name
from unet_diffusion.runtime.hub import download
from unet_diffusion.runtime.safe_loading import load_plain
from unet_diffusion.runtime.weight_files import PIPELINE_FILES, only_weights

StrPath = str | os.PathLike[str]
LAST = "checkpoints/last.ckpt"  # of a run


def load(
    path: StrPath,
    *,
    allow: Sequence[str] = (),
    autoencoder: StrPath | None = None,
    tokenizer: StrPath | None = None,
    prediction_type: PredictionType | None = None,
    image_size: int | None = None,
    num_heads: int | None = None,
    head_channels: int | None = None,
    scaling_factor: float | None = None,
    num_classes: int | None = None,
    normalization: Normalization | None = None,
    revision: str | None = None,
) -> Denoiser | Segmenter | Autoencoder:
    """The model in a run folder, a checkpoint file, a diffusers folder or on the hub; print it to see a summary.

    No code in the files is run. The model is on the CPU, in float32 and in eval mode; `to` moves it.

    The arguments from tokenizer on are for one file of another program's weights: of latent diffusion, of Stable
    Diffusion, or of a U-Net for segmentation with the names inc, down1, up1 and outc. They say what its weights do not;
    None: as in the published models of its layout.

    Args:
        path: A run folder (its checkpoints/last.ckpt), a .ckpt file, a local diffusers folder, a segmenter.onnx, or one
            file of another program's weights, or a folder that holds one such .safetensors; or the name of a model on
            the hub, owner/name or hf://owner/name/file.safetensors, which is downloaded into its cache.
        allow: Further modules that you trust, whose classes a checkpoint may name.
        autoencoder: Current folder of the autoencoder of a denoiser of latents; None: its folder in training.
        tokenizer: Folder of CLIP's tokenizer, for a denoiser that takes captions.
        prediction_type: What the network predicts: "epsilon", "v_prediction" or "sample".
        image_size: Side of the images in pixels, or of the tiles of a segmenter.
        num_heads: Number of attention heads.
        head_channels: Channels of each attention head, in place of num_heads.
        scaling_factor: Factor that brings the latents to unit variance.
        num_classes: Number of classes of a denoiser of classes; one row more of their embedding is the null.
        normalization: What a network of segmentation_models_pytorch was trained on, which its folder does not say:
            "unit" for images in [0, 1], "imagenet" for these normalised by ImageNet's mean and deviation.
        revision: Branch, tag or commit of a model on the hub; None: the main branch.

    Raises:
        FileNotFoundError: If there is no model at the path, or the hub cannot be reached.
        ValueError: If the model cannot be read, is damaged, is not of this package, or something must be given that
            its weights do not say.
    """
    told = Untold(tokenizer, prediction_type, image_size, num_heads, head_channels, scaling_factor, num_classes)
    path = local_model(path, revision)
    if Path(path).is_dir() and holds_encoder_unet(Path(path)):
        _check_told(told, ("image_size",), path)
        return encoder_segmenter(Path(path), normalization=normalization, window_size=image_size)
    if normalization is not None:
        raise ValueError(f"normalization is for a folder of segmentation_models_pytorch, got {path}; leave it out")
    if onnx_file(path):
        _check_told(told, (), path)
        return read_segmenter(path)
    if is_single_file(path):
        return _from_single_file(Path(path), autoencoder, told)
    _check_told(told, (), path)
    if not is_checkpoint(path):
        if holds_segmenter_folder(Path(path)):
            return Segmenter.from_pretrained(path, allow=allow)
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
    here = local_model(path)
    if is_checkpoint(here) and not is_single_file(here):
        return read_denoiser(here, allow=allow, autoencoder=autoencoder)
    model = load(here, allow=allow, autoencoder=autoencoder)
    if not isinstance(model, Denoiser):
        kind, command = ("a segmenter", "segment") if isinstance(model, Segmenter) else ("an autoencoder", "encode")
        raise ValueError(f"{path} holds {kind}, not a denoiser; use unet-diffusion {command}")
    return model


def load_segmenter(path: StrPath, *, allow: Sequence[str] = ()) -> Segmenter:
    """The segmenter at a path, with the arguments of `load`.

    Raises:
        FileNotFoundError: If there is no model at the path.
        ValueError: If the model is not a segmenter, or cannot be read.
    """
    here = local_model(path)
    if onnx_file(here) or (is_checkpoint(here) and not is_single_file(here)):
        return read_segmenter(here, allow=allow)
    model = load(here, allow=allow)
    if not isinstance(model, Segmenter):
        kind, command = ("a denoiser", "sample") if isinstance(model, Denoiser) else ("an autoencoder", "encode")
        raise ValueError(f"{path} holds {kind}, not a segmenter; use unet-diffusion {command}")
    return model


def local_model(path: StrPath, revision: str | None = None) -> StrPath:
    """The path of a model on this machine, to which one on the hub is downloaded.

    The path of a folder with one .safetensors, and nothing that says what it is of, is that of the file.

    Args:
        path: As for `load`.
        revision: Branch, tag or commit of a model on the hub; None: the main branch.

    Raises:
        FileNotFoundError: If the hub cannot be reached, or has no such model.
        ValueError: If the folder holds several files of weights, or a revision is given for a model on this machine.
    """
    place = path
    if is_hub_name(path):
        path = download(str(path), revision)
    elif revision is not None:
        raise ValueError(f"revision is for a model on the hub, and {path} is here; leave it out")
    folder = Path(path)
    if not folder.is_dir() or onnx_file(folder) or any((folder / name).is_file() for name in (LAST, *PIPELINE_FILES)):
        return path
    file = only_weights(str(place), (file.name for file in folder.iterdir()))
    return path if file is None else folder / file


def is_single_file(path: StrPath) -> bool:
    """Whether a path is a file of weights that another program wrote, rather than a checkpoint of this package.

    Raises:
        ValueError: If the file is no checkpoint, is damaged, or holds objects that could run code.
    """
    path = Path(path)
    if not path.is_file() or path.suffix == ".safetensors":
        return path.is_file()
    content = load_plain(path)
    return isinstance(content, dict) and not any(isinstance(content.get(kind), dict) for kind in KINDS)


def _check_told(told: Untold, allowed: tuple[str, ...], path: StrPath) -> None:
    """Refuse what a user says of a model that says it itself, or does not have it."""
    if given := [name for name in told.given() if name not in allowed]:
        raise ValueError(f"{given[0]} is for another program's weights in one file that do not say it, and {path} "
                         "needs none; leave it out")  # fmt: skip


def _from_single_file(file: Path, autoencoder: StrPath | None, told: Untold) -> Denoiser | Segmenter | Autoencoder:
    from unet_diffusion.diffusers_io.single_file.importing import import_single_file
    from unet_diffusion.diffusers_io.single_file.layouts import holds_unet
    from unet_diffusion.models.segmentation_file import holds_segmentation_unet, without_prefix
    from unet_diffusion.models.single_file import RESOLUTION, autoencoder_in, holds_autoencoder, read_settings
    from unet_diffusion.runtime.tensor_files import read_tensors

    tensors = without_prefix(read_tensors(file), file)
    if holds_unet(tensors) or not (holds_segmentation_unet(tensors) or holds_autoencoder(tensors)):
        return Denoiser(**vars(import_single_file(tensors, file, told, autoencoder=autoencoder)))
    _check_told(told, ("image_size",), file)
    if holds_segmentation_unet(tensors):
        return segmenter_of(tensors, file, settings=read_settings(file), window_size=told.image_size)
    network = autoencoder_in(tensors, file)
    side = told.image_size or read_settings(file).get("image_size", RESOLUTION)
    return Autoencoder(network, (network.config["in_channels"], side, side))


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
