"""Does a denoiser draw what its condition says? Seven kinds of condition, each trained for minutes on Fashion-MNIST.

    python benchmarks/conditions.py --root DIR

DIR holds FashionMNIST/raw. The first images become folders of files as a user has them: classes, captions, silhouettes
as label images, outlines as paired images, and, for boxes, clothes of random sizes at random places. Each condition is
trained by `unet-diffusion fit` in a process of its own, by the recipe `folder` and the overlay of the condition. Then
images are drawn for what is known of held-out images, and scored by a figure that falls if the condition is ignored.
The same figure with the conditions of other images, shuffled, is what such a denoiser reaches. A result is kept as soon
as it is there.

    class, text    share of images that a classifier, trained on real ones, gives the class asked for
    map            intersection over union of the silhouette drawn and that asked for
    boxes          share of images whose object has an intersection over union of at least 0.5 with the box asked for
    pairs          peak signal-to-noise ratio against the image that the outlines are of
    enlarging      the same, from a fourth of the width; beside it, that of bicubic interpolation
    inpainting     the same inside the mask; beside it, that of the mean of the rest

The sheet has a row for each kind: four conditions, and the images drawn for them.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features import classes, fashion_mnist, trained_classifier
from measure import RESULTS, environment, process_seconds, table, write_json
from numpy.typing import NDArray
from PIL import Image
from skimage.filters import sobel
from skimage.transform import resize
from torch import Tensor
from torch.nn.functional import interpolate

import unet_diffusion as ud
from unet_diffusion.data import Folder, scale_to_unit_range, split_by_name
from unet_diffusion.diffusion.conditions.low_resolution import shrink
from unet_diffusion.evaluation.following_scores import boxes_hit, enlarged, filled_with_mean
from unet_diffusion.evaluation.image_quality import psnr
from unet_diffusion.evaluation.scores_of_counts import iou_of
from unet_diffusion.evaluation.segmented_images import class_counts
from unet_diffusion.runtime.pictures import save_grid

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SIDE, PAD = 32, 2  # pixels of an image, and of the frame around the 28x28 of the set
BRIGHT = 30  # grey levels above which a pixel belongs to the silhouette
OUTLINE = 0.15  # of the gradient: more is an outline
SMALLEST = 12  # pixels, of clothes in boxes
NUM_SHOWN = 4
GUIDANCE = 2.0
WITHOUT = ["--model.unet.in_channels=1", "--model.unet.out_channels=1"]


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


def main() -> None:
    options = parsed()
    files = options.work / "files"
    if not (files / "boxes.json").exists():
        write_files(options.root, files, options.num_images)
    results = json.loads(options.json.read_text())["results"] if options.json.exists() else []
    known = {one["condition"] for one in results}
    for kind in options.kinds:
        if kind in known:
            continue
        if kind == "enlarging" and not (options.work / "autoencoder").exists():
            autoencoder(options, files)
        print(kind, flush=True)
        seconds = trained(options, kind, files)
        results.append({"condition": kind, "seconds": seconds, **measured(options, kind, files)})
        print(f"  {results[-1]}", flush=True)
        write_json(options.json, {"environment": environment(), "results": results})
    print(table([{key: one.get(key, "") for key in ("condition", "figure", "drawn", "shuffled")} for one in results]))
    sheet(options)


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
    parser.add_argument("--num_val", type=int, default=200, help="of them, to draw for")
    parser.add_argument("--num_single", type=int, default=48, help="of these, where images are drawn one by one")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--work", type=Path, default=Path("runs/conditions"), help="for files, runs and logs")
    parser.add_argument("--json", type=Path, default=RESULTS / "conditions.json")
    options, options_of_fit = parser.parse_known_args()
    options.of_fit = options_of_fit
    return options


# --- files


def write_files(root: str, files: Path, num_images: int) -> None:
    """Images in a folder for each class, and what is known of them in files beside."""
    images, targets = fashion_mnist(root, train=True)
    rng = np.random.default_rng(0)
    captions, boxes = ["file_name,text"], list[dict[str, Any]]()
    for number in range(num_images):
        kind = NAMES[int(targets[number])]
        item = ((images[number, 0] / 2 + 0.5) * 255).round().numpy().astype(np.uint8)
        image = np.pad(item, PAD)
        silhouette = image > BRIGHT
        name = f"{kind}/{number:05d}.png"
        outline = sobel(image / 255.0) > OUTLINE
        placed, box = at_random_place(item, rng)
        for folder, pixels in (("image", image), ("map", silhouette), ("outline", outline * 255), ("placed", placed)):
            path = files / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        captions.append(f"{name},a {kind}")
        boxes.append({"image_id": number, "category_id": int(targets[number]), "bbox": box, "file_name": name})
    (files / "image" / "metadata.csv").write_text("\n".join(captions))
    coco = {
        "images": [{"id": b["image_id"], "file_name": b["file_name"], "width": SIDE, "height": SIDE} for b in boxes],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
        "annotations": [{"id": b["image_id"], **{key: b[key] for key in list(b)[:3]}} for b in boxes],
    }
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


def trained(options: argparse.Namespace, kind: str, files: Path) -> float:
    """Trains a kind of condition in a process of its own, and returns the seconds."""
    overlay = [
        one.replace("FILES", str(files.resolve())).replace("RUNS", str(options.work.resolve())) for one in KINDS[kind]
    ]
    configs, others = (
        [one for one in overlay if one.startswith("--config") is is_config] for is_config in (True, False)
    )
    common = [
        *(f"--data.root={files / 'image'}", f"--data.image_size={SIDE}", "--data.channels=1", "--data.batch_size=64"),
        *(f"--data.num_val={options.num_val}", "--data.horizontal_flip=false", "--model.unet.channels=[32,64,128]"),
        *("--model.unet.layers_per_block=1", "--model.unet.attention_levels=[2]", "--model.unet.head_channels=32"),
        *("--model.optimizer.lr=1.0e-3", "--model.lr_warmup_steps=60", "--model.ema_decay=0.99"),
        *("--trainer.max_steps=800", "--trainer.val_check_interval=800", "--samples.every_n_steps=0"),
    ]
    return fit(options.work / kind, ["--config=folder", *configs, *common, *others, *options.of_fit])


def autoencoder(options: argparse.Namespace, files: Path) -> float:
    """Trains the autoencoder, which says how far images are enlarged: by four."""
    arguments = [
        *("--config=autoencoder_kl", f"--data.root={files / 'image'}", f"--data.image_size={SIDE}"),
        *("--data.channels=1", f"--data.num_val={options.num_val}", "--data.batch_size=32"),
        *("--model.autoencoder.in_channels=1", "--model.autoencoder.channels=[32,64,64]"),
        *("--trainer.max_steps=800", "--trainer.val_check_interval=800", "--samples.every_n_steps=0"),
    ]
    steps = [one for one in options.of_fit if one.startswith("--trainer.")]
    return fit(options.work / "autoencoder", [*arguments, *steps])


def fit(run: Path, arguments: list[str]) -> float:
    shutil.rmtree(run, ignore_errors=True)  # of a run that was cut off
    command = [sys.executable, "-m", "unet_diffusion", "fit", *arguments, f"--trainer.default_root_dir={run}"]
    return round(process_seconds(command, run.with_name(f"{run.name}.log")), 1)


# --- scores


class HeldOut:
    """The held-out images of a kind of condition, and what is known of them."""

    def __init__(self, options: argparse.Namespace, kind: str, files: Path) -> None:
        root = files / ("placed" if kind == "boxes" else "image")
        image_set = Folder(root, image_size=SIDE, channels=1).load(progress=False)
        assert image_set.names is not None
        held_out = split_by_name(image_set.names, options.num_val)[1].tolist()
        single = kind in ("enlarging", "inpainting")
        self.numbers = held_out[: options.num_single] if single else held_out
        self.names = [image_set.names[i] for i in self.numbers]
        self.images = scale_to_unit_range(image_set.images.index_select(0, torch.tensor(self.numbers)))
        self.labels = torch.tensor([NAMES.index(name.split("/")[0]) for name in self.names])
        self.maps = torch.stack([torch.from_numpy(np.array(Image.open(files / "map" / one))) for one in self.names])
        self.outlines = [files / "outline" / name for name in self.names]
        coco = json.loads((files / "boxes.json").read_text())
        of_name = {one["file_name"]: one["id"] for one in coco["images"]}
        self.boxes = [coco["annotations"][of_name[name]]["bbox"] for name in self.names]
        self.mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
        self.mask[:, SIDE // 4 : 3 * SIDE // 4, SIDE // 4 : 3 * SIDE // 4] = True


def drawn(denoiser: ud.Denoiser, kind: str, data: HeldOut, num_inference_steps: int) -> Tensor:
    """An image for the condition of each held-out image, (N, 1, SIDE, SIDE) in [-1, 1]."""
    draw = partial(denoiser.sample, num_inference_steps=num_inference_steps)
    guided, number = partial(draw, guidance_scale=GUIDANCE), len(data.images)
    match kind:
        case "class":
            images = guided(number, labels=[NAMES[i] for i in data.labels.tolist()])
        case "text":
            images = guided(number, captions=[f"a {NAMES[i]}" for i in data.labels.tolist()])
        case "map":
            images = guided(number, conditions={"semantic_map": list(data.maps)})
        case "boxes":
            named = [[(NAMES[i], *box)] for i, box in zip(data.labels.tolist(), data.boxes, strict=True)]
            images = guided(number, conditions={"boxes": named})
        case "pairs":
            images = draw(number, conditions={"paired_image": data.outlines})
        case "enlarging":
            images = torch.cat([draw(1, image=one, noise_level=0) for one in small(data.images)])
        case _:
            images = torch.cat([draw(1, image=one, mask=data.mask) for one in data.images])
    return images.clamp(-1, 1)


def small(images: Tensor) -> Tensor:
    """Images at a fourth of the width."""
    return shrink(images, (SIDE // 4, SIDE // 4))


def measured(options: argparse.Namespace, kind: str, files: Path) -> dict[str, Any]:
    """The figure of the images drawn, of the same with the conditions of others, and of what needs no denoiser."""
    data = HeldOut(options, kind, files)
    images = drawn(ud.load(options.work / kind).to("cpu"), kind, data, options.num_inference_steps)
    torch.save(shown_of(images).clone(), options.work / f"{kind}.pt")
    name, score, others = scorer(options, kind, data)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # neighbours are of one class
    figures = {"drawn": score(images), "shuffled": score(images[order])}
    figures |= {who: score(one) for who, one in others.items()}
    return {"figure": name, "images": len(images), **{who: round(value, 4) for who, value in figures.items()}}


def scorer(
    options: argparse.Namespace, kind: str, data: HeldOut
) -> tuple[str, Callable[[Tensor], float], dict[str, Tensor]]:
    """The name of a kind's figure, what works it out of images, and images that need no denoiser."""
    if kind in ("class", "text"):
        network = classifier(options.root)
        inner = slice(PAD, -PAD)

        def agreement(images: Tensor) -> float:
            return (classes(network, images[:, :, inner, inner]) == data.labels).float().mean().item()

        return "share recognised", agreement, {"real": data.images}
    if kind == "map":
        return (
            "IoU of silhouettes",
            lambda images: float(np.mean(ious(silhouettes(images), data.maps > 0))),
            {"real": data.images},
        )
    if kind == "boxes":
        return "share of boxes hit", lambda images: hits(images, data.boxes), {"real": data.images}
    mask = data.mask.expand(len(data.images), -1, -1, -1)
    others = {}
    if kind == "enlarging":
        others = {"bicubic": enlarged(small(data.images), (SIDE, SIDE))}
    if kind == "inpainting":
        others = {"mean": filled_with_mean(data.images, mask)}
    where = mask if kind == "inpainting" else None
    return "PSNR, dB", lambda images: psnr(data.images, images, where).mean().item(), others


