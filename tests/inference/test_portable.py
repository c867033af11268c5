"""Networks as files of ONNX and programs of torch.export, at sizes and batches other than those that were traced."""

import json
from dataclasses import replace
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from denoisers import randomise, save_autoencoder, text_denoiser
from PIL import Image

import unet_diffusion as ud
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.portable import PortableFormat
from unet_diffusion.inference.reading import contents_of
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.runtime.pixel_values import PixelValues

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.slow

FORMATS: tuple[PortableFormat, ...] = ("onnx", "torch")
TOLERANCE = {"rtol": 0, "atol": 1e-4}  # another order of the same float32 operations


def segmenter(**options) -> ud.Segmenter:
    torch.manual_seed(0)
    network = randomise(SegmentationUNet(1, 2, channels=(4, 8), **options))
    timestep = 3 if options.get("timestep_embedding") else None
    return ud.Segmenter(network, "binary", ["background", "cell"], timestep, stretch=True, window_size=60)


def computed(folder, name, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the file gives, without this package."""
    if (folder / f"{name}.onnx").exists():
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])
    with torch.no_grad():
        return torch.export.load(folder / f"{name}.pt2").module()(**inputs)


def metadata_of(folder, name) -> dict[str, Any]:
    """What the file says of itself, read without this package."""
    if (folder / f"{name}.onnx").exists():
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        return {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    with ZipFile(folder / f"{name}.pt2") as file:
        (entry,) = (one for one in file.namelist() if one.endswith("metadata.json"))
        return json.loads(file.read(entry))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_segmenter_computes_at_any_batch_and_size(tmp_path, format, padding):
    trained = segmenter(padding=padding, norm="batch")
    trained.export(tmp_path / "out", format=format)
    for batch, height, width in ((1, 40, 90), (3, 64, 30)):
        x = torch.randn(batch, 1, trained.unet.next_size(height), trained.unet.next_size(width))
        with torch.no_grad():
            torch.testing.assert_close(computed(tmp_path / "out", "segmenter", {"x": x}), trained.unet(x), **TOLERANCE)


def test_contents_of_onnx_are_those_of_its_weights_too(tmp_path):
    """Weights of more than 2 GB lie in a file of their own; here small ones do."""
    segmenter(padding="same").export(tmp_path / "out", format="onnx")
    file, weights = tmp_path / "segmenter.onnx", tmp_path / "segmenter.onnx.data"
    model = onnx.load(tmp_path / "out" / "segmenter.onnx")
    assert [output.name for output in model.graph.output] == ["output"]
    onnx.save_model(model, file, save_as_external_data=True, location=weights.name, size_threshold=100)
    before = contents_of(ud.load(file))
    assert contents_of(ud.load(file)) == before
    changed = bytearray(weights.read_bytes())
    changed[0] ^= 1
    weights.write_bytes(changed)
    assert contents_of(ud.load(file)) != before


def test_segment_runs_from_onnx_and_knows_the_margin(tmp_path, run_cli):
    trained = replace(
        segmenter(timestep_embedding=True),  # of the 2015 kind: unpadded
        values=PixelValues("uint8", 10, 200),
    )
    trained.save(tmp_path / "trained.ckpt")
    status, _, err = run_cli("export", tmp_path / "trained.ckpt", tmp_path / "out", "--format", "onnx")
    assert status == 0, err
    file = tmp_path / "out" / "segmenter.onnx"
    metadata = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert int(metadata["margin"]) == trained.unet.margin == 8
    read = ud.load(tmp_path / "out")
    assert read.values == trained.values
    assert (read.unet.margin, read.unet.size_step, read.unet.smallest_size) == (8, 2, trained.unet.smallest_size)
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(10, 200, size=(83, 131), dtype=np.uint8)  # more than a window
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    maps = [one.segment(tmp_path / "images" / "0.png").maps for one in (trained, read)]
    np.testing.assert_allclose(*maps, atol=1e-4)
    for name, path in {"ours": tmp_path / "trained.ckpt", "onnx": file}.items():
        arguments = ["segment", path, tmp_path / "images", "--output", tmp_path / name, "--device", "cpu"]
        status, _, err = run_cli(*arguments, "--precision", "float32")
        assert status == 0, err
    ours, theirs = (np.asarray(Image.open(tmp_path / name / "0.png")) for name in ("ours", "onnx"))
    assert 0.02 < (ours > 0).mean() < 0.98
    assert (ours != theirs).mean() < 1e-3  # pixels at the threshold


@pytest.mark.parametrize("format", FORMATS)
def test_denoiser_and_decoder_compute_at_any_batch_and_size(tmp_path, format):
    trained = text_denoiser(tmp_path)
    trained.export(tmp_path / "out", format=format)
    for batch, height, width, length in ((1, 8, 14, 12), (3, 10, 6, 5)):
        x, t = torch.randn(batch, 4, height, width), torch.arange(batch) * 7
        context = torch.randn(batch, length, trained.unet.context_dim)
        with torch.no_grad():
            expected = trained.unet(x, t, context=context)
        got = computed(tmp_path / "out", "denoiser", {"x": x, "t": t, "context": context})
        torch.testing.assert_close(got, expected, **TOLERANCE)
        torch.testing.assert_close(
            computed(tmp_path / "out", "decoder", {"latents": x}), trained.decode(x), **TOLERANCE
        )


@pytest.mark.parametrize("format", FORMATS)
def test_denoiser_says_what_it_takes_to_draw_with_it(tmp_path, format, tiny_unet):
    schedule = NoiseSchedule(20, prediction_type="v_prediction")
    values = PixelValues("int16", -1024, 3071)
    unet = tiny_unet(in_channels=2, num_class_embeds=3)
    trained = ud.Denoiser(unet, schedule, (2, 8, 12), class_names=["cat", "dog"], null_label=2, values=values)
    trained.export(tmp_path / "out", format=format)
    metadata = metadata_of(tmp_path / "out", "denoiser")
    assert (metadata["in_channels"], metadata["out_channels"], metadata["sample_shape"]) == (2, 2, [2, 8, 12])
    assert (metadata["class_names"], metadata["null_label"]) == (["cat", "dog"], 2)
    assert metadata["values"] == {"dtype": "int16", "low": -1024, "high": 3071, "shown": None}
    assert NoiseSchedule(**metadata["schedule"]).alphas_cumprod.equal(schedule.alphas_cumprod)
    assert metadata["schedule"]["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_decoder_of_an_autoencoder_computes_at_any_batch_and_size(tmp_path, kind):
    save_autoencoder(tmp_path / "autoencoder", kind)
    autoencoder = ud.load(tmp_path / "autoencoder")
    autoencoder.export(tmp_path / "out", format="onnx")
    latents = torch.randn(3, 4, 5, 8)
    expected = autoencoder.decode(latents)
    torch.testing.assert_close(computed(tmp_path / "out", "decoder", {"latents": latents}), expected, **TOLERANCE)


def test_files_that_are_no_segmenters_and_devices_that_they_lack_are_refused(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x.onnx cannot be read as ONNX"):
        ud.load(tmp_path / "x.onnx")
    segmenter(padding="same").export(tmp_path / "out", format="onnx")
    read = ud.load(tmp_path / "out" / "segmenter.onnx")
    with pytest.raises(ValueError, match=r"runs on the CPU in float32, got device cuda"):
        read.to("cuda")
    with pytest.raises(ValueError, match="cannot become a checkpoint"):
        read.save(tmp_path / "no.ckpt")
    with pytest.raises(FileExistsError, match="is not overwritten"):
        segmenter(padding="same").export(tmp_path / "out", format="onnx")


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'pip install "unet-diffusion\[onnx\]"'):
        segmenter(padding="same").export(tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()


def test_format_that_a_model_does_not_have_is_refused_with_those_that_it_has(tmp_path):
    segmenter = ud.Segmenter(
        ud.SegmentationUNet(1, 2, channels=(4, 8), padding="same"),
        *("binary", ["background", "cell"]),
        timestep=None,
        stretch=False,
        window_size=32,
    )
    with pytest.raises(ValueError, match="format must be one of pipeline, onnx, torch, got 'adapter'"):
        segmenter.export(tmp_path / "folder", format="adapter")
    assert not list(tmp_path.iterdir())
