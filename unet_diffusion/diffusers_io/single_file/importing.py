"""Import of a denoiser from one file of latent diffusion or Stable Diffusion; nothing is downloaded.

Weights are tensors by name; code in the file never runs. `layouts.py` says what a file does not.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unet_diffusion.diffusers_io.importing import DROPOUT, take_scaled_latents
from unet_diffusion.diffusers_io.single_file.layouts import CLASSES, SD1, SD2, UPSCALER, XL, Layout, layout_of
from unet_diffusion.diffusers_io.single_file.network import single_file_unet
from unet_diffusion.diffusers_io.single_file.schedules import check_low_res_schedule, schedule_in
from unet_diffusion.diffusers_io.single_file.text import class_tokens, clip_text, open_clip_text, xl_text
from unet_diffusion.diffusers_io.single_file.untold import Untold
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.conditions.xl_text import XLText
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.diffusion.schedule import NoiseSchedule, PredictionType
from unet_diffusion.latents.codec import LatentCodec, latent_space_of
from unet_diffusion.models.autoencoders import AutoencoderNetwork, downsampling, num_codes
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.single_file import autoencoder_in, read_settings
from unet_diffusion.runtime.tensor_files import read_tensors

StrPath = str | os.PathLike[str]
TEXTS: dict[Layout, Callable[..., Condition]] = {
    SD1: clip_text,
    SD2: open_clip_text,
    UPSCALER: open_clip_text,
    XL: xl_text,
}
SD2_CHANNELS = 4  # of the latents of Stable Diffusion 2
SD2_SIZES: dict[str, int] = {"epsilon": 512, "v_prediction": 768}  # side of the images of both models of Stability


def import_single_file(
    tensors: dict[str, Tensor], path: StrPath, untold: Untold, *, autoencoder: StrPath | None = None
) -> DenoiserParts:
    """The denoiser in a .safetensors or .ckpt file, with averaged weights if it has any.

    A checkpoint made of it names the file as the place of its autoencoder.

    Args:
        tensors: The tensors in the file by name, from `read_tensors`.
        path: The file.
        untold: What its weights do not say, and the file does not store.
        autoencoder: Folder or file of the autoencoder of the latents; None: the autoencoder in the file.

    Raises:
        ValueError: If its layout is not known, or something must be given that its weights do not say.
    """
    path, layout = Path(path), layout_of(tensors, path)
    if layout.reason is not None:
        raise ValueError(f"{path} has the layout of {layout.name}, which is not imported: {layout.reason}")
    _check_used(untold, layout, path)
    settings = read_settings(path)
    untold = untold.or_stored(settings)
    unet = single_file_unet(tensors, layout, num_heads=untold.num_heads, head_channels=untold.head_channels)
    prediction_type = _prediction_type(tensors, layout, untold.prediction_type, path=path, in_channels=unet.in_channels)
    schedule = _schedule(tensors, layout, prediction_type, path)
    network = autoencoder_in(tensors, path)
    size = _image_size(layout, untold.image_size, prediction_type, path)
    scale = _scale(network, layout, path) if untold.scaling_factor is None else untold.scaling_factor
    image_shape = (network.config["in_channels"], size, size)
    codec = LatentCodec.of(latent_space_of(network, path, image_shape, scaling_factor=scale), autoencoder)
    dropouts = _dropouts(settings)
    conditions = [*_tokens(tensors, layout, untold, path, dropouts), *_maps(unet, layout, path, dropouts)]
    check_low_res_schedule(tensors, path)
    if any(isinstance(condition, PairedImage) for condition in conditions):
        take_scaled_latents(unet, codec)
    side = size // downsampling(network)
    return DenoiserParts(
        unet=unet,
        schedule=schedule,
        sample_shape=(unet.out_channels, side, side),
        codec=codec,
        class_names=settings.get("class_names"),
        conditions=nn.ModuleList(conditions).eval(),
    )


def _check_used(untold: Untold, layout: Layout, path: Path) -> None:
    """Refuse what a user says of conditions that the layout does not have."""
    uses = {"tokenizer": layout in TEXTS, "num_classes": layout is CLASSES}
    if unused := [name for name in untold.given() if not uses.get(name, True)]:
        raise ValueError(f"{unused[0]} is for other layouts, and {path} has that of {layout.name}; leave it out")


def assumptions(path: StrPath, parts: DenoiserParts) -> str:
    """What was imported from a file, in a line: its layout, and what its weights do not say.

    Args:
        path: The file.
        parts: The denoiser, from `import_single_file`.
    """
    layout = layout_of(read_tensors(path), path)
    config, space = parts.unet.config, parts.codec.space
    assert space is not None
    heads = (
        f"heads of {config['head_channels']} channels"
        if config["num_heads"] is None
        else f"{config['num_heads']} heads"
    )
    return (
        f"{path} has the layout of {layout.name}. What its weights do not say is set to: prediction_type "
        f"{parts.schedule.prediction_type}, images of {parts.image_shape[1]} pixels, {heads}, scaling_factor "
        f"{space.scaling_factor}{_classes_in_words(parts)}"
    )


def _classes_in_words(parts: DenoiserParts) -> str:
    tokens = parts.condition(ClassTokens)
    if tokens is None:
        return ""
    return f", {tokens.num_classes} classes {'and a null' if tokens.has_null else 'without a null'}"


def _prediction_type(
    tensors: dict[str, Tensor], layout: Layout, told: PredictionType | None, *, path: Path, in_channels: int
) -> PredictionType:
    """What the network predicts: as told, as the file says, or as all published models of its layout do."""
    if told is not None:
        return told
    if "v_pred" in tensors:  # a mark of fine-tuned models of Stable Diffusion XL
        return "v_prediction"
    if layout.prediction_type is not None:
        return layout.prediction_type
    if in_channels > SD2_CHANNELS:  # the model for inpainting
        return "epsilon"
    raise ValueError(f"prediction_type must be given for {path}, a {layout.name}, as no weight says it: epsilon for "
                     "the models of 512 pixels (base), v_prediction for those of 768")  # fmt: skip


def _image_size(layout: Layout, told: int | None, prediction_type: PredictionType, path: Path) -> int:
    """The side of the images: as told, or as in the published model of its layout."""
    size = told or layout.image_size or SD2_SIZES.get(prediction_type)
    if size is None:
        raise ValueError(f"image_size must be given for {path}, as no published {layout.name} predicts "
                         f"{prediction_type}")  # fmt: skip
    return size


def _schedule(tensors: dict[str, Tensor], layout: Layout, prediction_type: PredictionType, path: Path) -> NoiseSchedule:
    schedule = schedule_in(tensors, layout, prediction_type)
    if schedule is None:
        raise ValueError(
            f"the noise schedule in {path} must have even betas, or betas with even roots, the same in all of its "
            "tables, and has others; from_diffusers reads its U-Net alone"
        )
    return schedule


def _scale(network: AutoencoderNetwork, layout: Layout, path: Path) -> float:
    """The scaling_factor in the file, or else that of the layout; latents of a codebook are not scaled."""
    scale = network.config["scaling_factor"]
    if scale is not None and not scale > 0:
        raise ValueError(f"the scale_factor in {path} must be above 0, got {scale}; give scaling_factor")
    if (scale := scale or layout.scaling_factor) is not None:
        return scale
    if num_codes(network):
        return 1.0
    raise ValueError(f"scaling_factor must be given for {path}, as the file has no scale_factor; it is in the "
                     "configuration that the model was trained with")  # fmt: skip


def _dropouts(settings: Mapping[str, Any]) -> dict[type[Condition], float]:
    """The dropout of each kind of condition: the usual one, or 0 if a file stores that it has no null."""
    kinds = (ClassTokens, TextTokens, XLText, PairedImage)
    with_null = settings.get("unconditional", [kind.__name__ for kind in kinds])
    return {kind: DROPOUT * (kind.__name__ in with_null) for kind in kinds}


def _tokens(
    tensors: dict[str, Tensor], layout: Layout, untold: Untold, path: Path, dropouts: dict[type[Condition], float]
) -> list[Condition]:
    """The conditions that the network attends to."""
    if layout is CLASSES:
        return [class_tokens(tensors, untold.num_classes, path, dropout=dropouts[ClassTokens])]
    dropout = dropouts[XLText if layout is XL else TextTokens]
    return [TEXTS[layout](tensors, untold.tokenizer, dropout=dropout)] if layout in TEXTS else []


def _maps(unet: DenoiserUNet, layout: Layout, path: Path, dropouts: dict[type[Condition], float]) -> list[Condition]:
    """The condition on the input channels beyond x."""
    channels = unet.out_channels
    beside = unet.in_channels - channels
    if beside == 0:
        return []
    if layout is UPSCALER:
        return [LowResolution(beside)]
    if layout in (SD1, SD2) and beside == channels + 1:
        return [MaskedImage(beside)]
    if layout is SD1 and beside == channels:
        return [PairedImage(beside, dropout=dropouts[PairedImage])]
    raise ValueError(f"a {layout.name} with {unet.in_channels} channels in and {channels} out is not imported, got "
                     f"{path}; from_diffusers reads its U-Net alone")  # fmt: skip
