"""The training loss: the squared or absolute error of the prediction, weighted by noise level.

Min-SNR weighting (Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4) weights the error of x0 by
min(SNR, gamma). The error of epsilon is SNR times that of x0, and the error of v is SNR + 1 times that of x0.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_diffusion.diffusion.schedule import NoiseSchedule

Loss = Literal["l2", "l1"]
LossWeighting = Literal["uniform", "min_snr"]

NUM_QUARTERS = 4  # training logs the loss of each quarter of the range of t


def loss_weights(schedule: NoiseSchedule, t: Tensor, weighting: LossWeighting, gamma: float = 5.0) -> Tensor:
    """The weight of each sample's error, (B,) float32.

    Args:
        schedule: The noise schedule; its prediction_type decides the form of the weight.
        t: Timesteps, (B,) int64 in [0, num_train_timesteps).
        weighting: "uniform" (1 everywhere) or "min_snr".
        gamma: The SNR at which the weight of x0 stops growing; 5 in the paper.
    """
    if weighting == "uniform":
        return torch.ones_like(t, dtype=torch.float32)
    snr = schedule.snr(t)
    clipped = snr.clamp(max=gamma)
    if schedule.prediction_type == "epsilon":
        return clipped / snr
    if schedule.prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return clipped


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each sample, (B,) float32, for a prediction and a target (B, C, H, W)."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)


def absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean absolute error of each sample, (B,) float32, for a prediction and a target (B, C, H, W)."""
    return F.l1_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)


ERRORS = {"l2": squared_error, "l1": absolute_error}


def sums_by_quarter(errors: Tensor, t: Tensor, num_train_timesteps: int) -> tuple[Tensor, Tensor]:
    """The sums of the errors in each quarter of the range of t, (4,), and their counts, (4,), least noisy first.

    The mean over several batches or processes is the ratio of their totals.

    Args:
        errors: The error of each sample, (B,).
        t: Timesteps, (B,) int64 in [0, num_train_timesteps).
        num_train_timesteps: T.
    """
    quarter = F.one_hot(t * NUM_QUARTERS // num_train_timesteps, NUM_QUARTERS).to(errors.dtype)  # (B, 4)
    return errors @ quarter, quarter.sum(0)


def gaussian_errors(schedule: NoiseSchedule, variance: Tensor) -> Tensor:
    """The mean squared error of the best prediction at each timestep if x0 were Gaussian, (T,) float32.

    Once x_t is seen, the variance that remains of x0 ~ N(m, s^2) is s^2 (1 - a) / (a s^2 + 1 - a). The errors of
    epsilon and v are that times a / (1 - a) and 1 / (1 - a). A network that knows more of images is better.

    Args:
        schedule: The schedule, with its prediction type.
        variance: The variance of each value of x0, of any shape; the error is the mean over them.
    """
    a = schedule.alphas_cumprod.double()[:, None]  # (T, 1)
    s2 = variance.double().cpu().flatten()[None]  # (1, N)
    numerator = {"epsilon": a * s2, "v_prediction": s2, "sample": (1 - a) * s2}[schedule.prediction_type]
    return (numerator / (a * s2 + 1 - a).clamp(min=1e-12)).mean(dim=1).float()
