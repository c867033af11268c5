"""Commands that read images take the columns and the split of a data set by name, as `fit` does."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import unet_diffusion as ud
from unet_diffusion.commands import two_stages
from unet_diffusion.data import Folder, Tiles
from unet_diffusion.data.described import Table
from unet_diffusion.evaluation import own_features as own
from unet_diffusion.latents.store import read_latents
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.models.segmentation_unet import SegmentationUNet

NAMES = [f"{number}.png" for number in range(24)]
IMAGE = ["--table.image", "photo", "--table.split", "test"]
KNOWN = [*IMAGE, "--table.label", "kind", "--table.caption", "prompt"]


pytestmark = pytest.mark.usefixtures("cache_of_datasets")


@pytest.fixture
def folder(tmp_path) -> Path:
    """24 images in two classes with captions."""
    rng = np.random.default_rng(0)
    rows = ["file_name,text"]
    for number, name in enumerate(NAMES):
        path = tmp_path / "images" / ("cat" if number % 2 else "dog") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
        rows.append(f"{path.parent.name}/{name},caption {number}")
    (tmp_path / "images/metadata.csv").write_text("\n".join(rows))
    return tmp_path / "images"


@pytest.fixture
def table(folder, tmp_path) -> Path:
    """The same as the split "test" of a saved data set, whose columns have names of their own."""
    paths = [next(folder.glob(f"*/{name}")) for name in NAMES]
    photos = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    content = {"photo": photos, "mask": photos[:1] * 24, "kind": [path.parent.name for path in paths],
               "prompt": [f"caption {number}" for number in range(24)]}  # fmt: skip
    made = datasets.Dataset.from_dict(content)
    made = made.cast_column("photo", datasets.Image()).cast_column("mask", datasets.Image())
    datasets.DatasetDict(train=made.select(range(3)), test=made).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def refused(run_cli, *words) -> str:
    status, _, err = run_cli(*words)
    assert status == 1
    return err


def test_latents_of_a_table_are_those_of_the_folder_of_the_same_images(run_cli, folder, table, tmp_path):
    torch.manual_seed(0)
    small = {"layers_per_block": 1, "mid_attention": False, "norm_num_groups": 4}
    network = kl_autoencoder(3, (8, 8), latent_channels=4, **small)
    network.register_to_config(sample_size=16)
    network.save_pretrained(tmp_path / "autoencoder")
    options = ["--class_labels", "--captions", "--device", "cpu"]
    made = {}
    for place, names in ((folder, []), (table, KNOWN)):
        output = tmp_path / f"latents of {place.name}"
        status, _, err = run_cli("encode", tmp_path / "autoencoder", place, "--output", output, *options, *names)
        assert status == 0, err
        latents = read_latents(output)
        order = np.argsort(latents.entries["captions"])
        made[place] = latents.mean[order], latents.entries["labels"][order], latents.class_names
    torch.testing.assert_close(made[table][:2], made[folder][:2])
    assert made[table][2] == made[folder][2] == ["cat", "dog"]
    again = ["encode", tmp_path / "autoencoder", table, "--output", tmp_path / "latents of set", *options]
    assert "set table.image to" in refused(run_cli, *again, "--table.split", "test")
    assert "table.label is kind, and class_labels is false" in refused(run_cli, *again[:5], *KNOWN)


def test_masks_are_those_of_the_images_in_the_column(run_cli, folder, table, tmp_path):
    torch.manual_seed(0)
    unet = SegmentationUNet(3, 4, channels=(4, 8), padding="same")
    options = {"timestep": None, "stretch": False, "window_size": 32}
    names = ["background", "cell", "border"]
    ud.Segmenter(unet, kind="instances", class_names=names, **options).save_pretrained(tmp_path / "segmenter")
    status, _, err = run_cli("segment", tmp_path / "segmenter", table, "--output", tmp_path / "masks", *IMAGE)
    assert status == 0, err
    assert "24 masks" in run_cli("segment", tmp_path / "segmenter", folder, "--output", tmp_path / "expected")[1]
    for name in NAMES:
        expected = next((tmp_path / "expected").glob(f"*/{name}"))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "masks" / name)), np.asarray(Image.open(expected)))
    words = ["segment", tmp_path / "segmenter", table, "--output", tmp_path / "others"]
    assert "set table.image to the one" in refused(run_cli, *words, "--table.split", "test")
    assert "only images are read here" in refused(run_cli, *words, *KNOWN)
    assert "holds image files; leave it out" in refused(run_cli, *words[:2], folder, *words[3:], *IMAGE)


def test_drawn_images_in_a_table_are_evaluated(run_cli, table, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(own.SETTINGS, "num_steps", 3)
    figures, flat = {}, tmp_path / "flat"
    flat.mkdir()
    for path in folder.glob("*/*.png"):
        path.rename(flat / path.name)  # the order of the images is that of the table
    for place, names in ((flat, []), (table, IMAGE)):
        data = ["--data.source", "Folder", "--data.root", table, "--data.table.image", "photo", "--data.table.split",
                "test", "--data.image_size", 8, 8, "--data.num_val", 4]  # fmt: skip
        output = ["--output", tmp_path / f"evaluation of {place.name}"]
        status, out, err = run_cli("evaluate", place, *data, *names, *output, "--device", "cpu")
        assert status == 0, err
        figures[place] = out.partition("explains")[0].splitlines()[:2]
    assert figures[table] == figures[flat]


def test_stages_pass_the_names_on(run_cli, table, small_recipes, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(two_stages, "_exit_status", lambda command: commands.append(command) or 0)
    monkeypatch.setattr(two_stages, "check_runs", lambda runs: None)
    recipes = ["--autoencoder", small_recipes[0], "--denoiser", small_recipes[1]]
    words = ["two-stages", table, "--output", tmp_path / "out", "--captions", *recipes]
    known = [*IMAGE, "--table.caption", "prompt"]
    status, _, err = run_cli(*words, *known)
    assert status == 0, err
    assert {"--data.table.image=photo", "--data.table.split=test"} < set(commands[0])
    assert "--data.table.caption=prompt" not in commands[0]  # an autoencoder has no captions
    assert {"--table.image=photo", "--table.split=test", "--table.caption=prompt"} < set(commands[1])
    assert not any("table" in word for word in commands[2])
    said = refused(run_cli, *words, "--table.image", "mask", *known[2:])
    assert "table.image: photo there, mask here" in said
    assert "set table.caption to" in refused(run_cli, *words[:3], tmp_path / "new", *words[4:], *IMAGE)
    assert not (tmp_path / "new").exists()


def test_tiles_are_cut_from_the_images_in_the_column(table, folder):
    tiles = Tiles(table, tile_size=8, table=Table(image="photo", split="test")).load(progress=False)
    expected = Tiles(folder, tile_size=8).load(progress=False)
    rows, others = (sorted(one.images.flatten(1).tolist()) for one in (tiles, expected))
    assert rows == others


def test_column_beside_images_cannot_be_named_and_that_is_said(table, folder):
    with pytest.raises(ValueError, match=r"data.semantic_map .*; no option names another image here; write the data"):
        Folder(folder, image_size=8, semantic_map=table).load(progress=False)
