"""What a run takes: its lines have the numbers, and too little memory or disk is a warning."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from plans import plan

from unet_diffusion.checks.plan import (
    Disk,
    Measured,
    in_bytes,
    in_time,
    plan_facts,
    plan_findings,
    refuse_little_memory,
)
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.segmentation.features import FeatureClassifier
from unet_diffusion.training import SegmentationModule
from unet_diffusion.training.planning import plan_of
from unet_diffusion.training.timing import num_batches

GIB = 2**30
MEASURED = Measured(0.5, 10.0, 20, used_bytes=2 * GIB, free_bytes=4 * GIB, where="of the GPU")
DISK = Disk(checkpoint_bytes=GIB, num_kept=3, free_bytes=10 * GIB)


def test_state_is_weights_averages_gradients_and_moments():
    assert plan().state_bytes == 4 * 5 * 1_000_000
    half_frozen = plan(num_parameters=2_000_000, num_moments=1)
    assert half_frozen.state_bytes == 4 * (2 + 1 + 1 + 1) * 1_000_000


def test_frozen_weights_are_counted_once():
    denoiser = DenoiserUNet(1, [8, 16], layers_per_block=1, norm_num_groups=4)
    num_frozen = sum(parameter.numel() for parameter in denoiser.parameters())
    unet = FeatureClassifier(denoiser, NoiseSchedule(), levels=[0], hidden_channels=[4, 4])
    module = SegmentationModule(unet)
    module.image_shape = (1, 32, 32)
    data = SimpleNamespace(train_indices=range(4), val_indices=range(2), batch_size=2)
    trainer = Trainer(max_steps=10, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.optimizers = module.new_optimizers()
    made = plan_of(trainer, module, data, num_processes=1)
    new = [*unet.projections.parameters(), *unet.classifier.parameters()]
    assert made.num_trained == sum(parameter.numel() for parameter in new)
    assert made.num_parameters == num_frozen + made.num_trained


@pytest.mark.parametrize(
    ("limit", "num_steps"), [({}, 24), ({"limit_train_batches": 3}, 6), ({"limit_train_batches": 0.5}, 12)]
)
def test_steps_are_those_of_epochs_as_the_trainer_limits_them(limit, num_steps):
    trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu", **limit)
    data = SimpleNamespace(train_indices=range(49), batch_size=2)
    assert num_batches(trainer, data, num_processes=2) == num_steps


def test_lines_have_duration_times_shown_memory_and_disk():
    text = "\n".join(plan_facts(plan(), MEASURED, DISK))
    for words in (
        "each image 64 times on average, 640,000 images in all",
        "memory of the GPU: 2 GiB in the steps that were tried; 4 GiB more were free",
        "500 ms a step, 10 s a validation; 2.8 h for the run",
        "3 checkpoints of 1 GiB; 10 GiB are free",
    ):
        assert words in text


def test_a_run_without_end_has_no_duration():
    text = "\n".join(plan_facts(plan(num_steps=math.inf), MEASURED))
    assert "no end" in text
    assert "for the run" not in text


def test_a_validation_that_was_not_tried_has_no_time():
    text = "\n".join(plan_facts(plan(), replace(MEASURED, val_seconds=0.0)))
    assert "500 ms a step; 2.8 h for the run" in text


def test_little_memory_and_disk_are_warnings():
    assert plan_findings(plan(), MEASURED, DISK) == []
    little = Measured(0.5, 10.0, 20, used_bytes=40 * GIB, free_bytes=GIB, where="of the GPU")
    findings = plan_findings(plan(), little, Disk(GIB, num_kept=30, free_bytes=10 * GIB))
    assert [finding.severity for finding in findings] == ["warning", "warning"]
    assert findings[0].option == "--data.batch_size 16"


def test_a_network_that_does_not_fit_in_memory_is_refused():
    refuse_little_memory(plan(), 4 * 3 * 1_000_000)
    refuse_little_memory(plan(), None)
    with pytest.raises(ValueError, match=r"11.4 MiB, and 1 MiB are free; use a network with fewer channels"):
        refuse_little_memory(plan(), 2**20)


def test_numbers_have_units_that_suit_them():
    assert [in_time(seconds) for seconds in (0.01, 30, 600, 9000, 300_000)] == [
        "10 ms",
        "30 s",
        "10 min",
        "2.5 h",
        "3.5 days",
    ]
    assert [in_bytes(number) for number in (2**20, 3 * GIB)] == ["1 MiB", "3 GiB"]
