"""Do pairs of a mask and an image drawn for it help to segment nuclei from few labels?

    python benchmarks/synthetic_pairs.py --root DIR

DIR holds image/ and label/ of 400 microscopy images; the last 80 by name are tested on, and never trained on or chosen
by. A denoiser is trained on the other 320 without labels, if it is not there. Then, with labels of N of the 320, drawn
by the seed, and for the same number of steps:

    alone    a segmenter trained on the N images: configs/nuclei_joint.yaml without denoising
    drawn    the same with synthetic pairs: configs/nuclei_from_masks.yaml trained on the N images from the denoiser's
             weights, `unet-diffusion synthesize` with it, and of its pairs those in which `alone` finds the mask
    copied   the same with the pairs of `unet-diffusion synthesize --copy_from`, whose pixels are copied, and nothing is
             drawn

Half of the windows are synthetic until two thirds of the steps are done; the rest is trained on real windows only. All
networks have the widths below, as training takes two CPU cores. Scores are those of nuclei.py. A result is kept as soon
as it is there, and a run that was cut off continues.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from label_efficiency import CONFIGS, METHODS, measure, of_run
from measure import RESULTS, process_seconds

OF_DENOISER = [  # the same for the denoiser without labels and for that of masks
    "--model.unet.channels=[16,32,64,128]",
    "--model.speed=plain",
    "--model.ema_decay=0.998",
]
SYNTHETIC = ("drawn", "copied")


def main() -> None:
    options = parsed()
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.denoiser.exists():
        images = options.root.resolve() / "image"
        num_unlabelled = len(list(images.iterdir())) - options.num_test
        data = [f"--data.root={images}", f"--data.num_images={num_unlabelled}", "--model.unet.in_channels=3"]
        data.append(f"--data.tile_size={options.tile_size}")
        steps = [
            f"--trainer.max_steps={options.denoiser_steps}",
            f"--trainer.val_check_interval={options.denoiser_steps}",
        ]
        fit(options.denoiser, "nuclei_denoiser.yaml", [*OF_DENOISER, "--model.optimizer.lr=1.0e-3", *data, *steps])
    methods = ("alone", *SYNTHETIC)
    keys = [(method, number, seed) for number in options.num_labelled for seed in options.seeds for method in methods]
    measure(options, keys, measured)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further options are those of unet-diffusion fit for the segmenters, such as --trainer.max_steps=100.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--root", type=Path, required=True, help="folder that holds image and label")
    parser.add_argument("--denoiser", type=Path, default=Path("runs/synthetic_pairs/denoiser"), help="run folder")
    parser.add_argument("--denoiser_steps", type=int, default=4000, help="steps of the denoiser without labels")
    parser.add_argument("--masks_steps", type=int, default=400, help="steps of the denoiser of masks")
    parser.add_argument("--tile_size", type=int, default=64, help="pixels, of what denoisers are trained on")
    parser.add_argument("--image_size", type=int, default=128, help="pixels, of a pair: the segmenter's window")
    parser.add_argument("--num_pairs", type=int, default=128, help="pairs to make; those that are not kept count")
    parser.add_argument("--min_dice", type=float, default=0.8, help="of a drawn pair that is kept")
    parser.add_argument("--num_labelled", nargs="+", type=int, default=[5, 20, 80])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_test", type=int, default=80, help="images to test on, the last by name")
    parser.add_argument("--work", type=Path, default=Path("runs/synthetic_pairs"), help="for runs and logs")
    parser.add_argument("--json", type=Path, default=RESULTS / "synthetic_pairs.json")
    options, options_of_fit = parser.parse_known_args()
    options.of_fit = options_of_fit
    return options


def measured(options: argparse.Namespace, method: str, num_labelled: int, seed: int) -> dict:
    """Trains a segmenter, after the pairs that it needs are made, and scores it."""
    files = subset(options, num_labelled, seed)
    run, alone = (options.work / f"{name}_{num_labelled}_{seed}" for name in (method, "alone"))
    arguments = [
        *(f"--data.{side}s={files / side}" for side in ("image", "label")),
        f"--data.num_val={options.num_test}",
        f"--data.seed={seed}",
        f"--seed_everything={seed}",
        "--trainer.limit_val_batches=1",  # a validation fits the threshold
        *METHODS["alone"][1],
    ]
    steps = next((int(one.partition("=")[2]) for one in options.of_fit if one.startswith("--trainer.max_steps=")), 600)
    made = {}
    if method in SYNTHETIC:
        pairs = options.work / f"pairs_{method}_{num_labelled}_{seed}"
        made = synthesized(options, method, files, num_labelled, seed, pairs, alone)
    if made.get("kept") == 0:  # there is nothing to add: the segmenter is that without pairs
        scores = of_run(options.root.resolve(), alone, options.num_test)
        return {"method": method, "labelled": num_labelled, "seed": seed, "seconds": 0.0, **made, **scores}
    if made:
        arguments += [f"--data.synthetic.root={pairs}", f"--data.synthetic.num_batches={2 * steps // 3}"]
        arguments += ["--data.synthetic.share=0.5"]
    seconds = fit(run, METHODS["alone"][0], [*arguments, *options.of_fit])
    scores = of_run(options.root.resolve(), run, options.num_test)
    return {"method": method, "labelled": num_labelled, "seed": seed, "seconds": seconds, **made, **scores}


def subset(options: argparse.Namespace, num_labelled: int, seed: int) -> Path:
    """A folder with N labelled images, drawn by the seed, and those that are tested on."""
    root = options.root.resolve()
    names = sorted(path.name for path in (root / "image").iterdir())
    others = names[: -options.num_test]
    chosen = np.random.default_rng(seed).permutation(others)[:num_labelled].tolist()
    folder = options.work / f"files_{num_labelled}_{seed}"
    for side in ("image", "label"):
        (folder / side).mkdir(parents=True, exist_ok=True)
        for name in (*chosen, *names[-options.num_test :]):
            shutil.copyfile(root / side / name, folder / side / name)
    return folder


def synthesized(
    options: argparse.Namespace, method: str, files: Path, num_labelled: int, seed: int, pairs: Path, alone: Path
) -> dict:
    """Makes pairs, and says how many were kept."""
    masks = options.work / f"masks_{num_labelled}_{seed}"
    if method == "drawn":
        data = [f"--data.root={files / 'image'}", f"--data.semantic_map={files / 'label'}"]
        data += [
            f"--data.num_images={num_labelled}",
            f"--data.tile_size={options.tile_size}",
            f"--data.seed={seed}",
            f"--seed_everything={seed}",
        ]
        steps = [f"--trainer.max_steps={options.masks_steps}", f"--trainer.val_check_interval={options.masks_steps}"]
        start = [f"--model.init_from={options.denoiser}", "--model.unet.in_channels=7", "--samples.every_n_steps=0"]
        fit(masks, "nuclei_from_masks.yaml", [*OF_DENOISER, *start, *data, *steps])
    of_drawing = {
        "drawn": ["--segmenter", str(alone), "--guidance_scale", "2"],
        "copied": ["--copy_from", str(files / "image")],
    }
    shutil.rmtree(pairs, ignore_errors=True)
    command = [sys.executable, "-m", "unet_diffusion", "synthesize", str(masks), *of_drawing[method]]
    command += ["--labels", str(files / "label"), "--num_labels", str(num_labelled), "--seed", str(seed)]
    command += ["--image_size", *2 * [str(options.image_size)], "--batch_size", "16"]
    command += ["--num_images", str(options.num_pairs), "--min_dice", str(options.min_dice)]
    log = pairs.with_name(f"{pairs.name}.log")
    with log.open("w") as file:
        subprocess.run(
            [*command, "--output", str(pairs)], stdout=file, stderr=subprocess.STDOUT
        )  # fails if it keeps none
    if not (pairs / "synthesize.json").exists():
        raise RuntimeError(f"no pairs were made; {log} ends with\n{log.read_text()[-2000:]}")
    record = json.loads((pairs / "synthesize.json").read_text())
    return {"pairs": record["num_images"], "kept": record["num_kept"]}


def fit(run: Path, recipe: str, arguments: list[str]) -> float:
    """Trains a recipe in a process of its own, in a new folder, and returns the seconds."""
    shutil.rmtree(run, ignore_errors=True)  # of a run that was cut off
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "unet_diffusion", "fit", f"--config={CONFIGS / recipe}", *arguments]
    log = run.with_name(f"{run.name}.log")
    return round(process_seconds([*command, f"--trainer.default_root_dir={run}"], log), 1)


if __name__ == "__main__":
    main()
