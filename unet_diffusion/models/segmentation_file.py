"""Segmentation networks in files of weights whose names are `inc`, `down1` ..., `up1` ... and `outc`.

Many PyTorch U-Nets have these names. Each level is a double convolution with batch norm. Levels go up by a
transposed convolution, or by bilinear interpolation, which has no weights. Such networks see images in [0, 1], and one
score is the logit of the foreground.
"""

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.messages import first_few, in_words, printable

NAMES = re.compile(r"(?:inc|down\d+|up\d+|outc)\..+")
FIRST, LAST = "inc.double_conv.0.weight", "outc.conv.weight"
SECOND, NORM = "inc.double_conv.3.weight", "inc.double_conv.1.running_mean"
LAYERS = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}  # of a double convolution, by its number in the file
DOUBLE_CONV_BIAS = re.compile(r"\.double_conv\.[03]\.bias$")
LEAST_SCORES = 2  # of SegmentationUNet; the layout may have one, which is the logit of the second
NO_BIAS = re.compile(r"\.conv[12]\.weight$")  # convolutions of SegmentationUNet for which the file may have no bias
COUNTS = "num_batches_tracked"  # of batch norm; files may lack them, and no output depends on them
LAST_BIAS = "outc.conv.bias"
NEEDED = {"padding": "same", "norm": "batch", "timestep_embedding": False, "unit_range": True}  # of a network to write


