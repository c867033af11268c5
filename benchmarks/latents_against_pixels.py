"""Latent diffusion against diffusion of pixels: the same images and captions, the same time, the same hardware.

    python benchmarks/latents_against_pixels.py --images emoji.zip --minutes 15

    latents  an autoencoder for the first part of the time, then the latents of all images, then their denoiser
    pixels   a denoiser of the images themselves, for the whole time

Both denoisers read the captions, and both are recipes of configs/, of a size that fits the hardware (SIZES). The clock
runs from before the first process starts to the last training step: imports, data, compiling, the autoencoder's
validation and export, and the latents are in it. Rates fall to 0 towards the end of the time (see until_time.py). With
--together both train at the same time and share the hardware; otherwise one after the other has it to itself. Where the
denoiser of latents is compiled, this is done while the autoencoder trains, on latents that say nothing: its own
process then finds all kernels in the cache.

Then, outside of the time and the same for both: images for the captions of those images that were kept apart, by 25
steps of DPM-Solver++ with guidance 3. Judged by a classifier of the captions' words (evaluation/captions.py): their
Fréchet distance to the images kept apart, and the average precision with which it finds the words of their captions.
"""

import argparse
import csv
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from features import frechet_distance
from measure import RESULTS, environment, process_seconds, table, write_json
from torch import Tensor
from until_time import STEPS

from unet_diffusion.data import (
    Folder,
    ImageDataModule,
    scale_to_unit_range,
)
from unet_diffusion.evaluation.captions import (
    WordFinder,
    average_precision,
    frequent_words,
    has_words,
    train_word_finder,
)
from unet_diffusion.inference.loading import load_denoiser
from unet_diffusion.latents.space import fingerprint
from unet_diffusion.latents.store import encode_images
from unet_diffusion.models.autoencoders import downsampling, kl_autoencoder
from unet_diffusion.models.speed import Speed
from unet_diffusion.runtime.pictures import save_grid

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
AUTOENCODER, DENOISER = CONFIGS / "autoencoder_kl.yaml", CONFIGS / "latents_text.yaml"
GUIDANCE_SCALE, NUM_INFERENCE_STEPS, SAMPLE_BATCH_SIZE = 3.0, 25, 64
GRID_COLUMNS = 4
STAND_INS = 1024  # latents that say nothing: a few batches
NEVER = 10**9  # steps, seconds
STAGES = ("autoencoder", "encoded", "latents")  # each with a folder of its name


@dataclass(frozen=True)
class Size:
    """What of the recipes is changed to fit images and hardware.

    Args:
        image_size: height and width, in pixels.
        autoencoder, latents, pixels: options beside the recipe.
        share: part of the time that the autoencoder has.
        speed: of the denoisers, see speed.py.
    """

    image_size: int
    autoencoder: tuple[str, ...]
    latents: tuple[str, ...]
    pixels: tuple[str, ...]
    share: float
    speed: Speed = "plain"


def unet(channels: list[int], attention_levels: list[int], **options: Any) -> tuple[str, ...]:
    """Options of a denoiser: of its network, and others by name."""
    given = {"model.unet.init_args.channels": channels, "model.unet.init_args.attention_levels": attention_levels}
    return tuple(f"--{name}={value}" for name, value in {**given, **options}.items())


def rate_and_batch(lr: float, batch_size: int) -> tuple[str, ...]:
    return f"--model.optimizer.init_args.lr={lr}", f"--data.batch_size={batch_size}"


WIDE_TEXT = ("--model.unet.init_args.context_dim=256", "--model.conditions.init_args.context_dim=256")
CUDA_AUTOENCODER = ("--model.autoencoder.init_args.channels=[64,128,128]", *rate_and_batch(1.5e-3, 32))
CUDA_LATENTS = (*unet([128, 256, 384], [1, 2]), *WIDE_TEXT)
CUDA_PIXELS = (*unet([64, 64, 128, 256, 384], [3, 4]), *WIDE_TEXT)
SIZES = {
    "tiny": Size(  # to try the script
        image_size=32,
        autoencoder=("--model.autoencoder.init_args.channels=[32,32,32]", *rate_and_batch(3e-3, 8)),
        latents=(*unet([32, 32, 64], [2]), *rate_and_batch(8e-4, 8)),
        pixels=(*unet([32, 32, 64], [2]), *rate_and_batch(8e-4, 8)),
        share=0.4,
    ),
    "cpu": Size(  # the recipes as they are; of pixels, two levels more and as much attention
        image_size=64,
        autoencoder=(),
        latents=(),
        pixels=(*unet([32, 32, 64, 128, 256], [3, 4]), *rate_and_batch(8e-4, 16)),
        share=0.45,
    ),
    "cuda": Size(
        image_size=128,
        autoencoder=CUDA_AUTOENCODER,
        latents=(*CUDA_LATENTS, *rate_and_batch(6e-4, 128)),
        pixels=(*CUDA_PIXELS, *rate_and_batch(6e-4, 64)),
        share=0.4,
        speed="channels_last",
    ),
    "cuda_graphed": Size(  # from about six minutes on, as compiling takes two of them
        image_size=128,
        autoencoder=CUDA_AUTOENCODER,
        latents=(*CUDA_LATENTS, *rate_and_batch(6e-4, 256), "--model.ema_decay=0.999"),
        pixels=(*CUDA_PIXELS, *rate_and_batch(6e-4, 64), "--model.ema_decay=0.999"),
        share=0.25,
        speed="graphed",
    ),
}


