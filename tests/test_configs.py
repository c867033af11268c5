import json
import pickle
import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import AutoencoderKL, VQModel
from PIL import Image

from unet_diffusion.data import find_images, pack_images
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.record import save_denoiser
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.models.denoiser_unet import DenoiserUNet

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
RECIPES = [name for name in ALL if "/" not in name]
OVERLAYS = [name for name in ALL if "/" in name]

SMALLER = [  # every recipe: sizes, not kinds
    "--data.batch_size=4",
    "--data.num_val=4",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--model.speed=plain",
    "--trainer.val_check_interval=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--samples.num_images=2",
]
DENOISE = ["--model.unet.init_args.norm_num_groups=4", "--samples.num_inference_steps=2"]
SMALL_WINDOWS = ["--data.window_size=32", "--data.num_val=2"]
NUCLEI = {"in_channels": 3, "channels": [8, 8, 8], "layers_per_block": 1, "mid_attention": False, "norm_num_groups": 4}
NARROWER = {
    "cells.yaml": ["--model.unet.init_args.channels=[4,8]", "--data.num_images=4"],
    "isbi2012_modern.yaml": ["--model.unet.init_args.channels=[4,8]"],
    "isbi2012_unet.yaml": ["--model.unet.init_args.channels=[4,8]"],
    "nuclei_denoiser.yaml": ["--model.unet.init_args.channels=[8,8,8]", "--data.tile_size=32"],
    "nuclei_features.yaml": [
        "--model.unet.init_args.denoiser.init_args.channels=[8,8,8]",
        "--model.unet.init_args.denoiser.init_args.norm_num_groups=4",
    ],
    "nuclei_finetune.yaml": ["--model.unet.init_args.channels=[8,8,8]", "--model.unet.init_args.norm_num_groups=4"],
    "nuclei_from_masks.yaml": ["--model.unet.init_args.channels=[8,8,8]", "--model.unet.init_args.norm_num_groups=4"],
    "nuclei_joint.yaml": ["--model.unet.init_args.channels=[8,8,8]"],
    "nuclei_segment.yaml": ["--model.unet.init_args.channels=[8,8,8]", "--data.num_fit=1"],
    "cifar10_ddpm.yaml": [*DENOISE, "--model.unet.init_args.channels", "[8,8,8,8]"],
    "digits.yaml": [*DENOISE, "--model.unet.init_args.channels", "[8,8]"],
    "fashion_mnist.yaml": [*DENOISE, "--model.unet.init_args.channels", "[8,8,8]"],
    "folder.yaml": [
        *DENOISE,
        "--model.unet.init_args.channels",
        "[8,8,8,8]",
        "--model.unet.init_args.head_channels",
        "4",
    ],
    "stream.yaml": [*DENOISE, "--model.unet.init_args.channels=[8,8,8,8]", "--model.unet.init_args.head_channels=4"],
}


def leaves(node, path="") -> dict:
    if isinstance(node, list) and any(isinstance(one, dict) for one in node):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return {path: node}
    return {key: value for name, child in node.items() for key, value in leaves(child, f"{path}.{name}").items()}


@pytest.mark.parametrize("name", ALL)
def test_every_value_of_a_configuration_is_understood(run_cli, name):
    is_whole = name in RECIPES or name.startswith("adapters/")
    base = [] if is_whole else ["--config", CONFIGS / "digits.yaml"]
    status, out, err = run_cli("fit", *base, "--config", CONFIGS / name, "--print_config")
    assert status == 0, err
    understood = leaves(yaml.safe_load(out))
    for key, value in leaves(yaml.safe_load((CONFIGS / name).read_text())).items():
        assert understood[key] == value, key


def test_commands_of_the_page_on_several_gpus_are_understood(run_cli, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    commands = re.findall(r"unet[-_]diffusion fit (--.*)", (CONFIGS / "trainer/README.md").read_text())
    assert len(commands) == 7
    for command in commands:
        status, _, err = run_cli("fit", *shlex.split(command), "--print_config")
        assert status == 0, (command, err)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_understood_as_written_with_every_number_a_number(name):
    values = leaves(yaml.safe_load((CONFIGS / name).read_text()))
    texts = [value for value in values.values() if isinstance(value, str)]
    assert [text for text in texts if text.replace("e-", "").replace("e", "").isdigit()] == []  # 2e-4 is a string


def write_cifar10(root, monkeypatch):
    """20 images in CIFAR-10's layout; torchvision would compare their checksums with those of the real ones."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(1, 6):
        entry = {"data": rng.integers(256, size=(4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps(entry))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def write_fashion_mnist(root, monkeypatch=None, num_images=20):
    """Images of noise in the idx format of MNIST and its kin."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(256, size=(num_images, 28, 28), dtype=np.uint8)
    labels = (np.arange(num_images) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(labels)) + labels.tobytes())


