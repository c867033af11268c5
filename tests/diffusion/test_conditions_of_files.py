"""Semantic maps and paired images as conditions: what the network is given of them."""

import re

import numpy as np
import pytest
import scipy
import torch
from PIL import Image

from unet_diffusion.data import Folder, ImageDataModule
from unet_diffusion.diffusion.conditions.condition import network_inputs, unconditional_inputs
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.runtime.pictures import over_white

OBJECTS = torch.tensor([[0, 0, 0, 0, 0], [0, 5, 5, 5, 0], [0, 5, 5, 5, 0], [0, 5, 5, 5, 0], [0, 0, 7, 0, 0]])


def shares(condition, labels) -> torch.Tensor:
    batch = {"semantic_map": condition.read({"semantic_map": labels[None, None]})}
    return network_inputs([condition], batch)["concat"]


def test_one_channel_a_class_is_its_share_of_the_area():
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 2]])
    expected = torch.tensor([[[1.0, 0.0]], [[0.0, 0.75]], [[0.0, 0.25]]])
    torch.testing.assert_close(shares(SemanticMap(3, 3, downsampling=2), labels)[0], expected)


def test_fewer_channels_are_a_linear_map_of_the_shares():
    torch.manual_seed(0)
    labels = torch.randint(5, (4, 4))
    few, all_classes = SemanticMap(2, 5, downsampling=2), SemanticMap(5, 5, downsampling=2)
    expected = torch.einsum("kc,khw->chw", few.encoder.table.weight[:-1], shares(all_classes, labels)[0])
    torch.testing.assert_close(shares(few, labels)[0], expected)


def test_objects_become_background_object_and_edge():
    classes = SemanticMap(3, label_format="instances").read({"semantic_map": OBJECTS[None, None]})[0, 0]
    assert classes.tolist() == [[0, 0, 0, 0, 0], [0, 2, 2, 2, 0], [0, 2, 1, 2, 0], [0, 2, 2, 2, 0], [0, 0, 2, 0, 0]]


def chessboard_distances(labels: np.ndarray, most: int) -> np.ndarray:
    """Of each object by itself; outside of the image it goes on."""
    distances = np.zeros(labels.shape, dtype=int)
    for number in np.unique(labels[labels > 0]):
        is_object = np.pad(labels == number, most, mode="edge")
        found = scipy.ndimage.distance_transform_cdt(is_object, "chessboard")[most:-most, most:-most]
        distances = np.where(labels == number, found, distances)
    return np.where(distances < 0, most, distances).clip(max=most)  # -1 where the object is everywhere


@pytest.mark.parametrize("most", [1, 3, 6])
def test_distance_is_that_of_scipy_from_the_edge_of_each_object(most):
    rng = np.random.default_rng(most)
    seeds = np.where(rng.random((40, 50)) < 0.01, rng.integers(1, 70_000, (40, 50)), 0)
    labels = scipy.ndimage.grey_dilation(seeds, size=(9, 15))  # objects that touch, and that the border cuts
    labels[:20, :15] = 8
    condition = SemanticMap(4, label_format="instances", max_distance=most)
    expected = torch.from_numpy(chessboard_distances(labels, most))
    torch.testing.assert_close(shares(condition, torch.from_numpy(labels))[0, 3], expected / most)
    without = SemanticMap(3, label_format="instances")
    assert torch.equal(shares(condition, torch.from_numpy(labels))[:, :3], shares(without, torch.from_numpy(labels)))


def test_distance_of_an_object_that_fills_the_image_is_the_largest():
    condition = SemanticMap(4, label_format="instances", max_distance=6)
    assert shares(condition, torch.full((8, 9), 3))[0, 3].unique().tolist() == [1.0]


def test_pixels_to_ignore_have_no_distance_and_are_an_edge_to_others():
    condition = SemanticMap(3, label_format="0/255", ignore_label=9, max_distance=2)
    labels = torch.full((3, 5), 255)
    labels[:, 4] = 9
    assert shares(condition, labels)[0, 2, 1].tolist() == [1.0, 1.0, 1.0, 0.5, 0.0]
    batch = {"semantic_map": condition.read({"semantic_map": labels[None, None]})}
    assert unconditional_inputs([condition], batch)["concat"].abs().max() == 0


@pytest.mark.parametrize(
    "arguments", [{"label_format": "classes", "num_classes": 3}, {"max_distance": 0}, {"channels": 1}]
)
def test_distance_needs_objects_a_pixel_and_a_channel(arguments):
    with pytest.raises(ValueError, match="max_distance must be at least 1 pixel, with objects as label_format"):
        SemanticMap(**{"channels": 4, "label_format": "instances", "max_distance": 6, **arguments})


