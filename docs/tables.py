"""Writes the tables of the pages from benchmarks/results/*.json and configs/: `python docs/tables.py`.

`--check` writes nothing, and fails where a table differs.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a function of this file.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
SCHEDULERS = {
    "DPMSolverMultistepScheduler": "DPM-Solver++, 20 steps",
    "DDIMScheduler": "DDIM, 50 steps",
    "UniPCMultistepScheduler": "UniPC, 10 steps",
}
PEERS = {
    "unet_diffusion": "unet_diffusion",
    "diffusers": "diffusers as shipped",
    "diffusers_shipped": "diffusers as shipped",
    "diffusers_tuned": "diffusers tuned",
    "diffusers_graphed": "diffusers tuned, CUDA graphs",
    "ddpm_pytorch": "denoising-diffusion-pytorch as shipped",
    "ddpm_pytorch_shipped": "denoising-diffusion-pytorch as shipped",
    "ddpm_pytorch_tuned": "denoising-diffusion-pytorch tuned",
    "ours": "unet_diffusion",
    "ours_unconditional": "unet_diffusion, without labels",
}
NETWORKS = {
    "cifar10": "35.7 M network of DDPM's CIFAR-10",
    "medium": "8.9 M network at 28x28",
    "small": "1.6 M network at 28x28",
}
OTSU = "20 lines without training: Otsu's threshold, watershed"
Rows = list[Sequence[object]]


# --- denoisers


def training_avx2() -> Rows:
    """Rates of a training step on a CPU without AVX-512."""
    rows: Rows = [("", "unet_diffusion, images/s", "diffusers as shipped", "times", "diffusers tuned", "times")]
    for network, aims in (("small", ("1.8, **missed**", "1.5")), ("medium", ("", "")), ("cifar10", ("", ""))):
        record = result(f"train_step_{network}_avx2")
        ours, *peers = (record["contenders"][name] for name in ("unet_diffusion", "diffusers", "diffusers_tuned"))
        cells = [
            cell
            for peer, aim in zip(peers, aims, strict=True)
            for cell in (f"{rate(peer):.1f}", f"{peer['ours_times_as_fast']:.2f}" + (f" (aim: {aim})" if aim else ""))
        ]
        rows.append((f"{NETWORKS[network]}, batch {record['settings']['batch_size']}", f"{rate(ours):.1f}", *cells))
    return rows


def training_avx512() -> Rows:
    """Rates, memory and first steps on a CPU with AVX-512."""
    rows: Rows = [("", "", "images/s", "unet_diffusion is so many times as fast", "first step, s", "memory, MiB")]
    for network in NETWORKS:
        record = result(f"train_step_{network}")
        for name, peer in record["contenders"].items():
            first = name == "unet_diffusion"
            rows.append((
                f"{NETWORKS[network]}, batch {record['settings']['batch_size']}" if first else "",
                PEERS[name],
                f"{rate(peer):.1f}",
                "" if first else f"{peer['ours_times_as_fast']:.2f}",
                f"{peer['first_step_seconds']:.0f}",
                f"{peer['peak_mib']:,.0f}",
            ))  # fmt: skip
    return rows


def sampling_avx512() -> Rows:
    """Rates of sampling on a CPU with AVX-512."""
    rows: Rows = [("images/s", "unet_diffusion", "diffusers as shipped", "times", "diffusers tuned", "times")]
    for name in ("sample_cifar10", "sample_cifar10_batch_1"):
        for ours, *peers in by_three(result(name)["contenders"]):
            cells = [cell for peer in peers for cell in (f"{rate(peer):.2f}", f"{peer['ours_times_as_fast']:.2f}")]
            label = f"{SCHEDULERS[ours['scheduler']]}, batch {ours['batch_size']}"
            rows.append((label, f"{rate(ours):.2f}", *cells))
    return rows


def time_to_quality() -> Rows:
    """Distance of samples of Fashion-MNIST after minutes of training."""
    rows: Rows = [("", "seconds", "steps", "parameters", "distance")]
    record = result("time_to_quality")
    runs = [
        (PEERS[run["contender"]] + name, run | figures)
        for run in record["results"]
        for name, figures in [("", {}), (", guided", run.get("guided"))]
        if figures is not None
    ]
    for name, run in sorted(runs, key=lambda named: named[1]["distance"]):
        size = f"{run['parameters'] / 1e6:.1f} M"
        rows.append((name, f"{run['seconds']:.0f}", f"{run['steps']:,}", size, f"{run['distance']:,.0f}"))
    rows.append(("1,000 training images", "", "", "", f"{record['real_images']['distance']:.0f}"))
    return rows


def fit_fashion_mnist() -> Rows:
    """What a run takes beside its training steps."""
    record = result("fit_fashion_mnist")
    bare = [statistics.median(record["bare_step_seconds"][when]) for when in ("before", "after")]
    step = statistics.median(record["step_seconds"])
    return [
        ("start to pipeline, s", "step within `fit`, s", "bare training step before and after, s"),
        (f"{record['whole_seconds']:.0f}", f"{step:.2f}", f"{bare[0]:.2f}, {bare[1]:.2f}"),
    ]


def gpu() -> Rows:
    """Rates on a GPU; where two runs measured the same, the later one counts."""
    columns = ("unet_diffusion", "diffusers_graphed", "diffusers_tuned", "diffusers", "ddpm_pytorch")
    rates: dict[tuple[str, int, str], dict[str, float]] = {}
    for run in result("gpu")["runs"]:
        for record in run["contenders"]:
            if "seconds" in record:
                key = (record["task"], record["batch_size"], record["key"])
                rates.setdefault(key, {})[record["contender"]] = rate(record)
    rows: Rows = [("images/s", "unet_diffusion (`graphed`)", *(PEERS[name] for name in columns[1:]))]
    order = {"train": 0, "fit": 1, "sample": 2}
    for task, batch_size, key in sorted(
        rates, key=lambda key: (order[key[0]], key[1] if key[0] == "train" else -key[1])
    ):
        label = {"train": "training step", "fit": "`unet-diffusion fit`"}.get(task) or SCHEDULERS[key]
        found = [rates[task, batch_size, key].get(name) for name in columns]
        rows.append((f"{label}, batch {batch_size}", *(significant(value) for value in found)))
    return rows


# --- machine


def checkpoints() -> Rows:
    """Size of a checkpoint, and how long training waits for it."""
    record = result("checkpoints")
    rows: Rows = [("", "MiB", "seconds, median of 5", "at most")]
    saved = {"the file": "checkpoint, on the disk", "weights": "weights by torch.save"}
    for name, size in record["mib"].items():
        taken = record["seconds"].get(saved.get(name))
        times = (f"{statistics.median(taken):.2f}", f"{max(taken):.2f}") if taken else ("", "")
        rows.append((f"{name}, by `torch.save`" if name == "weights" else name, f"{size:.0f}", *times))
    return rows


def loading() -> Rows:
    """Seconds and memory until a folder of Stable Diffusion 1's size is loaded."""
    rows: Rows = [("process", "seconds, median of 3", "of the processor", "memory, MiB")]
    for name, turns in result("loading")["turns"].items():
        units = ("seconds", "seconds of the processor", "MiB")
        medians = (statistics.median(turn[unit] for turn in turns) for unit in units)
        rows.append((name, *(f"{value:.0f}" for value in medians)))
    return rows


