"""The published recipes of latent diffusion on their page: parsed, built at full size, and run at toy width."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from denoisers import randomise
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from PIL import Image
from sklearn.datasets import load_sample_images

import unet_diffusion as ud
from unet_diffusion.models.autoencoders import kl_autoencoder, vq_autoencoder

pytest.importorskip("transformers")

PAGE = (Path(__file__).parents[1] / "docs" / "published.md").read_text()
TABLE = {
    row: cells for row, *cells in re.findall(r"^\| (\d+b?) \| (\S+) \| (.*?) \| ([\d,]+) \| (.*?) \|$", PAGE, re.M)
}
COMMANDS = dict(re.findall(r"^### (\d+b?) .*?```bash\n(.*?)\n```", PAGE, re.M | re.S))
ROWS = [*map(str, range(1, 20)), "19b", "20", "21"]
PUBLISHED = {
    "2": 83_653_863,
    "10": 274_056_163,
    "11": 274_056_163,
    "12": 274_056_163,
    "17": 872_300_484,
}
# The networks in the words of the configurations in the repository of the paper; the number of heads changes no weight.
SPATIAL = {"context_dim": 512, "transformer_depth": 1}
SOURCES = {
    "10": {"model_channels": 224, "channel_mult": [1, 2, 3, 4], "attention_resolutions": [8, 4, 2], "channels": (3, 3)},
    "13": {"model_channels": 192, "channel_mult": [1, 2, 2, 4, 4], "attention_resolutions": [1, 2, 4, 8],
           "channels": (4, 4), "use_scale_shift_norm": True, "resblock_updown": True},
    "14": {"model_channels": 256, "channel_mult": [1, 2, 4], "attention_resolutions": [4, 2, 1], "channels": (4, 4),
           **SPATIAL},
    "15": {"model_channels": 192, "channel_mult": [1, 2, 3, 5], "attention_resolutions": [8, 4, 2], "channels": (3, 3),
           **SPATIAL},
    "16": {"model_channels": 192, "channel_mult": [1, 2, 3, 5], "attention_resolutions": [8, 4, 2], "channels": (3, 3),
           "context_dim": 640, "transformer_depth": 1},
    "17": {"model_channels": 320, "channel_mult": [1, 2, 4, 4], "attention_resolutions": [4, 2, 1], "channels": (4, 4),
           "context_dim": 1280, "transformer_depth": 1},
    "18": {"model_channels": 128, "channel_mult": [1, 2, 3, 4], "attention_resolutions": [8, 4, 2], "channels": (3, 3),
           "context_dim": 512, "transformer_depth": 3},
    "19": {"model_channels": 128, "channel_mult": [1, 4, 8], "attention_resolutions": [32, 16, 8], "channels": (6, 3)},
    "19b": {"model_channels": 128, "channel_mult": [1, 4, 8], "attention_resolutions": [32, 16, 8], "channels": (6, 3)},
    "20": {"model_channels": 160, "channel_mult": [1, 2, 2, 4], "attention_resolutions": [16, 8], "channels": (6, 3)},
    "21": {"model_channels": 256, "channel_mult": [1, 2, 3, 4], "attention_resolutions": [8, 4, 2], "channels": (7, 3),
           "resblock_updown": True},
}  # fmt: skip
NUM_IMAGES = 8
SIDE = 64  # of the images of a toy run; a network with five levels needs larger ones
BOX = [8, 8, 32, 40]


def built(spec: dict):
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**spec["init_args"])


def settings_of(run_cli, row: str) -> dict:
    status, out, err = run_cli(*shlex.split(COMMANDS[row])[1:], "--print_config")
    assert status == 0, err
    return yaml.safe_load(out)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder to run the commands in, in which what they read is there but empty."""
    for name in ("images", "labels", *(f"latents/{autoencoder}" for autoencoder in ("kl-f8", "vq-f4", "vq-f8"))):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("row", ROWS)
