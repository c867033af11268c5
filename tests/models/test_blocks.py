import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from unet_diffusion.models.attention import SelfAttention
from unet_diffusion.models.embeddings import sinusoids
from unet_diffusion.models.kernels import double_by_copies, group_norm_by_channel
from unet_diffusion.models.layers import Downsample, Upsample, crop_and_concat
from unet_diffusion.models.residual_blocks import DownBlock, MidBlock, PassThrough, ResidualBlock, UpBlock


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoids_are_those_of_diffusers(flip, shift):
    t = torch.tensor([0.0, 0.5, 17, 999])
    ours = sinusoids(t, 16, flip_sin_to_cos=flip, freq_shift=shift)
    assert torch.equal(ours, get_timestep_embedding(t, 16, flip_sin_to_cos=flip, downscale_freq_shift=shift))


def test_sinusoids_have_unit_length_per_frequency():
    sines = sinusoids(torch.tensor([123.0]), 8)
    cos, sin = sines.chunk(2, dim=1)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(1, 4))


def test_attention_as_products_is_flash_attention(monkeypatch):
    attention, x = randomised(SelfAttention(32, 2)), torch.randn(2, 32, 4, 4)
    products = attention(x)
    monkeypatch.setattr(
        "unet_diffusion.models.attention.MAX_SCORES", 0
    )  # as with too many pixels for their pairs to be kept
    torch.testing.assert_close(products, attention(x), rtol=1e-4, atol=1e-4)


def test_attention_in_bfloat16_is_as_near_as_flash_attention(monkeypatch):
    attention, x = SelfAttention(32, 1), torch.randn(4, 32, 8, 8)
    exact = attention.double()(x.double()) - x
    attention.float()
    errors = []
    for limit in (2**24, 0):  # products, flash
        monkeypatch.setattr("unet_diffusion.models.attention.MAX_SCORES", limit)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((attention(x) - x - exact).norm() / exact.norm())
    assert errors[0] < 2 * errors[1]  # both round what goes in and comes out; products round the scores too


def test_attention_is_the_softmax_formula():
    attention = randomised(SelfAttention(8, 2, norm_num_groups=4)).double()
    x = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    tokens = attention.group_norm(x).reshape(2, 8, 6).transpose(1, 2)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k, v = (project(tokens)[..., part] for project in (attention.to_q, attention.to_k, attention.to_v))
        heads.append((q @ k.transpose(1, 2) / math.sqrt(4)).softmax(dim=-1) @ v)
    expected = x + attention.to_out[0](torch.cat(heads, dim=-1)).transpose(1, 2).reshape(2, 8, 3, 2)
    torch.testing.assert_close(attention(x), expected)


def test_attention_does_not_care_where_pixels_are():
    attention = randomised(SelfAttention(8, 2, norm_num_groups=4)).double()
    x = torch.randn(1, 8, 4, 2, dtype=torch.float64)
    order = torch.randperm(8)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(attention(shuffled), attention(x).flatten(2)[..., order].view_as(x))


@pytest.mark.parametrize("scale_shift", [True, False])
def test_residual_block_is_the_identity_where_its_last_layer_is_zero(scale_shift):
    block = randomised(ResidualBlock(8, 8, emb_channels=4, norm_num_groups=4, scale_shift=scale_shift))
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 4)), x)


@pytest.mark.parametrize(("resample", "size"), [(None, 4), (nn.AvgPool2d(2), 2), (nn.Upsample(scale_factor=2), 8)])
def test_residual_block_resamples_both_branches(resample, size):
    block = ResidualBlock(8, 16, emb_channels=4, norm_num_groups=4, resample=resample)
    assert block(torch.randn(2, 8, 4, 4), torch.randn(2, 4)).shape == (2, 16, size, size)


def test_downsampling_without_padding_sees_zeros_at_the_bottom_and_right_only():
    down = Downsample(1, padding=0)
    nn.init.ones_(down.conv.weight)
    nn.init.zeros_(down.conv.bias)
    sums = down(torch.ones(1, 1, 4, 4))[0, 0]
    assert sums.tolist() == [[9, 6], [6, 4]]


def test_downsampling_with_padding_sees_zeros_at_the_top_and_left():
    down = Downsample(1, padding=1)
    nn.init.ones_(down.conv.weight)
    nn.init.zeros_(down.conv.bias)
    assert down(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[4, 6], [6, 9]]


def test_upsampling_repeats_each_pixel_up_to_the_size():
    upsample = Upsample(1)
    with torch.no_grad():
        upsample.conv.weight.zero_()[0, 0, 1, 1] = 1
        upsample.conv.bias.zero_()
    x = torch.tensor([[[[1.0, 2, 3]]]])
    assert upsample(x, size=(2, 6)).tolist() == [[[[1, 1, 2, 2, 3, 3]] * 2]]
    assert upsample(x, size=(1, 5)).tolist() == [[[[1, 1, 2, 2, 3]]]]


