"""unet-diffusion evaluate for denoisers that draw by images of the data: of pixels, of latents, and through a codec."""

import json

import numpy as np
import pytest
import torch
from denoisers import TINY_UNET, latent_space, randomise
from PIL import Image
from torch import nn

from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.evaluation import own_features as own
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.segmentation_unet import SegmentationUNet

FEW = ("--num_images=12", "--num_inference_steps=2", "--batch_size=5", "--device=cpu", "--precision=float32")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setitem(own.SETTINGS, "num_steps", 3)


@pytest.fixture
def files(tmp_path):
    """Images with pairs and maps in folders beside."""
    rng = np.random.default_rng(0)
    for number in range(24):
        pixels = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
        folders = {"image": pixels, "pair": 255 - pixels, "map": (pixels[..., 0] > 127).astype(np.uint8)}
        for folder, content in folders.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(content).save(tmp_path / folder / f"{number:02}.png")
    return tmp_path


def save_denoiser(path, *conditions, space=None):
    """A denoiser that was not trained, of digits or of latents."""
    torch.manual_seed(0)
    channels = 1 if space is None else 4
    beside = sum(condition.config["channels"] for condition in conditions)
    network = {**TINY_UNET, "in_channels": channels + beside, "out_channels": channels, "attention_levels": []}
    codec = {} if space is None else {"codec": LatentCodec.of(space)}
    made = Denoiser(
        randomise(DenoiserUNet(**network)),
        NoiseSchedule(50),
        (channels, 8, 8),
        conditions=nn.ModuleList(conditions),
        **codec,
    )
    made.save(path)
    return path


def save_segmenter(path, channels=3):
    torch.manual_seed(0)
    unet = SegmentationUNet(channels, 2, channels=(4, 8), padding="same")
    Segmenter(randomise(unet), "binary", ["background", "bright"], None, False, 16).save(path)
    return path


def stored(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_pixels_are_painted_into_digits(run_cli, tmp_path):
    model = save_denoiser(tmp_path / "model.ckpt", MaskedImage(2))
    status, out, err = run_cli("evaluate", model, *FEW, "--config", "digits", "--data.num_val", 20)
    assert status == 0, err
    assert "Does it follow its condition?\n  PSNR in the hole, dB: " in out
    found = stored(tmp_path / "model-evaluation")
    assert found["protocol"]["drawn for"] == "what is known of 20 held-out images, by turns"
    assert set(found["figures"]["masked_image_psnr"]["beside"]) == {"shuffled", "mean of the rest"}
    page = (tmp_path / "model-evaluation" / "evaluation.html").read_text()
    assert "masked image, real image, drawn image, from left to right" in page
    status, again, err = run_cli("evaluate", model, *FEW, "--config", "digits", "--data.num_val", 20)
    assert (status, again) == (0, out), err


def test_stored_latents_are_drawn_for_maps_and_a_segmenter_judges(run_cli, files):
    space = latent_space(files / "autoencoder")
    words = ("--semantic_map", files / "map", "--image_size", 16, 16, "--device=cpu")
    status, _, err = run_cli("encode", files / "autoencoder", files / "image", "--output", files / "latents", *words)
    assert status == 0, err
    condition = SemanticMap(2, label_format="0/1", downsampling=2)
    model = save_denoiser(files / "model.ckpt", condition, space=space)
    data = ("--data.source=Latents", "--data.root", files / "latents", "--data.num_val", 8)
    status, _, err = run_cli("evaluate", model, *FEW, *data)
    assert status == 0, err
    found = stored(files / "model-evaluation")["figures"]["semantic_map_iou"]
    assert found["value"] is None
    assert "give --segmenter RUN" in found["remark"]
    judged = ("--segmenter", save_segmenter(files / "segmenter.ckpt"))
    status, _, err = run_cli("evaluate", model, *FEW, *data, *judged)  # of the same samples
    assert status == 0, err
    found = stored(files / "model-evaluation")["figures"]["semantic_map_iou"]
    assert 0 <= found["value"] <= 1
    assert 0 <= found["real"] <= 1
    assert set(found["beside"]) == {"shuffled"}


def test_images_are_encoded_for_a_denoiser_of_latents(run_cli, files):
    model = save_denoiser(files / "model.ckpt", PairedImage(4), space=latent_space(files / "autoencoder"))
    data = ("--data.source=Folder", "--data.root", files / "image", "--data.image_size=16", "--data.num_val", 8)
    status, _, err = run_cli("evaluate", model, *FEW, *data, "--data.paired_image", files / "pair")
    assert status == 0, err
    assert 0 < stored(files / "model-evaluation")["figures"]["paired_image_psnr"]["value"] < 30


def test_what_is_missing_is_said_in_a_sentence(run_cli, files):
    space = latent_space(files / "autoencoder")
    pairs = save_denoiser(files / "pairs.ckpt", PairedImage(4), space=space)
    data = ("--data.source=Folder", "--data.root", files / "image", "--data.image_size=16", "--data.num_val", 8)
    cases = [
        ((), 2, "does not say what it was trained on; give its data, with --config FILE, or with --data.source"),
        (data, 1, "the data must give numbers as 'paired_image', which the condition PairedImage reads"),
        ((*data, "--segmenter", "none"), 1, "--segmenter must exist, got none"),
        ((*data, "--segmenter", pairs), 1, "holds a denoiser, not a segmenter"),
        ((*data, "--segmenter", save_segmenter(files / "s.ckpt")), 1, "judges semantic maps and boxes, and this"),
    ]
    for words, status, said in cases:
        found, _, err = run_cli("evaluate", pairs, *FEW, *words)
        assert (found, said in err) == (status, True), err
        assert not (files / "pairs-evaluation" / "samples").exists()
