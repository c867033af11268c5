"""Detects a run that goes wrong: gradients that are not finite, and memory that does not suffice."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.training.lightning_internals import is_within_step, log_interval

MAX_BAD_STEPS = 10  # in a row; one outlier is skipped, a run of them is no outlier
MAX_BAD_STEPS_IN_FLOAT16 = 30  # in a row: each halves the scale of the losses, from 2^16 until gradients fit
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


class SkipBadSteps(Callback):
    """Skips optimiser steps whose gradients are not finite, and ends the run after too many in a row.

    Gradients are checked after they were summed over processes, so that all processes do the same. A fused optimiser
    skips the step on the device, as `torch.amp.GradScaler` has it do. Any other optimiser, and one of sharded weights,
    is left without gradients, for which one number is read from the device. `train/skipped_steps` counts the skipped
    steps of the run, of all its optimisers, and is read when losses are logged. If ten in a row were skipped by then,
    the run ends, and `bad_batch_RANK.pt` in its folder holds the last batch. In float16 a GradScaler skips the steps,
    some of them to find its scale: they are counted too, and thirty in a row end the run.
    """

    def __init__(self) -> None:
        self._counts: dict[int, Tensor] = {}  # by optimiser: all, in a row now, most in a row since they were read
        self._reported = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the gradients; modules that step without Lightning call it themselves.

        Args:
            trainer: The run's trainer.
            pl_module: The module, which gets the norm of the gradients.
            optimizer: The optimiser itself, not Lightning's wrapper.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        is_sharded = isinstance(norm, DTensor)
        bad = (~torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm)).float()
        number = next(number for number, one in enumerate(trainer.optimizers) if one is optimizer)
        total, in_a_row, most = self._counts.get(number, torch.zeros(3)).to(bad.device)
        in_a_row = (in_a_row + 1) * bad
        self._counts[number] = torch.stack([total + bad, in_a_row, torch.maximum(most, in_a_row)])
        if _has_scaler(trainer):  # it looks at the gradients itself; those of fused optimisers are still scaled
            return
        pl_module.gradient_norm = norm  # clipping needs it too
        if all(group.get("fused") for group in optimizer.param_groups) and not is_sharded:
            # Attributes that fused optimisers look for; torch's types do not have them.
            optimizer.grad_scale, optimizer.found_inf = None, bad  # type: ignore[attr-defined]
        elif bad:
            optimizer.zero_grad(set_to_none=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = log_interval(trainer) or MAX_BAD_STEPS
        step = trainer.global_step
        if step % every or is_within_step(trainer):
            return
        skipped, most = self._read()
        for counts in self._counts.values():
            counts[2] = 0.0
        pl_module.log("train/skipped_steps", float(skipped))
        if skipped > self._reported and not _has_scaler(trainer):
            rank_zero_warn(f"{skipped - self._reported} of the steps to {step} were skipped: gradients not finite")
            self._reported = skipped
        if most >= (MAX_BAD_STEPS_IN_FLOAT16 if _has_scaler(trainer) else MAX_BAD_STEPS):
            path = Path(trainer.default_root_dir) / f"bad_batch_{trainer.global_rank}.pt"
            keep_batch(path, batch, step)
            raise RuntimeError(
                f"the gradients of {most} steps in a row, up to about step {step}, were not finite; the steps were "
                f"skipped, and the weights are as before them. The last batch is in {path}. Look for images or labels "
                "that are not numbers; otherwise lower --model.optimizer.lr and start again"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._read()[0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counts = {0: torch.tensor([float(state_dict["skipped"]), 0.0, 0.0])}
        self._reported = state_dict["skipped"]

    def _read(self) -> tuple[int, int]:
        """The number of skipped steps, and the most in a row since losses were last logged; waits for the device."""
        counts = [[int(number) for number in one.tolist()] for one in self._counts.values()]
        return sum(total for total, *_ in counts), max((most for *_, most in counts), default=0)


def _has_scaler(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def keep_batch(path: Path, batch: dict[str, Tensor], step: int) -> None:
    """Write a batch and its step to a file that `torch.load(path, weights_only=True)` reads."""
    with atomic_write(path) as partial:
        torch.save({"step": step, **{name: value.cpu() for name, value in batch.items()}}, partial)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def memory_advice(
    error: BaseException, batch_size: int | None, accumulate_grad_batches: int | None, smaller_precision: str | None
) -> str:
    """An error message that says what to change when memory does not suffice.

    Args:
        error: The error that was raised.
        batch_size: The number of images in a batch; None if unknown.
        accumulate_grad_batches: The number of batches in a step; None if a step cannot have several.
        smaller_precision: The trainer's precision that would take less memory here; None if there is none.
    """
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if batch_size is None or batch_size == 1:
        less = "use smaller images or a network with fewer channels"
    else:
        less = f"lower data.batch_size from {batch_size} to {batch_size // 2}"
        if accumulate_grad_batches is not None:
            less += (
                f", and set trainer.accumulate_grad_batches to {2 * accumulate_grad_batches}, which trains on as many "
                "images a step"
            )
    other = f". trainer.precision {smaller_precision} takes less, too" if smaller_precision else ""
    return f"out of memory ({first}); {less}{other}"
