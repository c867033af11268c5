"""The README.md of an exported folder: what the folder holds, how to load it, and how it was trained."""

from collections.abc import Mapping
from typing import Any

import yaml
from diffusers import DiffusionPipeline

from unet_diffusion.diffusers_io.pipelines.conditional import ConditionalPipeline
from unet_diffusion.diffusers_io.super_resolution import why_no_super_resolution
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.models.autoencoders import AutoencoderNetwork, downsampling, num_codes, num_latent_channels
from unet_diffusion.runtime.shareable import shareable

MODEL_CARD = """---
library_name: diffusers
tags: [image-generation, {kind}, unet-diffusion]
---
# A denoising U-Net, {kind}

Generates {samples} of {channels} x {height} x {width} (channels, height, width) by diffusion. The network is a
`{network}` with {parameters:,} parameters.

## Use
{usage}
## Training
Noise schedule:
```yaml
{schedule}```
Settings:
```yaml
{settings}```

## Licence
Not stated. If you publish this folder, choose a licence that fits the training images.
"""
UNCONDITIONAL_USAGE = """```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("path/to/this/folder")
images = pipeline(batch_size=4, num_inference_steps={steps}).images
```
To sample in fewer steps, set `pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)` and choose a
number of steps that divides {steps}. `DPMSolverMultistepScheduler` works, too. Euler schedulers do not, because
`DDPMPipeline` does not scale the network's input for them.
"""
LATENT_USAGE = """```python
from diffusers import LDMPipeline

pipeline = LDMPipeline.from_pretrained("path/to/this/folder")
images = pipeline(batch_size=4, num_inference_steps=50).images
```
Any scheduler with the same noise schedule works, such as
`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.
"""
OWN_USAGE = """```python
from diffusers import DiffusionPipeline
{preparation}
# trust_remote_code runs this folder's pipeline.py, the sampling loop with classifier-free guidance
pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
images = pipeline({arguments}, num_inference_steps={steps}{guidance}).images
```
{about}To sample in fewer steps, use another scheduler with the same noise schedule, such as
`pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)`.
"""
NUMBERS = """`images` is an array (N, C, H, W) of {dtype} from {low:g} to {high:g}, the type and range of the training
images. `output_type` may also be "np" or "pt", for numbers from 0 to 1.

"""
LOAD_IMAGE = "from diffusers.utils import load_image\n\n"
PREPARATIONS = {  # imports and code that prepare arguments of a ConditionalPipeline, by the last of them
    "mask_image": f'{LOAD_IMAGE}image, mask_image = load_image("image.png"), load_image("mask.png")  '
    "# white is painted, black stays",
    "image": f'{LOAD_IMAGE}image = load_image("image.png")  # the image to enlarge',
    "small_image": f'{LOAD_IMAGE}small_image = load_image("small_image.png")  # of {{width}} x {{height}} pixels',
    "concat": "import torch\n\nconcat = torch.zeros(1, {num_maps}, {height}, {width})  # replace by your maps",
}
ENLARGING_USAGE = """```python
from diffusers import LDMSuperResolutionPipeline
from diffusers.utils import load_image

pipeline = LDMSuperResolutionPipeline.from_pretrained("path/to/this/folder")
image = load_image("image.png")  # the image to enlarge; its sides are rounded down to multiples of 32 pixels
images = pipeline(image, num_inference_steps=50).images
```
diffusers offers this pipeline only where transformers is installed. To sample in fewer steps, choose a number of steps
that divides {steps}. `DPMSolverMultistepScheduler` works, too. Euler schedulers do not, because the pipeline would
scale the small image for them, too.
"""
TEXT_USAGE = """```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
images = pipeline("a caption", num_inference_steps=50, guidance_scale={guidance}).images
```
{about_guidance} A caption has at most {max_length} tokens. Any scheduler with the same noise schedule works, such as
`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.
"""
INPAINTING_USAGE = """```python
from diffusers import StableDiffusionInpaintPipeline
from diffusers.utils import load_image

pipeline = StableDiffusionInpaintPipeline.from_pretrained("path/to/this/folder")
image, mask = load_image("image.png"), load_image("mask.png")  # white is painted, black stays
images = pipeline("a caption", image, mask, num_inference_steps=50, guidance_scale={guidance}).images
```
{about_guidance} A caption has at most {max_length} tokens. Any scheduler with the same noise schedule works, such as
`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.
"""
PAIRED_USAGE = """```python
from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers.utils import load_image

pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained("path/to/this/folder")
image = load_image("image.png").resize(({width}, {height}))
scales = {{"guidance_scale": {guidance}, "image_guidance_scale": {image_guidance}}}
images = pipeline("a caption", image, num_inference_steps=50, **scales).images
```
{about_guidance} A caption has at most {max_length} tokens. Any scheduler with the same noise schedule works, such as
`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.
"""
UPSCALING_USAGE = """```python
from diffusers import StableDiffusionUpscalePipeline
from diffusers.utils import load_image

pipeline = StableDiffusionUpscalePipeline.from_pretrained("path/to/this/folder")
image = load_image("image.png")  # the image to enlarge
images = pipeline("a caption", image, num_inference_steps=50, guidance_scale={guidance}).images
```
{about_guidance} A caption has at most {max_length} tokens. Any scheduler with the same noise schedule works, such as
`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.
"""
AUTOENCODER_CARD = """---
library_name: diffusers
tags: [autoencoder, {kind}, unet-diffusion]
---
# An autoencoder, {kind}

The first stage of latent diffusion: it encodes images of {channels} x {height} x {width} (channels, height, width) as
latents of {latent_channels} x {latent_height} x {latent_width}, and decodes them. The network is an `{network}` with
{parameters:,} parameters. It also takes images of other sizes, if height and width are multiples of {factor}.

## Use
```python
import torch
from diffusers import {network}

autoencoder = {network}.from_pretrained("path/to/this/folder")
images = torch.rand(1, {channels}, {height}, {width}) * 2 - 1  # replace by your images; -1 is black, 1 is white
scale = autoencoder.config.scaling_factor
with torch.no_grad():
    latents = autoencoder.encode(images).{latents} * scale
    reconstructions = autoencoder.decode(latents / scale).sample
```
{about_scale}

## Training
Settings:
```yaml
{settings}```

## Licence
Not stated. If you publish this folder, choose a licence that fits the training images.
"""


