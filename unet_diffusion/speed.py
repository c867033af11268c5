"""How a network runs: memory format, fused kernels or compilation. Its weights, names and numbers stay as they are.

    plain          PyTorch's own operations one by one, channels first
    channels_last  the same on channels-last memory, which matrix units of GPUs and CPUs read without copying
    fused          on a CPU with AVX-512's bf16: channels last, Winograd convolutions, norm and SiLU as one (kernels.py)
    compiled       channels last, and the whole network through torch.compile
    graphed        on a GPU: compiled, and its kernels launched at once as CUDA graphs, which small batches gain from

Which one is fastest depends on the processor, the widths and the batch, so `fastest_speed` tries them.
"""

import copy
import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from unet_diffusion.blocks import Conv3x3, GroupNorm, Upsample
from unet_diffusion.kernels import library_path, operators, winograd_filters
from unet_diffusion.unet import PixelNetwork

Speed = Literal["plain", "channels_last", "fused", "compiled", "graphed"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)

# Seconds that trying them is expected to take, most of it compiling. On two CPU cores benchmarks/train_step.py found 11
# to 13 for fused with an empty cache, and 104 to 136 for whole networks; benchmarks/gpu.py 128 while it compiled ten
# others. Graphs are not tried, as what is captured would keep its memory: see `NetworkModule`.
TRIALS: dict[str, dict[Speed, float]] = {
    "cpu": {"channels_last": 0, "fused": 15, "compiled": 180},
    "cuda": {"channels_last": 0, "compiled": 130},
}
FLOAT32_TRIAL = 30  # seconds: on a processor without instructions for bfloat16 every run is long
MAX_TRIAL_SHARE = 0.05  # of a run: what would take longer is not tried
MIN_GAIN = 1.05  # a setting must be so many times as fast as a simpler one; less is within the noise
NUM_TIMED_STEPS = 2  # after one that is not timed; the fastest counts
MIN_WINOGRAD_CHANNELS = 64  # in and out; the matrix products of fewer are too thin to gain anything

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def set_speed(unet: nn.Module, speed: Speed, device: torch.device | None = None) -> None:
    """Make a network run so, in place. "compiled" compiles when it is first called, and for each new shape.

    Args:
        unet: a network, or any module of our blocks.
        speed: one of SPEEDS.
        device: where it will run; None: where its weights are.

    Raises:
        ValueError: if there is no such setting, or not on this device, or it needs a C++ compiler and there is none.
        RuntimeError: if the fused kernels cannot be compiled.
    """
    device = next(unet.parameters()).device if device is None else device
    if speed not in SPEEDS:
        raise ValueError(f"speed must be one of {', '.join(SPEEDS)}, got {speed!r}")
    if speed not in speeds_for(device):
        if device.type != "cpu" or speed == "graphed":
            reason = f"is not for {device.type}"
        elif _has_compiler():
            reason = "needs a processor with AVX-512 and its bf16, and Linux"
        else:
            reason = "needs a C++ compiler (install g++)"
        raise ValueError(f"speed {speed} {reason}; here use one of {', '.join(speeds_for(device))}")
    if speed == "fused":
        operators()  # compiles them
    unet.to(memory_format=torch.contiguous_format if speed == "plain" else torch.channels_last)
    compiled_for_gpu = device.type == "cuda" and speed in ("compiled", "graphed")
    for module in unet.modules():
        if isinstance(module, GroupNorm):
            module.fused, module.by_channel = speed == "fused", compiled_for_gpu
        elif isinstance(module, Upsample):
            module.by_copies = compiled_for_gpu
        elif isinstance(module, Conv3x3):
            module.filters = None
            module.fused = speed == "fused" and _is_wide(module.in_channels) and _is_wide(module.out_channels)
    unet._compiled_call_impl = None  # undoes an earlier compile(), for which torch has no method
    if speed == "compiled":
        unet.compile()  # in place: the state dict's keys stay plain
    elif speed == "graphed":
        unet.compile(mode="reduce-overhead")
        unet._compiled_call_impl = _copying(unet._compiled_call_impl)


def prepare_weights(unet: nn.Module, dtype: torch.dtype) -> None:
    """Make once, in place, what would be made of the weights at each call: Winograd's filters, and autocast's rounding.

    Predictions are the same. Not for training, nor to load other weights into: fused convolutions keep their weights,
    and the filters made of them.

    Args:
        unet: a network, after `set_speed`.
        dtype: of autocast; float32: without it.
    """
    for module in unet.modules():
        if isinstance(module, Conv3x3) and module.fused:
            module.filters = winograd_filters(module.weight, dtype)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.to(dtype)


def _can_fuse() -> bool:
    # The first can be told to see less; oneDNN has no products of bfloat16 for AVX-512 without the second.
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return sys.platform == "linux" and has_avx512 and torch.cpu._is_avx512_bf16_supported()


