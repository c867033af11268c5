"""Sampling beside diffusers: same weights, same noise, same scheduler, as shipped and tuned.

    python benchmarks/sample.py

First, our trajectory is asserted to be diffusers' own in float32: the loop of its pipelines, given the noise that our
images start from. Then both are timed from noise to images on the CPU. "As shipped" is float32 and eager; "tuned" is
channels_last, compilation and inference mode, and autocast to bfloat16 where that is in hardware; ours is
`unet_diffusion.diffusion.sampling.sample` at the chosen speed, under the same autocast.

With fewer --time_steps than the trajectory has, a shorter trajectory is timed, and the rate of the whole one follows
from the time a network step: batch size / (seconds a network step x steps of the whole).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from measure import (
    Step,
    alternate,
    describe,
    empty_caches,
    environment,
    fastest_autocast,
    seconds,
    table,
    times_as_fast,
    write_json,
)
from peers import NETWORKS, diffusers_network, our_network
from torch import Tensor

from unet_diffusion.diffusion.sampling import build_scheduler, image_generators, sample
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.speed import SPEEDS, keep_freed_memory, prepare_weights, set_speed
from unet_diffusion.runtime.precision import precisions_for

SCHEDULERS = {"DPMSolverMultistepScheduler": 20, "DDIMScheduler": 50, "UniPCMultistepScheduler": 10}  # steps of each
CPU_TIME_STEPS = 4
TOLERANCE = 1e-4  # relative to the largest value: 50 steps carry on the rounding of the network, some 1e-6
CHECKED_IMAGES = 2
OURS = "unet_diffusion"

# Networks without training diverge with epsilon-prediction, which starts by dividing their output by sqrt(a_T) = 0.006.
SCHEDULE = NoiseSchedule(prediction_type="v_prediction")

Record = dict[str, Any]


def main() -> None:
    options = parse_options()
    machine = environment()
    print(describe(machine))
    records = []
    with empty_caches():  # so that the first call includes compilation
        for scheduler in options.scheduler:
            steps = options.num_inference_steps or SCHEDULERS[scheduler]
            difference = assert_equal_trajectories(scheduler, steps, options)
            print(f"{scheduler}, {steps} steps: ours and diffusers' images differ by {difference:.1e} of the largest")
            for batch_size in options.batch_size:
                records += measure_contenders(scheduler, steps, batch_size, options)
    print(table([row(record) for record in records]))
    if any(record["timed_steps"] < record["steps"] for record in records):
        print("images/s are extrapolated to the whole trajectory, from the seconds a network step of a shorter one")
    settings = {name: getattr(options, name) for name in ("network", "blocks", "ours")}
    report = {"environment": machine, "device": options.device.type, "settings": settings, "contenders": records}
    print(f"written: {write_json(options.output or f'sample_{options.network}', report)}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="cifar10", help="sd1 wants a GPU; tiny only tries the program")
    add("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT_CONTENDERS, help="default: without graphs")
    add("--ours", choices=SPEEDS, help="speed of ours; default: graphed on a GPU, fused on a CPU")
    add("--scheduler", nargs="+", choices=SCHEDULERS, help="default: all on a GPU, DPM-Solver++ on a CPU")
    add("--num_inference_steps", type=int, help="default: 20 of DPM-Solver++, 50 of DDIM, 10 of UniPC")
    add("--time_steps", type=int, help=f"of the timed trajectory; default: all on a GPU, {CPU_TIME_STEPS} on a CPU")
    add("--batch_size", type=int, nargs="+", help="default: 1, 64 and 1024 on a GPU, 64 on a CPU")
    add("--blocks", type=int, default=3, help="timed trajectories of each contender")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", help="JSON file; default: benchmarks/results/sample_NETWORK.json")
    options = parser.parse_args()
    on_gpu = options.device.type == "cuda"
    options.ours = options.ours or ("graphed" if on_gpu else "fused")
    options.scheduler = options.scheduler or list(SCHEDULERS)[: None if on_gpu else 1]
    options.batch_size = options.batch_size or ([1, 64, 1024] if on_gpu else [64])
    options.time_steps = options.time_steps or (max(SCHEDULERS.values()) if on_gpu else CPU_TIME_STEPS)
    return options


# ---------------------------------------------------------------------------------------------------------- contenders


def our_images(unet: DenoiserUNet, scheduler: str, steps: int, batch_size: int, options: argparse.Namespace) -> Tensor:
    return sample(
        unet,
        SCHEDULE,
        (batch_size, *NETWORKS[options.network].image_shape),
        scheduler=scheduler,
        num_inference_steps=steps,
        batch_size=batch_size,
        device=options.device,
    )


@torch.no_grad()
def diffusers_images(unet: UNet2DModel, scheduler: str, steps: int, noise: Tensor) -> Tensor:
    """The loop of diffusers' DDPMPipeline and DDIMPipeline, with the settings of our schedulers."""
    solver = build_scheduler(SCHEDULE, scheduler)
    solver.set_timesteps(steps)
    x = noise * solver.init_noise_sigma
    for t in solver.timesteps:
        x = solver.step(unet(x, t).sample, t, x).prev_sample
    return x.cpu()


