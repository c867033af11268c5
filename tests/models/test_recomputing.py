"""Gradient checkpointing: the gradients of training without it, and what is kept for them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.models.speed import set_speed, speeds_for

CPU = torch.device("cpu")
WIDTHS = (32, 64)  # wide enough for the fused convolutions of some processors
NETWORKS = {
    "self-attention": lambda: DenoiserUNet(3, WIDTHS, attention_levels=(1,), dropout=0.3),
    "scale-shift and resampling": lambda: DenoiserUNet(3, WIDTHS, scale_shift=True, resample="resnet", dropout=0.3),
    "spatial transformers": lambda: DenoiserUNet(3, WIDTHS, attention_levels=(0, 1), context_dim=8, num_heads=4),
    "double convolutions": lambda: SegmentationUNet(3, 2, channels=WIDTHS, padding="same", norm="group", dropout=0.3),
    "batch norms": lambda: SegmentationUNet(3, 2, channels=(4, 8, 8), padding="same", norm="batch", dropout=0.3),
}


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """A network with random weights, and the same with gradient checkpointing."""
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    recomputing = type(plain)(**{**plain.config, "gradient_checkpointing": True})
    recomputing.load_state_dict(plain.state_dict())
    return plain.train(), recomputing.train()


def output(network: nn.Module, size: int = 16) -> Tensor:
    torch.manual_seed(1)
    inputs = [torch.randn(2, 3, size, size)]
    if isinstance(network, DenoiserUNet):
        inputs.append(torch.tensor([10, 900]))
    context = {"context": torch.randn(2, 5, 8)} if network.config.get("context_dim") else {}
    return network(*inputs, **context)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    output(network).square().mean().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_bit_for_bit_those_without_checkpointing(name):
    plain, recomputing = map(gradients, both(name))
    for key, gradient in plain.items():
        assert torch.equal(gradient, recomputing[key]), key


@pytest.mark.skipif("fused" not in speeds_for(CPU), reason="needs AVX2 and a compiler")
def test_gradients_of_fused_kernels_are_bit_for_bit_those_without_checkpointing():
    networks = both("self-attention")
    for network in networks:
        set_speed(network, "fused", CPU)
    plain, recomputing = map(gradients, networks)
    for key, gradient in plain.items():
        assert torch.equal(gradient, recomputing[key]), key


@pytest.mark.parametrize("convert", [nn.Identity(), nn.SyncBatchNorm.convert_sync_batchnorm], ids=["own", "sync"])
def test_statistics_of_batch_norms_move_once_a_step(convert):
    plain, recomputing = map(convert, both("batch norms"))
    for network in (plain, recomputing):
        gradients(network)
    before = both("batch norms")[0].state_dict()
    for key, value in plain.state_dict().items():
        if "running" in key:
            assert torch.equal(value, recomputing.state_dict()[key]), key
            assert not torch.equal(value, before[key]), key


def bytes_kept(network: nn.Module) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass, each storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used again
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output(network, size=32)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_less_is_kept_for_the_backward_pass(name):
    plain, recomputing = map(bytes_kept, both(name))
    assert recomputing < 0.6 * plain


def test_a_copy_recomputes_too_and_a_network_without_gradients_does_not():
    recomputing = copy.deepcopy(both("self-attention")[1])
    with torch.no_grad():
        assert output(recomputing).grad_fn is None
    assert bytes_kept(recomputing) == bytes_kept(both("self-attention")[1])
