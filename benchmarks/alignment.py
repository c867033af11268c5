"""Does a denoiser learn faster when its features are pulled towards those of a segmenter?

    python benchmarks/alignment.py --root DIR --segmenter RUN

DIR holds image/ of 400 microscopy images (BBBC038), RUN is a run of configs/nuclei_segment.yaml on the first 320 and
their labels. Denoisers of tiles of these images are trained for the same steps from the same seeds:

    alone      as DiffusionModule does
    aligned    the loss has one more term, weight * (1 - cosine), of what a small head makes of the maps at the bottom
               of the denoiser's U, and the segmenter's maps of the clean image at the same resolution on its way up
               (Yu et al. 2024, https://arxiv.org/abs/2410.06940, align with a network trained on other images)

The Fréchet distance of samples to the tiles is that of `unet-diffusion evaluate`, in features of a small network of
these tiles, which has seen neither. It is measured on the way. A result is kept as soon as it is there.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from measure import RESULTS, environment, table, write_json
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import unet_diffusion as ud
from unet_diffusion.data import ImageDataModule, Tiles
from unet_diffusion.evaluation.distances import frechet_distance
from unet_diffusion.evaluation.features import Features, features_named
from unet_diffusion.evaluation.selections import Selection, of_data, of_images, some_of
from unet_diffusion.models.speed import keep_freed_memory

METHODS = ("alone", "aligned")
CHANNELS = [16, 32, 64, 128]  # of the denoiser, at 64x64 down to 8x8
HIDDEN = 256  # channels of the head
SAMPLES_PER_BATCH = 64


class Alignment(nn.Module):
    """How far the maps at the bottom of a denoiser are from a segmenter's, 1 - cosine, (B,).

    Args:
        unet: The denoiser's network, whose last forward pass counts.
        segmenter: The segmenter's network; it is not trained.
        image: A clean image, (1, C, H, W) in [-1, 1], to find the maps of equal size.

    Raises:
        ValueError: If the segmenter has no maps of that size on its way up.
    """

    def __init__(self, unet: ud.DenoiserUNet, segmenter: ud.SegmentationUNet, image: Tensor):
        super().__init__()
        maps: dict[str, Tensor] = {}
        self.__dict__["maps"] = maps  # the last ones, "denoiser" and "segmenter"
        self.__dict__["segmenter"] = segmenter.eval().requires_grad_(False)  # not saved with what is trained

        def keep(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
            maps[name] = output

        unet.mid_block.register_forward_hook(partial(keep, "denoiser"))
        with torch.no_grad():
            unet.eval()(image, torch.zeros(1, dtype=torch.long))
        unet.train()
        for block in segmenter.up_blocks:
            hook = block.register_forward_hook(partial(keep, "segmenter"))
            with torch.no_grad():
                segmenter(image)
            if maps["segmenter"].shape[-2:] == maps["denoiser"].shape[-2:]:
                break
            hook.remove()
        else:
            raise ValueError(f"the segmenter has no maps of {tuple(maps['denoiser'].shape[-2:])} on its way up")
        width, target = maps["denoiser"].shape[1], maps["segmenter"].shape[1]
        self.head = nn.Sequential(nn.Conv2d(width, HIDDEN, 1), nn.SiLU(), nn.Conv2d(HIDDEN, target, 1))
        self.normalized = nn.BatchNorm2d(target, affine=False)  # else the cosine is that of the channels' means

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            self.segmenter(images)
            target = self.normalized(self.maps["segmenter"].float())
        cosine = nn.functional.cosine_similarity(self.head(self.maps["denoiser"]).float(), target, dim=1)
        return (1 - cosine).mean(dim=(1, 2))


class AlignedModule(ud.DiffusionModule):
    """A denoiser in training whose features are pulled towards a segmenter's."""

    alignment: Alignment
    weight: float

    def new_optimizers(self) -> list[Optimizer]:
        return [self.optimizer_factory([*self.unet.parameters(), *self.alignment.head.parameters()])]

    def _errors(self, unet: Any, x0: Tensor, noise: Tensor, t: Tensor, inputs: Any) -> Tensor:
        errors = super()._errors(unet, x0, noise, t, inputs)
        return errors + self.weight * self.alignment(x0) if unet is self.unet else errors


