"""Predictions for images of any size, in memory that the window bounds and not the image.

Unpadded networks go by the overlap-tile strategy of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597, figure
2): each tile is given the pixels around it, mirrored at the border of the image, and together the tiles are exactly
what one pass over the whole image gives. Padded networks see zeros at the border of a window, so windows overlap, and
are blended with weights that fall off towards it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unet_diffusion.diffusion.tiling import blend_weights, window_starts
from unet_diffusion.models.unet import PixelNetwork

Predictor = Callable[[Tensor], Tensor]  # (1, C, h, w) -> (1, K, h - 2 margin, w - 2 margin)

OVERLAP = 0.25  # share of a window that it has in common with the next, at least
NUM_VIEWS = 8  # four rotations, each with its mirror image


def predict_tiled(
    predict: Predictor, image: Tensor, network: PixelNetwork, *, window_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The prediction for each pixel of an image, (K, H, W) float32 on the CPU.

    Args:
        predict: the network, or what is made of its output pixel by pixel, such as a softmax.
        image: (C, H, W), H and W at least 1.
        network: knows its margin, its stride and the sizes it takes.
        window_size: height and width of the windows that it is given, at most; raised to the next size that it takes.
        device: where `predict` wants its input.
    """
    output: Tensor | None = None
    weight = torch.zeros(image.shape[1:])
    for top, left, window in _windows(image, network, window_size):
        part = predict(window[None].to(device))[0].float().cpu()
        if output is None:
            output = torch.zeros(len(part), *image.shape[1:])
        # What reaches beyond the image was mirrored, and is left out.
        height, width = (
            min(side, n - at) for side, n, at in zip(part.shape[1:], weight.shape, (top, left), strict=True)
        )
        place = (slice(top, top + height), slice(left, left + width))
        part = part[:, :height, :width]
        if network.margin:  # tiles agree where they overlap
            output[:, *place] = part
        else:
            blend = blend_weights(window.shape[1:], OVERLAP)[:height, :width]
            output[:, *place] += blend * part
            weight[place] += blend
    assert output is not None
    return output if network.margin else output.div_(weight)


def predict_views(predict: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """The mean prediction over the eight rotated and mirrored views of an image, each turned back, (K, H, W).

    Args:
        predict: (C, H, W) -> (K, H, W), for images of any size.
        image: (C, H, W).
    """
    total: Tensor | None = None
    for turns in range(NUM_VIEWS // 2):
        for mirrored in (False, True):
            view = torch.rot90(image, turns, (1, 2))
            prediction = predict(view.flip(2) if mirrored else view)
            prediction = prediction.flip(2) if mirrored else prediction
            back = torch.rot90(prediction, -turns, (1, 2))
            total = back.clone() if total is None else total.add_(back)
    assert total is not None
    return total / NUM_VIEWS


def mirror(start: int, stop: int, length: int) -> Tensor:
    """Indices into a row of that length for positions start to stop, mirrored at both ends as often as needed, int64.

    The pixels at the ends are not repeated: -1 is 1.
    """
    period = max(2 * (length - 1), 1)
    positions = torch.arange(start, stop) % period
    return torch.minimum(positions, period - positions) if length > 1 else torch.zeros_like(positions)


def _windows(image: Tensor, network: PixelNetwork, window_size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Top and left of the place in the image that a window predicts, and its pixels, (C, h, w)."""
    margin = network.margin
    rows, columns = ((_window(side, network, window_size), side) for side in image.shape[1:])
    for top in _starts(*rows, network):
        y = mirror(top - margin, top - margin + rows[0], rows[1])
        for left in _starts(*columns, network):
            x = mirror(left - margin, left - margin + columns[0], columns[1])
            yield top, left, image[:, y][:, :, x]


def _window(side: int, network: PixelNetwork, window_size: int) -> int:
    """The size of the windows along a side: no larger than is needed for as many as there must be."""
    margin, step = network.margin, network.size_step
    if not margin:
        return network.next_size(min(side, window_size))
    largest = max((window_size - 2 * margin) // step * step, step)
    num_tiles = -(-side // largest)
    return network.next_size(-(-side // (num_tiles * step)) * step + 2 * margin)


def _starts(window: int, side: int, network: PixelNetwork) -> list[int]:
    """Where predictions start along a side of the image."""
    if network.margin:
        # Pooling divides the plane into squares of size_step pixels, which must lie alike in all tiles.
        step = (window - 2 * network.margin) // network.size_step * network.size_step
        return list(range(0, side, step))
    return window_starts(side, window, OVERLAP)
