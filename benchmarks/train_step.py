"""Training throughput beside diffusers: the 35.7 M network of DDPM's CIFAR-10, same weights, process and precision.

    python benchmarks/train_step.py

A step is noising, forward, loss, backward, gradient clipping and the optimiser; ours also moves the EMA. The two
alternate in blocks; printed are the medians. Forward agreement is asserted first.
"""

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from unet_diffusion.interop import to_diffusers
from unet_diffusion.schedule import NoiseSchedule
from unet_diffusion.unet import DenoiserUNet

NUM_WARM_UP = 2  # steps a network before timing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks of each network")
    parser.add_argument("--steps", type=int, default=4, help="steps a block")
    options = parser.parse_args()

    torch.manual_seed(0)
    ours = DenoiserUNet(
        3, [128, 256, 256, 256], attention_levels=[1], downsample_padding=0, norm_eps=1e-6,
        flip_sin_to_cos=False, freq_shift=1,
    )  # fmt: skip
    nn.init.normal_(ours.conv_out.weight, std=0.02)  # it starts at zero, where all networks would agree
    theirs = to_diffusers(ours, sample_size=32).train()
    ours.train()
    x, t = torch.randn(options.batch_size, 3, 32, 32), torch.arange(options.batch_size) * 7
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t).sample, atol=1e-5, rtol=1e-5)

    steps = {"unet_diffusion": our_step(ours, x), "diffusers": their_step(theirs, x)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(NUM_WARM_UP):
            step()
    for _ in range(options.blocks):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(options.steps):
                step()
            seconds[name].append((time.perf_counter() - start) / options.steps)
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"{time.strftime('%Y-%m-%d')}: {machine}, {versions}, bf16 autocast, batch {options.batch_size}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:15s} {median:.3f} s a step, {options.batch_size / median:.1f} images/s "
              f"(blocks {min(times):.3f} to {max(times):.3f} s)")  # fmt: skip
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"ours is {statistics.median(ratios):.2f} times as fast (median of {len(ratios)} pairs)")


def our_step(unet: DenoiserUNet, x0: torch.Tensor) -> Callable[[], None]:
    schedule = NoiseSchedule()
    ema = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-4)

    def step() -> None:
        noise, t = torch.randn_like(x0), torch.randint(schedule.num_train_timesteps, (len(x0),))
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(schedule.add_noise(x0, noise, t), t)
        F.mse_loss(prediction.float(), schedule.target(x0, noise, t)).backward()
        _finish(unet, optimizer)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1e-4)

    return step


def their_step(unet: nn.Module, x0: torch.Tensor) -> Callable[[], None]:
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-4)

    def step() -> None:
        noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),))
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(scheduler.add_noise(x0, noise, t), t).sample
        F.mse_loss(prediction.float(), noise).backward()
        _finish(unet, optimizer)

    return step


def _finish(unet: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()
