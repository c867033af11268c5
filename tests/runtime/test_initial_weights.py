"""Models are loaded without drawing random weights for them first, and nothing else is left out."""

import pytest
import torch
from denoisers import save_stable_diffusion, text_denoiser
from single_files import saved, sd1, sdxl
from torch import nn

import unet_diffusion as ud
from unet_diffusion.runtime.initial_weights import WithoutInitialWeights, without_initial_weights


def folder_of_stable_diffusion(folder):
    return save_stable_diffusion(folder / "pipeline"), {}


def checkpoint(folder):
    text_denoiser(folder).save(folder / "model.ckpt")
    return folder / "model.ckpt", {}


def one_file(make):
    def made(folder):
        made = saved(make, folder)
        return made.file, made.told

    return made


@pytest.mark.parametrize("make", [folder_of_stable_diffusion, checkpoint, *(one_file(make) for make in (sd1, sdxl))])
def test_loading_draws_no_random_numbers(make, tmp_path):
    path, told = make(tmp_path)
    before = torch.get_rng_state()
    ud.load(path, **told)
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_beside_parameters_are_drawn():
    def draw():
        torch.manual_seed(0)
        linear = nn.Linear(100, 100)
        linear.register_buffer("frequencies", torch.empty(100).normal_(), persistent=False)
        return linear

    with WithoutInitialWeights():
        linear = draw()
    torch.manual_seed(0)
    torch.testing.assert_close(linear.frequencies, torch.empty(100).normal_())
    assert draw().weight.abs().max() > 0


class WithFrequencies(nn.Module):
    """A class of a user's own: its buffer is no part of a state dict."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(10, 10)
        self.register_buffer("frequencies", torch.randn(3), persistent=False)
        self.register_buffer("scale", self.linear.weight.std(), persistent=False)


def test_classes_of_a_users_own_are_made_as_in_training():
    trained = WithFrequencies()
    with without_initial_weights(["my_networks"]):
        loaded = WithFrequencies()
    assert torch.equal(loaded.frequencies, trained.frequencies)
    assert torch.equal(loaded.scale, trained.scale)
