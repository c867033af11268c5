"""Bad inputs: what is said of them, that nothing is left behind, and that none asks for all memory."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import bad_inputs
import numpy as np
import pytest
import torch
from bad_files import HUGE, make_inputs
from PIL import Image

from unet_diffusion.commands.parser_errors import in_short
from unet_diffusion.data import (
    Digits,
    Folder,
    ImageDataModule,
)
from unet_diffusion.diffusers_io.configurations import schedule_from_diffusers
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.record_checks import built, check_weights, no_larger_than
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.runtime.atomic_files import read_json
from unet_diffusion.runtime.folder_settings import LOCK, ClaimedFolder
from unet_diffusion.runtime.messages import in_words
from unet_diffusion.runtime.safe_loading import load_plain

ROOT = Path(__file__).parents[2]
SAMPLE = (  # of the cases of benchmarks/bad_inputs.py: of each command, and of each way to be wrong
    *(
        "sample --num_images 1000000000",
        "sample --seed ''",
        "pack --shard_images 0",
        "sample --device gpu",
        "sample --output ''",
        "sample --output {text}/out",
    ),
    *("sample --image_size 1000000 1000000", "sample --image {empty}", "segment --output /proc/nowhere/out"),
    *("sample a checkpoint of denoiser: huge", "sample a checkpoint of denoiser: huge old"),
    *("sample a checkpoint of denoiser: wide", "sample a checkpoint of denoiser: deep", "recipes copy to nowhere"),
    *("sample a checkpoint of denoiser: strided", "sample a checkpoint of denoiser: other weights"),
    *("segment a cells whose window_size is 0", 'segment a cells whose kind is "x"', "segment with a pipeline"),
    *('export a autoencoder whose class_name is "x"', "export with an autoencoder", "pack --image_size 512 512"),
    *("import, index of a pipeline: cut", "import, scheduler of a pipeline: null", "encode, settings of latents: cut"),
    *("export, list of exports: null", "encode, autoencoder: null", "import into the name of its configuration"),
    *("fit --config with a null byte", "two-stages of a text", "encode --device cuda:0", "segment a text"),
    *("fit, index of shards: null", "fit --config with no section", "fit --config with a class that is a list"),
    *("fit a checkpoint of digits: nan weights", "fit a checkpoint of digits: no weights"),
    *("segment a cells whose timestep is -1", "sample a denoiser whose sample_shape is [1, 7, 8]"),
    *("sample a denoiser whose schedule is {}", "fit --config digits --trainer.default_root_dir {text}/out"),
)
CASES = {case.name: case for case in bad_inputs.all_cases()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_cases_are_many_of_every_command_and_each_has_a_name_of_its_own():
    names = [case.name for case in bad_inputs.all_cases()]
    assert len(names) == len(set(names)) >= 300
    commands = {case.command.split()[0] for case in bad_inputs.all_cases() if case.command}
    assert commands >= {"fit", "validate", "recipes", "pack", "encode", "two-stages", "sample", "segment", "export",
                        "import", "completion"}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_bad_input_is_refused_in_a_sentence_and_leaves_nothing(name, inputs, run_cli, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = bad_inputs.words_of(CASES[name], folder, inputs)
    before, start = bad_inputs.contents(folder), time.monotonic()
    status, out, err = run_cli(*words)
    left = bad_inputs.changed(before, bad_inputs.contents(folder))
    seconds = time.monotonic() - start
    outcome = bad_inputs.Outcome(status, seconds, seconds, 0.0, left, out + err)
    assert outcome.faults == [], err


def test_rules_of_the_script_are_broken_by_what_breaks_them():
    said = "unet-diffusion: error: 'NoneType' object has no attribute 'get'\n(--traceback shows where it came from)"
    assert bad_inputs.Outcome(1, 11.0, 10.5, 3.0, ["out"], said).faults == ["slow", "memory", "left", "raw"]
    assert bad_inputs.Outcome(1, 40.0, 9.0, 0.1, [], "unet-diffusion: error: x must be 1").faults == []  # others ran
    assert bad_inputs.Outcome(1, 40.0, 2.0, 0.1, [], "unet-diffusion: error: x must be 1").faults == [
        "slow"
    ]  # it waited
    assert bad_inputs.Outcome(0, 1.0, 1.0, 0.1, [], "done").faults == ["accepted"]
    assert "traceback" in bad_inputs.Outcome(1, 1.0, 1.0, 0.1, [], "Traceback (most recent call last):\n").faults
    assert bad_inputs.Outcome(2, 1.0, 1.0, 0.1, [], "unet-diffusion: error: x must be 1, got 2; set x").faults == []


# ----------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Parser key \"a.b\":\n  Expected a <class 'int'>. Got value: 1.5", "a.b must be a whole number, got 1.5"),
        (
            "Parser key \"a\":\n  Does not validate against any of the Union subtypes\n  Subtypes: [<class 'int'>, "
            "<class 'NoneType'>]\n  Errors:\n    - Expected a <class 'int'>\n    - Expected a <class 'NoneType'>\n"
            "  Given value type: <class 'str'>\n  Given value: x",
            "a must be a whole number or null, got x",
        ),
        (
            "Does not validate against any of the Union subtypes\nSubtypes: [<class 'x.Data'>, <class 'NoneType'>]\n"
            "Errors:\n  - batch_size must be at least 1, got -1\n  - Expected a <class 'NoneType'>\n"
            "Given value type: <class 'jsonargparse._namespace.Namespace'>\nGiven value: Namespace(batch_size=-1)",
            "batch_size must be at least 1, got -1",
        ),
        (
            'Parser key "a":\n\n  - Expected a path but b.C either not accessible or invalid\n  - Problem with given '
            "class_path 'b.C':\n    module 'b' has no attribute 'C'",
            "there is no class b.C; check its spelling",
        ),
    ],
)
def test_errors_of_the_parser_are_a_sentence(message, said):
    assert in_short(message, []) == said


def test_errors_of_the_system_name_the_file_and_what_to_do(tmp_path):
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file" / "x", tmp_path / "none" / "x"):
        with pytest.raises(OSError, match="Errno") as raised:
            wrong.mkdir()
        assert re.fullmatch(rf"{re.escape(str(wrong))} .*; choose another path", in_words(raised.value))


def test_scheduler_whose_noise_is_not_known_is_refused_by_name():
    config = {"_class_name": "UnCLIPScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
    with pytest.raises(ValueError, match="got UnCLIPScheduler without beta_start, beta_end"):
        schedule_from_diffusers(config)


def test_errors_of_weights_name_a_few_of_them():
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    with pytest.raises(RuntimeError) as raised:
        network.load_state_dict({"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(3), "x": torch.zeros(1)})
    assert in_words(raised.value) == (
        "the weights do not fit the Sequential that its settings describe: 2 are missing, such as 1.weight; "
        "1 are left over, such as x; 1 have another size, such as 0.weight [2, 2], here [3, 2]"
    )


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"5", b"null", b"\0", b"[" * 10**5])
def test_json_that_is_none_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json must hold .*; it is .*: make it again"):
        read_json(tmp_path / "x.json")


def test_file_that_is_gone_while_workers_read_is_named_in_one_message(tmp_path, tiny_images):
    for number in range(4):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / f"{number}.png")
    data = ImageDataModule(Folder(tmp_path, image_size=8, channels=1, in_memory=False), num_workers=1, num_val=1)
    data.setup()
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="DataLoader worker") as raised:
        list(data.train_dataloader())
    assert re.fullmatch(r"\d\.png could be read before, and cannot be now: .*; put it back.*", in_words(raised.value))


@pytest.mark.slow
def test_name_that_the_locale_cannot_spell_does_not_end_a_command(inputs, tmp_path):
    output = tmp_path / "gemälde"
    command = [sys.executable, "-P", "-m", "unet_diffusion", "pack", str(inputs["images"]), str(output)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 images in " in done.stdout


@pytest.mark.slow
def test_interrupt_while_modules_are_imported_is_no_traceback(tmp_path):
    (tmp_path / "argparse.py").write_text("import os, time\nos.write(1, b'here')\ntime.sleep(60)\n")  # of cli's first
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "unet_diffusion"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # these tests may run where it is ignored
    )
    assert process.stdout is not None
    assert process.stdout.read(4) == b"here"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (-signal.SIGINT, b"")


# ------------------------------------------------------------------------------------------- memory, and what is built


def test_network_that_is_larger_than_its_weights_is_not_built():
    weights = DenoiserUNet(1, [8, 16], norm_num_groups=4).state_dict()
    with no_larger_than(weights):
        built(DenoiserUNet, {"in_channels": 1, "channels": [8, 16], "norm_num_groups": 4})
    for larger in ({"channels": [2000] * 2}, {"channels": [8, 16] * 60}):
        with pytest.raises(ValueError, match="would be larger than its weights"), no_larger_than(weights):
            built(DenoiserUNet, {"in_channels": 1, "norm_num_groups": 4, **larger})
    torch.nn.Linear(10**4, 10**4)  # others are built as before


def test_weights_that_claim_more_than_they_have_are_refused():
    with pytest.raises(ValueError, match=r"x \(6000000000,\) is not"):
        check_weights({"x": torch.zeros(1).expand(HUGE)})
    check_weights({"x": torch.zeros(4, 4)[:, :2], "tied": torch.zeros(2, 3).T})


class Allocates:
    """Makes a tensor of any size when it is unpickled."""

    def __reduce__(self):
        return torch.FloatTensor, (HUGE,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle_that_makes_a_tensor_of_any_size_is_not_loaded(tmp_path, is_zip):
    torch.save({"x": Allocates()}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"got torch FloatTensor, which can have any size"):
        load_plain(tmp_path / "x.ckpt")


@pytest.mark.parametrize("arguments", [{"nothing": 1}, {"num_train_timesteps": "x"}])
def test_arguments_of_a_record_that_a_class_does_not_take_are_named(arguments):
    with pytest.raises(ValueError, match=f"NoiseSchedule.*{next(iter(arguments))}"):
        built(NoiseSchedule, arguments)


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    from unet_diffusion.data import (
        ImageDataModule,
        checking,
    )

    for number in range(4):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / f"{number}.png")
    underway, most = [0], [0]
    decode = checking.fitted_image

    def slowly(*arguments):
        underway[0] += 1
        most[0] = max(most[0], underway[0])
        time.sleep(0.05)
        underway[0] -= 1
        return decode(*arguments)

    monkeypatch.setattr(checking, "fitted_image", slowly)
    monkeypatch.setattr(checking, "num_cpus", lambda: 4)
    for limit, together in ((10**9, 4), (10, 1)):
        monkeypatch.setattr(checking, "LARGE_IMAGE", limit)
        most[0] = 0
        ImageDataModule(Folder(tmp_path, image_size=8, channels=1), num_val=1).setup()
        assert most[0] == together


def test_batch_is_no_larger_than_what_there_is_to_train_on():
    data = ImageDataModule(Digits(), batch_size=10**9)
    data.setup()
    assert data.batch_size == len(data.train_indices)


# ------------------------------------------------------------------------------------------------------------- folders


def test_folder_that_is_released_can_be_claimed_again_and_is_gone_if_nothing_came_of_it(tmp_path):
    for _ in range(2):
        ClaimedFolder(tmp_path / "a" / "b").close()
        assert list(tmp_path.iterdir()) == []
    claimed = ClaimedFolder(tmp_path / "a" / "b")
    (claimed.folder / "image.png").touch()
    claimed.close()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["image.png"]


@contextmanager
def claimed_elsewhere(folder):
    """By a process that has a worker, and is killed at the end."""
    program = (
        f"from unet_diffusion.runtime.folder_settings import *; import time; c = ClaimedFolder(Path({str(folder)!r})); "
        "os.fork(); print(1, flush=True); time.sleep(10)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_folder_is_claimed_by_one_process_and_released_when_it_dies_though_its_worker_lives(tmp_path):
    with (
        claimed_elsewhere(tmp_path),
        pytest.raises(FileExistsError, match="another process is at work in"),
    ):
        ClaimedFolder(tmp_path)
    assert (tmp_path / LOCK).exists()
    ClaimedFolder(tmp_path).close()


@pytest.mark.parametrize("command", [bad_inputs.SAMPLE, bad_inputs.SEGMENT, bad_inputs.ENCODE, bad_inputs.PACK])
def test_folder_in_which_another_process_is_at_work_is_refused_and_left_alone(
    command, inputs, run_cli, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = [word.format(**inputs) for word in command.split()]
    (tmp_path / "out").mkdir()
    with claimed_elsewhere(tmp_path / "out"):
        status, _, err = run_cli(*words)
        assert (status, "another process is at work in out" in err) == (1, True), err
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
    status, _, err = run_cli(*words)
    assert status == 0, err
    assert not (tmp_path / "out" / LOCK).exists()


def test_what_nothing_came_of_is_cleared_but_for_what_was_there(tmp_path):
    new = ClaimedFolder(tmp_path / "a" / "b")
    (new.folder / "logs").mkdir()
    new.clear()
    new.close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").touch()
    old = ClaimedFolder(tmp_path)
    (tmp_path / "logs").mkdir()
    old.clear()
    old.close()
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "logs"}


# ----------------------------------------------------------------------------------------------------------------- fit


def fit(run_cli, tiny_digits, run, *options):
    return run_cli("fit", *tiny_digits, "--trainer.default_root_dir", run, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--trainer.overfit_batches", 1), "trainer.overfit_batches must be 0, got 1"),
        (("--trainer.val_check_interval", 0), "trainer.val_check_interval must be more than 0, got 0"),
        (("--trainer.check_val_every_n_epoch", 0), "trainer.check_val_every_n_epoch must be 1 or more, got 0"),
        (("--trainer.devices", "x"), "trainer.devices must be a number from 1, or -1 or auto for all, got x"),
        (("--trainer.limit_train_batches", 0), "trainer.limit_train_batches must be more than 0, got 0"),
        (("--trainer.num_sanity_val_steps", -2), "trainer.num_sanity_val_steps must be -1 or more, got -2"),
        (("--samples.num_images", 10**9), "samples.num_images must be at most 1000, got 1000000000"),
        (("--data.num_val", 10**5), "num_val must be at least 1 and less than the 1797 images"),
        (("--checkpoint.monitor", "val/los"), "monitor of RunCheckpoint must be one of train/loss, val/loss, "),
        (
            ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/los"),
            "got 'val/los'; did you mean val/loss",
        ),
        (("--data.batch_size", -1), "error: batch_size must be at least 1, got -1\n"),
        (("--model.unet.init_args.norm_num_groups", 0), "norm_num_groups"),
    ],
)
def test_run_that_cannot_begin_says_so_and_leaves_no_folder(run_cli, tiny_digits, tmp_path, options, said):
    status, _, err = fit(run_cli, tiny_digits, tmp_path / "runs" / "x", *options)
    assert status
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_in_one_folder_are_refused(run_cli, tiny_digits, tmp_path):
    with claimed_elsewhere(tmp_path / "run"):
        (tmp_path / "run" / "theirs").touch()
        status, _, err = fit(run_cli, tiny_digits, tmp_path / "run")
        assert (status, "another process is at work in" in err) == (1, True), err
        assert (tmp_path / "run" / "theirs").exists()


def test_everything_that_is_logged_can_be_monitored(digits_run):
    header = next((digits_run / "logs").rglob("metrics.csv")).read_text().splitlines()[0]
    from unet_diffusion.training import DiffusionModule

    logged = {name for name in header.split(",") if name.startswith(("train/", "val/"))}
    assert logged == set(DiffusionModule.logged)


@pytest.mark.parametrize("option", ["class_labels", "captions"])
def test_data_that_the_network_does_not_take_are_refused(run_cli, tiny_digits, inputs, tmp_path, option):
    data = {"root": inputs["images"], "image_size": 16, "channels": 1, "num_val": 2, option: "true"}
    options = [f"--data.{name}={value}" for name, value in data.items()]
    network = ["--model.unet.init_args.num_class_embeds=null", "--model.label_dropout=0", "--samples.guidance_scale=1"]
    status, _, err = fit(run_cli, tiny_digits, tmp_path / "run", "--data=Folder", *options, *network)
    assert (status, f"data.{option} is true, and what is trained takes no {option}" in err) == (1, True), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["denoise", "segment", "autoencode"])
def test_every_module_says_what_it_logs(task):
    from unet_diffusion.commands.training_cli import Task

    assert "train/loss" in Task.named(task).module.logged


def test_checkpoint_of_another_program_is_refused_before_anything_is_written(run_cli, tiny_digits, inputs, tmp_path):
    shutil.copy(inputs["cells"].with_suffix(".ckpt"), tmp_path / "cells.ckpt")
    options = ["--trainer.default_root_dir", tmp_path / "run", "--ckpt_path", tmp_path / "cells.ckpt"]
    for command in ("fit", "validate"):
        status, _, err = run_cli(command, *tiny_digits, *options)
        assert (status, "the checkpoint holds no denoiser" in err) == (1, True), err
        assert not (tmp_path / "run").exists()
