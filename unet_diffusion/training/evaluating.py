"""Evaluates a denoiser in training: a few samples, compared with the images that it is trained on."""

import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.diffusion.schedulers import SchedulerName
from unet_diffusion.training.callbacks import run_folder
from unet_diffusion.training.lightning_internals import callbacks_of, data_of, is_trial, is_within_step

if TYPE_CHECKING:  # they import torch-fidelity and diffusers, which take seconds
    from torch import Tensor

    from unet_diffusion.evaluation.features import Features
    from unet_diffusion.evaluation.samples import SamplesToDraw
    from unet_diffusion.training.module import DiffusionModule

EVALUATED = ("eval/fd", "eval/kid")  # what is logged
MOST_SHARE = 0.2  # of the time of training; evaluations that would take more are left out
MOST_REFERENCES = 2000  # training images to compare with


class EvaluateSamples(Callback):
    """Logs the Fréchet distance (eval/fd) and KID (eval/kid) of samples of the averaged denoiser, as training goes on.

    Features are those of a small network that is trained on the run's images first; see `evaluation.own_features`. With
    few samples the Fréchet distance is too large, always by about the same: compare steps of a run, and judge the model
    by `unet-diffusion evaluate`, which draws for the same conditions. Evaluations take at most a fifth of the time;
    those beyond are left out, and the run tells which.

    Args:
        every_n_steps: Optimiser steps between evaluations; 0 is off. `checkpoint.monitor eval/fd` keeps the best.
        num_images: Samples of an evaluation.
        scheduler: Name of a diffusers scheduler.
        num_inference_steps: Denoising steps of a sample.
        guidance_scale: How strongly samples are pulled towards labels or captions; 1 is off.
        seed: Seed of the samples, the same ones every time.
        thresholding: Whether pixels are kept in their range at every step, as in `SampleGrid`.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        *,
        num_images: int = 256,
        scheduler: SchedulerName = "DPMSolverMultistepScheduler",
        num_inference_steps: int = 15,
        guidance_scale: float = 1.0,
        seed: int = 0,
        thresholding: bool = False,
    ):
        self.every_n_steps = every_n_steps
        self.num_images = num_images
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.seed = seed
        self.thresholding = thresholding
        self.evaluated_at = -1  # step
        self._to_draw: SamplesToDraw | None = None  # with the averaged network, which training changes in place
        self._features: Features | None = None
        self._reference: Tensor | None = None  # features of training images
        self._begun = self._spent = 0.0  # seconds

    @property
    def logged(self) -> tuple[str, ...]:
        """What it logs."""
        return EVALUATED if self.every_n_steps else ()

    def on_fit_start(self, trainer: Trainer, pl_module: "DiffusionModule") -> None:  # type: ignore[override]
        """Refuse what would only fail at the first evaluation.

        Raises:
            ValueError: If the denoiser cannot be evaluated on these data, or there are too few samples.
        """
        if not self.every_n_steps:
            return
        from unet_diffusion.evaluation.distances import LEAST_IMAGES
        from unet_diffusion.evaluation.samples import samples_to_draw

        if not isinstance(data_of(trainer), ImageDataModule):
            raise ValueError("evaluate.every_n_steps needs an ImageDataModule, whose images samples are compared with; "
                             "set it to 0")  # fmt: skip
        if self.num_images < LEAST_IMAGES:
            raise ValueError(f"evaluate.num_images must be at least {LEAST_IMAGES}, got {self.num_images}")
        self._to_draw = samples_to_draw(pl_module.trained, data_of(trainer), self.num_images, self._sampling())
        pl_module.codec.release()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the network of the features, which is no part of the time of evaluations."""
        if self.every_n_steps and trainer.is_global_zero and not is_trial(trainer):
            begun = time.monotonic()
            features, _ = self._compared_with(trainer)
            rank_zero_info(f"samples will be evaluated by {features.about}; it is there after "
                           f"{time.monotonic() - begun:.1f} s")  # fmt: skip
        self._begun, self._spent = time.monotonic(), 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        is_due = self.every_n_steps and step % self.every_n_steps == 0 and not is_within_step(trainer)
        if not is_due or is_trial(trainer) or trainer.strategy.broadcast(self._is_too_slow(step)):
            return
        begun = time.monotonic()
        values = self._evaluated(trainer, pl_module)
        self._spent += time.monotonic() - begun
        self.evaluated_at = step
        for name, value in values.items():
            pl_module.log(name, value, logger=False)
        for logger in trainer.loggers:  # at any step, not only at those at which losses are logged
            logger.log_metrics(values, step=step)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        rank_zero_info(f"step {step}: {figures}, of {self.num_images} samples in {time.monotonic() - begun:.1f} s")

    def _is_too_slow(self, step: int) -> bool:
        share = self._spent / max(time.monotonic() - self._begun, 1e-6)
        if share > MOST_SHARE:
            rank_zero_info(f"step {step}: not evaluated, as evaluations took {share:.0%} of the time so far; raise "
                           "evaluate.every_n_steps, or lower evaluate.num_images")  # fmt: skip
        return share > MOST_SHARE

    @torch.no_grad()
    def _evaluated(self, trainer: Trainer, module: "DiffusionModule") -> dict[str, float]:
        """The figures by name, the same on all processes; a network that is shared out draws on all of them at once."""
        from unet_diffusion.evaluation.distances import frechet_distance, kernel_distance
        from unet_diffusion.evaluation.selections import of_images

        values: dict[str, float] = {}
        if trainer.is_global_zero or module.is_sharded:
            with trainer.precision_plugin.forward_context():
                assert self._to_draw is not None  # since on_fit_start
                samples = self._to_draw.draw(range(self.num_images), None).clamp(-1, 1)
            module.codec.release()
            if trainer.is_global_zero:
                features, reference = self._compared_with(trainer)
                drawn = features.of(of_images(samples), progress=False)
                values = {"eval/fd": frechet_distance(drawn, reference), "eval/kid": kernel_distance(drawn, reference)}
        return trainer.strategy.broadcast(values)

    def _compared_with(self, trainer: Trainer) -> "tuple[Features, Tensor]":
        """What makes features, and those of training images; both are made once."""
        if self._features is None or self._reference is None:
            from unet_diffusion.evaluation.evaluation import OUTPUT
            from unet_diffusion.evaluation.features import features_named
            from unet_diffusion.evaluation.selections import of_data, some_of

            train, _ = of_data(data_of(trainer))
            with torch.enable_grad():
                self._features = features_named("own", None, train, run_folder(trainer) / OUTPUT, progress=False)
            self._reference = self._features.of(some_of(train, MOST_REFERENCES), progress=False)
        return self._features, self._reference

    def _sampling(self) -> Any:
        from unet_diffusion.inference.sample_options import Sampling

        return Sampling(
            self.scheduler,
            self.num_inference_steps,
            self.guidance_scale,
            self.seed,
            thresholding=self.thresholding,
        )


def evaluated_at(trainer: Trainer) -> int:
    """The step at which samples were last evaluated; -1 if they were not."""
    return max((one.evaluated_at for one in callbacks_of(trainer) if isinstance(one, EvaluateSamples)), default=-1)