def write_folder(root, monkeypatch):
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(256, size=(64, 72, 3), dtype=np.uint8)).save(root / f"{i}.png")


def write_shards(root, monkeypatch):
    write_folder(root.with_name("images"), monkeypatch)
    pack_images(find_images(root.with_name("images")), root, root="images", shard_images=5)


def write_pairs(root, channels, instances, num=6):
    rng = np.random.default_rng(0)
    for kind in ("image", "label"):
        (root / kind).mkdir(parents=True)
    for i in range(num):
        pixels = rng.integers(256, size=(40, 44, 3) if channels == 3 else (40, 44), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "image" / f"{i}.png")
        label = np.zeros((40, 44), dtype=np.uint16 if instances else np.uint8)
        label[4:20, 4:20], label[4:20, 24:40] = (1, 300) if instances else (255, 255)
        Image.fromarray(label).save(root / "label" / f"{i}.png")


def write_known(root, monkeypatch):
    """Images with what the overlays of maps, pairs and boxes read beside them."""
    write_folder(root, monkeypatch)
    rng = np.random.default_rng(1)
    for number in range(12):
        for folder, size in ((root.with_name("labels"), (64, 72)), (root.with_name("others"), (64, 72, 3))):
            folder.mkdir(exist_ok=True)
            pixels = rng.integers(2 if len(size) == 2 else 256, size=size, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    files = [{"id": i, "file_name": f"{i}.png", "width": 72, "height": 64} for i in range(12)]
    boxes = [{"image_id": i, "category_id": i % 2, "bbox": [8, 8, 20 + i, 30]} for i in range(12)]
    table = {"images": files, "annotations": boxes, "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]}
    root.with_name("boxes.json").write_text(json.dumps(table))


DATA = {
    "cifar10_ddpm.yaml": write_cifar10,
    "fashion_mnist.yaml": write_fashion_mnist,
    "folder.yaml": write_folder,
    "nuclei_denoiser.yaml": write_folder,
    "stream.yaml": write_shards,
}
LATENTS = {"latents.yaml": [], "latents_text.yaml": ["--captions"]}
AUTOENCODE = [name for name in RECIPES if name.startswith("autoencoder")]
SEGMENT = [name for name in RECIPES if yaml.safe_load((CONFIGS / name).read_text()).get("task") == "segment"]


WITH_MAPS = ["inpainting.yaml", "upscaling.yaml"]
FROM_MASKS = "nuclei_from_masks.yaml"


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if name not in [*SEGMENT, *AUTOENCODE, *LATENTS, *WITH_MAPS, FROM_MASKS]]
)
def test_recipe_trains_and_leaves_a_whole_run(run_cli, tmp_path, monkeypatch, name):
    arguments = ["--config", CONFIGS / name, *SMALLER, *NARROWER[name]]
    if name in DATA:
        DATA[name](tmp_path / "data", monkeypatch)
        arguments += ["--data.root", tmp_path / "data"]
    status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    for file in ("samples.png", "checkpoints/last.ckpt", "pipeline/model_index.json", "config.yaml"):
        assert (tmp_path / "run" / file).is_file(), file


@pytest.mark.parametrize(
    ("name", "place"), [("boxes", "boxes.json"), ("paired_image", "others"), ("semantic_map", "labels")]
)
def test_overlay_of_a_condition_trains_and_draws_as_its_comment_says(run_cli, tmp_path, monkeypatch, name, place):
    write_known(tmp_path / "data", monkeypatch)
    recipe = ["--config", "folder", "--config", f"conditions/{name}"]
    known = ["--data.root", tmp_path / "data", f"--data.{name}", tmp_path / place]
    smaller = [*SMALLER, *NARROWER["folder.yaml"], "--trainer.default_root_dir", tmp_path / "run"]
    status, _, err = run_cli("fit", *recipe, *known, *smaller)
    assert status == 0, err
    sample = ["--condition", f"{name}={tmp_path / place}", "--guidance_scale", 2, "--num_images", 2, "--device", "cpu"]
    status, _, err = run_cli(
        "sample", tmp_path / "run", *sample, "--num_inference_steps", 2, "--output", tmp_path / "o"
    )
    assert status == 0, err
    with Image.open(tmp_path / "run" / "samples.png") as grid:
        assert grid.height > 64  # what the network is shown above what it draws
    status, _, err = run_cli("sample", tmp_path / "run", "--device", "cpu", "--output", tmp_path / "none")
    assert (status != 0, f"give {name}, as conditions={{'{name}': ...}} or --condition {name}=..." in err) == (
        True,
        True,
    )


