"""Trains a denoising U-Net: noise an image, predict what was added, and keep a moving average of the weights.

The training of Ho et al. 2020 (https://arxiv.org/abs/2006.11239, algorithm 1), with timesteps spread over each batch
(Kingma et al. 2021, https://arxiv.org/abs/2107.00630, appendix I.1), and conditions dropped at times, for guidance (Ho
& Salimans 2022, https://arxiv.org/abs/2207.12598); the moving average of the weights is what is sampled.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, Self, cast, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from unet_diffusion.data.base import refuse_unused
from unet_diffusion.data.maps import ImagesWithMaps
from unet_diffusion.diffusion.conditions.class_labels import ClassLabels
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import Condition, Inputs, network_inputs
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.losses import NUM_QUARTERS, LossWeighting, loss_weights, squared_error, sums_by_quarter
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.record import TrainedDenoiser, denoiser_record, network_record, read_checkpoint
from unet_diffusion.latents.space import LatentSpace
from unet_diffusion.models.speed import Speed
from unet_diffusion.models.unet import DenoiserUNet, PixelNetwork
from unet_diffusion.runtime.randomness import image_generators, keyed_generator
from unet_diffusion.training.averaging import averaged_copy
from unet_diffusion.training.base import NetworkModule, check_choice
from unet_diffusion.training.lightning_internals import log_interval, total_batches
from unet_diffusion.training.optimizers import LRDecay, default_optimizer

FILLS_EVERY_QUARTER = 2 * NUM_QUARTERS - 1  # with so many timesteps in a stratified batch, each quarter has one
USUAL_DROPOUT = 0.1  # of labels (Ho & Salimans 2022), where a checkpoint does not say
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly however many there are


class DiffusionModule(NetworkModule):
    """A denoiser, its noise schedule and how it is trained.

    Batches are dicts: "images" (B, C, H, W) float32 in [-1, 1], or latents of mean 0 and variance 1; "labels" (B,)
    int64 if the model has classes; "concat" (B, K, H, W) if it has maps; and "index" (B,) int64, the number of each
    image in its data set, which finds its caption and fixes its noise in validation.

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
        conditions: what the network is conditioned on beside the class labels that it embeds itself; trained with it.
        speed: how the network runs, see `speed.py`; they differ in rounding. "auto" times them on this machine before
            the run, for about 5 % of it at most, and a run that is continued keeps what was found.
        seed: of noise, timesteps and label dropout.

    Raises:
        ValueError: if the settings contradict each other, or (in `setup`) the data.
    """

    unet: PixelNetwork
    ema_unet: PixelNetwork

    record_key = "denoiser"

    logged = (
        *("train/loss", "val/loss", "train/skipped_steps"),
        *(f"{stage}/loss_q{quarter}" for stage in ("train", "val") for quarter in range(1, NUM_QUARTERS + 1)),
    )

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
        conditions: list[Condition] | None = None,
        speed: Speed | Literal["auto"] = "plain",
        seed: int = 0,
    ):
        _check_denoises(unet)
        _check_conditions(unet, conditions or [])
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

        self.conditions = nn.ModuleList(conditions or [])
        self.ema_conditions = averaged_copy(self.conditions)

        self.null_label = num_class_embeds - 1 if label_dropout > 0 else None
        self.captions: list[str] | None = None  # of all images, if there is a condition on them
        self._token_ids: dict[str, Tensor] = {}  # of the captions
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
            conditions=self.ema_conditions,
            speed=self.chosen_speed,
        )

    @property
    def all_conditions(self) -> list[Condition]:
        """The class labels that the network embeds itself, if it does, and the others, as they are trained."""
        return self._conditions_of(self.conditions)

    def _conditions_of(self, others: nn.ModuleList) -> list[Condition]:
        labels = [] if self.unet.class_embedding is None else [ClassLabels(self.null_label, self.label_dropout)]
        return [*labels, *cast(list[Condition], list(others))]

    def averaged_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [*super().averaged_pairs(), (self.ema_conditions, self.conditions)]

    def bind_data(self, datamodule: Any) -> None:
        self.image_shape = tuple(datamodule.image_shape)
        self.class_names = datamodule.class_names
        self.latent_space = getattr(datamodule, "latent_space", None)
        self._check_data(datamodule.num_classes)
        names = {"labels": "class_labels", "captions": "captions"}
        refuse_unused(datamodule, {names.get(one.batch_key, "") for one in self.all_conditions})
        _check_maps(self.all_conditions, datamodule)
        self._meet_captions(datamodule)

    def example_inputs(self, batch_size: int) -> dict[str, Tensor]:
        assert self.image_shape is not None
        given = {"labels": torch.zeros(batch_size, dtype=torch.int64)}
        for condition in self.all_conditions:
            if condition.batch_key == "captions":
                given["captions"] = torch.zeros(batch_size, condition.config["max_length"], dtype=torch.int64)
            elif condition.batch_key == "concat":
                given["concat"] = torch.zeros(batch_size, condition.config["channels"], *self.image_shape[1:])
        return {name: value.detach() for name, value in network_inputs(self.all_conditions, given).items()}

    def record(self) -> dict[str, Any]:
        return denoiser_record(self.trained)

    def identity(self) -> dict[str, Any]:
        space = None if self.latent_space is None else self.latent_space.plain()
        kept = {**self.unet.config, **self.schedule.config, "null_label": self.null_label}
        conditions = [network_record(cast(Condition, one)) for one in self.conditions]
        return {**kept, **_space_identity(space), "conditions": _conditions_identity(conditions)}

    @classmethod
    def rebuilt(cls, path: str | os.PathLike[str], checkpoint: dict[str, Any], **arguments: Any) -> Self:
        trained = read_checkpoint(path)
        if trained.null_label is None:
            arguments["label_dropout"] = 0.0
        elif not arguments.get("label_dropout"):
            arguments["label_dropout"] = USUAL_DROPOUT
        conditions = cast(list[Condition], list(trained.conditions))
        module = cls(trained.unet, trained.schedule, **{**arguments, "conditions": conditions})
        module.image_shape, module.class_names = trained.image_shape, trained.class_names
        module.latent_space = trained.latent_space
        return module

    @staticmethod
    def identity_in(record: dict[str, Any]) -> dict[str, Any]:
        kept = {**record["unet"]["init_args"], **record["schedule"], "null_label": record["null_label"]}
        conditions = _conditions_identity(record["conditions"])
        return {**kept, **_space_identity(record["latent_space"]), "conditions": conditions}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        names = checkpoint[self.record_key]["class_names"]
        if names and self.class_names and names != self.class_names:
            raise ValueError(
                f"the classes of the checkpoint are {', '.join(names)}, and those of the data "
                f"{', '.join(self.class_names)}; give the folders of the data the names that they had"
            )
        self._token_ids = {}  # the checkpoint has a tokenizer of its own

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The weighted loss of a batch at random timesteps."""
        x0 = batch["images"]
        if self.image_shape is None:
            channels, height, width = x0.shape[1:]
            self.image_shape = (channels, height, width)
        # Keyed by the number of the batch in the whole run: a resumed run draws what an uninterrupted one would have.
        step = total_batches(self.trainer)
        generator = keyed_generator(self.seed, step, self.global_rank, device=x0.device)
        t = stratified_timesteps(len(x0), self.schedule.num_train_timesteps, generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=torch.float32)
        inputs = network_inputs(self.all_conditions, self._given(batch), generator=generator)

        errors = self._errors(self.unet, x0, noise, t, inputs)
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
        inputs = network_inputs(self._conditions_of(self.ema_conditions), self._given(batch))
        errors = self._errors(self.ema_unet, x0, noise, t, inputs)
        self._validation_sums += torch.stack(sums_by_quarter(errors, t, self.schedule.num_train_timesteps))

    def on_validation_epoch_start(self) -> None:
        self._validation_sums = torch.zeros(2, NUM_QUARTERS, device=self.device)

    def on_validation_epoch_end(self) -> None:
        sums, counts = self.trainer.strategy.reduce(self._validation_sums, reduce_op="sum")
        # Equal on all processes; sync_dist lets callbacks on each of them monitor it.
        self.log(f"{self.scores_prefix}/loss", sums.sum() / counts.sum(), prog_bar=True, sync_dist=True)
        for quarter in range(NUM_QUARTERS):
            if counts[quarter] > 0:
                self.log(f"{self.scores_prefix}/loss_q{quarter + 1}", sums[quarter] / counts[quarter], sync_dist=True)

    def fixed_timesteps(self, index: Tensor) -> Tensor:
        """The timestep at which each image is validated, (B,) int64: even over the range, whatever the batches.

        Args:
            index: number of each image in its data set, (B,) int64.
        """
        spread = (index.cpu().double() * GOLDEN_RATIO) % 1.0  # on the CPU: not every device has float64
        return (spread * self.schedule.num_train_timesteps).long().to(index.device)

    def _errors(self, unet: PixelNetwork, x0: Tensor, noise: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        """Squared error of the prediction for each image, (B,)."""
        prediction = unet(self.schedule.add_noise(x0, noise, t), t, **inputs)
        return squared_error(prediction, self.schedule.target(x0, noise, t))

    def _given(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the conditions are called with for a batch."""
        given: dict[str, Tensor] = {name: batch[name] for name in batch if name in ("labels", "concat")}
        if self.captions is not None:
            self._token_ids = self._token_ids or self.caption_tokens(self.captions)
            given["captions"] = self._token_ids["captions"][batch["index"]]
        return given

    def caption_tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The entry "captions" of what conditions are given: token ids, (N, L) int64, on the module's device."""
        text = next(one for one in self.conditions if isinstance(one, TextTokens))
        return {"captions": text.token_ids(captions).to(self.device)}

    def _meet_captions(self, datamodule: Any) -> None:
        self._token_ids = {}  # those of other data
        texts = [one for one in self.conditions if isinstance(one, TextTokens)]
        self.captions = getattr(datamodule, "captions", None) if texts else None
        if texts and self.captions is None:
            raise ValueError(
                "the model is conditioned on captions, and the data have none; set data.init_args.captions to true, or "
                "encode the images again with --captions"
            )
        for text, average in zip(self.conditions, self.ema_conditions, strict=True):
            if isinstance(text, TextTokens) and self.captions is not None:
                text.learn_words([self.captions[i] for i in datamodule.train_indices.tolist()])
                average.set_extra_state(text.get_extra_state())

    def data_notes(self) -> list[str]:
        if self.captions is None:
            return []
        text = next(one for one in self.conditions if isinstance(one, TextTokens))
        num_cut, num_equal = text.cut(self.captions)
        equal = f", by which {num_equal} become equal to another" if num_equal else ""
        length = f"max_length {text.config['max_length']}"
        return [f"captions: {num_cut} of {len(self.captions)} cut to the tokens of {length}{equal}"]

    def _log_quarters(self, errors: Tensor, t: Tensor) -> None:
        """Logs the error in each quarter of the noise range, for the step at which Lightning writes its log."""
        every = log_interval(self.trainer)
        # A smaller batch may leave a quarter empty; counting would wait for the device.
        if not every or (self.trainer.global_step + 1) % every or len(t) < FILLS_EVERY_QUARTER:
            return
        sums, counts = sums_by_quarter(errors, t, self.schedule.num_train_timesteps)
        self.log_dict({f"train/loss_q{i + 1}": sums[i] / counts[i] for i in range(NUM_QUARTERS)})

    def _check_data(self, num_classes: int | None) -> None:
        assert self.image_shape is not None
        in_channels, num_class_embeds = self.unet.in_channels, self.unet.config["num_class_embeds"]
        in_maps = sum(one.config["channels"] for one in self.all_conditions if one.batch_key == "concat")
        if self.image_shape[0] + in_maps != in_channels:
            beside = f" with {in_maps} of maps" if in_maps else ""
            raise ValueError(
                f"the images have {self.image_shape[0]} channels{beside} and the network takes {in_channels}; "
                "set model.unet.init_args.in_channels or data.init_args.channels"
            )
        self.unet.check_size(*self.image_shape[1:])
        for tokens in self.conditions:
            if isinstance(tokens, ClassTokens) and tokens.config["num_classes"] != num_classes:
                raise ValueError(
                    f"num_classes of ClassTokens must be that of the data, {num_classes}, got "
                    f"{tokens.config['num_classes']}"
                )
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


def _check_conditions(unet: PixelNetwork, conditions: Sequence[Condition]) -> None:
    """What the conditions give and what the network takes must be the same."""
    if unet.config.get("vector_dim") is not None:
        raise ValueError(f"vector_dim must be None to be trained here, got {unet.config['vector_dim']}; "
                         "no condition gives a vector")  # fmt: skip
    if any(isinstance(one, ClassLabels) for one in conditions):
        raise ValueError("ClassLabels must not be among the conditions; set num_class_embeds and label_dropout instead")
    if sum(isinstance(one, TextTokens) for one in conditions) > 1:
        raise ValueError("there must be at most one TextTokens among the conditions, as there is one caption an image")
    if not isinstance(unet, DenoiserUNet) and any(one.network_argument == "concat" for one in conditions):
        raise ValueError(f"maps need a DenoiserUNet, got a {type(unet).__name__}")
    takes = unet.config.get("context_dim")
    widths = {one.config["context_dim"] for one in conditions if one.network_argument == "context"}
    if widths != ({takes} if takes else set()):
        raise ValueError(
            f"context_dim of the network and of its conditions must be the same, got {takes} and "
            f"{', '.join(map(str, sorted(widths))) or 'no condition with one'}; set model.unet.init_args.context_dim "
            "and model.conditions"
        )


def _check_maps(conditions: Sequence[Condition], datamodule: Any) -> None:
    """Concat of a kind that a data module gives must come from that one; others come as its owner wants them."""
    takes = {type(one) for one in conditions if isinstance(one, Concat)} - {Concat}
    gives = {datamodule.gives} if isinstance(datamodule, ImagesWithMaps) else set()
    if takes != gives:
        got, wanted = (" and ".join(one.__name__ for one in kinds) or "none" for kinds in (gives, takes))
        raise ValueError(
            f"the data must give the maps that the model is conditioned on, {wanted}, and give {got}; set "
            "data.class_path, such as unet_diffusion.data.InpaintingDataModule, and model.conditions"
        )


def _conditions_identity(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what may change: how often a condition is dropped, and whether its weights are trained."""
    kept = []
    for record in records:
        init_args = {name: one for name, one in record["init_args"].items() if name not in ("dropout", "frozen")}
        kept.append({**record, "init_args": init_args})
    return kept
