"""Latents of a set of images, made once and kept on disk, and the space they lie in.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, section 3.1): the autoencoder is done before diffusion in its
latents begins, so each image, and its mirror image, is encoded once. What is kept is the distribution of its latents,
from which each step of training draws anew. Unlike in their code the scale comes from all images, not from one batch.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unet_diffusion.latents.space import LEAST_STD, LatentSpace, moment_sums
from unet_diffusion.runtime.atomic_files import atomic_write, field_of, read_json, remove_left_behind
from unet_diffusion.runtime.cropping import Crop
from unet_diffusion.runtime.folder_settings import SETTINGS, require_same_settings
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.runtime.processes import ALONE, ProcessGroup

INDEX = "index.json"
ENTRIES = "entries.safetensors"
MADE_OF = "images"  # in the metadata of a file: a hash of the files of its images
SHARD_IMAGES = 1024  # in a file, with their mirror images


@dataclass
class LatentSet:
    """The latents of N images, before they are normalised.

    Args:
        space: The latent space that they are in.
        mean: Mean of the distribution of each latent, (N, C, h, w) float16; with mirror images (2N, C, h, w), which
            come last.
        std: Standard deviation of that distribution, of the same shape; 0 for a codebook.
        entries: Values of each image beside its latents, by name: numbers (N, ...) or N texts.
        class_names: The name of each class, or None.
        has_mirrored: Whether mirror images are there too.
        names: The name of each image's file, or None.
        values: What the numbers in those files mean.
        crops: The part of its file that each image shows, or None.
    """

    space: LatentSpace
    mean: Tensor
    std: Tensor
    entries: dict[str, Tensor | list[str]]
    class_names: list[str] | None
    has_mirrored: bool
    names: list[str] | None = None
    values: PixelValues = field(default_factory=PixelValues)
    crops: list[Crop] | None = None

    def __len__(self) -> int:
        return len(self.mean) // 2 if self.has_mirrored else len(self.mean)


def encode_images(
    folder: Path,
    images: Callable[[range], Tensor],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    settings: dict[str, Any],
    contents: Sequence[str] = (),
    entries: Mapping[str, Tensor | list[str]] | None = None,
    crops: Sequence[Crop] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], object] = lambda num_images: None,
    say: Callable[[str], object] = lambda line: None,
    group: ProcessGroup = ALONE,
) -> None:
    """Write the latents of all images to a folder, going on where an earlier call with the same settings was cut off.

    A file appears whole or not at all, and index.json, which makes the folder a set of latents, comes last.

    Args:
        folder: The folder to write to. It is made if it is not there.
        images: A function that gives the images of these numbers, (B, C, H, W) in [-1, 1].
        encode: A function that gives mean and standard deviation of their latents, (B, c, h, w) each.
        settings: Plain values that decide what the latents are: "autoencoder", "fingerprint", "image_shape",
            "num_images", "has_mirrored" (each image's mirror image is encoded too), "has_codes" (all channels share a
            scale), "class_names" and "names" (of each image, or None), "values" (of `PixelValues`), and those of the
            images.
        contents: A hash of each image's file. Latents of other contents are made again.
        entries: Values of each image beside its latents, by name: numbers (N, ...) or N texts.
        crops: The part of its file that each image shows. None: it is not known.
        batch_size: The number of images that are encoded at once.
        progress: A function that is called with the number of images that were done.
        say: A function that is called with a line for each file of latents that is made again.
        group: The processes that share the files out.

    Raises:
        FileExistsError: If the folder holds something else, or latents with other settings.
    """
    entries = entries or {}
    numeric = {key: rows for key, rows in entries.items() if isinstance(rows, Tensor)}
    settings = {"texts": {key: rows for key, rows in entries.items() if key not in numeric}, **settings}
    group.on_rank_zero(lambda: _begin(folder, settings, contents, say))
    for numbers, path in group.shard(_shards(folder, settings["num_images"])):
        if not path.exists():
            parts = [
                range(i, min(i + batch_size, numbers.stop)) for i in range(numbers.start, numbers.stop, batch_size)
            ]
            done = []
            for part in parts:
                done.append(_encoded(images(part), encode, settings["has_mirrored"]))
                progress(len(part))
            tensors = {name: torch.cat([one[name] for one in done]) for name in done[0]}
            with atomic_write(path) as partial:
                save_file(tensors, partial, {MADE_OF: _digest(contents, numbers)})
        else:
            progress(len(numbers))
    group.barrier()
    group.on_rank_zero(lambda: _write_index(folder, {**settings, "crops": crops}, numeric))


def read_latents(folder: str | Path) -> LatentSet:
    """The latents in a folder that `encode_images` wrote, all in memory.

    Raises:
        FileNotFoundError: If the folder holds no latents, or they were not finished.
        ValueError: If a file is damaged.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        reason = "were not finished" if (folder / SETTINGS).is_file() else "are not there"
        raise FileNotFoundError(f"the latents in {folder} {reason}; run unet-diffusion encode, which goes on by itself")
    index = read_json(folder / INDEX)
    for name in ("num_images", "has_mirrored", "space", "class_names", "texts", "values"):
        field_of(index, name, folder / INDEX)
    shards = [_read_shard(path) for _, path in _shards(folder, index["num_images"])]
    copies = ("", "_mirrored") if index["has_mirrored"] else ("",)
    mean, std = (torch.cat([shard[name + copy] for copy in copies for shard in shards]) for name in ("mean", "std"))
    return LatentSet(
        space=LatentSpace.from_plain(index["space"]),
        mean=mean,
        std=std,
        entries=_read_entries(folder, index),
        class_names=index["class_names"],
        has_mirrored=index["has_mirrored"],
        names=index.get("names"),
        values=PixelValues.from_plain(index["values"]),
        crops=_read_crops(folder, index),
    )


