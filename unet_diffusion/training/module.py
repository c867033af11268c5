"""Trains a denoising U-Net: noise an image, predict what was added, and keep a moving average of the weights.

The training of Ho et al. 2020 (https://arxiv.org/abs/2006.11239, algorithm 1), with timesteps spread over each batch
(Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix I.1), and conditions dropped at times, for guidance (Ho
& Salimans 2022, https://arxiv.org/abs/2207.12598); the moving average of the weights is what is sampled.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, cast, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from unet_diffusion.data.base import refuse_unused
from unet_diffusion.diffusion.conditions.condition import (
    CONDITION_KEY,
    Condition,
    Encode,
    Inputs,
    Request,
    network_inputs,
)
from unet_diffusion.diffusion.conditions.of_images import Draws, bind_conditions, draws_of_images, entries_of_images
from unet_diffusion.diffusion.losses import (
    ERRORS,
    NUM_QUARTERS,
    Loss,
    LossWeighting,
    gaussian_errors,
    loss_weights,
    sums_by_quarter,
)
from unet_diffusion.diffusion.parts import all_conditions
from unet_diffusion.diffusion.schedule import NoiseSchedule, stratified_timesteps
from unet_diffusion.diffusion.transfer import load_unconditional_weights
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.reading import read_denoiser
from unet_diffusion.inference.record import codec_record, denoiser_record, network_record
from unet_diffusion.inference.sample_options import SampleOptions
from unet_diffusion.latents.codec import Codec, PixelCodec
from unet_diffusion.models.speed import Speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.hub import with_prefix
from unet_diffusion.runtime.randomness import image_generators, keyed_generator
from unet_diffusion.training.averaging import averaged_copy
from unet_diffusion.training.base import NetworkModule
from unet_diffusion.training.denoising_rules import (
    check_batch,
    check_channels,
    check_conditions,
    check_denoises,
    check_noise_levels,
    check_settings,
    conditions_identity,
    sample_shape_of,
    space_identity,
)
from unet_diffusion.training.hyperparameters import check_choice
from unet_diffusion.training.lightning_internals import log_interval, total_batches
from unet_diffusion.training.optimizers import LRDecay, default_optimizer
from unet_diffusion.training.prediction import numbered
from unet_diffusion.training.symptoms import warn_of, worse_than_gaussian

FILLS_EVERY_QUARTER = 2 * NUM_QUARTERS - 1  # with so many timesteps in a stratified batch, each quarter has one
USUAL_DROPOUT = 0.1  # of labels (Ho & Salimans 2022), where a checkpoint does not say
LEAST_FOR_VARIANCE = 20  # images
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly however many there are


class DiffusionModule(NetworkModule):
    """A denoiser, its noise schedule and how it is trained.

    Batches are dicts with "images" (B, C, H, W) float32 in [-1, 1], or "x0" (B, C, h, w) of mean 0 and variance 1 where
    images were encoded before; "index" (B,) int64, the number of each image in its data set, which fixes its noise in
    validation; and what the conditions read, such as "labels" (B,) int64.

    `trainer.predict` draws an image for each "index" of a batch, as `Denoiser.sample` does by default with the module's
    seed, and takes texts for captions and names for labels, too. A batch may be the numbers alone.

    Args:
        unet: The network to train; its weights are the raw ones.
        schedule: The noise schedule and what is predicted.
        codec: Turns images into what is denoised; None: images are denoised themselves, or the data hold latents.
        conditions: What the network is conditioned on, beside the class labels that it embeds itself; trained with it.
        label_dropout: Probability of training on the null label, which is then the last row of the network's class
            embedding; 0: there is no null label and no guidance.
        init_from: A denoiser without conditions whose weights the network starts with: a checkpoint file, a run folder
            or a diffusers pipeline folder. The weights of channels that conditions give begin at 0. The run prints what
            was taken over.
        optimizer: Makes the optimiser from the parameters.
        lr_warmup_steps: Optimiser steps over which the learning rate rises linearly to its full value; 0 is off.
        lr_decay: "constant", or "cosine" to 0 at the trainer's last step.
        ema_decay: Share of the average kept at each optimiser step; less at first: (1 + n) / (10 + n) after n steps;
            0 is off.
        loss: "l2", the squared error, or "l1", the absolute one.
        loss_weighting: "uniform", or "min_snr" with gamma 5.
        speed: How the network runs, see `models.speed`; speeds differ in rounding. "auto" times them on this machine
            before the run, for about 5 % of it at most, and a run that is continued keeps what was found.
        seed: Seed of noise, timesteps, dropout of conditions, and all that is drawn in training.

    Raises:
        ValueError: If the settings contradict each other, or (in `setup`) the data.
    """

    unet: PixelNetwork
    ema_unet: PixelNetwork
    _moment_sums: Tensor

    record_key = "denoiser"
    sample_shape: tuple[int, int, int] | None = None  # (C, h, w) of what is denoised; known with the data

    logged = (
        *("train/loss", "val/loss", "train/skipped_steps"),
        *(f"{stage}/loss_q{quarter}" for stage in ("train", "val") for quarter in range(1, NUM_QUARTERS + 1)),
    )

    def __init__(
        self,
        unet: PixelNetwork,
        schedule: NoiseSchedule,
        *,
        codec: Codec | None = None,
        conditions: list[Condition] | None = None,
        label_dropout: float = 0.0,
        init_from: str | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_warmup_steps: int = 0,
        lr_decay: LRDecay = "constant",
        ema_decay: float = 0.9999,
        loss: Loss = "l2",
        loss_weighting: LossWeighting = "uniform",
        speed: Speed | Literal["auto"] = "plain",
        seed: int = 0,
    ):
        check_denoises(unet)
        check_conditions(unet, conditions or [])
        num_class_embeds = unet.config.get("num_class_embeds")
        check_choice("loss", loss, get_args(Loss))
        check_choice("loss_weighting", loss_weighting, get_args(LossWeighting))
        check_settings(schedule, loss_weighting, label_dropout, num_class_embeds)
        super().__init__(
            unet,
            optimizer=optimizer,
            lr_warmup_steps=lr_warmup_steps,
            lr_decay=lr_decay,
            ema_decay=ema_decay,
            speed=speed,
            seed=seed,
        )
        self.schedule, self.label_dropout = schedule, label_dropout
        self.loss, self.loss_weighting = loss, loss_weighting
        self.init_from = init_from and with_prefix(init_from)

        self.conditions = nn.ModuleList(conditions or [])
        self.ema_conditions = averaged_copy(self.conditions)

        self.null_label = num_class_embeds - 1 if label_dropout > 0 and num_class_embeds else None
        self.class_names: list[str] | None = None
        self.codec: Codec = codec or PixelCodec()
        self.codec.check_config()

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        return self.sample_shape

    @property
    def trained(self) -> Denoiser:
        """The averaged network with all that is needed to draw with it and to export it.

        Raises:
            ValueError: Before the module has met its data.
        """
        if self.sample_shape is None:
            raise ValueError("the sample shape is not known before training; fit the module, or set its sample_shape")
        denoiser = Denoiser(
            unet=self.ema_unet,
            schedule=self.schedule,
            sample_shape=self.sample_shape,
            codec=self.codec,
            null_label=self.null_label,
            class_names=self.class_names,
            settings=self.settings,
            values=self.values,
            conditions=self.ema_conditions,
            speed=self.chosen_speed,
        )
        denoiser.device = self.device
        return denoiser

    @property
    def all_conditions(self) -> list[Condition]:
        """The class labels that the network embeds itself, if it does, and the others, as they are trained."""
        return self._conditions_of(self.conditions)

    def _conditions_of(self, others: nn.ModuleList) -> list[Condition]:
        return all_conditions(self.unet, others, self.null_label, self.label_dropout)

    def averaged_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [*super().averaged_pairs(), (self.ema_conditions, self.conditions)]

    def bind_data(self, datamodule: Any) -> None:
        encoded_by = getattr(datamodule, "codec", None)
        if encoded_by is not None and self.codec.config is not None:
            raise ValueError(f"the data hold latents of their own autoencoder, and model.codec is "
                             f"{type(self.codec).__name__}; train on images, or leave model.codec out")  # fmt: skip
        self.codec = encoded_by or self.codec
        self.sample_shape, self.class_names = sample_shape_of(datamodule, self.codec), datamodule.class_names
        self.bind_values(datamodule, self.codec.image_shape(self.sample_shape)[0], self.codec)
        check_channels(self.unet, self.sample_shape, self.conditions, self.codec)
        provided = {entry for one in self.all_conditions for entry in one.provides}
        if provided and getattr(datamodule, "codec", None) is not None:
            makers = ", ".join(type(one).__name__ for one in self.all_conditions if one.provides)
            raise ValueError(f"{makers} needs images, and the data hold latents; train on the images, with model.codec")
        taken = {one.batch_key for one in self.all_conditions if one.batch_key not in provided or one.provides}
        refuse_unused(datamodule, taken)
        if "labels" not in taken:
            self.class_names = None  # the network's classes, if any, are levels of noise
        bind_conditions(self.all_conditions, self.sample_shape, datamodule)  # the trained ones
        check_noise_levels(self.all_conditions, provided)
        for average, trained in zip(self.ema_conditions, self.conditions, strict=True):
            cast(Condition, average).copy_learned(cast(Condition, trained))

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.init_from is not None and not self.is_continued:
            from unet_diffusion.inference.loading import load_denoiser  # imports diffusers, which only this needs

            denoiser = load_denoiser(self.init_from)
            load_unconditional_weights(self.ema_unet, denoiser, self.schedule)
            rank_zero_info(f"{self.init_from}: {load_unconditional_weights(self.unet, denoiser, self.schedule)}")
            self.initial_values = denoiser.values
        super().setup(stage)

    def example_inputs(self, batch_size: int) -> dict[str, Tensor]:
        assert self.sample_shape is not None
        batch = {one.batch_key: one.example(batch_size, self.sample_shape) for one in self.all_conditions}
        return {name: value.detach() for name, value in network_inputs(self.all_conditions, batch).items()}

    def record(self) -> dict[str, Any]:
        return denoiser_record(self.trained)

    def identity(self) -> dict[str, Any]:
        settings = {**self.unet.config, **self.schedule.config, "null_label": self.null_label}
        settings["codec"] = codec_record(self.codec)
        conditions = [network_record(cast(Condition, one)) for one in self.conditions]
        return {**settings, **space_identity(self.codec.space_record), "conditions": conditions_identity(conditions)}

    @classmethod
    def rebuilt(
        cls, path: str | os.PathLike[str], checkpoint: dict[str, Any], allow: Sequence[str], **arguments: Any
    ) -> Self:
        trained = read_denoiser(path, allow=allow)
        if trained.null_label is None:
            arguments["label_dropout"] = 0.0
        elif not arguments.get("label_dropout"):
            arguments["label_dropout"] = USUAL_DROPOUT
        conditions = cast(list[Condition], list(trained.conditions))
        parts = {"unet": trained.unet, "schedule": trained.schedule, "codec": trained.codec, "conditions": conditions}
        module = cls(**{**parts, **arguments, "init_from": None})
        module.copy_data_description(trained)
        return module

    def copy_data_description(self, trained: Denoiser) -> None:
        """Take over what a trained denoiser knows of its data: the shape and values of samples, and class names."""
        self.sample_shape, self.class_names = trained.sample_shape, trained.class_names
        self.keep_values(trained.values)
        for condition in self.all_conditions:
            condition.bind_sample_shape(trained.sample_shape)

    @staticmethod
    def identity_in(record: dict[str, Any]) -> dict[str, Any]:
        settings = {**record["unet"]["init_args"], **record["schedule"], "null_label": record["null_label"]}
        settings["codec"] = record["codec"]
        conditions = conditions_identity(record["conditions"])
        return {**settings, **space_identity(record["latent_space"]), "conditions": conditions}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        names = checkpoint[self.record_key]["class_names"]
        if names and self.class_names and names != self.class_names:
            raise ValueError(
                f"the classes of the checkpoint are {', '.join(names)}, and those of the data "
                f"{', '.join(self.class_names)}; give the folders of the data the names that they had"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The weighted loss of a batch at random timesteps."""
        # Keyed by the number of the batch in the whole run: a resumed run draws what an uninterrupted one would have.
        step = total_batches(self.trainer)
        x0, entries = self._encoded(batch, step)
        if self.sample_shape is None:
            channels, height, width = x0.shape[1:]
            self.sample_shape = (channels, height, width)
        generator = keyed_generator(self.seed, step, self.global_rank, device=x0.device)
        t = stratified_timesteps(len(x0), self.schedule.num_train_timesteps, generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=torch.float32)
        inputs = network_inputs(self.all_conditions, entries, generator=generator)

        errors = self._errors(self.unet, x0, noise, t, inputs)
        loss = (errors * loss_weights(self.schedule, t, self.loss_weighting)).mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self._log_quarters(errors.detach(), t)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Adds up the averaged network's errors on noise and timesteps that are fixed for each image."""
        x0, t, errors = self.pass_average(batch)
        self._validation_sums += torch.stack(sums_by_quarter(errors, t, self.schedule.num_train_timesteps))
        self._moment_sums = torch.stack([x0.sum(dim=0), x0.square().sum(dim=0)]) + self._moment_sums

    def pass_average(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What is denoised, timesteps and the averaged network's errors; noise is fixed for each image."""
        x0, entries = self._encoded(batch, None)
        index = entries["index"]
        t = self.fixed_timesteps(index)
        generators = image_generators(self.seed, index.tolist())
        noise = torch.stack([torch.randn(x0.shape[1:], generator=g, dtype=torch.float32) for g in generators])
        noise = noise.to(x0.device)
        inputs = network_inputs(self._conditions_of(self.ema_conditions), entries)
        errors = self._errors(self.ema_unet, x0, noise, t, inputs)
        return x0, t, errors

    def fixed_entries(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What is denoised of a batch, (B, C, h, w), and what the conditions read, as they are validated on."""
        return self._encoded(batch, None)

    def on_validation_epoch_start(self) -> None:
        self._validation_sums = torch.zeros(2, NUM_QUARTERS, device=self.device)
        self._moment_sums = torch.zeros((), device=self.device)  # of x0 and its square, (2, C, h, w)

    def on_validation_epoch_end(self) -> None:
        sums, counts = self.trainer.strategy.reduce(self._validation_sums, reduce_op="sum")
        # Equal on all processes; sync_dist lets callbacks on each of them monitor it.
        self.log(f"{self.scores_prefix}/loss", sums.sum() / counts.sum(), prog_bar=True, sync_dist=True)
        for quarter in range(NUM_QUARTERS):
            if counts[quarter] > 0:
                self.log(f"{self.scores_prefix}/loss_q{quarter + 1}", sums[quarter] / counts[quarter], sync_dist=True)
        self._compare_with_gaussian(sums, counts)

    def _compare_with_gaussian(self, sums: Tensor, counts: Tensor) -> None:
        """Warn where the network loses more than what knows each pixel's mean and variance alone."""
        num_images = counts.sum().item()
        mean, square = self.trainer.strategy.reduce(self._moment_sums, reduce_op="sum") / num_images
        if num_images < LEAST_FOR_VARIANCE or (counts == 0).any() or self.loss != "l2":
            return
        variance = (square - mean.square()).clamp(min=0) * num_images / (num_images - 1)
        num_timesteps = self.schedule.num_train_timesteps
        errors = gaussian_errors(self.schedule, variance)
        gaussian_sums, gaussian_counts = sums_by_quarter(errors, torch.arange(num_timesteps), num_timesteps)
        warn_of(self, worse_than_gaussian((sums / counts).tolist(), (gaussian_sums / gaussian_counts).tolist()))

    def fixed_timesteps(self, index: Tensor) -> Tensor:
        """The timestep at which each image is validated, (B,) int64: even over the range, whatever the batches.

        Args:
            index: The number of each image in its data set, (B,) int64.
        """
        spread = (index.cpu().double() * GOLDEN_RATIO) % 1.0  # on the CPU: not every device has float64
        return (spread * self.schedule.num_train_timesteps).long().to(index.device)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Images drawn for a batch, (B, C, H, W) float32 on the CPU in [-1, 1]; image i is a function of "index" i."""
        from unet_diffusion.inference.drawing import Drawing  # imports diffusers, which takes seconds

        batch = numbered(batch)
        numbers = batch["index"].tolist()
        options = SampleOptions(num_images=len(numbers), seed=self.seed, batch_size=len(numbers))
        entries = self._entries_to_draw(batch)
        drawing = Drawing(self.trained, options, device=self.device, entries=entries, numbers=numbers)
        return drawing.draw(range(len(numbers))).clamp(-1, 1)

    def _entries_to_draw(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the conditions read of a batch; words are read as a user's."""
        is_read = any(one.provides for one in self.all_conditions)
        if is_read:
            _, batch = self.fixed_entries(batch)
        entries = {}
        for condition in self.all_conditions:
            entry: Any = Condition.read(condition, batch) if is_read else condition.read(batch, self.codec.encode)
            if not isinstance(entry, Tensor):
                values, names = {condition.batch_key: entry}, self.class_names
                request = Request(num_images=len(entry), values=values, class_names=names)
                entry = condition.from_user(request)[condition.batch_key]
            entries[condition.batch_key] = entry
        return entries

    def _errors(self, unet: PixelNetwork, x0: Tensor, noise: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        """Error of the prediction for each image, (B,)."""
        prediction = unet(self.schedule.add_noise(x0, noise, t), t, **inputs)
        return ERRORS[self.loss](prediction, self.schedule.target(x0, noise, t))

    def _encoded(self, batch: Any, step: int | None) -> tuple[Tensor, dict[str, Any]]:
        """What is denoised of a batch, (B, C, h, w), and the entries that the conditions read.

        Args:
            batch: A batch of the data.
            step: Number of the batch in the run, which what is random is drawn for; None: it is fixed for each image.
        """
        check_batch(batch, needs_index=step is None)
        conditions, mean = self.all_conditions, self.codec.encode
        provided = {entry for one in conditions for entry in one.provides}
        if "x0" in batch and not provided:
            return batch["x0"], entries_of_images(conditions, batch, [], encode=mean)
        images = batch["images"]
        generator = None
        if step is not None and (provided or self.codec.is_random):
            generator = keyed_generator(self.seed, CONDITION_KEY, step, self.global_rank, device=images.device)
        draws = self._draws(images, batch, generator)
        encode = self._encode_with(generator)
        x0 = encode(images)
        return x0, entries_of_images(conditions, batch, draws, encode=mean, encode_provided=encode)

    def _draws(self, images: Tensor, batch: Mapping[str, Any], generator: torch.Generator | None) -> Draws:
        """What is random in the entries that conditions provide; without a generator, the same for an image always."""
        providing = [one for one in self.all_conditions if one.provides]
        if generator is not None:
            return [(one, one.draw(images.shape, generator)) for one in providing]
        return draws_of_images(providing, images, batch["index"].tolist(), self.seed) if providing else []

    def _encode_with(self, generator: torch.Generator | None) -> Encode:
        return lambda images: self.codec.encode(images, generator)

    def data_notes(self) -> list[str]:
        return [line for condition in self.all_conditions for line in condition.notes()]

    def _log_quarters(self, errors: Tensor, t: Tensor) -> None:
        """Logs the error in each quarter of the noise range, for the step at which Lightning writes its log."""
        every = log_interval(self.trainer)
        # A smaller batch may leave a quarter empty; counting would wait for the device.
        if not every or (self.trainer.global_step + 1) % every or len(t) < FILLS_EVERY_QUARTER:
            return
        sums, counts = sums_by_quarter(errors, t, self.schedule.num_train_timesteps)
        self.log_dict({f"train/loss_q{i + 1}": sums[i] / counts[i] for i in range(NUM_QUARTERS)})
