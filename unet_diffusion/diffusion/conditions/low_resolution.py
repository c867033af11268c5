"""A small image to enlarge, as a condition.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, section 4.5) give the network the small image itself. Stable
Diffusion's upscaler noises it, and the network learns its noise level (Ho et al. 2021,
https://arxiv.org/abs/2106.15282, section 4.2), so that the network does not take errors of the small image for detail.
Where x0 is larger than the small image, this is enlarged first (Saharia et al. 2021, https://arxiv.org/abs/2104.07636).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unet_diffusion.diffusion.conditions.class_labels import NOISE_LEVEL_ENTRY
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import CONDITION_KEY, Encode, Request, by_turns
from unet_diffusion.diffusion.schedule import NoiseSchedule, scheduler_config
from unet_diffusion.runtime.randomness import keyed_generator

# The noise schedule of the small image and its highest timestep in use, as in Stable Diffusion's upscaler.
LOW_RES_SCHEDULE = NoiseSchedule(1000, "scaled_linear", beta_start=1.0e-4, beta_end=0.02)
MAX_NOISE_LEVEL = 350
NOISE_LEVEL = 20  # default of diffusers' pipeline


class LowResolution(Concat):
    """A small image at the size of x0, (B, C, h, w), noised to a level that is the network's class label.

    The network has one class for each of the `LOW_RES_SCHEDULE.num_train_timesteps` levels. It enlarges by the
    autoencoder's downsampling, 4 in Stable Diffusion, times scale_factor. Training draws levels from 0 to 350. To
    sample, a user gives an image and, if 20 does not suit, a noise_level. Beside a `MaskedImage`, which takes the
    user's image itself, set option to small_image.

    Args:
        channels: Number of channels of the small image.
        option: Name by which a user gives the small image: image, whose size decides that of what is drawn, or
            small_image, which is scaled to fit.
        noise: Whether the small image is noised. Without noise there are no levels, and the network needs no class for
            them.
        scale_factor: Height of x0 divided by that of the small image, which bicubic interpolation then brings to the
            size of x0. It must be above 1 where images are denoised themselves.

    Raises:
        ValueError: If scale_factor is below 1.
    """

    batch_key = "low_res"
    purpose = "enlarges an image"
    pipeline_role = "low_res"

    def __init__(
        self,
        channels: int,
        *,
        option: Literal["image", "small_image"] = "image",
        noise: bool = True,
        scale_factor: int = 1,
    ):
        super().__init__(channels)
        if scale_factor < 1:
            raise ValueError(f"scale_factor must be at least 1, got {scale_factor}")
        self.scale_factor = scale_factor
        self.config = {"channels": channels, "option": option, "noise": noise, "scale_factor": scale_factor}
        self.needs = (option,)
        self.provides = (NOISE_LEVEL_ENTRY, self.batch_key) if noise else (self.batch_key,)
        self.options = ("noise_level",) if noise else ()
        if option == "image":
            self.refuses = ("mask", "strength")
        else:
            self.options, self.files = (*self.options, option), (option,)
        self._small_size = (0, 0)

    @property
    def num_classes(self) -> int:
        """The number of noise levels in the network's class embedding, used or not."""
        return LOW_RES_SCHEDULE.num_train_timesteps

    def bind_sample_shape(self, sample_shape: tuple[int, int, int]) -> None:
        self._small_size = self._small_size_of(sample_shape[1:])

    def draw(self, shape: torch.Size, generator: torch.Generator) -> dict[str, Tensor]:
        if not self.config["noise"]:
            return {}
        device, size = generator.device, (*shape[:2], *self._small_size)
        return {
            "level": torch.randint(MAX_NOISE_LEVEL + 1, shape[:1], generator=generator, device=device),
            "noise": torch.randn(size, generator=generator, device=device),
        }

    def entries(self, images: Tensor, drawn: Mapping[str, Tensor], encode: Encode) -> dict[str, Tensor]:
        small = shrink(images, self._small_size)
        if not self.config["noise"]:
            return {self.batch_key: self._enlarged(small)}
        noised = LOW_RES_SCHEDULE.add_noise(small, drawn["noise"], drawn["level"])
        return {NOISE_LEVEL_ENTRY: drawn["level"], self.batch_key: self._enlarged(noised)}

    def seen(self, batch: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> Tensor:
        return interpolate(entries[self.batch_key], batch["images"].shape[2:])

    def from_user(self, request: Request) -> dict[str, Tensor]:
        small = self._small_image(request)
        if not self.config["noise"]:
            return {self.batch_key: by_turns(self._enlarged(small), request.num_images)}
        level = request.values.get("noise_level", NOISE_LEVEL)
        if not 0 <= level <= MAX_NOISE_LEVEL:
            raise ValueError(f"noise_level must be in [0, {MAX_NOISE_LEVEL}], got {level}; {NOISE_LEVEL} is usual")
        levels = torch.full((request.num_images,), level)
        generators = [keyed_generator(request.seed, CONDITION_KEY, index) for index in range(request.num_images)]
        noise = torch.stack([torch.randn(small.shape[1:], generator=generator) for generator in generators])
        noised = LOW_RES_SCHEDULE.add_noise(by_turns(small, request.num_images), noise, levels)
        return {NOISE_LEVEL_ENTRY: levels, self.batch_key: self._enlarged(noised)}

    def _small_image(self, request: Request) -> Tensor:
        """The user's small images, (n, C, h, w) in [-1, 1]."""
        if self.config["option"] == "image":
            assert request.image is not None
            return request.image
        assert request.read_pictures is not None
        shape = (self.config["channels"], *self._small_size_of(request.sample_size))
        return request.read_pictures("small_image", request.values["small_image"], shape)

    def _small_size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the small image for x0 of a size."""
        height, width = size
        if height % self.scale_factor or width % self.scale_factor:
            raise ValueError(f"height and width of what is denoised must be multiples of the scale_factor "
                             f"{self.scale_factor} of LowResolution, got {height} x {width}")  # fmt: skip
        return height // self.scale_factor, width // self.scale_factor

    def _enlarged(self, small: Tensor) -> Tensor:
        """Small images at the size of x0."""
        if self.scale_factor == 1:
            return small
        return interpolate(small, scale_factor=float(self.scale_factor), mode="bicubic")

    def pipeline_parts(self) -> dict[str, Any]:
        if not self.config["noise"]:
            return {}
        from diffusers import DDPMScheduler

        return {"low_res_scheduler": DDPMScheduler(**scheduler_config(LOW_RES_SCHEDULE, clip_sample=False))}


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images at a smaller size (h, w), (B, C, h, w) in [-1, 1], by antialiased bicubic interpolation."""
    return interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
