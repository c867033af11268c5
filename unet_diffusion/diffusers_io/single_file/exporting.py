"""Export of denoisers and autoencoders to one file of latent diffusion or Stable Diffusion.

What weights do not say stands in the metadata of the file, where other programs do not look.

A file is imported again and compared with the original before it gets its name.
"""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unet_diffusion.diffusers_io.exporting import check_same_reconstruction
from unet_diffusion.diffusers_io.normalising import normalised_autoencoder
from unet_diffusion.diffusers_io.single_file import names
from unet_diffusion.diffusers_io.single_file.importing import import_single_file
from unet_diffusion.diffusers_io.single_file.layouts import (
    CLASSES,
    FIRST_STAGE,
    SD1,
    SD2,
    UNCONDITIONAL,
    UNET,
    UPSCALER,
    XL,
    Layout,
)
from unet_diffusion.diffusers_io.single_file.schedules import schedule_in
from unet_diffusion.diffusers_io.single_file.text import OPEN_PREFIX, XL_PREFIX
from unet_diffusion.diffusers_io.single_file.untold import Untold
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.conditions.xl_text import XLText
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.latents.space import MOMENTS
from unet_diffusion.models.autoencoders import AutoencoderNetwork
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.single_file import SETTINGS, single_file_autoencoder
from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.runtime.tensor_files import SUFFIX, read_tensors

StrPath = str | os.PathLike[str]
METADATA = {"format": "pt", "exported_by": "unet_diffusion"}  # diffusers asks for the first
CLIP_PREFIXES = {SD1: "cond_stage_model.transformer.text_model.", XL: "conditioner.embedders.0.transformer.text_model."}
# Of configurations: heads of networks are said by other arguments, and training alone needs the others.
UNCOMPARED = ("num_heads", "head_channels", "transformer_depth", "dropout", "frozen")
HEAD_WIDTH = 64  # of the text encoders of all layouts
UNWRITTEN = {"norm_num_groups": 32, "act_fn": "silu"}  # settings of all published autoencoders of the layout
ROUNDING = 1e-6  # relative; the input of a paired image is scaled and scaled back


def export_single_file(parts: DenoiserParts, path: StrPath, *, overwrite: bool = False) -> None:
    """Write a denoiser of latents to one file, which holds all but the tokenizer of captions.

    Args:
        parts: The denoiser.
        path: The .safetensors file to make; it appears whole or not at all.
        overwrite: Replace the file, if it was exported.

    Raises:
        FileExistsError: If the file exists and overwrite is False, or if it is another file.
        ValueError: If no layout takes the denoiser.
        RuntimeError: If the file gives another denoiser when it is imported.
    """
    path = Path(path)
    check_replaceable(path, overwrite=overwrite)
    layout = _layout(parts)
    _check_expressible(parts, layout)
    tensors, autoencoder = _tensors(parts, layout)
    with written(tensors, path, _settings(parts)) as readable:
        _check_same(parts, readable, autoencoder)


def _check_expressible(parts: DenoiserParts, layout: Layout) -> None:
    """Refuse what no layout of one file can say, and what would come back as something else."""
    for text in parts.conditions.modules():
        if isinstance(text, TextTokens) and text.config["context_dim"] != HEAD_WIDTH * text.config["num_heads"]:
            width = text.config["context_dim"] / text.config["num_heads"]
            raise ValueError(f"heads of a text encoder must be {HEAD_WIDTH} wide in one file, got {width:g}; export a "
                             "folder")  # fmt: skip
    check_values(parts.values)
    if isinstance(parts.codec, LatentCodec):
        _check_unwritten(parts.codec.autoencoder)
    read = schedule_in(_tables(parts.schedule), layout, parts.schedule.prediction_type)
    if read is None or read.config != parts.schedule.config:
        raise ValueError(f"one file holds a noise schedule as tables, from which this one is not read again: "
                         f"{parts.schedule.config}; export a folder")  # fmt: skip


def _check_unwritten(autoencoder: AutoencoderNetwork) -> None:
    """Refuse an autoencoder with other settings than those that the layout takes for granted, as no weight tells."""
    for name, value in UNWRITTEN.items():
        if (ours := autoencoder.config[name]) != value:
            raise ValueError(f"one file holds an autoencoder with {name} {value}, got {ours}; export a folder")


