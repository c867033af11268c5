"""Folders whose images or latents were made with conditions say what differs, and may be overwritten without them."""

import numpy as np
import pytest
import torch
from denoisers import TINY_UNET, latent_space, randomise
from PIL import Image
from torch import nn

from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.models.denoiser_unet import DenoiserUNet

SAMPLE = ("--num_images", 2, "--num_inference_steps", 2, "--device", "cpu")


@pytest.fixture
def maps(tmp_path):
    folder = tmp_path / "map"
    folder.mkdir()
    Image.fromarray(np.eye(16, dtype=np.uint8)).save(folder / "0.png")
    return folder


def save_denoiser(path, *conditions):
    torch.manual_seed(0)
    beside = sum(condition.config["channels"] for condition in conditions)
    unet = DenoiserUNet(**{**TINY_UNET, "in_channels": 1 + beside, "out_channels": 1, "attention_levels": []})
    Denoiser(randomise(unet), NoiseSchedule(50), (1, 8, 8), conditions=nn.ModuleList(conditions)).save(path)
    return path


def test_images_of_a_map_may_be_overwritten_by_a_model_without(run_cli, maps, tmp_path):
    by_maps = save_denoiser(tmp_path / "maps.ckpt", SemanticMap(2, label_format="0/1"))
    plain, output = save_denoiser(tmp_path / "plain.ckpt"), ("--output", tmp_path / "drawn", *SAMPLE)
    status, _, err = run_cli("sample", by_maps, *output, "--condition", f"semantic_map={maps}")
    assert status == 0, err
    status, _, err = run_cli("sample", plain, *output, "--resume")
    assert (status, "the images in" in err, "made with other settings (checkpoint: " in err) == (1, True, True), err
    for model, condition in ((plain, []), (by_maps, ["--condition", f"semantic_map={maps}"])):
        status, _, err = run_cli("sample", model, *output, *condition, "--overwrite")
        assert status == 0, err


def test_a_condition_that_is_given_twice_is_refused(run_cli, maps, tmp_path):
    by_maps = save_denoiser(tmp_path / "maps.ckpt", SemanticMap(2, label_format="0/1"))
    words = ("--condition", f"semantic_map={maps}", f"semantic_map={maps / '0.png'}", "--output", tmp_path / "drawn")
    status, _, err = run_cli("sample", by_maps, *SAMPLE, *words)
    assert status == 2
    assert "--condition has one value for each name, got 2 for semantic_map; give one" in err
    assert not (tmp_path / "drawn").exists()


def test_two_conditions_of_other_images_are_refused_before_anything_is_drawn(run_cli, maps, tmp_path):
    """By turns, the second image of one folder would be drawn with the third of the other."""
    both = save_denoiser(tmp_path / "both.ckpt", SemanticMap(2, label_format="0/1"), PairedImage(1))
    pairs = tmp_path / "pair"
    pairs.mkdir()
    for number in range(3):
        Image.fromarray(np.eye(16, dtype=np.uint8)).save(maps / f"{number}.png")
        Image.fromarray(np.full((16, 16), 80 * number, dtype=np.uint8)).save(pairs / f"{number}.tif")
    words = ("--condition", f"semantic_map={maps}", f"paired_image={pairs}", "--output", tmp_path / "drawn")
    status, _, err = run_cli("sample", both, *SAMPLE, *words)
    assert status == 0, err
    (pairs / "1.tif").unlink()
    status, _, err = run_cli("sample", both, *SAMPLE, *words, "--overwrite")
    assert status == 1
    assert "semantic_map and paired_image must be of the same images, as they take turns together" in err
    assert "they differ in 1; add, remove or rename files" in err
    (pairs / "2.tif").rename(pairs / "3.tif")
    (pairs / "0.tif").rename(pairs / "4.tif")
    status, _, err = run_cli("sample", both, *SAMPLE, *words, "--overwrite")  # names that have nothing in common
    assert status == 0, err


def test_latents_with_and_without_maps_are_of_other_settings(run_cli, maps, tmp_path):
    latent_space(tmp_path / "autoencoder")
    (tmp_path / "image").mkdir()
    for number in range(2):
        pixels = np.full((16, 16, 3), number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "image" / f"{number}.png")
        Image.fromarray(pixels[..., 0]).save(maps / f"{number}.png")
    words = ("--output", tmp_path / "latents", "--image_size", 16, 16, "--device=cpu")
    encode = ("encode", tmp_path / "autoencoder", tmp_path / "image", *words)
    status, _, err = run_cli(*encode)
    assert status == 0, err
    status, _, err = run_cli(*encode, "--semantic_map", maps)
    assert status == 1
    assert f"were made with other settings (semantic_map: None there, {maps} here)" in err
