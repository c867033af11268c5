"""Reads the batches of `trainer.predict`, which may come from any data loader."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def images_of(batch: Any) -> list[Tensor]:
    """The images of a batch, (C, H, W) each.

    Args:
        batch: A tensor (B, C, H, W), or (C, H, W) for one image; a dict with it as "images", or a tuple or list that
            begins with it; a list of tensors (C, H, W), of dicts or of tuples, each with one image or more.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(batch, Tensor):
        if batch.ndim not in (3, 4):
            raise ValueError(f"images must be (B, C, H, W), or (C, H, W) for one, got {tuple(batch.shape)}")
        return list(batch) if batch.ndim == 4 else [batch]
    if isinstance(batch, dict):
        return images_of(batch["images"])
    if not isinstance(batch, list | tuple) or not batch:
        raise ValueError(f"a batch must be images, or a dict, list or tuple of them, got {type(batch).__name__}")
    is_list_of_images = isinstance(batch, list) and all(isinstance(one, Tensor) and one.ndim == 3 for one in batch)
    if is_list_of_images or isinstance(batch[0], dict | list | tuple):
        return [image for one in batch for image in images_of(one)]
    return images_of(batch[0])  # what comes after the images is not for the network


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
