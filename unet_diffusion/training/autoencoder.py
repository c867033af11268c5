"""Trains an autoencoder: reconstruction, a KL term or a codebook, and a discriminator for sharp reconstructions.

The first stage of Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, appendix G), after Esser et al. 2021
(https://arxiv.org/abs/2012.09841). It differs from their code in two points: the optimiser trains the learned variance,
and the trainer and the discriminator's start count the steps of the autoencoder alone.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from unet_diffusion.data.base import refuse_unused
from unet_diffusion.evaluation.image_quality import SSIM_SIDE, PerceptualNet, lpips, psnr, ssim
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.reading import read_autoencoder
from unet_diffusion.latents.space import LEAST_STD, moment_sums
from unet_diffusion.models.autoencoders import downsampling, latent_moments, num_latent_channels, reconstruct
from unet_diffusion.models.discriminator import hinge_loss
from unet_diffusion.models.speed import Speed
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.training.adversarial import AdversarialLoss, adversarial_in, problem_of
from unet_diffusion.training.base import NetworkModule
from unet_diffusion.training.health import SkipBadSteps
from unet_diffusion.training.hyperparameters import check_choice
from unet_diffusion.training.latent_terms import latent_term
from unet_diffusion.training.lightning_internals import callbacks_of, log_interval
from unet_diffusion.training.optimizers import LRDecay, adam_of_gans
from unet_diffusion.training.prediction import images_of
from unet_diffusion.training.symptoms import MIN_STEPS_TO_JUDGE, warn_of

Reconstruction = Literal["l1", "l2"]


class AutoencoderModule(NetworkModule):
    """An autoencoder in training, the moving average of its weights, and its discriminator.

    Batches are those of `ImageDataModule`. Steps are steps of the autoencoder: the discriminator's do not count.
    `trainer.predict` takes images in [-1, 1], all of one size in a batch, and gives their reconstructions.

    Args:
        autoencoder: An AutoencoderKL or VQModel of diffusers, such as `kl_autoencoder` or `vq_autoencoder` makes, or
            `pretrained_autoencoder` loads.
        reconstruction: "l1" or "l2", the error of a pixel.
        kl_weight: The weight of the KL divergence from the standard normal, summed over an image's latents as the error
            is over its pixels; for an AutoencoderKL.
        codebook_weight: The weight of the distance between latents and codes, see `quantize`; for a VQModel.
        restart_codes_after: The number of steps without use after which a code becomes one of the latents of that step
            (Dhariwal et al. 2020, https://arxiv.org/abs/2005.00341, section 3.1); 0 is off. For a VQModel.
        perceptual_weight: The weight of LPIPS (Zhang et al. 2018), added to the error of each pixel; 0 is off.
        perceptual_net: The network of LPIPS, whose weights must be in torch's cache.
        adversarial: The discriminator, and how it is trained; None: there is no adversarial loss.
        learn_variance: Whether to learn the scale of a pixel's error, by which errors are divided; it is 1 otherwise.
        optimizer: A function that makes the autoencoder's optimiser from its parameters.
        lr_warmup_steps: The number of steps over which all learning rates rise linearly to their full value; 0 is off.
        lr_decay: "constant", or "cosine" to 0 at the trainer's last step.
        ema_decay: The share of the average that stays at each step; less at first: (1 + n) / (10 + n) after n steps. 0
            is off.
        seed: Seed of the latents that are drawn.

    Raises:
        ValueError: If the settings contradict each other, or (in `setup`) the data.
        FileNotFoundError: If LPIPS's weights are not there.
    """

    autoencoder: AutoencoderKL | VQModel
    ema_autoencoder: AutoencoderKL | VQModel

    network_name = "autoencoder"
    record_key = "autoencoder"
    image_shape: tuple[int, int, int] | None = None  # (C, H, W) of an image; known with the data
    is_timed = False  # a step of two networks, each with its optimiser, is more than a trial can hold
    can_scale_losses = False  # gradients are compared, which scaling would spoil

    logged = (  # the last of those with their part only
        *("train/loss", "train/fidelity", "train/skipped_steps", "val/psnr", "val/latent_mean", "val/latent_std"),
        *("val/ssim", "val/latent_signal", "val/codes_used", "val/code_perplexity", "train/kl", "train/codebook"),
        *("train/adversarial", "train/adversarial_weight", "train/discriminator"),
    )

    def __init__(
        self,
        autoencoder: ModelMixin,
        *,
        reconstruction: Reconstruction = "l1",
        kl_weight: float = 1.0e-6,
        codebook_weight: float = 1.0,
        restart_codes_after: int = 0,
        perceptual_weight: float = 0.0,
        perceptual_net: PerceptualNet = "vgg",
        adversarial: AdversarialLoss | None = None,
        learn_variance: bool = False,
        optimizer: OptimizerCallable = adam_of_gans,
        lr_warmup_steps: int = 0,
        lr_decay: LRDecay = "constant",
        ema_decay: float = 0.999,
        seed: int = 0,
    ):
        if not isinstance(autoencoder, AutoencoderKL | VQModel):
            raise ValueError(f"autoencoder must be an AutoencoderKL or a VQModel, got {type(autoencoder).__name__}")
        check_choice("reconstruction", reconstruction, get_args(Reconstruction))
        check_choice("perceptual_net", perceptual_net, get_args(PerceptualNet))
        numbers = {"kl_weight": kl_weight, "codebook_weight": codebook_weight, "perceptual_weight": perceptual_weight,
                   "restart_codes_after": restart_codes_after}  # fmt: skip
        for name, number in numbers.items():
            if number < 0:
                raise ValueError(f"{name} must be 0 or more, got {number}")
        super().__init__(
            autoencoder.train(),
            optimizer=optimizer,
            lr_warmup_steps=lr_warmup_steps,
            lr_decay=lr_decay,
            ema_decay=ema_decay,
            seed=seed,
        )
        # Two optimisers take turns in a step, which Lightning leaves to the module.
        self.automatic_optimization = False
        self.adversarial = adversarial
        self.discriminator = adversarial.discriminator if adversarial else None
        self.log_variance = nn.Parameter(torch.zeros(()), requires_grad=learn_variance)
        # In a list: frozen weights that come from a file of their own are not in checkpoints.
        self._perceptual = [lpips(perceptual_net)] if perceptual_weight else []
        self.latent_term = latent_term(
            autoencoder,
            kl_weight=kl_weight,
            codebook_weight=codebook_weight,
            restart_codes_after=restart_codes_after,
            seed=seed,
        )
        self.reconstruction = reconstruction
        self.kl_weight = kl_weight
        self.codebook_weight = codebook_weight
        self.restart_codes_after = restart_codes_after
        self.perceptual_weight = perceptual_weight
        self.perceptual_net = perceptual_net
        self.learn_variance = learn_variance
        self.latent_std: float | None = None  # as last validated

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        return self.image_shape

    @property
    def trained(self) -> Autoencoder:
        """The averaged autoencoder with all that is needed to use it.

        Raises:
            ValueError: If the module has neither met its data nor come from a checkpoint.
        """
        if self.image_shape is None:
            raise ValueError("the image shape is not known before training; fit the module first")
        trained = Autoencoder(
            autoencoder=self.ema_autoencoder,
            image_shape=self.image_shape,
            latent_std=self.latent_std,
            settings=self.settings,
            values=self.values,
        )
        trained.device = self.device
        return trained

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._check_fit()
        super().setup(stage)
        if stage != "fit":
            self.run_at("plain")
        for perceptual in self._perceptual:
            perceptual.to(self.trainer.strategy.root_device)

    def _check_fit(self) -> None:
        if self.trainer.precision not in ("bf16-mixed", "32-true"):
            raise ValueError(
                f"precision must be bf16-mixed or 32-true, got {self.trainer.precision}: gradients are compared, which "
                "scaling would spoil, and the weights' average moves in small steps"
            )
        start = self.adversarial.start if self.adversarial else 0
        if 0 < self.trainer.max_steps <= start:
            rank_zero_warn(
                f"the discriminator never starts: adversarial.start is {start} of {self.trainer.max_steps} steps"
            )

    def configure_model(self) -> None:
        """Refuse to be shared out over processes.

        Raises:
            ValueError: Under ModelParallelStrategy.
        """
        if self._will_be_sharded:
            raise ValueError("an autoencoder cannot be trained with ModelParallelStrategy; use the strategy ddp")

    def run_at(self, speed: Speed) -> None:
        """Lay all networks out so that they are fast."""
        self.chosen_speed = speed
        # On CPUs group norms go backward in channels_last at half the speed.
        if self.trainer.strategy.root_device.type != "cpu":
            for network in (self.autoencoder, self.ema_autoencoder, self.discriminator):
                if network is not None:
                    network.to(memory_format=torch.channels_last)

    def new_optimizers(self) -> list[Optimizer]:
        generator = self.optimizer_factory([*self.autoencoder.parameters(), self.log_variance])
        if self.adversarial is None:
            return [generator]
        return [generator, self.adversarial.optimizer(self.adversarial.discriminator.parameters())]

    def starts(self) -> list[int]:
        return [0, self.adversarial.start] if self.adversarial else [0]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Step the autoencoder and, from its start on, the discriminator, on the same reconstructions."""
        images, step = batch["images"], self.trainer.global_step
        optimizers, schedulers = _as_list(self.optimizers()), _as_list(self.lr_schedulers())
        adversary = self.adversarial if self.adversarial and step >= self.adversarial.start else None
        generator = keyed_generator(self.seed, step, self.global_rank, device=images.device)
        networks = [self.autoencoder, self.ema_autoencoder]
        reconstructions, regularisation, logged = self.latent_term.reconstruct(
            networks, images, generator, self.trainer
        )
        self.log_dict(logged)

        fidelity = self._fidelity(images, reconstructions)
        loss = fidelity + regularisation
        if adversary is not None:
            adversarial = -adversary.discriminator(reconstructions).float().mean()
            weight = adversary.adaptive_weight(fidelity, adversarial, self.autoencoder.decoder.conv_out.weight)
            loss = loss + weight * adversarial
            self.log_dict({"train/adversarial": adversarial.detach(), "train/adversarial_weight": weight})
        self.log_dict({"train/loss": loss.detach(), "train/fidelity": fidelity.detach()}, prog_bar=True)
        optimizers[0].zero_grad()
        self.manual_backward(loss)
        optimizers[0].step()
        self.move_averages()
        schedulers[0].step()
        if adversary is not None:
            self._discriminator_step(adversary, optimizers[1], images, reconstructions.detach())
            schedulers[1].step()

    def on_validation_epoch_start(self) -> None:
        self.latent_term.start_validation()
        self._quality_sums = torch.zeros(3, device=self.device)  # images, their PSNR and SSIM
        self._latent_sums = torch.zeros(4, num_latent_channels(self.autoencoder), device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add up the quality of the averaged autoencoder's reconstructions, and the moments of its latents."""
        images, autoencoder = batch["images"], self.ema_autoencoder
        latents, std = latent_moments(autoencoder, images)
        reconstructions = self.latent_term.validate(autoencoder, latents.float())
        qualities = (torch.ones_like(images[:, 0, 0, 0]), psnr(images, reconstructions), ssim(images, reconstructions))
        self._quality_sums += torch.stack([quality.sum() for quality in qualities])
        self._latent_sums += moment_sums(latents.float(), std.float())

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:  # of a few batches
            return
        sums = [self.trainer.strategy.reduce(part, reduce_op="sum") for part in (self._quality_sums, self._latent_sums)]
        num_images, psnr_sum, ssim_sum = sums[0].tolist()
        num_latents, totals, squares, variances = sums[1].cpu().double()
        means, noise = totals / num_latents, variances / num_latents
        signal = (squares / num_latents - means.square()).clamp(min=0)
        within = signal.mean().item() + noise.mean().item()
        self.latent_std = max(math.sqrt(within + means.var(correction=0).item()), LEAST_STD)
        scores = {"latent_mean": means.mean().item(), "latent_std": self.latent_std}
        if self.image_shape is not None and min(self.image_shape[1:]) >= SSIM_SIDE:
            scores["ssim"] = ssim_sum / num_images
        own, warning = self.latent_term.scores(signal, noise, self.trainer)
        scores |= own
        warn_of(self, warning)
        self.log_dict({f"{self.scores_prefix}/{name}": score for name, score in scores.items()}, sync_dist=True)
        self.log(f"{self.scores_prefix}/psnr", psnr_sum / num_images, prog_bar=True, sync_dist=True)

    def record(self) -> dict[str, Any]:
        return self.trained.record()

    def identity(self) -> dict[str, Any]:
        return {} if self.image_shape is None else self.identity_in(self.record())

    @staticmethod
    def identity_in(record: dict[str, Any]) -> dict[str, Any]:
        return record["config"]

    @classmethod
    def rebuilt(
        cls, path: str | os.PathLike[str], checkpoint: dict[str, Any], allow: Sequence[str], **arguments: Any
    ) -> Self:
        trained = read_autoencoder(path)
        parts = {"autoencoder": trained.autoencoder, "adversarial": adversarial_in(checkpoint, trained.settings)}
        module = cls(**{**parts, **arguments})
        module.image_shape = trained.image_shape
        module.keep_values(trained.values)
        return module

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.reconstruct(torch.stack(images_of(batch)))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructions of images by the averaged autoencoder, (B, C, H, W) float32 in [-1, 1].

        Args:
            images: The images, (B, C, H, W) in [-1, 1].
        """
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return reconstruct(self.ema_autoencoder, images.to(self.device)).float().clamp(-1, 1)

    def _fidelity(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """The errors of an image divided by their learned scale, plus its logarithm, ().

        For l1 this is the negative logarithm of the likelihood under Laplace's law.
        """
        difference = images - reconstructions.float()
        errors = difference.abs() if self.reconstruction == "l1" else difference.square()
        for perceptual in self._perceptual:
            errors = errors + self.perceptual_weight * perceptual(images, reconstructions.float())
        return (errors / self.log_variance.exp() + self.log_variance).sum() / len(images)

    def _discriminator_step(
        self, adversary: AdversarialLoss, optimizer: Any, images: Tensor, reconstructions: Tensor
    ) -> None:
        # The optimiser itself, not Lightning's wrapper, which would count this as a step of the run.
        optimizer.zero_grad()  # of what the autoencoder's loss left there
        discriminator = adversary.discriminator
        loss = hinge_loss(discriminator(images).float(), discriminator(reconstructions).float())
        self.manual_backward(loss)
        for callback in callbacks_of(self.trainer):
            if isinstance(callback, SkipBadSteps):
                callback.on_before_optimizer_step(self.trainer, self, optimizer.optimizer)
        optimizer.optimizer.step()
        self.log("train/discriminator", loss.detach(), prog_bar=True)
        average, every = adversary.count(loss), log_interval(self.trainer)
        if every and self.trainer.global_step % every == 0:  # reading the loss waits for the device
            warn_of(self, problem_of(average.item()), after=adversary.start + MIN_STEPS_TO_JUDGE)

    def bind_data(self, datamodule: Any) -> None:
        refuse_unused(datamodule, set())
        channels, height, width = self.image_shape = tuple(datamodule.image_shape)
        self.bind_values(datamodule, channels)
        in_channels, multiple = self.autoencoder.config["in_channels"], downsampling(self.autoencoder)
        if channels != in_channels:
            raise ValueError(
                f"the images have {channels} channels and the autoencoder takes {in_channels}; "
                "set model.autoencoder.in_channels or data.channels"
            )
        if height % multiple or width % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, got {height} x {width}")
        if self._perceptual and channels != 3:
            raise ValueError(f"LPIPS is of RGB images, got {channels} channels; set perceptual_weight to 0")
        if self.adversarial is not None:
            self.adversarial.check_images(channels, height, width)


def _as_list(value: Any) -> list[Any]:
    """Lightning's optimisers or schedulers as a list; Lightning gives a single one without."""
    return value if isinstance(value, list) else [value]
