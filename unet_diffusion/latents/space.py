"""Latent spaces: the autoencoder that made the latents, and the moments that normalise them."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("latents_mean", "latents_std")  # fields of an autoencoder's configuration, a value for each channel
LEAST_STD = 1e-6  # lower bound for the standard deviation of a channel


@dataclass(frozen=True)
class LatentSpace:
    """The latents of an autoencoder, and the moments that bring them to mean 0 and standard deviation 1.

    Args:
        autoencoder: Path of the autoencoder's folder.
        fingerprint: Hash of the autoencoder's weights and configuration, see `fingerprint`.
        image_shape: (C, H, W) of the images, in pixels.
        downsampling: The height of an image divided by the height of its latents.
        mean: Mean of each channel.
        std: Standard deviation of each channel. With a codebook all are equal, to preserve distances between codes.
    """

    autoencoder: str
    fingerprint: str
    image_shape: tuple[int, int, int]
    downsampling: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_plain(cls, record: dict[str, Any]) -> "LatentSpace":
        """The latent space of plain values: the inverse of `plain`."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        return cls(**fields)

    def plain(self) -> dict[str, Any]:
        """The fields as plain values, for a checkpoint or JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def scaling_factor(self) -> float | None:
        """1 / std, the scale in diffusers' configurations; None if a mean is not 0 or the scales of channels differ."""
        has_one_scale = not any(self.mean) and len(set(self.std)) == 1
        return 1 / self.std[0] if has_one_scale else None

    def rescaled(self, scaling_factor: float) -> "LatentSpace":
        """The same latents, normalised by one scale for all channels instead of by moments."""
        count = len(self.std)
        return replace(self, mean=(0.0,) * count, std=(1 / scaling_factor,) * count)

    def normalise(self, latents: Tensor) -> Tensor:
        """The normalised latents (latents - mean) / std, (B, C, h, w), for the autoencoder's latents (B, C, h, w)."""
        mean, std = _moments_on(self, latents.device)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents, latents * std + mean: the inverse of `normalise`."""
        mean, std = _moments_on(self, latents.device)
        return latents * std + mean


def fingerprint(autoencoder: nn.Module, config: dict[str, Any]) -> str:
    """A hash of weights and configuration, equal for two autoencoders that encode and decode alike.

    Args:
        autoencoder: The autoencoder, float32.
        config: The configuration as plain values. Names with a leading underscore and the scale do not count.
    """
    # Moments count as None, their value in nearly all configurations.
    fields = {key: None if key in MOMENTS else value for key, value in config.items()
              if key[0] != "_" and key != "scaling_factor"}  # fmt: skip
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, value in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def moment_sums(mean: Tensor, std: Tensor) -> Tensor:
    """Sums over the latents of each channel, (4, C): of 1, of the means, of their squares, and of the variances.

    Args:
        mean: Mean of the distribution of each latent, (B, C, h, w).
        std: Standard deviation of the distribution of each latent, (B, C, h, w).
    """
    moments = (torch.ones_like(mean), mean, mean.square(), std.square())
    return torch.stack([moment.sum(dim=(0, 2, 3)) for moment in moments])


@cache  # copying them to a GPU in each step would wait for it
def _moments_on(space: LatentSpace, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(moment, device=device)[:, None, None] for moment in (space.mean, space.std))
    return mean, std
