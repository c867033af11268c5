"""How images look to a small classifier that has learnt which words are in their captions.

Two things follow from it: features for a Fréchet distance (see features.py), and whether drawn images show what their
captions say, as the average precision with which the classifier finds each word again. For sets of a few thousand
images with captions, which have no classes; the numbers compare only with each other.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from measure import fastest_autocast
from torch import Tensor, nn

LEAST_COUNT = 20  # captions that a word must be in to be learnt
LEAST_JUDGED = 5  # captions with the word among those that are judged, for an average precision that means something
NUM_FEATURES = 64  # few, as a covariance is estimated from a few hundred images
WIDTHS = (32, 64, 96, 128)  # each at half the size of the one before


def words_of(caption: str) -> set[str]:
    """The words of a caption, in small letters."""
    return set(re.findall(r"[a-z0-9-]+", caption.lower()))


def frequent_words(captions: Sequence[str]) -> list[str]:
    """Words in at least 20 of the captions, one for each set of captions that they are in, sorted."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    frequent = sorted(word for word, count in counts.items() if LEAST_COUNT <= count < len(captions))
    together = {
        tuple(column.tolist()): word for word, column in zip(frequent, has_words(captions, frequent).T, strict=True)
    }
    return sorted(together.values())


def has_words(captions: Sequence[str], words: Sequence[str]) -> Tensor:
    """Which words are in which captions, (number of captions, number of words) bool."""
    return torch.tensor([[word in words_of(caption) for word in words] for caption in captions])


def small_cnn(num_words: int) -> nn.Sequential:
    """Eight convolutions, the mean over all places and two linear layers: RGB images of any size -> a logit a word."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, *WIDTHS)):
        for first, last, stride in ((inputs, outputs, 2), (outputs, outputs, 1)):
            layers += [nn.Conv2d(first, last, 3, stride, padding=1), nn.BatchNorm2d(last), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], NUM_FEATURES), nn.ReLU()]
    return nn.Sequential(*layers, *head, nn.Dropout(0.2), nn.Linear(NUM_FEATURES, num_words))


def trained_classifier(
    images: Tensor, has: Tensor, *, seed: int = 0, num_steps: int = 600, batch_size: int = 64
) -> nn.Sequential:
    """The small network, trained on images (N, 3, H, W) in [-1, 1] and their words (N, W), in eval mode, on its device.

    Args:
        images: to train on.
        has: which words are in their captions.
        seed: of weights, batches and mirroring.
        num_steps: optimiser steps.
        batch_size: images a step.
    """
    torch.manual_seed(seed)
    network, has = small_cnn(has.shape[1]).to(images.device), has.float().to(images.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3.0e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3.0e-3, total_steps=num_steps)
    for step in range(num_steps):
        batch = torch.randint(len(images), (batch_size,)).to(images.device)
        flip = [3] if step % 2 else []
        with fastest_autocast(images.device.type):
            logits = network(images[batch].flip(flip))
        loss = F.binary_cross_entropy_with_logits(logits.float(), has[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def features(network: nn.Sequential, images: Tensor) -> Tensor:
    """What the last layer sees of each image, (N, 64), at least 0, on the CPU."""
    device = next(network.parameters()).device
    return torch.cat([network[:-2](part.to(device)).cpu() for part in images.split(200)])


@torch.no_grad()
def average_precision(network: nn.Sequential, images: Tensor, has: Tensor) -> float:
    """Mean over words of the average precision with which the network finds the images whose captions have them.

    Args:
        network: as trained.
        images: (N, 3, H, W) in [-1, 1].
        has: which words are in their captions, (N, W); words of fewer than 5 captions are left out.
    """
    logits = network[-1](features(network, images).to(next(network.parameters()).device)).cpu()
    scores = []
    for word in range(has.shape[1]):
        hits = has[:, word][logits[:, word].argsort(descending=True)].double()
        if hits.sum() >= LEAST_JUDGED:
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            scores.append((precision * hits).sum() / hits.sum())
    return torch.stack(scores).mean().item() if scores else float("nan")
