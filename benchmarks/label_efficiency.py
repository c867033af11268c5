"""Does denoising first help to segment nuclei from few labels?

    python benchmarks/label_efficiency.py --root DIR

DIR holds image/ and label/ of 400 microscopy images; the last 80 by name are tested on, and never trained on or chosen
by. Denoisers of the other 320, without labels, are trained first if they are not there: those of
configs/nuclei_denoiser.yaml with the network of configs/nuclei_joint.yaml. The usual one predicts x0, another the noise
of the linear schedule, and a third that of its first tenth, of low noise only. Then the same network segments, with
labels of N of the 320, drawn by the seed:

    alone              configs/nuclei_joint.yaml without denoising, from random weights
    finetuned          the same from the weights of the usual denoiser
    finetuned_epsilon  the same from those of the denoiser that predicts the noise
    low_noise          the same from those of the denoiser of low noise
    slow               as low_noise, and these weights learn at a tenth of the rate
    features           configs/nuclei_features.yaml: a pixel classifier on all maps of the usual denoiser, frozen
    joint              configs/nuclei_joint.yaml, which denoises all 320 while it learns from the N labels

Each has the same number of steps, is trained by `unet-diffusion fit` in a process of its own, which fits its threshold
on images that it trains on, and is scored on the test images as in nuclei.py. The program of nuclei.py that learns
nothing is a row, too. A result is kept as soon as it is there, and a run that was cut off continues.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from measure import RESULTS, environment, process_seconds, table, write_json
from nuclei import by, classical, scored, tested

from unet_diffusion.inference.reading import read_segmenter
from unet_diffusion.models.speed import keep_freed_memory, set_speed

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EPSILON = ["--model.schedule.beta_schedule=linear", "--model.schedule.prediction_type=epsilon"]
LOW_NOISE = ["--model.schedule.num_train_timesteps=100", "--model.schedule.beta_end=2.1e-3"]  # as nuclei_joint.yaml
DENOISERS = {"usual": [], "epsilon": EPSILON, "low_noise": [*EPSILON, *LOW_NOISE]}
ALONE = ["--model.joint=null", "--model.unet.init_args.out_channels=4"]
WIDTHS = (16, 32, 64, 128, 256)  # of nuclei_joint.yaml
METHODS = {  # the recipe, what is changed of it, and the denoiser to start from
    "alone": ("nuclei_joint.yaml", ALONE, None),
    "finetuned": ("nuclei_joint.yaml", ALONE, "usual"),
    "finetuned_epsilon": ("nuclei_joint.yaml", ALONE, "epsilon"),
    "low_noise": ("nuclei_joint.yaml", ALONE, "low_noise"),
    "slow": ("nuclei_joint.yaml", [*ALONE, "--model.pretrained_lr_scale=0.1"], "low_noise"),
    "features": ("nuclei_features.yaml", [], "usual"),
    "joint": ("nuclei_joint.yaml", [], None),
}
TEST_WINDOW = 256  # pixels; twice that of training: half the test images are no larger, and need one window


def main() -> None:
    options = parsed()
    for name, changes in DENOISERS.items():
        if any(METHODS[method][2] == name for method in options.methods):
            train_denoiser(options, name, changes)
    keys = [(method, number, seed) for seed in options.seeds for number in options.num_labelled
            for method in options.methods]  # fmt: skip
    measure(options, keys, measured)


def measure(
    options: argparse.Namespace,
    keys: Iterable[tuple[str, int, int]],
    measured: Callable[[argparse.Namespace, str, int, int], dict],
) -> None:
    """Measure what is not in the file of results yet, beside the program that learns nothing, and print the means.

    Args:
        options: root, num_test and json.
        keys: Method, number of labels and seed of each result.
        measured: Measures one of them.
    """
    results = json.loads(options.json.read_text())["results"] if options.json.exists() else []
    if not results:
        scores = scored(*tested(options.root, options.num_test), classical)["all"]
        results.append({"method": "classical", "labelled": 0, "seed": 0, "seconds": 0.0, **scores})
    known = {(result["method"], result["labelled"], result["seed"]) for result in results}
    for method, num_labelled, seed in keys:
        if (method, num_labelled, seed) in known:
            continue
        print(f"{method}, {num_labelled} labelled images, seed {seed}", flush=True)
        results.append(measured(options, method, num_labelled, seed))
        print(f"  {results[-1]}", flush=True)
        write_json(options.json, {"environment": environment(), "results": results})
    print(table(means(results)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further options are those of unet-diffusion fit, such as --data.batch_size=8.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--root", type=Path, required=True, help="folder that holds image and label")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--num_labelled", nargs="+", type=int, default=[5, 20, 80])
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps of each segmenter")
    parser.add_argument("--denoiser_steps", type=int, default=2000, help="optimiser steps of each denoiser")
    parser.add_argument("--tile_size", type=int, default=64, help="pixels, of what denoisers are trained on")
    parser.add_argument("--channels", nargs="+", type=int, default=WIDTHS, help="widths of the network")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_test", type=int, default=80, help="images to test on, the last by name")
    parser.add_argument("--work", type=Path, default=Path("runs/label_efficiency"), help="for runs and logs")
    parser.add_argument("--json", type=Path, default=RESULTS / "label_efficiency.json")
    options, options_of_fit = parser.parse_known_args()
    if any(one.startswith("--trainer.max_steps") for one in options_of_fit):
        parser.error("give the number of steps as --steps, as the threshold is fitted at the last one")
    options.of_fit = options_of_fit
    return options


def denoiser_of(options: argparse.Namespace, name: str) -> Path:
    """The run folder of a denoiser."""
    return options.work / f"denoiser_{name}"


def network_that_denoises(channels: Sequence[int]) -> str:
    """The network of nuclei_joint.yaml with the outputs of a denoiser, as JSON."""
    unet = yaml.safe_load((CONFIGS / "nuclei_joint.yaml").read_text())["model"]["unet"]
    unet["init_args"] |= {"out_channels": unet["init_args"]["in_channels"], "channels": list(channels)}
    return json.dumps(unet)


def train_denoiser(options: argparse.Namespace, name: str, changes: list[str]) -> None:
    """Trains a denoiser, or what is left to do of it."""
    run = denoiser_of(options, name)
    print(f"training a denoiser: {run}", flush=True)
    images = options.root.resolve() / "image"
    num_unlabelled = len(list(images.iterdir())) - options.num_test
    arguments = [
        f"--config={CONFIGS / 'nuclei_denoiser.yaml'}",
        f"--model.unet={network_that_denoises(options.channels)}",
        f"--data.root={images}",
        f"--data.num_images={num_unlabelled}",
        f"--data.tile_size={options.tile_size}",
        f"--trainer.max_steps={options.denoiser_steps}",
        f"--trainer.val_check_interval={options.denoiser_steps}",
        f"--trainer.default_root_dir={run}",
        *changes,
    ]
    subprocess.run([sys.executable, "-m", "unet_diffusion", "fit", *arguments], check=True)


def measured(options: argparse.Namespace, method: str, num_labelled: int, seed: int) -> dict:
    run = options.work / f"{method}_{num_labelled}_{seed}"
    shutil.rmtree(run, ignore_errors=True)  # of a run that was cut off
    run.parent.mkdir(parents=True, exist_ok=True)
    root = options.root.resolve()
    recipe, changes, denoiser = METHODS[method]
    changes = [*changes, *([] if denoiser is None else [f"--model.init_from={denoiser_of(options, denoiser)}"])]
    if method == "features":
        changes += [
            f"--model.unet.init_args.denoiser={network_that_denoises(options.channels)}",
            f"--model.unet.init_args.levels={list(range(len(options.channels) - 1))}",
        ]
    else:
        changes.append(f"--model.unet.init_args.channels={list(options.channels)}")
    arguments = [
        f"--config={CONFIGS / recipe}",
        f"--data.images={root / 'image'}",
        f"--data.labels={root / 'label'}",
        f"--data.num_val={options.num_test}",
        f"--data.num_train={num_labelled}",
        f"--data.seed={seed}",
        f"--seed_everything={seed}",
        "--trainer.limit_val_batches=1",  # a validation fits the threshold
        f"--trainer.default_root_dir={run}",
        f"--trainer.max_steps={options.steps}",
        f"--trainer.val_check_interval={options.steps}",
        *changes,
        *options.of_fit,
    ]
    command = [sys.executable, "-m", "unet_diffusion", "fit", *arguments]
    seconds = round(process_seconds(command, run.with_name(f"{run.name}.log")), 1)
    scores = of_run(root, run, options.num_test)
    return {"method": method, "labelled": num_labelled, "seed": seed, "seconds": seconds, **scores}


def of_run(root: Path, run: Path, num_test: int) -> dict[str, float]:
    """The scores of a run on the test images."""
    keep_freed_memory()
    trained = replace(read_segmenter(run), window_size=TEST_WINDOW)
    set_speed(trained.unet, "channels_last")
    return scored(*tested(root, num_test), by(trained))["all"]


def means(results: list[dict]) -> list[dict]:
    """Mean and range over the seeds, a row a method and number of labels."""
    rows = []
    for key in sorted({(one["labelled"], one["method"]) for one in results}):
        ones = [one for one in results if (one["labelled"], one["method"]) == key]
        row = {"labelled": key[0], "method": key[1], "seeds": len(ones)}
        for score in ("dice", "ap_50", "ap_50_to_90", "seconds"):
            values = [one[score] for one in ones]
            row[score] = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
