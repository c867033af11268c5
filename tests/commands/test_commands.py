import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image
from sklearn.datasets import load_digits

from unet_diffusion.commands import fit_arguments
from unet_diffusion.commands import main as cli
from unet_diffusion.commands.arguments import Precision, Speed
from unet_diffusion.commands.completion import FIT_OPTIONS
from unet_diffusion.commands.fit_arguments import check_arguments
from unet_diffusion.commands.recipes import recipe_path
from unet_diffusion.commands.run_settings import changes
from unet_diffusion.commands.training_cli import TrainingCLI
from unet_diffusion.data import Folder, ImageDataModule
from unet_diffusion.diffusers_io.exporting import export_pipeline
from unet_diffusion.diffusers_io.importing import import_pipeline
from unet_diffusion.diffusion.sampling import image_generators
from unet_diffusion.inference.loading import load_denoiser
from unet_diffusion.inference.reading import read_denoiser
from unet_diffusion.inference.record import save_denoiser
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.runtime.messages import UsageError
from unet_diffusion.training.precision import RunTrainer

CONFIGS = Path(__file__).parents[2] / "configs"
SAMPLE = ("--num_inference_steps", 2, "--device", "cpu")


def pixels(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


def copy_of(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def metrics(run, version=0) -> list[dict[str, str]]:
    with open(run / "logs" / f"version_{version}" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------ fit, validate


def test_fit_leaves_samples_checkpoints_configuration_and_pipeline(digits_run):
    expected = ["checkpoints/last.ckpt", "config.yaml", "logs/version_0/metrics.csv", "pipeline/model_index.json"]
    expected += ["samples.png", "samples/step_0000002.png", "samples/step_0000004.png"]
    assert [name for name in expected if not (digits_run / name).is_file()] == []


def test_fit_logs_training_and_validation_losses(digits_run):
    rows = metrics(digits_run)
    assert sorted({int(row["step"]) for row in rows if row.get("train/loss")}) == [0, 1, 2, 3]
    assert sorted({int(row["step"]) for row in rows if row.get("val/loss")}) == [1, 3]


def test_written_configuration_makes_the_same_run(digits_run, tmp_path, run_cli):
    again = tmp_path / "again"
    before = sorted(digits_run.rglob("*"))
    status, _, err = run_cli("fit", "--config", digits_run / "config.yaml", "--trainer.default_root_dir", again)
    assert status == 0, err
    assert sorted(digits_run.rglob("*")) == before
    assert len(list((again / "logs").iterdir())) == 1
    one, other = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (digits_run, again))
    torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=0, atol=0)


def test_exported_pipeline_holds_the_averaged_weights_of_the_last_checkpoint(digits_run):
    exported = import_pipeline(digits_run / "pipeline").unet.state_dict()
    last = read_denoiser(digits_run / "checkpoints" / "last.ckpt").unet.state_dict()
    torch.testing.assert_close(exported, last, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("option", "value", "differs"),
    [
        ("--model.ema_decay", 0.5, "model.ema_decay was 0.9"),
        ("--data.batch_size", 16, "data.init_args.batch_size was 32, is 16)"),
        ("--seed_everything", 1, "seed_everything was 0, is 1)"),
    ],
)
def test_fit_of_other_settings_into_a_run_folder_is_refused_with_what_to_do(
    digits_run, run_cli, tiny_digits, option, value, differs
):
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", digits_run, option, value)
    assert status == 1
    assert f"{digits_run} holds a run of other settings ({differs}" in err
    assert f"by --ckpt_path {digits_run}/checkpoints/last.ckpt, or start another" in err
    assert not (digits_run / "logs" / "version_1").exists()


def test_same_command_again_leaves_a_finished_run_as_it_is(digits_run, tmp_path, run_cli, tiny_digits):
    run = copy_of(digits_run, tmp_path)
    before = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (run / "samples.png").unlink()  # the run may have been killed while it was drawn
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", run)
    assert status == 0, err
    after = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.testing.assert_close(after["state_dict"], before["state_dict"], rtol=0, atol=0)
    assert (run / "samples.png").read_bytes() == (digits_run / "samples.png").read_bytes()


def test_fit_from_another_run_into_a_run_folder_is_refused(digits_run, tmp_path, run_cli, tiny_digits):
    last = copy_of(digits_run, tmp_path) / "checkpoints" / "last.ckpt"
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", digits_run, "--ckpt_path", last)
    assert status == 1
    assert "holds a run of other settings (ckpt_path was None, is" in err


def test_run_continues_from_its_checkpoint_and_keeps_its_log(digits_run, tmp_path, run_cli, tiny_digits):
    run = copy_of(digits_run, tmp_path)
    log = (run / "logs" / "version_0" / "metrics.csv").read_text()
    last = run / "checkpoints" / "last.ckpt"
    arguments = [*tiny_digits, "--trainer.default_root_dir", run, "--ckpt_path", last, "--trainer.max_steps", 6]
    status, _, err = run_cli("fit", *arguments)
    assert status == 0, err
    assert torch.load(last, weights_only=True)["global_step"] == 6
    assert (run / "logs" / "version_0" / "metrics.csv").read_text() == log
    assert {int(row["step"]) for row in metrics(run, version=1)} == {4, 5}


@pytest.mark.parametrize("stop", [3, 4])  # a checkpoint is written every 2 steps, and at the end
def test_continued_run_is_the_longer_run(stop, tmp_path, run_cli, tiny_digits):
    def fit(name, max_steps, *arguments):
        arguments = [*arguments, "--trainer.default_root_dir", tmp_path / name, "--trainer.max_steps", max_steps]
        # 8 of 40 images a batch: an epoch is 5 steps
        arguments += [
            "--model.lr_decay",
            "constant",
            "--data.num_val",
            1757,
            "--data.batch_size",
            8,
        ]
        status, _, err = run_cli("fit", *tiny_digits, *arguments, "--trainer.limit_val_batches", 1)
        assert status == 0, err
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)

    straight = fit("straight", 8)
    fit("continued", stop)
    continued = fit("continued", 8, "--ckpt_path", tmp_path / "continued" / "checkpoints" / "last.ckpt")
    assert continued["global_step"] == straight["global_step"] == 8
    torch.testing.assert_close(continued["state_dict"], straight["state_dict"], rtol=0, atol=0)


def test_validate_gives_the_loss_of_the_run(digits_run, run_cli):
    arguments = ["--config", digits_run / "config.yaml", "--ckpt_path", digits_run / "checkpoints" / "last.ckpt"]
    status, out, err = run_cli("validate", *arguments, "--trainer.logger", "false")
    assert status == 0, err
    (during_fit,) = (row["val/loss"] for row in metrics(digits_run) if row.get("val/loss") and row["step"] == "3")
    assert f"{float(during_fit):.6f}"[:7] in out


