"""The space that latents lie in: of which autoencoder they are, and what normalises them."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("latents_mean", "latents_std")  # of each channel, in a configuration
LEAST_STD = 1e-6  # of a channel


@dataclass(frozen=True)
class LatentSpace:
    """Which autoencoder latents are of, and what brings them to mean 0 and standard deviation 1.

    Args:
        autoencoder: Path of its folder.
        fingerprint: Hash of its weights and configuration, see `fingerprint`.
        image_shape: (C, H, W) of the images, in pixels.
        downsampling: Pixels of an image along a side for one latent.
        mean: Mean of each channel.
        std: Standard deviation of each channel; the same for all with a codebook, whose distances it may not change.
    """

    autoencoder: str
    fingerprint: str
    image_shape: tuple[int, int, int]
    downsampling: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_plain(cls, record: dict[str, Any]) -> "LatentSpace":
        """The counterpart of `plain`."""
        fields: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in record.items()}
        return cls(**fields)

    def plain(self) -> dict[str, Any]:
        """Its fields as plain values, as a checkpoint or JSON holds them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def scaling_factor(self) -> float | None:
        """1 / std, as diffusers' models have it; None where means are taken off, or each channel has a scale."""
        has_one_scale = not any(self.mean) and len(set(self.std)) == 1
        return 1 / self.std[0] if has_one_scale else None

    def rescaled(self, scaling_factor: float) -> "LatentSpace":
        """The same latents with one scale for all channels in place of their moments."""
        count = len(self.std)
        return replace(self, mean=(0.0,) * count, std=(1 / scaling_factor,) * count)

    def normalise(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents, (B, C, h, w), as diffusion takes them: mean 0 and standard deviation 1."""
        mean, std = _moments_on(self, latents.device)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, std = _moments_on(self, latents.device)
        return latents * std + mean


def fingerprint(autoencoder: nn.Module, config: dict[str, Any]) -> str:
    """A hash of weights and configuration: the same for two autoencoders exactly if they encode and decode alike.

    Args:
        autoencoder: Its weights are float32.
        config: plain values; names that begin with an underscore, and the scale, which is no part of it, do not count.
    """
    # Moments count as None, which they are in nearly all configurations.
    kept = {key: None if key in MOMENTS else value for key, value in config.items()
            if key[0] != "_" and key != "scaling_factor"}  # fmt: skip
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, value in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def moment_sums(mean: Tensor, std: Tensor) -> Tensor:
    """Of each channel: how many latents, the sums of their means, of the squares of these, and of variances, (4, C).

    Args:
        mean: of the distribution of each latent, (B, C, h, w).
        std: its standard deviation, of the same shape.
    """
    moments = (torch.ones_like(mean), mean, mean.square(), std.square())
    return torch.stack([moment.sum(dim=(0, 2, 3)) for moment in moments])


@cache  # copying to a device each step would wait for it
def _moments_on(space: LatentSpace, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(one, device=device)[:, None, None] for one in (space.mean, space.std))
    return mean, std
