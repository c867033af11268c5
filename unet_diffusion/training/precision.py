"""Precision in training: Lightning's, and "auto", which the module settles when it has met device and data."""

from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from unet_diffusion.runtime.precision import precisions_for

TrainingPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]
NAMES: dict[torch.dtype, TrainingPrecision] = {
    torch.float32: "32-true",
    torch.bfloat16: "bf16-mixed",
    torch.float16: "16-mixed",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}


class RunTrainer(Trainer):
    """Lightning's trainer, whose precision may be left to the machine.

    Args:
        precision: What convolutions and matrix products are computed in; weights are float32. 32-true: float32.
            bf16-mixed: bfloat16. 16-mixed: float16, with scaled losses, on GPUs only. auto: one of those that the
            hardware has. A few training steps are timed to find the fastest; autoencoders take 16 bits untimed. A run
            that is continued keeps what was chosen.
    """

    def __init__(self, *, precision: TrainingPrecision | Literal["auto"] = "auto", **options: Any):
        super().__init__(precision="32-true" if precision == "auto" else precision, **options)
        self.precision_is_auto = precision == "auto"


def precision_is_auto(trainer: Trainer) -> bool:
    """Whether the precision is left to the machine, and not settled yet."""
    return getattr(trainer, "precision_is_auto", False)


def possible_precisions(trainer: Trainer, *, can_scale_losses: bool = True) -> tuple[torch.dtype, ...]:
    """The precisions that a run may be in: the one asked for, or for auto those that its device has in hardware.

    Args:
        trainer: The run's trainer, connected to its strategy.
        can_scale_losses: Whether the module can do with scaled losses, which float16 needs.

    Raises:
        ValueError: If the precision asked for is none of `TrainingPrecision`.
    """
    if precision_is_auto(trainer):
        # Under ModelParallelStrategy nothing is timed, as a copy may not fit, and Lightning scales no losses.
        is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        dtypes = precisions_for(trainer.strategy.root_device)
        dtypes = tuple(dtype for dtype in dtypes if dtype != torch.float16 or (can_scale_losses and not is_sharded))
        return dtypes[-1:] if is_sharded else dtypes
    if trainer.precision not in DTYPES:
        raise ValueError(
            f"trainer.precision must be auto, {', '.join(DTYPES)}, got {trainer.precision}: weights stay float32, so "
            "that their average can move in small steps"
        )
    return (DTYPES[trainer.precision],)


def precision_before(
    trainer: Trainer, checkpoint: dict[str, Any], *, can_scale_losses: bool = True
) -> tuple[torch.dtype, ...]:
    """The precisions in which a run may go on.

    If the precision is left to the machine, and the machine has the checkpoint's in hardware, it is that one. Otherwise
    they are those of `possible_precisions`, and the change is logged.
    """
    possible = possible_precisions(trainer, can_scale_losses=can_scale_losses)
    before = DTYPES.get(checkpoint.get("precision", ""))
    if before is None or before in possible:
        return (before,) if before and precision_is_auto(trainer) else possible
    device = trainer.strategy.root_device
    if precision_is_auto(trainer) and can_scale_losses and _is_in_hardware(before, device):
        return (before,)  # float16 on a GPU that has bfloat16
    reason = "" if _is_in_hardware(before, device) else ", which this machine does not have in hardware"
    names = " or ".join(NAMES[dtype] for dtype in possible)
    rank_zero_info(f"the run was in {NAMES[before]}{reason}; it continues in {names}")
    return possible


def warn_of_emulation(trainer: Trainer) -> None:
    """Warn if the precision that was asked for is emulated here: a configuration may come from another machine."""
    dtype, device = DTYPES.get(trainer.precision), trainer.strategy.root_device
    if dtype is not None and not _is_in_hardware(dtype, device):
        rank_zero_warn(
            f"trainer.precision {trainer.precision} is not in this machine's hardware, and many times slower than "
            "float32; set it to auto"
        )


def _is_in_hardware(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype in precisions_for(device) or (dtype == torch.float16 and device.type == "cuda")


def smaller_precision(trainer: Trainer, *, can_scale_losses: bool = True) -> TrainingPrecision | None:
    """The 16-bit precision that this machine has in hardware; None if the trainer is in it, or there is none.

    Args:
        trainer: The run's trainer.
        can_scale_losses: Whether the module can do with scaled losses, which float16 needs.
    """
    name = NAMES[precisions_for(trainer.strategy.root_device)[-1]]
    refused = ("32-true", trainer.precision, *(() if can_scale_losses else ("16-mixed",)))
    return None if name in refused else name


def set_precision(trainer: Trainer, dtype: torch.dtype) -> None:
    """Make a trainer compute in that precision; before it sets up its strategy."""
    if DTYPES[trainer.precision] != dtype:
        name = NAMES[dtype]
        device_type = trainer.strategy.root_device.type
        plugin = Precision() if name == "32-true" else MixedPrecision(name, device_type)
        trainer.strategy.precision_plugin = plugin


def settle_precision(trainer: Trainer, dtype: torch.dtype) -> None:
    """Set the precision for all that the trainer does from now on."""
    set_precision(trainer, dtype)
    if isinstance(trainer, RunTrainer):
        trainer.precision_is_auto = False