def model_card(parts: DenoiserParts, pipeline: DiffusionPipeline) -> str:
    """The text of README.md for a denoiser and its exported pipeline; the licence is left to the user."""
    channels, height, width = parts.sample_shape
    return MODEL_CARD.format(
        kind=_kind(parts),
        samples="images" if parts.codec.space is None else "latents, which an autoencoder decodes into images,",
        channels=channels,
        height=height,
        width=width,
        network=type(pipeline.unet).__name__,
        parameters=sum(parameter.numel() for parameter in parts.unet.parameters()),
        usage=_usage(parts, pipeline),
        schedule=_yaml(parts.schedule.config),
        settings=_yaml(parts.settings) if parts.settings else "# not known\n",
    )


def autoencoder_card(
    autoencoder: AutoencoderNetwork,
    image_shape: tuple[int, int, int],
    latent_std: float | None,
    settings: Mapping[str, Any],
) -> str:
    """The text of README.md for an autoencoder; the licence is left to the user.

    Args:
        autoencoder: The autoencoder.
        image_shape: (C, H, W) of the images that it was trained on.
        latent_std: Standard deviation of its latents; None: it is not known.
        settings: The settings of the training as plain values; empty: they are not known.
    """
    channels, height, width = image_shape
    codes, factor = num_codes(autoencoder), downsampling(autoencoder)
    return AUTOENCODER_CARD.format(
        kind=f"{codes} codes" if codes else "KL",
        network=type(autoencoder).__name__,
        parameters=sum(parameter.numel() for parameter in autoencoder.parameters()),
        channels=channels,
        height=height,
        width=width,
        factor=factor,
        latent_channels=num_latent_channels(autoencoder),
        latent_height=height // factor,
        latent_width=width // factor,
        latents="latents" if codes else "latent_dist.mean",
        about_scale=_about_scale(latent_std, autoencoder.config["scaling_factor"]),
        settings=_yaml(settings) if settings else "# not known\n",
    )


def _about_scale(latent_std: float | None, scaling_factor: float | None) -> str:
    if latent_std is None:
        return f"The standard deviation of the latents was not measured; `scaling_factor` stays {scaling_factor}."
    return f"`scaling_factor` brings latents of validation images from a standard deviation of {latent_std:.3g} to 1."


