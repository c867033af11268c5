"""Finds the speed and the precision in which a network trains fastest on this machine, by timing some steps."""

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from unet_diffusion.data.windows import within_limit
from unet_diffusion.models.speed import Speed, fastest_setting
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.training.lightning_internals import data_of


def fastest(
    trainer: Trainer,
    network: PixelNetwork,
    x: Tensor,
    inputs: dict[str, Tensor],
    *,
    speeds: tuple[Speed, ...],
    precisions: tuple[torch.dtype, ...],
) -> tuple[Speed, torch.dtype]:
    """The fastest of these speeds and precisions on the first process, for all processes.

    Args:
        trainer: The run's trainer, with its data module.
        network: The network, which stays as it is.
        x: A batch of inputs, on the device.
        inputs: The network's other arguments.
        speeds: The speeds to choose from.
        precisions: The precisions to choose from.
    """
    num_steps = num_batches(trainer, data_of(trainer), num_processes=trainer.world_size)
    timed: tuple[Speed, ...] = ("compiled",) if speeds == ("graphed",) else speeds  # graphs are not timed
    speed, precision, reason = fastest_setting(
        network, x, inputs=inputs, num_steps=num_steps, speeds=timed, precisions=precisions
    )
    rank_zero_info(reason)
    speed, precision = trainer.strategy.broadcast((speed, precision))
    if "graphed" in speeds and speed == "compiled" and can_be_graphed(trainer):
        speed = "graphed"
    return speed, precision


def can_be_graphed(trainer: Trainer) -> bool:
    """Whether a step may run as a CUDA graph, whose gradients are there until its next replay only.

    Graphs were not tried with several processes.
    """
    on_gpu = trainer.strategy.root_device.type == "cuda"
    return on_gpu and trainer.world_size == 1 and trainer.accumulate_grad_batches == 1


def num_batches(trainer: Trainer, datamodule: Any, *, num_processes: int) -> float:
    """The number of batches of one process in the whole run; infinite if it has no end.

    Lightning's own number is not asked for before the first step: to answer, it would set up the data, and then not
    resume them.

    Args:
        trainer: The trainer, which says where the run ends.
        datamodule: The data module, set up.
        num_processes: The number of processes of the run, which are more than the trainer's where one tries its steps.
    """
    ends = [math.inf]
    if trainer.max_steps != -1:
        ends.append(trainer.max_steps * trainer.accumulate_grad_batches)
    if trainer.max_epochs not in (None, -1):
        ends.append(trainer.max_epochs * batches_of_an_epoch(trainer, datamodule, num_processes=num_processes))
    return min(ends)


def batches_of_an_epoch(trainer: Trainer, datamodule: Any, *, num_processes: int) -> int:
    """The number of batches of one process in an epoch.

    Args:
        trainer: The trainer, which may limit them.
        datamodule: The data module, set up.
        num_processes: The number of processes of the run.
    """
    batches = len(datamodule.train_indices) // (datamodule.batch_size * num_processes)
    return within_limit(trainer, max(batches, 1))
