"""How well do the recipes of the ISBI 2012 challenge segment membranes after half an hour on this machine?

    python benchmarks/isbi2012.py --root DIR --minutes 30

DIR holds train/image and train/label with slices 00 to 23: the last six are tested on, and never trained on or chosen
by. Contenders, each trained by `unet-diffusion fit` in a process of its own:

    paper     configs/isbi2012_unet.yaml: the network, border weights, deformations and optimiser of the paper
    modern    configs/isbi2012_modern.yaml
    port      what most ports of the U-Net are: the paper's widths, padded, with batch norm; plain cross-entropy, Adam,
              flips and rotations by quarters only

How many steps fit follows from two short runs. Tested with the average over the eight rotated and mirrored views of a
slice, and without. A result is kept as soon as it is there, and a run that was cut off continues.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from measure import RESULTS, environment, table, write_json

from unet_diffusion.checkpoint import read_segmenter
from unet_diffusion.data import PairedFiles
from unet_diffusion.data.base import to_float
from unet_diffusion.segmentation.predict import class_probabilities
from unet_diffusion.segmentation.scores import membrane_scores
from unet_diffusion.speed import keep_freed_memory

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NUM_TEST = 6  # slices, the last
CELL = 1  # class
PORT = [  # beside isbi2012_modern.yaml
    "--model.unet.init_args.channels=[64,128,256,512,1024]",
    "--model.loss=cross_entropy",
    "--model.ema_decay=0",
    "--data.init_args.targets.border_weight=0",
    "--data.init_args.augmentation={flip: true, rotation: 0.0, scale: 0.0, elastic_sd: 0.0}",
]
CONTENDERS = {
    "paper": (CONFIGS / "isbi2012_unet.yaml", []),
    "modern": (CONFIGS / "isbi2012_modern.yaml", []),
    "port": (CONFIGS / "isbi2012_modern.yaml", PORT),
}


def main() -> None:
    options = parsed()
    results = json.loads(options.json.read_text())["results"] if options.json.exists() else []
    for name in options.contenders:
        for seed in options.seeds:
            done = {(one["contender"], one["minutes"], one["seed"]) for one in results}
            if (name, options.minutes, seed) not in done:
                print(f"{name}, {options.minutes:g} minutes, seed {seed}", flush=True)
                results += measured(options, name, seed)
                write_json(options.json, {"environment": environment(), "results": results})
    print(table(results))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds train/image and train/label")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, from the start of the process")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--options", nargs="*", default=[], help="of fit, such as --trainer.accelerator=cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/isbi2012"), help="for runs and logs")
    parser.add_argument("--json", type=Path, default=RESULTS / "isbi2012.json")
    return parser.parse_args()


def measured(options: argparse.Namespace, name: str, seed: int) -> list[dict]:
    """The scores of a contender, one result with views and one without."""
    num_steps = steps_that_fit(options, name, seed)
    run = options.work / f"{name}_{options.minutes:g}_{seed}"
    seconds = fit(options, name, seed, num_steps, run)
    shared = {"contender": name, "minutes": options.minutes, "seed": seed, "steps": num_steps, "seconds": seconds}
    return [{**shared, "views": views, **tested(options.root, run, views=views)} for views in (False, True)]


def steps_that_fit(options: argparse.Namespace, name: str, seed: int) -> int:
    """From two short runs: what starting costs, and a step."""
    short, long = 4, 12
    taken = []
    for steps in (short, long):
        run = options.work / f"calibration_{name}_{steps}"
        taken.append(fit(options, name, seed, steps, run, again=True))
    pace = (taken[1] - taken[0]) / (long - short)
    start = taken[0] - short * pace
    print(f"  start {start:.1f} s, step {pace:.2f} s", flush=True)
    return max(int((60 * options.minutes - start) / pace), 1)


def fit(options: argparse.Namespace, name: str, seed: int, num_steps: int, run: Path, *, again: bool = False) -> float:
    """Seconds that training took, from the start of the process to its end; a run that is finished is not repeated."""
    record = run / "seconds.json"
    if record.exists() and not again:
        return json.loads(record.read_text())
    if run.exists():
        shutil.rmtree(run)
    config, more = CONTENDERS[name]
    folder = options.root.resolve() / "train"
    arguments = [
        f"--config={config}",
        f"--data.init_args.source.init_args.images={folder / 'image'}",
        f"--data.init_args.source.init_args.labels={folder / 'label'}",
        f"--data.init_args.num_val={NUM_TEST}",
        f"--data.init_args.seed={seed}",
        f"--seed_everything={seed}",
        f"--trainer.max_steps={num_steps}",
        f"--trainer.val_check_interval={num_steps}",
        "--samples.every_n_steps=0",
        f"--checkpoint.every_n_train_steps={num_steps}",
        f"--trainer.default_root_dir={run}",
        *more,
        *options.options,
    ]
    run.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(run.with_suffix(".log"), "w") as log:
        command = [sys.executable, "-m", "unet_diffusion.cli", "fit", *arguments]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - start
    record.write_text(json.dumps(seconds))
    return seconds


def tested(root: Path, run: Path, *, views: bool) -> dict[str, float]:
    """The mean scores over the test slices."""
    keep_freed_memory()
    trained = read_segmenter(run)
    loaded = PairedFiles(root / "train" / "image", root / "train" / "label").load(progress=False)
    scores, seconds = [], 0.0
    for image, labels in zip(loaded.images[-NUM_TEST:], loaded.labels[-NUM_TEST:], strict=True):
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            probabilities = class_probabilities(trained, to_float(image, stretch=trained.stretch), views=views)
        seconds += time.perf_counter() - start
        scores.append(asdict(membrane_scores(labels > 0, probabilities[CELL].numpy())))
    means = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    return {**means, "seconds_a_slice": seconds / NUM_TEST}


if __name__ == "__main__":
    main()
