"""The weights of a solver's steps, against the steps of diffusers' schedulers."""

import math

import pytest
import torch

from unet_diffusion.diffusion.linear_solver import LinearSolver, linear_steps
from unet_diffusion.diffusion.sampling import (
    STOCHASTIC,
    build_scheduler,
    denoise,
    image_generators,
    supported_schedulers,
)
from unet_diffusion.diffusion.schedule import NoiseSchedule

NUM_STEPS = 10
NOT_FOUND = {  # it looks back further
    "epsilon": {"PNDMScheduler", "LMSDiscreteScheduler"},
    "sample": {"LMSDiscreteScheduler"},
    "v_prediction": {"LMSDiscreteScheduler"},
}


def predict(x, t):
    """No linear function of x."""
    return torch.tanh(x.roll(1, dims=-1)) * (1 + t.view(-1, 1, 1, 1) / 1000)


def trajectory(solver, scheduler, x):
    for t in scheduler.timesteps:
        x = solver.step(predict(solver.scaled(x), t.expand(len(x))), x)
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_weighted_sums_are_the_steps_of_every_scheduler_without_noise_of_its_own(prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    for name in set(supported_schedulers(schedule)) - set(STOCHASTIC):
        noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        scheduler = build_scheduler(schedule, name, clip_sample=False)
        steps = linear_steps(scheduler, NUM_STEPS)
        if steps is None:
            assert name in NOT_FOUND[prediction_type]
            continue
        generators = image_generators(0, range(2))
        expected = denoise(predict, scheduler, generators, noise.shape, num_inference_steps=NUM_STEPS, noise=noise)
        found = trajectory(LinearSolver(steps), scheduler, noise * scheduler.init_noise_sigma)
        # LMS itself divides differences of nearly equal float32 numbers; the others are within 1e-6.
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), name


def test_the_zero_signal_to_noise_ratio_of_a_last_timestep_is_no_obstacle():
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for name in set(supported_schedulers(schedule)) - set(STOCHASTIC):
        scheduler = build_scheduler(schedule, name, clip_sample=False)
        steps = linear_steps(scheduler, NUM_STEPS)
        if steps is not None:
            assert all(math.isfinite(weight) for step in steps for weight in (*step.states, *step.predictions)), name


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_a_scheduler_that_clips_has_none(name):
    assert linear_steps(build_scheduler(NoiseSchedule(), name), NUM_STEPS) is None


def test_a_solver_that_is_asked_to_clip_has_none():
    scheduler = build_scheduler(NoiseSchedule(), "DPMSolverMultistepScheduler", thresholding=True)
    assert linear_steps(scheduler, NUM_STEPS) is None


def test_noise_of_its_own_is_noticed():
    scheduler = build_scheduler(NoiseSchedule(), "EulerAncestralDiscreteScheduler")
    assert linear_steps(scheduler, NUM_STEPS) is None


def test_the_scheduler_is_left_as_it_was():
    scheduler = build_scheduler(NoiseSchedule(), "UniPCMultistepScheduler")
    linear_steps(scheduler, NUM_STEPS)
    assert scheduler.num_inference_steps is None