def main() -> None:
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    images = Images.of(options)
    contenders = {name: CONTENDERS[name] for name in options.contenders}
    train_all(options, list(contenders.values()))
    done = [name for name in contenders if (options.work / name / STEPS).exists()]
    judge = Judge.of(options, images)
    settings = {name: getattr(options, name) for name in ("minutes", "together", "seed")}
    size = vars(SIZES[options.size])
    record = {"environment": environment(), **settings, "size": size, **judge.on_real_images()}
    results: list[dict[str, Any]] = []
    for name in done:
        results.append({"diffusion of": name, **trained_result(options, name), **judged(options, name, judge)})
        write_json(options.json, record | {"captions": grid_captions(options, images), "results": results})
        print(table([row(result) for result in results]), flush=True)
    print(f"\nwritten: {options.json}; pictures beside it. Images kept apart: words found with an average precision of "
          f"{record['kept_apart']['average_precision']:.3f}; as many training images: distance "
          f"{record['trained_on']['distance']:.2f}.")  # fmt: skip
    if len(done) < len(contenders):
        sys.exit("a contender failed, see above")


def train_all(options: argparse.Namespace, trainings: list[Callable[[argparse.Namespace], None]]) -> None:
    """At the same time or one after the other; one that fails leaves the others alone."""

    def attempt(train: Callable[[argparse.Namespace], None]) -> None:
        try:
            train(options)
        except RuntimeError as error:
            print(error, flush=True)

    begin = time.time()
    threads = [threading.Thread(target=attempt, args=(train,)) for train in trainings]
    for thread in threads:
        thread.start()
        if not options.together:
            thread.join()
    for thread in threads:
        thread.join()
    print(f"trained in {time.time() - begin:.0f} s", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder or zip archive, with captions")
    parser.add_argument("--minutes", type=float, default=15.0, help="for each")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--together", action="store_true", help="train both at the same time")
    parser.add_argument("--size", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_images", type=int, help="to judge; default: twice as many as are kept apart")
    parser.add_argument("--captions", nargs="+", help="of the two grids; default: the first that are kept apart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/latents_against_pixels"), help="for runs; made anew")
    parser.add_argument("--json", type=Path, default=RESULTS / "latents_against_pixels.json", help="pictures beside it")
    options = parser.parse_args()
    options.images, options.work = options.images.resolve(), options.work.resolve()
    options.device = "cuda" if torch.cuda.is_available() and options.size != "tiny" else "cpu"
    return options


# ------------------------------------------------------------------------------------------------------------- training


def train_latents(options: argparse.Namespace) -> None:
    size, begin = SIZES[options.size], time.time()
    seconds = 60 * options.minutes
    compiling = ThreadPoolExecutor().submit(compile_ahead, options) if size.speed == "graphed" else None
    recipe = [f"--config={AUTOENCODER}", *images_of(options), *size.autoencoder]
    fit(options, "autoencoder", recipe, begin + size.share * seconds)
    command = ["encode", options.work / "autoencoder", options.images, "--output", options.work / "encoded"]
    flags = ["--captions", "--horizontal_flip", "--device", options.device]
    shutil.rmtree(options.work / "encoded", ignore_errors=True)
    run(options, "encoded", [*command, *flags])
    if compiling is not None:
        compiling.result()
    fit(options, "latents", recipe_of_latents(options, options.work / "encoded"), begin + seconds)


def recipe_of_latents(options: argparse.Namespace, root: Path) -> list[str]:
    return [f"--config={DENOISER}", f"--data.root={root}", *SIZES[options.size].latents]


def compile_ahead(options: argparse.Namespace) -> None:
    """Three steps of the denoiser, on latents of the same shape, which leave its kernels in the compiler's cache."""
    folder = options.work / "stand_in"
    shutil.rmtree(folder, ignore_errors=True)
    autoencoder = kl_autoencoder(**yaml.safe_load(AUTOENCODER.read_text())["model"]["autoencoder"]["init_args"])
    autoencoder.save_pretrained(folder / "autoencoder")
    image_size = SIZES[options.size].image_size
    side = image_size // downsampling(autoencoder)
    shape = (autoencoder.config["latent_channels"], side, side)
    settings = {"autoencoder": str(folder / "autoencoder"), "image_shape": (3, image_size, image_size),
                "fingerprint": fingerprint(autoencoder, autoencoder.config), "num_images": STAND_INS,
                "has_mirrored": False, "has_codes": False, "class_names": None}  # fmt: skip
    encode_images(
        folder / "latents",
        lambda numbers: torch.empty(len(numbers), 0),
        lambda images: (torch.randn(len(images), *shape), torch.zeros(len(images), *shape)),
        settings=settings,
        entries={"captions": ["nothing"] * STAND_INS},
    )
    few = ["--data.horizontal_flip=false", "--trainer.max_steps=3"]
    fit(options, "compiled", recipe_of_latents(options, folder / "latents"), NEVER + time.time(), few)


def train_pixels(options: argparse.Namespace) -> None:
    begin = time.time()
    recipe = [f"--config={DENOISER}", "--data=unet_diffusion.data.Folder"]
    recipe += [*images_of(options), "--data.captions=true", "--data.horizontal_flip=true"]
    recipe += ["--model.unet.init_args.in_channels=3", *SIZES[options.size].pixels]
    fit(options, "pixels", recipe, begin + 60 * options.minutes)


CONTENDERS = {"latents": train_latents, "pixels": train_pixels}


def images_of(options: argparse.Namespace) -> list[str]:
    return [f"--data.root={options.images}", f"--data.image_size={SIZES[options.size].image_size}"]


def fit(options: argparse.Namespace, name: str, recipe: Iterable[str], end: float, more: Iterable[str] = ()) -> None:
    """A run of the recipe until that time, with neither validation nor pictures on the way."""
    accelerator = "gpu" if options.device == "cuda" else "cpu"
    settings = ["--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--model.lr_decay=constant"]
    settings += [f"--trainer.val_check_interval={NEVER}", "--trainer.num_sanity_val_steps=0"]
    settings += ["--trainer.enable_progress_bar=false", f"--trainer.accelerator={accelerator}", "--trainer.devices=1"]
    settings += ["--samples.every_n_steps=0", "--samples.num_images=16", "--checkpoint.every_n_train_steps=null"]
    settings += ["--allow=until_time", "--trainer.callbacks+=until_time.UntilTime", f"--trainer.callbacks.end={end}"]
    settings += [f"--{field}={options.seed}" for field in ("seed_everything", "model.seed", "data.init_args.seed")]
    if name != "autoencoder":
        settings += [f"--model.speed={SIZES[options.size].speed}"]
    if accelerator == "gpu":
        settings += ["--trainer.benchmark=true"]
    shutil.rmtree(options.work / name, ignore_errors=True)
    run(options, name, ["fit", *recipe, f"--trainer.default_root_dir={options.work / name}", *settings, *more])


def run(options: argparse.Namespace, name: str, arguments: Iterable[object]) -> None:
    """A command of ours in a process of its own, whose output goes to a file."""
    command = [sys.executable, "-m", "unet_diffusion", *map(str, arguments)]
    seconds = process_seconds(command, options.work / f"{name}.log")
    (options.work / f"{name}.seconds").write_text(f"{seconds:.1f}")
    print(f"{name}: {seconds:.1f} s", flush=True)


def trained_result(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What is known of a run, and of the autoencoder where there is one."""
    trained = load_denoiser(options.work / name)
    settings = trained.settings["data"]["init_args"]
    steps = int((options.work / name / STEPS).read_text())
    result = {"steps": steps, "batch_size": settings["batch_size"], "images_seen": steps * settings["batch_size"],
              "parameters": sum(p.numel() for p in trained.unet.parameters())}  # fmt: skip
    if trained.codec.space is not None:
        result["seconds"] = {stage: float((options.work / f"{stage}.seconds").read_text()) for stage in STAGES}
        result["autoencoder"] = autoencoder_result(options.work / "autoencoder")
        picture = options.json.with_name(f"{options.json.stem}_autoencoder.png")
        shutil.copyfile(options.work / "autoencoder" / "samples.png", picture)
    return result


def autoencoder_result(run_folder: Path) -> dict[str, Any]:
    with open(next(run_folder.glob("logs/*/metrics.csv")), newline="") as file:
        validated = [row for row in csv.DictReader(file) if row.get("val/psnr")]
    scores = {name: float(validated[-1][f"val/{name}"]) for name in ("psnr", "ssim")}
    return {"steps": int((run_folder / STEPS).read_text()), **scores}


# ------------------------------------------------------------------------------------------------------------ judgement


@dataclass(frozen=True)
class Images:
    """All images in [-1, 1] with their captions: those to train on, and those kept apart, as both contenders do."""

    training: Tensor
    training_captions: list[str]
    kept: Tensor
    captions: list[str]

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Images":
        data = ImageDataModule(Folder(options.images, image_size=SIZES[options.size].image_size, captions=True))
        data.setup()
        images, captions = scale_to_unit_range(data.image_set.images), data.entries["captions"]
        trained_on, kept = data.train_indices.tolist(), data.val_indices.tolist()
        return cls(images[trained_on], [captions[i] for i in trained_on], images[kept], [captions[i] for i in kept])


@torch.no_grad()
def seen_by(network: Callable[[Tensor], Tensor], images: Tensor, device: Any) -> Tensor:
    """What a network makes of images, on the CPU."""
    return torch.cat([network(part.to(device)).cpu() for part in images.split(200)])


@dataclass(frozen=True)
class Judge:
    """The classifier, and what it sees in the images that were kept apart."""

    network: WordFinder
    words: list[str]
    images: Images
    features: Tensor

    @classmethod
    def of(cls, options: argparse.Namespace, images: Images) -> "Judge":
        words, started = frequent_words(images.training_captions), time.time()
        num_steps = 20 if options.size == "tiny" else 600
        has, training = has_words(images.training_captions, words), images.training.to(options.device)
        network = WordFinder(training.shape[1:], len(words)).to(options.device)
        train_word_finder(network, lambda rows: training[rows.to(training.device)], has, num_steps=num_steps)
        print(f"classifier of {len(words)} words trained in {time.time() - started:.0f} s", flush=True)
        return cls(network, words, images, seen_by(network.features, images.kept, options.device))

    def verdict(self, images: Tensor, captions: list[str]) -> dict[str, float]:
        device = next(self.network.parameters()).device
        scores = seen_by(self.network, images, device)
        return {
            "distance": frechet_distance(seen_by(self.network.features, images, device), self.features),
            "average_precision": average_precision(scores, has_words(captions, self.words)),
        }

    def on_real_images(self) -> dict[str, Any]:
        """Of those kept apart, and of as many to train on, evenly spread."""
        known = self.images
        some = torch.arange(len(known.kept)) * len(known.training) // len(known.kept)
        trained_on = self.verdict(known.training[some], [known.training_captions[i] for i in some.tolist()])
        return {"words": len(self.words), "kept_apart": self.verdict(known.kept, known.captions),
                "trained_on": trained_on}  # fmt: skip


def grid_captions(options: argparse.Namespace, images: Images) -> list[str]:
    return options.captions or images.captions[:16]


def judged(options: argparse.Namespace, name: str, judge: Judge) -> dict[str, Any]:
    """The verdict on drawn images; the grid is written."""
    picture = options.json.with_name(f"{options.json.stem}_{name}.png")
    save_grid(drawn(options, name, grid_captions(options, judge.images)), picture, columns=GRID_COLUMNS)
    kept = judge.images.captions
    num_images = options.num_images or 2 * len(kept)
    captions = [kept[i % len(kept)] for i in range(num_images)]
    started = time.time()
    images = drawn(options, name, captions)
    seconds = time.time() - started
    save_grid(images[: 8 * 8], options.work / f"more_{name}.png", columns=8)
    return {"num_images": num_images, "seconds_drawing": round(seconds, 1), **judge.verdict(images, captions)}


def drawn(options: argparse.Namespace, name: str, captions: list[str]) -> Tensor:
    """Images of these captions, (N, 3, H, W) in [-1, 1]."""
    denoiser = load_denoiser(options.work / name).to(str(options.device))
    images = denoiser.sample(
        len(captions),
        captions=captions,
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        seed=options.seed,
        batch_size=SAMPLE_BATCH_SIZE,
    )
    return images.clamp(-1, 1)


def row(result: dict[str, Any]) -> dict[str, object]:
    return {
        "diffusion of": result["diffusion of"],
        "steps": result["steps"],
        "images seen": result["images_seen"],
        "parameters": f"{result['parameters'] / 1e6:.1f} M",
        "distance": f"{result['distance']:.2f}",
        "words found": f"{result['average_precision']:.3f}",
        "seconds to draw": result["seconds_drawing"],
    }


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    main()
