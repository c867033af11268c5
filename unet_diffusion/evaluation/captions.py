"""Whether images show what their captions say: words that a small network finds in them, and the cosine of CLIP.

The network is trained on the training images and on which words their captions have, so it needs no download, and takes
any channels and sizes. How well it ranks the samples by each word of their captions is compared with how well it ranks
held-out images, and with samples whose captions are shuffled.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from unet_diffusion.evaluation.following_pictures import picture_by_name
from unet_diffusion.evaluation.following_scores import others_of_another_kind
from unet_diffusion.evaluation.result import SHUFFLED, Figure, Picture, Section
from unet_diffusion.evaluation.selections import Selection
from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.randomness import keyed_generator

LEAST_COUNT = 20  # captions that have a word, for the word to be learnt
LEAST_JUDGED = 5  # captions with the word among those that are judged, for an average precision that means something
NUM_FEATURES = 64
WIDTHS = (32, 64, 96, 128)  # channels, each at half the size of the one before
LARGEST_SIDE = 64  # in pixels; larger images are averaged down by a whole factor, which bounds the time they take
NUM_STEPS, BATCH, RATE = 600, 64, 3e-3
DROPOUT = 0.2
SEED = 0

Texts = Callable[[list[str]], Tensor]
"""texts(captions) gives their embeddings, (N, d), to compare with those of images."""


class WordFinder(nn.Module):
    """A logit for each word, images (N, C, H, W) in [-1, 1] -> (N, num_words).

    Args:
        image_shape: (C, H, W).
        num_words: The number of words.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_words: int) -> None:
        super().__init__()
        channels, *sides = image_shape
        self.factor = max(min(sides) // LARGEST_SIDE, 1)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((channels, *WIDTHS)):
            for width, stride in ((inputs, 2), (outputs, 1)):
                layers += [nn.Conv2d(width, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], NUM_FEATURES), nn.ReLU()]
        self.layers = nn.Sequential(*layers, *pooled)
        self.words = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(NUM_FEATURES, num_words))

    def forward(self, images: Tensor) -> Tensor:
        return self.words(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What the last layer sees of each image, (N, 64), at least 0."""
        return self.layers(images if self.factor == 1 else F.avg_pool2d(images, self.factor))


def words_of(caption: str) -> set[str]:
    """The words of a caption, in small letters."""
    return set(re.findall(r"[\w-]+", caption.lower()))


def frequent_words(captions: Sequence[str]) -> list[str]:
    """Words in at least 20 of the captions, one of those that always occur together, sorted."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    frequent = sorted(word for word, count in counts.items() if LEAST_COUNT <= count < len(captions))
    columns = has_words(captions, frequent).T
    return sorted({tuple(column.tolist()): word for word, column in zip(frequent, columns, strict=True)}.values())


def has_words(captions: Sequence[str], words: Sequence[str]) -> Tensor:
    """Which captions have which words, (number of captions, number of words) bool."""
    rows = [words_of(caption) for caption in captions]
    return torch.tensor([[word in row for word in words] for row in rows], dtype=torch.bool).view(len(rows), len(words))


def average_precision(scores: Tensor, has: Tensor) -> float:
    """The mean over words of the average precision with which scores rank the images whose captions have the word.

    Args:
        scores: A score of each image for each word, (N, W).
        has: Which captions have which words, (N, W) bool; words of fewer than 5 captions are left out. NaN if none
            is left.
    """
    precisions = []
    for ranking, true in zip(scores.T, has.T, strict=True):
        hits = true[ranking.argsort(descending=True, stable=True)].double()
        if hits.sum() >= LEAST_JUDGED:
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            precisions.append((precision * hits).sum() / hits.sum())
    return float(torch.stack(precisions).mean()) if precisions else float("nan")


def word_finder(train: Selection, words: Sequence[str], folder: Path | None, *, progress: bool = True) -> WordFinder:
    """The network that finds words in images, trained once and then read again.

    Args:
        train: The training images, with captions.
        words: The words.
        folder: Where the network is kept, as words-HASH.safetensors; None: nowhere.
        progress: Whether a progress bar is shown.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = WordFinder(train.image_shape, len(words))
    path = None if folder is None else folder / f"words-{_contents_hash(train, words)}.safetensors"
    if path is not None and path.exists():
        network.load_state_dict(load_file(path))
        return network.eval().requires_grad_(False)
    train_word_finder(network, train.take, has_words(train.captions or [], words), progress=progress)
    if path is not None:
        with atomic_write(path) as partial:
            save_file(network.state_dict(), partial)
    return network.requires_grad_(False)


def train_word_finder(
    network: WordFinder,
    take: Callable[[Tensor], Tensor],
    has: Tensor,
    *,
    num_steps: int = NUM_STEPS,
    progress: bool = True,
) -> None:
    """Train the network, and leave it in eval mode.

    Args:
        network: The network; the images are on its device.
        take: Function that gives the images of these numbers, (B, C, H, W) in [-1, 1].
        has: Which captions have which words, (N, W) bool on the CPU.
        num_steps: Number of optimiser steps.
        progress: Whether a progress bar is shown.
    """
    generator = keyed_generator(SEED)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=num_steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # of the dropout
        for step in tqdm(range(num_steps), "learning words", unit="step", leave=False, disable=not progress):
            rows = torch.randint(len(has), (BATCH,), generator=generator)
            images = take(rows)
            logits = network(images.flip(-1) if step % 2 else images)
            loss = F.binary_cross_entropy_with_logits(logits, has[rows].to(logits))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def caption_section(
    samples: Selection,
    train: Selection,
    held_out: Selection,
    folder: Path | None,
    *,
    texts: Texts | None = None,
    features: tuple[Tensor, Tensor] | None = None,
    progress: bool = True,
) -> Section | None:
    """The section of an evaluation on the captions of samples; None if captions have no words that could be found.

    Args:
        samples: The samples, with the captions that they were drawn by.
        train: The training images, with captions.
        held_out: Real images that were not trained on, with captions.
        folder: Where the network that finds words is kept; None: nowhere.
        texts: Embeds captions, for features that captions can be compared with; None: there are no such features.
        features: The features of samples and of held-out images, for `texts`.
        progress: Whether a progress bar is shown.
    """
    section = Section("Do they show what their captions say?", "")
    words = frequent_words(train.captions or [])
    captions = samples.captions or []
    places, others = others_of_another_kind(_numbers_of(captions))
    shuffled, of_others = samples.select(places), samples.select(others).captions or []
    if words:
        network = word_finder(train, words, folder, progress=progress)
        ours, real = (_precision(network, images, words) for images in (samples, held_out))
        chance = {SHUFFLED: _precision(network, shuffled, words, of_others)} if of_others else {}
        section.about = (
            f"A small network learns, from the training images, which of {len(words)} words their captions have. A "
            "sample's caption is right as far as the network finds its words in the sample."
        )
        section.figures.append(Figure(
            "words_found", "Words of the captions found", ours, "higher", real=real, beside=chance,
            remark=f"Mean average precision over words. N = {len(samples)} samples, {len(held_out)} held-out images.",
        ))  # fmt: skip
    if texts is not None and features is not None:
        pairs = zip((samples, held_out), features, strict=True)
        cosines = [F.cosine_similarity(seen, texts(images.captions or [])) for images, seen in pairs]
        ours, real = (float(cosine.mean()) for cosine in cosines)
        of_pairs = F.cosine_similarity(features[0][places], texts(of_others)) if of_others else None
        chance = {} if of_pairs is None else {SHUFFLED: float(of_pairs.mean())}
        margin = 1.96 * float(cosines[0].std()) / len(cosines[0]) ** 0.5
        section.figures.append(Figure(
            "clip_cosine", "Cosine of image and caption (CLIP)", ours, "higher", (ours - margin, ours + margin), real,
            "The mean over samples; a hundred times this is the CLIP score of papers.", chance,
        ))  # fmt: skip
    image = picture_by_name(dict.fromkeys(captions), held_out, held_out.captions or [], samples, captions)
    if image is not None:
        about_picture = "A held-out image of each caption, up to ten, and below samples that were drawn for it."
        section.pictures.append(Picture("captions", about_picture, image))
    return section if section.figures else None


def _numbers_of(captions: Sequence[str]) -> Tensor:
    """The number of each caption among those that differ, (N,) int64."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return torch.tensor([numbers[caption] for caption in captions])


@torch.no_grad()
def _precision(
    network: WordFinder, images: Selection, words: Sequence[str], captions: Sequence[str] | None = None
) -> float:
    scores = torch.cat([network(batch) for batch in images.batches()])
    return average_precision(scores, has_words(captions or images.captions or [], words))


def _contents_hash(train: Selection, words: Sequence[str]) -> str:
    """A hash of the pixels and captions of images, of the words, and of how the network is trained."""
    settings = [NUM_FEATURES, WIDTHS, LARGEST_SIDE, NUM_STEPS, BATCH, RATE, DROPOUT, SEED]
    digest = hashlib.sha256(json.dumps([settings, list(words), train.captions]).encode())
    for images in train.batches():
        digest.update(images.numpy().tobytes())
    return digest.hexdigest()[:16]
