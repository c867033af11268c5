"""Networks and pipelines to diffusers' folders.

An exported folder needs diffusers and nothing of this package. It is reloaded and compared before it gets its name.
"""

import copy
import json
import math
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
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

from unet_diffusion.diffusers_io.configurations import config_to_diffusers
from unet_diffusion.diffusers_io.model_card import autoencoder_card, model_card
from unet_diffusion.diffusers_io.pipelines import conditional
from unet_diffusion.diffusers_io.pipelines.conditional import ConditionalPipeline
from unet_diffusion.diffusion.conditions import class_token_embedding
from unet_diffusion.diffusion.conditions.class_token_embedding import ClassTokenEmbedding
from unet_diffusion.diffusion.conditions.low_resolution import MAX_NOISE_LEVEL
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.diffusion.schedule import scheduler_config
from unet_diffusion.latents.codec import LatentCodec, decode_latents, latent_space_of
from unet_diffusion.latents.space import MOMENTS, LatentSpace
from unet_diffusion.models.autoencoders import AutoencoderNetwork, downsampling, pretrained_autoencoder, reconstruct
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.speed import set_speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.atomic_files import check_replaceable, put_folder, read_json
from unet_diffusion.runtime.randomness import keyed_generator

StrPath = str | os.PathLike[str]

MULTIPLE = 8  # pixels, of the sides of what a StableDiffusionPipeline draws
UPSCALED_SCALE = 0.08333  # scaling_factor that a StableDiffusionUpscalePipeline sets, whatever there was
INPAINTED_CHANNELS = 4  # of the latents of a StableDiffusionInpaintPipeline, whose network must take 9
EXPORT_TOLERANCE = 1e-4  # of outputs of order 1; the same float32 operations in another order differ by 1e-6


def to_diffusers(
    model: PixelNetwork, sample_size: int | tuple[int, int] | None = None
) -> UNet2DModel | UNet2DConditionModel:
    """The same network as diffusers': float32, on the CPU, in eval mode.

    Args:
        model: the network; with tokens to attend to it becomes a UNet2DConditionModel, otherwise a UNet2DModel.
        sample_size: side, or height and width, of the images that diffusers' pipelines are to make; they need it.

    Raises:
        ValueError: if diffusers has no such network.
    """
    config = _config_of(model)
    counterpart = UNet2DModel if model.config["context_dim"] is None else UNet2DConditionModel
    unet = counterpart(**config, sample_size=sample_size)
    unet.load_state_dict(model.state_dict())
    return unet.eval()