def adapters() -> Rows:
    """What adapters and gradient checkpointing save."""
    rows: Rows = [("trained", "trained weights", "checkpoint, MiB", "memory, MiB", "seconds a step")]
    for run in result("adapters")["results"]:
        sizes = f"{run['trained weights']:,}", significant(run["checkpoint MiB"]), f"{run['memory MiB']:,}"
        rows.append((run["trained"], *sizes, f"{run['seconds a step']:.1f}"))
    return rows


def processes() -> Rows:
    """One process on two cores against two of one core each."""
    record = result("processes")
    one, two = (f"{statistics.median(record['images_per_second'][count]):.1f}" for count in "12")
    return [
        ("one process, images/s", "two processes of one core each, images/s", "times"),
        (one, two, f"{record['ratio']:.2f}"),
    ]


def streaming() -> Rows:
    """Rates of reading images."""
    rows: Rows = [("images from", "images/s", "first batch, s", "order after a resume")]
    for run in result("streaming")["results"]:
        rows.append((run["images from"], f"{run['images/s']:,}", run["first batch, s"], run["resumed order"]))
    return rows


def decoding() -> Rows:
    """Rates of reading images from each kind of source, and of a plain loop over its library."""
    record = result("decoding")
    rows: Rows = [("images from", "unet_diffusion, images/s", "library", "library, images/s")]
    for run in record["results"]:
        library = f"{run['library']} {record['libraries'].get(run['library'], '')}".strip()
        rows.append((run["images from"], f"{run['images/s']:,}", library, f"{run['its images/s']:,}"))
    return rows


