"""Where sampling starts from, against diffusers' own loops, an oracle and closed forms."""

import inspect
import math

import diffusers
import pytest
import torch
from denoisers import SCHEDULER_WARNINGS

from unet_diffusion.diffusion import image_to_image as start_module
from unet_diffusion.diffusion.image_to_image import NO_START_MIDWAY, InitImage, interpolated_noise
from unet_diffusion.diffusion.sampling import (
    BEYOND_DDPM,
    STOCHASTIC,
    build_scheduler,
    denoise,
    image_generators,
    num_network_steps,
    sample,
    scheduler_config,
    supported_schedulers,
)
from unet_diffusion.diffusion.schedule import NoiseSchedule

pytestmark = SCHEDULER_WARNINGS

SHORT = NoiseSchedule(100, beta_end=0.2)
SHORT_V = NoiseSchedule(100, beta_end=0.2, prediction_type="v_prediction")
SHAPE = (3, 1, 6, 6)
NAMES = [name for name in supported_schedulers(SHORT) if name not in NO_START_MIDWAY]
every_scheduler = pytest.mark.parametrize("name", NAMES)


def pictures(seed=5, count=3):
    return torch.rand(count, *SHAPE[1:], generator=torch.Generator().manual_seed(seed)) * 2 - 1


def checkerboard():
    return (torch.arange(6)[:, None] + torch.arange(6)).remainder(2).eq(0)[None, None]


def curved(x, t):
    """A denoiser that is no one's score: bounded, and different at every pixel and timestep."""
    return torch.tanh(1.3 * x + 0.001 * t.float().view(-1, 1, 1, 1))


def oracle(x0):
    """A denoiser of v that knows x0; between timesteps log sigma is linear, as diffusers has it."""
    a = SHORT_V.alphas_cumprod.double()
    log_sigma = 0.5 * (torch.log1p(-a) - torch.log(a))

    def denoiser(x, t):
        low = t.double().floor().long()
        level = torch.lerp(log_sigma[low], log_sigma[(low + 1).clamp(max=99)], t.double() - low)
        a_t = torch.sigmoid(-2 * level).view(-1, 1, 1, 1)
        noise = (x.double() - a_t.sqrt() * x0.double()) / (1 - a_t).sqrt()
        return (a_t.sqrt() * noise - (1 - a_t).sqrt() * x0).float()

    return denoiser


def drawn(denoiser, schedule=SHORT, shape=SHAPE, **options):
    return sample(denoiser, schedule, shape, **{"num_inference_steps": 10, **options})


# ------------------------------------------------------------------------------------------------------ from a picture