def export_pipeline(parts: DenoiserParts, folder: StrPath, *, overwrite: bool = False) -> None:
    """Write a folder that diffusers loads without this package, after a comparison of what it loads with the original.

    It is one of diffusers' pipelines where there is one that draws the same: of images from nothing a DDPMPipeline, of
    latents an LDMPipeline; of latents from texts a StableDiffusionPipeline, from masked images too a
    StableDiffusionInpaintPipeline, and from small ones a StableDiffusionUpscalePipeline. Else it holds its own
    `pipeline.py`, and is loaded with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. A README.md
    says how, for each.

    Args:
        parts: The denoiser.
        folder: The folder to make; it appears whole or not at all.
        overwrite: Replace the folder, if all that it holds was exported there.

    Raises:
        FileExistsError: If the folder exists and is not to be overwritten, or holds something else.
        FileNotFoundError: If the autoencoder of its latents is not there.
        ValueError: If there is no such pipeline (`why_not_exported`), or the autoencoder is another one.
        RuntimeError: If diffusers loads something else than was written.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        pipeline = _build_pipeline(parts)
        pipeline.save_pretrained(partial)
        _check_equal(parts, type(pipeline).from_pretrained(partial))
        if isinstance(pipeline, ConditionalPipeline):
            _ship_pipeline_code(partial)
        (partial / "README.md").write_text(model_card(parts, pipeline), encoding="utf-8")
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def why_not_exported(parts: DenoiserParts) -> str | None:
    """Why a denoiser cannot be a pipeline of diffusers, and what to do then; None if it can."""
    try:
        _config_of(parts.unet)
    except ValueError as error:
        return f"{error}; draw its images with unet-diffusion sample"
    reason = _why_no_pipeline_takes(parts)
    if parts.codec.config is not None:
        reason = f"no pipeline of diffusers decodes with the codec {type(parts.codec).__name__}"
    return reason and f"{reason}; draw its images with unet-diffusion sample"


def export_autoencoder(
    autoencoder: AutoencoderNetwork,
    folder: StrPath,
    *,
    image_shape: tuple[int, int, int],
    latent_std: float | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that diffusers loads, with the latents' scale if it is known, after a comparison.

    A README.md in it says how.

    Args:
        autoencoder: The autoencoder.
        folder: The folder to make; it appears whole or not at all.
        image_shape: (C, H, W) of the images that it was trained on.
        latent_std: Standard deviation of its latents; None: not known.
        settings: How it was trained, as plain values; None: not known.
        overwrite: Replace the folder, if all that it holds was exported there.

    Raises:
        FileExistsError: If the folder exists and is not to be overwritten, or holds something else.
        RuntimeError: If diffusers loads something else than was written.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    _, height, width = image_shape
    fields: dict[str, Any] = {"sample_size": height if height == width else [height, width]}
    if latent_std is not None:
        fields["scaling_factor"] = 1 / latent_std
    exported = _with_scale(autoencoder, **fields).cpu().float()
    try:
        exported.save_pretrained(partial)
        _check_same_reconstruction(exported, pretrained_autoencoder(partial))
        card = autoencoder_card(autoencoder, image_shape, latent_std, settings or {})
        (partial / "README.md").write_text(card, encoding="utf-8")
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _config_of(model: PixelNetwork) -> dict[str, Any]:
    """The configuration of the same network in diffusers; a ValueError says why there is none."""
    # A class of a user's own that inherits from it may compute something else. Weights that are shared out over
    # processes are of a class of torch's that inherits from it, too.
    ours = [one for one in type(model).__mro__ if one is not object and not one.__module__.startswith("torch.")]
    kind = (*ours, type(model))[0]
    if kind is not DenoiserUNet or not isinstance(model, DenoiserUNet):
        raise ValueError(f"only a DenoiserUNet has a counterpart in diffusers, got a {kind.__name__}")
    return config_to_diffusers(model.config)


def _why_no_pipeline_takes(parts: DenoiserParts) -> str | None:
    """What of a denoiser's conditions no pipeline gives it."""
    conditions = parts.all_conditions
    # A kind of one's own that inherits a role may do something else with it.
    known = [vars(type(one)).get("pipeline_role") for one in conditions]
    if unknown := [type(one).__name__ for one, role in zip(conditions, known, strict=True) if role is None]:
        return f"no pipeline of diffusers gives a network the condition {unknown[0]}"
    arguments = [(one.network_argument, one.batch_key) for one in conditions]
    if twice := [name for name, key in arguments if arguments.count((name, key)) > 1]:
        return f"a pipeline gives one condition of a kind, and this denoiser has several that become {twice[0]!r}"
    takes_context = parts.unet.config.get("context_dim") is not None
    if takes_context and not any(one.network_argument == "context" for one in conditions):
        return "a pipeline must give tokens to a network with context_dim, and this denoiser has no condition with them"
    if parts.unet.config.get("vector_dim") is not None:
        return f"no pipeline here gives a vector, and the network has vector_dim {parts.unet.config['vector_dim']}"
    return None


def _build_pipeline(parts: DenoiserParts) -> DiffusionPipeline:
    if reason := why_not_exported(parts):
        raise ValueError(reason)
    _, height, width = parts.sample_shape
    unet = to_diffusers(parts.unet, height if height == width else (height, width))
    codec = parts.codec
    scheduler = DDPMScheduler(**scheduler_config(parts.schedule, clip_sample=codec.clip_sample))
    if not isinstance(codec, LatentCodec):
        if not parts.all_conditions:
            return DDPMPipeline(unet, scheduler)
        return _own_pipeline(parts, unet, scheduler, None)
    scheduler = DDIMScheduler.from_config(json.loads(scheduler.to_json_string()))
    vae, space = copy.deepcopy(codec.autoencoder).cpu(), codec.space
    assert space is not None
    kind = _stock_pipeline(parts, space, vae)
    if kind is None:
        normalise = normalised_autoencoder if _takes_scale(vae, space, None) else _with_moments
        return _own_pipeline(parts, unet, scheduler, normalise(vae, space))
    vae = normalised_autoencoder(vae, space, UPSCALED_SCALE if kind is StableDiffusionUpscalePipeline else None)
    if kind is LDMPipeline:
        return LDMPipeline(vae, unet, scheduler)
    return _text_pipeline(kind, parts, unet=unet, scheduler=scheduler, vae=vae)


