"""Two processes against one on the same cores: images a second of `unet-diffusion fit` at the same global batch.

    python benchmarks/processes.py --config fashion_mnist --data.root DIR

Arguments after the configuration go to fit. One process uses all cores, two share them out, and they take turns. The
rate is that of the median optimiser step, so that it is without validation, grids and checkpoints. On a CPU this says
what DDP and its messages cost; on GPUs, where each process has its own, see scaling.py.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import yaml
from fit import fit_apart
from measure import describe, environment, table, write_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="configs/digits.yaml", help="of fit; default: configs/digits.yaml")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/processes.json")
    options, overrides = parser.parse_known_args()
    machine = environment()
    print(describe(machine), flush=True)
    batch_size = yaml.safe_load(Path(options.config).read_text())["data"]["init_args"]["batch_size"]
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for _ in range(options.repeats):
            for count, taken in rates.items():
                arguments = ["--config", options.config, *overrides, "--trainer.devices", str(count)]
                arguments += ["--trainer.accelerator", "cpu", "--model.speed", "plain"]
                arguments += ["--data.batch_size", str(batch_size // count)]
                arguments += ["--trainer.max_steps", str(options.steps), "--samples.every_n_steps", "0"]
                arguments += ["--trainer.strategy", "ddp"] if count > 1 else []
                _, times = fit_apart(arguments, folder)
                taken.append(batch_size / statistics.median(times["step_seconds"]))
                print(f"{count} processes: {taken[-1]:.1f} images/s", flush=True)
    ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))
    rows = [{"processes": count, "images/s": f"{statistics.median(taken):.1f} ({min(taken):.1f} to {max(taken):.1f})"}
            for count, taken in rates.items()]  # fmt: skip
    print(table(rows))
    print(f"two processes are {ratio:.2f} times as fast as one")
    report = {"environment": machine, "config": Path(options.config).name, "batch_size": batch_size}
    report |= {"images_per_second": rates, "ratio": ratio}
    print(f"written: {write_json(options.output or 'processes', report)}")


if __name__ == "__main__":
    main()
