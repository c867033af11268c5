"""How long a diffusers folder of Stable Diffusion 1's size takes to load, here and by diffusers: seconds and memory.

    python benchmarks/loading.py

The folder is made here, with random weights in float16 (2.1 GB): U-Net 860 M, text encoder 123 M, autoencoder 84 M.
Each turn is a process of its own, from its start to a model in float32 that can draw. Before each turn the system is
asked to drop the files of the folder from its memory. Seconds of the processor are those of user and system. Memory is
the largest resident set, which counts mapped files.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from measure import describe, environment, status_mib, table, write_json
from torch import nn

from unet_diffusion.diffusion.conditions.text import TextTokens

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768},  # the rest is Stable Diffusion 1's already
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
        "text": {"context_dim": 768, "vocab_size": 49408, "max_length": 77, "num_layers": 12, "num_heads": 12},
    },
    "tiny": {
        "unet": {"sample_size": 8, "cross_attention_dim": 64, "block_out_channels": (32, 64, 64, 64)},
        "vae": {"block_out_channels": (32, 32), "layers_per_block": 1, "sample_size": 16},
        "text": {"context_dim": 64, "vocab_size": 600, "max_length": 77, "num_layers": 2, "num_heads": 1},
    },
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True}
LOADS = {
    "unet_diffusion": "import unet_diffusion; model = unet_diffusion.load(sys.argv[1])",
    "diffusers": "import torch; from diffusers import StableDiffusionPipeline as Kind; "
    "model = Kind.from_pretrained(sys.argv[1], torch_dtype=torch.float32)",
    "unet_diffusion, imports alone": "import unet_diffusion.inference.loading, unet_diffusion.diffusers_io.importing",
    "diffusers, imports alone": "from diffusers import StableDiffusionPipeline",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd1", help="tiny only tries the program")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", help="where the model is made; default: the system's temporary folder")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/loading.json")
    options = parser.parse_args()
    machine = environment()
    print(describe(machine), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = Path(folder) / "model"
        save_model(model, SIZES[options.size])
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in LOADS}
        for _ in range(options.turns):
            for name in LOADS:
                turns[name].append(turn(LOADS[name], model))
                print(f"{name}: {turns[name][-1]}", flush=True)
        size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
    rows = [
        {"loaded by": name, **{unit: f"{statistics.median(turn[unit] for turn in taken):.2f}" for unit in taken[0]}}
        for name, taken in turns.items()
    ]
    print(table(rows))
    report = {"environment": machine, "size": options.size, "bytes": size, "turns": turns}
    print(f"written: {write_json(options.output or 'loading', report)}")


def save_model(folder: Path, sizes: dict[str, dict[str, Any]]) -> None:
    """A folder of the build of Stable Diffusion 1, with random weights in float16."""
    text = TextTokens(**sizes["text"], hidden_act="quick_gelu")
    text.learn_words(["red", "heart"])
    levels = len(sizes["vae"]["block_out_channels"])
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": 4,
    }
    StableDiffusionPipeline(
        unet=random(lambda: UNet2DConditionModel(**sizes["unet"])),
        vae=random(lambda: AutoencoderKL(**sizes["vae"], **kinds)),
        text_encoder=text.encoder.half(),
        tokenizer=text.tokenizer,
        scheduler=PNDMScheduler(**SCHEDULE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@torch.no_grad()
def random(build: Callable[[], nn.Module]) -> nn.Module:
    """A network in float16 with small random weights."""
    with torch.device("meta"):
        network = build()
    network = network.half().to_empty(device="cpu")
    for parameter in network.parameters():
        parameter.normal_(std=0.02)
    return network


def turn(load: str, folder: Path) -> dict[str, float]:
    """Seconds from the start of a process until it has loaded, and MiB of its largest resident set."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    script = f"import sys, time, json; {load}; print(json.dumps([time.time(), open('/proc/self/status').read()]))"
    start, before = time.time(), os.times()
    done = subprocess.run([sys.executable, "-c", script, folder], check=True, capture_output=True, text=True)
    end, status = json.loads(done.stdout.splitlines()[-1])
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return {
        "seconds": round(end - start, 2),
        "seconds of the processor": round(cpu, 2),
        "MiB": round(status_mib("VmHWM", status)),
    }


if __name__ == "__main__":
    main()
