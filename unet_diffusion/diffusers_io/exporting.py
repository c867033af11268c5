"""Export of networks and pipelines to diffusers folders.

An exported folder needs diffusers but not this package. It is reloaded and compared before it gets its name.
"""

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion_superresolution import (
    LDMSuperResolutionPipeline,  # `from diffusers import` finds it only where transformers is installed
)
from torch import Tensor

from unet_diffusion.diffusers_io.configurations import SDXL_TIME_DIM, config_to_diffusers
from unet_diffusion.diffusers_io.model_card import autoencoder_card, model_card
from unet_diffusion.diffusers_io.normalising import normalised_autoencoder, takes_scale, with_moments, with_scale
from unet_diffusion.diffusers_io.pipeline_code import own_pipeline, ship_pipeline_code, why_no_own_pipeline_takes
from unet_diffusion.diffusers_io.pipelines.conditional import ConditionalPipeline
from unet_diffusion.diffusers_io.super_resolution import ENLARGED_SCALE, why_no_super_resolution
from unet_diffusion.diffusers_io.values_file import write_values
from unet_diffusion.diffusion.conditions.low_resolution import MAX_NOISE_LEVEL
from unet_diffusion.diffusion.conditions.xl_text import NUM_SIZES, size_waves
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.diffusion.schedule import scheduler_config
from unet_diffusion.latents.codec import LatentCodec, decode_latents, latent_space_of
from unet_diffusion.latents.space import MOMENTS, LatentSpace
from unet_diffusion.models.autoencoders import AutoencoderNetwork, downsampling, pretrained_autoencoder, reconstruct
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.speed import set_speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.atomic_files import check_replaceable, put_folder
from unet_diffusion.runtime.initial_weights import WithoutInitialWeights
from unet_diffusion.runtime.pixel_values import PixelValues, default_shown
from unet_diffusion.runtime.randomness import keyed_generator

StrPath = str | os.PathLike[str]

MULTIPLE = 8  # StableDiffusionPipeline draws images whose sides are multiples of 8 pixels
UPSCALED_SCALE = 0.08333  # StableDiffusionUpscalePipeline overwrites scaling_factor with this value
PAIRED_SCALE = 1.0  # StableDiffusionInstructPix2PixPipeline does not scale the latents of its image
FIXED_SCALES = {
    StableDiffusionUpscalePipeline: UPSCALED_SCALE,
    StableDiffusionInstructPix2PixPipeline: PAIRED_SCALE,
    LDMSuperResolutionPipeline: ENLARGED_SCALE,
}
INPAINTED_CHANNELS = 4  # StableDiffusionInpaintPipeline needs latents of 4 channels
EXPORT_TOLERANCE = 1e-4  # for outputs of order 1; another order of the same float32 operations differs by 1e-6


def to_diffusers(
    model: PixelNetwork, sample_size: int | tuple[int, int] | None = None
) -> UNet2DModel | UNet2DConditionModel:
    """The diffusers network that equals this one, float32 on the CPU and in eval mode.

    Args:
        model: The network; it becomes a UNet2DConditionModel if it has a context_dim, otherwise a UNet2DModel.
        sample_size: Side, or height and width, of x0, which diffusers' pipelines need.

    Raises:
        ValueError: If diffusers has no such network.
    """
    config = _config_of(model)
    counterpart = UNet2DModel if model.config["context_dim"] is None else UNet2DConditionModel
    with WithoutInitialWeights():
        unet = counterpart(**config, sample_size=sample_size)
    unet.load_state_dict(model.state_dict())
    return unet.eval()


