"""Statistics of batch norms that belong to the averaged weights.

The average of the weights is another network than the trained one, and other activations reach its batch norms, so that
the trained network's running statistics do not belong to it (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407,
section 3.2). As there, they are computed anew from training batches: before each validation, and at the end of
training. In between the average has those of the trained network, which cost nothing.
"""

import math
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from unet_diffusion.data.base import SourceDataModule
from unet_diffusion.data.batches import ResumableLoader
from unet_diffusion.training.lightning_internals import (
    data_of,
    ends_now,
    is_within_step,
    total_batches,
    validation_follows,
)

NUM_BATCHES = 50  # of all processes together; a run that has had fewer takes as many as it has had
FIRST_EPOCH = 10**9 + 1  # of the data's order, from which these batches come; no run gets there


class HasAverages(LightningModule):
    """A module whose averages are validated with statistics of their own.

    A subclass defines `averaged_pairs`, and with batch norms `pass_average`.
    """

    ema_decay: float

    def averaged_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each average, and the network that it is of."""
        raise NotImplementedError(f"{type(self).__name__} must define averaged_pairs()")

    def pass_average(self, batch: Any) -> Any:
        """Put a training batch through the averages, as validation does, so that their batch norms see it.

        Args:
            batch: A batch of the data, on the device.
        """
        raise NotImplementedError  # never reached: configure_callbacks refuses a subclass that needs it and lacks it

    def configure_callbacks(self) -> list[Callback]:
        """What recomputes the statistics of the averages; nothing without batch norms, or if there is no average."""
        has_norms = any(running_norms(average) for average, _ in self.averaged_pairs())
        if has_norms and self.ema_decay > 0 and type(self).pass_average is HasAverages.pass_average:
            raise NotImplementedError(f"{type(self).__name__} must define pass_average() to train batch norms")
        return [AverageStatistics()] if has_norms and self.ema_decay > 0 else []


class AverageStatistics(Callback):
    """Gives batch norms of averages the statistics of training batches.

    A checkpoint of the last step, or of a validated one, holds these statistics. One that is saved at another step
    holds the trained network's: to compute them each time would cost more than to save. A run that resumes is the same
    with either, as each step begins with those of the trained network.
    """

    _recomputed_at = -1  # step
    _are_own = True  # not those of the trained network; a checkpoint may hold either

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._are_own, self._recomputed_at = True, -1
        if not isinstance(data_of(trainer), SourceDataModule):
            rank_zero_warn(
                "the average of the weights is used with statistics of batch norms that are not its own, as they "
                "cannot be computed from data loaders; train on a data module of unet_diffusion, or use group norm"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Go on from the trained network's statistics, to which `Averages.restore_statistics` may have to return."""
        if self._are_own:
            for average, network in cast(HasAverages, pl_module).averaged_pairs():
                for ema_buffer, buffer in zip(average.buffers(), network.buffers(), strict=True):
                    ema_buffer.copy_(buffer)
            self._are_own, self._recomputed_at = False, -1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._recompute(trainer, cast(HasAverages, pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Recompute at the last step, before its checkpoint is saved; Lightning calls those callbacks last."""
        if not is_within_step(trainer) and not validation_follows(trainer) and ends_now(trainer):
            self._recompute(trainer, cast(HasAverages, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if ends_now(trainer):
            self._recompute(trainer, cast(HasAverages, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._recompute(trainer, cast(HasAverages, pl_module))

    def _recompute(self, trainer: Trainer, module: HasAverages) -> None:
        """Compute the statistics from training batches, unless those of this step are there."""
        data = data_of(trainer)
        if self._recomputed_at == trainer.global_step or not isinstance(data, SourceDataModule):
            return
        num_batches = math.ceil(min(NUM_BATCHES, total_batches(trainer) + 1) / trainer.world_size)
        norms = [norm for average, _ in module.averaged_pairs() for norm in running_norms(average)]
        before = [buffer.clone() for norm in norms for buffer in norm.buffers()]

        def pass_on_device(batch: Any) -> None:
            with trainer.precision_plugin.forward_context():
                module.pass_average(trainer.strategy.batch_to_device(batch))

        loader = cast(ResumableLoader, data.train_dataloader())  # another one than training's, which stays where it is
        update_bn(islice(batches_beside_training(loader), num_batches), Norms(norms, pass_on_device))
        for norm in norms:  # processes had other batches, and equally many
            for statistic in (cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)):
                statistic.copy_(trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))
        if not all(buffer.isfinite().all() for norm in norms for buffer in norm.buffers()):
            rank_zero_warn("the statistics of batch norms of the average are not finite, and those of the trained "
                           "network are kept; train in bfloat16 or float32")  # fmt: skip
            for buffer, value in zip((buffer for norm in norms for buffer in norm.buffers()), before, strict=True):
                buffer.copy_(value)
        self._are_own, self._recomputed_at = True, trainer.global_step


class Norms(nn.Module):
    """Batch norms of networks, for `update_bn`, which sets all that it is given to training mode: these alone.

    Dropout and norms of frozen parts, which are not among them, stay as they are in validation.

    Args:
        norms: The batch norms.
        run: Puts a batch through their networks.
    """

    def __init__(self, norms: list[_BatchNorm], run: Callable[[Any], None]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)
        self.run = run
        self.eval()

    def forward(self, batch: Any) -> None:
        self.run(batch)


def running_norms(network: nn.Module) -> list[_BatchNorm]:
    """The batch norms of an average that has running statistics, but for those of parts that are never trained."""
    network.train()  # a network may leave frozen parts out, as FeatureClassifier does
    norms = [one for one in network.modules() if isinstance(one, _BatchNorm) and one.training]
    network.eval()
    return [norm for norm in norms if norm.track_running_stats]


def batches_beside_training(loader: ResumableLoader) -> Iterator[Any]:
    """Training batches in an order that is a function of the seed alone, and that training does not get to."""
    for epoch in count(FIRST_EPOCH):
        loader.sampler.set_epoch(epoch)
        yield from loader