def test_fit_and_validate_begin_with_what_the_data_are(digits_run, tmp_path, run_cli, tiny_digits, caplog):
    run_cli("fit", *tiny_digits, "--trainer.default_root_dir", tmp_path / "run", "--trainer.max_steps", 1)
    counts = np.bincount(load_digits().target)
    found = f"found: 1797 images of 1x8x8 (uint8); 10 classes of {min(counts)} to {max(counts)}"
    split = "split: 1777 to train on, 20 to validate on"
    said = caplog.messages
    assert said.count(found) == said.count(split) == 1
    assert said.index(found) < said.index(split) < said.index("`Trainer.fit` stopped: `max_steps=1` reached.")
    caplog.clear()
    arguments = ["--config", digits_run / "config.yaml", "--ckpt_path", digits_run / "checkpoints" / "last.ckpt"]
    run_cli("validate", *arguments, "--trainer.logger", "false")
    assert caplog.messages.count(found) == caplog.messages.count(split) == 1


@pytest.fixture
def few_images(tmp_path):
    for number in range(6):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * number, np.uint8)).save(path)
    return tmp_path / "images"


def test_run_among_its_images_does_not_train_on_its_own_pictures(few_images, run_cli, tiny_digits, caplog):
    data = ["--data", "Folder", "--data.root", few_images, "--data.image_size", 8]
    data += ["--data.channels", 1, "--data.num_val", 2, "--data.batch_size", 2]
    data += ["--model.unet.init_args.num_class_embeds", "null", "--model.label_dropout", 0]
    arguments = ["fit", *tiny_digits, *data, "--samples.guidance_scale", 1]
    arguments += ["--trainer.default_root_dir", few_images / "run"]
    for max_steps, left_out in ((2, "nothing"), (4, "1 written by unet-diffusion (run)")):
        status, _, err = run_cli(*arguments, "--trainer.max_steps", max_steps)
        assert status == 0, err
        assert (few_images / "run" / "samples.png").is_file()
        said = caplog.messages
        assert said[said.index(f"found: 6 images of 1x8x8 (uint8) in {few_images}") + 1] == f"left out: {left_out}"
        caplog.clear()


@pytest.mark.parametrize("name", ["images", "images/../images"])
def test_run_folder_that_is_the_folder_of_its_images_is_refused(few_images, run_cli, name):
    root = few_images.parent / name
    status, _, err = run_cli("fit", "--config", "folder", "--data.root", root,
                             "--trainer.default_root_dir", few_images)  # fmt: skip
    assert status == 1
    assert f"init_args.root and trainer.default_root_dir must be two folders, got {root} for both" in err
    assert sorted(path.name for path in few_images.iterdir()) == [f"{number}.png" for number in range(6)]


def test_pack_says_what_is_left_out(few_images, run_cli, tmp_path):
    (few_images / "a.heic").write_bytes(b"heic")
    for number in range(6):
        (few_images / f"{number}.txt").write_text("a caption")
    for captions, left_out in (([], "left out: 6 .txt; 1 .heic\n"), (["--captions"], "left out: 1 .heic\n")):
        status, _, err = run_cli("pack", few_images, tmp_path / f"shards{len(captions)}", *captions)
        assert status == 0, err
        assert left_out in err


def test_fast_dev_run_trains_and_leaves_nothing(tmp_path, run_cli, tiny_digits):
    run = tmp_path / "run"
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", run, "--trainer.fast_dev_run", 1)
    assert status == 0, err
    assert not any(path.suffix in (".ckpt", ".png") for path in run.rglob("*"))


