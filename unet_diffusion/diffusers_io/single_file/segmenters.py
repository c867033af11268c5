"""Export of segmenters to one file of weights whose names are `inc`, `down1` ..., `up1` ... and `outc`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unet_diffusion.diffusers_io.single_file.exporting import check_replaceable, written
from unet_diffusion.models.segmentation_file import segmentation_unet_of, weights_of
from unet_diffusion.models.single_file import read_settings
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.runtime.tensor_files import read_tensors

KINDS = ("binary", "classes")  # of the segmenters that give scores of classes alone
STORED = {
    "kind": "kind",
    "class_names": "class_names",
    "image_size": "window_size",
    "threshold": "threshold",
    "min_size": "min_size",
}  # settings of the file by name, and the fields of a segmenter that they are


def export_segmenter_file(
    unet: PixelNetwork, record: Mapping[str, Any], path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a segmenter to one file, which `unet_diffusion.load` reads; it is read again and compared.

    Args:
        unet: The network of the segmenter.
        record: The plain values that describe the segmenter, as `Segmenter.record`.
        path: The .safetensors file to make; it appears whole or not at all.
        overwrite: Replace the file, if it was exported.

    Raises:
        FileExistsError: If the file exists and overwrite is False, or if it is another file.
        RuntimeError: If the file gives another segmenter when it is read.
        ValueError: If the layout has no place for the network, or for what the segmenter does.
    """
    path = Path(path)
    check_replaceable(path, overwrite=overwrite)
    weights = weights_of(unet)
    if record["kind"] not in KINDS or len(record["class_names"]) != unet.config["out_channels"]:
        raise ValueError(f"one file holds the scores of classes alone, and a segmenter of kind {record['kind']} gives "
                         f"{unet.config['out_channels']} maps; export a folder")  # fmt: skip
    changed = record["stretch"] or record["object_diameter"] is not None
    if changed or record["values"] != PixelValues().plain():
        raise ValueError("one file holds a segmenter of images of 8 bits that are neither stretched nor scaled; export "
                         "a folder")  # fmt: skip
    settings = {name: record[field] for name, field in STORED.items()}
    with written(weights, path, settings) as readable:
        again = segmentation_unet_of(read_tensors(readable), readable).state_dict()
        same = all(torch.equal(again[key], value.cpu()) for key, value in unet.state_dict().items())
        if not same or read_settings(readable) != settings:
            raise RuntimeError(f"{path} gives another segmenter when it is read; please report this")
