"""Draws from exported folders in a process where this package cannot be imported.

Whoever gets such a folder has diffusers and nothing else.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image


def draw_elsewhere(root: Path, calls: dict[str, dict[str, dict]], seeds: list[int]) -> dict[str, dict[str, np.ndarray]]:
    """The images of some calls of each pipeline, and of the Python of its model card as "card", by names.

    Args:
        root: holds NAME/pipeline for each name, and beside it the files that a call or the model card names.
        calls: options of each call, by the name of the folder and of the call; pictures and tensors are names of files.
        seeds: of the images of a call, if it has none of its own.
    """
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(root), json.dumps(calls), json.dumps(seeds)]
    subprocess.run([sys.executable, "-I", __file__, *arguments], check=True, env=environment)
    drawn = {}
    for name in calls:
        with np.load(root / name / "drawn.npz") as arrays:
            drawn[name] = dict(arrays)
    return drawn


def _draw(root: str, calls: dict[str, dict[str, dict]], seeds: list[int]) -> None:
    for name, options in calls.items():
        os.chdir(Path(root) / name)
        pipeline = diffusers.DiffusionPipeline.from_pretrained("pipeline", trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        arrays = {call: _called(pipeline, one, seeds) for call, one in options.items()}
        card = Path("pipeline/README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
        found: dict = {}
        exec(card.replace("path/to/this/folder", "pipeline"), found)
        arrays["card"] = np.stack([np.asarray(image) for image in found["images"]])
        np.savez("drawn.npz", **arrays)


def _called(pipeline: diffusers.DiffusionPipeline, options: dict, seeds: list[int]) -> np.ndarray:
    read = {
        "image": Image.open,
        "mask_image": Image.open,
        "small_image": Image.open,
        "semantic_map": Image.open,
        "paired_image": Image.open,
        "concat": lambda path: torch.from_numpy(np.load(path)),
        "latents": lambda path: torch.from_numpy(np.load(path)),
    }
    options = {name: read[name](value) if name in read else value for name, value in options.items()}
    generator = [torch.Generator().manual_seed(seed) for seed in options.pop("seeds", seeds)]
    return pipeline(generator=generator, output_type="np", **options).images


if __name__ == "__main__":
    sys.modules["unet_diffusion"] = None  # type: ignore[assignment]
    try:
        import unet_diffusion  # noqa: F401
    except ImportError:
        _draw(sys.argv[1], *map(json.loads, sys.argv[2:]))
    else:
        raise AssertionError("the package must not be importable here")
