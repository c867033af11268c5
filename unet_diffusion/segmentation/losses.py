"""What a segmenter minimises: the weighted cross-entropy of the U-Net paper, the Dice loss, or their sum."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SegmentationLoss = Literal["cross_entropy", "dice", "both"]

SMOOTH = 1.0  # pixels added to both sides of the Dice quotient: a class that is neither there nor predicted has loss 0


def segmentation_loss(scores: Tensor, classes: Tensor, weights: Tensor, kind: SegmentationLoss) -> Tensor:
    """The loss of that kind; the arguments are those of the two functions below."""
    if kind == "cross_entropy":
        return weighted_cross_entropy(scores, classes, weights)
    if kind == "dice":
        return dice_loss(scores, classes, weights)
    return weighted_cross_entropy(scores, classes, weights) + dice_loss(scores, classes, weights)


def weighted_cross_entropy(scores: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """Mean over the pixels that count of w(x) times -log softmax (Ronneberger et al. 2015, equation 1).

    Args:
        scores: (B, K, H, W).
        classes: (B, H, W) int64 in [0, K); anything where weights are 0.
        weights: (B, H, W); 0 for pixels that do not count.
    """
    losses = F.cross_entropy(scores.float(), torch.where(weights > 0, classes, 0), reduction="none")
    return (losses * weights).sum() / (weights > 0).sum().clamp(min=1)


def dice_loss(scores: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
    """1 - the mean Dice coefficient of the classes but the first, over the whole batch (Milletari et al. 2016).

    The weights only say which pixels count. Squares in the denominator, as in https://arxiv.org/abs/1606.04797.
    The arguments are those of `weighted_cross_entropy`.
    """
    counts = (weights > 0).unsqueeze(1)
    predicted = torch.softmax(scores.float(), dim=1) * counts
    truth = F.one_hot(torch.where(weights > 0, classes, 0), scores.shape[1]).movedim(3, 1) * counts
    overlap = (predicted * truth).sum(dim=(0, 2, 3))
    total = (predicted.square() + truth).sum(dim=(0, 2, 3))
    return 1 - ((2 * overlap + SMOOTH) / (total + SMOOTH))[1:].mean()
