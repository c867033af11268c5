"""Training steps of the same size beside diffusers and denoising-diffusion-pytorch, each as shipped and tuned.

    python benchmarks/train_step.py --network cifar10

A step is noise, forward, loss, backward, clipping, optimiser and EMA. diffusers' network has our weights, and equality
is asserted first; denoising-diffusion-pytorch's has about as many parameters and its own operations. What "as shipped"
and "tuned" mean stands in peers.py. Contenders take turns in blocks, and ratios are medians of pairs in a round.

TFLOP/s counts what the network asks for, whatever the kernels do, beside what one matrix product and one convolution
reach here in the fastest precision that the hardware has, forward and backward. The first step includes making the
network, and compilation from an empty cache (ours is tried at several speeds before, which compiles its kernels, unless
--ours names one). Memory is measured for each contender in a process of its own.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from measure import (
    Step,
    alternate,
    describe,
    empty_caches,
    environment,
    forward_flops,
    host_synchronisations,
    peak_memory,
    peak_memory_apart,
    peaks,
    seconds,
    table,
    times_as_fast,
    write_json,
)
from ours import our_step, setting_for
from peers import (
    NETWORKS,
    assert_equal_networks,
    ddpm_pytorch_network,
    ddpm_pytorch_step,
    diffusers_network,
    diffusers_step,
    num_parameters,
    our_network,
    random_images,
    tuned_ddpm_pytorch_step,
    tuned_diffusers_step,
)

from unet_diffusion.models.speed import SPEEDS
from unet_diffusion.runtime.precision import precisions_for

OURS = "unet_diffusion"
PEERS = {
    "diffusers": (diffusers_network, diffusers_step),
    "diffusers_tuned": (diffusers_network, tuned_diffusers_step),
    "diffusers_graphed": (diffusers_network, partial(tuned_diffusers_step, mode="reduce-overhead")),
    "ddpm_pytorch": (ddpm_pytorch_network, ddpm_pytorch_step),
    "ddpm_pytorch_tuned": (ddpm_pytorch_network, tuned_ddpm_pytorch_step),
}
CUDA_BATCH_SIZE = 128

Record = dict[str, Any]


def main() -> None:
    options = parse_options()
    if options.memory_of:
        print(peak_memory(lambda: build_step(options.memory_of, options)))
        return
    machine = environment()
    print(describe(machine))
    difference = assert_equal_networks(options.network)
    print(f"{options.network}: our output and diffusers' differ by {difference:.1e} of the largest, in float32")
    with empty_caches():
        images = random_images(options.network, options.batch_size, options.device)
        options.ours = options.ours or setting_for(our_network(options.network), images)[0]
        ceilings = peaks(options.device)
        records = measure_contenders(options)
    for name, record in records.items():
        millions, gflops = record["parameters"] / 1e6, record["forward_flops"] / 1e9
        print(f"{name}: {millions:.2f} M parameters, {gflops:.3f} GFLOP forward")
    print(table([row(name, records, ceilings) for name in records]))
    settings = {name: getattr(options, name) for name in ("network", "batch_size", "blocks", "steps", "ours")}
    report = {"environment": machine, "device": options.device.type, "settings": settings, "peaks": ceilings}
    path = write_json(options.output or f"train_step_{options.network}", {**report, "contenders": records})
    print(f"written: {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="cifar10", help="sd1 wants a GPU; tiny only tries the program")
    add(
        "--contenders",
        nargs="+",
        choices=[OURS, *PEERS],
        default=installed_contenders(),
        help="default: without graphs",
    )
    add("--ours", choices=SPEEDS, help="speed of ours; default: the one that fit would choose")
    add("--batch_size", type=int, help=f"default: {CUDA_BATCH_SIZE} on a GPU; 16 for cifar10, 64 for small, medium")
    add("--blocks", type=int, default=5, help="timed blocks of each contender")
    add("--steps", type=int, default=4, help="steps a block")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no_memory", action="store_true", help="leave out memory: it compiles every compiled contender once more")
    add("--output", help="JSON file; default: benchmarks/results/train_step_NETWORK.json")
    add("--memory_of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = options.device.type == "cuda"
    options.batch_size = options.batch_size or (CUDA_BATCH_SIZE if on_gpu else NETWORKS[options.network].batch_size)
    return options


def installed_contenders() -> list[str]:
    with_ddpm_pytorch = find_spec("denoising_diffusion_pytorch") is not None
    ready = ["diffusers", "diffusers_tuned", *(["ddpm_pytorch", "ddpm_pytorch_tuned"] if with_ddpm_pytorch else [])]
    return [OURS, *ready]


def build_step(name: str, options: argparse.Namespace) -> Step:
    x0 = random_images(options.network, options.batch_size, options.device)
    make_network = our_network if name == OURS else PEERS[name][0]
    with options.device:  # where a large network is initialised soonest
        network = make_network(options.network)
    dtype = precisions_for(options.device)[-1]  # as the tuned peers
    return our_step(network, x0, speed=options.ours, dtype=dtype) if name == OURS else PEERS[name][1](network, x0)


def measure_contenders(options: argparse.Namespace) -> dict[str, Record]:
    """What is reported of each contender, by name."""
    records: dict[str, Record] = {name: size(name, options.network) for name in options.contenders}
    steps = {}
    for name in options.contenders:
        start = time.perf_counter()
        steps[name] = build_step(name, options)
        seconds(steps[name])
        records[name]["first_step_seconds"] = time.perf_counter() - start
        print(f"{name}: first step after {records[name]['first_step_seconds']:.1f} s", flush=True)
    times = alternate(steps, options.blocks, options.steps, warm_up=2)
    for name, record in records.items():
        record["seconds_per_step"] = times[name]
        record["images_per_second"] = [options.batch_size / taken for taken in times[name]]
        record["tflops"] = 3 * record["forward_flops"] * statistics.median(record["images_per_second"]) / 1e12
        record["ours_times_as_fast"] = times_as_fast(times[OURS], times[name]) if OURS in times else None
        record["host_synchronisations"] = host_synchronisations(steps[name])
        record["peak_mib"] = None if options.no_memory else peak_memory_apart(name, "--ours", options.ours)
    return records


def size(name: str, network: str) -> Record:
    """Parameters and operations, counted on the plain network in float32."""
    channels, height, width = NETWORKS[network].image_shape
    unet = our_network(network) if name == OURS else PEERS[name][0](network)
    flops = forward_flops(unet.eval(), torch.zeros(1, channels, height, width), torch.zeros(1))
    return {"parameters": num_parameters(unet), "forward_flops": flops}


def row(name: str, records: dict[str, Record], ceilings: dict[str, float]) -> dict[str, str | None]:
    record = records[name]
    ratio, memory = record["ours_times_as_fast"], record["peak_mib"]

    def ceiling(operation: str) -> float:
        return [tflops for key, tflops in ceilings.items() if key.startswith(operation) and "training" in key][-1]

    return {
        "contender": name,
        "images/s (lowest to highest block)": spread(record["images_per_second"]),
        "ours is so many times as fast": None if ratio is None else f"{ratio:.2f}",
        "TFLOP/s": f"{record['tflops']:.3f}",
        "of a matrix product": f"{record['tflops'] / ceiling('product'):.0%}",
        "of a convolution": f"{record['tflops'] / ceiling('convolution'):.0%}",
        "first step, s": f"{record['first_step_seconds']:.1f}",
        "peak memory, MiB": None if memory is None else f"{memory:.0f}",
        "host waits a step": record["host_synchronisations"],
    }


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
