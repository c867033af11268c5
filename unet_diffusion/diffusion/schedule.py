"""The noise schedule: how much of an image is left at each timestep, and what a network is trained to predict.

Denoising diffusion probabilistic models (Ho et al. 2020, https://arxiv.org/abs/2006.11239), with the cosine schedule of
Nichol & Dhariwal 2021 (https://arxiv.org/abs/2102.09672), v-prediction of Salimans & Ho 2022
(https://arxiv.org/abs/2202.00512) and zero terminal SNR of Lin et al. 2023 (https://arxiv.org/abs/2305.08891).
The tables equal those of diffusers' DDPMScheduler. Unlike diffusers, `add_noise` refuses less than float32: in bfloat16
the least noisy level rounds to no noise at all.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]

MAX_BETA = 0.999  # cap of the cosine schedule, whose last betas would reach 1 (Nichol & Dhariwal 2021, section 3.2)
COSINE_OFFSET = 0.008  # s in the cosine schedule: keeps the first betas from vanishing (same section)

MAX_TIMESTEPS = 100_000  # a hundred times the papers' number; a longer table only takes memory


class NoiseSchedule:
    """A table of a_t = alphas_cumprod[t], and the formulas of diffusion in terms of it.

    x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise. The schedule has no parameters and is not a module: its table stays
    float32 whatever precision the network is cast to.

    Args:
        num_train_timesteps: T, in [2, 100000]; timesteps are 0 (least noisy) to T - 1.
        beta_schedule: "linear" (Ho et al. 2020), "scaled_linear" (latent diffusion) or "squaredcos_cap_v2" (cosine).
        beta_start: Variance added at t = 0, in (0, 1); the cosine schedule ignores it.
        beta_end: Variance added at t = T - 1, in [beta_start, 1); the cosine schedule ignores it.
        prediction_type: What the network predicts: "epsilon" (the noise), "sample" (x0) or "v_prediction".
        rescale_betas_zero_snr: Shift and scale the table so that x_{T-1} is pure noise.

    Raises:
        ValueError: If a value is out of range, or if rescale_betas_zero_snr meets prediction_type "epsilon".
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: BetaSchedule = "linear",
        *,
        beta_start: float = 1.0e-4,
        beta_end: float = 0.02,
        prediction_type: PredictionType = "epsilon",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        _check_choice("beta_schedule", beta_schedule, get_args(BetaSchedule))
        _check_choice("prediction_type", prediction_type, get_args(PredictionType))
        if not 2 <= num_train_timesteps <= MAX_TIMESTEPS:
            raise ValueError(
                f"num_train_timesteps must be from 2 to {MAX_TIMESTEPS}, got {num_train_timesteps}; 1000 is usual"
            )
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "prediction_type epsilon cannot recover x0 from the pure noise of rescale_betas_zero_snr; "
                "use v_prediction or sample"
            )
        self.num_train_timesteps = num_train_timesteps
        self.beta_schedule = beta_schedule
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.prediction_type = prediction_type
        self.rescale_betas_zero_snr = rescale_betas_zero_snr

        betas = _betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        self.betas = _zero_terminal_snr(betas) if rescale_betas_zero_snr else betas  # (T,)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)  # (T,)
        self._on_device = {self.alphas_cumprod.device: self.alphas_cumprod}

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments by name, as plain values."""
        names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
        return {name: getattr(self, name) for name in (*names, "rescale_betas_zero_snr")}

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, x0 diffused to timestep t (Ho et al. 2020, eq. 4).

        Args:
            x0: Clean images or latents, (B, C, H, W) float32 or float64; they should have unit variance.
            noise: Standard normal noise of the shape of x0.
            t: Timesteps, (B,) int64 in [0, num_train_timesteps); 0 is the least noisy level, not clean.

        Raises:
            ValueError: If t does not hold one timestep per sample, or x0 has another dtype.
        """
        signal, sigma = self._signal_and_noise(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The network's target at t: the noise, x0, or v = sqrt(a_t) noise - sqrt(1 - a_t) x0.

        Arguments and errors are those of `add_noise`.
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        signal, sigma = self._signal_and_noise(t, x0)
        return signal * noise - sigma * x0

    def predict_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that a prediction at x_t implies, (B, C, H, W): the inverse of `target`.

        Args:
            prediction: The network's output, (B, C, H, W).
            x_t: The noised sample, (B, C, H, W) float32 or float64.
            t: Timesteps, (B,) int64 in [0, num_train_timesteps).

        Raises:
            ValueError: As `add_noise` does, unless prediction_type is "sample".
        """
        if self.prediction_type == "sample":
            return prediction
        signal, sigma = self._signal_and_noise(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / signal
        return signal * x_t - sigma * prediction

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio a_t / (1 - a_t) of each timestep, (B,) float32; 0 is pure noise."""
        a_t = self._table(t.device)[t]
        return a_t / (1.0 - a_t)

    def _signal_and_noise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), each (B, 1, ..., 1), as factors for x (B, ...)."""
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must hold one timestep per sample, shape ({x.shape[0]},), got {tuple(t.shape)}")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"noise must be added in float32 or float64, got {x.dtype}; cast the images first")
        a_t = self._table(x.device)[t].to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return a_t.sqrt(), (1.0 - a_t).sqrt()

    def _table(self, device: torch.device) -> Tensor:
        """alphas_cumprod on a device; it is copied there once."""
        if device not in self._on_device:
            self._on_device[device] = self.alphas_cumprod.to(device)
        return self._on_device[device]


def stratified_timesteps(batch_size: int, num_train_timesteps: int, generator: torch.Generator) -> Tensor:
    """One uniform timestep from each of batch_size equal parts of the range, in random order: (B,) int64.

    Each is uniform over the whole range by itself; together they spread evenly, and the loss varies less.
    """
    device = generator.device
    uniform = torch.rand(batch_size, generator=generator, device=device, dtype=torch.float32)
    part = torch.randperm(batch_size, generator=generator, device=device)
    t = ((part + uniform) / batch_size * num_train_timesteps).long()
    return t.clamp(max=num_train_timesteps - 1)  # float32 rounds the highest draws up to the end


def scheduler_config(schedule: NoiseSchedule, *, clip_sample: bool = True) -> dict[str, Any]:
    """Every field of diffusers' DDPMScheduler for this schedule.

    All are written out, because diffusers' `from_config` drops fields at their default when it crosses from one class
    to another. "trailing" starts at the last timestep, the noisiest one (Lin et al. 2023, section 3.3).

    Args:
        schedule: The noise schedule.
        clip_sample: Clip each estimate of x0 to [-1, 1]; right for pixels, wrong for latents.
    """
    return {
        **schedule.config,
        "trained_betas": None,
        "variance_type": "fixed_small",
        "clip_sample": clip_sample,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,  # this field and the next have no effect without thresholding
        "sample_max_value": 1.0,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
    }


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _betas(beta_schedule: BetaSchedule, num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float32)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float32) ** 2

    def cosine(s: float) -> float:
        return math.cos((s + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

    steps = range(num_timesteps)
    betas = [1 - cosine((i + 1) / num_timesteps) / cosine(i / num_timesteps) for i in steps]
    return torch.tensor([min(beta, MAX_BETA) for beta in betas], dtype=torch.float32)


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas with the same first sqrt(a_t) and a last one of 0 (Lin et al. 2023, algorithm 1)."""
    sqrt_a = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = sqrt_a[0].clone(), sqrt_a[-1].clone()
    sqrt_a = (sqrt_a - last) * (first / (first - last))
    a = sqrt_a**2
    alphas = torch.cat([a[:1], a[1:] / a[:-1]])
    return 1.0 - alphas