def test_recipe_is_understood_and_has_the_published_size(run_cli, workplace, row):
    model = settings_of(run_cli, row)["model"]
    with torch.device("meta"):
        network = built(model["unet"] if "unet" in model else model["autoencoder"])
        conditions = [built(one) for one in model.get("conditions") or []]
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == int(TABLE[row][2].replace(",", ""))
    assert count == PUBLISHED.get(row, count)
    beside = sum(one.config["channels"] for one in conditions if one.network_argument == "concat")
    if "unet" in model:
        assert network.in_channels == network.out_channels + beside
        assert network.context_dim == next((one.config.get("context_dim") for one in conditions
                                            if one.network_argument == "context"), None)  # fmt: skip


@pytest.mark.parametrize("row", [str(row) for row in range(10, 18)])
def test_recipe_reads_the_latents_of_an_autoencoder_of_the_page_with_its_channels(run_cli, workplace, row):
    settings = settings_of(run_cli, row)
    name = Path(settings["data"]["init_args"]["source"]["init_args"]["root"]).name
    of_autoencoder = settings_of(run_cli, next(other for other, cells in TABLE.items() if cells[0] == name))
    latent_channels = of_autoencoder["model"]["autoencoder"]["init_args"]["latent_channels"]
    assert latent_channels == settings["model"]["unet"]["init_args"]["in_channels"]


def of_diffusers(source: dict) -> UNet2DModel | UNet2DConditionModel:
    """The network of a configuration of the paper's repository, made of diffusers' blocks, of which a level has two."""
    depth, updown = len(source["channel_mult"]), source.get("resblock_updown", False)
    attends = [2**level in source["attention_resolutions"] for level in range(depth)]
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if updown else ("DownBlock2D", "UpBlock2D")
    prefix = "CrossAttn" if "context_dim" in source else "Attn"
    options = {
        "block_out_channels": [source["model_channels"] * factor for factor in source["channel_mult"]],
        "in_channels": source["channels"][0],
        "out_channels": source["channels"][1],
        "layers_per_block": 2,
        "down_block_types": [f"{prefix}DownBlock2D" if on else plain[0] for on in attends],
        "up_block_types": [f"{prefix}UpBlock2D" if on else plain[1] for on in reversed(attends)],
        "attention_head_dim": 8,
    }
    if "context_dim" in source:
        transformers = {"transformer_layers_per_block": source["transformer_depth"]}
        return UNet2DConditionModel(**options, cross_attention_dim=source["context_dim"], **transformers)
    kind = "resnet" if updown else "conv"
    shift = "scale_shift" if source.get("use_scale_shift_norm") else "default"
    resample = {"downsample_type": kind, "upsample_type": kind}
    # The paper normalises before all attention; diffusers leaves that out in the middle of a network with scale_shift.
    return UNet2DModel(**options, **resample, resnet_time_scale_shift=shift, attn_norm_num_groups=32)


@pytest.mark.parametrize("row", SOURCES)
def test_diffusers_blocks_of_the_published_configuration_have_as_many_parameters(row):
    with torch.device("meta"):
        network = of_diffusers(SOURCES[row])
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == int(TABLE[row][2].replace(",", ""))
    assert count == PUBLISHED.get(row, count)


# ------------------------------------------------------------------------------------------------ toy runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Crops of two photographs with classes, captions, maps of bright and dark, and boxes."""
    root = tmp_path_factory.mktemp("photographs")
    images, annotations = [], []
    lines = ["file_name,text"]
    for number in range(NUM_IMAGES):
        which, place = number % 2, 80 * (number // 2)
        crop = load_sample_images().images[which][place : place + 128, place : place + 128]
        name = f"{('house', 'flower')[which]}/{number}.png"
        for folder, pixels in (("images", crop), ("labels", (crop.mean(axis=2) > 128).astype(np.uint8))):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / name)
        lines.append(f"{name},crop {number} of a {('house', 'flower')[which]}")
        images.append({"id": number, "file_name": name, "width": 128, "height": 128})
        annotations.append({"image_id": number, "category_id": which, "bbox": BOX})
    (root / "images" / "metadata.csv").write_text("\n".join(lines))
    categories = [{"id": 0, "name": "house"}, {"id": 1, "name": "flower"}]
    table = {"images": images, "annotations": annotations, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(table))
    return root


