"""Can a denoiser segment? It draws masks of nuclei for an image, and where its draws differ it is in doubt.

    python benchmarks/drawn_masks.py --root DIR

DIR holds image/ and label/ of 400 microscopy images (BBBC038). Crops of the first 320, grey and with bright nuclei,
become two folders, images and masks. Trained on both in processes of their own, for the same number of steps and seeds:

    denoiser     configs/folder.yaml with conditions/paired_image.yaml: it draws the mask, given the image
    segmenter    configs/nuclei_joint.yaml without denoising: a network of half its width

Scores are of crops of the last 80 images, of which neither saw anything:

    dice                  of all pixels
    calibration_error     the expected difference of a pixel's probability and how often it is a nucleus, 15 bins
    calibrated            the same once a logistic curve was fitted to crops of training images that were held out
    errors_in_doubt       the share of all wrong pixels among the tenth of pixels that are most in doubt: p (1 - p)

The probability of the denoiser is the mean of its draws, and one draw is scored, too. A result is kept as soon as it is
there. The picture shows images with their labels, two draws, their mean and doubt, and the segmenter's probability.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, environment, process_seconds, table, write_json
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

import unet_diffusion as ud
from unet_diffusion.data import PairedFiles, split_by_name
from unet_diffusion.data.scaling import to_float
from unet_diffusion.runtime.pictures import save_grid

MAX_CROPS = 12  # of an image: large images would outweigh the others
EDGE = 1.0e-3  # probabilities keep this from 0 and 1, where the logistic curve has no value
MAX_TEST_CROPS = 4  # of a test image
DOUBTFUL = 0.1  # share of the pixels
NUM_SHOWN = 6
SHOWN_FROM = 0.1  # share of a crop that is nuclei
TRAINED = ("denoiser", "segmenter")

Probabilities = NDArray[np.float32]  # (N, H, W)


def main() -> None:
    options = parsed()
    files = options.work / "files"
    if not (files / "test").exists():
        write_files(options.root, files, options.side, options.num_test)
    results = json.loads(options.json.read_text())["results"] if options.json.exists() else []
    for seed in options.seeds:
        if any(result["seed"] == seed for result in results):
            continue
        seconds = {name: trained(options, name, files, seed) for name in TRAINED}
        results += measured(options, files, seed, seconds)
        write_json(options.json, {"environment": environment(), "results": results})
    print(table(results))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, required=True, help="folder that holds image and label")
    parser.add_argument("--side", type=int, default=64, help="pixels of a crop")
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--batch_size", type=int, default=16, help="crops of a step")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num_draws", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--num_test", type=int, default=80, help="images to test on, the last by name")
    parser.add_argument("--num_val", type=int, default=160, help="crops that calibrate, and are not trained on")
    parser.add_argument("--work", type=Path, default=Path("runs/drawn_masks"), help="for files, runs and logs")
    parser.add_argument("--json", type=Path, default=RESULTS / "drawn_masks.json")
    return parser.parse_args()


# --- files


def write_files(root: Path, files: Path, side: int, num_test: int) -> None:
    """Crops as image/, mask/ and label/ of what is trained on, and those of test images in test/."""
    loaded = PairedFiles(root / "image", root / "label", channels=3).load(progress=False)
    rng = np.random.default_rng(0)
    for number, (image, label) in enumerate(zip(loaded.images, loaded.labels, strict=True)):
        is_test = number >= len(loaded.images) - num_test
        grey = as_grey(image)
        places = corners(grey.shape, side, rng)[: MAX_TEST_CROPS if is_test else MAX_CROPS]
        for place, (top, left) in enumerate(places):
            window = np.s_[top : top + side, left : left + side]
            of_crop = {"image": grey[window], "mask": (label[window] > 0) * 255, "label": label[window]}
            for kind, pixels in of_crop.items():
                path = (files / "test" if is_test else files) / kind / f"{number:03d}_{place}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint16 if kind == "label" else np.uint8)).save(path)


def as_grey(image: Tensor) -> NDArray[np.uint8]:
    """The mean of the channels from the 1st to the 99.8th percentile, with nuclei brighter than their ground."""
    grey = to_float(image.float().mean(dim=0, keepdim=True).round().to(torch.uint8), stretch=True)[0].clamp(-1, 1)
    grey = -grey if grey.median() > 0 else grey
    return ((grey / 2 + 0.5) * 255).round().to(torch.uint8).numpy()


def corners(shape: Sequence[int], side: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The upper left corners of crops side by side, in random order."""
    rows, columns = (range(0, length - side + 1, side) for length in shape)
    every = [(row, column) for row in rows for column in columns]
    return [every[i] for i in rng.permutation(len(every))]


# --- runs


