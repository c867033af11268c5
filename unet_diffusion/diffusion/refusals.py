"""Combinations of scheduler, noise schedule and number of steps for which diffusers returns wrong images or fails."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
from diffusers.utils import is_torchsde_available

from unet_diffusion.diffusion.schedule import NoiseSchedule

NO_SAMPLE_PREDICTION = (  # their step() raises NotImplementedError or ValueError
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
)
MIN_PNDM_SIGNAL = 1e-5  # below this a_T, PNDM misses x0 by more than 1e-5 (measured; the linear schedule has 4e-5)
MIN_PNDM_STEPS = 4  # the Runge-Kutta start of PNDM takes the first four steps
MAX_DEVIATION = 1.5  # after the first step of Heun, in units of the right one; images of variance 0.25 then have 1.13


def refusal(schedule: NoiseSchedule, name: str) -> str | None:
    """The reason why a scheduler, one of SCHEDULERS, is not valid for the schedule; None if it is valid."""
    if name == "EDMEulerScheduler":
        return "it is for networks with EDM's preconditioning, which take log(sigma) / 4 instead of a timestep"
    if name == "DPMSolverSDEScheduler" and not is_torchsde_available():
        return "it needs the package torchsde (pip install torchsde)"
    if schedule.prediction_type == "sample" and name in NO_SAMPLE_PREDICTION:
        return "it does not implement prediction_type sample"
    fields = inspect.signature(getattr(diffusers, name)).parameters
    if schedule.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in fields:
        return "it ignores rescale_betas_zero_snr, and would underestimate the noise"
    return _pndm_refusal(schedule) if name == "PNDMScheduler" else None


def check_num_inference_steps(scheduler: Any, num_steps: int) -> None:
    """Refuse a number of steps for which the scheduler's timesteps do not match the noise levels it steps to."""
    num_train = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= num_train:
        raise ValueError(f"num_inference_steps must be in [1, num_train_timesteps] = [1, {num_train}], got {num_steps}")
    if scheduler.config.get("timestep_spacing") != "trailing":
        return
    rule, fits = _trailing_rule(type(scheduler).__name__, num_train)
    if fits(num_steps):
        return
    fitting = [k for k in range(1, num_train + 1) if fits(k)]
    nearest = [*[k for k in fitting if k < num_steps][-1:], *[k for k in fitting if k > num_steps][:1]]
    fix = f"use {' or '.join(map(str, nearest))}, or another scheduler" if nearest else "use another scheduler"
    raise ValueError(f"num_inference_steps must {rule} (num_train_timesteps is {num_train}), got {num_steps}; {fix}")


def _trailing_rule(name: str, num_train: int) -> tuple[str, Callable[[int], bool]]:
    """The rule for the number of steps with "trailing" timesteps, in words and as a predicate."""
    if name == "DDIMScheduler":  # it steps to t - num_train // n, not to the next timestep: 60 steps leave 5 % noise
        return "divide num_train_timesteps for DDIMScheduler, whose steps are all equal", lambda n: num_train % n == 0
    if name == "PNDMScheduler":  # it does the same, with half of that step in its Runge-Kutta start
        return (
            f"be at least {MIN_PNDM_STEPS} and divide half of num_train_timesteps for PNDMScheduler, "
            "whose steps are all equal and begin with half steps",
            lambda n: n >= MIN_PNDM_STEPS and num_train % (2 * n) == 0,
        )
    # This is diffusers' own formula; if rounding adds a timestep, the last one is -1.
    return "not make the trailing timesteps end below 0", lambda n: len(np.arange(num_train, 0, -num_train / n)) == n


def check_first_step_of_heun(scheduler: Any, num_steps: int) -> None:
    """Refuse a number of steps for which the first step of Heun's scheduler adds noise that was never there.

    The step follows the mean of two slopes, that of the noise level it leaves and that of the level it reaches. From
    20,000 to 10 the second differs from the first by a hundredth, and over the length of the step that is ten times the
    noise that should be left. Schedulers whose steps are even in terms of log(sigma), such as KDPM2DiscreteScheduler,
    are right.

    Args:
        scheduler: A new HeunDiscreteScheduler for images that start from noise alone.
        num_steps: The number of denoising steps.

    Raises:
        ValueError: If images with a variance of 1 would be more than `MAX_DEVIATION` times too noisy after the step.
    """
    if _deviation(scheduler, num_steps) <= MAX_DEVIATION:
        return
    more = range(num_steps + 1, scheduler.config.num_train_timesteps + 1)
    enough = next((number for number in more if _deviation(scheduler, number) <= MAX_DEVIATION), None)
    fix = "another scheduler" if enough is None else f"{enough} or more, or another scheduler"
    raise ValueError(f"num_inference_steps must be enough for HeunDiscreteScheduler, whose first step is too long on "
                     f"this noise schedule, got {num_steps}; use {fix}")  # fmt: skip


def _deviation(scheduler: Any, num_steps: int) -> float:
    """The deviation of pixels from N(0, 1) after Heun's first step with their best denoiser, over the right one."""
    scheduler.set_timesteps(num_steps, device="cpu")
    first, second = scheduler.sigmas.unique().flip(0)[:2].tolist()
    if not second:
        return 1.0  # a single step is of first order
    slope = first / (1 + first**2)  # of dx / d sigma = (x - x0) / sigma, where x0 = x / (1 + sigma^2); x is 1 at first
    there = (1 + (second - first) * slope) * second / (1 + second**2)
    after = 1 + (second - first) * (slope + there) / 2
    return float(after / math.sqrt((1 + second**2) / (1 + first**2)))


def _pndm_refusal(schedule: NoiseSchedule) -> str | None:
    if schedule.prediction_type == "v_prediction":
        return "it averages the predictions of several timesteps, and v has another meaning at each"
    signal = float(schedule.alphas_cumprod[-1])
    if signal < MIN_PNDM_SIGNAL:
        return (
            f"its Runge-Kutta start amplifies rounding by powers of 1 / sqrt(alphas_cumprod[-1]), "
            f"which must be at least {MIN_PNDM_SIGNAL} for it and is {signal:.1e}"
        )
    return None
