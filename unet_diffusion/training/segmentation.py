"""Trains a segmenter on windows, to give each pixel a class, and validates it on whole images.

The loss is the weighted cross-entropy of Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), the Dice loss, or
both. The network is a SegmentationUNet, a DenoiserUNet at a fixed timestep, or a classifier of a denoiser's features.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self, cast, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from unet_diffusion.data.segmentation import SegmentationDataModule
from unet_diffusion.evaluation.segmented_images import Truth
from unet_diffusion.evaluation.thresholds import ScoresByThreshold, evenly_spaced, kept_threshold
from unet_diffusion.inference.reading import read_segmenter
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.speed import Speed
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.hub import with_prefix
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.segmentation.features import FeatureClassifier
from unet_diffusion.segmentation.labels import BACKGROUND, MIN_SIZE, NO_VALUE, NUM_BESIDE, THRESHOLD, Kind
from unet_diffusion.segmentation.losses import SegmentationLoss, affinity_loss, distance_loss, segmentation_loss
from unet_diffusion.segmentation.scores import THRESHOLDS
from unet_diffusion.segmentation.transfer import is_of_denoiser, load_denoiser_weights
from unet_diffusion.training.base import NetworkModule
from unet_diffusion.training.hyperparameters import check_choice
from unet_diffusion.training.joint import JointDenoising, joint_in
from unet_diffusion.training.lightning_internals import data_of, total_batches
from unet_diffusion.training.optimizers import LRDecay, default_optimizer
from unet_diffusion.training.prediction import images_of
from unet_diffusion.training.symptoms import one_class_only, warn_of

JOINT_KEY = 5  # keeps the noise of what is denoised apart from windows, which have the same seed
MOST_FITTED = 16  # images on which thresholds are fitted
MOST_DIVIDED = 2 * 512**2  # pixels of them where the mutex watershed makes objects, unless the user keeps more for it
SECONDS_PER_PIXEL = 5e-6  # of the mutex watershed; 1 to 3 were measured on one core where cells are plain to see
LONG = 20  # seconds after which a user should know what the run waits for
MIN_STEPS_OF_ALL_CLASSES = 100  # after which a segmenter that predicts one class only is warned about


class SegmentationModule(NetworkModule):
    """A network that gives each pixel a class, and how it is trained.

    Batches are those of `SegmentationDataModule`. `trainer.predict` takes images of any size, in [-1, 1], and gives the
    maps of each, (K, H, W): class probabilities, and then the distances or affinities, as `Segmenter.maps`.

    Args:
        unet: The network to train; its out_channels are the classes; for targets with borders one more, or for targets
            with affinities one for each offset; and to denoise beside segmenting, those of an image.
        loss: "cross_entropy", weighted by pixel; "dice"; or "both", their sum. That of distances is added, or this loss
            of affinities.
        timestep: The timestep for a network with a timestep embedding, such as a DenoiserUNet; 0 means almost no noise.
        init_from: A denoiser whose weights the network starts with: a checkpoint file, a run folder or a diffusers
            pipeline folder. The run prints what was taken over.
        pretrained_lr_scale: The learning rate of the weights from `init_from`, relative to that of the new head. Below
            1 they stay nearer to the denoiser, which few labels then do not overwrite. The optimiser then gets two
            groups of weights, those of the head first.
        joint: Denoise windows of images without labels, too, with the same network. None: segment only.
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
    kind: Kind  # the four below are known with the data
    class_names: list[str]
    stretch: bool
    object_diameter: float | None
    threshold: float = THRESHOLD  # these two are fitted before a validation
    min_size: int = MIN_SIZE

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
        pretrained_lr_scale: float = 1.0,
        joint: JointDenoising | None = None,
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
        if joint is not None and (timestep is None or isinstance(unet, FeatureClassifier)):
            raise ValueError(f"joint needs a network that takes a timestep and is trained, got {type(unet).__name__} "
                             "with timestep None; use a DenoiserUNet, and set timestep to 0")  # fmt: skip
        if joint is not None and any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in unet.modules()):
            raise ValueError("joint needs a network without batch norm, which would mix the statistics of images with "
                             "and without noise; set norm to group")  # fmt: skip
        _check_lr_scale(pretrained_lr_scale)
        if pretrained_lr_scale != 1 and (init_from is None or isinstance(unet, FeatureClassifier)):
            raise ValueError(
                f"pretrained_lr_scale must be 1 where no weights from init_from are trained, got "
                f"{pretrained_lr_scale}; set init_from to a denoiser with the network's widths"
            )
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
        self.init_from = init_from and with_prefix(init_from)
        self.pretrained_lr_scale = pretrained_lr_scale
        self.joint = joint
        self.batches_at_once = 1 if joint is None else 2  # the second is denoised
        self._validation_sums: Tensor | None = None
        self._has_told_to_wait = False

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
            object_diameter=self.object_diameter,
            window_size=self.image_shape[-1],
            settings=self.settings,
            threshold=self.threshold,
            min_size=self.min_size,
            values=self.values,
            speed=self.chosen_speed,
        )
        segmenter.device = self.device
        return segmenter

    def bind_data(self, datamodule: Any) -> None:
        self.image_shape = tuple(datamodule.image_shape)
        self.bind_values(datamodule, self.image_shape[0])
        targets = datamodule.targets
        self.kind, self.class_names, self.stretch = targets.kind, list(targets.class_names), datamodule.stretch
        self.object_diameter = targets.object_diameter
        datamodule.margin, datamodule.draws_unlabelled = self.unet.margin, self.joint is not None
        channels, height, width = self.image_shape
        num_scores = self.unet.config["out_channels"]
        if self.unet.in_channels != channels:
            raise ValueError(
                f"the images have {channels} channels and the network takes {self.unet.in_channels}; set "
                "model.unet.in_channels or channels of the source"
            )
        if datamodule.images.unlabelled and self.joint is None:
            raise ValueError("data.unlabelled is for a network that denoises, too; set model.joint, or leave it out")
        if targets.object_diameter is not None and self.joint is not None:
            raise ValueError("joint denoises images without labels, whose objects have no known size; leave out "
                             "data.targets.object_diameter")  # fmt: skip
        expected = targets.num_maps + (channels if self.joint is not None else 0)
        if num_scores != expected:
            others = {"instances": ", and one for the distance from the edge",
                      "affinities": ", and one for each offset of affinities"}.get(self.kind, "")  # fmt: skip
            others += f", and {channels} to denoise" if self.joint is not None else ""
            raise ValueError(
                f"out_channels must be {expected}, one a class ({', '.join(self.class_names)}){others}, got "
                f"{num_scores}; set model.unet.out_channels"
            )
        self.unet.check_size(height, width)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.init_from is not None and not self.is_continued:
            from unet_diffusion.inference.loading import load_denoiser  # imports diffusers, which only this needs

            denoiser = load_denoiser(self.init_from)
            load_denoiser_weights(self.ema_unet, denoiser)
            rank_zero_info(f"{self.init_from}: {load_denoiser_weights(self.unet, denoiser)}")
            self.initial_values = denoiser.values
        elif stage == "fit" and isinstance(self.unet, FeatureClassifier) and not self.is_continued:
            rank_zero_warn("the frozen denoiser has random weights; set model.init_from to a trained one")
        super().setup(stage)

    def new_optimizers(self) -> list[Optimizer]:
        if self.pretrained_lr_scale == 1:
            return super().new_optimizers()
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in self.unet.named_parameters():
            parts[is_of_denoiser(name)].append(parameter)
        optimizer = self.optimizer_factory([{"params": part} for part in parts])  # type: ignore[arg-type]  # groups, too
        if len(optimizer.param_groups) != len(parts):
            raise ValueError(
                f"the optimiser must keep the two groups of weights of pretrained_lr_scale, and has "
                f"{len(optimizer.param_groups)}; set pretrained_lr_scale to 1"
            )
        optimizer.param_groups[1]["lr"] *= self.pretrained_lr_scale
        return [optimizer]

    def record(self) -> dict[str, Any]:
        return self.trained.record()

    @classmethod
    def rebuilt(
        cls, path: str | os.PathLike[str], checkpoint: dict[str, Any], allow: Sequence[str], **arguments: Any
    ) -> Self:
        trained = read_segmenter(path, allow=allow)
        alone = {"init_from": None, "pretrained_lr_scale": 1.0}  # the checkpoint has the weights
        parts = {"unet": trained.unet, "timestep": trained.timestep, "joint": joint_in(trained.settings)}
        module = cls(**{**parts, **arguments, **alone})
        module.pretrained_lr_scale = arguments.get("pretrained_lr_scale", 1.0)
        _check_lr_scale(module.pretrained_lr_scale)
        module.kind, module.class_names, module.stretch = trained.kind, trained.class_names, trained.stretch
        module.object_diameter = trained.object_diameter
        module.threshold, module.min_size = trained.threshold, trained.min_size
        module.keep_values(trained.values)
        module.image_shape = (trained.unet.in_channels, trained.window_size, trained.window_size)
        return module

    def identity(self) -> dict[str, Any]:
        return {} if self.image_shape is None else self.identity_in(self.record())

    @staticmethod
    def identity_in(record: dict[str, Any]) -> dict[str, Any]:
        settings = {name: record[name] for name in ("timestep", "kind", "class_names", "stretch", "object_diameter")}
        return {**record["unet"]["init_args"], **settings}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was fitted before the checkpoint, until it is fitted again."""
        super().on_load_checkpoint(checkpoint)
        record = checkpoint[self.record_key]
        self.threshold, self.min_size = record["threshold"], record["min_size"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of windows, where the network predicts."""
        margin, images = self.unet.margin, batch["images"]
        inside = (slice(None), *(slice(margin, side - margin) for side in images.shape[-2:]))
        x, t = images, None if self.timestep is None else torch.full((len(images),), self.timestep, device=self.device)
        if self.joint is not None:
            # Keyed by the number of the batch in the whole run: a resumed run draws what an uninterrupted one would.
            step = total_batches(self.trainer)
            generator = keyed_generator(self.seed, JOINT_KEY, step, self.global_rank, device=images.device)
            noised, noised_t, target = self.joint.noised(batch["unlabelled"], generator)
            x, t = torch.cat([images, noised]), torch.cat([cast(Tensor, t), noised_t])
        prediction = self.unet(x, t)
        scores, weights = prediction[: len(images)], batch["weights"][inside]
        num_classes = len(self.class_names)
        num_maps = num_classes + NUM_BESIDE[self.kind]
        loss = segmentation_loss(scores[:, :num_classes], batch["classes"][inside], weights, self.loss)
        if self.kind == "instances":
            loss = loss + distance_loss(scores[:, num_classes], batch["distances"][inside], weights)
        elif self.kind == "affinities":
            loss = loss + affinity_loss(scores[:, num_classes:num_maps], batch["instances"][inside], self.loss)
        if self.joint is not None:
            denoised = prediction[len(images) :, -images.shape[1] :]
            loss, denoising_loss = self.joint.loss(loss, denoised, target[:, :, *inside[1:]])
            self.log("train/denoising_loss", denoising_loss.detach())
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def pass_average(self, batch: dict[str, Tensor]) -> None:
        images = batch["images"]
        t = None if self.timestep is None else torch.full((len(images),), self.timestep, device=images.device)
        self.ema_unet(images, t)

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking and self.kind != "classes":
            self._fit_threshold(cast(SegmentationDataModule, data_of(self.trainer)))
        # Of each class, pixels: of truth and prediction, of the truth, of the prediction.
        num_classes = len(self.class_names) if self.kind == "classes" else 2
        self._validation_sums = torch.zeros(num_classes, 3, device=self.device, dtype=torch.int64)

    def _fit_threshold(self, data: SegmentationDataModule) -> None:
        """Fit threshold and least size on images that are kept for it, or else on images that are trained on."""
        scores = []
        for index in self._images_to_fit_on(data):
            classes = data.classes(index).long().numpy()
            truth = Truth.of(data.targets, data.images.labels[index], classes)
            maps = self.maps(data.whole(index)["images"]).numpy()
            scores.append(ScoresByThreshold.of(index, maps, self.kind, truth))
        self.threshold, self.min_size = kept_threshold(scores, self.kind)

    def _images_to_fit_on(self, data: SegmentationDataModule) -> list[int]:
        """The images to fit on; few where the mutex watershed divides them, and a line if that takes long."""
        images = evenly_spaced(data.fit_indices.tolist() or data.train_images.tolist(), MOST_FITTED)
        if self.kind != "affinities":
            return images
        if not len(data.fit_indices):
            largest = max(data.classes(index).numel() for index in images)
            images = evenly_spaced(images, max(MOST_DIVIDED // largest, 1))
        seconds = SECONDS_PER_PIXEL * len(THRESHOLDS) * sum(data.classes(index).numel() for index in images)
        if seconds > LONG and not self._has_told_to_wait:
            self._has_told_to_wait = True
            fewer = "; a smaller data.num_fit takes less" if len(data.fit_indices) > 1 else ""
            rank_zero_info(f"fitting the threshold: the mutex watershed divides {len(images)} images at "
                           f"{len(THRESHOLDS)} thresholds, which takes about {seconds:.0f} seconds before each "
                           f"validation{fewer}")  # fmt: skip
        return images

    def validation_step(self, batch: list[dict[str, Tensor]], batch_idx: int) -> None:
        """Count right and wrong pixels of whole images, in the masks that `segment` would write."""
        assert self._validation_sums is not None
        for one in batch:
            classes = one["classes"]
            maps = self.maps(one["images"])
            if self.kind == "classes":
                truth, predicted = classes, maps.argmax(dim=0)
            else:
                truth, predicted = (classes > 0).long(), (maps[BACKGROUND] < 1 - self.threshold).long()
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
        return [self.maps(image) for image in images_of(batch)]

    def maps(self, image: Tensor) -> Tensor:
        """The maps of the averaged network for a whole image, as `Segmenter.maps`.

        Args:
            image: The image, (C, H, W) in [-1, 1], of any size.
        """
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return self.trained.maps(image)


def _check_lr_scale(scale: float) -> None:
    if not 0 < scale <= 1:
        raise ValueError(f"pretrained_lr_scale must be above 0 and at most 1, got {scale}")
