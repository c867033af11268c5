import functools

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from unet_diffusion.diffusion.guidance import Guidance
from unet_diffusion.diffusion.sampling import check_sampling, sample
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.training import SampleGrid
from unet_diffusion.training.callbacks import ALWAYS_DRAWS

TWO_CLASSES = {"num_class_embeds": 3, "label_dropout": 0.2}
GRID_SIZE = (2 * 66 + 2, 3 * 66 + 2)  # a column a class, 6 images: 8 pixels shown as 64, 2 between and around them


@pytest.fixture
def fit_with_grid(tiny_module, tiny_images, quiet_trainer):
    """Trains 4 steps of two classes with this sample grid."""

    def fit(grid, max_steps=4, module=None, data=None, **trainer_options):
        trainer = quiet_trainer(max_steps=max_steps, callbacks=[grid], **trainer_options)
        trainer.fit(module or tiny_module(**TWO_CLASSES), data or tiny_images())
        return trainer

    return fit


def tiny_grid(every_n_steps=2, **options) -> SampleGrid:
    return SampleGrid(every_n_steps, **{"num_images": 6, "num_inference_steps": 2, **options})


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_grids_are_written_every_so_often_and_at_the_end(fit_with_grid, tmp_path):
    fit_with_grid(tiny_grid(), max_steps=5)
    assert files(tmp_path) == ["samples.png", "samples/step_0000002.png", "samples/step_0000004.png"]


def test_grid_is_a_png_with_a_column_a_class(fit_with_grid, tmp_path):
    fit_with_grid(tiny_grid())
    with Image.open(tmp_path / "samples.png") as picture:
        assert (picture.format, picture.size) == ("PNG", GRID_SIZE)


def test_grid_at_the_end_is_that_of_the_last_step(fit_with_grid, tmp_path):
    fit_with_grid(tiny_grid())
    assert (tmp_path / "samples.png").read_bytes() == (tmp_path / "samples" / "step_0000004.png").read_bytes()


def test_grid_at_the_end_is_a_new_one_if_steps_came_after_the_last(fit_with_grid, shown):
    fit_with_grid(tiny_grid(), max_steps=5)
    assert len(shown) == 3


def test_grid_without_classes_is_about_square(fit_with_grid, tiny_module, tiny_images, tmp_path):
    fit_with_grid(tiny_grid(), module=tiny_module(), data=tiny_images(class_names=None))
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (3 * 66 + 2, 2 * 66 + 2)


def test_every_0_steps_writes_one_grid_at_the_end(fit_with_grid, tmp_path):
    fit_with_grid(tiny_grid(every_n_steps=0))
    assert files(tmp_path) == ["samples.png"]


@pytest.fixture
def shown(monkeypatch):
    """The images of each grid that is drawn."""
    grids = []

    draw = SampleGrid.sample

    def drawn(self, *arguments):
        images, seen = draw(self, *arguments)
        grids.append(images)
        return images, seen

    monkeypatch.setattr(SampleGrid, "sample", drawn)
    return grids


