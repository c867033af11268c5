"""The source of a pipeline of our own, copied into its folder."""

import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from unet_diffusion.diffusers_io.pipelines import conditional
from unet_diffusion.diffusers_io.pipelines.conditional import ConditionalPipeline
from unet_diffusion.runtime.atomic_files import read_json


def ship_pipeline_code(folder: Path, pipeline: ConditionalPipeline, own_parts: Sequence[str]) -> None:
    """Copy the source of the pipeline and its parts into the folder, named in model_index.json as diffusers does it.

    Args:
        folder: The folder, which the pipeline was saved to.
        pipeline: The pipeline.
        own_parts: The names of parts whose code is in a file beside that of their condition.
    """
    index = read_json(folder / "model_index.json")
    shutil.copyfile(conditional.__file__, folder / "pipeline.py")
    index["_class_name"] = ["pipeline", ConditionalPipeline.__name__]
    for name in ("class_tokens", *own_parts):
        if (part := getattr(pipeline, name)) is not None:
            shutil.copyfile(inspect.getfile(type(part)), folder / name / f"{name}.py")
            index[name] = [name, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
