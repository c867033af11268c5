"""A judge of small photographs: a residual network that names the class of an image, for label_agreement.py.

The network is that of David Page (https://myrtle.ai/learn/how-to-train-your-resnet/), a residual network (He et al.
2015, https://arxiv.org/abs/1512.03385) with few layers, three eighths as wide: 54 million multiplications for an image
of CIFAR-10. It is trained by Adam with one cycle of the rate (Smith and Topin 2018, https://arxiv.org/abs/1708.07120).
It is kept in a file with all that continues it, so that a training which was cut off goes on with its next epoch, and
one that is done is not repeated.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import fastest_autocast
from torch import Tensor, nn

from unet_diffusion.data import Folder

SIZE = 32  # height and width of the images
WIDTH = 24
NUM_EPOCHS = 10
BATCH_SIZE = 256
MAX_RATE = 0.01
MAX_GRADIENT = 0.1  # of each weight
SHIFT = 4  # pixels by which an image moves at most
LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Labelled:
    """Images (N, 3, 32, 32) in [-1, 1], their classes (N,) int64, and the names of the classes."""

    images: Tensor
    targets: Tensor
    class_names: list[str]


def read(root: str | Path, part: str) -> Labelled:
    """The images of one part, "train" or "test", with a folder for each class.

    Args:
        root: A folder, archive.zip, or archive.zip/folder that holds the parts.
        part: The name of the part.
    """
    image_set = Folder(f"{root}/{part}", image_size=SIZE, class_labels=True).load(progress=False)
    assert isinstance(image_set.images, Tensor)
    assert image_set.class_names is not None
    targets = image_set.entries["labels"]
    assert isinstance(targets, Tensor)
    return Labelled(image_set.images.float() / 127.5 - 1, targets, image_set.class_names)


class Residual(nn.Module):
    """x + two convolutions of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*convolution(channels, channels), *convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def residual_network(num_classes: int, width: int = WIDTH) -> nn.Sequential:
    """Eight convolutions and a linear layer, (B, 3, 32, 32) -> (B, num_classes)."""
    return nn.Sequential(
        *convolution(3, width),
        *[*convolution(width, 2 * width), nn.MaxPool2d(2), Residual(2 * width)],
        *[*convolution(2 * width, 4 * width), nn.MaxPool2d(2)],
        *[*convolution(4 * width, 8 * width), nn.MaxPool2d(2), Residual(8 * width)],
        *[nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8 * width, num_classes)],
    )


def trained_network(
    data: Labelled, path: Path, *, seed: int = 0, num_epochs: int = NUM_EPOCHS, width: int = WIDTH
) -> nn.Sequential:
    """The network in a file, in eval mode, once it has been trained for so many epochs.

    Args:
        data: The images to train on.
        path: The file, which is made if it is not there; after each epoch it holds all that continues the training.
        seed: Seed of the first weights, the order and the changes of the images.
        num_epochs: The number of times that each image is shown.
        width: The number of channels of the first layer.

    Raises:
        SystemExit: If the file is of another training.
    """
    settings = {
        **{"images": content_of(data.images), "class_names": data.class_names},
        **{"seed": seed, "num_epochs": num_epochs, "width": width},
    }
    torch.manual_seed(seed)
    network = residual_network(len(data.class_names), width).to(memory_format=torch.channels_last)
    batch_size = min(BATCH_SIZE, len(data.images))
    num_steps = len(data.images) // batch_size
    optimizer = torch.optim.Adam(network.parameters(), lr=MAX_RATE, weight_decay=1.0e-4)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=MAX_RATE, total_steps=num_epochs * num_steps)
    parts = {"network": network, "optimizer": optimizer, "rates": rates}
    for epoch in range(_continued(path, settings, parts), num_epochs):
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(data.images), generator=generator)
        for batch in order[: num_steps * batch_size].split(batch_size):
            with fastest_autocast():
                scores = network(changed(data.images[batch], generator).to(memory_format=torch.channels_last))
                loss = F.cross_entropy(scores.float(), data.targets[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_value_(network.parameters(), MAX_GRADIENT)
            optimizer.step()
            rates.step()
        print(f"classifier: epoch {epoch + 1} of {num_epochs}, loss {loss.item():.3f}", flush=True)
        _keep(path, {"settings": settings, "epoch": epoch + 1, **{key: one.state_dict() for key, one in parts.items()}})
    return network.eval()


def content_of(images: Tensor) -> str:
    """A hash of the pixels of images, (N, C, H, W)."""
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


def _continued(path: Path, settings: dict[str, Any], parts: dict[str, Any]) -> int:
    """The number of epochs that are done, whose results the parts take over."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["settings"] != settings:
        raise SystemExit(f"{path} holds a classifier of other images or settings; give another file, or remove it")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["epoch"])


def _keep(path: Path, state: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def changed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to four pixels, what comes in mirrored at the edge, and half of them mirrored."""
    padded = F.pad(images, (SHIFT,) * 4, mode="reflect")
    corners = torch.randint(2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    height, width = images.shape[2:]
    moved = torch.stack([
        one[:, top : top + height, left : left + width] for one, (top, left) in zip(padded, corners, strict=True)
    ])  # fmt: skip
    is_mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(is_mirrored, moved.flip(3), moved)


@torch.no_grad()
def classes(network: nn.Sequential, images: Tensor) -> Tensor:
    """The class that the network finds in each image and its mirror image together, (N,) int64."""
    return torch.cat([(network(part) + network(part.flip(3))).argmax(1) for part in images.split(500)])
