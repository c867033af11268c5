"""Translation of the configurations of networks and noise schedules from and to diffusers.

`DenoiserUNet` has the module names of diffusers' UNet2DModel and UNet2DConditionModel, so only the configuration needs
translation. A field that the network cannot honour raises an error that names it.
"""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
from diffusers import UNet2DConditionModel, UNet2DModel

from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.runtime.messages import printable

SHARED_FIELDS = (  # the same name and meaning in DenoiserUNet, UNet2DModel and UNet2DConditionModel
    "in_channels",
    "out_channels",
    "num_class_embeds",
    "downsample_padding",
    "dropout",
    "norm_num_groups",
    "norm_eps",
    "flip_sin_to_cos",
    "freq_shift",
)
SUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {  # values that can be imported, for both networks of diffusers
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
SUPPORTED_UNET_FIELDS = {**SUPPORTED_FIELDS, "mid_block_type": ("UNetMidBlock2D",)}
SDXL_TIME_DIM = 256  # sinusoids for each size in Stable Diffusion XL's vector
SUPPORTED_CONDITION_FIELDS = {
    **SUPPORTED_FIELDS,
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "addition_embed_type": (None, "text_time"),
    "addition_time_embed_dim": (None, SDXL_TIME_DIM),
    "attention_type": ("default",),
    "class_embeddings_concat": (None, False),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (None, False),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (None, False),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
}
SUPPORTED_SCHEDULER_FIELDS: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "use_flow_sigmas": (False,),
    "snr_shift_scale": (1,),
}
RESAMPLE_OF_BLOCK = {  # None: downsample_type or upsample_type decides; the other blocks ignore these fields
    "DownBlock2D": "conv",
    "AttnDownBlock2D": None,
    "ResnetDownsampleBlock2D": "resnet",
    "UpBlock2D": "conv",
    "AttnUpBlock2D": None,
    "ResnetUpsampleBlock2D": "resnet",
}
CONDITION_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
LEGACY_BLOCK_PREFIX = "UNetRes"  # block names in old files begin with it


def config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the DenoiserUNet that equals a diffusers network; missing fields have diffusers' defaults.

    Args:
        config: Configuration of the network that its "_class_name" names, UNet2DModel or UNet2DConditionModel; the
            default is UNet2DModel.

    Raises:
        ValueError: If the network is of another class, or a field is not supported; the message names it.
    """
    kind = config.get("_class_name", "UNet2DModel")
    if kind == "UNet2DModel":
        return _from_unet(complete(UNet2DModel, config))
    if kind in ("UNet2DConditionModel", "FlaxUNet2DConditionModel"):  # old files have the latter
        return _from_condition_unet(complete(UNet2DConditionModel, config))
    raise ValueError(f"_class_name must be UNet2DModel or UNet2DConditionModel to be imported, got {kind}")


def config_to_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, except sample_size, of the diffusers network that equals a DenoiserUNet.

    They are those of a UNet2DConditionModel if the configuration has a context_dim, otherwise of a UNet2DModel.

    Raises:
        ValueError: If diffusers has no such network; the message names the argument that is not supported.
    """
    return _to_unet(config) if config["context_dim"] is None else _to_condition_unet(config)


