"""Commands are functions: the command line that their signatures and docstrings make, and programs that call them."""

import ast
import dataclasses
import inspect
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unet_diffusion.commands import arguments, parsing
from unet_diffusion.commands.pack import pack
from unet_diffusion.commands.parsing import ACTIONS, COMMANDS, TRAINING, command_parser, function_of, parsed
from unet_diffusion.commands.recipes import copy_recipe
from unet_diffusion.commands.sample import sample_images
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.record import save_denoiser
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.runtime.folder_settings import require_same_settings
from unet_diffusion.runtime.messages import UsageError

PARSED = [command for command in COMMANDS if command not in TRAINING]


# --------------------------------------------------------------------------------------------- signature and docstring


def texts_of(function) -> dict[str, str]:
    """What the docstring says of each parameter."""
    described = inspect.getdoc(function).partition("Args:")[2].partition("\nRaises:")[0]
    texts = re.findall(r"^    (\w+): ((?:.|\n     )+)", described, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in texts}


@pytest.mark.parametrize("command", PARSED)
def test_help_shows_an_example_and_every_parameter_with_its_default(command, run_cli):
    status, out, _ = run_cli(command, "--help")
    assert status == 0
    assert re.search(rf"^    .*unet-diffusion {command}\b", out, flags=re.MULTILINE)  # a line that can be copied
    function, words = function_of(COMMANDS[command]), " ".join(out.split())
    for name, text in texts_of(function).items():
        parameter = inspect.signature(function).parameters[name]
        assert text.removesuffix(".") in words
        if dataclasses.is_dataclass(parameter.default):  # an option for each of its fields
            assert all(f" --{name}.{field.name} " in words for field in dataclasses.fields(parameter.default))
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert f" --{name} " in words
            is_off = parameter.default in (None, parameter.empty) or parameter.default is False
            assert (f"{text} (default: {parameter.default})" in words) != is_off


@pytest.mark.parametrize("name", [*COMMANDS.values(), *(name for one in ACTIONS.values() for name in one.values())])
def test_docstring_says_all_of_the_parameters_in_sentences(name):
    function = function_of(name)
    texts = texts_of(function)
    assert list(texts) == list(inspect.signature(function).parameters)
    assert [text for text in texts.values() if not re.fullmatch(r"[A-Z].*\.", text)] == []
    assert inspect.getdoc(function).splitlines()[0].endswith(".")


def test_no_function_of_the_commands_takes_a_namespace():
    for path in Path(parsing.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg) and node.annotation is not None:
                assert "argparse.Namespace" not in ast.unparse(node.annotation), f"{path.name}: {node.arg}"


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("sample a.ckpt", {"checkpoint": Path("a.ckpt"), "labels": None, "seed": 0, "output": Path("generated")}),
        ("sample a.ckpt --labels 3 seven --seed 5", {"labels": ["3", "seven"], "seed": 5}),
        ("sample --labels 3 --labels 7 -- a.ckpt", {"checkpoint": Path("a.ckpt"), "labels": ["3", "7"]}),
        ("sample a.ckpt --image_size 16 24 --guidance_scale 2", {"image_size": [16, 24], "guidance_scale": 2.0}),
        ("sample a.ckpt --interpolate -1 5 --captions a: b", {"interpolate": [-1, 5], "captions": ["a:", "b"]}),
        ("sample a.ckpt --speed plain --precision=float32", {"speed": "plain", "precision": "float32"}),
        ("segment a.ckpt b c/d --output=out --views", {"images": [Path("b"), Path("c/d")], "views": True}),
        ("pack a b --channels 1", {"images": Path("a"), "folder": Path("b"), "channels": 1, "class_labels": False}),
        ("two-stages a --output b --allow x --allow y.z", {"allow": ["x", "y.z"], "traceback": False}),
        ("two-stages a --output b --traceback", {"traceback": True}),
        ("recipes copy digits null", {"name": "digits", "file": Path("null")}),
        ("recipes", {}),
    ],
)
def test_words_become_the_values_that_the_signature_names(words, values):
    command, *rest = words.split()
    function, found = parsed(command, rest)
    assert set(found) == set(inspect.signature(function).parameters)
    assert {name: found[name] for name in values} == values


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sample", "CHECKPOINT must be given"),
        ("segment a", "IMAGES, --output must be given"),
        ("sample a --outptu b", "sample takes no --outptu; did you mean --output?"),
        ("sample a --num_image 3", "sample takes no --num_image; did you mean --num_images"),  # no abbreviations
        ("sample a --seed x", "--seed must be a whole number, got x"),
        ("sample a --guidance_scale x", "--guidance_scale must be a number, got x"),
        ("sample a --image_size 3", "--image_size must be followed by 2 values"),
        ("sample a --image_size 3 x", "--image_size must be a whole number, got x"),
        ("sample a --seed", "--seed must be followed by one value"),
        ("sample a --precision flot32", "--precision must be one of auto, float32, bfloat16, float16, got flot32; did"),
        ("sample a --output=", "--output must be a path, and is empty; . is the current folder"),
        ("pack a b --on_bad_file drop", "--on_bad_file must be one of error, skip, got drop"),
        ("recipes shw", "ACTION must be one of show, copy, got shw; did you mean show?"),
        ("recipes show", "NAME must be given"),
        ("recipes copy digits", "FILE must be given"),
        ("completion fish", "SHELL must be one of bash, zsh, got fish"),
    ],
)
def test_wrong_words_are_refused_in_a_sentence(words, said):
    command, *rest = words.split()
    with pytest.raises(UsageError) as raised:
        parsed(command, rest)
    assert str(raised.value).startswith(said)
    assert str(raised.value).endswith("--help says more")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "words", ["sample . --overwrite --resume", "two-stages . --output out --captions --class_labels"]
)
def test_options_that_exclude_each_other_are_told(run_cli, words):
    status, _, err = run_cli(*words.split())
    assert (status, "give one of the two" in err) == (2, True), err


