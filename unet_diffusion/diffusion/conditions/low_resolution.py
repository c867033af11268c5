"""A small image, to be enlarged.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, section 4.5), laid out as in Stable Diffusion's network for
upscaling. The small image is noised, and the network told how much (Ho et al. 2021, https://arxiv.org/abs/2106.15282,
section 4.2), so that its errors are not taken for detail.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import CONDITION_KEY, Encode, Request
from unet_diffusion.diffusion.schedule import NoiseSchedule, scheduler_config
from unet_diffusion.runtime.randomness import keyed_generator

# Of a small image, as in Stable Diffusion's upscaler; and the highest timestep of it that is used.
LOW_RES_SCHEDULE = NoiseSchedule(1000, "scaled_linear", beta_start=1.0e-4, beta_end=0.02)
MAX_NOISE_LEVEL = 350
NOISE_LEVEL = 20  # unless a user gives another, as in diffusers' pipeline


class LowResolution(Concat):
    """A small image of the size of x0, noised to the level that is the network's class: (B, C, h, w).

    The network has a class for each level, `LOW_RES_SCHEDULE.num_train_timesteps`. How far it enlarges is what the
    autoencoder divides by, 4 in Stable Diffusion. Levels of noise to train on are drawn from 0 to 350. To draw, a user
    gives an image, and a level if 20 does not suit.

    Args:
        channels: Channels of the small image.
    """

    provides = ("labels", "concat")
    options = ("noise_level",)
    needs = ("image",)
    refuses = ("mask", "strength", "labels")
    pipeline_role = "low_res"

    def __init__(self, channels: int):
        super().__init__(channels)
        self.config = {"channels": channels}
        self._sample_size = (0, 0)

    @property
    def num_classes(self) -> int:
        """Levels of noise that the network's class embedding has, whether they are used or not."""
        return LOW_RES_SCHEDULE.num_train_timesteps

    def bind_sample_shape(self, sample_shape: tuple[int, int, int]) -> None:
        self._sample_size = sample_shape[1:]

    def draw(self, shape: torch.Size, generator: torch.Generator) -> dict[str, Tensor]:
        device, size = generator.device, (*shape[:2], *self._sample_size)
        return {
            "level": torch.randint(MAX_NOISE_LEVEL + 1, shape[:1], generator=generator, device=device),
            "noise": torch.randn(size, generator=generator, device=device),
        }

    def entries(self, images: Tensor, drawn: Mapping[str, Tensor], encode: Encode) -> dict[str, Tensor]:
        small = shrink(images, self._sample_size)
        noised = LOW_RES_SCHEDULE.add_noise(small, drawn["noise"], drawn["level"])
        return {"labels": drawn["level"], "concat": noised}

    def seen(self, images: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
        return interpolate(entries["concat"], images.shape[2:])

    def from_user(self, request: Request) -> dict[str, Tensor]:
        assert request.image is not None
        level = request.values.get("noise_level", NOISE_LEVEL)
        if not 0 <= level <= MAX_NOISE_LEVEL:
            raise ValueError(f"noise_level must be in [0, {MAX_NOISE_LEVEL}], got {level}; {NOISE_LEVEL} is usual")
        levels = torch.full((request.num_images,), level)
        generators = [keyed_generator(request.seed, CONDITION_KEY, index) for index in range(request.num_images)]
        noise = torch.stack([torch.randn(request.image.shape[1:], generator=one) for one in generators])
        return {"labels": levels, "concat": LOW_RES_SCHEDULE.add_noise(request.image.expand_as(noise), noise, levels)}

    def pipeline_parts(self) -> dict[str, Any]:
        from diffusers import DDPMScheduler

        return {"low_res_scheduler": DDPMScheduler(**scheduler_config(LOW_RES_SCHEDULE, clip_sample=False))}


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images at a smaller size, (B, C, *size) in [-1, 1], bicubic and antialiased."""
    return interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