@cache
def classifier(root: str) -> torch.nn.Sequential:
    """The classifier, which takes a minute to train."""
    return trained_classifier(root, seed=0)


def silhouettes(images: Tensor) -> Tensor:
    return (images[:, 0] / 2 + 0.5) * 255 > BRIGHT


def ious(found: Tensor, wanted: Tensor) -> NDArray[np.floating]:
    """The intersection over union of the silhouettes of each image, (N,)."""
    pairs = zip(wanted.long().numpy(), found.long().numpy(), strict=True)
    return iou_of(np.stack([class_counts(truth, drawn, 2) for truth, drawn in pairs]))


def hits(images: Tensor, boxes: list[list[int]]) -> float:
    """The share of images in which the box around all that is bright fits the box asked for."""
    corners = [[left, top, left + width, top + height] for left, top, width, height in boxes]
    pairs = zip(silhouettes(images).int().numpy(), corners, strict=True)
    return float(np.mean([boxes_hit(bright, [box]).item() for bright, box in pairs]))


# --- the sheet


def sheet(options: argparse.Namespace) -> None:
    """A row for each kind: some of its conditions, and then in the same order what was drawn for them."""
    tiles = []
    for kind in options.kinds:
        data = HeldOut(options, kind, options.work / "files")
        shown = {
            "class": data.images,
            "text": data.images,
            "map": data.maps[:, None] * 2.0 - 1,
            "boxes": torch.stack([boxed(box) for box in data.boxes]),
            "pairs": torch.stack([torch.from_numpy(np.array(Image.open(one)))[None] for one in data.outlines]) / 127.5
            - 1,
            "enlarging": interpolate(small(data.images), scale_factor=4),
            "inpainting": data.images * ~data.mask,
        }[kind]
        tiles += [shown_of(shown), torch.load(options.work / f"{kind}.pt")]
    save_grid(torch.cat(tiles), options.json.with_suffix(".png"), columns=2 * NUM_SHOWN)


def shown_of(images: Tensor) -> Tensor:
    """Some of the held-out images, of different classes, as these are sorted by class."""
    return images[torch.linspace(0, len(images) - 1, NUM_SHOWN).long()]


def boxed(box: list[int]) -> Tensor:
    left, top, width, height = box
    picture = torch.full((1, SIDE, SIDE), -1.0)
    picture[:, top : top + height, left : left + width] = 1.0
    return picture


if __name__ == "__main__":
    main()
