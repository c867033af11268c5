"""`unet-diffusion synthesize`: pairs of an image and its mask, that a segmenter is trained on."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from denoisers import randomise
from PIL import Image
from torch import nn

import unet_diffusion as ud
from unet_diffusion.data import PairedFiles
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.record import save_denoiser
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.segmentation.scores import dice
from unet_diffusion.segmentation.synthetic import synthetic_cells

NUM, SIZE = 4, 32
SHORT = {"num_labels": NUM - 1, "sampling": ud.Sampling(num_inference_steps=2, seed=3)}
COPIED = {"num_labels": NUM - 1, "image_size": (SIZE, SIZE), "channels": 1, "seed": 3}
WORDS = ["--num_labels", NUM - 1, "--num_inference_steps", 2, "--seed", 3, "--device", "cpu"]


def denoiser(channels=1, **options) -> Denoiser:
    """A denoiser of masks that was not trained."""
    torch.manual_seed(0)
    condition = SemanticMap(4, **{"label_format": "instances", "max_distance": 6, **options})
    unet = DenoiserUNet(channels + 4, [8, 16], out_channels=channels, layers_per_block=1, norm_num_groups=4)
    parts = (randomise(unet), NoiseSchedule(100, "linear"), (channels, SIZE, SIZE))
    return Denoiser(*parts, conditions=nn.ModuleList([condition]))


def segmenter(channels=1, kind="instances") -> Segmenter:
    """A segmenter that was not trained."""
    torch.manual_seed(0)
    num_classes = {"binary": 2, "instances": 3, "classes": 4}[kind]
    unet = SegmentationUNet(channels, 2 if kind == "binary" else 4, channels=(4, 8), padding="same")
    names = ["background", "cell", "border", "other"][:num_classes]
    return Segmenter(randomise(unet), kind, names, timestep=None, stretch=True, window_size=32)


class Thresholded(Segmenter):
    """Takes the bright pixels for objects."""

    def maps(self, image, **options):
        is_bright = (image.mean(dim=0) > 0).float()
        return torch.stack([1 - is_bright, is_bright, torch.zeros_like(is_bright), is_bright])


@pytest.fixture
def files(tmp_path):
    """A folder with images of cells, their labels, and checkpoints of a denoiser and a segmenter."""
    for kind in ("image", "label"):
        (tmp_path / kind).mkdir()
    for number in range(NUM):
        image, labels = synthetic_cells((48, 56), num_cells=5, seed=number)
        Image.fromarray(image).save(tmp_path / "image" / f"{number}.png")
        Image.fromarray(labels.astype(np.uint16)).save(tmp_path / "label" / f"{number}.png")
    save_denoiser(denoiser(), tmp_path / "denoiser.ckpt")
    segmenter().save(tmp_path / "segmenter.ckpt")
    return tmp_path


def contents(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def test_pairs_are_what_segmenters_are_trained_on(run_cli, files):
    command = ["synthesize", files / "denoiser.ckpt", "--labels", files / "label", *WORDS, "--num_images", 6]
    status, out, err = run_cli(*command, "--output", files / "out")
    assert status == 0, err
    assert "kept 6 of 6 pairs (100%)" in out
    loaded = PairedFiles(files / "out/image", files / "out/label", channels=1).load(progress=False)
    assert loaded.names == [f"{number:06d}" for number in range(6)]
    assert {(tuple(one.shape), one.dtype) for one in loaded.images} == {((1, SIZE, SIZE), torch.uint8)}
    record = json.loads((files / "out/synthesize.json").read_text())
    assert (record["num_images"], record["num_kept"], record["share_kept"]) == (6, 6, 1.0)
    assert (record["settings"]["seed"], record["settings"]["num_labels"]) == (3, NUM - 1)
    with Image.open(files / "out/label/000000.png") as label, Image.open(files / "out/pairs.png") as sheet:
        assert label.mode == "I;16"
        assert sheet.size == (8 * 66 + 2, 2 * 66 + 2)
    fit = ["fit", "--config", "cells", "--data.source", "PairedFiles", "--model.unet.init_args.channels=[4,8]"]
    fit += ["--data.images", files / "out/image", "--data.labels", files / "out/label", "--data.window_size=32"]
    fit += ["--data.num_val=2", "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--data.batch_size=2"]
    status, _, err = run_cli(*fit, "--trainer.default_root_dir", files / "run", "--trainer.enable_progress_bar=false")
    assert status == 0, err


def test_image_is_drawn_for_its_mask_and_pairs_do_not_depend_on_the_batch(files):
    def few(batch_size):
        return {**SHORT, "sampling": replace(SHORT["sampling"], batch_size=batch_size)}

    made = denoiser()
    ud.synthesize(made, files / "label", output=files / "out", num_images=5, **few(2))
    ud.synthesize(made, files / "label", output=files / "again", num_images=5, **few(5))
    for name in [f"{number:06d}.png" for number in range(5)]:
        assert (files / "out/label" / name).read_bytes() == (files / "again/label" / name).read_bytes()
        first, second = (np.asarray(Image.open(files / run / "image" / name)).astype(int) for run in ("out", "again"))
        assert np.abs(first - second).max() <= 1  # of rounding
    labels = [np.asarray(Image.open(files / f"out/label/{number:06d}.png")).astype(np.int32) for number in range(5)]
    drawn = made.sample(5, conditions={"semantic_map": labels}, num_inference_steps=2, seed=3, batch_size=2)
    for number, image in enumerate(((drawn[:, 0] / 2 + 0.5).clamp(0, 1) * 255).round().numpy()):
        assert np.abs(image - np.asarray(Image.open(files / f"out/image/{number:06d}.png"))).max() <= 1


def test_pairs_are_kept_where_the_segmenter_finds_the_mask(files):
    judge = Thresholded(**{name: getattr(segmenter(), name) for name in Segmenter.__dataclass_fields__})
    options = {"num_images": 12, "segmenter": judge, **COPIED}
    every = ud.copy_paste(files / "image", files / "label", output=files / "all", min_dice=0, **options)
    least = float(np.median(list(every.dice.values())))
    made = ud.copy_paste(files / "image", files / "label", output=files / "out", min_dice=least, **options)
    assert made.dice == every.dice
    assert 0 < made.share_kept == len(made.kept) / 12 < len(every.kept) / 12 == 1
    assert made.kept == [name for name, score in made.dice.items() if score >= least]
    assert sorted(path.stem for path in (files / "out/image").iterdir()) == made.kept
    for name in made.kept:
        image, label = (np.asarray(Image.open(files / "out" / kind / f"{name}.png")) for kind in ("image", "label"))
        pixels = torch.tensor(image)[None] / 127.5 - 1  # as they were drawn: not stretched
        assert made.dice[name] == round(dice(label > 0, judge.segment(pixels).classes > 0), 4)
    record = json.loads((files / "out/synthesize.json").read_text())
    assert record["dice"] == made.dice
    assert record["share_kept"] == made.share_kept


def test_command_that_was_cut_off_continues_and_adds_pairs(run_cli, files, monkeypatch):
    command = ["synthesize", files / "denoiser.ckpt", "--labels", files / "label", *WORDS]
    whole = [*command, "--segmenter", files / "segmenter.ckpt", "--min_dice", 0, "--batch_size", 2]
    assert run_cli(*whole, "--num_images", 5, "--output", files / "whole")[0] == 0
    assert run_cli(*whole, "--num_images", 2, "--output", files / "parts")[0] == 0
    (files / "parts/image/.000002.png.999999999.partial").touch()
    early = (files / "parts/image/000000.png").stat().st_mtime_ns
    status, _, err = run_cli(*whole, "--num_images", 5, "--output", files / "parts")
    assert status == 0, err
    assert contents(files / "parts") == contents(files / "whole")
    assert (files / "parts/image/000000.png").stat().st_mtime_ns == early
    monkeypatch.chdir(files)  # the same labels, by another path
    command[3] = "label"
    words = [*command, "--segmenter", files / "segmenter.ckpt", "--min_dice", 0, "--num_images", 5]
    status, _, err = run_cli(*words, "--output", files / "parts")
    assert status == 0, err


def test_folder_of_other_settings_or_files_is_left_as_it_is(run_cli, files):
    command = ["synthesize", files / "denoiser.ckpt", "--labels", files / "label", *WORDS, "--num_images", 2]
    assert run_cli(*command, "--output", files / "out")[0] == 0
    before = contents(files / "out")
    status, _, err = run_cli(*command, "--output", files / "out", "--guidance_scale", 2)
    assert (status, "guidance_scale: 1.0 there, 2.0 here" in err) == (1, True), err
    status, _, err = run_cli(*command, "--output", files / "label")
    assert (status, "holds files that are no synthetic pairs" in err) == (1, True), err
    assert contents(files / "out") == before
    assert len(contents(files / "label")) == NUM


def test_labels_beyond_the_first_are_never_read(files):
    ud.synthesize(denoiser(), files / "label", output=files / "out", num_images=3, **SHORT)
    ud.copy_paste(files / "image", files / "label", output=files / "copied", num_images=3, **COPIED)
    for kind in ("label", "image"):
        (files / kind / f"{NUM - 1}.png").write_bytes(b"damaged")
    ud.synthesize(denoiser(), files / "label", output=files / "again", num_images=3, **SHORT)
    assert contents(files / "out/label") == contents(files / "again/label")
    ud.copy_paste(files / "image", files / "label", output=files / "copied", num_images=4, **COPIED)
    assert len(list((files / "copied/image").iterdir())) == 4


def test_copied_pixels_are_those_of_the_same_masks(files):
    """The control: the masks of the pairs that are drawn, with pixels of real images alone."""
    ud.synthesize(denoiser(), files / "label", output=files / "drawn", num_images=4, **SHORT)
    ud.copy_paste(files / "image", files / "label", output=files / "out", num_images=4, **COPIED)
    assert contents(files / "out/label") == contents(files / "drawn/label")
    bright, dark = [], []
    for name in [f"{number:06d}.png" for number in range(4)]:
        image, label = (np.asarray(Image.open(files / "out" / kind / name)) for kind in ("image", "label"))
        bright.append(image[label > 0].mean())
        dark.append(image[label == 0].mean())
    assert np.mean(bright) > np.mean(dark) + 40  # cells are brighter than their background


def test_pixels_are_not_copied_from_images_that_are_larger_than_their_labels(files):
    Image.new("L", (56, 50)).save(files / "image" / "1.png")
    with pytest.raises(
        ValueError, match=r"1 of 3 images cannot be used:\n  1\.png: 50x56 pixels, and 48x56 in its label"
    ):
        ud.copy_paste(files / "image", files / "label", output=files / "out", **COPIED)
    assert not (files / "out").exists()


def test_copied_pixels_are_stretched_as_the_denoisers_images_were(run_cli, files):
    dark = np.asarray(Image.open(files / "image/0.png")) // 8
    for number in range(NUM):
        Image.fromarray(dark).save(files / f"image/{number}.png")
    brightest = {}
    for stretch in (False, True):
        drawing = denoiser()
        drawing.settings = {"data": {"init_args": {"source": {"init_args": {"stretch": stretch}}}}}
        save_denoiser(drawing, files / f"{stretch}.ckpt")
        command = ["synthesize", files / f"{stretch}.ckpt", "--labels", files / "label", *WORDS, "--num_images", 8]
        status, _, err = run_cli(*command, "--copy_from", files / "image", "--output", files / f"out{stretch}")
        assert status == 0, err
        images = [np.asarray(Image.open(path)) for path in (files / f"out{stretch}/image").iterdir()]
        assert {image.shape for image in images} == {(SIZE, SIZE)}  # as in training
        brightest[stretch] = max(int(image.max()) for image in images)
    assert brightest[False] == dark.max() < 32
    assert brightest[True] == 255


def test_denoiser_with_a_value_range_is_refused(files):
    drawing = denoiser()
    drawing.values = PixelValues("float32", -1000, 3000)
    with pytest.raises(ValueError, match=r"without a value_range, as pairs are pictures .* this one has -1000"):
        ud.synthesize(drawing, files / "label", output=files / "out", **SHORT)
    assert not (files / "out").exists()


def test_copied_pixels_of_coloured_images_are_not_mixed_with_grey_ones(files):
    for number in range(NUM):
        pixels = np.asarray(Image.open(files / f"image/{number}.png"))
        coloured = np.stack([pixels, pixels // (2 if number % 2 else 1), pixels], axis=-1)
        Image.fromarray(coloured).save(files / f"image/{number}.png")
    options = {"output": files / "out", "num_images": 12, **COPIED, "channels": 3}
    ud.copy_paste(files / "image", files / "label", **options)
    images = [np.asarray(Image.open(path)).astype(int) for path in (files / "out/image").iterdir()]
    shares = [(image[..., 0] != image[..., 1])[image[..., 0] > 20].mean() for image in images]
    assert {round(share) for share in shares} == {0, 1}
    assert all(share < 0.01 or share > 0.99 for share in shares)


def test_no_pair_that_is_kept_is_an_error_that_leaves_the_record(run_cli, files):
    command = ["synthesize", files / "denoiser.ckpt", "--labels", files / "label", *WORDS, "--num_images", 2]
    options = ["--segmenter", files / "segmenter.ckpt", "--min_dice", 1]
    status, _, err = run_cli(*command, *options, "--output", files / "out")
    assert (status, "none of 2 pairs was kept, as the best Dice is" in err) == (1, True), err
    assert json.loads((files / "out/synthesize.json").read_text())["share_kept"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num_images", 0], "num_images must be at least 1, got 0"),
        (["--min_dice", 1.5], "min_dice must be from 0 to 1, got 1.5"),
        (["--num_labels", 0], "num_labels must be at least 1, got 0"),
        (["--image_size", 64, 64], "label images must have at least 64x64 pixels"),
        (["--image_size", 31, 32], "image_size must be"),
        (["--labels", "none"], "--labels must exist, got none"),
        (["--scheduler", "Euler"], "--scheduler must be one of"),
        (
            ["--segmenter", "colours.ckpt"],
            "must take the 1 channels of the images of the pairs, and takes 3",
        ),
        (["--segmenter", "classes.ckpt"], "must tell objects from background, and this one was trained on classes"),
        (["--segmenter", "measured.ckpt"], "the segmenter was trained on numbers of 0 to 60 as -1 to 1, and the data"),
        (["--segmenter", "denoiser.ckpt"], "holds a denoiser, not a segmenter"),
        (["--labels", "negative"], "1 of 3 label files cannot be used:\n  1.tif: numbers of objects must be 0 or more"),
        (["--labels", "empty"], "3 label images hold no object"),
        (["--copy_from", "empty"], "must have the same names"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(run_cli, files, monkeypatch, options, said):
    monkeypatch.chdir(files)
    segmenter(channels=3).save("colours.ckpt")
    segmenter(kind="classes").save("classes.ckpt")
    replace(segmenter(), stretch=False, values=PixelValues("float32", 0, 60)).save("measured.ckpt")
    for folder in ("negative", "empty"):
        (files / folder).mkdir()
        for number in range(3):
            labels = np.full((40, 40), -(folder == "negative" and number == 1), dtype=np.int32)
            Image.fromarray(labels).save(files / folder / f"{number}.tif")
    words = dict(zip(WORDS[::2], WORDS[1::2], strict=True)) | {"--labels": "label", "--num_images": 2}
    for name in [word for word in options if str(word).startswith("--")]:
        words.pop(name, None)
    given = [word for pair in words.items() for word in pair]
    status, _, err = run_cli("synthesize", "denoiser.ckpt", *given, *options, "--output", "out")
    assert (status, said in err, (files / "out").exists()) == (1, True, False), err


def test_denoiser_without_masks_of_objects_is_refused(files):
    trained = denoiser(num_classes=4, label_format="classes", max_distance=None)
    with pytest.raises(ValueError, match="the denoiser must take masks of objects, and this one does not"):
        ud.synthesize(trained, files / "label", output=files / "out", **SHORT)


def test_functions_have_at_most_twelve_arguments():
    for function in (ud.synthesize, ud.copy_paste):
        assert len(inspect.signature(function).parameters) <= 12
