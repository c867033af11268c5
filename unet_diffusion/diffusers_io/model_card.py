"""The README.md of an exported folder: what it is, how to load it, how it was parts."""

from collections.abc import Mapping
from typing import Any

import yaml
from diffusers import DiffusionPipeline

from unet_diffusion.diffusers_io.pipelines.conditional import ConditionalPipeline
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.models.autoencoders import AutoencoderNetwork, downsampling, num_codes, num_latent_channels

MODEL_CARD = """---
library_name: diffusers
tags: [image-generation, {kind}, unet-diffusion]
---
# A denoising U-Net, {kind}

Makes {what} of {channels} x {height} x {width} (channels, height, width) by diffusion. The network is a `{network}`
of {parameters:,} parameters.

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
Not stated: whoever publishes this folder chooses one that fits the images that the network was trained on.
"""
UNCONDITIONAL_USAGE = """```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("path/to/this/folder")
images = pipeline(batch_size=4, num_inference_steps={steps}).images
```
In fewer steps with `pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)`; their number must
divide {steps}. `DPMSolverMultistepScheduler` fits too; Euler and its like do not, as `DDPMPipeline` does not scale its
input for them.
"""
LATENT_USAGE = """```python
from diffusers import LDMPipeline

pipeline = LDMPipeline.from_pretrained("path/to/this/folder")
images = pipeline(batch_size=4, num_inference_steps=50).images
```
Any scheduler for the same noise schedule fits, such as
`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.
"""
OWN_USAGE = """```python
from diffusers import DiffusionPipeline
{preparation}
# trust_remote_code: runs pipeline.py of this folder, the sampling loop with classifier-free guidance
pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
images = pipeline({arguments}, num_inference_steps={steps}{guidance}).images
```
{about}In fewer steps with another scheduler for the same noise schedule, such as
`pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)`.
"""
LOAD_IMAGE = "from diffusers.utils import load_image\n\n"
PREPARATIONS = {  # of what an argument names, in a pipeline with code of its own
    "mask_image": f'{LOAD_IMAGE}image, mask_image = load_image("image.png"), load_image("mask.png")  '
    "# white is painted anew, black stays\n",
    "image": f'{LOAD_IMAGE}image = load_image("image.png")  # to be enlarged\n',
    "concat": "import torch\n\nconcat = torch.zeros(1, {num_maps}, {height}, {width})  # yours here\n",
}
TEXT_USAGE = """```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("path/to/this/folder")
images = pipeline("what is to be seen", num_inference_steps=50, guidance_scale={guidance}).images
```
{about_guidance} A caption has {max_length} tokens at most. Any scheduler for the same noise schedule fits, such as
`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.
"""
INPAINTING_USAGE = """```python
from diffusers import StableDiffusionInpaintPipeline
from diffusers.utils import load_image

pipeline = StableDiffusionInpaintPipeline.from_pretrained("path/to/this/folder")
image, mask = load_image("image.png"), load_image("mask.png")  # white is painted anew, black stays
images = pipeline("what is to be seen", image, mask, num_inference_steps=50, guidance_scale={guidance}).images
```
{about_guidance} A caption has {max_length} tokens at most. Any scheduler for the same noise schedule fits, such as
`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.
"""
UPSCALING_USAGE = """```python
from diffusers import StableDiffusionUpscalePipeline
from diffusers.utils import load_image

pipeline = StableDiffusionUpscalePipeline.from_pretrained("path/to/this/folder")
image = load_image("image.png")  # to be enlarged
images = pipeline("what is to be seen", image, num_inference_steps=50, guidance_scale={guidance}).images
```
{about_guidance} A caption has {max_length} tokens at most. Any scheduler for the same noise schedule fits, such as
`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.
"""
AUTOENCODER_CARD = """---
library_name: diffusers
tags: [autoencoder, {kind}, unet-diffusion]
---
# An autoencoder, {kind}

Makes latents of {latent_channels} x {latent_height} x {latent_width} (channels, height, width) of images of
{channels} x {height} x {width}, and images of them: the first stage of latent diffusion. The network is an `{network}`
of {parameters:,} parameters. It takes images of other sizes too, if height and width are multiples of {factor}.

## Use
```python
import torch
from diffusers import {network}

autoencoder = {network}.from_pretrained("path/to/this/folder")
images = torch.rand(1, {channels}, {height}, {width}) * 2 - 1  # yours here; -1 is black, 1 white
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
Not stated: whoever publishes this folder chooses one that fits the images that the network was trained on.
"""


