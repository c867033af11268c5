"""Segmenters in files of the layout inc, down, up, outc; see `models.segmentation_file`."""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.segmentation_file import segmentation_unet_of
from unet_diffusion.segmentation.labels import MIN_SIZE, THRESHOLD

WINDOW_SIZE = 512  # pixels, of the tiles of larger images; the network takes any size
BINARY = ["background", "foreground"]


def segmenter_of(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    window_size: int | None = None,
) -> Segmenter:
    """The segmenter of weights of this layout, float32 on the CPU and in eval mode.

    One score, or two, are background and foreground; more are classes. The settings of a file that was exported here
    say more.

    Args:
        tensors: The tensors in a file by name.
        path: Path of the file, for errors.
        settings: What the file stores beside its weights, see `models.single_file.read_settings`.
        window_size: Height and width in pixels of the tiles of larger images; None: that of the settings, or 512.

    Raises:
        ValueError: If the weights are not those of such a network.
    """
    unet = segmentation_unet_of(tensors, path)
    count = unet.config["out_channels"]
    names = BINARY if count == len(BINARY) else [str(number) for number in range(count)]
    kind = settings.get("kind", "binary" if count == len(BINARY) else "classes")
    if kind not in ("binary", "classes"):
        raise ValueError(f"kind in the metadata of {path} must be binary or classes, got {kind!r}; export it again")
    return Segmenter(
        unet=unet,
        kind=kind,
        class_names=settings.get("class_names", names),
        timestep=None,
        stretch=False,
        window_size=window_size or settings.get("image_size", WINDOW_SIZE),
        threshold=settings.get("threshold", THRESHOLD),
        min_size=settings.get("min_size", MIN_SIZE),
    )
