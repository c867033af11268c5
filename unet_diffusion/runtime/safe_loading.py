"""Loading of weights that anyone may have made: as tensors and plain values, never as code, and never damaged.

A file of a few bytes can fill the memory: its pickle may name an array of any size.
"""

import functools
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from unet_diffusion.runtime.atomic_files import field_of, read_json

NUM_PICKLES = 5  # in a file of the format that torch wrote before zip archives
# Names in a pickle whose objects can have any size. No checkpoint has them: tensors are rebuilt from their storage.
ALLOCATE = re.compile(r"(?:__builtin__|builtins) bytearray|torch[\w.]* (?:\w*Tensor|TypedStorage|UntypedStorage)")

DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError)  # what zipfile raises
UNREADABLE = (  # what torch raises for files that are no checkpoints, or damaged
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError),
    *(AssertionError, AttributeError, LookupError, TypeError, ValueError),
)


def load_plain(path: str | os.PathLike[str]) -> Any:
    """Return the tensors and plain values in a file written by `torch.save`, on the CPU.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If the file has another format, is damaged, holds anything that could run code when loaded, or is
            compressed, so that it could fill the memory.
    """
    is_whole = _is_whole(path)
    if is_whole:
        state = os.stat(path)
        _check_bytes(os.fspath(path), state.st_size, state.st_mtime_ns)
    check_pickle(Path(path))
    try:
        return _unpickled(path, is_whole)
    except UNREADABLE as error:
        if not is_whole:
            reason = "is no checkpoint, or only a part of one: it must be a file written by torch.save"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "was not loaded: it must hold only tensors and plain values, got objects that could run code"
        else:
            reason = "is damaged; copy or download it again"
        raise ValueError(f"{path} {reason}") from error


def step_of(path: str | os.PathLike[str]) -> float:
    """Return the step of a checkpoint without reading its weights, or infinity if the file cannot be read."""
    try:
        check_pickle(Path(path))
        return int(_unpickled(path, _is_whole(path))["global_step"])
    except (MemoryError, OverflowError, *UNREADABLE):
        return math.inf


def _is_whole(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a zip archive with its directory, which stands at the end: a cut file has none.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If the archive is damaged or compressed.
    """
    with open(path, "rb") as file:
        try:
            if not zipfile.is_zipfile(file):
                return False
            members = zipfile.ZipFile(file).infolist()
        except (*DAMAGED, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); copy or download it again") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError(f"{path} was not loaded: it must be uncompressed; save it again with torch.save")
    return True


def _unpickled(path: str | os.PathLike[str], is_whole: bool) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_whole)


@functools.lru_cache(maxsize=8)
def _check_bytes(path: str, size: int, time: int) -> None:
    """Compare all bytes of a file with their checksums, once for each path, size and time of the last change.

    Raises:
        ValueError: If they differ.
    """
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (*DAMAGED, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again") from error
    if bad is not None:
        raise ValueError(f"{path} is damaged (the checksum of {bad} is wrong); copy or download it again")


def check_safetensors(folder: Path, stem: str) -> str | None:
    """Require that a model's weights are safetensors: the older format is a pickle, which can run code.

    Returns the variant of the weights, such as "fp16", in a folder that holds no others; None for full precision.

    Args:
        folder: Folder of a model of diffusers or transformers.
        stem: Name of its file of weights, without the extension.

    Raises:
        FileNotFoundError: If the folder holds no weights in safetensors.
        ValueError: If the index of several files names anything but safetensors files in the same folder, or if the
            folder holds several variants alone.
    """
    variant = _variant(folder, stem)
    ending = "" if variant is None else f".{variant}"
    index = folder / f"{stem}.safetensors.index{ending}.json"
    if index.is_file():
        names = field_of(read_json(index), "weight_map", index).values()
        if wrong := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise ValueError(f"{index} must name .safetensors files in its folder, got {wrong[0]!r}; download it again")
    elif not (folder / f"{stem}{ending}.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} must hold {stem}.safetensors, and does not; a file in the older format .bin can run code: ask "
            "its author for safetensors, which save_pretrained of diffusers writes"
        )
    return variant


def _variant(folder: Path, stem: str) -> str | None:
    """The variant of the weights in safetensors, if there are none without one."""
    names = re.compile(rf"{stem}(?:\.(\w+))?\.safetensors|{stem}\.safetensors\.index(?:\.(\w+))?\.json")
    matches = [match for path in folder.glob("*") if (match := names.fullmatch(path.name))]
    variants = sorted({match[1] or match[2] or "" for match in matches})
    if len(variants) > 1 and variants[0]:
        raise ValueError(f"{folder} must have one variant of its weights, got {variants}; remove the others")
    return variants[0] or None if variants else None


def check_pickle(path: Path) -> None:
    """Refuse a file of torch.save whose pickle names objects of any size, which could fill the memory.

    Args:
        path: Path of the file, a zip archive or in the format that torch wrote before.

    Raises:
        ValueError: If the pickle names such an object.
    """
    for _, argument, _ in _operations(path):
        if isinstance(argument, str) and ALLOCATE.fullmatch(argument):
            raise ValueError(
                f"{path} was not loaded: it must hold only tensors and plain values, got {argument}, which can have "
                "any size"
            )


def _operations(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the operations of all pickles in a file, as far as they can be read."""
    with suppress(*DAMAGED), open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            for _ in range(NUM_PICKLES):
                yield from pickletools.genops(file)
            return
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    yield from pickletools.genops(archive.read(name))
