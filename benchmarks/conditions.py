"""Does a denoiser draw what its condition says? Seven kinds of condition, each trained for minutes on Fashion-MNIST.

    python benchmarks/conditions.py --root DIR

DIR holds FashionMNIST/raw. The first images become folders of files as a user has them: classes, captions, silhouettes
as label images, outlines as paired images, and, for boxes, clothes of random sizes at random places. Each condition is
trained by `unet-diffusion fit` in a process of its own, by the recipe `folder` and the overlay of the condition, and
scored by `unet-diffusion evaluate` in another, which draws for held-out images and says how well the samples fit.
Beside it is the same figure for the conditions of other images. A denoiser that ignores its condition would reach about
as much. A segmenter that judges maps and boxes is trained on the clothes at random places. Each result is written to
the JSON at once; trainings and results that exist are not repeated.

The sheet is made of the pictures on the pages of the evaluations.
"""

import argparse
import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from features import fashion_mnist
from measure import RESULTS, environment, process_seconds, table, write_json
from numpy.typing import NDArray
from PIL import Image
from skimage.filters import sobel
from skimage.transform import resize

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SIDE, PAD = 32, 2  # pixels of an image, and of the frame around the 28x28 of the set
BRIGHT = 30  # grey levels above which a pixel belongs to the silhouette
OUTLINE = 0.15  # of the gradient: more is an outline
SMALLEST = 12  # pixels, of clothes in boxes
GUIDED, GUIDANCE_SCALE = ("class", "text", "map", "boxes"), 2
SHEET, GAP = 1304, 12  # pixels: its width, of parts of five, five and three columns; and the gap between parts
PART = (492, 410)  # pixels of five columns and four rows of a picture, with the titles
STEPS = ["--trainer.max_steps=800", "--trainer.val_check_interval=800", "--samples.every_n_steps=0"]
WITHOUT = ["--model.unet.in_channels=1", "--model.unet.out_channels=1"]
FIGURES = {  # of an evaluation
    "class": "class_agreement",
    "text": "words_found",
    "map": "semantic_map_iou",
    "boxes": "boxes_hit",
    "pairs": "paired_image_psnr",
    "enlarging": "small_image_psnr",
    "inpainting": "masked_image_psnr",
}


def condition(name: str, **arguments: Any) -> str:
    """The option of fit that trains a condition of this package."""
    class_path = f"unet_diffusion.diffusion.conditions.{name}"
    return f"--model.conditions={json.dumps([{'class_path': class_path, 'init_args': arguments}])}"


KINDS = {  # what is added to the recipe; FILES is the folder of files, RUNS that of runs
    "class": [*WITHOUT, "--data.class_labels=true", "--model.unet.num_class_embeds=11", "--model.label_dropout=0.1"],
    "text": [
        *(*WITHOUT, "--data.captions=true", "--model.unet.context_dim=64"),
        condition(
            "text.TextTokens", context_dim=64, vocab_size=600, max_length=8, num_layers=1, num_heads=2, dropout=0.1
        ),
    ],
    "map": [
        *("--config=conditions/semantic_map", "--model.unet.in_channels=3", "--model.unet.out_channels=1"),
        "--data.semantic_map=FILES/map",
    ],
    "boxes": [
        *("--config=conditions/boxes", *WITHOUT, "--model.unet.context_dim=64"),
        *("--data.root=FILES/placed", "--data.boxes=FILES/boxes.json"),
        condition("box_tokens.BoxTokens", context_dim=64, num_classes=10, max_boxes=2, num_heads=2, dropout=0.1),
    ],
    "pairs": [
        *("--config=conditions/paired_image", "--model.unet.in_channels=2", "--model.unet.out_channels=1"),
        *("--model.conditions.channels=1", "--data.paired_image=FILES/outline"),
    ],
    "enlarging": [
        *("--model.codec=unet_diffusion.latents.codec.LatentCodec", "--model.codec.autoencoder=RUNS/autoencoder"),
        *("--model.unet.in_channels=5", "--model.unet.out_channels=4", "--model.unet.num_class_embeds=1000"),
        *("--model.unet.channels=[64,128]", "--model.unet.attention_levels=[]"),
        condition("low_resolution.LowResolution", channels=1),
    ],
    "inpainting": [
        *("--model.unet.in_channels=3", "--model.unet.out_channels=1"),
        condition("masked_image.MaskedImage", channels=2),
    ],
}
DENOISER = [
    *("--config=folder", "--data.root=FILES/image", f"--data.image_size={SIDE}", "--data.channels=1"),
    *("--data.batch_size=64", "--data.horizontal_flip=false", "--model.unet.channels=[32,64,128]"),
    *("--model.unet.layers_per_block=1", "--model.unet.attention_levels=[2]", "--model.unet.head_channels=32"),
    *("--model.optimizer.lr=1.0e-3", "--model.lr_warmup_steps=60", "--model.ema_decay=0.99", *STEPS),
]
OTHERS = {
    "autoencoder": [  # says how far images are enlarged: by four
        *("--config=autoencoder_kl", "--data.root=FILES/image", f"--data.image_size={SIDE}", "--data.channels=1"),
        *("--data.batch_size=32", "--model.autoencoder.in_channels=1", "--model.autoencoder.channels=[32,64,64]"),
        *STEPS,
    ],
    "segmenter": [  # of background and clothes, wherever these are and however large
        *("--config=cells", "--data.source=PairedFiles", "--data.source.images=FILES/placed"),
        *("--data.source.labels=FILES/placed_map", "--data.targets.label_format=classes"),
        *("--data.targets.num_classes=2", "--data.targets.separate_borders=false", "--data.augmentation=null"),
        *(f"--data.window_size={SIDE}", "--data.windows_per_image=1", "--data.batch_size=64"),
        *("--model.unet.out_channels=2", "--model.unet.channels=[16,32,64]", *STEPS, "--trainer.max_steps=300"),
        "--trainer.val_check_interval=300",
    ],
}
NEEDED = {"map": ["segmenter"], "boxes": ["segmenter"], "enlarging": ["autoencoder"]}