def _stock_pipeline(
    parts: DenoiserParts, space: LatentSpace, vae: AutoencoderNetwork
) -> type[DiffusionPipeline] | None:
    """The pipeline of diffusers that draws the same latents from the same; None if there is none."""
    roles = {one.pipeline_role for one in parts.all_conditions}
    channels, height, width = parts.sample_shape
    takes_scale = _takes_scale(vae, space, None)
    if not roles:
        return LDMPipeline if takes_scale and height == width else None
    if not isinstance(vae, AutoencoderKL) or any(side % MULTIPLE for side in space.image_shape[1:]):
        return None
    if roles == {"prompt"} and takes_scale:
        return StableDiffusionPipeline
    if roles == {"prompt", "mask"} and takes_scale and height == width and channels == INPAINTED_CHANNELS:
        return StableDiffusionInpaintPipeline
    if roles == {"prompt", "low_res", "class_labels"} and parts.null_label is None:
        return StableDiffusionUpscalePipeline if _takes_scale(vae, space, UPSCALED_SCALE) else None
    return None


def _own_pipeline(
    parts: DenoiserParts,
    unet: UNet2DModel | UNet2DConditionModel,
    scheduler: DDPMScheduler | DDIMScheduler,
    vae: AutoencoderNetwork | None,
) -> ConditionalPipeline:
    conditions = parts.all_conditions
    return ConditionalPipeline(
        unet,
        scheduler,
        vae,
        class_names=parts.class_names,
        unconditional={one.pipeline_role: one.pipeline_null for one in conditions if one.has_null},
        max_noise_level=MAX_NOISE_LEVEL,
        **{name: part for one in conditions for name, part in one.pipeline_parts().items()},
    )


def _text_pipeline(
    kind: type[DiffusionPipeline],
    parts: DenoiserParts,
    *,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    vae: AutoencoderKL,
) -> DiffusionPipeline:
    made = {name: part for one in parts.all_conditions for name, part in one.pipeline_parts().items()}
    components = {
        "vae": vae,
        "text_encoder": made["text_encoder"],
        "tokenizer": made["tokenizer"],
        "unet": unet,
        # They would set this themselves, with a warning; it has no effect where timesteps are spaced as here.
        "scheduler": DDIMScheduler.from_config({**scheduler.config, "steps_offset": 1}),
        "safety_checker": None,
        "feature_extractor": None,
    }
    if kind is StableDiffusionUpscalePipeline:
        return kind(**components, low_res_scheduler=made["low_res_scheduler"], max_noise_level=MAX_NOISE_LEVEL)
    return kind(**components, requires_safety_checker=False)


def _has_scale(space: LatentSpace, scaling_factor: float | None) -> bool:
    """Whether latents have that one scale; None: any one."""
    found = space.scaling_factor
    return found is not None and (scaling_factor is None or math.isclose(found, scaling_factor))


def _takes_scale(autoencoder: AutoencoderNetwork, space: LatentSpace, scaling_factor: float | None) -> bool:
    """Whether `normalised_autoencoder` can do it."""
    has_convolutions = autoencoder.quant_conv is not None and autoencoder.post_quant_conv is not None
    return has_convolutions or _has_scale(space, scaling_factor)


def _with_scale(autoencoder: AutoencoderNetwork, **fields: Any) -> AutoencoderNetwork:
    """A copy whose configuration has these fields, and no moments of the latents but those."""
    autoencoder = copy.deepcopy(autoencoder)
    moments = dict.fromkeys(MOMENTS) if isinstance(autoencoder, AutoencoderKL) else {}  # VQModel has no such fields
    autoencoder.register_to_config(**{**moments, **fields})
    return autoencoder


def _with_moments(autoencoder: AutoencoderNetwork, space: LatentSpace) -> AutoencoderNetwork:
    """A copy whose configuration has the latents' mean and deviation of each channel."""
    mean, std = MOMENTS
    return _with_scale(autoencoder, scaling_factor=1.0, **{mean: list(space.mean), std: list(space.std)})


