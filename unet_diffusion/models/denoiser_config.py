"""The configuration of a `DenoiserUNet`: the rules that its values must keep, and their meaning for each level."""

import math
from collections.abc import Sequence
from typing import Any

MOST_LAYERS = 100  # residual blocks in a level; published networks have 4 at most


def num_heads_of(config: dict[str, Any], level: int) -> int:
    """Return the number of attention heads of a level; -1 is the lowest level."""
    if config["num_heads"] is not None:
        return value_of(config["num_heads"], level)
    width = config["channels"][level]
    return width // (config["head_channels"] or width)


def value_of(setting: int | list[int], level: int) -> int:
    """Return the value that a setting has on a level, where the setting is one number for all levels or one for each.

    Args:
        setting: The number, or the numbers from full resolution down.
        level: Index of the level; -1 is the lowest.
    """
    return setting if isinstance(setting, int) else setting[level]


def check_denoiser_config(config: dict[str, Any]) -> None:
    """Check the arguments of a `DenoiserUNet`.

    Raises:
        ValueError: If the widths cannot be divided into groups, heads or sinusoids, a level does not exist, an argument
            is out of its range, or an argument needs context_dim.
    """
    _check_widths(config["channels"], config["norm_num_groups"])
    if config["resample"] not in ("conv", "resnet"):
        raise ValueError(f"resample must be 'conv' or 'resnet', got {config['resample']!r}")
    if config["downsample_padding"] not in (0, 1):
        raise ValueError(f"downsample_padding must be 0 or 1, got {config['downsample_padding']}")
    if not 1 <= config["layers_per_block"] <= MOST_LAYERS:
        raise ValueError(f"layers_per_block must be from 1 to {MOST_LAYERS}, got {config['layers_per_block']}")
    if not 0 <= config["dropout"] <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {config['dropout']}")
    num_levels = len(config["channels"])
    for name in ("attention_levels", "cross_only_levels"):
        for level in config[name]:
            if not 0 <= level < num_levels:
                raise ValueError(f"{name} must be in [0, {num_levels}), got {level}")
    _check_transformers(config)
    _check_heads(config)


def _check_widths(channels: Sequence[int], norm_num_groups: int) -> None:
    if not channels:
        raise ValueError("channels must hold the width of at least one level, got none")
    if min(*channels, norm_num_groups) < 1:
        raise ValueError(f"channels and norm_num_groups must be at least 1, got {list(channels)} and {norm_num_groups}")
    if channels[0] % 2:
        raise ValueError(f"channels[0] must be even, as half of the timestep embedding is sines, got {channels[0]}")
    for width in channels:
        if width % norm_num_groups:
            raise ValueError(
                f"every width in channels must be a multiple of norm_num_groups {norm_num_groups}, got {width}; "
                f"change the width, or use norm_num_groups {math.gcd(norm_num_groups, *channels)}"
            )


def _check_transformers(config: dict[str, Any]) -> None:
    off: dict[str, Any] = {
        "num_heads": None,
        "transformer_depth": 1,
        "linear_projection": False,
        "cross_only_levels": [],
    }
    set_without = [name for name, value in off.items() if config[name] != value]
    if config["context_dim"] is None and set_without:
        name = set_without[0]
        raise ValueError(
            f"{name} needs spatial transformers, got {name} {config[name]} without context_dim; set context_dim to the "
            f"length of a token, or leave {name} out"
        )
    if config["num_heads"] is not None and config["head_channels"] is not None:
        raise ValueError(
            f"num_heads {config['num_heads']} and head_channels {config['head_channels']} both set the heads of "
            "attention; leave one of them out"
        )
    for name in ("num_heads", "transformer_depth"):
        value = 1 if config[name] is None else config[name]
        values = value if isinstance(value, list) else [value] * len(config["channels"])
        if len(values) != len(config["channels"]) or min(values) < 1:
            raise ValueError(
                f"{name} must be a positive number, or a list of {len(config['channels'])} positive numbers, one for "
                f"each level, got {config[name]}"
            )


def _check_heads(config: dict[str, Any]) -> None:
    bottom = [len(config["channels"]) - 1] if config["mid_attention"] else []
    name = "head_channels" if config["num_heads"] is None else "num_heads"
    for level in {*config["attention_levels"], *bottom}:
        width = config["channels"][level]
        divisor = value_of(config[name], level) if config[name] else width
        if width % divisor:
            raise ValueError(
                f"the width of every level with attention must be a multiple of {name} {divisor}, got {width}"
            )
