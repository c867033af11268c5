"""What a configuration from anyone may name. Each attack would leave a file behind if it were carried out."""

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from unet_diffusion.unet import DenoiserUNet

RUNS_A_COMMAND = "torch.utils.collect_env.run"  # a function of a package that is there: subprocess.Popen(command)
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"
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
    "function of a callback": lambda run: {"trainer": {"callbacks": [spec(LAMBDA, on_fit_start=run)]}},
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

    def fit(settings) -> tuple[int, str]:
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
        run = ("--trainer.fast_dev_run", 1, "--trainer.default_root_dir", tmp_path / "run")
        status, _, err = run_cli("fit", *tiny_digits, "--config", tmp_path / "settings.yaml", *run)
        return status, err

    return fit


def assert_refused(status, err, marker, name):
    assert status != 0
    assert name in err
    assert not marker.exists()


@pytest.mark.parametrize("place", ATTACKS)
def test_function_that_runs_commands_is_refused_before_it_is_called(fit_with, tmp_path, place):
    marker = tmp_path / "ran"
    status, err = fit_with(ATTACKS[place](COMMANDS[RUNS_A_COMMAND](marker)))
    assert_refused(status, err, marker, RUNS_A_COMMAND)


@pytest.mark.parametrize("place", ["optimizer that is a command", "argument of a logger", "function of a callback"])
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

    made: list[str] = []  # noqa: RUF012

    def __init__(self, word: str):
        self.made.append(word)


class OwnOptimizer(torch.optim.SGD):
    """A user's own."""


def own_network(channels: int) -> DenoiserUNet:
    """A user's own function."""
    OwnCallback.made.append(f"{channels} channels")
    return DenoiserUNet(1, (channels,), norm_num_groups=4, layers_per_block=1, num_class_embeds=11)


def test_classes_and_functions_of_ones_own_are_built(fit_with):
    OwnCallback.made.clear()
    settings = {
        "model": {
            "optimizer": spec(f"{__name__}.OwnOptimizer", lr=0.1),
            "unet": spec(f"{__name__}.own_network", channels=8),
        },
        "trainer": {"callbacks": [spec(f"{__name__}.OwnCallback", word="hello")]},
    }
    status, err = fit_with(settings)
    assert status == 0, err
    assert set(OwnCallback.made) == {"hello", "8 channels"}
