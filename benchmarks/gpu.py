"""Training steps, `fit` and sampling on a GPU, ours beside the peers': compiled side by side, then timed by turns.

    python benchmarks/gpu.py --minutes 3

What train_step.py and sample.py measure, in a time that is given. Each contender has a process of its own. They are
made ready at the same time, the first of the list with the most right to the processor, for compiling takes minutes and
hardly needs the GPU. Then, with the others gone, each in turn has the machine alone, three times. Those not ready
by then are left out, and it is said. First calls therefore count compiling on a machine that is shared.

Steps are as in train_step.py, with cuDNN's convolutions chosen by trial for all. Ours is graphed, or as the case says;
diffusers_graphed is the tuned one with torch.compile's mode "reduce-overhead". Trajectories are asserted to be those of
diffusers first. TFLOP/s is beside what a matrix product and a convolution reach here in bfloat16. Peak memory is what
PyTorch took from the GPU at most in a step, with what it does not use at the moment.

fit is the whole program with the network of ours, on random images in memory, stopped after an optimiser step wherever
the others wait; its rate is beside that of our bare step of the same size. Within a turn it logs once, but draws no
samples, does not validate and saves nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import (
    Step,
    describe,
    environment,
    host_synchronisations,
    peaks,
    seconds,
    table,
    times_as_fast,
    write_json,
)

CASES = (  # TASK:NETWORK:BATCH_SIZE:CONTENDER[:SPEED], those first that should be ready first
    "train:cifar10:128:unet_diffusion",
    "train:cifar10:128:diffusers_tuned",
    "train:cifar10:512:unet_diffusion",
    "train:cifar10:512:diffusers_tuned",
    "fit:cifar10:128:unet_diffusion",
    "sample:cifar10:64:unet_diffusion",
    "sample:cifar10:64:diffusers_tuned",
    "sample:cifar10:1:unet_diffusion",
    "sample:cifar10:1:diffusers_graphed",
    "train:cifar10:128:diffusers",
    "train:cifar10:128:ddpm_pytorch",
    "sample:cifar10:64:diffusers",
    "sample:cifar10:1:diffusers",
)
OURS = "unet_diffusion"
PROFILED = (OURS, "diffusers_tuned")  # in training
TURNS = 3
STEPS = 10  # a turn, of training
FIT_STEPS = 100  # a turn; logs are written as often
WARM_UP = 3  # calls, after the first; a graph is captured in the second and replayed from the third
SECONDS_A_TURN = 1.0  # of a contender, about, to know when to stop waiting
MAX_ANSWER_SECONDS = 30
COMPILE_THREADS = "4"  # of each process, as there are many

CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_ddpm.yaml"  # of fit; the network and its images are replaced

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What a process measures.

    Args:
        task: "train", "fit" or "sample".
        network: one of peers.NETWORKS.
        batch_size: images at once.
        contender: name of it.
        speed: of ours; fit may be given "auto".
    """

    task: str
    network: str
    batch_size: int
    contender: str
    speed: str

    @property
    def name(self) -> str:
        suffix = f"_{self.speed}" if self.contender == OURS else ""
        return f"{self.task}-{self.network}-{self.batch_size}-{self.contender}{suffix}"


