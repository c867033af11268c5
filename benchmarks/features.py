"""How images look to a small classifier of Fashion-MNIST, and how far apart two sets of images are in its eyes.

The Fréchet distance of Heusel et al. 2017 (https://arxiv.org/abs/1706.08500), between Gaussians fitted to features of
28x28 clothes instead of Inception's features of photographs: its numbers compare only with each other.
"""

import torch
import torch.nn.functional as F
from measure import fastest_autocast
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST


def fashion_mnist(root: str, *, train: bool) -> tuple[Tensor, Tensor]:
    """All images, (N, 1, 28, 28) float32 in [-1, 1], and their classes, (N,) int64."""
    data = FashionMNIST(root, train=train)
    return data.data[:, None].float() / 127.5 - 1, data.targets


def small_cnn() -> nn.Sequential:
    """Four convolutions and two linear layers, 28x28 -> 10 classes."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *[*block(1, 32), *block(32, 32), nn.MaxPool2d(2)],
        *[*block(32, 64), *block(64, 64), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)],
    )


def trained_classifier(root: str, seed: int, num_epochs: int = 5, batch_size: int = 128) -> nn.Sequential:
    """The small network, trained on the 60,000 training images, in eval mode."""
    torch.manual_seed(seed)
    images, targets = fashion_mnist(root, train=True)
    network = small_cnn()
    num_steps = num_epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2.0e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2.0e-3, total_steps=num_steps)
    for step in range(num_steps):
        batch = torch.randint(len(images), (batch_size,))
        flip = [3] if step % 2 else []
        with fastest_autocast():
            loss = F.cross_entropy(network(images[batch].flip(flip)), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def features(network: nn.Sequential, images: Tensor) -> Tensor:
    """What the last layer sees of each image, (N, 128), at least 0."""
    return torch.cat([network[:-2](part) for part in images.split(500)])  # without dropout and the last layer


@torch.no_grad()
def classes(network: nn.Sequential, images: Tensor) -> Tensor:
    """The class that the network finds in each image, (N,) int64."""
    return network[-1](features(network, images)).argmax(1)


def label_entropy(labels: Tensor) -> float:
    """Entropy in nats of how often each class occurs: 2.30 if all ten are as frequent, 0 if there is only one."""
    return torch.distributions.Categorical(probs=labels.bincount(minlength=10).double()).entropy().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), of features (N, D) and (M, D)."""
    a, b = a.double(), b.double()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    # C_a C_b has the eigenvalues of the symmetric C_a^(1/2) C_b C_a^(1/2): real, and below 0 by rounding only
    eigenvalues = torch.linalg.eigvals(covariance_a @ covariance_b).real.clamp(min=0)
    squared_mean = (a.mean(0) - b.mean(0)).square().sum()
    return (squared_mean + covariance_a.trace() + covariance_b.trace() - 2 * eigenvalues.sqrt().sum()).item()