@pytest.mark.parametrize("name", AUTOENCODE)
def test_recipe_trains_and_leaves_an_autoencoder(run_cli, tmp_path, name):
    write_folder(tmp_path / "data", None)
    smaller = [option for option in SMALLER if "speed" not in option]
    smaller += [
        "--model.autoencoder.init_args.channels=[32,32,32]",
        "--model.adversarial.discriminator=PatchDiscriminator",
        "--model.adversarial.discriminator.channels=32",
        "--model.adversarial.start=1",
    ]
    arguments = ["--config", CONFIGS / name, *smaller, "--data.root", tmp_path / "data"]
    status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    for file in ("samples.png", "checkpoints/last.ckpt", "config.yaml", "autoencoder/config.json"):
        assert (tmp_path / "run" / file).is_file(), file
    kind = {"autoencoder_kl.yaml": AutoencoderKL, "autoencoder_vq.yaml": VQModel}[name]
    kind.from_pretrained(tmp_path / "run" / "autoencoder")
    arguments += ["--trainer.max_steps=4", "--ckpt_path", tmp_path / "run" / "checkpoints" / "last.ckpt"]
    status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err


@pytest.mark.parametrize("name", LATENTS)
def test_recipe_trains_on_latents_as_its_comment_says(run_cli, tmp_path, name):
    write_folder(tmp_path / "data", None)
    captions = [f"{i}.png,picture number {i}" for i in range(12)]
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(["file_name,text", *captions]))
    autoencoder = kl_autoencoder(3, (32, 32, 32), layers_per_block=1)
    autoencoder.register_to_config(sample_size=64)
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    encode = ["encode", tmp_path / "autoencoder", tmp_path / "data", "--output", tmp_path / "latents", "--device=cpu"]
    status, _, err = run_cli(*encode, "--horizontal_flip", *LATENTS[name])
    assert status == 0, err
    arguments = ["--config", CONFIGS / name, *SMALLER, *DENOISE, "--model.unet.init_args.channels=[8,8,8]"]
    arguments += ["--model.unet.init_args.head_channels=4", "--data.root", tmp_path / "latents"]
    status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    texts = ["captions.txt"] if LATENTS[name] else []
    for file in ("samples.png", "checkpoints/last.ckpt", "pipeline/model_index.json", "config.yaml", *texts):
        assert (tmp_path / "run" / file).is_file(), file
    with Image.open(tmp_path / "run" / "samples.png") as grid:
        assert grid.height > 64  # images, not latents


@pytest.mark.parametrize("name", WITH_MAPS)
def test_recipe_with_maps_trains_and_leaves_a_pipeline(run_cli, tmp_path, name):
    write_folder(tmp_path / "data", None)
    captions = [f"{i}.png,picture number {i}" for i in range(12)]
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(["file_name,text", *captions]))
    kl_autoencoder(3, (32, 32, 32), layers_per_block=1).save_pretrained(tmp_path / "autoencoder")
    arguments = [*SMALLER, "--data.root", tmp_path / "data"]
    arguments += ["--model.codec.init_args.autoencoder", tmp_path / "autoencoder"]
    arguments += [*DENOISE, "--model.unet.init_args.channels=[8,8,8]", "--model.unet.init_args.head_channels=4"]
    status, _, err = run_cli(
        "fit", "--config", CONFIGS / name, *arguments, "--trainer.default_root_dir", tmp_path / "run"
    )
    assert status == 0, err
    for file in ("samples.png", "checkpoints/last.ckpt", "pipeline/model_index.json", "config.yaml", "captions.txt"):
        assert (tmp_path / "run" / file).is_file(), file


def save_denoiser_of_nuclei(path):
    """A small denoiser with the schedule of its recipe, from which other recipes start."""
    schedule = yaml.safe_load((CONFIGS / "nuclei_denoiser.yaml").read_text())["model"]["schedule"]["init_args"]
    save_denoiser(Denoiser(DenoiserUNet(**NUCLEI), NoiseSchedule(**schedule), (3, 8, 8)), path)


