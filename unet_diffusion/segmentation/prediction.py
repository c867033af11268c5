"""Class scores of images that fit the network, and class probabilities of images of any size."""

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.segmentation.tiles import NUM_VIEWS, predict_tiled, predict_views


def class_scores(network: PixelNetwork, x: Tensor, timestep: int | None) -> Tensor:
    """Return class scores before the softmax, (B, K, H, W).

    Args:
        network: The network, called `network(x, t)`.
        x: Images in [-1, 1], (B, C, H, W).
        timestep: The timestep of all images; None: the network takes none.
    """
    return network(x, None if timestep is None else torch.full((len(x),), timestep, device=x.device))


def class_probabilities(
    network: PixelNetwork,
    image: Tensor,
    *,
    timestep: int | None,
    window_size: int,
    views: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[float], object] | None = None,
) -> Tensor:
    """Return the probability of each class at each pixel, (K, H, W) float32 on the CPU.

    Args:
        network: The network, on the device.
        image: (C, H, W) in [-1, 1], of any size.
        timestep: The timestep that the network is given; None: it takes none.
        window_size: Height and width of the windows that the network sees, in pixels.
        views: Average over the eight rotated and mirrored views.
        device: Where the network is.
        progress: Called with the share of the image that is done, above 0 and up to 1.
    """
    num_views, done = NUM_VIEWS if views else 1, count(1)

    def predict(x: Tensor) -> Tensor:
        return torch.softmax(class_scores(network, x, timestep).float(), dim=1)

    def on_window(num_windows: int) -> None:
        if progress is not None:
            progress(next(done) / (num_windows * num_views))

    def whole(view: Tensor) -> Tensor:
        return predict_tiled(predict, view, network, window_size=window_size, device=device, on_window=on_window)

    return predict_views(whole, image) if views else whole(image)
