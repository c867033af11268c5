"""Networks and pipelines to and from diffusers' folders.

`DenoiserUNet` names its parts as diffusers' UNet2DModel does, so weights pass both ways with a strict load and no key
map; what is translated is the configuration, and a field that the network cannot honour is refused by name.
An exported folder needs diffusers and nothing of this package. It is reloaded and compared before it gets its name.
"""

import copy
import inspect
import json
import os
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

from unet_diffusion.checkpoint import TrainedDenoiser, load_plain, read_checkpoint
from unet_diffusion.pipelines import class_conditional
from unet_diffusion.pipelines.class_conditional import ClassConditionalPipeline
from unet_diffusion.pipelines.model_card import model_card
from unet_diffusion.sampling import scheduler_config
from unet_diffusion.schedule import NoiseSchedule, keyed_generator
from unet_diffusion.speed import set_speed
from unet_diffusion.unet import DenoiserUNet, PixelNetwork

StrPath = str | os.PathLike[str]

SHARED_FIELDS = (  # of the same name and meaning in DenoiserUNet and UNet2DModel
    "in_channels",
    "out_channels",
    "layers_per_block",
    "num_class_embeds",
    "downsample_padding",
    "dropout",
    "norm_num_groups",
    "norm_eps",
    "flip_sin_to_cos",
    "freq_shift",
)
SUPPORTED_UNET_FIELDS: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
SUPPORTED_SCHEDULER_FIELDS: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "use_flow_sigmas": (False,),
    "snr_shift_scale": (1,),
}
SAMPLER_FIELDS = {"variance_type": "fixed_small", "clip_sample": True, "thresholding": False}  # of `scheduler_config`
RESAMPLE_OF_BLOCK = {  # None: as downsample_type or upsample_type says; the other blocks ignore these fields
    "DownBlock2D": "conv",
    "AttnDownBlock2D": None,
    "ResnetDownsampleBlock2D": "resnet",
    "UpBlock2D": "conv",
    "AttnUpBlock2D": None,
    "ResnetUpsampleBlock2D": "resnet",
}
LEGACY_BLOCK_PREFIX = "UNetRes"  # of block names in old files
LEGACY_ATTENTION_KEYS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in old files
# a variant, such as fp16, stands before or after the number of the shard
WEIGHTS_FILE = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.(safetensors|bin)")
EXPORT_TOLERANCE = 1e-4  # of outputs of order 1; the same float32 operations in another order differ by 1e-6


def from_diffusers(model_or_folder: UNet2DModel | StrPath) -> DenoiserUNet:
    """The same network as one of diffusers: float32, on the CPU, in eval mode.

    Args:
        model_or_folder: a UNet2DModel; or a folder with its config.json and weights (safetensors or .bin, whole or in
            shards; of a variant such as fp16 if there is no other), or with a subfolder unet that has them.

    Raises:
        FileNotFoundError: if the folder or a file in it is missing.
        ValueError: if the configuration is not supported, or the weights do not fit it.
    """
    if isinstance(model_or_folder, UNet2DModel):
        config, weights = dict(model_or_folder.config), model_or_folder.state_dict()
    elif isinstance(model_or_folder, str | os.PathLike):
        folder = _unet_folder(Path(model_or_folder))
        config, weights = _read_json(folder / "config.json"), {}
    else:
        raise ValueError(f"only a UNet2DModel or a folder can be imported, got a {type(model_or_folder).__name__}")
    model = DenoiserUNet(**config_from_diffusers(config)).eval()
    weights = weights or _read_weights(folder)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights must be those of the configuration, and are not: {error}") from error
    return model


def to_diffusers(model: PixelNetwork, sample_size: int | tuple[int, int] | None = None) -> UNet2DModel:
    """The same network as diffusers' UNet2DModel: float32, on the CPU, in eval mode.

    Args:
        model: the network.
        sample_size: side, or height and width, of the images that diffusers' pipelines are to make; they need it.

    Raises:
        ValueError: if the network is of another kind.
    """
    if not isinstance(model, DenoiserUNet):
        raise ValueError(f"only a DenoiserUNet has a counterpart in diffusers, got a {type(model).__name__}")
    unet = UNet2DModel(**config_to_diffusers(model.config), sample_size=sample_size)
    unet.load_state_dict(model.state_dict())
    return unet.eval()


