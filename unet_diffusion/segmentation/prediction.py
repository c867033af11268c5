"""Class scores of images that fit the network, and class probabilities of images of any size."""

from typing import Protocol

import torch
from torch import Tensor

from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.segmentation.tiles import predict_tiled, predict_views


class SegmenterLike(Protocol):
    """A trained segmenter.

    Attributes:
        unet: The network, called `unet(x, t)`; it returns class scores.
        timestep: The fixed timestep of a network with a timestep embedding; None for other networks.
        window_size: Height and width of the windows that the network was trained on, in pixels.
    """

    unet: PixelNetwork
    timestep: int | None
    window_size: int


def class_scores(network: PixelNetwork, x: Tensor, timestep: int | None) -> Tensor:
    """Return class scores before the softmax, (B, K, H, W).

    Args:
        network: The network of a segmenter, called `network(x, t)`.
        x: Images in [-1, 1], (B, C, H, W), of a size that the network takes.
        timestep: The fixed timestep of a network with a timestep embedding; None for other networks.
    """
    return network(x, None if timestep is None else torch.full((len(x),), timestep, device=x.device))


def class_probabilities(
    trained: SegmenterLike, image: Tensor, *, views: bool = False, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the probability of each class at each pixel, (K, H, W) float32 on the CPU.

    Args:
        trained: The segmenter, whose network is on the device.
        image: An image in [-1, 1], (C, H, W), of any size.
        views: Whether to average over the eight rotated and mirrored views of the image.
        device: The device of the network.
    """

    def predict(x: Tensor) -> Tensor:
        return torch.softmax(class_scores(trained.unet, x, trained.timestep).float(), dim=1)

    def whole(view: Tensor) -> Tensor:
        return predict_tiled(predict, view, trained.unet, window_size=trained.window_size, device=device)

    return predict_views(whole, image) if views else whole(image)
