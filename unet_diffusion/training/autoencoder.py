"""Trains an autoencoder: reconstruction, a KL term or a codebook, and a discriminator that makes it look sharp.

The first stage of Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, appendix G), after Esser et al. 2021
(https://arxiv.org/abs/2012.09841). Unlike in their code the learned variance is in the optimiser, the discriminator's
start counts the autoencoder's steps, and so does the trainer.
"""

import copy
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.functional.image import structural_similarity_index_measure

from unet_diffusion.data.base import refuse_unused
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.record import autoencoder_record, check_callbacks
from unet_diffusion.latents.space import moment_sums
from unet_diffusion.models.autoencoders import (
    decode_codes,
    downsampling,
    latent_moments,
    num_latent_channels,
    quantize,
    reconstruct,
)
from unet_diffusion.models.discriminator import PatchDiscriminator, hinge_loss
from unet_diffusion.models.speed import keep_freed_memory
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.runtime.safe_loading import load_plain
from unet_diffusion.training.base import LRDecay, check_choice, lr_factor, put_hyperparameters
from unet_diffusion.training.health import SkipBadSteps
from unet_diffusion.training.precision import (
    possible_precisions,
    precision_before,
    set_precision,
    settle_precision,
    warn_of_emulation,
)

Reconstruction = Literal["l1", "l2"]
PerceptualNet = Literal["vgg", "alex", "squeeze"]

