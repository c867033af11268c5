"""Guidance against its algebra by hand, and labels dropped against their probability."""

import pytest
import torch

from unet_diffusion.conditioning import drop_labels, guide

NULL = 10


class Recorder:
    """A denoiser whose prediction is 100 * label + t + x, and that keeps its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels):
        self.calls.append((x, t, labels))
        offset = t.to(x.dtype) + (0 if labels is None else 100 * labels)
        return x + offset.view(-1, 1, 1, 1)


def arguments():
    x = torch.arange(8.0).view(2, 1, 2, 2)
    return x, torch.tensor([5, 7]), torch.tensor([1, 3])


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 2.0, 7.5])
def test_guided_prediction_is_the_hand_computed_combination(guidance_scale):
    x, t, labels = arguments()
    prediction = guide(Recorder(), labels, null_label=NULL, guidance_scale=guidance_scale)(x, t)
    for image, step, label, result in zip(x, t, labels, prediction, strict=True):
        cond, uncond = image + step + 100 * label, image + step + 100 * NULL
        torch.testing.assert_close(result, uncond + guidance_scale * (cond - uncond))


def test_guidance_is_one_doubled_batch_with_the_labelled_half_first():
    x, t, labels = arguments()
    denoiser = Recorder()
    guide(denoiser, labels, null_label=NULL, guidance_scale=3.0)(x, t)
    assert len(denoiser.calls) == 1
    seen_x, seen_t, seen_labels = denoiser.calls[0]
    assert torch.equal(seen_x, torch.cat([x, x]))
    assert seen_t.tolist() == [5, 7, 5, 7]
    assert seen_labels.tolist() == [1, 3, NULL, NULL]


@pytest.mark.parametrize("labels", [None, torch.tensor([1, 3])])
def test_scale_one_is_a_single_pass(labels):
    x, t, _ = arguments()
    denoiser = Recorder()
    prediction = guide(denoiser, labels, null_label=NULL, guidance_scale=1.0)(x, t)
    assert len(denoiser.calls) == 1
    assert denoiser.calls[0][0] is x
    assert denoiser.calls[0][2] is labels
    assert torch.equal(prediction, Recorder()(x, t, labels))


def test_predictions_in_bfloat16_are_combined_in_float32():
    x, t, labels = arguments()
    x = x / 7

    def denoiser(x, t, labels):
        return Recorder()(x, 0 * t, labels / 1000).bfloat16()

    prediction = guide(denoiser, labels, null_label=NULL, guidance_scale=4.0)(x, t)
    cond = denoiser(x, t, labels).float()
    uncond = denoiser(x, t, torch.full_like(labels, NULL)).float()
    assert torch.equal(prediction, uncond + 4 * (cond - uncond))


def test_guidance_without_labels_or_null_label_is_refused():
    with pytest.raises(ValueError, match=r"must be 1 without labels, got 2\.0"):
        guide(Recorder(), None, null_label=NULL, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"must be 1 without a null label, got 2\.0"):
        guide(Recorder(), torch.tensor([0]), null_label=None, guidance_scale=2.0)


def test_labels_are_dropped_with_the_probability_asked_for():
    labels = torch.arange(10).repeat(2000)
    dropped = drop_labels(labels, NULL, 0.2, torch.Generator().manual_seed(0))
    share = (dropped == NULL).float().view(2000, 10).mean(dim=0)
    assert share.mean() == pytest.approx(0.2, abs=0.012)  # 20000 draws: four standard errors are 0.011
    assert (share - 0.2).abs().max() < 0.04  # whatever the class
    assert torch.equal(dropped[dropped != NULL], labels[dropped != NULL])


def test_no_label_is_dropped_at_zero_and_every_one_at_one():
    labels = torch.arange(10)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(drop_labels(labels, NULL, 0.0, generator), labels)
    assert torch.equal(drop_labels(labels, NULL, 1.0, generator), torch.full_like(labels, NULL))
    assert torch.equal(labels, torch.arange(10))


def test_same_generator_state_drops_the_same_labels():
    labels = torch.arange(100)
    first, second = (drop_labels(labels, 100, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_dropout_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1\.5"):
        drop_labels(torch.arange(3), NULL, 1.5, torch.Generator())
