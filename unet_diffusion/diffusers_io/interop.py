"""Networks and pipelines to and from diffusers' folders.

Weights pass both ways with a strict load and no key map; the configuration is translated by `diffusers_config.py`. An
exported folder needs diffusers and nothing of this package. It is reloaded and compared before it gets its name.
"""

import copy
import json
import math
import os
import re
import shutil
import warnings
from collections import defaultdict
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
from safetensors.torch import load_file
from torch import Tensor, nn

from unet_diffusion.diffusers_io.configurations import (
    complete,
    config_from_diffusers,
    config_to_diffusers,
    schedule_from_diffusers,
)
from unet_diffusion.diffusers_io.model_card import autoencoder_card, model_card
from unet_diffusion.diffusers_io.pipelines import class_tokens, conditional
from unet_diffusion.diffusers_io.pipelines.class_tokens import ClassTokenEmbedding
from unet_diffusion.diffusers_io.pipelines.conditional import ConditionalPipeline
from unet_diffusion.diffusion.conditions.class_labels import ClassLabels
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.conditions.low_resolution import LOW_RES_SCHEDULE, MAX_NOISE_LEVEL, LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.text import TextTokens, pretrained_text
from unet_diffusion.diffusion.sampling import scheduler_config
from unet_diffusion.inference.record import TrainedAutoencoder, TrainedDenoiser, read_checkpoint
from unet_diffusion.latents.codec import autoencoder_of, decode_latents, latent_space_of
from unet_diffusion.latents.space import MOMENTS, LatentSpace
from unet_diffusion.models.autoencoders import Autoencoder, downsampling, pretrained_autoencoder, reconstruct
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.speed import set_speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.atomic_files import check_replaceable, field_of, put_folder, read_json
from unet_diffusion.runtime.messages import in_words
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.runtime.safe_loading import load_plain

StrPath = str | os.PathLike[str]

SAMPLER_FIELDS = {"variance_type": "fixed_small", "thresholding": False}  # of `scheduler_config`
LEGACY_ATTENTION_KEYS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in old files
# a variant, such as fp16, stands before or after the number of the shard
WEIGHTS_FILE = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.(safetensors|bin)")
AUTOENCODERS, TEXT = ("vae", "vqvae"), ("text_encoder", "tokenizer")  # parts of a pipeline
CLASS_TOKENS = "class_tokens"  # part of a pipeline with code of its own
KINDS = (ClassLabels, ClassTokens, TextTokens, Concat, MaskedImage, LowResolution)  # of conditions, that it knows
DROPOUT = 0.1  # of an imported condition that has a null; usual
MULTIPLE = 8  # pixels, of the sides of what a StableDiffusionPipeline draws
UPSCALED_SCALE = 0.08333  # scaling_factor that a StableDiffusionUpscalePipeline sets, whatever there was
INPAINTED_CHANNELS = 4  # of the latents of a StableDiffusionInpaintPipeline, whose network must take 9
LOW_RES = "low_res_scheduler"  # part of an upscaler: the noise of its small image
LEFT_OUT = ("safety_checker", "feature_extractor", "watermarker")  # parts that do not draw
EXPORT_TOLERANCE = 1e-4  # of outputs of order 1; the same float32 operations in another order differ by 1e-6


def from_diffusers(model_or_folder: UNet2DModel | UNet2DConditionModel | StrPath) -> DenoiserUNet:
    """The same network as one of diffusers: float32, on the CPU, in eval mode.

    Args:
        model_or_folder: a UNet2DModel or UNet2DConditionModel; or a folder with its config.json and weights
            (safetensors or .bin, whole or in shards; of a variant such as fp16 if there is no other), or with a
            subfolder unet that has them.

    Raises:
        FileNotFoundError: if the folder or a file in it is missing.
        ValueError: if the configuration is not supported, or the weights do not fit it.
    """
    if isinstance(model_or_folder, UNet2DModel | UNet2DConditionModel):
        kind = UNet2DModel if isinstance(model_or_folder, UNet2DModel) else UNet2DConditionModel
        config = {**model_or_folder.config, "_class_name": kind.__name__}
        weights = model_or_folder.state_dict()
    elif isinstance(model_or_folder, str | os.PathLike):
        folder = _unet_folder(Path(model_or_folder))
        config, weights = _read_json(folder / "config.json"), {}
    else:
        got = type(model_or_folder).__name__
        raise ValueError(f"only a UNet2DModel, UNet2DConditionModel or a folder can be imported, got a {got}")
    model = DenoiserUNet(**config_from_diffusers(config)).eval()
    _load_weights(model, weights or _read_weights(folder))
    return model


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


