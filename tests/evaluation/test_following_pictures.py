"""Pictures of conditions beside samples: what stands where."""

import numpy as np
import torch

from unet_diffusion.evaluation.following_pictures import picture_by_name, side_by_side
from unet_diffusion.evaluation.selections import of_images

CENTRES = [50, 148, 246]  # of tiles, in pixels


def test_picture_has_a_row_for_each_image_and_a_column_for_each_title():
    grey, colour = torch.zeros(2, 1, 96, 96), torch.ones(2, 3, 96, 96)
    picture = np.asarray(side_by_side({"map": grey, "real image": colour, "drawn image": -colour}))
    centres = picture[[16 + 50, 16 + 148]][:, CENTRES]
    assert (centres == np.array([128, 255, 0])[None, :, None]).all()


def test_long_titles_end_before_the_next_column():
    tile = torch.zeros(1, 1, 96, 96)
    long = np.asarray(side_by_side({"a title of several\nlines, " * 9: tile, "": tile}))[:16]
    assert (long[:, :98] > 200).any()
    assert (long[:, 98:] == 128).all()


def of_levels(*levels):
    """Images of one level each, from -1 to 1."""
    return of_images(torch.tensor(levels)[:, None, None, None].expand(-1, 1, 8, 8).float())


def test_samples_stand_below_an_image_of_their_name():
    held_out, samples = of_levels(-1.0, 0.0, 1.0), of_levels(-0.5, 0.5, -0.6, 0.6, 0.7)
    image = picture_by_name(
        ["cat", "no sample", "dog", "no image"],
        *(held_out, ["dog", "no sample", "cat"]),
        *(samples, ["cat", "dog", "cat", "dog", "no image"]),
    )
    centres = np.asarray(image)[[16 + centre for centre in CENTRES]][:, CENTRES[:2], 0] / 127.5 - 1
    np.testing.assert_allclose(centres, [[1, -1], [-0.5, 0.5], [-0.6, 0.6]], atol=0.01)
    assert image.size == (2 * 98 + 2, 16 + 3 * 98 + 2)
    assert picture_by_name(["cat"], held_out, ["dog"] * 3, samples, ["cat"] * 5) is None


def test_ten_names_and_three_samples_of_each_are_shown():
    images, names = of_levels(*np.linspace(-1, 1, 60)), [str(number % 12) for number in range(60)]
    image = picture_by_name(dict.fromkeys(names), images, names, images, names)
    assert image.size == (10 * 98 + 2, 16 + 4 * 98 + 2)
