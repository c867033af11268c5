"""What the tests of training, the command line and the recipes share: a tiny network, tiny data, a quiet trainer."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from sklearn.datasets import load_digits

from unet_diffusion.commands.main import main
from unet_diffusion.data import ImageDataModule, ImageSet, Source, find_images, pack_images
from unet_diffusion.data.folder import entries_of
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.training import DiffusionModule

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
MAX_WORKERS = 4  # each has a GB of PyTorch, Lightning and diffusers

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start; tiny networks are no faster with more
torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of processes that share the files of tests; none for files that are named, which are there sooner without."""
    has_files = any(Path(argument.split("::")[0]).is_file() for argument in config.args)
    return 0 if has_files or os.cpu_count() == 1 else min(os.cpu_count() or 1, MAX_WORKERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests come first where processes share them: so all end at about the same time."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def precision_auto_is_float32() -> Iterator[None]:
    """What commands compute is compared with float32, and `auto` takes 16 bits on a machine that has them."""
    with pytest.MonkeyPatch.context() as patch:  # of its own, as tests undo theirs
        patch.setattr("unet_diffusion.runtime.precision.cpu_has_bfloat16", lambda: False)
        yield


TINY_UNET = {"in_channels": 1, "channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}

TINY_DIGITS = (  # configs/digits.yaml, in a second
    f"--config {CONFIGS / 'digits.yaml'} --model.unet.init_args.channels [8,16] "
    "--model.unet.init_args.norm_num_groups 4 --model.unet.init_args.layers_per_block 1 "
    "--data.batch_size 32 --data.num_val 20 "
    "--model.speed plain --trainer.accelerator cpu --trainer.precision 32-true --trainer.max_steps 4 "
    "--trainer.val_check_interval 2 --trainer.log_every_n_steps 1 "
    "--trainer.enable_progress_bar false --trainer.enable_model_summary false "
    "--samples.every_n_steps 2 --samples.num_images 10 --samples.num_inference_steps 2 "
    "--checkpoint.every_n_train_steps 2"
).split()


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


class Noise(Source):
    """20 images of noise, 1x8x8, of two classes or none."""

    def __init__(self, *, class_names=("cat", "dog"), shape=(1, 8, 8)):
        self.class_names, self._shape = class_names, shape

    def load(self, *, progress=True) -> ImageSet:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (20, *self._shape), generator=generator).to(torch.uint8)
        if self.class_names is None:
            return ImageSet(images)
        return ImageSet(images, {"labels": torch.arange(20) % len(self.class_names)}, list(self.class_names))


class TinyImages(ImageDataModule):
    """16 images of noise to train on, and 4 to validate on."""

    def __init__(self, *, num_val=4, batch_size=4, horizontal_flip=False, seed=0, **noise):
        options = {"horizontal_flip": horizontal_flip, "seed": seed}
        super().__init__(Noise(**noise), num_val=num_val, batch_size=batch_size, num_workers=0, **options)


@pytest.fixture
def code():
    """Made with a path, what creates that file when it is unpickled."""
    return Code


@pytest.fixture
def tiny_images():
    return TinyImages


@pytest.fixture
def tiny_unet():
    """Makes a tiny network; the same weights every time."""

    def make(**options) -> DenoiserUNet:
        torch.manual_seed(0)
        return DenoiserUNet(**{**TINY_UNET, **options})

    return make


@pytest.fixture
def tiny_module(tiny_unet):
    """Makes a tiny module without classes, or with as many rows of the class embedding as told."""

    def make(*, num_class_embeds=None, prediction_type="v_prediction", unet=None, **options) -> DiffusionModule:
        unet = unet or tiny_unet(num_class_embeds=num_class_embeds)
        schedule = NoiseSchedule(100, "squaredcos_cap_v2", prediction_type=prediction_type)
        return DiffusionModule(unet, schedule, **options)

    return make


@pytest.fixture
def small_recipes(tmp_path) -> tuple[Path, Path]:
    """Files with the recipes of an autoencoder and of a denoiser with captions, but for sizes and lengths."""
    recipes = {}
    for name in ("autoencoder_kl", "latents_text"):
        recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        recipe["data"]["init_args"] |= {"batch_size": 4, "num_val": 4}
        recipe["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu", "precision": "32-true"}
        recipe["samples"]["num_images"] = 2
        recipes[name] = recipe
    recipes["autoencoder_kl"]["model"]["autoencoder"]["init_args"] |= {"channels": [32, 32, 32]}
    recipes["autoencoder_kl"]["data"]["init_args"]["source"]["init_args"]["image_size"] = 32
    small = {"channels": [32, 32], "attention_levels": [1], "head_channels": 32}
    recipes["latents_text"]["model"]["unet"]["init_args"] |= small
    recipes["latents_text"]["model"]["speed"] = "plain"
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "autoencoder_kl.yaml", tmp_path / "latents_text.yaml"


@pytest.fixture
def quiet_trainer(tmp_path):
    """Makes a trainer on the CPU that writes nothing but what a test asks for."""

    def make(**options) -> Trainer:
        return Trainer(**{"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, **QUIET, **options})

    return make


@pytest.fixture
def check_resuming(quiet_trainer, tmp_path):
    """Checks that a run that goes on after step 3 ends bit for bit as one that was not interrupted.

    Made with functions that make the module and the data of a run.
    """

    def check(make_module, make_data) -> None:
        def fit(max_steps: int, **options):
            module = make_module()
            saving = ModelCheckpoint(tmp_path / str(max_steps), every_n_train_steps=1, save_top_k=-1, filename="{step}")
            kept = {"limit_val_batches": 0, "enable_checkpointing": True, "callbacks": [saving]}
            quiet_trainer(max_steps=max_steps, **kept).fit(module, make_data(), **options)
            return module.state_dict()

        whole = fit(6)
        fit(3)
        resumed = fit(6, ckpt_path=tmp_path / "3" / "step=3.ckpt")
        for key, value in whole.items():
            assert torch.equal(resumed[key], value), key

    return check


@pytest.fixture
def cache_of_datasets(tmp_path, monkeypatch):
    """The library datasets keeps what it prepares in the folder of the test, and shows no progress."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def run_cli(capsys):
    """Runs a command in this process; its exit status, and what it wrote to stdout and to stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def console_script() -> str:
    """The installed command; skips if the package is not installed with it."""
    path = Path(sys.executable).parent / "unet-diffusion"
    if not path.exists():
        pytest.skip(f"no console script at {path}")
    return str(path)


@pytest.fixture(scope="session")
def tiny_digits() -> tuple[str, ...]:
    return tuple(TINY_DIGITS)


@pytest.fixture(scope="session")
def streamed_digits(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """The digits in 36 shards, with classes, and the arguments that make a tiny run stream them from there."""
    folder = tmp_path_factory.mktemp("streamed")
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / "images" / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).save(path)
    files = find_images(folder / "images")
    entries, class_names = entries_of(files, files.names, "images", class_labels=True, captions=False)
    known = {"entries": entries, "class_names": class_names}
    pack_images(files, folder / "shards", root="images", shard_images=50, **known)
    data = ["--data", "Shards", "--data.root", str(folder / "shards")]
    data += ["--data.image_size", "8", "--data.channels", "1"]
    data += ["--data.class_labels", "true", "--data.num_workers", "2"]
    return folder / "shards", tuple([*TINY_DIGITS, *data])


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """The folder of a finished tiny run on the digits, to look at; tests do not write into it."""
    root = tmp_path_factory.mktemp("digits") / "run"
    assert main(["fit", *TINY_DIGITS, "--trainer.default_root_dir", str(root)]) == 0
    return root
