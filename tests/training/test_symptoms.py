"""Runs that go wrong without an error are warned about, and good runs are not."""

import functools
import warnings

import pytest
import torch

from unet_diffusion.data import Digits, ImageDataModule
from unet_diffusion.diffusion.losses import gaussian_errors
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.training import DiffusionModule, SampleGrid
from unet_diffusion.training.symptoms import colour_drift, one_class_only, worse_than_gaussian


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_gaussian_error_is_that_of_the_best_linear_prediction(prediction_type):
    schedule = NoiseSchedule(100, prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    std, num = 0.4, 200_000
    x0 = 0.3 + std * torch.randn(num, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(num, 1, generator=generator, dtype=torch.float64)
    errors = gaussian_errors(schedule, torch.tensor([std**2]))
    for t in (0, 30, 99):
        steps = torch.full((num,), t)
        seen = torch.cat([schedule.add_noise(x0, noise, steps), torch.ones(num, 1, dtype=torch.float64)], dim=1)
        target = schedule.target(x0, noise, steps)
        residual = target - seen @ torch.linalg.lstsq(seen, target).solution  # for Gaussians the best is linear
        assert errors[t].item() == pytest.approx(residual.square().mean().item(), rel=0.02)


def test_gaussian_error_is_the_mean_over_pixels():
    schedule = NoiseSchedule(10)
    both = gaussian_errors(schedule, torch.tensor([0.1, 2.0]))
    each = [gaussian_errors(schedule, torch.tensor([variance])) for variance in (0.1, 2.0)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_only_losses_clearly_above_the_gaussian_are_symptoms():
    assert worse_than_gaussian([0.9, 0.5, 0.3, 0.22], [1.0, 0.6, 0.4, 0.2]) is None
    assert "val/loss_q4 is 0.5" in str(worse_than_gaussian([0.9, 0.5, 0.3, 0.5], [1.0, 0.6, 0.4, 0.2]))


def fitted(quiet_trainer, lr: float) -> None:
    torch.manual_seed(0)
    unet = DenoiserUNet(1, [16, 32], layers_per_block=1, attention_levels=[], mid_attention=False, norm_num_groups=8)
    schedule = NoiseSchedule(100, "squaredcos_cap_v2", prediction_type="v_prediction")
    module = DiffusionModule(unet, schedule, optimizer=functools.partial(torch.optim.AdamW, lr=lr), ema_decay=0.9)
    quiet_trainer(max_steps=200, val_check_interval=200, check_val_every_n_epoch=None, num_sanity_val_steps=0).fit(
        module, ImageDataModule(Digits(), batch_size=32)
    )


@pytest.fixture
def judged_at_once(monkeypatch):
    from unet_diffusion.training import symptoms

    monkeypatch.setattr(symptoms.warn_of, "__kwdefaults__", {"after": 0})


@pytest.mark.slow
def test_denoiser_that_learns_nothing_is_warned_about(quiet_trainer, judged_at_once, tmp_path):
    with pytest.warns(UserWarning, match=r"val/loss_q\d is .* mean and variance of each pixel"):
        fitted(quiet_trainer, lr=1.0e-7)


@pytest.mark.slow
def test_denoiser_that_learns_is_not_warned_about(quiet_trainer, judged_at_once, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mean and variance of each pixel")
        fitted(quiet_trainer, lr=3.0e-3)


def test_tint_of_samples_is_a_symptom_and_chance_is_not():
    generator = torch.Generator().manual_seed(0)
    real = 0.1 * torch.randn(64, 3, generator=generator)
    drawn = 0.1 * torch.randn(64, 3, generator=generator)
    assert colour_drift(drawn, real) is None
    assert "+0.00, +0.00, +0.31" in str(colour_drift(real + torch.tensor([0, 0, 0.31]), real))
    assert colour_drift(5 * drawn[:4], 5 * real[:4]) is None  # too few to tell
    assert colour_drift(drawn, torch.empty(0, 0)) is None  # nothing to compare with


def test_real_colours_are_of_all_classes_alike(quiet_trainer):
    data = ImageDataModule(Digits(), batch_size=32, num_val=200)
    data.setup("fit")
    trainer = quiet_trainer(max_steps=1)
    trainer.datamodule = data
    grid = SampleGrid(0)
    trainer.fit_loop._data_source.instance = data
    assert len(grid.real_colours(trainer, 0)) == 200
    assert len(grid.real_colours(trainer, 10)) % 10 == 0


def test_segmenter_of_one_class_is_a_symptom():
    names = ["background", "cell"]
    assert "background, which is right for 90%" in str(
        one_class_only(torch.tensor([100, 0]), torch.tensor([90, 10]), names)
    )
    assert one_class_only(torch.tensor([99, 1]), torch.tensor([90, 10]), names) is None
    assert one_class_only(torch.tensor([100, 0]), torch.tensor([100, 0]), names) is None  # there is no other
