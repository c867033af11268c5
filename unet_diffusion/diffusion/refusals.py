"""Combinations of scheduler, noise schedule and number of steps for which diffusers returns wrong images or fails."""

import inspect
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
MAX_FALSE_NOISE = 0.5  # in the first step of Heun, of images of variance 1; of variance 0.5 it is half of that


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


def check_first_step(scheduler: Any, num_steps: int) -> None:
    """Refuse a number of steps for which the first step of Heun's scheduler adds noise that was never there.

    The step from the noise level s0 down to s1 follows the mean of two slopes. At s1 a denoiser of images of variance 1
    knows a share 1 / s1 ** 2 of the slope, and the other slope knows nothing of it, so that the mean misses by half of
    that share. Over the length of the step this is s0 / (2 s1 ** 3) of the noise that is left. Schedulers that take the
    middle in terms of log(s), such as KDPM2DiscreteScheduler, are right.

    Args:
        scheduler: A new scheduler of diffusers for images that start from noise alone.
        num_steps: The number of denoising steps.

    Raises:
        ValueError: If more than `MAX_FALSE_NOISE` of the noise is false.
    """
    if type(scheduler).__name__ != "HeunDiscreteScheduler" or _false_noise(scheduler, num_steps) <= MAX_FALSE_NOISE:
        return
    more = range(num_steps + 1, scheduler.config.num_train_timesteps + 1)
    enough = next((number for number in more if _false_noise(scheduler, number) <= MAX_FALSE_NOISE), None)
    fix = "another scheduler" if enough is None else f"{enough} or more, or another scheduler"
    raise ValueError(f"num_inference_steps must be enough for HeunDiscreteScheduler, whose first step is too long on "
                     f"this noise schedule, got {num_steps}; use {fix}")  # fmt: skip


def _false_noise(scheduler: Any, num_steps: int) -> float:
    """What the first step of Heun's scheduler adds falsely, as a share of the noise that it leaves."""
    scheduler.set_timesteps(num_steps, device="cpu")
    first, second = scheduler.sigmas.unique().flip(0)[:2].tolist()
    return first / (2 * second**3) if second else 0.0  # a single step is of first order, and ends without noise


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
