"""Affinities are those of the numbers of objects, and the mutex watershed is that of the paper, step by step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.segmentation import affinities
from unet_diffusion.segmentation.affinities import (
    APART,
    NUM_ATTRACTIVE,
    OFFSETS,
    affinities_of,
    mutex_watershed,
)
from unet_diffusion.segmentation.labels import Targets, instances_from
from unet_diffusion.segmentation.losses import affinity_loss
from unet_diffusion.segmentation.prediction import predicted_maps
from unet_diffusion.segmentation.scores import thin_borders, v_rand
from unet_diffusion.segmentation.synthetic import synthetic_cells

NEAR = ((-1, 0), (0, -1), (-2, 0), (0, -3), (-2, -2), (2, -1))


def true_affinities(instances: np.ndarray) -> np.ndarray:
    return affinities_of(torch.from_numpy(instances.astype(np.int32))[None])[0][0].numpy().astype(np.float32)


def step_by_step(
    weights: np.ndarray, probability: np.ndarray, foreground: np.ndarray, offsets, stride: int
) -> np.ndarray:
    """Algorithm 1 of Wolf et al. 2018 with sets of clusters and of pairs of pixels that exclude each other."""
    edges = []
    for channel, offset in enumerate(offsets):
        for pixel in np.argwhere(foreground).tolist():
            partner = [at + step for at, step in zip(pixel, offset, strict=True)]
            is_inside = all(0 <= at < side for at, side in zip(partner, foreground.shape, strict=True))
            repels = channel >= NUM_ATTRACTIVE
            if is_inside and foreground[tuple(partner)] and not (repels and any(at % stride for at in pixel)):
                affinity = float(weights[channel][tuple(pixel)])
                if repels:
                    both = probability[tuple(pixel)] * probability[tuple(partner)]
                    affinity = 1 - min(affinity / float(both), 1)
                edges.append((affinity, repels, tuple(pixel), tuple(partner)))
    clusters = {tuple(pixel): {tuple(pixel)} for pixel in np.argwhere(foreground).tolist()}
    exclusions: set[frozenset] = set()
    for _, repels, one, other in sorted(edges, key=lambda edge: -edge[0]):
        if clusters[one] is clusters[other]:
            continue
        if repels:
            exclusions.add(frozenset((one, other)))
        elif not any(frozenset((a, b)) in exclusions for a in clusters[one] for b in clusters[other]):
            joined = clusters[one] | clusters[other]
            clusters.update(dict.fromkeys(joined, joined))
    numbers = np.zeros(foreground.shape, dtype=int)
    for number, cluster in enumerate({id(one): one for one in clusters.values()}.values(), start=1):
        numbers[tuple(np.array(list(cluster)).T)] = number
    return numbers


def are_the_same(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1)
    return len(np.unique(one)) == len(np.unique(other)) == pairs.shape[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("offsets", "stride"), [(NEAR, 1), (NEAR, 2), (OFFSETS, 4)])
def test_watershed_is_the_papers_step_by_step(monkeypatch, seed, offsets, stride):
    monkeypatch.setattr(affinities, "OFFSETS", offsets)
    monkeypatch.setattr(affinities, "STRIDE", stride)
    rng = np.random.default_rng(seed)
    weights = rng.random((len(offsets), 13, 11)).astype(np.float32)  # without ties
    foreground = rng.random((13, 11)) < (1 if seed == 0 else 0.8)
    probability = (0.5 + 0.5 * rng.random((13, 11))).astype(np.float32)
    numbers = mutex_watershed(weights, probability, foreground)
    assert np.array_equal(numbers > 0, foreground)
    assert are_the_same(numbers, step_by_step(weights, probability, foreground, offsets, stride))
    assert 1 < numbers.max() < foreground.sum() / 2  # neither all nor nothing is joined


def test_image_without_foreground_or_smaller_than_the_offsets_has_its_objects():
    weights = np.ones((len(OFFSETS), 5, 3), dtype=np.float32)
    sure = np.ones((5, 3), dtype=np.float32)
    assert not mutex_watershed(weights, sure, sure < 1).any()
    assert (mutex_watershed(weights, sure, sure == 1) == 1).all()


def test_far_pairs_that_may_be_background_repel_by_what_is_left_of_the_doubt():
    """Each pixel is of a cell with 0.8, and each pair with 0.64: affinities of 0.65 leave no doubt."""
    weights = np.full((len(OFFSETS), 1, 24), 0.65, dtype=np.float32)
    probability = np.full((1, 24), 0.8, dtype=np.float32)
    weights[:NUM_ATTRACTIVE, :, 12] = 0.3  # less than 1 - 0.65
    foreground = np.ones((1, 24), dtype=bool)
    assert mutex_watershed(weights, probability, foreground).max() == 1
    assert mutex_watershed(weights, np.ones_like(probability), foreground).max() == 2


def membranes(seed: int) -> np.ndarray:
    """Cells of a plane behind membranes of three pixels, (200, 200), as in ISBI 2012."""
    rng = np.random.default_rng(seed)
    seeds = np.zeros((200, 200), dtype=int)
    seeds[tuple(rng.integers(0, 200, (2, 40)))] = np.arange(1, 41)
    nearest = ndimage.distance_transform_edt(seeds == 0, return_indices=True)[1]
    cells = seeds[tuple(nearest)]
    edges = ndimage.maximum_filter(cells, 3) != ndimage.minimum_filter(cells, 3)
    return np.where(edges, 0, cells).astype(np.int32)


@pytest.mark.parametrize("seed", range(2))
def test_true_affinities_give_the_true_cells_through_gaps_in_their_membranes(seed):
    cells = membranes(seed)
    foreground = cells > 0
    foreground[::20] = True  # a threshold would join all cells
    numbers = mutex_watershed(true_affinities(cells), np.ones(cells.shape, dtype=np.float32), foreground)
    assert v_rand(cells, ndimage.label(foreground)[0]) < 0.6
    assert v_rand(cells, numbers) > 0.999
    assert v_rand(cells, thin_borders(numbers)) > 0.999


def test_true_affinities_tell_touching_objects_apart():
    cells = synthetic_cells((128, 128), num_cells=30, seed=1)[1]
    maps = np.concatenate([np.stack([cells == 0, cells > 0]).astype(np.float32), true_affinities(cells)])
    assert ndimage.label(cells > 0)[1] < cells.max()
    assert are_the_same(instances_from(maps, "affinities", min_size=1), cells)


def test_affinities_are_those_of_each_pair():
    instances = torch.from_numpy(np.random.default_rng(0).integers(-1, 3, (1, 30, 11)))
    together, counts = affinities_of(instances)
    for channel, (down, right) in enumerate(OFFSETS):
        for row, column in np.ndindex(30, 11):
            is_pair = 0 <= row + down < 30 and 0 <= column + right < 11
            one, other = instances[0, row, column], instances[0, row + down, column + right] if is_pair else APART
            assert counts[0, channel, row, column] == (one != APART and other != APART)
            if counts[0, channel, row, column]:
                assert together[0, channel, row, column] == (one == other and one > 0)


class SureNetwork(SegmentationUNet):
    """Knows the affinities of an image whose grey values are the numbers of its objects."""

    def forward(self, x, t=None, labels=None):
        return torch.cat([torch.zeros_like(x).expand(-1, 2, -1, -1), 200 * affinities_of(x[:, 0])[0] - 100.0], dim=1)


@pytest.mark.parametrize("views", [False, True])
def test_views_of_true_affinities_agree(views):
    cells = torch.from_numpy(synthetic_cells((40, 56), seed=0)[1]).float()[None]
    network = SureNetwork(1, 12, channels=(2, 2), padding="same")
    options = {"num_classes": 2, "num_maps": 12, "has_affinities": True, "timestep": None, "window_size": 64}
    maps = predicted_maps(network, cells, views=views, **options)
    together, counts = affinities_of(cells)
    torch.testing.assert_close(maps[2:][counts[0]], together[0].float()[counts[0]])


INSTANCES = torch.from_numpy(synthetic_cells((40, 48), seed=0)[1].astype(np.int32))[None].clone()
INSTANCES[:, :5, 7:] = APART
SCORES = torch.randn(1, len(OFFSETS), 40, 48, generator=torch.Generator().manual_seed(0))


def test_cross_entropy_of_affinities_is_torchs_over_the_pairs_that_count():
    together, counts = affinities_of(INSTANCES)
    expected = F.binary_cross_entropy_with_logits(SCORES[counts], together[counts].float())
    torch.testing.assert_close(affinity_loss(SCORES, INSTANCES, "cross_entropy"), expected)


def test_dice_is_of_the_pairs_that_are_apart_by_offset():
    together, counts = affinities_of(INSTANCES)
    apart, predicted = ~together, torch.sigmoid(-SCORES)
    coefficients = [
        (2 * predicted[0, k][counts[0, k] & apart[0, k]].sum() + 1)
        / (predicted[0, k][counts[0, k]].square().sum() + apart[0, k][counts[0, k]].sum() + 1)
        for k in range(len(OFFSETS))
    ]
    torch.testing.assert_close(affinity_loss(SCORES, INSTANCES, "dice"), 1 - torch.stack(coefficients).mean())
    both = affinity_loss(SCORES, INSTANCES, "cross_entropy") + affinity_loss(SCORES, INSTANCES, "dice")
    torch.testing.assert_close(affinity_loss(SCORES, INSTANCES, "both"), both)


@pytest.mark.parametrize("kind", ["cross_entropy", "dice", "both"])
def test_sure_and_right_affinities_have_no_loss(kind):
    sure = 60 * affinities_of(INSTANCES)[0].float() - 30
    torch.testing.assert_close(affinity_loss(sure, INSTANCES, kind), torch.tensor(0.0))


PARTS = np.array([[0, 1, 1, 0, 1], [0, 1, 1, 0, 1]])  # two components


@pytest.mark.parametrize(("label_format", "labels"), [("0/1", PARTS), ("0/255", 255 * PARTS), ("instances", PARTS)])
def test_objects_are_components_where_labels_have_no_numbers(label_format, labels):
    targets = Targets(label_format, affinities=True)
    last = 1 if label_format == "instances" else 2
    assert targets.partners(labels).tolist() == [[0, 1, 1, 0, last]] * 2
    assert (targets.kind, targets.class_names, targets.num_maps) == ("affinities", ["background", "cell"], 12)


def test_ignored_pixels_are_apart_and_large_numbers_are_compact():
    targets = Targets("instances", affinities=True, ignore_label=9)
    assert targets.partners(np.array([[0, 2**30, 9, 7]])).tolist() == [[0, 2, APART, 1]]


@pytest.mark.parametrize(
    "options",
    [{"label_format": "instances", "separate_borders": True}, {"label_format": "classes", "num_classes": 3}],
)
def test_affinities_beside_borders_or_without_objects_are_refused(options):
    with pytest.raises(ValueError, match="affinities are of objects, and are learnt instead of borders"):
        Targets(affinities=True, **options)
