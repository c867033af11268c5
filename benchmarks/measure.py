"""What the benchmarks share: the machine and its ceilings, times in turn, memory, host waits, tables and JSON."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unet_diffusion.runtime.precision import autocast, precision_name, precisions_for

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "lightning", "denoising_diffusion_pytorch")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides how fast bfloat16 is
MIB = 2**20

PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}  # of square matrices, large enough to reach the ceiling
CONV_SHAPE = {"cpu": (32, 128, 32, 32), "cuda": (256, 256, 32, 32)}  # of a map at the top of DDPM's CIFAR-10 network
PEAK_REPEATS = 5  # the fastest counts: a ceiling is not an average
MEMORY_STEPS = 3

Step = Callable[[], object]


# ------------------------------------------------------------------------------------------------- machine and ceilings


def environment() -> dict[str, Any]:
    """The machine and the versions that a number belongs to, plain."""
    cpu = _cpuinfo()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in cpu.get("flags", "").split()],
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def describe(record: Mapping[str, Any]) -> str:
    """An environment in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    flags = " ".join(record["cpu_flags"]) or "no vector extensions named"
    gpu = f", {record['gpu']}" if record["gpu"] else ""
    return f"{record['date']}: {record['cpu']}, {record['cores']} cores ({flags}){gpu}, {versions}"


def fastest_autocast(device_type: str = "cpu") -> torch.autocast:
    """The context in which networks compute in 16 bits where the device has them in hardware, else in float32."""
    return autocast(device_type, precisions_for(torch.device(device_type))[-1])


@contextmanager
def empty_caches() -> Iterator[None]:
    """Where compiled kernels are kept, of this process and of those that it starts: empty at first, gone afterwards."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder, TORCH_EXTENSIONS_DIR=folder),
    ):
        yield


def peaks(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a matrix product and of a 3x3 channels_last convolution; "training" is forward and backward.

    In the precisions that the device has in hardware, the fastest last.
    """
    measured = {}
    for dtype in precisions_for(device):
        name = precision_name(dtype)
        measured[f"product {name} forward"] = _forward_peak(*_product(device, dtype))
        measured[f"product {name} training"] = _training_peak(*_product(device, dtype))
        measured[f"convolution {name} forward"] = _forward_peak(*_convolution(device, dtype))
        measured[f"convolution {name} training"] = _training_peak(*_convolution(device, dtype))
    return measured


def forward_flops(network: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of a forward pass, 2 for a multiplication and addition; training takes three times."""
    # the counter does not know the CPU's flash attention; as plain products it counts the same
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()


def _cpuinfo() -> dict[str, str]:
    """The first processor in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = [line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines()]
    return {key.strip(): value.strip() for key, _, value in lines}


def _version(package: str) -> str | None:
    """Without importing it: that would count in the time to start."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor], float]:
    side = PRODUCT_SIDE[device.type]
    factors = [torch.randn(side, side, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    return torch.mm, factors, 2 * side**3


def _convolution(device: torch.device, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor], float]:
    batch, channels, height, width = CONV_SHAPE[device.type]
    tensors = [
        torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        for shape in ((batch, channels, height, width), (channels, channels, 3, 3))
    ]
    return lambda x, weight: F.conv2d(x, weight, padding=1), tensors, 2 * batch * height * width * channels**2 * 9


@torch.no_grad()
def _forward_peak(operation: Callable[..., Tensor], tensors: list[Tensor], flops: float) -> float:
    return flops / _fastest(lambda: operation(*tensors)) / 1e12


def _training_peak(operation: Callable[..., Tensor], tensors: list[Tensor], flops: float) -> float:
    gradient = torch.ones_like(operation(*tensors))
    return 3 * flops / _fastest(lambda: torch.autograd.grad(operation(*tensors), tensors, gradient)) / 1e12


def _fastest(step: Step) -> float:
    seconds(step)  # the first call chooses and compiles kernels
    return min(seconds(step) for _ in range(PEAK_REPEATS))


# ---------------------------------------------------------------------------------------------------------------- time


def seconds(step: Step, steps: int = 1) -> float:
    """Seconds a step, over so many of them."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize()
    return (time.perf_counter() - start) / steps


def alternate(contenders: Mapping[str, Step], blocks: int, steps: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds a step in each block of steps; the contenders take turns, so that a slow minute meets all of them.

    Args:
        contenders: what to time, by name.
        blocks: rounds; each gives every contender one block.
        steps: a block.
        warm_up: untimed steps of each contender before the first round.
    """
    for step in contenders.values():
        for _ in range(warm_up):
            step()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for block in range(blocks):
        for name, step in contenders.items():
            taken[name].append(seconds(step, steps))
        progress = ", ".join(f"{name} {times[-1]:.4f}" for name, times in taken.items())
        print(f"  block {block + 1} of {blocks}, seconds a step: {progress}", flush=True)
    return taken


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median, over rounds, of how many times as fast ours was."""
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------- memory, host synchronisations


def peak_memory_apart(name: str, *arguments: str) -> float:
    """MiB that the contender takes in a process of its own: this script again, with --memory_of NAME and arguments."""
    command = [sys.executable, *sys.argv, *arguments, "--memory_of", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.split()[-1])


def peak_memory(build: Callable[[], Step]) -> float:
    """MiB that network, optimiser, average and a step take at most, after a first step that may compile.

    On a GPU all that is allocated, on a CPU what the process takes beyond what it took before the network was built.
    """
    before = status_mib("VmRSS")
    step = build()
    seconds(step)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        seconds(step, MEMORY_STEPS)
        return torch.cuda.max_memory_allocated() / MIB
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    seconds(step, MEMORY_STEPS)
    # not resource.getrusage: its peak is inherited from the process that started this one
    return status_mib("VmHWM") - before


def host_synchronisations(step: Step) -> int | None:
    """How often the host waits for the GPU in a step; None without a GPU."""
    if not torch.cuda.is_initialized():
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def status_mib(field: str, status: str | None = None) -> float:
    """MiB of a field in /proc/PID/status, such as VmHWM, the largest resident set; by default of this process."""
    lines = (Path("/proc/self/status").read_text() if status is None else status).splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


# -------------------------------------------------------------------------------------------------------------- reports


def process_seconds(command: Iterable[str], log: Path) -> float:
    """Wall clock of a command from its start to its end.

    Raises:
        RuntimeError: if it fails.
    """
    start = time.perf_counter()
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"a contender must end well, and its status is {status}; {log} ends with\n"
                           f"{log.read_text()[-2000:]}")  # fmt: skip
    return seconds


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table; the columns are those of the first row."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [["-" if row[column] is None else str(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: str | Path, record: Mapping[str, Any]) -> Path:
    """Write a record, whole or not at all; a bare name goes to benchmarks/results/NAME.json. Returns the path."""
    path = Path(path)
    if path.name == str(path) and not path.suffix:
        path = RESULTS / f"{path}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
        file.write(json.dumps(record, indent=1) + "\n")
    os.chmod(file.name, 0o644)  # temporary files are private
    os.replace(file.name, path)
    return path
