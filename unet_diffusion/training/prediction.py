"""Reads the batches of `trainer.predict`, which may come from any data loader."""

from typing import Any

from torch import Tensor


def images_of(batch: Any) -> list[Tensor]:
    """The images of a batch, (C, H, W) each.

    Args:
        batch: A tensor (B, C, H, W), a dict with it as "images", a list of such dicts, or a tuple that begins with it.
    """
    if isinstance(batch, Tensor):
        return list(batch)
    if isinstance(batch, dict):
        images = batch["images"]
        return list(images) if images.ndim == 4 else [images]
    if batch and isinstance(batch[0], dict):
        return [image for one in batch for image in images_of(one)]
    return list(batch[0])
