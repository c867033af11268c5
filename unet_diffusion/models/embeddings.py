"""Embeddings of the timestep and of other vectors, which residual blocks and double convolutions add.

Sinusoids come from Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762, section 3.5), the two layers after them from
Ho et al. 2020 (https://arxiv.org/abs/2006.11239). Submodules carry diffusers' names.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PERIOD = 10_000  # longest wavelength of the timestep embedding (Vaswani et al. 2017, section 3.5)


class VectorEmbedding(nn.Module):
    """Two linear layers: (B, channels) -> (B, emb_channels).

    Args:
        channels: Length of the vector.
        emb_channels: Length of the embedding.
    """

    def __init__(self, channels: int, emb_channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, emb_channels)
        self.linear_2 = nn.Linear(emb_channels, emb_channels)

    def forward(self, vector: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(vector.to(self.linear_1.weight.dtype))))


class TimestepEmbedding(VectorEmbedding):
    """Sinusoids of the timestep, then two linear layers: (B,) -> (B, emb_channels).

    Args:
        channels: Number of sinusoids, even.
        emb_channels: Length of the embedding.
        flip_sin_to_cos: Whether cosines come before sines.
        freq_shift: Number that is subtracted from the number of frequencies; see `sinusoids`.
    """

    def __init__(self, channels: int, emb_channels: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0):
        super().__init__(channels, emb_channels)
        self.channels = channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.freq_shift = freq_shift

    def forward(self, t: Tensor) -> Tensor:
        waves = sinusoids(t, self.channels, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)
        return super().forward(waves)


def sinusoids(t: Tensor, channels: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Compute sines and cosines of t at frequencies from 1 down to 1 / MAX_PERIOD: (B, channels) float32.

    Args:
        t: Timesteps, (B,).
        channels: Number of sinusoids, even.
        flip_sin_to_cos: Whether cosines come before sines.
        freq_shift: Number that is subtracted from the number of frequencies in the exponent's divisor; with 1 the
            lowest frequency is exactly 1 / MAX_PERIOD.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * steps / (half - freq_shift))
    angles = t[:, None].float() * frequencies
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=1)