@pytest.fixture(scope="module")
def autoencoder_of(data):
    """The folder of a tiny autoencoder of the kind that a row uses, and the side of its images."""

    def make(row: str) -> tuple[Path, int]:
        kl, levels = row in ("13", "17"), 4 if row in ("13", "14", "17") else 3
        channels = levels  # 4 of f8, 3 of f4
        folder = data / f"{'kl' if kl else 'vq'}-f{2 ** (levels - 1)}"
        if not folder.exists():
            torch.manual_seed(0)
            small = {"layers_per_block": 1, "mid_attention": False, "norm_num_groups": 4, "latent_channels": channels}
            made = kl_autoencoder(3, (8,) * levels, **small) if kl else vq_autoencoder(
                3, (8,) * levels, num_codes=16, **small
            )  # fmt: skip
            made.register_to_config(sample_size=SIDE)
            randomise(made).save_pretrained(folder)
        large = levels == 4 or row in ("19b", "20")  # the pipeline of row 20 takes small images of 32 pixels at least
        return folder, 2 * SIDE if large else SIDE

    return make


def shrunk(model: dict) -> None:
    """The same network at toy width."""
    if "autoencoder" in model:
        network = model["autoencoder"]["init_args"]
        network |= {"channels": [8] * len(network["channels"]), "norm_num_groups": 4, "layers_per_block": 1}
        network |= {"num_codes": 16} if "num_codes" in network else {}
        model["adversarial"]["discriminator"]["init_args"] |= {"channels": 32}
        model["adversarial"]["start"] = 1
        return
    network = model["unet"]["init_args"]
    width = network["head_channels"] and 4
    network |= {"channels": [8] * len(network["channels"]), "norm_num_groups": 4, "layers_per_block": 1}
    network |= {"head_channels": width, "context_dim": network["context_dim"] and 8}
    model["speed"] = "plain"
    for condition in model.get("conditions") or []:
        small = {"context_dim": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 600, "max_length": 12}
        is_class = condition["class_path"].endswith("ClassTokens")
        small |= {"num_classes": 2} if is_class else {}
        condition["init_args"] |= {key: value for key, value in small.items() if key in condition["init_args"]}


def shortened(settings: dict, run: Path) -> None:
    settings["trainer"] |= {"default_root_dir": str(run), "accelerator": "cpu", "precision": "32-true", "max_steps": 2}
    settings["trainer"] |= {"val_check_interval": 2, "enable_progress_bar": False, "enable_model_summary": False}
    settings["samples"] |= {"num_images": 2, "every_n_steps": 0}
    if "num_inference_steps" in settings["samples"]:
        settings["samples"]["num_inference_steps"] = 2
    settings["data"]["init_args"] |= {"batch_size": 2, "num_val": 2, "horizontal_flip": False}
    settings.pop("ckpt_path", None)


