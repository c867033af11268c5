"""A denoiser becomes a segmenter: its weights are copied, or its features classified."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.segmentation.features import NOISE_SEED, FeatureClassifier
from unet_diffusion.segmentation.transfer import load_denoiser_weights

SMALL = {"in_channels": 1, "channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "epsilon"}


def denoiser(**options) -> Denoiser:
    torch.manual_seed(1)
    unet = DenoiserUNet(**{**SMALL, **options}).eval()
    for parameter in unet.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Denoiser(unet=unet, schedule=NoiseSchedule(**SCHEDULE), sample_shape=(1, 8, 8))


def classifier(**options) -> FeatureClassifier:
    torch.manual_seed(2)
    unet = DenoiserUNet(**SMALL)
    return FeatureClassifier(
        unet, NoiseSchedule(**SCHEDULE), **{"levels": [0, 1], "hidden_channels": [6, 5], **options}
    )


def test_all_but_the_head_is_copied():
    segmenter, trained = DenoiserUNet(**SMALL, out_channels=3), denoiser()
    head = {name: value.clone() for name, value in segmenter.state_dict().items() if name.startswith("conv_out.")}
    load_denoiser_weights(segmenter, trained)
    for name, value in segmenter.state_dict().items():
        expected = head[name] if name in head else trained.unet.state_dict()[name]
        assert torch.equal(value, expected), name


def test_denoiser_with_classes_gives_all_but_their_embedding():
    segmenter, trained = DenoiserUNet(**SMALL, out_channels=3), denoiser(num_class_embeds=4)
    report = load_denoiser_weights(segmenter, trained)
    assert report.endswith("not copied: class_embedding.weight, conv_out.bias, conv_out.weight")


def test_report_names_what_was_and_was_not_copied():
    report = load_denoiser_weights(DenoiserUNet(**SMALL, out_channels=3), denoiser())
    assert (
        "weights of the denoiser; new in the segmenter: conv_out.bias, conv_out.weight; not copied: conv_out" in report
    )


def test_maps_before_the_head_are_the_denoisers():
    segmenter, trained = DenoiserUNet(**SMALL, out_channels=3).eval(), denoiser()
    load_denoiser_weights(segmenter, trained)
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([0])
    torch.testing.assert_close(segmenter.wire(x, segmenter.embed(t)), trained.unet.wire(x, trained.unet.embed(t)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"channels": [16, 16]}, "tensors differ, such as conv_in.bias: 8 in the denoiser, 16 in the segmenter"),
        ({"layers_per_block": 2}, "none in the denoiser"),
        ({"in_channels": 3}, "conv_in.weight: 8x1x3x3 in the denoiser, 8x3x3x3 in the segmenter"),
    ],
)
def test_another_network_is_refused_and_left_as_it_was(options, named):
    segmenter = DenoiserUNet(**{**SMALL, "out_channels": 3, **options})
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    with pytest.raises(ValueError, match=named):
        load_denoiser_weights(segmenter, denoiser())
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())


def test_classifier_copies_the_whole_denoiser_and_refuses_another_schedule():
    network, trained = classifier(), denoiser()
    assert "frozen" in load_denoiser_weights(network, trained)
    for name, value in network.denoiser.state_dict().items():
        assert torch.equal(value, trained.unet.state_dict()[name])
    trained.schedule = NoiseSchedule(**{**SCHEDULE, "prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match="the schedule must be the denoiser's"):
        load_denoiser_weights(network, trained)


def test_maps_are_what_the_expanding_path_makes_of_the_noised_image():
    network = classifier().eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([50, 50])
    noise = torch.randn(1, 8, 8, generator=keyed_generator(NOISE_SEED))
    unet, schedule = network.denoiser, network.schedule
    x_t = schedule.add_noise(x, noise.expand_as(x), t)
    tops = []
    hook = unet.conv_norm_out.register_forward_hook(lambda module, args, output: tops.append(args[0]))
    unet(x_t, t)
    hook.remove()
    finest, coarse = network.maps(x, 50)
    torch.testing.assert_close(finest, tops[0])  # the map that the head is given
    assert coarse.shape == (2, 16, 4, 4)


@pytest.mark.parametrize("upsampling", ["transposed", "bilinear"])
def test_maps_of_the_2015_network_are_what_its_levels_give(upsampling):
    torch.manual_seed(5)
    unet = SegmentationUNet(1, 1, channels=[8, 16, 16], padding="same", timestep_embedding=True, upsampling=upsampling)
    schedule = NoiseSchedule(**SCHEDULE)
    network = FeatureClassifier(unet, schedule, levels=[0, 1], timesteps=[50], hidden_channels=[6, 5]).eval()
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([50, 50])
    noise = torch.randn(1, 16, 16, generator=keyed_generator(NOISE_SEED))
    x_t = schedule.add_noise(x, noise.expand_as(x), t)
    finest, coarse = network.maps(x, 50)
    torch.testing.assert_close(unet.conv_out(finest), unet(x_t, t))  # of the finest the head makes the prediction
    torch.testing.assert_close(unet.up_blocks[1](coarse, [unet.conv_in(x_t)], unet.embed(t), None), finest)
    assert network(x).shape == (2, 2, 16, 16)
    built = type(network)(
        SegmentationUNet(**network.config["denoiser"]["init_args"]), schedule, levels=[0, 1], timesteps=[50],
        hidden_channels=[6, 5],
    )  # fmt: skip
    built.load_state_dict(network.state_dict())
    assert network.config["denoiser"]["class_path"].endswith("segmentation_unet.SegmentationUNet")


@pytest.mark.parametrize("options", [{"padding": "same"}, {"timestep_embedding": True}])
def test_2015_network_that_cannot_denoise_is_refused(options):
    unet = SegmentationUNet(1, 1, channels=[8, 16], **options)
    with pytest.raises(ValueError, match="must take a timestep and keep height and width; set its timestep_embedding"):
        FeatureClassifier(unet, NoiseSchedule(**SCHEDULE), levels=[0])


def test_first_layer_before_enlarging_is_the_papers_on_the_enlarged_maps():
    network = classifier(timesteps=[50, 150]).eval()
    for norm, _ in network.projections:
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 1, 8, 8)
    maps = [features for t in (50, 150) for features in network.maps(x, t)]
    scaled = [norm(features) for (norm, _), features in zip(network.projections, maps, strict=True)]
    enlarged = torch.cat([F.interpolate(features, size=(8, 8), mode="bilinear") for features in scaled], dim=1)
    weight = torch.cat([conv.weight for _, conv in network.projections], dim=1)
    bias = torch.stack([conv.bias for _, conv in network.projections]).sum(dim=0)
    expected = network.classifier(F.conv2d(enlarged, weight, bias))
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_only_the_classifier_is_trained():
    network = classifier().train()
    assert not network.denoiser.training
    network(torch.randn(2, 1, 8, 8)).sum().backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in network.named_parameters() if not name.startswith("denoiser.")}


def test_prediction_repeats():
    network, x = classifier().eval(), torch.randn(1, 1, 8, 8)
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": [1000]}, "timesteps must be in \\[0, 1000\\), got \\[1000\\]"),
        ({"levels": [2]}, "levels must be in \\[0, 2\\), got \\[2\\]"),
        ({"levels": []}, "levels must be in"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options)


MEMORY = """
import resource, torch
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.segmentation.features import FeatureClassifier
from unet_diffusion.segmentation.losses import weighted_cross_entropy
from unet_diffusion.models.denoiser_unet import DenoiserUNet
unet = DenoiserUNet(3, [32, 64, 128, 256], layers_per_block=1, mid_attention=False, norm_num_groups=8)
network = FeatureClassifier(unet, NoiseSchedule(1000, "linear")).train()
optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
images = torch.randint(256, (50, 3, 128, 128), dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for batch in images.split(4)[:3]:
    x = batch.float() / 127.5 - 1
    loss = weighted_cross_entropy(network(x), (x[:, 0] > 0).long(), torch.ones(x[:, 0].shape))
    loss.backward()
    optimizer.step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024**2)
"""


@pytest.mark.slow
def test_training_on_50_images_of_256_x_256_needs_less_than_4_gib():
    """Four times what 128 x 128 take: three of the 13 batches, and ten more that add what the third did."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    _, second, third = map(float, done.stdout.split())
    assert 4 * (third + 10 * (third - second)) < 2.5, done.stdout  # beside torch and the network
