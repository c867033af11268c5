import pytest
import torch
from torch import nn

from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.unet import UNet

OPTIONS = [
    {},
    {"attention_levels": (0, 1), "head_channels": 4},
    {"mid_attention": False},
    {"num_class_embeds": 3},
    {"scale_shift": True, "resample": "resnet", "attention_levels": (1,)},
    {"downsample_padding": 0, "dropout": 0.5, "out_channels": 6},
    {"layers_per_block": 1, "flip_sin_to_cos": False, "freq_shift": 1},
]


def tiny_unet(**options) -> DenoiserUNet:
    """Every parameter random, as a fresh network predicts 0 whatever its input."""
    torch.manual_seed(0)
    model = DenoiserUNet(3, (8, 16), **{"norm_num_groups": 4, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(model: DenoiserUNet) -> tuple:
    torch.manual_seed(1)
    labels = None if model.class_embedding is None else torch.tensor([0, 2])
    return torch.randn(2, 3, 8, 4), torch.tensor([10, 900]), labels


@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_receives_gradient(options):
    model = tiny_unet(**options).train()
    model(*inputs(model)).square().sum().backward()
    for name, parameter in model.named_parameters():
        # a constant added to all keys of an attention cancels in the softmax
        if not name.endswith("to_k.bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 1e-7, name


@pytest.mark.parametrize("options", OPTIONS)
def test_config_rebuilds_the_network(options):
    model = tiny_unet(**options)
    again = DenoiserUNet(**model.config).eval()
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert torch.equal(again(*inputs(model)), model(*inputs(model)))


@pytest.mark.parametrize("options", OPTIONS)
def test_output_has_the_size_of_the_input(options):
    model = tiny_unet(**options)
    assert model(*inputs(model)).shape == (2, options.get("out_channels", 3), 8, 4)


def test_fresh_network_predicts_zero_and_its_residuals_change_nothing():
    model = DenoiserUNet(3, (8, 16), norm_num_groups=4, attention_levels=(1,))
    assert not model(*inputs(model)).any()
    x, emb = torch.randn(1, 16, 4, 4), torch.randn(1, 32)
    for block in (model.mid_block.resnets[0], model.mid_block.attentions[0]):
        torch.testing.assert_close(block(x, emb, None), x, rtol=0, atol=0)


def test_output_depends_on_the_timestep():
    model = tiny_unet()
    x, _, _ = inputs(model)
    early, late = (model(x, torch.full((2,), t)) for t in (10, 11))
    assert (early - late).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_output_depends_on_the_label():
    model = tiny_unet(num_class_embeds=3)
    x, t, _ = inputs(model)
    one, other = (model(x, t, torch.full((2,), label)) for label in (0, 2))
    assert (one - other).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_output_depends_on_every_skip():
    model = tiny_unet()
    arguments = inputs(model)
    expected = model(*arguments)
    up_inputs = []
    handles = [
        block.register_forward_pre_hook(lambda module, args: up_inputs.append(len(module.resnets)))
        for block in model.up_blocks
    ]
    model(*arguments)
    for handle in handles:
        handle.remove()
    assert sum(up_inputs) == 1 + 3 + 2  # conv_in; two blocks and a downsampler; two blocks
    for block, count in zip(model.up_blocks, up_inputs, strict=True):
        for position in range(count):
            handle = block.register_forward_pre_hook(perturb_skip(position))
            difference = (model(*arguments) - expected).abs().max()
            handle.remove()
            assert difference > 1e-4, position


def perturb_skip(position: int):
    def hook(module, args):
        skips = args[1]
        skips[-1 - position] = skips[-1 - position] + 0.1 * torch.randn_like(skips[-1 - position])

    return hook


def test_samples_of_a_batch_do_not_mix():
    model = tiny_unet(attention_levels=(0, 1))
    x, t, _ = inputs(model)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(model(x, t), alone, atol=1e-5, rtol=1e-5)  # float32; kernels differ by batch size


def test_two_passes_in_eval_mode_are_equal_under_dropout():
    model = tiny_unet(dropout=0.5)
    arguments = inputs(model)
    assert torch.equal(model(*arguments), model(*arguments))
    model.train()
    assert not torch.equal(model(*arguments), model(*arguments))


def test_integer_and_floating_timesteps_agree():
    model = tiny_unet()
    x, t, _ = inputs(model)
    assert torch.equal(model(x, t), model(x, t.double()))


def test_single_level_has_no_multiple_to_fit():
    model = DenoiserUNet(1, (8,), norm_num_groups=4)
    assert model(torch.randn(1, 1, 5, 7), torch.tensor([3])).shape == (1, 1, 5, 7)


def test_size_that_does_not_fit_names_the_next_that_does():
    with pytest.raises(ValueError, match=r"multiples of 2.*9 x 4.*10 x 4"):
        tiny_unet()(torch.randn(1, 3, 9, 4), torch.tensor([1]))


def test_labels_are_wanted_exactly_if_there_are_classes():
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([1])
    with pytest.raises(ValueError, match="class embedding and needs labels, got none"):
        tiny_unet(num_class_embeds=3)(x, t)
    with pytest.raises(ValueError, match="no class embedding, got labels"):
        tiny_unet()(x, t, torch.tensor([0]))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("norm_num_groups 3.*norm_num_groups 1", {"norm_num_groups": 3}),
        ("head_channels 5.*got 16", {"head_channels": 5}),
        ("attention_levels.*got 2", {"attention_levels": (2,)}),
        ("resample.*'pool'", {"resample": "pool"}),
        ("downsample_padding.*2", {"downsample_padding": 2}),
        ("layers_per_block.*0", {"layers_per_block": 0}),
    ],
)
def test_impossible_arguments_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**options)


@pytest.mark.parametrize(("message", "channels"), [("at least one level", ()), ("even", (9,))])
def test_impossible_widths_are_refused(message, channels):
    with pytest.raises(ValueError, match=message):
        DenoiserUNet(3, channels, norm_num_groups=1)


class Append(nn.Module):
    """Keeps `keeps` maps on the way down; notes what it is given on the way up."""

    def __init__(self, keeps: list[float], num_skips: int = 0):
        super().__init__()
        self.keeps, self.num_skips, self.seen = keeps, num_skips, []

    def forward(self, x, *args):
        if self.num_skips:
            self.seen += [float(args[0].pop()) for _ in range(self.num_skips)]
            return x
        return [x + step for step in self.keeps]


def test_skips_are_taken_last_in_first_out():
    ups = [Append([], 2), Append([], 2)]
    model = UNet(nn.Identity(), [Append([1, 2]), Append([10])], mid_block=PassX(), up_blocks=ups)
    assert model.wire(torch.tensor(0.0)) == 12  # the last map flows on
    assert [up.seen for up in ups] == [[12, 2], [1, 0]]


class PassX(nn.Module):
    def forward(self, x, emb, context):
        return x
