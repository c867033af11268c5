"""Fast forms of the two costly layers of a U-Net, equal to the plain forms up to rounding.

`winograd_conv2d` is a 3x3 convolution with fewer multiplications (Lavin & Gray 2015, https://arxiv.org/abs/1509.09308):
F(4x4, 3x3) in float32, which makes 4x4 outputs from a tile of 6x6 inputs with 36 products where the plain form needs
144, and F(2x2, 3x3) in bfloat16, with 16 products in place of 36. `fused_group_norm` adds the embedding, normalises and
applies SiLU in one pass over some channels of an image.

These two are for CPUs, and written in C++ in kernels.cpp. They need channels-last memory and AVX2, with which they
compute in float32; with AVX-512 and its bf16 they compute in bfloat16, too. In sampling, the tiles never lie in memory
all together: a thread takes a few tiles through all steps while they are in its cache.

Two more are for whole networks that are compiled for a GPU, and written in torch. `group_norm_by_channel` sums over the
pixels of each channel, which channels-last memory holds side by side; the gradient of `double_by_copies` is a sum that
the compiler fuses with the layer before.
"""

import hashlib
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unet_diffusion.runtime.precision import cpu_has_bfloat16

ANOTHER_SPEED = "choose another speed (plain)"
SOURCE = Path(__file__).with_suffix(".cpp")
TORCH = Path(torch.__file__).parent
COMPILER_FLAGS = "-O3", "-std=c++20", "-fPIC", "-fopenmp"
BFLOAT16_FLAGS = (  # for processors with AVX-512 and its bf16
    *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"),
)
FLOAT32_FLAGS = "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"  # for other processors


def winograd_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, *, padding: int = 1, filters: Tensor | None = None
) -> Tensor:
    """Convolve with a 3x3 kernel: (B, C, H, W) -> (B, K, H + 2 padding - 2, W + 2 padding - 2), in channels_last.

    The precision is that of autocast where autocast is on, otherwise that of x: float32, or bfloat16 where the
    processor has it.

    Args:
        x: Input, (B, C, H, W), of any size.
        weight: Kernels, (K, C, 3, 3); C and K must be multiples of 16.
        bias: Number added to each output channel, (K,).
        padding: Rows and columns of zeros on each side, 0 to 2.
        filters: Result of `winograd_filters` for the weight and the precision, through which no gradient flows; None
            computes it in each call.
    """
    dtype = _autocast_dtype(x)
    if filters is not None:
        return _convolve(_channels_last(x.to(dtype)), filters, bias, padding)
    return _WinogradConv2d.apply(x.to(dtype), weight, bias, padding)


def winograd_filters(weight: Tensor, dtype: torch.dtype, *, turned: bool = False) -> Tensor:
    """Transform kernels for `winograd_conv2d`: (K, C, 3, 3) -> (components, C, K), in the memory order of kernels.cpp.

    Args:
        weight: Kernels, (K, C, 3, 3).
        dtype: Precision of the result, float32 or bfloat16.
        turned: Whether to turn the kernels by 180 degrees and swap input and output, (components, K, C), for the
            gradient of the input.
    """
    return operators().winograd_filters(_channels_last(weight.detach().float()), dtype, turned)


def fused_group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, offset: Tensor | None = None, silu: bool
) -> Tensor:
    """Compute group_norm(x + offset), and SiLU if asked: (B, C, H, W) in channels_last and the type of x.

    Sums are computed in float32.

    Args:
        x: Input, (B, C, H, W).
        num_groups: Number of groups; must divide C.
        weight: Gain of each channel, (C,), or of each channel of each image, (B, C).
        bias: Number added after the gain, of the same shape.
        eps: Number added to the variance.
        offset: Number added to each channel of each image before the norm, (B, C); None adds nothing.
        silu: Whether SiLU follows.
    """
    batch, channels = x.shape[:2]
    gain, shift = (parameter.float().expand(batch, channels) for parameter in (weight, bias))
    offset = gain.new_zeros(batch, channels) if offset is None else offset.float()
    return _GroupNorm.apply(x, gain, shift, offset, num_groups, eps, silu)


