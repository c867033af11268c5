"""What is counted in latents: sums that add up over images, from which moments and the use of codes follow."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from unet_diffusion.evaluation.intervals import Values


@dataclass
class LatentSums:
    """Sums over the positions of latents, in float64.

    Args:
        count: The number of positions.
        sums: Sum of each channel, (c,).
        products: Sums of the products of each two channels, (c, c).
        variances: Sum of the variances of the latents' distributions, (c,).
        codes: How often each code is used, (K,); K is 0 without a codebook.
    """

    count: int
    sums: Values
    products: Values
    variances: Values
    codes: Values

    @classmethod
    def of(cls, mean: Tensor, std: Tensor, numbers: Tensor | None, num_codes: int) -> "LatentSums":
        """The sums over some latents.

        Args:
            mean: Means of the latents' distributions, (B, c, h, w).
            std: Their standard deviations, likewise.
            numbers: The numbers of the codes nearest to the latents, (B * h * w,); None: there is no codebook.
            num_codes: The number of codes.
        """
        flat, variances = (part.double().movedim(1, 0).flatten(1).numpy() for part in (mean, std.square()))
        codes = np.bincount([] if numbers is None else numbers.cpu().numpy(), minlength=num_codes)
        return cls(flat.shape[1], flat.sum(axis=1), flat @ flat.T, variances.sum(axis=1), codes)

    def __add__(self, other: "LatentSums") -> "LatentSums":
        return LatentSums(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})

    @property
    def mean(self) -> Values:
        """The mean of each channel, (c,)."""
        return self.sums / self.count

    @property
    def covariance(self) -> Values:
        """The covariance of the channels, (c, c): what comes from the images, without the distributions' noise."""
        return self.products / self.count - np.outer(self.mean, self.mean)

    @property
    def signal(self) -> Values:
        """Of each channel the variance that comes from the images, (c,)."""
        return np.diag(self.covariance).clip(min=0)

    @property
    def noise(self) -> Values:
        """Of each channel the mean variance of a latent's distribution, (c,)."""
        return self.variances / self.count

    @property
    def correlation(self) -> Values:
        """The correlation of the channels, (c, c); 0 with a channel that is constant."""
        scale = np.sqrt(np.outer(self.signal, self.signal))
        return np.divide(self.covariance, scale, out=np.zeros_like(scale), where=scale > 0)
