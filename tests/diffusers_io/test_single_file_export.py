"""Denoisers and autoencoders as one file again: the very weights, by the names that diffusers' conversion reads."""

import pytest
import torch
from denoisers import text_denoiser
from diffusers import AutoencoderKL
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from single_files import LAYOUTS, UNET, classes, saved, sd1, tiny_vae, unconditional

import unet_diffusion as ud
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.latents.space import LatentSpace
from unet_diffusion.runtime.pixel_values import PixelValues

pytest.importorskip("transformers")

ADDED = {"betas", "alphas_cumprod", "scale_factor"}


@pytest.fixture(params=LAYOUTS, ids=lambda make: make.__name__)
def made(request, tmp_path):
    return saved(request.param, tmp_path)


def test_file_that_was_imported_is_exported_bit_for_bit(made, tmp_path):
    ud.load(made.file, **made.told).export(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() - made.tensors.keys() <= ADDED
    for key in again.keys() - ADDED:
        if made.name == "pix2pix" and key == f"{UNET}input_blocks.0.0.weight":  # it is scaled, and scaled back
            torch.testing.assert_close(again[key], made.tensors[key], rtol=1e-6, atol=0)
        else:
            assert torch.equal(again[key], made.tensors[key]), key


def test_diffusers_reads_the_very_weights_from_an_export(made, tmp_path):
    ud.load(made.file, **made.told).export(tmp_path / "again.safetensors")
    again, config = load_file(tmp_path / "again.safetensors"), made.unet.config
    if config.get("cross_attention_dim") is not None and made.name != "pix2pix":
        converted = single_file_utils.convert_ldm_unet_checkpoint(again, config)
        weights = made.unet.state_dict()
        assert converted.keys() == weights.keys()
        assert all(torch.equal(converted[key], value) for key, value in weights.items())
    if made.name != "unconditional":
        converted = single_file_utils.convert_ldm_vae_checkpoint(again, made.vae.config)
        weights = made.vae.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in converted.items())
        assert weights.keys() - converted.keys() <= {"quantize.embedding.weight"}


def test_export_is_imported_as_the_denoiser_that_it_was(made, tmp_path):
    denoiser = ud.load(made.file, **{**made.told, "image_size": 16})
    denoiser.schedule = NoiseSchedule(500, "linear", beta_start=2e-4, beta_end=0.01)
    denoiser.export(tmp_path / "again.safetensors")
    again = ud.load(tmp_path / "again.safetensors", tokenizer=made.told.get("tokenizer"))
    assert again.schedule.config == denoiser.schedule.config
    assert again.image_shape == (3, 16, 16)
    assert again.codec.space.std == pytest.approx(denoiser.codec.space.std)
    for ours, read in ((denoiser.unet, again.unet), (denoiser.codec.autoencoder, again.codec.autoencoder)):
        weights = read.state_dict()
        assert all(torch.allclose(value, weights[key], rtol=1e-6, atol=0) for key, value in ours.state_dict().items())


def test_moments_of_latents_are_absorbed_by_the_autoencoder(tmp_path):
    made = saved(sd1, tmp_path)
    denoiser = ud.load(made.file, **made.told, image_size=16)
    space = denoiser.codec.space
    denoiser.codec.space = LatentSpace(**{**vars(space), "mean": (0.1, 0.2, -0.3, 0.0), "std": (0.5, 2.0, 1.0, 0.7)})
    denoiser.export(tmp_path / "again.safetensors")
    again = ud.load(tmp_path / "again.safetensors", **made.told, image_size=16)
    x0 = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(again.decode(x0), denoiser.decode(x0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_autoencoder_is_exported_alone(kind, tmp_path):
    tiny_vae(kind, attended=True).save_pretrained(tmp_path / "vae")
    original = ud.load(tmp_path / "vae")
    original.image_shape, original.latent_std = (3, 32, 32), 4.0
    original.export(tmp_path / "vae.safetensors")
    again = ud.load(tmp_path / "vae.safetensors")
    assert (again.image_shape, again.autoencoder.config["scaling_factor"]) == ((3, 32, 32), 0.25)
    assert LatentCodec(tmp_path / "vae.safetensors").sample_shape((3, 16, 16)) == (4, 8, 8)
    weights = again.autoencoder.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in original.autoencoder.state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("norm_num_groups", 8), ("act_fn", "relu")])
def test_autoencoder_with_settings_that_no_weight_tells_is_refused(name, value, tmp_path):
    network = AutoencoderKL(3, 3, block_out_channels=[32], norm_num_groups=8 if name == "norm_num_groups" else 32)
    network.register_to_config(**{name: value})
    with pytest.raises(ValueError, match=rf"an autoencoder with {name} .*, got {value}; export a folder"):
        ud.Autoencoder(network, (3, 32, 32)).export(tmp_path / "vae.safetensors")
    assert not list(tmp_path.iterdir())


def test_autoencoder_of_images_that_are_not_square_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an autoencoder of square images, got 32x48; export a folder"):
        ud.Autoencoder(tiny_vae("kl"), (3, 32, 48)).export(tmp_path / "vae.safetensors")


def test_command_says_how_the_file_is_imported(tmp_path, run_cli):
    made = saved(unconditional, tmp_path)
    assert run_cli("import", made.file, tmp_path / "imported.ckpt", "--image_size", "16")[0] == 0
    status, out, err = run_cli("export", tmp_path / "imported.ckpt", tmp_path / "again.safetensors")
    assert status == 0, err
    assert out.strip().endswith(f"import {tmp_path / 'again.safetensors'} CHECKPOINT")
    status, out, err = run_cli("import", tmp_path / "again.safetensors", tmp_path / "second.ckpt")
    assert status == 0, err
    assert "images of 16 pixels, heads of 32 channels" in out
    status, _, err = run_cli("export", tmp_path / "second.ckpt", tmp_path / "again.safetensors", "--overwrite")
    assert status == 0, err


