"""How well do the recipes of the ISBI 2012 challenge segment membranes after half an hour on this machine?

    python benchmarks/isbi2012.py --root DIR --minutes 30

DIR holds train/image and train/label with slices 00 to 23: the last six are tested on, and never trained on or chosen
by, but for the threshold below. Contenders, each trained by `unet-diffusion fit` in a process of its own:

    paper     configs/isbi2012_unet.yaml: the network, border weights, deformations and optimiser of the paper
    modern    configs/isbi2012_modern.yaml
    parts     the same without affinities: cells are the connected parts of the foreground, and borders have weights
    port      what most ports of the U-Net are: the paper's widths, padded, with batch norm; plain cross-entropy and
              flips only; otherwise as modern

How many steps fit follows from two short runs, once for all seeds. Scores but the pixel error are the best over nine
thresholds of the mean over the test slices, each score by itself, as in the challenge, whose own pixel error is there,
too. Scores of objects are those of the segments that the trained network makes, at the threshold and least size that
are fitted on two slices of the others, with thinned borders. Tested with the average over the eight rotated and
mirrored views of a slice, and without. A result is kept as soon as it is there, and a run that was cut off continues;
its seconds are not known.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import skimage
import torch
from measure import RESULTS, environment, fastest_autocast, process_seconds, table, write_json

from unet_diffusion.data import PairedFiles
from unet_diffusion.data.scaling import to_float
from unet_diffusion.inference.reading import read_segmenter
from unet_diffusion.models.speed import keep_freed_memory
from unet_diffusion.segmentation.scores import FOUR_CONNECTED, membrane_scores, thin_borders, v_info, v_rand

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NUM_TEST, NUM_FIT = 6, 2  # slices: the last, and of the others
CELL = 1  # class
AUGMENTATIONS_BUT_FLIPS = (
    "rotation",
    "scale",
    "elastic_sd",
    "brightness",
    "contrast",
    "noise",
    "colour",
    "shuffle",
    "inversion",
)
PARTS = [  # beside isbi2012_modern.yaml
    "--data.targets.affinities=false",
    "--data.targets.border_weight=5",
    "--model.unet.init_args.out_channels=2",
]
PORT = [
    "--data.targets.affinities=false",
    "--model.unet.init_args.out_channels=2",
    "--model.unet.init_args.norm=batch",
    "--model.unet.init_args.channels=[64,128,256,512,1024]",
    "--model.loss=cross_entropy",
    "--model.ema_decay=0",
    *(f"--data.augmentation.{name}=0" for name in AUGMENTATIONS_BUT_FLIPS),
]
CONTENDERS = {
    "paper": (CONFIGS / "isbi2012_unet.yaml", []),
    "modern": (CONFIGS / "isbi2012_modern.yaml", []),
    "parts": (CONFIGS / "isbi2012_modern.yaml", PARTS),
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
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further options are those of unet-diffusion fit, such as --trainer.max_steps=100.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--root", type=Path, required=True, help="folder that holds train/image and train/label")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, from the start of the process")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--speed", default="channels_last", help="of training")
    parser.add_argument("--calibration_steps", nargs=2, type=int, default=[5, 35], help="of the short runs")
    parser.add_argument("--work", type=Path, default=Path("runs/isbi2012"), help="for runs and logs")
    parser.add_argument("--json", type=Path, default=RESULTS / "isbi2012.json")
    options, options_of_fit = parser.parse_known_args()
    options.of_fit = options_of_fit
    return options


def measured(options: argparse.Namespace, name: str, seed: int) -> list[dict]:
    """The scores of a contender, one result with views and one without."""
    run = options.work / f"{name}_{options.minutes:g}_{seed}"
    record = run / "trained.json"
    if not record.exists():
        num_steps, is_continued = steps_that_fit(options, name), run.exists()
        seconds = fit(options, name, seed, num_steps, run)
        record.write_text(json.dumps({"steps": num_steps, "seconds": None if is_continued else round(seconds, 1)}))
    trained = json.loads(record.read_text())
    shared = {"contender": name, "minutes": options.minutes, "seed": seed, **trained}
    return [{**shared, "views": views, **tested(options.root, run, views=views)} for views in (False, True)]


def steps_that_fit(options: argparse.Namespace, name: str) -> int:
    """From two short runs, which are not repeated with the same options: what starting costs, and a step."""
    record, (short, long) = options.work / f"{name}_pace.json", options.calibration_steps
    settings = {"speed": options.speed, "calibration_steps": options.calibration_steps, "of_fit": options.of_fit}
    if not record.exists() or json.loads(record.read_text())["settings"] != settings:
        taken = []
        for steps in (short, long):
            run = options.work / f"calibration_{name}_{steps}"
            shutil.rmtree(run, ignore_errors=True)  # of a run that was cut off
            taken.append(fit(options, name, options.seeds[0], steps, run))
        pace = (taken[1] - taken[0]) / (long - short)
        record.write_text(json.dumps({"settings": settings, "start": taken[0] - short * pace, "step": pace}))
    seconds = json.loads(record.read_text())
    print(f"  start {seconds['start']:.1f} s, step {seconds['step']:.2f} s", flush=True)
    return max(int((60 * options.minutes - seconds["start"]) / seconds["step"]), 1)


def fit(options: argparse.Namespace, name: str, seed: int, num_steps: int, run: Path) -> float:
    """Seconds that training took, from the start of the process to its end; a run that was cut off continues."""
    config, more = CONTENDERS[name]
    folder = options.root.resolve() / "train"
    arguments = [
        f"--config={config}",
        f"--data.images={folder / 'image'}",
        f"--data.labels={folder / 'label'}",
        f"--data.num_val={NUM_TEST}",
        f"--data.seed={seed}",
        f"--seed_everything={seed}",
        f"--trainer.max_steps={num_steps}",
        f"--trainer.val_check_interval={num_steps}",  # fits the threshold
        f"--data.num_fit={NUM_FIT}",
        f"--model.speed={options.speed}",
        "--samples.every_n_steps=0",
        "--checkpoint.every_n_train_steps=100",
        f"--trainer.default_root_dir={run}",
        *more,
        *options.of_fit,
    ]
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "unet_diffusion", "fit", *arguments]
    return process_seconds(command, run.with_name(f"{run.name}.log"))


def tested(root: Path, run: Path, *, views: bool) -> dict[str, float]:
    """The scores of the test slices."""
    keep_freed_memory()
    trained = read_segmenter(run)
    loaded = PairedFiles(root / "train" / "image", root / "train" / "label").load(progress=False)
    truths, cells, objects, seconds = [], [], [], 0.0
    for image, labels in zip(loaded.images[-NUM_TEST:], loaded.labels[-NUM_TEST:], strict=True):
        start = time.perf_counter()
        with torch.inference_mode(), fastest_autocast():
            segmented = trained.segment(to_float(image, stretch=trained.stretch), views=views)
            segments = thin_borders(segmented.instances)
        seconds += time.perf_counter() - start
        truths.append(labels > 0)
        cells.append(segmented.probabilities[CELL])
        true_segments = skimage.measure.label(labels > 0, connectivity=FOUR_CONNECTED)
        objects.append((v_rand(true_segments, segments), v_info(true_segments, segments)))
    of_objects = dict(zip(("v_rand_objects", "v_info_objects"), map(float, np.mean(objects, axis=0)), strict=True))
    scores = {name: round(score, 4) for name, score in (asdict(membrane_scores(truths, cells)) | of_objects).items()}
    fitted = {"threshold": trained.threshold, "min_size": trained.min_size}
    return {**scores, **fitted, "seconds_a_slice": round(seconds / NUM_TEST, 2)}


if __name__ == "__main__":
    main()
