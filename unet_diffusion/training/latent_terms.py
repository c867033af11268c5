"""What keeps an autoencoder's latents fit for diffusion: a KL term or a codebook, the two of Rombach et al. 2022.

Each makes the reconstructions of a training step with its own term of the loss, and those of validation with its own
scores. `latent_term` chooses; whoever trains never asks which of the two it is.
"""

import math

import torch
from diffusers import AutoencoderKL, VQModel
from lightning.pytorch import Trainer
from torch import Tensor, nn

from unet_diffusion.latents.collapse import collapsed_channels, unused_codes
from unet_diffusion.latents.space import LEAST_STD
from unet_diffusion.models.autoencoders import AutoencoderNetwork, decode_codes, num_codes, quantize
from unet_diffusion.runtime.randomness import keyed_generator

RESTART_KEY = 4  # keeps the draws of codes apart from others with the same seed


class KLTerm(nn.Module):
    """The KL divergence of the latents' distribution from the standard normal.

    Args:
        weight: The weight of the divergence, summed over an image's latents as the error is over its pixels.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def reconstruct(
        self, networks: list[AutoencoderKL], images: Tensor, generator: torch.Generator, trainer: Trainer
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstructions (B, C, H, W) of latents that are drawn, the weighted term (), and what is logged.

        Args:
            networks: The autoencoder in training, and its average.
            images: The images, (B, C, H, W) in [-1, 1].
            generator: Draws the latents.
            trainer: The trainer, which connects the processes.
        """
        posterior = networks[0].encode(images).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=torch.float32)
        kl = kl_divergence(mean, std).sum() / len(images)
        return networks[0].decode(mean + std * noise).sample, self.weight * kl, {"train/kl": kl.detach()}

    def start_validation(self) -> None:
        """Forget what was counted in the validation before."""

    def validate(self, autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
        """The reconstructions, (B, C, H, W), of the means of the latents, (B, c, h, w)."""
        return autoencoder.decode(latents).sample

    def scores(self, signal: Tensor, noise: Tensor, trainer: Trainer) -> tuple[dict[str, float], str | None]:
        """The scores of a validation by name, and a warning if they are bad.

        Args:
            signal: The variance of the latents' means over the images, of each channel, (c,) float64.
            noise: The mean variance of a latent about its mean, likewise.
            trainer: The trainer, which connects the processes.
        """
        overall = signal.mean().item()
        share = overall / max(overall + noise.mean().item(), LEAST_STD**2)
        return {"latent_signal": share}, " ".join(collapsed_channels(signal.numpy(), noise.numpy())) or None


class CodebookTerm(nn.Module):
    """The distance between latents and their codes, and new codes in place of those that are not used.

    Args:
        num_codes: The number of codes.
        weight: The weight of the distance, see `quantize`.
        restart_after: The number of steps without use after which a code becomes one of the latents of that step
            (Dhariwal et al. 2020, https://arxiv.org/abs/2005.00341, section 3.1); 0 is off.
        seed: Seed of the choice of these latents.
    """

    idle_steps: Tensor  # since each code was last used
    code_counts: Tensor  # in this validation

    def __init__(self, num_codes: int, weight: float, restart_after: int, seed: int) -> None:
        super().__init__()
        self.weight = weight
        self.restart_after = restart_after
        self.seed = seed
        self.register_buffer("idle_steps", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("code_counts", torch.zeros(num_codes, dtype=torch.int64), persistent=False)

    def reconstruct(
        self, networks: list[VQModel], images: Tensor, generator: torch.Generator, trainer: Trainer
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Reconstructions (B, C, H, W) of codes, the weighted term (), and what is logged.

        Args:
            networks: The autoencoder in training, and its average.
            images: The images, (B, C, H, W) in [-1, 1].
            generator: Draws nothing here: codes are not drawn.
            trainer: The trainer, which connects the processes and counts the steps.
        """
        latents = networks[0].encode(images).latents
        if self.restart_after:
            self.restart_idle_codes(networks, latents.detach().float(), trainer)
        codes, loss, numbers = quantize(networks[0], latents)
        if self.restart_after:
            self.idle_steps += 1
            self.idle_steps.index_fill_(0, trainer.strategy.all_gather(numbers).flatten(), 0)
        # The error is a sum over an image: so is this, as if each of its pixels had it.
        weight = self.weight * images[0].numel()
        return decode_codes(networks[0], codes), weight * loss.float(), {"train/codebook": loss.detach()}

    def restart_idle_codes(self, networks: list[VQModel], latents: Tensor, trainer: Trainer) -> None:
        """Put latents, drawn from those of all processes, in place of codes that were not used for long."""
        vectors = trainer.strategy.all_gather(latents.movedim(1, -1).contiguous()).flatten(0, -2)
        # Without the rank in its key: processes keep the same codebook.
        generator = keyed_generator(self.seed, RESTART_KEY, trainer.global_step, device=latents.device)
        drawn = torch.randint(len(vectors), (len(self.idle_steps),), generator=generator, device=latents.device)
        fresh = vectors[drawn]
        # A batch that is not finite is skipped, and may leave nothing here either.
        is_idle = (self.idle_steps >= self.restart_after) & fresh.isfinite().all(dim=1)
        with torch.no_grad():
            for autoencoder in networks:
                codebook = autoencoder.quantize.embedding.weight
                codebook.copy_(torch.where(is_idle[:, None], fresh, codebook))
        self.idle_steps.masked_fill_(is_idle, 0)

    def start_validation(self) -> None:
        """Forget which codes the validation before used."""
        self.code_counts.zero_()

    def validate(self, autoencoder: VQModel, latents: Tensor) -> Tensor:
        """The reconstructions, (B, C, H, W), of the codes nearest to the latents, (B, c, h, w)."""
        codes, _, numbers = quantize(autoencoder, latents)
        self.code_counts += torch.bincount(numbers, minlength=len(self.code_counts))
        return decode_codes(autoencoder, codes)

    def scores(self, signal: Tensor, noise: Tensor, trainer: Trainer) -> tuple[dict[str, float], str | None]:
        """The scores of a validation by name, and a warning if they are bad.

        Args:
            signal: The variance of the latents over the images, of each channel, (c,) float64.
            noise: Zeros: a codebook has no noise.
            trainer: The trainer, which connects the processes.
        """
        numbers = trainer.strategy.reduce(self.code_counts.clone(), reduce_op="sum")
        counts = numbers.float()
        shares = counts[counts > 0] / counts.sum()
        used = len(shares) / len(counts)
        scores = {"codes_used": used, "code_perplexity": math.exp(-(shares * shares.log()).sum().item())}
        return scores, unused_codes(numbers.cpu().numpy())


LatentTerm = KLTerm | CodebookTerm


def latent_term(
    autoencoder: AutoencoderNetwork, *, kl_weight: float, codebook_weight: float, restart_codes_after: int, seed: int
) -> LatentTerm:
    """The term of an autoencoder's loss that concerns its latents, see `AutoencoderModule` for the arguments."""
    codes = num_codes(autoencoder)
    if codes:
        return CodebookTerm(codes, codebook_weight, restart_codes_after, seed)
    return KLTerm(kl_weight)


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) of each latent (Kingma & Welling 2014, appendix B), of the shape of the mean."""
    return 0.5 * (mean.square() + std.square() - 1) - std.log()
