"""The sampler against closed forms, an oracle, and diffusers' own loops and pipelines."""

import inspect
import math

import diffusers
import pytest
import torch
from denoisers import SCHEDULER_WARNINGS
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from unet_diffusion.diffusion import refusals, sampling
from unet_diffusion.diffusion.guidance import Guidance
from unet_diffusion.diffusion.sampling import (
    SCHEDULERS,
    build_scheduler,
    check_sampling,
    denoise,
    image_generators,
    num_network_steps,
    sample,
    scheduler_config,
    supported_schedulers,
)
from unet_diffusion.diffusion.schedule import NoiseSchedule

pytestmark = SCHEDULER_WARNINGS

LINEAR = NoiseSchedule()
SHORT = NoiseSchedule(
    100, beta_end=0.2
)  # for what does not depend on the table: KDPM2 takes 0.3 s to build 1000 levels
LINEAR_SAMPLE = NoiseSchedule(prediction_type="sample")
LINEAR_V = NoiseSchedule(prediction_type="v_prediction")
COSINE = NoiseSchedule(beta_schedule="squaredcos_cap_v2")
COSINE_V = NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
ZERO_V = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
ZERO_SAMPLE = NoiseSchedule(prediction_type="sample", rescale_betas_zero_snr=True)
SCHEDULES = {"linear": LINEAR, "linear-sample": LINEAR_SAMPLE, "cosine-v": COSINE_V, "zero-v": ZERO_V}

FIRST_ORDER = ("DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler")
MEAN, DEVIATION = 0.3, 0.5  # of the Gaussian's pixels


def cases(*names):
    """(schedule, scheduler) for every supported pair among these schedules."""
    return [
        pytest.param(SCHEDULES[name], scheduler, id=f"{name}-{scheduler}")
        for name in names
        for scheduler in supported_schedulers(SCHEDULES[name])
    ]


every_scheduler = pytest.mark.parametrize("name", supported_schedulers(LINEAR))


def signal_at(schedule, t):
    """a_t as float64 (B, 1, 1, 1); between timesteps log sigma is linear, as diffusers has it for fractional ones."""
    a = schedule.alphas_cumprod.double()
    log_sigma = 0.5 * (torch.log1p(-a) - torch.log(a))
    low = t.double().floor().long()
    high = (low + 1).clamp(max=len(a) - 1)
    part = t.double() - low
    between = torch.sigmoid(-2 * torch.lerp(log_sigma[low], log_sigma[high], part))
    return torch.where(part == 0, a[low], between).view(-1, 1, 1, 1)


def as_prediction(schedule, x0, noise, a):
    match schedule.prediction_type:
        case "epsilon":
            return noise.float()
        case "sample":
            return x0.expand_as(noise).float()
        case _:
            return (a.sqrt() * noise - (1 - a).sqrt() * x0).float()


def oracle(schedule, x0):
    """A denoiser that knows x0."""

    def denoiser(x, t, labels=None):
        a = signal_at(schedule, t)
        noise = (x.double() - a.sqrt() * x0.double()) / (1 - a).sqrt()
        return as_prediction(schedule, x0.double(), noise, a)

    return denoiser


def gaussian(schedule):
    """The best denoiser for pixels from N(MEAN, DEVIATION^2): their posterior mean given x_t."""

    def denoiser(x, t, labels=None):
        a = signal_at(schedule, t)
        surprise = (x.double() - a.sqrt() * MEAN) / (a * DEVIATION**2 + 1 - a)
        return as_prediction(schedule, MEAN + a.sqrt() * DEVIATION**2 * surprise, (1 - a).sqrt() * surprise, a)

    return denoiser


def curved(x, t, labels=None):
    """A denoiser that is no one's score: bounded, and different at every pixel and timestep."""
    return torch.tanh(1.3 * x + 0.001 * t.float().view(-1, 1, 1, 1))


def unreachable(x, t, labels=None):
    raise AssertionError("the denoiser was called before the request was refused")


def images_like(count=3, side=4):
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


def initial_noise(count, *shape, seed=0):
    return torch.stack([torch.randn(shape, generator=g) for g in image_generators(seed, range(count))])


