"""What a run will take: memory, time, disk, and how often it shows each image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unet_diffusion.checks.findings import Finding

BYTES = 4  # of a weight, its average, its gradient and each of its moments


@dataclass(frozen=True)
class Plan:
    """The settings of a run that decide what it takes and what comes of it.

    Args:
        task: "denoise", "segment" or "autoencode".
        image_shape: (C, H, W) of what the network takes.
        num_train: The number of images to train on.
        num_val: The number of images to validate on.
        batch_size: The number of images of a batch of one process.
        images_a_step: The number of images of an optimiser step, of all processes.
        num_steps: The number of optimiser steps; infinite if the run has no end.
        num_parameters: The number of parameters of all networks.
        num_trained: The number of parameters that are trained.
        num_moments: The number of moments that the optimiser keeps of each trained parameter.
        optimizer: The name of the optimiser's class.
        learning_rate: The learning rate.
        momentum: The momentum of SGD; 0 for optimisers of Adam's kind.
        lr_warmup_steps: The number of steps over which the learning rate rises.
        ema_decay: The share of the moving average that stays at each step; 0: there is none.
        has_batch_norm: Whether the network has batch norms.
        horizontal_flip: Whether images are mirrored.
        class_names: The name of each class that the user named, if the model takes classes.
        captions: The caption of each image, if the model takes captions.
        can_be_guided: Whether classes or captions are dropped at times; None: there are none.
        last_snr: Signal to noise at the noisiest timestep; None: no noise is added.
        encodes: Whether the network sees latents.
    """

    task: str
    image_shape: tuple[int, int, int]
    num_train: int
    num_val: int
    batch_size: int
    images_a_step: int
    num_steps: float
    num_parameters: int
    num_trained: int
    num_moments: int
    optimizer: str
    learning_rate: float
    momentum: float
    lr_warmup_steps: int
    ema_decay: float
    has_batch_norm: bool
    horizontal_flip: bool
    class_names: Sequence[str] = ()
    captions: Sequence[str] = ()
    can_be_guided: bool | None = None
    last_snr: float | None = None
    encodes: bool = False

    @property
    def times_shown(self) -> float:
        """How often each image is shown."""
        return self.num_steps * self.images_a_step / self.num_train

    @property
    def coming_bytes(self) -> int:
        """The memory that the first step asks for beside that of the weights and activations."""
        return BYTES * (1 + self.num_moments) * self.num_trained

    @property
    def state_bytes(self) -> int:
        """The memory of the weights, the average, gradients and moments of those that are trained."""
        return BYTES * (self.num_parameters + self.num_trained) + self.coming_bytes


@dataclass(frozen=True)
class Measured:
    """What a few steps took.

    Args:
        step_seconds: Seconds of an optimiser step.
        val_seconds: Seconds of a validation; 0: none was tried.
        num_validations: The number of validations of the run.
        used_bytes: The memory that was used at most.
        free_bytes: The memory that was free beside it; None: it is not known.
        where: Whose memory, such as "of the GPU".
    """

    step_seconds: float
    val_seconds: float
    num_validations: float
    used_bytes: int
    free_bytes: int | None
    where: str


@dataclass(frozen=True)
class Disk:
    """What checkpoints take.

    Args:
        checkpoint_bytes: The size of one.
        num_kept: How many lie there at most.
        free_bytes: What is free.
    """

    checkpoint_bytes: int
    num_kept: float
    free_bytes: int


def plan_facts(plan: Plan, measured: Measured | None = None, disk: Disk | None = None) -> list[str]:
    """Lines about what a run will take."""
    trained = "" if plan.num_trained == plan.num_parameters else f", {plan.num_trained:,} of them trained"
    size = "x".join(map(str, plan.image_shape))
    steps = "no end" if plan.num_steps == math.inf else f"{plan.num_steps:,.0f} steps"
    lines = [
        f"network: {plan.num_parameters:,} parameters{trained}; weights, average, gradients and moments take "
        f"{in_bytes(plan.state_bytes)}",
        f"run: {steps} of {plan.images_a_step} {'latents' if plan.encodes else 'images'} of {size}",
    ]
    if plan.num_steps < math.inf:
        total = plan.num_steps * plan.images_a_step
        lines.append(f"shown: each image {plan.times_shown:.3g} times on average, {total:,.0f} images in all")
    if measured is not None:
        lines += _measured_facts(plan, measured)
    if disk is not None:
        lines.append(
            f"disk: {disk.num_kept:.0f} checkpoints of {in_bytes(disk.checkpoint_bytes)}; {in_bytes(disk.free_bytes)} "
            "are free"
        )
    return lines


def _measured_facts(plan: Plan, measured: Measured) -> list[str]:
    free = "" if measured.free_bytes is None else f"; {in_bytes(measured.free_bytes)} more were free"
    lines = [
        f"memory {measured.where}: {in_bytes(measured.used_bytes)} in the steps that were tried{free}",
        f"time: {in_time(measured.step_seconds)} a step",
    ]
    if measured.val_seconds:
        lines[-1] += f", {in_time(measured.val_seconds)} a validation"
    if plan.num_steps < math.inf:
        validations = measured.num_validations * measured.val_seconds
        total = plan.num_steps * measured.step_seconds + validations
        lines[-1] += f"; {in_time(total)} for the run without its pictures"
    return lines


def refuse_little_memory(plan: Plan, free_bytes: int | None) -> None:
    """Refuse a run whose first step does not fit in memory, whatever its batches; a system may just kill it.

    Args:
        plan: The run, whose weights are in memory.
        free_bytes: The memory that is free beside them; None: it is not known.

    Raises:
        ValueError: If it does not fit.
    """
    if free_bytes is not None and plan.coming_bytes > free_bytes:
        raise ValueError(
            f"gradients and moments of {plan.num_trained:,} parameters take {in_bytes(plan.coming_bytes)}, and "
            f"{in_bytes(free_bytes)} are free; use a network with fewer channels"
        )


def plan_findings(plan: Plan, measured: Measured | None = None, disk: Disk | None = None) -> list[Finding]:
    """Whether memory and disk suffice."""
    findings = []
    if measured is not None and measured.free_bytes is not None and measured.free_bytes < measured.used_bytes // 10:
        text = (
            f"the steps that were tried left {in_bytes(measured.free_bytes)} of memory free, and a run takes more at "
            "times, such as for pictures and checkpoints"
        )
        findings.append(Finding("warning", text, f"--data.batch_size {max(plan.batch_size // 2, 1)}"))
    if disk is not None and disk.num_kept * disk.checkpoint_bytes > disk.free_bytes:
        text = (
            f"{disk.num_kept:.0f} checkpoints take {in_bytes(int(disk.num_kept * disk.checkpoint_bytes))}, and "
            f"{in_bytes(disk.free_bytes)} are free"
        )
        option = "--checkpoint.save_top_k 1, or --trainer.default_root_dir on another disk"
        findings.append(Finding("warning", text, option))
    return findings


def in_bytes(number: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"


def in_time(seconds: float) -> str:
    """A time in a unit that suits it, such as "2.5 h"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 1.5 * length or unit == "s":
            return f"{seconds / length:.2g} {unit}" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
    raise AssertionError