class Distances(Callback):
    """The distance of samples to the images at some steps, and the seconds of training until then."""

    def __init__(self, steps: list[int], num_images: int, features: Features, reference: Tensor):
        self.steps, self.num_images = steps, num_images
        self.features, self.reference = features, reference
        self.at: dict[str, float] = {}  # by step, as in JSON
        self.seconds: dict[str, float] = {}
        self.drawing = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.begun = time.monotonic()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if step not in self.steps:
            return
        begun = time.monotonic()
        self.seconds[str(step)] = round(begun - self.begun - self.drawing, 1)
        options = {"num_inference_steps": 25, "seed": 0, "batch_size": SAMPLES_PER_BATCH}
        images = pl_module.trained.sample(self.num_images, **options).clamp(-1, 1)
        self.at[str(step)] = round(
            frechet_distance(self.features.of(of_images(images), progress=False), self.reference), 3
        )
        self.drawing += time.monotonic() - begun


def main() -> None:
    options = parsed()
    keep_freed_memory()
    results = json.loads(options.json.read_text())["results"] if options.json.exists() else []
    known = {(result["method"], result["seed"]) for result in results}
    data = tiles(options, seed=0)
    train, _ = of_data(data)
    features = features_named("own", None, train, Path(tempfile.mkdtemp()), progress=False)
    reference = features.of(some_of(train, options.num_images), progress=False)
    floor = distance_of_tiles(train, features, reference, options.num_images)
    for seed in options.seeds:
        for method in METHODS:
            if (method, seed) not in known:
                distances = Distances(options.steps, options.num_images, features, reference)
                fit(options, method, seed, distances)
                results.append(
                    {"method": method, "seed": seed, "distances": distances.at, "seconds": distances.seconds}
                )
                print(results[-1], flush=True)
                write_json(options.json, {"environment": environment(), "tiles": floor, "results": results})
    print(table([{"method": one["method"], "seed": one["seed"], **one["distances"]} for one in results]))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--root", type=Path, required=True, help="folder that holds image")
    parser.add_argument("--segmenter", type=Path, required=True, help="run folder or checkpoint")
    parser.add_argument("--steps", nargs="+", type=int, default=[250, 500, 1000], help="to measure at")
    parser.add_argument("--weight", type=float, default=0.5, help="of the alignment, as the paper")
    parser.add_argument("--batch_size", type=int, default=16, help="tiles of a step")
    parser.add_argument("--tile_size", type=int, default=64, help="pixels")
    parser.add_argument("--num_images", type=int, default=512, help="samples, and tiles to compare with")
    parser.add_argument("--num_train", type=int, default=320, help="images to train on, the first by name")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=RESULTS / "alignment.json")
    return parser.parse_args()


def tiles(options: argparse.Namespace, seed: int) -> ImageDataModule:
    source = Tiles(options.root / "image", tile_size=options.tile_size, channels=3, stretch=True,
                   num_images=options.num_train)  # fmt: skip
    data = ImageDataModule(source, batch_size=options.batch_size, horizontal_flip=True, seed=seed)
    data.setup("fit")
    return data


def distance_of_tiles(train: Selection, features: Features, reference: Tensor, num_images: int) -> float:
    """The distance of as many other tiles: the least to hope for."""
    others = train.shuffled().select(torch.arange(min(num_images, len(train))))
    return round(frechet_distance(features.of(others, progress=False), reference), 3)


def fit(options: argparse.Namespace, method: str, seed: int, distances: Distances) -> None:
    """Trains a denoiser by the recipe of nuclei_from_masks, without masks."""
    seed_everything(seed, verbose=False)
    data = tiles(options, seed)
    unet = ud.DenoiserUNet(3, CHANNELS, layers_per_block=1, attention_levels=[], mid_attention=False,
                           norm_num_groups=8)  # fmt: skip
    kind = AlignedModule if method == "aligned" else ud.DiffusionModule
    schedule = ud.NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    optimizer = partial(AdamW, lr=1.0e-3, weight_decay=0.0)
    recipe = {"lr_warmup_steps": 100, "lr_decay": "cosine", "ema_decay": 0.99, "seed": seed}
    module = kind(unet, schedule, optimizer=optimizer, **recipe)
    if isinstance(module, AlignedModule):
        segmenter = ud.load(options.segmenter).to("cpu").unet
        module.alignment = Alignment(module.unet, segmenter, torch.zeros(1, *data.image_shape))
        module.weight = options.weight
    trainer = Trainer(
        max_steps=max(options.steps),
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[distances],
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