def our_drawing_network(options: argparse.Namespace) -> DenoiserUNet:
    """As the command runs it with --precision auto."""
    unet = our_network(options.network).eval().to(options.device)
    if options.device.type == "cpu":
        keep_freed_memory()  # it is the whole process's, so that diffusers gains too
    set_speed(unet, options.ours)
    prepare_weights(unet, precisions_for(options.device)[-1])
    return unet


def our_drawing(unet: DenoiserUNet, scheduler: str, steps: int, batch_size: int, options: argparse.Namespace) -> Step:
    autocast = fastest_autocast(options.device.type)
    return autocast(partial(our_images, unet, scheduler, steps, batch_size, options))


def diffusers_drawing(
    unet: UNet2DModel, scheduler: str, steps: int, batch_size: int, options: argparse.Namespace
) -> Step:
    return lambda: diffusers_images(unet, scheduler, steps, random_noise(batch_size, options))


def tuned_diffusers_network(options: argparse.Namespace, mode: str = "default") -> UNet2DModel:
    unet = diffusers_network(options.network).to(options.device, memory_format=torch.channels_last)
    unet.compile(mode=mode)
    return unet


def tuned_diffusers_drawing(
    unet: UNet2DModel, scheduler: str, steps: int, batch_size: int, options: argparse.Namespace
) -> Step:
    autocast = fastest_autocast(options.device.type)

    @torch.inference_mode()
    @autocast
    def images() -> Tensor:
        noise = random_noise(batch_size, options).to(memory_format=torch.channels_last)
        return diffusers_images(unet, scheduler, steps, noise)

    return images


# What makes a network ready, and a step of it that draws a batch.
CONTENDERS: dict[str, tuple[Callable[..., Any], Callable[..., Step]]] = {
    OURS: (our_drawing_network, our_drawing),
    "diffusers": (lambda options: diffusers_network(options.network).to(options.device), diffusers_drawing),
    "diffusers_tuned": (tuned_diffusers_network, tuned_diffusers_drawing),
    # as its documentation has it
    "diffusers_graphed": (partial(tuned_diffusers_network, mode="reduce-overhead"), tuned_diffusers_drawing),
}
DEFAULT_CONTENDERS = (OURS, "diffusers", "diffusers_tuned")  # CUDA graphs want a GPU


def random_noise(batch_size: int, options: argparse.Namespace) -> Tensor:
    return torch.randn(batch_size, *NETWORKS[options.network].image_shape, device=options.device)


# -------------------------------------------------------------------------------------------------- equality and times


def assert_equal_trajectories(scheduler: str, steps: int, options: argparse.Namespace) -> float:
    """The largest difference of our images and diffusers' from the same noise, relative to the largest value.

    Raises:
        AssertionError: if it is above TOLERANCE.
    """
    unet = our_network(options.network).eval().to(options.device)
    set_speed(unet, options.ours)
    shape = (CHECKED_IMAGES, *NETWORKS[options.network].image_shape)
    noise = randn_tensor(shape, generator=image_generators(0, range(CHECKED_IMAGES)), device=options.device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        ours = our_images(unet, scheduler, steps, CHECKED_IMAGES, options)
        theirs = diffusers_images(diffusers_network(options.network).to(options.device), scheduler, steps, noise)
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert difference < TOLERANCE, f"{scheduler}: our images and diffusers' differ by {difference:.1e} of the largest"
    return difference


def measure_contenders(scheduler: str, steps: int, batch_size: int, options: argparse.Namespace) -> list[Record]:
    timed_steps = min(options.time_steps, steps)
    torch.compiler.reset()  # else another batch size would be compiled for all sizes, and slower
    samplers, first = {}, {}
    for name in options.contenders:
        start = time.perf_counter()
        make_network, make_step = CONTENDERS[name]
        samplers[name] = make_step(make_network(options), scheduler, timed_steps, batch_size, options)
        seconds(samplers[name])
        first[name] = time.perf_counter() - start
        print(f"{scheduler}, batch {batch_size}, {name}: first call after {first[name]:.1f} s", flush=True)
    times = alternate(samplers, options.blocks, steps=1)
    return [
        {
            "contender": name,
            "scheduler": scheduler,
            "steps": steps,
            "timed_steps": timed_steps,
            "batch_size": batch_size,
            "first_call_seconds": first[name],
            "seconds_per_network_step": [taken / timed_steps for taken in times[name]],
            "images_per_second": [batch_size * timed_steps / (taken * steps) for taken in times[name]],
            "ours_times_as_fast": times_as_fast(times[OURS], times[name]) if OURS in times else None,
        }
        for name in options.contenders
    ]


def row(record: Record) -> dict[str, object]:
    ratio, rates = record["ours_times_as_fast"], record["images_per_second"]
    return {
        "scheduler": record["scheduler"],
        "steps (timed)": f"{record['steps']} ({record['timed_steps']})",
        "batch": record["batch_size"],
        "contender": record["contender"],
        "s a network step": f"{statistics.median(record['seconds_per_network_step']):.4f}",
        "images/s (lowest to highest)": f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})",
        "ours is so many times as fast": None if ratio is None else f"{ratio:.2f}",
        "first call, s": f"{record['first_call_seconds']:.1f}",
    }


if __name__ == "__main__":
    main()