def test_fast_dev_run_leaves_a_finished_run_alone(digits_run, tmp_path, run_cli, tiny_digits):
    run = copy_of(digits_run, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", run, "--trainer.fast_dev_run", 1)
    assert status == 0, err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_progress_bar_can_be_on_or_off(tmp_path, run_cli, tiny_digits):
    arguments = ["fit", *tiny_digits, "--trainer.fast_dev_run", 1, "--trainer.default_root_dir", tmp_path]
    bars = ["fit:" in run_cli(*arguments, "--trainer.enable_progress_bar", on)[2] for on in ("true", "false")]
    assert bars == [True, False]


def test_wandb_overlay_logs_pictures_offline_beside_the_csv_file(tmp_path, run_cli, tiny_digits, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run, overlay = tmp_path / "run", "configs/logger/wandb.yaml"
    monkeypatch.chdir(cli.__file__.removesuffix("unet_diffusion/commands/main.py"))
    status, _, err = run_cli("fit", *tiny_digits, "--config", overlay, "--trainer.default_root_dir", run)
    wandb.finish()
    assert status == 0, err
    (folder,) = run.glob("wandb/offline-run-*")
    assert len(list(folder.glob("files/media/images/samples_*.png"))) == 2
    assert (run / "logs" / "version_0" / "metrics.csv").is_file()


def test_tensorboard_overlay_logs_pictures_losses_and_rates(tmp_path, run_cli, tiny_digits):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, overlay = tmp_path / "run", CONFIGS / "logger" / "tensorboard.yaml"
    status, _, err = run_cli("fit", *tiny_digits, "--config", overlay, "--trainer.default_root_dir", run)
    assert status == 0, err
    events = EventAccumulator(str(run / "tensorboard" / "version_0")).Reload()
    assert {"train/loss", "val/loss", "lr-AdamW"} <= set(events.Tags()["scalars"])
    for image in events.Images("samples"):
        with Image.open(run / "samples" / f"step_{image.step:07d}.png") as picture:
            logged = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
            np.testing.assert_array_equal(logged, np.asarray(picture))
    assert [image.step for image in events.Images("samples")] == [2, 4]


# ------------------------------------------------------------------------------------------------------------- sample


@pytest.fixture(scope="module")
def strong_run(digits_run, tmp_path_factory):
    """A run folder whose network reacts to its labels and to rounding, which one of four steps hardly does."""
    trained = import_pipeline(digits_run / "pipeline")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained.unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    root = tmp_path_factory.mktemp("strong") / "run"
    save_denoiser(trained, root / "checkpoints" / "last.ckpt")
    export_pipeline(trained, root / "pipeline")
    return root


@pytest.fixture
def draw(run_cli, tmp_path):
    """Draws images into a folder of that name; they must come out."""

    def run(name, checkpoint, *arguments):
        status, _, err = run_cli("sample", checkpoint, "--output", tmp_path / name, *SAMPLE, *arguments)
        assert status == 0, err
        return tmp_path / name

    return run


def test_labels_take_turns(strong_run, draw):
    mixed = pixels(draw("both", strong_run, "--num_images", 4, "--labels", 3, 7))
    threes, sevens = (pixels(draw(str(one), strong_run, "--num_images", 4, "--labels", one)) for one in (3, 7))
    assert not np.array_equal(threes[1], sevens[1])
    np.testing.assert_array_equal(mixed, np.stack([threes[0], sevens[1], threes[2], sevens[3]]))


def test_weaker_checkpoint_of_other_classes_is_refused(strong_run, run_cli, tmp_path):
    other = load_denoiser(strong_run)
    other.class_names = [f"digit {label}" for label in range(10)]
    save_denoiser(other, tmp_path / "other.ckpt")
    options = ["--autoguidance", tmp_path / "other.ckpt", "--guidance_scale", 2, "--labels", 3]
    status, _, err = run_cli("sample", strong_run, *options, "--output", tmp_path / "drawn")
    assert status == 1
    assert "autoguidance must be a denoiser of the same classes" in err


def test_sample_writes_images_a_grid_and_the_settings(strong_run, draw):
    folder = draw("images", strong_run, "--num_images", 4, "--labels", 3, "--guidance_scale", 2)
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{i:06d}.png" for i in range(4)),
        "grid.png",
        "settings.json",
    ]
    assert Image.open(folder / "grid.png").size == (2 * 66 + 2, 2 * 66 + 2)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["guidance_scale"] == 2
    assert settings["labels"] == ["3"]
    assert settings["seed"] == 0
    assert settings["checkpoint"] == str(strong_run)


def test_checkpoint_run_folder_and_pipeline_give_the_same_images(strong_run, draw):
    sources = {"run": strong_run, "file": strong_run / "checkpoints" / "last.ckpt", "folder": strong_run / "pipeline"}
    drawn = [pixels(draw(name, source, "--num_images", 3, "--guidance_scale", 1.5)) for name, source in sources.items()]
    assert drawn[0].std() > 1
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_pixels_kept_in_their_range_are_those_of_the_exported_pipeline(strong_run, draw):
    drawn, plain = (
        pixels(draw(name, strong_run, "--num_images", 2, "--labels", 3, 7, "--guidance_scale", 4, *options))
        for name, options in {"clipped": ["--thresholding"], "plain": []}.items()
    )
    pipeline = DiffusionPipeline.from_pretrained(strong_run / "pipeline", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, thresholding=True)
    options = {"guidance_scale": 4.0, "num_inference_steps": 2, "generator": image_generators(0, [0, 1])}
    images = np.stack([np.asarray(image) for image in pipeline(class_labels=[3, 7], **options).images])
    assert np.abs(drawn.astype(int) - images).max() <= 1  # of 255, where rounding falls to the other side
    assert np.abs(drawn.astype(int) - plain).max() > 10


def named_pipeline(tmp_path, strong_run):
    """The digits' pipeline with names for the classes."""
    trained = import_pipeline(strong_run / "pipeline")
    trained.class_names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    export_pipeline(trained, tmp_path / "named")
    return tmp_path / "named"


def test_labels_are_numbers_or_names_by_turns(strong_run, draw, tmp_path):
    source = named_pipeline(tmp_path, strong_run)
    by_name = pixels(draw("names", source, "--num_images", 3, "--labels", "seven", "two"))
    by_number = pixels(draw("numbers", source, "--num_images", 3, "--labels", 7, 2, 7))
    np.testing.assert_array_equal(by_name, by_number)


def test_label_is_a_name_first_and_the_record_says_which_class_it_was(strong_run, draw, tmp_path):
    """Of classes that are named by numbers: with the command, and with the exported pipeline."""
    trained = load_denoiser(strong_run)
    trained.class_names = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]
    save_denoiser(trained, tmp_path / "named.ckpt")
    by_name = draw("names", tmp_path / "named.ckpt", "--num_images", 3, "--labels", 10, 0, 3)
    by_number = draw("numbers", strong_run, "--num_images", 3, "--labels", 9, 0, 2)
    np.testing.assert_array_equal(pixels(by_name), pixels(by_number))
    assert json.loads((by_name / "settings.json").read_text())["classes"] == ["9: 10", "0: 1", "2: 3"]
    export_pipeline(trained, tmp_path / "pipeline")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True)
    assert pipeline._labels(["10", 10, 0, "3", 3]).tolist() == [9, 9, 0, 2, 2]
    with pytest.raises(ValueError, match=r"class_labels must be names of classes \(1, 2, .* from 0 to 9, got 11"):
        pipeline._labels(11)


def test_labels_matter(strong_run, draw):
    one, other = (pixels(draw(f"{label}", strong_run, "--num_images", 2, "--labels", label)) for label in (1, 2))
    assert not np.array_equal(one, other)


def test_default_labels_are_all_classes_in_turn(strong_run, draw):
    default = pixels(draw("default", strong_run, "--num_images", 12))
    listed = pixels(draw("listed", strong_run, "--num_images", 12, "--labels", *range(10)))
    np.testing.assert_array_equal(default, listed)


def test_images_depend_on_the_seed(strong_run, draw):
    one, other = (pixels(draw(f"{seed}", strong_run, "--num_images", 2, "--seed", seed)) for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_images_do_not_depend_on_the_batch_size(strong_run, draw):
    one = pixels(draw("one", strong_run, "--num_images", 5, "--batch_size", 2))
    other = pixels(draw("other", strong_run, "--num_images", 5))
    assert np.abs(one.astype(int) - other).max() <= 1  # float32 rounding before the rounding to bytes


def test_images_are_not_overwritten_unasked(strong_run, draw, run_cli):
    folder = draw("images", strong_run, "--num_images", 2)
    before = pixels(folder)
    status, _, err = run_cli("sample", strong_run, "--output", folder, *SAMPLE, "--seed", 5)
    assert status == 1
    assert "choose another --output, --resume to draw only the missing ones, or --overwrite" in err
    np.testing.assert_array_equal(pixels(folder), before)
    assert json.loads((folder / "settings.json").read_text())["seed"] == 0


def test_overwrite_replaces_images(strong_run, draw):
    before = pixels(draw("images", strong_run, "--num_images", 2))
    after = pixels(draw("images", strong_run, "--num_images", 2, "--seed", 5, "--overwrite"))
    assert not np.array_equal(before, after)


def test_overwrite_removes_what_sample_drew_and_nothing_else(strong_run, draw, run_cli):
    folder = draw("images", strong_run, "--num_images", 3)
    for name in ("7.png", "000009.png", "notes.txt"):
        (folder / name).write_text("mine")
    (folder / ".000001.png.999999999.partial").write_text("of a process that was killed")
    draw("images", strong_run, "--num_images", 2, "--seed", 5, "--overwrite")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("000000.png", "000001.png", "000009.png", "7.png", "grid.png", "notes.txt", "settings.json"),
    ]
    status, _, err = run_cli("sample", strong_run, "--output", folder, *SAMPLE, "--num_images", 10, "--overwrite")
    assert (status, "holds 000009.png, which was not drawn there by sample" in err) == (1, True), err
    assert (folder / "000009.png").read_text() == "mine"


@pytest.mark.parametrize("content", ["mine", "[]", '{"seed": 3}'])
def test_record_of_something_else_is_not_replaced(strong_run, run_cli, tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "settings.json").symlink_to(tmp_path / "mine.json")
    status, _, err = run_cli("sample", strong_run, "--output", tmp_path / "images", *SAMPLE, "--overwrite")
    assert (status, "was not written for images and is not replaced" in err) == (1, True), err
    assert (tmp_path / "mine.json").read_text() == content


