"""Predictions for images of any size, in memory that depends on the window and not on the image.

Unpadded networks use the overlap-tile strategy of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597, figure 2):
each tile is predicted from the pixels in and around it, mirrored at the border of the image, and all tiles together
equal one pass over the whole image. Padded networks see zeros at the border of a window; so windows overlap, and are
blended with weights that fall off towards the border.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from unet_diffusion.diffusion.tiling import blend_weights, window_starts
from unet_diffusion.models.unet import PixelNetwork

Predictor = Callable[[Tensor], Tensor]  # (1, C, h, w) -> (1, K, h - 2 margin, w - 2 margin)

OVERLAP = 0.25  # least share of a window that it has in common with the next
NUM_VIEWS = 8  # four rotations, each with its mirror image


def predict_tiled(
    predict: Predictor,
    image: Tensor,
    network: PixelNetwork,
    *,
    window_size: int,
    device: torch.device | str = "cpu",
    on_window: Callable[[int], object] | None = None,
) -> Tensor:
    """Return the prediction for each pixel of an image, (K, H, W) float32 on the CPU.

    Args:
        predict: The network, or the network followed by a function of each pixel, such as a softmax.
        image: The image, (C, H, W), H and W at least 1.
        network: The network, for its margin and the sizes that it takes.
        window_size: Largest height and width of a window, raised to the next size that the network takes.
        device: Device of the input of `predict`.
        on_window: Called after each window with the number of all windows.
    """
    output: Tensor | None = None
    weight = torch.zeros(image.shape[1:])
    windows = _Windows(image, network, window_size)
    for top, left, window in windows:
        part = predict(window[None].to(device))[0].float().cpu()
        if output is None:
            output = torch.zeros(len(part), *image.shape[1:])
        # A window may reach beyond the image, where pixels are mirrored; that part is left out.
        height, width = (
            min(side, n - at) for side, n, at in zip(part.shape[1:], weight.shape, (top, left), strict=True)
        )
        place = (slice(top, top + height), slice(left, left + width))
        part = part[:, :height, :width]
        if network.margin:  # overlapping tiles are equal
            output[:, *place] = part
        else:
            blend = blend_weights(window.shape[1:], OVERLAP)[:height, :width]
            output[:, *place] += blend * part
            weight[place] += blend
        if on_window is not None:
            on_window(len(windows))
    assert output is not None
    return output if network.margin else output.div_(weight)


def predict_views(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    turned: Callable[[Tensor, int, bool], Tensor] = lambda maps, turns, mirrored: maps,
) -> Tensor:
    """Return the mean prediction over the eight rotated and mirrored views of an image, each turned back, (K, H, W).

    Args:
        predict: Function (C, H, W) -> (K, H, W) of images of any size.
        image: The image, (C, H, W).
        turned: Function of a prediction whose pixels are turned back, the number of quarter turns of the view and
            whether it was mirrored, which gives the prediction that is averaged. Maps of directions need it.
    """
    total: Tensor | None = None
    for turns in range(NUM_VIEWS // 2):
        for mirrored in (False, True):
            view = torch.rot90(image, turns, (1, 2))
            prediction = predict(view.flip(2) if mirrored else view)
            prediction = prediction.flip(2) if mirrored else prediction
            back = turned(torch.rot90(prediction, -turns, (1, 2)), turns, mirrored)
            total = back.clone() if total is None else total.add_(back)
    assert total is not None
    return total / NUM_VIEWS


def mirror(start: int, stop: int, length: int) -> Tensor:
    """Return indices into a row for positions from start to stop, mirrored at both ends as often as needed, int64.

    The pixels at the ends are not repeated: position -1 has index 1.

    Args:
        start: First position.
        stop: Position after the last one.
        length: Number of pixels in the row.
    """
    period = max(2 * (length - 1), 1)
    positions = torch.arange(start, stop) % period
    return torch.minimum(positions, period - positions) if length > 1 else torch.zeros_like(positions)


class _Windows:
    """The windows of an image, cut out one by one: the top and left of the part that each predicts, and its pixels."""

    def __init__(self, image: Tensor, network: PixelNetwork, window_size: int) -> None:
        self.image, self.margin = image, network.margin
        self.sides = [_window(side, network, window_size) for side in image.shape[1:]]
        rows, columns = (
            _starts(window, side, network) for window, side in zip(self.sides, image.shape[1:], strict=True)
        )
        self.places = list(product(rows, columns))

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        for top, left in self.places:
            y, x = (
                mirror(start - self.margin, start - self.margin + window, side)
                for start, window, side in zip((top, left), self.sides, self.image.shape[1:], strict=True)
            )
            yield top, left, self.image[:, y][:, :, x]


def _window(side: int, network: PixelNetwork, window_size: int) -> int:
    """Return the size of the windows along a side of the image: the least size with which no more are needed."""
    margin, step = network.margin, network.size_step
    if not margin:
        return network.next_size(min(side, window_size))
    largest = max((window_size - 2 * margin) // step * step, step)
    num_tiles = -(-side // largest)
    return network.next_size(-(-side // (num_tiles * step)) * step + 2 * margin)


def _starts(window: int, side: int, network: PixelNetwork) -> list[int]:
    """Return the positions at which predictions start along a side of the image."""
    if network.margin:
        # Pooling divides the plane into squares of size_step pixels, which must have the same places in all tiles.
        step = (window - 2 * network.margin) // network.size_step * network.size_step
        return list(range(0, side, step))
    return window_starts(side, window, OVERLAP)