def _is_wide(channels: int) -> bool:
    return channels >= MIN_WINOGRAD_CHANNELS and channels % 16 == 0  # numbers of float32 in a vector


def _copying(graphed: Any) -> Callable[..., Tensor]:
    """The same with an output of its own: the next call overwrites what a graph returns, which solvers look back at."""

    def call(*args: object, **kwargs: object) -> Tensor:
        return graphed(*args, **kwargs).clone()

    return call


def speeds_for(device: torch.device) -> tuple[Speed, ...]:
    """The settings that a device can run, simplest first."""
    if device.type == "cuda":
        return "plain", "channels_last", "compiled", "graphed"
    if device.type != "cpu" or not _has_compiler():
        return "plain", "channels_last"
    return ("plain", "channels_last", "fused", "compiled") if _can_fuse() else ("plain", "channels_last", "compiled")


def speed_for_use(trained_at: Speed, device: torch.device) -> Speed:
    """What a network that was trained at a speed is used at here: the same, unless that compiles the whole network.

    Whether fused is the fastest was found on the machine of the training; with dozens of cores it was never measured.
    """
    return trained_at if trained_at in ("plain", "fused") and trained_at in speeds_for(device) else "channels_last"


def fastest_speed(
    unet: PixelNetwork,
    x: Tensor,
    *,
    inputs: Mapping[str, Tensor],
    num_steps: float,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[Speed, str]:
    """The setting with the shortest training step here, and a sentence that says how long each one took.

    Forward and backward of a copy are timed, three steps each, on x's device. "plain" and "channels_last", which
    compile nothing, are always tried; the others only if compiling them all is expected to take at most 5 % of the run
    (see TRIALS; what is compiled already costs nothing). One that fails is left out. The network and the random numbers
    are left as they were.

    Args:
        unet: the network.
        x: a batch as in training, (B, C, H, W) float32.
        inputs: what else it is called with, on x's device.
        num_steps: of the run; infinite if unknown.
        autocast: makes the context that the steps will run in.
    """
    start = time.perf_counter()
    network = copy.deepcopy(unet).to(x.device).train()
    seconds: dict[Speed, float] = {"plain": _step_seconds(network, "plain", x, inputs, autocast)}
    left = MAX_TRIAL_SHARE * num_steps * seconds["plain"]
    notes = []
    offered = speeds_for(x.device)
    for speed, cost in TRIALS.get(x.device.type, {"channels_last": 0}).items():
        if speed not in offered:
            continue
        try:
            cost = 0 if speed == "fused" and library_path().exists() else cost
            if cost <= left:
                left -= cost
                seconds[speed] = _step_seconds(network, speed, x, inputs, autocast)
        except RuntimeError as error:  # of compilers, and out of memory
            notes.append(f"; {speed} does not run here ({str(error).strip().splitlines()[0]})")
    if x.device.type == "cpu" and _is_bfloat16(autocast) and left >= FLOAT32_TRIAL:
        float32 = _step_seconds(network, "plain", x, inputs, nullcontext)
        if float32 * MIN_GAIN < min(seconds.values()):
            notes.append(f"; float32 would take {float32:.3f} s: set trainer.precision to 32-true")
    chosen = _simplest_of_the_fastest(seconds)
    times = ", ".join(f"{speed} {taken:.3f} s" for speed, taken in seconds.items())
    tried_for = time.perf_counter() - start
    return chosen, f"speed {chosen}: a step takes {times} (tried for {tried_for:.0f} s){''.join(notes)}"


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step, instead of returning it to the system and asking for it again.

    Each step frees and allocates the same large maps, whose pages the system clears each time. For the whole process.
    Does nothing on systems with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(M_TOP_PAD, 2**26)


def _simplest_of_the_fastest(seconds: dict[Speed, float]) -> Speed:
    """The seconds are in order of simplicity; each further setting must gain on what was best before it."""
    chosen: Speed = "plain"
    for speed, taken in seconds.items():
        if taken * MIN_GAIN < seconds[chosen]:
            chosen = speed
    return chosen


def _is_bfloat16(autocast: Callable[[], AbstractContextManager[object]]) -> bool:
    with autocast():
        return torch.is_autocast_enabled("cpu")


def _step_seconds(
    network: PixelNetwork,
    speed: Speed,
    x: Tensor,
    inputs: Mapping[str, Tensor],
    autocast: Callable[[], AbstractContextManager[object]],
) -> float:
    """Of forward and backward, the fastest of a few; the network gets no gradients."""
    set_speed(network, speed)
    t = None if network.time_embedding is None else torch.zeros(len(x), dtype=torch.int64, device=x.device)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def step() -> None:
        with autocast():
            loss = network(x, t, **inputs).float().square().mean()
        torch.autograd.grad(loss, parameters)

    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):  # dropout draws
        step()
        return min(_seconds(step, x.device) for _ in range(NUM_TIMED_STEPS))


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None  # as torch.compile looks for it