def export_pipeline(parts: DenoiserParts, folder: StrPath, *, overwrite: bool = False) -> None:
    """Write a folder that diffusers loads without this package; the reloaded parts are compared with the originals.

    If a pipeline of diffusers draws the same images, the folder is of its class:

    - for pixels without conditions DDPMPipeline, for latents without conditions LDMPipeline;
    - for latents from a small image without noise LDMSuperResolutionPipeline;
    - for latents from texts StableDiffusionPipeline, with a mask StableDiffusionInpaintPipeline, with a small image
      StableDiffusionUpscalePipeline, with a paired image StableDiffusionInstructPix2PixPipeline;
    - for latents from texts and sizes StableDiffusionXLPipeline.

    Otherwise, and for images of other channels or values than pictures, the folder has its own `pipeline.py` for
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. Its README.md shows how to use it.

    Args:
        parts: The denoiser.
        folder: The folder to make; it appears whole or not at all.
        overwrite: Replace the folder, if everything in it was exported there.

    Raises:
        FileExistsError: If the folder exists and overwrite is False, or if it holds other files.
        FileNotFoundError: If the autoencoder of the latents is missing.
        ValueError: If there is no such pipeline (see `why_not_exported`), or if the autoencoder was replaced.
        RuntimeError: If the reloaded folder gives other results than the original.
    """
    folder, parts = Path(folder).resolve(), parts.merged()
    check_replaceable(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        pipeline = _build_pipeline(parts)
        pipeline.save_pretrained(partial)
        _check_equal(parts, type(pipeline).from_pretrained(partial))
        if isinstance(pipeline, ConditionalPipeline):
            ship_pipeline_code(partial, pipeline)
        for place in (partial, partial / "vae"):
            if place.is_dir():
                write_values(parts.values, place)
        (partial / "README.md").write_text(model_card(parts, pipeline), encoding="utf-8")
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def why_not_exported(parts: DenoiserParts) -> str | None:
    """The reason why a denoiser cannot become a diffusers pipeline, and what to do; None if it can."""
    try:
        _config_of(parts.unet)
    except ValueError as error:
        return f"{error}; draw images with unet-diffusion sample"
    reason = _why_no_pipeline_takes(parts)
    if parts.codec.config is not None:
        reason = f"no pipeline of diffusers decodes with the codec {type(parts.codec).__name__}"
    return reason and f"{reason}; draw images with unet-diffusion sample"


def export_autoencoder(
    autoencoder: AutoencoderNetwork,
    folder: StrPath,
    *,
    image_shape: tuple[int, int, int],
    latent_std: float | None = None,
    settings: Mapping[str, Any] | None = None,
    values: PixelValues | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that diffusers loads without this package; the reloaded autoencoder is compared with the original.

    The folder's README.md shows how to use it.

    Args:
        autoencoder: The autoencoder.
        folder: The folder to make; it appears whole or not at all.
        image_shape: (C, H, W) of the images that the autoencoder was trained on.
        latent_std: Standard deviation of the latents, whose inverse becomes scaling_factor; None: it is not known.
        settings: The settings of the training as plain values; None: they are not known.
        values: What the numbers in the files of its images mean; None: they are of 8 bits.
        overwrite: Replace the folder, if everything in it was exported there.

    Raises:
        FileExistsError: If the folder exists and overwrite is False, or if it holds other files.
        RuntimeError: If the reloaded autoencoder gives other results than the original.
    """
    folder, (_, height, width) = Path(folder).resolve(), image_shape
    check_replaceable(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    imported = {name: value for name in MOMENTS if (value := autoencoder.config.get(name)) is not None}
    scale = imported if latent_std is None else {"scaling_factor": 1 / latent_std}
    size = height if height == width else [height, width]
    exported = with_scale(autoencoder, sample_size=size, **scale).cpu().float()
    try:
        exported.save_pretrained(partial)
        check_same_reconstruction(exported, pretrained_autoencoder(partial))
        write_values(values or PixelValues(shown=default_shown(image_shape[0])), partial)
        card = autoencoder_card(autoencoder, image_shape, latent_std, settings or {})
        (partial / "README.md").write_text(card, encoding="utf-8")
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config_of(model: PixelNetwork) -> dict[str, Any]:
    """The configuration of the diffusers network that equals this one; a ValueError says why there is none."""
    # A user's subclass of DenoiserUNet may compute something else. torch's subclass for sharded weights does not.
    classes = [cls for cls in type(model).__mro__ if cls is not object and not cls.__module__.startswith("torch.")]
    kind = (*classes, type(model))[0]
    if kind is not DenoiserUNet or not isinstance(model, DenoiserUNet):
        raise ValueError(f"only a DenoiserUNet has a counterpart in diffusers, got a {kind.__name__}")
    return config_to_diffusers(model.config)


def _why_no_pipeline_takes(parts: DenoiserParts) -> str | None:
    """The reason why no pipeline fits the denoiser's conditions; None if one does."""
    conditions = parts.all_conditions
    # Only the class's own role counts: a user's subclass may do something else.
    roles = [vars(type(condition)).get("pipeline_role") for condition in conditions]
    if unknown := [type(condition).__name__ for condition, role in zip(conditions, roles, strict=True) if role is None]:
        return f"no pipeline of diffusers takes the condition {unknown[0]}"
    arguments = [(condition.network_argument, condition.batch_key) for condition in conditions]
    if repeated := [name for name, key in arguments if arguments.count((name, key)) > 1]:
        return f"a pipeline takes one condition of each kind, and this denoiser has several for {repeated[0]!r}"
    if reason := why_no_own_pipeline_takes(conditions):
        return reason
    takes_context = parts.unet.config.get("context_dim") is not None
    if takes_context and not any(condition.network_argument == "context" for condition in conditions):
        return "the network has context_dim and needs tokens to attend to, and this denoiser has no condition for them"
    if "xl_prompt" in roles and (len(roles) > 1 or not isinstance(parts.codec, LatentCodec)):
        return "StableDiffusionXLPipeline draws latents, from captions and sizes alone"
    if parts.unet.config.get("vector_dim") is not None and roles != ["xl_prompt"]:
        return f"no pipeline of diffusers fits a network with vector_dim, got {parts.unet.config['vector_dim']}"
    return None


def _build_pipeline(parts: DenoiserParts) -> DiffusionPipeline:
    if reason := why_not_exported(parts):
        raise ValueError(reason)
    _, height, width = parts.sample_shape
    unet = to_diffusers(parts.unet, height if height == width else (height, width))
    codec = parts.codec
    scheduler = DDPMScheduler(**scheduler_config(parts.schedule, clip_sample=codec.clip_sample))
    if not isinstance(codec, LatentCodec):
        if not parts.all_conditions and parts.are_pictures:
            return DDPMPipeline(unet, scheduler)
        return own_pipeline(parts, unet, scheduler, None)
    scheduler = DDIMScheduler.from_config(json.loads(scheduler.to_json_string()))
    vae, space = copy.deepcopy(codec.autoencoder).cpu(), codec.space
    assert space is not None
    kind = _stock_pipeline(parts, space, vae)
    if kind is None and parts.unet.config["vector_dim"] is not None:
        raise ValueError("StableDiffusionXLPipeline needs an AutoencoderKL with one scale or quant_conv, and sides of "
                         "multiples of 8 pixels; draw images with unet-diffusion sample")  # fmt: skip
    if kind is None:
        normalise = normalised_autoencoder if takes_scale(vae, space, None) else with_moments
        return own_pipeline(parts, unet, scheduler, normalise(vae, space))
    vae = normalised_autoencoder(vae, space, FIXED_SCALES.get(kind))
    if kind in (LDMPipeline, LDMSuperResolutionPipeline):
        return kind(vae, unet, scheduler)
    return _text_pipeline(kind, parts, unet=unet, scheduler=scheduler, vae=vae)


def _stock_pipeline(
    parts: DenoiserParts, space: LatentSpace, vae: AutoencoderNetwork
) -> type[DiffusionPipeline] | None:
    """The class of diffusers' pipeline that draws the same latents from the same conditions; None if there is none."""
    if not parts.are_pictures or any(condition.scale_factor > 1 for condition in parts.all_conditions):
        return None
    roles = {condition.pipeline_role for condition in parts.all_conditions}
    channels, height, width = parts.sample_shape
    has_scale = takes_scale(vae, space, None)
    if not roles:
        return LDMPipeline if has_scale and height == width else None
    if roles == {"low_res"}:
        return None if why_no_super_resolution(parts) else LDMSuperResolutionPipeline
    if not isinstance(vae, AutoencoderKL) or any(side % MULTIPLE for side in space.image_shape[1:]):
        return None
    stock = {"prompt": StableDiffusionPipeline, "xl_prompt": StableDiffusionXLPipeline}
    if has_scale and (alone := [kind for role, kind in stock.items() if roles == {role}]):
        return alone[0]
    if roles == {"prompt", "mask"} and has_scale and height == width and channels == INPAINTED_CHANNELS:
        return StableDiffusionInpaintPipeline
    if roles == {"prompt", "paired_image"} and takes_scale(vae, space, PAIRED_SCALE):
        return StableDiffusionInstructPix2PixPipeline
    if roles == {"prompt", "low_res", "class_labels"} and parts.null_label is None and not parts.num_classes:
        return StableDiffusionUpscalePipeline if takes_scale(vae, space, UPSCALED_SCALE) else None
    return None


def _text_pipeline(
    kind: type[DiffusionPipeline],
    parts: DenoiserParts,
    *,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    vae: AutoencoderKL,
) -> DiffusionPipeline:
    own = {name: part for condition in parts.all_conditions for name, part in condition.pipeline_parts().items()}
    if kind is StableDiffusionXLPipeline:
        return kind(
            vae=vae, unet=unet, scheduler=scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False, **own
        )
    components = {
        "vae": vae,
        "text_encoder": own["text_encoder"],
        "tokenizer": own["tokenizer"],
        "unet": unet,
        # The pipelines would set steps_offset with a warning. It has no effect on "trailing" timesteps.
        "scheduler": DDIMScheduler.from_config({**scheduler.config, "steps_offset": 1}),
        "safety_checker": None,
        "feature_extractor": None,
    }
    if kind is StableDiffusionUpscalePipeline:
        return kind(**components, low_res_scheduler=own["low_res_scheduler"], max_noise_level=MAX_NOISE_LEVEL)
    return kind(**components, requires_safety_checker=False)


@torch.no_grad()
def _check_equal(parts: DenoiserParts, pipeline: DiffusionPipeline) -> None:
    """Compare a reloaded pipeline with its original on random input."""
    alphas = parts.schedule.alphas_cumprod
    differences = {
        "outputs of the network": _network_difference(parts, pipeline.unet),
        "alphas_cumprod": _difference(alphas, pipeline.scheduler.alphas_cumprod),
    }
    if isinstance(parts.codec, LatentCodec):
        vae = pipeline.vae if hasattr(pipeline, "vae") else pipeline.vqvae
        differences["decoded images"] = _decoded_difference(parts.codec, parts.sample_shape[0], vae)
    for condition in parts.all_conditions:
        for name, (ours, theirs) in condition.pipeline_outputs(pipeline).items():
            differences[name] = _difference(ours, theirs)
    _check_small(differences)


def _network_difference(parts: DenoiserParts, loaded: UNet2DModel | UNet2DConditionModel) -> float:
    """The difference of the networks' outputs, for input that is two pixels wide in the mid block."""
    unet = copy.deepcopy(parts.unet).cpu().float().eval()
    set_speed(unet, "plain")
    side = 2 ** len(unet.config["channels"])
    generator = keyed_generator(0)
    x = torch.randn(2, unet.config["in_channels"], side, side, generator=generator)
    t = torch.randint(parts.schedule.num_train_timesteps, (2,), generator=generator)
    classes = unet.config["num_class_embeds"]
    labels = None if classes is None else torch.randint(classes, (2,), generator=generator)
    if unet.config["context_dim"] is not None:
        context = torch.randn(2, 3, unet.config["context_dim"], generator=generator)
        vector, added = None, None
        if unet.config["vector_dim"] is not None:
            sizes = torch.randint(1024, (2, NUM_SIZES), generator=generator)
            pooled = torch.randn(2, unet.config["vector_dim"] - NUM_SIZES * SDXL_TIME_DIM, generator=generator)
            vector, added = torch.cat([pooled, size_waves(sizes)], dim=1), {"text_embeds": pooled, "time_ids": sizes}
        theirs = loaded(x, t, encoder_hidden_states=context, class_labels=labels, added_cond_kwargs=added).sample
        return _difference(unet(x, t, labels, context=context, vector=vector), theirs)
    return _difference(unet(x, t, labels), loaded(x, t, class_labels=labels).sample)


def _decoded_difference(codec: LatentCodec, channels: int, loaded: AutoencoderNetwork) -> float:
    space, latents = codec.space, torch.randn(1, channels, 2, 2, generator=keyed_generator(0))
    assert space is not None
    loaded_space = latent_space_of(loaded, "", space.image_shape)
    original = copy.deepcopy(codec.autoencoder).cpu()
    return _difference(decode_latents(original, space, latents), decode_latents(loaded, loaded_space, latents))


def _difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference, relative to the largest expected value if that is above 1."""
    return float((expected - got).abs().max() / expected.abs().max().clamp(min=1))


def _check_small(differences: Mapping[str, float]) -> None:
    if not all(value <= EXPORT_TOLERANCE for value in differences.values()):  # this form refuses nan, too
        listed = ", ".join(f"{name} differ by {value:.1e}" for name, value in differences.items())
        raise RuntimeError(f"the exported folder must give the original's results, but {listed}; nothing was exported")


@torch.no_grad()
def check_same_reconstruction(autoencoder: AutoencoderNetwork, loaded: AutoencoderNetwork) -> None:
    """Raise a RuntimeError if an autoencoder reconstructs otherwise once it was loaded."""
    side = 2 * downsampling(autoencoder)
    x = torch.randn(1, autoencoder.config["in_channels"], side, side, generator=keyed_generator(0))
    _check_small({"reconstructed images": _difference(reconstruct(autoencoder, x), reconstruct(loaded, x))})
