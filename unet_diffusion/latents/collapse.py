"""What makes latents unfit for diffusion, in training and in the evaluation: channels of noise, and unused codes."""

import numpy as np
from numpy.typing import NDArray

MIN_SIGNAL = 0.1  # share of a channel's variance that comes from the images
MIN_CODE_USE = 0.1  # share of the codebook that is used
HARDLY_VARIES = 0.01  # of the largest deviation of a channel


def collapsed_channels(signal: NDArray[np.float64], noise: NDArray[np.float64]) -> list[str]:
    """Warnings of channels that say nothing of the image: they are noise (posterior collapse), or constant.

    Args:
        signal: The variance of each channel that comes from the images, (c,).
        noise: The mean variance of a latent of each channel about its mean, (c,); zeros with a codebook.
    """
    deviations = np.sqrt(signal + noise)
    is_constant = deviations <= HARDLY_VARIES * deviations.max()
    is_noise = (signal < MIN_SIGNAL * (signal + noise)) & ~is_constant
    warnings = []
    if is_noise.any():
        warnings.append(
            f"{_channels(is_noise)}: over {1 - MIN_SIGNAL:.0%} of the variance is noise, not image (posterior "
            "collapse). Lower kl_weight, or make fewer latent_channels."
        )
    if is_constant.any():
        warnings.append(f"{_channels(is_constant)}: hardly varies. Fewer latent_channels would do.")
    return warnings


def unused_codes(counts: NDArray[np.int64]) -> str | None:
    """A warning of a codebook that is hardly used.

    Args:
        counts: How often each code is used, (K,).
    """
    used = int((counts > 0).sum())
    if used >= MIN_CODE_USE * len(counts):
        return None
    return (
        f"Only {used} of {len(counts)} codes are used. Restart unused ones (model.restart_codes_after), or make fewer "
        "(num_codes) or shorter ones (latent_channels)."
    )


def _channels(which: NDArray[np.bool_]) -> str:
    numbers = np.flatnonzero(which).tolist()
    return f"Channel{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} of the latents"
