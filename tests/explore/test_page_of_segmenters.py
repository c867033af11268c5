"""The page of segmenters and autoencoders in a real browser: a cells run, classes, and what comes back of an image."""

import csv
import io
import shlex

import numpy as np
import pytest
import tifffile
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
    visitor.window.locator("#counted_0", has_text=f"{count} objects").wait_for(timeout=60_000)
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


def test_threshold_and_least_size_are_slid_without_the_network(visit, run_of, cells_run, cells_image):
    run = run_of(cells_run)
    visitor = visit(run)
    visitor.set_number("min_size_0", run.model.min_size + 1)  # nothing is there yet, and nothing goes wrong
    visitor.set_number("min_size_0", run.model.min_size)
    visitor.upload(cells_image)
    visitor.press("Segment")
    visitor.window.locator("#counted_0", has_text="objects").wait_for(timeout=60_000)
    calls = []
    hook = run.model.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    slider = visitor.window.locator("#threshold_0 input[type=range]")
    for _ in range(20):
        slider.press("ArrowRight")  # not only by mouse
    visitor.window.wait_for_timeout(2000)
    assert calls == []
    hook.remove()
    strict = run.model.segment(cells_image, threshold=round(run.model.threshold + 0.2, 2))
    assert strict.classes.sum() != run.model.segment(cells_image).classes.sum()
    assert np.array_equal(_pixels(visitor.downloads(), "_mask.png"), strict.classes)
    areas = [int(row["area"]) for row in _rows(visitor)]
    least = sorted(areas)[1]  # the smallest object goes
    visitor.set_number("min_size_0", least)
    assert sorted(int(row["area"]) for row in _rows(visitor)) == sorted(areas)[1:]
    assert visitor.window.locator(".toast-body").count() == 0


def test_two_visitors_keep_their_own_objects_and_a_new_image_clears_the_old(
    visit, run_of, cells_run, cells_image, tmp_path
):
    run = run_of(cells_run)
    other, _ = synthetic_cells((64, 64), num_cells=3, seed=9)
    Image.fromarray(other).save(tmp_path / "other.png")
    images = [cells_image, tmp_path / "other.png"]
    visitors = visit(run, visitors=2)
    for visitor, image in zip(visitors, images, strict=True):
        visitor.upload(image)
        visitor.press("Segment")
    for visitor, image in zip(visitors, images, strict=True):
        visitor.window.locator("#counted_0", has_text="objects").wait_for(timeout=60_000)
        _wait_for_objects(visitor, run.model.segment(image).instances)
    visitors[0].set_number("min_size_0", run.model.min_size + 5)
    _wait_for_objects(visitors[0], run.model.segment(cells_image, min_size=run.model.min_size + 5).instances)
    visitors[1].window.get_by_label("Clear").or_(visitors[1].window.get_by_label("Remove this file")).first.click()
    visitors[1].window.locator("#counted_0", has_text="objects").wait_for(state="detached", timeout=60_000)


def test_objects_stay_where_their_image_is_heard_of_after_they_were_found(visit, run_of, cells_run, cells_image):
    """The page tells the server of an upload and of a press in two messages, of which the second may come first."""
    visitor, late = visit(run_of(cells_run)), []
    visitor.window.route("**/queue/join*", lambda route: route.continue_() if late else late.append(route))
    visitor.upload(cells_image)
    visitor.press("Segment")
    objects = visitor.window.locator("#counted_0", has_text="objects")
    objects.wait_for(timeout=60_000)
    with visitor.window.expect_response("**/queue/join*"):
        late[0].continue_()
    visitor.window.wait_for_timeout(1500)
    assert objects.count() == 1


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
    visitor.window.locator("#counted_0", has_text="objects").wait_for(timeout=60_000)


def test_pages_of_a_stack_are_refused_with_what_to_do(visit, run_of, cells_run, tmp_path):
    image, _ = synthetic_cells((64, 64), num_cells=3, seed=9)
    tifffile.imwrite(tmp_path / "stack.tif", np.stack([image, image]))
    visitor = visit(run_of(cells_run))
    visitor.upload(tmp_path / "stack.tif")
    visitor.press("Segment")
    assert "save each page as a file" in visitor.status("has 2 pages")


def test_names_of_classes_are_words_and_nothing_else(visit, tmp_path):
    names = ["![x](http://example.invalid/p.png)", "<img src=http://example.invalid/q.png>"]
    unet = SegmentationUNet(3, 2, channels=(4, 8), padding="same")
    model = Segmenter(unet, "classes", names, timestep=None, stretch=False, window_size=32)
    run = Run(tmp_path / "a_run_*with*_marks.ckpt", model, lambda path: model, lambda: None)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "i.png")
    visitor = visit(run)  # which fails if anything is fetched
    visitor.window.locator("h2", has_text="a_run_*with*_marks.ckpt").wait_for()
    visitor.upload(tmp_path / "i.png")
    visitor.press("Segment")
    visitor.window.locator("#counted_0", has_text="2 classes").wait_for(timeout=60_000)
    visitor.open_tab("Configuration")
    visitor.window.wait_for_timeout(1000)


def test_classes_are_coloured_and_measured(visit, tmp_path):
    torch.manual_seed(0)
    unet = SegmentationUNet(3, 4, channels=(4, 8), padding="same")
    model = Segmenter(unet, "classes", list("abcd"), timestep=None, stretch=False, window_size=32)
    run = Run(tmp_path / "classes.ckpt", model, lambda path: model, lambda: None)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    visitor = visit(run)
    visitor.upload(tmp_path / "i.png")
    visitor.press("Segment")
    visitor.window.locator("#counted_0", has_text="4 classes").wait_for(timeout=60_000)
    assert np.array_equal(_pixels(visitor.downloads(), "_mask.png"), model.segment(tmp_path / "i.png").classes)
    assert visitor.window.locator("#threshold_0:visible").count() == 0


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


def _wait_for_objects(visitor, expected):
    def are_there():
        files = visitor.downloads()
        return any(name.endswith("_objects.png") for name in files) and np.array_equal(
            _pixels(files, "_objects.png"), expected
        )

    visitor.until(are_there)


def _pixels(files, end) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(_named(files, end))))


def _named(files, end) -> bytes:
    return next(data for name, data in files.items() if name.endswith(end))


def _rows(visitor):
    visitor.window.wait_for_timeout(2000)
    return list(csv.DictReader(io.StringIO(_named(visitor.downloads(), ".csv").decode())))
