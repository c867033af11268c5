"""Random numbers that are a function of a key: of the seed, and of what they are drawn for."""

import hashlib
from collections.abc import Iterable

import torch


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws are a function of the key alone, such as (seed, step, rank) or (seed, image index).

    The key is hashed because neighbouring seeds of one generator give correlated streams, and so that (0, 1) and (1, 0)
    differ.

    Args:
        key: integers; the order matters.
        device: where the numbers are drawn; the same key gives other numbers on another kind of device.
    """
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1  # torch takes signed 64-bit seeds
    return torch.Generator(device).manual_seed(seed)


def image_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """A generator for each image, keyed by (seed, index); on the CPU, so that every device gets the same numbers."""
    return [keyed_generator(seed, index) for index in indices]
