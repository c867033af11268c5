"""The machine decides the precision: tests pretend to be each kind of machine."""

import functools
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from unet_diffusion.runtime.precision import chosen_precision, precisions_for
from unet_diffusion.training import AutoencoderModule
from unet_diffusion.training.health import SkipBadSteps
from unet_diffusion.training.precision import RunTrainer, precision_before, smaller_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def precision_auto_is_float32():
    """Here, `auto` takes what the machine has."""


def pretend(monkeypatch, *, capability="AVX2", has_avx512_bf16=False, gpu_has_bfloat16=False) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has_bfloat16)


@pytest.mark.parametrize(
    ("machine", "device", "expected"),
    [
        ({"capability": "AVX2"}, "cpu", (FLOAT32,)),
        ({"capability": "AVX2", "has_avx512_bf16": True}, "cpu", (FLOAT32,)),  # a wide machine told to be a narrow one
        ({"capability": "AVX512"}, "cpu", (FLOAT32,)),  # before Zen 4 and Cooper Lake
        ({"capability": "AVX512", "has_avx512_bf16": True}, "cpu", (FLOAT32, BFLOAT16)),
        ({"gpu_has_bfloat16": False}, "cuda", (FLOAT32, FLOAT16)),  # T4, V100
        ({"gpu_has_bfloat16": True}, "cuda", (FLOAT32, BFLOAT16)),  # A100 and later
        ({}, "mps", (FLOAT32,)),
    ],
)
def test_each_kind_of_machine_gets_what_it_has_in_hardware(monkeypatch, machine, device, expected):
    pretend(monkeypatch, **machine)
    assert precisions_for(torch.device(device)) == expected


def test_auto_takes_16_bits_where_they_are_in_hardware_and_a_name_is_obeyed(monkeypatch):
    pretend(monkeypatch, capability="AVX2", gpu_has_bfloat16=False)
    assert chosen_precision("auto", CPU) == "float32"
    assert chosen_precision("bfloat16", CPU) == "bfloat16"
    assert chosen_precision("auto", CUDA) == "float16"
    pretend(monkeypatch, gpu_has_bfloat16=True)
    assert chosen_precision("auto", CUDA) == "bfloat16"
    with pytest.raises(ValueError, match="precision float16 is for GPUs, and this is a CPU; use auto or float32"):
        chosen_precision("float16", CPU)


# ------------------------------------------------------------------------------------------------------------ training


