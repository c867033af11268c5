"""One training run in two real processes on the CPU, looked at from several sides."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from forked import run_python
from PIL import Image

from unet_diffusion.data import SegmentationDataModule, SyntheticCells, scale_to_unit_range
from unet_diffusion.inference.reading import read_segmenter
from unet_diffusion.latents.store import read_latents
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.segmentation.augmentation import Augmentation
from unet_diffusion.segmentation.labels import Targets
from unet_diffusion.segmentation.scores import dice
from unet_diffusion.training.batch_norms import FIRST_EPOCH

CONFIGS = Path(__file__).parents[1] / "configs"

pytestmark = pytest.mark.slow

RECORDER = """
import torch
from lightning.pytorch import Callback

import unet_diffusion.training.callbacks as callbacks


class Recorder(Callback):
    '''Writes what each process drew, drew a grid of, and ended with.'''

    def setup(self, trainer, module, stage):
        self.noise, self.t, self.grids, self.index = [], [], [], []
        add_noise, write_png = module.schedule.add_noise, callbacks.write_png

        def recorded_noise(x0, noise, t):
            if torch.is_grad_enabled():
                self.noise.append(noise)
                self.t.append(t)
            return add_noise(x0, noise, t)

        def recorded_grid(picture, path):
            self.grids.append(path.name)
            write_png(picture, path)

        module.schedule.add_noise, callbacks.write_png = recorded_noise, recorded_grid

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.index.append(batch["index"])

    def teardown(self, trainer, module, stage):
        names = ("noise", "t", "grids", "index")
        record = {name: getattr(self, name) for name in names}
        torch.save({**record, "weights": module.state_dict()}, f"rank{trainer.global_rank}.pt")