def _begin(folder: Path, settings: dict[str, Any], contents: Sequence[str], say: Callable[[str], object]) -> None:
    """Claim the folder, and remove files of latents that are not of these images, the index first."""
    require_same_settings(folder, settings, "latents")
    remove_left_behind(folder)
    shards = [(numbers, path) for numbers, path in _shards(folder, settings["num_images"]) if path.exists()]
    for path in (path for numbers, path in shards if _made_of(path) != _digest(contents, numbers)):
        say(f"{path.name} is made again, because images in it have changed or it is damaged")
        (folder / INDEX).unlink(missing_ok=True)
        path.unlink()


def _digest(contents: Sequence[str], numbers: range) -> str:
    """Of the images of these numbers."""
    return hashlib.sha256("\n".join(contents[numbers.start : numbers.stop]).encode()).hexdigest()


def _made_of(path: Path) -> str | None:
    """The digest of the images that a file of latents is of; None: it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(MADE_OF)
    except SafetensorError:
        return None


def _encoded(
    images: Tensor, encode: Callable[[Tensor], tuple[Tensor, Tensor]], has_mirrored: bool
) -> dict[str, Tensor]:
    copies = {"": images, "_mirrored": images.flip(3)} if has_mirrored else {"": images}
    tensors: dict[str, Tensor] = {}
    for copy, pixels in copies.items():
        mean, std = encode(pixels)
        tensors |= {f"mean{copy}": mean.half().cpu().contiguous(), f"std{copy}": std.half().cpu().contiguous()}
    return tensors


def _shards(folder: Path, num_images: int) -> list[tuple[range, Path]]:
    """The images in each file, and its path."""
    starts = range(0, num_images, SHARD_IMAGES)
    return [
        (range(start, min(start + SHARD_IMAGES, num_images)), folder / f"latents_{number:05d}.safetensors")
        for number, start in enumerate(starts)
    ]


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors ({error}); remove it and encode again") from error


def _read_entries(folder: Path, index: Mapping[str, Any]) -> dict[str, Tensor | list[str]]:
    texts = index["texts"]
    if not isinstance(texts, dict) or not all(isinstance(rows, list) for rows in texts.values()):
        raise ValueError(f"texts in {folder / INDEX} must be a list for each name; remove the file and encode again")
    entries: dict[str, Tensor | list[str]] = {**_read_shard(folder / ENTRIES), **texts}
    for key, rows in entries.items():
        if len(rows) != index["num_images"]:
            raise ValueError(f"{folder} must hold {key} of {index['num_images']} images, and holds those of "
                             f"{len(rows)}; encode again")  # fmt: skip
    return entries


def _read_crops(folder: Path, index: Mapping[str, Any]) -> list[Crop] | None:
    if (rows := index.get("crops")) is None:
        return None
    try:
        crops = [Crop.from_plain(row) for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"crops in {folder / INDEX} are not as encode writes them; encode again") from error
    if len(crops) != index["num_images"]:
        raise ValueError(f"{folder} must hold crops of {index['num_images']} images, and holds those of {len(crops)}; "
                         "encode again")  # fmt: skip
    return crops


def _write_index(folder: Path, settings: dict[str, Any], entries: dict[str, Tensor]) -> None:
    mean, std = _moments(folder, settings["num_images"], shared=settings["has_codes"])
    fields = {name: settings[name] for name in ("autoencoder", "fingerprint", "image_shape")}
    (_, first), *_ = _shards(folder, settings["num_images"])
    factor = settings["image_shape"][1] // _read_shard(first)["mean"].shape[2]
    space = LatentSpace.from_plain({**fields, "downsampling": factor, "mean": mean, "std": std})
    keys = ("num_images", "has_mirrored", "class_names", "names", "texts", "crops")
    index = {"space": space.plain(), **{key: settings.get(key) for key in keys}}
    index["values"] = settings.get("values", PixelValues().plain())
    with atomic_write(folder / ENTRIES) as partial:
        save_file({key: rows.contiguous() for key, rows in entries.items()}, partial)
    with atomic_write(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1))


def _moments(folder: Path, num_images: int, *, shared: bool) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all images, as training draws the latents.

    If shared, one standard deviation is of all channels together and no mean is taken off, since the decoder looks for
    the nearest code.
    """
    sums = torch.zeros(4, 1, dtype=torch.float64)
    for _, path in _shards(folder, num_images):
        shard = _read_shard(path)
        for name in shard:
            if name.startswith("mean"):
                std = shard["std" + name.removeprefix("mean")]
                sums = sums + moment_sums(shard[name].double(), std.double())
    sums = sums.sum(dim=1, keepdim=True).expand_as(sums) if shared else sums
    count, total, squares, variances = sums
    mean = torch.zeros_like(total) if shared else total / count
    std = ((squares + variances) / count - (total / count).square()).clamp(min=LEAST_STD**2).sqrt()
    return mean.tolist(), std.tolist()