def main() -> None:
    options = parsed()
    files = options.work / "files"
    results = json.loads(options.json.read_text())["results"] if options.json.exists() else []
    known = {result["condition"] for result in results}
    new = [kind for kind in options.kinds if kind not in known]
    if new and not (files / "boxes.json").exists():
        write_files(options.root, files, options.num_images)
    for kind in new:
        print(kind, flush=True)
        seconds = trained(options, kind)
        results.append({"condition": kind, **evaluated(options, kind), "seconds": seconds})
        print(f"  {results[-1]}", flush=True)
        write_json(options.json, {"environment": environment(), "results": results})
    print(table([{key: result[key] for key in ("condition", "figure", "value", "shuffled")} for result in results]))
    pages = [page_of(options.work / result["condition"]) for result in results]
    if all(page.exists() for page in pages):  # results may be of another folder of runs
        sheet(pages, options.json.with_suffix(".png"))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Further options are those of unet-diffusion fit, such as --trainer.max_steps=100.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--root", required=True, help="folder that holds FashionMNIST/raw")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--num_images", type=int, default=8000, help="images that become files")
    parser.add_argument("--num_val", type=int, default=200, help="of them, held out")
    parser.add_argument("--num_samples", type=int, default=200, help="to draw for these")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--work", type=Path, default=Path("runs/conditions"), help="for files, runs and logs")
    parser.add_argument("--json", type=Path, default=RESULTS / "conditions.json")
    options, options.of_fit = parser.parse_known_args()
    if any("=" not in option for option in options.of_fit):
        parser.error(f"write options of fit as --NAME=VALUE, got {' '.join(options.of_fit)}")
    return options


# --- files


def write_files(root: str, files: Path, num_images: int) -> None:
    """Images in a folder for each class, and what is known of them in files beside."""
    images, targets = fashion_mnist(root, train=True)
    rng = np.random.default_rng(0)
    captions = ["file_name,text"]
    coco: dict[str, list[Any]] = {"images": [], "annotations": []}
    coco["categories"] = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    for number, target in enumerate(targets[:num_images].tolist()):
        item = ((images[number, 0] / 2 + 0.5) * 255).round().numpy().astype(np.uint8)
        image = np.pad(item, PAD)
        placed, box = at_random_place(item, rng)
        pictures = {"image": image, "map": image > BRIGHT, "outline": (sobel(image / 255.0) > OUTLINE) * 255}
        name = f"{NAMES[target]}/{number:05d}.png"
        for folder, pixels in {**pictures, "placed": placed, "placed_map": placed > BRIGHT}.items():
            path = files / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        captions.append(f"{name},a {NAMES[target]}")
        coco["images"].append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        coco["annotations"].append({"id": number, "image_id": number, "category_id": target, "bbox": box})
    (files / "image" / "metadata.csv").write_text("\n".join(captions))
    (files / "boxes.json").write_text(json.dumps(coco))


