"""Which precisions a machine computes fast in: float32 everywhere, and one of 16 bits where the hardware has it.

Weights stay float32; `autocast` computes convolutions and matrix products in the precision. Hardware without bfloat16
emulates it: two cores of an AVX2 processor convolve fifty times as slowly in it as in float32.
"""

from typing import Literal, get_args

import torch

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def precisions_for(device: torch.device) -> tuple[torch.dtype, ...]:
    """The precisions that a device has in hardware, float32 first.

    The other one is bfloat16 on GPUs since Ampere and on CPUs with AVX-512's bf16, and float16 on GPUs before Ampere,
    which have no bfloat16. Apple's GPUs get float32 only, as nothing was measured on them.
    """
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float32, torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.float32, torch.bfloat16
    return (torch.float32,)


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; ATEN_CPU_CAPABILITY=avx2 makes it seem not to."""
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and torch.cpu._is_avx512_bf16_supported()


def chosen_precision(asked: Precision | Literal["auto"], device: torch.device) -> Precision:
    """The precision asked for, or for "auto" the 16-bit one where the device has one in hardware, else float32.

    Raises:
        ValueError: If float16 is asked for on a CPU.
    """
    if asked == "float16" and device.type == "cpu":
        raise ValueError("precision float16 is for GPUs, and this is a CPU; use auto or float32")
    return precision_name(precisions_for(device)[-1]) if asked == "auto" else asked


def precision_name(dtype: torch.dtype) -> Precision:
    """The name of a dtype: "float32", "bfloat16" or "float16"."""
    name = str(dtype).removeprefix("torch.")
    assert name in PRECISIONS
    return name


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """The context in which networks compute in that precision; float32 changes nothing."""
    # As Lightning's: rounded weights are not kept from one use to the next.
    return torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)
