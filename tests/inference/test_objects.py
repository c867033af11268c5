"""The table of segmented objects, against a count by hand, and the sizes of pixels that TIFF files hold."""

import csv
import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_diffusion.inference.objects import COLUMNS, object_rows, pixel_size, write_objects
from unet_diffusion.inference.segment_files import ImagesToSegment, Outputs


def test_row_of_an_object_is_what_a_loop_over_pixels_counts():
    rng = np.random.default_rng(0)
    instances, pixels = np.zeros((9, 7), dtype=np.uint16), rng.random((9, 7)) * 1000
    instances[1:4, 2:6], instances[5, 1], instances[7:9, 3:5] = 3, 9, 1
    rows = {row[0]: row[1:] for row in object_rows(instances, pixels)}
    assert set(rows) == {1, 3, 9}
    for number, (area, y, x, top, left, bottom, right, intensity) in rows.items():
        inside = [(i, j) for i in range(9) for j in range(7) if instances[i, j] == number]
        ys, xs = zip(*inside, strict=True)
        assert area == len(inside)
        assert (y, x) == pytest.approx((sum(ys) / area, sum(xs) / area), abs=1e-3)
        assert (top, left, bottom, right) == (min(ys), min(xs), max(ys) + 1, max(xs) + 1)
        assert intensity == pytest.approx(sum(pixels[place] for place in inside) / area, abs=1e-3)


def test_table_has_a_row_for_each_object_of_each_page(tmp_path):
    pages = np.arange(2 * 6 * 5, dtype=np.uint16).reshape(2, 6, 5)
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / "stack.tif", pages)
    Image.fromarray(np.full((6, 5, 3), (10, 20, 60), dtype=np.uint8)).save(tmp_path / "images" / "colour.png")
    numbers = np.zeros((2, 6, 5), dtype=np.uint16)
    numbers[0, :2, :2], numbers[1, 3:, 4] = 1, 2
    (tmp_path / "out" / "instances").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "out" / "instances" / "stack.tif", numbers, photometric="minisblack")
    Image.fromarray(numbers[0]).save(tmp_path / "out" / "instances" / "colour.png")
    outputs = Outputs(tmp_path / "out", instances=True)
    assert write_objects(ImagesToSegment([tmp_path / "images"]), outputs, 1) == 3
    with (tmp_path / "out" / "objects.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    assert [row[:4] for row in rows] == [
        *(["colour.png", "0", "1", "4"], ["stack.tif", "0", "1", "4"], ["stack.tif", "1", "2", "3"])
    ]
    assert [float(row[10]) for row in rows] == [30.0, pages[0, :2, :2].mean(), pages[1, 3:, 4].mean()]
    assert rows[0][-2:] == ["", ""]


def written(**options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((4, 5), dtype=np.uint16), **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm",
                                    "PhysicalSizeY": 500.0, "PhysicalSizeYUnit": "nm"}}, (0.5, 0.25)),
        ({"imagej": True, "resolution": (4.0, 2.0), "metadata": {"unit": "um"}}, (0.5, 0.25)),
        ({"resolution": (40000, 20000), "resolutionunit": "CENTIMETER"}, (0.5, 0.25)),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, (None, None)),  # of a printer
        ({}, (None, None)),
    ],
)  # fmt: skip
def test_size_of_a_pixel_is_that_of_the_file(options, size):
    assert pixel_size(written(**options)) == (pytest.approx(size[0]), pytest.approx(size[1]))


@pytest.mark.parametrize(
    ("pixels", "size"),
    [
        ('<Pixels PhysicalSizeX="" PhysicalSizeY="0.5"/>', (0.5, None)),
        ('<Pixels PhysicalSizeX="0.25" PhysicalSizeXUnit="ell"/>', (None, None)),
        ('<Pixels PhysicalSizeX="0.25">', (None, None)),  # never closed
    ],
)
def test_size_is_unknown_where_the_metadata_is_broken(pixels, size):
    namespace = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    assert pixel_size(written(description=f'<OME xmlns="{namespace}">{pixels}</OME>', metadata=None)) == size


def test_objects_of_an_image_that_was_removed_are_left_out(tmp_path):
    for folder in ("images", "out/instances"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.fromarray(np.ones((6, 5), dtype=np.uint8)).save(tmp_path / folder / name)
    images = ImagesToSegment([tmp_path / "images"])
    (tmp_path / "images" / "a.png").unlink()
    assert write_objects(images, Outputs(tmp_path / "out", instances=True), 1) == 1


def test_other_formats_hold_no_size_of_a_pixel():
    assert pixel_size(b"\x89PNG") == (None, None)
