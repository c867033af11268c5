"""How a network runs: memory format, fused kernels or compilation. Its weights, names and numbers stay as they are.

    plain          PyTorch's own operations one by one, channels first
    channels_last  the same on channels-last memory, which matrix units of GPUs and CPUs read without copying
    fused          on a CPU with AVX2: channels last, Winograd convolutions, norm and SiLU as one (kernels.py)
    compiled       channels last, and the whole network through torch.compile
    graphed        on a GPU: compiled, and its kernels launched at once as CUDA graphs, which small batches gain from

Which one is fastest depends on the processor, the widths and the batch, so `fastest_setting` tries them.
"""

import copy
import ctypes
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from unet_diffusion.models.kernels import library_path, operators, winograd_filters
from unet_diffusion.models.layers import Conv3x3, GroupNorm, Upsample
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.precision import autocast, cpu_has_bfloat16

Speed = Literal["plain", "channels_last", "fused", "compiled", "graphed"]
SPEEDS: tuple[Speed, ...] = get_args(Speed)

# Seconds that compiling is expected to take. On two CPU cores benchmarks/train_step.py found 11 to 13 for fused, once a
# machine, and 104 to 136 for whole networks; benchmarks/gpu.py 128 while it compiled ten others.
COMPILE_SECONDS: dict[str, dict[Speed, float]] = {
    "cpu": {"fused": 15, "compiled": 180},
    "cuda": {"compiled": 130},
}
MAX_TRIAL_SECONDS = 15.0  # of timed steps
MAX_TRIAL_SHARE = 0.05  # of a run, compiling included
SMALL_SHARE = 8  # a first step has so many times fewer images
MAX_SLOWDOWN = 2.0  # what is slower than the best by more than this after that step is dropped
MIN_GAIN = 1.05  # a setting must be so many times as fast as a simpler one; less is within the noise
NUM_TIMED_STEPS = 3  # the fastest counts, so the first may warm up
# In and out; the matrix products of fewer are too thin to gain anything. In float32, 32 gain 1.9 times and 16 nothing.
MIN_WINOGRAD_CHANNELS = 64 if cpu_has_bfloat16() else 32

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
            reason = "needs a processor with AVX2, and Linux"
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
    # what torch is told to see, which can be less than what the processor has
    return sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


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


def fastest_setting(
    unet: PixelNetwork,
    x: Tensor,
    *,
    inputs: Mapping[str, Tensor],
    num_steps: float,
    speeds: Sequence[Speed],
    precisions: Sequence[torch.dtype],
) -> tuple[Speed, torch.dtype, str]:
    """The speed and precision with the shortest training step here, and a sentence that says why.

    Forward and backward of a copy are timed on x's device. Each setting begins with an eighth of the batch, and is
    dropped if that takes more than twice what the best one took. The timed steps take at most 15 s, and at most 5 % of
    the run; settings that time does not suffice for are left out, and so are those that fail. What must be compiled
    first is tried where 5 % of the run cover that, too. Network and random numbers are left as they were.

    Args:
        unet: The network.
        x: A batch as in training, (B, C, H, W) float32.
        inputs: What else the network is called with, on x's device.
        num_steps: Batches of the run; infinite if unknown.
        speeds: The speeds to choose from.
        precisions: The precisions to choose from.
    """
    # The likely ones first: if time does not suffice, one of them is what the run is left with.
    settings = [Setting(speed, dtype) for dtype in reversed(precisions) for speed in speeds if speed != "graphed"]
    settings.sort(key=lambda setting: (_compile_seconds(setting.speed, x.device), setting.speed != "fused"))
    trial = _Trial(unet, x, inputs, num_steps, len(settings))
    for setting in settings:
        trial.time(setting)
    chosen = trial.simplest_of_the_fastest()
    return chosen.speed, chosen.dtype, trial.sentence(chosen)


@dataclass(frozen=True)
class Setting:
    """A speed in a precision."""

    speed: Speed
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.speed} in {str(self.dtype).removeprefix('torch.')}"

    @property
    def simplicity(self) -> tuple[int, bool]:
        """Less is simpler: the order of SPEEDS, and float32 before others."""
        return SPEEDS.index(self.speed), self.dtype != torch.float32