PERCEPTUAL_FILES = {  # torchvision's, on which the linear heads that torchmetrics brings were trained
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
MAX_ADAPTIVE_WEIGHT = 1e4  # Esser et al.'s code, as the next one
GRADIENT_FLOOR = 1e-4
RANGE = 2.0  # of images in [-1, 1]
SSIM_SIDE = 11  # pixels of its window (Wang et al. 2004)
TELLS_ALL_APART, CANNOT_TELL = 0.02, 0.99  # of the hinge loss, which is 1 for a discriminator that says nothing
CRITIC_MEMORY = 0.98  # share of the average of that loss kept at each step: it is of about 50 steps
RESTART_KEY = 4  # keeps the draws of codes apart from others with the same seed
MIN_SIGNAL = 0.1  # share of the latents' variance that comes from the images
MIN_CODE_USE = 0.1  # share of the codebook
LEAST_STD = 1e-6  # of latents
MIN_STEPS_TO_JUDGE = 500  # before, networks have learnt too little to be warned about


def adam_of_gans(params: Iterable[Tensor]) -> Optimizer:
    """Adam at 1e-4, with the betas (0.5, 0.9) of Esser et al. 2021."""
    return Adam(params, lr=1.0e-4, betas=(0.5, 0.9), fused=True)


class AutoencoderModule(LightningModule):
    """An autoencoder in training, the moving average of its weights, and its discriminator.

    Batches are those of `ImageDataModule`. Steps are steps of the autoencoder: the discriminator's do not count.

    Args:
        autoencoder: diffusers' AutoencoderKL or VQModel, such as `kl_autoencoder` or `vq_autoencoder` makes, or
            `pretrained_autoencoder` loads.
        reconstruction: "l1" or "l2", the error of a pixel.
        kl_weight: of the KL divergence from the standard normal, summed over an image's latents as the error is over
            its pixels; for an AutoencoderKL.
        codebook_weight: of the distance between latents and codes, see `quantize`; for a VQModel.
        restart_codes_after: steps without use after which a code becomes one of the latents of that step (Dhariwal et
            al. 2020, https://arxiv.org/abs/2005.00341, section 3.1); 0 is off. For a VQModel.
        perceptual_weight: of LPIPS (Zhang et al. 2018), added to the error of each pixel; 0 is off.
        perceptual_net: network of LPIPS, whose weights must be in torch's cache.
        discriminator: tells images from reconstructions; None: no adversarial loss.
        discriminator_start: step at which it begins to be trained and to count.
        discriminator_weight: of the adversarial loss, beside the ratio of gradients at the decoder's last layer.
        learn_variance: learn the scale of a pixel's error, by which errors are divided; 1 otherwise.
        optimizer: makes the autoencoder's optimiser from its parameters.
        discriminator_optimizer: makes the discriminator's.
        lr_warmup_steps: steps over which both learning rates rise linearly to their full value; 0 is off.
        lr_decay: "constant", or "cosine" to 0 at the trainer's last step.
        ema_decay: share of the average kept at each step; less at first: (1 + n) / (10 + n) after n steps; 0 is off.
        seed: of the latents that are drawn.

    Raises:
        ValueError: if the settings contradict each other, or (in `setup`) the data.
        FileNotFoundError: if LPIPS's weights are not there.
    """

    image_shape: tuple[int, int, int] | None = None  # (C, H, W); known with the data

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
        discriminator: PatchDiscriminator | None = None,
        discriminator_start: int = 0,
        discriminator_weight: float = 0.5,
        learn_variance: bool = False,
        optimizer: OptimizerCallable = adam_of_gans,
        discriminator_optimizer: OptimizerCallable = adam_of_gans,
        lr_warmup_steps: int = 0,
        lr_decay: LRDecay = "constant",
        ema_decay: float = 0.999,
        seed: int = 0,
    ):
        super().__init__()
        if not isinstance(autoencoder, AutoencoderKL | VQModel):
            raise ValueError(f"autoencoder must be an AutoencoderKL or a VQModel, got {type(autoencoder).__name__}")
        check_choice("reconstruction", reconstruction, get_args(Reconstruction))
        check_choice("perceptual_net", perceptual_net, get_args(PerceptualNet))
        check_choice("lr_decay", lr_decay, get_args(LRDecay))
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        weights = {"kl": kl_weight, "codebook": codebook_weight, "perceptual": perceptual_weight,
                   "discriminator": discriminator_weight}  # fmt: skip
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name}_weight must be 0 or more, got {weight}")
        counts = {"discriminator_start": discriminator_start, "lr_warmup_steps": lr_warmup_steps,
                  "restart_codes_after": restart_codes_after}  # fmt: skip
        for name, steps in counts.items():
            if steps < 0:
                raise ValueError(f"{name} must be 0 or more, got {steps}")
        # Two optimisers take turns in a step, which Lightning leaves to the module.
        self.automatic_optimization = False
        self.autoencoder = autoencoder.train()
        self.ema_autoencoder = copy.deepcopy(autoencoder).requires_grad_(False).eval()
        self.discriminator = discriminator
        self.log_variance = nn.Parameter(torch.zeros(()), requires_grad=learn_variance)
        # In a list: frozen weights that come from a file of their own are not in checkpoints.
        self._perceptual = [_lpips(perceptual_net)] if perceptual_weight else []
        self.loss_weights = weights
        self.restart_codes_after = restart_codes_after
        if isinstance(autoencoder, VQModel):
            self.idle_steps: Tensor  # since each code was last used
            self.register_buffer("idle_steps", torch.zeros(autoencoder.quantize.n_e, dtype=torch.int64))
        self.reconstruction = reconstruction
        self.discriminator_start = discriminator_start
        self.optimizer_factory = optimizer
        self.discriminator_optimizer_factory = discriminator_optimizer
        self.lr_warmup_steps = lr_warmup_steps
        self.lr_decay = lr_decay
        self.ema_decay = ema_decay
        self.seed = seed

        self._critic_loss: Tensor | None = None  # average over the last steps, on the device
        self.latent_std: float | None = None  # as last validated
        self.is_continued = False  # set by who calls fit with a checkpoint
        self.settings: dict[str, Any] = {}  # of the whole run, plain

    @property
    def trained(self) -> Autoencoder:
        """The averaged autoencoder with all that is needed to use it.

        Raises:
            ValueError: before the module has met its data.
        """
        if self.image_shape is None:
            raise ValueError("the image shape is not known before training; fit the module first")
        return Autoencoder(
            autoencoder=self.ema_autoencoder,
            image_shape=self.image_shape,
            latent_std=self.latent_std,
            settings=self.settings,
        )

    def setup(self, stage: str) -> None:
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()
        if stage == "fit":
            self._check_fit()
            warn_of_emulation(self.trainer)
        # Nothing is timed: a step of two networks, each with its optimiser, is more than a trial can hold.
        precision = possible_precisions(self.trainer, can_scale_losses=False)[-1]
        if stage != "fit":
            set_precision(self.trainer, precision)
        elif not self.is_continued:  # else the checkpoint tells
            settle_precision(self.trainer, precision)
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            refuse_unused(datamodule, set())
            self._meet_data(tuple(datamodule.image_shape))
        if self.trainer.strategy.root_device.type != "cpu":  # there group norms go backward in it at half the speed
            for network in (self.autoencoder, self.ema_autoencoder, self.discriminator):
                if network is not None:
                    network.to(memory_format=torch.channels_last)
        for perceptual in self._perceptual:
            perceptual.to(self.trainer.strategy.root_device)

    def _check_fit(self) -> None:
        if self.trainer.precision not in ("bf16-mixed", "32-true"):
            raise ValueError(
                f"precision must be bf16-mixed or 32-true, got {self.trainer.precision}: gradients are compared, which "
                "scaling would spoil, and the weights' average moves in small steps"
            )
        if self.lr_decay == "cosine" and self.trainer.max_steps == -1:
            raise ValueError("lr_decay cosine needs an end: set trainer.max_steps")
        if self.discriminator is not None and 0 < self.trainer.max_steps <= self.discriminator_start:
            rank_zero_warn(
                f"the discriminator never starts: discriminator_start is {self.discriminator_start} of "
                f"{self.trainer.max_steps} steps"
            )

    def train(self, mode: bool = True) -> "AutoencoderModule":
        """Switches what is trained; the averaged autoencoder is never in training mode."""
        super().train(mode)
        self.ema_autoencoder.eval()
        return self

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        optimizers = self._new_optimizers()

        def factor(start: int, step: int) -> float:
            num_steps = self.trainer.max_steps - start if self.lr_decay == "cosine" else math.inf
            return lr_factor(step, self.lr_warmup_steps, num_steps)

        starts = (0, self.discriminator_start)[: len(optimizers)]
        return optimizers, [
            LambdaLR(one, partial(factor, start)) for one, start in zip(optimizers, starts, strict=True)
        ]

    def _new_optimizers(self) -> list[Optimizer]:
        """That of the autoencoder, and that of the discriminator, if there is one."""
        generator = self.optimizer_factory([*self.autoencoder.parameters(), self.log_variance])
        if self.discriminator is None:
            return [generator]
        return [generator, self.discriminator_optimizer_factory(self.discriminator.parameters())]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """A step of the autoencoder and, once it has started, one of the discriminator on the same reconstructions."""
        images, step = batch["images"], self.trainer.global_step
        optimizers, schedulers = _as_list(self.optimizers()), _as_list(self.lr_schedulers())
        critic = self.discriminator if step >= self.discriminator_start else None
        generator = keyed_generator(self.seed, step, self.global_rank, device=images.device)
        reconstructions, regularisation = self._reconstruct(images, generator)

        fidelity = self._fidelity(images, reconstructions)
        loss = fidelity + regularisation
        if critic is not None:
            adversarial = -critic(reconstructions).float().mean()
            weight = self._adaptive_weight(fidelity, adversarial)
            loss = loss + weight * adversarial
            self.log_dict({"train/adversarial": adversarial.detach(), "train/adversarial_weight": weight})
        self.log_dict({"train/loss": loss.detach(), "train/fidelity": fidelity.detach()}, prog_bar=True)
        optimizers[0].zero_grad()
        self.manual_backward(loss)
        optimizers[0].step()
        self._move_average()
        schedulers[0].step()
        if critic is not None:
            self._critic_step(critic, optimizers[1], images, reconstructions.detach())
            schedulers[1].step()

    def on_validation_epoch_start(self) -> None:
        codes = self.autoencoder.config["num_vq_embeddings"] if isinstance(self.autoencoder, VQModel) else 0
        self._code_counts = torch.zeros(codes, dtype=torch.int64, device=self.device)
        self._quality_sums = torch.zeros(3, device=self.device)  # images, their PSNR and SSIM
        self._latent_sums = torch.zeros(4, num_latent_channels(self.autoencoder), device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds up how near the averaged autoencoder's reconstructions are, and what its latents are like."""
        images, autoencoder = batch["images"], self.ema_autoencoder
        latents, std = latent_moments(autoencoder, images)
        if isinstance(autoencoder, VQModel):
            codes, _, numbers = quantize(autoencoder, latents.float())
            self._code_counts += torch.bincount(numbers, minlength=len(self._code_counts))
            reconstructions = decode_codes(autoencoder, codes)
        else:
            reconstructions = autoencoder.decode(latents.float()).sample
        qualities = (torch.ones_like(images[:, 0, 0, 0]), psnr(images, reconstructions), ssim(images, reconstructions))
        self._quality_sums += torch.stack([quality.sum() for quality in qualities])
        self._latent_sums += moment_sums(latents.float(), std.float())

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:  # of a few batches
            return
        sums = [self.trainer.strategy.reduce(one, reduce_op="sum") for one in (self._quality_sums, self._latent_sums)]
        num_images, psnr_sum, ssim_sum = sums[0].tolist()
        num_latents, totals, squares, variances = sums[1].cpu().double()
        means, noise = totals / num_latents, (variances / num_latents).mean().item()
        signal = (squares / num_latents - means.square()).clamp(min=0).mean().item()
        self.latent_std = max(math.sqrt(signal + noise + means.var(correction=0).item()), LEAST_STD)
        scores = {"val/latent_mean": means.mean().item(), "val/latent_std": self.latent_std}
        if self.image_shape is not None and min(self.image_shape[1:]) >= SSIM_SIDE:
            scores["val/ssim"] = ssim_sum / num_images
        has_codes = isinstance(self.autoencoder, VQModel)
        scores |= self._use_of_codes() if has_codes else self._share_of_signal(signal, noise)
        self.log_dict(scores, sync_dist=True)
        self.log("val/psnr", psnr_sum / num_images, prog_bar=True, sync_dist=True)

    def _use_of_codes(self) -> dict[str, float]:
        counts = self.trainer.strategy.reduce(self._code_counts, reduce_op="sum").float()
        shares = counts[counts > 0] / counts.sum()
        used = len(shares) / len(counts)
        self._warn_if(used < MIN_CODE_USE, f"only {used:.0%} of the codes are used; fewer of them (num_codes), or "
                      "shorter ones (latent_channels), are used better")  # fmt: skip
        return {"val/codes_used": used, "val/code_perplexity": math.exp(-(shares * shares.log()).sum().item())}

    def _share_of_signal(self, signal: float, noise: float) -> dict[str, float]:
        share = signal / max(signal + noise, LEAST_STD**2)
        self._warn_if(share < MIN_SIGNAL, f"{1 - share:.1%} of the latents' variance is noise, not image (posterior "
                      f"collapse); lower kl_weight from {self.loss_weights['kl']:g}")  # fmt: skip
        return {"val/latent_signal": share}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["precision"] = self.trainer.precision
        if self.image_shape is not None:
            checkpoint["autoencoder"] = autoencoder_record(self.trained)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another autoencoder before its weights are loaded.

        Raises:
            ValueError: naming each setting that differs.
        """
        check_callbacks(checkpoint)
        saved = checkpoint.get("autoencoder")
        if saved is None:
            raise ValueError("a checkpoint to train on must have an entry 'autoencoder', and this one was written by "
                             "another program or for another task")  # fmt: skip
        here = autoencoder_record(self.trained)["config"] if self.image_shape is not None else {}
        differ = [f"{name}: {saved['config'].get(name)} in the checkpoint, {value} here"
                  for name, value in here.items() if saved["config"].get(name) != value]  # fmt: skip
        if differ:
            raise ValueError(f"the checkpoint holds another model ({'; '.join(differ)}); set model as it was")
        if self._trainer is not None:
            before = precision_before(self.trainer, checkpoint, can_scale_losses=False)[-1]
            (settle_precision if self.trainer.training else set_precision)(self.trainer, before)
            if self.trainer.training:
                put_hyperparameters(checkpoint, self._new_optimizers())

    def reconstruct(self, images: Tensor) -> Tensor:
        """What the averaged autoencoder makes of images, (B, C, H, W) float32 in [-1, 1].

        Args:
            images: (B, C, H, W) in [-1, 1].
        """
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            return reconstruct(self.ema_autoencoder, images.to(self.device)).float().clamp(-1, 1)

    def _reconstruct(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Reconstructions, (B, C, H, W), and the weighted term that regularises the latents, ()."""
        if isinstance(self.autoencoder, VQModel):
            latents = self.autoencoder.encode(images).latents
            if self.restart_codes_after:
                self._restart_idle_codes(latents.detach().float())
            codes, codebook_loss, numbers = quantize(self.autoencoder, latents)
            if self.restart_codes_after:
                self.idle_steps += 1
                self.idle_steps.index_fill_(0, self.trainer.strategy.all_gather(numbers).flatten(), 0)
            self.log("train/codebook", codebook_loss.detach())
            # The error is a sum over an image: so is this, as if each of its pixels had it.
            weight = self.loss_weights["codebook"] * images[0].numel()
            return decode_codes(self.autoencoder, codes), weight * codebook_loss.float()
        posterior = self.autoencoder.encode(images).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=torch.float32)
        kl = kl_divergence(mean, std).sum() / len(images)
        self.log("train/kl", kl.detach())
        return self.autoencoder.decode(mean + std * noise).sample, self.loss_weights["kl"] * kl

    def _restart_idle_codes(self, latents: Tensor) -> None:
        """Puts latents, drawn from those of all processes, in place of codes that were not used for long."""
        vectors = self.trainer.strategy.all_gather(latents.movedim(1, -1).contiguous()).flatten(0, -2)
        # Without the rank in its key: processes keep the same codebook.
        generator = keyed_generator(self.seed, RESTART_KEY, self.trainer.global_step, device=latents.device)
        drawn = torch.randint(len(vectors), (len(self.idle_steps),), generator=generator, device=latents.device)
        fresh = vectors[drawn]
        # A batch that is not finite is skipped, and may leave nothing here either.
        is_idle = (self.idle_steps >= self.restart_codes_after) & fresh.isfinite().all(dim=1)
        with torch.no_grad():
            for autoencoder in (self.autoencoder, self.ema_autoencoder):
                codebook = autoencoder.quantize.embedding.weight
                codebook.copy_(torch.where(is_idle[:, None], fresh, codebook))
        self.idle_steps.masked_fill_(is_idle, 0)

    def _fidelity(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Errors of an image by their learned scale, plus its logarithm, (): for l1 the likelihood of Laplace's law."""
        difference = images - reconstructions.float()
        errors = difference.abs() if self.reconstruction == "l1" else difference.square()
        for perceptual in self._perceptual:
            errors = errors + self.loss_weights["perceptual"] * perceptual(images, reconstructions.float())
        return (errors / self.log_variance.exp() + self.log_variance).sum() / len(images)

    def _adaptive_weight(self, fidelity: Tensor, adversarial: Tensor) -> Tensor:
        """Makes the adversarial gradient at the decoder's last layer as large as the other (Esser et al., eq. 7)."""
        last = self.autoencoder.decoder.conv_out.weight
        losses = (fidelity, adversarial)
        wanted, got = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in losses)
        ratio = (wanted / (got + GRADIENT_FLOOR)).clamp(0, MAX_ADAPTIVE_WEIGHT).detach()
        return self.loss_weights["discriminator"] * ratio

    def _critic_step(self, critic: nn.Module, optimizer: Any, images: Tensor, reconstructions: Tensor) -> None:
        # The optimiser itself, not Lightning's wrapper, which would count this as a step of the run.
        optimizer.zero_grad()  # of what the autoencoder's loss left there
        loss = hinge_loss(critic(images).float(), critic(reconstructions).float())
        self.manual_backward(loss)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it at runtime
            if isinstance(callback, SkipBadSteps):
                callback.on_before_optimizer_step(self.trainer, self, optimizer.optimizer)
        optimizer.optimizer.step()
        self.log("train/discriminator", loss.detach(), prog_bar=True)
        before = self._critic_loss
        self._critic_loss = loss.detach() if before is None else before.lerp(loss.detach(), 1 - CRITIC_MEMORY)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it at runtime
        if every and self.trainer.global_step % every == 0:  # reading the loss waits for the device
            self._judge_critic(self._critic_loss.item())

    def _judge_critic(self, loss: float) -> None:
        """Warns of a discriminator that teaches nothing, as it has won or lost."""
        start = self.discriminator_start
        self._warn_if(loss < TELLS_ALL_APART, "the discriminator tells all reconstructions from images, and teaches "
                      "nothing; lower its learning rate or raise discriminator_start", since=start)  # fmt: skip
        self._warn_if(loss > CANNOT_TELL, "the discriminator cannot tell reconstructions from images (its loss is "
                      "about 1, as if it said nothing), and teaches nothing; raise its learning rate or its channels, "
                      "or lower discriminator_weight", since=start)  # fmt: skip

    def _move_average(self) -> None:
        n = self.trainer.global_step
        decay = min(self.ema_decay, (1 + n) / (10 + n))
        averaged, raw = list(self.ema_autoencoder.parameters()), list(self.autoencoder.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averaged, raw, 1 - decay)

    def _warn_if(self, condition: bool, message: str, *, since: int = 0) -> None:
        """Warns, unless what it is about was trained for too few steps to be judged."""
        if condition and self.trainer.global_step >= since + MIN_STEPS_TO_JUDGE:
            rank_zero_warn(message)

    def _meet_data(self, image_shape: tuple[int, int, int]) -> None:
        channels, height, width = self.image_shape = image_shape
        in_channels, multiple = self.autoencoder.config["in_channels"], downsampling(self.autoencoder)
        if channels != in_channels:
            raise ValueError(
                f"the images have {channels} channels and the autoencoder takes {in_channels}; "
                "set model.autoencoder.init_args.in_channels or data.init_args.channels"
            )
        if height % multiple or width % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, got {height} x {width}")
        if self.discriminator is not None and self.discriminator.in_channels != channels:
            raise ValueError(
                f"the images have {channels} channels and the discriminator takes {self.discriminator.in_channels}; "
                "set model.discriminator.init_args.in_channels"
            )
        if self._perceptual and channels != 3:
            raise ValueError(f"LPIPS is of RGB images, got {channels} channels; set perceptual_weight to 0")
        if self.discriminator is not None and min(height, width) < self.discriminator.smallest_size:
            raise ValueError(
                f"the discriminator needs images of {self.discriminator.smallest_size} pixels, got {height} x {width}; "
                "give it fewer layers (num_layers)"
            )