def test_recipe_of_masks_starts_as_the_denoiser_and_draws_training_data_as_its_comment_says(run_cli, caplog, tmp_path):
    write_pairs(tmp_path, 3, instances=True)
    save_denoiser_of_nuclei(tmp_path / "denoiser.ckpt")
    arguments = ["--config", CONFIGS / FROM_MASKS, *SMALLER, *NARROWER[FROM_MASKS], "--data.tile_size=32"]
    arguments += ["--data.root", tmp_path / "image", "--data.semantic_map", tmp_path / "label"]
    arguments += ["--model.init_from", tmp_path / "denoiser.ckpt", "--samples.num_inference_steps=2"]
    status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    assert "those of 4 channels of conditions begin at 0" in caplog.text
    assert "the schedule is another" not in caplog.text
    for file in ("samples.png", "checkpoints/last.ckpt", "pipeline/model_index.json", "config.yaml"):
        assert (tmp_path / "run" / file).is_file(), file
    command = ["synthesize", tmp_path / "run", "--labels", tmp_path / "label", "--num_labels", 4, "--num_images", 2]
    status, _, err = run_cli(*command, "--num_inference_steps", 2, "--output", tmp_path / "pairs", "--device", "cpu")
    assert status == 0, err
    arguments[arguments.index("--trainer.max_steps=2")] = "--trainer.max_steps=3"
    (tmp_path / "denoiser.ckpt").write_bytes(b"")  # a run that goes on needs it no more
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    status, _, err = run_cli("fit", *arguments, "--ckpt_path", last, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err


def test_pretrained_autoencoder_is_trained_on_by_the_command_line(run_cli, tmp_path):
    write_folder(tmp_path / "data", None)
    kl_autoencoder(3, (32, 32), layers_per_block=1).save_pretrained(tmp_path / "vae")
    arguments = ["--task=autoencode", "--model.autoencoder=unet_diffusion.models.autoencoders.pretrained_autoencoder"]
    arguments += ["--model.autoencoder.init_args.folder", tmp_path / "vae", "--data=Folder"]
    arguments += ["--data.root", tmp_path / "data", "--data.image_size=16", "--data.batch_size=4"]
    arguments += ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--samples.num_images=2"]
    status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err


SLOW = ["nuclei_features.yaml"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SEGMENT]
)
def test_recipe_trains_and_leaves_a_segmenter(run_cli, caplog, tmp_path, name):
    arguments = ["--config", CONFIGS / name, *SMALLER, *SMALL_WINDOWS, *NARROWER[name]]
    if name != "cells.yaml":
        write_pairs(tmp_path, 3 if "nuclei" in name else 1, "nuclei" in name)
        for side in ("image", "label"):
            arguments += [f"--data.{side}s", tmp_path / side]
    if "init_from" in (CONFIGS / name).read_text():
        save_denoiser_of_nuclei(tmp_path / "denoiser.ckpt")
        arguments += ["--model.init_from", tmp_path / "denoiser.ckpt"]
    status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
    assert ("weights of the denoiser" in caplog.text) == ("init_from" in (CONFIGS / name).read_text())
    for file in ("samples.png", "checkpoints/last.ckpt", "config.yaml"):
        assert (tmp_path / "run" / file).is_file(), file
    status, _, err = run_cli("segment", tmp_path / "run", tmp_path / "run" / "samples.png", "--output", tmp_path / "o")
    assert status == 0, err


def test_folder_recipe_trains_with_classes_as_its_comment_says(run_cli, tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_folder(tmp_path / "data" / label, None)
    arguments = ["--config", CONFIGS / "folder.yaml", *SMALLER, *NARROWER["folder.yaml"]]
    arguments += ["--data.root", tmp_path / "data", "--data.class_labels", "true"]
    arguments += ["--model.unet.init_args.num_class_embeds", "3", "--model.label_dropout", "0.1"]
    status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err


def test_cells_recipe_trains_on_files_as_its_comment_says(run_cli, tmp_path):
    write_pairs(tmp_path, channels=1, instances=True)
    arguments = ["--config", CONFIGS / "cells.yaml", *SMALLER, *SMALL_WINDOWS, "--model.unet.init_args.channels=[4,8]"]
    arguments += [
        "--data.source",
        "PairedFiles",
        "--data.images",
        tmp_path / "image",
    ]
    arguments += ["--data.labels", tmp_path / "label"]
    status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", tmp_path / "run")
    assert status == 0, err
