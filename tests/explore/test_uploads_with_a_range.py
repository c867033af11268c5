"""Uploads of instruments: the tabs read them by the range of the model, and the command gets all that they hold."""

from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.explore.autoencoder_tab import _reconstructed
from unet_diffusion.explore.image_tab import ImageTab
from unet_diffusion.explore.request_form import RequestForm
from unet_diffusion.explore.runs import Run
from unet_diffusion.explore.segmenter_tab import _segmented
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.init_images import read_user_image
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.runtime.pixel_values import PixelValues

HOUNSFIELD = PixelValues("float32", -1024, 3071)


def upload_of(folder: Path, dtype, size=(8, 8)) -> Path:
    numbers = np.random.default_rng(0).uniform(0, 3000, size).astype(dtype)
    if dtype == np.uint8:
        Image.fromarray(numbers).save(folder / "an upload.png")
        return folder / "an upload.png"
    tifffile.imwrite(folder / "an upload.tif", numbers)
    return folder / "an upload.tif"


@pytest.fixture
def files_of_command(tiny_unet, tmp_path, monkeypatch):
    """The command of the tab for an upload, half of which is painted over if that is told, and the files for it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))

    def make(upload, values, *, is_painted=True):
        denoiser = Denoiser(tiny_unet(), NoiseSchedule(10), (1, 8, 8), values=values)
        run = Run(tmp_path / "model.ckpt", denoiser, None, None)
        with gr.Blocks():
            form = RequestForm(denoiser, gr.State(run.name))
            tab = ImageTab(form, lambda values: run)
        layer = np.zeros((384, 384, 4), np.uint8)
        layer[:, :192, 3] = 255
        filled = {component: component.value for component in form.inputs}
        filled |= {tab.upload: str(upload), tab.strength: 0.5}
        filled[tab.editor] = {"layers": [layer] if is_painted else []}
        update = tab._command(filled)
        files = {Path(path).name: Path(path) for path in _paths(update[tab.files])}
        return denoiser, update[tab.code].value, files

    return make


def _paths(files: gr.File) -> list[str]:
    return [one["path"] if isinstance(one, dict) else one.path for one in files.value]


@pytest.mark.parametrize(("dtype", "values"), [(np.uint16, PixelValues()), (np.float32, HOUNSFIELD)])
def test_upload_of_the_size_to_draw_is_kept_as_it_is(files_of_command, tmp_path, dtype, values):
    upload = upload_of(tmp_path, dtype)
    _, line, files = files_of_command(upload, values)
    assert "--image image.tif --mask mask.png" in line
    assert files["image.tif"].read_bytes() == upload.read_bytes()
    mask = np.asarray(Image.open(files["mask.png"]))
    np.testing.assert_array_equal(mask, np.repeat([255] * 4 + [0] * 4, 8).reshape(8, 8).T)


@pytest.mark.parametrize(
    ("dtype", "values", "name", "tolerance"),
    [
        (np.uint8, PixelValues(), "image.png", 0),
        (np.uint16, PixelValues(), "image.tif", 1 / 65535),  # half a step
        (np.float32, HOUNSFIELD, "image.tif", 1e-6),
    ],
)
@pytest.mark.parametrize("is_painted", [True, False])
def test_upload_of_another_size_is_written_with_all_that_it_holds(
    files_of_command, tmp_path, dtype, values, name, tolerance, is_painted
):
    upload = upload_of(tmp_path, dtype, (20, 12))
    denoiser, line, files = files_of_command(upload, values, is_painted=is_painted)
    assert f"--image {name}" in line
    assert ("mask.png" in files) == is_painted
    drawn_from, again = (
        read_user_image(path, None, denoiser.image_shape, values.value_range).pixels for path in (upload, files[name])
    )
    torch.testing.assert_close(again, drawn_from, rtol=0, atol=tolerance)
    image = denoiser.sample(1, image=files[name], mask=files.get("mask.png"), num_inference_steps=2)
    assert image.isfinite().all()


def test_autoencoder_tab_reads_by_the_range_of_the_model(tmp_path):
    torch.manual_seed(0)
    network = kl_autoencoder(1, (4, 8), latent_channels=2, layers_per_block=1, norm_num_groups=2, mid_attention=False)
    autoencoder = Autoencoder(network.eval(), (1, 8, 8), values=HOUNSFIELD)
    upload = upload_of(tmp_path, np.float32)
    update = _reconstructed(autoencoder, str(upload), ("picture", "latents", "words"), lambda update: None)
    image = (torch.from_numpy(tifffile.imread(upload).astype(np.float64)) + 1024) / 4095 * 2 - 1
    back = autoencoder.decode(autoencoder.encode(image[None, None].float())).clamp(-1, 1)
    psnr = 10 * np.log10(4 / float((back - image).square().mean()))
    assert update["words"].startswith(f"PSNR {psnr:.2f} dB")


def test_segmenter_tab_reads_by_the_range_of_the_model(tmp_path):
    torch.manual_seed(0)
    unet = SegmentationUNet(1, 2, channels=(4, 8), padding="same").eval()
    segmenter = Segmenter(unet, "binary", ["background", "cell"], None, False, 32, values=HOUNSFIELD)
    upload = upload_of(tmp_path, np.float32, (32, 32))
    segmented = _segmented(segmenter, str(upload), False, "status", lambda update: None)
    stored = tifffile.imread(upload)
    np.testing.assert_array_equal(segmented.intensities, stored)
    expected = np.rint((stored.astype(np.float64) + 1024) / 4095 * 255)
    np.testing.assert_allclose(segmented.pixels[0].numpy(), expected, atol=1)  # a tie may go either way
    image = torch.from_numpy(((stored + 1024.0) / 4095 * 2 - 1).astype(np.float32))
    np.testing.assert_allclose(segmented.segmentation.maps, segmenter.segment(image[None]).maps, atol=1e-5)
