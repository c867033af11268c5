"""Findings about classes and label images: each for labels that deserve it, and none for others."""

import numpy as np
import pytest
import torch

from unet_diffusion.checks.labels import (
    class_findings,
    object_facts,
    object_findings,
    objects_of,
    pixel_findings,
    touching,
)
from unet_diffusion.segmentation.labels import Targets

INSTANCES = Targets("instances")


def classes(*counts, val=2):
    """Labels with these numbers of images of each class, and two of each class to validate on."""
    train = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
    held_out = torch.arange(len(counts)).repeat(val)
    labels = torch.cat([train, held_out])
    index = torch.arange(len(labels))
    names = [f"class{number}" for number in range(len(counts))]
    return [str(one) for one in class_findings(labels, names, index[: len(train)], index[len(train) :])]


def squares(*numbers):
    """A label image with squares of 4x4 in a row, one pixel apart where a 0 is between them."""
    label = np.zeros((8, 40), dtype=np.int32)
    x = 0
    for number in numbers:
        label[2:6, x : x + 4] = number
        x += 4 if number else 1
    return label


def test_nothing_is_found_in_balanced_classes():
    assert classes(20, 30, 40) == []


def test_a_class_without_images_is_a_warning():
    assert any(
        text.startswith("warning: 1 of 3 classes have no image to train on (class1)") for text in classes(20, 0, 30)
    )


def test_a_class_of_few_images_is_named():
    assert any("fewer than 10 images to train on (class1: 3)" in text for text in classes(20, 3))


def test_a_class_many_times_as_large_as_another_is_named():
    assert any("class class1 has 30 times as many images as class0" in text for text in classes(10, 300))


def test_a_class_that_is_not_validated_is_a_note():
    assert [text[:4] for text in classes(20, 20, val=0)] == ["note"]


def test_objects_are_counted_with_their_areas_and_those_that_touch():
    objects = objects_of([squares(1, 2, 0, 3), squares()], INSTANCES)
    assert objects.areas.tolist() == [16, 16, 16]
    assert (objects.num_touching, objects.num_empty) == (2, 1)
    assert "3 objects, 1.5 an image" in object_facts(objects, 2)[0]


def test_regions_of_a_mask_are_objects():
    assert len(objects_of([(squares(1, 0, 1) * 255).astype(np.int32)], Targets("0/255")).areas) == 2


def test_touching_objects_are_neighbours_in_either_direction():
    label = np.array([[1, 1, 0], [2, 0, 3], [0, 0, 3]], dtype=np.int32)
    assert touching(label) == {1, 2}


def test_touching_objects_want_separate_borders():
    labels = [squares(1, 2, 0, 3)]
    (finding,) = object_findings(objects_of(labels, INSTANCES), INSTANCES, 1, window_size=32)
    assert "66.7 % of the objects touch another" in finding.text
    borders = Targets("instances", separate_borders=True)
    assert object_findings(objects_of(labels, borders), borders, 1, window_size=32) == []


def test_empty_label_images_are_counted():
    (finding,) = object_findings(objects_of([squares(1), squares()], INSTANCES), INSTANCES, 2, window_size=32)
    assert "1 of 2 label images hold no object" in finding.text


def test_objects_wider_than_a_window_are_found():
    (finding,) = object_findings(objects_of([squares(1)], INSTANCES), INSTANCES, 1, window_size=3)
    assert "wider than a window of 3 pixels" in finding.text


@pytest.mark.parametrize(("diameter", "num_findings"), [(4, 0), (8, 1)])
def test_objects_of_one_size_are_as_wide_as_they_are_scaled_to(diameter, num_findings):
    targets = Targets("instances", separate_borders=True, object_diameter=diameter)
    large = squares(1).repeat(3, axis=0).repeat(3, axis=1)
    assert len(object_findings(objects_of([large], targets), targets, 1, window_size=6)) == num_findings


def test_a_rare_class_is_ignored_by_cross_entropy_alone():
    pixels = torch.zeros(100, 100, dtype=torch.int16)
    pixels[0, :50] = 1
    mask = Targets("0/1")
    assert "cell: 0.5 %" in pixel_findings([pixels], mask, "cross_entropy")[0].text
    assert pixel_findings([pixels], mask, "both") == []
    assert pixel_findings([pixels], Targets("0/1", class_balance=True), "cross_entropy") == []


def test_a_class_without_pixels_is_a_warning():
    (finding,) = pixel_findings([torch.zeros(4, 4, dtype=torch.int16)], Targets("0/1"), "both")
    assert finding.severity == "warning"