def main() -> None:
    options = parse_options()
    if options.case:
        contend(Case(**json.loads(options.case)), Path(options.folder), options)
        return
    machine = environment()
    print(describe(machine), flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        records = measure([parse_case(text, options.ours) for text in options.cases], Path(folder), options)
    ceilings = {} if options.device.type == "cpu" else peaks(options.device)
    for record in records:
        add_ratios(record, records, options.ours)
    report = {"environment": machine, "device": options.device.type, "peaks": ceilings, "contenders": records}
    print(f"written: {write_json(options.output or 'gpu', report)}")
    for task in ("train", "fit", "sample"):
        rows = [row(record, ceilings) for record in records if record["task"] == task and "seconds" in record]
        if rows:
            print(table(rows))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", default=CASES, help="TASK:NETWORK:BATCH_SIZE:CONTENDER[:SPEED]; default: %(default)s")
    add(
        "--ours",
        default="graphed" if torch.cuda.is_available() else "plain",
        help="speed of ours, unless the case says it",
    )
    add("--minutes", type=float, default=10, help="for compiling and timing")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--profile", action="store_true", help="write the kernels of training steps beside the output")
    add("--output", help="JSON file; default: benchmarks/results/gpu.json")
    add("--case", help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def parse_case(text: str, speed: str) -> Case:
    task, network, batch_size, contender, *speeds = text.split(":")
    return Case(task, network, int(batch_size), contender, speeds[0] if speeds else speed)


# ---------------------------------------------------------------------------------------------- the process of a case


def contend(case: Case, folder: Path, options: argparse.Namespace) -> None:
    """Makes a contender ready, says so, and measures when it is told to."""
    try:
        if case.task == "fit":
            fit(case, folder, options)
            return
        steps = {"train": training, "sample": drawing}[case.task](case, options)
        first = {}
        for name, step in steps.items():
            first[name] = seconds(step)
            for _ in range(WARM_UP):
                step()
        say_ready(case, folder)
        for turn in range(TURNS):
            wait_for(folder / f"{case.name}.turn{turn}")
            records = [measured(step, case, turn, {"key": name, "first": first[name]}) for name, step in steps.items()]
            write_whole(folder / f"{case.name}.result{turn}", json.dumps(records))
        if options.profile and case.task == "train" and case.contender in PROFILED:
            wait_for(folder / f"{case.name}.profile")
            write_whole(folder / f"{case.name}.kernels", kernels(next(iter(steps.values()))))
    except Exception:
        (folder / f"{case.name}.failed").write_text(traceback.format_exc())
        raise


def training(case: Case, options: argparse.Namespace) -> dict[str, Step]:
    from train_step import build_step

    torch.backends.cudnn.benchmark = True
    settings = argparse.Namespace(
        network=case.network, batch_size=case.batch_size, device=options.device, ours=case.speed
    )
    return {"step": build_step(case.contender, settings)}


def fit(case: Case, folder: Path, options: argparse.Namespace) -> None:
    """Runs the program, whose optimiser steps wait for the turns."""
    from peers import NETWORKS

    from unet_diffusion.commands.main import main as unet_diffusion
    from unet_diffusion.training.module import DiffusionModule

    network = NETWORKS[case.network]
    unet = {"class_path": "unet_diffusion.models.denoiser_unet.DenoiserUNet", "init_args": network.build().config}
    source = {"class_path": "ours.RandomImages", "init_args": {"image_shape": network.image_shape}}
    images = {"source": source, "batch_size": case.batch_size, "horizontal_flip": True}
    data = {"class_path": "unet_diffusion.data.ImageDataModule", "init_args": images}
    settings = {
        "model.unet": unet, "model.speed": case.speed, "data": data, "trainer.default_root_dir": folder / case.name,
        "trainer.accelerator": "cpu" if options.device.type == "cpu" else "gpu", "trainer.log_every_n_steps": FIT_STEPS
    }  # fmt: skip
    arguments = ["--allow=ours"] + [
        f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in settings.items()
    ]
    turns = turns_of_fit(case, folder)
    optimizer_step = DiffusionModule.optimizer_step

    def waiting(self: DiffusionModule, *args: Any, **kwargs: Any) -> None:
        optimizer_step(self, *args, **kwargs)
        turns.send(self.chosen_speed)

    DiffusionModule.optimizer_step = waiting
    next(turns)
    status = unet_diffusion(["fit", "--config", str(CONFIG), *arguments])
    raise RuntimeError(f"fit must go on until it is ended, but ended with status {status}")


def turns_of_fit(case: Case, folder: Path) -> Generator[None, str, None]:
    """Sent the speed that was chosen after each optimiser step; measures when it is told to, and never ends."""
    start = time.perf_counter()
    chosen = yield
    first = time.perf_counter() - start
    for _ in range(WARM_UP):
        yield
    say_ready(case, folder)
    for turn in range(TURNS):
        wait_for(folder / f"{case.name}.turn{turn}")
        reset_peak_memory()
        yield  # the clocks go up
        timer = Timer()
        for _ in range(FIT_STEPS):
            yield
        record = {"key": "step", "first": first, "chosen": chosen, **timer.record(FIT_STEPS)}
        write_whole(folder / f"{case.name}.result{turn}", json.dumps([record]))
    wait_for(folder / f"{case.name}.end")  # until the process is ended


def drawing(case: Case, options: argparse.Namespace) -> dict[str, Step]:
    from sample import CONTENDERS, SCHEDULERS, assert_equal_trajectories

    if case.contender == "diffusers":  # the one that compiles nothing
        for name, num in SCHEDULERS.items():
            settings = argparse.Namespace(network=case.network, device=options.device, ours="plain")
            print(f"{name}: ours and diffusers' differ by {assert_equal_trajectories(name, num, settings):.1e}")
    settings = argparse.Namespace(network=case.network, device=options.device, ours=case.speed)
    make_network, make_step = CONTENDERS[case.contender]
    network = make_network(settings)
    return {name: make_step(network, name, num, case.batch_size, settings) for name, num in SCHEDULERS.items()}


def measured(step: Step, case: Case, turn: int, record: Record) -> Record:
    """Seconds a call; in the first turn memory and waits too."""
    count = STEPS if case.task == "train" else 1
    if torch.cuda.is_initialized() and turn == 0:
        reset_peak_memory()
        record["host_synchronisations"] = host_synchronisations(step)
    elif case.task == "train":
        step()  # the clocks go up
    timer = Timer()
    for _ in range(count):
        step()
    return {**record, **timer.record(count)}


class Timer:
    """Of calls that begin when it is made."""

    def __init__(self) -> None:
        synchronize()
        self.start = time.perf_counter()

    def record(self, num_calls: int) -> Record:
        """Seconds a call until the GPU was ready, and until the host was; most memory since the peak was reset."""
        host_seconds = time.perf_counter() - self.start
        synchronize()
        taken = time.perf_counter() - self.start
        # what graphs hold does not count as allocated
        peak = torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_initialized() else None
        return {"seconds": taken / num_calls, "host_seconds": host_seconds / num_calls, "peak_mib": peak}


def say_ready(case: Case, folder: Path) -> None:
    synchronize()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # of the first calls, which tried convolutions; others may need it
    write_whole(folder / f"{case.name}.ready", "")


def reset_peak_memory() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def kernels(step: Step, num_steps: int = 2) -> str:
    """Time of each kernel of the step on the GPU, the longest first."""
    on_gpu = torch.cuda.is_initialized()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        seconds(step, num_steps)
    rows = sorted(profiler.key_averages(), key=lambda one: -one.self_device_time_total)
    total = max(sum(one.self_device_time_total for one in rows), 1)
    lines = [f"{total / num_steps:.0f} us a step in {sum(one.count for one in rows) // num_steps} kernels and copies"]
    lines += [
        f"{one.self_device_time_total / num_steps:9.0f} us {one.self_device_time_total / total:6.1%} "
        f"{one.count // num_steps:5d} x {one.key[:140]}"
        for one in rows[:50]
    ]
    return "\n".join(lines) + "\n"


def write_whole(path: Path, text: str) -> None:
    """So that who waits for the file never reads a part of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.rename(path)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------- all the processes


def measure(to_measure: list[Case], folder: Path, options: argparse.Namespace) -> list[Record]:
    """What is reported of each case and, of sampling, scheduler."""
    end = time.monotonic() + 60 * options.minutes
    environ = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": COMPILE_THREADS
    }  # fmt: skip
    processes = {}
    for place, case in enumerate(to_measure):
        command = ["nice", "-n", str(min(place, 19)), sys.executable, *sys.argv]
        command += ["--case", json.dumps(vars(case)), "--folder", str(folder)]
        log = (folder / f"{case.name}.log").open("w")
        processes[case] = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT)
    for case in to_measure:
        if case.task == "train":
            forward_flops(architecture(case.contender), case.network)  # while they compile
    ready = ready_cases(processes, folder, end - SECONDS_A_TURN * TURNS * len(to_measure))
    for case, process in processes.items():
        if case not in ready:
            end_process(process)
    print("timing", flush=True)
    records: dict[Case, list[Record]] = {case: [] for case in to_measure}
    for turn in range(TURNS):
        for case in ready:
            text = answer(folder, f"{case.name}.turn{turn}", f"{case.name}.result{turn}", processes[case])
            merge(records[case], json.loads(text or "[]"))
        raw = {case.name: found for case, found in records.items()}
        write_json(options.output or "gpu", {"turns": turn + 1, "raw": raw})  # in case that it is cut off
    profiled = [case for case in ready if case.task == "train" and case.contender in PROFILED]
    for case in profiled if options.profile else ():
        if time.monotonic() > end:
            break
        text = answer(folder, f"{case.name}.profile", f"{case.name}.kernels", processes[case])
        Path(options.output or "gpu.json").with_name(f"{case.name}.txt").write_text(text or "none\n")
    for process in processes.values():
        end_process(process)
    return [record for case in to_measure for record in reported(case, records[case], folder)]


def ready_cases(processes: dict[Case, subprocess.Popen[bytes]], folder: Path, until: float) -> list[Case]:
    """Those that are ready by then, or when none is left that could be."""
    start, said = time.monotonic(), set()
    while True:
        ready = [case for case in processes if (folder / f"{case.name}.ready").exists()]
        for case in set(ready) - said:
            print(f"{case.name}: ready after {time.monotonic() - start:.0f} s", flush=True)
        said |= set(ready)
        running = [case for case, process in processes.items() if case not in ready and process.poll() is None]
        if not running or time.monotonic() > until:
            return ready
        time.sleep(0.1)


def answer(folder: Path, question: str, wanted: str, process: subprocess.Popen[bytes]) -> str | None:
    """What a process writes when it is asked; None if it ends or takes too long."""
    (folder / question).touch()
    until = time.monotonic() + MAX_ANSWER_SECONDS
    while True:
        is_last = process.poll() is not None or time.monotonic() > until
        if (folder / wanted).exists():
            return (folder / wanted).read_text()
        if is_last:
            return None
        time.sleep(0.01)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started: compiling goes on in processes of its own."""
    if process.poll() is None:
        family = psutil.Process(process.pid)
        for one in [*family.children(recursive=True), family]:
            one.kill()
        process.wait()


def merge(records: list[Record], turn: list[Record]) -> None:
    """Adds the seconds of a turn to what was measured in the first."""
    if not records:
        records += [{**one, "seconds": []} for one in turn]
    for record, one in zip(records, turn, strict=True):
        record["seconds"].append(one["seconds"])


# ----------------------------------------------------------------------------------------------------------- the report


def reported(case: Case, records: list[Record], folder: Path) -> list[Record]:
    """A record for each step of a case, or one that says why there is none."""
    failed = folder / f"{case.name}.failed"
    if failed.exists() and not records:
        print(f"{case.name} failed: {failed.read_text()[-500:]}", flush=True)
        return [{**vars(case), "failed": failed.read_text().strip().splitlines()[-1]}]
    if not records:
        print(f"{case.name} was not ready in time", flush=True)
        return [{**vars(case), "failed": "not ready in time"}]
    return [
        {**vars(case), **record, "images_per_second": [case.batch_size / taken for taken in record["seconds"]]}
        for record in records
    ]


def add_ratios(record: Record, records: list[Record], speed: str) -> None:
    """How many times as fast ours was, and the operations that the network asked for; of fit, its share."""
    if "seconds" not in record:
        return
    if record["task"] == "fit":
        bare = {"task": "train", "contender": OURS, "speed": record["chosen"]}
        bare |= {name: record[name] for name in ("network", "batch_size", "key")}
        found = [one for one in records if all(one.get(name) == value for name, value in bare.items())]
        share = times_as_fast(record["seconds"], found[0]["seconds"]) if found else None
        record["of_the_bare_step"] = share
        return
    same = ("task", "network", "batch_size", "key")
    ours = [
        one for one in records if one["contender"] == OURS and one["speed"] == speed
        and all(one.get(name) == record[name] for name in same)
    ]  # fmt: skip
    record["ours_times_as_fast"] = times_as_fast(ours[0]["seconds"], record["seconds"]) if ours else None
    if record["task"] == "train":
        flops = 3 * forward_flops(architecture(record["contender"]), record["network"])
        record["tflops"] = flops * statistics.median(record["images_per_second"]) / 1e12


def architecture(contender: str) -> str:
    """A contender whose network has as many operations: those of diffusers have our network."""
    return OURS if contender.startswith("diffusers") else contender


@cache
def forward_flops(contender: str, network: str) -> int:
    from train_step import size

    return size(contender, network)["forward_flops"]


def row(record: Record, ceilings: dict[str, float]) -> dict[str, object]:
    rates, ratio, peak = record["images_per_second"], record.get("ours_times_as_fast"), record["peak_mib"]
    described = {
        "batch": f"{record['network']} {record['batch_size']}",
        "contender": record["contender"] + (f" {record['speed']}" if record["contender"] == OURS else ""),
        "what": record["key"],
        "images/s (lowest to highest)": f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})",
        "ours is so many times as fast": None if ratio is None else f"{ratio:.2f}",
        "ms": f"{1000 * statistics.median(record['seconds']):.2f}",
        "ms of the host": f"{1000 * record['host_seconds']:.2f}",
        "peak memory, MiB": None if peak is None else f"{peak:.0f}",
        "host waits": record.get("host_synchronisations"),
        "first call, s": f"{record['first']:.1f}",
    }
    if record["task"] == "fit":
        share = record["of_the_bare_step"]
        described |= {"speed": record["chosen"], "of the bare step": None if share is None else f"{share:.1%}"}
    if record["task"] == "train" and ceilings:
        for name in ("product", "convolution"):
            described[f"of a {name}"] = f"{record['tflops'] / ceilings[f'{name} bfloat16 training']:.0%}"
    return described


if __name__ == "__main__":
    main()
