"""Images of a run that is continued, compared with those of its checkpoint."""

import shutil

import numpy as np
import pytest
import torch
from encoded import image_data, write_images
from PIL import Image

from unet_diffusion.data import (
    Folder,
    ImageDataModule,
    PairedFiles,
    SegmentationDataModule,
    Tiles,
)
from unet_diffusion.segmentation.labels import Targets


def folder_data(root, **options):
    data = image_data(Folder, root, **{"image_size": 8, "num_val": 5, "num_workers": 0, **options})
    data.setup()
    return data


def replace(path, seed=99):
    pixels = np.random.default_rng(seed).integers(256, size=(12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    return write_images(tmp_path / "set", 20)


def go_on(state, data, *, must_be_same):
    data.must_be_same = must_be_same
    data.load_state_dict(state)


@pytest.mark.parametrize("in_memory", [True, False])
def test_same_images_go_on_without_a_word_wherever_they_are(root, tmp_path, recwarn, in_memory):
    state = folder_data(root).state_dict()
    copy = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    go_on(state, folder_data(copy, in_memory=in_memory), must_be_same=True)
    assert not recwarn.list


def test_state_is_tensors_of_24_bytes_an_image_or_fewer(root):
    state = folder_data(root).state_dict()
    assert sum(value.numel() * value.element_size() for value in state.values()) <= 24 * 20


@pytest.mark.parametrize("in_memory", [True, False])
def test_image_that_was_replaced_under_its_name_is_refused_by_it_or_said(root, in_memory):
    state = folder_data(root, in_memory=in_memory).state_dict()
    replace(root / "007.png")
    said = r"not those that the checkpoint was trained on: 1 changed \(007\.png\)"
    data = folder_data(root, in_memory=in_memory)
    with pytest.raises(ValueError, match=rf"{said}\. Bring them back, or train on with these by --ckpt_path"):
        go_on(state, data, must_be_same=True)
    with pytest.warns(UserWarning, match=f"{said}$"):
        go_on(state, data, must_be_same=False)


def test_image_that_is_gone_is_refused_or_said(root):
    state = folder_data(root).state_dict()
    data = folder_data(root)
    (root / data.image_set.names[int(data.train_indices[0])]).unlink()
    with pytest.raises(ValueError, match="trained on: 1 gone"):
        go_on(state, folder_data(root), must_be_same=True)
    with pytest.warns(UserWarning, match="1 gone. The epoch that was begun goes on with these"):
        go_on(state, folder_data(root), must_be_same=False)


@pytest.mark.parametrize("num_val", [None, 5])
def test_images_that_are_added_are_said_and_move_none(root, num_val):
    before = folder_data(root, num_val=num_val)
    for number in range(30):
        replace(root / f"new_{number}.png", number)
    after = folder_data(root, num_val=num_val)
    with pytest.warns(
        UserWarning,
        match=r"30 new \(new_0\.png, new_1\.png, new_10\.png, new_11\.png, new_12\.png, \.\.\.\)\. The epoch",
    ):
        go_on(before.state_dict(), after, must_be_same=True)
    trained = {before.image_set.names[i] for i in before.train_indices.tolist()}
    assert not trained & {after.image_set.names[i] for i in after.val_indices.tolist()}


def test_image_that_was_trained_on_is_not_validated_on(root):
    state = folder_data(root, num_val=5).state_dict()
    with pytest.raises(ValueError, match=r"2 trained on that would be validated on now \("):
        go_on(state, folder_data(root, num_val=7), must_be_same=True)


def test_renamed_image_that_was_trained_on_is_known_in_the_validation(root):
    before = folder_data(root)
    trained, kept = (before.image_set.names[int(i[0])] for i in (before.train_indices, before.val_indices))
    (root / kept).unlink()
    (root / trained).rename(root / kept)
    with pytest.raises(ValueError, match=f"1 changed .*1 trained on that would be validated on now .{kept}"):
        go_on(before.state_dict(), folder_data(root), must_be_same=True)


@pytest.mark.parametrize("what", ["captions", "class_labels"])
def test_other_words_and_classes_are_other_contents(tmp_path, what):
    for label in ("cat", "dog"):
        folder = write_images(tmp_path / "set" / label, 4)
        for path in list(folder.iterdir()):
            path.with_suffix(".txt").write_text(f"a {label}")
    options = {"num_val": 2, what: True}
    state = folder_data(tmp_path / "set", **options).state_dict()
    if what == "captions":
        (tmp_path / "set" / "dog" / "001.txt").write_text("a wolf")
        said = r"1 changed \(dog/001\.png\)"
    else:
        (tmp_path / "set" / "dog").rename(tmp_path / "set" / "wolf")
        said = r"4 new \(wolf/000\.png, .*4 gone"
    with pytest.raises(ValueError, match=said):
        go_on(state, folder_data(tmp_path / "set", **options), must_be_same=True)


def test_nothing_is_refused_when_a_run_is_validated(root, quiet_trainer):
    data = folder_data(root)
    state = data.state_dict()
    replace(root / "007.png")
    data = folder_data(root)
    data.trainer = quiet_trainer()  # in no state of training
    go_on(state, data, must_be_same=True)


def test_label_image_that_was_replaced_is_named(tmp_path):
    rng = np.random.default_rng(0)

    def data():
        made = SegmentationDataModule(
            PairedFiles(tmp_path / "images", tmp_path / "labels"), Targets("0/255"), window_size=16, num_val=2
        )
        made.setup()
        return made

    for number in range(6):
        for kind in ("images", "labels"):
            (tmp_path / kind).mkdir(exist_ok=True)
            pixels = rng.integers(2, size=(16, 16), dtype=np.uint8) * 255
            Image.fromarray(pixels).save(tmp_path / kind / f"{number}.png")
    state = data().state_dict()
    go_on(state, data(), must_be_same=True)
    Image.fromarray(rng.integers(2, size=(16, 16), dtype=np.uint8) * 255).save(tmp_path / "labels" / "1.png")
    with pytest.raises(ValueError, match=r"1 changed \(1\)"):
        go_on(state, data(), must_be_same=True)


@pytest.mark.parametrize("num_val", [2, None])
def test_labelled_images_that_are_added_are_validated_on_or_trained_on_and_move_none(tmp_path, num_val):
    """Of ten images a fifth is two, of twenty four: the default would move one that was trained on."""
    rng = np.random.default_rng(0)

    def data(names):
        for name in names:
            for kind in ("images", "labels"):
                (tmp_path / kind).mkdir(exist_ok=True)
                pixels = rng.integers(2, size=(16, 16), dtype=np.uint8) * 255
                Image.fromarray(pixels).save(tmp_path / kind / f"{name}.png")
        source = PairedFiles(tmp_path / "images", tmp_path / "labels")
        made = SegmentationDataModule(source, Targets("0/255"), window_size=16, num_val=num_val)
        made.setup()
        return made

    before, after = data("bcdefghijk"), data([f"a{number}" for number in range(9)] + ["z"])
    if num_val is None:
        with pytest.raises(ValueError, match=r"10 new .* 1 trained on that would be validated on now \(i\).*num_val"):
            go_on(before.state_dict(), after, must_be_same=True)
    else:
        with pytest.warns(UserWarning, match="10 new"):
            go_on(before.state_dict(), after, must_be_same=True)
        assert [after.images.names[i] for i in after.val_indices] == ["k", "z"]


def test_tiles_are_split_by_the_names_of_their_files(tmp_path):
    def data():
        made = ImageDataModule(Tiles(tmp_path, tile_size=8, channels=3), num_val=4)
        made.setup()
        return made

    for name in ("b", "c", "d"):
        Image.fromarray(np.random.default_rng(ord(name)).integers(256, size=(24, 24, 3), dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    before = data()
    trained = {
        name for name, is_val in zip(before.image_set.names, before.state_dict()["is_val"], strict=True) if not is_val
    }
    replace(tmp_path / "a.png")
    after = data()
    assert not trained & {after.image_set.names[i] for i in after.val_indices.tolist()}
    with pytest.warns(UserWarning, match=r"4 new \(a\.png, page 0, tile 0"):
        go_on(before.state_dict(), after, must_be_same=True)


def test_images_in_memory_are_known_by_their_pixels(tiny_images):
    data = tiny_images()
    data.setup()
    state = data.state_dict()
    go_on(state, data, must_be_same=True)
    data = tiny_images()
    data.setup()
    data.image_set.images[3] = torch.zeros_like(data.image_set.images[3])
    with pytest.raises(ValueError, match=r"1 changed \(3\)"):
        go_on(state, data, must_be_same=True)
