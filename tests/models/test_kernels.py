"""The fused kernels against PyTorch's own operations in float64, forward and backward."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_diffusion.diffusers_io.exporting import to_diffusers
from unet_diffusion.models import kernels
from unet_diffusion.models.blocks import Conv3x3
from unet_diffusion.models.kernels import (
    compiled_kernels,
    fused_group_norm,
    library_path,
    operators,
    winograd_conv2d,
    winograd_filters,
)
from unet_diffusion.models.speed import MIN_WINOGRAD_CHANNELS, prepare_weights, set_speed, speeds_for
from unet_diffusion.models.unet import DenoiserUNet, SegmentationUNet
from unet_diffusion.runtime.precision import autocast, cpu_has_bfloat16

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif("fused" not in speeds_for(CPU), reason="needs AVX2 and a C++ compiler")
NEEDS_BFLOAT16 = pytest.mark.skipif(not cpu_has_bfloat16(), reason="needs AVX-512 with bf16")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)]

SHAPES = {  # B, C, K, H, W
    "even": (2, 32, 64, 8, 8),
    "odd and not square": (3, 16, 32, 7, 10),
    "one pixel": (1, 64, 32, 1, 1),
    "square of the batch": (16, 16, 16, 16, 16),
    "wide, and many tiles": (2, 128, 208, 9, 35),  # outputs in parts, and gradients in several products
}
# Relative; float32 has 6e-8, and a pixel is a sum of several hundred products. The plain convolution has 2e-7 to 8e-7
# at these sizes, and Winograd's, which adds larger numbers, twice as much.
FLOAT32 = 2e-6
# bfloat16 has 4e-3. The plain convolution rounds twice; Winograd's rounds its tiles and products too, which are larger
# than what they add up to.
BFLOAT16 = 1e-2


def norms(num_groups: int, silu: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Group norm with an offset before it, and SiLU after it if asked: fused, and in PyTorch's operations."""

    def fused(x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor) -> Tensor:
        return fused_group_norm(x, num_groups, weight, bias, 1e-5, offset=offset, silu=silu)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor) -> Tensor:
        out = F.group_norm(x + offset[:, :, None, None], num_groups, weight, bias, 1e-5)
        return F.silu(out) if silu else out

    return fused, plain


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def in_float64(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """In the mean over all elements, relative to the size of the expected ones."""
    error = (found.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def assert_same_function(fused, plain, inputs: list[Tensor], tolerance: float) -> None:
    exact = in_float64(inputs)
    found, expected = fused(*inputs), plain(*exact)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    assert_near(found, expected, tolerance)
    grads = torch.autograd.grad(found, inputs, grad.to(found.dtype))
    for mine, theirs in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_near(mine, theirs, tolerance)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_winograd_convolution_is_the_convolution(shape, padding):
    batch, channels_in, channels_out, height, width = shape
    inputs = leaves((batch, channels_in, height, width), (channels_out, channels_in, 3, 3), (channels_out,))
    fused = partial(winograd_conv2d, padding=padding)
    if min(height, width) + 2 * padding < 3:
        with pytest.raises(RuntimeError, match="images must be at least 3 pixels high and wide, got 1 x 1"):
            fused(*inputs)
    else:
        assert_same_function(fused, lambda *args: F.conv2d(*args, padding=padding), inputs, FLOAT32)


def test_winograd_convolution_with_filters_made_before_is_the_same():
    x, weight, bias = (tensor.detach() for tensor in leaves((3, 16, 5, 8), (32, 16, 3, 3), (32,)))
    filters = winograd_filters(weight, torch.float32)
    expected = winograd_conv2d(x, weight, bias)
    assert torch.equal(winograd_conv2d(x, torch.zeros_like(weight), bias, filters=filters), expected)


@NEEDS_BFLOAT16
@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_winograd_convolution_in_autocast_is_the_convolution_up_to_bfloat16(shape, padding):
    batch, channels_in, channels_out, height, width = shape
    inputs = leaves((batch, channels_in, height, width), (channels_out, channels_in, 3, 3), (channels_out,))

    def fused(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = winograd_conv2d(*args, padding=padding)
        assert out.dtype == torch.bfloat16
        return out

    assert_same_function(fused, lambda *args: F.conv2d(*args, padding=padding), inputs, BFLOAT16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same(dtype):
    shapes = (2, 64, 13, 34), (96, 64, 3, 3), (96,), (96,), (96,)
    tolerance = FLOAT32 if dtype == torch.float32 else BFLOAT16

    def outputs() -> list[Tensor]:
        x, weight, bias, gain, shift = inputs = leaves(*shapes)
        convolved = winograd_conv2d(x.to(dtype), weight, bias)
        out = fused_group_norm(convolved, 3, gain, shift, 1e-5, silu=True)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    alone = outputs()
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        together = outputs()
    finally:
        torch.set_num_threads(before)
    for one, other in zip(together, alone, strict=True):
        assert_near(one, other.double(), tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_reaches_every_gradient(value, dtype):
    x, weight, bias, gain, shift = inputs = leaves((2, 32, 6, 6), (64, 32, 3, 3), (64,), (64,), (64,))
    spoilt = x.to(dtype).index_fill(0, torch.tensor(1), value)
    out = fused_group_norm(winograd_conv2d(spoilt, weight, bias), 4, gain, shift, 1e-5, silu=True)
    assert torch.isfinite(out[0]).all()
    for grad in torch.autograd.grad(out.float().sum(), inputs[1:]):
        assert not torch.isfinite(grad).any()


def test_winograd_convolution_of_nothing_has_gradients_of_zero():
    inputs = leaves((0, 16, 4, 4), (32, 16, 3, 3), (32,))
    out = winograd_conv2d(*inputs)
    assert out.shape == (0, 32, 4, 4)
    for grad, one in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(one))


@pytest.mark.parametrize(
    ("channels", "dtype", "message"),
    [
        (20, torch.float32, r"channels must be a multiple of (8|16), got 20"),
        (16, torch.float64, r"speed fused is for float32 .*, not Double; set .*another speed"),
        pytest.param(
            *(16, torch.bfloat16, "fused is for float32 on this processor, not BFloat16; set precision float32"),
            marks=pytest.mark.skipif(cpu_has_bfloat16(), reason="has bfloat16"),
        ),
    ],
)
def test_winograd_convolution_refuses_what_it_cannot_do(channels, dtype, message):
    x, weight, bias = (one.detach().to(dtype) for one in leaves((1, channels, 4, 4), (16, channels, 3, 3), (16,)))
    with pytest.raises(RuntimeError, match=message):
        winograd_conv2d(x, weight, bias)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_winograd_convolution_takes_any_memory_format_and_returns_channels_last(memory_format):
    x, weight, bias = (tensor.detach() for tensor in leaves((2, 32, 8, 8), (64, 32, 3, 3), (64,)))
    out = winograd_conv2d(x.to(memory_format=memory_format), weight.to(memory_format=memory_format), bias)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_near(out, F.conv2d(x.double(), weight.double(), bias.double(), padding=1), FLOAT32)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fused_group_norm_is_the_three_operations(shape, silu):
    batch, channels, _, height, width = shape
    inputs = leaves((batch, channels, height, width), (channels,), (channels,), (batch, channels))
    assert_same_function(*norms(4, silu), inputs, FLOAT32)


def test_fused_group_norm_of_channels_in_uneven_parts():
    inputs = leaves((2, 72, 20, 21), (72,), (72,), (2, 72))  # groups of 24: parts of 48 and 24 channels
    assert_same_function(*norms(3, silu=True), inputs, FLOAT32)


@NEEDS_BFLOAT16
@pytest.mark.parametrize("silu", [True, False])
def test_fused_group_norm_of_bfloat16_is_the_three_operations_up_to_rounding(silu):
    x, *others = leaves((3, 40, 7, 10), (40,), (40,), (3, 40))
    inputs = [x.detach().bfloat16().requires_grad_(), *others]
    assert_same_function(*norms(4, silu), inputs, BFLOAT16)


def test_fused_group_norm_takes_gains_of_each_image():
    inputs = leaves((2, 8, 4, 4), (2, 8), (2, 8))

    def plain(x, weight, bias):
        return F.silu(F.group_norm(x, 4, eps=1e-5) * weight[:, :, None, None] + bias[:, :, None, None])

    assert_same_function(lambda x, *gains: fused_group_norm(x, 4, *gains, 1e-5, silu=True), plain, inputs, FLOAT32)


def test_fused_group_norm_of_a_small_variance_about_a_large_mean():
    (noise,) = leaves((2, 32, 64, 64))
    x, ones, zeros = noise.detach() + 1000, torch.ones(32), torch.zeros(32)
    expected = F.silu(F.group_norm(x.double(), 8, ones.double(), zeros.double(), 1e-5))
    out = fused_group_norm(x, 8, ones, zeros, 1e-5, silu=True)
    assert_near(out, expected, 1e-4)  # x itself is rounded by 6e-5 deviations


def test_fused_group_norm_survives_a_map_without_variance():
    x = torch.full((1, 8, 4, 4), 1000.0)
    out = fused_group_norm(x, 4, torch.ones(8), torch.zeros(8), 1e-5, silu=True)
    assert torch.equal(out, torch.zeros_like(x))


def test_kernels_are_compiled_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    monkeypatch.setenv("CXX", "false")  # a program that fails
    with pytest.raises(
        RuntimeError, match=r"false cannot build the fused kernels \(exit status 1\); choose another speed"
    ):
        compiled_kernels()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        RuntimeError, match=r"no-such-compiler cannot be run \(.*\); set CXX to g\+\+, or choose another"
    ):
        compiled_kernels()
    assert list((tmp_path / "new").iterdir()) == []

    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nfor last; do :; done\ntouch "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    library = compiled_kernels()
    assert compiled_kernels() == library
    assert list((tmp_path / "new").iterdir()) == [library]
    compiling, linking = (tmp_path / "called").read_text().splitlines()  # and no second time
    assert "-fopenmp" in compiling
    assert "-fopenmp" not in linking


def test_kernels_of_another_source_are_others(tmp_path, monkeypatch):
    source = tmp_path / "kernels.cpp"
    source.write_text("int one;")
    monkeypatch.setattr(kernels, "SOURCE", source)
    before = library_path()
    source.write_text("int other;")
    assert library_path() != before


def test_kernels_are_compiled_for_what_torch_sees_of_the_processor(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "cpu_has_bfloat16", lambda: True)
    wide = library_path()
    monkeypatch.setattr(kernels, "cpu_has_bfloat16", lambda: False)
    assert library_path() != wide


NARROW = """
import torch
from unet_diffusion.models.kernels import winograd_conv2d
from unet_diffusion.runtime.precision import cpu_has_bfloat16
assert not cpu_has_bfloat16()
x, weight, bias = torch.randn(2, 24, 9, 7), torch.randn(40, 24, 3, 3), torch.randn(40)
exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
print(((winograd_conv2d(x, weight, bias) - exact).norm() / exact.norm()).item())
"""


@NEEDS_BFLOAT16
def test_a_wide_processor_made_narrow_runs_the_kernels_of_narrow_ones():
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", NARROW], check=True, capture_output=True, text=True, env=environment)
    assert float(done.stdout) < FLOAT32


def test_a_folder_that_cannot_hold_the_kernels_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "folder"))
    with pytest.raises(RuntimeError, match=r"cannot be kept \(.*\); set TORCH_EXTENSIONS_DIR to a folder"):
        compiled_kernels()


def test_kernels_that_cannot_be_loaded_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    library_path().write_bytes(b"half of a library")
    with pytest.raises(RuntimeError, match=r"\.so cannot be loaded \(.*\); remove it to have it compiled again"):
        operators.__wrapped__()  # in this process they are loaded


@pytest.mark.parametrize("options", [{}, {"scale_shift": True, "resample": "resnet"}], ids=["added", "scale and shift"])
def test_fused_network_is_diffusers_network(options):
    torch.manual_seed(0)
    width = MIN_WINOGRAD_CHANNELS  # narrower convolutions are not fused
    unet = DenoiserUNet(1, [width, width], layers_per_block=1, attention_levels=[1], num_class_embeds=3, **options)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    theirs = to_diffusers(unet, sample_size=8)
    set_speed(unet, "fused")
    x, t, labels = torch.randn(2, 1, 8, 12), torch.tensor([3, 900]), torch.tensor([0, 2])
    ours, expected = unet(x, t, labels), theirs(x, t, labels).sample
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())

    ours.square().mean().backward()
    expected.square().mean().backward()
    largest = max(parameter.grad.abs().max().item() for parameter in theirs.parameters())
    grads = dict(theirs.named_parameters())
    for name, parameter in unet.named_parameters():  # the bias of the keys has a gradient of 0, up to rounding
        torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_fused_segmentation_network_is_the_plain_one(padding):
    torch.manual_seed(4)  # no ReLU's input is so near 0, and no two in a pool so near, that rounding decides
    width = MIN_WINOGRAD_CHANNELS
    unet = SegmentationUNet(1, 2, channels=(width, width), padding=padding)
    plain = copy.deepcopy(unet).double()
    set_speed(unet, "fused")
    assert sum(isinstance(module, Conv3x3) and module.fused for module in unet.modules()) == 5  # all but the first
    x = torch.rand(1, 1, 28, 36)
    ours, expected = unet(x), plain(x.double())
    assert_near(ours, expected, 1e-5)
    ours.square().mean().backward()
    expected.square().mean().backward()
    for parameter, one in zip(unet.parameters(), plain.parameters(), strict=True):
        assert_near(parameter.grad, one.grad, 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_network_with_prepared_weights_is_as_near_the_exact_one(dtype):
    torch.manual_seed(0)
    width = MIN_WINOGRAD_CHANNELS
    unet = DenoiserUNet(1, [width, width], layers_per_block=1).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 900])
    with torch.inference_mode():
        exact = unet(x, t).double()
        set_speed(unet, "fused")
        errors = []
        with autocast("cpu", dtype):
            errors.append((unet(x, t) - exact).norm())
            prepare_weights(unet, dtype)
            for module in unet.modules():
                if isinstance(module, Conv3x3) and module.fused:
                    module.weight.zero_()  # not looked at any more
            errors.append((unet(x, t) - exact).norm())
    assert errors[1] < 1.2 * errors[0]  # products are added in another order before they are rounded