def group_norm_by_channel(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, offset: Tensor | None = None
) -> Tensor:
    """Compute group_norm(x + offset), (B, C, H, W), in float32 or wider, in a form that torch.compile fuses.

    The moments of a group follow from the moments of its channels. A sum over a whole group would read pieces of
    C / num_groups numbers, a few bytes each. Digits are lost if the first number of a group is far from the others:
    about 3e-4 of a standard deviation if it is 30 standard deviations away, and 1e-2 if it is 100.

    The arguments are those of `fused_group_norm`, without silu.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (num_groups, -1))  # (B, G, C / G, H, W)
    sizes = wide.shape[:3]
    gain, shift = (parameter.to(wide.dtype).expand(x.shape[:2]).view(sizes) for parameter in (weight, bias))
    # Moments are taken about the first number of each group: about 0, a mean of many standard deviations would drown
    # the variance. Their gradient is the same about any number.
    wide = wide - wide[:, :, :1, :1, :1].detach()
    total, squares = wide.mean((3, 4)), wide.square().mean((3, 4))  # of each channel
    if offset is not None:
        offset = offset.to(wide.dtype).view(sizes)
        offset = offset - offset[:, :, :1].detach()
        total, squares = total + offset, squares + offset * (2 * total + offset)
    mean = total.mean(2, keepdim=True)
    variance = squares.mean(2, keepdim=True) - mean.square()
    scale = gain * (variance.clamp(min=0) + eps).rsqrt()
    shift = shift + ((0 if offset is None else offset) - mean) * scale
    return (wide * scale[..., None, None] + shift[..., None, None]).flatten(1, 2)


def double_by_copies(x: Tensor, size: Sequence[int]) -> Tensor:
    """Double height and width by nearest neighbours: (B, C, H, W) -> (B, C, *size), in channels_last.

    torch.compile turns the gradient of F.interpolate into an addition in memory for each pixel, and the gradient of
    this function into a sum of four numbers.

    Args:
        x: Input, (B, C, H, W).
        size: Height and width of the output: twice those of x, or 1 less.
    """
    pixels = x.permute(0, 2, 3, 1)
    copies = pixels[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)  # (B, H, 2, W, 2, C)
    return copies.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)[..., : size[0], : size[1]]


@cache
def operators() -> Any:
    """Return the operators of kernels.cpp.

    Raises:
        RuntimeError: If they cannot be compiled, saved or loaded; the error has the reason.
    """
    library = compiled_kernels()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise RuntimeError(
            f"{library} cannot be loaded ({error.__cause__ or error}); remove it to have it compiled again, or set "
            f"TORCH_EXTENSIONS_DIR to another folder, or {ANOTHER_SPEED}"
        ) from error
    return torch.ops.unet_diffusion


def compiled_kernels() -> Path:
    """Return the path of the library of kernels.cpp; if it does not exist, compile it, which takes about 11 s.

    Raises:
        RuntimeError: If it cannot be compiled or saved; the error has the reason.
    """
    library = library_path()
    if library.exists():
        return library
    compile_command = _compile_command()
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=library.parent, prefix=f"{library.stem}.", ignore_cleanup_errors=True) as temporary:
            compiled, linked = Path(temporary, "kernels.o"), Path(temporary, "kernels.so")
            _run([*compile_command, "-o", str(compiled)])
            # The library is linked without OpenMP: it then uses torch's, which has the threads.
            _run([compile_command[0], "-shared", str(compiled), *libraries, "-o", str(linked)])
            linked.replace(library)
    except OSError as error:
        raise RuntimeError(
            f"the fused kernels cannot be saved ({error}); set TORCH_EXTENSIONS_DIR to a folder that can be written, "
            f"or {ANOTHER_SPEED}"
        ) from error
    return library


def library_path() -> Path:
    """Return the path of the library, whose name is a hash of its source, in TORCH_EXTENSIONS_DIR or ~/.cache."""
    recipe = "\n".join([torch.__version__, *_compile_command(), SOURCE.read_text()])
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return folder / f"unet_diffusion_{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"


def _compile_command() -> list[str]:
    flags = BFLOAT16_FLAGS if cpu_has_bfloat16() else FLOAT32_FLAGS
    return [os.environ.get("CXX", "g++"), "-c", *COMPILER_FLAGS, *flags, f"-I{TORCH / 'include'}", str(SOURCE)]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run ({error}); set CXX to g++, or {ANOTHER_SPEED}") from error
    if done.returncode:
        lines = [*(line for line in done.stderr.splitlines() if "error:" in line), *done.stderr.splitlines()[-1:]]
        reason = lines[0] if lines else f"exit status {done.returncode}"
        raise RuntimeError(f"{command[0]} cannot build the fused kernels ({reason}); {ANOTHER_SPEED}")


class _WinogradConv2d(torch.autograd.Function):
    """The convolution with its gradient; saves the input, and not its tiles, which are several times as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        x = _channels_last(x)
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return _convolve(x, winograd_filters(weight, x.dtype), bias, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = _channels_last(grads[0].to(x.dtype))
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need_x:  # convolve with the kernels turned by 180 degrees
            filters = winograd_filters(weight, x.dtype, turned=True)
            grad_x = _convolve(grad, filters, weight.new_zeros(x.shape[3]), 2 - ctx.padding)
        if need_weight or need_bias:
            grad_weight, grad_bias = operators().winograd_filter_gradient(x, grad, ctx.padding)
            grad_weight = grad_weight.permute(0, 3, 1, 2)
        return grad_x, grad_weight, grad_bias, None


def _convolve(x: Tensor, filters: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Convolve (B, H, W, C) with filters -> (B, K, H + 2 padding - 2, W + 2 padding - 2), in channels_last."""
    return operators().winograd_convolve(x, filters, bias.detach().float(), padding).permute(0, 3, 1, 2)


class _GroupNorm(torch.autograd.Function):
    """The norm with its gradient; saves the input and two numbers for each group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, offset: Tensor, num_groups: int, eps: float, silu: bool
    ) -> Tensor:
        x, gain, shift, offset = _channels_last(x), gain.contiguous(), shift.contiguous(), offset.contiguous()
        out, mean, inverse = operators().group_norm(x, gain, shift, offset, num_groups, eps, silu)
        ctx.save_for_backward(x, gain, shift, offset, mean, inverse)
        ctx.silu = silu
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        grad = _channels_last(grads[0].to(x.dtype))
        grad_x, *others = operators().group_norm_gradient(grad, x, *others, ctx.silu)
        return grad_x.permute(0, 3, 1, 2), *others, None, None, None


def _channels_last(x: Tensor) -> Tensor:
    """Rearrange (B, C, H, W) -> (B, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
