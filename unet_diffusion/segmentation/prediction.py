"""Maps of images of any size: class probabilities, distances and affinities."""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.segmentation.affinities import turned_back
from unet_diffusion.segmentation.tiles import NUM_VIEWS, predict_tiled, predict_views


def predicted_maps(
    network: PixelNetwork,
    image: Tensor,
    *,
    num_classes: int,
    num_maps: int,
    has_affinities: bool = False,
    timestep: int | None,
    window_size: int,
    views: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[float], object] | None = None,
) -> Tensor:
    """Return each pixel's probability of each class, and then distances or affinities, (K, H, W) float32 on the CPU.

    Args:
        network: The network, on the device.
        image: (C, H, W) in [-1, 1], of any size.
        num_classes: How many of the maps are of classes, the first.
        num_maps: How many of the network's outputs are maps, the first; others are of another task.
        has_affinities: Whether the other scores are of affinities, which depend on the direction of the view.
        timestep: The timestep that the network is given; None: it takes none.
        window_size: Height and width of the windows that the network sees, in pixels.
        views: Average over the eight rotated and mirrored views.
        device: Where the network is.
        progress: Called with the share of the image that is done, above 0 and up to 1.
    """
    num_views, done = NUM_VIEWS if views else 1, count(1)

    def predict(x: Tensor) -> Tensor:
        t = None if timestep is None else torch.full((len(x),), timestep, device=x.device)
        scores = network(x, t)[:, :num_maps].float()
        classes, others = scores[:, :num_classes], scores[:, num_classes:]
        return torch.cat([torch.softmax(classes, dim=1), torch.sigmoid(others)], dim=1)

    def on_window(num_windows: int) -> None:
        if progress is not None:
            progress(next(done) / (num_windows * num_views))

    def whole(view: Tensor) -> Tensor:
        return predict_tiled(predict, view, network, window_size=window_size, device=device, on_window=on_window)

    def turned(maps: Tensor, turns: int, mirrored: bool) -> Tensor:
        return torch.cat([maps[:num_classes], turned_back(maps[num_classes:], turns, mirrored)])

    if not views:
        return whole(image)
    return predict_views(whole, image, turned) if has_affinities else predict_views(whole, image)
