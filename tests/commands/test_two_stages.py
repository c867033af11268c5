"""From a folder to a latent diffusion model in one command: what it runs, in which order, and where it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from forked import run_python
from PIL import Image

from unet_diffusion.commands import two_stages

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"

KILLED = """
import os
import signal
from pathlib import Path

from lightning.pytorch import Callback


class Killed(Callback):
    def on_fit_start(self, *args):
        if not Path("killed_once").exists():
            Path("killed_once").touch()
            os.killpg(0, signal.SIGKILL)
"""


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["file_name,text"]
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
            rows.append(f"{label}/{number}.png,{label} number {number}")
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(rows))
    return tmp_path / "images"


@pytest.fixture
def command(images, small_recipes, tmp_path):
    autoencoder, denoiser = small_recipes
    return ["two-stages", images, "--output", tmp_path / "out", "--autoencoder", autoencoder, "--denoiser", denoiser]


def first_file_of(command) -> Path:
    """What a stage leaves as soon as it has something to go on from."""
    if command[0] == "encode":
        return Path(command[command.index("--output") + 1]) / "settings.json"
    (run,) = (word.partition("=")[2] for word in command if word.startswith("--trainer.default_root_dir="))
    return Path(run) / "checkpoints" / "last.ckpt"


@pytest.fixture
def ran(monkeypatch):
    """Runs no stage, but keeps its command; a stage fails if told so, and but for status 2 leaves its first file."""
    commands, status = [], {}

    def exit_status(command):
        commands.append(command[command.index("unet_diffusion") + 1 :])
        assert "-P" in command  # in a folder with a torch.py of somebody else, that would be imported
        if status.get(len(commands)) != 2:
            first_file_of(commands[-1]).parent.mkdir(parents=True, exist_ok=True)
            first_file_of(commands[-1]).touch()
        return status.get(len(commands), 0)

    monkeypatch.setattr(two_stages, "_exit_status", exit_status)
    monkeypatch.setattr(two_stages, "check_runs", lambda runs: None)  # which builds them, in a process of its own
    return commands, status


def test_stages_follow_each_other_and_are_done_once(ran, run_cli, command, tmp_path):
    commands, _ = ran
    status, out, err = run_cli(*command, "--captions")
    assert status == 0, err
    assert [one[0] for one in commands] == ["fit", "encode", "fit"]
    assert {"--captions", "--horizontal_flip"} <= set(commands[1])
    status, out, err = run_cli(*command, "--captions")
    assert len(commands) == 3
    assert out.count("done before") == 3


def test_options_for_every_stage_reach_it(ran, run_cli, command, small_recipes):
    commands, _ = ran
    recipe = yaml.safe_load(small_recipes[0].read_text())
    recipe["data"]["init_args"]["source"]["init_args"] |= {"on_bad_file": "skip", "background": "black"}
    small_recipes[0].write_text(yaml.safe_dump(recipe))
    status, _, err = run_cli(*command, "--traceback")
    assert status == 0, err
    assert ["--traceback" in one for one in commands] == [True] * 3
    encode = commands[1]
    assert [encode[encode.index(name) + 1] for name in ("--on_bad_file", "--background")] == ["skip", "black"]


def test_a_stage_that_fails_is_gone_on_with(ran, run_cli, command, tmp_path):
    commands, fails = ran
    fails[3] = 1
    status, _, err = run_cli(*command)
    assert (status, "stage 3, denoiser, failed; the same command again continues" in err) == (1, True), err
    status, _, err = run_cli(*command)
    assert status == 0, err
    assert commands[3:] == [commands[2]]


@pytest.mark.parametrize("status", [130, 143])
def test_an_interrupted_stage_ends_the_command_as_interrupted(ran, run_cli, command, status):
    commands, status_of = ran
    status_of[1] = status
    assert run_cli(*command)[0] == status
    assert len(commands) == 1


def test_classes_set_the_class_embedding(ran, run_cli, command, tmp_path):
    commands, _ = ran
    (tmp_path / "out" / "latents").mkdir(parents=True)
    (tmp_path / "out" / "latents" / "index.json").write_text(json.dumps({"class_names": ["cat", "dog"]}))
    (tmp_path / "out" / two_stages.RECORD).write_text(
        json.dumps({"settings": {}, "images": {}, "seconds": {}, "done": []})
    )
    status, _, err = run_cli(*command, "--class_labels")
    assert status == 0, err
    assert "--model.unet.num_class_embeds=3" in commands[2]
    assert "--model.label_dropout=0.1" in commands[2]


def test_other_settings_and_other_folders_are_refused(ran, run_cli, command, tmp_path, small_recipes):
    assert run_cli(*command)[0] == 0
    small_recipes[1].write_text(small_recipes[1].read_text() + "\n# changed\n")
    status, _, err = run_cli(*command, "--captions")
    said = (
        "made with other settings (captions: False there, True here; contents of captions; contents of denoiser recipe)"
    )
    assert (status, said in err) == (1, True), err
    status, _, err = run_cli("two-stages", tmp_path / "images", "--output", tmp_path / "images")
    assert (status, "holds files of something else" in err) == (1, True), err
    status, _, err = run_cli(*command[:2], "--output", tmp_path / "new", "--denoiser", tmp_path / "none.yaml")
    assert (status, "there is no recipe or file" in err) == (2, True), err
    assert not (tmp_path / "new").exists()


def replace_image(path) -> None:
    Image.fromarray(np.random.default_rng(9).integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)


def edit(path, old, new) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CHANGES = {  # what is changed when so many stages were begun, and what the refusal names; None: it is not refused
    "image": (lambda f: replace_image(f["images"] / "cat" / "0.png"), "contents of images: cat/0.png", None),
    "image gone": (lambda f: (f["images"] / "cat" / "0.png").unlink(), "contents of images: cat/0.png", None),
    "image added": (
        lambda f: [replace_image(f["images"] / "cat" / "new.png"), edit(f["csv"], "text\n", "text\ncat/new.png,new\n")],
        "contents of images: cat/new.png",
        None,
    ),
    "folder renamed": (
        lambda f: [(f["images"] / "cat").rename(f["images"] / "tom"), edit(f["csv"], "cat/", "tom/")],
        "contents of images: cat/0.png, cat/1.png, cat/2.png, cat/3.png, cat/4.png, ...",
        None,
    ),
    "caption": (lambda f: edit(f["csv"], "cat number 3", "a tiger"), "contents of captions", 2),
    "autoencoder": (
        lambda f: edit(f["autoencoder"], "max_steps: 2", "max_steps: 3"), "contents of autoencoder recipe", None
    ),
    "denoiser": (lambda f: edit(f["denoiser"], "max_steps: 2", "max_steps: 3"), "contents of denoiser recipe", 3),
    "mirrored": (
        lambda f: edit(f["denoiser"], "horizontal_flip: true", "horizontal_flip: false"), "horizontal_flip", 2
    ),
    "nothing": (lambda f: os.utime(f["images"] / "cat" / "0.png"), None, None),
}  # fmt: skip


@pytest.mark.parametrize("begun", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_stages_that_have_begun_keep_their_images_and_settings_and_others_may_be_corrected(
    ran, run_cli, command, images, small_recipes, begun, change
):
    """The last of so many stages fails; 4: all three are done."""
    commands, fails = ran
    fails |= {begun: 1} if 1 <= begun <= 3 else {}
    files = {"images": images, "csv": images / "metadata.csv"}
    files |= dict(zip(("autoencoder", "denoiser"), small_recipes, strict=True))
    if begun:
        assert run_cli(*command, "--captions")[0] == (0 if begun == 4 else 1)
    make, named, kept_from = CHANGES[change]
    make(files)
    num_before, num_done = len(commands), max(begun - 1, 0)
    status, out, err = run_cli(*command, "--captions")
    if named is None or begun < (kept_from or 1):
        assert status == 0, err
        assert out.count("done before") == num_done
        assert [one[0] for one in commands[num_before:]] == ["fit", "encode", "fit"][num_done:]
    else:
        assert status == 1
        assert f"were made with other settings ({named}" in err, err
        assert "done before" not in out


@pytest.mark.parametrize(("stage", "recipe"), [(1, "autoencoder"), (3, "denoiser")])
def test_typo_that_a_stage_failed_of_can_be_mended(ran, run_cli, command, small_recipes, stage, recipe):
    _, fails = ran
    fails[stage] = 2
    assert run_cli(*command)[0] == 1
    edit(dict(zip(("autoencoder", "denoiser"), small_recipes, strict=True))[recipe], "max_steps: 2", "max_steps: 3")
    status, out, err = run_cli(*command)
    assert (status, out.count("done before")) == (0, stage - 1), err


def test_stage_after_one_that_was_trained_on_by_hand_is_not_done_before(ran, run_cli, command, tmp_path):
    assert run_cli(*command)[0] == 0
    weights = tmp_path / "out" / "autoencoder" / "autoencoder" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("others")
    status, _, err = run_cli(*command)
    assert (status, "made with other settings (contents of autoencoder)" in err) == (1, True), err


def test_record_that_was_being_written_when_it_was_killed_is_no_file_of_something_else(ran, run_cli, command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".{two_stages.RECORD}.999999999.partial").write_text("{")
    status, _, err = run_cli(*command)
    assert status == 0, err


def test_what_would_fail_late_is_refused_before_anything_is_written(ran, run_cli, command, tmp_path):
    commands, _ = ran
    (bare := tmp_path / "bare.yaml").write_text("task: denoise\n")
    for without in (CONFIGS / "latents.yaml", bare):
        status, _, err = run_cli(*command[:6], "--denoiser", without, "--captions")
        assert (status, "must have conditions to take captions" in err) == (1, True), err
    (tmp_path / "images" / "metadata.csv").unlink()
    status, _, err = run_cli(*command, "--captions")
    assert (status, "16 of 16 images have no caption" in err) == (1, True), err
    status, _, err = run_cli("two-stages", tmp_path / "none", *command[2:])
    assert (status, "none" in err) == (1, True), err
    recipe = yaml.safe_load(command[5].read_text())
    recipe["data"]["init_args"]["source"]["init_args"]["table"] = {"label": "kind"}
    command[5].write_text(yaml.safe_dump(recipe))
    (tmp_path / "images").rename(tmp_path / "folder")
    paths = sorted(map(str, (tmp_path / "folder").rglob("*.png")))
    rows = {"image": [{"bytes": Path(path).read_bytes(), "path": path} for path in paths], "kind": [0, 1] * 8}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(command[1])
    status, _, err = run_cli(*command)  # encode would refuse it
    assert (status, "table.label is kind, and class_labels is false" in err) == (1, True), err
    assert not (tmp_path / "out").exists()
    assert commands == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "place", "value", "said"),
    [
        (0, ("autoencoder", "init_args", "chanels"), [32], "recipe of the autoencoder: "),
        (1, ("unet", "init_args", "chanels"), [32], "recipe of the denoiser: "),
        (1, ("unet", "init_args", "channels"), [31, 32], "recipe of the denoiser: "),
        (1, ("unet", "init_args", "in_channels"), 3, "must have in_channels 4, as latents of the autoencoder have"),
    ],
)
def test_recipes_of_all_stages_are_checked_before_the_first_is_trained(
    run_cli, command, small_recipes, tmp_path, number, place, value, said
):
    recipe = yaml.safe_load(small_recipes[number].read_text())
    settings = recipe["model"]
    for name in place[:-1]:
        settings = settings[name]
    settings[place[-1]] = value
    small_recipes[number].write_text(yaml.safe_dump(recipe))
    status, out, err = run_cli(*command, "--captions")
    assert status == 2
    assert said in err
    assert "Traceback" not in err
    assert "stage 1" not in out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_only_looked_at_leaves_nothing(command, tmp_path):
    stages = two_stages.TwoStages(command[1], tmp_path / "out", command[5], command[7], False, True)
    stages._check([])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_recipe_of_another_task_is_refused(run_cli, images, tmp_path):
    status, _, err = run_cli("two-stages", images, "--output", tmp_path / "out", "--autoencoder", "cells")
    assert (status, "the recipe of the autoencoder must have task autoencode, got segment" in err) == (2, True), err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process that its parent was killed")
def test_stage_is_stopped_when_two_stages_is_killed():
    stage = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = f"[sys.executable, '-c', {stage!r}]"
    program = f"import sys; from unet_diffusion.commands.two_stages import _exit_status; _exit_status({command})"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    state = Path(f"/proc/{int(parent.stdout.readline())}/stat")
    assert state.exists()
    parent.kill()
    parent.wait()
    for _ in range(100):
        with suppress(FileNotFoundError, ProcessLookupError):
            if state.read_text().rpartition(")")[2].split()[0] != "Z":  # nobody may have asked for its status
                time.sleep(0.1)
                continue
        return
    pytest.fail("it goes on")


@pytest.mark.slow
def test_a_folder_becomes_a_pipeline_by_way_of_a_kill_and_is_timed(command, small_recipes, tmp_path):
    """In processes of their own, the first of which is killed, with that of its stage, when its latents are there."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "killed.py").write_text(KILLED)
    recipe = yaml.safe_load(small_recipes[1].read_text())
    recipe["trainer"]["callbacks"] = [{"class_path": "killed.Killed"}]
    small_recipes[1].write_text(yaml.safe_dump(recipe))
    path = os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])

    def run() -> subprocess.CompletedProcess:
        arguments = [sys.executable, "-m", "unet_diffusion", *command, "--captions", "--allow", "killed"]
        return run_python(arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})

    assert run().returncode == -signal.SIGKILL
    done = run()
    assert done.returncode == 0, done.stderr
    assert "stage 2 of 3, latents: done before" in done.stdout
    out = tmp_path / "out"
    for file in ("autoencoder/autoencoder/config.json", "latents/index.json", "denoiser/samples.png"):
        assert (out / file).is_file(), file
    assert len((out / "denoiser" / "captions.txt").read_text().splitlines()) == 2
    assert (out / "denoiser" / "pipeline" / "model_index.json").is_file()
    record = json.loads((out / two_stages.RECORD).read_text())
    assert record["done"] == list(record["seconds"]) == ["autoencoder", "latents", "denoiser"]
    assert min(record["seconds"].values()) > 0
    benchmark = [sys.executable, str(REPOSITORY / "benchmarks" / "latents.py"), "--run", str(out), "--batch_size=4"]
    done = run_python([*benchmark, "--blocks=1", "--steps=1", "--json", tmp_path / "latents.json"])
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "latents.json").read_text())["results"]
    assert [row["latents"] for row in rows] == ["kept latents", "encoded at every step"]
    assert all(row["images/s"] > 0 for row in rows)
