"""Weights in diffusers' folders: finding their files, and reading them under diffusers' current names."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from unet_diffusion.runtime.messages import in_words
from unet_diffusion.runtime.safe_loading import load_plain
from unet_diffusion.runtime.tensor_files import read_safetensors

LEGACY_ATTENTION_KEYS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # old -> current
# A variant, such as fp16, stands before or after the number of the shard.
WEIGHTS_FILE = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.(safetensors|bin)")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights in a folder, under diffusers' current names.

    Raises:
        FileNotFoundError: If the folder has no weights.
        ValueError: If the folder has a weight twice or several variants, or a file would run code.
    """
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        loaded = read_safetensors(file) if file.suffix == ".safetensors" else load_plain(file)
        loaded = {_current_key(key): value for key, value in loaded.items()}
        if repeated := weights.keys() & loaded.keys():
            raise ValueError(f"{folder} must hold each weight once, got {min(repeated)} again in {file.name}")
        weights |= loaded
    return weights


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights strictly.

    Raises:
        ValueError: If the weights do not fit the module; the message names a few.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(in_words(error)) from error


def _weight_files(folder: Path) -> list[Path]:
    """The files of one set of weights; full precision wins over variants, safetensors over pickles."""
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
    """The current key of a weight; old files use other names for attention."""
    module, _, parameter = key.rpartition(".")
    parent, _, name = module.rpartition(".")
    return f"{parent}.{LEGACY_ATTENTION_KEYS[name]}.{parameter}" if name in LEGACY_ATTENTION_KEYS else key