def diffusers_loop(name, image, strength, generators, keep_mask=None):
    """StableDiffusionImg2ImgPipeline without the autoencoder, with the blending of StableDiffusionInpaintPipeline."""
    scheduler = getattr(diffusers, name).from_config(scheduler_config(SHORT), **BEYOND_DDPM.get(name, {}))
    scheduler.set_timesteps(10)
    t_start = max(10 - min(int(10 * strength), 10), 0)
    timesteps = scheduler.timesteps[t_start * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(t_start * scheduler.order)
    noise = torch.cat([torch.randn(1, *SHAPE[1:], generator=g) for g in generators])
    x = scheduler.add_noise(image, noise, timesteps[:1].repeat(len(image)))
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for i, t in enumerate(timesteps):
        prediction = curved(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(prediction, t, x, **options).prev_sample
        if keep_mask is not None:
            last = i == len(timesteps) - 1
            proper = image if last else scheduler.add_noise(image, noise, timesteps[i + 1 : i + 2])
            x = torch.where(keep_mask, proper, x)
    return x


@every_scheduler
@pytest.mark.parametrize("strength", [0.35, 1.0])
def test_trajectory_from_a_picture_is_that_of_diffusers(name, strength):
    if name == "DPMSolverSDEScheduler":
        pytest.skip("its noise takes seeds, not generators")
    expected = diffusers_loop(name, pictures(), strength, image_generators(0, range(3)))
    assert torch.equal(drawn(curved, scheduler=name, init_image=InitImage(pictures(), strength)), expected)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_painting_is_that_of_diffusers(name):
    expected = diffusers_loop(name, pictures(), 0.8, image_generators(0, range(3)), checkerboard())
    assert torch.equal(drawn(curved, scheduler=name, init_image=InitImage(pictures(), 0.8, checkerboard())), expected)


@every_scheduler
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_denoiser_that_knows_x0_gives_x0_whatever_the_picture(name, strength):
    x0 = pictures()
    images = drawn(oracle(x0), SHORT_V, scheduler=name, init_image=InitImage(pictures(seed=6), strength))
    atol = 0.05 if name == "DEISMultistepScheduler" else 1e-5  # it ends at timestep 0, still noisy
    torch.testing.assert_close(images, x0, rtol=0, atol=atol)


@pytest.mark.parametrize("name", NO_START_MIDWAY)
def test_what_is_refused_does_miss_x0_in_diffusers(name, monkeypatch):
    monkeypatch.setattr(start_module, "NO_START_MIDWAY", ())
    x0 = pictures()

    def knows_x0(x, t):
        a = SHORT.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    images = drawn(knows_x0, scheduler=name, init_image=InitImage(x0, 0.5))
    assert (images - x0).abs().max() > 1e-3  # where this fails, diffusers mended it: lift the refusal


def test_less_strength_leaves_more_of_the_picture():
    little, all_steps = (
        (drawn(curved, init_image=InitImage(pictures(), strength)) - pictures()).abs().mean() for strength in (0.1, 1.0)
    )
    assert 0 < little < all_steps / 2


@every_scheduler
def test_denoiser_is_called_for_the_steps_that_are_left(name):
    calls = []

    def spy(x, t):
        calls.append(len(x))
        return curved(x, t)

    start = InitImage(pictures(count=1), 0.35)
    drawn(spy, scheduler=name, init_image=start, shape=(1, *SHAPE[1:]))
    order = build_scheduler(SHORT, name).order
    assert len(calls) == num_network_steps(SHORT, name, 10, start)
    assert len(calls) in (3 * order, 3 * order - 1)  # 0.35 of 10 steps is 3; Heun's last is of first order


# ------------------------------------------------------------------------------------------------------------ painting


@every_scheduler
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_known_pixels_come_back_exactly_and_others_do_not(name, strength):
    keep_mask = checkerboard().expand(SHAPE)
    images = drawn(curved, scheduler=name, init_image=InitImage(pictures(), strength, checkerboard()))
    assert torch.equal(images[keep_mask], pictures()[keep_mask])
    assert ((images - pictures())[~keep_mask].abs() > 1e-3).float().mean() > 0.9  # a few pixels may be drawn alike


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STOCHASTIC])
def test_known_part_is_put_back_at_the_level_of_the_state(name):
    def states(keep_mask):
        seen = []
        denoise(
            oracle(pictures()),
            build_scheduler(SHORT_V, name),
            image_generators(0, range(3)),
            SHAPE,
            num_inference_steps=10,
            init_image=InitImage(pictures(), 1.0, keep_mask),
            on_step=lambda t, x: seen.append(x),
        )
        return seen[:-1]  # DEIS ends at another level than the picture's

    # on the oracle's way the noised picture is the state, which is up to 150 times an image in terms of sigma
    torch.testing.assert_close(states(torch.ones(1, 1, 6, 6).bool()), states(None), rtol=1e-5, atol=1e-4)


def test_everything_unknown_is_the_way_from_the_picture():
    unknown = torch.zeros(1, 1, 6, 6).bool()
    painted = drawn(curved, init_image=InitImage(pictures(), 0.7, unknown))
    assert torch.equal(painted, drawn(curved, init_image=InitImage(pictures(), 0.7)))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_painted_image_does_not_depend_on_the_batch(name):
    keep_mask = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    start = InitImage(pictures(), 0.8, keep_mask)
    together, alone = (drawn(curved, scheduler=name, init_image=start, batch_size=size) for size in (3, 1))
    torch.testing.assert_close(together, alone)
    last = InitImage(pictures()[2:], 0.8, keep_mask[2:])
    one = drawn(curved, scheduler=name, init_image=last, shape=(1, *SHAPE[1:]), indices=[2])
    torch.testing.assert_close(together[2:], one)


def test_one_picture_serves_all_images():
    start, repeated = (InitImage(pictures()[:1].expand(n, -1, -1, -1), 0.6, checkerboard()) for n in (1, 3))
    assert torch.equal(drawn(curved, init_image=start, batch_size=2), drawn(curved, init_image=repeated, batch_size=2))


