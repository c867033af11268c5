"""Optimisers, their learning rate over a run, and how a resumed run keeps their state under new settings."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

LRDecay = Literal["constant", "cosine"]


def default_optimizer(params: Iterable[Tensor]) -> Optimizer:
    """AdamW at 2e-4 (Ho et al. 2020, appendix B), without weight decay."""
    return AdamW(params, lr=2.0e-4, weight_decay=0.0, fused=True)


def adam_of_gans(params: Iterable[Tensor]) -> Optimizer:
    """Adam at 1e-4, with the betas (0.5, 0.9) of Esser et al. 2021 (https://arxiv.org/abs/2012.09841)."""
    return Adam(params, lr=1.0e-4, betas=(0.5, 0.9), fused=True)


def lr_factor(step: int, num_warmup_steps: int, num_steps: float) -> float:
    """The factor of the learning rate at a step: linear warm-up, then half a cosine to 0 at num_steps.

    Args:
        step: The number of optimiser steps done.
        num_warmup_steps: The length of the warm-up; the first step gets 1 / num_warmup_steps.
        num_steps: The length of the run; infinite for a constant rate after the warm-up.
    """
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    if num_steps == math.inf:
        return 1.0
    progress = (step - num_warmup_steps) / max(num_steps - num_warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def clip_gradients(optimizer: Optimizer, most: float, algorithm: str | None, norm: Tensor | None) -> None:
    """Clip the gradients of an optimiser's weights.

    Args:
        optimizer: The optimiser, whose gradients are not scaled.
        most: The largest norm of all gradients together, or the largest value of each.
        algorithm: "value", or "norm", which is the default.
        norm: The norm, if it is known already.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if algorithm == "value":
        nn.utils.clip_grad_value_(parameters, most)
        return
    if norm is None:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    nn.utils.clip_grads_with_norm_(parameters, most, norm)


def put_hyperparameters(checkpoint: dict[str, Any], optimizers: Sequence[Optimizer]) -> None:
    """Replace the hyper-parameters of a checkpoint's optimisers by those of new ones, and keep the moments.

    Equal hyper-parameters stay as they are, bit for bit. The factor that a schedule has reached stays, too.

    Args:
        checkpoint: What Lightning is about to restore; one without optimisers is left alone.
        optimizers: Optimisers made by the present settings.

    Raises:
        ValueError: If an optimiser is of another kind, or has another number of groups of weights.
    """
    schedules = checkpoint.get("lr_schedulers") or [{} for _ in optimizers]
    # Not strict: a run that begins has no states yet.
    for saved, schedule, optimizer in zip(checkpoint.get("optimizer_states", []), schedules, optimizers, strict=False):
        if len(saved["param_groups"]) != len(optimizer.param_groups):
            raise ValueError(
                f"the checkpoint's optimiser has {len(saved['param_groups'])} groups of weights, and that of the "
                f"settings {len(optimizer.param_groups)}; set model.optimizer as it was, and of a segmenter "
                "model.pretrained_lr_scale"
            )
        has_moments = any(saved["state"].values())  # plain SGD has none, and any optimiser can follow it
        for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            if has_moments and (difference := _of_another_kind(old, new)):
                raise ValueError(
                    f"the checkpoint's optimiser {difference}, unlike {type(optimizer).__name__} of the settings; set "
                    "model.optimizer as it was, or start another run"
                )
            old |= {name: value for name, value in new.items() if name not in ("params", "lr", "initial_lr")}
            before = old.get("initial_lr", old["lr"])
            if new["lr"] != before:
                old["lr"] = new["lr"] * (old["lr"] / before if before else 1.0)
                old["initial_lr"] = new["lr"]
        if "base_lrs" in schedule:
            schedule["base_lrs"] = [group["initial_lr"] for group in saved["param_groups"]]


def _of_another_kind(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How a group of weights of a checkpoint tells that its moments are not those of a new optimiser; "" if they are.

    Of two classes each has options that the other lacks. Versions of PyTorch, and optimisers that run, only add some.
    """
    if new.get("amsgrad") and not old.get("amsgrad"):
        return "has no moments for amsgrad"
    gone, added = old.keys() - new.keys() - {"initial_lr"}, new.keys() - old.keys()
    return f"has the options {', '.join(sorted(gone))}" if gone and added else ""


def lay_out_moments(optimizers: Iterable[Optimizer]) -> None:
    """Lay out the moments of optimisers as the weights, whose memory format another speed may have changed.

    A fused optimiser walks through both in memory, whatever their strides.
    """
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                is_moment = isinstance(value, Tensor) and value.shape == parameter.shape
                if is_moment and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