def check_values(values: PixelValues) -> None:
    """Refuse a range of the numbers of images, which one file does not hold.

    Raises:
        ValueError: If there is one.
    """
    if values.value_range is not None:
        low, high = values.value_range
        raise ValueError(f"one file does not hold the value_range of images, {low:.6g} to {high:.6g}; export a folder")


def export_autoencoder_file(
    autoencoder: AutoencoderNetwork,
    path: StrPath,
    *,
    image_shape: tuple[int, int, int],
    latent_std: float | None = None,
    overwrite: bool = False,
) -> None:
    """Write an autoencoder to one file of latent diffusion.

    Args:
        autoencoder: The autoencoder.
        image_shape: (C, H, W) of the images that the autoencoder was trained on.
        latent_std: Standard deviation of the latents, whose inverse becomes scaling_factor; None: that of the
            configuration, if it has any.
        path: The .safetensors file to make; it appears whole or not at all.
        overwrite: Replace the file, if it was exported.

    Raises:
        FileExistsError: If the file exists and overwrite is False, or if it is another file.
        RuntimeError: If the file gives another autoencoder when it is read.
        ValueError: If the latents are normalised by more than one scale, or the layout has no such autoencoder.
    """
    path = Path(path)
    check_replaceable(path, overwrite=overwrite)
    _check_unwritten(autoencoder)
    if any(autoencoder.config.get(name) is not None for name in MOMENTS):
        raise ValueError(f"one file holds a scaling_factor, and not {' and '.join(MOMENTS)}; export a folder")
    scale = autoencoder.config["scaling_factor"] if latent_std is None else 1 / latent_std
    settings = {} if scale is None else {"scaling_factor": float(scale)}
    _, height, width = image_shape
    if height != width:
        raise ValueError(f"one file holds an autoencoder of square images, got {height}x{width}; export a folder")
    settings["image_size"] = height
    with written(names.autoencoder_weights(autoencoder), path, settings) as readable:
        again = single_file_autoencoder(readable)
        _check_equal({"autoencoder": (autoencoder, again)})
        check_same_reconstruction(autoencoder, again)
        _check_same_values({"scaling_factor": scale}, {"scaling_factor": again.config["scaling_factor"]})


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that is not to be replaced.

    Args:
        path: Path of the file to write.
        overwrite: Whether an earlier export is replaced.

    Raises:
        FileExistsError: If the file exists and overwrite is False, or if it is another file.
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists and is not overwritten; choose another file, or give --overwrite")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        metadata = {}
    if metadata.get("exported_by") != METADATA["exported_by"]:
        raise FileExistsError(f"{path} was not exported and is not overwritten; choose another file")


@contextmanager
def written(tensors: dict[str, Tensor], path: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """A file of the tensors to read again, which takes its place where the block ends without an error.

    Args:
        tensors: The tensors by name.
        path: Path of the .safetensors file.
        settings: What its metadata store, see `models.single_file.read_settings`.
    """
    metadata = {**METADATA, SETTINGS: json.dumps(settings)}
    with atomic_write(path) as partial:
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, partial, metadata)
        readable = partial.with_name(f"{partial.name}{SUFFIX}")  # its suffix says its format
        os.replace(partial, readable)
        try:
            yield readable
        finally:
            os.replace(readable, partial)


