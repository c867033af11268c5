"""When diffusers' LDMSuperResolutionPipeline enlarges as a denoiser does (Rombach et al. 2022, section 4.5)."""

from unet_diffusion.diffusers_io.normalising import takes_scale
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.latents.codec import LatentCodec

ENLARGED_SCALE = 1.0  # LDMSuperResolutionPipeline decodes latents as they are drawn
PICTURE_MULTIPLE = 32  # it scales pictures to sides of multiples of 32 pixels


def why_no_super_resolution(parts: DenoiserParts) -> str | None:
    """The reason why LDMSuperResolutionPipeline does not draw a denoiser's images; None if it does.

    Args:
        parts: The denoiser.
    """
    small, codec = parts.condition(LowResolution), parts.codec
    if small is not None and small.config["noise"]:
        return "it adds no noise to the small image"
    if small is None or len(parts.all_conditions) > 1:
        return "it takes a small image alone"
    if small.scale_factor > 1:
        return "it does not enlarge the small image for the network"
    if not isinstance(codec, LatentCodec) or codec.space is None:
        return "it draws latents"
    (channels, height, width), image_channels = parts.sample_shape, parts.image_shape[0]
    if channels != image_channels:
        return f"it draws latents of as many channels as images have, {image_channels}, and these have {channels}"
    if not parts.are_pictures or channels == 1:
        return "it reads pictures in colours"
    if height % PICTURE_MULTIPLE or width % PICTURE_MULTIPLE:
        return f"it scales small images to multiples of {PICTURE_MULTIPLE} pixels, and these are {height} x {width}"
    if not takes_scale(codec.autoencoder, codec.space, ENLARGED_SCALE):
        return "it does not scale latents, and this autoencoder cannot absorb their scale"
    return None