def checks() -> Rows:
    """What `check` found in sets of data, and how long it took."""
    rows: Rows = [("data", "seconds", "warnings, advice and notes")]
    for name, record in result("checks").items():
        said = [f"{finding['severity']}: {finding['text']}" for finding in record["findings"]]
        rows.append((name, f"{record['seconds']:.0f}", "<br>".join(said) or "none"))
    return rows


def bad_inputs() -> Rows:
    """How the commands answered bad inputs."""
    cases = result("bad_inputs")["cases"].values()
    refused = [case for case in cases if case["status"] != 0]
    return [
        ("inputs", "answered badly", "slowest refusal, s", "most memory, GiB"),
        (
            len(cases),
            sum(bool(case["faults"]) for case in cases),
            f"{max(case['seconds'] for case in refused):.1f}",
            f"{max(case['gib'] or 0 for case in refused):.2f}",
        ),
    ]


def formats() -> Rows:
    """The largest difference of the numbers that are read of a file from those that its own library reads."""
    cases = result("formats")["cases"]
    rows: Rows = [("format", "written by", "files", "compared", "largest difference")]
    for name in dict.fromkeys(case["format"] for case in cases):
        group = [case for case in cases if case["format"] == name]
        compared = [case["compared"] for case in group]
        library = ", ".join(dict.fromkeys(case["written by"] for case in group))
        largest = f"{max(case['largest difference'] for case in group):g}"
        rows.append((name, library, len(group), "; ".join(compared), largest))
    return rows


# --- segmentation


def isbi2012() -> Rows:
    """Scores on membranes, averaged over eight views of a slice."""
    names = {
        "paper": "`isbi2012_unet`",
        "port": "port: the paper's widths, padded, batch norm, plain cross-entropy, flips",
    }
    before = "`isbi2012_modern` without affinities"
    files = {
        "isbi2012_affinities": "`isbi2012_modern`, half its widths, batches of two",
        "isbi2012": f"{before}, border weight 5",
        "isbi2012_border_weight_1": f"{before}, border weight 1",
    }
    scores = {"v_rand_objects": 3, "v_info_objects": 3, "v_rand": 3, "v_info": 3, "pixel_error": 3,
              "challenge_pixel_error": 3, "rand_error": 3, "warping_error": 4}  # fmt: skip
    rows: Rows = [("", "minutes", "steps", "V_rand of objects", "V_info of objects", "V_rand", "V_info", "pixel error",
                   "challenge's pixel error", "Rand error", "warping error")]  # fmt: skip
    for name, modern in files.items():
        for run in result(name)["results"]:
            if run["views"]:
                cells = [f"{run[score]:.{digits}f}" if score in run else "" for score, digits in scores.items()]
                contender = {**names, "modern": modern}[run["contender"]]
                rows.append((contender, f"{run['minutes']:g}", f"{run['steps']:,}", *cells))
    return rows