def test_overwriting_that_is_cut_off_leaves_none_of_the_old_images(strong_run, draw, monkeypatch, run_cli):
    folder = draw("images", strong_run, "--num_images", 3)
    monkeypatch.setattr("unet_diffusion.runtime.pictures.save_images", lambda *args, **options: 1 / 0)
    options = ["--num_images", 3, "--seed", 5]
    assert run_cli("sample", strong_run, "--output", folder, *SAMPLE, *options, "--overwrite")[0] == 1
    monkeypatch.undo()
    draw("images", strong_run, *options, "--resume")
    np.testing.assert_array_equal(pixels(folder), pixels(draw("fresh", strong_run, *options)))


@pytest.mark.parametrize("name", ["config.yaml", "samples.png", "pipeline"])
def test_files_of_others_in_the_run_folder_are_found_before_training(run_cli, tiny_digits, tmp_path, name):
    (tmp_path / name).write_text("mine")
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", tmp_path)
    assert (status, f"{tmp_path} holds {name} that no run has written there" in err) == (1, True), err
    assert (tmp_path / name).read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [tmp_path / name]


def test_files_of_others_in_the_pipeline_of_a_run_are_found_before_training_goes_on(
    run_cli, tiny_digits, digits_run, tmp_path
):
    run = copy_of(digits_run, tmp_path)
    (run / "pipeline" / "notes.txt").write_text("mine")
    before = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", run, "--trainer.max_steps", 9)
    assert (status, "not exported there (notes.txt)" in err) == (1, True), err
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_resume_draws_only_what_is_missing_as_it_was(strong_run, draw):
    folder = draw("images", strong_run, "--num_images", 4, "--scheduler", "DDPMScheduler")
    before, kept = pixels(folder), (folder / "000002.png").stat().st_mtime_ns
    (folder / "000001.png").unlink()
    (folder / "000003.png").unlink()
    draw("images", strong_run, "--num_images", 4, "--scheduler", "DDPMScheduler", "--resume")
    assert np.abs(pixels(folder).astype(int) - before).max() <= 1  # as in another batch size
    assert (folder / "000002.png").stat().st_mtime_ns == kept


def test_resume_with_other_settings_is_refused(strong_run, draw, run_cli):
    folder = draw("images", strong_run, "--num_images", 2)
    status, _, err = run_cli("sample", strong_run, "--output", folder, *SAMPLE, "--resume", "--seed", 5)
    assert status == 1
    assert "made with other settings (seed: 0 there, 5 here); choose another --output, or --overwrite" in err


def train_on(run) -> None:
    """Other weights in a run's checkpoint, as more steps would leave them."""
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["state_dict"] = {
        name: value + 0.1 if value.is_floating_point() else value for name, value in checkpoint["state_dict"].items()
    }
    torch.save(checkpoint, last)


@pytest.mark.parametrize("name", ["checkpoint", "autoguidance"])
def test_resume_does_not_mix_two_models_behind_the_same_path(strong_run, draw, run_cli, tmp_path, name):
    run = shutil.copytree(strong_run, tmp_path / "run")
    networks = {"checkpoint": [run], "autoguidance": [strong_run, "--guidance_scale", 2, "--autoguidance", run]}[name]
    folder = draw("images", *networks, "--num_images", 2)
    before = pixels(folder)
    train_on(run)
    command = ["sample", *networks, "--output", folder, *SAMPLE, "--num_images", 3]
    status, _, err = run_cli(*command, "--resume")
    assert (status, f"made with other settings (contents of {name}); choose another --output" in err) == (1, True), err
    np.testing.assert_array_equal(pixels(folder), before)
    assert run_cli(*command, "--overwrite")[0] == 0
    np.testing.assert_array_equal(pixels(folder), pixels(draw("fresh", *networks, "--num_images", 3)))


@pytest.mark.parametrize("moment", ["removing", "record", "first", "second", "third", "grid"])
def test_overwriting_that_is_killed_at_any_moment_and_resumed_is_a_fresh_run_or_refused(
    strong_run, draw, run_cli, monkeypatch, moment
):
    """None of the old images may stand under the new settings."""
    folder = draw("images", strong_run, "--num_images", 3)
    num_replaced = {"removing": 9, "record": 0, "first": 1, "second": 2, "third": 3, "grid": 4}[moment]
    replaced, removed, replace, unlink = [], [], os.replace, Path.unlink

    def killed_replace(source, place):
        if len(replaced) == num_replaced:
            raise KeyboardInterrupt
        replaced.append(place)
        replace(source, place)

    def killed_unlink(path, missing_ok=False):
        if moment == "removing" and len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr("os.replace", killed_replace)
    monkeypatch.setattr(Path, "unlink", killed_unlink)
    new = ["--num_images", 3, "--seed", 1, "--batch_size", 1]
    assert run_cli("sample", strong_run, "--output", folder, *SAMPLE, *new, "--overwrite")[0] == 130
    monkeypatch.undo()
    status, _, err = run_cli("sample", strong_run, "--output", folder, *SAMPLE, *new, "--resume")
    if moment in ("removing", "record"):  # what is left is of the old settings, as the record says
        assert (status, "made with other settings (seed: 0 there, 1 here)" in err) == (1, True), err
        new = ["--num_images", 3, "--batch_size", 1]
        draw("images", strong_run, *new, "--resume")
    else:
        assert status == 0, err
        assert json.loads((folder / "settings.json").read_text())["seed"] == 1
    np.testing.assert_allclose(pixels(folder).astype(int), pixels(draw("fresh", strong_run, *new)), atol=1)


def test_sample_in_bfloat16_is_near_the_one_in_float32(strong_run, draw):
    exact = pixels(draw("float32", strong_run, "--num_images", 2)).astype(int)
    rounded = pixels(draw("bfloat16", strong_run, "--num_images", 2, "--precision", "bfloat16")).astype(int)
    assert 0 < np.abs(rounded - exact).mean() < 10


# ----------------------------------------------------------------------------------------- sample: size, start, windows


@pytest.fixture
def picture(tmp_path):
    """An 8x8 picture of noise, and a mask of it whose right half is to be painted."""
    noise = np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    Image.fromarray(np.repeat([[0] * 4 + [255] * 4], 8, axis=0).astype(np.uint8)).save(tmp_path / "mask.png")
    return noise


def test_image_size_need_not_be_that_of_training(strong_run, draw):
    assert pixels(draw("wide", strong_run, "--num_images", 2, "--image_size", 8, 24)).shape == (2, 8, 24)


