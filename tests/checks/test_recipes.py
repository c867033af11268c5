"""No recipe gets advice with data like those that it is for."""

from pathlib import Path

import pytest
import torch

from unet_diffusion.checks.advice import advice
from unet_diffusion.commands.fit_arguments import check_arguments
from unet_diffusion.commands.training_cli import BuildOnly
from unet_diffusion.data import ImageSet
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.training.planning import plan_of

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = {  # what the network sees, and the number of images to train on
    "autoencoder_kl": ((3, 64, 64), 3200),
    "autoencoder_vq": ((3, 64, 64), 3200),
    "cells": ((1, 128, 128), 52),
    "cifar10_ddpm": ((3, 32, 32), 49_000),
    "digits": ((1, 8, 8), 1618),
    "fashion_mnist": ((1, 28, 28), 59_500),
    "folder": ((3, 64, 64), 3200),
    "inpainting": ((4, 16, 16), 3200),
    "isbi2012_modern": ((1, 256, 256), 18),
    "isbi2012_unet": ((1, 572, 572), 18),
    "latents": ((4, 16, 16), 3200),
    "latents_text": ((4, 16, 16), 3200),
    "nuclei_denoiser": ((3, 64, 64), 12_427),
    "nuclei_features": ((3, 128, 128), 320),
    "nuclei_finetune": ((3, 128, 128), 320),
    "nuclei_from_masks": ((3, 64, 64), 12_427),
    "nuclei_joint": ((3, 128, 128), 320),
    "nuclei_segment": ((3, 128, 128), 320),
    "stream": ((3, 64, 64), 1_000_000),
    "upscaling": ((4, 16, 16), 3200),
}
PATHS = ("--data.root", "--data.images", "--data.labels", "--data.semantic_map", "--model.init_from",
         "--model.codec.init_args.autoencoder")  # fmt: skip
NAMES = (
    "root:",
    "images:",
    "labels:",
    "semantic_map:",
    "init_from:",
    "autoencoder: runs",
)  # of these settings in a recipe


def test_every_recipe_is_looked_at():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(DATA)


@pytest.mark.parametrize("name", DATA)
def test_recipe_gets_no_advice(name, tmp_path):
    text = (CONFIGS / f"{name}.yaml").read_text()
    words = ["fit", "--config", name, "--trainer.accelerator", "cpu"]
    for option, setting in zip(PATHS, NAMES, strict=True):
        words += [option, str(tmp_path)] if f" {setting}" in text else []
    if "autoencoder: runs" in text:
        kl_autoencoder(3, (32, 32, 32), layers_per_block=1).save_pretrained(tmp_path)
    cli = BuildOnly.run(check_arguments(words))
    model, data = cli.model, cli.datamodule
    shape, number = DATA[name]
    setattr(model, "sample_shape" if model.record_key == "denoiser" else "image_shape", shape)
    data.train_indices, data.val_indices = torch.arange(number), torch.arange(100)
    if hasattr(data, "targets"):
        data.train_images = data.train_indices
    else:
        data._image_set = ImageSet(
            torch.zeros(1, 1, 1, 1), entries={"captions": ["a red heart"]}, class_names=["a", "b"]
        )
    cli.trainer.optimizers = model.new_optimizers()
    findings = advice(plan_of(cli.trainer, model, data, num_processes=1))
    assert [str(finding) for finding in findings if finding.severity != "note"] == []
