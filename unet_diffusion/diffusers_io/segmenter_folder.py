"""Folders of segmenters: config.json, model.safetensors and README.md, which `unet_diffusion.load` reads."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from unet_diffusion.runtime.atomic_files import check_replaceable, put_folder, read_json
from unet_diffusion.runtime.shareable import shareable
from unet_diffusion.runtime.tensor_files import read_safetensors

StrPath = str | os.PathLike[str]
CLASS_NAME, WEIGHTS = "Segmenter", "model.safetensors"
CARD = """---
library_name: unet-diffusion
pipeline_tag: image-segmentation
tags: [image-segmentation, unet-diffusion]
---
# A U-Net for segmentation

Segments images of {channels} channel{s} into {classes}. The network is a `{network}` with {parameters:,} parameters.

## Use
```python
import unet_diffusion as ud

segmenter = ud.load("path/to/this/folder")
result = segmenter.segment("image.png")
result.classes  # the mask, (H, W)
```

## Training
Settings:
```yaml
{settings}```

## Licence
Not stated. If you publish this folder, choose a licence that fits the training images.
"""


def save_segmenter_folder(
    record: Mapping[str, Any], weights: Mapping[str, Tensor], folder: StrPath, *, overwrite: bool = False
) -> None:
    """Write the folder of a segmenter; it is read again and compared before it gets its name.

    Args:
        record: The plain values that describe it; of its settings, those that are `shareable` are written.
        weights: The weights of its network.
        folder: The folder to make; it appears whole or not at all.
        overwrite: Replace the folder, if everything in it was exported there.

    Raises:
        FileExistsError: If the folder exists and overwrite is False, or if it holds other files.
        RuntimeError: If the folder does not give what was written.
    """
    record = {**record, "settings": shareable(record["settings"])}
    folder = Path(folder).resolve()
    check_replaceable(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        plain = {"_class_name": CLASS_NAME, **record}
        (partial / "config.json").write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        stored = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        save_file(stored, partial / WEIGHTS, {"format": "pt"})
        again, values = read_segmenter_folder(partial)
        is_same = all(stored[key].equal(value) for key, value in values.items())
        if again != json.loads(json.dumps(record)) or not is_same:
            raise RuntimeError("a segmenter must be read as it was written, and is not; nothing was exported")
        (partial / "README.md").write_text(_card(record, stored), encoding="utf-8")
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def holds_segmenter(folder: Path) -> bool:
    """Whether a folder is one of `save_segmenter_folder`."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == CLASS_NAME


def read_segmenter_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the weights in the folder of a segmenter.

    Raises:
        FileNotFoundError: If the folder has no weights.
        ValueError: If a file is damaged.
    """
    record = {name: value for name, value in read_json(folder / "config.json").items() if name != "_class_name"}
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} must hold {WEIGHTS} beside config.json, and does not; copy it again")
    return record, read_safetensors(folder / WEIGHTS)


def _card(record: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    channels = record["unet"]["init_args"].get("in_channels", 1)
    settings = yaml.safe_dump(record["settings"], sort_keys=False, allow_unicode=True) if record["settings"] else None
    return CARD.format(
        channels=channels,
        s="" if channels == 1 else "s",
        classes=", ".join(record["class_names"]),
        network=record["unet"]["class_path"].rpartition(".")[2],
        parameters=sum(value.numel() for value in weights.values()),
        settings=settings or "# not known\n",
    )
