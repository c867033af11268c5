"""Trains a denoising U-Net: noise an image, predict what was added, and keep a moving average of the weights.

The training of Ho et al. 2020 (https://arxiv.org/abs/2006.11239, algorithm 1), with timesteps spread over each batch
(Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix I.1), label dropout for guidance (Ho & Salimans 2022,
https://arxiv.org/abs/2207.12598); the moving average of the weights is what is sampled.
"""

import math
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from unet_diffusion.checkpoint import TrainedDenoiser, denoiser_record
from unet_diffusion.conditioning import drop_labels
from unet_diffusion.latents import LatentSpace
from unet_diffusion.losses import NUM_QUARTERS, LossWeighting, loss_weights, squared_error, sums_by_quarter
from unet_diffusion.sampling import image_generators
from unet_diffusion.schedule import NoiseSchedule, keyed_generator
from unet_diffusion.speed import Speed
from unet_diffusion.training.base import LRDecay, NetworkModule, check_choice, default_optimizer
from unet_diffusion.unet import PixelNetwork

FILLS_EVERY_QUARTER = 2 * NUM_QUARTERS - 1  # with so many timesteps in a stratified batch, each quarter has one
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly however many there are


class DiffusionModule(NetworkModule):
    """A denoiser, its noise schedule and how it is trained.

    Batches are dicts: "images" (B, C, H, W) float32 in [-1, 1], or latents of mean 0 and variance 1; "labels" (B,)
    int64 if the network has classes; and "index" (B,) int64, the number of each image in its data set, which fixes
    its noise in validation.

    Args:
        unet: the network to train; its weights are the raw ones.
        schedule: noise schedule and prediction type.
        optimizer: makes the optimiser from the parameters.
        lr_warmup_steps: optimiser steps over which the learning rate rises linearly to its full value; 0 is off.
        lr_decay: "constant", or "cosine" to 0 at the trainer's last step.
        ema_decay: share of the average kept at each optimiser step; less at first: (1 + n) / (10 + n) after n steps;
            0 is off.
        loss_weighting: "uniform", or "min_snr" with gamma 5.
        label_dropout: probability of training on the null label, which is then the last row of the network's class
            embedding; 0: no null label and no guidance.
        speed: how the network runs, see `speed.py`; they differ in rounding. "auto" times them on this machine before
            the run, for about 5 % of it at most, and a run that is continued keeps what was found.
        seed: of noise, timesteps and label dropout.

    Raises:
        ValueError: if the settings contradict each other, or (in `setup`) the data.
    """

    record_key = "denoiser"

    def __init__(
        self,
        unet: PixelNetwork,
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
        _check_denoises(unet)
        num_class_embeds = unet.config["num_class_embeds"]
        check_choice("loss_weighting", loss_weighting, get_args(LossWeighting))
        _check_settings(schedule, loss_weighting, label_dropout, num_class_embeds)
        super().__init__(
            unet,
            optimizer=optimizer,
            lr_warmup_steps=lr_warmup_steps,
            lr_decay=lr_decay,
            ema_decay=ema_decay,
            speed=speed,
            seed=seed,
        )
        self.schedule = schedule
        self.loss_weighting = loss_weighting
        self.label_dropout = label_dropout

        self.null_label = num_class_embeds - 1 if label_dropout > 0 else None
        self.class_names: list[str] | None = None
        self.latent_space: LatentSpace | None = None

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
            latent_space=self.latent_space,
        )

    @property
    def num_classes(self) -> int | None:
        """Classes to choose from, the null label not counted; None: the network has none."""
        rows = self.unet.config["num_class_embeds"]
        return rows if rows is None or self.null_label is None else rows - 1

    def meet_data(self, datamodule: Any) -> None:
        self.image_shape = tuple(datamodule.image_shape)
        self.class_names = datamodule.class_names
        self.latent_space = getattr(datamodule, "latent_space", None)
        self._check_data(datamodule.num_classes)

    def record(self) -> dict[str, Any]:
        return denoiser_record(self.trained)

    def identity(self) -> dict[str, Any]:
        space = None if self.latent_space is None else self.latent_space.plain()
        return {**self.unet.config, **self.schedule.config, "null_label": self.null_label, **_space_identity(space)}

    @staticmethod
    def identity_in(record: dict[str, Any]) -> dict[str, Any]:
        kept = {**record["unet"]["init_args"], **record["schedule"], "null_label": record["null_label"]}
        return {**kept, **_space_identity(record["latent_space"])}

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

    def _errors(self, unet: PixelNetwork, x0: Tensor, noise: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
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
        in_channels, num_class_embeds = self.unet.in_channels, self.unet.config["num_class_embeds"]
        if self.image_shape[0] != in_channels:
            raise ValueError(
                f"the images have {self.image_shape[0]} channels and the network takes {in_channels}; "
                "set model.unet.init_args.in_channels or data.init_args.channels"
            )
        self.unet.check_size(*self.image_shape[1:])
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


def _check_settings(
    schedule: NoiseSchedule,
    loss_weighting: LossWeighting,
    label_dropout: float,
    num_class_embeds: int | None,
) -> None:
    if not 0 <= label_dropout < 1:
        raise ValueError(f"label_dropout must be in [0, 1), got {label_dropout}")
    if label_dropout > 0 and num_class_embeds is None:
        raise ValueError(
            f"label_dropout {label_dropout} needs a network with classes; set num_class_embeds to their number + 1"
        )
    if loss_weighting == "min_snr" and schedule.rescale_betas_zero_snr:
        raise ValueError(
            "min_snr gives the last timestep of rescale_betas_zero_snr no weight, and sampling starts there; "
            "use loss_weighting uniform"
        )


def _space_identity(space: dict[str, Any] | None) -> dict[str, Any]:
    """Of latents, what may not change; their autoencoder may have been moved."""
    return {f"latent {name}": (space or {}).get(name) for name in ("fingerprint", "mean", "std")}


def _check_denoises(unet: PixelNetwork) -> None:
    """A denoiser is told the timestep and gives a prediction as large as its input."""
    if unet.time_embedding is None:
        raise ValueError(f"a denoiser needs a timestep: set timestep_embedding of {type(unet).__name__} to true")
    if unet.margin:
        raise ValueError(
            f"a denoiser must keep height and width, and this network takes {unet.margin} pixels off each side; "
            "set padding to same"
        )
    for name in ("context_dim", "vector_dim"):
        if unet.config.get(name) is not None:
            raise ValueError(f"{name} must be None to be trained here, got {unet.config[name]}; the data have none")
