"""Networks of segmentation_models_pytorch, from their own folders, beside that library."""

import json

import numpy as np
import pytest
import torch
from denoisers import randomise
from torchvision.transforms.functional import normalize

import unet_diffusion as ud
from unet_diffusion.models.encoder_unet import EncoderUNet

smp = pytest.importorskip("segmentation_models_pytorch")
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402  # it comes with the library

SMALL_OF_TIMM = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}
SMALL = {"encoder_depth": 3, "decoder_channels": (16, 8, 8), "encoder_weights": None}


def saved(folder, classes=2, channels=3, **options):
    torch.manual_seed(0)
    net = smp.Unet("resnet18", in_channels=channels, classes=classes, **{**SMALL, **options})
    net = randomise(net, 0.02)
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize(("classes", "channels", "normalization"), [(2, 3, "imagenet"), (4, 1, "unit")])
@torch.no_grad()
def test_network_gives_the_scores_of_its_library(classes, channels, normalization, tmp_path):
    net = saved(tmp_path, classes, channels)
    ours = ud.load(tmp_path, normalization=normalization)
    images = torch.rand(2, channels, 32, 48)
    seen = images
    if normalization == "imagenet":
        seen = normalize(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    torch.testing.assert_close(ours.unet(2 * images - 1), net(seen), atol=1e-5, rtol=1e-5)
    assert len(ours.class_names) == classes


@torch.no_grad()
def test_one_score_is_the_logit_of_the_foreground(tmp_path):
    net = saved(tmp_path, 1)
    image = torch.rand(3, 32, 32)
    result = ud.load(tmp_path, normalization="unit").segment(2 * image - 1)
    np.testing.assert_allclose(result.probabilities[1], net(image[None]).sigmoid()[0, 0].numpy(), atol=1e-5)


def test_imported_folder_is_a_checkpoint(tmp_path, run_cli):
    saved(tmp_path / "folder")
    options = ["--normalization", "imagenet", "--image_size", "64"]
    status, _, err = run_cli("import", tmp_path / "folder", tmp_path / "net.ckpt", *options)
    assert status == 0, err
    image = torch.rand(3, 40, 40) * 2 - 1
    expected = ud.load(tmp_path / "folder", normalization="imagenet", image_size=64).segment(image).probabilities
    np.testing.assert_array_equal(ud.load(tmp_path / "net.ckpt").segment(image).probabilities, expected)


def test_normalization_is_asked_for(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"normalization must be given for .* unit for a network"):
        ud.load(tmp_path)


def test_normalization_of_images_needs_three_channels(tmp_path):
    saved(tmp_path, channels=1)
    with pytest.raises(ValueError, match=r"normalization imagenet is for images of 3 channels, got 1"):
        ud.load(tmp_path, normalization="imagenet")


def test_other_networks_of_the_library_are_refused(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"_model_class": "Linknet"}, r'_model_class must be "Unet" in .*config.json, got "Linknet"; other networks'),
        ({"activation": "sigmoid"}, r'activation must be null in .*config.json, got "sigmoid"; .* set it to null'),
        ({"aux_params": {"classes": 2}}, r"aux_params must be null in .*, got .*classes.*; save the network without"),
        ({"encoder_name": "resnet19"}, r"encoder_name must be one of .*, got 'resnet19'; did you mean resnet1"),
        ({"encoder_name": "tu-resnet1"}, r"encoder_name must be one of .*, got 'tu-resnet1'; did you mean tu-resnet"),
        ({"decoder_channels": [16, 8, 4]}, r"the weights in .* do not fit its config.json"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            ud.load(tmp_path, normalization="unit")


def test_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install unet-diffusion\[encoders\]"):
        ud.load(tmp_path, normalization="unit")


def test_encoder_of_timm_is_built():
    assert EncoderUNet(3, 2, "tu-mobilenetv3_small_050", options=SMALL_OF_TIMM).size_step == 8


def test_encoder_that_a_server_would_be_asked_for_is_refused():
    with pytest.raises(ValueError, match="encoder_name must be one of segmentation_models_pytorch's"):
        EncoderUNet(3, 2, "tu-hf-hub:someone/model")