def trained(options: argparse.Namespace, name: str, files: Path, seed: int) -> float:
    """Trains one of both in a process of its own, and returns the seconds."""
    run = options.work / f"{name}_{seed}"
    shutil.rmtree(run, ignore_errors=True)  # of a run that was cut off
    of_each = {
        "denoiser": [
            *("--config=folder", "--config=conditions/paired_image"),
            *(
                f"--data.root={files / 'mask'}",
                f"--data.paired_image={files / 'image'}",
                f"--data.image_size={options.side}",
            ),
            *("--data.channels=1", "--model.unet.in_channels=2", "--model.unet.out_channels=1"),
            *("--model.unet.channels=[32,64,128]", "--model.unet.layers_per_block=1"),
            *("--model.unet.attention_levels=[]", "--model.unet.mid_attention=false", "--model.unet.dropout=0"),
            *("--model.conditions.channels=1", "--model.conditions.dropout=0", "--samples.num_images=16"),
            *("--model.schedule.prediction_type=sample", "--model.lr_warmup_steps=100", "--model.ema_decay=0.995"),
            "--model.optimizer.lr=1.0e-3",
        ],
        "segmenter": [
            *("--config=nuclei_joint", f"--data.images={files / 'image'}", f"--data.labels={files / 'label'}"),
            *("--model.joint=null", "--model.unet.init_args.in_channels=1", "--model.unet.init_args.out_channels=4"),
            *("--data.channels=1", "--data.stretch=false", "--model.lr_warmup_steps=100", "--model.ema_decay=0.995"),
            f"--data.windows_per_image={options.batch_size}",
        ],
    }[name]
    common = [
        *(f"--data.batch_size={options.batch_size}", f"--data.num_val={options.num_val}", f"--data.seed={seed}"),
        *(f"--seed_everything={seed}", f"--trainer.max_steps={options.steps}", "--samples.every_n_steps=0"),
        *(f"--trainer.val_check_interval={options.steps}", f"--trainer.default_root_dir={run}"),
    ]
    command = [sys.executable, "-m", "unet_diffusion", "fit", *of_each, *common]
    return round(process_seconds(command, run.with_name(f"{run.name}.log")), 1)


# --- scores


def measured(options: argparse.Namespace, files: Path, seed: int, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """The scores of a draw, of the mean of all, and of the segmenter."""
    names = sorted(path.name for path in (files / "image").iterdir())
    held_out = [names[i] for i in split_by_name(names, options.num_val)[1].tolist()]
    tests = sorted(path.name for path in (files / "test" / "image").iterdir())
    denoiser, segmenter = (ud.load(options.work / f"{name}_{seed}").to("cpu") for name in TRAINED)
    scores = {}
    for split, folder, chosen in (("val", files, held_out), ("test", files / "test", tests)):
        images = [folder / "image" / name for name in chosen]
        draws = drawn(denoiser, images, options)
        scores[split] = {
            "truth": np.stack([np.array(Image.open(folder / "mask" / name)) > 0 for name in chosen]),
            "one draw": draws[0],
            f"mean of {len(draws)} draws": draws.mean(axis=0),
            "segmenter": np.stack([1 - segmenter.segment(image).probabilities[0] for image in images]),
        }
    if seed == options.seeds[0]:
        sheet(options.json.with_suffix(".png"), images, draws, scores["test"])
    return [
        {
            "method": method,
            "seed": seed,
            "steps": options.steps,
            "seconds": seconds["segmenter" if method == "segmenter" else "denoiser"],
            **scored(scores, method),
        }
        for method in scores["test"]
        if method != "truth"
    ]


def drawn(denoiser: ud.Denoiser, images: Sequence[Path], options: argparse.Namespace) -> Probabilities:
    """Masks from 0 to 1, (draws, N, H, W)."""
    masks = [
        denoiser.sample(
            len(images),
            conditions={"paired_image": list(images)},
            num_inference_steps=options.num_inference_steps,
            seed=number,
        )
        for number in range(options.num_draws)
    ]
    return ((torch.stack(masks)[:, :, 0].clamp(-1, 1) + 1) / 2).numpy()


def scored(scores: dict[str, dict[str, Any]], method: str) -> dict[str, float]:
    probability, truth = scores["test"][method], scores["test"]["truth"]
    curve = LogisticRegression(C=np.inf).fit(logits(scores["val"][method]), scores["val"]["truth"].ravel())
    calibrated = curve.predict_proba(logits(probability))[:, 1].reshape(truth.shape)
    predicted = probability > 0.5
    doubt = (probability * (1 - probability)).ravel()
    doubtful = np.argsort(-doubt, kind="stable")[: round(DOUBTFUL * doubt.size)]
    wrong = (predicted != truth).ravel()
    values = {
        "dice": 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()),
        "calibration_error": calibration_error(probability, truth),
        "calibrated": calibration_error(calibrated, truth),
        "errors_in_doubt": wrong[doubtful].sum() / max(wrong.sum(), 1),
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def logits(probability: Probabilities) -> NDArray[np.float32]:
    """log(p / (1 - p)) of all pixels, (pixels, 1)."""
    clipped = np.clip(probability, EDGE, 1 - EDGE)
    return np.log(clipped / (1 - clipped)).reshape(-1, 1)


def calibration_error(probability: Probabilities, truth: NDArray[np.bool_]) -> float:
    preds, target = torch.from_numpy(probability.ravel()).float(), torch.from_numpy(truth.ravel()).long()
    return binary_calibration_error(preds, target, n_bins=15).item()


def sheet(path: Path, images: Sequence[Path], draws: Probabilities, scores: dict[str, Any]) -> None:
    """Images, their labels, two draws, the mean, the doubt (twice the deviation) and the segmenter's probability."""
    with_nuclei = np.flatnonzero(scores["truth"].mean(axis=(1, 2)) > SHOWN_FROM)
    chosen = with_nuclei[np.linspace(0, len(with_nuclei) - 1, NUM_SHOWN).round().astype(int)]
    pixels = np.stack([np.array(Image.open(images[i])) / 255 for i in chosen])
    rows = [pixels, scores["truth"][chosen], draws[0][chosen], draws[1][chosen], draws.mean(axis=0)[chosen]]
    rows += [2 * draws.std(axis=0)[chosen], scores["segmenter"][chosen]]
    tiles = torch.from_numpy(np.concatenate(rows).astype(np.float32))[:, None] * 2 - 1
    save_grid(tiles, path, columns=NUM_SHOWN)


if __name__ == "__main__":
    main()