def label_efficiency() -> Rows:
    """Scores on nuclei of ways to few labels, by the number of labels."""
    methods = {
        "alone": "segmenting alone",
        "finetuned": "denoise first, then segment",
        "finetuned_epsilon": "from a denoiser of the noise",
        "low_noise": "from a denoiser of low noise",
        "slow": "from the same, slowly",
        "features": "a classifier on the frozen denoiser",
        "joint": "denoising beside segmenting",
    }
    return by_labels(result("label_efficiency")["results"], methods)


def synthetic_pairs() -> Rows:
    """Scores on nuclei of segmenters trained beside drawn or copied pairs, and of the same without."""
    methods = {"alone": "without pairs", "drawn": "with pairs drawn for masks", "copied": "with pairs of copied pixels"}
    return by_labels(result("synthetic_pairs")["results"], methods)


def by_labels(runs: Sequence[dict[str, Any]], methods: dict[str, str]) -> Rows:
    """Mean and range over the seeds of each number of labels and method, and the program that learns nothing."""
    rows: Rows = [("", "labels", "seeds", "Dice", "AP at 0.5", "AP 0.5 to 0.9")]
    for labels, method in product(sorted({run["labelled"] for run in runs} - {0}), methods):
        same = [run for run in runs if (run["labelled"], run["method"]) == (labels, method)]
        if not same:
            continue
        scores = [[run[score] for run in same] for score in ("dice", "ap_50", "ap_50_to_90")]
        cells = [f"{statistics.mean(one):.3f} ({min(one):.3f} to {max(one):.3f})" for one in scores]
        rows.append((methods[method], labels, len(same), *cells))
    untrained = result("nuclei")["results"][0]["all"]
    scores_of_none = [f"{untrained[score]:.3f}" for score in ("dice", "ap_50", "ap_50_to_90")]
    rows.append((OTSU, 0, "", *scores_of_none))
    return rows


def nuclei() -> Rows:
    """Scores on nuclei with all labels, of all test images and of each kind."""
    names = {"classical": OTSU}
    kinds = ("fluorescence", "stained", "bright field")
    rows: Rows = [("", "AP at 0.5", "pooled", "AP 0.5 to 0.9", "pooled", "Dice", *(f"{kind}, AP" for kind in kinds))]
    scores = ("ap_50", "ap_50_pooled", "ap_50_to_90", "ap_50_to_90_pooled", "dice")
    for run in [*result("nuclei")["results"], *result("nuclei_10000_steps")["results"]]:
        steps = f", {run['steps']:,} steps" if "steps" in run else ""
        cells = [f"{run['all'][score]:.3f}" for score in scores]
        cells += [f"{run[kind]['ap_50']:.3f} and {run[kind]['ap_50_to_90']:.3f}" for kind in kinds]
        rows.append((names.get(run["method"], run["method"]) + steps, *cells))
    return rows


def drawn_masks() -> Rows:
    """Scores of masks that a denoiser draws, mean over the seeds, and of a segmenter's."""
    scores = {"dice": "Dice", "calibration_error": "calibration error", "calibrated": "after calibration"}
    scores |= {"errors_in_doubt": "share of errors among the tenth most in doubt"}
    rows: Rows = [("", "seconds of training", *scores.values())]
    runs = result("drawn_masks")["results"]
    for method in dict.fromkeys(run["method"] for run in runs):
        same = [run for run in runs if run["method"] == method]
        means = [statistics.mean(run[name] for run in same) for name in ("seconds", *scores)]
        rows.append((method, f"{means[0]:,.0f}", *(f"{mean:.3f}" for mean in means[1:])))
    return rows


def alignment() -> Rows:
    """Distances on the way of a denoiser that is aligned with a segmenter, and of one that is not."""
    record = result("alignment")
    steps = list(record["results"][0]["distances"])
    rows: Rows = [("", "seeds", *(f"distance after {step} steps" for step in steps))]
    for method in ("alone", "aligned"):
        same = [run for run in record["results"] if run["method"] == method]
        each = [[run["distances"][step] for run in same] for step in steps]
        cells = [f"{statistics.mean(one):.1f} ({min(one):.1f} to {max(one):.1f})" for one in each]
        rows.append((method, str(len(same)), *cells))
    rows.append(("other tiles", "", *[""] * (len(steps) - 1), f"{record['tiles']:.1f}"))
    return rows