class _Trial:
    """Times settings of a copy of a network for `fastest_setting`, whose arguments it takes."""

    def __init__(
        self, unet: PixelNetwork, x: Tensor, inputs: Mapping[str, Tensor], num_steps: float, num_settings: int
    ):
        self.start = time.perf_counter()
        self.network = copy.deepcopy(unet).to(x.device).train()
        self.x, self.inputs, self.num_steps, self.num_settings = x, inputs, num_steps, num_settings
        self.num_small = max(len(x) // SMALL_SHARE, 1)
        self.num_timed = 0  # images of the steps that decide; known after the first small step
        self.compiled_for = 0.0  # seconds
        self.best_small = math.inf  # seconds
        self.seconds: dict[Setting, float] = {}  # of a step with the whole batch
        self.notes: list[str] = []

    def time(self, setting: Setting) -> None:
        """Time one setting, unless there is no time left for it."""
        try:
            if self._is_affordable(setting):
                self._set_up(setting)
                # What is compiled for one shape would be compiled anew for a small step.
                small = self.best_small if setting.speed == "compiled" else self._small_step(setting)
                if self._is_promising(setting, small):
                    self._time_steps(setting, expected=small * self.num_timed / self.num_small)
        except RuntimeError as error:  # of compilers, and out of memory
            self.notes.append(f"{setting} does not run here ({str(error).strip().splitlines()[0]})")

    def simplest_of_the_fastest(self) -> Setting:
        """The simplest setting whose step takes hardly longer than the fastest.

        Raises:
            RuntimeError: If none runs.
        """
        if not self.seconds:
            raise RuntimeError(f"the network runs at no speed here: {'; '.join(self.notes)}")
        fastest = min(self.seconds.values())
        return min(
            (setting for setting, taken in self.seconds.items() if taken <= MIN_GAIN * fastest),
            key=lambda setting: setting.simplicity,
        )

    def sentence(self, chosen: Setting) -> str:
        """What was chosen and why, in one line."""
        others = [f"{setting} {taken:.3g} s" for setting, taken in self.seconds.items() if setting != chosen]
        reasons = "; ".join([*([", ".join(others)] if others else []), *self.notes]) or "nothing else to try"
        return (
            f"speed {chosen}: a step takes {self.seconds[chosen]:.3g} s ({reasons}; tried for {self._elapsed():.1f} s)"
        )

    def _is_affordable(self, setting: Setting) -> bool:
        cost = _compile_seconds(setting.speed, self.x.device)
        can_begin = self._left() > self.best_small and self._elapsed() + cost <= self._share_of_run()
        affordable = not self.seconds or can_begin
        if not affordable:
            self.notes.append(f"no time for {setting}")
        return affordable

    def _set_up(self, setting: Setting) -> None:
        start = time.perf_counter()
        set_speed(self.network, setting.speed)
        if setting.speed == "compiled":
            self._step(setting, self.num_timed)
        self.compiled_for += time.perf_counter() - start

    def _small_step(self, setting: Setting) -> float:
        """Seconds of a step with few images."""
        if self.x.device.type != "cpu":
            self._step(setting, self.num_small)  # a GPU's first one loads kernels and chooses among them, for a second
        return self._step(setting, self.num_small)

    def _is_promising(self, setting: Setting, taken: float) -> bool:
        """Whether a step with few images is not far slower than that of the best so far."""
        if taken > MAX_SLOWDOWN * self.best_small:
            self.notes.append(f"{setting} dropped, {taken / self.best_small:.1f} times as slow")
            return False
        self.best_small = min(self.best_small, taken)
        if not self.num_timed:
            whole_step = taken * len(self.x) / self.num_small
            limit = min(MAX_TRIAL_SECONDS, MAX_TRIAL_SHARE * self.num_steps * whole_step)
            all_steps = self.num_settings * NUM_TIMED_STEPS * whole_step
            self.num_timed = len(self.x) if all_steps <= limit else self.num_small
        return True

    def _time_steps(self, setting: Setting, expected: float) -> None:
        taken: list[float] = []
        while len(taken) < NUM_TIMED_STEPS and (not self.seconds or expected <= self._left()):
            taken.append(expected := self._step(setting, self.num_timed))
            self.seconds[setting] = min(taken) * len(self.x) / self.num_timed
        if not taken:
            self.notes.append(f"no time for {setting}")

    def _step(self, setting: Setting, num_images: int) -> float:
        """Seconds of forward and backward; the network gets no gradients."""
        x, network = self.x[:num_images], self.network
        inputs = {name: value[:num_images] for name, value in self.inputs.items()}
        t = None if network.time_embedding is None else torch.zeros(len(x), dtype=torch.int64, device=x.device)
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):  # dropout draws
            _synchronize(x.device)
            start = time.perf_counter()
            with autocast(x.device.type, setting.dtype):
                loss = network(x, t, **inputs).float().square().mean()
            torch.autograd.grad(loss, parameters)
            _synchronize(x.device)
        return time.perf_counter() - start

    def _elapsed(self) -> float:
        return time.perf_counter() - self.start

    def _share_of_run(self) -> float:
        """Seconds that trying may take, compiling included; unlimited until a step has been timed."""
        return MAX_TRIAL_SHARE * self.num_steps * min(self.seconds.values(), default=math.inf)

    def _left(self) -> float:
        """Seconds for timed steps."""
        return min(MAX_TRIAL_SECONDS, self._share_of_run()) - (self._elapsed() - self.compiled_for)


def _compile_seconds(speed: Speed, device: torch.device) -> float:
    """What compiling is expected to take; 0 for kernels that are there."""
    if speed == "fused" and library_path().exists():
        return 0
    return COMPILE_SECONDS.get(device.type, {}).get(speed, 0)


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


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None  # as torch.compile looks for it