def _layout(parts: DenoiserParts) -> Layout:
    """The layout of a denoiser with these conditions.

    Raises:
        ValueError: If there is none; the message says why.
    """
    if not isinstance(parts.codec, LatentCodec):
        raise ValueError(f"one file holds a denoiser of latents, and this one denoises {parts.codec.name} without an "
                         "autoencoder; export a folder")  # fmt: skip
    kinds = [type(condition) for condition in parts.conditions]
    text = next((condition for condition in parts.conditions if isinstance(condition, TextTokens)), None)
    sd = SD1 if text is not None and text.config["hidden_act"] == "quick_gelu" else SD2
    layouts: dict[frozenset[type[nn.Module]], Layout] = {
        frozenset(): UNCONDITIONAL,
        frozenset({ClassTokens}): CLASSES,
        frozenset({TextTokens}): sd,
        frozenset({TextTokens, MaskedImage}): sd,
        frozenset({TextTokens, PairedImage}): SD1,
        frozenset({TextTokens, LowResolution}): UPSCALER,
        frozenset({XLText}): XL,
    }
    layout = layouts.get(frozenset(kinds))
    small = parts.condition(LowResolution)
    if small is not None and (not small.config["noise"] or small.scale_factor > 1):
        raise ValueError("no layout of one file takes a small image without noise, or one that is enlarged for the "
                         "network; export a folder")  # fmt: skip
    if layout is None or len({*kinds}) < len(kinds) or type(parts.unet) is not DenoiserUNet:
        listed = ", ".join(kind.__name__ for kind in kinds) or "none"
        raise ValueError(f"no layout of one file takes a {type(parts.unet).__name__} with the conditions {listed}; "
                         "export a folder")  # fmt: skip
    for name, value in {"resample": "conv", "norm_num_groups": 32, "mid_attention": True}.items():
        if parts.unet.config[name] != value:
            raise ValueError(f"{name} must be {value} for one file, got {parts.unet.config[name]}; export a folder")
    if parts.unet.config["num_class_embeds"] is not None and layout is not UPSCALER:
        raise ValueError("no layout of one file takes labels that the network embeds itself; export a folder")
    return layout


def _tensors(parts: DenoiserParts, layout: Layout) -> tuple[dict[str, Tensor], AutoencoderNetwork]:
    """All tensors of the file, and the autoencoder whose weights are among them."""
    space = parts.codec.space
    assert isinstance(parts.codec, LatentCodec)
    assert space is not None
    autoencoder, scale = parts.codec.autoencoder, space.scaling_factor
    if scale is None:
        autoencoder = normalised_autoencoder(copy.deepcopy(autoencoder).cpu(), space)
        scale = autoencoder.config["scaling_factor"]
    unet = copy.deepcopy(cast(DenoiserUNet, parts.unet)).cpu().float()
    if any(isinstance(condition, PairedImage) for condition in parts.conditions):
        with torch.no_grad():  # the pipeline of the layout gives the network latents that are not scaled
            cast(Tensor, unet.conv_in.weight)[:, unet.out_channels :] *= scale
    tensors = {UNET + key: value for key, value in names.unet_weights(unet).items()}
    tensors |= {FIRST_STAGE + key: value for key, value in names.autoencoder_weights(autoencoder).items()}
    tensors |= _tables(parts.schedule)
    tensors["scale_factor"] = torch.tensor(scale, dtype=torch.float64)
    for condition in parts.conditions:
        tensors |= _condition_tensors(cast(Condition, condition), layout)
    return tensors, autoencoder


def _tables(schedule: NoiseSchedule) -> dict[str, Tensor]:
    mark = {"ztsnr": torch.zeros(1)} if schedule.rescale_betas_zero_snr else {}
    return {"betas": schedule.betas, "alphas_cumprod": schedule.alphas_cumprod, **mark}


def _condition_tensors(condition: Condition, layout: Layout) -> dict[str, Tensor]:
    if isinstance(condition, ClassTokens):
        weight = cast(Tensor, condition.embedding.weight)  # a row that was not trained would be taken for a null
        return {"cond_stage_model.embedding.weight": weight if condition.has_null else weight[:-1]}
    if isinstance(condition, XLText):
        first = {CLIP_PREFIXES[XL] + key: value for key, value in condition.first.encoder.state_dict().items()}
        projection = cast(Tensor, condition.projection.weight)
        second = names.open_clip_weights(condition.second.encoder.state_dict(), projection)
        return first | {XL_PREFIX + key: value for key, value in second.items()}
    if not isinstance(condition, TextTokens):
        return {}
    weights = condition.encoder.state_dict()
    if layout is SD1:
        return {CLIP_PREFIXES[SD1] + key: value for key, value in weights.items()}
    return {OPEN_PREFIX + key: value for key, value in names.open_clip_weights(weights).items()}


