"""What the whole `unet-diffusion fit` reaches: its start, its steps, and their share of the bare training step.

    python benchmarks/fit.py --config fashion_mnist --data.root DIR
    python benchmarks/fit.py --start_only

Arguments after the configuration go to fit. The time of each optimiser step is recorded in a run of the program itself,
in a temporary folder. "Over the run" is from the end of the first step to that of the last, with validation, grids,
logs and checkpoints between; the median step is without them. The bare step is that of ours.py, on network and batch
size of the run, timed before and after it; its share is what the program leaves of it. Speed and precision are chosen
here as auto chooses them for a long run, and both run at those.

A start is from the start of the process to the end of the first step, with an empty compiler cache and a filled one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import Step, alternate, describe, empty_caches, environment, table, write_json
from ours import our_step, setting_for
from step_times import STEPS

from unet_diffusion.inference.reading import read_denoiser
from unet_diffusion.training.precision import NAMES

# a run that ends soon after its first step
ONE_STEP = ["--trainer.max_steps", "1", "--samples.num_images", "1", "--samples.num_inference_steps", "2"]

Record = dict[str, Any]


def main() -> None:
    options, overrides = parse_options()
    arguments = ["--config", options.config, *overrides]
    machine = environment()
    print(describe(machine), flush=True)
    with empty_caches(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        measure = measure_starts if options.start_only else measure_run
        record = measure(arguments, folder, options)
    print(table([{"measured": name, "value": text} for name, text in summary(record).items()]))
    name = f"fit_{'start_' if options.start_only else ''}{Path(options.config).stem}"
    report = {"environment": machine, "config": Path(options.config).name, **record}
    print(f"written: {write_json(options.output or name, report)}")


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", default="digits", help="of fit; default: digits")
    add("--start_only", action="store_true", help="measure only the start, several times")
    add("--repeats", type=int, default=5, help="starts with a filled cache")
    add("--blocks", type=int, default=5, help="timed blocks of the bare step, before the run and after it")
    add("--steps", type=int, default=4, help="steps a block")
    add("--output", help="JSON file; default: benchmarks/results/fit_CONFIG.json or fit_start_CONFIG.json")
    return parser.parse_known_args()


# ------------------------------------------------------------------------------------------------------------ the runs


def fit_apart(arguments: list[str], folder: str) -> tuple[Path, Record]:
    """The run folder of fit in a process of its own, and its times in seconds."""
    run = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "unet_diffusion", "fit", *arguments, "--trainer.default_root_dir", str(run)]
    command += ["--allow=step_times", "--trainer.callbacks+=step_times.StepTimes"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    start = time.time()
    subprocess.run(command, check=True, env=environment)
    whole = time.time() - start
    times = json.loads((run / STEPS).read_text())
    steps = [after - before for before, after in pairwise(times)]
    return run, {"whole_seconds": whole, "start_seconds": times[0] - start, "step_seconds": steps}


def measure_starts(arguments: list[str], folder: str, options: argparse.Namespace) -> Record:
    starts = [fit_apart([*arguments, *ONE_STEP], folder)[1]["start_seconds"] for _ in range(1 + options.repeats)]
    return {"first_start_seconds": starts[0], "start_seconds": starts[1:]}


def measure_run(arguments: list[str], folder: str, options: argparse.Namespace) -> Record:
    run, first = fit_apart([*arguments, *ONE_STEP], folder)  # leaves the network and settings for the bare step
    step, batch_size, setting = bare_step(run)
    before = alternate({"bare step": step}, options.blocks, options.steps, warm_up=3)["bare step"]
    _, whole = fit_apart([*arguments, *setting], folder)
    after = alternate({"bare step": step}, options.blocks, options.steps)["bare step"]
    return {
        "batch_size": batch_size,
        "setting": setting,
        "first_start_seconds": first["start_seconds"],
        "start_seconds": [whole["start_seconds"]],
        "whole_seconds": whole["whole_seconds"],
        "step_seconds": whole["step_seconds"],
        "bare_step_seconds": {"before": before, "after": after},
    }


def bare_step(run: Path) -> tuple[Step, int, list[str]]:
    """The training step alone, for network and batch size of a run; that size; and options for the same setting."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    on_gpu = torch.cuda.is_available() and config["trainer"]["accelerator"] != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    trained = read_denoiser(run / "checkpoints" / "last.ckpt")
    unet = trained.unet.to(device)
    batch_size, classes = config["data"]["init_args"]["batch_size"], unet.config["num_class_embeds"]
    x0 = torch.rand(batch_size, *trained.sample_shape, device=device) * 2 - 1
    labels = None if classes is None else torch.randint(classes, (batch_size,), device=device)
    speed, dtype = setting_for(unet, x0, labels)
    setting = ["--model.speed", speed, "--trainer.precision", NAMES[dtype]]
    return our_step(unet, x0, speed=speed, labels=labels, dtype=dtype), batch_size, setting


# ---------------------------------------------------------------------------------------------------------- the report


def summary(record: Record) -> dict[str, str]:
    starts = record["start_seconds"]
    lines = {
        "start with an empty cache": f"{record['first_start_seconds']:.1f} s",
        f"start with a filled cache, median of {len(starts)}": f"{statistics.median(starts):.1f} s",
    }
    if "step_seconds" not in record:
        return lines
    steps, bare = record["step_seconds"], record["bare_step_seconds"]
    mean, median = statistics.mean(steps), statistics.median(steps)
    bare_median = statistics.median(bare["before"] + bare["after"])
    return lines | {
        f"the whole program, {len(steps) + 1} steps": f"{record['whole_seconds']:.1f} s",
        "a step over the run": f"{mean:.4f} s, {record['batch_size'] / mean:.1f} images/s",
        "the median step": f"{median:.4f} s, {record['batch_size'] / median:.1f} images/s",
        "the bare step": f"{bare_median:.4f} s (before {statistics.median(bare['before']):.4f}, "
        f"after {statistics.median(bare['after']):.4f})",
        "share of the bare step's rate over the run": f"{bare_median / mean:.1%}",
        "share of the bare step's rate in the median step": f"{bare_median / median:.1%}",
    }


if __name__ == "__main__":
    main()