@torch.no_grad()
def assert_reconstructs_alike(run: Path, kind: type[AutoencoderKL] | type[VQModel], image: Path) -> None:
    """Compares what we load from a run's checkpoint with what diffusers loads from its folder."""
    crop = np.asarray(Image.open(image).convert("RGB"))[:SIDE, :SIDE]
    pixels = torch.from_numpy(crop).permute(2, 0, 1)[None] / 127.5 - 1
    theirs = kind.from_pretrained(run / "autoencoder")
    encoded = theirs.encode(pixels)
    latents = encoded.latents if kind is VQModel else encoded.latent_dist.mean
    ours = ud.load(run)
    torch.testing.assert_close(ours.encode(pixels), latents)
    torch.testing.assert_close(ours.decode(ours.encode(pixels)), theirs.decode(latents).sample)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_recipe_runs_from_data_to_samples_and_a_folder_of_diffusers(
    run_cli, workplace, tmp_path, data, autoencoder_of, row
):
    settings = settings_of(run_cli, row)
    model, source = settings["model"], settings["data"]["init_args"]["source"]["init_args"]
    shrunk(model)
    shortened(settings, tmp_path / "run")
    places = {"root": "images", "semantic_map": "labels", "boxes": "boxes.json"}
    source |= {name: str(data / places[name]) for name in places if source.get(name)}
    options = []
    if "unet" in model:
        autoencoder, side = autoencoder_of(row)
        if model["codec"] is None:
            encode = [
                "encode",
                autoencoder,
                data / "images",
                "--output",
                tmp_path / "stored",
                "--image_size",
                side,
                side,
            ]
            encode += ["--class_labels"] if row in ("14", "15") else ["--captions"] if row in ("16", "17") else []
            status, _, err = run_cli(*encode, "--device", "cpu")
            assert status == 0, err
            source["root"] = str(tmp_path / "stored")
        else:
            source["image_size"] = [side, side]
            model["codec"]["init_args"]["autoencoder"] = str(autoencoder)
        options = {
            "16": ["--captions", "a house"], "17": ["--captions", "a flower"],
            "18": ["--condition", f"boxes={data / 'boxes.json'}"],
            "19": ["--condition", f"semantic_map={data / 'labels'}"],
            "20": ["--image", tmp_path / "small.png"],
            "21": ["--image", data / "images/house/0.png", "--mask", tmp_path / "mask.png"],
        }.get(row.removesuffix("b"), [])  # fmt: skip
        Image.open(data / "images/house/0.png").resize((32, 32)).save(tmp_path / "small.png")
        Image.fromarray(np.tri(128, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    else:
        source["image_size"] = [SIDE, SIDE]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    status, _, err = run_cli("fit", "--config", tmp_path / "recipe.yaml")
    assert status == 0, err
    if "unet" not in model:
        assert_reconstructs_alike(tmp_path / "run", {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}[
            TABLE[row][3].split()[-1]], data / "images/house/0.png")  # fmt: skip
        return
    index = json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())
    assert str(index["_class_name"]).strip("[]'").rpartition("'")[2] in TABLE[row][3]
    for checkpoint in ("run", "run/pipeline"):
        sample = ["sample", tmp_path / checkpoint, "--num_images", "2", "--num_inference_steps", "2", "--device", "cpu"]
        status, _, err = run_cli(*sample, *options, "--output", tmp_path / f"drawn_{Path(checkpoint).name}")
        assert status == 0, err
    first, second = (np.asarray(Image.open(tmp_path / f"drawn_{name}" / "000001.png")).astype(int)
                     for name in ("run", "pipeline"))  # fmt: skip
    assert np.abs(first - second).max() <= 1  # rounded to 8 bits


def test_map_and_boxes_of_stored_latents_are_trained_together(run_cli, tmp_path, data, autoencoder_of):
    autoencoder, side = autoencoder_of("10")
    known = ["--semantic_map", data / "labels", "--boxes", data / "boxes.json", "--horizontal_flip"]
    encode = ["encode", autoencoder, data / "images", "--output", tmp_path / "stored", "--image_size", side, side]
    status, _, err = run_cli(*encode, *known, "--device", "cpu")
    assert status == 0, err
    status, _, err = run_cli(*encode, *known[:2], "--horizontal_flip", "--device", "cpu")
    assert (status != 0, "boxes" in err) == (True, True)  # other latents than those that are there
    settings = yaml.safe_load((Path(__file__).parents[1] / "configs" / "latents.yaml").read_text())
    where = "unet_diffusion.diffusion.conditions"
    settings["model"]["unet"]["init_args"] |= {"in_channels": 5, "out_channels": 3, "context_dim": 8}
    settings["model"]["conditions"] = [
        {"class_path": f"{where}.box_tokens.BoxTokens", "init_args": {"context_dim": 8, "num_classes": 2}},
        {"class_path": f"{where}.semantic_map.SemanticMap",
         "init_args": {"channels": 2, "num_classes": 2, "downsampling": 4}},
    ]  # fmt: skip
    shrunk(settings["model"])
    shortened(settings, tmp_path / "run")
    settings["data"]["init_args"] |= {"horizontal_flip": True}
    settings["data"]["init_args"]["source"]["init_args"]["root"] = str(tmp_path / "stored")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    status, _, err = run_cli("fit", "--config", tmp_path / "recipe.yaml")
    assert status == 0, err
    given = ["--condition", f"semantic_map={data / 'labels'}", f"boxes={data / 'boxes.json'}", "--guidance_scale", 2]
    for checkpoint in ("run", "run/pipeline"):
        sample = ["sample", tmp_path / checkpoint, "--num_images", 2, "--num_inference_steps", 2, "--device", "cpu"]
        status, _, err = run_cli(*sample, *given, "--output", tmp_path / f"drawn_{Path(checkpoint).name}")
        assert status == 0, err
