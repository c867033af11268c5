"""Small good inputs of every command, and damaged checkpoints: what `bad_inputs.py` makes its cases of.

python benchmarks/bad_files.py DIR
"""

import copy
import io
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

GOOD = 40  # grey value of the pictures' background
HUGE = 6_000_000_000  # bytes
WIDE = 9400  # pixels


class Huge:
    """Asks for 6 GB when it is unpickled."""

    def __reduce__(self):
        return bytearray, (HUGE,)


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return exec, ("import os; os.mkdir('ran')",)


def make_inputs(folder: Path) -> dict[str, Path]:
    """Make small inputs in a folder; their paths by name. A checkpoint has the name of its kind and .ckpt."""
    names = ("run", "denoiser", "cells", "autoencoder", "digits", "pipeline", "images", "grey", "shards", "latents")
    more = ("png", "small_png", "black_png", "cut_png", "wide_png", "pixel", "wide", "text", "empty", "empty_folder")
    last = ("zip", "cut_zip", "black_labels", "small_labels", "drawn", "masks", "stages", "foreign")
    at = {name: folder / name for name in (*names, *more, *last)}
    if not (folder / "stages").exists():
        _pictures(at)
        _checkpoints(at)
        _made_by_commands(at)
        for name, text in {"stages/stages.json": "{}", "foreign/config.yaml": "mine: 1", "text": "hello"}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    return at