def export_pipeline(
    trained: TrainedDenoiser, folder: StrPath, *, overwrite: bool = False, autoencoder: StrPath | None = None
) -> None:
    """Write a folder that diffusers loads without this package, after a comparison of what it loads with the original.

    It is one of diffusers' pipelines where there is one that draws the same: of images from nothing a DDPMPipeline, of
    latents an LDMPipeline; of latents from captions a StableDiffusionPipeline, from masked images too a
    StableDiffusionInpaintPipeline, and from small ones a StableDiffusionUpscalePipeline. Else it holds its own
    `pipeline.py`, and is loaded with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. A README.md
    says how, for each.

    Args:
        trained: the network and its schedule.
        folder: appears whole or not at all.
        overwrite: Replace the folder, if all that it holds was exported there.
        autoencoder: folder of the one whose latents are denoised; None: where it was in training.

    Raises:
        FileExistsError: If the folder exists and is not to be overwritten, or holds something else.
        FileNotFoundError: if the autoencoder is not there.
        ValueError: if there is no such pipeline (`why_not_exported`), or the autoencoder is another one.
        RuntimeError: if diffusers loads something else than was written.
    """
    if autoencoder is not None and trained.latent_space is None:
        raise ValueError("an autoencoder is for a denoiser of latents, and this one denoises images; leave it out")
    folder = Path(folder).resolve()
    check_replaceable(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        pipeline = _build_pipeline(trained, autoencoder)
        pipeline.save_pretrained(partial)
        _check_equal(trained, type(pipeline).from_pretrained(partial), autoencoder)
        if isinstance(pipeline, ConditionalPipeline):
            _ship_pipeline_code(partial)
        (partial / "README.md").write_text(model_card(trained, pipeline), encoding="utf-8")
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def why_not_exported(trained: TrainedDenoiser) -> str | None:
    """Why a denoiser cannot be a pipeline of diffusers, and what to do then; None if it can."""
    try:
        _config_of(trained.unet)
    except ValueError as error:
        return f"{error}; draw its images with unet-diffusion sample"
    reason = _why_not_given(trained)
    return reason and f"{reason}; draw its images with unet_diffusion.diffusion.sampling.sample"


def export_autoencoder(trained: TrainedAutoencoder, folder: StrPath, *, overwrite: bool = False) -> None:
    """Write a folder that diffusers loads, with the latents' scale if it is known, after a comparison.

    A README.md in it says how.

    Args:
        trained: the autoencoder and the scale of its latents.
        folder: appears whole or not at all.
        overwrite: Replace the folder, if all that it holds was exported there.

    Raises:
        FileExistsError: If the folder exists and is not to be overwritten, or holds something else.
        RuntimeError: if diffusers loads something else than was written.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    _, height, width = trained.image_shape
    fields: dict[str, Any] = {"sample_size": height if height == width else [height, width]}
    if trained.latent_std is not None:
        fields["scaling_factor"] = 1 / trained.latent_std
    autoencoder = _with_scale(trained.autoencoder, **fields).cpu().float()
    try:
        autoencoder.save_pretrained(partial)
        _check_same_reconstruction(autoencoder, pretrained_autoencoder(partial))
        (partial / "README.md").write_text(autoencoder_card(trained), encoding="utf-8")
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def import_pipeline(folder: StrPath) -> TrainedDenoiser:
    """The denoiser in a local pipeline folder of diffusers: what `export_pipeline` writes, or Stable Diffusion 1 or 2.

    Those for inpainting and for upscaling too. The text encoder is frozen, and latents keep the scale that the
    autoencoder's configuration names. Code in the folder is not run.

    Raises:
        FileNotFoundError: if the folder lacks a network, a scheduler or another part that its index names.
        ValueError: if a part of the pipeline, or a field of a configuration, is not supported.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if (folder / "model_index.json").is_file():
        field_of(index, "_class_name", folder / "model_index.json")
    parts = _parts(index)
    config = _network_config(folder, has_tokens=not parts.isdisjoint({*TEXT, CLASS_TOKENS}))
    scheduler_file = _scheduler_file(folder)
    scheduler_config = _read_json(scheduler_file)
    field_of(scheduler_config, "_class_name", scheduler_file)
    image_shape = _image_shape(config)
    unconditional = index.get("unconditional", {"prompt": ""})  # Stable Diffusion names none
    maps = _maps(
        index, parts, drawn=image_shape[0], taken=config["in_channels"], dropout=DROPOUT * ("concat" in unconditional)
    )
    if LOW_RES in parts:
        _check_low_res_schedule(folder / LOW_RES / "scheduler_config.json")
    space = next((_latent_space(folder / name, image_shape) for name in AUTOENCODERS if name in parts), None)
    _warn_of_lost_fields(scheduler_config, clip_sample=space is None)
    return TrainedDenoiser(
        unet=from_diffusers(folder),
        schedule=schedule_from_diffusers(scheduler_config),
        image_shape=image_shape,
        null_label=unconditional.get("class_labels"),
        class_names=index.get("class_names"),
        latent_space=space,
        conditions=nn.ModuleList([*_tokens(folder, parts, unconditional), *maps]).eval(),
    )


def load_denoiser(path: StrPath) -> TrainedDenoiser:
    """The denoiser in a checkpoint file, in a run folder (its checkpoints/last.ckpt) or in a diffusers pipeline folder.

    Raises:
        FileNotFoundError: if none of these is there.
        ValueError: if it cannot be read; see `read_checkpoint` and `import_pipeline`.
    """
    path = Path(path)
    if path.is_file():
        return read_checkpoint(path)
    if (path / "checkpoints" / "last.ckpt").is_file():
        return read_checkpoint(path / "checkpoints" / "last.ckpt")
    if any((path / name).is_file() for name in ("model_index.json", "unet/config.json", "config.json")):
        return import_pipeline(path)
    raise FileNotFoundError(
        f"no denoiser at {path}: it must be a checkpoint file, a run folder with checkpoints/last.ckpt, "
        "or a diffusers folder with model_index.json"
    )


def _config_of(model: PixelNetwork) -> dict[str, Any]:
    """The configuration of the same network in diffusers; a ValueError says why there is none."""
    if not isinstance(model, DenoiserUNet):
        raise ValueError(f"only a DenoiserUNet has a counterpart in diffusers, got a {type(model).__name__}")
    return config_to_diffusers(model.config)


def _parts(index: Mapping[str, Any]) -> set[str]:
    """The parts of a pipeline that draw; refuses unknown ones, and warns of those that are LEFT_OUT."""
    known = {"unet", "scheduler", LOW_RES, CLASS_TOKENS, *AUTOENCODERS, *TEXT}
    parts = {
        name
        for name, value in index.items()
        if isinstance(value, list) and name not in ("_class_name", "class_names") and value and value[0]
    }
    if others := sorted(parts - known - {*LEFT_OUT}):
        raise ValueError(
            f"a pipeline must consist of {', '.join(sorted(known))} to be imported, got also {', '.join(others)}; "
            "from_diffusers reads the network alone"
        )
    if lost := sorted(parts & {*LEFT_OUT}):
        warnings.warn(f"not kept of the pipeline: {', '.join(lost)}", stacklevel=3)
    return parts & known


def _network_config(folder: Path, *, has_tokens: bool) -> dict[str, Any]:
    """The whole configuration of the network, which must be of the kind that takes what the pipeline gives it."""
    config = _read_json(_unet_folder(folder) / "config.json")
    wanted, given = (UNet2DConditionModel, "captions or class tokens") if has_tokens else (UNet2DModel, "noise alone")
    got = config.get("_class_name", "UNet2DModel")
    if got != wanted.__name__:
        raise ValueError(
            f"only a {wanted.__name__} makes images from {given}, got a {got} in {folder}; "
            "from_diffusers reads the network alone"
        )
    return complete(wanted, config)


def _latent_space(folder: Path, latent_shape: tuple[int, int, int]) -> LatentSpace:
    """That of the autoencoder in the folder, with the scale that its configuration names."""
    autoencoder = pretrained_autoencoder(folder)
    _, height, width = (downsampling(autoencoder) * side for side in latent_shape)
    return latent_space_of(autoencoder, folder, (autoencoder.config["in_channels"], height, width))


def _warn_of_lost_fields(config: Mapping[str, Any], *, clip_sample: bool) -> None:
    """Says which settings of the sampler, not of the schedule, are replaced by ours."""
    lost = [
        f"{field} {config[field]} (here {ours})"
        for field, ours in {**SAMPLER_FIELDS, "clip_sample": clip_sample}.items()
        if config.get(field, ours) != ours
    ]
    if lost:
        warnings.warn(f"not kept of the scheduler, so samples will differ: {', '.join(lost)}", stacklevel=3)


def _image_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Of what is drawn."""
    size = config["sample_size"]
    if size is None:
        raise ValueError("sample_size must be given in the network's config.json, got None; add the side of the images")
    height, width = (size, size) if isinstance(size, int) else size
    return config["out_channels"], height, width


def _maps(index: Mapping[str, Any], parts: set[str], *, drawn: int, taken: int, dropout: float) -> list[Condition]:
    """What the network takes beside the channels that it draws: nothing, a mask and a masked image, or a small image.

    A pipeline with code of its own says whether it is the second, and may have other maps.
    """
    if LOW_RES in parts:
        if taken <= drawn:
            raise ValueError(f"in_channels must be more than out_channels {drawn}, for a small image, got {taken}")
        return [LowResolution(taken - drawn)]
    takes_mask = index.get("takes_mask", taken != drawn and "text_encoder" in parts)
    if takes_mask and taken == 2 * drawn + 1:
        return [MaskedImage(taken - drawn)]
    if taken == drawn and not takes_mask:
        return []
    if takes_mask or taken < drawn or "takes_mask" not in index:
        raise ValueError(f"in_channels must be as out_channels {drawn}, or with captions {2 * drawn + 1}, for a mask "
                         f"and a masked image, got {taken}")  # fmt: skip
    return [Concat(taken - drawn, dropout=dropout)]


def _tokens(folder: Path, parts: set[str], unconditional: Mapping[str, Any]) -> list[Condition]:
    """What the network attends to."""
    conditions: list[Condition] = []
    if CLASS_TOKENS in parts:
        config = _read_json(folder / CLASS_TOKENS / "config.json")
        dropout = DROPOUT * (CLASS_TOKENS in unconditional)
        conditions.append(ClassTokens(config["context_dim"], config["num_classes"], dropout=dropout))
        _load_weights(conditions[0], _read_weights(folder / CLASS_TOKENS))
    if not parts.isdisjoint(TEXT):
        conditions.append(pretrained_text(folder, dropout=DROPOUT * ("prompt" in unconditional)))
    return conditions


def _check_low_res_schedule(path: Path) -> None:
    """An upscaler's small images must have been noised as they are here."""
    alphas = schedule_from_diffusers(_read_json(path)).alphas_cumprod
    ours = LOW_RES_SCHEDULE.alphas_cumprod
    if alphas.shape != ours.shape or not torch.allclose(alphas, ours):
        raise ValueError(f"{path} must have the noise schedule of Stable Diffusion's upscaler, "
                         f"{LOW_RES_SCHEDULE.config}, and has another")  # fmt: skip


def _unet_folder(folder: Path) -> Path:
    for candidate in (folder / "unet", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder} must be a local folder with unet/config.json or config.json, and has neither; "
        "download a published model first"
    )


