"""`unet-diffusion segment`: masks of the same name and size, for files of any kind."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from unet_diffusion.commands.main import main
from unet_diffusion.data.scaling import to_float
from unet_diffusion.inference.reading import read_segmenter
from unet_diffusion.inference.segment_files import mask_name
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.segmentation_unet import SegmentationUNet

CONFIGS = Path(__file__).parents[2] / "configs"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a tiny run of configs/cells.yaml; tests do not write into it."""

    root = tmp_path_factory.mktemp("cells") / "run"
    arguments = f"--config {CONFIGS / 'cells.yaml'} --model.unet.init_args.channels [4,8] --trainer.accelerator cpu "
    arguments += "--data.num_images 4 --data.num_val 1 "
    arguments += "--data.batch_size 2 --data.window_size 64 --trainer.max_steps 4 "
    arguments += "--trainer.val_check_interval 2 --trainer.enable_progress_bar false "
    arguments += "--samples.every_n_steps 2 --checkpoint.every_n_train_steps 2"
    assert main(["fit", *arguments.split(), "--trainer.default_root_dir", str(root)]) == 0
    return root


@pytest.fixture
def images(tmp_path):
    """Grey, colour, 16 bit, a stack; of many sizes."""
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    Image.fromarray(RNG.integers(256, size=(70, 51), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(RNG.integers(256, size=(20, 90, 3), dtype=np.uint8)).save(folder / "inner" / "colour.jpg")
    Image.fromarray(RNG.integers(65536, size=(33, 64), dtype=np.uint16)).save(folder / "deep.tif")
    pages = [Image.fromarray(RNG.integers(256, size=(40, 45), dtype=np.uint8)) for _ in range(3)]
    pages[0].save(folder / "stack.tif", save_all=True, append_images=pages[1:])
    return folder


def sizes(folder) -> dict:
    found = {}
    for path in sorted(path for path in folder.rglob("*.*") if path.suffix not in (".json", ".jsonl", ".csv")):
        with Image.open(path) as image:
            found[path.relative_to(folder).as_posix()] = (image.height, image.width, getattr(image, "n_frames", 1))
    return found


def test_run_leaves_pictures_and_a_segmenter(run):
    assert {"samples.png", "samples", "checkpoints", "config.yaml", "logs"} == {path.name for path in run.iterdir()}
    assert read_segmenter(run).kind == "instances"


def test_picture_shows_image_label_and_prediction(run):
    with Image.open(run / "samples.png") as picture:
        assert picture.size == (3 * 258, 16 + 258)
        tiles = [np.asarray(picture.convert("RGB"))[16:272, 258 * i : 258 * i + 256] for i in range(3)]
    assert len(np.unique(tiles[0])) > 50  # grey values
    assert {tuple(colour) for colour in tiles[1].reshape(-1, 3)} == {(0, 0, 0), (255, 255, 255), (230, 159, 0)}


def test_masks_have_the_names_and_sizes_of_their_images(run_cli, run, images, tmp_path):
    status, out, err = run_cli("segment", run, images, "--output", tmp_path / "masks")
    assert status == 0, err
    assert "4 masks in" in out
    expected = {
        "grey.png": (70, 51, 1),
        "deep.tif": (33, 64, 1),
        "stack.tif": (40, 45, 3),
        "inner/colour.png": (20, 90, 1),
    }
    assert sizes(tmp_path / "masks") == expected


def test_mask_is_what_the_network_predicts(run_cli, run, images, tmp_path):
    run_cli("segment", run, images / "grey.png", "--output", tmp_path / "m", "--probabilities")
    trained = read_segmenter(run)
    with Image.open(images / "grey.png") as image, torch.no_grad():
        pixels = to_float(torch.from_numpy(np.array(image))[None], stretch=False)
        expected = trained.maps(pixels)[:3]
    np.testing.assert_allclose(np.load(tmp_path / "m" / "probabilities" / "grey.npy"), expected, atol=1e-3)  # float16
    with Image.open(tmp_path / "m" / "grey.png") as mask:
        assert np.array_equal(np.asarray(mask), np.where(expected[0] < 1 - trained.threshold, 255, 0))


def test_window_size_is_what_the_network_is_given(run_cli, run, images, tmp_path):
    for name, options in (("default", []), ("small", ["--window_size", "32"])):
        run_cli("segment", run, images / "grey.png", "--output", tmp_path / name, "--probabilities", *options)
    one, other = (np.load(tmp_path / name / "probabilities" / "grey.npy") for name in ("default", "small"))
    assert one.shape == other.shape
    assert 0 < np.abs(one - other).mean() < 0.2  # padding at other places


def test_overlays_and_instances_lie_beside_the_masks(run_cli, run, images, tmp_path):
    status, _, err = run_cli("segment", run, images, "--output", tmp_path / "m", "--overlays", "--instances", "--views")
    assert status == 0, err
    overlays = ["deep.png", "grey.png", "inner/colour.png", "stack/0000.png", "stack/0001.png", "stack/0002.png"]
    assert sorted(sizes(tmp_path / "m" / "overlays")) == overlays
    with (
        Image.open(tmp_path / "m" / "instances" / "grey.png") as numbers,
        Image.open(tmp_path / "m" / "grey.png") as mask,
    ):
        assert numbers.mode.startswith("I")
        assert not (np.asarray(numbers) > 0)[np.asarray(mask) == 0].any()


def test_threshold_and_least_size_are_those_of_the_mask_and_the_objects(run_cli, run, images, tmp_path):
    trained = read_segmenter(run)
    background = trained.segment(images / "grey.png").probabilities[0]
    threshold = float(1 - np.quantile(background, 0.3))
    options = ["--threshold", threshold, "--min_size", 1, "--instances"]
    status, _, err = run_cli("segment", run, images / "grey.png", "--output", tmp_path / "m", *options)
    assert status == 0, err
    expected = trained.segment(images / "grey.png", threshold=threshold, min_size=1)
    with (
        Image.open(tmp_path / "m" / "grey.png") as mask,
        Image.open(tmp_path / "m" / "instances" / "grey.png") as numbers,
    ):
        assert np.array_equal(np.asarray(mask), expected.classes)
        assert np.array_equal(np.asarray(numbers), expected.instances)
    assert (expected.classes > 0).mean() == pytest.approx(0.3, abs=0.01)
    assert np.array_equal(expected.classes > 0, expected.instances > 0)  # no object is too small
    status, _, err = run_cli("segment", run, images / "grey.png", "--output", tmp_path / "m", "--instances")
    assert status == 1
    assert f"threshold: {threshold} there, {trained.threshold} here; min_size: 1 there, {trained.min_size} here" in err


def test_unreadable_file_is_reported_at_the_end_and_the_rest_is_done(run_cli, run, images, tmp_path):
    (images / "broken.png").write_bytes(b"no image")
    status, _, err = run_cli("segment", run, images, "--output", tmp_path / "masks")
    assert status == 1
    assert "1 of 5 images could not be segmented:\n  broken.png: " in err
    assert len(sizes(tmp_path / "masks")) == 4


def test_image_that_takes_too_much_memory_is_reported_and_the_rest_is_done(run_cli, run, images, tmp_path, monkeypatch):
    segment = Segmenter.segment

    def of_little_memory(self, image, **options):
        if image.shape[1:] == (70, 51):
            np.empty(2**60, dtype=np.uint8)
        return segment(self, image, **options)

    monkeypatch.setattr(Segmenter, "segment", of_little_memory)
    status, _, err = run_cli("segment", run, images, "--output", tmp_path / "masks")
    assert status == 1
    assert "1 of 4 images could not be segmented:\n  grey.png: Unable to allocate 1.00 EiB" in err
    assert len(sizes(tmp_path / "masks")) == 3


def test_where_no_file_can_be_read_nothing_is_left_that_stops_the_next_try(run_cli, run, images, tmp_path):
    segment = ["segment", run, images / "grey.png", "--output", tmp_path / "masks", "--instances"]
    content = (images / "grey.png").read_bytes()
    (images / "grey.png").write_bytes(b"no image")
    assert run_cli(*segment)[0] == 1
    assert not (tmp_path / "masks").exists()
    (images / "grey.png").write_bytes(content)
    status, _, err = run_cli(*segment)
    assert status == 0, err


def test_pages_of_a_large_tiff_are_pages_of_its_mask(run_cli, run, tmp_path):
    pixels = RNG.integers(256, size=(3, 40, 45), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / "a.btf", pixels, bigtiff=True, photometric="minisblack")
    status, _, err = run_cli("segment", run, tmp_path / "images", "--output", tmp_path / "masks")
    assert status == 0, err
    assert sizes(tmp_path / "masks") == {"a.btf": (40, 45, 3)}


def test_masks_and_overlays_among_the_images_are_not_segmented(run_cli, run, images):
    (images / "notes.txt").write_text("of the images")
    for left_out in ("left out: 1 .txt\n", "left out: 1 .txt; 1 written by unet-diffusion (masks)\n"):
        status, out, err = run_cli("segment", run, images, "--output", images / "masks", "--overlays")
        assert status == 0, err
        assert "4 masks in" in out
        assert left_out in err


def test_masks_that_are_there_are_left_alone_unless_told(run_cli, run, images, tmp_path):
    run_cli("segment", run, images / "stack.tif", "--output", tmp_path / "masks")
    Image.new("L", (1, 1)).save(tmp_path / "masks" / "grey.png")  # as if it had been done
    status, _, err = run_cli("segment", run, images, "--output", tmp_path / "masks")
    assert status == 0, err
    assert sizes(tmp_path / "masks")["grey.png"] == (1, 1, 1)
    run_cli("segment", run, images, "--output", tmp_path / "masks", "--overwrite")
    assert sizes(tmp_path / "masks")["grey.png"] == (70, 51, 1)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_images_are_never_replaced_by_their_masks(run_cli, run, images, overwrite):
    before = {path: path.read_bytes() for path in images.rglob("*.*")}
    status, _, err = run_cli("segment", run, images, "--output", images, *overwrite)
    assert status == 1
    assert "holds files that are no masks; choose another folder" in err
    assert {path: path.read_bytes() for path in images.rglob("*.*")} == before


def test_masks_of_other_settings_are_not_added_to(run_cli, run, images, tmp_path):
    run_cli("segment", run, images, "--output", tmp_path / "masks")
    status, _, err = run_cli("segment", run, images, "--output", tmp_path / "masks", "--overlays")
    assert status == 1
    assert "were made with other settings (overlays: False there, True here)" in err
    status, _, err = run_cli("segment", run, images, "--output", tmp_path / "masks", "--overlays", "--overwrite")
    assert status == 0, err
    assert (tmp_path / "masks" / "overlays" / "grey.png").is_file()


def test_no_half_written_file_is_left(run_cli, run, images, tmp_path, monkeypatch):
    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    status, _, err = run_cli("segment", run, images / "grey.png", "--output", tmp_path / "masks")
    assert status == 1
    assert "no space left on device" in err
    assert not (tmp_path / "masks").exists()


def contents(folder) -> dict:
    """Of all outputs."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*") if "json" not in path.suffix}


def same_as_fresh(run_cli, checkpoint, images, folder, *options) -> bool:
    """Whether the outputs are those that the command makes in an empty folder."""
    assert run_cli("segment", checkpoint, images, "--output", folder.with_name("fresh"), *options)[0] == 0
    return contents(folder) == contents(folder.with_name("fresh"))


EXTRAS = ("--overlays", "--instances", "--probabilities")


def test_mask_of_an_image_that_was_replaced_is_made_again_and_said(run_cli, run, images, tmp_path):
    command = ["segment", run, images, "--output", tmp_path / "masks", *EXTRAS]
    assert run_cli(*command)[0] == 0
    kept = (tmp_path / "masks" / "grey.png").stat().st_mtime_ns
    Image.fromarray(RNG.integers(65536, size=(33, 64), dtype=np.uint16)).save(images / "deep.tif")
    Image.fromarray(RNG.integers(256, size=(40, 45), dtype=np.uint8)).save(images / "stack.tif")  # one page of three
    status, out, err = run_cli(*command)
    assert status == 0, err
    assert (
        "2 masks are made again, because their images have changed or they were not finished: deep.tif, stack.tif"
        in out
    )
    assert (tmp_path / "masks" / "grey.png").stat().st_mtime_ns == kept
    assert same_as_fresh(run_cli, run, images, tmp_path / "masks", *EXTRAS)


def test_masks_of_a_folder_that_was_copied_are_kept(run_cli, run, images, tmp_path):
    assert run_cli("segment", run, images, "--output", tmp_path / "masks")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").rglob("*.*")}
    images = shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    status, out, err = run_cli("segment", run, images, "--output", tmp_path / "masks")
    assert (status, "made again" in out) == (0, False), err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").rglob("*.*")} == before


def test_mask_of_a_member_of_an_archive_that_was_replaced_is_made_again(run_cli, run, images, tmp_path):
    command = ["segment", run, tmp_path / "packed.zip", "--output", tmp_path / "masks"]
    shutil.make_archive(str(tmp_path / "packed"), "zip", images)
    assert run_cli(*command)[0] == 0
    Image.fromarray(RNG.integers(256, size=(70, 51), dtype=np.uint8)).save(images / "grey.png")
    shutil.make_archive(str(tmp_path / "packed"), "zip", images)
    status, out, err = run_cli(*command)
    assert (status, "1 masks are made again, because their images have changed" in out) == (0, True), err
    assert same_as_fresh(run_cli, run, images, tmp_path / "masks")


def test_segmenter_that_was_trained_on_does_not_keep_old_masks(run_cli, classes_checkpoint, images, tmp_path):
    command = ["segment", classes_checkpoint, images, "--output", tmp_path / "masks"]
    assert run_cli(*command)[0] == 0
    before = contents(tmp_path / "masks")
    checkpoint = torch.load(classes_checkpoint, weights_only=True)
    for name, weight in checkpoint["state_dict"].items():
        checkpoint["state_dict"][name] = weight + torch.randn_like(weight)
    torch.save(checkpoint, classes_checkpoint)
    status, _, err = run_cli(*command)
    assert (status, "made with other settings (contents of checkpoint)" in err) == (1, True), err
    assert contents(tmp_path / "masks") == before
    one = images / "grey.png"
    assert run_cli("segment", classes_checkpoint, one, "--output", tmp_path / "masks", "--overwrite")[0] == 0
    status, out, err = run_cli(*command)  # the others were not overwritten, and are of the weights of before
    assert (status, "3 masks are made again" in out) == (0, True), err
    assert contents(tmp_path / "masks") != before
    assert same_as_fresh(run_cli, classes_checkpoint, images, tmp_path / "masks")


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_segmenting_that_is_cut_off_and_goes_on_with_other_images_is_a_fresh_one(
    run_cli, run, images, tmp_path, monkeypatch, written
):
    """Cut off when so many files of outputs have taken their place; then one image is replaced, and one exchanged."""
    command, places = ["segment", run, images, "--output", tmp_path / "masks", "--overlays"], []
    replace = os.replace

    def cut_off(source, place):
        if Path(place).suffix in (".png", ".tif"):
            if len(places) == written:
                raise KeyboardInterrupt
            places.append(place)
        replace(source, place)

    monkeypatch.setattr("os.replace", cut_off)
    assert run_cli(*command)[0] == 130
    monkeypatch.undo()
    Image.fromarray(RNG.integers(256, size=(33, 64), dtype=np.uint8)).save(images / "deep.tif")
    (images / "grey.png").rename(images / "moved.png")
    Image.fromarray(RNG.integers(256, size=(70, 51), dtype=np.uint8)).save(images / "grey.png")
    status, _, err = run_cli(*command)
    assert status == 0, err
    assert same_as_fresh(run_cli, run, images, tmp_path / "masks", "--overlays")


@pytest.fixture
def classes_checkpoint(tmp_path):
    """A valid-convolution network for RGB images, of four classes, with stretched grey values."""
    torch.manual_seed(0)
    unet = SegmentationUNet(3, 4, channels=(4, 8))
    trained = Segmenter(unet, "classes", list("abcd"), timestep=None, stretch=True, window_size=50)
    weights = {f"ema_unet.{name}": value for name, value in unet.state_dict().items()}
    torch.save({"segmenter": trained.record(), "state_dict": weights}, tmp_path / "classes.ckpt")
    return tmp_path / "classes.ckpt"


def test_classes_are_written_as_their_indices(run_cli, classes_checkpoint, images, tmp_path):
    status, _, err = run_cli("segment", classes_checkpoint, images, "--output", tmp_path / "m", "--overlays")
    assert status == 0, err
    trained = read_segmenter(classes_checkpoint)
    with Image.open(images / "deep.tif") as image, torch.no_grad():
        pixels = to_float(torch.from_numpy(np.array(image))[None].expand(3, -1, -1), stretch=True)
        expected = trained.maps(pixels).argmax(dim=0)
    with Image.open(tmp_path / "m" / "deep.tif") as mask:
        assert np.array_equal(np.asarray(mask), expected)


def test_zip_archives_and_bfloat16_work(run_cli, classes_checkpoint, images, tmp_path):
    shutil.make_archive(str(tmp_path / "packed"), "zip", images)
    options = ["--output", tmp_path / "m", "--precision", "bfloat16", "--speed", "channels_last"]
    status, _, err = run_cli("segment", classes_checkpoint, tmp_path / "packed.zip", *options)
    assert status == 0, err
    assert len(sizes(tmp_path / "m")) == 4


def test_instances_of_classes_are_refused(run_cli, classes_checkpoint, images, tmp_path):
    status, _, err = run_cli("segment", classes_checkpoint, images, "--output", tmp_path / "m", "--instances")
    assert status == 1
    assert "--instances needs a model of objects" in err


def test_a_threshold_of_classes_is_refused(run_cli, classes_checkpoint, images, tmp_path):
    status, _, err = run_cli("segment", classes_checkpoint, images, "--output", tmp_path / "m", "--threshold", "0.3")
    assert status == 1
    assert "threshold and min_size need a model of foreground or objects" in err
    with pytest.raises(ValueError, match="and this one was trained on classes"):
        read_segmenter(classes_checkpoint).segment(images / "grey.png", min_size=3)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("segment {run}/none {images} --output {tmp}/o", "none"),
        (
            "segment {digits} {images} --output {tmp}/o",
            "holds a denoiser, not a segmenter; draw from it with unet-diffusion sample",
        ),
        ("segment {run} {tmp}/nothing --output {tmp}/o", "IMAGES must exist, got {tmp}/nothing"),
        ("segment {run} {images} {images} --output {tmp}/o", "must differ in more than their extension, got deep.tif"),
        ("segment {run} {images} --output {tmp}/o --window_size -5", "--window_size must be at least 1, got -5"),
        ("segment {run} {images} --output {tmp}/o --threshold 1", "threshold must be above 0 and below 1, got 1.0"),
        ("segment {run} {images} --output {tmp}/o --min_size 0 --overlays", "min_size must be at least 1 pixel, got 0"),
        ("segment {run} {images} --output {tmp}/o --min_size 8", "add --instances or --overlays"),
    ],
)
def test_bad_input_gets_one_message(run_cli, run, images, digits_run, tmp_path, command, message):
    filled = command.format(run=run, images=images, tmp=tmp_path, digits=digits_run)
    status, _, err = run_cli(*filled.split())
    assert status == 1
    assert message.format(tmp=tmp_path) in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("a.png", "a.png"),
        ("a.TIF", "a.TIF"),
        ("b/a.jpeg", "b/a.png"),
        ("a.webp", "a.png"),
        ("a.tf8", "a.tf8"),
        ("b/a.nii.gz", "b/a.png"),
    ],
)
def test_mask_keeps_the_name_unless_its_format_would_spoil_it(name, mask):
    assert mask_name(name) == mask


def test_task_on_the_command_line_must_exist(run_cli):
    status, _, err = run_cli("fit", "--task", "dream")
    assert status == 2
    assert "task must be one of denoise, adapt, segment, autoencode, got dream" in err


def test_help_of_a_task_mentions_its_options(run_cli):
    status, out, _ = run_cli("fit", "--task", "segment", "--help")
    assert status == 0
    wanted = "--model.loss --model.timestep --model.init_from --samples.num_images --data --model.ema_decay"
    assert [option for option in wanted.split() if option not in out] == []
