import copy
import math
import platform
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unet_diffusion.diffusion.sampling import build_scheduler, denoise, image_generators
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models import speed
from unet_diffusion.models.speed import SPEEDS, fastest_setting, prepare_weights, set_speed, speed_for_use
from unet_diffusion.runtime.precision import cpu_has_bfloat16
from unet_diffusion.training import DiffusionModule
from unet_diffusion.training.base import NetworkModule
from unet_diffusion.training.health import is_out_of_memory

CPU = torch.device("cpu")
NEEDS_FUSED = pytest.mark.skipif("fused" not in speed.speeds_for(CPU), reason="needs AVX2 and a C++ compiler")


@pytest.fixture
def precision_auto_is_float32():
    """Here, `auto` takes what the machine has."""


@pytest.mark.parametrize("name", speed.speeds_for(CPU))
def test_a_speed_changes_neither_weights_nor_names(tiny_unet, name):
    unet = tiny_unet()
    before = copy.deepcopy(unet.state_dict())
    set_speed(unet, name)
    after = unet.state_dict()
    assert list(after) == list(before)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"scale_shift": True}], ids=["added", "scale and shift"])
@pytest.mark.parametrize("name", ["plain", "channels_last", pytest.param("fused", marks=NEEDS_FUSED)])
def test_every_speed_computes_the_same(tiny_unet, name, options, monkeypatch):
    monkeypatch.setattr(speed, "MIN_WINOGRAD_CHANNELS", 8)
    unet, x, t = tiny_unet(**options), torch.randn(2, 1, 8, 8), torch.tensor([1, 99])
    for parameter in unet.parameters():  # many start at zero, where errors would not show
        torch.nn.init.normal_(parameter, std=0.1)
    expected = unet(x, t)
    expected_grads = torch.autograd.grad(expected.square().mean(), list(unet.parameters()))
    set_speed(unet, name)
    found = unet(x, t)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(found.square().mean(), list(unet.parameters()))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-5)


@NEEDS_FUSED
def test_the_last_speed_set_counts(tiny_unet):
    unet = tiny_unet()
    for name in ("compiled", "fused", "plain"):
        set_speed(unet, name)
    assert not any(getattr(module, "fused", False) for module in unet.modules())
    assert unet._compiled_call_impl is None
    assert unet.conv_in.weight.is_contiguous()


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("fast", "cpu", "speed must be one of plain, channels_last, fused, compiled, graphed, got 'fast'"),
        ("fused", "cuda", "speed fused is not for cuda; here use one of plain, channels_last, compiled, graphed"),
    ],
)
def test_a_speed_that_cannot_be_is_refused(tiny_unet, name, device, message):
    with pytest.raises(ValueError, match=message):
        set_speed(tiny_unet(), name, torch.device(device))


def test_without_a_compiler_nothing_that_needs_one_is_offered(tiny_unet, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"speed fused needs a C\+\+ compiler \(install g\+\+\); here use one of plain"
    ):
        set_speed(tiny_unet(), "fused")


@pytest.mark.parametrize(("capability", "offered"), [("AVX512", True), ("AVX2", True), ("DEFAULT", False)])
def test_fused_is_offered_where_torch_sees_avx2(monkeypatch, capability, offered):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(speed, "_has_compiler", lambda: True)
    assert ("fused" in speed.speeds_for(CPU)) == offered


def test_without_the_instructions_fused_is_neither_offered_nor_run(tiny_unet, monkeypatch):
    monkeypatch.setattr(speed, "_can_fuse", lambda: False)
    monkeypatch.setattr(speed, "_has_compiler", lambda: True)
    assert speed.speeds_for(CPU) == ("plain", "channels_last", "compiled")
    assert speed_for_use("fused", CPU) == "channels_last"
    with pytest.raises(ValueError, match="fused needs a processor with AVX2, and Linux; here use one of"):
        set_speed(tiny_unet(), "fused")


FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


