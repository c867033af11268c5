"""Overlapping windows on an image: their layout, their blending, and a denoiser that works window by window.

Bar-Tal et al. 2023, MultiDiffusion (https://arxiv.org/abs/2302.08113, eq. 5): a network can denoise images larger than
those of its training if each step takes the weighted mean of its predictions for overlapping windows. The paper's equal
weights leave visible seams; here weights fall off towards the border of a window.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from unet_diffusion.diffusion.guidance import Denoise

Place = tuple[slice, slice]  # rows and columns of an image


def windowed(denoiser: Denoise, window: tuple[int, int], *, overlap: float = 0.5, batch_size: int = 64) -> Denoise:
    """A denoiser for images of any size: the blended predictions of `denoiser` for overlapping windows, float32.

    An image that fits into one window goes to the denoiser unchanged.

    Args:
        denoiser: The denoiser, called as denoiser(x, t, **inputs). The input "concat" is cut as x is; every window gets
            all other inputs.
        window: Largest height and width that the denoiser is called with.
        overlap: Share in [0, 1) of a window that it has in common with the next, at least.
        batch_size: Largest number of windows per call, but at least one window of each image.

    Raises:
        ValueError: If an argument is out of range.
    """
    if min(window) < 1 or batch_size < 1 or not 0 <= overlap < 1:
        raise ValueError(
            "window and batch_size must be at least 1 and overlap in [0, 1), "
            f"got window {window[0]} x {window[1]}, batch_size {batch_size} and overlap {overlap}"
        )

    def blended(x: Tensor, t: Tensor, **inputs: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height <= window[0] and width <= window[1]:
            return denoiser(x, t, **inputs)
        layout = _layout(height, width, window, overlap, x.device)
        output = torch.zeros(x.shape, device=x.device)
        num_together = max(batch_size // len(x), 1)
        for group in (layout[first : first + num_together] for first in range(0, len(layout), num_together)):
            predictions = _predictions(denoiser, [place for place, _ in group], x, t, inputs)
            for (place, weight), prediction in zip(group, predictions, strict=True):
                output[:, :, *place] += weight * prediction.float()
        return output

    return blended


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """The first pixel of each window along a side; windows are equally spaced and cover the side from end to end.

    Args:
        side: Length of the side in pixels.
        window: Length of a window in pixels; a window larger than the side starts at 0.
        overlap: Share in [0, 1) of a window that it has in common with the next, at least.
    """
    if side <= window:
        return [0]
    count = 1 + -(-(side - window) // max(int(window * (1 - overlap)), 1))
    return [round(i * (side - window) / (count - 1)) for i in range(count)]


def blend_weights(size: Sequence[int], overlap: float) -> Tensor:
    """The weight of each pixel of a window, (h, w): 1 in the middle, falling to almost 0 at the border.

    Args:
        size: Height and width of the window.
        overlap: Share in [0, 1) of the window over which weights fall.
    """
    ramps = []
    for side in size:
        distance = torch.minimum(torch.arange(side), torch.arange(side).flip(0)) + 1.0
        ramps.append((distance / max(overlap * side, 1)).clamp(max=1))
    return ramps[0][:, None] * ramps[1]


@lru_cache(maxsize=16)  # copying weights to a GPU in each step would wait for it
def _layout(
    height: int, width: int, window: tuple[int, int], overlap: float, device: torch.device
) -> list[tuple[Place, Tensor]]:
    """The windows on an image, each with its weights, (h, w); weights sum to 1 at every pixel of the image."""
    size = (min(window[0], height), min(window[1], width))
    blend = blend_weights(size, overlap)
    places = [
        (slice(top, top + size[0]), slice(left, left + size[1]))
        for top in window_starts(height, size[0], overlap)
        for left in window_starts(width, size[1], overlap)
    ]
    total = torch.zeros(height, width)
    for place in places:
        total[place] += blend
    return [(place, (blend / total[place]).to(device)) for place in places]


def _predictions(
    denoiser: Denoise, places: list[Place], x: Tensor, t: Tensor, inputs: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """The prediction for each window, (B, C, h, w) each, from one call of the denoiser."""
    repeated = {
        name: torch.cat([value[:, :, *place] if name == "concat" else value for place in places])
        for name, value in inputs.items()
    }
    windows = torch.cat([x[:, :, *place] for place in places])
    return denoiser(windows, t.repeat(len(places)), **repeated).chunk(len(places))
