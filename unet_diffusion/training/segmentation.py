"""Trains a segmenter on windows, to give each pixel a class, and validates it on whole images.

The loss is the weighted cross-entropy of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), the Dice loss, or
both. The network is a SegmentationUNet, a DenoiserUNet at a fixed timestep, or a classifier of a denoiser's features.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from unet_diffusion.inference.reading import read_segmenter
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.speed import Speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.segmentation.features import FeatureClassifier
from unet_diffusion.segmentation.labels import BACKGROUND, NO_VALUE
from unet_diffusion.segmentation.losses import SegmentationLoss, segmentation_loss
from unet_diffusion.segmentation.prediction import class_scores
from unet_diffusion.segmentation.transfer import load_denoiser_weights
from unet_diffusion.training.base import NetworkModule, check_choice
from unet_diffusion.training.optimizers import LRDecay, default_optimizer
from unet_diffusion.training.prediction import images_of
from unet_diffusion.training.symptoms import one_class_only, warn_of

MIN_STEPS_OF_ALL_CLASSES = 100  # after which a segmenter that predicts one class only is warned about


class SegmentationModule(NetworkModule):
    """A network that gives each pixel a class, and how it is trained.

    Batches are those of `SegmentationDataModule`. `trainer.predict` takes images of any size, in [-1, 1], and gives the
    class probabilities of each, (K, H, W).

    Args:
        unet: The network to train; its out_channels are the classes.
        loss: "cross_entropy", weighted by pixel; "dice"; or "both", their sum.
        timestep: The timestep for a network with a timestep embedding, such as a DenoiserUNet; 0 means almost no noise.
        init_from: A denoiser whose weights the network starts with: a checkpoint file, a run folder or a diffusers
            pipeline folder. The run prints what was taken over.
        optimizer: A function that makes the optimiser from the parameters.
        lr_warmup_steps: The number of optimiser steps over which the learning rate rises linearly to its full value; 0
            is off.
        lr_decay: "constant", or "cosine" to 0 at the trainer's last step.
        ema_decay: The share of the moving average of the weights that stays at each optimiser step; 0 is off.
        speed: How the network runs, see `speed.py`.
        seed: Seed of all that the module draws.

    Raises:
        ValueError: If the settings contradict each other, or (in `setup`) the data or the denoiser.
    """

    unet: PixelNetwork
    ema_unet: PixelNetwork
    kind: Literal["binary", "classes", "instances"]  # the three below are known with the data
    class_names: list[str]
    stretch: bool

    record_key = "segmenter"
    image_shape: tuple[int, int, int] | None = None  # (C, H, W) of a window; known with the data

    logged = ("train/loss", "train/skipped_steps", "val/dice", "val/iou", "val/pixel_error")

    def __init__(
        self,
        unet: PixelNetwork,
        *,
        loss: SegmentationLoss = "cross_entropy",
        timestep: int | None = None,
        init_from: str | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_warmup_steps: int = 0,
        lr_decay: LRDecay = "constant",
        ema_decay: float = 0.0,
        speed: Speed | Literal["auto"] = "plain",
        seed: int = 0,
    ):
        check_choice("loss", loss, get_args(SegmentationLoss))
        if (timestep is None) != (unet.time_embedding is None):
            has = "no timestep embedding" if unet.time_embedding is None else "a timestep embedding"
            raise ValueError(f"timestep must be given exactly if the network has a timestep embedding: it has {has}, "
                             f"got {timestep}")  # fmt: skip
        if unet.class_embedding is not None:
            raise ValueError("the network must have no class embedding, as images to segment have no class; "
                             "set num_class_embeds to null")  # fmt: skip
        super().__init__(
            unet,
            optimizer=optimizer,
            lr_warmup_steps=lr_warmup_steps,
            lr_decay=lr_decay,
            ema_decay=ema_decay,
            speed=speed,
            seed=seed,
        )
        self.loss = loss
        self.timestep = timestep
        self.init_from = init_from
        self._validation_sums: Tensor | None = None

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        return self.image_shape

    @property
    def trained(self) -> Segmenter:
        """The averaged network with all that is needed to segment with it.

        Raises:
            ValueError: If the module has neither met its data nor come from a checkpoint.
        """
        if self.image_shape is None:
            raise ValueError("the classes are not known before training; fit the module first")
        segmenter = Segmenter(
            unet=self.ema_unet,
            kind=self.kind,
            class_names=self.class_names,
            timestep=self.timestep,
            stretch=self.stretch,
            window_size=self.image_shape[-1],
            settings=self.settings,
            speed=self.chosen_speed,
        )
        segmenter.device = self.device
        return segmenter

    def bind_data(self, datamodule: Any) -> None:
        self.image_shape = tuple(datamodule.image_shape)
        targets = datamodule.targets
        self.kind, self.class_names, self.stretch = targets.kind, list(targets.class_names), datamodule.stretch
        datamodule.margin = self.unet.margin
        channels, height, width = self.image_shape
        num_classes, num_scores = len(self.class_names), self.unet.config["out_channels"]
        if self.unet.in_channels != channels:
            raise ValueError(
                f"the images have {channels} channels and the network takes {self.unet.in_channels}; set "
                "model.unet.in_channels or channels of the source"
            )
        if num_scores != num_classes:
            raise ValueError(
                f"out_channels must be {num_classes}, one a class ({', '.join(self.class_names)}), "
                f"got {num_scores}; set model.unet.out_channels"
            )
        self.unet.check_size(height, width)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.init_from is not None and not self.is_continued:
            from unet_diffusion.inference.loading import load_denoiser  # imports diffusers, which only this needs

            denoiser = load_denoiser(self.init_from)
            load_denoiser_weights(self.ema_unet, denoiser)
            rank_zero_info(f"{self.init_from}: {load_denoiser_weights(self.unet, denoiser)}")
        elif stage == "fit" and isinstance(self.unet, FeatureClassifier) and not self.is_continued:
            rank_zero_warn("the frozen denoiser has random weights; set model.init_from to a trained one")
        super().setup(stage)

    def record(self) -> dict[str, Any]:
        return self.trained.record()

    @classmethod
    def rebuilt(
        cls, path: str | os.PathLike[str], checkpoint: dict[str, Any], allow: Sequence[str], **arguments: Any
    ) -> Self:
        trained = read_segmenter(path, allow=allow)
        module = cls(**{"unet": trained.unet, "timestep": trained.timestep, **arguments, "init_from": None})
        module.kind, module.class_names, module.stretch = trained.kind, trained.class_names, trained.stretch
        module.image_shape = (trained.unet.in_channels, trained.window_size, trained.window_size)
        return module

    def identity(self) -> dict[str, Any]:
        return {} if self.image_shape is None else self.identity_in(self.record())

    @staticmethod
    def identity_in(record: dict[str, Any]) -> dict[str, Any]:
        settings = {name: record[name] for name in ("timestep", "kind", "class_names", "stretch")}
        return {**record["unet"]["init_args"], **settings}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of windows, where the network predicts."""
        margin = self.unet.margin
        inside = (slice(None), *(slice(margin, side - margin) for side in batch["images"].shape[-2:]))
        predicted = class_scores(self.unet, batch["images"], self.timestep)
        loss = segmentation_loss(predicted, batch["classes"][inside], batch["weights"][inside], self.loss)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        # Of each class, pixels: of truth and prediction, of the truth, of the prediction.
        num_classes = len(self.class_names) if self.kind == "classes" else 2
        self._validation_sums = torch.zeros(num_classes, 3, device=self.device, dtype=torch.int64)

    def validation_step(self, batch: list[dict[str, Tensor]], batch_idx: int) -> None:
        """Count right and wrong pixels of whole images, in the masks that `segment` would write."""
        assert self._validation_sums is not None
        for one in batch:
            classes = one["classes"]
            probabilities = self.probabilities(one["images"])
            if self.kind == "classes":
                truth, predicted = classes, probabilities.argmax(dim=0)
            else:
                truth, predicted = (classes > 0).long(), (probabilities[BACKGROUND] < 0.5).long()
            counts = classes != NO_VALUE
            truth, predicted = truth[counts], predicted.to(self.device)[counts]
            tally = partial(torch.bincount, minlength=len(self._validation_sums))
            sums = [tally(truth[predicted == truth]), tally(truth), tally(predicted)]
            self._validation_sums += torch.stack(sums, dim=1)

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(self._validation_sums, reduce_op="sum").float()
        names = self.class_names if self.kind == "classes" else [self.class_names[0], "foreground"]
        warn_of(self, one_class_only(sums[:, 2], sums[:, 1], names), after=MIN_STEPS_OF_ALL_CLASSES)
        error = 1 - sums[:, 0].sum() / sums[:, 1].sum()
        occurs = sums[1:, 1:].sum(dim=1) > 0  # the others, and the background, do not count
        right, truth, predicted = sums[1:][occurs].unbind(dim=1)
        dice = (2 * right / (truth + predicted)).mean()
        iou = (right / (truth + predicted - right)).mean()
        scores = {"dice": dice, "iou": iou, "pixel_error": error}
        named = {f"{self.scores_prefix}/{name}": value for name, value in scores.items()}
        self.log_dict(named, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> list[Tensor]:
        return [self.probabilities(image) for image in images_of(batch)]

    def probabilities(self, image: Tensor) -> Tensor:
        """Class probabilities of the averaged network for a whole image, (K, H, W) float32 on the CPU.

        Args:
            image: The image, (C, H, W) in [-1, 1], of any size.
        """
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return self.trained.probabilities(image)
