"""Duplicates across the split: equal images, brighter ones and tinted ones are found, and others are not."""

import torch

from unet_diffusion.checks.duplicates import alike_findings, exact_findings, nearest_trained, thumbnails

NAMES = [f"{i}.png" for i in range(40)]
TRAIN, VAL = torch.arange(30), torch.arange(30, 40)


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(100, 200, (40, 3, 24, 24), generator=generator).to(torch.uint8)


def test_different_images_are_not_alike():
    assert alike_findings(thumbnails(images()), NAMES, TRAIN, VAL) == []


def test_brighter_and_tinted_copies_are_alike_and_named():
    copies = images()
    copies[30], copies[31] = copies[3] + 40, copies[4] // 2
    copies[32] = copies[5]
    copies[32, 0] += 40
    (finding,) = alike_findings(thumbnails(copies), NAMES, TRAIN, VAL)
    assert finding.severity == "warning"
    assert "3 of 10 images to validate on (30 %)" in finding.text
    assert "in 3 groups" in finding.text
    assert "30.png and 3.png" in finding.text


def test_few_images_that_are_alike_are_a_note():
    copies = images()
    copies[30] = copies[3]
    val = torch.arange(19, 40)
    train = torch.arange(19)
    assert [one.severity for one in alike_findings(thumbnails(copies), NAMES, train, val)] == ["note"]


def test_images_without_content_are_not_alike():
    assert alike_findings(thumbnails(images() // 100 + 7), NAMES, TRAIN, VAL) == []


def test_small_bright_images_are_alike_by_what_they_show_and_not_by_their_brightness():
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(220, 250, (40, 1, 8, 8), generator=generator).to(torch.uint8)
    assert alike_findings(thumbnails(small), NAMES, TRAIN, VAL) == []
    assert alike_findings(thumbnails(torch.full_like(small, 250)), NAMES, TRAIN, VAL) == []
    small[30] = small[3] - 150
    (finding,) = alike_findings(thumbnails(small), NAMES, TRAIN, VAL)
    assert "(30.png and 3.png)" in finding.text


def test_thumbnails_of_a_list_are_those_of_a_tensor():
    assert torch.equal(thumbnails(list(images())), thumbnails(images()))


def test_the_nearest_image_is_that_of_all_distances(monkeypatch):
    monkeypatch.setattr("unet_diffusion.checks.duplicates.AT_ONCE", 64)  # in several parts
    thumbs = thumbnails(images())
    likeness, nearest = nearest_trained(thumbs, TRAIN, VAL)
    expected = (thumbs[VAL][:, None] * thumbs[TRAIN]).sum(dim=-1).max(dim=1)
    torch.testing.assert_close(likeness, expected.values)
    assert torch.equal(nearest, expected.indices)


def test_equal_images_on_both_sides_are_named_and_copies_counted():
    contents = [str(i) for i in range(40)]
    contents[35], contents[4] = contents[7], contents[3]
    found = exact_findings(contents, NAMES, TRAIN, VAL)
    assert "1 of 10 images to validate on" in found[0].text
    assert "35.png = 7.png" in found[0].text
    assert "1 of 30 images to train on are copies" in found[1].text
    assert exact_findings([str(i) for i in range(40)], NAMES, TRAIN, VAL) == []
