"""Fast forms of a U-Net's two costly parts, equal to the plain ones up to rounding; the first two are for CPUs.

`winograd_conv2d` is a 3x3 convolution with 2.25 times fewer multiplications: F(2x2, 3x3) of Lavin & Gray 2015
(https://arxiv.org/abs/1509.09308), which makes 2x2 outputs from a tile of 4x4 inputs as 16 products where the plain
form needs 36. The products are one batched matrix product; what comes before and after it is fused by torch.compile.
`fused_group_norm` is group norm, the embedding added before and SiLU, in two passes over the image instead of six.

Both want channels last in memory. Their kernels are compiled once for all shapes, in about half a minute, and kept on
disk by torch.compile; a C++ compiler is needed.

The other two are written for whole networks that are compiled for a GPU, in torch only. The reductions of
`group_norm_by_channel` are over the pixels of each channel, which channels-last memory holds side by side, and the
gradient of `double_by_copies` is a sum that is fused with what follows.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_KINDS = 64  # of types and sizes of 1 that a kernel is compiled for; torch stops at 8
TURNED = (15, 13, 14, 12, 7, 5, 6, 4, 11, 9, 10, 8, 3, 1, 2, 0)  # first and last row, and column, change places


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor, *, filters: Tensor | None = None) -> Tensor:
    """A 3x3 convolution with stride 1 and padding 1, (B, C, H, W) -> (B, K, H, W), in channels_last.

    Args:
        x: (B, C, H, W), any size; computed in autocast's type where that is on, else in its own.
        weight: (K, C, 3, 3).
        bias: (K,).
        filters: of the weight and of that type, from `winograd_filters`; None: made in each call. No gradient flows.
    """
    dtype = _autocast_dtype(x)
    with torch.autocast(x.device.type, enabled=False):  # the kernels would be compiled again for each of its states
        if filters is not None:
            return _convolve(_channels_last(x.to(dtype)), filters, bias).permute(0, 3, 1, 2)
        return _WinogradConv2d.apply(x.to(dtype), weight, bias)


def winograd_filters(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What `winograd_conv2d` makes of a weight, in that type: (K, C, 3, 3) -> (16, C, K)."""
    return _kernel(_filter_tiles, dtype)(_channels_last(weight)).transpose(1, 2)


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
    with torch.autocast(x.device.type, enabled=False):
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


class _WinogradConv2d(torch.autograd.Function):
    """Keeps the input, not its tiles, which are four times as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = _channels_last(x)
        ctx.save_for_backward(x, weight)
        return _convolve(x, winograd_filters(weight, x.dtype), bias).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = _channels_last(grads[0].to(x.dtype))
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if need_x:  # the convolution with the filter turned by 180 degrees, whose tiles are those of the filter turned
            filters = _kernel(_filter_tiles, x.dtype)(_channels_last(weight))[list(TURNED)]
            grad_x = _convolve(grad, filters, grad.new_zeros(x.shape[3])).permute(0, 3, 1, 2)
        if need_weight:
            grad_weight = _kernel(_filter_gradient)(_tile_products(x, grad)).permute(0, 3, 1, 2)
        if need_bias:
            grad_bias = grad.sum((0, 1, 2), dtype=torch.float32)
        return grad_x, grad_weight, grad_bias


def _convolve(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, C), (16, C, K) and (K,) -> (B, H, W, K)."""
    batch, height, width, _ = x.shape
    tiles = _kernel(_input_tiles)(_padded(x))  # (16, B, h, w, C)
    products = torch.bmm(tiles.flatten(1, 3), filters)  # (16, B*h*w, K)
    h, w = tiles.shape[2:4]
    out = _kernel(_outputs)(products.view(4, 4, batch * h, w, len(bias)), bias)  # (B*h, 2, w, 2, K)
    return out.view(batch, 2 * h, 2 * w, len(bias))[:, :height, :width].contiguous()