def test_window_that_covers_the_image_changes_nothing_and_a_smaller_one_does(strong_run, draw):
    size = ("--num_images", 2, "--image_size", 16, 16)
    whole = pixels(draw("whole", strong_run, *size))
    np.testing.assert_array_equal(pixels(draw("covered", strong_run, *size, "--window", 16)), whole)
    half = pixels(draw("windows", strong_run, *size, "--window", 8))
    assert not np.array_equal(half, whole)
    np.testing.assert_array_equal(pixels(draw("half", strong_run, *size, "--window", 8, "--overlap", 0.5)), half)
    assert not np.array_equal(pixels(draw("quarter", strong_run, *size, "--window", 8, "--overlap", 0.25)), half)


def test_images_from_a_picture_are_nearer_to_it_the_less_the_strength(strong_run, draw, picture, tmp_path):
    arguments = ("--num_images", 2, "--image", tmp_path / "image.png", "--num_inference_steps", 10)
    distances = [
        np.abs(pixels(draw(f"{strength}", strong_run, *arguments, "--strength", strength)).astype(int) - picture).mean()
        for strength in (0.1, 1.0)
    ]
    assert 0 < distances[0] < distances[1]


def test_black_of_the_mask_stays_as_in_the_picture_and_white_is_painted(strong_run, draw, picture, tmp_path):
    arguments = ("--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png")
    images = pixels(draw("painted", strong_run, "--num_images", 3, *arguments))
    np.testing.assert_array_equal(images[:, :, :4], np.broadcast_to(picture[:, :4], (3, 8, 4)))
    assert all(not np.array_equal(image[:, 4:], picture[:, 4:]) for image in images)
    settings = json.loads((tmp_path / "painted" / "settings.json").read_text())
    assert (settings["image"], settings["mask"]) == (str(tmp_path / "image.png"), str(tmp_path / "mask.png"))


@pytest.mark.parametrize("name", ["image", "mask"])
def test_resume_needs_the_same_picture_behind_the_same_path(strong_run, draw, run_cli, picture, tmp_path, name):
    options = ("--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png")
    folder = draw("images", strong_run, "--num_images", 1, *options)
    draw("images", strong_run, "--num_images", 2, *options, "--resume")
    changed = np.array(Image.open(tmp_path / f"{name}.png"))
    Image.fromarray(np.roll(changed, 1, axis=1)).save(tmp_path / f"{name}.png")
    arguments = ["--output", folder, *SAMPLE, *options, "--num_images", 3, "--resume"]
    status, _, err = run_cli("sample", strong_run, *arguments)
    assert (status, f"made with other settings (contents of {name})" in err) == (1, True), err


def test_frames_between_two_seeds_begin_and_end_with_their_first_images(strong_run, draw):
    frames = pixels(draw("frames", strong_run, "--num_images", 3, "--labels", 3, "--interpolate", 4, 9))
    for frame, seed in ((0, 4), (2, 9)):
        image = pixels(draw(f"seed{seed}", strong_run, "--num_images", 1, "--labels", 3, "--seed", seed))[0]
        assert np.abs(frames[frame].astype(int) - image).max() <= 1  # as in another batch size
    assert not np.array_equal(frames[0], frames[1])


@pytest.mark.parametrize(
    ("options", "changed", "name"),
    [
        (["--interpolate", 1, 2, "--labels", 3, "--num_images", 3], ["--num_images", 4], "num_images"),
        (["--num_images", 1], ["--image_size", 16, 16], "image_size"),
        (["--num_images", 1], ["--window", 8], "window"),
        (["--num_images", 1, "--window", 8], ["--overlap", 0.25], "overlap"),
        (["--num_images", 1, "--image", "{tmp}/image.png"], ["--strength", 0.5], "strength"),
    ],
)
def test_resume_needs_the_same_size_window_and_start(
    strong_run, draw, run_cli, picture, tmp_path, options, changed, name
):
    options = [str(option).format(tmp=tmp_path) for option in options]
    folder = draw("images", strong_run, *options)
    draw("images", strong_run, *options, "--resume")
    status, _, err = run_cli("sample", strong_run, "--output", folder, *SAMPLE, *options, *changed, "--resume")
    assert (status, f"with other settings ({name}: " in err) == (1, True), err


START_ERRORS = {
    "size": ("--image_size 8 13", "plus a multiple of 2 for this denoiser, got 8 13; the next size that fits"),
    "window": ("--window 7", "window must be 2 pixels plus a multiple of 2 for this denoiser, got 7; the next"),
    "no window": ("--window 0", "window must be"),
    "all overlap": ("--window 8 --overlap 1", "overlap must be in [0, 1), got 1.0; 0.5 is usual"),
    "negative overlap": ("--window 8 --overlap -0.25", "overlap must be in [0, 1), got -0.25"),
    "overlap of nothing": ("--overlap 0.25", "overlap needs windows; give window, too"),
    "mask alone": ("--mask {tmp}/mask.png", "mask needs an image; give image, too"),
    "strength alone": ("--strength 0.5", "strength needs an image"),
    "no picture": ("--image {tmp}/none.png", "image must be an image file, and there is none at"),
    "text": ("--image {tmp}/text.ckpt", "text.ckpt cannot be read as an image"),
    "small": ("--image {tmp}/image.png --image_size 16 16", "too small: 8x8, must be at least 16x16"),
    "strength": ("--image {tmp}/image.png --strength 1.5", "strength must be in (0, 1], got 1.5"),
    "no step": ("--image {tmp}/image.png --strength 0.01", "0.01 of 25 steps is none"),
    "scheduler": ("--image {tmp}/image.png --scheduler LMSDiscreteScheduler", "cannot start from an image"),
    "other mask": ("--image {tmp}/image.png --mask {tmp}/large.png", "as large as image, 8x8, got 9x8; resize it"),
    "black mask": ("--image {tmp}/image.png --mask {tmp}/black.png", "black.png has no white"),
    "one seed": ("--interpolate 3 3", "two different seeds, got 3 twice"),
    "one frame": ("--interpolate 1 2 --num_images 1", "at least 2 images, got num_images 1"),
    "noisy": ("--interpolate 1 2 --scheduler DDPMScheduler", "adds no noise, got DDPMScheduler; use one of DDIM"),
    "all classes": ("--interpolate 1 2", "draws a single class or caption, got 10 labels; give one"),
}


