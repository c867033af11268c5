"""check: it says what will be trained on what, writes nothing, and fails where training would."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_diffusion.training.planning import FirstLook, TrySteps

SECTIONS = ("Data", "Plan")


def write_images(root: Path, number: int = 12, height: int = 40) -> list[str]:
    """Images of noise, and the arguments of a tiny run on them."""
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(number):
        Image.fromarray(rng.integers(256, size=(height, 40, 3), dtype=np.uint8)).save(root / f"{i}.png")
    unet = "--model.unet.init_args."
    return [
        *("--config", "folder", "--data.root", str(root), "--data.image_size", "16", "--data.batch_size", "4"),
        *(f"{unet}channels", "[8,8,8,8]", f"{unet}head_channels", "4", f"{unet}norm_num_groups", "4"),
        *("--data.num_val", "4", "--trainer.accelerator", "cpu", "--model.speed", "plain", "--trainer.precision"),
        *("32-true", "--trainer.max_steps", "5000", "--samples.num_inference_steps", "2"),
    ]


def test_help_names_the_command_and_the_options_of_fit(run_cli):
    status, out, _ = run_cli("check", "--help")
    assert status == 0
    assert "unet-diffusion check --config RECIPE" in out
    assert "--trainer.max_steps" in out


def test_sections_are_printed_and_nothing_is_written(run_cli, tiny_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run_cli("check", *tiny_digits, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    assert [line for line in out.splitlines() if line in SECTIONS] == list(SECTIONS)
    for words in ("1797 images of 1x8x8", "a step", "each image 0.072 times", "memory of"):
        assert words in out
    assert list(tmp_path.iterdir()) == []


def test_one_process_tries_the_steps_of_several(run_cli, tiny_digits, tmp_path):
    several = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "3"]
    status, out, err = run_cli("check", *tiny_digits, *several, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    assert "4 steps of 64 images" in out  # 32 for each process


def test_epochs_of_several_processes_have_fewer_steps(run_cli, tiny_digits, tmp_path, monkeypatch):
    validations, measured = [], TrySteps.measured
    monkeypatch.setattr(
        TrySteps,
        "measured",
        lambda self, trainer, number: validations.append(number) or measured(self, trainer, number),
    )
    several = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    several += ["--trainer.max_steps", "-1", "--trainer.max_epochs", "3"]
    several += ["--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "1.0"]
    status, out, err = run_cli("check", *tiny_digits, *several, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    assert "81 steps of 64 images" in out  # 1777 // 64 in an epoch
    assert "each image 2.92 times" in out
    assert validations == [3]


def test_a_finished_run_stays_as_it_is(run_cli, tiny_digits, digits_run):
    before = {path: path.stat().st_mtime_ns for path in digits_run.rglob("*")}
    status, _, err = run_cli("check", *tiny_digits, "--trainer.default_root_dir", digits_run)
    assert status == 0, err
    assert {path: path.stat().st_mtime_ns for path in digits_run.rglob("*")} == before


def test_what_deserves_it_is_found_in_a_folder(run_cli, tmp_path):
    arguments = write_images(tmp_path / "images", height=80)
    (tmp_path / "images" / "copy.png").write_bytes((tmp_path / "images" / "3.png").read_bytes())
    for i in range(12, 30):
        (tmp_path / "images" / f"{i}.png").write_bytes((tmp_path / "images" / f"{i - 12}.png").read_bytes())
    status, out, err = run_cli("check", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    for words in ("images are tall, and lose 50 %", "are trained on too, under other names", "look alike"):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_captions_are_looked_at(run_cli, tmp_path):
    arguments = write_images(tmp_path / "images")
    rows = [f"{i}.png,a picture of thing number {i} that points to the left" for i in range(12)]
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    text = '{"class_path": "unet_diffusion.diffusion.conditions.text.TextTokens", "init_args": {"context_dim": 8, '
    text += '"max_length": 8, "num_layers": 1, "num_heads": 2, "dropout": 0.0}}'
    arguments += ["--data.captions", "true", "--model.conditions+", text, "--model.unet.init_args.context_dim", "8"]
    status, out, err = run_cli("check", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    for words in ("12 of 12 captions are cut at 8 tokens", "words occur once", "of directions or signs", "guided"):
        assert words in out


def test_labels_are_looked_at(run_cli, tmp_path):
    arguments = "--config cells --data.num_images 6 --data.num_val 2 --data.window_size 32 --data.batch_size 1 "
    arguments += "--model.unet.init_args.channels [4,8] --trainer.accelerator cpu --trainer.precision 32-true"
    status, out, err = run_cli("check", *arguments.split(), "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    for words in ("Labels", "touch another", "warning: batch norm with batches of one"):
        assert words in out


def test_shards_are_looked_at_by_their_index(run_cli, streamed_digits, tmp_path):
    _, arguments = streamed_digits
    status, out, err = run_cli("check", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    assert "1797 images" in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.root", "none"], "data.root must be an existing folder"),
        (["--samples.guidance_scale", "2"], "set model.label_dropout above 0"),
        (["--data.image_size", "400"], "12 of 12 image files cannot be used"),
        (["--model.unet.init_args.in_channels", "1"], "the images have 3 channels"),
        (["--checkpoint.monitor", "val/los"], "monitor"),
    ],
)
def test_what_would_make_training_fail_is_an_error(run_cli, tmp_path, more, words):
    arguments = write_images(tmp_path / "images")
    status, out, err = run_cli("check", *arguments, "--trainer.default_root_dir", tmp_path / "run", *more)
    assert status != 0
    assert words in err
    assert "Plan" not in out


def test_fit_says_the_gravest_at_its_beginning(run_cli, tmp_path, caplog):
    arguments = write_images(tmp_path / "images", height=80)
    (tmp_path / "images" / "20.png").write_bytes((tmp_path / "images" / "3.png").read_bytes())
    options = ["--trainer.default_root_dir", tmp_path / "run", "--trainer.fast_dev_run", "true"]
    with caplog.at_level(logging.INFO):
        status, _, err = run_cli("fit", *arguments, *options)
    assert status == 0, err
    assert "advice: 13 of 13 images are tall" in caplog.text
    assert "note: " not in caplog.text
    assert "GPU available" in caplog.text
    assert "litlogger" not in caplog.text  # which Lightning advertises


def test_the_first_look_is_that_of_the_first_process(monkeypatch):
    trainer = type("Trainer", (), {"is_global_zero": False})()
    FirstLook().on_fit_start(trainer, None)  # asks for nothing
