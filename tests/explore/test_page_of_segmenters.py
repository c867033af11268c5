"""The page of segmenters and autoencoders in a real browser: a cells run, classes, and what comes back of an image."""

import csv
import io
import shlex

import numpy as np
import pytest
import torch
from denoisers import SMALL
from PIL import Image

from unet_diffusion.commands.main import main
from unet_diffusion.explore.runs import Run
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.segmentation.synthetic import synthetic_cells

pytestmark = pytest.mark.slow

TINY_CELLS = {
    "model.unet.init_args.channels": "[8,16]",
    "data.source.num_images": 8,
    "data.num_val": 2,
    "data.window_size": 64,
    "model.speed": "plain",
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.max_steps": 60,
    "trainer.val_check_interval": 60,
    "trainer.enable_progress_bar": "false",
    "samples.num_images": 2,
}


@pytest.fixture(scope="module")
def cells_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("cells") / "run"
    options = [f"--{name}={value}" for name, value in TINY_CELLS.items()]
    assert main(["fit", "--config", "cells", *options, f"--trainer.default_root_dir={root}"]) == 0
    return root


@pytest.fixture
def cells_image(tmp_path):
    image, _ = synthetic_cells((96, 120), num_cells=9, seed=5)
    Image.fromarray(image).save(tmp_path / "cells 1.png")
    return tmp_path / "cells 1.png"


def test_objects_of_an_image_are_outlined_counted_and_given_away(visit, run_of, cells_run, cells_image, run_cli):
    run = run_of(cells_run)
    visitor = visit(run)
    visitor.upload(cells_image)
    visitor.press("Segment")
    expected = run.model.segment(cells_image)
    count = int(expected.instances.max())
    assert count > 1
    visitor.window.locator("#found_0", has_text=f"{count} objects").wait_for(timeout=60_000)
    assert visitor.picture("outlines_0").shape == (5 * 96, 5 * 120, 3)  # enlarged, so that outlines are thin
    files = visitor.downloads()
    assert np.array_equal(_pixels(files, "_mask.png"), expected.classes)
    assert np.array_equal(_pixels(files, "_objects.png"), expected.instances)
    visitor.press("Command line")
    words = shlex.split(visitor.code())[1:]
    words[words.index("cells 1.png")] = str(cells_image)
    words[words.index("masks")] = str(cells_image.parent / "masks")
    assert run_cli(*words, "--device", "cpu")[0] == 0
    table = (cells_image.parent / "masks" / "objects.csv").read_text()
    assert (
        next(data for name, data in files.items() if name.endswith(".csv")).decode().splitlines() == table.splitlines()
    )


def test_the_threshold_is_slid_without_the_network(visit, run_of, cells_run, cells_image):
    run = run_of(cells_run)
    visitor = visit(run)
    visitor.upload(cells_image)
    visitor.press("Segment")
    visitor.window.locator("#found_0", has_text="objects").wait_for(timeout=60_000)
    calls = []
    run.model.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    visitor.set_number("min_size", 200)
    areas = [int(row["area"]) for row in _rows(visitor)]
    assert min(areas) >= 200
    assert calls == []


def test_what_is_no_image_gets_a_message_and_nothing_is_lost(visit, run_of, cells_run, cells_image, tmp_path):
    (tmp_path / "table.tif").write_bytes(b"II*\0nothing")
    visitor = visit(run_of(cells_run))
    visitor.press("Segment")
    visitor.status("an image must be given")
    visitor.upload(tmp_path / "table.tif")
    visitor.press("Segment")
    assert "/tmp" not in visitor.status("image table.tif cannot be read")
    visitor.window.get_by_label("Remove this file").or_(visitor.window.get_by_label("Clear")).first.click()
    visitor.upload(cells_image)
    visitor.press("Segment")
    visitor.window.locator("#found_0", has_text="objects").wait_for(timeout=60_000)


def test_classes_are_coloured_and_measured(visit, tmp_path):
    torch.manual_seed(0)
    unet = SegmentationUNet(3, 4, channels=(4, 8), padding="same")
    model = Segmenter(unet, "classes", list("abcd"), timestep=None, stretch=False, window_size=32)
    run = Run(tmp_path / "classes.ckpt", model, lambda path: model, lambda: None)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    visitor = visit(run)
    visitor.upload(tmp_path / "i.png")
    visitor.press("Segment")
    visitor.window.locator("#found_0", has_text="4 classes").wait_for(timeout=60_000)
    assert np.array_equal(_pixels(visitor.downloads(), "_mask.png"), model.segment(tmp_path / "i.png").classes)
    assert visitor.window.locator("#threshold:visible").count() == 0


def test_an_autoencoder_shows_what_comes_back(visit, tmp_path):
    torch.manual_seed(0)
    network = kl_autoencoder(3, (8, 8), **SMALL).eval()
    model = Autoencoder(network, (3, 16, 16))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    visitor = visit(Run(tmp_path / "kl.ckpt", model, lambda path: model, lambda: None))
    visitor.upload(tmp_path / "i.png")
    visitor.press("Reconstruct")
    visitor.window.locator("text=PSNR").wait_for(timeout=60_000)
    assert visitor.picture("reconstructed_0").shape[1] == 3 * 98 + 2


def _pixels(files, end) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(_named(files, end))))


def _named(files, end) -> bytes:
    return next(data for name, data in files.items() if name.endswith(end))


def _rows(visitor):
    visitor.window.wait_for_timeout(2000)
    return list(csv.DictReader(io.StringIO(_named(visitor.downloads(), ".csv").decode())))