def segmentation_speed() -> Rows:
    """Rates of segmenting slices of 512x512."""
    rows: Rows = [("", "parameters", "multiply-adds a slice", "megapixels/s")]
    for run in result("segmentation_speed")["results"]:
        rows.append((run["network"], run["parameters"], run["multiply-adds a slice"], f"{run['megapixels/s']:.2f}"))
    return rows


# --- conditions


def conditions() -> Rows:
    """How well images fit their conditions, and those of others."""
    names = {
        "class": "class",
        "text": "caption",
        "map": "semantic map",
        "boxes": "box",
        "pairs": "paired image: outlines",
        "enlarging": "image of a fourth of the width",
        "inpainting": "image with a hole",
    }
    rows: Rows = [("condition", "figure", "drawn", "shuffled", "beside it", "seconds of training")]
    for run in result("conditions")["results"]:
        drawn = f"{run['value']:.2f}"
        if run["interval"]:
            drawn += " ({:.2f} to {:.2f})".format(*run["interval"])
        beside = ", ".join(f"{name} {value:.2f}" for name, value in run["beside"].items())
        cells = (drawn, f"{run['shuffled']:.2f}", beside, f"{run['seconds']:,.0f}")
        rows.append((names[run["condition"]], run["figure"], *cells))
    return rows


# --- latents


def latents() -> Rows:
    """Training on stored latents, and on images encoded at every step."""
    rows: Rows = [("training on", "images/s")]
    names = {"kept latents": "stored latents", "encoded at every step": "images, encoded at every step"}
    return rows + [(names[run["latents"]], run["images/s"]) for run in result("latents")["results"]]


def latents_against_pixels() -> Rows:
    """Diffusion of latents and of pixels in the same time."""
    record = result("latents_against_pixels")
    rows: Rows = [("diffusion of", "steps", "images seen", "distance", "words found", "710 images drawn in, s")]
    for run in record["results"]:
        steps = f"{run['steps']:,} of {run['batch_size']}"
        words = f"{run['average_precision']:.3f}"
        seconds = f"{run['seconds_drawing']:.0f}"
        rows.append((run["diffusion of"], steps, f"{run['images_seen']:,}", f"{run['distance']:.2f}", words, seconds))
    trained_on, kept_apart = record["trained_on"], record["kept_apart"]
    real = "real images: distance of as many to train on, words found in those kept apart"
    rows.append((real, "", "", f"{trained_on['distance']:.2f}", f"{kept_apart['average_precision']:.3f}", ""))
    return rows


# --- README


def recipes() -> Rows:
    """What the recipes train, need and take, from the first three lines of each."""
    rows: Rows = [("`--config`", "trains", "needs", "takes")]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        cells = [line.split(": ", 1)[1].removesuffix(".") for line in path.read_text().splitlines()[:3]]
        rows.append((f"`{path.stem}`", *cells))
    return rows


