"""The losses of a segmenter: the weighted cross-entropy of the U-Net paper, Dice, their sum; those of other maps."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_diffusion.segmentation.affinities import affinities_of

SegmentationLoss = Literal["cross_entropy", "dice", "both"]

SMOOTH = 1.0  # pixels added to both sides of the Dice quotient: a class neither present nor predicted has loss 0


def segmentation_loss(scores: Tensor, classes: Tensor, weights: Tensor, kind: SegmentationLoss) -> Tensor:
    """Return the loss of a kind, (); the other arguments are those of `weighted_cross_entropy`."""
    if kind == "cross_entropy":
        return weighted_cross_entropy(scores, classes, weights)
    if kind == "dice":
        return dice_loss(scores, classes, weights)
    return weighted_cross_entropy(scores, classes, weights) + dice_loss(scores, classes, weights)


def distance_loss(scores: Tensor, distances: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cross-entropy of sigmoids with distances, over the pixels that count, ().

    Args:
        scores: Scores of the distances before the sigmoid, (B, H, W).
        distances: Distances from the edges of objects, (B, H, W) in [0, 1].
        weights: The weight of each pixel, (B, H, W); 0 for pixels that do not count, and the rest count alike.
    """
    counts = weights > 0
    losses = F.binary_cross_entropy_with_logits(scores.float(), distances, reduction="none")
    return (losses * counts).sum() / counts.sum().clamp(min=1)


def affinity_loss(scores: Tensor, instances: Tensor, kind: SegmentationLoss) -> Tensor:
    """Return the loss of a kind of sigmoids with affinities, (), where each offset counts alike.

    Dice is of 1 - affinity, for fewer pairs are of two objects than of one (Wolf et al. 2019,
    https://arxiv.org/abs/1904.12654).

    Args:
        scores: Scores of the affinities before the sigmoid, (B, K, H, W).
        instances: Numbers of objects, as in `affinities_of`.
        kind: The loss of each offset.
    """
    together, counts = affinities_of(instances)
    apart, scores = (~together).float(), -scores.float()
    cross_entropy = F.binary_cross_entropy_with_logits(scores, apart, weight=counts, reduction="sum")
    cross_entropy = cross_entropy / counts.sum().clamp(min=1)
    if kind == "cross_entropy":
        return cross_entropy
    predicted, apart = torch.sigmoid(scores) * counts, apart * counts
    dice = _dice(predicted, apart)
    return 1 - dice.mean() + (cross_entropy if kind == "both" else 0)


def weighted_cross_entropy(scores: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of w(x) times -log softmax over the pixels that count, () (Ronneberger et al. 2015, equation 1).

    Args:
        scores: Class scores before the softmax, (B, K, H, W).
        classes: The class of each pixel, (B, H, W) int64 in [0, K), and any number where the weight is 0.
        weights: The weight w(x) of each pixel, (B, H, W); 0 for pixels that do not count.
    """
    losses = F.cross_entropy(scores.float(), torch.where(weights > 0, classes, 0), reduction="none")
    return (losses * weights).sum() / (weights > 0).sum().clamp(min=1)


def dice_loss(scores: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Return 1 - the mean Dice coefficient over all classes except the first and over the whole batch, ().

    Predictions are squared in the denominator, as in Milletari et al. 2016 (https://arxiv.org/abs/1606.04797). The
    arguments are those of `weighted_cross_entropy`; weights only tell which pixels count.
    """
    counts = (weights > 0).unsqueeze(1)
    predicted = torch.softmax(scores.float(), dim=1) * counts
    truth = F.one_hot(torch.where(weights > 0, classes, 0), scores.shape[1]).movedim(3, 1) * counts
    return 1 - _dice(predicted, truth)[1:].mean()


def _dice(predicted: Tensor, truth: Tensor) -> Tensor:
    """The coefficient of each channel, (K,), of (B, K, H, W); truth is 0 or 1."""
    overlap = (predicted * truth).sum(dim=(0, 2, 3))
    total = (predicted.square() + truth).sum(dim=(0, 2, 3))
    return (2 * overlap + SMOOTH) / (total + SMOOTH)