def at_random_place(item: NDArray[np.uint8], rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[int]]:
    """The clothes of an image in another size at a random place, and their box (left, top, width, height)."""
    rows, columns = (np.flatnonzero((item > BRIGHT).any(axis=axis)) for axis in (1, 0))
    cut = item[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    longest = rng.integers(SMALLEST, SIDE + 1)
    height, width = (max(round(side * longest / max(cut.shape)), 2) for side in cut.shape)
    top, left = rng.integers(SIDE - height + 1), rng.integers(SIDE - width + 1)
    placed = np.zeros((SIDE, SIDE), np.uint8)
    placed[top : top + height, left : left + width] = resize(cut, (height, width), preserve_range=True).round()
    return placed, [int(value) for value in (left, top, width, height)]


# --- runs


def trained(options: argparse.Namespace, kind: str) -> float:
    """Trains a kind of condition, and first what it needs, and returns the seconds without these."""
    of_trainer = [option for option in options.of_fit if option.startswith("--trainer.")]
    for name in NEEDED.get(kind, []):
        fit(options, name, [*OTHERS[name], *of_trainer])
    return fit(options, kind, [*DENOISER, *KINDS[kind], *options.of_fit])


def fit(options: argparse.Namespace, name: str, arguments: list[str]) -> float:
    """Trains in a process of its own, unless that was done before, and returns the seconds."""
    run, record = options.work / name, options.work / f"{name}.json"  # written when training has ended
    arguments = [*arguments, f"--data.num_val={options.num_val}"]
    if not record.exists():
        shutil.rmtree(run, ignore_errors=True)  # of a training that was cut off
        places = {"FILES": str((options.work / "files").resolve()), "RUNS": str(options.work.resolve())}
        placed = [re.sub("FILES|RUNS", lambda match: places[match[0]], argument) for argument in arguments]
        placed.sort(key=lambda argument: not argument.startswith("--config"))  # options change what recipes set
        command = [sys.executable, "-m", "unet_diffusion", "fit", *placed, f"--trainer.default_root_dir={run}"]
        seconds = round(process_seconds(command, options.work / f"{name}.log"), 1)
        write_json(record, {"arguments": arguments, "seconds": seconds})
    trained = json.loads(record.read_text())
    if trained["arguments"] != arguments:
        raise SystemExit(f"{run} was trained with other options; delete {record}, or choose another --work")
    return trained["seconds"]


def evaluated(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The figure that says whether samples follow their condition, and the same of other things."""
    run = options.work / kind
    command = [
        *(sys.executable, "-m", "unet_diffusion", "evaluate", str(run), f"--num_images={options.num_samples}"),
        *(f"--num_inference_steps={options.num_inference_steps}", "--seed=0", "--overwrite"),
        *([f"--guidance_scale={GUIDANCE_SCALE}"] if kind in GUIDED else []),
        *([f"--segmenter={options.work / 'segmenter'}"] if "segmenter" in NEEDED.get(kind, []) else []),
    ]
    process_seconds(command, run.with_name(f"{kind}_evaluation.log"))
    figure = json.loads((run / "evaluation" / "evaluation.json").read_text())["figures"][FIGURES[kind]]
    real = {} if figure["real"] is None else {"real images": figure["real"]}
    beside = real | {name: value for name, value in figure["beside"].items() if name != "shuffled"}
    of_samples = {"value": figure["value"], "interval": figure["interval"], "shuffled": figure["beside"]["shuffled"]}
    return {"figure": figure["title"], "images": options.num_samples, **of_samples, "beside": beside}


# --- the sheet


def page_of(run: Path) -> Path:
    return run / "evaluation" / "evaluation.html"


def sheet(pages: list[Path], path: Path) -> None:
    """Four rows and up to five columns of the picture on each page, in lines of up to three or four."""
    whole, left, top = Image.new("RGB", (SHEET, len(pages) * (PART[1] + GAP)), "white"), 0, 0
    for picture in map(picture_on, pages):
        part = picture.crop((0, 0, min(picture.width, PART[0]), min(picture.height, PART[1])))
        if left + part.width > SHEET:
            left, top = 0, top + PART[1] + GAP
        whole.paste(part, (left, top))
        left += part.width + GAP
    whole.crop((0, 0, SHEET, top + PART[1])).save(path, optimize=True)


def picture_on(page: Path) -> Image.Image:
    """The picture of conditions and what was drawn for them on the page of an evaluation."""
    key = {"class": "classes", "text": "captions"}.get(page.parents[1].name, "conditions")
    match = re.search(f'<figure id="{key}"><img src="data:image/png;base64,([^"]+)"', page.read_text())
    assert match is not None, f"{page} has no picture of {key}"
    return Image.open(io.BytesIO(base64.b64decode(match[1])))


if __name__ == "__main__":
    main()
