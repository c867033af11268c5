"""Files of tensors by name that other programs wrote: `.safetensors`, or a `.ckpt` of torch, read without running code.

A checkpoint of a training holds more than weights. Only its tensors are read, with the averaged ones in their place.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from unet_diffusion.runtime.safe_loading import load_plain

SUFFIX = ".safetensors"
NESTED = ("state_dict", "state_dict", "model_state_dict")  # entries of checkpoints that hold the weights, in turn
PARALLEL = "module."  # begins the names of all weights of a network in DataParallel
NETWORK, AVERAGED = "model.", "model_ema."  # prefixes of a weight and of its average, whose name has no dots


def is_single_file_name(path: str | os.PathLike[str]) -> bool:
    """Return whether a path names one file of weights rather than a folder: by its suffix, .safetensors."""
    return Path(path).suffix == SUFFIX


def check_format(folder: str | os.PathLike[str], format: str, formats: Sequence[str]) -> None:
    """Refuse a format of an export that there is not, or that makes a folder where one file of weights is named.

    Args:
        folder: The folder or file to make.
        format: The format.
        formats: The formats of the model; all but "pipeline" make a folder.

    Raises:
        ValueError: If the format is none of these, or does not fit the name.
    """
    if format not in formats:
        raise ValueError(f"format must be one of {', '.join(formats)}, got {format!r}")
    if is_single_file_name(folder) and format != "pipeline":
        raise ValueError(f"format {format} makes a folder, got {folder}; give a name without {SUFFIX}")


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return all tensors in a file by name, on the CPU; averaged (EMA) weights replace those that were trained.

    Args:
        path: Path of a .safetensors file, or of one written by `torch.save`.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If the file is damaged, has another format, or holds objects that could run code.
    """
    path = Path(path)
    content = read_safetensors(path) if path.suffix == SUFFIX else load_plain(path)
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold tensors by name, and holds a {type(content).__name__}; it is another file")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if all(key.startswith(PARALLEL) for key in tensors):
        tensors = {key.removeprefix(PARALLEL): value for key, value in tensors.items()}
    return with_averages(tensors)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors in a .safetensors file by name, on the CPU.

    Args:
        path: Path of the file.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If the file is damaged, or has another format.
    """
    with _damage_named(path):
        return load_file(path)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata in the header of a .safetensors file.

    Args:
        path: Path of the file.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If the file is damaged, or has another format.
    """
    with _damage_named(path), safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def with_averages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the averages (EMA) of weights, which take the place of these weights.

    Args:
        tensors: Tensors by name, as latent diffusion names them.
    """
    weights = {key: value for key, value in tensors.items() if not key.startswith(AVERAGED)}
    averages = {key: AVERAGED + key.removeprefix(NETWORK).replace(".", "") for key in weights}
    return weights | {key: tensors[average] for key, average in averages.items() if average in tensors}


@contextmanager
def _damage_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """A context in which the library's errors become ValueErrors that name the file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); copy or download it again") from error
