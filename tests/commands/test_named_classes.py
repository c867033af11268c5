"""What a configuration from anyone may name. Each attack would leave a file behind if it were carried out."""

import contextlib
import importlib
import inspect
import pkgutil
import sys
from typing import ClassVar

import lightning.fabric
import lightning.pytorch
import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback

import unet_diffusion
from unet_diffusion.commands.named_classes import ALLOWED, FACTORIES, check_names, refuse_names_but
from unet_diffusion.models.denoiser_unet import DenoiserUNet

RUNS_A_COMMAND = "torch.utils.collect_env.run"  # a function of a package that is there: subprocess.Popen(command)
DDP = "lightning.pytorch.strategies.DDPStrategy"
TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"


def spec(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


def test_commands_of_these_attacks_do_run(tmp_path):
    torch.utils.collect_env.run(f"touch {tmp_path / 'ran'}")
    assert (tmp_path / "ran").exists()


ATTACKS = {  # where a class or a callable is asked for, and where anything goes
    "optimizer that is a command": lambda run: {"model": {"optimizer": run}},
    "network": lambda run: {"model": {"unet": run}},
    "schedule": lambda run: {"model": {"schedule": run}},
    "conditions": lambda run: {"model": {"conditions": [run]}},
    "argument of the optimizer": lambda run: {"model": {"optimizer": spec("torch.optim.AdamW", lr=run)}},
    "unknown argument": lambda run: {
        "model": {"optimizer": {"class_path": "torch.optim.SGD", "dict_kwargs": {"x": run}}}
    },
    "data": lambda run: {"data": run},
    "callback": lambda run: {"trainer": {"callbacks": [run]}},
    "function of a strategy": lambda run: {"trainer": {"strategy": spec(DDP, ddp_comm_hook=run)}},
    "logger": lambda run: {"trainer": {"logger": run}},
    "argument of a logger": lambda run: {"trainer": {"logger": spec(TENSORBOARD, save_dir=".", comment=run)}},
    "plugin": lambda run: {"trainer": {"plugins": [run]}},
    "strategy": lambda run: {"trainer": {"strategy": run}},
    "profiler": lambda run: {"trainer": {"profiler": run}},
    "checkpoint": lambda run: {"checkpoint": {"dirpath": run}},
}
COMMANDS = {
    "os.system": lambda marker: spec("os.system", command=f"touch {marker}"),
    "subprocess.Popen": lambda marker: spec("subprocess.Popen", args=["touch", str(marker)]),
    "builtins.eval": lambda marker: {
        "class_path": "builtins.eval",
        "dict_kwargs": {"source": f"open({str(marker)!r}, 'w')"},
    },
    RUNS_A_COMMAND: lambda marker: spec(RUNS_A_COMMAND, command=f"touch {marker}"),
}


@pytest.fixture
def fit_with(run_cli, tiny_digits, tmp_path):
    """Runs one step of a configuration with these settings; its exit status, and what it wrote to stderr."""

    def fit(settings, *options) -> tuple[int, str]:
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
        run = ("--trainer.fast_dev_run", 1, "--trainer.default_root_dir", tmp_path / "run", *options)
        status, _, err = run_cli("fit", *tiny_digits, "--config", tmp_path / "settings.yaml", *run)
        return status, err

    return fit


def assert_refused(status, err, marker, name):
    assert status != 0
    assert name in err
    assert not marker.exists()


def test_module_that_is_not_allowed_is_not_imported(fit_with, tmp_path, monkeypatch):
    (tmp_path / "harmful.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for settings in ({"data": "harmful.Data"}, {"model": {"optimizer": "harmful.run"}}):
        status, err = fit_with(settings)
        assert_refused(status, err, tmp_path / "ran", "harmful")


def test_code_in_the_graph_of_a_network_is_not_run(fit_with, tmp_path):
    """By a function of torch that is annotated to return a network, as the place asks for."""
    marker = tmp_path / "ran"
    graph = spec(
        "torch.fx.graph_module.reduce_graph_module",
        body={"_code": "forward = print"},
        import_block=f"import os; os.system('touch {marker}')",
    )
    for place in ("unet", "optimizer"):
        status, err = fit_with({"model": {place: graph}})
        assert_refused(status, err, marker, "a configuration may not name torch.fx.graph_module.reduce_graph_module")


@pytest.fixture
def by_default():
    refuse_names_but([])


def test_no_function_of_a_package_can_be_named_but_those_listed(by_default):
    """Of all that are loaded, under the name of the module that defines them and of each that has them."""
    for package in (lightning.pytorch, lightning.fabric, unet_diffusion):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):  # which would run
                with contextlib.suppress(ImportError):  # of packages that are not installed
                    importlib.import_module(module.name)
    functions, named = 0, set()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in (
            "torch",
            "lightning",
            "diffusers",
            "unet_diffusion",
            "transformers",
            "torchvision",
        ):
            continue
        for attribute, value in list(vars(module).items()):
            if not inspect.isroutine(value):
                continue
            functions += 1
            try:
                check_names({"class_path": f"{name}.{attribute}"}, [])
                named.add(f"{value.__module__}.{value.__qualname__}")
            except ValueError:
                pass
    assert functions > 20_000
    assert named == set(FACTORIES)


def test_no_class_of_another_package_can_be_named(by_default):
    for path in ("torch.nn.Linear", "torch.fx.GraphModule", "lightning.pytorch.Trainer", "diffusers.DDPMScheduler",
                 "unet_diffusion.models.speed.ctypes.CDLL", "torch.optim.adam.Tensor", "subprocess.Popen"):  # fmt: skip
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--x", type=type)
        with pytest.raises(ArgumentError, match=r"Importing '.*' is not allowed"):
            parser.parse_args([f"--x={path}"])


PRINTS = "builtins.print"
OURS = "unet_diffusion.commands.main.main"  # of an allowed package


@pytest.mark.parametrize("function", [PRINTS, OURS, "torch.optim.adamw.adamw"])
@pytest.mark.parametrize("place", ["strategy", "optimizer", "unet", "schedule"])
def test_function_that_a_file_names_is_not_handed_on(fit_with, function, place):
    """Each is of an allowed package, but the first."""
    settings = {"model": {place: function}}
    if place == "strategy":
        settings = {"trainer": {"strategy": spec(DDP, ddp_comm_hook=function)}}
    status, err = fit_with(settings)
    assert status in (1, 2)
    assert function in err


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoint": {"dirpath": "elsewhere"}},
        {"checkpoint": {"dirpath": "local:///elsewhere"}},
        {"checkpoint": {"dirpath": "reference::http://127.0.0.1:9/x.json"}},
        {"checkpoint": {"filename": ".{step:c}/.{step:c}/x"}},
        {"checkpoint": {"filename": "{step].__class__}"}},
        {"trainer": {"logger": spec(TENSORBOARD, save_dir="", name="$HOME/x")}},
        {"checkpoint": {"filename": "../../x"}},
        {"trainer": {"logger": spec(TENSORBOARD, save_dir="/elsewhere")}},
        {"trainer": {"logger": spec(TENSORBOARD, save_dir=".", name="../../x")}},
        {"trainer": {"callbacks": [spec("lightning.pytorch.callbacks.OnExceptionCheckpoint", dirpath="elsewhere")]}},
        {"trainer": {"profiler": spec("lightning.pytorch.profilers.SimpleProfiler", dirpath="~/elsewhere")}},
    ],
    ids=str,
)
def test_configuration_cannot_write_outside_the_run_folder(fit_with, tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    status, err = fit_with(settings)
    assert status == 1, err
    assert f"must lie in the run folder {tmp_path / 'run'}, got " in err
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "settings.yaml"]