class ToldTimes:
    """Has a step of 16 images at each setting take so long by the clock; `steps` are those that were timed, in order.

    A setting that is not told fails.
    """

    def __init__(self, monkeypatch, seconds: dict[tuple[str, torch.dtype], float], *, compile_seconds: float = 0):
        self.now, self.seconds, self.compile_seconds = 0.0, seconds, compile_seconds
        self.steps: list[tuple[str, torch.dtype, int]] = []
        monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(speed, "set_speed", self.set_speed)
        monkeypatch.setattr(speed._Trial, "_step", lambda trial, setting, number: self.step(setting, number))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/nowhere")  # nothing is compiled

    def set_speed(self, network, name):
        self.now += self.compile_seconds if name in ("fused", "compiled") else 0

    def step(self, setting, number):
        self.steps.append((setting.speed, setting.dtype, number))
        if (setting.speed, setting.dtype) not in self.seconds:
            raise RuntimeError("g++ is not what it seems")
        taken = self.seconds[setting.speed, setting.dtype] * number / 16
        self.now += taken
        return taken


def choose(unet, num_steps=math.inf, speeds=SPEEDS, precisions=(FLOAT32,)):
    x = torch.zeros(16, 1, 8, 8)
    return fastest_setting(unet, x, inputs={}, num_steps=num_steps, speeds=speeds, precisions=precisions)


def test_the_fastest_is_chosen_and_the_reason_given(tiny_unet, monkeypatch):
    seconds = {"plain": 0.1, "channels_last": 0.11, "fused": 0.06, "compiled": 0.08}
    ToldTimes(monkeypatch, {(name, FLOAT32): taken for name, taken in seconds.items()})
    chosen, dtype, reason = choose(tiny_unet())
    assert (chosen, dtype) == ("fused", FLOAT32)
    assert reason == (
        "speed fused in float32: a step takes 0.06 s (plain in float32 0.1 s, channels_last in float32 0.11 s, "
        "compiled in float32 0.08 s; tried for 1.2 s)"
    )


def test_what_a_gpu_loads_at_its_first_step_does_not_count(tiny_unet, monkeypatch):
    """A step there takes milliseconds, and the first one of each setting a second."""
    told = ToldTimes(
        monkeypatch, {("plain", FLOAT32): 0.1, ("plain", BFLOAT16): 0.05, ("channels_last", BFLOAT16): 0.03}
    )
    step, met = told.step, set()

    def with_loading(setting, number):
        loading = 0.0 if setting in met else 1.0
        told.now += loading
        met.add(setting)
        return loading + step(setting, number)

    told.step = with_loading
    x = torch.zeros(16, 1, 8, 8, device="meta")
    chosen, dtype, _ = fastest_setting(
        tiny_unet(), x, inputs={}, num_steps=10_000, speeds=("plain", "channels_last"), precisions=(FLOAT32, BFLOAT16)
    )
    assert (chosen, dtype) == ("channels_last", BFLOAT16)
    assert ("channels_last", BFLOAT16, 16) in told.steps  # timed with the whole batch


def test_a_gain_within_the_noise_does_not_count(tiny_unet, monkeypatch):
    ToldTimes(monkeypatch, {("plain", FLOAT32): 0.1, ("plain", BFLOAT16): 0.097, ("fused", FLOAT32): 0.096})
    assert choose(tiny_unet(), precisions=(FLOAT32, BFLOAT16))[:2] == ("plain", FLOAT32)
    ToldTimes(monkeypatch, {("plain", FLOAT32): 0.1, ("fused", FLOAT32): 0.052, ("fused", BFLOAT16): 0.05})
    assert choose(tiny_unet(), precisions=(FLOAT32, BFLOAT16))[:2] == ("fused", FLOAT32)


