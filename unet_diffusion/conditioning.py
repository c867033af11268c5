"""Conditions: labels dropped in training, and classifier-free guidance wrapped around a denoiser in sampling.

Classifier-free diffusion guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598). A network trained with some
of its labels replaced by a null label predicts with and without the class; the difference, amplified, pulls towards the
class. As in diffusers, and unlike in the paper, scale 1 is the conditional prediction itself: theirs is 1 + w.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""denoiser(x, t, labels): the network's prediction (B, C, H, W) for x (B, C, H, W), t (B,) and labels (B,) or None."""

Predictor = Callable[[Tensor, Tensor], Tensor]
"""predictor(x, t): a denoiser whose conditions are settled, as the sampling loop calls it."""


def drop_labels(labels: Tensor, null_label: int, dropout: float, generator: torch.Generator) -> Tensor:
    """Labels, each replaced by null_label with probability dropout, (B,) int64.

    Args:
        labels: (B,) int64.
        null_label: the class that stands for none.
        dropout: probability in [0, 1]; 0.1 is usual.
        generator: of the choice; B numbers are drawn from it whatever the probability.

    Raises:
        ValueError: if dropout is not a probability.
    """
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability in [0, 1], got {dropout}")
    dropped = torch.rand(labels.shape, generator=generator, device=generator.device, dtype=torch.float32) < dropout
    return torch.where(dropped.to(labels.device), null_label, labels)


def guide(denoiser: Denoiser, labels: Tensor | None, *, null_label: int | None, guidance_scale: float) -> Predictor:
    """A predictor of uncond + guidance_scale * (cond - uncond) for these labels, float32.

    Both predictions come from one doubled batch, the labelled half first. Where guidance_scale is 1 there is a single
    pass with the labels as they are.

    Args:
        denoiser: called as denoiser(x, t, labels).
        labels: (B,) int64 on the denoiser's device, one for each image of the batches to come; None: no classes.
        null_label: the class that stands for none; None if the network was trained without.
        guidance_scale: 1 is off, 0 ignores the labels, more than 1 amplifies them.

    Raises:
        ValueError: if guidance is asked for without labels or without a null label.
    """
    check_guidance(labels, null_label=null_label, guidance_scale=guidance_scale)
    if guidance_scale == 1 or labels is None or null_label is None:
        return lambda x, t: denoiser(x, t, labels)
    both_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        both = denoiser(torch.cat([x, x]), torch.cat([t, t]), both_labels)
        cond, uncond = both.float().chunk(2)  # bfloat16 would round their difference
        return uncond + guidance_scale * (cond - uncond)

    return predict


def check_guidance(labels: Tensor | None, *, null_label: int | None, guidance_scale: float) -> None:
    """Refuses guidance without a pair of predictions to guide between.

    Raises:
        ValueError: if guidance_scale is not 1 and there are no labels or no null label.
    """
    if guidance_scale == 1:
        return
    if labels is None:
        raise ValueError(f"guidance_scale must be 1 without labels, got {guidance_scale}; give the labels")
    if null_label is None:
        raise ValueError(
            f"guidance_scale must be 1 without a null label, got {guidance_scale}; "
            "guidance needs a network that was trained with label dropout"
        )
