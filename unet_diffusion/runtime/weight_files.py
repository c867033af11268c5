"""Names of files in folders of models and in repositories of the hub: which of them hold the weights to read."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from itertools import groupby
from pathlib import PurePosixPath

SUFFIX = ".safetensors"
PIPELINE_FILES = ("model_index.json", "unet/config.json", "config.json")  # a diffusers folder has one of them
OTHER_FORMATS = ("*onnx*", "*openvino*", "*flax*")
VARIANTS = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")  # of the same model


def weights_among(files: Iterable[str]) -> list[str]:
    """The files of weights in safetensors; variants such as fp16 only in folders that hold no others.

    Args:
        files: Paths in a folder or repository, with slashes.
    """
    files = sorted((name for name in files if name.endswith(SUFFIX) and not _is(name, OTHER_FORMATS)), key=_folder)
    return [name for _, names in groupby(files, _folder) for name in _in_full_precision(list(names))]


def only_weights(place: str, files: Iterable[str]) -> str | None:
    """The one file of weights in a folder that says nothing else of its model; None if it holds none.

    Args:
        place: The folder or repository, as the message names it.
        files: The paths in it.

    Raises:
        ValueError: If it holds several.
    """
    weights = [name for name in weights_among(files) if "/" not in name]
    if len(weights) > 1:
        raise ValueError(f"{place} holds {len(weights)} files of weights and no model_index.json or config.json: "
                         f"{', '.join(weights)}; name one of them, such as {place}/{weights[0]}")  # fmt: skip
    return weights[0] if weights else None


def _in_full_precision(names: Sequence[str]) -> Sequence[str]:
    return [name for name in names if not _is(name, VARIANTS)] or names


def _is(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _folder(name: str) -> str:
    return str(PurePosixPath(name).parent)
