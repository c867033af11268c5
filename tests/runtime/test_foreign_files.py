"""Commands on files that come from anyone: what would run code is refused, and has not run it."""

import shutil
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def checkpoint_with_code(digits_run, tmp_path, marker, code):
    """The checkpoint of a run, and code beside its weights."""
    checkpoint = torch.load(digits_run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**checkpoint, "more": code(marker)}, tmp_path / "evil.ckpt")
    return tmp_path / "evil.ckpt"


def test_code_of_these_tests_does_run(checkpoint_with_code, marker):
    torch.load(checkpoint_with_code, weights_only=False)
    assert marker.exists()


COMMANDS = {
    "fit": "fit {tiny} --trainer.default_root_dir {tmp}/run --ckpt_path {file}",
    "validate": "validate {tiny} --trainer.default_root_dir {tmp}/run --ckpt_path {file}",
    "sample": "sample {file} --output {tmp}/drawn",
    "sample from the weaker": "sample {run} --output {tmp}/drawn --guidance_scale 2 --autoguidance {file}",
    "segment": "segment {file} {run}/samples --output {tmp}/masks",
    "export": "export {file} {tmp}/pipeline",
    "fit from a denoiser": "fit --config {configs}/cells.yaml --trainer.default_root_dir {tmp}/run "
    "--model.init_from {file} --trainer.accelerator cpu --data.num_images 4 "
    "--data.num_val 1",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_checkpoint_with_code_is_refused(
    run_cli, tiny_digits, digits_run, tmp_path, command, checkpoint_with_code, marker
):
    configs = tiny_digits[1].rpartition("/")[0]
    places = {"tiny": " ".join(tiny_digits), "tmp": tmp_path, "run": digits_run, "configs": configs}
    status, _, err = run_cli(*command.format(file=checkpoint_with_code, **places).split())
    assert status == 1
    assert (
        "evil.ckpt was not loaded: it must hold only tensors and plain values, got objects that could run code" in err
    )
    assert not marker.exists()


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/evil.ckpt", "memory://evil.ckpt", "{folder}", "registry:evil"])
def test_checkpoint_to_continue_from_is_a_file(run_cli, tiny_digits, tmp_path, path):
    path = path.format(folder=tmp_path)  # in a folder, torch.distributed keeps a pickle
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", tmp_path / "run", "--ckpt_path", path)
    assert status == 1
    assert f"ckpt_path must be a file, or one of last, best, hpc, got {path}" in err


def test_checkpoint_that_is_found_is_checked_as_well(
    run_cli, tiny_digits, tmp_path, checkpoint_with_code, marker, monkeypatch
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch's default then is to run code
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    shutil.copyfile(checkpoint_with_code, last)
    status, _, err = run_cli("fit", *tiny_digits, "--trainer.default_root_dir", tmp_path / "run", "--ckpt_path", "last")
    assert status == 1
    assert "last.ckpt was not loaded" in err
    assert not marker.exists()


def test_configuration_cannot_ask_for_code_to_be_loaded(run_cli, tiny_digits, tmp_path, checkpoint_with_code, marker):
    settings = {"ckpt_path": str(checkpoint_with_code), "weights_only": False}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings))
    run = ("--trainer.default_root_dir", tmp_path / "run")
    status, _, err = run_cli("fit", *tiny_digits, "--config", tmp_path / "x.yaml", *run)
    assert status == 1
    assert "weights_only must be true, got false" in err
    assert not marker.exists()


def test_settings_in_a_checkpoint_do_not_count(run_cli, tiny_digits, digits_run, tmp_path, marker):
    run = shutil.copytree(digits_run, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    command = {"class_path": "os.system", "init_args": {"command": f"touch {marker}"}}
    torch.save({**torch.load(last, weights_only=True), "hyper_parameters": {"optimizer": command}}, last)
    arguments = ("--trainer.default_root_dir", run, "--ckpt_path", last, "--trainer.max_steps", 5)
    status, _, err = run_cli("fit", *tiny_digits, *arguments)
    assert status == 0, err
    assert not marker.exists()


@pytest.mark.parametrize("name", ["best_model_path", "last_model_path", "kth_best_model_path"])
def test_checkpoint_cannot_have_other_files_removed(run_cli, tiny_digits, digits_run, tmp_path, name):
    run = shutil.copytree(digits_run, tmp_path / "run")
    last, precious = run / "checkpoints" / "last.ckpt", tmp_path / "precious"
    precious.mkdir()
    checkpoint = torch.load(last, weights_only=True)
    (saver,) = (state for state in checkpoint["callbacks"].values() if "best_model_path" in state)
    saver |= {"dirpath": str(run / "checkpoints"), name: f"{run}/checkpoints/../../precious"}
    torch.save(checkpoint, last)
    arguments = ("--trainer.default_root_dir", run, "--ckpt_path", last, "--trainer.max_steps", 8)
    status, _, err = run_cli("fit", *tiny_digits, *arguments)
    assert precious.exists()
    assert status == 1
    assert "must name files in its run folder, got" in err


def test_masks_are_written_nowhere_but_to_their_folder(run_cli, tmp_path, cells_checkpoint):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "x.png")
    for name in ("../outside.png", str(tmp_path / "outside.png")):
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            archive.write(tmp_path / "x.png", "inside.png")
            archive.writestr(zipfile.ZipInfo(name), (tmp_path / "x.png").read_bytes())
        status, _, err = run_cli("segment", cells_checkpoint, tmp_path / "set.zip", "--output", tmp_path / "masks")
        assert status == 1
        assert f"set.zip must be paths within it, got '{name}'" in err
        assert not (tmp_path / "outside.png").exists()


def test_picture_that_decodes_to_gigabytes_is_not_segmented(run_cli, tmp_path, cells_checkpoint, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "images" / "x.png")
    status, _, err = run_cli("segment", cells_checkpoint, tmp_path / "images", "--output", tmp_path / "masks")
    assert status == 1
    assert "x.png: an image must have at most 1000 pixels, got more than twice as many; reduce it" in err


@pytest.fixture
def cells_checkpoint(tmp_path):
    """Of an untrained tiny segmenter."""
    from unet_diffusion.inference.segmenter import Segmenter
    from unet_diffusion.models.segmentation_unet import SegmentationUNet

    unet = SegmentationUNet(1, 2, channels=(4, 8), padding="same")
    record = Segmenter(unet, "classes", ["background", "cell"], None, False, 64).record()
    weights = {f"ema_unet.{key}": value for key, value in unet.state_dict().items()}
    torch.save({"segmenter": record, "state_dict": weights}, tmp_path / "cells.ckpt")
    return tmp_path / "cells.ckpt"
