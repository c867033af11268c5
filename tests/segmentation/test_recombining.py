"""Masks made of real ones: each number is one object, nothing overlaps, and objects keep their shapes."""

import numpy as np
import pytest
import skimage
import torch

from unet_diffusion.segmentation import recombining
from unet_diffusion.segmentation.recombining import RecombinedMasks, pixels_at
from unet_diffusion.segmentation.synthetic import synthetic_cells

NUM = 5
CELLS = [synthetic_cells((72, 90), num_cells=6, seed=seed) for seed in range(NUM)]
LABELS = [labels for _, labels in CELLS]
NAMES = [f"{number}.png" for number in range(NUM)]


def masks(labels=LABELS, size=(48, 40), seed=0) -> RecombinedMasks:
    return RecombinedMasks(labels, size, seed=seed, names=NAMES[: len(labels)])


def test_each_number_is_one_connected_object_and_none_is_left_out():
    for mask in map(masks().__getitem__, range(30)):
        assert (mask.labels.shape, mask.labels.dtype) == ((48, 40), np.int32)
        assert np.unique(mask.labels[mask.labels > 0]).tolist() == list(range(1, mask.labels.max() + 1))
        for number in range(1, mask.labels.max() + 1):
            assert skimage.measure.label(mask.labels == number, connectivity=2).max() == 1


def test_every_pixel_is_of_the_object_that_is_there_in_the_real_label_image():
    """So none covers another, and all pixels of a mask's object are of one real object."""
    num_pasted = 0
    for mask in map(masks().__getitem__, range(30)):
        real = np.zeros(mask.labels.shape, dtype=int)
        for y, x in np.ndindex(real.shape):
            image, row, column = mask.places[:, y, x]
            real[y, x] = 1000 * image + LABELS[image][row, column] if LABELS[image][row, column] else 0
        assert np.array_equal(real > 0, mask.labels > 0)
        for number in range(1, mask.labels.max() + 1):
            assert len(np.unique(real[mask.labels == number])) == 1
        num_pasted += len(np.unique(mask.places[0])) - 1
    assert num_pasted > 20  # images beside the window's, in 30 masks


def test_pasted_objects_are_whole(monkeypatch):
    """Without a change of size, as many pixels as in the real label image."""
    monkeypatch.setattr(recombining, "SCALE", 1.0)
    checked = 0
    for mask in map(masks().__getitem__, range(30)):
        most = np.bincount(mask.places[0].ravel()).argmax()  # the window's
        for number in np.unique(mask.labels[mask.places[0] != most]):
            image, row, column = mask.places[:, mask.labels == number][:, 0]
            assert (mask.labels == number).sum() == (LABELS[image] == LABELS[image][row, column]).sum()
            checked += 1
    assert checked > 20


def test_view_is_numpys(monkeypatch):
    """A window without a change of size is a part of one of the eight views of its label image."""
    monkeypatch.setattr(recombining, "SCALE", 1.0)
    monkeypatch.setattr(recombining, "MOST_PASTED", 0)
    for mask in map(masks().__getitem__, range(12)):
        image = mask.places[0, 0, 0]
        turned = [np.rot90(LABELS[image], turns) for turns in range(4)]
        parts = [
            part
            for view in [*turned, *(view[:, ::-1] for view in turned)]
            for part in np.lib.stride_tricks.sliding_window_view(view > 0, (48, 40)).reshape(-1, 48, 40)
        ]
        assert any(np.array_equal(part, mask.labels > 0) for part in parts)


def test_mask_is_a_function_of_seed_and_number_alone():
    some, others = masks(), masks()
    later = [some[number].labels for number in (3, 0)]
    assert np.array_equal(later[0], others[3].labels)
    assert np.array_equal(later[1], others[0].labels)
    assert not np.array_equal(later[0], later[1])
    assert not np.array_equal(later[0], masks(seed=1)[3].labels)
    state = torch.get_rng_state()
    masks()[0]
    assert torch.equal(state, torch.get_rng_state())


def test_touching_numbers_of_a_label_image_stay_apart():
    labels = np.zeros((40, 40), dtype=np.int32)
    labels[10:30, 5:20], labels[10:30, 20:35] = 70_000, 3
    sizes = {masks([labels], (40, 40))[number].labels.max() for number in range(10)}
    assert sizes == {2}


def test_objects_of_another_kind_are_not_added():
    kinds = [0, 1, 0, 1, 1]
    made = RecombinedMasks(LABELS, (48, 40), seed=0, names=NAMES, kinds=kinds)
    together = [{kinds[image] for image in np.unique(made[number].places[0])} for number in range(30)]
    assert {len(mixed) for mixed in together} == {1}
    assert {kind for mixed in together for kind in mixed} == {0, 1}


def test_pixels_move_with_the_objects():
    images = [image[None] for image, _ in CELLS]
    mask = masks()[4]
    pixels = pixels_at(images, mask)
    for y, x in np.ndindex(mask.labels.shape):
        image, row, column = mask.places[:, y, x]
        assert pixels[0, y, x] == images[image][0, row, column]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([LABELS[0], LABELS[1][:47]], r"at least 48x48 pixels, .* 1 of 2 are smaller: 1\.png \(47x90\)"),
        ([np.zeros((60, 60), np.int32)], "1 label images hold no object"),
    ],
)
def test_label_images_that_do_not_fit_are_refused(labels, said):
    with pytest.raises(ValueError, match=said):
        masks(labels)