def export_pipeline(trained: TrainedDenoiser, folder: StrPath, *, overwrite: bool = False) -> None:
    """Write a folder that diffusers loads without this package, after a comparison of what it loads with the original.

    Without classes it is a stock DDPMPipeline; with classes it holds its own `pipeline.py`, and is loaded with
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. A README.md says how, for either.

    Args:
        trained: the network and its schedule.
        folder: appears whole or not at all.
        overwrite: replace the folder if it is a pipeline already.

    Raises:
        FileExistsError: if the folder exists and is not to be overwritten, or is no pipeline.
        RuntimeError: if diffusers loads something else than was written.
    """
    folder = Path(folder).resolve()
    _check_replaceable(folder, overwrite)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        pipeline = _build_pipeline(trained)
        pipeline.save_pretrained(partial)
        _check_equal(trained, type(pipeline).from_pretrained(partial))
        if isinstance(pipeline, ClassConditionalPipeline):
            _ship_pipeline_code(partial)
        (partial / "README.md").write_text(model_card(trained), encoding="utf-8")
        _move_into_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def import_pipeline(folder: StrPath) -> TrainedDenoiser:
    """The denoiser in a pixel-space pipeline folder of diffusers, such as `export_pipeline` writes.

    Raises:
        FileNotFoundError: if the folder lacks a network or a scheduler.
        ValueError: if a part of the pipeline, or a field of a configuration, is not supported.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    others = [
        name
        for name, value in index.items()
        if isinstance(value, list) and name not in ("_class_name", "unet", "scheduler", "class_names") and value[0]
    ]
    if others:
        raise ValueError(
            f"a pipeline must consist of unet and scheduler to be imported, got also {', '.join(others)}; "
            "from_diffusers reads the network alone"
        )
    config = _complete(UNet2DModel, _read_json(_unet_folder(folder) / "config.json"))
    scheduler_config = _read_json(_scheduler_file(folder))
    _warn_of_lost_fields(scheduler_config)
    return TrainedDenoiser(
        unet=from_diffusers(folder),
        schedule=schedule_from_diffusers(scheduler_config),
        image_shape=_image_shape(config),
        null_label=index.get("null_label"),
        class_names=index.get("class_names"),
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


def config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the DenoiserUNet that a UNet2DModel of this configuration is; missing fields are its defaults.

    Raises:
        ValueError: if a field is not supported; it says which.
    """
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"_class_name must be UNet2DModel, got {config['_class_name']}, which is another network")
    config = _complete(UNet2DModel, config)
    _check_fields("UNet2DModel", config, SUPPORTED_UNET_FIELDS)
    down = _block_types(config, "down_block_types")
    up = _block_types(config, "up_block_types")
    translated = {
        **{field: config[field] for field in SHARED_FIELDS},
        "channels": list(config["block_out_channels"]),
        "attention_levels": _attention_levels(down, up),
        "head_channels": config["attention_head_dim"],
        "mid_attention": config["add_attention"],
        "scale_shift": config["resnet_time_scale_shift"] == "scale_shift",
        "resample": _resample(config, down, up),
    }
    _check_widths(config, translated["attention_levels"])
    return translated


def config_to_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the UNet2DModel that a DenoiserUNet of this configuration is, but for sample_size."""
    plain_down, plain_up = {
        "conv": ("DownBlock2D", "UpBlock2D"),
        "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    }[config["resample"]]
    attended = [level in config["attention_levels"] for level in range(len(config["channels"]))]
    return {
        **{field: config[field] for field in SHARED_FIELDS},
        "down_block_types": tuple("AttnDownBlock2D" if is_attended else plain_down for is_attended in attended),
        "up_block_types": tuple("AttnUpBlock2D" if is_attended else plain_up for is_attended in reversed(attended)),
        "block_out_channels": tuple(config["channels"]),
        "downsample_type": config["resample"],
        "upsample_type": config["resample"],
        "attention_head_dim": config["head_channels"],
        # with scale_shift, the attention at the bottom has a norm only if this is set
        "attn_norm_num_groups": config["norm_num_groups"] if config["scale_shift"] else None,
        "resnet_time_scale_shift": "scale_shift" if config["scale_shift"] else "default",
        "add_attention": config["mid_attention"],
    }


def schedule_from_diffusers(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a variance-preserving scheduler's configuration; missing fields are its class's defaults.

    Raises:
        ValueError: if the scheduler is of another kind, or a field is not supported; it says which.
    """
    name = config.get("_class_name", "DDPMScheduler")
    fields = {**_defaults(getattr(diffusers, name, object)), **config}
    if "beta_schedule" not in fields:
        raise ValueError(f"_class_name must be a scheduler with a beta_schedule, such as DDPMScheduler, got {name}")
    _check_fields(name, fields, SUPPORTED_SCHEDULER_FIELDS)
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
    # schedulers without these fields have them off: they predict noise, and do not rescale
    optional = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    return NoiseSchedule(**{key: fields.get(key, optional.get(key)) for key in (*names, "rescale_betas_zero_snr")})