# ---------------------------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_key_knows_every_command_its_options_and_the_recipes(run_cli, shell):
    status, out, err = run_cli("completion", shell)
    assert status == 0, err
    assert [command for command in COMMANDS if command not in out] == []
    options = [option for command in PARSED for option in command_parser(command)._option_string_actions]
    assert [option for option in options if option not in out] == []
    assert "digits" in out
    assert "--data.root" in out


def test_completion_is_a_program_of_the_shell(run_cli):
    subprocess.run(["bash", "-n"], input=run_cli("completion", "bash")[1], text=True, check=True)


# ---------------------------------------------------------------------------------------------- programs that call them


def test_program_calls_commands_with_values_of_python(tmp_path, capsys):
    for number in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    pack(tmp_path / "images", tmp_path / "shards", image_size=(4, 4), channels=1)
    assert "3 images in" in capsys.readouterr().out
    assert (tmp_path / "shards" / "index.json").is_file()
    copy_recipe("digits", tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text().startswith("# Trains: ")
    torch.manual_seed(0)
    unet = DenoiserUNet(1, (4, 4), norm_num_groups=2, layers_per_block=1)
    save_denoiser(Denoiser(unet, NoiseSchedule(10), (1, 8, 8)), tmp_path / "a.ckpt")
    sample_images(tmp_path / "a.ckpt", num_images=2, num_inference_steps=2, output=tmp_path / "drawn", device="cpu")
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        *("000000.png", "000001.png", "grid.png", "settings.json"),
    }


# ------------------------------------------------------------------------------------------------ settings of a folder


def test_settings_are_written_once_compared_by_name_and_replaced_when_asked(tmp_path):
    folder, removed = tmp_path / "out", []
    require_same_settings(folder, {"seed": 0, "size": (8, 8)}, "images", notes={"count": 1})
    require_same_settings(folder, {"seed": 0, "size": [8, 8]}, "images", notes={"count": 2})  # notes may change
    assert '"count": 2' in (folder / "settings.json").read_text()
    with pytest.raises(FileExistsError, match=r"made with other settings \(seed: 0 there, 1 here\); choose"):
        require_same_settings(folder, {"seed": 1, "size": (8, 8)}, "images", notes={"count": 2})
    require_same_settings(
        folder, {"seed": 1, "size": (8, 8)}, "images", notes={"count": 2}, replace=lambda: removed.append("images")
    )
    assert removed == ["images"]
    require_same_settings(folder, {"seed": 1, "size": (8, 8)}, "images", notes={"count": 2})


def test_folder_from_before_the_parts_of_tables_could_be_named_goes_on_where_none_is_named(tmp_path):
    unnamed = {"seed": 0, "table.image": None, "table.split": None}
    require_same_settings(tmp_path, {"seed": 0}, "masks")
    with pytest.raises(FileExistsError, match=r"made with other settings \(table.split: None there, test here\)"):
        require_same_settings(tmp_path, {**unnamed, "table.split": "test"}, "masks")
    require_same_settings(tmp_path, unnamed, "masks")


@pytest.mark.parametrize("content", ["{}", "[]", "mine", '{"seed": 0, "other": 1}'])
def test_settings_of_something_else_are_not_replaced(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(FileExistsError, match="was not written for images and is not replaced"):
        require_same_settings(tmp_path, {"seed": 0}, "images", replace=lambda: pytest.fail("removed"))
    assert (tmp_path / "settings.json").read_text() == content


def test_files_of_others_are_allowed_only_where_that_is_said(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="holds files that are no images"):
        require_same_settings(tmp_path, {"seed": 0}, "images")
    require_same_settings(tmp_path, {"seed": 0}, "images", among_others=True)


def test_processes_of_one_command_claim_its_folder_once(tmp_path, monkeypatch):
    from unet_diffusion.runtime.processes import ProcessGroup

    claims = []
    monkeypatch.setattr(arguments, "ClaimedFolder", lambda folder: claims.append(folder) or pytest.fail("claimed"))
    with arguments.claimed(tmp_path, ProcessGroup(1, 2)):
        assert claims == []
