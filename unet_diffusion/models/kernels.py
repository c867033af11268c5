"""Fast forms of a U-Net's two costly parts, equal to the plain ones up to rounding; the first two are for CPUs.

`winograd_conv2d` is a 3x3 convolution with fewer multiplications (Lavin & Gray 2015, https://arxiv.org/abs/1509.09308):
F(4x4, 3x3) in float32, which makes 4x4 outputs from a tile of 6x6 inputs as 36 products where the plain form needs 144,
and F(2x2, 3x3) in bfloat16, 16 products in place of 36. `fused_group_norm` is group norm, the embedding added before
and SiLU, an image's channels at a time.

Both want channels last in memory, and AVX2, with which they compute in float32; with AVX-512 and its bf16 in bfloat16
too. They are written in C++ in kernels.cpp. When sampling, tiles never lie in memory as a whole: a thread takes some
through all that is done to them while they are in its cache.

The other two are written for whole networks that are compiled for a GPU, in torch only. The reductions of
`group_norm_by_channel` are over the pixels of each channel, which channels-last memory holds side by side, and the
gradient of `double_by_copies` is a sum that is fused with what follows.
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
FLOAT32_FLAGS = "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"  # for the others


def winograd_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, *, padding: int = 1, filters: Tensor | None = None
) -> Tensor:
    """A 3x3 convolution with stride 1, (B, C, H, W) -> (B, K, H + 2 padding - 2, W + 2 padding - 2), in channels_last.

    Args:
        x: (B, C, H, W), any size; computed in autocast's type where that is on, else in its own: float32, or bfloat16
            where the processor has that.
        weight: (K, C, 3, 3), C and K multiples of 16.
        bias: (K,).
        padding: rows and columns of zeros on each side, 0 to 2.
        filters: of the weight and of that type, from `winograd_filters`; None: made in each call. No gradient flows.
    """
    dtype = _autocast_dtype(x)
    if filters is not None:
        return _convolve(_channels_last(x.to(dtype)), filters, bias, padding)
    return _WinogradConv2d.apply(x.to(dtype), weight, bias, padding)


def winograd_filters(weight: Tensor, dtype: torch.dtype, *, turned: bool = False) -> Tensor:
    """What `winograd_conv2d` makes of a weight: (K, C, 3, 3) -> (components, C, K), in an order of its own.

    Args:
        weight: (K, C, 3, 3).
        dtype: float32 or bfloat16.
        turned: of the filters turned by 180 degrees, from output to input: (components, K, C).
    """
    return operators().winograd_filters(_channels_last(weight.detach().float()), dtype, turned)


def fused_group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, offset: Tensor | None = None, silu: bool
) -> Tensor:
    """group_norm(x + offset) over (B, C, H, W), then SiLU if asked: channels_last, x's type, computed in float32.

    Args:
        x: (B, C, H, W).
        num_groups: must divide C.
        weight: gain of each channel, (C,), or of each channel of each image, (B, C).
        bias: added after the gain, same shape.
        eps: added to the variance.
        offset: added to each channel of each image, (B, C); None: nothing.
        silu: whether SiLU follows.
    """
    batch, channels = x.shape[:2]
    gain, shift = (parameter.float().expand(batch, channels) for parameter in (weight, bias))
    offset = gain.new_zeros(batch, channels) if offset is None else offset.float()
    return _GroupNorm.apply(x, gain, shift, offset, num_groups, eps, silu)


def group_norm_by_channel(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, offset: Tensor | None = None
) -> Tensor:
    """group_norm(x + offset) over (B, C, H, W), computed in float32 or wider, for torch.compile to fuse.

    A group's moments follow from those of its channels. Summed at once, a group would be read in pieces of C /
    num_groups numbers, a few bytes each. Digits are lost if a group's first number is far from the others: about
    3e-4 of a standard deviation where it is 30 of them away, 1e-2 where it is 100.

    Arguments are those of `fused_group_norm`, without silu.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (num_groups, -1))  # (B, G, C / G, H, W)
    sizes = wide.shape[:3]
    gain, shift = (one.to(wide.dtype).expand(x.shape[:2]).view(sizes) for one in (weight, bias))
    # Moments about each group's first number: about 0, a mean of many deviations would drown the variance. They have
    # the same gradient about any number.
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
    """Nearest-neighbour doubling: (B, C, H, W) -> (B, C, *size), in channels_last.

    The gradient of F.interpolate is compiled to an addition in memory for each pixel, of this to a sum of four.

    Args:
        x: (B, C, H, W).
        size: twice the height and width, or less by 1.
    """
    pixels = x.permute(0, 2, 3, 1)
    copies = pixels[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)  # (B, H, 2, W, 2, C)
    return copies.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)[..., : size[0], : size[1]]


@cache
def operators() -> Any:
    """The operators of kernels.cpp. Raises RuntimeError if they cannot be compiled, kept or loaded, with the reason."""
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
    """kernels.cpp as a library, compiled in about 11 s if it is not there yet; it appears when it is whole.

    Raises:
        RuntimeError: if it cannot be compiled or kept, with the reason.
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
            # Without an OpenMP of its own: torch's, which has the threads, is the one that it finds.
            _run([compile_command[0], "-shared", str(compiled), *libraries, "-o", str(linked)])
            linked.replace(library)
    except OSError as error:
        raise RuntimeError(
            f"the fused kernels cannot be kept ({error}); set TORCH_EXTENSIONS_DIR to a folder that can be written, or "
            f"{ANOTHER_SPEED}"
        ) from error
    return library


def library_path() -> Path:
    """Where it is kept, in the folder TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions: named by its contents."""
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
        said = [*(line for line in done.stderr.splitlines() if "error:" in line), *done.stderr.splitlines()[-1:]]
        reason = said[0] if said else f"exit status {done.returncode}"
        raise RuntimeError(f"{command[0]} cannot build the fused kernels ({reason}); {ANOTHER_SPEED}")


class _WinogradConv2d(torch.autograd.Function):
    """Keeps the input, not its tiles, which are several times as large."""

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
        if need_x:  # the convolution with the filters turned by 180 degrees
            filters = winograd_filters(weight, x.dtype, turned=True)
            grad_x = _convolve(grad, filters, weight.new_zeros(x.shape[3]), 2 - ctx.padding)
        if need_weight or need_bias:
            grad_weight, grad_bias = operators().winograd_filter_gradient(x, grad, ctx.padding)
            grad_weight = grad_weight.permute(0, 3, 1, 2)
        return grad_x, grad_weight, grad_bias, None


def _convolve(x: Tensor, filters: Tensor, bias: Tensor, padding: int) -> Tensor:
    """(B, H, W, C) and filters -> (B, K, H + 2 padding - 2, W + 2 padding - 2), in channels_last."""
    return operators().winograd_convolve(x, filters, bias.detach().float(), padding).permute(0, 3, 1, 2)


class _GroupNorm(torch.autograd.Function):
    """Keeps the input and two numbers a group."""

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
    """(B, C, H, W) -> (B, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
