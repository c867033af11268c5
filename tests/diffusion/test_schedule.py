import itertools

import pytest
import torch
from diffusers import DDPMScheduler

from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.runtime.randomness import keyed_generator

BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
CONFIGS = [
    {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero_snr, "prediction_type": prediction_type}
    for beta_schedule, zero_snr, prediction_type in itertools.product(BETA_SCHEDULES, [False, True], PREDICTION_TYPES)
    if not (zero_snr and prediction_type == "epsilon")
]


def batch(size: int = 5, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, size, 3, 4, 4, generator=generator, dtype=dtype)
    return x0, noise, torch.tensor([0, 1, 500, 998, 999])[:size]


@pytest.mark.parametrize("config", CONFIGS)
def test_tables_equal_those_of_diffusers(config):
    ours, theirs = NoiseSchedule(**config), DDPMScheduler(**config)
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


def test_other_ends_and_lengths_equal_those_of_diffusers():
    config = {"num_train_timesteps": 100, "beta_start": 0.0015, "beta_end": 0.0195}
    for beta_schedule in BETA_SCHEDULES:
        ours = NoiseSchedule(beta_schedule=beta_schedule, **config)
        assert torch.equal(ours.betas, DDPMScheduler(beta_schedule=beta_schedule, **config).betas)


@pytest.mark.parametrize("config", CONFIGS)
def test_noised_images_equal_those_of_diffusers(config):
    x0, noise, t = batch()
    expected = DDPMScheduler(**config).add_noise(x0, noise, t)
    torch.testing.assert_close(NoiseSchedule(**config).add_noise(x0, noise, t), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_targets_equal_those_of_diffusers(config):
    x0, noise, t = batch()
    theirs = DDPMScheduler(**config)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": theirs.get_velocity(x0, noise, t)}
    ours = NoiseSchedule(**config).target(x0, noise, t)
    torch.testing.assert_close(ours, expected[config["prediction_type"]], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_x0_is_recovered_from_its_target(config):
    x0, noise, t = batch(dtype=torch.float64)
    schedule = NoiseSchedule(**config)
    x_t = schedule.add_noise(x0, noise, t)
    recovered = schedule.predict_x0(schedule.target(x0, noise, t), x_t, t)
    # epsilon divides by sqrt(a_t), which is 5e-5 at the end of the cosine schedule
    torch.testing.assert_close(recovered, x0, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("config", CONFIGS)
def test_signal_and_noise_keep_unit_variance_and_signal_only_falls(config):
    schedule = NoiseSchedule(**config)
    ones, zeros = torch.ones(1000, 1), torch.zeros(1000, 1)
    t = torch.arange(1000)
    signal, sigma = schedule.add_noise(ones, zeros, t), schedule.add_noise(zeros, ones, t)
    torch.testing.assert_close(signal**2 + sigma**2, ones)
    assert (signal.diff(dim=0) < 0).all()
    assert sigma[0] > 0


@pytest.mark.parametrize("config", CONFIGS)
def test_snr_is_the_ratio_of_variances(config):
    schedule = NoiseSchedule(**config)
    t = torch.tensor([0, 500, 998])
    a_t = schedule.alphas_cumprod[t]
    torch.testing.assert_close(schedule.snr(t), a_t / (1 - a_t))


def test_zero_terminal_snr_ends_in_pure_noise():
    schedule = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    x0, noise, _ = batch(1)
    assert torch.equal(schedule.add_noise(x0, noise, torch.tensor([999])), noise)
    assert schedule.snr(torch.tensor([999])) == 0


@pytest.mark.parametrize("t", [[1000], [-1001]])
def test_timestep_out_of_range_is_refused(t):
    x0, noise, _ = batch(1)
    with pytest.raises((IndexError, ValueError)):
        NoiseSchedule().add_noise(x0, noise, torch.tensor(t))


def test_timesteps_must_be_one_a_sample():
    x0, noise, _ = batch(3)
    with pytest.raises(ValueError, match=r"one timestep per sample.*\(3,\).*\(1,\)"):
        NoiseSchedule().add_noise(x0, noise, torch.tensor([1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_half_precision_are_refused(dtype):
    x0, noise, t = batch(dtype=dtype)
    with pytest.raises(ValueError, match="float32"):
        NoiseSchedule().add_noise(x0, noise, t)


def test_config_rebuilds_the_schedule():
    config = {
        "num_train_timesteps": 10,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.01,
        "beta_end": 0.5,
        "prediction_type": "sample",
        "rescale_betas_zero_snr": True,
    }
    schedule = NoiseSchedule(**config)
    assert schedule.config == config
    assert torch.equal(NoiseSchedule(**schedule.config).betas, schedule.betas)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("beta_schedule.*linear.*'cosine'", {"beta_schedule": "cosine"}),
        ("prediction_type.*epsilon.*'v'", {"prediction_type": "v"}),
        ("num_train_timesteps.*1", {"num_train_timesteps": 1}),
        ("beta_start", {"beta_start": 0.0}),
        ("beta_start", {"beta_start": 0.1}),
        ("beta_end", {"beta_end": 1.0}),
        ("epsilon.*v_prediction", {"rescale_betas_zero_snr": True}),
    ],
)
def test_impossible_schedule_is_refused(message, arguments):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**arguments)


def draw(*key: int) -> torch.Tensor:
    return torch.randn(1000, generator=keyed_generator(*key))


def test_keyed_generator_repeats_its_draws():
    assert torch.equal(draw(0, 7), draw(0, 7))


def test_keyed_generator_does_not_touch_the_global_state():
    state = torch.random.get_rng_state()
    draw(0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_keys_that_differ_in_value_order_or_length_draw_differently():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (-1,), (12,), (1, 2), (2**70,)]
    draws = [draw(*key) for key in keys]
    for a, b in itertools.combinations(draws, 2):
        # independent draws of 1000 normals: |correlation| has standard deviation 0.03
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.15


def test_keys_may_be_any_integers():
    assert torch.equal(draw(*torch.tensor([3, 4])), draw(3, 4))