class Steps(Callback):
    """Weights before and after each optimiser step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in pl_module.unet.parameters()]))

    def on_train_end(self, trainer, pl_module):
        self.on_train_batch_start(trainer, pl_module)


def trainer_on(tmp_path, **options) -> RunTrainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return RunTrainer(
        **{"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, "limit_val_batches": 0, **quiet, **options}
    )


def has_only(monkeypatch, *dtypes) -> None:
    """Pretends that this machine has these in hardware, the last of them the fastest."""
    monkeypatch.setattr("unet_diffusion.training.precision.precisions_for", lambda device: dtypes)
    monkeypatch.setattr(
        "unet_diffusion.training.timing.fastest_setting",
        lambda *args, speeds, precisions, **options: (speeds[0], precisions[-1], "for a test"),
    )


@pytest.mark.parametrize("fused", [False, True])
def test_clipped_gradients_bound_the_step_in_float16(tiny_module, tiny_images, tmp_path, monkeypatch, fused):
    has_only(monkeypatch, FLOAT32, FLOAT16)
    steps = Steps()
    module = tiny_module(optimizer=functools.partial(torch.optim.SGD, lr=1.0, fused=fused))
    trainer = trainer_on(tmp_path, max_steps=2, gradient_clip_val=0.01, callbacks=[steps])
    trainer.fit(module, tiny_images(class_names=None))
    assert trainer.precision == "16-mixed"
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**16  # no step was skipped, which would halve it
    lengths = [(after - before).norm() for before, after in zip(steps.weights, steps.weights[1:], strict=False)]
    assert lengths == pytest.approx([0.01, 0.01], rel=1e-2)  # gradients of an untrained network are longer


@pytest.mark.parametrize("fused", [False, True])
def test_float16_takes_the_steps_of_float32_up_to_rounding(tiny_module, tiny_images, tmp_path, monkeypatch, fused):
    ends = []
    for dtypes in ((FLOAT32,), (FLOAT32, FLOAT16)):
        has_only(monkeypatch, *dtypes)
        steps = Steps()
        module = tiny_module(optimizer=functools.partial(torch.optim.SGD, lr=0.1, fused=fused))
        trainer_on(tmp_path, max_steps=3, callbacks=[steps]).fit(module, tiny_images(class_names=None))
        ends.append(steps.weights[-1] - steps.weights[0])
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[0].norm()  # float16 has 11 digits


def test_a_continued_run_keeps_its_precision(tiny_module, tiny_images, tmp_path, monkeypatch):
    data = tiny_images(class_names=None)
    has_only(monkeypatch, FLOAT32)
    trainer = trainer_on(tmp_path, max_steps=1)
    trainer.fit(tiny_module(), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    has_only(monkeypatch, FLOAT32, BFLOAT16)  # goes on where bfloat16 would be chosen
    module = tiny_module()
    module.is_continued = True
    trainer = trainer_on(tmp_path, max_steps=2)
    trainer.fit(module, data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert trainer.precision == "32-true"


@pytest.mark.parametrize("kind", ["denoiser", "autoencoder"])
def test_a_run_that_goes_on_where_its_precision_is_not_in_hardware_says_so(
    tiny_module, tiny_images, tmp_path, monkeypatch, kind
):
    from unet_diffusion.models.autoencoders import kl_autoencoder

    def make():
        if kind == "denoiser":
            return tiny_module(), tiny_images(class_names=None)
        sizes = {"layers_per_block": 1, "norm_num_groups": 4, "mid_attention": False}
        module = AutoencoderModule(kl_autoencoder(1, (8, 8), latent_channels=2, **sizes))
        return module, tiny_images(class_names=None, shape=(1, 16, 16))

    said = []
    monkeypatch.setattr("unet_diffusion.training.precision.rank_zero_info", said.append)
    has_only(monkeypatch, FLOAT32, BFLOAT16)
    module, data = make()
    trainer = trainer_on(tmp_path, max_steps=1)
    trainer.fit(module, data)
    assert trainer.precision == "bf16-mixed"
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    has_only(monkeypatch, FLOAT32)
    module, data = make()
    module.is_continued = True
    trainer = trainer_on(tmp_path, max_steps=2)
    trainer.fit(module, data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert trainer.precision == "32-true"
    assert said == ["the run was in bf16-mixed, which this machine does not have in hardware; it continues in 32-true"]


def test_a_float16_run_goes_on_so_on_a_gpu_with_bfloat16_and_not_on_a_cpu(monkeypatch):
    has_only(monkeypatch, FLOAT32, BFLOAT16)
    trainer = SimpleNamespace(precision_is_auto=True, strategy=SimpleNamespace(root_device=CUDA))
    assert precision_before(trainer, {"precision": "16-mixed"}) == (FLOAT16,)
    assert precision_before(trainer, {"precision": "16-mixed"}, can_scale_losses=False) == (FLOAT32, BFLOAT16)
    trainer.strategy.root_device = CPU
    assert precision_before(trainer, {"precision": "16-mixed"}) == (FLOAT32, BFLOAT16)


def test_a_precision_that_is_emulated_is_warned_of(tiny_module, tiny_images, tmp_path, monkeypatch):
    has_only(monkeypatch, FLOAT32)
    with pytest.warns(UserWarning, match=r"bf16-mixed is not in this machine's hardware.*; set it to auto"):
        trainer_on(tmp_path, max_steps=1, precision="bf16-mixed").fit(tiny_module(), tiny_images(class_names=None))


class Spoilt(Callback):
    """Makes the images of some steps infinite."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps:
            batch["images"].fill_(torch.inf)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_in_float16_are_counted_and_many_in_a_row_end_the_run(
    tiny_module, tiny_images, tmp_path, monkeypatch, fused
):
    has_only(monkeypatch, FLOAT32, FLOAT16)
    monkeypatch.setattr("unet_diffusion.training.health.MAX_BAD_STEPS_IN_FLOAT16", 3)
    make = functools.partial(tiny_module, optimizer=functools.partial(torch.optim.SGD, lr=0.1, fused=fused))
    options = {"max_steps": 6, "log_every_n_steps": 1, "gradient_clip_val": 1.0}
    module = make()
    trainer = trainer_on(tmp_path, callbacks=[Spoilt({1, 2, 4}), SkipBadSteps()], **options)
    trainer.fit(module, tiny_images(class_names=None))
    assert trainer.callback_metrics["train/skipped_steps"] == 3
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**13
    assert all(weight.isfinite().all() for weight in module.state_dict().values())
    trainer = trainer_on(tmp_path, callbacks=[Spoilt({1, 2, 3}), SkipBadSteps()], **options)
    with pytest.raises(RuntimeError, match="the gradients of 3 steps in a row"):
        trainer.fit(make(), tiny_images(class_names=None))


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_clipped_by_value_in_float16(tiny_module, tiny_images, tmp_path, monkeypatch, fused):
    has_only(monkeypatch, FLOAT32, FLOAT16)
    steps = Steps()
    module = tiny_module(optimizer=functools.partial(torch.optim.SGD, lr=1.0, fused=fused))
    clipping = {"gradient_clip_val": 1.0e-4, "gradient_clip_algorithm": "value"}
    trainer_on(tmp_path, max_steps=1, callbacks=[steps], **clipping).fit(module, tiny_images(class_names=None))
    largest = (steps.weights[1] - steps.weights[0]).abs().max()
    assert largest == pytest.approx(1.0e-4, rel=1e-2)  # the gradients of an untrained network are larger