def _tile_products(x: Tensor, grad: Tensor) -> Tensor:
    """(B, H, W, C) and (B, H, W, K) -> the gradient of the filter tiles, (4, 4, K, C)."""
    batch, height, width, num_out = grad.shape
    tiles = _kernel(_input_tiles)(_padded(x)).flatten(1, 3)  # (16, B*h*w, C)
    even = F.pad(grad, (0, 0, 0, width % 2, 0, height % 2))
    even = even.view(batch * ((height + 1) // 2), 2, (width + 1) // 2, 2, num_out)
    grad_tiles = _kernel(_gradient_tiles)(even).flatten(1, 2)  # (16, B*h*w, K)
    return torch.bmm(grad_tiles.transpose(1, 2), tiles).unflatten(0, (4, 4))


def _filter_tiles(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """G w G^T for each filter w, with G of section 4.1: (K, 3, 3, C) -> (16, K, C)."""
    top, middle, bottom = weight.float().unbind(1)
    tiles = []
    for row in (top, (top + middle + bottom) / 2, (top - middle + bottom) / 2, bottom):
        left, centre, right = row.unbind(1)
        tiles += [left, (left + centre + right) / 2, (left - centre + right) / 2, right]
    return torch.stack([tile.to(dtype) for tile in tiles])


def _filter_gradient(products: Tensor) -> Tensor:
    """G^T p G, the transpose of `_filter_tiles`: (4, 4, K, C) -> (K, 3, 3, C) float32."""
    p = products.float()
    rows = []
    for row in (p[0] + (p[1] + p[2]) / 2, (p[1] - p[2]) / 2, (p[1] + p[2]) / 2 + p[3]):
        half = (row[1] + row[2]) / 2
        rows.append(torch.stack([row[0] + half, (row[1] - row[2]) / 2, half + row[3]], dim=1))
    return torch.stack(rows, dim=1)


def _padded(x: Tensor) -> Tensor:
    """(B, H, W, C) with a border of zeros, and one more where a side is odd."""
    batch, height, width, channels = x.shape
    padded = x.new_empty(batch, 2 + height + height % 2, 2 + width + width % 2, channels)
    for border in (padded[:, 0], padded[:, height + 1 :], padded[:, :, 0], padded[:, :, width + 1 :]):
        border.zero_()  # F.pad fills the whole with zeros first
    padded[:, 1 : height + 1, 1 : width + 1] = x
    return padded


def _input_tiles(padded: Tensor) -> Tensor:
    """B^T d B for each 4x4 tile d, two pixels apart: (B, 2h + 2, 2w + 2, C) -> (16, B, h, w, C)."""
    batch, height, width, channels = padded.shape
    h, w = height // 2 - 1, width // 2 - 1
    pairs = padded.view(batch, height // 2, 2, width // 2, 2, channels).float()
    d = (pairs[:, :h, 0], pairs[:, :h, 1], pairs[:, 1:, 0], pairs[:, 1:, 1])  # rows of the tiles
    tiles = []
    for row in (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]):
        e = (row[:, :, :w, 0], row[:, :, :w, 1], row[:, :, 1:, 0], row[:, :, 1:, 1])  # and columns
        tiles += [e[0] - e[2], e[1] + e[2], e[2] - e[1], e[1] - e[3]]
    return torch.stack([tile.to(padded.dtype) for tile in tiles])


def _outputs(products: Tensor, bias: Tensor) -> Tensor:
    """A^T m A + bias for each tile m: (4, 4, B*h, w, K) -> (B*h, 2, w, 2, K)."""
    m = products.float()
    rows = []
    for row in (m[0] + m[1] + m[2], m[1] - m[2] - m[3]):
        pair = (row[0] + row[1] + row[2] + bias, row[1] - row[2] - row[3] + bias)
        rows.append(torch.stack([pixel.to(products.dtype) for pixel in pair], dim=2))
    return torch.stack(rows, dim=1)


def _gradient_tiles(grad: Tensor) -> Tensor:
    """A g A^T, the transpose of `_outputs`: (B*h, 2, w, 2, K) -> (16, B*h, w, K)."""
    g = grad.float()
    top, bottom = g[:, 0], g[:, 1]
    tiles = []
    for row in (top, top + bottom, top - bottom, -bottom):
        left, right = row[:, :, 0], row[:, :, 1]
        tiles += [left, left + right, left - right, -right]
    return torch.stack([tile.to(grad.dtype) for tile in tiles])


class _GroupNorm(torch.autograd.Function):
    """All that is as large as the image is in four compiled kernels; the rest is a few numbers a channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, offset: Tensor, num_groups: int, eps: float, silu: bool
    ) -> Tensor:
        x = _channels_last(x)
        height, width = x.shape[1:3]
        pixels = x.flatten(1, 2)  # (B, H*W, C)
        # Moments about each channel's first pixel: about 0, a mean of many deviations would drown the variance.
        first = pixels[:, 0].float()
        total, squares = (moment / (height * width) for moment in _kernel(_moments)(pixels, first[:, None]))
        channel_mean = first + total
        mean = _group_mean(channel_mean + offset, num_groups)
        channel_variance = squares - total**2 + (channel_mean + offset - mean) ** 2  # about the group's mean
        std = _group_mean(channel_variance, num_groups).clamp(min=0).add(eps).sqrt()
        scale = gain / std
        shift = shift + (offset - mean) * scale
        ctx.save_for_backward(pixels, gain, offset, mean, std, scale, shift, channel_mean)
        ctx.num_groups, ctx.silu = num_groups, silu
        out = _kernel(_scaled, silu)(pixels, scale[:, None], shift[:, None])
        return out.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pixels, gain, offset, mean, std, scale, shift, channel_mean = ctx.saved_tensors
        grad = _channels_last(grads[0].to(pixels.dtype))
        height, width = grad.shape[1:3]
        num_pixels = height * width
        grad = grad.flatten(1, 2)
        # z is what SiLU is applied to; xhat the normalised image, before gain and shift.
        sum_dz, sum_dz_x = _kernel(_gradient_sums, ctx.silu)(grad, pixels, scale[:, None], shift[:, None])
        sum_dz_xhat = (sum_dz_x + (offset - mean) * sum_dz) / std
        mean_dxhat = _group_mean(sum_dz * gain, ctx.num_groups) / num_pixels
        mean_dxhat_xhat = _group_mean(sum_dz_xhat * gain, ctx.num_groups) / num_pixels
        # dx = (dxhat - mean_dxhat - xhat mean_dxhat_xhat) / std, as dz scale + x slope + intercept
        slope = -mean_dxhat_xhat / std**2
        intercept = -mean_dxhat / std + (offset - mean) * slope
        grad_x = _kernel(_norm_gradient, ctx.silu)(
            grad, pixels, scale[:, None], shift[:, None], slope[:, None], intercept[:, None]
        ).unflatten(1, (height, width)).permute(0, 3, 1, 2)  # fmt: skip
        grad_offset = scale * sum_dz + num_pixels * (slope * channel_mean + intercept)  # the sum of dx over the pixels
        return grad_x, sum_dz_xhat, sum_dz, grad_offset, None, None, None


def _group_mean(values: Tensor, num_groups: int) -> Tensor:
    """The mean over each group of channels, for each of its channels: (B, C) -> (B, C)."""
    grouped = values.unflatten(1, (num_groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def _moments(x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over pixels of the distance from the centre and of its square: (B, H*W, C) and (B, 1, C) -> (B, C) twice."""
    x = x.float() - centre
    return x.sum(1), (x * x).sum(1)


def _scaled(x: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    z = x.float() * scale + shift
    return (z * torch.sigmoid(z) if silu else z).to(x.dtype)


def _scaled_gradient(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    """That of z in `_scaled`."""
    if not silu:
        return grad.float()
    z = x * scale + shift
    sigmoid = torch.sigmoid(z)
    return grad.float() * (sigmoid * (1 + z * (1 - sigmoid)))


def _gradient_sums(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    x = x.float()
    dz = _scaled_gradient(grad, x, scale, shift, silu)
    return dz.sum(1), (dz * x).sum(1)


def _norm_gradient(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, intercept: Tensor, silu: bool
) -> Tensor:
    wide = x.float()
    return (_scaled_gradient(grad, wide, scale, shift, silu) * scale + wide * slope + intercept).to(x.dtype)


@cache
def _kernel(function: Callable[..., Any], *options: Any) -> Callable[..., Any]:
    """The function compiled for all sizes, but anew for each type, pattern of sizes that are 1, and inference mode."""
    from torch._dynamo import config as dynamo_config  # seconds to import, which runs that are not fused save
    from torch.fx.experimental import _config as shape_config

    compiled = torch.compile(function, dynamic=True)
    known = set()

    def call(*tensors: Tensor) -> Any:
        # requires_grad would be another reason to compile anew.
        tensors = tuple(tensor.detach() for tensor in tensors)
        sizes = tuple((tensor.dtype, *(size == 1 for size in tensor.shape)) for tensor in tensors)
        kind = (torch.is_inference_mode_enabled(), *sizes)
        if kind in known:
            return compiled(*tensors, *options)
        known.add(kind)
        # Sizes that happen to be equal are not taken to be so always. mypy does not see patch(), which torch adds
        # to the module when it is imported.
        with dynamo_config.patch(recompile_limit=MAX_KINDS), shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled(*tensors, *options)

    return call


def _channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
