"""Conditions and the data: they learn of them, and read their batches in training, in validation and to draw."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import CONDITION_KEY, Condition, Encode
from unet_diffusion.runtime.randomness import keyed_generator

Draws = list[tuple[Condition, dict[str, Tensor]]]
"""Each condition that provides entries, with the random numbers behind them, (B, ...) each."""


def bind_conditions(conditions: Sequence[Condition], sample_shape: tuple[int, int, int], datamodule: Any) -> None:
    """Have conditions learn of the data; those whose entry another one provides learn nothing.

    Args:
        conditions: The conditions.
        sample_shape: (C, h, w) of x0.
        datamodule: The data, set up.

    Raises:
        ValueError: If the data do not fit a condition.
    """
    provided = {entry for condition in conditions for entry in condition.provides}
    for condition in conditions:
        condition.bind_sample_shape(sample_shape)
        if condition.provides or condition.batch_key not in provided:
            condition.bind_data(datamodule)


def draws_of_images(conditions: Sequence[Condition], images: Tensor, index: Sequence[int], seed: int) -> Draws:
    """The random numbers behind provided entries, on the device of the images: for an image always the same ones.

    Args:
        conditions: The conditions; those that provide nothing draw nothing.
        images: B images, (B, C, H, W).
        index: The number of each in its data set.
        seed: The seed.
    """
    draws = []
    for condition in conditions:
        if condition.provides:
            generators = [keyed_generator(seed, CONDITION_KEY, number) for number in index]
            each = [condition.draw(torch.Size([1, *images.shape[1:]]), generator) for generator in generators]
            joined = {name: torch.cat([one[name] for one in each]).to(images.device) for name in each[0]}
            draws.append((condition, joined))
    return draws


def entries_of_images(
    conditions: Sequence[Condition],
    batch: Mapping[str, Any],
    draws: Draws,
    *,
    encode: Encode,
    encode_provided: Encode | None = None,
) -> dict[str, Any]:
    """The batch with all entries that the conditions read, the provided ones and the numbers behind these as well.

    Args:
        conditions: The conditions.
        batch: A batch of the data, with "images" (B, C, H, W) in [-1, 1] if a condition provides entries.
        draws: The random numbers behind provided entries, on the device of the batch.
        encode: Function that gives the x0 of images: the mean, where a codec draws in training.
        encode_provided: The same for provided entries, which may draw x0 in training; None: as `encode`.

    Raises:
        ValueError: If the batch lacks an entry.
    """
    entries = dict(batch)
    for condition, drawn in draws:
        entries |= {**drawn, **condition.entries(batch["images"], drawn, encode_provided or encode)}
    for condition in conditions:
        entries[condition.batch_key] = condition.read(entries, encode)
    return entries
