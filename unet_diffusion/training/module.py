"""Trains a denoising U-Net: noise an image, predict what was added, and keep a moving average of the weights.

The training of Ho et al. 2020 (https://arxiv.org/abs/2006.11239, algorithm 1), with timesteps spread over each batch
(Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix I.1), label dropout for guidance (Ho & Salimans 2022,
https://arxiv.org/abs/2207.12598) and an exponential moving average of the weights (EMA), which is what is sampled.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from unet_diffusion.checkpoint import TrainedDenoiser, denoiser_record
from unet_diffusion.conditioning import drop_labels
from unet_diffusion.losses import NUM_QUARTERS, LossWeighting, loss_weights, squared_error, sums_by_quarter
from unet_diffusion.sampling import image_generators
from unet_diffusion.schedule import NoiseSchedule, keyed_generator
from unet_diffusion.speed import SPEEDS, Speed, fastest_speed, keep_freed_memory, set_speed, speeds_for
from unet_diffusion.unet import DenoiserUNet

LRDecay = Literal["constant", "cosine"]

FILLS_EVERY_QUARTER = 2 * NUM_QUARTERS - 1  # with so many timesteps in a stratified batch, each quarter has one
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly however many there are


def default_optimizer(params: Iterable[Tensor]) -> Optimizer:
    """AdamW at 2e-4 (Ho et al. 2020, appendix B), without weight decay."""
    return AdamW(params, lr=2.0e-4, weight_decay=0.0)


class DiffusionModule(LightningModule):
    """A denoiser, its noise schedule and how it is trained.

    Batches are dicts: "images" (B, C, H, W) float32 in [-1, 1], "labels" (B,) int64 if the network has classes, and
    "index" (B,) int64, the number of each image in its data set, which fixes its noise in validation.

    Args:
        unet: the network to train; its weights are the raw ones.
        schedule: noise schedule and prediction type.
        optimizer: makes the optimiser from the parameters.
        lr_warmup_steps: optimiser steps over which the learning rate rises linearly to its full value; 0 is off.
        lr_decay: "constant", or "cosine" to 0 at the trainer's last step.
        ema_decay: share of the average kept at each optimiser step; less at first: (1 + n) / (10 + n) after n steps.
        loss_weighting: "uniform", or "min_snr" with gamma 5.
        label_dropout: probability of training on the null label, which is then the last row of the network's class
            embedding; 0: no null label and no guidance.
        speed: how the network runs, see `speed.py`; they differ in rounding. "auto" times them on this machine before
            the run, for about 5 % of it at most, and a run that is continued keeps what was found.
        seed: of noise, timesteps and label dropout.

    Raises:
        ValueError: if the settings contradict each other, or (in `setup`) the data.
    """

    def __init__(
        self,
        unet: DenoiserUNet,
        schedule: NoiseSchedule,
        *,
        optimizer: OptimizerCallable = default_optimizer,
        lr_warmup_steps: int = 0,
        lr_decay: LRDecay = "constant",
        ema_decay: float = 0.9999,
        loss_weighting: LossWeighting = "uniform",
        label_dropout: float = 0.0,
        speed: Speed | Literal["auto"] = "plain",
        seed: int = 0,
    ):
        super().__init__()
        num_class_embeds = unet.config["num_class_embeds"]
        _check_choice("loss_weighting", loss_weighting, get_args(LossWeighting))
        _check_choice("lr_decay", lr_decay, get_args(LRDecay))
        _check_choice("speed", speed, (*SPEEDS, "auto"))
        if lr_warmup_steps < 0:
            raise ValueError(f"lr_warmup_steps must be 0 or more, got {lr_warmup_steps}")
        _check_settings(schedule, loss_weighting, label_dropout, ema_decay, num_class_embeds)
        self.unet = unet
        self.ema_unet = copy.deepcopy(unet).requires_grad_(False).eval()
        self.schedule = schedule
        self.optimizer_factory = optimizer
        self.lr_warmup_steps = lr_warmup_steps
        self.lr_decay = lr_decay
        self.ema_decay = ema_decay
        self.loss_weighting = loss_weighting
        self.label_dropout = label_dropout
        self.speed = speed
        self.seed = seed

        self.chosen_speed: Speed = "plain"  # until the run begins
        self.is_continued = False  # set by who calls fit with a checkpoint: speed auto then need not try again
        self.null_label = num_class_embeds - 1 if label_dropout > 0 else None
        self.image_shape: tuple[int, int, int] | None = None
        self.class_names: list[str] | None = None
        self.settings: dict[str, Any] = {}  # of the whole run, plain, for the model card

    @property
    def trained(self) -> TrainedDenoiser:
        """The averaged network with all that is needed to sample and export it.

        Raises:
            ValueError: before the module has met its data.
        """
        if self.image_shape is None:
            raise ValueError("the image shape is not known before training; fit the module, or set its image_shape")
        return TrainedDenoiser(
            unet=self.ema_unet,
            schedule=self.schedule,
            image_shape=self.image_shape,
            null_label=self.null_label,
            class_names=self.class_names,
            settings=self.settings,
        )

    @property
    def num_classes(self) -> int | None:
        """Classes to choose from, the null label not counted; None: the network has none."""
        rows = self.unet.config["num_class_embeds"]
        return rows if rows is None or self.null_label is None else rows - 1

    def setup(self, stage: str) -> None:
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        self._meet_data()
        if stage == "fit":
            self._check_end()
            if self.speed != "auto":
                self._run_at(self.speed)
            elif not self.is_continued:  # else the checkpoint tells
                self._run_at(self._fastest_speed())

    def _meet_data(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            return
        self.image_shape = tuple(datamodule.image_shape)
        self.class_names = datamodule.class_names
        self._check_data(datamodule.num_classes)

    def on_fit_start(self) -> None:
        dtype = next(self.unet.parameters()).dtype
        if dtype != torch.float32:
            raise ValueError(
                f"the weights must be float32 for the average to move, got {dtype}; use precision bf16-mixed"
            )

    def train(self, mode: bool = True) -> "DiffusionModule":
        """Switches dropout of the trained network; the averaged one is never in training mode."""
        super().train(mode)
        self.ema_unet.eval()
        return self

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The weighted loss of a batch at random timesteps."""
        x0 = batch["images"]
        if self.image_shape is None:
            channels, height, width = x0.shape[1:]
            self.image_shape = (channels, height, width)
        # Keyed by the number of the batch in the whole run: a resumed run draws what an uninterrupted one would have.
        step = self.trainer.fit_loop.total_batch_idx
        generator = keyed_generator(self.seed, step, self.global_rank, device=x0.device)
        t = stratified_timesteps(len(x0), self.schedule.num_train_timesteps, generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=torch.float32)
        labels = self._labels(batch)
        if labels is not None and self.null_label is not None:
            labels = drop_labels(labels, self.null_label, self.label_dropout, generator)

        errors = self._errors(self.unet, x0, noise, t, labels)
        loss = (errors * loss_weights(self.schedule, t, self.loss_weighting)).mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self._log_quarters(errors.detach(), t)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds up the averaged network's errors on noise and timesteps that are fixed for each image."""
        x0, index = batch["images"], batch["index"]
        t = self.fixed_timesteps(index)
        generators = image_generators(self.seed, index.tolist())
        noise = torch.stack([torch.randn(x0.shape[1:], generator=g, dtype=torch.float32) for g in generators]).to(
            x0.device
        )
        errors = self._errors(self.ema_unet, x0, noise, t, self._labels(batch))
        self._validation_sums += torch.stack(sums_by_quarter(errors, t, self.schedule.num_train_timesteps))

    def on_validation_epoch_start(self) -> None:
        self._validation_sums = torch.zeros(2, NUM_QUARTERS, device=self.device)

    def on_validation_epoch_end(self) -> None:
        sums, counts = self.trainer.strategy.reduce(self._validation_sums, reduce_op="sum")
        # Equal on all processes; sync_dist lets callbacks on each of them monitor it.
        self.log("val/loss", sums.sum() / counts.sum(), prog_bar=True, sync_dist=True)
        for quarter in range(NUM_QUARTERS):
            if counts[quarter] > 0:
                self.log(f"val/loss_q{quarter + 1}", sums[quarter] / counts[quarter], sync_dist=True)

    def fixed_timesteps(self, index: Tensor) -> Tensor:
        """The timestep at which each image is validated, (B,) int64: even over the range, whatever the batches.

        Args:
            index: number of each image in its data set, (B,) int64.
        """
        spread = (index.cpu().double() * GOLDEN_RATIO) % 1.0  # on the CPU: not every device has float64
        return (spread * self.schedule.num_train_timesteps).long().to(index.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer_factory(self.unet.parameters())

        def factor(step: int) -> float:
            # Not asked for before the first step: to answer, Lightning would set up the data, and then not resume them.
            num_steps = self.trainer.estimated_stepping_batches if self.lr_decay == "cosine" and step else math.inf
            return lr_factor(step, self.lr_warmup_steps, num_steps)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, then moves the average: once an optimiser step, however many batches it accumulates."""
        super().optimizer_step(*args, **kwargs)
        n = self.trainer.global_step
        decay = min(self.ema_decay, (1 + n) / (10 + n))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema_unet.parameters()), list(self.unet.parameters()), 1 - decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["speed"] = self.chosen_speed
        if self.image_shape is not None:
            checkpoint["denoiser"] = denoiser_record(self.trained)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another network, noise schedule or null label, before its weights are loaded.

        Raises:
            ValueError: naming each setting that differs.
        """
        saved = checkpoint.get("denoiser")
        if saved is None:
            raise ValueError(
                "a checkpoint to train on must have an entry 'denoiser', and this one was written by another program; "
                "for its weights, convert them to a diffusers folder and import that"
            )
        then = {**saved["unet"]["init_args"], **saved["schedule"], "null_label": saved["null_label"]}
        now = {**self.unet.config, **self.schedule.config, "null_label": self.null_label}
        differ = [
            f"{name}: {then.get(name)} in the checkpoint, {value} here"
            for name, value in now.items()
            if name != "dropout" and then.get(name) != value  # dropout may change: it has no weights
        ]
        if differ:
            raise ValueError(f"the checkpoint holds another model ({'; '.join(differ)}); set model as it was")
        if self.speed == "auto" and self._trainer is not None and self.trainer.training:
            before = checkpoint.get("speed")
            if before in speeds_for(self.trainer.strategy.root_device):  # to go on bit for bit
                rank_zero_info(f"speed {before}, as the run had before")
                self._run_at(before)
            elif self.is_continued:
                self._run_at(self._fastest_speed())

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
        set_speed(self.ema_unet, "channels_last" if speed == "compiled" else speed, device)

    def _fastest_speed(self) -> Speed:
        """Of the first process, for all."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            raise ValueError(f"speed auto needs a data module that knows its images; use one of {', '.join(SPEEDS)}")
        assert self.image_shape is not None
        device = self.trainer.strategy.root_device
        generator = keyed_generator(self.seed, device=device)
        x = torch.randn(datamodule.batch_size, *self.image_shape, generator=generator, device=device)
        labels = None if self.unet.class_embedding is None else x.new_zeros(len(x), dtype=torch.int64)
        autocast = self.trainer.precision_plugin.forward_context
        speed, reason = fastest_speed(self.unet, x, labels, num_steps=self._num_batches(datamodule), autocast=autocast)
        rank_zero_info(reason)
        return self.trainer.strategy.broadcast(speed)

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

    def _errors(self, unet: DenoiserUNet, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Squared error of the prediction for each image, (B,)."""
        prediction = unet(self.schedule.add_noise(x0, noise, t), t, labels)
        return squared_error(prediction, self.schedule.target(x0, noise, t))

    def _labels(self, batch: dict[str, Tensor]) -> Tensor | None:
        return None if self.unet.class_embedding is None else batch["labels"]

    def _log_quarters(self, errors: Tensor, t: Tensor) -> None:
        """Logs the error in each quarter of the noise range, for the step at which Lightning writes its log."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it at runtime
        # A smaller batch may leave a quarter empty; counting would wait for the device.
        if not every or (self.trainer.global_step + 1) % every or len(t) < FILLS_EVERY_QUARTER:
            return
        sums, counts = sums_by_quarter(errors, t, self.schedule.num_train_timesteps)
        self.log_dict({f"train/loss_q{i + 1}": sums[i] / counts[i] for i in range(NUM_QUARTERS)})

    def _check_data(self, num_classes: int | None) -> None:
        assert self.image_shape is not None
        in_channels, num_class_embeds = self.unet.config["in_channels"], self.unet.config["num_class_embeds"]
        if self.image_shape[0] != in_channels:
            raise ValueError(
                f"the images have {self.image_shape[0]} channels and the network takes {in_channels}; "
                "set model.unet.init_args.in_channels or data.init_args.channels"
            )
        self.unet._check_size(torch.empty(1, *self.image_shape, device="meta"))
        if num_class_embeds is None:
            return
        num_null = int(self.null_label is not None)
        if num_classes is None:
            raise ValueError(
                f"the network has {num_class_embeds} class embeddings and the data have no classes; "
                "set data.init_args.class_labels to true or model.unet.init_args.num_class_embeds to null"
            )
        if num_class_embeds != num_classes + num_null:
            raise ValueError(
                f"num_class_embeds must be {num_classes + num_null} ({num_classes} classes and {num_null} null labels, "
                f"as label_dropout is {self.label_dropout}), got {num_class_embeds}"
            )


def stratified_timesteps(batch_size: int, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """One uniform timestep from each of batch_size equal parts of the range, in random order: (B,) int64.

    Each is uniform over the whole range by itself; together they spread evenly, and the loss varies less.
    """
    device = generator.device
    uniform = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float32)
    part = torch.randperm(batch_size, generator=generator, device=device)
    t = ((part + uniform) / batch_size * num_train_timesteps).long()
    return t.clamp(max=num_train_timesteps - 1)  # float32 rounds the highest draws up to the end


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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_settings(
    schedule: NoiseSchedule,
    loss_weighting: LossWeighting,
    label_dropout: float,
    ema_decay: float,
    num_class_embeds: int | None,
) -> None:
    if not 0 <= label_dropout < 1:
        raise ValueError(f"label_dropout must be in [0, 1), got {label_dropout}")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    if label_dropout > 0 and num_class_embeds is None:
        raise ValueError(
            f"label_dropout {label_dropout} needs a network with classes; set num_class_embeds to their number + 1"
        )
    if loss_weighting == "min_snr" and schedule.rescale_betas_zero_snr:
        raise ValueError(
            "min_snr gives the last timestep of rescale_betas_zero_snr no weight, and sampling starts there; "
            "use loss_weighting uniform"
        )
