"""What training a network takes, whatever it learns: averages of the weights, learning rate, speed, checkpoints."""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, Self, cast

import torch
from lightning.pytorch.cli import OptimizerCallable, SaveConfigCallback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from unet_diffusion.inference.record import check_callbacks
from unet_diffusion.models.speed import SPEEDS, Speed, keep_freed_memory, set_speed, speeds_for
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.precision import precision_name
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.runtime.safe_loading import load_plain
from unet_diffusion.runtime.shareable import PLACES
from unet_diffusion.training.averaging import Averages, averaged_copy
from unet_diffusion.training.batch_norms import HasAverages
from unet_diffusion.training.hyperparameters import check_choice, plain_arguments, plain_optimizer, scalar_arguments
from unet_diffusion.training.kept_values import KeepsValues
from unet_diffusion.training.lightning_internals import callbacks_of, data_of, is_attached, total_batches
from unet_diffusion.training.optimizers import LRDecay, clip_gradients, lay_out_moments, lr_factor, put_hyperparameters
from unet_diffusion.training.precision import (
    possible_precisions,
    precision_before,
    precision_is_auto,
    set_precision,
    settle_precision,
    warn_of_emulation,
)
from unet_diffusion.training.resuming import FREE, differences
from unet_diffusion.training.sharding import shard
from unet_diffusion.training.timing import can_be_graphed, fastest

DROPOUT_KEY = 3  # keeps dropout apart from noise, which has the same seed