def test_16_bits_are_chosen_where_they_are_faster(tiny_unet, monkeypatch):
    ToldTimes(monkeypatch, {("plain", FLOAT32): 0.1, ("plain", BFLOAT16): 0.06, ("channels_last", BFLOAT16): 0.05})
    assert choose(tiny_unet(), precisions=(FLOAT32, BFLOAT16))[:2] == ("channels_last", BFLOAT16)


def test_what_is_far_slower_is_dropped_after_a_step_with_an_eighth_of_the_batch(tiny_unet, monkeypatch):
    told = ToldTimes(monkeypatch, {("plain", FLOAT32): 5.0, ("plain", BFLOAT16): 0.1})
    reason = choose(tiny_unet(), speeds=("plain",), precisions=(FLOAT32, BFLOAT16))[2]
    assert told.steps == [("plain", BFLOAT16, 2), *[("plain", BFLOAT16, 16)] * 3, ("plain", FLOAT32, 2)]
    assert "plain in float32 dropped, 50.0 times as slow" in reason


@pytest.mark.parametrize("step_seconds", [0.01, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("num_steps", [10, 1000, math.inf])
def test_the_trial_ends_within_15_seconds_and_5_percent_of_the_run(tiny_unet, monkeypatch, step_seconds, num_steps):
    speeds = ("plain", "channels_last", "fused")
    told = ToldTimes(monkeypatch, {(name, dtype): step_seconds for name in speeds for dtype in (FLOAT32, BFLOAT16)})
    choose(tiny_unet(), num_steps=num_steps, speeds=speeds, precisions=(FLOAT32, BFLOAT16))
    least = 2 * step_seconds / speed.SMALL_SHARE  # two small steps; without any, nothing is known
    assert told.now <= max(min(15.0, 0.05 * num_steps * step_seconds), least) * (1 + 1e-9)


def test_what_must_be_compiled_is_tried_where_5_percent_of_the_run_cover_it(tiny_unet, monkeypatch):
    seconds = {("plain", FLOAT32): 1.0, ("channels_last", FLOAT32): 1.0, ("fused", FLOAT32): 0.1}
    ToldTimes(monkeypatch, seconds, compile_seconds=12)
    chosen, _, reason = choose(tiny_unet(), num_steps=299, speeds=("plain", "fused"))
    assert chosen == "plain"  # 15 s are more than 5 % of 299 s
    assert "no time for fused in float32" in reason
    assert choose(tiny_unet(), num_steps=400, speeds=("plain", "fused"))[0] == "fused"


def test_what_is_compiled_is_tried_in_any_run(tiny_unet, monkeypatch, tmp_path):
    ToldTimes(monkeypatch, {("plain", FLOAT32): 0.1, ("fused", FLOAT32): 0.05})
    monkeypatch.setattr(speed, "library_path", lambda: tmp_path)  # there
    assert choose(tiny_unet(), num_steps=200, speeds=("plain", "fused"))[0] == "fused"


def test_compiled_network_alone_is_compiled_for_a_whole_batch_in_each_precision(tiny_unet, monkeypatch):
    told = ToldTimes(monkeypatch, {("compiled", FLOAT32): 0.1, ("compiled", BFLOAT16): 0.05}, compile_seconds=100)
    chosen = choose(tiny_unet(), speeds=("compiled",), precisions=(FLOAT32, BFLOAT16))[:2]
    assert chosen == ("compiled", BFLOAT16)
    assert {images for _, _, images in told.steps} == {16}  # another number would compile it again
    assert {dtype for _, dtype, _ in told.steps} == {FLOAT32, BFLOAT16}


def test_a_setting_that_does_not_run_is_left_out(tiny_unet, monkeypatch):
    ToldTimes(monkeypatch, {("plain", FLOAT32): 0.1, ("channels_last", FLOAT32): 0.05})
    chosen, _, reason = choose(tiny_unet(), speeds=("plain", "channels_last", "fused"))
    assert chosen == "channels_last"
    assert "; fused in float32 does not run here (g++ is not what it seems); " in reason


def test_a_setting_that_fails_after_its_first_step_is_left_out(tiny_unet, monkeypatch):
    told = ToldTimes(monkeypatch, {("plain", FLOAT32): 0.1, ("channels_last", FLOAT32): 0.05})
    step = told.step

    def runs_once(setting, number):
        if told.steps.count(("channels_last", FLOAT32, 16)) == 1 and setting.speed == "channels_last":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(setting, number)

    told.step = runs_once
    chosen, _, reason = choose(tiny_unet(), speeds=("plain", "channels_last"))
    assert chosen == "plain"
    assert "channels_last in float32 does not run here (CUDA out of memory); " in reason


def test_batch_that_fits_at_no_speed_is_a_lack_of_memory(tiny_unet, monkeypatch):
    told = ToldTimes(monkeypatch, {})

    def fails(setting, number):
        raise torch.OutOfMemoryError("CUDA out of memory")

    told.step = fails
    with pytest.raises(RuntimeError, match=r"runs at no speed here: .*CUDA out of memory") as caught:
        choose(tiny_unet(), speeds=("plain", "channels_last"))
    assert is_out_of_memory(caught.value)


def test_trying_leaves_network_and_random_numbers_alone(tiny_unet, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/nowhere")
    unet = tiny_unet(dropout=0.5)
    weights, random_state = copy.deepcopy(unet.state_dict()), torch.get_rng_state()
    chosen, _, reason = choose(unet, num_steps=100, speeds=speed.speeds_for(CPU))  # too few to compile for
    assert chosen in ("plain", "channels_last")
    assert reason.startswith(f"speed {chosen} in float32: a step takes ")
    torch.testing.assert_close(unet.state_dict(), weights, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.parametrize("speed", ["plain", "channels_last"])
def test_rounded_weights_predict_what_autocast_does(tiny_unet, speed):
    unet = tiny_unet(num_class_embeds=3, attention_levels=[1])
    for parameter in unet.parameters():  # many start at zero, where errors would not show
        torch.nn.init.normal_(parameter, std=0.1)
    set_speed(unet, speed)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 99]), torch.tensor([0, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = unet(x, t, labels)
        prepare_weights(unet, torch.bfloat16)
        assert unet.conv_in.weight.dtype == torch.bfloat16
        torch.testing.assert_close(unet(x, t, labels), expected, rtol=0, atol=0)


RESIDENT = """
import torch
from unet_diffusion.models.speed import keep_freed_memory
if {keep}: keep_freed_memory()
def resident():
    status = open("/proc/self/status").read()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024
block = torch.ones(64 * 2**20, dtype=torch.uint8)
before = resident()
del block
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step():
    def returned(keep: bool) -> float:  # MiB, of 64
        command = [sys.executable, "-c", RESIDENT.format(keep=keep)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert returned(keep=False) > 60
    assert returned(keep=True) < 4


# -------------------------------------------------------------------------------------------- in training and sampling


def test_auto_times_once_and_a_continued_run_keeps_what_was_found(
    tiny_module, tiny_images, quiet_trainer, tmp_path, monkeypatch
):
    found = iter(["channels_last"])
    monkeypatch.setattr(
        "unet_diffusion.training.timing.fastest_setting", lambda *args, **options: (next(found), FLOAT32, "for a test")
    )
    data = tiny_images(class_names=None)
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(tiny_module(speed="auto"), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    module = tiny_module(speed="auto")
    module.is_continued = True
    quiet_trainer(max_steps=4, limit_val_batches=0).fit(module, data, ckpt_path=tmp_path / "run.ckpt")
    assert module.chosen_speed == "channels_last"
    assert module.unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_run_continued_at_another_speed_keeps_its_moments(tiny_module, tiny_images, quiet_trainer, tmp_path):
    """A fused optimiser walks through weights and moments in memory, whatever their strides."""
    optimizer = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    data = tiny_images(class_names=None)
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(tiny_module(optimizer=optimizer), data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    ends = []
    for name in ("plain", "channels_last"):
        module = tiny_module(optimizer=optimizer, speed=name)
        quiet_trainer(max_steps=4, limit_val_batches=0).fit(module, data, ckpt_path=tmp_path / "run.ckpt")
        ends.append(module.unet.state_dict())
    # A step of Adam is 1e-2; where a gradient is near 0, rounding decides its sign.
    differences = torch.cat([(a - b).abs().flatten() for a, b in zip(*(end.values() for end in ends), strict=True)])
    assert differences.quantile(0.99) < 1e-4


@NEEDS_FUSED
@pytest.mark.parametrize(
    "precision",
    [
        "32-true",
        pytest.param("bf16-mixed", marks=pytest.mark.skipif(not cpu_has_bfloat16(), reason="needs AVX-512 with bf16")),
    ],
)
def test_a_fused_run_goes_on_bit_for_bit(run_cli, tiny_digits, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(speed, "MIN_WINOGRAD_CHANNELS", 8)
    fused = [*tiny_digits, "--model.speed", "fused", "--trainer.precision", precision]
    weights = []
    for name, stops in (("whole", [4]), ("halves", [2, 4])):
        root = tmp_path / name
        for step in stops:
            more = ["--ckpt_path", root / "checkpoints" / "last.ckpt"] if step > stops[0] else []
            arguments = [*fused, "--trainer.max_steps", step, "--model.lr_decay", "constant"]
            status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", root, *more)
            assert status == 0, err
        assert (root / "pipeline" / "model_index.json").is_file()
        weights.append(torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize(("can_be_graphed", "expected"), [(True, "graphed"), (False, "compiled")])
def test_auto_takes_graphs_where_compiling_pays_and_they_can_be(
    tiny_module, tiny_images, quiet_trainer, monkeypatch, can_be_graphed, expected
):
    monkeypatch.setattr(
        "unet_diffusion.training.timing.fastest_setting", lambda *args, **options: ("compiled", FLOAT32, "for a test")
    )
    monkeypatch.setattr("unet_diffusion.training.timing.can_be_graphed", lambda trainer: can_be_graphed)
    monkeypatch.setattr(NetworkModule, "_speeds", lambda self: ("plain", "compiled", "graphed"))  # as on a GPU
    ran_at = []
    monkeypatch.setattr(NetworkModule, "run_at", lambda self, speed: ran_at.append(speed))
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(tiny_module(speed="auto"), tiny_images(class_names=None))
    assert ran_at == [expected]


def test_precision_of_graphs_is_found_with_the_compiled_network(tiny_module, tiny_images, quiet_trainer, monkeypatch):
    timed, ran_at = [], []

    def fastest_of(*args, speeds, precisions, **options):
        timed.append((speeds, precisions))
        return speeds[0], precisions[-1], "for a test"

    monkeypatch.setattr("unet_diffusion.training.timing.fastest_setting", fastest_of)
    for place in ("timing", "base"):
        monkeypatch.setattr(f"unet_diffusion.training.{place}.can_be_graphed", lambda trainer: True)
    monkeypatch.setattr(
        "unet_diffusion.training.base.possible_precisions", lambda trainer, **options: (FLOAT32, BFLOAT16)
    )
    monkeypatch.setattr(NetworkModule, "run_at", lambda self, speed: ran_at.append(speed))
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(tiny_module(speed="graphed"), tiny_images(class_names=None))
    assert timed == [(("compiled",), (FLOAT32, BFLOAT16))]
    assert ran_at == ["graphed"]
    assert trainer.precision == "bf16-mixed"


def test_graphs_where_they_cannot_be_are_refused(tiny_module, tiny_images, quiet_trainer):
    with pytest.raises(ValueError, match="speed graphed needs a GPU in one process, with accumulate_grad_batches 1"):
        quiet_trainer(max_steps=1).fit(tiny_module(speed="graphed"), tiny_images(class_names=None))


def test_auto_without_a_data_module_is_refused(tiny_module, tiny_images, quiet_trainer):
    data = tiny_images(class_names=None)
    data.setup("fit")
    data.trainer = None
    with pytest.raises(ValueError, match="speed auto needs a data module that knows its images"):
        quiet_trainer(max_steps=1).fit(tiny_module(speed="auto"), data.train_dataloader())


def test_fit_times_the_speeds_of_this_machine_and_says_so(run_cli, tiny_digits, tmp_path, monkeypatch):
    said = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/nowhere")
    monkeypatch.setattr("unet_diffusion.training.timing.rank_zero_info", said.append)
    status, _, err = run_cli("fit", *tiny_digits, "--model.speed", "auto", "--trainer.default_root_dir", tmp_path)
    assert status == 0, err
    (reason,) = [line for line in said if ": a step takes " in line]
    chosen = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["speed"]
    assert chosen in ("plain", "channels_last")  # four steps are too few to compile for
    assert reason.startswith(f"speed {chosen} in float32: ")


@pytest.mark.parametrize(
    ("trained_at", "device", "used_at"),
    [
        ("plain", "cpu", "plain"),
        ("channels_last", "cpu", "channels_last"),
        pytest.param("fused", "cpu", "fused", marks=NEEDS_FUSED),
        ("fused", "cuda", "channels_last"),
        ("compiled", "cpu", "channels_last"),
        ("graphed", "cuda", "channels_last"),
        ("plain", "cuda", "plain"),
    ],
)
def test_a_network_is_used_at_the_speed_it_was_trained_at_if_that_compiles_no_whole_one(trained_at, device, used_at):
    assert speed_for_use(trained_at, torch.device(device)) == used_at


def test_sample_runs_at_the_speed_of_the_training(run_cli, tiny_digits, tmp_path, monkeypatch):
    options = ("--model.speed", "channels_last", "--trainer.default_root_dir", tmp_path / "run")
    status, _, err = run_cli("fit", *tiny_digits, *options)
    assert status == 0, err
    set_to = []
    monkeypatch.setattr("unet_diffusion.inference.running.set_speed", lambda unet, speed: set_to.append(speed))
    for asked in ([], ["--speed", "plain"]):
        command = ("sample", tmp_path / "run", "--num_images", 1, "--num_inference_steps", 2, "--overwrite", *asked)
        status, _, err = run_cli(*command, "--output", tmp_path / "drawn")
        assert status == 0, err
    assert set_to == ["channels_last", "plain"]


class HostReads(TorchDispatchMode):
    """Counts the operations that hand a tensor's value to Python, each of which waits for a GPU."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.nonzero.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.READS:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_host_reads_are_found():
    with HostReads() as reads:
        torch.ones(1).item()
    assert reads.found


def test_a_training_step_reads_nothing_back(tiny_unet, tiny_images, quiet_trainer):
    class Watched(DiffusionModule):
        found: list[str] | None = None

        def training_step(self, batch, batch_idx):
            with HostReads() as reads:
                loss = super().training_step(batch, batch_idx)
                torch.autograd.grad(loss, list(self.unet.parameters()), retain_graph=True)
            self.found = reads.found
            return loss

    module = Watched(tiny_unet(num_class_embeds=3), NoiseSchedule(100), label_dropout=0.1)
    quiet_trainer(max_steps=2, limit_val_batches=0, log_every_n_steps=50).fit(module, tiny_images())
    assert module.found == []


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_a_sampling_loop_reads_nothing_back(name, monkeypatch):
    # Tensors on the meta device have no values: what would read one fails. Autocast does not know the device.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    x = denoise(
        lambda x, t: x * 0.5,
        build_scheduler(NoiseSchedule(), name),
        image_generators(0, range(2)),
        (2, 1, 8, 8),
        num_inference_steps=10,
        device="meta",
    )
    assert x.shape == (2, 1, 8, 8)