@pytest.mark.parametrize("num_classes", [10, 11])
def test_classes_keep_their_names_and_their_null(num_classes, tmp_path):
    """Of 11 rows, the last is the null, or none is; a row of our own that is not used is not written."""
    made = saved(classes, tmp_path)
    denoiser = ud.load(made.file, **{**made.told, "num_classes": num_classes}, image_size=16)
    denoiser.class_names = [f"class {number}" for number in range(num_classes)]
    denoiser.export(tmp_path / "again.safetensors")
    assert len(load_file(tmp_path / "again.safetensors")["cond_stage_model.embedding.weight"]) == 11
    again = ud.load(tmp_path / "again.safetensors")
    assert again.class_names == denoiser.class_names
    assert again.conditions[0].has_null == (num_classes == 10)


def test_captions_without_a_null_come_back_without_it(tmp_path):
    made = saved(sd1, tmp_path)
    denoiser = ud.load(made.file, **made.told, image_size=16)
    denoiser.conditions[0].dropout = 0.0
    denoiser.export(tmp_path / "again.safetensors")
    assert not ud.load(tmp_path / "again.safetensors", **made.told).conditions[0].has_null


@pytest.mark.parametrize("settings", ["no JSON", "[1]", '{"image_size": "16"}', '{"other": 1}'])
def test_damaged_settings_in_metadata_are_refused(settings, tmp_path):
    made = saved(unconditional, tmp_path)
    save_file(made.tensors, made.file, {"unet_diffusion": settings})
    with pytest.raises(ValueError, match=r"metadata of .*model.safetensors .*export it again"):
        ud.load(made.file)


# ------------------------------------------------------------------------------------------------------------- refused


def test_other_files_are_not_overwritten(tmp_path):
    made = saved(unconditional, tmp_path)
    denoiser = ud.load(made.file)
    with pytest.raises(FileExistsError, match=r"model.safetensors exists and is not overwritten"):
        denoiser.export(made.file)
    with pytest.raises(FileExistsError, match=r"model.safetensors was not exported and is not overwritten"):
        denoiser.export(made.file, overwrite=True)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(FileExistsError, match=r"was not exported"):
        denoiser.export(tmp_path / "empty.safetensors", overwrite=True)


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(100, "squaredcos_cap_v2"),
        NoiseSchedule(1000, "linear", prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ],
)
def test_schedule_that_a_file_cannot_hold_is_refused(schedule, tmp_path):
    denoiser = ud.load(saved(unconditional, tmp_path).file)
    denoiser.schedule = schedule
    with pytest.raises(ValueError, match=r"holds a noise schedule as tables, .*'beta_schedule': .*; export a folder"):
        denoiser.export(tmp_path / "again.safetensors")
    assert not list(tmp_path.glob("*again*")) + list(tmp_path.glob(".*again*"))


def test_format_of_a_folder_does_not_take_the_name_of_a_file(tmp_path):
    denoiser = ud.load(saved(unconditional, tmp_path).file)
    tiny_vae().save_pretrained(tmp_path / "vae")
    segmenter = ud.Segmenter(ud.SegmentationUNet(1, 2, channels=(4, 8)), "binary", ["no", "yes"], None, False, 60)
    for model, formats in (
        (denoiser, ("adapter", "onnx", "torch")),
        (ud.load(tmp_path / "vae"), ("onnx", "torch")),
        (segmenter, ("onnx", "torch")),
    ):
        for format in formats:
            with pytest.raises(ValueError, match=f"format {format} makes a folder, got .*; give a name without"):
                model.export(tmp_path / "out.safetensors", format=format)
        with pytest.raises(ValueError, match=r"format must be one of pipeline, .*onnx, torch, got 'gguf'"):
            model.export(tmp_path / "out", format="gguf")
    assert not list(tmp_path.glob("out*"))


def test_denoiser_of_another_build_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"norm_num_groups must be 32 for one file, got 4; export a folder"):
        text_denoiser(tmp_path).export(tmp_path / "model.safetensors")


def test_denoiser_of_pixels_is_refused(tmp_path):
    unet = ud.DenoiserUNet(3, (32, 64), norm_num_groups=32)
    denoiser = ud.Denoiser(unet=unet, schedule=NoiseSchedule(), sample_shape=(3, 8, 8))
    with pytest.raises(ValueError, match=r"one file holds a denoiser of latents, .* images .* export a folder"):
        denoiser.export(tmp_path / "model.safetensors")


def test_heads_and_ranges_that_a_file_cannot_say_are_refused(tmp_path):
    made = saved(sd1, tmp_path)
    denoiser = ud.load(made.file, **made.told)
    denoiser.values = PixelValues("float32", -100, 400)
    with pytest.raises(ValueError, match="one file does not hold the value_range of images, -100 to 400"):
        denoiser.export(tmp_path / "again.safetensors")
    (text,) = (one for one in denoiser.conditions.modules() if isinstance(one, TextTokens))
    text.config["num_heads"] = 2 * text.config["num_heads"]
    with pytest.raises(ValueError, match="heads of a text encoder must be 64 wide in one file, got 32"):
        denoiser.export(tmp_path / "again.safetensors")
    assert not list(tmp_path.glob("*again*"))
