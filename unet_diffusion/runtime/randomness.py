"""Random numbers that are a function of a key: the seed, and the numbers of the step, process or image."""

import hashlib
from collections.abc import Iterable

import torch


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose draws are a function of a key alone, such as (seed, step, rank) or (seed, image index).

    The key is hashed because neighbouring seeds of one generator give correlated streams, and so that (0, 1) and (1, 0)
    differ.

    Args:
        key: Integers; their order matters.
        device: Device on which numbers are drawn; the same key gives other numbers on another kind of device.
    """
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1  # torch takes signed 64-bit seeds
    return torch.Generator(device).manual_seed(seed)


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """Return a generator for each image, keyed by (seed, index), on the CPU: every device gets the same numbers."""
    return [keyed_generator(seed, index) for index in indices]
