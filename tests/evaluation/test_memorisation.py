import pytest
import torch
import torch.nn.functional as F

from unet_diffusion.data import ImageDataModule
from unet_diffusion.data.standard import Digits
from unet_diffusion.evaluation import memorisation as module
from unet_diffusion.evaluation.memorisation import TrainingImages, memorisation, pixels_of
from unet_diffusion.evaluation.selections import of_data, of_images


def points(count, dim=8, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_nearest_images_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 7)
    train, others = points(60), points(20, seed=1)
    nearest = TrainingImages(train).nearest_to(others)
    for i, point in enumerate(others):
        distances = sorted((torch.dist(point, x).item(), j) for j, x in enumerate(train))
        assert nearest.index[i] == distances[0][1]
        assert nearest.ratio[i].item() == pytest.approx(distances[0][0] / distances[1][0], rel=1e-4)


def test_near_duplicates_are_a_group_and_a_copy_of_one_is_as_suspicious_as_that_of_a_single_image():
    train = points(60)
    twins = torch.cat([train, train[:5] + 0.01, train[:5] - 0.01])
    known = TrainingImages(twins)
    assert torch.equal(known.groups[:5], known.groups[60:65])
    assert torch.equal(known.groups[:5], known.groups[65:])
    assert len(known.groups.unique()) == 60
    assert known.num_alike == 15
    copies = train[[2, 40]] + 0.02
    nearest = known.nearest_to(copies)
    assert nearest.is_copy.all()
    assert (nearest.ratio < 0.1).all()  # the next one of the group is no other image
    assert not known.nearest_to(points(20, seed=1)).is_copy.any()


def test_images_that_are_exactly_the_same_are_no_problem():
    known = TrainingImages(torch.cat([points(10), points(10)]))
    nearest = known.nearest_to(points(10))
    assert nearest.is_copy.all()
    assert (nearest.ratio == 0).all()
    same = TrainingImages(torch.ones(70, 4)).nearest_to(torch.ones(2, 4))
    assert same.ratio.isfinite().all()


def test_large_images_are_compared_at_32_pixels():
    images = points(3, 3 * 64 * 48).reshape(3, 3, 64, 48)
    expected = F.adaptive_avg_pool2d(images, (32, 32)).flatten(1)
    assert torch.equal(pixels_of(of_images(images)), expected)
    assert torch.equal(pixels_of(of_images(images[..., :8, :8])), images[..., :8, :8].flatten(1))


@pytest.fixture(scope="module")
def digits():
    return of_data(ImageDataModule(Digits()))


def sections_of(samples, digits):
    train, held_out = digits
    selections = (of_images(samples), train, held_out)
    return memorisation(*selections, tuple(pixels_of(one) for one in selections))


def test_samples_that_are_20_training_images_with_a_little_noise_are_caught(digits):
    train, _ = digits
    samples = train.take(torch.arange(20).repeat(10))
    samples = samples + 0.05 * torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
    section = sections_of(samples, digits)
    figures = {figure.key: figure for figure in section.figures}
    assert figures["copies_pixels"].value > 0.9
    assert "knows images by heart" in section.warnings[0]
    assert [picture.key for picture in section.pictures] == ["closest_pixels", "closest_features"]


def test_a_few_copies_among_good_samples_are_caught(digits):
    train, held_out = digits
    samples = torch.cat([held_out.take(range(90)), train.take(range(10))])
    assert any("copies" in warning for warning in sections_of(samples, digits).warnings)


def test_copies_of_mirrored_training_images_are_caught_where_training_mirrors_them(digits):
    train, held_out = digits
    samples = of_images(torch.cat([held_out.take(range(60)), train.take(range(20)).flip(-1)]))
    both = train.with_mirrored()
    points = [pixels_of(one) for one in (samples, both, held_out)]
    section = memorisation(samples, both, held_out, tuple(points), are_mirrored=True)
    figures = {figure.key: figure for figure in section.figures}
    assert figures["copies_pixels"].value >= 0.25
    assert any("copies" in warning for warning in section.warnings)
    assert f"of {len(train)} training images" in figures["copies_pixels"].remark


def test_variants_of_training_images_in_honest_samples_are_not_suspected():
    """As of drawings in several colours: held-out variants leak, samples are such variants, nothing is memorised."""
    concepts = points(60, 64)
    families = torch.arange(300) % 60

    def variants(rows: torch.Tensor, seed: int) -> torch.Tensor:
        return concepts[rows] + 0.02 * points(len(rows), 64, seed=seed)

    fresh = [points(200, 64, seed=seed) for seed in (11, 12, 13)]
    sets = [torch.cat([variants(families[:size], seed), part]) for size, seed, part in
            zip((300, 40, 40), (1, 2, 3), fresh, strict=True)]  # fmt: skip
    selections = [of_images(one.reshape(-1, 1, 8, 8)) for one in sets]
    section = memorisation(selections[2], *selections[:2], (sets[2], sets[0], sets[1]))
    assert section.warnings == []


def test_samples_like_held_out_images_are_not_suspected(digits):
    train, held_out = digits
    half = torch.arange(len(held_out))
    section = sections_of(held_out.take(half[::2]), (train, held_out.select(half[1::2])))
    assert section.warnings == []
    figures = {figure.key: figure.value for figure in section.figures}
    assert figures["copies_pixels"] < 0.02
    assert figures["suspicious_95_pixels"] < 0.15


def test_too_few_held_out_images_calibrate_nothing(digits):
    train, held_out = digits
    section = sections_of(held_out.take(range(30)), (train, held_out.select(torch.arange(10))))
    figures = {figure.key: figure for figure in section.figures}
    assert figures["suspicious_95_pixels"].value != figures["suspicious_95_pixels"].value
    assert "There must be 19 held-out images" in figures["suspicious_95_pixels"].remark


def test_images_of_two_channels_have_figures_and_pictures():
    images = [of_images(points(30, 2 * 16, seed=seed).reshape(30, 2, 4, 4)) for seed in range(3)]
    section = memorisation(*images, tuple(pixels_of(one) for one in images))
    assert len(section.figures) == 6
    assert [picture.key for picture in section.pictures] == ["closest_pixels", "closest_features"]


def test_a_share_is_larger_only_if_chance_does_not_explain_it():
    def of(count, total):
        return torch.arange(total) < count

    assert module._are_more(of(20, 100), of(2, 100))
    assert not module._are_more(of(8, 200), of(2, 200))
    assert not module._are_more(of(0, 1000), of(50, 100))