@pytest.mark.parametrize("case", START_ERRORS)
def test_wrong_size_or_start_is_refused_before_anything_is_written(case, digits_run, run_cli, picture, tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    Image.new("L", (8, 9)).save(tmp_path / "large.png")
    options, message = START_ERRORS[case]
    arguments = options.format(tmp=tmp_path).split()
    status, _, err = run_cli("sample", digits_run, "--output", tmp_path / "images", "--device", "cpu", *arguments)
    assert (status, message in err) == (1, True), err
    assert not (tmp_path / "images").exists()


# ----------------------------------------------------------------------------------------------------- export, import


def test_export_writes_the_pipeline_that_fit_writes(digits_run, run_cli, tmp_path):
    status, out, err = run_cli("export", digits_run, tmp_path / "pipeline")
    assert status == 0, err
    assert str(tmp_path / "pipeline") in out
    one, other = (import_pipeline(run / "pipeline") for run in (digits_run, tmp_path))
    torch.testing.assert_close(one.unet.state_dict(), other.unet.state_dict(), rtol=0, atol=0)
    assert (one.null_label, one.class_names) == (other.null_label, other.class_names)


def test_export_overwrites_only_when_asked(digits_run, run_cli, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    status, _, err = run_cli("export", digits_run, tmp_path / "kept")
    assert status == 1
    assert str(tmp_path / "kept") in err
    assert (tmp_path / "kept" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("num_moves", [0, 1])  # of the old folder away, and of the new one into its place
def test_export_that_was_killed_and_is_given_again_after_more_training_is_a_fresh_one(
    strong_run, run_cli, tmp_path, monkeypatch, num_moves
):
    run, moves, replace = shutil.copytree(strong_run, tmp_path / "run"), [], os.replace

    def killed(source, place):
        if Path(source).is_dir() and moves.append(place) is None and len(moves) > num_moves:
            raise KeyboardInterrupt
        replace(source, place)

    assert run_cli("export", run, tmp_path / "pipeline")[0] == 0
    train_on(run)
    monkeypatch.setattr("os.replace", killed)
    assert run_cli("export", run, tmp_path / "pipeline", "--overwrite")[0] == 130
    monkeypatch.undo()
    train_on(run)
    for options in ([tmp_path / "pipeline", "--overwrite"], [tmp_path / "fresh"]):
        status, _, err = run_cli("export", run, *options)
        assert status == 0, err
    again, fresh = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "pipeline", tmp_path / "fresh")
    )
    assert again == fresh


def test_imported_pipeline_is_trained_on(digits_run, run_cli, tmp_path, tiny_digits, monkeypatch):
    checkpoint = tmp_path / "imported" / "first.ckpt"
    status, out, err = run_cli("import", digits_run / "pipeline", checkpoint)
    assert status == 0, err
    assert f"--config {checkpoint.with_suffix('.yaml')} --ckpt_path {checkpoint}" in out
    seen = []
    monkeypatch.setattr(
        "unet_diffusion.training.DiffusionModule.on_train_start",
        lambda module: seen.append({key: value.clone() for key, value in module.unet.state_dict().items()}),
    )
    recipe = ["--config", checkpoint.with_suffix(".yaml"), "--ckpt_path", checkpoint]
    status, _, err = run_cli("fit", *tiny_digits, *recipe, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    torch.testing.assert_close(seen, [import_pipeline(digits_run / "pipeline").unet.state_dict()], rtol=0, atol=0)
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_imported_configuration_makes_the_network_by_itself(digits_run, run_cli, tmp_path):
    run_cli("import", digits_run / "pipeline", tmp_path / "first.ckpt")
    model = yaml.safe_load((tmp_path / "first.yaml").read_text())["model"]
    expected = read_denoiser(digits_run / "checkpoints" / "last.ckpt")
    assert DenoiserUNet(**model["unet"]["init_args"]).config == expected.unet.config
    assert model["schedule"]["init_args"] == expected.schedule.config


def test_import_overwrites_nothing(digits_run, run_cli, tmp_path):
    (tmp_path / "first.yaml").write_text("mine")
    status, _, err = run_cli("import", digits_run / "pipeline", tmp_path / "first.ckpt")
    assert status == 1
    assert "first.yaml exists and is not overwritten" in err
    assert not (tmp_path / "first.ckpt").exists()


# ------------------------------------------------------------------------------------------------------- errors, help


def unconditional(tmp_path):
    from unet_diffusion.diffusion.schedule import NoiseSchedule
    from unet_diffusion.inference.denoiser import Denoiser
    from unet_diffusion.inference.record import save_denoiser

    unet = DenoiserUNet(1, (4, 4), norm_num_groups=2, layers_per_block=1)
    save_denoiser(Denoiser(unet, NoiseSchedule(10), (1, 8, 8)), tmp_path / "unconditional.ckpt")
    return tmp_path / "unconditional.ckpt"


ERRORS = {
    "missing checkpoint": ("sample {tmp}/none.ckpt", "none.ckpt"),
    "no checkpoint": ("sample {tmp}/text.ckpt", "text.ckpt is no checkpoint"),
    "bad scheduler": ("sample {run} --scheduler Euler", "scheduler must be one of"),
    "unknown name": ("sample {run} --labels eleven", "labels must be names of classes (0, 1, 2"),
    "number out of range": ("sample {run} --labels 10", "got '10'"),
    "labels without classes": ("sample {unconditional} --labels 1", "trained without labels; leave labels out"),
    "guidance without classes": ("sample {unconditional} --guidance_scale 2", "guidance_scale must be 1"),
    "no images": ("sample {run} --num_images 0", "num_images must be at least 1, got 0"),
    "no batch": ("sample {run} --batch_size 0", "batch_size must be at least 1, got 0"),
    "too many steps": ("sample {run} --num_inference_steps 1001", "got 1001"),
    "export of nothing": ("export {tmp}/none {tmp}/out", "none"),
    "import of nothing": ("import {tmp}/none {tmp}/out.ckpt", "none"),
    "grid's guidance": ("fit {tiny} --model.label_dropout 0 --model.unet.init_args.num_class_embeds 10", "with a null"),
    "grid's steps": ("fit {tiny} --samples.num_inference_steps 1001", "got 1001"),
    "network and data": ("fit {tiny} --model.unet.init_args.num_class_embeds 5", "num_class_embeds must be 11"),
    "setting": ("fit {tiny} --model.ema_decay 2", "ema_decay must be in [0, 1), got 2"),
    "missing ckpt_path": ("fit {tiny} --ckpt_path {tmp}/none.ckpt", "none.ckpt"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_is_one_message_and_exit_status_1(case, digits_run, run_cli, tmp_path, tiny_digits):
    command, message = ERRORS[case]
    (tmp_path / "text.ckpt").write_text("hello")
    places = {
        "tmp": tmp_path,
        "run": digits_run,
        "unconditional": unconditional(tmp_path),
        "tiny": " ".join(tiny_digits),
    }
    arguments = command.format(**places).split()
    arguments += {
        "sample": ["--output", tmp_path / "images"],
        "fit": ["--trainer.default_root_dir", tmp_path / "new"],
    }.get(arguments[0], [])
    status, out, err = run_cli(*arguments)
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("unet-diffusion: error:")]
    assert message in line
    assert "Traceback" not in out + err


def test_failed_sample_leaves_no_folder(digits_run, run_cli, tmp_path):
    run_cli("sample", digits_run, "--output", tmp_path / "images", "--labels", "eleven")
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("command", ["sample {tmp}/none.ckpt", "fit {tiny} --model.ema_decay 2"])
def test_traceback_shows_where_an_error_came_from(command, tmp_path, tiny_digits):
    arguments = command.format(tmp=tmp_path, tiny=" ".join(tiny_digits)).split()
    with pytest.raises((FileNotFoundError, ValueError)):
        cli.main([*arguments, "--traceback"])


def test_error_without_a_message_is_named(run_cli, monkeypatch, tmp_path):
    def fail(path, **options):
        raise MemoryError

    monkeypatch.setattr("unet_diffusion.inference.loading.load_denoiser", fail)
    _, _, err = run_cli("sample", tmp_path)
    assert "unet-diffusion: error: MemoryError" in err


@pytest.mark.parametrize(
    "arguments", [(), ("train",), ("sample",), ("sample", "x.ckpt", "--number", "3"), ("fit", "--x")]
)
def test_wrong_usage_has_exit_status_2(run_cli, arguments):
    status, _, err = run_cli(*arguments)
    assert status == 2
    assert re.fullmatch(r"unet-diffusion: error: .+\n", err)  # a line, and not all of the usage


OPTIONS = {
    "sample": "CHECKPOINT --num_images --scheduler --num_inference_steps --guidance_scale --labels --seed --output "
    "--image_size --window --overlap --image --strength --mask --noise_level --interpolate --overwrite --resume "
    "--batch_size --device --precision --speed",
    "segment": "CHECKPOINT IMAGES --output --instances --overlays --probabilities --views --threshold --min_size "
    "--overwrite --window_size --device --precision --speed",
    "export": "CHECKPOINT DIR --overwrite",
    "import": "DIR CHECKPOINT",
    "fit": "--config --print_config --ckpt_path --seed_everything --model.unet --model.schedule --model.optimizer "
    "--model.lr_warmup_steps --model.lr_decay --model.ema_decay --model.loss_weighting --model.label_dropout "
    "--model.speed --model.seed --data --trainer.max_steps --trainer.default_root_dir --trainer.precision "
    "--samples.every_n_steps --samples.num_images --samples.scheduler --samples.num_inference_steps "
    "--samples.guidance_scale --samples.seed --checkpoint.every_n_train_steps",
}
OPTIONS["validate"] = OPTIONS["fit"]


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_mentions_its_options(run_cli, command):
    status, out, _ = run_cli(command, "--help")
    assert status == 0
    assert [option for option in OPTIONS[command].split() if option not in out] == []


def test_help_mentions_every_command(run_cli):
    status, out, _ = run_cli("--help")
    assert status == 0
    assert [command for command in OPTIONS if f"\n    {command} " not in out] == []


def test_console_script_fails_with_a_message_and_status_1(console_script, tmp_path):
    done = subprocess.run([console_script, "sample", "none.ckpt"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: CHECKPOINT must exist, got none.ckpt" in done.stderr
    assert "Traceback" not in done.stderr


MISSPELT = {
    "--config digitz": "there is no recipe or file digitz; did you mean digits?",
    "--config digits --modle.lr 3": "there is no option --modle.lr; did you mean model?",
    "--config digits --model.ema_decai 0.5": "there is no option model.ema_decai; did you mean model.ema_decay",
    "--config digits --data Digit": "data: there is no class Digit; did you mean Digits",
    "--config digits --samples.scheduler Euler": "samples.scheduler must be one of DDIMScheduler, ",
    "--config digits --model.lr_warmup_steps x": "model.lr_warmup_steps must be a whole number, got x",
    "--config {tmp}/misspelt.yaml": "there is no option trainer.max_stepz",
    "--config {tmp}/section.yaml": "there is no section 'modle' of {tmp}/section.yaml; did you mean model?",
    "--config {tmp}/broken.yaml": "broken.yaml must be YAML, and is not: ",
    "digits": "digits belongs to no option; did you mean --config digits?",
    "--config digits --allow ../mine": "--allow takes the name of a module, such as mine or mine.networks, got '../",
    "--config digits --task sing": "task must be one of denoise, adapt, segment, autoencode, got sing",
}


@pytest.mark.parametrize("arguments", MISSPELT)
def test_what_is_misspelt_is_told_in_a_line_with_what_was_meant(run_cli, tmp_path, arguments):
    (tmp_path / "misspelt.yaml").write_text("trainer:\n  max_stepz: 3\n")
    (tmp_path / "section.yaml").write_text("modle:\n  lr: 3\n")
    (tmp_path / "broken.yaml").write_text("trainer: [\n")
    status, _, err = run_cli("fit", *arguments.format(tmp=tmp_path).split())
    (line,) = [line for line in err.splitlines() if not line.startswith(" ")]
    meant = MISSPELT[arguments].format(tmp=tmp_path)
    assert (status, line.startswith("unet-diffusion: error: "), meant in line) == (2, True, True), err


def test_names_of_files_do_not_reach_the_terminal_as_escapes(run_cli, tmp_path):
    assert "got \\x1b[2Jred.ckpt" in run_cli("sample", "\x1b[2Jred.ckpt", "--output", tmp_path)[2]
    (tmp_path / "\x1b[2Jred.png").write_text("no image")
    (tmp_path / "images").mkdir()
    data = ImageDataModule(Folder(tmp_path, image_size=8), batch_size=1)
    with pytest.raises(ValueError, match=r"\\x1b\[2Jred\.png") as error:
        data.setup("fit")
    assert "\x1b" not in str(error.value)


WITHOUT_EFFECT = {
    "--trainer.max_steps 0": "trainer.max_steps must be 1 or more, or -1",
    "--trainer.max_steps -2": "trainer.max_steps must be -1 or more, got -2",
    "--trainer.gradient_clip_val -1": "trainer.gradient_clip_val must be 0 or more, got -1",
    "--trainer.gradient_clip_val .nan": "trainer.gradient_clip_val must be 0 or more, got nan",
    "--trainer.accumulate_grad_batches 0": "trainer.accumulate_grad_batches must be 1 or more, got 0",
    "--trainer.log_every_n_steps -1": "trainer.log_every_n_steps must be 0 or more, got -1",
    "--samples.every_n_steps -5": "samples.every_n_steps must be 0 or more, got -5",
    "--checkpoint.filename=": "checkpoint.filename must not be empty",
    "--model.schedule.init_args.num_train_timesteps 1000000000": "num_train_timesteps must be from 2 to 100000, got",
}


@pytest.mark.parametrize("arguments", WITHOUT_EFFECT)
def test_number_that_would_not_do_what_it_says_is_refused(run_cli, tiny_digits, tmp_path, arguments):
    root = ("--trainer.default_root_dir", tmp_path / "run")
    status, _, err = run_cli("fit", *tiny_digits, *root, *arguments.split())
    assert (status != 0, WITHOUT_EFFECT[arguments] in err) == (True, True), err
    assert not (tmp_path / "run").exists()


def test_random_weights_are_not_validated(run_cli, tiny_digits):
    status, _, err = run_cli("validate", *tiny_digits)
    assert (status, "--ckpt_path must name what is validated" in err) == (2, True), err


GROWING = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_steps: 1}\nmodel: {}\ntrainer: {max_steps: 2}\n", "trainer occurs twice, line 3, column 1"),
        ("trainer:\n  max_steps: 1\n  max_steps: 2\n", "max_steps occurs twice, line 3, column 3"),
        (GROWING, "must hold at most 100000 values"),
        ("trainer: &a {x: *a}\n", "must hold at most 100000 values"),
        (
            "data: {init_args: {source: {class_path: Folder, init_args: {root: ''}}}}\n",
            "data.root must be a folder or file, and is em",
        ),
        ("trainer: &a {max_steps: 1}\nmodel: {<<: *a, lr_warmup_steps: 1}\n", None),
    ],
)
def test_file_that_says_a_thing_twice_or_grows_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    arguments = ["fit", "--config", str(tmp_path / "x.yaml")]
    if message is None:
        assert check_arguments(arguments).task == "denoise"
        return
    with pytest.raises(UsageError, match=message):
        check_arguments(arguments)


def test_option_before_the_command_is_told(run_cli):
    assert "options follow the command, got --device before it" in run_cli("--device", "cpu", "sample")[2]


@pytest.mark.parametrize("name", ["picture", "picture-house"])  # which holds -h, as --help does
def test_missing_folder_is_told_with_one_that_is_there(tmp_path, name):
    (tmp_path / f"{name}s").mkdir()
    with pytest.raises(FileNotFoundError, match=f"did you mean {tmp_path}/{name}s?"):
        check_arguments(["fit", "--config", "folder", "--data.root", str(tmp_path / name)])


@pytest.mark.parametrize(
    "arguments",
    [
        "--config fashion_mnist --data.source.root made_by_it --data.source.download True",
        "--config cells --model.init_from null",
        "--config inpainting --data.source Shards --data.source.root s3://a/b",
        "--config folder --data mine.Flowers --data.root a/name --data.labels fine",
        "--config digits --ckpt_path last",
    ],
)
def test_what_is_no_missing_path_is_left_to_the_parser(arguments):
    checked = check_arguments(["fit", *arguments.split()])
    assert checked.words[3:] == arguments.split()[2:]
    assert checked.task == ("segment" if "cells" in arguments else "denoise")


def test_every_section_of_the_parsers_is_known():
    """Of fit and of validate, whose arguments are looked at before there is a parser."""
    sections = set()

    class Parsed(TrainingCLI):
        def parse_arguments(self, parser, args):
            for subparser in parser._subcommands_action._name_parser_map.values():
                sections.update(action.dest.split(".")[0] for action in subparser._actions)
            raise UsageError

    with pytest.raises(UsageError):
        Parsed(
            "denoise",
            [],
            subclass_mode_data=True,
            args=["fit"],
            trainer_class=RunTrainer,
            auto_configure_optimizers=False,
        )
    assert sections <= {*fit_arguments.SECTIONS, *fit_arguments.FLAGS}
    assert {"model", "trainer", "verbose", "samples"} <= sections


def test_only_speed_and_precision_are_kept_when_they_are_auto():
    before = {"model": {"speed": "fused"}, "trainer": {"precision": "32-true", "devices": 2}}
    now = {"model": {"speed": "auto"}, "trainer": {"precision": "auto", "devices": "auto"}}
    assert changes(before, now) == ["trainer.devices was 2, is auto"]


def test_recipes_are_listed_shown_and_copied(run_cli, tmp_path):
    status, out, _ = run_cli("recipes")
    names = [path.stem for path in CONFIGS.glob("*.yaml")]
    assert (status, [name for name in names if f"\n{name} " not in f"\n{out}"]) == (0, [])
    assert run_cli("recipes", "show", "digits")[1] == (CONFIGS / "digits.yaml").read_text()
    assert run_cli("recipes", "copy", "digits", tmp_path / "mine.yaml")[0] == 0
    assert (tmp_path / "mine.yaml").read_bytes() == (CONFIGS / "digits.yaml").read_bytes()
    status, _, err = run_cli("recipes", "copy", "cells", tmp_path / "mine.yaml")
    assert (status, "mine.yaml exists and is not overwritten" in err) == (1, True)
    assert (tmp_path / "mine.yaml").read_bytes() == (CONFIGS / "digits.yaml").read_bytes()


def test_file_comes_before_a_recipe_of_its_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cells").mkdir()
    assert recipe_path("cells") == CONFIGS / "cells.yaml"
    (tmp_path / "digits").write_text("model:\n")
    assert recipe_path("digits") == Path("digits")


def test_options_of_fit_that_the_tab_key_completes_are_those_of_its_parser(run_cli, tmp_path):
    values = {
        "--trainer.max_steps": 7,
        "--trainer.default_root_dir": str(tmp_path / "run"),
        "--trainer.devices": 2,
        "--trainer.precision": "32-true",
        "--data.root": str(tmp_path),
        "--data.batch_size": 3,
        "--model.speed": "plain",
        "--ckpt_path": "last",
    }
    assert {*values, "--print_config"} == set(FIT_OPTIONS)
    given = [word for option, value in values.items() for word in (option, value)]
    status, out, err = run_cli("fit", "--config", "folder", *given, "--print_config")
    assert status == 0, err
    settings = yaml.safe_load(out)
    for option, value in values.items():
        setting = settings
        long = option.replace("data.root", "data.init_args.source.init_args.root").replace(
            "data.batch_size", "data.init_args.batch_size"
        )
        for part in long.removeprefix("--").split("."):
            setting = setting[part]
        assert str(setting) == str(value), option


def test_choices_of_commands_are_those_of_the_rooms_behind_them():
    from unet_diffusion.models import speed
    from unet_diffusion.runtime import precision

    assert get_args(Speed) == speed.SPEEDS
    assert get_args(Precision) == ("auto", *precision.PRECISIONS)


@pytest.mark.parametrize(("there", "device"), [((True, True), "cuda"), ((False, True), "mps"), ((False, False), "cpu")])
def test_device_auto_is_the_first_that_is_there(monkeypatch, there, device):
    from unet_diffusion.runtime.processes import own_device

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there[0])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there[1])
    assert own_device("auto") == device
    assert own_device("cpu") == "cpu"


def test_version_and_module_are_those_of_the_installed_package():
    from importlib.metadata import version

    command = [sys.executable, "-m", "unet_diffusion", "--version"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out == f"unet-diffusion {version('unet-diffusion')}\n"


def test_module_of_the_current_folder_is_not_imported_in_place_of_one_of_ours(tmp_path):
    """It may be the folder of somebody's images; python -m looks there first."""
    for name in ("tqdm", "yaml", "torch", "argparse", "typing"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\n")
    command = [sys.executable, "-m", "unet_diffusion", "sample", "none.ckpt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "error: CHECKPOINT must exist, got none.ckpt" in done.stderr
    assert not (tmp_path / "ran").exists()
