import io

import numpy as np
import pytest
import torch
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from unet_diffusion.evaluation import distances
from unet_diffusion.evaluation.distances import (
    density_and_coverage,
    distance_figures,
    frechet_distance,
    kernel_distance,
    kernel_distance_error,
    precision_and_recall,
)
from unet_diffusion.evaluation.features import features_named
from unet_diffusion.evaluation.selections import of_images
from unet_diffusion.runtime.pictures import save_images


def normal(count, dim=6, *, mean=0.0, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + mean


class RandomInception(FeatureExtractorInceptionV3):
    """Inception with the weights that it begins with."""

    def load_state_dict(self, state):
        pass


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = RandomInception("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)  # features that are not all the same
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow  # the eigenvalues of 2048 x 2048 matrices
def test_figures_of_two_folders_are_those_of_torch_fidelity(inception_file, tmp_path):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(24, 3, 32, 32, generator=generator) * scale - 1 for scale in (2, 1.5))
    for name, images in (("first", first), ("second", second)):
        save_images(images, tmp_path / name)
    theirs = calculate_metrics(
        input1=str(tmp_path / "first"), input2=str(tmp_path / "second"), fid=True, kid=True, prc=True,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(inception_file),
        kid_subset_size=24, cuda=False, verbose=False, cache=False,
    )  # fmt: skip
    features = features_named("inception", str(inception_file), of_images(first), None)
    ours = [features.of(of_images(images), progress=False) for images in (first, second)]
    expected = theirs["frechet_inception_distance"]
    assert expected > 1e-3
    assert frechet_distance(*ours) == pytest.approx(expected, rel=1e-4)
    assert kernel_distance(*ours) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert precision_and_recall(*ours) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-4)


def test_frechet_distance_is_that_of_normal_distributions_with_the_same_moments():
    a, b = normal(500), normal(400, mean=0.5, seed=1) * torch.tensor([1, 2, 1, 1, 0.5, 1])
    moments = [(x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)) for x in (a, b)]
    (mean_a, cov_a), (mean_b, cov_b) = moments
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root)).sum()
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)


def brute_force_kernel_distance(a, b):
    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    a, b = a.double().tolist(), b.double().tolist()
    within = [
        sum(kernel(x, y) for i, x in enumerate(one) for j, y in enumerate(one) if i != j) / (len(one) * (len(one) - 1))
        for one in (a, b)
    ]
    between = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    return sum(within) - 2 * between


def test_kernel_distance_is_the_sum_over_all_pairs():
    a, b = normal(40), normal(40, mean=0.3, seed=1)
    assert kernel_distance(a, b) == pytest.approx(brute_force_kernel_distance(a, b), rel=1e-4)


def test_error_of_the_kernel_distance_is_a_jackknife_of_the_sum_over_all_pairs(monkeypatch):
    monkeypatch.setattr(distances, "NUM_GROUPS", 5)
    monkeypatch.setattr(distances, "_shuffled", lambda features: features)
    a, b = normal(22), normal(33, mean=0.3, seed=1)
    left_out = []
    for group in range(5):
        kept = [torch.arange(len(x)) % 5 != group for x in (a, b)]
        left_out.append(brute_force_kernel_distance(a[kept[0]], b[kept[1]]))
    expected = np.sqrt(4 / 5 * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
    assert kernel_distance_error(a, b) == pytest.approx(expected, rel=1e-6)


def test_error_of_the_kernel_distance_does_not_depend_on_the_order_of_classes():
    classes = [normal(40, mean=0.5 * number, seed=number) for number in range(5)]
    by_class, in_turn = torch.cat(classes), torch.stack(classes, dim=1).flatten(0, 1)
    reference = torch.cat([normal(40, mean=0.5 * number, seed=10 + number) for number in range(5)])
    errors = [kernel_distance_error(one, reference) for one in (by_class, in_turn)]
    assert max(errors) < 2 * min(errors)


def test_intervals_of_the_kernel_distance_hold_what_more_images_would_say():
    truth = kernel_distance(normal(1000, seed=100), normal(1000, mean=0.2, seed=101))
    inside = 0
    for seed in range(20):
        a, b = normal(100, seed=2 * seed), normal(100, mean=0.2, seed=2 * seed + 1)
        inside += abs(kernel_distance(a, b) - truth) < 1.96 * kernel_distance_error(a, b)
    assert inside >= 16


def neighbourhoods(points, k):
    return [sorted(torch.dist(x, y).item() for y in points)[k] for x in points]


def test_precision_and_recall_count_images_within_neighbourhoods():
    a, b = normal(30), normal(25, mean=0.8, seed=1)
    within_b, within_a = neighbourhoods(b, 3), neighbourhoods(a, 3)
    precision = np.mean([any(torch.dist(x, y) <= r for y, r in zip(b, within_b, strict=True)) for x in a])
    recall = np.mean([any(torch.dist(x, y) <= r for x, r in zip(a, within_a, strict=True)) for y in b])
    assert 0 < precision < 1
    assert precision_and_recall(a, b) == pytest.approx((precision, recall))


def test_density_and_coverage_count_images_within_neighbourhoods(monkeypatch):
    monkeypatch.setattr(distances, "ROWS", 7)  # so that there are several parts
    a, b = normal(30), normal(25, mean=0.8, seed=1)
    radius = neighbourhoods(b, 5)
    inside = np.array([[torch.dist(x, y).item() <= r for x in a] for y, r in zip(b, radius, strict=True)])
    assert density_and_coverage(a, b) == pytest.approx((inside.sum() / (5 * 30), inside.any(1).mean()))


@pytest.mark.parametrize("count", [200, 800])
def test_samples_as_good_as_real_images_have_the_frechet_distance_of_real_images(count):
    reference = normal(2 * count, 32, seed=1)
    distances = [frechet_distance(normal(count, 32, seed=seed), reference) for seed in (2, 3)]
    assert distances[0] == pytest.approx(distances[1], rel=0.2)  # of a single draw each
    assert distances[0] > 10 / count  # though both are of one distribution


def test_figures_say_of_how_many_images_they_are_and_stand_beside_those_of_real_images():
    figures = distance_figures(normal(60, mean=1.0), normal(60, seed=1), normal(80, seed=2))
    found = {figure.key: figure for figure in figures}
    assert list(found) == ["fd", "kid", "precision", "recall", "density", "coverage"]
    assert "N = 60 against 80" in found["fd"].remark
    assert "Few images make it too large" in found["fd"].remark
    assert found["kid"].interval[0] < found["kid"].value < found["kid"].interval[1]
    for figure in figures:
        worse = figure.value < figure.real if figure.better == "higher" else figure.value > figure.real
        assert worse, figure
