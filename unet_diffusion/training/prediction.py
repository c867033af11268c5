"""Reads the batches of `trainer.predict`, which may come from any data loader."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def images_of(batch: Any) -> list[Tensor]:
    """The images of a batch, (C, H, W) each.

    Args:
        batch: A tensor (B, C, H, W), or (C, H, W) for one image; a dict with it as "images", a list of such dicts, or
            a tuple that begins with it.

    Raises:
        ValueError: If a tensor has another number of dimensions.
    """
    if isinstance(batch, Tensor):
        if batch.ndim not in (3, 4):
            raise ValueError(f"images must be (B, C, H, W), or (C, H, W) for one, got {tuple(batch.shape)}")
        return list(batch) if batch.ndim == 4 else [batch]
    if isinstance(batch, dict):
        return images_of(batch["images"])
    if batch and isinstance(batch[0], dict):
        return [image for one in batch for image in images_of(one)]
    return images_of(batch[0])


def numbered(batch: Any) -> Mapping[str, Any]:
    """A batch that says which images to draw, as a dict with "index".

    Args:
        batch: A dict with "index" (B,) int64 and what the conditions read, or these numbers alone, (B,).

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(batch, Tensor) and batch.ndim == 1:
        return {"index": batch}
    if isinstance(batch, Mapping) and "index" in batch:
        return batch
    got = f"entries {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise ValueError(
        'a batch to draw must be a dict with "index" (B,), the number of each image, and what the conditions read, or '
        f"the numbers alone, got {got}; DataLoader(range(16), batch_size=4) draws 16 images"
    )
