import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import chisquare

from unet_diffusion.diffusion.losses import loss_weights, squared_error, sums_by_quarter
from unet_diffusion.diffusion.schedule import NoiseSchedule, stratified_timesteps
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.training.optimizers import lr_factor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEPS = torch.tensor([0, 50, 200, 500, 800, 999])


def snr_of_diffusers() -> np.ndarray:
    a_t = DDPMScheduler().alphas_cumprod.double().numpy()[TIMESTEPS]
    return a_t / (1 - a_t)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_uniform_weighting_weights_all_alike(prediction_type):
    weights = loss_weights(NoiseSchedule(prediction_type=prediction_type), TIMESTEPS, "uniform")
    assert weights.tolist() == [1.0] * len(TIMESTEPS)


@pytest.mark.parametrize(
    ("prediction_type", "closed_form"),
    [
        ("epsilon", lambda snr: np.minimum(snr, 5) / snr),
        ("sample", lambda snr: np.minimum(snr, 5)),
        ("v_prediction", lambda snr: np.minimum(snr, 5) / (snr + 1)),
    ],
)
def test_min_snr_weights_are_those_of_the_paper(prediction_type, closed_form):
    weights = loss_weights(NoiseSchedule(prediction_type=prediction_type), TIMESTEPS, "min_snr")
    # float32 has 1 - a_t of the first timestep, 1e-4, to 6e-4 of its value
    np.testing.assert_allclose(weights.numpy(), closed_form(snr_of_diffusers()), rtol=1e-3)


def test_gamma_is_where_min_snr_stops_growing():
    weights = loss_weights(NoiseSchedule(prediction_type="sample"), TIMESTEPS, "min_snr", gamma=2.0)
    np.testing.assert_allclose(weights.numpy(), np.minimum(snr_of_diffusers(), 2), rtol=1e-3)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_is_the_same_loss_whatever_is_predicted(prediction_type):
    generator = torch.Generator().manual_seed(0)
    x0, noise, error = torch.randn(3, 4, 1, 8, 8, dtype=torch.float64, generator=generator)
    t = TIMESTEPS[1:5]
    a_t = DDPMScheduler().alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    signal, sigma = a_t.sqrt(), (1 - a_t).sqrt()
    x0_hat = x0 + error
    noise_hat = (signal * x0 + sigma * noise - signal * x0_hat) / sigma  # what x0_hat says of the noise in x_t
    predictions = {"epsilon": noise_hat, "sample": x0_hat, "v_prediction": signal * noise_hat - sigma * x0_hat}

    schedule = NoiseSchedule(prediction_type=prediction_type)
    errors = squared_error(predictions[prediction_type], schedule.target(x0, noise, t))
    losses = errors * loss_weights(schedule, t, "min_snr")

    expected = torch.from_numpy(np.minimum(snr_of_diffusers()[1:5], 5)) * error.square().mean((1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=0)  # float32 weights


def test_squared_error_is_float32_in_reduced_precision():
    prediction, target = torch.zeros(2, 1, 4, 4).bfloat16(), torch.full((2, 1, 4, 4), 1.0 + 2**-7).bfloat16()
    expected = torch.full((2,), (1 + 2**-7) ** 2)  # whose last digits bfloat16 has no room for
    torch.testing.assert_close(squared_error(prediction, target), expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_train_timesteps", [10, 1000])
def test_sums_by_quarter_are_those_of_numpy(num_train_timesteps):
    rng = np.random.default_rng(0)
    errors, t = rng.random(50), rng.integers(num_train_timesteps, size=50)
    t[:2] = 0, num_train_timesteps - 1
    sums, counts = sums_by_quarter(torch.from_numpy(errors), torch.from_numpy(t), num_train_timesteps)
    quarter = np.floor(t / (num_train_timesteps / 4)).astype(int)
    np.testing.assert_array_equal(counts.numpy(), np.bincount(quarter, minlength=4))
    np.testing.assert_allclose(sums.numpy(), np.bincount(quarter, weights=errors, minlength=4), rtol=1e-12)


def test_stratified_timesteps_are_one_in_each_part_of_the_range():
    t = stratified_timesteps(64, 1024, keyed_generator(0))
    assert sorted((t // 16).tolist()) == list(range(64))


def test_stratified_timesteps_are_in_random_order():
    t = stratified_timesteps(64, 1024, keyed_generator(0))
    assert abs(np.corrcoef(t.numpy(), np.arange(64))[0, 1]) < 0.4  # 0.125 is one standard deviation


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_stratified_timesteps_cover_the_first_and_the_last_and_no_more(batch_size):
    generator = keyed_generator(0)
    t = torch.stack([stratified_timesteps(batch_size, 8, generator) for _ in range(200)])
    assert (int(t.min()), int(t.max())) == (0, 7)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_each_stratified_timestep_is_uniform_by_itself(batch_size):
    generator = keyed_generator(1)
    t = torch.stack([stratified_timesteps(batch_size, 8, generator) for _ in range(4000)])
    for column in t.T:
        assert chisquare(np.bincount(column, minlength=8)).pvalue > 1e-3


def test_stratified_timesteps_survive_the_highest_draw(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.full((size,), 1 - 2.0**-24))
    assert stratified_timesteps(128, 1000, keyed_generator(0)).max() == 999


def test_learning_rate_rises_from_above_zero_to_one_at_the_end_of_the_warm_up():
    factors = [lr_factor(step, 10, 110) for step in range(11)]
    np.testing.assert_allclose(factors, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0], rtol=1e-12)


def test_learning_rate_falls_along_a_cosine_to_zero():
    steps = np.array([10, 35, 60, 85, 110])
    expected = np.cos(np.linspace(0, np.pi / 2, 5)) ** 2
    np.testing.assert_allclose([lr_factor(step, 10, 110) for step in steps], expected, atol=1e-12)


def test_learning_rate_stays_zero_after_the_end():
    assert lr_factor(200, 10, 110) == 0


def test_learning_rate_without_decay_stays_one_after_the_warm_up():
    assert [lr_factor(step, 2, float("inf")) for step in (0, 1, 2, 10**6)] == [0.5, 1, 1, 1]


def test_learning_rate_without_warm_up_starts_at_one():
    assert lr_factor(0, 0, 100) == 1
