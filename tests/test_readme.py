"""Every command of the pages runs, in order, with settings that only make it small, and so does their Python."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from forked import run_python
from torchvision.io import write_png

from unet_diffusion.commands.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *((ROOT / "docs" / f"{name}.md").read_text() for name in ("guide", "streaming"))]
MAX_BYTES = 10_000  # of README: what a newcomer reads; the rest is for docs/
SMALL = ["--samples.num_images=4", "--data.batch_size=8"]
SMALL_DENOISER = [
    *SMALL,
    "--model.unet.init_args.channels=[8, 16]",
    "--model.unet.init_args.norm_num_groups=4",
    "--model.unet.init_args.attention_levels=[1]",
    "--model.unet.init_args.head_channels=null",
    "--samples.num_inference_steps=2",
]
SMALL_WITH_MAPS = [*SMALL_DENOISER, "--data.num_val=2"]
SMALL_SEGMENTER = [*SMALL, "--model.unet.init_args.channels=[8, 16]", "--data.window_size=32"]
SMALL_NUCLEI = ["--model.unet.init_args.norm_num_groups=4", "--data.num_val=4"]
SMALL_RECIPE = {
    "autoencoder_kl": [*SMALL, "--model.autoencoder.init_args.channels=[32, 32, 32]"],
    "cells": [*SMALL_SEGMENTER, "--data.num_images=13"],
    "inpainting": SMALL_WITH_MAPS,
    "upscaling": SMALL_WITH_MAPS,
    "isbi2012_modern": SMALL_SEGMENTER,
    "latents": [*SMALL_DENOISER, "--data.num_val=2"],
    "latents_text": [*SMALL_DENOISER, "--data.num_val=2"],
    "nuclei_denoiser": [*SMALL_DENOISER, "--model.unet.init_args.attention_levels=[]"],
    "nuclei_from_masks": [*SMALL_DENOISER, "--model.unet.init_args.attention_levels=[]"],
    "nuclei_finetune": [*SMALL_SEGMENTER, *SMALL_NUCLEI],
    "nuclei_joint": [*SMALL_SEGMENTER, "--data.num_val=4"],
}


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(PAGES), flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Those of README, then those that only the other pages have."""
    lines = [line for block in code_blocks("bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines if not line.startswith("#") for part in line.split("&&")]
    distinct = dict.fromkeys(part for part in parts if part.startswith("unet-diffusion"))
    return [shlex.split(part)[1:] for part in distinct]


def run(arguments: list[str]) -> int:
    if arguments[0] == "explore":  # which serves until it is interrupted
        return served([*arguments, "--device", "cpu"])
    if "ddp" in arguments or arguments[0] == "two-stages":  # which start others; Lightning by their command line
        return run_python([sys.executable, "-m", "unet_diffusion", *arguments]).returncode
    return main(arguments)


def served(arguments: list[str]) -> int:
    """0 if the command serves a page, and ends when it is interrupted."""
    words = [sys.executable, "-m", "unet_diffusion", *(word for word in arguments if word != "--open_browser")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            with urlopen(re.search(r"http://127.0.0.1:\d+/", line)[0]) as page:
                assert b"gradio" in page.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130  # as shells report it
        finally:
            process.kill()
    return 0


def write_images(
    folder: Path, num: int, *, channels: int, values: int, scale: int = 1, size: tuple[int, int] = (70, 66)
) -> None:
    folder.mkdir(parents=True)
    for number in range(num):
        generator = torch.Generator().manual_seed(number)
        pixels = scale * torch.randint(values, (channels, *size), generator=generator, dtype=torch.uint8)
        write_png(pixels, str(folder / f"{number}.png"))


def small(arguments: list[str]) -> list[str]:
    recipe = arguments[arguments.index("--config") + 1]  # that of "mine.yaml" is `folder`
    return SMALL_RECIPE.get(recipe, SMALL_DENOISER)


def test_readme_is_short_and_its_pictures_are_there() -> None:
    assert len(README.encode()) <= MAX_BYTES
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert [picture for picture in pictures if not (ROOT / picture).is_file()] == []


def test_no_figure_is_left_to_be_filled_in() -> None:
    """A name in capitals with underscores stands for one: outside of code, the pages have no other such names."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", "\n".join(PAGES), flags=re.DOTALL)
    assert re.findall(r"\b(?:[A-Z0-9]+(?:_[A-Z0-9]+)+|TODO|FIXME|TBD|XXX)\b|\?\?", prose) == []


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few images in it, to run the commands in."""
    write_images(tmp_path / "images", 12, channels=3, values=256)
    write_images(tmp_path / "scans", 12, channels=3, values=256)
    for path in sorted((tmp_path / "scans").iterdir()):
        path.rename(path.with_name(f"p{int(path.stem) // 3}_slice{path.stem}.png"))
    for folder, channels, dtype in (("stacks", 5, "uint16"), ("floats", 1, "float32"), ("slices", 1, "int16")):
        (tmp_path / folder).mkdir()
        for number in range(12):
            numbers = np.random.default_rng(number).integers(0, 3000, size=(channels, 70, 66)).astype(dtype)
            np.save(tmp_path / folder / f"{number}.npy", numbers)
    captions = [f"{number}.png,picture number {number}" for number in range(12)]
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(["file_name,text", *captions]))
    train, nuclei, size = tmp_path / "isbi2012" / "train", tmp_path / "nuclei", (170, 166)
    write_images(train / "image", 9, channels=1, values=256)
    write_images(train / "label", 9, channels=1, values=2, scale=255)
    write_images(nuclei / "image", 24, channels=3, values=256, size=size)  # as large as pairs that are drawn
    write_images(nuclei / "label", 24, channels=1, values=2, size=size)
    write_images(nuclei / "mask", 24, channels=1, values=2, scale=255, size=size)
    write_png((torch.arange(64).view(1, 8, 8) % 8 > 3).to(torch.uint8) * 255, str(tmp_path / "mask.png"))
    write_png((torch.arange(66).expand(1, 70, 66) > 30).to(torch.uint8) * 255, str(tmp_path / "white_is_painted.png"))
    write_png(torch.randint(256, (3, 16, 20), dtype=torch.uint8), str(tmp_path / "small.png"))
    write_png(torch.randint(256, (1, 70, 66), dtype=torch.uint8), str(tmp_path / "image.png"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


@pytest.mark.slow
def test_every_command_and_python_block_runs(workplace: Path, small_recipes: tuple[Path, Path]) -> None:
    assert len(commands()) >= 30
    for step, arguments in enumerate(commands()):
        # Each fit goes further than the last, so that the one that continues has something to do.
        more = [*small(arguments), f"--trainer.max_steps={step + 1}"] if arguments[0] in ("fit", "check") else []
        if arguments[0] == "two-stages":
            autoencoder, denoiser = small_recipes
            more = ["--autoencoder", str(autoencoder), "--denoiser", str(denoiser)]
        if arguments[0] == "synthesize":
            more = ["--min_dice", "0", "--num_inference_steps", "5"]  # segmenters of a few steps agree with nothing
        assert run([*arguments, *more]) == 0, " ".join(arguments)
    assert (workplace / "runs" / "digits" / "samples.png").exists()
    assert (workplace / "generated" / "threes_and_sevens" / "grid.png").exists()
    assert len(list((workplace / "masks").glob("*.png"))) == 12
    for block in code_blocks("python"):
        exec(block.replace("num_inference_steps=50", "num_inference_steps=2"), {})
    assert (workplace / "pipeline" / "model_index.json").exists()
    assert (workplace / "three.png").exists()
