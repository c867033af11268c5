"""Findings about images: each for images that deserve it, and none for others."""

import numpy as np
import torch

from unet_diffusion.checks.images import crop_findings, image_findings


def noise(number=8, channels=3, side=8, dtype=np.uint8):
    values = np.random.default_rng(0).integers(np.iinfo(dtype).max + 1, size=(number, channels, side, side))
    return torch.from_numpy(values.astype(dtype))


def texts(findings, severity):
    return [finding.text for finding in findings if finding.severity == severity]


def test_nothing_is_found_in_images_that_use_their_range():
    for images in (noise(), noise(channels=1), noise(channels=4), noise(dtype=np.uint16), list(noise())):
        assert image_findings(images) == []


def test_images_of_12_of_16_bits_use_little_of_the_range():
    images = torch.from_numpy(noise(dtype=np.uint16).numpy() // 16)
    (text,) = texts(image_findings(images), "warning")
    assert "4,09" in text
    assert "65,535" in text


def test_images_of_one_colour_are_named():
    images = noise()
    images[2] = 7
    (finding,) = image_findings(images, [f"{i}.png" for i in range(8)])
    assert "1 of 8 images are of one colour (2.png)" in finding.text
    assert finding.severity == "advice"


def test_few_images_of_one_colour_are_a_note():
    images = noise(number=100)
    images[2] = 7
    assert [finding.severity for finding in image_findings(images)] == ["note"]


def test_grey_images_with_three_channels_are_a_note():
    (finding,) = image_findings(noise(channels=1).expand(-1, 3, -1, -1))
    assert (finding.severity, finding.option) == ("note", "--data.channels 1")


def test_opaque_images_with_four_channels_are_a_note():
    images = noise(channels=4)
    images[:, 3] = 255
    assert [finding.option for finding in image_findings(images)] == ["--data.channels 3"]


def test_cut_heads_of_tall_images_are_found():
    (finding,) = crop_findings([(150, 100)] * 3 + [(100, 100)] * 7, (64, 64))
    assert "3 of 10 images are tall, and lose 33.3 % on average" in finding.text
    assert finding.severity == "advice"


def test_the_cut_of_wide_images_is_found_for_the_size_asked_for():
    assert crop_findings([(100, 200)] * 4, (64, 128)) == []
    assert "wide" in crop_findings([(100, 200)] * 4, (64, 64))[0].text


def test_images_of_about_the_right_shape_are_not_cut_much():
    assert crop_findings([(100, 110), (110, 100), (64, 64)], (64, 64)) == []