def test_less_memory_is_advised_only_in_a_precision_of_the_hardware(monkeypatch):
    trainer = SimpleNamespace(precision="32-true", strategy=SimpleNamespace(root_device=CPU))
    has_only(monkeypatch, FLOAT32)
    assert smaller_precision(trainer) is None
    has_only(monkeypatch, FLOAT32, BFLOAT16)
    assert smaller_precision(trainer) == "bf16-mixed"
    trainer.precision = "bf16-mixed"
    assert smaller_precision(trainer) is None
    trainer.precision = "32-true"
    has_only(monkeypatch, FLOAT32, FLOAT16)
    assert smaller_precision(trainer) == "16-mixed"
    assert smaller_precision(trainer, can_scale_losses=False) is None  # it would be refused


def test_a_precision_of_weights_is_refused(tiny_module, tiny_images, quiet_trainer):
    with pytest.raises(ValueError, match=r"trainer\.precision must be auto, 32-true, bf16-mixed, 16-mixed, got bf16-"):
        quiet_trainer(max_steps=1, precision="bf16-true").fit(tiny_module(), tiny_images(class_names=None))


def test_config_and_checkpoint_hold_what_was_chosen_and_the_same_command_goes_on(
    run_cli, tiny_digits, tmp_path, monkeypatch
):
    has_only(monkeypatch, FLOAT32, BFLOAT16)
    options = [*tiny_digits, "--trainer.precision", "auto", "--model.speed", "auto"]
    options += ["--trainer.default_root_dir", tmp_path, "--model.lr_decay", "constant"]
    for max_steps in (2, 4):
        status, _, err = run_cli("fit", *options, "--trainer.max_steps", max_steps)
        assert status == 0, err
        has_only(monkeypatch, FLOAT32, BFLOAT16, FLOAT32)  # float32 would be chosen now
        settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert (settings["trainer"]["precision"], settings["model"]["speed"]) == ("bf16-mixed", "plain")
        checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        assert (checkpoint["precision"], checkpoint["speed"]) == ("bf16-mixed", "plain")
        assert checkpoint["denoiser"]["settings"]["trainer"]["precision"] == "bf16-mixed"
        assert checkpoint["global_step"] == max_steps


def test_the_environment_makes_a_wide_machine_a_narrow_one():
    import os
    import subprocess
    import sys

    code = (
        "import torch; from unet_diffusion.runtime.precision import precisions_for as p; print(p(torch.device('cpu')))"
    )
    narrow = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    out = subprocess.run([sys.executable, "-c", code], env=narrow, check=True, capture_output=True, text=True).stdout
    assert out == "(torch.float32,)\n"
