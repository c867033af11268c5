"""What is found in the data of a run, whatever source they are from; a quick look spares large sets."""

import numpy as np
import pytest
import torch
from PIL import Image

from unet_diffusion.checks.data import data_sections
from unet_diffusion.data import Folder, ImageDataModule, ImageSet, SegmentationDataModule, Source
from unet_diffusion.data.labelled import LabelledImages, LabelledSource
from unet_diffusion.segmentation.labels import Targets


class Held(Source):
    """Images that are given."""

    def __init__(self, images, **more):
        self.images, self.more = images, more

    def load(self, *, progress=True):
        return ImageSet(self.images, **self.more)


class Mine(Source):
    """Items by number, with classes and captions."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(256, size=(8, 8, 3), dtype=np.uint8)
        return {"image": pixels, "label": int(index == 3), "caption": f"thing {index}"}


class Cells(LabelledSource):
    """Dark noise with one small bright square each, and two more whose squares touch."""

    def load(self, *, progress=True):
        rng = np.random.default_rng(0)
        images, labels = [], []
        for _ in range(6):
            image = rng.integers(20, size=(1, 64, 64), dtype=np.uint8)
            label = np.zeros((64, 64), dtype=np.int32)
            label[8:12, 8:12], label[8:12, 12:16] = 1, 2
            image[0, label > 0] = rng.integers(200, 250, size=32)
            images.append(torch.from_numpy(image))
            labels.append(label)
        return LabelledImages(images, labels, [f"{i}" for i in range(6)])


def texts(data, **options):
    data.setup()
    return "\n".join(str(one) for section in data_sections(data, **options) for one in section.findings)


def noise(number=40, dtype=torch.uint8, side=8):
    return torch.randint(256, (number, 3, side, side), generator=torch.Generator().manual_seed(0)).to(dtype)


def copied():
    images = noise()
    images[20:] = images[:20]
    return images


def test_nothing_is_found_in_noise():
    assert texts(ImageDataModule(Held(noise()), num_val=10)) == ""


def test_copies_are_found_in_images_of_any_source():
    assert "are trained on too" in texts(ImageDataModule(Held(copied()), num_val=10))


def test_a_source_of_ones_own_has_classes_and_captions_looked_at():
    found = texts(ImageDataModule(Mine(), num_val=4))
    assert "words occur once" in found
    assert "fewer than 10 images" in found or "no image" in found


def test_latents_have_no_range_but_likeness():
    images = copied().to(torch.float16) / 100 - 1
    found = texts(ImageDataModule(Held(images), num_val=10))
    assert "look alike" in found
    assert "range" not in found


def test_images_that_are_not_in_memory_are_decoded_in_part(tmp_path):
    for i, pixels in enumerate(copied().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels // 16).save(tmp_path / f"{i}.png")
    data = ImageDataModule(Folder(tmp_path, image_size=8, in_memory=False), num_val=10)
    found = texts(data)
    assert "of the range" in found
    assert "are trained on too" in found
    quick = texts(data, quick=True)
    assert "of the range" not in quick  # nothing is decoded
    assert "are trained on too" in quick


def test_a_quick_look_takes_some_of_many_images(monkeypatch):
    for limit in ("QUICK_VALUES", "QUICK_COMPARED"):
        monkeypatch.setattr(f"unet_diffusion.checks.data.{limit}", 10 * 3 * 8 * 8)
    data = ImageDataModule(Held(copied() // 16), num_val=10)
    found = texts(data, quick=True)
    assert "of the range" in found
    assert "trained on too" not in found
    assert "trained on too" in texts(data)


@pytest.mark.parametrize("quick", [False, True])
def test_touching_objects_are_found_in_all_labels_and_in_some(quick, monkeypatch):
    monkeypatch.setattr("unet_diffusion.checks.data.QUICK_VALUES", 3 * 64 * 64)
    data = SegmentationDataModule(Cells(), Targets("instances"), window_size=32, num_val=2)
    assert "touch another, and are learnt as one" in texts(data, loss="both", quick=quick)


def test_data_of_another_kind_are_not_looked_at():
    assert data_sections(object()) == []