def model_card(parts: DenoiserParts, pipeline: DiffusionPipeline) -> str:
    """The text of README.md for a denoiser that is exported as that pipeline; its licence is left to the user."""
    channels, height, width = parts.sample_shape
    return MODEL_CARD.format(
        kind=_kind(parts),
        what="images" if parts.codec.space is None else "latents, from which an autoencoder makes images,",
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
    """The text of README.md for an autoencoder; its licence is left to the user.

    Args:
        autoencoder: The autoencoder.
        image_shape: (C, H, W) of the images that it was trained on.
        latent_std: Standard deviation of its latents; None: not known.
        settings: How it was trained, as plain values; empty: not known.
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
        about_scale=_about_scale(latent_std),
        settings=_yaml(settings) if settings else "# not known\n",
    )


def _about_scale(latent_std: float | None) -> str:
    if latent_std is None:
        return "How far the latents spread was not measured: `scaling_factor` is 1."
    return f"Latents have a standard deviation of {latent_std:.3g} on images kept apart, and 1 times `scaling_factor`."


def _kind(parts: DenoiserParts) -> str:
    """What a folder is for, in the words of its tags."""
    kinds = {
        "mask": "inpainting",
        "low_res": "upscaling",
        "concat": "image-conditional",
        "prompt": "text-to-image",
        "class_labels": "class-conditional",
        "class_tokens": "class-conditional",
    }
    roles = [one.pipeline_role for one in parts.all_conditions]
    return next((name for role, name in kinds.items() if role in roles), "unconditional")


def _usage(parts: DenoiserParts, pipeline: DiffusionPipeline) -> str:
    if isinstance(pipeline, ConditionalPipeline):
        return _own_usage(parts, pipeline)
    if text := next((one for one in parts.all_conditions if one.pipeline_role == "prompt"), None):
        stock = {"StableDiffusionInpaintPipeline": INPAINTING_USAGE, "StableDiffusionUpscalePipeline": UPSCALING_USAGE}
        return _text_usage(text, stock.get(type(pipeline).__name__, TEXT_USAGE))
    if parts.codec.space is not None:
        return LATENT_USAGE
    return UNCONDITIONAL_USAGE.format(steps=parts.schedule.num_train_timesteps)


def _yaml(settings: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def _own_usage(parts: DenoiserParts, pipeline: ConditionalPipeline) -> str:
    names, last = parts.class_names, parts.num_classes - 1
    values = {"class_labels": names[:2] if names else [0, last], "prompt": '"what is to be seen"'}
    taken = pipeline.arguments
    preparation = next((text for name, text in PREPARATIONS.items() if name in taken), "")
    _, height, width = parts.sample_shape
    num_maps = pipeline.unet.config.in_channels - pipeline.unet.config.out_channels
    guidance = 3.0 if "prompt" in pipeline.config.unconditional else 2.0
    return OWN_USAGE.format(
        preparation=preparation.format(num_maps=num_maps, height=height, width=width),
        arguments=", ".join(f"{name}={values.get(name, name)}" for name in taken) or "batch_size=4",
        steps=parts.schedule.num_train_timesteps if parts.codec.space is None else 50,
        guidance=f", guidance_scale={guidance}" if pipeline.config.unconditional else "",
        about=f"Classes: {', '.join(names) if names else f'0 to {last}'}.\n\n" if "class_labels" in taken else "",
    )


def _text_usage(text: Condition, usage: str) -> str:
    return usage.format(
        guidance=3.0 if text.has_null else 1.0,
        about_guidance="More guidance keeps closer to the caption."
        if text.has_null
        else "It was not trained without captions, so guidance_scale must be 1.",
        max_length=text.config["max_length"],
    )
