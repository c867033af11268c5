"""Noise schedules in files of latent diffusion and Stable Diffusion: tables, from which their settings are read.

A file may hold its schedule as `betas`, as `alphas_cumprod`, or as the `denoiser.sigmas` of Stable Diffusion XL, or not
at all. All of its tables must say the same.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.diffusers_io.single_file.layouts import Layout
from unet_diffusion.diffusion.conditions.low_resolution import LOW_RES_SCHEDULE
from unet_diffusion.diffusion.schedule import NoiseSchedule, PredictionType

NUM_TIMESTEPS = 1000  # of all published models
LOW_RES = "low_scale_model."  # begins the names of the upscaler's tables for its small image
RTOL = 1e-2  # of alphas_cumprod; in bfloat16 sigmas are rounded by up to 2^-8, and their squares by twice that
ATOL = 1e-6  # programs write other small numbers for the last one of zero terminal SNR
DIGITS = (3, 4, 5)  # of the first and the last beta, which are round numbers


def schedule_in(tensors: Mapping[str, Tensor], layout: Layout, prediction_type: PredictionType) -> NoiseSchedule | None:
    """The noise schedule in a file, or the layout's if the file has no table; None if the tables are of no such one.

    Args:
        tensors: The tensors in the file by name.
        layout: Their layout.
        prediction_type: What the network predicts.

    Raises:
        ValueError: If the last timestep is pure noise and the network predicts the noise.
    """
    tables = _tables(tensors)
    is_marked = "ztsnr" in tensors  # a mark of fine-tuned models of Stable Diffusion XL; tables may lack the change
    for settings in _candidates(tables, layout):
        plain, shifted = (
            NoiseSchedule(**settings, prediction_type="v_prediction", rescale_betas_zero_snr=on) for on in (False, True)
        )
        is_plain, is_shifted = (all(_is_table_of(schedule, table) for table in tables) for schedule in (plain, shifted))
        if is_plain or is_shifted:
            is_zero_snr = is_marked or not is_plain
            return NoiseSchedule(**settings, prediction_type=prediction_type, rescale_betas_zero_snr=is_zero_snr)
    return None


def check_low_res_schedule(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse an upscaler whose small images were noised by another schedule than LOW_RES_SCHEDULE.

    Args:
        tensors: The tensors in a file by name.
        path: Path of the file, for errors.

    Raises:
        ValueError: If a table of the small image's schedule says so.
    """
    if not all(_is_table_of(LOW_RES_SCHEDULE, table) for table in _tables(tensors, LOW_RES)):
        raise ValueError(
            f"the tables {LOW_RES}* in {path} must be those of Stable Diffusion's upscaler, {LOW_RES_SCHEDULE.config}, "
            "and are others; from_diffusers reads its U-Net alone"
        )


def _tables(tensors: Mapping[str, Tensor], prefix: str = "") -> list[Tensor]:
    """The alphas_cumprod of each table in a file."""
    found = []
    if (betas := tensors.get(f"{prefix}betas")) is not None:
        found.append((1 - betas.double()).cumprod(dim=0))
    if (alphas_cumprod := tensors.get(f"{prefix}alphas_cumprod")) is not None:
        found.append(alphas_cumprod.double())
    if (sigmas := tensors.get(f"{prefix}denoiser.sigmas")) is not None:
        found.append(1 / (1 + sigmas.double().sort().values.square()))
    return found


def _is_table_of(schedule: NoiseSchedule, alphas_cumprod: Tensor) -> bool:
    ours = schedule.alphas_cumprod.double()
    return ours.shape == alphas_cumprod.shape and torch.allclose(ours, alphas_cumprod, rtol=RTOL, atol=ATOL)


def _candidates(tables: list[Tensor], layout: Layout) -> Iterator[dict[str, Any]]:
    """Settings of schedules: the layout's, then those with the first and the last beta of the first table."""
    start, end = layout.betas
    yield {"num_train_timesteps": NUM_TIMESTEPS, "beta_schedule": "scaled_linear", "beta_start": start, "beta_end": end}
    for alphas_cumprod in tables[:1]:
        ends = 1 - alphas_cumprod[0], 1 - alphas_cumprod[-1] / alphas_cumprod[-2]
        for digits in DIGITS:
            start, end = (float(f"{float(value):.{digits}g}") for value in ends)
            if 0 < start <= end < 1 and len(alphas_cumprod) > 1:
                for kind in ("scaled_linear", "linear"):
                    yield {
                        "num_train_timesteps": len(alphas_cumprod),
                        "beta_schedule": kind,
                        "beta_start": start,
                        "beta_end": end,
                    }