@torch.no_grad()
def normalised_autoencoder(
    autoencoder: AutoencoderNetwork, space: LatentSpace, scaling_factor: float | None = None
) -> AutoencoderNetwork:
    """The same autoencoder for latents of mean 0 and standard deviation 1 a channel, for pipelines with one scale only.

    Its convolutions of one pixel, the encoder's last and the decoder's first, take the moments in. One scale for all
    channels, as with a codebook, becomes diffusers' scaling_factor.

    Args:
        autoencoder: of any scale.
        space: of its latents.
        scaling_factor: that diffusers is to have, whatever the scale of the latents; None: it does not matter.

    Raises:
        ValueError: if it lacks these convolutions.
    """
    if not _takes_scale(autoencoder, space, scaling_factor):
        raise ValueError("an autoencoder must have quant_conv and post_quant_conv to take in a scale for each channel")
    if _has_scale(space, scaling_factor):
        return _with_scale(autoencoder, scaling_factor=scaling_factor or space.scaling_factor)
    scaling_factor = scaling_factor or 1.0
    autoencoder = _with_scale(autoencoder, scaling_factor=scaling_factor)
    last, first = autoencoder.quant_conv, autoencoder.post_quant_conv
    mean, std = torch.tensor(space.mean), torch.tensor(space.std) * scaling_factor
    first.bias += first.weight.flatten(1) @ mean
    first.weight *= std[:, None, None]
    last.bias -= torch.cat([mean, 2 * std.log()])
    scale = torch.cat([std, torch.ones_like(std)])  # of means; of the logarithms of variances
    last.bias /= scale
    last.weight /= scale[:, None, None, None]
    return autoencoder


@torch.no_grad()
def _check_equal(parts: DenoiserParts, pipeline: DiffusionPipeline) -> None:
    """Compare a reloaded pipeline with its original, on random input."""
    alphas = parts.schedule.alphas_cumprod
    differences = {
        "outputs of the network": _network_difference(parts, pipeline.unet),
        "alphas_cumprod": _difference(alphas, pipeline.scheduler.alphas_cumprod),
    }
    if isinstance(parts.codec, LatentCodec):
        vae = pipeline.vqvae if isinstance(pipeline, LDMPipeline) else pipeline.vae
        differences["decoded images"] = _decoded_difference(parts.codec, parts.sample_shape[0], vae)
    for condition in parts.all_conditions:
        for name, (ours, theirs) in condition.pipeline_outputs(pipeline).items():
            differences[name] = _difference(ours, theirs)
    _check_small(differences)


def _network_difference(parts: DenoiserParts, loaded: UNet2DModel | UNet2DConditionModel) -> float:
    """On input that is two pixels wide at the bottom."""
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
        theirs = loaded(x, t, encoder_hidden_states=context, class_labels=labels).sample
        return _difference(unet(x, t, labels, context=context), theirs)
    return _difference(unet(x, t, labels), loaded(x, t, class_labels=labels).sample)


def _decoded_difference(codec: LatentCodec, channels: int, loaded: AutoencoderNetwork) -> float:
    space = codec.space
    assert space is not None
    latents = torch.randn(1, channels, 2, 2, generator=keyed_generator(0))
    found = latent_space_of(loaded, "", space.image_shape)
    original = copy.deepcopy(codec.autoencoder).cpu()
    return _difference(decode_latents(original, space, latents), decode_latents(loaded, found, latents))


def _difference(expected: Tensor, got: Tensor) -> float:
    """The largest, as a share of the largest expected; of values below 1, as it is."""
    return float((expected - got).abs().max() / expected.abs().max().clamp(min=1))


def _check_small(differences: Mapping[str, float]) -> None:
    if not all(one <= EXPORT_TOLERANCE for one in differences.values()):  # not: NaN is a failure too
        found = ", ".join(f"{name} differ by {one:.1e} of their largest" for name, one in differences.items())
        raise RuntimeError(f"diffusers must load what was written, but {found}; nothing was exported")


@torch.no_grad()
def _check_same_reconstruction(autoencoder: AutoencoderNetwork, loaded: AutoencoderNetwork) -> None:
    side = 2 * downsampling(autoencoder)
    x = torch.randn(1, autoencoder.config["in_channels"], side, side, generator=keyed_generator(0))
    _check_small({"reconstructed images": _difference(reconstruct(autoencoder, x), reconstruct(loaded, x))})


def _ship_pipeline_code(folder: Path) -> None:
    """Put the pipeline's source into the folder, and its names into model_index.json in the form for custom code."""
    index = read_json(folder / "model_index.json")
    shutil.copyfile(conditional.__file__, folder / "pipeline.py")
    index["_class_name"] = ["pipeline", ConditionalPipeline.__name__]
    if (folder / "class_tokens").is_dir():
        shutil.copyfile(class_token_embedding.__file__, folder / "class_tokens" / "class_tokens.py")
        index["class_tokens"] = ["class_tokens", ClassTokenEmbedding.__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
