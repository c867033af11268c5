"""The precisions in which a machine computes fast: float32 everywhere, and 16 bits where the hardware has them.

Weights stay float32; `autocast` computes convolutions and matrix products in the precision. Hardware without bfloat16
emulates it: on two cores of an AVX2 processor its convolutions are fifty times slower than those in float32.
"""

from typing import Literal, get_args

import torch

Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def precisions_for(device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the precisions that a device has in hardware, float32 first.

    The second is bfloat16 on GPUs since Ampere and on CPUs with AVX-512's bf16, and float16 on older GPUs, which have
    no bfloat16. Apple's GPUs get float32 only, because nothing was measured on them.
    """
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float32, torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == "cpu" and cpu_has_bfloat16():
        return torch.float32, torch.bfloat16
    return (torch.float32,)


def cpu_has_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 in hardware; with ATEN_CPU_CAPABILITY=avx2 the answer is no."""
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and torch.cpu._is_avx512_bf16_supported()


def chosen_precision(asked: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Return the precision asked for; for "auto" the 16 bits that the device has in hardware, otherwise float32.

    Raises:
        ValueError: If float16 is asked for on a CPU.
    """
    if asked == "float16" and device.type == "cpu":
        raise ValueError("precision float16 is for GPUs, and this is a CPU; use auto or float32")
    return precision_name(precisions_for(device)[-1]) if asked == "auto" else asked


def precision_name(dtype: torch.dtype) -> Precision:
    """Return the name of a dtype: "float32", "bfloat16" or "float16"."""
    name = str(dtype).removeprefix("torch.")
    assert name in PRECISIONS
    return name


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which networks compute in a precision; float32 changes nothing."""
    # Like Lightning's, it does not cache rounded weights from one use to the next.
    return torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)
