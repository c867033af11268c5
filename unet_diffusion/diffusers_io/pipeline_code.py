"""Pipelines of our own, and their source, which is copied into an exported folder."""

import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel

from unet_diffusion.diffusers_io.pipelines import conditional
from unet_diffusion.diffusers_io.pipelines.conditional import ConditionalPipeline
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.conditions.encoded import EncodedCondition
from unet_diffusion.diffusion.conditions.low_resolution import MAX_NOISE_LEVEL
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.models.autoencoders import AutoencoderNetwork
from unet_diffusion.runtime.atomic_files import read_json

ENCODER_PARTS = {"tokens": ("tokens",), "maps": ("maps", "maps_2")}  # the parts of a pipeline for each kind of encoder


def own_pipeline(
    parts: DenoiserParts,
    unet: UNet2DModel | UNet2DConditionModel,
    scheduler: DDPMScheduler | DDIMScheduler,
    vae: AutoencoderNetwork | None,
) -> ConditionalPipeline:
    """The pipeline of a denoiser that no pipeline of diffusers draws the same as.

    Args:
        parts: The denoiser.
        unet: Its network.
        scheduler: Its sampler.
        vae: Its autoencoder; None: it denoises images.
    """
    conditions = parts.all_conditions
    return ConditionalPipeline(
        unet,
        scheduler,
        vae,
        class_names=parts.class_names,
        unconditional={
            condition.pipeline_role: condition.pipeline_null for condition in conditions if condition.has_null
        },
        max_noise_level=MAX_NOISE_LEVEL,
        scale_factor=max([1, *(condition.scale_factor for condition in conditions)]),
        values=None if parts.are_pictures else parts.values.plain(),
        conditions=[
            [str(condition.pipeline_role), f"{type(condition).__module__}.{type(condition).__qualname__}"]
            for condition in conditions
        ],
        **_components(conditions),
    )


def why_no_own_pipeline_takes(conditions: Sequence[Condition]) -> str | None:
    """The reason why a pipeline of our own does not take these conditions together; None if it does."""
    encoded = [condition for condition in conditions if isinstance(condition, EncodedCondition)]
    for kind, places in ENCODER_PARTS.items():
        names = [type(condition).__name__ for condition in encoded if condition.pipeline_part == kind]
        if len(names) > len(places):
            return f"a pipeline takes at most {len(places)} conditions that give {kind}, got {', '.join(names)}"
    return None


def encoder_parts(conditions: Sequence[Condition]) -> list[tuple[EncodedCondition, str]]:
    """The conditions with an encoder, and the name of the part of a pipeline that each encoder becomes, in order."""
    free = {kind: list(places) for kind, places in ENCODER_PARTS.items()}
    encoded = [condition for condition in conditions if isinstance(condition, EncodedCondition)]
    return [(condition, free[condition.pipeline_part].pop(0)) for condition in encoded]


def ship_pipeline_code(folder: Path, pipeline: ConditionalPipeline) -> None:
    """Copy the source of the pipeline and its parts into the folder, named in model_index.json as diffusers does it.

    Args:
        folder: The folder, which the pipeline was saved to.
        pipeline: The pipeline.
    """
    index = read_json(folder / "model_index.json")
    shutil.copyfile(conditional.__file__, folder / "pipeline.py")
    index["_class_name"] = ["pipeline", ConditionalPipeline.__name__]
    for name in ("class_tokens", *(place for places in ENCODER_PARTS.values() for place in places)):
        if (part := getattr(pipeline, name)) is not None:
            shutil.copyfile(inspect.getfile(type(part)), folder / name / f"{name}.py")
            index[name] = [name, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _components(conditions: Sequence[Condition]) -> dict[str, Any]:
    """The parts that conditions add to a pipeline, by name."""
    encoded = encoder_parts(conditions)
    components = {place: condition.pipeline_parts()[condition.pipeline_part] for condition, place in encoded}
    for condition in conditions:
        if not isinstance(condition, EncodedCondition):
            components |= condition.pipeline_parts()
    return components
