"""Our training step without the trainer: what `unet-diffusion fit` does in each step, and nothing around it.

`RandomImages` is for fit itself, where only its rate is of interest.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unet_diffusion.data import ImageSet, Source
from unet_diffusion.diffusion.losses import squared_error
from unet_diffusion.diffusion.schedule import NoiseSchedule, stratified_timesteps
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.speed import Speed, fastest_setting, keep_freed_memory, set_speed, speeds_for
from unet_diffusion.runtime.precision import precisions_for
from unet_diffusion.runtime.randomness import keyed_generator

EMA_DECAY = 0.9999
NUM_IMAGES = 50_000  # as CIFAR-10
RUN_STEPS = 1000  # of the run that a speed is chosen for: on a CPU too short for torch.compile to be tried


def our_step(
    unet: DenoiserUNet,
    x0: Tensor,
    *,
    speed: Speed,
    labels: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Callable[[], Tensor]:
    """A function that trains the network for a step on x0 and returns the loss, which stays on the device.

    Args:
        unet: on the device of x0; its speed is set here.
        x0: images, (B, C, H, W) float32.
        speed: one of unet_diffusion.models.speed.SPEEDS.
        labels: (B,) int64, for a network with classes.
        dtype: of autocast; float32 is off.
    """
    if x0.device.type == "cpu":
        keep_freed_memory()  # as fit does, and the next; both are the whole process's, so that peers in it gain too
    torch.backends.cudnn.benchmark = True
    set_speed(unet.train(), speed)
    schedule = NoiseSchedule()
    parameters = list(unet.parameters())
    ema = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1.0e-4, fused=True)
    autocast = torch.autocast(x0.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    numbers = itertools.count()

    def step() -> Tensor:
        generator = keyed_generator(0, next(numbers), device=x0.device)
        t = stratified_timesteps(len(x0), schedule.num_train_timesteps, generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        with autocast:
            prediction = unet(schedule.add_noise(x0, noise, t), t, labels)
            loss = squared_error(prediction, schedule.target(x0, noise, t)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1 - EMA_DECAY)
        return loss.detach()

    return step


def setting_for(unet: DenoiserUNet, x0: Tensor, labels: Tensor | None = None) -> tuple[Speed, torch.dtype]:
    """The speed and precision that "auto" chooses for a run of RUN_STEPS; they are printed with the reason."""
    speed, dtype, reason = fastest_setting(
        unet,
        x0,
        inputs={} if labels is None else {"labels": labels},
        num_steps=RUN_STEPS,
        speeds=speeds_for(x0.device),
        precisions=precisions_for(x0.device),
    )
    print(reason, flush=True)
    return speed, dtype


class RandomImages(Source):
    """As many images as CIFAR-10 has, of noise, in memory.

    Args:
        image_shape: (C, H, W).
    """

    def __init__(self, image_shape: tuple[int, int, int]):
        self.shape = image_shape

    def load(self, *, progress: bool = True) -> ImageSet:
        return ImageSet(torch.randint(256, (NUM_IMAGES, *self.shape), dtype=torch.uint8))
