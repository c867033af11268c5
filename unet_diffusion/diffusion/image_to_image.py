"""Where sampling starts from, if not from the noise of one seed: noise between two seeds, or a given image.

From an image: it is noised as far as it may change, and denoised from there (Meng et al. 2022, SDEdit,
https://arxiv.org/abs/2108.01073). An image of which a part is to be painted: after each step the rest is
put back, noised to where the step led (Lugmayr et al. 2022, RePaint, https://arxiv.org/abs/2201.09865, eq. 8). Unlike
there its noise is the initial one at every step, as in diffusers, so that solvers that look back see one trajectory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.runtime.randomness import keyed_generator

NO_START_MIDWAY = (  # PNDM's first steps differ from the rest; LMS weights steps that were not taken
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)


@dataclass(frozen=True)
class InitImage:
    """A given image for each image to draw.

    Args:
        image: (N, C, H, W) float32, scaled as the denoiser's; (1, C, H, W) for all.
        strength: share in (0, 1] of the steps that are taken; the less, the more of the image is left. With 1 it is
            noised to the level that sampling starts at.
        keep_mask: True where a pixel is to stay as it is, (N, 1, H, W) or (1, 1, H, W) bool; None: nowhere.

    Raises:
        ValueError: if an argument is out of range or does not fit.
    """

    image: Tensor
    strength: float = 1.0
    keep_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {self.strength}; 0.8 is usual")
        if self.keep_mask is None:
            return
        shape = (1, *self.image.shape[2:])
        if self.keep_mask.dtype != torch.bool or self.keep_mask.shape[1:] != shape:
            raise ValueError(
                f"keep_mask must be bool, (N, {', '.join(map(str, shape))}), got {self.keep_mask.dtype} "
                f"{tuple(self.keep_mask.shape)}"
            )

    def part(self, images: slice, device: torch.device | str) -> "InitImage":
        """The same for some of the images, on a device."""
        image, keep_mask = (
            one if one is None or len(one) == 1 else one[images] for one in (self.image, self.keep_mask)
        )
        assert image is not None
        return InitImage(image.to(device), self.strength, None if keep_mask is None else keep_mask.to(device))


def interpolated_noise(seeds: tuple[int, int], fractions: Sequence[float], shape: Sequence[int]) -> Tensor:
    """Noise on the great circle from image 0 of one seed to image 0 of the other, (N, C, H, W) float32 on the CPU.

    With a scheduler that adds no noise, images change smoothly along it (Song et al. 2021, DDIM,
    https://arxiv.org/abs/2010.02502, eq. 67). A straight line would lead through noise that is too weak.

    Args:
        seeds: of the noise at 0 and at 1.
        fractions: N numbers in [0, 1], how far along.
        shape: (C, H, W).

    Raises:
        ValueError: if the seeds are the same.
    """
    if seeds[0] == seeds[1]:
        raise ValueError(f"the seeds to interpolate between must differ, got {seeds[0]} twice")
    first, last = (torch.randn(*shape, generator=keyed_generator(seed, 0)).double() for seed in seeds)
    angle = torch.acos((first * last).sum() / (first.norm() * last.norm()))
    f = torch.tensor(fractions, dtype=torch.float64).view(-1, 1, 1, 1)
    return ((torch.sin((1 - f) * angle) * first + torch.sin(f * angle) * last) / torch.sin(angle)).float()


def check_init_image(init_image: InitImage, shape: Sequence[int], scheduler: str, num_inference_steps: int) -> None:
    """Refuses an image that does not fit what is drawn, or a scheduler that cannot start from it.

    Raises:
        ValueError: if so.
    """
    for name, one in (("image", init_image.image), ("keep_mask", init_image.keep_mask)):
        if one is not None and (len(one) not in (1, shape[0]) or one.shape[2:] != tuple(shape[2:])):
            raise ValueError(
                f"the {name} to start from must be for 1 or {shape[0]} images of {shape[2]} x {shape[3]}, "
                f"got shape {tuple(one.shape)}"
            )
    if init_image.image.shape[1] != shape[1]:
        raise ValueError(f"the image to start from must have {shape[1]} channels, got {init_image.image.shape[1]}")
    if scheduler in NO_START_MIDWAY:
        raise ValueError(f"{scheduler} cannot start from an image, as its steps build on the first ones; use another")
    if not num_steps_from(init_image, num_inference_steps):
        raise ValueError(
            f"strength must leave a step, and {init_image.strength} of {num_inference_steps} steps is none; "
            "raise strength or num_inference_steps"
        )


def num_steps_from(init_image: InitImage | None, num_inference_steps: int) -> int:
    """How many of the steps are taken, rounded down as in diffusers' image-to-image pipelines."""
    return num_inference_steps if init_image is None else int(num_inference_steps * init_image.strength)


def begin(scheduler: Any, noise: Tensor, init_image: InitImage | None, num_inference_steps: int) -> tuple[int, Tensor]:
    """Which of the scheduler's timesteps comes first, and the state there, (B, C, H, W).

    Args:
        scheduler: of diffusers, its timesteps set; it is told where to begin.
        noise: standard normal, (B, C, H, W).
        init_image: image on the device of the noise; None: begin with noise alone.
        num_inference_steps: that the timesteps were set for.
    """
    if init_image is None:
        return 0, noise * scheduler.init_noise_sigma
    first = (num_inference_steps - num_steps_from(init_image, num_inference_steps)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # the others find their place by the timestep
        scheduler.set_begin_index(first)
    return first, _noised(init_image.image, noise, scheduler, first)


def apply_keep_mask(x: Tensor, init_image: InitImage, noise: Tensor, scheduler: Any, num_calls: int) -> Tensor:
    """The state with what the mask keeps noised to the level of the state; after the last step, as it is.

    Args:
        x: state, (B, C, H, W), that the scheduler's last step led to.
        init_image: image, and which of it is kept; on the device of x.
        noise: that sampling began with.
        scheduler: as the loop has it.
        num_calls: which of the scheduler's timesteps comes next.
    """
    is_last = num_calls == len(scheduler.timesteps)
    # Halfway through a step of second order, some states are at a level between those of the schedule.
    if init_image.keep_mask is None or (num_calls % scheduler.order and not is_last):
        return x
    image = init_image.image if is_last else _noised(init_image.image, noise, scheduler, num_calls)
    return torch.where(init_image.keep_mask, image, x)


def _noised(image: Tensor, noise: Tensor, scheduler: Any, number: int) -> Tensor:
    """The image at the level of the scheduler's timestep of that number, (B, C, H, W).

    The scheduler is asked for the two factors, not for the sum: so its table stays on the CPU.
    """
    one, zero, t = torch.ones(1), torch.zeros(1), scheduler.timesteps[number : number + 1]
    signal, sigma = scheduler.add_noise(one, zero, t), scheduler.add_noise(zero, one, t)
    return signal[0] * image + sigma[0] * noise
