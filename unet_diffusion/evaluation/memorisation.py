"""Whether samples are copies of training images: the nearest ones, and the same question asked of held-out images.

A sample that was learnt by heart is far nearer to one training image than to all others (Carlini et al. 2023,
https://arxiv.org/abs/2301.13188). Held-out real images, which the model has not seen, show how much nearer is usual.
Training images that are nearly the same, such as one drawing in several colours, form a group: otherwise the copy of
one would be as near to the next. They are found by the same rule as copies.
"""

from dataclasses import dataclass

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import fisher_exact
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from unet_diffusion.evaluation.result import Figure, Picture, Section
from unet_diffusion.evaluation.selections import Selection
from unet_diffusion.runtime.pictures import image_grid

NUM_NEIGHBOURS = 50  # whose mean distance tells how densely images lie there, as in the paper
COPY = 0.25  # of that mean: what is nearer is a copy. The paper has half, but so near are an eighth of all digits
LARGEST_SIDE = 32  # in pixels; larger images are averaged down to it, as copies stay copies
ROWS = 512  # of distances in memory at once
NUM_PAIRS = 10  # in the picture
CHANCE = 1e-3  # of a warning about samples that are like the held-out images, for each of the tests


@dataclass(frozen=True)
class Nearest:
    """The training images nearest to each of N images.

    Args:
        index: The nearest one, (N,) int64.
        ratio: Its distance over that of the nearest one of another group, (N,).
        is_copy: Whether it is nearer than a quarter of the mean distance of those of the 50 nearest images that are of
            other groups, (N,) bool.
    """

    index: Tensor
    ratio: Tensor
    is_copy: Tensor


