"""What do kept latents save? Training steps of a denoiser on them, and with images encoded at every step.

    python benchmarks/latents.py --run DIR

DIR was made by unet-diffusion two-stages. Both train its denoiser on, bfloat16, on the same images: forward, backward
and AdamW, without mirror images; they take turns in blocks.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from measure import RESULTS, Step, alternate, environment, fastest_autocast, table, write_json
from torch import Tensor

import unet_diffusion as ud
from unet_diffusion.data import Folder, ImageDataModule, scale_to_unit_range
from unet_diffusion.diffusion.losses import squared_error
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.latents.space import LatentSpace
from unet_diffusion.latents.store import read_latents
from unet_diffusion.models.autoencoders import latent_moments
from unet_diffusion.models.speed import keep_freed_memory
from unet_diffusion.runtime.randomness import keyed_generator

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]  # mean and standard deviation of the latents of these images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="what unet-diffusion two-stages made")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="a block")
    parser.add_argument("--json", default=str(RESULTS / "latents.json"))
    options = parser.parse_args()
    keep_freed_memory()
    latents = read_latents(options.run / "latents")
    ways = {"kept latents": kept(options.run), "encoded at every step": encoded(options.run)}
    trained = ud.load(options.run / "denoiser")
    steps = {
        name: training_step(trained, latents.space, moments, len(latents), options.batch_size)
        for name, moments in ways.items()
    }
    seconds = alternate(steps, options.blocks, options.steps)
    rows = [{"latents": name, "images/s": round(options.batch_size / statistics.median(taken), 1)}
            for name, taken in seconds.items()]  # fmt: skip
    print(table(rows))
    print(f"written: {write_json(options.json, {'environment': environment(), 'results': rows, 'seconds': seconds})}")


def kept(run: Path) -> Moments:
    latents = read_latents(run / "latents")
    return lambda index: (latents.mean.index_select(0, index).float(), latents.std.index_select(0, index).float())


def encoded(run: Path) -> Moments:
    settings = json.loads((run / "latents" / "settings.json").read_text())
    channels, height, width = settings["image_shape"]
    form = {"image_size": (height, width), "channels": channels, "background": settings["background"]}
    data = ImageDataModule(Folder(settings["images"], **form))
    data.setup()
    autoencoder = LatentCodec.of(read_latents(run / "latents").space).autoencoder

    @torch.no_grad()
    def moments(index: Tensor) -> tuple[Tensor, Tensor]:
        with fastest_autocast():
            mean, std = latent_moments(autoencoder, scale_to_unit_range(data.image_set.images.index_select(0, index)))
        return mean.float(), std.float()

    return moments


def training_step(trained: ud.Denoiser, space: LatentSpace, moments: Moments, num_images: int, batch_size: int) -> Step:
    unet, schedule, generator = trained.unet.train(), trained.schedule, keyed_generator(0)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.0e-6)
    captions = [text.token_ids([""] * batch_size) for text in trained.conditions]
    given = {"captions": captions[0]} if captions else {"labels": torch.zeros(batch_size, dtype=torch.int64)}
    inputs = {name: value.detach() for name, value in trained.inputs(given)[0].items()}

    def step() -> None:
        mean, std = moments(torch.randint(num_images, (batch_size,), generator=generator))
        x0 = space.normalise(mean + std * torch.randn(mean.shape, generator=generator))
        t = torch.randint(schedule.num_train_timesteps, (batch_size,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        with fastest_autocast():
            prediction = unet(schedule.add_noise(x0, noise, t), t, **inputs)
        optimizer.zero_grad()
        squared_error(prediction, schedule.target(x0, noise, t)).mean().backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
