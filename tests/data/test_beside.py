"""Semantic maps, paired images and boxes of images: read with them, and refused where they do not fit."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from unet_diffusion.data import Folder, ImageDataModule, Tiles
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap

SIZE = (20, 24)  # of the files; images are cut to their centre of 20x20 and scaled to 10x10
NUM = 4


def write(folder, number, pixels, extension="png"):
    folder.mkdir(exist_ok=True, parents=True)
    Image.fromarray(pixels).save(folder / f"{number}.{extension}")


@pytest.fixture
def images(tmp_path):
    """A folder of images, whose files have maps and pictures of the same names beside them."""
    for number in range(NUM):
        rows = np.broadcast_to(np.arange(SIZE[1], dtype=np.uint8), SIZE)  # the number of each column
        write(tmp_path / "image", number, np.stack([rows * 10] * 3, axis=-1))
        write(tmp_path / "map", number, np.ascontiguousarray(rows // 2), "bmp" if number % 2 else "png")
        write(tmp_path / "pair", number, np.stack([255 - rows * 10] * 3, axis=-1))
    return tmp_path


def coco(**changes) -> dict:
    """Boxes in COCO's form: each image has one of a cat that fills its left half, the first one a dog too."""
    files = [{"id": i, "file_name": f"{i}.png", "width": SIZE[1], "height": SIZE[0]} for i in range(NUM)]
    cats = [{"id": i, "image_id": i, "category_id": 7, "bbox": [2, 0, 10, 20], "iscrowd": 0} for i in range(NUM)]
    dog = {"id": 99, "image_id": 0, "category_id": 9, "bbox": [12, 10, 8, 6], "iscrowd": 0}
    categories = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]
    return {"images": files, "annotations": [*cats, dog], "categories": categories, **changes}


def write_boxes(folder, **changes):
    (folder / "boxes.json").write_text(json.dumps(coco(**changes)))
    return folder / "boxes.json"


def load(folder, **beside):
    return Folder(folder / "image", image_size=10, **beside).load(progress=False)


def test_maps_and_pictures_are_scaled_and_cut_as_their_images(images):
    entries = load(images, semantic_map=images / "map", paired_image=images / "pair").entries
    maps, pairs, pixels = entries["semantic_map"], entries["paired_image"], load(images).images
    assert (maps.dtype, maps.shape) == (torch.uint8, (NUM, 1, 10, 10))
    assert maps[0, 0, 0].tolist() == list(range(1, 11))  # columns 2 and 3 to 20 and 21 are left, and pairs are alike
    assert pairs.shape == (NUM, 3, 10, 10)
    assert (pairs.int() + pixels.int() - 255).abs().max() <= 1  # rounded twice


def test_numbers_above_255_stay_what_they_are(images):
    write(images / "map", 0, np.full(SIZE, 70000, dtype=np.int32), "tif")
    (images / "map" / "0.png").unlink()
    assert load(images, semantic_map=images / "map").entries["semantic_map"][0].unique().tolist() == [70000]


def test_boxes_are_moved_with_the_cut_and_named(images):
    rows = load(images, boxes=write_boxes(images)).entries["boxes"]
    assert json.loads(rows[0]) == [["cat", 0.0, 0.0, 5.0, 10.0], ["dog", 5.0, 5.0, 4.0, 3.0]]
    assert json.loads(rows[1]) == [["cat", 0.0, 0.0, 5.0, 10.0]]


def test_crowds_and_boxes_that_are_cut_off_are_left_out(images):
    boxes = [[0, 0, 2, 20], [0, 0, 4, 20], [5, 5, 5, 5], [5, 5, 500, 5]]  # the last reaches out of the image
    annotations = [{"image_id": 0, "category_id": 7, "bbox": box, "iscrowd": int(box[0] == 5)} for box in boxes]
    rows = load(images, boxes=write_boxes(images, annotations=annotations)).entries["boxes"]
    assert [json.loads(row) for row in rows] == [[["cat", 0.0, 0.0, 1.0, 10.0]], [], [], []]


def drop(folder, name):
    (folder / name).unlink()


