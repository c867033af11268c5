"""The speed of a network: memory format, fused kernels or compilation. Weights and their names stay as they are.

    plain          PyTorch's own operations one by one, in channels-first memory
    channels_last  the same in channels-last memory, which matrix units of GPUs and CPUs read without copying
    fused          on a CPU with AVX2: channels last, Winograd convolutions, norm and SiLU in one pass (kernels.py)
    compiled       channels last, and the whole network compiled by torch.compile
    graphed        on a GPU: compiled, and all kernels launched at once as CUDA graphs, which makes small batches faster

The fastest speed depends on the processor, the widths and the batch, so `fastest_setting` tries them.
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

# Seconds that compiling is expected to take. On two CPU cores benchmarks/train_step.py measured 11 to 13 s for fused,
# once on each machine, and 104 to 136 s for whole networks; benchmarks/gpu.py 128 s while ten others were compiled.
COMPILE_SECONDS: dict[str, dict[Speed, float]] = {
    "cpu": {"fused": 15, "compiled": 180},
    "cuda": {"compiled": 130},
}
MAX_TRIAL_SECONDS = 15.0  # for all timed steps together
MAX_TRIAL_SHARE = 0.05  # share of the run that trying may take, compiling included
SMALL_SHARE = 8  # the first step of a setting has so many times fewer images than a batch
MAX_SLOWDOWN = 2.0  # a setting whose first step takes so many times as long as the best one is dropped
MIN_GAIN = 1.05  # a setting must be so many times as fast as a simpler one; less is within the noise
NUM_TIMED_STEPS = 3  # the fastest counts, so the first may warm up
# Convolutions with fewer channels, in or out, gain nothing: in float32, 32 channels are 1.9 times as fast, 16 are not.
MIN_WINOGRAD_CHANNELS = 64 if cpu_has_bfloat16() else 32

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def set_speed(unet: nn.Module, speed: Speed, device: torch.device | None = None) -> None:
    """Set the speed of a network, in place. "compiled" compiles at the first call, and again for each new shape.

    Args:
        unet: A network, or any module made of this package's blocks.
        speed: One of SPEEDS.
        device: Device on which the network will run; None takes the device of its weights.

    Raises:
        ValueError: If there is no such speed, this device cannot run it, or it needs a C++ compiler and there is none.
        RuntimeError: If the fused kernels cannot be compiled.
    """
    device = next(unet.parameters()).device if device is None else device
    _check_speed(speed, device)
    if speed == "fused":
        operators()  # compiles the kernels
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
        unet.compile()  # in place, so the keys of the state dict stay the same
    elif speed == "graphed":
        unet.compile(mode="reduce-overhead")
        unet._compiled_call_impl = _copying(unet._compiled_call_impl)


def _check_speed(speed: str, device: torch.device) -> None:
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


def prepare_weights(unet: nn.Module, dtype: torch.dtype) -> None:
    """Compute once, in place, what every call would compute from the weights: Winograd filters and autocast's rounding.

    Predictions stay the same. The network can then neither be trained nor get other weights: fused convolutions would
    use the filters of the old ones.

    Args:
        unet: A network, after `set_speed`.
        dtype: Precision of autocast; float32 for a network that runs without autocast.
    """
    for module in unet.modules():
        if isinstance(module, Conv3x3) and module.fused:
            module.filters = winograd_filters(module.weight, dtype)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.to(dtype)


def _can_fuse() -> bool:
    # the instructions that torch may use, which ATEN_CPU_CAPABILITY can make fewer than the processor has
    return sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _is_wide(channels: int) -> bool:
    return channels >= MIN_WINOGRAD_CHANNELS and channels % 16 == 0  # a vector holds 16 numbers in float32


def _copying(graphed: Any) -> Callable[..., Tensor]:
    """Copy the output of a graphed network: the next call overwrites it, and solvers look back at earlier outputs."""

    def call(*args: object, **kwargs: object) -> Tensor:
        return graphed(*args, **kwargs).clone()

    return call


def speeds_for(device: torch.device) -> tuple[Speed, ...]:
    """Return the speeds that a device can run, simplest first."""
    if device.type == "cuda":
        return "plain", "channels_last", "compiled", "graphed"
    if device.type != "cpu" or not _has_compiler():
        return "plain", "channels_last"
    return ("plain", "channels_last", "fused", "compiled") if _can_fuse() else ("plain", "channels_last", "compiled")


def speed_for_use(trained_at: Speed, device: torch.device) -> Speed:
    """Return the speed to use a trained network at: that of the training, unless it compiles the whole network.

    The training machine measured whether fused is fastest; nobody has measured it on dozens of cores.

    Args:
        trained_at: Speed of the training.
        device: Device on which the network will run.
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
    """Return the speed and precision with the shortest training step on this machine, and a sentence that says why.

    Forward and backward passes of a copy are timed on the device of x. The first step of each setting has an eighth of
    the batch; a setting that takes more than twice as long as the best one is dropped. All timed steps together take at
    most 15 s and at most 5 % of the run; settings for which there is no time, and settings that fail, are left out. A
    setting that must be compiled is tried if its compilation, too, fits into 5 % of the run. The network and the state
    of the random numbers stay as they are.

    Args:
        unet: The network.
        x: A batch of a training step, (B, C, H, W) float32.
        inputs: Further arguments of the network by name, on the device of x.
        num_steps: Number of batches of the run; infinite if unknown.
        speeds: Speeds to choose from.
        precisions: Precisions to choose from.
    """
    # The likely winners come first: where time is short, one of them is chosen.
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
        """The place in the order of simplicity, simplest first: the order of SPEEDS, and float32 before others."""
        return SPEEDS.index(self.speed), self.dtype != torch.float32