def test_run_folder_is_a_folder_and_nothing_that_leads_to_one(fit_with, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, err = fit_with({}, "--trainer.default_root_dir", "reference::http:")
    assert (status, "trainer.default_root_dir must be a folder, got reference::http:" in err) == (1, True), err


def test_settings_of_wandb_are_those_that_do_no_harm(fit_with):
    for name, value in {"settings": {"base_url": "http://127.0.0.1:9"}, "save_code": True}.items():
        logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "dict_kwargs": {name: value}}
        status, err = fit_with({"trainer": {"logger": logger}})
        assert (status, f"trainer.logger must not set {name} of W&B" in err) == (1, True), err


def test_what_was_allowed_once_is_not_allowed_afterwards():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=type)
    refuse_names_but(["json"])
    assert parser.parse_args(["--x=json.JSONDecoder"]).x.__name__ == "JSONDecoder"
    refuse_names_but([])
    with pytest.raises(ArgumentError, match=r"Importing 'json\.JSONDecoder' is not allowed"):
        parser.parse_args(["--x=json.JSONDecoder"])


@pytest.mark.parametrize("name", ["callbacks", "loggers", "profilers", "strategies"])
def test_classes_of_lightning_that_are_promised_can_be_named(by_default, name):
    promised = [
        path for path in ALLOWED if path.startswith(f"lightning.pytorch.{name}.") and path.split(".")[3][0].isupper()
    ]
    assert promised
    for path in promised:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--x", type=type)
        assert parser.parse_args([f"--x={path}"]).x.__name__ == path.rpartition(".")[2]


