"""unet-diffusion evaluate: which data it takes, where it writes, and that several processes are as one."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from forked import run_python
from PIL import Image

from unet_diffusion.commands.parsing import parsed
from unet_diffusion.evaluation import own_features as own
from unet_diffusion.evaluation.evaluation import subject_of
from unet_diffusion.runtime.pictures import save_images

FEW = ("--num_images=12", "--num_inference_steps=2", "--batch_size=5", "--device=cpu", "--precision=float32")


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setitem(own.SETTINGS, "num_steps", 3)


def stored(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_run_is_evaluated_with_its_own_data_into_its_own_folder(few_steps, run_cli, digits_run, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    status, out, err = run_cli("evaluate", run, *FEW)
    assert status == 0, err
    assert out.startswith("Are the samples like the real images?\n  Fréchet distance: ")
    assert f"{run / 'evaluation' / 'evaluation.html'} explains it with pictures" in out
    found = stored(run / "evaluation")
    assert found["subject"] == str(run)
    assert found["protocol"]["held-out images"] == 20  # as the run's configuration has it
    checkpoint = run / "checkpoints" / "last.ckpt"
    status, out, err = run_cli("evaluate", checkpoint, *FEW)  # the same model, and what is there is kept
    assert status == 0, err
    assert stored(run / "evaluation")["figures"] == found["figures"]


def test_data_are_changed_by_options_of_fit(few_steps, run_cli, digits_run, tmp_path):
    status, _, err = run_cli("evaluate", digits_run, *FEW, "--output", tmp_path, "--data.num_val", "30")
    assert status == 0, err
    assert stored(tmp_path)["protocol"]["held-out images"] == 30


@pytest.fixture
def folder_of_images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        pixels = torch.randint(256, (8, 8), generator=generator).to(torch.uint8).numpy()
        (tmp_path / "images" / str(i % 10)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels)).save(tmp_path / "images" / str(i % 10) / f"{i}.png")
    return tmp_path / "images"


def test_model_without_a_configuration_is_evaluated_on_data_that_are_named(
    few_steps, run_cli, digits_run, folder_of_images, tmp_path
):
    shutil.copy(digits_run / "checkpoints" / "last.ckpt", tmp_path / "model.ckpt")
    data = f"--data.source Folder --data.root {folder_of_images} --data.image_size 8 8 --data.channels 1".split()
    status, _, err = run_cli("evaluate", tmp_path / "model.ckpt", *FEW, *data, "--data.class_labels=true")
    assert status == 0, err
    found = stored(tmp_path / "model-evaluation")["protocol"]
    assert found["training images"] + found["held-out images"] == 40


def test_folder_of_images_is_compared_with_the_data_of_a_recipe(few_steps, run_cli, tmp_path):
    save_images(torch.rand(15, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1, tmp_path / "guided_1.5")
    status, out, err = run_cli("evaluate", tmp_path / "guided_1.5", "--config", "digits")
    assert status == 0, err
    assert "Fréchet distance" in out
    assert stored(tmp_path / "guided_1.5-evaluation")["protocol"]["samples"] == 15


def test_archives_by_their_numbers_are_images_and_no_model(tmp_path):
    for number in "01":
        (tmp_path / f"s-{number}.tar").touch()
    assert subject_of(tmp_path / "s-{0..1}.tar") == tmp_path / "s-{0..1}.tar"
    with pytest.raises(FileNotFoundError):
        subject_of(tmp_path / "s-{0..2}.tar")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("none", 1, "RUN must exist, got none"),
        ("{tmp}", 2, "does not say what it was trained on; give its data, with --config FILE, or with --data.source"),
        ("{run} --data.rot x", 2, "there is no option data.rot; it must be one of source"),
        ("{run} --data.source Folder --data.root none", 1, "data.root must be an existing folder or file, got none"),
        ("{run} --data.batch_size x", 2, "batch_size must be a whole number, got x"),
        ("{run} --data.batch_size 0", 1, "batch_size must be at least 1, got 0"),
        ("{run} --config digitz", 2, "there is no recipe or file digitz; did you mean digits"),
        ("{run} --scheduler Euler", 1, "--scheduler must be one of"),
        ("{run} --features inceptoin", 2, "--features must be one of own, inception, dinov2, clip, got inceptoin"),
        ("{run} --num_images 3", 1, "num_images must be at least 10, got 3; 1000 are usual"),
        ("{run} --data.source mine.Images", 2, "if you trust it, add --allow mine"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(run_cli, digits_run, tmp_path, words, status, said):
    asked = words.format(run=digits_run, tmp=tmp_path).split()
    found, _, err = run_cli("evaluate", *asked, "--output", tmp_path / "out", "--device", "cpu")
    assert (found, said in err) == (status, True), err
    assert len(err.strip().splitlines()) <= 2, err
    assert not (tmp_path / "out").exists()


def test_options_of_data_are_read_as_fit_reads_them():
    words = "runs/x --data.root=a=b --data.image_size 16 24 --seed 3 --data.source Folder --data num_val=3"
    _, values = parsed("evaluate", words.split())
    assert values["data"] == ["root=a=b", "image_size=16", "24", "source=Folder", "num_val=3"]
    assert values["seed"] == 3


@pytest.mark.slow
def test_two_processes_find_what_one_finds(digits_run, tmp_path):
    def run(processes, output):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        command = [*torchrun, "-m", "unet_diffusion", "evaluate", digits_run, *FEW, "--output", output]
        done = run_python(command, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("explains it with pictures") == 1
        return stored(output)["figures"]

    alone, together = run("1", tmp_path / "one"), run("2", tmp_path / "two")
    assert alone.keys() == together.keys()
    for key, figure in alone.items():
        numbers = [np.nan if one["value"] is None else one["value"] for one in (together[key], figure)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-6, nan_ok=True), key
    names = [sorted(path.name for path in (tmp_path / name / "samples").iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]


FIT = ("--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--samples.num_images=2")


def test_run_of_a_segmenter_is_evaluated(run_cli, tmp_path):
    small = ("--model.unet.init_args.channels=[4,8]", "--data.num_images=24", "--data.window_size=32", *FIT)
    run = tmp_path / "run"
    assert run_cli("fit", "--config", "cells", *small, "--model.speed=plain", "--trainer.default_root_dir", run)[0] == 0
    status, out, err = run_cli("evaluate", run, "--device=cpu", "--precision=float32")
    assert status == 0, err
    assert {"dice_images", "dice_pooled"} <= set(stored(run / "evaluation")["figures"]), out


def test_run_of_an_autoencoder_is_evaluated(few_steps, run_cli, small_recipes, folder_of_images, tmp_path):
    run = tmp_path / "run"
    words = ("--config", small_recipes[0], "--data.root", folder_of_images, "--trainer.default_root_dir", run)
    status, _, err = run_cli("fit", *words, "--data.num_val", "20", "--data.image_size", "8")
    assert status == 0, err
    status, out, err = run_cli("evaluate", run, "--device=cpu", "--precision=float32")
    assert status == 0, err
    assert {"psnr_images", "rfid"} <= set(stored(run / "evaluation")["figures"]), out