def _scheduler_file(folder: Path) -> Path:
    for candidate in (folder / "scheduler", folder):
        if (candidate / "scheduler_config.json").is_file():
            return candidate / "scheduler_config.json"
    raise FileNotFoundError(f"{folder} must have [scheduler/]scheduler_config.json, and has not")


def _read_json(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(path)
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights in a folder, under the names that diffusers gives them today."""
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        loaded = load_file(file) if file.suffix == ".safetensors" else load_plain(file)
        loaded = {_current_key(key): value for key, value in loaded.items()}
        if twice := weights.keys() & loaded.keys():
            raise ValueError(f"{folder} must hold each weight once, got {min(twice)} again in {file.name}")
        weights |= loaded
    return weights


def _load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(in_words(error)) from error


def _weight_files(folder: Path) -> list[Path]:
    """The files of one set of weights: full precision before variants, safetensors before pickles."""
    sets = defaultdict(list)
    for file in sorted(folder.iterdir()):
        if match := WEIGHTS_FILE.fullmatch(file.name):
            sets[match[1] or match[2] or "", match[3] == "bin"].append(file)
    if not sets:
        raise FileNotFoundError(f"{folder} must have weights named diffusion_pytorch_model.safetensors or .bin")
    variants = {variant for variant, _ in sets}
    if len(variants) > 1 and "" not in variants:
        raise ValueError(f"{folder} must have one variant of its weights, got {sorted(variants)}; remove the others")
    return sets[min(sets)]


def _current_key(key: str) -> str:
    """The key of a weight today; attention had other names once."""
    module, _, parameter = key.rpartition(".")
    parent, _, name = module.rpartition(".")
    return f"{parent}.{LEGACY_ATTENTION_KEYS[name]}.{parameter}" if name in LEGACY_ATTENTION_KEYS else key


def _why_not_given(trained: TrainedDenoiser) -> str | None:
    """What of a denoiser's conditions no pipeline gives it."""
    kinds = [type(one) for one in trained.all_conditions]
    if unknown := [kind.__name__ for kind in kinds if kind not in KINDS]:
        return f"a pipeline can have {', '.join(kind.__name__ for kind in KINDS)}, and this denoiser has {unknown[0]}"
    names = ["Concat" if issubclass(kind, Concat) else kind.__name__ for kind in kinds]
    if twice := [name for name in names if names.count(name) > 1]:
        return f"a pipeline is given one condition of a kind, and this denoiser has {twice[0]} {len(twice)} times"
    if trained.unet.config["context_dim"] is not None and not {"ClassTokens", "TextTokens"} & {*names}:
        return "a pipeline must give tokens to a network with context_dim, and this denoiser has no condition with them"
    if trained.unet.config["vector_dim"] is not None:
        return f"no pipeline here gives a vector, and the network has vector_dim {trained.unet.config['vector_dim']}"
    return None


def _build_pipeline(trained: TrainedDenoiser, autoencoder: StrPath | None) -> DiffusionPipeline:
    if reason := why_not_exported(trained):
        raise ValueError(reason)
    _, height, width = trained.image_shape
    unet = to_diffusers(trained.unet, height if height == width else (height, width))
    space = trained.latent_space
    scheduler = DDPMScheduler(**scheduler_config(trained.schedule, clip_sample=space is None))
    if space is None and not trained.all_conditions:
        return DDPMPipeline(unet, scheduler)
    if space is None:
        return _own_pipeline(trained, unet, scheduler, None)
    scheduler = DDIMScheduler.from_config(json.loads(scheduler.to_json_string()))
    vae = autoencoder_of(space, autoencoder)
    kind = _stock_pipeline(trained, space, vae)
    if kind is None:
        normalise = normalised_autoencoder if _takes_scale(vae, space, None) else _with_moments
        return _own_pipeline(trained, unet, scheduler, normalise(vae, space))
    vae = normalised_autoencoder(vae, space, UPSCALED_SCALE if kind is StableDiffusionUpscalePipeline else None)
    if kind is LDMPipeline:
        return LDMPipeline(vae, unet, scheduler)
    return _text_pipeline(kind, trained, unet=unet, scheduler=scheduler, vae=vae)


def _stock_pipeline(trained: TrainedDenoiser, space: LatentSpace, vae: Autoencoder) -> type[DiffusionPipeline] | None:
    """The pipeline of diffusers that draws the same latents from the same; None if there is none."""
    names = sorted(type(one).__name__ for one in trained.all_conditions)
    channels, height, width = trained.image_shape
    takes_scale = _takes_scale(vae, space, None)
    if not names:
        return LDMPipeline if takes_scale and height == width else None
    if not isinstance(vae, AutoencoderKL) or any(side % MULTIPLE for side in space.image_shape[1:]):
        return None
    if names == ["TextTokens"] and takes_scale:
        return StableDiffusionPipeline
    if names == ["MaskedImage", "TextTokens"] and takes_scale and height == width and channels == INPAINTED_CHANNELS:
        return StableDiffusionInpaintPipeline
    if names == ["ClassLabels", "LowResolution", "TextTokens"] and trained.null_label is None:
        return StableDiffusionUpscalePipeline if _takes_scale(vae, space, UPSCALED_SCALE) else None
    return None


def _own_pipeline(
    trained: TrainedDenoiser,
    unet: UNet2DModel | UNet2DConditionModel,
    scheduler: DDPMScheduler | DDIMScheduler,
    vae: Autoencoder | None,
) -> ConditionalPipeline:
    text, tokens = trained.condition(TextTokens), trained.condition(ClassTokens)
    if tokens is not None:
        embedding = ClassTokenEmbedding(tokens.config["context_dim"], tokens.config["num_classes"])
        embedding.load_state_dict(tokens.state_dict())
    return ConditionalPipeline(
        unet,
        scheduler,
        vae,
        text_encoder=text and _text_encoder(text),
        tokenizer=text and text.tokenizer,
        class_tokens=None if tokens is None else embedding.eval(),
        low_res_scheduler=_low_res_scheduler() if trained.condition(LowResolution) else None,
        class_names=trained.class_names,
        unconditional=_nulls(trained),
        takes_mask=trained.condition(MaskedImage) is not None,
        max_noise_level=MAX_NOISE_LEVEL,
    )


def _nulls(trained: TrainedDenoiser) -> dict[str, Any]:
    """What stands for not known, as a ConditionalPipeline names it, of the conditions that have a null."""
    tokens = trained.condition(ClassTokens)
    unconditional: dict[str, tuple[Condition | None, Any]] = {
        "class_labels": (trained.condition(ClassLabels), trained.null_label),
        CLASS_TOKENS: (tokens, tokens and tokens.config["num_classes"]),
        "prompt": (trained.condition(TextTokens), ""),
        "concat": (trained.condition(Concat), 0.0),
    }
    return {
        name: null for name, (condition, null) in unconditional.items() if condition is not None and condition.has_null
    }


def _text_pipeline(
    kind: type[DiffusionPipeline],
    trained: TrainedDenoiser,
    *,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    vae: AutoencoderKL,
) -> DiffusionPipeline:
    text = trained.condition(TextTokens)
    assert text is not None
    parts = {
        "vae": vae,
        "text_encoder": _text_encoder(text),
        "tokenizer": text.tokenizer,
        "unet": unet,
        # They would set this themselves, with a warning; it has no effect where timesteps are spaced as here.
        "scheduler": DDIMScheduler.from_config({**scheduler.config, "steps_offset": 1}),
        "safety_checker": None,
        "feature_extractor": None,
    }
    if kind is StableDiffusionUpscalePipeline:
        return kind(**parts, low_res_scheduler=_low_res_scheduler(), max_noise_level=MAX_NOISE_LEVEL)
    return kind(**parts, requires_safety_checker=False)


def _text_encoder(text: TextTokens) -> nn.Module:
    return copy.deepcopy(text.encoder).cpu().float().eval()


def _low_res_scheduler() -> DDPMScheduler:
    return DDPMScheduler(**scheduler_config(LOW_RES_SCHEDULE, clip_sample=False))


def _has_scale(space: LatentSpace, scaling_factor: float | None) -> bool:
    """Whether latents have that one scale; None: any one."""
    found = space.scaling_factor
    return found is not None and (scaling_factor is None or math.isclose(found, scaling_factor))


def _takes_scale(autoencoder: Autoencoder, space: LatentSpace, scaling_factor: float | None) -> bool:
    """Whether `normalised_autoencoder` can do it."""
    has_convolutions = autoencoder.quant_conv is not None and autoencoder.post_quant_conv is not None
    return has_convolutions or _has_scale(space, scaling_factor)


def _with_scale(autoencoder: Autoencoder, **fields: Any) -> Autoencoder:
    """A copy whose configuration has these fields, and no moments of the latents but those."""
    autoencoder = copy.deepcopy(autoencoder)
    moments = dict.fromkeys(MOMENTS) if isinstance(autoencoder, AutoencoderKL) else {}  # VQModel has no such fields
    autoencoder.register_to_config(**{**moments, **fields})
    return autoencoder


def _with_moments(autoencoder: Autoencoder, space: LatentSpace) -> Autoencoder:
    """A copy whose configuration has the latents' mean and deviation of each channel."""
    mean, std = MOMENTS
    return _with_scale(autoencoder, scaling_factor=1.0, **{mean: list(space.mean), std: list(space.std)})


@torch.no_grad()
def normalised_autoencoder(
    autoencoder: Autoencoder, space: LatentSpace, scaling_factor: float | None = None
) -> Autoencoder:
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
def _check_equal(trained: TrainedDenoiser, pipeline: DiffusionPipeline, autoencoder: StrPath | None) -> None:
    """Compare a reloaded pipeline with its original, on random input."""
    alphas = trained.schedule.alphas_cumprod
    differences = {
        "outputs of the network": _network_difference(trained, pipeline.unet),
        "alphas_cumprod": _difference(alphas, pipeline.scheduler.alphas_cumprod),
    }
    if trained.latent_space is not None:
        vae = pipeline.vqvae if isinstance(pipeline, LDMPipeline) else pipeline.vae
        original = autoencoder_of(trained.latent_space, autoencoder)
        differences["decoded images"] = _decoded_difference(original, trained, vae)
    if tokens := trained.condition(ClassTokens):
        labels = torch.arange(tokens.config["num_classes"] + 1)
        tokens = copy.deepcopy(tokens).cpu().float()
        differences["tokens of classes"] = _difference(tokens(labels), pipeline.class_tokens(labels))
    if text := trained.condition(TextTokens):
        differences["outputs of the text encoder"] = _text_difference(text, pipeline)
    _check_small(differences)


def _network_difference(trained: TrainedDenoiser, loaded: UNet2DModel | UNet2DConditionModel) -> float:
    """On input that is two pixels wide at the bottom."""
    unet = copy.deepcopy(trained.unet).cpu().float().eval()
    set_speed(unet, "plain")
    side = 2 ** len(unet.config["channels"])
    generator = keyed_generator(0)
    x = torch.randn(2, unet.config["in_channels"], side, side, generator=generator)
    t = torch.randint(trained.schedule.num_train_timesteps, (2,), generator=generator)
    classes = unet.config["num_class_embeds"]
    labels = None if classes is None else torch.randint(classes, (2,), generator=generator)
    if unet.config["context_dim"] is not None:
        context = torch.randn(2, 3, unet.config["context_dim"], generator=generator)
        theirs = loaded(x, t, encoder_hidden_states=context, class_labels=labels).sample
        return _difference(unet(x, t, labels, context=context), theirs)
    return _difference(unet(x, t, labels), loaded(x, t, class_labels=labels).sample)


def _decoded_difference(autoencoder: Autoencoder, trained: TrainedDenoiser, loaded: Autoencoder) -> float:
    space = trained.latent_space
    assert space is not None
    latents = torch.randn(1, trained.image_shape[0], 2, 2, generator=keyed_generator(0))
    found = latent_space_of(loaded, "", space.image_shape)
    return _difference(decode_latents(autoencoder, space, latents), decode_latents(loaded, found, latents))


def _text_difference(text: TextTokens, pipeline: DiffusionPipeline) -> float:
    """On a caption, each with its own tokenizer, called as the pipeline does."""
    caption, tokenizer = ["A caption of 7 words, and more"], pipeline.tokenizer
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    loaded = pipeline.text_encoder(tokenizer(caption, **options, return_tensors="pt").input_ids)[0]
    encoder = copy.deepcopy(text.encoder).cpu().float().eval()
    return _difference(encoder(text.token_ids(caption))[0], loaded)


def _difference(expected: Tensor, got: Tensor) -> float:
    """The largest, as a share of the largest expected; of values below 1, as it is."""
    return float((expected - got).abs().max() / expected.abs().max().clamp(min=1))


def _check_small(differences: Mapping[str, float]) -> None:
    if not all(one <= EXPORT_TOLERANCE for one in differences.values()):  # not: NaN is a failure too
        found = ", ".join(f"{name} differ by {one:.1e} of their largest" for name, one in differences.items())
        raise RuntimeError(f"diffusers must load what was written, but {found}; nothing was exported")


@torch.no_grad()
def _check_same_reconstruction(autoencoder: Autoencoder, loaded: Autoencoder) -> None:
    side = 2 * downsampling(autoencoder)
    x = torch.randn(1, autoencoder.config["in_channels"], side, side, generator=keyed_generator(0))
    _check_small({"reconstructed images": _difference(reconstruct(autoencoder, x), reconstruct(loaded, x))})


def _ship_pipeline_code(folder: Path) -> None:
    """Put the pipeline's source into the folder, and its names into model_index.json in the form for custom code."""
    index = _read_json(folder / "model_index.json")
    shutil.copyfile(conditional.__file__, folder / "pipeline.py")
    index["_class_name"] = ["pipeline", ConditionalPipeline.__name__]
    if (folder / CLASS_TOKENS).is_dir():
        shutil.copyfile(class_tokens.__file__, folder / CLASS_TOKENS / "class_tokens.py")
        index[CLASS_TOKENS] = ["class_tokens", ClassTokenEmbedding.__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
