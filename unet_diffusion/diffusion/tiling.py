"""Windows on an image: how they lie, how they are blended, and a denoiser that looks through them.

Bar-Tal et al. 2023, MultiDiffusion (https://arxiv.org/abs/2302.08113, eq. 5): a network denoises images larger than it
was trained on if it predicts overlapping windows, and each step goes by the weighted mean of their predictions. Theirs
have equal weights, and show where windows end; here weights fall off towards the border of a window.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from unet_diffusion.diffusion.guidance import Denoise

Place = tuple[slice, slice]  # rows and columns of an image


def windowed(denoiser: Denoise, window: tuple[int, int], *, overlap: float = 0.5, batch_size: int = 64) -> Denoise:
    """A denoiser for images of any size that calls another one with windows, and blends its predictions, float32.

    Along a side that the window covers there is one window of that side; where it covers both, the other denoiser's
    prediction is returned as it is.

    Args:
        denoiser: called as denoiser(x, t, **inputs); of the inputs "concat" are cut as x is, others are for every
            window.
        window: height and width that it is called with, at most.
        overlap: share in [0, 1) of a window that it has in common with the next, at least.
        batch_size: windows at once, at most, but one of each image at least.

    Raises:
        ValueError: if an argument is out of range.
    """
    if min(window) < 1 or batch_size < 1 or not 0 <= overlap < 1:
        raise ValueError(
            "window and batch_size must be at least 1 and overlap in [0, 1), "
            f"got {window[0]} x {window[1]}, {batch_size} and {overlap}"
        )

    def blended(x: Tensor, t: Tensor, **inputs: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height <= window[0] and width <= window[1]:
            return denoiser(x, t, **inputs)
        layout = _layout(height, width, window, overlap, x.device)
        output = torch.zeros(x.shape, device=x.device)
        num_together = max(batch_size // len(x), 1)
        for some in (layout[first : first + num_together] for first in range(0, len(layout), num_together)):
            predictions = _predictions(denoiser, [place for place, _ in some], x, t, inputs)
            for (place, weight), prediction in zip(some, predictions, strict=True):
                output[:, :, *place] += weight * prediction.float()
        return output

    return blended


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """Where windows start along a side: at equal distances, the first at its beginning and the last up to its end.

    Args:
        side: in pixels.
        window: in pixels; one that is larger than the side starts at 0.
        overlap: share of a window that it has in common with the next, at least.
    """
    if side <= window:
        return [0]
    count = 1 + -(-(side - window) // max(int(window * (1 - overlap)), 1))
    return [round(i * (side - window) / (count - 1)) for i in range(count)]


def blend_weights(size: Sequence[int], overlap: float) -> Tensor:
    """Weights of the pixels of a window of that size, (h, w): 1 in its middle, falling to almost 0 over the overlap."""
    ramps = []
    for side in size:
        distance = torch.minimum(torch.arange(side), torch.arange(side).flip(0)) + 1.0
        ramps.append((distance / max(overlap * side, 1)).clamp(max=1))
    return ramps[0][:, None] * ramps[1]


@lru_cache(maxsize=16)  # copying weights to a device each step would wait for it
def _layout(
    height: int, width: int, window: tuple[int, int], overlap: float, device: torch.device
) -> list[tuple[Place, Tensor]]:
    """The windows on an image, and the weights of each, (h, w), which sum to 1 at every pixel."""
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
    """The prediction for each window, (B, C, h, w) each, of one call."""
    repeated = {
        name: torch.cat([value[:, :, *place] if name == "concat" else value for place in places])
        for name, value in inputs.items()
    }
    windows = torch.cat([x[:, :, *place] for place in places])
    return denoiser(windows, t.repeat(len(places)), **repeated).chunk(len(places))