def test_writing_into_the_run_folder_is_allowed(fit_with, tmp_path):
    settings = {
        "checkpoint": {"dirpath": str(tmp_path / "run" / "mine")},
        "trainer": {"logger": spec(TENSORBOARD, save_dir=".")},
    }
    status, err = fit_with(settings)
    assert status == 0, err


@pytest.mark.parametrize("place", ATTACKS)
def test_function_that_runs_commands_is_refused_before_it_is_called(fit_with, tmp_path, place):
    marker = tmp_path / "ran"
    status, err = fit_with(ATTACKS[place](COMMANDS[RUNS_A_COMMAND](marker)))
    assert_refused(status, err, marker, RUNS_A_COMMAND)


@pytest.mark.parametrize("place", ["optimizer that is a command", "argument of a logger", "function of a strategy"])
@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "builtins.eval"])
def test_modules_that_run_commands_cannot_be_named(fit_with, tmp_path, place, name):
    marker = tmp_path / "ran"
    status, err = fit_with(ATTACKS[place](COMMANDS[name](marker)))
    assert_refused(status, err, marker, name)


def test_command_under_the_name_that_another_module_has_for_it_is_refused(fit_with, tmp_path):
    marker = tmp_path / "ran"
    status, err = fit_with({"model": {"optimizer": spec("shutil.os.system", command=f"touch {marker}")}})
    assert_refused(status, err, marker, "shutil.os.system")


def test_yaml_tags_of_python_are_refused(run_cli, tiny_digits, tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "x.yaml").write_text(f"seed_everything: !!python/object/apply:os.system ['touch {marker}']\n")
    status, _, err = run_cli("fit", *tiny_digits, "--config", tmp_path / "x.yaml", "--trainer.fast_dev_run", 1)
    assert_refused(status, err, marker, "os.system")


class OwnCallback(Callback):
    """A user's own."""

    made: ClassVar[list[str]] = []

    def __init__(self, word: str):
        self.made.append(word)


class OwnOptimizer(torch.optim.SGD):
    """A user's own."""


def own_network(channels: int) -> DenoiserUNet:
    """A user's own function."""
    OwnCallback.made.append(f"{channels} channels")
    return DenoiserUNet(1, (channels,), norm_num_groups=4, layers_per_block=1, num_class_embeds=11)


def test_classes_and_functions_of_ones_own_are_built_once_they_are_allowed(fit_with):
    OwnCallback.made.clear()
    settings = {
        "model": {
            "optimizer": spec(f"{__name__}.OwnOptimizer", lr=0.1),
            "unet": spec(f"{__name__}.own_network", channels=8),
        },
        "trainer": {"callbacks": [spec(f"{__name__}.OwnCallback", word="hello")]},
    }
    status, err = fit_with(settings)
    assert status != 0
    assert f"if you trust it, add --allow {__name__} to the command line" in err
    assert not OwnCallback.made
    status, err = fit_with(settings, "--allow", __name__)
    assert status == 0, err
    assert set(OwnCallback.made) == {"hello", "8 channels"}