def holds_segmentation_unet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether most tensors have names of this layout."""
    return 2 * sum(NAMES.fullmatch(key) is not None for key in tensors) > len(tensors)


def without_prefix(tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors without what stands before inc, down, up and outc in their names, as model. in a Lightning module.

    A warning says what was taken off, and names the tensors that do not have it, which are left out. Tensors of another
    layout stay as they are.

    Args:
        tensors: The tensors in a file by name.
        path: Path of the file, for the warning.

    Raises:
        ValueError: If there are several networks of this layout.
    """
    prefixes = sorted(key.removesuffix(FIRST) for key in tensors if key.endswith(f".{FIRST}"))
    if not prefixes or FIRST in tensors:
        return tensors
    if len(prefixes) > 1:
        raise ValueError(f"{path} must hold one network of the layout inc, down, up, outc, and holds several, "
                         f"{first_few(prefixes)}; save the state_dict of one of them")  # fmt: skip
    (prefix,) = prefixes
    others = [key for key in tensors if not key.startswith(prefix)]
    left_out = f", and {first_few(others)} left out" if others else ""
    warnings.warn(printable(f"{path}: {prefix} was taken off the names of the weights{left_out}"), stacklevel=4)
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def segmentation_unet_of(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> SegmentationUNet:
    """The network of weights of this layout, float32 on the CPU and in eval mode.

    Args:
        tensors: The tensors in a file by name.
        path: Path of the file, for errors.

    Raises:
        ValueError: If the weights are not those of such a network.
    """
    config = _config(tensors, path)
    unet = SegmentationUNet(**config)
    needed = {key for key in weights_of(unet) if not key.endswith(COUNTS)}
    if not any(DOUBLE_CONV_BIAS.search(key) for key in tensors):  # convolutions before a norm often have no bias
        needed = {key for key in needed if not DOUBLE_CONV_BIAS.search(key)}
    if needed - tensors.keys() == {LAST_BIAS}:
        raise ValueError(f"{path} has the layout inc, down, up, outc, but lacks {LAST_BIAS}; save the whole state_dict "
                         "of the network, or, if its last convolution has no bias, add zeros of that name")  # fmt: skip
    if lacking := sorted(needed - tensors.keys()):
        raise ValueError(f"{path} has the layout inc, down, up, outc, but lacks {first_few(lacking)}; save the whole "
                         "state_dict of the network")  # fmt: skip
    try:
        unet.load_state_dict(_renamed(tensors, config))
    except RuntimeError as error:
        raise ValueError(f"{path} has the layout inc, down, up, outc, but {in_words(error)}") from error
    return unet.eval()


def weights_of(unet: PixelNetwork) -> dict[str, Tensor]:
    """The weights of a network by the names of this layout: `segmentation_unet_of` makes the same network of them.

    Args:
        unet: The network.

    Raises:
        ValueError: If the layout has no place for the network.
    """
    if not isinstance(unet, SegmentationUNet):
        raise ValueError(f"one file holds a SegmentationUNet, got {type(unet).__name__}; export a folder")
    if wrong := [name for name, value in NEEDED.items() if unet.config[name] != value]:
        raise ValueError(f"one file holds a network with {wrong[0]} {NEEDED[wrong[0]]}, got {unet.config[wrong[0]]}; "
                         "export a folder")  # fmt: skip
    file_layers = {name: number for number, name in LAYERS.items()}
    weights = {}
    for place, ours in _places(len(unet.config["channels"]) - 1).items():
        for key, value in unet.state_dict().items():
            if key.startswith(f"{ours}."):
                inner = [file_layers.get(part, part) for part in key.removeprefix(f"{ours}.").split(".")]
                weights[".".join([place, *inner])] = _skip_first(value) if _joins_skip(key) else value
    return weights


def _config(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of the network, read off the shapes of its weights."""
    if lacking := [name for name in (FIRST, SECOND, LAST) if name not in tensors]:
        raise ValueError(f"{path} has the layout inc, down, up, outc, but lacks {lacking[0]}; double convolutions with "
                         "batch norm in between are read, and no others")  # fmt: skip
    if NORM not in tensors:
        raise ValueError(f"{path} must have batch norm after each convolution, with {NORM}; a network without it is "
                         "not read")  # fmt: skip
    widths = [tensors[SECOND].shape[0]]
    while (value := tensors.get(f"down{len(widths)}.maxpool_conv.1.double_conv.3.weight")) is not None:
        widths.append(value.shape[0])
    return {
        "in_channels": tensors[FIRST].shape[1],
        "out_channels": max(tensors[LAST].shape[0], LEAST_SCORES),
        "channels": widths,
        "padding": "same",
        "norm": "batch",
        "upsampling": "transposed" if "up1.up.weight" in tensors else "bilinear",
        "unit_range": True,
    }


def _renamed(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights by the names of SegmentationUNet; those that it does not have keep their names."""
    places = _places(len(config["channels"]) - 1)
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        place = next((place for place in places if key.startswith(f"{place}.")), None)
        if place is None:
            renamed[key] = value
            continue
        inner = key.removeprefix(f"{place}.").split(".")
        renamed[".".join([places[place], *(LAYERS.get(part, part) for part in inner)])] = value
    return _adapted(renamed)


def _places(levels: int) -> dict[str, str]:
    """The parts of SegmentationUNet by the names of the layout."""
    places = {"inc.double_conv": "conv_in", "outc.conv": "conv_out"}
    for number in range(1, levels + 1):
        below = "mid_block" if number == levels else f"down_blocks.{number - 1}"
        places[f"down{number}.maxpool_conv.1.double_conv"] = f"{below}.double_conv"
        places[f"up{number}.conv.double_conv"] = f"up_blocks.{number - 1}.double_conv"
        places[f"up{number}.up"] = f"up_blocks.{number - 1}.up_conv"
    return places


def _joins_skip(key: str) -> bool:
    """Whether a weight of SegmentationUNet reads the skip and what comes from below, in halves."""
    return key.startswith("up_blocks.") and key.endswith(".conv1.weight")


def _skip_first(weight: Tensor) -> Tensor:
    """The weight with its halves exchanged: the layout has the skip first, SegmentationUNet last."""
    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def _adapted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights for a network that has the skip behind what comes from below, all biases, and two scores."""
    adapted = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    for key, value in weights.items():
        if _joins_skip(key):
            adapted[key] = _skip_first(value.float())
        if NO_BIAS.search(key):
            adapted.setdefault(f"{key.removesuffix('weight')}bias", torch.zeros(len(value)))
    if len(adapted["conv_out.weight"]) == 1:  # a logit is the difference of two scores, of which one is 0
        for key in ("conv_out.weight", "conv_out.bias"):
            adapted[key] = torch.cat([torch.zeros_like(adapted[key]), adapted[key]])
    return adapted