def _as_list(value: Any) -> list[Any]:
    """Lightning's optimisers or schedulers, which are no list where there is one."""
    return value if isinstance(value, list) else [value]


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) of each latent (Kingma & Welling 2014, appendix B), of the shape of the mean."""
    return 0.5 * (mean.square() + std.square() - 1) - std.log()


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """10 log10(4 / mean squared error) of each image in [-1, 1], (B,) float32, in decibels; 100 at most."""
    errors = (images.float() - reconstructions.float().clamp(-1, 1)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(RANGE**2 / errors.clamp(min=RANGE**2 * 1e-10))


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), (B,) float32; 0 for images too small for its window."""
    if min(images.shape[-2:]) < SSIM_SIDE:
        return torch.zeros(len(images), device=images.device)
    pair = reconstructions.float().clamp(-1, 1), images.float()
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would lose the small differences of moments
        return cast(Tensor, structural_similarity_index_measure(*pair, data_range=RANGE, reduction="none"))


def _lpips(net: PerceptualNet) -> nn.Module:
    path = Path(torch.hub.get_dir()) / "checkpoints" / PERCEPTUAL_FILES[net]
    if not path.is_file():
        raise FileNotFoundError(
            f"perceptual_weight needs {path}, the weights of torchvision's network, and nothing is downloaded here; "
            f"put the file there, or set perceptual_weight to 0"
        )
    load_plain(path)  # refuses code in it, which torchvision would run
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type=net).net.requires_grad_(False).eval()
