import csv
import shutil
from collections import namedtuple
from functools import partial

import pytest
import torch

from unet_diffusion.data import SegmentationDataModule, SyntheticCells
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.models.discriminator import PatchDiscriminator
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.runtime.pictures import save_images
from unet_diffusion.segmentation.labels import Targets
from unet_diffusion.training import AutoencoderModule, SegmentationModule, health
from unet_diffusion.training.adversarial import AdversarialLoss
from unet_diffusion.training.checkpointing import num_bytes
from unet_diffusion.training.health import SkipBadSteps


class Spoilt(torch.nn.Module):
    """Makes the loss of some batches infinite, by their number."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.count = numbers, 0

    def forward(self, module, inputs):
        self.count += 1
        return (inputs[0] * (torch.inf if self.count in self.numbers else 1.0), *inputs[1:])


def fitted(tiny_module, tiny_images, quiet_trainer, bad_steps, *, fused, **options):
    """The module after 6 steps, with those steps' inputs spoilt; only calls of the trained network are counted."""
    module = tiny_module(optimizer=partial(torch.optim.AdamW, lr=1.0e-3, fused=fused), **options)
    module.unet.register_forward_pre_hook(Spoilt(bad_steps))
    watch = SkipBadSteps()
    trainer = quiet_trainer(max_steps=6, limit_val_batches=0, callbacks=[watch], log_every_n_steps=1)
    trainer.fit(module, tiny_images())
    return module, trainer


@pytest.mark.parametrize("fused", [True, False])
def test_step_with_infinite_gradients_changes_no_weight_and_no_moment(tiny_module, tiny_images, quiet_trainer, fused):
    straight, before = fitted(tiny_module, tiny_images, quiet_trainer, [], fused=fused)
    with pytest.warns(UserWarning, match="1 of the steps to 6 were skipped"):
        module, trainer = fitted(tiny_module, tiny_images, quiet_trainer, [6], fused=fused)
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert before.callback_metrics["train/skipped_steps"] == 0
    # The last of six steps was skipped: what is left are five.
    five = tiny_module(optimizer=partial(torch.optim.AdamW, lr=1.0e-3, fused=fused))
    other = quiet_trainer(max_steps=5, limit_val_batches=0)
    other.fit(five, tiny_images())
    for name, weight in module.unet.state_dict().items():
        torch.testing.assert_close(weight, five.unet.state_dict()[name], rtol=0, atol=0)
    assert not torch.equal(module.unet.conv_in.weight, straight.unet.conv_in.weight)
    for one, same in zip(*(t.optimizers[0].state_dict()["state"].values() for t in (trainer, other)), strict=True):
        torch.testing.assert_close(one, same, rtol=0, atol=0)


def test_training_goes_on_after_a_skipped_step(tiny_module, tiny_images, quiet_trainer):
    with pytest.warns(UserWarning, match="1 of the steps to 2 were skipped"):
        module, _ = fitted(tiny_module, tiny_images, quiet_trainer, [2], fused=True)
    assert all(weight.isfinite().all() for weight in module.state_dict().values())


def test_run_of_bad_steps_between_two_logged_ones_ends_too(tiny_module, tiny_images, quiet_trainer, monkeypatch):
    monkeypatch.setattr(health, "MAX_BAD_STEPS", 3)
    module = tiny_module()
    module.unet.register_forward_pre_hook(Spoilt([1, 2, 3]))
    trainer = quiet_trainer(max_steps=6, limit_val_batches=0, callbacks=[SkipBadSteps()], log_every_n_steps=5)
    with pytest.warns(UserWarning, match="3 of the steps to 5"), pytest.raises(RuntimeError, match="3 steps in a row"):
        trainer.fit(module, tiny_images())


def test_bad_steps_with_good_ones_between_do_not_end_a_run(tiny_module, tiny_images, quiet_trainer, monkeypatch):
    monkeypatch.setattr(health, "MAX_BAD_STEPS", 3)
    module = tiny_module()
    module.unet.register_forward_pre_hook(Spoilt([1, 2, 4, 5]))
    trainer = quiet_trainer(max_steps=7, limit_val_batches=0, callbacks=[SkipBadSteps()], log_every_n_steps=7)
    with pytest.warns(UserWarning, match="4 of the steps to 7 were skipped"):
        trainer.fit(module, tiny_images())
    assert trainer.global_step == 7


def test_skipped_steps_are_counted_over_the_whole_run(tiny_module, tiny_images, quiet_trainer, tmp_path):
    with pytest.warns(UserWarning, match="1 of the steps to 2 were skipped"):
        _, trainer = fitted(tiny_module, tiny_images, quiet_trainer, [2], fused=True)
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    longer = quiet_trainer(max_steps=8, limit_val_batches=0, callbacks=[SkipBadSteps()], log_every_n_steps=1)
    longer.fit(tiny_module(), tiny_images(), ckpt_path=tmp_path / "six.ckpt", weights_only=True)
    assert longer.callback_metrics["train/skipped_steps"] == 1