def _pictures(at: dict[str, Path]) -> None:
    rng = np.random.default_rng(0)
    rows = ["file_name,text"]
    for number in range(8):
        path = at["images"] / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
        rows.append(f"{path.parent.name}/{path.name},number {number}")
    (at["images"] / "metadata.csv").write_text("\n".join(rows))
    grey = rng.integers(256, size=(64, 64), dtype=np.uint8)
    for name, pixels in {"grey": grey, "black_labels": 0 * grey, "small_labels": grey[:32, :32] // 200}.items():
        at[name].mkdir()
        for number in range(2):
            Image.fromarray(pixels).save(at[name] / f"{number}.png")
    for name, shape, value in (
        *(("png", (8, 8), GOOD), ("small_png", (4, 4), 255), ("black_png", (8, 8), 0)),
        *(("wide_png", (WIDE, WIDE, 3), GOOD), ("pixel", (1, 1), GOOD)),
    ):
        Image.fromarray(np.full(shape, value, np.uint8)).save(at[name], format="PNG")
    first = (at["images"] / "cat" / "0.png").read_bytes()
    at["cut_png"].write_bytes(first[: len(first) // 2])
    at["empty"].touch()
    at["empty_folder"].mkdir()
    shutil.make_archive(str(at["zip"]), "zip", at["images"])
    content = at["zip"].with_suffix(".zip").read_bytes()
    at["zip"].write_bytes(content)
    at["cut_zip"].write_bytes(content[: len(content) // 2])
    for label in ("cat", "dog"):
        for number in range(2):
            path = at["wide"] / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(at["wide_png"], path)


def _checkpoints(at: dict[str, Path]) -> None:
    from unet_diffusion.diffusion.schedule import NoiseSchedule
    from unet_diffusion.inference.autoencoder import Autoencoder
    from unet_diffusion.inference.denoiser import Denoiser
    from unet_diffusion.inference.segmenter import Segmenter
    from unet_diffusion.models.autoencoders import kl_autoencoder
    from unet_diffusion.models.unet import DenoiserUNet, SegmentationUNet

    torch.manual_seed(0)
    schedule = NoiseSchedule(1000, "squaredcos_cap_v2", prediction_type="v_prediction")
    small = {"norm_num_groups": 4, "layers_per_block": 1, "attention_levels": [1]}
    for name, names in {"denoiser": ["cat", "dog"], "digits": [str(digit) for digit in range(10)]}.items():
        unet = DenoiserUNet(1, [8, 16], num_class_embeds=len(names) + 1, **small)
        trained = Denoiser(unet, schedule, (1, 8, 8), null_label=len(names), class_names=names)
        trained.save(at[name].with_suffix(".ckpt"))
        if name == "denoiser":
            trained.save(at["run"] / "checkpoints" / "last.ckpt")
            trained.export(at["pipeline"])
    cells = Segmenter(SegmentationUNet(1, 2, channels=[4, 8], padding="same"), "classes", ["none", "cell"], None,
                             False, 64)  # fmt: skip
    cells.save(at["cells"].with_suffix(".ckpt"))
    autoencoder = kl_autoencoder(3, [32, 32])
    trained_autoencoder = Autoencoder(autoencoder, (3, 16, 16), 1.0)
    trained_autoencoder.save(at["autoencoder"].with_suffix(".ckpt"))
    trained_autoencoder.export(at["autoencoder"])


def _made_by_commands(at: dict[str, Path]) -> None:
    from unet_diffusion.commands.main import main

    cells, run = at["cells"].with_suffix(".ckpt"), at["run"]
    for command in (
        ("pack", at["images"], at["shards"], "--class_labels"),
        ("encode", at["autoencoder"], at["images"], "--output", at["latents"], "--device=cpu"),
        ("sample", run, "--output", at["drawn"], "--device=cpu", "--num_images=2", "--num_inference_steps=2"),
        ("segment", cells, at["grey"], "--output", at["masks"], "--device=cpu"),
    ):
        assert main([str(word) for word in command]) == 0, command


def write_damaged(source: Path, damage: str, target: Path, field: str = "", value: Any = None) -> Path:
    """Write a checkpoint with something wrong about it; returns its path.

    Args:
        source: A good one, without its extension.
        damage: What is wrong; "record" is of a field.
        target: The file to make.
        field: Of the record.
        value: In its place; "-" leaves it out.
    """
    good = source.with_suffix(".ckpt").read_bytes()
    bytes_of = {
        "empty": b"",
        "text": b"hello",
        "cut": good[: len(good) // 2],
        "flipped": _flipped(good),
        "json": b'{"denoiser": {}}',
        "png": (source.parent / "png").read_bytes(),
        "zip": (source.parent / "zip").read_bytes(),
    }
    if damage in bytes_of:
        target.write_bytes(bytes_of[damage])
    elif damage == "compressed":
        with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    elif damage in ("code", "huge"):
        torch.save({**torch.load(io.BytesIO(good)), "more": Code() if damage == "code" else Huge()}, target)
    elif damage == "huge old":
        torch.save({"more": Huge()}, target, _use_new_zipfile_serialization=False)
    elif damage == "list":
        torch.save([1, 2], target)
    else:
        torch.save(_with_other(torch.load(io.BytesIO(good)), damage, field, value), target)
    return target


def _flipped(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]


def _with_other(checkpoint: dict[str, Any], damage: str, field: str, value: Any) -> dict[str, Any]:
    checkpoint = copy.copy(checkpoint)
    weights = dict(checkpoint["state_dict"])
    key = next(key for key in ("denoiser", "segmenter", "autoencoder") if key in checkpoint)
    record = copy.deepcopy(checkpoint[key])
    name = next(name for name in weights if name.startswith("ema_"))
    config = record["unet"]["init_args"] if "unet" in record else record["config"]
    if damage == "no weights":
        del checkpoint["state_dict"]
        return checkpoint
    if damage == "fewer weights":
        weights = {name: one for name, one in weights.items() if "conv_in" not in name and "down_blocks.0" not in name}
    elif damage == "other weights":
        weights[name] = torch.zeros(3, 3)
    elif damage == "nan weights":
        weights[name] = torch.full_like(weights[name], torch.nan)
    elif damage == "strided":  # a number that says that it is six billion
        weights[name] = torch.zeros(1).expand(HUGE)
    elif damage in ("wide", "deep"):
        channels = "channels" if "channels" in config else "block_out_channels"
        config[channels] = [16000] * len(config[channels]) if damage == "wide" else [*config[channels]] * 4000
    elif value == "-":
        del record[field]
    else:
        record[field] = value
    return {**checkpoint, key: record, "state_dict": weights}


if __name__ == "__main__":
    make_inputs(Path(sys.argv[1]))
