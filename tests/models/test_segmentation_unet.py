"""The network of Ronneberger et al. 2015: its size, its sizes, its weights, and its other life as a denoiser."""

import math

import pytest
import torch
from torch import nn

from unet_diffusion.models.segmentation_unet import SegmentationUNet


def tiny(**options) -> SegmentationUNet:
    torch.manual_seed(0)
    return SegmentationUNet(1, 2, **{"channels": (4, 6, 8), **options}).eval()


@pytest.fixture(scope="module")
def paper() -> SegmentationUNet:
    with torch.device("meta"):
        return SegmentationUNet(1, 2, dropout=0.5)


def test_network_of_the_paper_has_its_number_of_parameters(paper):
    assert sum(parameter.numel() for parameter in paper.parameters()) == 31_030_658


def test_network_of_the_paper_has_23_convolutions(paper):
    assert sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in paper.modules()) == 23


def test_maps_have_the_sizes_of_figure_1(paper):
    seen = []
    for module in paper.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    paper(torch.empty(1, 1, 572, 572, device="meta"))
    figure = [570, 568, 282, 280, 138, 136, 66, 64, 30, 28, 54, 52, 102, 100, 198, 196, 390, 388, 388]
    assert seen == figure


def test_dropout_is_at_the_end_of_the_contracting_path_only(paper):
    rates = {name: module.p for name, module in paper.named_modules() if isinstance(module, nn.Dropout) and module.p}
    assert rates == {"down_blocks.2.double_conv.dropout": 0.5, "mid_block.double_conv.dropout": 0.5}


@pytest.mark.parametrize("channels", [(4, 6), (4, 6, 8), (4, 6, 8, 10), (4,) * 5])
def test_smallest_size_gives_pixels_and_the_next_smaller_would_not(channels):
    model = tiny(channels=channels)
    output = model(torch.zeros(1, 1, model.smallest_size, model.smallest_size)).shape[-1]
    assert 0 < output <= model.size_step
    assert output == model.smallest_size - 2 * model.margin


def test_sizes_of_the_paper_are_16_k_plus_188(paper):
    assert [paper.next_size(n) for n in (1, 188, 189, 204, 512, 572, 573)] == [188, 188, 204, 204, 524, 572, 588]
    assert paper.margin == 92


def test_wrong_size_is_refused_with_the_next_that_fits(paper):
    with pytest.raises(ValueError, match="got 572 x 512; the next size that fits is 572 x 524"):
        paper(torch.empty(1, 1, 572, 512, device="meta"))


def test_same_padding_keeps_the_size_and_takes_multiples_of_the_stride():
    model = tiny(padding="same")
    assert model(torch.zeros(1, 1, 8, 12)).shape == (1, 2, 8, 12)
    with pytest.raises(ValueError, match="multiples of 4, got 8 x 10; the next size that fits is 8 x 12"):
        model(torch.zeros(1, 1, 8, 10))


def test_weights_are_drawn_as_the_paper_says():
    torch.manual_seed(0)
    model = SegmentationUNet(1, 2, channels=(64, 128))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            expected = math.sqrt(2 / (9 * module.in_channels))  # N incoming connections
            assert module.weight.std().item() == pytest.approx(expected, rel=0.02)  # 3 sigma of 10,000 draws
        if isinstance(module, nn.ConvTranspose2d):
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.02)
    assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))


def test_up_convolution_keeps_the_variance_that_its_initialisation_promises():
    torch.manual_seed(0)
    up = SegmentationUNet(1, 2, channels=(64, 128)).up_blocks[0].up_conv
    x = torch.randn(4, 128, 16, 16)
    assert up(x).square().mean().item() == pytest.approx(2.0, rel=0.1)  # 2 / N times N inputs of variance 1


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("norm", [None, "batch", "group"])
def test_every_parameter_receives_gradient(padding, norm):
    model = tiny(padding=padding, norm=norm, timestep_embedding=True, num_class_embeds=3).train()
    size = model.next_size(48)
    x, t, labels = torch.randn(2, 1, size, size), torch.tensor([3, 700]), torch.tensor([0, 2])
    model(x, t, labels).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_valid_output_depends_on_its_field_of_view_only():
    model = tiny().double()
    size = model.next_size(60)
    x = torch.randn(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    model(x)[0, 0, 0, 0].backward()
    rows = x.grad[0, 0].abs().sum(dim=1).nonzero()
    assert rows.max() <= 2 * model.margin + model.size_step  # none of the far side


def test_shift_by_the_stride_shifts_the_output():
    model = tiny().double()
    stride, size = model.size_step, model.next_size(60)
    x = torch.randn(1, 1, size + stride, size, dtype=torch.float64)
    upper, lower = model(x[:, :, :size]), model(x[:, :, stride:])
    torch.testing.assert_close(upper[:, :, stride:], lower[:, :, :-stride])


def test_timestep_changes_the_output_and_is_wanted_exactly_with_an_embedding():
    model = tiny(padding="same", timestep_embedding=True)
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(model(x, torch.tensor([1])), model(x, torch.tensor([500])))
    with pytest.raises(ValueError, match="the network has a timestep embedding and needs t, got none"):
        model(x)
    with pytest.raises(ValueError, match="the network has no timestep embedding, got t of shape"):
        tiny(padding="same")(x, torch.tensor([1]))


def test_configuration_builds_the_same_network():
    model = tiny(padding="same", norm="group", timestep_embedding=True)
    again = SegmentationUNet(**model.config).eval()
    again.load_state_dict(model.state_dict())
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    assert torch.equal(model(x, t), again(x, t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (4,)}, "at least 2 levels, got \\[4\\]"),
        ({"padding": "full"}, "padding must be 'valid' or 'same', got 'full'"),
        ({"norm": "layer"}, "norm must be 'batch', 'group' or None, got 'layer'"),
        ({"num_class_embeds": 3}, "needs a timestep embedding"),
        ({"channels": (3, 4), "timestep_embedding": True}, "must be even"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