# ----------------------------------------------------------------------------------------------------------- schedulers


def test_schedulers_are_those_that_diffusers_calls_compatible():
    assert set(SCHEDULERS) == {scheduler.__name__ for scheduler in DDPMScheduler().compatibles}


def test_scheduler_config_writes_every_field_of_ddpm_scheduler():
    assert set(scheduler_config(LINEAR)) == set(inspect.signature(DDPMScheduler).parameters)


@pytest.mark.parametrize(("schedule", "name"), cases("linear", "cosine-v", "zero-v"))
def test_scheduler_has_the_table_of_the_schedule_and_starts_at_its_last_timestep(schedule, name):
    scheduler = build_scheduler(schedule, name)
    # those in terms of sigma put 2^-24 for the zero signal, whose sigma would be infinite
    torch.testing.assert_close(scheduler.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-6, atol=2.0**-24)
    assert scheduler.config.prediction_type == schedule.prediction_type
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == schedule.num_train_timesteps - 1


def test_supported_schedulers_of_each_prediction_type():
    pytest.importorskip("torchsde")
    everything = set(SCHEDULERS) - {"EDMEulerScheduler"}
    no_sample = {"PNDMScheduler", "DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler"}
    no_sample |= {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
    zero = {"DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"}
    zero |= {"DPMSolverMultistepScheduler", "UniPCMultistepScheduler"}
    assert set(supported_schedulers(LINEAR)) == everything
    assert set(supported_schedulers(LINEAR_V)) == everything - {"PNDMScheduler"}
    assert set(supported_schedulers(COSINE)) == everything - {"PNDMScheduler"}
    assert set(supported_schedulers(LINEAR_SAMPLE)) == everything - no_sample
    assert set(supported_schedulers(ZERO_V)) == zero
    assert set(supported_schedulers(ZERO_SAMPLE)) == zero - no_sample


@pytest.mark.parametrize(
    ("schedule", "name", "reason"),
    [
        (LINEAR, "EDMEulerScheduler", "EDM's preconditioning"),
        (LINEAR, "FlowMatchEulerDiscreteScheduler", "must be one of DDIMScheduler, DDPMScheduler"),
        (LINEAR_SAMPLE, "PNDMScheduler", "does not implement prediction_type sample"),
        (LINEAR_SAMPLE, "EulerAncestralDiscreteScheduler", "does not implement prediction_type sample"),
        (LINEAR_SAMPLE, "KDPM2DiscreteScheduler", "does not implement prediction_type sample"),
        (LINEAR_SAMPLE, "KDPM2AncestralDiscreteScheduler", "does not implement prediction_type sample"),
        (ZERO_V, "LMSDiscreteScheduler", "ignores rescale_betas_zero_snr"),
        (ZERO_V, "HeunDiscreteScheduler", "ignores rescale_betas_zero_snr"),
        (ZERO_V, "DEISMultistepScheduler", "ignores rescale_betas_zero_snr"),
        (ZERO_V, "DPMSolverSinglestepScheduler", "ignores rescale_betas_zero_snr"),
        (LINEAR_V, "PNDMScheduler", "averages the predictions"),
        (COSINE, "PNDMScheduler", "amplifies rounding"),
    ],
)
def test_invalid_scheduler_is_refused_with_the_reason(schedule, name, reason):
    with pytest.raises(ValueError, match=reason):
        sample(unreachable, schedule, (1, 1, 4, 4), scheduler=name)


def test_sde_scheduler_asks_for_torchsde_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(refusals, "is_torchsde_available", lambda: False)
    assert "DPMSolverSDEScheduler" not in supported_schedulers(LINEAR)
    with pytest.raises(ValueError, match="pip install torchsde"):
        build_scheduler(LINEAR, "DPMSolverSDEScheduler")


@pytest.mark.parametrize(
    ("schedule", "name", "num_steps", "reason"),
    [
        (LINEAR, "DDPMScheduler", 0, r"in \[1, num_train_timesteps\] = \[1, 1000\], got 0"),
        (LINEAR, "DDPMScheduler", 1001, "got 1001"),
        (LINEAR, "DDIMScheduler", 60, "divide num_train_timesteps .* got 60; use 50 or 100"),
        (LINEAR, "PNDMScheduler", 3, "at least 4 .* got 3; use 4"),
        (LINEAR, "PNDMScheduler", 40, "half .* got 40; use 25 or 50"),
        (LINEAR, "DPMSolverMultistepScheduler", 61, "end below 0 .* got 61; use 60 or 62"),
        (COSINE, "EulerAncestralDiscreteScheduler", 3, "finite on this schedule, got 3"),
        (COSINE, "KDPM2AncestralDiscreteScheduler", 5, "finite on this schedule, got 5"),
        (LINEAR, "HeunDiscreteScheduler", 2, "first step is too long .* got 2; use 3 or more"),
        (COSINE, "HeunDiscreteScheduler", 20, "first step is too long .* got 20; use 43 or more"),
    ],
)
def test_number_of_steps_that_goes_wrong_is_refused_with_the_reason(schedule, name, num_steps, reason):
    with pytest.raises(ValueError, match=reason):
        sample(unreachable, schedule, (1, 1, 4, 4), scheduler=name, num_inference_steps=num_steps)


def plain_loop(denoiser, scheduler, generators, shape, num_steps):
    """The loop of diffusers' documentation."""
    scheduler.set_timesteps(num_steps)
    x = torch.cat([torch.randn(1, *shape[1:], generator=g) for g in generators]) * scheduler.init_noise_sigma
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        prediction = denoiser(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(prediction, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize(
    ("schedule", "name", "num_steps", "extra"),
    [
        (LINEAR, "DDIMScheduler", 60, {}),
        (LINEAR, "PNDMScheduler", 60, {"set_alpha_to_one": True}),
        (LINEAR_V, "PNDMScheduler", 10, {"set_alpha_to_one": True}),
        (COSINE, "PNDMScheduler", 10, {"set_alpha_to_one": True}),
        (ZERO_V, "LMSDiscreteScheduler", 10, {}),
        (ZERO_V, "HeunDiscreteScheduler", 10, {}),
    ],
)
def test_what_is_refused_does_miss_x0_in_diffusers(schedule, name, num_steps, extra):
    x0 = images_like()
    scheduler = getattr(diffusers, name).from_config(scheduler_config(schedule), **extra)
    images = plain_loop(oracle(schedule, x0), scheduler, image_generators(0, range(3)), x0.shape, num_steps)
    assert (images - x0).abs().max() > 1e-3  # where this fails, diffusers mended it: lift the refusal


# --------------------------------------------------------------------------------------------------------------- oracle


@pytest.mark.parametrize(("schedule", "name"), cases("linear", "linear-sample", "cosine-v", "zero-v"))
def test_denoiser_that_knows_x0_gives_x0(schedule, name):
    x0, num_steps = images_like(), 50 if name == "HeunDiscreteScheduler" else 20
    images = sample(oracle(schedule, x0), schedule, x0.shape, scheduler=name, num_inference_steps=num_steps)
    if name == "DEISMultistepScheduler":  # its last noise level is that of timestep 0, by construction
        first, last = schedule.alphas_cumprod[0], schedule.alphas_cumprod[-1]
        noise = (initial_noise(*x0.shape) - last.sqrt() * x0) / (1 - last).sqrt()
        torch.testing.assert_close(images, first.sqrt() * x0 + (1 - first).sqrt() * noise, rtol=0, atol=2e-5)
    else:
        torch.testing.assert_close(images, x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("schedule", "name"), cases("linear", "zero-v"))
@pytest.mark.parametrize("num_steps", [1, 2])
def test_few_steps_give_x0_too(schedule, name, num_steps):
    if name == "PNDMScheduler" and num_steps < 4:
        pytest.skip("it needs four steps")
    if name == "HeunDiscreteScheduler" and num_steps == 2:
        pytest.skip("it is refused, see test_number_of_steps_that_goes_wrong_is_refused_with_the_reason")
    x0 = images_like()
    images = sample(oracle(schedule, x0), schedule, x0.shape, scheduler=name, num_inference_steps=num_steps)
    # one step multiplies float32's 6e-8 by 1 / sqrt(a_T): 160 with the linear schedule, 4096 where 2^-24 stands for 0
    rounding = (1e-4 if schedule is LINEAR else 2e-3) if num_steps == 1 else 1e-5
    atol = 0.05 if name == "DEISMultistepScheduler" else rounding
    torch.testing.assert_close(images, x0, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------------------- Gaussian


def affine_map(schedule, num_steps, num_train=1000):
    """Slope of DDIM's closed form x_T -> x_0 for the Gaussian, a product over steps of equally spaced timesteps."""
    a = [float(value) for value in schedule.alphas_cumprod.double()]
    stride, slope = num_train // num_steps, 1.0
    for t in range(num_train - 1, 0, -stride):
        now, after = a[t], a[t - stride] if t >= stride else 1.0
        variance = now * DEVIATION**2 + 1 - now
        slope *= (math.sqrt(now * after) * DEVIATION**2 + math.sqrt((1 - now) * (1 - after))) / variance
    return slope


def ancestral_deviation(schedule, num_steps, num_train=1000):
    """Deviation of samples by Ho et al. 2020, eq. 7, with the Gaussian's denoiser: a recursion of variances."""
    a = [float(value) for value in schedule.alphas_cumprod.double()]
    stride, variance = num_train // num_steps, 1.0
    for t in range(num_train - 1, 0, -stride):
        now, after = a[t], a[t - stride] if t >= stride else 1.0
        alpha = now / after
        x0_slope = math.sqrt(now) * DEVIATION**2 / (now * DEVIATION**2 + 1 - now)
        slope = math.sqrt(after) * (1 - alpha) / (1 - now) * x0_slope + math.sqrt(alpha) * (1 - after) / (1 - now)
        variance = slope**2 * variance + (1 - after) / (1 - now) * (1 - alpha)
    return math.sqrt(variance)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE_V, ZERO_V])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_first_order_solvers_follow_ddims_closed_form(schedule, name):
    images = sample(
        gaussian(schedule), schedule, (4, 1, 8, 8), scheduler=name, num_inference_steps=20, clip_sample=False
    )
    noise = initial_noise(4, 1, 8, 8)
    expected = affine_map(schedule, 20) * (noise - noise.mean())
    # Euler's first states are up to 20 000 times the noise, and so is their rounding
    torch.testing.assert_close(images - images.mean(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE_V, ZERO_V])
@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_ancestral_samplers_have_the_deviation_of_the_closed_form(schedule, name):
    images = sample(
        gaussian(schedule), schedule, (1, 1, 128, 128), scheduler=name, num_inference_steps=20, clip_sample=False
    )
    # 16384 pixels: one standard error of the deviation is 0.55 %
    assert images.std() == pytest.approx(ancestral_deviation(schedule, 20), rel=0.02)


@pytest.mark.parametrize(("schedule", "name"), cases("linear", "cosine-v", "zero-v"))
def test_gaussians_denoiser_gives_the_gaussian(schedule, name):
    images = sample(
        gaussian(schedule), schedule, (1, 1, 128, 128), scheduler=name, num_inference_steps=100, clip_sample=False
    )
    # standard errors over 16384 pixels: 0.004 of the mean, 0.55 % of the deviation; 100 steps of first order make it up
    # to 7 % too small, of higher order up to 1.8 % too large (both fall as steps rise)
    assert images.mean() == pytest.approx(MEAN, abs=0.016)
    assert images.std() == pytest.approx(DEVIATION, rel=0.09 if name in FIRST_ORDER else 0.03)


def test_long_first_step_of_heun_is_refused_where_it_adds_noise():
    deviation = {}
    for num_steps in (20, 43):
        scheduler = diffusers.HeunDiscreteScheduler.from_config(scheduler_config(COSINE_V, clip_sample=False))
        images = plain_loop(gaussian(COSINE_V), scheduler, image_generators(0, [0]), (1, 1, 64, 64), num_steps)
        deviation[num_steps] = images.std() / DEVIATION
    check_sampling(SHORT, (1, 1, 64, 64), scheduler="HeunDiscreteScheduler", num_inference_steps=5)  # little noise
    assert deviation[20] > 2  # where this fails, diffusers mended it: lift the refusal
    assert deviation[43] < 1.15
    ours = {"scheduler": "HeunDiscreteScheduler", "num_inference_steps": 43, "clip_sample": False}
    images = sample(gaussian(COSINE_V), COSINE_V, (1, 1, 64, 64), **ours)
    assert images.std() / DEVIATION < 1.15


# -------------------------------------------------------------------------------------------------- against diffusers


@every_scheduler
def test_trajectory_equals_the_plain_loop_of_diffusers(name):
    if name == "DPMSolverSDEScheduler":
        pytest.skip("its noise takes seeds, not generators")
    extra = sampling.BEYOND_DDPM.get(name, {})
    scheduler = getattr(diffusers, name).from_config(scheduler_config(SHORT), **extra)
    expected = plain_loop(curved, scheduler, image_generators(0, range(3)), (3, 1, 4, 4), 10)
    images = sample(curved, SHORT, (3, 1, 4, 4), scheduler=name, num_inference_steps=10)
    assert images.dtype == torch.float32
    assert torch.equal(images, expected)


@pytest.mark.parametrize(("pipeline_class", "name"), [(DDPMPipeline, "DDPMScheduler"), (DDIMPipeline, "DDIMScheduler")])
def test_images_equal_those_of_diffusers_pipeline(pipeline_class, name):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    pipeline = pipeline_class(unet, DDPMScheduler(**scheduler_config(LINEAR)))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=2, generator=image_generators(3, [0, 1]), num_inference_steps=5, output_type="np")
    images = sample(lambda x, t: unet(x, t).sample, LINEAR, (2, 3, 8, 8), scheduler=name, num_inference_steps=5, seed=3)
    pixels = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(pixels, torch.from_numpy(expected.images))


# -------------------------------------------------------------------------------------- seeds, batches and processes


@every_scheduler
def test_image_does_not_depend_on_the_batch(name):
    def draw(indices, batch_size):
        shape = (len(indices), 1, 4, 4)
        settings = {"scheduler": name, "num_inference_steps": 10, "indices": indices, "batch_size": batch_size}
        return sample(curved, SHORT, shape, seed=0, **settings)

    together = draw(range(7), 7)
    for batch_size in (1, 3):
        torch.testing.assert_close(draw(range(7), batch_size), together)
    torch.testing.assert_close(draw(range(0, 7, 2), 4), together[::2])  # what one of two processes would draw
    torch.testing.assert_close(draw([6, 3], 2), together[[6, 3]])
    assert (together[0] - together[1]).abs().max() > 0.01


@every_scheduler
def test_seed_zero_is_reproducible_and_differs_from_seed_one(name):
    def draw(seed):
        return sample(curved, SHORT, (2, 1, 4, 4), scheduler=name, num_inference_steps=5, seed=seed)

    assert torch.equal(draw(0), draw(0))
    assert not torch.allclose(draw(0), draw(1))


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for name in supported_schedulers(SHORT):
        sample(curved, SHORT, (1, 1, 4, 4), scheduler=name, num_inference_steps=5)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------------- the loop


@every_scheduler
def test_denoiser_sees_float32_images_and_a_timestep_each(name):
    seen = []

    def spy(x, t):
        seen.append((x.dtype, t))
        assert torch.is_grad_enabled() is False
        return curved(x, t)

    sample(spy, SHORT, (2, 1, 4, 4), scheduler=name, num_inference_steps=5)
    scheduler = build_scheduler(SHORT, name)
    scheduler.set_timesteps(5)
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert torch.equal(torch.stack([t for _, t in seen]), scheduler.timesteps[:, None].expand(-1, 2))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_thresholding_of_a_scheduler_object_clips_each_x0(name):
    far = torch.full((1, 1, 4, 4), 1.7)  # outside of [-1, 1], as a guided prediction may be
    plain = getattr(diffusers, name)()
    clipping = getattr(diffusers, name)(thresholding=True, sample_max_value=1.0)
    images = {one: sample(oracle(LINEAR_V, far), LINEAR_V, far.shape, scheduler=one) for one in (plain, clipping)}
    torch.testing.assert_close(images[plain], far, atol=1e-3, rtol=0)  # rounding of 50 steps
    torch.testing.assert_close(images[clipping], torch.ones_like(far), atol=1e-3, rtol=0)


CLIP_BY_THEMSELVES = ("DDIMScheduler", "DDPMScheduler", "HeunDiscreteScheduler")
CLIP_WHEN_ASKED = (
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    "UniPCMultistepScheduler",
)


@every_scheduler
def test_thresholding_clips_each_x0_whatever_the_scheduler_or_is_refused(name):
    far = torch.full((1, 1, 4, 4), 1.7)  # outside of [-1, 1], as a guided prediction may be
    options = {"scheduler": name, "num_inference_steps": 10}
    if name not in (*CLIP_BY_THEMSELVES, *CLIP_WHEN_ASKED):
        with pytest.raises(
            ValueError, match=rf"needs a scheduler that can clip x0, got {name}; use one of DDIM.*UniPC"
        ):
            sample(oracle(LINEAR, far), LINEAR, far.shape, thresholding=True, **options)
        return
    plain, clipped = (sample(oracle(LINEAR, far), LINEAR, far.shape, thresholding=one, **options) for one in (0, 1))
    # DEIS ends at timestep 0, with 1 % of the noise.
    tolerance = 0.05 if name == "DEISMultistepScheduler" else 1e-3
    torch.testing.assert_close(clipped, torch.ones_like(far), atol=tolerance, rtol=0)
    expected = torch.ones_like(far) if name in CLIP_BY_THEMSELVES else far
    torch.testing.assert_close(plain, expected, atol=tolerance, rtol=0)


@torch.no_grad()
def looped(unet, scheduler, x) -> torch.Tensor:
    """The images of five steps as diffusers' pipelines take them."""
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", CLIP_WHEN_ASKED)
def test_thresholding_draws_the_images_of_diffusers_with_its_own(name):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, **blocks).eval()
    written = DDPMScheduler(**scheduler_config(LINEAR)).config  # as an exported folder has it
    scheduler = getattr(diffusers, name).from_config(written, thresholding=True)
    drawn = []
    for thresholding in (False, True):
        images = sample(
            lambda x, t: unet(x, t).sample, LINEAR, (2, 3, 8, 8), scheduler=name, num_inference_steps=5, seed=3,
            thresholding=thresholding,
        )  # fmt: skip
        drawn.append((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    generators = image_generators(3, [0, 1])
    if "generator" in inspect.signature(scheduler.step).parameters:  # which DDPMPipeline hands over
        pipeline = DDPMPipeline(unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        expected = pipeline(batch_size=2, generator=generators, num_inference_steps=5, output_type="np").images
    else:
        expected = looped(unet, scheduler, randn_tensor((2, 3, 8, 8), generator=generators))
    torch.testing.assert_close(drawn[1], torch.as_tensor(expected))
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3  # something was clipped


def test_latents_are_never_clipped():
    options = {"scheduler": "DPMSolverMultistepScheduler", "clip_sample": False, "thresholding": True}
    with pytest.raises(ValueError, match=r"thresholding is for pixels, .* and this denoiser draws latents"):
        sample(curved, SHORT, (1, 1, 4, 4), **options)


@every_scheduler
def test_scheduler_computes_in_float32_under_autocast(name):
    x0 = images_like()
    shape, settings = x0.shape, {"scheduler": name, "num_inference_steps": 10}
    expected = sample(curved, SHORT, shape, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        images = sample(curved, SHORT, shape, **settings)
    assert torch.equal(images, expected)  # curved has nothing that autocast would touch


def test_prediction_in_bfloat16_leaves_images_in_float32():
    images = sample(lambda x, t: curved(x, t).bfloat16(), SHORT, (1, 1, 4, 4), scheduler="DDPMScheduler")
    assert images.dtype == torch.float32


@every_scheduler
def test_progress_counts_images_times_network_steps(name):
    calls, finished = [], []

    def spy(x, t):
        calls.append(len(x))
        return curved(x, t)

    sample(spy, SHORT, (5, 1, 4, 4), scheduler=name, num_inference_steps=5, batch_size=2, progress=finished.append)
    assert finished == calls
    assert sum(finished) == 5 * num_network_steps(SHORT, name, 5)


def test_on_step_shows_the_way_from_noise_to_image():
    states = []
    x0 = images_like()
    image = denoise(
        oracle(LINEAR, x0),
        build_scheduler(LINEAR),
        image_generators(0, range(3)),
        x0.shape,
        num_inference_steps=4,
        on_step=lambda t, x: states.append((int(t), x)),
    )
    assert [t for t, _ in states] == [999, 749, 499, 249]
    errors = [float((x - x0).abs().mean()) for _, x in states]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(states[-1][1], image)


def test_clip_sample_bounds_the_estimate_of_x0():
    bright = torch.full((1, 1, 4, 4), 3.0)
    for clip_sample, expected in ((True, 1.0), (False, 3.0)):
        images = sample(oracle(LINEAR_SAMPLE, bright), LINEAR_SAMPLE, bright.shape, clip_sample=clip_sample)
        torch.testing.assert_close(images, torch.full_like(bright, expected))


def test_guidance_pushes_away_from_the_null_label():
    means = torch.tensor([0.1, 0.3, 0.5])  # of classes 0 and 1, and of the null label 2

    def denoiser(x, t, labels):
        return means[labels].view(-1, 1, 1, 1).expand_as(x)

    labels = torch.tensor([0, 1, 1, 0, 2])
    unconditional = {"labels": torch.full_like(labels, 2)}
    images = sample(
        denoiser,
        LINEAR_SAMPLE,
        (5, 1, 4, 4),
        inputs={"labels": labels},
        unconditional=unconditional,
        guidance=Guidance(2.0),
        batch_size=2,
    )
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), 0.5 + 2 * (means[labels] - 0.5))


# --------------------------------------------------------------------------------------------------------------- errors


def labels(values: torch.Tensor) -> dict:
    return {"inputs": {"labels": values}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (labels(torch.tensor([0, 1, 2])), "for each of 2 images"),
        (labels(torch.tensor([0.0, 1.0])), "int64"),
        (labels(torch.tensor([-1, 1])), "at least 0, got -1"),
        ({**labels(torch.tensor([0, 4])), "unconditional": {"labels": torch.tensor([3, 3])}}, r"in \[0, 3\].* got 4"),
        ({**labels(torch.tensor([0, 1])), "unconditional": {}}, r"must have the shape of labels, \(2,\), got none"),
        ({"guidance": Guidance(2.0)}, "without conditions"),
        ({**labels(torch.tensor([0, 1])), "guidance": Guidance(2.0)}, "trained without dropout of its conditions"),
        (
            {
                **labels(torch.tensor([0, 1])),
                "unconditional": {"labels": torch.tensor([2, 2])},
                "guidance": Guidance(2.0, interval=(1000, 2000)),
            },
            r"timestep in \[0, 999\], got 1000 and 2000",
        ),
        ({"indices": [1, 2, 3]}, "indices must have one number for each of 2 images, got 3"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_request_that_cannot_be_met_is_refused_before_the_denoiser_is_called(settings, message):
    with pytest.raises(ValueError, match=message):
        sample(unreachable, LINEAR, (2, 1, 4, 4), **settings)


def test_shape_without_batch_is_refused():
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        check_sampling(LINEAR, (1, 4, 4))


def test_denoise_wants_a_generator_for_each_image():
    with pytest.raises(ValueError, match="must be 2, one per image, got 1"):
        denoise(curved, build_scheduler(LINEAR), image_generators(0, [0]), (2, 1, 4, 4))


def test_prediction_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="shape of x"):
        sample(lambda x, t: x[:, :1], LINEAR, (2, 3, 4, 4))