def _kind(parts: DenoiserParts) -> str:
    """The task of the denoiser, in the words of the Hub's tags."""
    kinds = {
        "mask": "inpainting",
        "low_res": "upscaling",
        "concat": "image-conditional",
        "prompt": "text-to-image",
        "xl_prompt": "text-to-image",
        "class_labels": "class-conditional",
        "class_tokens": "class-conditional",
    }
    roles = [condition.pipeline_role for condition in parts.all_conditions]
    others = [f"{role.replace('_', '-')}-to-image" for role in roles if role is not None and role not in kinds]
    return [*others, *(name for role, name in kinds.items() if role in roles), "unconditional"][0]


def _usage(parts: DenoiserParts, pipeline: DiffusionPipeline) -> str:
    if isinstance(pipeline, ConditionalPipeline):
        return _own_usage(parts, pipeline)
    if text := next((condition for condition in parts.all_conditions if condition.batch_key == "captions"), None):
        stock = {
            "StableDiffusionInpaintPipeline": INPAINTING_USAGE,
            "StableDiffusionInstructPix2PixPipeline": PAIRED_USAGE,
            "StableDiffusionUpscalePipeline": UPSCALING_USAGE,
            "StableDiffusionXLPipeline": TEXT_USAGE.replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        }
        return _text_usage(text, stock.get(type(pipeline).__name__, TEXT_USAGE), parts)
    steps = parts.schedule.num_train_timesteps
    if parts.codec.space is not None:
        return LATENT_USAGE if not parts.all_conditions else ENLARGING_USAGE.format(steps=steps)
    return UNCONDITIONAL_USAGE.format(steps=steps)


def _yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(shareable(settings), sort_keys=False, allow_unicode=True)


def _own_usage(parts: DenoiserParts, pipeline: ConditionalPipeline) -> str:
    names, last = parts.class_names, parts.num_classes - 1
    values = {"class_labels": names[:2] if names else [0, last], "prompt": '"a caption"'}
    guidance = 3.0 if "prompt" in pipeline.config.unconditional else 2.0
    arguments = [f"{name}={values.get(name, name)}" for name in pipeline.arguments] or ["batch_size=4"]
    about = (
        f"Classes: {', '.join(names) if names else f'0 to {last}'}.\n\n" if "class_labels" in pipeline.arguments else ""
    )
    if pipeline.config["values"] is not None:
        arguments.append('output_type="numbers"')
        about += NUMBERS.format(**pipeline.config["values"])
    if {condition.pipeline_role for condition in parts.all_conditions} in ({"low_res"}, {"low_res", "class_labels"}):
        about += f"`LDMSuperResolutionPipeline` would not draw the same: {why_no_super_resolution(parts)}.\n\n"
    return OWN_USAGE.format(
        preparation=_preparation(parts, pipeline),
        arguments=", ".join(arguments),
        steps=parts.schedule.num_train_timesteps if parts.codec.space is None else 50,
        guidance=f", guidance_scale={guidance}" if pipeline.config.unconditional else "",
        about=about,
    )


def _preparation(parts: DenoiserParts, pipeline: ConditionalPipeline) -> str:
    """The Python that makes what a pipeline is called with: imports, then a line for each."""
    taken = [name for name in pipeline.arguments if not (name == "image" and pipeline.paints)]
    _, height, width = parts.sample_shape
    maps = pipeline.channels_beside.get("concat")
    usages = []
    for name, text in PREPARATIONS.items():
        factor = pipeline.config["scale_factor"] if name == "small_image" else 1
        if name in taken:
            usages.append(text.format(num_maps=maps, height=height // factor, width=width // factor))
    usages += [one.usage for one in (pipeline.tokens, pipeline.maps, pipeline.maps_2) if one is not None]
    imports, _, statements = zip(*(usage.rpartition("\n\n") for usage in usages), strict=True) if usages else ((),) * 3
    lines = [line for line in dict.fromkeys(imports) if line]
    return "".join(f"{line}\n" for line in [*lines, *[""] * bool(lines), *statements])


def _text_usage(text: Condition, usage: str, parts: DenoiserParts) -> str:
    are_dropped = all(condition.has_null for condition in parts.all_conditions)
    _, height, width = parts.image_shape
    return usage.format(
        height=height,
        width=width,
        image_guidance=3.0 if are_dropped else 1.0,  # as our guidance, which drops all conditions with a null
        guidance=3.0 if text.has_null else 1.0,
        about_guidance="A larger guidance_scale follows the caption more closely."
        if text.has_null
        else "The network was not trained without captions, so guidance_scale must be 1.",
        max_length=getattr(text, "max_length", None) or text.config["max_length"],
    )