# ------------------------------------------------------------------------------------------------------- interpolation


def test_ends_of_an_interpolation_are_the_first_images_of_the_seeds():
    frames = drawn(curved, noise=interpolated_noise((4, 9), [0, 0.5, 1], SHAPE[1:]))
    for frame, seed in ((0, 4), (2, 9)):
        torch.testing.assert_close(frames[frame], drawn(curved, shape=(1, *SHAPE[1:]), seed=seed)[0])
    assert (frames[1] - frames[0]).abs().max() > 0.01


def test_norm_between_the_ends_is_that_of_noise():
    noise = interpolated_noise((0, 1), [i / 10 for i in range(11)], (3, 32, 32))
    norms = noise.flatten(1).norm(dim=1)
    # the norm of 3072 normal numbers is 55.4 with a deviation of 0.7; halfway along a straight line it would be 39
    assert (norms - math.sqrt(3 * 32 * 32)).abs().max() < 3 * 0.71
    assert norms.min() >= norms[[0, -1]].min() - 0.1


def test_interpolation_turns_by_equal_angles():
    flat = interpolated_noise((0, 1), [i / 8 for i in range(9)], (3, 8, 8)).flatten(1).double()
    unit = flat / flat.norm(dim=1, keepdim=True)
    angles = torch.acos((unit[1:] * unit[:-1]).sum(dim=1))
    # equal on a circle; as the norms of the two ends differ by a few percent, so do the angles
    assert angles.max() / angles.min() < 1.1


@pytest.mark.parametrize("name", supported_schedulers(SHORT))
def test_stochastic_schedulers_are_those_that_add_noise(name):
    noise = pictures()
    one, other = (drawn(curved, scheduler=name, noise=noise, seed=seed) for seed in (0, 1))
    assert torch.equal(one, other) == (name not in STOCHASTIC)


def test_seeds_of_an_interpolation_must_differ():
    with pytest.raises(ValueError, match="must differ, got 3 twice"):
        interpolated_noise((3, 3), [0.5], (1, 4, 4))


# -------------------------------------------------------------------------------------------------------- size, errors


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (24, 8)])
def test_network_draws_any_size_that_it_takes(tiny_unet, size):
    unet = tiny_unet().eval()
    images = drawn(unet, shape=(1, 1, *size), num_inference_steps=2)
    assert images.shape == (1, 1, *size)
    assert images.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strength": 0.0}, r"strength must be in \(0, 1\], got 0.0"),
        ({"strength": 1.5}, "got 1.5"),
        ({"keep_mask": torch.zeros(1, 1, 6, 6)}, r"bool of shape \(N, 1, 6, 6\), got torch.float32"),
        ({"keep_mask": torch.zeros(1, 1, 5, 6).bool()}, r"got torch.bool of shape \(1, 1, 5, 6\)"),
    ],
)
def test_start_out_of_range_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        InitImage(pictures(), **wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_image": InitImage(pictures()[:2])}, r"for 1 or 3 images of 6 x 6, got shape \(2, 1, 6, 6\)"),
        ({"init_image": InitImage(pictures()[..., :5])}, "for 1 or 3 images of 6 x 6"),
        (
            {"init_image": InitImage(pictures(), keep_mask=checkerboard().repeat(2, 1, 1, 1))},
            "the keep_mask to start from",
        ),
        ({"init_image": InitImage(pictures().repeat(1, 3, 1, 1))}, "must have 1 channels, got 3"),
        ({"init_image": InitImage(pictures(), 0.05)}, "0.05 of 10 steps is none; raise strength"),
        (
            {"init_image": InitImage(pictures()), "scheduler": "PNDMScheduler"},
            "PNDMScheduler cannot start from an image",
        ),
        ({"init_image": InitImage(pictures()), "scheduler": "LMSDiscreteScheduler"}, "cannot start from an image"),
        ({"noise": pictures()[:2]}, r"noise must have the shape \(3, 1, 6, 6\), got \(2, 1, 6, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_denoiser_is_called(options, message):
    def unreachable(x, t):
        raise AssertionError("the denoiser was called before the request was refused")

    with pytest.raises(ValueError, match=message):
        drawn(unreachable, **options)