def _from_unet(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_fields("UNet2DModel", config, SUPPORTED_UNET_FIELDS)
    down = _block_types(config, "down_block_types", RESAMPLE_OF_BLOCK)
    up = _block_types(config, "up_block_types", RESAMPLE_OF_BLOCK)
    translated = {
        **_shared_from_diffusers(config),
        "layers_per_block": config["layers_per_block"],
        "attention_levels": _attention_levels(down, up),
        "head_channels": config["attention_head_dim"],
        "mid_attention": config["add_attention"],
        "resample": _resample(config, down, up),
    }
    _check_attention(config, translated["attention_levels"])
    return translated


def _to_unet(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["vector_dim"] is not None:
        raise ValueError(f"UNet2DModel takes no vector, got vector_dim {config['vector_dim']}; set context_dim too")
    plain_down, plain_up = {
        "conv": ("DownBlock2D", "UpBlock2D"),
        "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    }[config["resample"]]
    return {
        **_shared_to_diffusers(config),
        "down_block_types": _types(config, "AttnDownBlock2D", plain_down),
        "up_block_types": _types(config, "AttnUpBlock2D", plain_up)[::-1],
        "downsample_type": config["resample"],
        "upsample_type": config["resample"],
        "attention_head_dim": config["head_channels"],
        # With scale_shift, the attention of the mid block has a norm only if this is set.
        "attn_norm_num_groups": config["norm_num_groups"] if config["scale_shift"] else None,
        "add_attention": config["mid_attention"],
    }


def _from_condition_unet(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_fields("UNet2DConditionModel", config, SUPPORTED_CONDITION_FIELDS)
    down = _block_types(config, "down_block_types", CONDITION_BLOCKS)
    up = _block_types(config, "up_block_types", CONDITION_BLOCKS)
    levels = _attention_levels(down, up)
    cross_only = config["only_cross_attention"]
    return {
        **_shared_from_diffusers(config),
        "layers_per_block": _same_on_all_levels(config, "layers_per_block"),
        "attention_levels": levels,
        "num_heads": config["attention_head_dim"],  # a misnomer in diffusers: it is a number of heads
        "context_dim": _same_on_all_levels(config, "cross_attention_dim"),
        "transformer_depth": _of_levels(config, "transformer_layers_per_block"),
        "linear_projection": config["use_linear_projection"],
        "cross_only_levels": [
            level for level in levels if (cross_only if isinstance(cross_only, bool | None) else cross_only[level])
        ],
        "vector_dim": config["addition_embed_type"] and config["projection_class_embeddings_input_dim"],
    }


def _to_condition_unet(config: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in {"resample": "conv", "mid_attention": True}.items():
        if config[name] != value:
            raise ValueError(f"{name} must be {value} for a UNet2DConditionModel, got {config[name]}")
    vector_dim = config["vector_dim"]
    with_vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SDXL_TIME_DIM,
        "projection_class_embeddings_input_dim": vector_dim,
    }
    head_channels = config["head_channels"]
    heads = [width // (head_channels or width) for width in config["channels"]]
    return {
        **_shared_to_diffusers(config),
        "down_block_types": _types(config, "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": _types(config, "CrossAttnUpBlock2D", "UpBlock2D")[::-1],
        "attention_head_dim": config["num_heads"] or heads,
        "cross_attention_dim": config["context_dim"],
        "transformer_layers_per_block": config["transformer_depth"],
        "use_linear_projection": config["linear_projection"],
        "only_cross_attention": [level in config["cross_only_levels"] for level in range(len(config["channels"]))],
        **({} if vector_dim is None else with_vector),
    }


def schedule_from_diffusers(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler's configuration; missing fields have the scheduler's defaults.

    Raises:
        ValueError: If the scheduler is not for variance-preserving diffusion, or a field is not supported; the message
            names it.
    """
    name = config.get("_class_name", "DDPMScheduler")
    fields = {**_defaults(getattr(diffusers, name, object)), **config}
    if missing := [field for field in ("beta_schedule", "beta_start", "beta_end") if fields.get(field) is None]:
        raise ValueError(
            f"_class_name must be a scheduler with a beta_schedule, such as DDPMScheduler, got {name} without "
            f"{', '.join(missing)}"
        )
    _check_fields(name, fields, SUPPORTED_SCHEDULER_FIELDS)
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
    # A scheduler without these fields predicts noise and does not rescale.
    optional = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    return NoiseSchedule(**{key: fields.get(key, optional.get(key)) for key in (*names, "rescale_betas_zero_snr")})


def _defaults(diffusers_class: type) -> dict[str, Any]:
    """The default of each argument of a constructor."""
    parameters = inspect.signature(diffusers_class.__init__).parameters.values()  # type: ignore[misc]
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def complete(diffusers_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with defaults for missing fields. As in diffusers, unknown fields give a warning only."""
    defaults = _defaults(diffusers_class)
    unknown = [key for key in config if key not in defaults and not key.startswith("_")]
    if unknown:
        message = f"{diffusers_class.__name__} has no field {', '.join(unknown)}; it is ignored"
        warnings.warn(printable(message), stacklevel=4)
    return {key: config.get(key, default) for key, default in defaults.items()}


def _check_fields(owner: str, config: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    for field, values in supported.items():
        if field in config and config[field] not in values:
            allowed = " or ".join(str(value) for value in values)
            raise ValueError(f"{field} of {owner} must be {allowed} to be imported, got {config[field]!r}")


def _shared_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    channels = list(config["block_out_channels"])
    if config["time_embedding_dim"] not in (None, 0, 4 * channels[0]):  # in diffusers 0 means None
        raise ValueError(
            f"time_embedding_dim must be {4 * channels[0]}, four times block_out_channels[0], to be imported, "
            f"got {config['time_embedding_dim']}"
        )
    if config["norm_num_groups"] is None:
        raise ValueError("norm_num_groups must be a number to be imported, got None")
    return {
        **{field: config[field] for field in SHARED_FIELDS},
        "channels": channels,
        "scale_shift": config["resnet_time_scale_shift"] == "scale_shift",
    }


def _shared_to_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{field: config[field] for field in SHARED_FIELDS},
        "layers_per_block": config["layers_per_block"],
        "block_out_channels": tuple(config["channels"]),
        "resnet_time_scale_shift": "scale_shift" if config["scale_shift"] else "default",
    }


def _types(config: Mapping[str, Any], attended: str, plain: str) -> tuple[str, ...]:
    """The block type of each level, from full resolution down."""
    levels = range(len(config["channels"]))
    return tuple(attended if level in config["attention_levels"] else plain for level in levels)


def _same_on_all_levels(config: Mapping[str, Any], field: str) -> int:
    value = config[field]
    values = [value] if isinstance(value, int) else list(value)
    if len(set(values)) > 1:
        raise ValueError(f"{field} must be the same on all levels to be imported, got {values}")
    return values[0]


def _of_levels(config: Mapping[str, Any], field: str) -> int | list[int]:
    value = config[field]
    if isinstance(value, int):
        return value
    if not all(isinstance(depth, int) for depth in value):
        raise ValueError(f"{field} must be the same for all transformers of a level to be imported, got {value}")
    return list(value)


def _block_types(config: Mapping[str, Any], field: str, supported: Iterable[str]) -> list[str]:
    """The block types in a field, without the prefix of old files."""
    side = "Down" if field == "down_block_types" else "Up"
    allowed = [name for name in supported if side in name]
    types = [name.removeprefix(LEGACY_BLOCK_PREFIX) for name in config[field]]
    for name in types:
        if name not in allowed:
            raise ValueError(f"{field} must consist of {', '.join(allowed)} to be imported, got {name}")
    if len(types) != len(config["block_out_channels"]):
        raise ValueError(f"{field} must have as many entries as block_out_channels {config['block_out_channels']}, "
                         f"got {types}")  # fmt: skip
    return types


def _attention_levels(down: list[str], up: list[str]) -> list[int]:
    levels = [level for level, name in enumerate(down) if "Attn" in name]
    levels_up = [level for level, name in enumerate(reversed(up)) if "Attn" in name]
    if levels != levels_up:
        raise ValueError(
            f"up_block_types must have attention at the levels where down_block_types have it, {levels}, "
            f"got {levels_up}"
        )
    return levels


def _resample(config: Mapping[str, Any], down: list[str], up: list[str]) -> str:
    """How all levels resample, "conv" or "resnet"; the last block down and the last block up do not resample."""
    kinds = {RESAMPLE_OF_BLOCK[name] or config["downsample_type"] for name in down[:-1]}
    kinds |= {RESAMPLE_OF_BLOCK[name] or config["upsample_type"] for name in up[:-1]}
    if len(kinds) > 1 or not kinds <= {"conv", "resnet"}:
        raise ValueError(
            "all levels must resample alike, conv or resnet; "
            f"downsample_type {config['downsample_type']!r} with down_block_types {down} "
            f"and upsample_type {config['upsample_type']!r} with up_block_types {up} give {sorted(map(str, kinds))}"
        )
    return kinds.pop() if kinds else "conv"


def _check_attention(config: Mapping[str, Any], attention_levels: list[int]) -> None:
    """Refuse values for the norm and width of attention that differ from those this network derives."""
    channels, groups, head_dim = (
        config[field] for field in ("block_out_channels", "norm_num_groups", "attention_head_dim")
    )
    mid_groups = config["attn_norm_num_groups"]
    if mid_groups is None and config["resnet_time_scale_shift"] == "default":
        mid_groups = groups
    if config["add_attention"] and mid_groups != groups:
        raise ValueError(f"attn_norm_num_groups must be norm_num_groups, {groups}, to be imported, got {mid_groups}")
    attended = {*attention_levels, len(channels) - 1} if config["add_attention"] else {*attention_levels}
    for width in (channels[level] for level in attended):
        if head_dim is not None and width % head_dim:
            raise ValueError(f"attention_head_dim must divide the {width} channels of its level, got {head_dim}")
