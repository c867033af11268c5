"""`fit` that is cut off and given again, with images, settings or files of the run changed in between."""

import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from unet_diffusion.training import DiffusionModule
from unet_diffusion.training.checkpointing import WholeCheckpoints, newest_good

RNG = np.random.default_rng(0)


def draw_image(path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(RNG.integers(256, size=(8, 8), dtype=np.uint8)).save(path)


@pytest.fixture
def images(tmp_path):
    for number in range(20):
        draw_image(tmp_path / "images" / f"{number:02}.png")
    return tmp_path / "images"


@pytest.fixture
def fit(run_cli, tiny_digits, images, tmp_path):
    """Trains 6 steps, of 4 images each, on the 16 that are not kept apart; a checkpoint every 2 steps."""

    def run(name, *options) -> tuple[int, str]:
        arguments = ["--model.unet.init_args.num_class_embeds", "null", "--model.label_dropout", "0"]
        arguments += ["--data", "Folder", "--data.root", images, "--data.channels", 1]
        arguments += ["--data.image_size", 8, "--data.batch_size", 4, "--data.num_val", 4]
        arguments += ["--trainer.max_steps", 6, "--samples.every_n_steps", 0, "--samples.num_images", 2]
        arguments += ["--samples.guidance_scale", 1, "--trainer.default_root_dir", tmp_path / name]
        status, _, err = run_cli("fit", *tiny_digits, *arguments, *options)
        return status, err

    return run


@pytest.fixture
def killed(fit, monkeypatch, tmp_path):
    """A run that was cut off in its fourth step, in the middle of an epoch; a checkpoint of the second is left."""
    step, calls = DiffusionModule.training_step, []

    def training_step(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return step(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(DiffusionModule, "training_step", training_step)
        assert "killed" in fit("run")[1]
    assert newest_good(tmp_path / "run" / "checkpoints")[1] == 2
    return tmp_path / "run"


def last_of(run) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_run_goes_on_as_the_unbroken_one_with_the_same_images_in_another_order_of_times(fit, killed, images, tmp_path):
    for path in sorted(images.iterdir(), reverse=True):  # as a backup that was brought back would leave them
        shutil.copyfile(path, tmp_path / "copy.png")
        os.replace(tmp_path / "copy.png", path)
    status, err = fit("run")
    assert status == 0, err
    status, err = fit("unbroken")
    assert status == 0, err
    for name, weight in last_of(tmp_path / "unbroken")["state_dict"].items():
        assert torch.equal(last_of(killed)["state_dict"][name], weight), name


def test_run_does_not_go_on_with_another_image_under_the_same_name_unless_told(fit, killed, images):
    before = (killed / "checkpoints" / "last.ckpt").read_bytes()
    draw_image(images / "03.png")
    status, err = fit("run")
    assert (status, "trained on: 1 changed (03.png). Bring them back, or train on" in err) == (1, True), err
    assert (killed / "checkpoints" / "last.ckpt").read_bytes() == before
    with pytest.warns(UserWarning, match=r"1 changed \(03\.png\)$"):
        status, err = fit("run", "--ckpt_path", killed / "checkpoints" / "last.ckpt")
    assert status == 0, err
    status, err = fit("run")  # whose images they are now
    assert status == 0, err


def test_run_does_not_go_on_without_an_image_that_it_was_trained_on(fit, killed, images):
    (images / "03.png").unlink()
    status, err = fit("run")
    assert (status, "1 gone" in err) == (1, True), err


def test_run_goes_on_with_more_images_says_so_and_validates_on_none_that_it_was_trained_on(
    fit, killed, images, monkeypatch
):
    seen: dict[str, set] = {"training_step": set(), "validation_step": set()}
    for name, indices in seen.items():
        step = getattr(DiffusionModule, name)

        def recorded(self, batch, *args, step=step, indices=indices):
            files = self.trainer.datamodule.image_set.names
            indices.update(files[i] for i in batch["index"].tolist())
            return step(self, batch, *args)

        monkeypatch.setattr(DiffusionModule, name, recorded)
    state = last_of(killed)["ImageDataModule"]
    trained = {f"{i:02}.png" for i, is_val in enumerate(state["is_val"].tolist()) if not is_val}
    for number in range(20):
        draw_image(images / f"{number:02}b.png")  # between the others
    with pytest.warns(UserWarning, match=r"20 new \(00b\.png, 01b\.png, 02b\.png, 03b\.png, 04b\.png, \.\.\.\)"):
        status, err = fit("run")
    assert status == 0, err
    assert len(seen["validation_step"]) == 4
    assert not seen["validation_step"] & (trained | seen["training_step"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("model", "ema_decay", 0.5), "model.ema_decay was 0.995, is 0.5"),
        (("data", "init_args", {"seed": 3}), "data.init_args.seed was 0, is 3"),
    ],
)
def test_settings_of_a_run_that_were_edited_in_its_own_folder_are_noticed(killed, run_cli, changed, said):
    file = killed / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    section, name, value = changed
    settings[section][name] = {**settings[section][name], **value} if isinstance(value, dict) else value
    file.write_text(file.read_text().splitlines()[0] + "\n" + yaml.safe_dump(settings))
    status, _, err = run_cli("fit", "--config", file)
    assert (status, f"holds a run of other settings ({said})" in err) == (1, True), err


def test_copy_of_a_run_goes_on_from_the_last_step_whatever_the_times_of_files(tmp_path):
    for step, name in ((2, "previous.ckpt"), (1, "step_0000001.ckpt"), (2, "step_0000002.ckpt"), (3, "last.ckpt")):
        WholeCheckpoints().save_checkpoint({"global_step": step}, tmp_path / name)
    for age, name in enumerate(("previous.ckpt", "step_0000001.ckpt", "step_0000002.ckpt", "last.ckpt")):
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert newest_good(tmp_path) == (tmp_path / "last.ckpt", 3)
    (tmp_path / "last.ckpt").unlink()
    assert newest_good(tmp_path)[1] == 2
    WholeCheckpoints().save_checkpoint({"global_step": 10}, tmp_path / "step_0000010.ckpt")
    os.utime(tmp_path / "step_0000010.ckpt", (1, 1))
    assert newest_good(tmp_path) == (tmp_path / "step_0000010.ckpt", 10)
