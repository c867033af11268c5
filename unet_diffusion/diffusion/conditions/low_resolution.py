"""A small image, to be enlarged.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, section 4.5), laid out as in Stable Diffusion's network for
upscaling. The small image is noised, and the network told how much (Ho et al. 2021, https://arxiv.org/abs/2106.15282,
section 4.2), so that its errors are not taken for detail.
"""

from torch import Tensor
from torch.nn.functional import interpolate

from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.schedule import NoiseSchedule

# Of a small image, as in Stable Diffusion's upscaler; and the highest timestep of it that is used.
LOW_RES_SCHEDULE = NoiseSchedule(1000, "scaled_linear", beta_start=1.0e-4, beta_end=0.02)
MAX_NOISE_LEVEL = 350


class LowResolution(Concat):
    """A small image of the latents' size, noised to the level that is the network's class: (B, C, h, w).

    The network has a class for each level, `LOW_RES_SCHEDULE.num_train_timesteps`.

    Args:
        channels: of the image.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.config = {"channels": channels}


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images at a smaller size, (B, C, *size) in [-1, 1], bicubic and antialiased."""
    return interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