def readme() -> Rows:
    """The results that help to decide whether to use the package."""
    cpu, avx2, runs = result("train_step_cifar10"), result("train_step_medium_avx2"), result("gpu")["runs"]
    quality = {(run["contender"], run["minutes"]): run for run in result("time_to_quality")["results"]}
    after_ten = {
        name: f"{quality[name, 10]['distance']:.0f}" for name in ("ours", "ours_unconditional", "diffusers_tuned")
    }
    all_labels = {run["method"]: run["all"]["ap_50_to_90"] for run in result("nuclei")["results"]}
    membranes = {run["contender"]: run["v_rand"] for run in result("isbi2012")["results"] if run["views"]}
    pixels = {run["diffusion of"]: run["distance"] for run in result("latents_against_pixels")["results"]}

    def on_gpu(task: str, batch_size: int, contender: str, key: str = "step") -> str:
        found = [
            rate(record)
            for run in runs
            for record in run["contenders"]
            if (record["task"], record["batch_size"], record["contender"], record.get("key"))
            == (task, batch_size, contender, key)
        ]
        return significant(found[-1])

    def times(record: dict[str, Any], name: str) -> str:
        return f"{rate(record['contenders'][name]):.1f}"

    dpm = "DPMSolverMultistepScheduler"
    return [
        ("", "unet_diffusion", "compared with"),
        ("Training on two cores with AVX2, 8.9 M network, images/s", times(avx2, "unet_diffusion"),
         f"diffusers {times(avx2, 'diffusers')}; tuned {times(avx2, 'diffusers_tuned')}"),
        ("Training on two cores with AVX-512, 35.7 M network, images/s", times(cpu, "unet_diffusion"),
         f"diffusers {times(cpu, 'diffusers')}; tuned {times(cpu, 'diffusers_tuned')}"),
        ("Training on an H200, 35.7 M network, batch 128, images/s", on_gpu("train", 128, "unet_diffusion"),
         f"diffusers {on_gpu('train', 128, 'diffusers')}; "
         f"tuned, with CUDA graphs {on_gpu('train', 128, 'diffusers_graphed')}"),
        ("Sampling on an H200, 20 steps, batch 64, images/s", on_gpu("sample", 64, "unet_diffusion", dpm),
         f"diffusers {on_gpu('sample', 64, 'diffusers', dpm)}; tuned {on_gpu('sample', 64, 'diffusers_tuned', dpm)}"),
        ("Fashion-MNIST after ten minutes on two cores, Fréchet distance (less is better)",
         f"{quality['ours', 10]['guided']['distance']:.0f}; unguided {after_ten['ours']}, without labels "
         f"{after_ten['ours_unconditional']}",
         f"diffusers tuned {after_ten['diffusers_tuned']}, without labels"),
        ("Nuclei with 320 labelled images, AP at IoU 0.5 to 0.9",
         f"{all_labels['nuclei_segment']:.3f}", f"{all_labels['classical']:.3f}, 20 lines without training"),
        ("Membranes of ISBI 2012, ten minutes, without affinities, V_rand", f"{membranes['modern']:.3f}",
         f"{membranes['port']:.3f}, a plain port of the 2015 network"),
        ("128x128 images from captions, 3.5 minutes on an H200, Fréchet distance",
         f"{pixels['latents']:.2f}, latent diffusion", f"{pixels['pixels']:.2f}, diffusion of pixels"),
    ]  # fmt: skip


# --- pages


def result(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rate(record: dict[str, Any]) -> float:
    """Images a second, the median of the turns."""
    return statistics.median(record["images_per_second"])


def significant(value: float | None) -> str:
    """Whole numbers from 100 on, one decimal below; nothing for what was not measured."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def by_three(records: Sequence[dict[str, Any]]) -> Iterable[Sequence[dict[str, Any]]]:
    """Ours and two peers at a time."""
    return (records[start : start + 3] for start in range(0, len(records), 3))


def markdown(rows: Rows) -> str:
    """A table; its first row is the header."""
    header, *others = [" | ".join(str(cell) for cell in row) for row in rows]
    return "".join(f"| {line} |\n" for line in (header, " | ".join("---" for _ in rows[0]), *others))


def with_tables(page: str) -> str:
    """The text of a page with its tables written anew."""

    def written(match: re.Match[str]) -> str:
        make: Callable[[], Rows] = globals()[match[2]]
        return match[1] + markdown(make()) + match[3]

    return MARKED.sub(written, page)


def main() -> int:
    """Writes the tables, or names the pages whose tables differ from the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table differs")
    check = parser.parse_args().check
    different = {path: text for path in PAGES if (text := with_tables(path.read_text())) != path.read_text()}
    for path, text in different.items():
        print(
            f"{path.relative_to(ROOT)}: "
            + ("has a table that is out of date; run python docs/tables.py" if check else "written")
        )
        if not check:
            path.write_text(text)
    return int(check and bool(different))


if __name__ == "__main__":
    sys.exit(main())
