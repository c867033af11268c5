"""Samples are evaluated in training, and the checkpoint of the best is kept."""

import csv
import functools

import pytest
import torch

from unet_diffusion.data import Digits, ImageDataModule
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.evaluation import own_features
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.training import DiffusionModule
from unet_diffusion.training import evaluating as training
from unet_diffusion.training.checkpointing import RunCheckpoint
from unet_diffusion.training.evaluating import EvaluateSamples


@pytest.fixture
def few_steps(monkeypatch):
    """Of the features' network; training here is so short that evaluations take all of its time."""
    monkeypatch.setitem(own_features.SETTINGS, "num_steps", 3)
    monkeypatch.setattr(training, "MOST_SHARE", 1.0)


def tiny_module(**options) -> DiffusionModule:
    torch.manual_seed(0)
    unet = DenoiserUNet(1, [8], layers_per_block=1, attention_levels=[], mid_attention=False, norm_num_groups=8)
    options = {"optimizer": functools.partial(torch.optim.AdamW, lr=1.0e-3), "ema_decay": 0.5, **options}
    return DiffusionModule(unet, NoiseSchedule(100, "squaredcos_cap_v2", prediction_type="v_prediction"), **options)


def evaluation(every_n_steps=2, **options) -> EvaluateSamples:
    return EvaluateSamples(every_n_steps, **{"num_images": 12, "num_inference_steps": 2, **options})


def test_figures_are_logged_at_their_steps_and_not_at_others(quiet_trainer, few_steps):
    evaluate = evaluation()
    trainer = quiet_trainer(max_steps=5, callbacks=[evaluate], limit_val_batches=0)
    trainer.fit(tiny_module(), ImageDataModule(Digits(), batch_size=16))
    assert evaluate.evaluated_at == 4
    assert set(training.EVALUATED) <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["eval/fd"] > 0


def test_batches_that_are_accumulated_are_no_steps_of_their_own(quiet_trainer, few_steps, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(
        EvaluateSamples, "_evaluated", lambda self, trainer, module: steps.append(trainer.global_step) or {}
    )

    def train(max_steps, **options):
        trainer = quiet_trainer(
            max_steps=max_steps, callbacks=[evaluation()], limit_val_batches=0, accumulate_grad_batches=2
        )
        trainer.fit(tiny_module(), ImageDataModule(Digits(), batch_size=16), **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")

    train(2)
    assert steps == [2]  # and not 0, of an untrained network
    train(4, ckpt_path=tmp_path / "last.ckpt")
    assert steps == [2, 4]


def test_evaluating_changes_nothing_of_the_training(quiet_trainer, few_steps):
    def weights(callbacks) -> list[torch.Tensor]:
        module = tiny_module()
        quiet_trainer(max_steps=4, callbacks=callbacks, limit_val_batches=0).fit(
            module, ImageDataModule(Digits(), batch_size=16)
        )
        return [parameter.detach().clone() for parameter in module.parameters()]

    for ours, theirs in zip(weights([evaluation()]), weights([]), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpoint_of_the_best_figure_is_kept(quiet_trainer, few_steps, tmp_path, monkeypatch):
    figures = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(
        EvaluateSamples, "_evaluated", lambda self, trainer, module: {"eval/fd": next(figures), "eval/kid": 0.0}
    )
    checkpoint = RunCheckpoint(dirpath=tmp_path, monitor="eval/fd", save_top_k=1, save_last=True, filename="{step}")
    trainer = quiet_trainer(
        max_steps=6, callbacks=[evaluation(), checkpoint], limit_val_batches=0, enable_checkpointing=True
    )
    trainer.fit(tiny_module(), ImageDataModule(Digits(), batch_size=16))
    assert (tmp_path / "step=4.ckpt").exists()
    assert sorted(path.name for path in tmp_path.glob("step*.ckpt")) == ["step=4.ckpt"]


def test_evaluations_that_take_too_long_are_left_out(quiet_trainer, few_steps, monkeypatch):
    monkeypatch.setattr(training, "MOST_SHARE", 0.0)
    evaluate = evaluation()
    trainer = quiet_trainer(max_steps=6, callbacks=[evaluate], limit_val_batches=0)
    trainer.fit(tiny_module(), ImageDataModule(Digits(), batch_size=16))
    assert evaluate.evaluated_at == 2  # the first one: nothing was spent before


def test_too_few_samples_are_refused_before_training(quiet_trainer):
    trainer = quiet_trainer(max_steps=1, callbacks=[evaluation(num_images=2)], limit_val_batches=0)
    with pytest.raises(ValueError, match=r"evaluate.num_images must be at least 10, got 2"):
        trainer.fit(tiny_module(), ImageDataModule(Digits(), batch_size=16))


def test_scheduler_that_cannot_clip_is_refused_before_training(quiet_trainer):
    evaluate = evaluation(scheduler="EulerDiscreteScheduler", thresholding=True)
    with pytest.raises(ValueError, match="thresholding needs a scheduler that can clip x0, got EulerDiscreteScheduler"):
        quiet_trainer(max_steps=1, callbacks=[evaluate]).fit(tiny_module(), ImageDataModule(Digits(), batch_size=16))


@pytest.mark.slow
def test_fit_evaluates_and_keeps_the_best(tmp_path, few_steps):
    from unet_diffusion.commands.main import main

    words = [
        "fit",
        "--config",
        "digits",
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
        "--trainer.max_steps",
        "4",
    ]
    words += ["--evaluate.every_n_steps", "2", "--evaluate.num_images", "12", "--checkpoint.monitor", "eval/fd"]
    words += ["--model.unet.init_args.channels", "[8]", "--model.unet.init_args.attention_levels", "[]"]
    words += ["--model.unet.init_args.norm_num_groups", "8", "--samples.num_images", "4", "--model.speed", "plain"]
    assert main(words) == 0
    (log,) = (tmp_path / "run").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(log.open()) if row.get("eval/fd")]
    assert [int(row["step"]) for row in rows] == [2, 4]
    assert list((tmp_path / "run" / "evaluation").glob("features-*.safetensors"))
