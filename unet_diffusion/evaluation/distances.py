"""Distances between two sets of images by their features, with what the number of images makes of them.

Fréchet distance (Heusel et al. 2017), kernel distance (KID, Binkowski et al. 2018), precision and recall (Kynkäänniemi
et al. 2019) are computed by torch-fidelity; density and coverage are those of Naeem et al. 2020.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from unet_diffusion.evaluation.result import Figure, number_text
from unet_diffusion.runtime.randomness import keyed_generator

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as in torch-fidelity and most papers
PRC_NEIGHBOURS = 3  # of precision and recall, as in the paper and in ADM
DENSITY_NEIGHBOURS = 5  # of density and coverage, as in the paper
NUM_GROUPS = 20  # of the jackknife
ROWS = 2000  # of distances in memory at once
LEAST_IMAGES = 10  # in each set: fewer have no neighbours to speak of


@dataclass(frozen=True)
class Distances:
    """How far generated images are from reference images; see `distances_between`."""

    fd: float
    kid: float
    precision: float
    recall: float
    density: float
    coverage: float


def distances_between(generated: Tensor, reference: Tensor) -> Distances:
    """All distances of two sets.

    Args:
        generated: The features of generated images, (N, d).
        reference: The features of real images, (M, d).
    """
    precision, recall = precision_and_recall(generated, reference)
    density, coverage = density_and_coverage(generated, reference)
    fd, kid = frechet_distance(generated, reference), kernel_distance(generated, reference)
    return Distances(fd, kid, precision, recall, density, coverage)


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """The squared Fréchet distance of normal distributions with the moments of two sets, (N, d) and (M, d)."""
    statistics = [fid_features_to_statistics(features) for features in (generated, reference)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def _shuffled(features: Tensor) -> Tensor:
    """Features in a random order, the same one every time: images may come by class, or with classes in turn."""
    return features[torch.randperm(len(features), generator=keyed_generator(len(features)))]


def kernel_distance(generated: Tensor, reference: Tensor) -> float:
    """KID: the squared maximum mean discrepancy of the kernel (x y / d + 1)^3, without bias, so that it may be below 0.

    It is the mean over 100 subsets of 1000 images, or of as many as there are.
    """
    size = min(KID_SUBSET_SIZE, len(generated), len(reference))
    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "verbose": False}
    return float(kid_features_to_metric(generated, reference, **options)[KEY_METRIC_KID_MEAN])


def kernel_distance_error(generated: Tensor, reference: Tensor) -> float:
    """The standard error of KID: a jackknife over 20 groups of images of both sets, on all pairs of images."""
    sets = [_shuffled(features).double().numpy() for features in (generated, reference)]
    num_groups = min(NUM_GROUPS, *map(len, sets))
    a, b = ([features[i::num_groups] for i in range(num_groups)] for features in sets)
    aa, bb, ab = (_kernel_sums(x, y, same=x is y) for x, y in ((a, a), (b, b), (a, b)))
    n, m = (np.array([len(group) for group in groups]) for groups in (a, b))
    left_out = [_mmd(aa, bb, ab, n, m, np.arange(num_groups) != i) for i in range(num_groups)]
    return float(np.sqrt((num_groups - 1) * np.var(left_out)))


def _kernel_sums(a: list[NDArray], b: list[NDArray], same: bool) -> NDArray:
    """The sum of the kernel over the pairs of each two groups, (G, G); an image is no pair with itself."""
    sums = np.array([[(((x @ y.T) / x.shape[1] + 1) ** 3).sum() for y in b] for x in a])
    if same:
        sums -= np.diag([(((x**2).sum(1) / x.shape[1] + 1) ** 3).sum() for x in a])
    return sums


def _mmd(aa: NDArray, bb: NDArray, ab: NDArray, n: NDArray, m: NDArray, kept: NDArray) -> float:
    """The discrepancy of the groups that are kept, from the sums of the kernel and the sizes of the groups."""
    of_a, of_b = n[kept].sum(), m[kept].sum()
    within = aa[kept][:, kept].sum() / (of_a * (of_a - 1)) + bb[kept][:, kept].sum() / (of_b * (of_b - 1))
    return float(within - 2 * ab[kept][:, kept].sum() / (of_a * of_b))


def precision_and_recall(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """The share of generated images among the real ones, and of real images among the generated ones.

    An image is among others if it is as near to one of them as that one's third neighbour.
    """
    options = {"prc_neighborhood": PRC_NEIGHBOURS, "prc_batch_size": ROWS, "save_cpu_ram": True, "verbose": False}
    metrics = prc_features_to_metric(generated, reference, **options)
    return metrics[KEY_METRIC_PRECISION], metrics[KEY_METRIC_RECALL]


def density_and_coverage(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """How many real images' neighbourhoods a generated image lies in, over k, and the share of them that hold one.

    A neighbourhood reaches to the k-th neighbour among the real images (https://arxiv.org/abs/2002.09797, eq. 4, 5).
    """
    k = DENSITY_NEIGHBOURS
    inside, covered = 0, 0
    for rows in reference.split(ROWS):
        radius = torch.cdist(rows, reference).kthvalue(k + 1).values  # the first is the image itself
        within = torch.cdist(rows, generated) <= radius[:, None]
        inside += int(within.sum())
        covered += int(within.any(dim=1).sum())
    return inside / (k * len(generated)), covered / len(reference)


def distance_figures(generated: Tensor, real: Tensor, reference: Tensor) -> list[Figure]:
    """The distances of generated images, and beside them those of as many real images, to the same other real images.

    Args:
        generated: The features of generated images, (N, d).
        real: The features of real images, (N, d).
        reference: The features of other real images, (M, d).
    """
    ours, theirs = distances_between(generated, reference), distances_between(real, reference)
    error = 1.96 * kernel_distance_error(generated, reference)
    size = f"N = {len(generated)} against {len(reference)}"
    bias = (
        f"Squared, of {generated.shape[1]} features; {size}. Few images make it too large: real images have "
        f"{number_text(theirs.fd)} at this N. Compare runs at the same N only."
    )
    interval = (ours.kid - error, ours.kid + error)
    return [
        Figure("fd", "Fréchet distance", ours.fd, "lower", real=theirs.fd, remark=bias),
        Figure("kid", "Kernel distance (KID)", ours.kid, "lower", interval, theirs.kid,
               f"{size}. Unbiased, so it may be below 0; the interval is of a jackknife over {NUM_GROUPS} groups."),
        Figure("precision", "Precision", ours.precision, "higher", real=theirs.precision,
               remark=f"The share of samples that lie among real images, k = {PRC_NEIGHBOURS}."),
        Figure("recall", "Recall", ours.recall, "higher", real=theirs.recall,
               remark=f"The share of real images that lie among samples, k = {PRC_NEIGHBOURS}."),
        Figure("density", "Density", ours.density, "higher", real=theirs.density,
               remark=f"As precision, but counted, k = {DENSITY_NEIGHBOURS}; above 1 where samples crowd together."),
        Figure("coverage", "Coverage", ours.coverage, "higher", real=theirs.coverage,
               remark=f"The share of real images with a sample beside them, k = {DENSITY_NEIGHBOURS}."),
    ]  # fmt: skip
