"""Features of a small network that is trained on the user's own images: any channels, any size, no download.

A distance between sets of images needs features in which what matters is large. With few images there must be few
features, too: with N images and d features the Fréchet distance is too large by about d (d + 1) / N (in units of a
variance), so there are 64. The network learns three tasks at once, each of which keeps another thing in the features:

- Which image a crop is of (Chen et al. 2020, https://arxiv.org/abs/2002.05709): what an image shows.
- How much noise and blur were added: how sharp and how clean it is.
- The class, where there are classes.

The features are scaled so that each has mean 0 and variance 1 over the training images.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from unet_diffusion.evaluation.selections import Selection
from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.randomness import keyed_generator

SETTINGS: dict[str, Any] = {  # with the contents of the images, what the features are
    "version": 1,  # of the network and of its tasks
    "num_features": 64,
    "num_steps": 300,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "seed": 0,
}
WIDTHS = (32, 64, 96, 128)  # channels of the stem and after each halving
LARGEST_SIDE = 128  # in pixels; larger images are averaged down by a whole factor, which bounds the time they take
LARGEST_MAP = 16  # side after the stem, which bounds it, too
SMALLEST_MAP = 4  # side in pixels after which nothing is halved
MOST_NOISE = 0.5  # standard deviation that is added, of grey values in [-1, 1]
TEMPERATURE = 0.2  # of the task "which image"


class FeatureNetwork(nn.Module):
    """Features of images, (N, C, H, W) in [-1, 1] -> (N, num_features).

    Args:
        image_shape: (C, H, W).
        num_classes: The number of classes; 0 without classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int = 0) -> None:
        super().__init__()
        channels, *sides = image_shape
        self.factor = max(min(sides) // LARGEST_SIDE, 1)
        sides = [side // self.factor for side in sides]
        num_features, stride = SETTINGS["num_features"], 1
        while min(sides) // stride > LARGEST_MAP:
            stride *= 2
        kernel = 3 if stride == 1 else stride
        layers: list[nn.Module] = [nn.Conv2d(channels, WIDTHS[0], kernel, stride, padding=int(stride == 1))]
        side, width = min(sides) // stride, WIDTHS[0]
        for wider in WIDTHS[1:]:
            if side <= SMALLEST_MAP:
                break
            layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, wider, 3, 2, padding=1)]
            side, width = -(-side // 2), wider
        layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        self.layers = nn.Sequential(*layers, nn.Linear(4 * width, num_features))
        self.which_image = nn.Sequential(nn.SiLU(), nn.Linear(num_features, num_features))
        self.quality = nn.Sequential(nn.SiLU(), nn.Linear(num_features, 2))
        self.classes = nn.Sequential(nn.SiLU(), nn.Linear(num_features, num_classes)) if num_classes else None
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    def forward(self, images: Tensor) -> Tensor:
        return self.of_small(self.averaged(images))

    def of_small(self, images: Tensor) -> Tensor:
        """The features of images that are averaged down."""
        return (self.layers(images) - self.mean) / self.std

    def averaged(self, images: Tensor) -> Tensor:
        """Images averaged down to the size that the network takes."""
        return images if self.factor == 1 else F.avg_pool2d(images, self.factor)


def own_features(train: Selection, folder: Path | None, *, progress: bool = True) -> tuple[FeatureNetwork, str]:
    """The network of these training images, and the hash of images and settings; trained once and then read again.

    Args:
        train: The training images; with labels, classes are one of its tasks.
        folder: Where the network is kept, as features-HASH.safetensors; None: nowhere.
        progress: Whether a progress bar is shown.
    """
    key = contents_hash(train)
    num_classes = 0 if train.labels is None else int(train.labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SETTINGS["seed"])
        network = FeatureNetwork(train.image_shape, num_classes)
    path = None if folder is None else folder / f"features-{key}.safetensors"
    if path is not None and path.exists():
        network.load_state_dict(load_file(path))
    else:
        _train(network, train, progress)
        if path is not None:
            with atomic_write(path) as partial:
                save_file(network.state_dict(), partial)
    return network.eval().requires_grad_(False), key


def contents_hash(train: Selection) -> str:
    """A hash of the pixels and classes of images, and of the settings of the features."""
    digest = hashlib.sha256(json.dumps(SETTINGS, sort_keys=True).encode())
    for images in train.batches():
        digest.update(images.numpy().tobytes())
    if train.labels is not None:
        digest.update(train.labels.numpy().tobytes())
    return digest.hexdigest()[:16]


def _train(network: FeatureNetwork, train: Selection, progress: bool) -> None:
    generator = keyed_generator(SETTINGS["seed"])
    num_steps, rate = SETTINGS["num_steps"], SETTINGS["learning_rate"]
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=num_steps)
    for _ in tqdm(range(num_steps), "training features", unit="step", disable=not progress):
        rows = torch.randperm(len(train), generator=generator)[: SETTINGS["batch_size"]]
        images = network.averaged(train.take(rows))
        loss = _loss(network, images, None if train.labels is None else train.labels[rows], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        features = torch.cat([network(images) for images in train.batches()])
    network.mean.copy_(features.mean(0))
    network.std.copy_(features.std(0).clamp(min=1e-6))


def _loss(network: FeatureNetwork, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """The sum of the losses of the tasks, of two views of each image."""
    views = torch.cat([_shifted(images, generator), _shifted(images, generator)])
    views, quality = _degraded(views, generator)
    features = network.of_small(views)
    projected = F.normalize(network.which_image(features), dim=1)
    first, second = projected.chunk(2)
    which = torch.arange(len(images))
    similarity = first @ second.T / TEMPERATURE
    loss = (F.cross_entropy(similarity, which) + F.cross_entropy(similarity.T, which)) / 2
    loss = loss + 4 * F.mse_loss(network.quality(features), quality)  # 4: its loss is small beside the others
    if network.classes is not None and labels is not None:
        loss = loss + F.cross_entropy(network.classes(features), labels.repeat(2))
    return loss


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to an eighth of its side, into its mirror image at the border; no pixel is blended."""
    count, _, height, width = images.shape
    margins = [max(side // 8, 1) if side > 1 else 0 for side in (height, width)]
    padded = F.pad(images, (margins[1], margins[1], margins[0], margins[0]), mode="reflect")
    top, left = (torch.randint(2 * margin + 1, (count, 1), generator=generator) for margin in margins)
    corners = zip(padded, top.flatten().tolist(), left.flatten().tolist(), strict=True)
    return torch.stack([image[:, y : y + height, x : x + width] for image, y, x in corners])


def _degraded(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of which half are blurred and half have noise, and how much of each, (N, 2) in [0, 1]."""
    amounts = torch.rand(len(images), 2, generator=generator) * (torch.rand(len(images), 2, generator=generator) < 0.5)
    reach = 1 if min(images.shape[2:]) <= 16 else 2
    blurred = F.avg_pool2d(F.pad(images, [reach] * 4, mode="replicate"), 2 * reach + 1, stride=1)
    noise, blur = amounts[:, 0, None, None, None], amounts[:, 1, None, None, None]
    return images.lerp(blurred, blur) + MOST_NOISE * noise * torch.randn(images.shape, generator=generator), amounts
