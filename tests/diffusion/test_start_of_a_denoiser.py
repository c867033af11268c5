"""A denoiser of masks that starts as one without conditions."""

import pytest
import torch
from denoisers import randomise
from torch import nn

from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.diffusion.transfer import load_unconditional_weights
from unet_diffusion.models.denoiser_unet import DenoiserUNet

SMALL = {"in_channels": 3, "out_channels": 3, "channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def denoiser(*conditions, **options) -> DenoiserParts:
    torch.manual_seed(1)
    unet = randomise(DenoiserUNet(**{**SMALL, **options}))
    return DenoiserParts(unet, NoiseSchedule(100, "linear"), (3, 8, 8), conditions=nn.ModuleList(conditions))


def test_network_predicts_at_first_what_the_denoiser_does_whatever_the_mask():
    """Bit for bit on these sizes; the products with 0 add nothing."""
    trained, network = denoiser(), denoiser(in_channels=7).unet
    said = load_unconditional_weights(network, trained, trained.schedule)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert said == f"copied all {millions:.2f} M weights of the denoiser; those of 4 channels of conditions begin at 0"
    said = load_unconditional_weights(network, trained, NoiseSchedule(100, "squaredcos_cap_v2"))
    assert said.endswith("begin at 0; the schedule is another, so what to predict is learnt anew")
    condition = SemanticMap(4, label_format="instances", max_distance=6)
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 40, 99])
    expected = trained.unet(x, t)
    for labels in (torch.zeros(3, 1, 16, 16), torch.randint(3, (3, 1, 16, 16))):
        assert torch.equal(network(x, t, concat=condition(condition.encoder.entry_of(labels))), expected)
    assert not torch.equal(
        network(x, t, concat=torch.ones(3, 4, 16, 16)), network(x + 1, t, concat=x.new_ones(3, 4, 16, 16))
    )


def test_network_of_the_same_channels_gets_all_weights():
    trained, network = denoiser(), denoiser(dropout=0.1).unet
    randomise(network)
    load_unconditional_weights(network, trained, trained.schedule)
    for name, value in trained.unet.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("trained", "options", "said"),
    [
        (denoiser(), {"channels": [8, 8]}, "tensors differ, such as "),
        (denoiser(in_channels=4), {}, "conv_in.weight: 8x4x3x3 in init_from, 8x3x3x3 here"),
        (denoiser(num_class_embeds=3), {}, "class_embedding.weight: 3x32 in init_from, none here"),
        (denoiser(SemanticMap(3, 3), in_channels=6), {}, "without conditions, and this one has SemanticMap"),
    ],
)
def test_another_network_or_condition_is_refused_and_nothing_copied(trained, options, said):
    own = denoiser(**options)
    before = {name: value.clone() for name, value in own.unet.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_unconditional_weights(own.unet, trained, trained.schedule)
    assert all(torch.equal(value, before[name]) for name, value in own.unet.state_dict().items())
