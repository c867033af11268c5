"""Windows are sampled where they say, image and label alike."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import kstest

from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.segmentation.augmentation import Augmentation, elastic_displacement, sample_at

OFF = Augmentation(flip=False, rotation=0.0, scale=0.0, elastic_sd=0.0)
MODES = ("bicubic", "bilinear", "nearest")

# grid_sample takes positions scaled to [-1, 1], in float32: on a side of 30 pixels they are right to a few 1e-6 pixels.
# Values of randn differ by a few from one pixel to the next, and the cubic kernel is no steeper than 1.5 of that.
POSITION_TOLERANCE = 5e-5


def picture(height: int, width: int, channels: int = 2) -> torch.Tensor:
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(1))


def positions(rows: range, columns: range) -> torch.Tensor:
    """(2, H, W): these rows and columns."""
    y, x = torch.tensor(rows).float(), torch.tensor(columns).float()
    return torch.stack(torch.meshgrid(y, x, indexing="ij"))


def draw_uniforms(monkeypatch, *draws: float) -> None:
    """Sets what `coordinates` draws: mirror y and x (below a half), the angle and the size (a half: none)."""
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.tensor(draws))


# --------------------------------------------------------------------------------------------------------- coordinates


@pytest.mark.parametrize(("size", "centre"), [((4, 6), (6.5, 9.5)), ((5, 3), (2.0, 1.0)), ((3, 4), (0.0, -2.5))])
def test_window_without_deformation_is_at_the_pixels_of_the_plain_crop(size, centre):
    top, left = (int(middle - (side - 1) / 2) for middle, side in zip(centre, size, strict=True))
    expected = positions(range(top, top + size[0]), range(left, left + size[1]))
    assert torch.equal(OFF.coordinates(size, centre, keyed_generator(0)), expected)


def test_coordinates_are_float32():
    assert Augmentation().coordinates((4, 6), (1.0, 2.0), keyed_generator(0)).dtype == torch.float32


def test_quarter_turn_is_that_of_rot90(monkeypatch):
    draw_uniforms(monkeypatch, 0.9, 0.9, 0.75, 0.5)  # half of the way from no turn to 180 degrees
    image = picture(7, 7)
    augmentation = Augmentation(rotation=180.0, elastic_sd=0.0)
    turned = sample_at(image, augmentation.coordinates((7, 7), (3.0, 3.0), keyed_generator(0)), mode="nearest")
    assert torch.equal(turned, image.rot90(-1, (1, 2)))


def test_window_is_mirrored_before_it_is_turned(monkeypatch):
    draw_uniforms(monkeypatch, 0.1, 0.9, 0.75, 0.5)
    image = picture(7, 7)
    coordinates = Augmentation(elastic_sd=0.0).coordinates((7, 7), (3.0, 3.0), keyed_generator(0))
    assert torch.equal(sample_at(image, coordinates, mode="nearest"), image.rot90(-1, (1, 2)).flip(1))


@pytest.mark.parametrize(("draws", "axes"), [((0.1, 0.9), (1,)), ((0.9, 0.1), (2,)), ((0.1, 0.1), (1, 2))])
def test_flip_mirrors_the_window(monkeypatch, draws, axes):
    draw_uniforms(monkeypatch, *draws, 0.5, 0.5)
    image = picture(6, 8)
    coordinates = Augmentation(elastic_sd=0.0).coordinates((6, 8), (2.5, 3.5), keyed_generator(0))
    assert torch.equal(sample_at(image, coordinates, mode="nearest"), image.flip(axes))


def test_each_axis_is_flipped_half_of_the_time():
    augmentation = dataclasses.replace(OFF, flip=True)
    corners = [augmentation.coordinates((2, 2), (0.0, 0.0), keyed_generator(seed))[:, 0, 0] for seed in range(400)]
    flipped = (torch.stack(corners) > 0).float()
    both = flipped.prod(dim=1).mean()
    assert torch.allclose(flipped.mean(dim=0), torch.tensor(0.5), atol=0.1)  # four standard deviations
    assert both == pytest.approx(0.25, abs=0.09)


@pytest.mark.parametrize("rotation", [30.0, 180.0])
def test_angles_are_uniform_to_either_side(rotation):
    augmentation = dataclasses.replace(OFF, rotation=rotation)
    angles = []
    for seed in range(300):
        window = augmentation.coordinates((2, 1), (0.0, 0.0), keyed_generator(seed))
        dy, dx = (window[:, 1, 0] - window[:, 0, 0]).tolist()
        angles.append(math.degrees(math.atan2(dx, dy)))
    assert kstest(angles, "uniform", (-rotation, 2 * rotation)).pvalue > 1e-3


def test_sizes_are_uniform_in_their_logarithm():
    augmentation = dataclasses.replace(OFF, scale=0.5)
    windows = [augmentation.coordinates((1, 2), (0.0, 0.0), keyed_generator(seed)) for seed in range(300)]
    steps = torch.stack([window[1, 0, 1] - window[1, 0, 0] for window in windows])
    assert kstest(steps.log().numpy(), "uniform", (-math.log(1.5), 2 * math.log(1.5))).pvalue > 1e-3


def test_deformations_turn_about_the_centre():
    augmentation = Augmentation(scale=0.5, elastic_sd=0.0)
    middle = augmentation.coordinates((5, 5), (7.25, -3.5), keyed_generator(3))[:, 2, 2]
    assert middle.tolist() == [7.25, -3.5]


def test_elastic_displacement_is_added_to_the_plain_crop():
    generator = keyed_generator(0)
    moved = dataclasses.replace(OFF, elastic_sd=2.0).coordinates((9, 7), (4.0, 3.0), generator)
    displacement = moved - OFF.coordinates((9, 7), (4.0, 3.0), keyed_generator(0))
    points = displacement[:, [0, 4, 8]][:, :, [0, 3, 6]]
    generator = keyed_generator(0)
    torch.rand(4, generator=generator)  # of the other deformations
    torch.testing.assert_close(points, 2 * torch.randn(2, 3, 3, generator=generator), rtol=0, atol=1e-5)  # float32


def test_same_seed_gives_the_same_window():
    windows = [Augmentation(scale=0.2).coordinates((8, 8), (5.0, 5.0), keyed_generator(4)) for _ in range(2)]
    assert torch.equal(*windows)


def test_other_seed_gives_another_window():
    windows = [Augmentation().coordinates((8, 8), (5.0, 5.0), keyed_generator(seed)) for seed in (4, 5)]
    assert not torch.equal(*windows)


def test_as_many_numbers_are_drawn_whatever_is_off():
    states = []
    changes = {name: 1.0 for name in ("brightness", "contrast", "noise", "colour", "shuffle", "inversion")}
    for augmentation in (OFF, Augmentation(scale=0.2, **changes)):
        generator = keyed_generator(0)
        augmentation.coordinates((8, 8), (5.0, 5.0), generator)
        augmentation.grey_values(picture(8, 8), generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    augmentation = Augmentation(scale=0.2, brightness=1.0, contrast=1.0, noise=1.0)
    augmentation.coordinates((8, 8), (5.0, 5.0), keyed_generator(0))
    augmentation.grey_values(picture(8, 8), keyed_generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_colours_are_changed_channel_by_channel():
    image = picture(8, 8, channels=3)
    changed = dataclasses.replace(OFF, colour=0.3).grey_values(image, keyed_generator(0))
    fits = [np.polyfit(old.flatten(), new.flatten(), 1, full=True) for old, new in zip(image, changed, strict=True)]
    assert all(residual < 1e-6 for _, (residual,), *_ in fits)  # a factor and a shift each
    assert len({round(float(factor), 3) for (factor, _), *_ in fits}) == 3


def test_channels_are_shuffled_in_as_many_windows_as_told():
    image = picture(2, 2, channels=3)
    shuffled = [dataclasses.replace(OFF, shuffle=0.5).grey_values(image, keyed_generator(seed)) for seed in range(300)]
    assert all(sorted(one.flatten().tolist()) == sorted(image.flatten().tolist()) for one in shuffled)
    is_same = np.mean([torch.equal(one, image) for one in shuffled])
    assert is_same == pytest.approx(
        0.5 + 0.5 / 6, abs=0.12
    )  # four standard deviations; one order of six is the old one


def test_bright_and_dark_change_places_in_as_many_windows_as_told():
    image = picture(2, 2)
    inverted = [
        dataclasses.replace(OFF, inversion=0.3).grey_values(image, keyed_generator(seed)) for seed in range(300)
    ]
    assert {torch.equal(one, image) or torch.equal(one, -image) for one in inverted} == {True}
    assert np.mean([torch.equal(one, -image) for one in inverted]) == pytest.approx(0.3, abs=0.11)


# ------------------------------------------------------------------------------------------------ elastic displacement


@pytest.mark.parametrize(("size", "grid"), [((9, 13), 3), ((7, 10), 4), ((5, 5), 2)])
def test_displacement_at_the_grid_points_is_what_was_drawn(size, grid):
    displacement = elastic_displacement(size, sd=10.0, grid=grid, generator=keyed_generator(0))
    rows, columns = (torch.linspace(0, side - 1, grid).long() for side in size)
    drawn = 10 * torch.randn(2, grid, grid, generator=keyed_generator(0))
    torch.testing.assert_close(displacement[:, rows][:, :, columns], drawn, rtol=0, atol=1e-4)  # float32 kernel weights


def test_displacement_has_the_standard_deviation_at_the_grid_points():
    generator = keyed_generator(0)
    drawn = [elastic_displacement((3, 3), sd=10.0, generator=generator) for _ in range(400)]
    # 7200 values: four standard errors of their deviation are 3.3 %
    assert torch.stack(drawn).std().item() == pytest.approx(10, rel=0.034)


def test_displacement_is_cubic_between_the_grid_points():
    displacement = elastic_displacement((1, 9), sd=1.0, generator=keyed_generator(0))[0, 0]
    # third differences of a cubic are constant, within each of two intervals of four pixels
    for third in (displacement[:5].diff(n=3), displacement[4:].diff(n=3)):
        assert third[0].item() == pytest.approx(third[1].item(), abs=1e-5)  # float32
        assert third[0].abs() > 1e-3


def test_displacement_has_a_row_and_a_column_part_for_each_pixel():
    displacement = elastic_displacement((5, 8), generator=keyed_generator(0))
    assert (displacement.shape, displacement.dtype) == ((2, 5, 8), torch.float32)


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("mode", MODES)
def test_sampling_at_all_pixels_is_the_identity(mode):
    image = picture(11, 30)
    sampled = sample_at(image, positions(range(11), range(30)), mode=mode)
    torch.testing.assert_close(sampled, image, rtol=0, atol=0 if mode == "nearest" else POSITION_TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
def test_sampling_the_plain_crop_is_the_crop(mode):
    image = picture(11, 30)
    sampled = sample_at(image, OFF.coordinates((4, 7), (5.5, 20.0), keyed_generator(0)), mode=mode)
    tolerance = 0 if mode == "nearest" else POSITION_TOLERANCE
    torch.testing.assert_close(sampled, image[:, 4:8, 17:24], rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_constant_shift_moves_the_image(mode):
    image = picture(11, 30)
    shifted = positions(range(6), range(9)) + torch.tensor([3.0, 5.0])[:, None, None]
    tolerance = 0 if mode == "nearest" else POSITION_TOLERANCE
    torch.testing.assert_close(sample_at(image, shifted, mode=mode), image[:, 3:9, 5:14], rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(9, 6), (2, 7), (1, 5), (6, 1), (1, 1)])
def test_outside_of_the_image_is_its_mirror_image(size, mode):
    image, pad = picture(*size), 8  # more than once around
    expected = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    coordinates = positions(*(range(-pad, side + pad) for side in size))
    sampled = sample_at(image, coordinates, mode=mode).numpy()
    np.testing.assert_allclose(sampled, expected, rtol=0, atol=0 if mode == "nearest" else POSITION_TOLERANCE)


@pytest.mark.parametrize(("mode", "order"), [("nearest", 0), ("bilinear", 1)])
@pytest.mark.parametrize("size", [(13, 30), (1, 9)])
def test_values_at_random_places_are_those_of_scipy(size, mode, order):
    image = picture(*size)
    rng = np.random.default_rng(0)
    coordinates = np.stack([rng.uniform(-2 * side, 3 * side, (20, 15)) for side in size]).astype(np.float32)
    expected = np.stack([ndimage.map_coordinates(c, coordinates, order=order, mode="mirror") for c in image.numpy()])
    sampled = sample_at(image, torch.from_numpy(coordinates), mode=mode).numpy()
    # positions here are up to three sides away, so they have a bit or two less
    np.testing.assert_allclose(sampled, expected, rtol=0, atol=0 if mode == "nearest" else 4 * POSITION_TOLERANCE)


def test_bicubic_halfway_between_pixels_has_the_weights_of_the_kernel():
    impulse = torch.zeros(1, 1, 9)
    impulse[..., 4] = 1
    halfway = torch.stack([torch.zeros(1, 4), torch.tensor([[2.5, 3.5, 4.5, 5.5]])])
    expected = torch.tensor([[[-0.09375, 0.59375, 0.59375, -0.09375]]])  # Keys 1981 with a = -0.75, as torch has it
    torch.testing.assert_close(sample_at(impulse, halfway, mode="bicubic"), expected, rtol=0, atol=1e-5)  # float32


def test_labels_keep_their_values():
    labels = torch.tensor([0.0, 7.0, 255.0])[torch.randint(3, (1, 20, 20), generator=keyed_generator(0))]
    coordinates = Augmentation(scale=0.3).coordinates((32, 32), (9.5, 9.5), keyed_generator(1))
    assert set(sample_at(labels, coordinates, mode="nearest").unique().tolist()) == {0.0, 7.0, 255.0}


def test_large_labels_are_exact():
    labels = (2.0**24 - torch.arange(36.0)).reshape(1, 6, 6)
    sampled = sample_at(labels, positions(range(6), range(6)) + 0.4, mode="nearest")
    assert torch.equal(sampled, labels)


def test_nearest_halves_are_alike_on_both_sides_of_the_mirror():
    labels = torch.arange(4.0).reshape(1, 1, 4)
    places = torch.tensor([0.5, 1.5, 2.5])
    for mirrored in (-places, 6 - places):
        here = torch.stack([torch.zeros(1, 3), places[None]])
        there = torch.stack([torch.zeros(1, 3), mirrored[None]])
        assert torch.equal(sample_at(labels, here, mode="nearest"), sample_at(labels, there, mode="nearest"))


@pytest.mark.parametrize("seed", range(4))
def test_image_and_label_move_alike(seed):
    y, x = positions(range(80), range(80))
    smooth = (torch.sin(y / 7) + torch.cos(x / 9 + 1) + 0.4 * torch.sin((x + y) / 11))[None]
    coordinates = Augmentation(elastic_sd=4.0).coordinates((64, 64), (39.5, 39.5), keyed_generator(seed))
    image = (sample_at(smooth, coordinates, mode="bicubic")[0] > 0).numpy()
    label = (sample_at((smooth > 0).float(), coordinates, mode="nearest")[0] > 0).numpy()
    neighbours = np.ones((3, 3), dtype=bool)
    near_edge = ndimage.binary_dilation(label, neighbours) & ndimage.binary_dilation(~label, neighbours)
    assert near_edge.mean() < 0.5  # or there would be little to see
    assert not ((image != label) & ~near_edge).any()


# --------------------------------------------------------------------------------------------------------- grey values


def test_grey_values_stay_when_all_is_off():
    image = picture(8, 8)
    assert torch.equal(OFF.grey_values(image, keyed_generator(0)), image)


def test_brightness_adds_the_same_to_each_pixel():
    image = picture(8, 8)
    added = Augmentation(brightness=0.5).grey_values(image, keyed_generator(0)) - image
    assert added.std() < 1e-6  # float32
    assert added.mean().abs() > 0.01


def test_brightness_has_the_standard_deviation():
    generator, image = keyed_generator(0), torch.zeros(1, 1, 1)
    added = torch.stack([Augmentation(brightness=0.5).grey_values(image, generator) for _ in range(2000)])
    assert added.std().item() == pytest.approx(0.5, rel=0.064)  # four standard errors


def test_contrast_scales_about_the_mean():
    image = picture(8, 8)
    scaled = Augmentation(contrast=0.5).grey_values(image, keyed_generator(0))
    factors = (scaled - image.mean()) / (image - image.mean())
    torch.testing.assert_close(
        factors, factors[0, 0, 0].expand_as(factors), rtol=1e-3, atol=0
    )  # some are near the mean
    assert factors[0, 0, 0] > 0
    assert abs(factors[0, 0, 0] - 1) > 0.01


def test_logarithm_of_the_contrast_has_the_standard_deviation():
    generator, image = keyed_generator(0), torch.tensor([[[-1.0, 1.0]]])
    factors = [Augmentation(contrast=0.5).grey_values(image, generator)[0, 0, 1] for _ in range(2000)]
    assert torch.stack(factors).log().std().item() == pytest.approx(0.5, rel=0.064)  # four standard errors


def test_noise_has_the_standard_deviation():
    image = picture(40, 40, channels=1)
    added = Augmentation(noise=0.5).grey_values(image, keyed_generator(0)) - image
    assert added.std().item() == pytest.approx(0.5, rel=0.072)  # four standard errors


def test_grey_values_are_not_clipped():
    image = torch.ones(1, 4, 4)
    brighter = [Augmentation(brightness=5.0).grey_values(image, keyed_generator(seed)).max() for seed in range(10)]
    assert max(brighter) > 1


def test_grey_values_do_not_change_the_image_in_place():
    image = picture(8, 8)
    Augmentation(brightness=0.5, contrast=0.5, noise=0.5).grey_values(image, keyed_generator(0))
    assert torch.equal(image, picture(8, 8))


def test_same_seed_gives_the_same_grey_values():
    augmentation = Augmentation(brightness=0.5, contrast=0.5, noise=0.5)
    assert torch.equal(*[augmentation.grey_values(picture(8, 8), keyed_generator(2)) for _ in range(2)])


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["rotation", "scale", "elastic_sd", "brightness", "contrast", "noise"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_strength_out_of_range_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}; 0 turns it off"):
        Augmentation(**{name: value})


@pytest.mark.parametrize("grid", [1, 0, -3])
def test_grid_of_fewer_than_two_points_is_an_error(grid):
    with pytest.raises(ValueError, match=f"elastic_grid must be at least 2 points a side, got {grid}"):
        Augmentation(elastic_grid=grid)


def test_fields_are_keyword_only():
    with pytest.raises(TypeError):
        Augmentation(True, 90.0)