def _warn_of_lost_fields(config: Mapping[str, Any]) -> None:
    """Says which settings of the sampler, not of the schedule, are replaced by ours."""
    lost = [
        f"{field} {config[field]} (here {ours})"
        for field, ours in SAMPLER_FIELDS.items()
        if config.get(field, ours) != ours
    ]
    if lost:
        warnings.warn(f"not kept of the scheduler, so samples will differ: {', '.join(lost)}", stacklevel=3)


def _defaults(diffusers_class: type) -> dict[str, Any]:
    """The constructor's default of each configuration field."""
    parameters = inspect.signature(diffusers_class.__init__).parameters.values()  # type: ignore[misc]
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _complete(diffusers_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with missing fields filled in; unknown ones are warned about and left out, as in diffusers."""
    defaults = _defaults(diffusers_class)
    unknown = [key for key in config if key not in defaults and not key.startswith("_")]
    if unknown:
        message = f"{diffusers_class.__name__} has no field {', '.join(unknown)}; ignored"
        warnings.warn(message, stacklevel=3)
    return {key: config.get(key, default) for key, default in defaults.items()}


def _check_fields(owner: str, config: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    for field, values in supported.items():
        if field in config and config[field] not in values:
            allowed = " or ".join(str(value) for value in values)
            raise ValueError(f"{field} of {owner} must be {allowed} to be imported, got {config[field]!r}")


def _block_types(config: Mapping[str, Any], field: str) -> list[str]:
    """The block types in that field, from its first block to its last, without the prefix of old files."""
    side = "Down" if field == "down_block_types" else "Up"
    allowed = [name for name in RESAMPLE_OF_BLOCK if side in name]
    types = [name.removeprefix(LEGACY_BLOCK_PREFIX) for name in config[field]]
    for name in types:
        if name not in allowed:
            raise ValueError(f"{field} must be of {', '.join(allowed)} to be imported, got {name}")
    if len(types) != len(config["block_out_channels"]):
        raise ValueError(f"{field} must be as many as block_out_channels {config['block_out_channels']}, got {types}")
    return types


def _attention_levels(down: list[str], up: list[str]) -> list[int]:
    levels = [level for level, name in enumerate(down) if name.startswith("Attn")]
    levels_up = [level for level, name in enumerate(reversed(up)) if name.startswith("Attn")]
    if levels != levels_up:
        raise ValueError(
            f"up_block_types must have attention at the levels where down_block_types have it, {levels}, "
            f"got {levels_up}"
        )
    return levels


def _resample(config: Mapping[str, Any], down: list[str], up: list[str]) -> str:
    """How every level resamples; the last block on either way does not."""
    kinds = {RESAMPLE_OF_BLOCK[name] or config["downsample_type"] for name in down[:-1]}
    kinds |= {RESAMPLE_OF_BLOCK[name] or config["upsample_type"] for name in up[:-1]}
    if len(kinds) > 1 or not kinds <= {"conv", "resnet"}:
        raise ValueError(
            "all levels must resample alike, conv or resnet; "
            f"downsample_type {config['downsample_type']!r} with down_block_types {down} "
            f"and upsample_type {config['upsample_type']!r} with up_block_types {up} give {sorted(map(str, kinds))}"
        )
    return kinds.pop() if kinds else "conv"


def _check_widths(config: Mapping[str, Any], attention_levels: list[int]) -> None:
    """Refuse the fields that set a width which this network derives from others."""
    channels, groups, head_dim = (
        config[field] for field in ("block_out_channels", "norm_num_groups", "attention_head_dim")
    )
    if config["time_embedding_dim"] not in (None, 0, 4 * channels[0]):  # diffusers: 0 is as None
        raise ValueError(f"time_embedding_dim must be 4 x {channels[0]}, got {config['time_embedding_dim']}")
    if groups is None:
        raise ValueError("norm_num_groups must be a number to be imported, got None")
    mid_groups = config["attn_norm_num_groups"]
    if mid_groups is None and config["resnet_time_scale_shift"] == "default":
        mid_groups = groups
    if config["add_attention"] and mid_groups != groups:
        raise ValueError(f"attn_norm_num_groups must be as norm_num_groups {groups}, got {mid_groups}")
    attended = {*attention_levels, len(channels) - 1} if config["add_attention"] else {*attention_levels}
    for width in (channels[level] for level in attended):
        if head_dim is not None and width % head_dim:
            raise ValueError(f"attention_head_dim must divide the width {width} of its level, got {head_dim}")


def _image_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    size = config["sample_size"]
    if size is None:
        raise ValueError("sample_size must be given in the network's config.json, got None; add the side of the images")
    if config["out_channels"] != config["in_channels"]:
        raise ValueError(f"out_channels must be as in_channels {config['in_channels']}, got {config['out_channels']}")
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


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
    return json.loads(path.read_text(encoding="utf-8"))


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


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists and is not overwritten; choose another folder, or pass overwrite=True")
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise FileExistsError(f"only a pipeline folder is overwritten, and {folder} has no model_index.json")


def _move_into_place(partial: Path, folder: Path) -> None:
    if folder.exists():
        replaced = partial.with_suffix(".replaced")  # a folder cannot be moved onto another
        os.replace(folder, replaced)
        os.replace(partial, folder)
        shutil.rmtree(replaced)
    else:
        os.replace(partial, folder)


def _build_pipeline(trained: TrainedDenoiser) -> DiffusionPipeline:
    _, height, width = trained.image_shape
    unet = to_diffusers(trained.unet, height if height == width else (height, width))
    scheduler = DDPMScheduler(**scheduler_config(trained.schedule))
    if trained.unet.config["num_class_embeds"] is None:
        return DDPMPipeline(unet, scheduler)
    return ClassConditionalPipeline(unet, scheduler, trained.null_label, trained.class_names)


@torch.no_grad()
def _check_equal(trained: TrainedDenoiser, pipeline: DiffusionPipeline) -> None:
    """Compare a reloaded pipeline with its original, on random input that is two pixels wide at the bottom."""
    unet = copy.deepcopy(trained.unet).cpu().float().eval()
    set_speed(unet, "plain")
    side = 2 ** len(unet.config["channels"])
    generator = keyed_generator(0)
    x = torch.randn(2, unet.config["in_channels"], side, side, generator=generator)
    t = torch.randint(trained.schedule.num_train_timesteps, (2,), generator=generator)
    classes = unet.config["num_class_embeds"]
    labels = None if classes is None else torch.randint(classes, (2,), generator=generator)
    expected, loaded = unet(x, t, labels), pipeline.unet(x, t, class_labels=labels).sample
    difference = (expected - loaded).abs().max() / expected.abs().max().clamp(min=1)
    schedule_difference = (pipeline.scheduler.alphas_cumprod - trained.schedule.alphas_cumprod).abs().max()
    if not max(difference, schedule_difference) <= EXPORT_TOLERANCE:  # not: NaN is a failure too
        raise RuntimeError(
            f"diffusers must load what was written, but outputs differ by {difference:.1e} of their largest "
            f"and alphas_cumprod by {schedule_difference:.1e}; nothing was exported"
        )


def _ship_pipeline_code(folder: Path) -> None:
    """Put the pipeline's source into the folder, and its name into model_index.json in the form for custom code."""
    shutil.copyfile(class_conditional.__file__, folder / "pipeline.py")
    index = _read_json(folder / "model_index.json")
    index["_class_name"] = ["pipeline", ClassConditionalPipeline.__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