def test_down_block_keeps_every_map_and_the_downsampled_one():
    block = DownBlock([AddOne(), AddOne()], [PassThrough(), PassThrough()], AddOne())
    assert [float(kept) for kept in block(torch.tensor(0.0), None, None)] == [1, 2, 3]


def test_mid_block_puts_attention_between_residual_blocks():
    block = MidBlock([AddOne(), AddOne()], [Double()])
    assert block(torch.tensor(0.0), None, None) == 3


def test_up_block_takes_one_skip_for_each_residual_block():
    block = UpBlock([Mean(), Mean()], [PassThrough(), PassThrough()], None)
    x, skips = torch.full((1, 1, 2, 2), 4.0), [torch.full((1, 1, 2, 2), value) for value in (7.0, 6.0, 0.0)]
    assert block(x, skips, None, None).mean() == 4  # (4 + 0) / 2 = 2; (2 + 6) / 2 = 4
    assert [float(skip.mean()) for skip in skips] == [7]  # left to the next block


def test_skip_is_cropped_to_its_centre():
    skip = torch.arange(16.0).view(1, 1, 4, 4)
    both = crop_and_concat(torch.zeros(1, 1, 2, 2), skip)
    assert both.shape == (1, 2, 2, 2)
    assert both[0, 1].tolist() == [[5, 6], [9, 10]]


class AddOne(nn.Module):
    def forward(self, x, emb, context):
        return x + 1


class Double(nn.Module):
    def forward(self, x, emb, context):
        return 2 * x


@pytest.mark.parametrize("size", [(8, 14), (7, 14), (8, 13), (7, 13)])
def test_doubling_by_copies_is_nearest_neighbour_interpolation(size):
    x = torch.randn(2, 3, 4, 7, dtype=torch.float64, requires_grad=True)
    found, expected = double_by_copies(x, size), F.interpolate(x, size=size, mode="nearest")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    grads = (torch.autograd.grad(out, x, torch.arange(out.numel()).view_as(out).double()) for out in (found, expected))
    torch.testing.assert_close(*grads)


def test_doubling_by_copies_leaves_no_layout_to_a_convolution_to_mend():
    x = torch.randn(2, 3, 4, 7).to(memory_format=torch.channels_last)
    assert double_by_copies(x, (8, 14)).is_contiguous(memory_format=torch.channels_last)


def test_an_upsampler_that_doubles_by_copies_computes_the_same():
    upsample, x = Upsample(2), torch.randn(1, 2, 3, 4)
    expected = upsample(x, size=(6, 7))
    upsample.by_copies = True
    torch.testing.assert_close(upsample(x, size=(6, 7)), expected)


class Mean(nn.Module):
    def forward(self, x, emb, context):
        return x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("shape", [(3, 8, 7, 10), (2, 16, 1, 1), (1, 4, 8, 8)])
@pytest.mark.parametrize("of_each_image", [False, True])
def test_norm_by_channel_is_group_norm(shape, of_each_image):
    generator = torch.Generator().manual_seed(0)
    batch, channels = shape[:2]
    parameters = (batch, channels) if of_each_image else (channels,)
    sizes = (shape, parameters, parameters, (batch, channels))
    inputs = [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]

    def plain(x, weight, bias, offset):
        h = F.group_norm(x + offset[:, :, None, None], 4)
        gain, shift = (one.expand(batch, channels)[:, :, None, None] for one in (weight, bias))
        return h * gain + shift

    def by_channel(x, weight, bias, offset):
        return group_norm_by_channel(x, 4, weight, bias, 1e-5, offset=offset)

    found, expected = by_channel(*inputs), plain(*inputs)
    torch.testing.assert_close(found, expected)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    grads = (torch.autograd.grad(out, inputs, grad) for out in (found, expected))
    torch.testing.assert_close(*grads)


def test_norm_by_channel_keeps_its_digits_far_from_zero():
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)) + 1000
    expected = F.group_norm(x.double(), 4).float()
    found = group_norm_by_channel(x, 4, torch.ones(8), torch.zeros(8), 1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # x itself has a resolution of 6e-5


@pytest.mark.parametrize("options", [{}, {"scale_shift": True}], ids=["added", "scale and shift"])
def test_a_block_whose_norms_go_by_channel_computes_the_same(options):
    block = randomised(ResidualBlock(8, 16, emb_channels=4, norm_num_groups=4, **options))
    attention = randomised(SelfAttention(16, 2, norm_num_groups=4))
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 4)
    expected = attention(block(x, emb))
    for module in (*block.modules(), *attention.modules()):
        module.by_channel = True
    torch.testing.assert_close(attention(block(x, emb)), expected, rtol=1e-4, atol=1e-5)