class TrainingImages:
    """Training images as points, in groups of those that are nearly the same.

    Args:
        points: The images as pixels or features, (M, d) float32, M at least 3.
        are_mirrored: Whether the second half of the images is the first half mirrored; twins are of one group.
    """

    def __init__(self, points: Tensor, *, are_mirrored: bool = False) -> None:
        self.points = points
        self.num_images = len(points) // 2 if are_mirrored else len(points)
        self.groups = self._groups()

    def nearest_to(self, points: Tensor) -> Nearest:
        """The nearest training images.

        Args:
            points: Other images, (N, d).
        """
        parts = [self._nearest(rows) for rows in points.split(ROWS)]
        return Nearest(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _nearest(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        distances, indices = self._neighbours(rows, NUM_NEIGHBOURS)
        other = self.groups[indices] != self.groups[indices[:, :1]]
        other[:, -1] |= ~other.any(1)  # with more than 50 in the group, the last one stands for the next
        second = torch.where(other, distances, torch.inf).amin(1)
        usual = (distances * other).sum(1) / other.sum(1)
        return indices[:, 0], distances[:, 0] / second.clamp(min=1e-12), distances[:, 0] < COPY * usual

    def _neighbours(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        nearest = torch.cdist(rows, self.points).topk(min(count, len(self.points)), largest=False)
        return nearest.values, nearest.indices

    def _groups(self) -> Tensor:
        """The number of the group of each training image, (M,): connected by copies among themselves."""
        near, far = list[Tensor](), list[Tensor]()
        for first, rows in zip(range(0, len(self.points), ROWS), self.points.split(ROWS), strict=True):
            distances, indices = self._neighbours(rows, NUM_NEIGHBOURS + 1)
            own = torch.arange(first, first + len(rows))[:, None]
            copies = (distances < COPY * distances[:, 1:].mean(1, keepdim=True)) & (indices != own)
            near.append(own.expand_as(indices)[copies])
            far.append(indices[copies])
        first_half = torch.arange(self.num_images)
        if self.num_images < len(self.points):
            near.append(first_half)
            far.append(first_half + self.num_images)
        edges = torch.cat(near).numpy(), torch.cat(far).numpy()
        graph = coo_array((torch.ones(len(edges[0])).numpy(), edges), shape=(len(self.points),) * 2)
        return torch.from_numpy(connected_components(graph, directed=False)[1]).long()

    @property
    def num_alike(self) -> int:
        """The number of training images that have a near-duplicate beside their own mirror image."""
        of_group = torch.bincount(self.groups[: self.num_images])
        return int((of_group[self.groups[: self.num_images]] > 1).sum())


def pixels_of(images: Selection) -> Tensor:
    """Images as points, (N, d): their pixels, averaged down to at most 32 x 32."""
    _, height, width = images.image_shape
    size = (min(height, LARGEST_SIDE), min(width, LARGEST_SIDE))
    return torch.cat([adaptive_avg_pool2d(batch, size).flatten(1) for batch in images.batches()])


def memorisation(
    samples: Selection,
    train: Selection,
    held_out: Selection,
    features: tuple[Tensor, Tensor, Tensor],
    *,
    are_mirrored: bool = False,
) -> Section:
    """What is to be said of copies among the samples.

    Args:
        samples: The samples.
        train: The training images.
        held_out: Real images that were not trained on.
        features: The features of the samples, of the training images and of the held-out images.
        are_mirrored: Whether the second half of the training images is the first half mirrored.
    """
    section = Section(
        "Is it memorised?",
        "For each sample the distance to the nearest training image, over that to the second nearest which is no "
        "near-duplicate of it: a copy has a small ratio. Held-out images, which the model has not seen, go through "
        "the same test, so at most 5 % and 1 % of the samples are expected to be more suspicious than 95 % and 99 % of "
        f"them. A copy is nearer than a quarter of the mean distance of the {NUM_NEIGHBOURS} nearest training images; "
        "copies are counted by themselves.",
    )
    points = {"pixels": (pixels_of(samples), pixels_of(train), pixels_of(held_out)), "features": features}
    for name, (of_samples, of_train, of_held_out) in points.items():
        training = TrainingImages(of_train, are_mirrored=are_mirrored)
        nearest, calibration = training.nearest_to(of_samples), training.nearest_to(of_held_out)
        _add_figures(section, name, training, nearest, calibration)
        section.pictures.append(_closest_pairs(name, samples, train, nearest))
    return section


def _add_figures(section: Section, name: str, training: TrainingImages, nearest: Nearest, calibration: Nearest) -> None:
    copies, expected = (float(one.is_copy.float().mean()) for one in (nearest, calibration))
    alike = f"{training.num_alike} of {training.num_images} training images have near-duplicates"
    section.figures.append(Figure(
        f"copies_{name}", f"Copies of training images, in {name}", copies, "lower", real=expected,
        remark=f"N = {len(nearest.index)}, held-out images {len(calibration.index)}; {alike}.",
    ))  # fmt: skip
    if _are_more(nearest.is_copy, calibration.is_copy):
        section.warnings.append(
            f"{copies:.1%} of the samples are copies of training images in {name}, and {expected:.1%} of the held-out "
            "images are: the model knows images by heart. Train on more images, for fewer steps, or with dropout."
        )
    # Copies are counted above. Held-out images that are copies leaked into the training set, and calibrate nothing.
    ours, ratios = nearest.ratio[~nearest.is_copy], calibration.ratio[~calibration.is_copy].sort().values
    for percent in (95, 99):
        key = f"suspicious_{percent}_{name}"
        title = f"Samples more suspicious than {percent} % of held-out images, in {name}"
        rank = (100 - percent) * (len(ratios) + 1) // 100  # a new image is below that one with at most this probability
        if rank < 1 or not len(ours):
            needed = 100 // (100 - percent) - 1
            remark = f"There must be {needed} held-out images that are no copies, got {len(ratios)}."
            remark = remark if rank < 1 else "All samples are copies."
            section.figures.append(Figure(key, title, float("nan"), "lower", remark=remark))
            continue
        least = ratios[rank - 1]
        share = float((ours < least).float().mean())
        section.figures.append(Figure(key, title, share, "lower", real=rank / (len(ratios) + 1)))
        if percent == 95 and _are_more(ours < least, ratios < least):
            section.warnings.append(
                f"{share:.1%} of the samples are nearer to one training image, in {name}, than 95 % of the held-out "
                "images are, and 5 % are expected. Look at the closest pairs: if they show the same, it is memorised."
            )


def _are_more(ours: Tensor, theirs: Tensor) -> bool:
    """Whether a larger share of ours is true than of theirs, and not by chance (Fisher's exact test)."""
    table = [[int(one.sum()), int((~one).sum())] for one in (ours, theirs)]
    return bool(fisher_exact(table, alternative="greater").pvalue < CHANCE)


def _closest_pairs(name: str, samples: Selection, train: Selection, nearest: Nearest) -> Picture:
    rows = nearest.ratio.argsort(stable=True)[:NUM_PAIRS]
    images = torch.cat([samples.seen(rows), train.seen(nearest.index[rows])])
    ratios = ", ".join(f"{ratio:.2f}" for ratio in nearest.ratio[rows].tolist())
    caption = f"The {len(rows)} closest pairs in {name}: samples above, their training images below; ratios {ratios}."
    return Picture(f"closest_{name}", caption, image_grid(images, columns=len(rows)))
