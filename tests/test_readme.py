"""Every command in README runs, in order, with settings that only make it small."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

from unet_diffusion.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = [
    "--model.unet.init_args.channels=[8, 16]",
    "--model.unet.init_args.norm_num_groups=4",
    "--model.unet.init_args.attention_levels=[1]",
    "--model.unet.init_args.head_channels=null",
    "--data.init_args.batch_size=8",
    "--samples.num_images=4",
    "--samples.num_inference_steps=2",
]


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in code_blocks("bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines if not line.startswith("#") for part in line.split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.startswith("unet-diffusion")]


def run(arguments: list[str]) -> int:
    if "ddp" in arguments:  # Lightning starts the second process with the command line of the first: not pytest's
        return subprocess.run([sys.executable, "-m", "unet_diffusion.cli", *arguments], check=False).returncode
    return main(arguments)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes and a few images in it, to run the commands in."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "images").mkdir()
    for number in range(12):
        pixels = torch.randint(256, (3, 70, 66), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        write_png(pixels, str(tmp_path / "images" / f"{number}.png"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


def test_every_command_runs_and_the_exported_pipeline_draws(workplace: Path) -> None:
    assert len(commands()) >= 9
    for step, arguments in enumerate(commands()):
        # Each fit goes further than the last, so that the one that continues has something to do.
        small = [*SMALL, f"--trainer.max_steps={step + 1}"] if arguments[0] == "fit" else []
        assert run([*arguments, *small]) == 0, " ".join(arguments)
    assert (workplace / "runs" / "digits" / "samples.png").exists()
    assert (workplace / "generated" / "threes_and_sevens" / "grid.png").exists()
    for block in code_blocks("python"):
        exec(block.replace("num_inference_steps=50", "num_inference_steps=2"), {})
    assert (workplace / "three.png").exists()