def test_statistics_of_batch_norms_outlive_a_bad_batch(quiet_trainer):
    def trained(num_steps, bad_steps):
        torch.manual_seed(0)
        module = SegmentationModule(SegmentationUNet(1, 2, channels=(4, 8), padding="same", norm="batch"))
        module.unet.register_forward_pre_hook(Spoilt(bad_steps))
        targets = Targets(label_format="instances")
        data = SegmentationDataModule(SyntheticCells(num_images=5), targets, window_size=32, batch_size=2, num_val=2)
        quiet_trainer(max_steps=num_steps, limit_val_batches=0, callbacks=[SkipBadSteps()]).fit(module, data)
        return dict(module.named_buffers())

    expected, spoilt = trained(3, []), trained(4, [4])
    for name, value in spoilt.items():
        if value.is_floating_point():  # the batch itself is counted
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_bad_step_of_a_discriminator_is_left_out(quiet_trainer, tiny_images):
    sizes = {"layers_per_block": 1, "norm_num_groups": 4, "mid_attention": False}
    critic = PatchDiscriminator(1, channels=32, num_layers=1)
    module = AutoencoderModule(
        kl_autoencoder(1, (8, 8), latent_channels=2, **sizes), adversarial=AdversarialLoss(critic)
    )
    critic.register_forward_pre_hook(Spoilt([5]))  # of the three calls in each step: the second's images
    trainer = quiet_trainer(max_steps=3, limit_val_batches=0, callbacks=[SkipBadSteps()], log_every_n_steps=1)
    with pytest.warns(UserWarning, match="1 of the steps to 2 were skipped"):
        trainer.fit(module, tiny_images(shape=(1, 16, 16)))
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert all(weight.isfinite().all() for weight in critic.parameters())


def test_run_of_bad_steps_ends_and_keeps_the_batch(tiny_digits, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "MAX_BAD_STEPS", 3)
    monkeypatch.setattr("unet_diffusion.data.source.in_unit_range", lambda images: images.float() * torch.nan)
    run = tmp_path / "run"
    arguments = ["--trainer.default_root_dir", run, "--trainer.limit_val_batches", 0, "--samples.every_n_steps", 0]
    with pytest.warns(UserWarning, match="of the steps to 1 were skipped"):
        status, _, err = run_cli("fit", *tiny_digits, *arguments)
    assert status == 1
    assert "the gradients of 3 steps in a row, up to about step 3, were not finite" in err
    kept = torch.load(run / "bad_batch_0.pt", weights_only=True)
    assert kept["step"] == 3
    assert kept["images"].shape == (32, 1, 8, 8)
    assert kept["images"].isnan().all()
    with open(run / "logs" / "version_0" / "metrics.csv") as file:
        counts = [row["train/skipped_steps"] for row in csv.DictReader(file) if row["train/skipped_steps"]]
    assert counts == ["1.0", "2.0"]
    assert all(one.isfinite().all() for one in torch.load(run / "checkpoints" / "last.ckpt")["state_dict"].values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "real"])
def test_out_of_memory_says_the_batch_size_and_what_to_change(tiny_digits, run_cli, tmp_path, monkeypatch, error):
    def step(module, batch, batch_idx):
        if error == "real":
            torch.empty(2**50)  # a pebibyte
        raise error

    monkeypatch.setattr("unet_diffusion.training.module.DiffusionModule.training_step", step)
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 1
    assert "out of memory (" in err
    assert "lower data.batch_size from 32 to 16, and set trainer.accumulate_grad_batches to 2" in err


def test_autoencoder_out_of_memory_is_not_told_to_accumulate_batches(small_recipes, run_cli, tmp_path, monkeypatch):
    def step(module, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")

    monkeypatch.setattr(AutoencoderModule, "training_step", step)
    save_images(torch.rand(16, 3, 32, 32) * 2 - 1, tmp_path / "images")
    images = ["--data.root", tmp_path / "images"]
    root = ["--trainer.default_root_dir", tmp_path / "run"]
    status, _, err = run_cli("fit", "--config", small_recipes[0], *images, *root)
    assert status == 1
    assert "lower data.batch_size from 4 to 2" in err
    assert "accumulate_grad_batches" not in err  # Lightning refuses it, as the module steps by itself


def test_too_little_disk_is_said_before_training(tiny_digits, run_cli, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100_000))
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 1
    assert "MiB are free; make room, or choose a --trainer.default_root_dir on another disk" in err
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_room_that_is_asked_for_is_that_of_a_checkpoint(tiny_module, tiny_images, quiet_trainer, tmp_path):
    module = tiny_module(unet=None)
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(module, tiny_images())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    tensors = torch.load(tmp_path / "one.ckpt", weights_only=True)
    moments = [value for state in tensors["optimizer_states"][0]["state"].values() for value in state.values()]
    size = sum(value.numel() * value.element_size() for value in [*tensors["state_dict"].values(), *moments])
    assert num_bytes(module) == pytest.approx(size, rel=0.01)