class _Trial:
    """Times the settings of a copy of a network; the arguments are those of `fastest_setting`."""

    def __init__(
        self, unet: PixelNetwork, x: Tensor, inputs: Mapping[str, Tensor], num_steps: float, num_settings: int
    ):
        self.start = time.perf_counter()
        self.network = copy.deepcopy(unet).to(x.device).train()
        self.x, self.inputs, self.num_steps, self.num_settings = x, inputs, num_steps, num_settings
        self.num_small = max(len(x) // SMALL_SHARE, 1)
        self.num_timed = 0  # images in the steps that decide; known after the first small step
        self.compiled_for = 0.0  # seconds
        self.best_small = math.inf  # seconds
        self.seconds: dict[Setting, float] = {}  # seconds of a step with the whole batch
        self.notes: list[str] = []
        self.failure: type[RuntimeError] = RuntimeError  # of the last setting that failed

    def time(self, setting: Setting) -> None:
        """Time one setting, unless there is no time left for it."""
        try:
            if self._is_affordable(setting):
                self._set_up(setting)
                small = self._small_step(setting)
                if self._is_promising(setting, small):
                    self._time_steps(setting, expected=small * self.num_timed / self.num_small)
        except RuntimeError as error:  # the compiler failed, or there is not enough memory
            self.seconds.pop(setting, None)  # of a first step, after which it failed
            self.failure = type(error)
            self.notes.append(f"{setting} does not run here ({str(error).strip().splitlines()[0]})")

    def simplest_of_the_fastest(self) -> Setting:
        """Return the simplest setting whose step takes hardly longer than the fastest.

        Raises:
            RuntimeError: If no setting runs; torch.OutOfMemoryError, which is one, if memory does not suffice.
        """
        if not self.seconds:
            kind = torch.OutOfMemoryError if issubclass(self.failure, torch.OutOfMemoryError) else RuntimeError
            raise kind(f"the network runs at no speed here: {'; '.join(self.notes)}")
        fastest = min(self.seconds.values())
        return min(
            (setting for setting, taken in self.seconds.items() if taken <= MIN_GAIN * fastest),
            key=lambda setting: setting.simplicity,
        )

    def sentence(self, chosen: Setting) -> str:
        """Return the choice and its reasons, in one line."""
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
            self.num_timed = self.num_timed or len(self.x)
            self._step(setting, self.num_timed)
        self.compiled_for += time.perf_counter() - start

    def _small_step(self, setting: Setting) -> float:
        """Return the seconds of a step with few images.

        Another number of images would compile the network again. So the first compiled one is timed with as many as
        decide, and a later one counts as promising.
        """
        if setting.speed == "compiled":
            whole_share = self.num_small / self.num_timed
            return self.best_small if self.seconds else self._step(setting, self.num_timed) * whole_share
        if self.x.device.type != "cpu":
            self._step(setting, self.num_small)  # for a second, a GPU loads kernels and chooses among them
        return self._step(setting, self.num_small)

    def _is_promising(self, setting: Setting, taken: float) -> bool:
        """Return whether a step with few images is not far slower than the best so far."""
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
        """Return the seconds of a forward and backward pass; no gradients are stored."""
        x, network = self.x[:num_images], self.network
        inputs = {name: value[:num_images].detach() for name, value in self.inputs.items()}
        t = None if network.time_embedding is None else torch.zeros(len(x), dtype=torch.int64, device=x.device)
        trained: list[Tensor] = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not trained:  # what is trained makes the network's inputs, so that gradients flow through all of it
            trained = [value.requires_grad_() for value in inputs.values() if value.is_floating_point()]
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):  # dropout draws random numbers
            _synchronize(x.device)
            start = time.perf_counter()
            with autocast(x.device.type, setting.dtype):
                loss = network(x, t, **inputs).float().square().mean()
            torch.autograd.grad(loss, trained)
            _synchronize(x.device)
        return time.perf_counter() - start

    def _elapsed(self) -> float:
        return time.perf_counter() - self.start

    def _share_of_run(self) -> float:
        """Return the seconds that trying may take, compiling included; infinite until a step has been timed."""
        return MAX_TRIAL_SHARE * self.num_steps * min(self.seconds.values(), default=math.inf)

    def _left(self) -> float:
        """Return the seconds that are left for timed steps."""
        return min(MAX_TRIAL_SECONDS, self._share_of_run()) - (self._elapsed() - self.compiled_for)


def _compile_seconds(speed: Speed, device: torch.device) -> float:
    """Return the seconds that compiling is expected to take; 0 for kernels that are compiled already."""
    if speed == "fused" and library_path().exists():
        return 0
    return COMPILE_SECONDS.get(device.type, {}).get(speed, 0)


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory in the next step, instead of returning it to the system and asking for it again.

    Each step frees and allocates the same large maps, and the system clears their pages each time. The setting holds
    for the whole process; it does nothing on systems with another C library.
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
    return shutil.which(os.environ.get("CXX", "g++")) is not None  # where torch.compile looks, too
