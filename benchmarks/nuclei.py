"""How well does the recipe for nuclei find them, beside a program of 20 lines that learns nothing?

    python benchmarks/nuclei.py --root DIR [--run RUN]

DIR holds image/ and label/ of 400 microscopy images (BBBC038); the last 80 by name are tested on, and never trained on
or chosen by. RUN is a run of configs/nuclei_segment.yaml on the others, and is trained first if it is not there. The
threshold and the least size of objects are those of the run, fitted on 16 images that it was not trained on. A run with
`--data.targets.object_diameter N` is also tested with diameters that are known, as the median of the labels.

Scores are of all test images and of each kind: average precision (AP) of nuclei, TP / (TP + FP + FN), at an IoU of 0.5
and over 0.5 to 0.9, as the mean over the images (Data Science Bowl) and of the sums over them (StarDist), and the Dice
coefficient of all pixels.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np
import scipy
import skimage
from measure import RESULTS, environment, fastest_autocast, table, write_json
from numpy.typing import NDArray
from torch import Tensor

from unet_diffusion.data import PairedFiles
from unet_diffusion.data.scaling import to_float
from unet_diffusion.evaluation.scores_of_counts import average_precision_of
from unet_diffusion.inference.reading import read_segmenter
from unet_diffusion.inference.record import checkpoint_file
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.runtime.safe_loading import load_plain
from unet_diffusion.segmentation.object_scores import matched_pairs, object_ious
from unet_diffusion.segmentation.object_size import median_diameter
from unet_diffusion.segmentation.scores import FOUR_CONNECTED

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "nuclei_segment.yaml"
NUM_TEST = 80
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of IoU
KINDS = ("all", "fluorescence", "stained", "bright field")
COLOURED = 8  # mean difference of an image's channels, in grey values: from 0 to 1 without a stain, from 14 with one
Labels = NDArray[np.int32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds image and label")
    parser.add_argument("--run", type=Path, default=Path("runs/nuclei_segment"), help="run folder")
    parser.add_argument("--num_test", type=int, default=NUM_TEST, help="images to test on, the last by name")
    parser.add_argument("--json", type=Path, default=RESULTS / "nuclei.json")
    options, options_of_fit = parser.parse_known_args()
    if not options.run.exists():
        data = [f"--data.images={options.root / 'image'}", f"--data.labels={options.root / 'label'}"]
        run = [f"--data.num_val={options.num_test}", f"--trainer.default_root_dir={options.run}", *options_of_fit]
        subprocess.run([sys.executable, "-m", "unet_diffusion", "fit", f"--config={CONFIG}", *data, *run], check=True)
    images, labels = tested(options.root, options.num_test)
    trained = read_segmenter(options.run)
    steps = int(load_plain(checkpoint_file(options.run))["global_step"])
    fitted = {"steps": steps, "threshold": trained.threshold, "min_size": trained.min_size}
    finders = {
        "classical": classical,
        "nuclei_segment": by(trained),
        "nuclei_segment, eight views": by(trained, views=True),
    }
    if trained.object_diameter is not None:
        known = [median_diameter(one) for one in labels]
        finders["nuclei_segment, known diameters"] = by(trained, diameters=iter(known))
        finders["nuclei_segment, eight views, known diameters"] = by(trained, views=True, diameters=iter(known))
    results = [
        {"method": name, **({} if name == "classical" else fitted), **scored(images, labels, finder)}
        for name, finder in finders.items()
    ]
    write_json(options.json, {"environment": environment(), "results": results})
    print(table([{"method": one["method"], **one["all"]} for one in results]))


def tested(root: Path, num_test: int) -> tuple[list[Tensor], list[Labels]]:
    """The test images and their labels."""
    loaded = PairedFiles(root / "image", root / "label", channels=3).load(progress=False)
    return loaded.images[-num_test:], loaded.labels[-num_test:]


def kind_of(image: Tensor) -> str:
    """How an image was made: stained images have colours, and bright ones without them are bright field."""
    values = image.numpy().astype(float)
    if (values.max(axis=0) - values.min(axis=0)).mean() > COLOURED:
        return "stained"
    return "fluorescence" if np.median(values) < 100 else "bright field"


def classical(image: Tensor) -> Labels:
    """Nuclei by Otsu's threshold, and a watershed from the peaks of the distance to the background."""
    grey = scipy.ndimage.gaussian_filter(image.numpy().astype(np.float32).mean(axis=0), 1)
    grey = 255 - grey if np.median(grey) > 127 else grey  # dark nuclei on a bright ground
    foreground = scipy.ndimage.binary_fill_holes(grey > skimage.filters.threshold_otsu(grey))
    parts = skimage.measure.label(foreground, connectivity=FOUR_CONNECTED)
    parts[np.isin(parts, np.flatnonzero(np.bincount(parts.ravel()) < 16))] = 0
    distance = scipy.ndimage.gaussian_filter(scipy.ndimage.distance_transform_edt(parts > 0), 1)
    peaks = skimage.feature.peak_local_max(distance, min_distance=5, exclude_border=False, labels=parts)
    seeds = np.zeros(parts.shape, dtype=np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return skimage.segmentation.watershed(-distance, seeds, mask=parts > 0)


def by(
    trained: Segmenter, *, views: bool = False, diameters: Iterator[float | None] | None = None
) -> Callable[[Tensor], Labels]:
    """The function that finds nuclei with a segmenter, on an image or on its eight rotated and mirrored views.

    Args:
        trained: The segmenter.
        views: Average over the views.
        diameters: The median diameter of the nuclei of each image to come; None: they are not known.
    """

    known = diameters or repeat(None)

    def predict(image: Tensor) -> Labels:
        scaled = to_float(image, stretch=trained.stretch)
        with fastest_autocast():
            return trained.segment(scaled, views=views, diameter=next(known)).instances

    return predict


def scored(images: Sequence[Tensor], labels: Sequence[Labels], predict: Callable[[Tensor], Labels]) -> dict:
    """The scores of each kind of image."""
    predicted = [predict(image) for image in images]
    counts = np.array([counted(*pair) for pair in zip(labels, predicted, strict=True)])  # (N, T, 3)
    pixels = np.array([overlap(*pair) for pair in zip(labels, predicted, strict=True)])
    kinds = np.array([kind_of(image) for image in images])
    chosen = {kind: np.flatnonzero((kinds == kind) | (kind == "all")) for kind in KINDS}
    return {kind: scores(counts[which], pixels[which]) for kind, which in chosen.items() if len(which)}


def counted(truth: Labels, predicted: Labels) -> list[tuple[int, int, int]]:
    """True positives, false positives and false negatives at each IoU."""
    ious = object_ious(truth, predicted)
    found = [len(matched_pairs(ious, threshold)[0]) for threshold in THRESHOLDS]
    return [(number, ious.shape[1] - number, ious.shape[0] - number) for number in found]


def overlap(truth: Labels, predicted: Labels) -> tuple[int, int]:
    """Pixels of nuclei in both, and the sum of those in each."""
    return int(((truth > 0) & (predicted > 0)).sum()), int((truth > 0).sum() + (predicted > 0).sum())


def scores(counts: NDArray[np.int64], pixels: NDArray[np.int64]) -> dict[str, float]:
    """Mean over images and pooled scores of the counts of images, (N, T, 3), and their overlaps, (N, 2)."""
    of_images, pooled = average_precision_of(counts), average_precision_of(counts.sum(axis=0))
    both, total = pixels.sum(axis=0)
    values = {
        "ap_50": of_images[:, 0].mean(),
        "ap_50_pooled": pooled[0],
        "ap_50_to_90": of_images.mean(),
        "ap_50_to_90_pooled": pooled.mean(),
        "dice": 2 * both / total,
    }
    return {"images": len(counts), **{name: round(float(value), 4) for name, value in values.items()}}


if __name__ == "__main__":
    main()
