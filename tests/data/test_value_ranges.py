"""Ranges of values that are measured over files, or kept from a model."""

import numpy as np
import pytest
from PIL import Image

from unet_diffusion.data import Folder, PairedFiles, SegmentationDataModule
from unet_diffusion.data.listing import LeftOut
from unet_diffusion.data.value_ranges import MEASURED, keep_range, settled_range
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.segmentation.labels import Targets


def ramps(folder, *highest):
    """Images of floating-point numbers from 0 to these."""
    folder.mkdir()
    for number, high in enumerate(highest):
        np.save(folder / f"{number}.npy", np.linspace(0, high, 64, dtype=np.float32).reshape(8, 8))
    return folder


def paired(tmp_path, **options):
    """A source of two labelled images, and of one without a label that has the name of the first."""
    (tmp_path / "labels").mkdir()
    for number in range(2):
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "labels" / f"{number}.png")
    images, others = ramps(tmp_path / "images", 100, 50), ramps(tmp_path / "others", 1)
    return PairedFiles(images, tmp_path / "labels", unlabelled=others, value_range=MEASURED, **options)


def test_range_is_that_of_all_places_where_names_are_alike(tmp_path):
    assert paired(tmp_path).load(progress=False).values.value_range == (0, 100)


class Counted:
    """Files that count how often they are read, and cannot be."""

    names, left_out, num_read = ["a.npy"], LeftOut(), 0

    def read(self, name, max_bytes=None):
        self.num_read += 1
        raise ValueError("it cannot be read")

    def stamp(self, name):
        return ""


def test_files_are_not_measured_where_the_range_is_kept_and_images_beyond_it_are_left_out():
    files = Counted()
    options = {"progress": False, "kept_range": (0, 5)}
    assert settled_range(MEASURED, [files], 1, on_bad_file="skip", **options) == (0, 5)
    assert files.num_read == 0
    assert settled_range(MEASURED, [files], 1, on_bad_file="error", **options) == (0, 5)
    assert files.num_read == 1


@pytest.mark.parametrize("has_skip", [True, False])
def test_images_beyond_a_kept_range_are_named_with_what_the_source_can_do(tmp_path, has_skip):
    source = paired(tmp_path)
    if has_skip:
        source = Folder(tmp_path / "images", image_size=8, channels=1, value_range=MEASURED)
    source.kept_range = (0, 60)
    said = r"from 0 to 60, .* 1 of [23] images have others: 0\.npy \(0 to 100\); take them away, "
    said += "leave them out by --data.on_bad_file skip, or" if has_skip else "or begin another run"
    with pytest.raises(ValueError, match=said):
        source.load(progress=False)


def test_image_beyond_a_declared_range_asks_for_one_that_holds_it(tmp_path):
    images = ramps(tmp_path / "images", 100, 50)
    said = r"within value_range, 0 to 60, and go from 0 to 100; leave the image out, or begin another run, with a range"
    with pytest.raises(ValueError, match=said):
        Folder(images, image_size=8, channels=1, value_range=(0, 60)).load(progress=False)


@pytest.mark.parametrize(("stretch", "kept"), [(True, None), (False, (0, 60))])
def test_data_that_stretch_each_image_keep_no_range(tmp_path, stretch, kept):
    data = SegmentationDataModule(paired(tmp_path), Targets("instances"), stretch=stretch)
    keep_range(data, PixelValues("float32", 0, 60))
    assert data.source.kept_range == kept
