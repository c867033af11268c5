"""What training a network takes whatever it learns: a moving average of its weights, its learning rate, its speed.

The exponential moving average (EMA) is what is sampled, validated and exported (Ho et al. 2020,
https://arxiv.org/abs/2006.11239, appendix B).
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from unet_diffusion.inference.record import check_callbacks
from unet_diffusion.models.attention import SelfAttention, SpatialTransformer
from unet_diffusion.models.double_conv import DoubleConv
from unet_diffusion.models.layers import Downsample, Upsample
from unet_diffusion.models.residual_blocks import ResidualBlock
from unet_diffusion.models.speed import SPEEDS, Speed, fastest_setting, keep_freed_memory, set_speed, speeds_for
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.precision import precision_name
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.training.precision import (
    possible_precisions,
    precision_before,
    precision_is_auto,
    set_precision,
    settle_precision,
    warn_of_emulation,
)

DROPOUT_KEY = 3  # keeps dropout apart from noise, which has the same seed
LRDecay = Literal["constant", "cosine"]
Network = TypeVar("Network", bound=nn.Module)

# What is gathered at once when networks are shared out. Not whole levels: those of the expanding path take their skips
# off a list, of which FSDP2 hands on a copy.
SHARDED = (DoubleConv, Downsample, ResidualBlock, SelfAttention, SpatialTransformer, Upsample)


def put_hyperparameters(checkpoint: dict[str, Any], optimizers: Sequence[Optimizer]) -> None:
    """Put the hyper-parameters of new optimisers in place of those that a checkpoint has, whose moments it keeps.

    What is equal stays as it is, bit for bit. The factor that a schedule has reached stays, too.

    Args:
        checkpoint: What Lightning is about to restore; one without optimisers is left alone.
        optimizers: As the settings of now make them.
    """
    schedules = checkpoint.get("lr_schedulers") or [{} for _ in optimizers]
    # Not strict: a run that begins has no states yet, and other numbers of groups torch refuses when it restores them.
    for saved, schedule, optimizer in zip(checkpoint.get("optimizer_states", []), schedules, optimizers, strict=False):
        for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=False):
            old |= {name: value for name, value in new.items() if name not in ("params", "lr", "initial_lr")}
            before = old.get("initial_lr", old["lr"])
            if new["lr"] != before:
                old["lr"] = new["lr"] * (old["lr"] / before if before else 1.0)
                old["initial_lr"] = new["lr"]
        if "base_lrs" in schedule:
            schedule["base_lrs"] = [group["initial_lr"] for group in saved["param_groups"]]


def default_optimizer(params: Iterable[Tensor]) -> Optimizer:
    """AdamW at 2e-4 (Ho et al. 2020, appendix B), without weight decay."""
    return AdamW(params, lr=2.0e-4, weight_decay=0.0, fused=True)


class NetworkModule(LightningModule):
    """A network in training, and the moving average of its weights. A subclass says what it learns, and from what data.

    It defines the steps, `bind_data`, `record`, `identity` and `identity_in`.

    Args:
        unet: the network to train; its weights are the raw ones.
        optimizer: makes the optimiser from the parameters that are trained.
        lr_warmup_steps: optimiser steps over which the learning rate rises linearly to its full value; 0 is off.
        lr_decay: "constant", or "cosine" to 0 at the trainer's last step.
        ema_decay: share of the average kept at each optimiser step; less at first: (1 + n) / (10 + n) after n steps.
            0 is off: the average is the raw weights.
        speed: How the network runs, see `speed.py`; speeds differ in rounding. "auto" times them on this machine before
            the run, together with the precisions if those are left to it, too; a run that is continued keeps what was
            found. Where a GPU is best off compiled it takes "graphed", unless there are several processes or batches a
            step.
        seed: of all that is drawn in training.

    Raises:
        ValueError: if the settings contradict each other.
    """

    image_shape: tuple[int, int, int] | None = None  # (C, H, W) of a training input; known with the data
    record_key: str  # of `record` in a checkpoint
    logged: tuple[str, ...]  # what callbacks may monitor
    gradient_norm: Tensor | None = None  # of this step, before clipping, if a callback needed it

    def __init__(
        self,
        unet: PixelNetwork,
        *,
        optimizer: OptimizerCallable,
        lr_warmup_steps: int,
        lr_decay: LRDecay,
        ema_decay: float,
        speed: Speed | Literal["auto"],
        seed: int,
    ):
        super().__init__()
        check_choice("lr_decay", lr_decay, ("constant", "cosine"))
        check_choice("speed", speed, (*SPEEDS, "auto"))
        if lr_warmup_steps < 0:
            raise ValueError(f"lr_warmup_steps must be 0 or more, got {lr_warmup_steps}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        unet.check_config()
        self.unet = unet
        self.ema_unet = averaged_copy(unet)
        self.optimizer_factory = optimizer
        self.lr_warmup_steps = lr_warmup_steps
        self.lr_decay = lr_decay
        self.ema_decay = ema_decay
        self.speed = speed
        self.seed = seed

        self.chosen_speed: Speed = "plain"  # until the run begins
        self.is_continued = False  # set by who calls fit with a checkpoint: speed auto then need not try again
        self.settings: dict[str, Any] = {}  # of the whole run, plain
        self._paired_parameters: list[tuple[Tensor, Tensor]] = []  # of averages and what they are of
        self._paired_buffers: list[tuple[Tensor, Tensor]] = []

    def averaged_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each average, and the network that it is of, whose weights are trained."""
        return [(self.ema_unet, self.unet)]

    def example_inputs(self, batch_size: int) -> dict[str, Tensor]:
        """What the network is called with beside x and t, to time a step of it."""
        return {}

    def bind_data(self, datamodule: Any) -> None:
        """Take from the data what the module needs to know of them, `image_shape` too.

        Raises:
            ValueError: if network and data do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__} must define bind_data()")

    def data_notes(self) -> list[str]:
        """What the module cuts of the data that it has met, a line each."""
        return []

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds beside the weights, plain values, to build and use the averaged network again."""
        raise NotImplementedError(f"{type(self).__name__} must define record()")

    def identity(self) -> dict[str, Any]:
        """The settings that a run must keep when it is continued, plain values."""
        raise NotImplementedError(f"{type(self).__name__} must define identity()")

    @staticmethod
    def identity_in(record: dict[str, Any]) -> dict[str, Any]:
        """The `identity` of the run that made a record."""
        raise NotImplementedError("a subclass must define identity_in()")

    def setup(self, stage: str) -> None:
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.bind_data(datamodule)
        if stage == "fit":
            self._paired_parameters = []  # of a run before this one, before networks were moved or shared out
            self._check_end()
            warn_of_emulation(self.trainer)
            if self.speed == "graphed" and not self._can_be_graphed:
                raise ValueError(
                    "speed graphed needs a GPU in one process, with accumulate_grad_batches 1, as graphs keep no "
                    "gradients for another batch; set model.speed to compiled"
                )
            if not self.is_continued or self._will_be_sharded:  # else the checkpoint tells, which is read after this
                self._settle(self._possible_speeds(), possible_precisions(self.trainer))
        elif stage == "validate":
            set_precision(self.trainer, possible_precisions(self.trainer)[-1])

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of each weight only, and all must call a network together."""
        return isinstance(self.unet, FSDPModule)

    @property
    def _will_be_sharded(self) -> bool:
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def configure_model(self) -> None:
        """Under ModelParallelStrategy (FSDP2) shares out networks and averages over the processes, block by block.

        Raises:
            ValueError: if the speed needs a memory format of its own, or a part of the network is frozen.
        """
        if not self._will_be_sharded or self.is_sharded:
            return
        if self.chosen_speed != "plain":
            raise ValueError(f"speed must be plain with ModelParallelStrategy, got {self.speed}; set model.speed to it")
        if not all(p.requires_grad for _, network in self.averaged_pairs() for p in network.parameters()):
            raise ValueError("a network with frozen parts cannot be shared out; use the strategy ddp")
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for network in (one for pair in self.averaged_pairs() for one in pair if list(one.parameters())):
            for block in network.modules():
                if isinstance(block, SHARDED):
                    fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh, reshard_after_forward=True)  # the average is called without a backward

    def on_fit_start(self) -> None:
        dtype = next(self.unet.parameters()).dtype
        if dtype != torch.float32:
            raise ValueError(
                f"the weights must be float32 for the average to move, got {dtype}; use precision bf16-mixed"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """What is drawn from torch's own generators, as dropout is, follows from seed, step and process as all else."""
        key = (self.seed, DROPOUT_KEY, self.trainer.fit_loop.total_batch_idx, self.global_rank)
        seed = keyed_generator(*key).initial_seed()
        # not torch.manual_seed, which keeps the stack for each kind of device that is not in use, a millisecond a step
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def train(self, mode: bool = True) -> "NetworkModule":
        """Switches dropout of the trained network; the averaged one is never in training mode."""
        super().train(mode)
        for average, _ in self.averaged_pairs():
            average.eval()
        return self

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._new_optimizer()

        def factor(step: int) -> float:
            # Not asked for before the first step: to answer, Lightning would set up the data, and then not resume them.
            num_steps = self.trainer.estimated_stepping_batches if self.lr_decay == "cosine" and step else math.inf
            return lr_factor(step, self.lr_warmup_steps, num_steps)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def _new_optimizer(self) -> Optimizer:
        networks = [network for _, network in self.averaged_pairs()]
        return self.optimizer_factory([p for network in networks for p in network.parameters() if p.requires_grad])

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as Lightning does, which refuses fused optimisers in mixed precision.

        In float16 those take scaled gradients, unless these were unscaled before, as they are here to be clipped.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if not gradient_clip_val:
            return
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            return
        if self.gradient_norm is None:
            self.gradient_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self.gradient_norm)
        self.gradient_norm = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, then moves the average: once an optimiser step, however many batches it accumulates."""
        super().optimizer_step(*args, **kwargs)
        if not self._paired_parameters:
            self._pair_tensors()
        self._restore_statistics()
        n = self.trainer.global_step
        decay = min(self.ema_decay, (1 + n) / (10 + n))
        averaged, raw = zip(*[(ema, p) for ema, p in self._paired_parameters if p.requires_grad], strict=True)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, raw, 1 - decay)
            for ema_buffer, buffer in self._paired_buffers:
                ema_buffer.copy_(buffer)  # statistics of batch norms, which are averages already

    def _pair_tensors(self) -> None:
        """Finds once a run what each step averages: to look through all modules takes milliseconds of the host."""
        pairs = self.averaged_pairs()
        self._paired_parameters = [
            both for ema, one in pairs for both in zip(ema.parameters(), one.parameters(), strict=True)
        ]
        self._paired_buffers = [both for ema, one in pairs for both in zip(ema.buffers(), one.buffers(), strict=True)]

    def _restore_statistics(self) -> None:
        """A forward pass that was not finite spoils what batch norms keep; the average has what they had before."""
        for ema_buffer, buffer in self._paired_buffers:
            if buffer.is_floating_point():
                buffer.copy_(torch.where(torch.isfinite(buffer).all(), buffer, ema_buffer))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["speed"], checkpoint["precision"] = self.chosen_speed, self.trainer.precision
        if self.image_shape is not None:
            checkpoint[self.record_key] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another network or other settings, before its weights are loaded.

        Raises:
            ValueError: naming each setting that differs.
        """
        check_callbacks(checkpoint)
        saved = checkpoint.get(self.record_key)
        if saved is None:
            raise ValueError(
                f"a checkpoint to train on must have an entry {self.record_key!r}, and this one was written by another "
                "program or for another task; for a diffusion model's weights, convert them to a diffusers folder and "
                "import that"
            )
        then = self.identity_in(saved)
        differ = [
            f"{name}: {then.get(name)} in the checkpoint, {value} here"
            for name, value in self.identity().items()
            if name != "dropout" and then.get(name) != value  # dropout may change: it has no weights
        ]
        if differ:
            raise ValueError(f"the checkpoint holds another model ({'; '.join(differ)}); set model as it was")
        if self._trainer is not None and (self.trainer.training or self.trainer.validating):
            self._go_on_as_before(checkpoint)

    def _go_on_as_before(self, checkpoint: dict[str, Any]) -> None:
        """Keeps speed and precision of the checkpoint, to go on bit for bit, where they were left to the machine."""
        precisions = precision_before(self.trainer, checkpoint)
        if self.trainer.validating:
            set_precision(self.trainer, precisions[-1])
            return
        put_hyperparameters(checkpoint, [self._new_optimizer()])
        speeds = self._possible_speeds()
        before = checkpoint.get("speed")
        before = "compiled" if before == "graphed" and not self._can_be_graphed else before
        if self.speed == "auto" and before in speeds:
            speeds = (before,)
        if self.is_continued or len(speeds) == len(precisions) == 1:
            self._settle(speeds, precisions)

    def on_train_start(self) -> None:
        """Lays out the optimiser's moments as the weights, whose memory format another speed may have changed.

        A fused optimiser walks through both in memory, whatever their strides.
        """
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    is_moment = isinstance(value, Tensor) and value.shape == parameter.shape
                    if is_moment and value.stride() != parameter.stride():
                        state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _run_at(self, speed: Speed) -> None:
        """Both networks in the same memory format, so that the average moves fast; only the trained one is compiled."""
        self.chosen_speed = speed
        device = self.trainer.strategy.root_device
        set_speed(self.unet, speed, device)
        set_speed(self.ema_unet, "channels_last" if speed in ("compiled", "graphed") else speed, device)

    def _possible_speeds(self) -> tuple[Speed, ...]:
        if self.speed != "auto":
            return (self.speed,)
        if self._will_be_sharded:
            return ("plain",)
        return speeds_for(self.trainer.strategy.root_device)

    def _settle(self, speeds: tuple[Speed, ...], precisions: tuple[torch.dtype, ...]) -> None:
        """Sets the fastest of these speeds and precisions."""
        speed, precision = speeds[0], precisions[-1]
        if len(speeds) > 1 or len(precisions) > 1:
            speed, precision = self._fastest_setting(speeds, precisions)
        elif self.speed == "auto" or precision_is_auto(self.trainer):
            rank_zero_info(f"speed {speed} in {precision_name(precision)}")
        settle_precision(self.trainer, precision)
        self._run_at(speed)

    def _fastest_setting(
        self, speeds: tuple[Speed, ...], precisions: tuple[torch.dtype, ...]
    ) -> tuple[Speed, torch.dtype]:
        """Of the first process, for all."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            raise ValueError(
                f"speed auto needs a data module that knows its images; use one of {', '.join(SPEEDS)}, and name "
                "trainer.precision"
            )
        assert self.image_shape is not None
        device = self.trainer.strategy.root_device
        generator = keyed_generator(self.seed, device=device)
        x = torch.randn(datamodule.batch_size, *self.image_shape, generator=generator, device=device)
        inputs = {name: value.to(device) for name, value in self.example_inputs(datamodule.batch_size).items()}
        num_steps = self._num_batches(datamodule)
        speed, precision, reason = fastest_setting(
            self.unet, x, inputs=inputs, num_steps=num_steps, speeds=speeds, precisions=precisions
        )
        rank_zero_info(reason)
        speed, precision = self.trainer.strategy.broadcast((speed, precision))
        if self.speed == "auto" and speed == "compiled" and self._can_be_graphed:
            speed = "graphed"
        return speed, precision

    @property
    def _can_be_graphed(self) -> bool:
        """Gradients of a graph are there until its next replay, and graphs were not tried with several processes."""
        trainer = self.trainer
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return on_gpu and trainer.world_size == 1 and trainer.accumulate_grad_batches == 1

    def _num_batches(self, datamodule: Any) -> float:
        """Of the whole run; infinite if it has no end. Asking Lightning would set up the data: see `factor` above."""
        trainer, ends = self.trainer, [math.inf]
        if trainer.max_steps != -1:
            ends.append(trainer.max_steps * trainer.accumulate_grad_batches)
        if trainer.max_epochs not in (None, -1):
            num_batches = len(datamodule.train_indices) // (datamodule.batch_size * trainer.world_size)
            ends.append(trainer.max_epochs * max(num_batches, 1))
        return min(ends)

    def _check_end(self) -> None:
        has_end = self.trainer.max_steps != -1 or self.trainer.max_epochs != -1
        if self.lr_decay == "cosine" and not has_end:
            raise ValueError("lr_decay cosine needs an end: set trainer.max_steps or trainer.max_epochs")


def averaged_copy(network: Network) -> Network:
    """A network for the moving average of another's weights, equal to them now; frozen weights are there once."""
    frozen = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, frozen).requires_grad_(False).eval()


def lr_factor(step: int, num_warmup_steps: int, num_steps: float) -> float:
    """What the learning rate is multiplied by at a step: linear warm-up, then half a cosine to 0 at num_steps.

    Args:
        step: optimiser steps done.
        num_warmup_steps: the first step gets 1 / num_warmup_steps.
        num_steps: infinite for a constant rate after the warm-up.
    """
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    if num_steps == math.inf:
        return 1.0
    progress = (step - num_warmup_steps) / max(num_steps - num_warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError if the value is none of the choices; the error lists them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