def test_grid_shows_the_averaged_network(fit_with_grid, tiny_module, shown):
    module = tiny_module(**TWO_CLASSES, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    fit_with_grid(tiny_grid(every_n_steps=0, scheduler="DDIMScheduler", seed=3), module=module)
    options = {"num_inference_steps": 2, "seed": 3, "inputs": {"labels": torch.arange(6) % 2}}
    averaged, raw = (sample(unet, module.schedule, (6, 1, 8, 8), **options) for unet in (module.ema_unet, module.unet))
    torch.testing.assert_close(shown, [averaged], rtol=0, atol=0)
    assert not torch.allclose(averaged, raw, atol=1e-3)


def test_grids_of_a_network_that_does_not_change_are_the_same(fit_with_grid, tiny_module, shown):
    fit_with_grid(tiny_grid(), module=tiny_module(**TWO_CLASSES, optimizer=functools.partial(torch.optim.SGD, lr=0.0)))
    torch.testing.assert_close(shown, [shown[0]] * 2, rtol=0, atol=1e-5)  # the average of equal weights is rounded


def test_grid_keeps_pixels_in_their_range(fit_with_grid, tiny_module, shown):
    module = tiny_module(**TWO_CLASSES)
    options = {"scheduler": "UniPCMultistepScheduler", "thresholding": True}
    fit_with_grid(tiny_grid(every_n_steps=0, **options), module=module)
    options |= {"num_inference_steps": 2, "inputs": {"labels": torch.arange(6) % 2}}
    expected = sample(module.ema_unet, module.schedule, (6, 1, 8, 8), **options)
    torch.testing.assert_close(shown, [expected], rtol=0, atol=0)
    plain = sample(module.ema_unet, module.schedule, (6, 1, 8, 8), **{**options, "thresholding": False})
    assert (expected - plain).abs().max() > 1e-2


def test_grid_with_a_scheduler_that_cannot_clip_is_refused_before_training(fit_with_grid):
    grid = tiny_grid(scheduler="EulerDiscreteScheduler", thresholding=True)
    with pytest.raises(ValueError, match="thresholding needs a scheduler that can clip x0, got EulerDiscreteScheduler"):
        fit_with_grid(grid)


def test_grid_follows_guidance(fit_with_grid, tiny_module, shown):
    module = tiny_module(**TWO_CLASSES)
    fit_with_grid(tiny_grid(every_n_steps=0, scheduler="DDIMScheduler", guidance_scale=3.0), module=module)
    inputs, unconditional = ({"labels": one} for one in (torch.arange(6) % 2, torch.full((6,), 2)))
    options = {"num_inference_steps": 2, "inputs": inputs, "unconditional": unconditional, "guidance": Guidance(3.0)}
    torch.testing.assert_close(
        shown, [sample(module.ema_unet, module.schedule, (6, 1, 8, 8), **options)], rtol=0, atol=0
    )


def test_grid_is_drawn_once_a_step_under_accumulation(fit_with_grid, shown):
    fit_with_grid(tiny_grid(), accumulate_grad_batches=2)
    assert len(shown) == 2  # at steps 2 and 4; samples.png is the last of them


def test_drawing_does_not_change_training(fit_with_grid, tiny_module):
    modules = [tiny_module(**TWO_CLASSES) for _ in range(2)]
    for module, every_n_steps in zip(modules, (1, 0), strict=True):
        fit_with_grid(tiny_grid(every_n_steps), module=module)
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict(), rtol=0, atol=0)


def test_fast_dev_run_writes_nothing(fit_with_grid, tmp_path):
    fit_with_grid(tiny_grid(every_n_steps=1), fast_dev_run=2)
    assert files(tmp_path) == []


def test_tensorboard_gets_each_grid(fit_with_grid, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit_with_grid(tiny_grid(), logger=TensorBoardLogger(tmp_path, name="tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "version_0"), size_guidance={"images": 0}).Reload()
    logged = events.Images("samples")
    assert [image.step for image in logged] == [2, 4]
    assert {(image.width, image.height) for image in logged} == {GRID_SIZE}


def test_wandb_gets_each_grid_offline(fit_with_grid, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="tiny", save_dir=str(tmp_path), offline=True)
    fit_with_grid(tiny_grid(), logger=logger)
    wandb.finish()
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media/images")
    pictures = sorted(media.glob("samples_*.png"))
    assert len(pictures) == 2
    expected = np.asarray(Image.open(tmp_path / "samples.png"))
    assert any(np.array_equal(np.asarray(Image.open(path)), expected) for path in pictures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "Euler"}, "scheduler must be one of .*got 'Euler'"),
        ({"scheduler": "EDMEulerScheduler"}, "EDMEulerScheduler cannot sample this model"),
        (
            {"num_inference_steps": 101},
            r"num_inference_steps must be in \[1, num_train_timesteps\] = \[1, 100\], got 101",
        ),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_training(fit_with_grid, tiny_module, options, message):
    module = tiny_module(**TWO_CLASSES)
    with pytest.raises(ValueError, match=message):
        fit_with_grid(tiny_grid(**options), module=module)
    assert module.trainer.global_step == 0


def test_guidance_without_null_label_is_refused_before_training(fit_with_grid, tiny_module):
    module = tiny_module(num_class_embeds=2)
    with pytest.raises(
        ValueError, match=r"guidance_scale 2\.0 needs a condition with a null; set model\.label_dropout"
    ):
        fit_with_grid(tiny_grid(guidance_scale=2.0), module=module)
    assert module.trainer.global_step == 0


KINDS = [("epsilon", False), ("v_prediction", True), ("sample", True)]


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("prediction_type", "zero_snr"), KINDS)
def test_what_is_not_checked_before_training_can_always_be_sampled(beta_schedule, prediction_type, zero_snr):
    schedule = NoiseSchedule(
        beta_schedule=beta_schedule, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr
    )
    for scheduler, num_steps, num_train_timesteps in ALWAYS_DRAWS:
        assert num_train_timesteps == schedule.num_train_timesteps
        check_sampling(schedule, (1, 1, 1, 1), scheduler=scheduler, num_inference_steps=num_steps)
