"""Which images are kept for validation, the same ones whatever the seed of a run."""

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from unet_diffusion.data.fingerprints import text_digest
from unet_diffusion.runtime.randomness import keyed_generator

MAX_NUM_VAL = 1000  # by default: enough for a validation loss that is stable to about 1 %
VAL_SHARE = 0.1  # by default
SPLIT_KEY = 0  # not the seed: runs that differ in their seed are validated on the same images


def split_by_name(names: Sequence[str], num_val: int | None = None) -> tuple[Tensor, Tensor]:
    """Sorted indices to train on and to validate on. A hash of its name gives each image a number in [0, 1).

    The num_val images with the lowest numbers are kept for validation, by default those with a number below 0.1. When
    images are added, none that was trained on moves to the validation images, though new ones may displace old ones
    there.

    Args:
        names: The name of each image below the root.
        num_val: The number of validation images. None takes those below 0.1, at least 1 and at most 1000.

    Raises:
        ValueError: If no image is left to train on or to validate on.
    """
    numbers = [number_of(name) for name in names]
    if num_val is None:
        num_val = min(max(sum(number < VAL_SHARE for number in numbers), 1), MAX_NUM_VAL, max(len(names) - 1, 1))
    check_split(len(names), num_val)
    ranked = torch.tensor(sorted(range(len(names)), key=numbers.__getitem__))
    return ranked[num_val:].sort().values, ranked[:num_val].sort().values


def number_of(name: str) -> float:
    """A hash of a name in [0, 1), which does not depend on whether a system stores letters and accents together."""
    text = f"{SPLIT_KEY} {unicodedata.normalize('NFC', name)}"
    return int.from_bytes(text_digest(text)[:8], "big") / 2**64


def split_indices(num_images: int, num_val: int | None = None) -> tuple[Tensor, Tensor]:
    """Sorted indices to train on and to validate on, for images without names; they follow from the two numbers alone.

    Args:
        num_images: The number of all images.
        num_val: The number of validation images; a larger number keeps the images of a smaller one. None takes a
            tenth, at most 1000.

    Raises:
        ValueError: If no image is left to train on or to validate on.
    """
    if num_val is None:
        num_val = default_num_val(num_images)
    check_split(num_images, num_val)
    order = torch.randperm(num_images, generator=keyed_generator(SPLIT_KEY))
    return order[num_val:].sort().values, order[:num_val].sort().values


def default_num_val(num_images: int) -> int:
    """A tenth of the images, at least 1 and at most 1000."""
    return min(max(num_images // 10, 1), MAX_NUM_VAL)


def check_split(num_images: int, num_val: int) -> None:
    """Raises ValueError if no image is left to train on or to validate on."""
    if num_images < 2:
        raise ValueError(f"there must be at least 2 images, to train and to validate on, got {num_images}; add images")
    if not 1 <= num_val < num_images:
        raise ValueError(
            f"num_val must be at least 1 and less than the {num_images} images, got {num_val}; "
            "leave it out to keep a tenth apart"
        )
