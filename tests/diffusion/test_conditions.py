"""Guidance against its algebra by hand and against diffusers; conditions against their probabilities."""

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from unet_diffusion.diffusion.conditions.class_labels import ClassLabels
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import network_inputs, unconditional_inputs
from unet_diffusion.diffusion.guidance import Guidance, guide

NULL = 10


class Recorder:
    """A denoiser whose prediction is 100 * label + t + x, and that keeps its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels=None):
        self.calls.append((x, t, labels))
        offset = t.to(x.dtype) + (0 if labels is None else 100 * labels)
        return x + offset.view(-1, 1, 1, 1)


def arguments():
    x = torch.arange(8.0).view(2, 1, 2, 2)
    return x, torch.tensor([5, 7]), {"labels": torch.tensor([1, 3])}


NULLS = {"labels": torch.tensor([NULL, NULL])}


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_guided_prediction_is_the_hand_computed_combination(scale):
    x, t, inputs = arguments()
    prediction = guide(Recorder(), inputs, NULLS, Guidance(scale))(x, t)
    for image, step, label, result in zip(x, t, inputs["labels"], prediction, strict=True):
        cond, uncond = image + step + 100 * label, image + step + 100 * NULL
        torch.testing.assert_close(result, uncond + scale * (cond - uncond))


def test_guidance_is_one_doubled_batch_with_the_conditioned_half_first():
    x, t, inputs = arguments()
    denoiser = Recorder()
    guide(denoiser, inputs, NULLS, Guidance(3.0))(x, t)
    assert len(denoiser.calls) == 1
    seen_x, seen_t, seen_labels = denoiser.calls[0]
    assert torch.equal(seen_x, torch.cat([x, x]))
    assert seen_t.tolist() == [5, 7, 5, 7]
    assert seen_labels.tolist() == [1, 3, NULL, NULL]


@pytest.mark.parametrize("inputs", [{}, {"labels": torch.tensor([1, 3])}])
def test_scale_one_is_a_single_pass(inputs):
    x, t, _ = arguments()
    denoiser = Recorder()
    prediction = guide(denoiser, inputs, NULLS if inputs else None, Guidance())(x, t)
    assert len(denoiser.calls) == 1
    assert denoiser.calls[0][0] is x
    assert denoiser.calls[0][2] is inputs.get("labels")
    assert torch.equal(prediction, Recorder()(x, t, **inputs))


def test_predictions_in_bfloat16_are_combined_in_float32():
    x, t, inputs = arguments()
    x = x / 7

    def denoiser(x, t, labels):
        return Recorder()(x, 0 * t, labels / 1000).bfloat16()

    prediction = guide(denoiser, inputs, NULLS, Guidance(4.0))(x, t)
    cond = denoiser(x, t, **inputs).float()
    uncond = denoiser(x, t, **NULLS).float()
    assert torch.equal(prediction, uncond + 4 * (cond - uncond))


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(rescale):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    _, t, inputs = arguments()

    def denoiser(x, t, labels):
        return x.roll(1, dims=2) * labels.view(-1, 1, 1, 1)

    guided = denoiser(x, t, **NULLS) + 2 * (denoiser(x, t, **inputs) - denoiser(x, t, **NULLS))
    expected = rescale_noise_cfg(guided, denoiser(x, t, **inputs), guidance_rescale=rescale)
    torch.testing.assert_close(guide(denoiser, inputs, NULLS, Guidance(2.0, rescale))(x, t), expected)


def test_only_timesteps_of_the_interval_are_guided():
    x, t, inputs = arguments()
    prediction = guide(Recorder(), inputs, NULLS, Guidance(2.0, interval=(6, 7)))(x, t)
    whole = guide(Recorder(), inputs, NULLS, Guidance(2.0))(x, t)
    assert torch.equal(prediction[0], Recorder()(x, t, **inputs)[0])  # timestep 5
    assert torch.equal(prediction[1], whole[1])  # timestep 7


@pytest.mark.parametrize("autoguidance", [None, Recorder()])
def test_nothing_more_than_one_prediction_is_computed_outside_of_the_interval(autoguidance):
    x, t, inputs = arguments()
    denoiser = Recorder()
    prediction = guide(denoiser, inputs, NULLS, Guidance(2.0, interval=(8, 9), autoguidance=autoguidance))(x, t)
    assert [len(call[0]) for call in denoiser.calls] == [2]
    assert autoguidance is None or autoguidance.calls == []
    assert torch.equal(prediction, Recorder()(x, t, **inputs))


def test_a_weaker_denoiser_is_led_away_from_with_its_own_conditions():
    x, t, inputs = arguments()
    its_own = {"labels": torch.tensor([2, 2])}

    def autoguidance(x, t, labels):
        return 0.5 * Recorder()(x, t, labels)

    prediction = guide(Recorder(), inputs, its_own, Guidance(3.0, autoguidance=autoguidance))(x, t)
    strong, weak = Recorder()(x, t, **inputs), autoguidance(x, t, **its_own)
    torch.testing.assert_close(prediction, weak + 3 * (strong - weak))
    unconditional = guide(Recorder(), {}, None, Guidance(3.0, autoguidance=lambda x, t: 0 * x))(x, t)
    torch.testing.assert_close(unconditional, 3 * Recorder()(x, t))


@pytest.mark.parametrize(
    ("inputs", "unconditional", "guidance", "message"),
    [
        ({}, None, Guidance(2.0), r"must be 1 without conditions .*got 2\.0"),
        ({"labels": torch.tensor([0])}, None, Guidance(2.0), r"must be 1 for a network .* without dropout .*got 2\.0"),
        ({}, None, Guidance(1.0, rescale=0.5), "guidance is off"),
    ],
)
def test_guidance_with_nothing_to_guide_between_is_refused(inputs, unconditional, guidance, message):
    with pytest.raises(ValueError, match=message):
        guide(Recorder(), inputs, unconditional, guidance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rescale": 1.5}, r"\[0, 1\], got 1\.5"), ({"interval": (500, 100)}, "the lower one first, got 500 and 100")],
)
def test_guidance_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Guidance(2.0, **settings)


# ---------------------------------------------------------------------------------------------------------- conditions


def test_labels_are_dropped_with_the_probability_asked_for():
    labels = torch.arange(10).repeat(2000)
    dropped = ClassLabels(NULL + 1, NULL, 0.2).drop(labels, torch.Generator().manual_seed(0))
    share = (dropped == NULL).float().view(2000, 10).mean(dim=0)
    assert share.mean() == pytest.approx(0.2, abs=0.012)  # 20000 draws: four standard errors are 0.011
    assert (share - 0.2).abs().max() < 0.04  # whatever the class
    assert torch.equal(dropped[dropped != NULL], labels[dropped != NULL])


def test_nothing_is_dropped_and_drawn_at_zero():
    labels, generator = torch.arange(10), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(ClassLabels(100, None).drop(labels, generator), labels)
    assert torch.equal(generator.get_state(), before)


def test_same_generator_state_drops_the_same_labels():
    labels = torch.arange(100)
    first, second = (ClassLabels(101, 100, 0.5).drop(labels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_whole_maps_are_dropped_not_pixels():
    maps = torch.ones(200, 2, 4, 4)
    sums = Concat(2, dropout=0.5).drop(maps, torch.Generator().manual_seed(0)).sum(dim=(1, 2, 3))
    assert set(sums.tolist()) == {0.0, 32.0}
    assert 70 < (sums == 0).sum() < 130  # 100 +- four standard errors of 7


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(ValueError, match=r"\[0, 1\), got"):
        ClassLabels(NULL + 1, NULL, dropout)


def test_conditions_of_any_combination_enter_each_by_its_own_way():
    tokens, more = ClassTokens(8, 3), ClassTokens(8, 3)
    given = {"labels": torch.tensor([0, 2]), "concat": torch.randn(2, 5, 4, 4)}
    inputs = network_inputs([ClassLabels(4, 3, 0.1), tokens, more, Concat(5)], given)
    assert torch.equal(inputs["labels"], given["labels"])
    assert torch.equal(inputs["concat"], given["concat"])
    expected = torch.stack([tokens.embedding.weight[[0, 2]], more.embedding.weight[[0, 2]]], dim=1)
    assert torch.equal(inputs["context"], expected)  # (B, tokens, context_dim)


def test_nulls_replace_only_what_has_one():
    tokens = ClassTokens(8, 3)
    given = {"labels": torch.tensor([0, 2]), "concat": torch.randn(2, 5, 4, 4)}
    unconditional = unconditional_inputs([tokens, Concat(5)], given)
    assert torch.equal(unconditional["context"], tokens.embedding.weight[[3, 3], None])
    assert torch.equal(unconditional["concat"], given["concat"])
    assert unconditional_inputs([Concat(5)], given) is None
    assert not unconditional_inputs([Concat(5, dropout=0.1)], given)["concat"].any()


def test_each_condition_is_dropped_by_itself():
    one, other = ClassTokens(1, 1, dropout=0.5), ClassTokens(1, 1, dropout=0.5)
    with torch.no_grad():
        one.embedding.weight.copy_(torch.tensor([[1.0], [0.0]]))
        other.embedding.weight.copy_(torch.tensor([[2.0], [0.0]]))
    given = {"labels": torch.zeros(400, dtype=torch.int64)}
    inputs = network_inputs([one, other], given, generator=torch.Generator().manual_seed(0))
    counts = inputs["context"].sum(dim=(1, 2)).long().bincount(minlength=4)
    assert (counts - 100).abs().max() < 35  # neither, one, the other, both: four standard errors of 8.7


def test_what_is_not_given_is_said():
    with pytest.raises(
        ValueError, match="must hold 'labels', which the condition ClassTokens reads, and holds nothing"
    ):
        network_inputs([ClassTokens(8, 3)], {})
