"""Other starts of sampling than the noise of one seed: noise between two seeds, or an image.

Image to image noises an image as far as it may change, and denoises it from there (Meng et al. 2022, SDEdit,
https://arxiv.org/abs/2108.01073). Painting under a mask puts the rest of the image back after each step, noised to the
level of that step (Lugmayr et al. 2022, RePaint, https://arxiv.org/abs/2201.09865, eq. 8). RePaint draws new noise at
every step; as in diffusers, the initial noise is used here, so multistep solvers see one trajectory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.runtime.randomness import keyed_generator

NO_START_MIDWAY = (  # PNDM's first steps differ from the rest; LMS looks back at steps that were skipped
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)


@dataclass(frozen=True)
class InitImage:
    """The x0 of images to start from, and the parts of them that stay.

    Args:
        image: The x0 to start from, (N, C, H, W) float32, or (1, C, H, W) for all N images.
        strength: Share in (0, 1] of the steps that are taken; a smaller share keeps more of the image. With 1 the image
            is noised to the level at which sampling starts.
        keep_mask: True where the image stays as it is, (N, 1, H, W) or (1, 1, H, W) bool; None: nowhere.

    Raises:
        ValueError: If strength is out of range, or keep_mask does not fit the image.
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
                f"keep_mask must be bool of shape (N, {', '.join(map(str, shape))}), got {self.keep_mask.dtype} "
                f"of shape {tuple(self.keep_mask.shape)}"
            )

    def part(self, images: slice, device: torch.device | str) -> "InitImage":
        """The start of a slice of the images, on a device."""
        image, keep_mask = (
            tensor if tensor is None or len(tensor) == 1 else tensor[images] for tensor in (self.image, self.keep_mask)
        )
        assert image is not None
        return InitImage(image.to(device), self.strength, None if keep_mask is None else keep_mask.to(device))


def interpolated_noise(seeds: tuple[int, int], fractions: Sequence[float], shape: Sequence[int]) -> Tensor:
    """Noise on the great circle between the first images of two seeds, (N, C, H, W) float32 on the CPU.

    It is (sin((1 - f) angle) first + sin(f angle) last) / sin(angle) for each fraction f (Song et al. 2021, DDIM,
    https://arxiv.org/abs/2010.02502, eq. 67). With a scheduler that adds no noise, the images change smoothly with f. A
    straight line would pass through noise that is too weak.

    Args:
        seeds: Seeds of the noise at fraction 0 and at fraction 1.
        fractions: N positions on the way, in [0, 1].
        shape: (C, H, W) of the noise.

    Raises:
        ValueError: If the seeds are equal.
    """
    if seeds[0] == seeds[1]:
        raise ValueError(f"the seeds to interpolate between must differ, got {seeds[0]} twice")
    first, last = (torch.randn(*shape, generator=keyed_generator(seed, 0)).double() for seed in seeds)
    angle = torch.acos((first * last).sum() / (first.norm() * last.norm()))
    f = torch.tensor(fractions, dtype=torch.float64).view(-1, 1, 1, 1)
    return ((torch.sin((1 - f) * angle) * first + torch.sin(f * angle) * last) / torch.sin(angle)).float()


def check_init_image(init_image: InitImage, shape: Sequence[int], scheduler: str, num_inference_steps: int) -> None:
    """Refuse an image that does not fit the images to draw, or a scheduler that cannot start from an image.

    Args:
        init_image: The image to start from.
        shape: (N, C, H, W) of the images to draw.
        scheduler: The class name of the scheduler.
        num_inference_steps: Denoising steps before strength shortens them.

    Raises:
        ValueError: If sampling cannot start from the image.
    """
    for name, tensor in (("image", init_image.image), ("keep_mask", init_image.keep_mask)):
        if tensor is not None and (len(tensor) not in (1, shape[0]) or tensor.shape[2:] != tuple(shape[2:])):
            raise ValueError(
                f"the {name} to start from must be for 1 or {shape[0]} images of {shape[2]} x {shape[3]}, "
                f"got shape {tuple(tensor.shape)}"
            )
    if init_image.image.shape[1] != shape[1]:
        raise ValueError(f"the image to start from must have {shape[1]} channels, got {init_image.image.shape[1]}")
    if scheduler in NO_START_MIDWAY:
        raise ValueError(
            f"{scheduler} cannot start from an image, because each of its steps needs all steps before it; "
            "use another scheduler"
        )
    if not num_steps_from(init_image, num_inference_steps):
        raise ValueError(
            f"strength must leave at least one step, and {init_image.strength} of {num_inference_steps} steps is none; "
            "raise strength or num_inference_steps"
        )


def num_steps_from(init_image: InitImage | None, num_inference_steps: int) -> int:
    """The number of steps that strength leaves, rounded down as in diffusers' image-to-image pipelines."""
    return num_inference_steps if init_image is None else int(num_inference_steps * init_image.strength)


def begin(scheduler: Any, noise: Tensor, init_image: InitImage | None, num_inference_steps: int) -> tuple[int, Tensor]:
    """The position of the first timestep in the scheduler's list, and the state there, (B, C, H, W).

    Args:
        scheduler: A diffusers scheduler with its timesteps set; its begin index is set here.
        noise: Standard normal noise, (B, C, H, W).
        init_image: The image to start from, on the device of the noise; None: start from noise alone.
        num_inference_steps: The number of steps that the timesteps were set for.
    """
    if init_image is None:
        return 0, noise * scheduler.init_noise_sigma
    first = (num_inference_steps - num_steps_from(init_image, num_inference_steps)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # the others look their position up by the timestep
        scheduler.set_begin_index(first)
    return first, _noised(init_image.image, noise, scheduler, first)


def apply_keep_mask(x: Tensor, init_image: InitImage, noise: Tensor, scheduler: Any, num_calls: int) -> Tensor:
    """x with the kept part of the image put back, noised to the level of x; after the last step without noise.

    Args:
        x: The state after a step of the scheduler, (B, C, H, W).
        init_image: The image and its keep_mask, on the device of x.
        noise: The initial noise of sampling, (B, C, H, W).
        scheduler: The scheduler of the sampling loop.
        num_calls: Calls of the denoiser so far, which is also the position of the next timestep.
    """
    is_last = num_calls == len(scheduler.timesteps)
    # Halfway through a second-order step, a state can lie between two levels of the schedule.
    if init_image.keep_mask is None or (num_calls % scheduler.order and not is_last):
        return x
    image = init_image.image if is_last else _noised(init_image.image, noise, scheduler, num_calls)
    return torch.where(init_image.keep_mask, image, x)


def _noised(image: Tensor, noise: Tensor, scheduler: Any, number: int) -> Tensor:
    """The image noised to the level of the scheduler's timestep at this position, (B, C, H, W).

    The scheduler computes only the two factors, so that its table can stay on the CPU.
    """
    one, zero, t = torch.ones(1), torch.zeros(1), scheduler.timesteps[number : number + 1]
    signal, sigma = scheduler.add_noise(one, zero, t), scheduler.add_noise(zero, one, t)
    return signal[0] * image + sigma[0] * noise