def _settings(parts: DenoiserParts) -> dict[str, Any]:
    """What the weights of a denoiser do not say, by the names of `SETTING_TYPES`."""
    config = parts.unet.config
    heads: dict[str, Any] = {"head_channels": config["head_channels"], "num_heads": config["num_heads"]}
    if isinstance(heads["num_heads"], list):
        widths = {width // count for width, count in zip(config["channels"], heads["num_heads"], strict=True)}
        if len(widths) > 1:
            raise ValueError(f"attention heads must be as many or as wide on all levels for one file, got "
                             f"{heads['num_heads']} for widths of {config['channels']}; export a folder")  # fmt: skip
        heads = {"num_heads": None, "head_channels": widths.pop()}
    elif heads["num_heads"] is None and heads["head_channels"] is None:
        heads["num_heads"] = 1
    _, height, width = parts.image_shape
    if height != width:
        raise ValueError(f"images must be square for one file, got {height} x {width}; export a folder")
    settings = {
        "prediction_type": parts.schedule.prediction_type,
        "image_size": height,
        "num_classes": parts.num_classes or None,
        "class_names": parts.class_names,
        "unconditional": [type(condition).__name__ for condition in parts.all_conditions if condition.has_null],
        **heads,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _check_same(parts: DenoiserParts, file: Path, autoencoder: AutoencoderNetwork) -> None:
    """Import a file and compare all that it holds with the original."""
    texts = [condition for condition in parts.conditions if isinstance(condition, TextTokens | XLText)]
    with tempfile.TemporaryDirectory() as folder:
        for text in texts:
            _words(text).save_pretrained(folder)
        told = Untold(tokenizer=folder if texts else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of words that the tokenizer learnt fewer of than it may
            again = import_single_file(read_tensors(file), file, told)
    assert isinstance(again.codec, LatentCodec)
    _check_equal({
        "network": (parts.unet, again.unet),
        "conditions": (_without_unused(parts.conditions), again.conditions),
        "autoencoder": (autoencoder, again.codec.autoencoder),
    })  # fmt: skip
    _check_same_values(_plain(parts), _plain(again))


def _without_unused(conditions: nn.ModuleList) -> nn.ModuleList:
    """A copy in which the rows of nulls that were not trained are 0, as they are not written."""
    conditions = copy.deepcopy(conditions)
    for tokens in conditions:
        if isinstance(tokens, ClassTokens) and not tokens.has_null:
            tokens.embedding.weight.data[-1] = 0
    return conditions


def _check_same_values(ours: dict[str, Any], read: dict[str, Any]) -> None:
    if differing := [name for name in ours if ours[name] != read[name]]:
        raise RuntimeError(f"{differing[0]} must be read as written, {ours[differing[0]]}, got {read[differing[0]]}; "
                           "nothing was exported")  # fmt: skip


def _words(text: TextTokens | XLText) -> Any:
    tokenizer = (text.first if isinstance(text, XLText) else text).tokenizer
    if tokenizer is None:
        raise ValueError("captions must have a tokenizer to be exported; train the denoiser first")
    return tokenizer


def _plain(parts: DenoiserParts) -> dict[str, Any]:
    """What a file must give again, as plain values."""
    texts = [text for text in parts.conditions.modules() if isinstance(text, TextTokens)]
    return {
        "schedule": parts.schedule.config,
        "network": {name: value for name, value in parts.unet.config.items() if name not in UNCOMPARED},
        "shape": parts.sample_shape,
        "class_names": parts.class_names,
        "conditions with a null": [condition.has_null for condition in parts.all_conditions],
        "encoders": [{name: value for name, value in text.config.items() if name not in UNCOMPARED} for text in texts],
        "tokens of a caption": [text.token_ids(["a caption"]).tolist() for text in texts],
    }


def _check_equal(pairs: dict[str, tuple[nn.Module, nn.Module]]) -> None:
    for name, (ours, read) in pairs.items():
        written, got = (
            {key: value for key, value in module.state_dict().items() if not key.endswith("_extra_state")}
            for module in (ours, read)
        )
        if written.keys() != got.keys() or any(
            value.shape != got[key].shape
            or not torch.allclose(value.cpu().float(), got[key].float(), rtol=ROUNDING, atol=0)
            for key, value in written.items()
        ):
            raise RuntimeError(f"the weights of the {name} must be read as written, and are not; nothing was exported")