class NetworkModule(KeepsValues, HasAverages):
    """A network in training, and the moving average of its weights.

    A subclass defines `training_step` and the hooks of validation, `input_shape`, `bind_data`, `record`, `identity`,
    `identity_in` and `rebuilt`. `trainer.test` does what `trainer.validate` does, and logs it under "test/".

    Args:
        network: The network to train, with the raw weights. It becomes the attribute `network_name`, and its average
            `ema_` and that name.
        optimizer: A function that makes the optimiser from the parameters that are trained.
        lr_warmup_steps: The number of optimiser steps over which the learning rate rises linearly to its full value; 0
            is off.
        lr_decay: "constant", or "cosine" to 0 at the trainer's last step.
        ema_decay: The share of the average that stays at each optimiser step. It is less at first: (1 + n) / (10 + n)
            after n steps. 0 is off: the average is the raw weights.
        speed: How the network runs, see `speed.py`; speeds differ in rounding. "auto" times them on this machine before
            the run, together with the precisions if those are left to it, too. A resumed run keeps what was found.
            Where a GPU is best off compiled it takes "graphed", unless there are several processes or batches a step.
        seed: Seed of all that is drawn in training.

    Raises:
        ValueError: If the settings contradict each other.
    """

    network_name = "unet"
    logged: tuple[str, ...]  # what callbacks may monitor
    is_timed = True  # whether the precision is left to a trial; otherwise it is the last that the machine has
    batches_at_once = 1  # that a step puts through the network side by side, each of the data's batch size
    can_scale_losses = True  # which float16 needs
    gradient_norm: Tensor | None = None  # of this step, before clipping, if a callback needed it

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: OptimizerCallable,
        lr_warmup_steps: int,
        lr_decay: LRDecay,
        ema_decay: float,
        seed: int,
        speed: Speed | Literal["auto"] = "plain",
    ):
        super().__init__()
        check_choice("lr_decay", lr_decay, ("constant", "cosine"))
        check_choice("speed", speed, (*SPEEDS, "auto"))
        if lr_warmup_steps < 0:
            raise ValueError(f"lr_warmup_steps must be 0 or more, got {lr_warmup_steps}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        if isinstance(network, PixelNetwork):
            network.check_config()
        setattr(self, self.network_name, network)
        setattr(self, f"ema_{self.network_name}", averaged_copy(network))
        self.optimizer_factory = optimizer
        self.lr_warmup_steps = lr_warmup_steps
        self.lr_decay = lr_decay
        self.ema_decay = ema_decay
        self.speed = speed
        self.seed = seed

        self.chosen_speed: Speed = "plain"  # until the run begins
        self.is_continued = False  # set by who calls fit with a checkpoint: speed auto then need not try again
        self.settings: dict[str, Any] = {}  # of the whole run, plain values
        self._averages: Averages | None = None  # found at the first step

    @property
    def network(self) -> nn.Module:
        """The network that is trained, with its raw weights."""
        return getattr(self, self.network_name)

    @property
    def ema_network(self) -> nn.Module:
        """The moving average of the network."""
        return getattr(self, f"ema_{self.network_name}")

    def averaged_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each average, and the network that it is of, whose weights are trained; the main one first."""
        return [(self.ema_network, self.network)]

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of what the network is trained on; None before the module has met its data."""
        raise NotImplementedError(f"{type(self).__name__} must define input_shape")

    def bind_data(self, datamodule: Any) -> None:
        """Take from the data what the module needs to know of them, `input_shape` too.

        Raises:
            ValueError: If network and data do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} must define bind_data()")

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights, plain values, to build and use the averaged network again."""
        raise NotImplementedError(f"{type(self).__name__} must define record()")

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must keep, plain values."""
        raise NotImplementedError(f"{type(self).__name__} must define identity()")

    @staticmethod
    def identity_in(record: dict[str, Any]) -> dict[str, Any]:
        """The `identity` of the run that made a record."""
        raise NotImplementedError("a subclass must define identity_in()")

    @classmethod
    def rebuilt(
        cls, path: str | os.PathLike[str], checkpoint: dict[str, Any], allow: Sequence[str], **arguments: Any
    ) -> Self:
        """A module as the one in a checkpoint; `load_from_checkpoint` then loads the weights.

        Args:
            path: The file of the checkpoint.
            checkpoint: What it holds.
            allow: Modules of one's own whose classes the checkpoint may name.
            arguments: Arguments of the constructor that are no networks.

        Raises:
            ValueError: If the checkpoint is of another task, or damaged.
        """
        raise NotImplementedError(f"{cls.__name__} must define rebuilt()")

    def example_inputs(self, batch_size: int) -> dict[str, Tensor]:
        """The network's arguments beside x and t, to time a step of it."""
        return {}

    def data_notes(self) -> list[str]:
        """A line for each kind of data that the module cuts."""
        return []

    def setup(self, stage: str) -> None:
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        datamodule = data_of(self.trainer)
        if datamodule is not None:
            self.bind_data(datamodule)
        if stage != "fit":
            set_precision(self.trainer, self._precisions()[-1])
            return
        self._averages = None  # of a run before this one, before networks were moved or shared out
        if self.lr_decay == "cosine" and self.trainer.max_steps == -1 and self.trainer.max_epochs == -1:
            raise ValueError("lr_decay cosine needs an end: set trainer.max_steps or trainer.max_epochs")
        warn_of_emulation(self.trainer)
        if self.speed == "graphed" and not can_be_graphed(self.trainer):
            raise ValueError(
                "speed graphed needs a GPU in one process, with accumulate_grad_batches 1, as graphs keep no "
                "gradients for another batch; set model.speed to compiled"
            )
        if not self.is_continued or self._will_be_sharded:  # else the checkpoint tells, which is read after this
            self._settle(self._speeds(), self._precisions())

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of each weight only, and all must call a network together."""
        return isinstance(self.network, FSDPModule)

    @property
    def _will_be_sharded(self) -> bool:
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def configure_model(self) -> None:
        """Share networks and averages out over the processes, block by block, under ModelParallelStrategy (FSDP2).

        Raises:
            ValueError: If the speed needs a memory format of its own, or a part of the network is frozen.
        """
        if not self._will_be_sharded or self.is_sharded:
            return
        if self.chosen_speed != "plain":
            raise ValueError(f"speed must be plain with ModelParallelStrategy, got {self.speed}; set model.speed to it")
        if not all(p.requires_grad for _, network in self.averaged_pairs() for p in network.parameters()):
            raise ValueError("a network with frozen parts cannot be shared out; use the strategy ddp")
        assert self.device_mesh is not None
        shard((network for pair in self.averaged_pairs() for network in pair), self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        dtype = next(self.network.parameters()).dtype
        if dtype != torch.float32:
            raise ValueError(
                f"the weights must be float32 for the average to move, got {dtype}; use precision bf16-mixed"
            )
        if not any(isinstance(one, SaveConfigCallback) for one in callbacks_of(self.trainer)):
            self.settings = {"model": self.hyperparameters()}  # the command line logs the settings of the whole run
            for logger in self.trainer.loggers:
                logger.log_hyperparams(self.settings)

    def hyperparameters(self) -> dict[str, Any]:
        """The arguments that the module was made with, as a configuration would name them; plain values."""
        return {**plain_arguments(self), "optimizer": plain_optimizer(self.trainer.optimizers[0])}

    def on_train_start(self) -> None:
        super().on_train_start()
        lay_out_moments(self.trainer.optimizers)

    def train(self, mode: bool = True) -> Self:
        """Switch dropout of the trained network; the averaged one is never in training mode."""
        super().train(mode)
        for average, _ in self.averaged_pairs():
            average.eval()
        return self

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed torch's own generators, of which dropout draws, by seed, step and process."""
        key = (self.seed, DROPOUT_KEY, total_batches(self.trainer), self.global_rank)
        seed = keyed_generator(*key).initial_seed()
        # not torch.manual_seed, which keeps the stack for each kind of device that is not in use, a millisecond a step
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def new_optimizers(self) -> list[Optimizer]:
        """Optimisers as the settings make them; the first one is that of the averaged networks."""
        networks = [network for _, network in self.averaged_pairs()]
        return [self.optimizer_factory([p for network in networks for p in network.parameters() if p.requires_grad])]

    def starts(self) -> list[int]:
        """The step at which each optimiser begins."""
        return [0]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizers = self.new_optimizers()
        schedulers = []
        for optimizer, start in zip(optimizers, self.starts(), strict=True):

            def factor(step: int, start: int = start) -> float:
                # Not asked for before the first step: to answer, Lightning would set up the data, and not resume them.
                has_end = self.lr_decay == "cosine" and step
                num_steps = self.trainer.estimated_stepping_batches - start if has_end else math.inf
                return lr_factor(step, self.lr_warmup_steps, num_steps)

            schedulers.append({"scheduler": LambdaLR(optimizer, factor), "interval": "step"})
        return cast(OptimizerLRScheduler, (optimizers, schedulers))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, which refuses fused optimisers in mixed precision.

        In float16 those take scaled gradients, unless these were unscaled before, as they are here to be clipped.
        """
        if not gradient_clip_val:
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm, self.gradient_norm)
        self.gradient_norm = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the average: once an optimiser step, however many batches it accumulates."""
        super().optimizer_step(*args, **kwargs)
        self.move_averages()

    def move_averages(self) -> None:
        """Move the averages towards the weights, after a step of the optimiser."""
        if self._averages is None:
            self._averages = Averages(self.averaged_pairs())
        self._averages.restore_statistics()
        n = self.trainer.global_step
        decay = min(self.ema_decay, (1 + n) / (10 + n))
        self._averages.move(decay)

    @property
    def scores_prefix(self) -> str:
        """What begins the names of logged scores: "val", or "test" in `trainer.test`."""
        return "test" if self.trainer.testing else "val"

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["speed"], checkpoint["precision"] = self.chosen_speed, self.trainer.precision
        if self.input_shape is not None:
            checkpoint[self.record_key] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network or other settings, before its weights are loaded.

        Raises:
            ValueError: Naming each setting that differs.
        """
        super().on_load_checkpoint(checkpoint)
        check_callbacks(checkpoint)
        now = {name: value for name, value in self.identity().items() if name not in FREE}
        before = self.identity_in(self.record_in(checkpoint))
        if differ := differences({name: before.get(name) for name in now}, now):
            raise ValueError(f"the checkpoint holds another model ({'; '.join(differ)}); set model as it was")
        if is_attached(self):
            self._resume(checkpoint)

    @classmethod
    def record_in(cls, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The `record` in a checkpoint; ValueError if another task wrote it."""
        if cls.record_key not in checkpoint:
            raise ValueError(
                f"the checkpoint holds no {cls.record_key}: another task or another program wrote it; "
                "`unet-diffusion import` makes a checkpoint of a diffusers folder"
            )
        return checkpoint[cls.record_key]

    def _resume(self, checkpoint: dict[str, Any]) -> None:
        """Keep speed and precision of the checkpoint, to continue bit for bit, where they were left to the machine."""
        precisions = precision_before(self.trainer, checkpoint, can_scale_losses=self.can_scale_losses)
        precisions = precisions if self.is_timed else precisions[-1:]
        if not self.trainer.training:
            set_precision(self.trainer, precisions[-1])
            return
        put_hyperparameters(checkpoint, self.new_optimizers())
        speeds = self._speeds()
        before = checkpoint.get("speed")
        before = "compiled" if before == "graphed" and not can_be_graphed(self.trainer) else before
        if self.speed == "auto" and before in speeds:
            speeds = (before,)
        if self.is_continued or len(speeds) == len(precisions) == 1:
            self._settle(speeds, precisions)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # what else a checkpoint needs is in it
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: torch.device | str | int | None = None,
        *,
        allow: Sequence[str] = (),
        **arguments: Any,
    ) -> Self:
        """The module of a checkpoint, with its raw and its averaged weights.

        The file can hold tensors and plain values only, never code. The optimiser is the default one, unless it is
        among the arguments; its state is restored by `trainer.fit(module, ckpt_path=...)`.

        Args:
            checkpoint_path: The checkpoint.
            map_location: The device for the weights; None: the CPU.
            allow: Modules of one's own whose classes the checkpoint may name.
            arguments: Arguments of the constructor, in place of those that the checkpoint names.

        Raises:
            ValueError: If the checkpoint is of another task, damaged, or holds code.
        """
        checkpoint = load_plain(checkpoint_path)
        settings = cls.record_in(checkpoint)["settings"]
        known = scalar_arguments(cls, settings.get("model", {}))
        known = {name: value for name, value in known.items() if name not in PLACES}  # of which the last part is kept
        module = cls.rebuilt(checkpoint_path, checkpoint, allow, **{**known, **arguments})
        module.load_state_dict(checkpoint["state_dict"])
        module.settings = settings
        return module.to(map_location or "cpu").train()

    def run_at(self, speed: Speed) -> None:
        """Set the speed: both networks get the same memory format, so that the average moves fast.

        Only the trained network is compiled.
        """
        self.chosen_speed = speed
        device = self.trainer.strategy.root_device
        set_speed(self.network, speed, device)
        set_speed(self.ema_network, "channels_last" if speed in ("compiled", "graphed") else speed, device)

    def _speeds(self) -> tuple[Speed, ...]:
        """The speeds to choose from."""
        if self.speed != "auto":
            return (self.speed,)
        if self._will_be_sharded:
            return ("plain",)
        return speeds_for(self.trainer.strategy.root_device)

    def _precisions(self) -> tuple[torch.dtype, ...]:
        """The precisions to choose from."""
        precisions = possible_precisions(self.trainer, can_scale_losses=self.can_scale_losses)
        return precisions if self.is_timed else precisions[-1:]

    def _settle(self, speeds: tuple[Speed, ...], precisions: tuple[torch.dtype, ...]) -> None:
        """Set the fastest of these speeds and precisions."""
        speed, precision = speeds[0], precisions[-1]
        if len(speeds) > 1 or len(precisions) > 1:
            speed, precision = self._fastest(speeds, precisions)
        elif self.speed == "auto" or precision_is_auto(self.trainer):
            rank_zero_info(f"speed {speed} in {precision_name(precision)}")
        settle_precision(self.trainer, precision)
        self.run_at(speed)

    def _fastest(self, speeds: tuple[Speed, ...], precisions: tuple[torch.dtype, ...]) -> tuple[Speed, torch.dtype]:
        datamodule = data_of(self.trainer)
        if datamodule is None:
            raise ValueError(
                f"speed auto needs a data module that knows its images; use one of {', '.join(SPEEDS)}, and name "
                "trainer.precision"
            )
        assert self.input_shape is not None
        batch_size, device = datamodule.batch_size * self.batches_at_once, self.trainer.strategy.root_device
        generator = keyed_generator(self.seed, device=device)
        x = torch.randn(batch_size, *self.input_shape, generator=generator, device=device)
        inputs = {name: value.to(device) for name, value in self.example_inputs(batch_size).items()}
        network = cast(PixelNetwork, self.network)
        return fastest(self.trainer, network, x, inputs, speeds=speeds, precisions=precisions)