def test_what_is_not_known_is_zero_in_all_channels():
    condition = SemanticMap(2, label_format="0/255", ignore_label=9)
    labels = torch.tensor([[0, 255, 9]])
    assert shares(condition, labels)[0, :, 0].tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    batch = {"semantic_map": condition.read({"semantic_map": labels[None, None]})}
    assert unconditional_inputs([condition], batch)["concat"].abs().max() == 0


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_classes_are_seen_apart_in_pictures_of_images_of_any_channels(channels):
    labels = torch.arange(3).view(1, 1, 1, 3).expand(1, 1, 2, 3)
    seen = SemanticMap(3, 3).seen({"images": torch.zeros(1, channels, 2, 3)}, {"semantic_map": labels})
    assert seen.shape == (1, channels, 2, 3)
    assert len(over_white(seen)[0, :, 0].unique(dim=1).T) == 3  # a colour for each class


@pytest.mark.parametrize(
    "condition", [SemanticMap(3, 3), SemanticMap(3, label_format="0/1", max_distance=2), PairedImage(3)]
)
def test_maps_of_mirrored_images_are_mirrored(condition):
    torch.manual_seed(0)
    entry = torch.randint(3, (2, 3 if isinstance(condition, PairedImage) else 1, 4, 4), dtype=torch.uint8)
    plain = condition.read({condition.batch_key: entry})
    mirrored = condition.read({condition.batch_key: entry, "is_mirrored": torch.tensor([True, False])})
    assert torch.equal(mirrored, torch.stack([plain[0].flip(-1), plain[1]]))


def test_paired_image_is_encoded_by_the_mean():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    read = PairedImage(1).read({"paired_image": pixels}, lambda images: images * 2)
    assert read.flatten().tolist() == [-2.0, 2.0]
    of_16_bits = PairedImage(1).read({"paired_image": torch.tensor([0, 65535], dtype=torch.uint16).view(1, 1, 1, 2)})
    assert of_16_bits.flatten().tolist() == [-1.0, 1.0]


@pytest.fixture
def data(tmp_path):
    """Makes data of images of 8x8 pixels, with maps of the numbers 0, 3 and 255."""

    def make(**options):
        for kind in ("image", "map"):
            (tmp_path / kind).mkdir(exist_ok=True)
            for number in range(4):
                pixels = np.full((8, 8), [0, 3, 255, 0][number] if kind == "map" else 9, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / kind / f"{number}.png")
        source = Folder(tmp_path / "image", image_size=8, channels=1, semantic_map=tmp_path / "map", **options)
        module = ImageDataModule(source, num_val=1)
        module.setup()
        return module

    return make


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (SemanticMap(4, 4), "1 of 4 semantic maps do not fit label_format classes: 2.png (labels must be from 0 to 3"),
        (SemanticMap(2, label_format="0/1"), "2 of 4 semantic maps do not fit label_format 0/1: 1.png (labels must be"),
        (SemanticMap(4, 4, ignore_label=255), None),
        (SemanticMap(3, label_format="instances"), None),
        (SemanticMap(4, 4, downsampling=2), "downsampling of SemanticMap must be 1, as its maps have 8x8 pixels"),
        (PairedImage(1), "the data must give numbers as 'paired_image', which the condition PairedImage reads"),
    ],
)
def test_maps_without_a_meaning_are_refused_by_name_before_training(data, condition, said):
    condition.bind_sample_shape((1, 8, 8))
    if said is None:
        condition.bind_data(data())
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        condition.bind_data(data())


def test_paired_image_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="channels of PairedImage must be 4, as of what is denoised, got 3"):
        PairedImage(3).bind_sample_shape((4, 8, 8))


def test_number_of_classes_goes_with_classes_alone():
    for arguments in ({"num_classes": 3, "label_format": "0/1"}, {"label_format": "classes"}):
        with pytest.raises(ValueError, match="num_classes goes with label_format classes and with no other"):
            SemanticMap(3, **arguments)


@pytest.mark.parametrize("source", ["Folder", "Shards"])
def test_data_without_maps_are_refused_with_what_to_do(run_cli, tmp_path, source):
    for number in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (number, 9, 9)).save(tmp_path / "images" / f"{number}.png")
    assert run_cli("pack", tmp_path / "images", tmp_path / "shards")[0] == 0
    place = {"Folder": "images", "Shards": "shards"}[source]
    recipes = ["--config", "stream" if source == "Shards" else "folder", "--config", "conditions/semantic_map"]
    words = ["--data.root", tmp_path / place, "--data.image_size", 32, "--trainer.default_root_dir", tmp_path / "run"]
    status, _, err = run_cli("fit", *recipes, *words, "--trainer.accelerator", "cpu", "--model.speed", "plain")
    said = {
        "Folder": "set data.semantic_map",
        "Shards": "Shards has none: train on the folder of the images with data.",
    }
    assert (status, said[source] in err) == (1, True), err
    assert not (tmp_path / "run" / "checkpoints").exists()