WRONG = {
    "a map that is missing": (
        lambda folder: drop(folder, "map/1.bmp"),
        "semantic_map",
        "1 images have no semantic map:\n  1.png",
    ),
    "a map without image": (
        lambda folder: write(folder / "map", 9, np.zeros(SIZE, dtype=np.uint8)),
        "semantic_map",
        "1 semantic maps have no image:\n  9.png",
    ),
    "a map of another size": (
        lambda folder: write(folder / "map", 0, np.zeros((20, 20), dtype=np.uint8)),
        "semantic_map",
        "0.png: 20x20 pixels, and its image 20x24",
    ),
    "a picture of colours as map": (
        lambda folder: write(folder / "map", 0, np.random.default_rng(0).integers(9, size=(*SIZE, 3), dtype=np.uint8)),
        "semantic_map",
        "0.png: a label must be one number a pixel",
    ),
    "a pair that is missing": (
        lambda folder: drop(folder, "pair/2.png"),
        "paired_image",
        "1 images have no paired image:\n  2.png",
    ),
    "a pair of another size": (
        lambda folder: write(folder / "pair", 3, np.zeros((24, 20, 3), dtype=np.uint8)),
        "paired_image",
        "3.png: 24x20 pixels, and its image 20x24",
    ),
    "a damaged pair": (
        lambda folder: (folder / "pair" / "3.png").write_bytes(b"no picture"),
        "paired_image",
        "3.png: ",
    ),
    "a box outside its image": (
        lambda folder: write_boxes(folder, annotations=[{"image_id": 1, "category_id": 7, "bbox": [20, 0, 9, 9]}]),
        "boxes",
        "annotation 0 of 1.png: the box of 'cat' at left 20, top 0, width 9, height 9 must lie within the image of "
        "24 x 20",
    ),
    "a box without area": (
        lambda folder: write_boxes(folder, annotations=[{"image_id": 1, "category_id": 7, "bbox": [2, 0, 0, 9]}]),
        "boxes",
        "annotation 0 of 1.png: the box of 'cat'",
    ),
    "an unknown category": (
        lambda folder: write_boxes(folder, annotations=[{"image_id": 1, "category_id": 8, "bbox": [2, 0, 5, 9]}]),
        "boxes",
        "annotation 0 has the category_id 8, which the file does not list",
    ),
    "an image that the boxes lack": (
        lambda folder: write_boxes(folder, images=coco()["images"][1:], annotations=[]),
        "boxes",
        "0.png is not among the images of the file",
    ),
    "boxes of another size": (
        lambda folder: write_boxes(folder, images=[{**one, "width": 48} for one in coco()["images"]]),
        "boxes",
        "0.png: 20x48 pixels, and its image 20x24",
    ),
    "two images of one number, as in two files put together": (
        lambda folder: write_boxes(folder, images=[*coco()["images"], {**coco()["images"][0], "file_name": "z.png"}]),
        "boxes",
        "images: the id 0 stands for 0.png and z.png; give each its own",
    ),
    "an image of two sizes": (
        lambda folder: write_boxes(folder, images=[*coco()["images"], {**coco()["images"][0], "id": 50, "width": 9}]),
        "boxes",
        "images: the file_name '0.png' stands for 24 x 20 and 9 x 20; give each its own",
    ),
    "two classes of one number": (
        lambda folder: write_boxes(folder, categories=[*coco()["categories"], {"id": 7, "name": "cow"}]),
        "boxes",
        "categories: the id 7 stands for cat and cow; give each its own",
    ),
    "boxes of another form": (
        lambda folder: write_boxes(folder, categories={"7": "cat"}),
        "boxes",
        "boxes must be of COCO's form",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_listed_before_training(images, name):
    spoil, key, said = WRONG[name]
    spoil(images)
    place = {"semantic_map": "map", "paired_image": "pair", "boxes": "boxes.json"}[key]
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load(images, **{key: images / place})
    assert f"data.{key} {images / place}: " in str(error.value)


def test_batches_say_which_images_are_mirrored(images):
    source = Folder(images / "image", image_size=10, semantic_map=images / "map")
    data = ImageDataModule(source, horizontal_flip=True, batch_size=3, num_val=1)
    data.setup()
    is_mirrored = torch.cat([batch["is_mirrored"] for _ in range(10) for batch in data.train_dataloader()])
    assert is_mirrored.any()
    assert not torch.cat([batch["is_mirrored"] for batch in data.val_dataloader()]).any()


def test_tiles_of_label_images_are_cut_and_mirrored_like_their_images(tmp_path):
    """Labels that are the grey values of their images stay so in every batch."""
    rng = np.random.default_rng(0)
    for i, size in enumerate([(16, 16), (16, 40), (20, 16)]):
        grey = rng.integers(256, size=size, dtype=np.uint8)
        write(tmp_path / "image", i, grey)
        write(tmp_path / "map", i, grey, "tif")
    source = Tiles(tmp_path / "image", tile_size=16, channels=1, semantic_map=tmp_path / "map", num_images=2)
    made = ImageDataModule(source, batch_size=3, num_val=1, horizontal_flip=True)
    made.setup()
    assert torch.equal(made.entries["semantic_map"], made.image_set.images)
    condition = SemanticMap(256, 256)
    for epoch in range(4):
        for batch in made.train_dataloader():
            assert torch.equal(condition.read(batch), batch["images"].long()), epoch


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((16, 15), r"a\.png: its semantic map a\.png: 16x15 pixels, and its image 16x16"),
        (None, r"1 images have no semantic map:\n  a\.png"),
    ],
)
def test_label_images_that_do_not_fit_their_tiles_are_listed(tmp_path, size, said):
    write(tmp_path / "image", "a", np.zeros((16, 16), np.uint8))
    write(tmp_path / "image", "b", np.zeros((16, 16), np.uint8))
    write(tmp_path / "map", "b", np.zeros((16, 16), np.uint8))
    if size is not None:
        write(tmp_path / "map", "a", np.zeros(size, np.uint8))
    with pytest.raises(ValueError, match=said):
        ImageDataModule(Tiles(tmp_path / "image", tile_size=16, semantic_map=tmp_path / "map")).setup()