"""
NUM_STEPS = 3


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, tiny_digits):
    """The folder of a finished run, with rank0.pt and rank1.pt beside it."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "recorder.py").write_text(RECORDER)
    program = Path(sys.executable).parent / "unet-diffusion"
    command = [str(program)] if program.exists() else ["-m", "unet_diffusion"]
    arguments = ["--config", str(CONFIGS / "trainer" / "ddp.yaml"), "--trainer.devices", "2"]
    arguments += ["--trainer.max_steps", str(NUM_STEPS), "--trainer.val_check_interval", str(NUM_STEPS)]
    arguments += ["--checkpoint.every_n_train_steps", "null", "--checkpoint.monitor", "val/loss"]
    arguments += ["--trainer.precision", "32-true"]
    arguments += ["--trainer.default_root_dir", "run", "--allow=recorder", "--trainer.callbacks+=recorder.Recorder"]
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, *command, "fit", *tiny_digits, *arguments]
    done = run_python(whole, cwd=folder, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(two_processes):
    return [torch.load(two_processes / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_weights_and_averages_are_equal_on_both_processes(ranks):
    torch.testing.assert_close(ranks[0]["weights"], ranks[1]["weights"], rtol=0, atol=0)


def test_noise_and_timesteps_differ_between_processes(ranks):
    assert len(ranks[0]["noise"]) == len(ranks[1]["noise"]) == NUM_STEPS
    for step in range(NUM_STEPS):
        assert not torch.equal(ranks[0]["noise"][step], ranks[1]["noise"][step])
        assert not torch.equal(ranks[0]["t"][step], ranks[1]["t"][step])


def test_images_differ_between_processes(ranks):
    seen = torch.cat(ranks[0]["index"] + ranks[1]["index"])
    assert len(seen) == 2 * 32 * NUM_STEPS
    assert len(seen.unique()) == len(seen)


def test_grids_are_drawn_by_one_process(ranks, two_processes):
    assert ranks[0]["grids"] == ["step_0000002.png", "samples.png"]
    assert ranks[1]["grids"] == []
    assert (two_processes / "run" / "samples.png").is_file()


def test_one_run_is_left_with_its_pipeline(two_processes):
    run = two_processes / "run"
    assert [path.name for path in (run / "logs").iterdir()] == ["version_0"]
    assert (run / "pipeline" / "model_index.json").is_file()
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["devices"] == "2"


def validated(folder: Path) -> dict[str, float]:
    """What a run last logged of its validation."""
    with open(next(folder.glob("logs/*/metrics.csv")), newline="") as file:
        rows = [{name: value for name, value in row.items() if name.startswith("val/")} for row in csv.DictReader(file)]
    return {name: float(value) for name, value in [row for row in rows if any(row.values())][-1].items()}


def test_validation_losses_are_those_of_a_single_process(two_processes, run_cli, tmp_path):
    """Of each quarter of the noise levels too, as the processes do not have equally many images of each."""
    run = two_processes / "run"
    logged = validated(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"].update(devices=1, strategy="auto", callbacks=None, default_root_dir=str(tmp_path / "alone"))
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", tmp_path / "alone.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt"]
    status, _, err = run_cli("validate", *arguments)
    assert status == 0, err
    assert logged.keys() == {"val/loss", *(f"val/loss_q{quarter}" for quarter in (1, 2, 3, 4))}
    assert logged == pytest.approx(validated(tmp_path / "alone"), rel=1e-5)  # float32 sums in another order


@pytest.fixture(scope="module")
def segmenter_run(tmp_path_factory):
    """A run of two processes, with three images to validate on: one process has two of them, the other one."""
    folder = tmp_path_factory.mktemp("cells")
    arguments = f"--config {CONFIGS / 'cells.yaml'} --config {CONFIGS / 'trainer' / 'ddp.yaml'} --trainer.devices 2 "
    arguments += "--trainer.accelerator cpu --trainer.precision 32-true --model.unet.init_args.channels [4,8] "
    arguments += "--data.num_images 6 --data.num_val 3 "
    arguments += "--data.batch_size 2 --trainer.max_steps 2 --trainer.val_check_interval 2 "
    arguments += "--samples.every_n_steps 0 --checkpoint.every_n_train_steps 2 --trainer.log_every_n_steps 1 "
    arguments += "--trainer.default_root_dir run"
    command = [sys.executable, "-m", "unet_diffusion", "fit", *arguments.split()]
    done = run_python(command, cwd=folder, timeout=180)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_segmenter_is_validated_alike_on_two_processes(segmenter_run):
    trained = read_segmenter(segmenter_run)
    loaded = SyntheticCells(num_images=6).load(progress=False)
    truths, predictions = [], []
    for image, labels in zip(loaded.images[-3:], loaded.labels[-3:], strict=True):
        with torch.no_grad():
            probabilities = trained.maps(scale_to_unit_range(image))
        truths.append(labels > 0)
        predictions.append((probabilities[0] < 1 - trained.threshold).numpy())
    with open(segmenter_run / "logs" / "version_0" / "metrics.csv") as file:
        (logged,) = [row["val/dice"] for row in csv.DictReader(file) if row.get("val/dice")]
    assert float(logged) == pytest.approx(dice(np.concatenate(truths), np.concatenate(predictions)), abs=1e-4)


def test_statistics_of_batch_norms_are_of_the_batches_of_both_processes(segmenter_run):
    augmentation = Augmentation(elastic_sd=5.0, brightness=0.1, contrast=0.1)
    settings = {"window_size": 128, "windows_per_image": 8, "batch_size": 2, "num_val": 3, "augmentation": augmentation}
    targets = Targets(label_format="instances", separate_borders=True, border_width=1)
    data = SegmentationDataModule(SyntheticCells(num_images=6), targets, **settings)
    sampler = data.train_dataloader().sampler
    sampler.set_epoch(FIRST_EPOCH)
    batches = [torch.stack([data.window(one)["images"] for one in drawn]) for drawn in [*sampler][:2]]
    unet = read_segmenter(segmenter_run).unet
    with torch.no_grad():
        means = [unet.conv_in.conv1(batch).mean(dim=(0, 2, 3)) for batch in batches]
    torch.testing.assert_close(unet.conv_in.norm1.running_mean, torch.stack(means).mean(dim=0), rtol=1e-4, atol=1e-6)


WATCHER = """
import torch
from lightning.pytorch import Callback


class Watcher(Callback):
    '''Writes what the conditions were, what each step dropped of them, and what they became.'''

    def setup(self, trainer, module, stage):
        self.before = {name: value.clone() for name, value in module.conditions.named_parameters()}
        self.dropped = []
        for condition in module.conditions:
            condition.drop = self.recorded(condition.drop)

    def recorded(self, drop):
        def recorded_drop(given, generator):
            kept = drop(given, generator)
            self.dropped.append((kept != given).view(len(given), -1).any(dim=1))
            return kept

        return recorded_drop

    def teardown(self, trainer, module, stage):
        record = {"before": self.before, "dropped": torch.stack(self.dropped), "after": module.state_dict()}
        torch.save(record, f"rank{trainer.global_rank}.pt")
"""


def captioned_folder(folder: Path) -> None:
    """Twelve images of noise of two classes, with captions."""
    rows = ["file_name,text"]
    for number in range(12):
        name = f"{('cat', 'dog')[number % 2]}/{number}.png"
        pixels = np.random.default_rng(number).integers(256, size=(8, 8, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        rows.append(f"{name},animal number {number}")
    (folder / "metadata.csv").write_text("\n".join(rows))


@pytest.fixture(scope="module")
def conditioned_ranks(tmp_path_factory):
    """What each of two processes kept of a run with captions and class tokens."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("conditions")
    (folder / "watcher.py").write_text(WATCHER)
    captioned_folder(folder / "images")
    text = {"context_dim": 8, "vocab_size": 600, "max_length": 8, "num_layers": 1, "num_heads": 2, "dropout": 0.5}
    tokens = {"context_dim": 8, "num_classes": 2, "dropout": 0.5}
    unet = {"in_channels": 3, "channels": [8, 8], "layers_per_block": 1, "attention_levels": [1], "num_heads": 2}
    config = {
        "model": {
            "unet": {
                "class_path": "unet_diffusion.models.denoiser_unet.DenoiserUNet",
                "init_args": {**unet, "context_dim": 8, "norm_num_groups": 4},
            },
            "schedule": {"class_path": "unet_diffusion.diffusion.schedule.NoiseSchedule"},
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
            "conditions": [
                {"class_path": "unet_diffusion.diffusion.conditions.text.TextTokens", "init_args": text},
                {"class_path": "unet_diffusion.diffusion.conditions.class_tokens.ClassTokens", "init_args": tokens},
            ],
        },
        "data": {
            "class_path": "unet_diffusion.data.ImageDataModule",
            "init_args": {
                "source": {
                    "class_path": "unet_diffusion.data.Folder",
                    "init_args": {"root": "images", "image_size": 8, "class_labels": True, "captions": True},
                },
                "batch_size": 4,
                "num_val": 2,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "ddp",
            "max_steps": NUM_STEPS,
            "default_root_dir": "run",
            "callbacks": [{"class_path": "watcher.Watcher"}],
        },
        "samples": {"every_n_steps": 0, "num_images": 2, "num_inference_steps": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [
        sys.executable,
        "-m",
        "unet_diffusion",
        "fit",
        "--config",
        "config.yaml",
        "--allow=watcher",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = run_python(command, cwd=folder, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_conditions_are_trained_and_equal_on_both_processes(conditioned_ranks):
    first, second = (one["after"] for one in conditioned_ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for name, before in conditioned_ranks[0]["before"].items():
        if "k_proj.bias" not in name:  # softmax does not see what is added to every key
            assert not torch.equal(first[f"conditions.{name}"], before), name


def test_words_are_the_same_on_both_processes(conditioned_ranks):
    first, second = (one["after"]["conditions.0._extra_state"] for one in conditioned_ranks)
    assert len(first) > 0
    assert torch.equal(first, second)


def test_conditions_are_dropped_by_different_choices_on_each_process(conditioned_ranks):
    first, second = (one["dropped"] for one in conditioned_ranks)
    assert first.shape == (2 * NUM_STEPS, 4)  # of captions and classes in turn
    for one, other in ((first[0::2], second[0::2]), (first[1::2], second[1::2])):
        assert not torch.equal(one, other)
        assert 0 < one.float().mean() < 1


KEEPER = """
import torch
from lightning.pytorch import Callback


class Keeper(Callback):
    def on_train_end(self, trainer, module):  # the validation that follows makes all processes have the weights of one
        torch.save(module.state_dict(), f"rank{trainer.global_rank}.pt")
"""


AUTOENCODER = "--data.root images --data.num_val 3 --data.image_size 32 "
AUTOENCODER += "--data.batch_size 2 --model.autoencoder.init_args.channels [32,32,32] "
AUTOENCODER += "--trainer.accelerator cpu --trainer.precision 32-true --samples.num_images 2"
CRITIC = "--model.adversarial.discriminator PatchDiscriminator --model.adversarial.discriminator.channels 32 "
CRITIC += "--model.adversarial.start 1"
TWO = f"--config {CONFIGS / 'trainer' / 'ddp.yaml'} --trainer.strategy.init_args.find_unused_parameters true "
TWO += "--trainer.devices 2"


def noise_folder(folder: Path) -> None:
    """Twelve images of noise, of more contrast from one to the next, three of which are validated on."""
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(256, size=(32, 32, 3))
        Image.fromarray((128 + (pixels - 128) * number // 12).astype(np.uint8)).save(folder / f"{number}.png")


def with_autoencoder(folder: Path, command: str, arguments: str) -> None:
    """Runs a command of ours on those images, in a process of its own."""
    whole = [sys.executable, "-m", "unet_diffusion", command, *arguments.split(), *AUTOENCODER.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    done = run_python(whole, cwd=folder, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory):
    """A folder with images and what two processes trained on them: run, and rank0.pt and rank1.pt."""
    folder = tmp_path_factory.mktemp("autoencoder")
    noise_folder(folder / "images")
    (folder / "keeper.py").write_text(KEEPER)
    arguments = f"--config {CONFIGS / 'autoencoder_kl.yaml'} {TWO} --trainer.max_steps 3 "
    arguments += f"{CRITIC} --trainer.default_root_dir run --allow keeper --trainer.callbacks+=keeper.Keeper"
    with_autoencoder(folder, "fit", arguments)
    return folder


def test_autoencoder_and_discriminator_are_equal_on_both_processes(autoencoder_folder):
    """Each process sees other images: weights stay equal only if both networks' gradients are averaged."""
    weights = [torch.load(autoencoder_folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert any(name.startswith("discriminator.") for name in weights[0])
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_autoencoder_is_validated_alike_on_one_process_and_on_two(autoencoder_folder):
    """Three images to validate on: one process has two of them, the other one."""
    arguments = f"--config {CONFIGS / 'autoencoder_kl.yaml'} --trainer.devices 1 --trainer.default_root_dir alone "
    with_autoencoder(autoencoder_folder, "validate", arguments + f"{CRITIC} --ckpt_path run/checkpoints/last.ckpt")
    alone = validated(autoencoder_folder / "alone")
    assert alone.keys() == {"val/psnr", "val/ssim", "val/latent_mean", "val/latent_std", "val/latent_signal"}
    # float32 sums in another order; one image in a batch, or two
    assert validated(autoencoder_folder / "run") == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def restarted_folder(autoencoder_folder):
    """What two processes trained with a codebook: restarted, and rank0.pt and rank1.pt beside it."""
    recipe = f"--config {CONFIGS / 'autoencoder_vq.yaml'} {TWO} --model.restart_codes_after 2 --trainer.max_steps 5 "
    recipe += "--trainer.default_root_dir restarted --allow keeper --trainer.callbacks+=keeper.Keeper"
    with_autoencoder(autoencoder_folder, "fit", recipe)
    return autoencoder_folder


def test_codebook_with_restarted_codes_is_equal_on_both_processes(restarted_folder):
    weights = [torch.load(restarted_folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert weights[0]["autoencoder.quantize.embedding.weight"].abs().max() > 0.1  # 0.001 as made


def test_use_of_the_codes_is_that_of_all_processes(restarted_folder):
    recipe = f"--config {CONFIGS / 'autoencoder_vq.yaml'} --ckpt_path restarted/checkpoints/last.ckpt "
    with_autoencoder(restarted_folder, "validate", f"{recipe} --trainer.devices 1 --trainer.default_root_dir alone_vq")
    alone = validated(restarted_folder / "alone_vq")
    assert {"val/psnr", "val/codes_used", "val/code_perplexity"} <= alone.keys()
    assert validated(restarted_folder / "restarted") == pytest.approx(alone, rel=1e-4, abs=1e-5)


SAME_NOISE = """
import torch
from lightning.pytorch import Callback

from unet_diffusion.diffusion.conditions.condition import network_inputs
from unet_diffusion.runtime.randomness import image_generators


class SameNoise(Callback):
    '''Noise and timesteps that belong to an image, not to a process.'''

    def setup(self, trainer, module, stage):
        def training_step(batch, batch_idx):
            x0, entries = module._encoded(batch, None)
            index = entries["index"]
            generators = image_generators(0, index.tolist())
            noise = torch.stack([torch.randn(x0.shape[1:], generator=one) for one in generators])
            inputs = network_inputs(module.all_conditions, entries)
            return module._errors(module.unet, x0, noise, module.fixed_timesteps(index), inputs).mean()

        module.training_step = training_step
"""
STRATEGIES = {
    "one": ["--trainer.devices", "1", "--data.batch_size", "64"],
    "ddp": ["--config", str(CONFIGS / "trainer" / "ddp.yaml"), "--trainer.devices", "2"],
    "fsdp2": ["--config", str(CONFIGS / "trainer" / "fsdp2.yaml"), "--trainer.devices", "2"],
}
MOMENTUM = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.init_args.lr", "0.05"]
MOMENTUM += [
    "--model.optimizer.init_args.fused",
    "null",
    "--model.optimizer.init_args.momentum",
    "0.9",
    "--model.lr_decay",
    "constant",
]


@pytest.fixture(scope="module")
def trained_by(tmp_path_factory, tiny_digits):
    """Trains 64 images a step by a strategy, to that many steps, in a copy of a run if told; the last checkpoint."""
    folder = tmp_path_factory.mktemp("strategies")
    (folder / "noise.py").write_text(SAME_NOISE)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}

    def train(strategy: str, max_steps: int, begun: str | None = None) -> dict:
        name = f"{begun}_{strategy}" if begun else strategy
        arguments = [*tiny_digits, *MOMENTUM, *STRATEGIES[strategy], "--trainer.max_steps", str(max_steps)]
        arguments += ["--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]
        arguments += ["--allow=noise", "--trainer.callbacks+=noise.SameNoise", "--trainer.default_root_dir", name]
        if begun:
            shutil.copytree(folder / begun, folder / name)
            arguments += ["--ckpt_path", f"{name}/checkpoints/last.ckpt"]
        command = [sys.executable, "-m", "unet_diffusion", "fit", *arguments]
        done = run_python(command, cwd=folder, env=environment, timeout=180)
        assert done.returncode == 0, done.stderr
        assert (folder / name / "pipeline" / "model_index.json").is_file()
        return torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=True)

    train.folder = folder
    return train


def assert_near(one: dict, other: dict) -> None:
    """Weights, averages and momentum, but for sums in another order."""
    torch.testing.assert_close(one["state_dict"], other["state_dict"], rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(
        one["optimizer_states"][0]["state"], other["optimizer_states"][0]["state"], rtol=1e-3, atol=2e-6
    )


def test_two_processes_train_as_one_and_go_on_from_each_others_checkpoints(trained_by):
    one = trained_by("one", 4)
    for strategy in ("ddp", "fsdp2"):
        assert_near(trained_by(strategy, 4), one)
    longer = trained_by("one", 6, begun="one")
    for begun, strategy in (("fsdp2", "one"), ("ddp", "fsdp2")):
        assert_near(trained_by(strategy, 6, begun=begun), longer)
    # Of a run that had all its steps and was killed before its picture, all processes draw it.
    (trained_by.folder / "fsdp2" / "samples.png").unlink()
    trained_by("fsdp2", 4)
    assert (trained_by.folder / "fsdp2" / "samples.png").is_file()


SEVERAL_COMMANDS = """
import json
import sys

import torch.distributed as dist

import unet_diffusion.latents.store
from unet_diffusion.commands.main import main

unet_diffusion.latents.store.SHARD_IMAGES = 5
dist.init_process_group("gloo")  # once for all commands: torchrun's store knows of one meeting
dist.init_process_group = lambda *args, **options: None
dist.destroy_process_group = lambda: None
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


def test_two_processes_draw_encode_and_segment_as_one(two_processes, segmenter_run, tmp_path):
    torch.manual_seed(0)
    sizes = {"layers_per_block": 1, "norm_num_groups": 4, "mid_attention": False}
    kl_autoencoder(3, (8, 8), latent_channels=2, **sizes).save_pretrained(tmp_path / "autoencoder")
    captioned_folder(tmp_path / "images")

    def run(processes: str, output: Path) -> str:
        sample = f"sample {two_processes / 'run'} --num_images 5 --num_inference_steps 3 --batch_size 2"
        encode = f"encode {tmp_path / 'autoencoder'} {tmp_path / 'images'} --image_size 8 8 --horizontal_flip"
        segment = f"segment {segmenter_run} {tmp_path / 'images'} --probabilities"
        named = {"drawn": sample, "latents": encode, "masks": segment}
        commands = [f"{one} --device cpu --output {output / name}".split() for name, one in named.items()]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        (tmp_path / "several.py").write_text(SEVERAL_COMMANDS)
        command = [*torchrun, str(tmp_path / "several.py"), json.dumps(commands)]
        done = run_python(command, timeout=180)
        assert done.returncode == 0, done.stderr
        return done.stdout

    alone, together = tmp_path / "one", tmp_path / "two"
    run("1", alone)
    said = run("2", together)
    for once in ("5 images and grid.png in", "latents of 12 images in", "12 masks in"):
        assert said.count(once) == 1
    names = sorted(path.relative_to(alone) for path in alone.rglob("*.*"))
    assert names == sorted(path.relative_to(together) for path in together.rglob("*.*"))
    for name in names:
        if name.suffix == ".png":
            one, two = (np.asarray(Image.open(folder / name)).astype(int) for folder in (alone, together))
            assert np.abs(one - two).max() <= 1  # float32 rounding in batches of other images
    one, two = (read_latents(folder / "latents") for folder in (alone, together))
    torch.testing.assert_close(one.mean, two.mean)
    assert one.space == two.space
