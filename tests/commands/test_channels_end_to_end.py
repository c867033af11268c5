"""From files of five channels to files of five channels: fit, sample, evaluate, export, segment, encode."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import unet_diffusion as ud
from unet_diffusion.diffusers_io.importing import import_pipeline

RNG = np.random.default_rng(0)
SMALL = [
    *("--model.unet.channels", "[8, 8]", "--model.unet.attention_levels", "[]", "--model.unet.norm_num_groups", "4"),
    *("--model.unet.head_channels", "null"),
    *("--trainer.max_steps", 2, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
    *("--model.speed", "plain", "--data.batch_size", 4, "--data.num_val", 2, "--trainer.val_check_interval", 2),
]
FIVE = ["--model.unet.in_channels", 5, "--data.image_size", 8, "--data.channels", 5, "--samples.num_images", 4]


def stack(number, size=(8, 8), dtype=np.uint16):
    rng = np.random.default_rng(number)
    return rng.integers(1000, 40000, size=(5, *size)).astype(dtype)


def write_stacks(folder, arrays):
    folder.mkdir(parents=True)
    for i, array in enumerate(arrays):
        tifffile.imwrite(folder / f"{i}.tif", array, photometric="minisblack", metadata={"axes": "CYX"})
    return folder


@pytest.fixture
def stacks(tmp_path):
    return write_stacks(tmp_path / "images", map(stack, range(8)))


def fitted(run_cli, folder, images, *options):
    status, _, err = run_cli("fit", "--config", "folder", *SMALL, *FIVE, "--data.root", images,
                             "--trainer.default_root_dir", folder, *options)  # fmt: skip
    assert status == 0, err
    return folder


def sampled(run_cli, run, output, *options):
    status, _, err = run_cli("sample", run, "--num_images", 3, "--num_inference_steps", 2, "--device", "cpu",
                             "--precision", "float32", "--output", output, *options)  # fmt: skip
    assert status == 0, err
    return [tifffile.imread(path) for path in sorted(output.glob("0*.tif"))]


def test_five_channels_of_16_bits_from_files_to_files(run_cli, stacks, tmp_path):
    run = fitted(run_cli, tmp_path / "run", stacks)
    drawn = sampled(run_cli, run, tmp_path / "drawn")
    assert [(one.shape, one.dtype) for one in drawn] == [((5, 8, 8), np.uint16)] * 3
    denoiser = ud.load(run)
    images = denoiser.sample(3, num_inference_steps=2).clamp(-1, 1)
    np.testing.assert_array_equal(np.stack(drawn), np.rint((images.double().numpy() + 1) * 32767.5).astype(np.uint16))
    grid = np.asarray(Image.open(tmp_path / "drawn" / "grid.png"))
    first = np.rint((images[0, :3].numpy() / 2 + 0.5) * 255)
    np.testing.assert_allclose(grid[2:66:8, 2:66:8].transpose(2, 0, 1), first, atol=1)
    assert Image.open(run / "samples.png").mode == "RGB"
    again = sampled(run_cli, run, tmp_path / "drawn", "--resume")
    np.testing.assert_array_equal(again, drawn)


def test_exported_pipeline_draws_numbers_of_the_files(run_cli, stacks, tmp_path):
    from diffusers import DiffusionPipeline

    run = fitted(run_cli, tmp_path / "run", stacks)
    pipe = DiffusionPipeline.from_pretrained(run / "pipeline", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="numbers").images
    floats = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    np.testing.assert_array_equal(drawn, np.rint(floats.double().numpy() * 65535).astype(np.uint16))
    with pytest.raises(ValueError, match="must be numbers, np or pt for images of 5 channels"):
        pipe(num_inference_steps=2)
    assert import_pipeline(run / "pipeline").values == ud.load(run).values
    assert 'output_type="numbers"' in (run / "pipeline" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.float64])
def test_measured_range_is_kept_from_training_to_samples(run_cli, tmp_path, dtype):
    arrays = [(stack(i).astype(np.int32) // 40 - 700).astype(dtype) for i in range(8)]
    images = write_stacks(tmp_path / "images", arrays)
    run = fitted(run_cli, tmp_path / "run", images, "--data.value_range", "measured", "--data.shown_channels", "[4, 2]")
    low, high = np.min(arrays), np.max(arrays)
    values = ud.load(run).values
    assert (values.dtype, values.low, values.high, values.shown) == (np.dtype(dtype).name, low, high, (4, 2))
    drawn = np.stack(sampled(run_cli, run, tmp_path / "drawn"))
    assert drawn.dtype == dtype
    assert low <= drawn.min() < drawn.max() <= high
    blue = np.asarray(Image.open(tmp_path / "drawn" / "grid.png"))[2:66, 2:66, 2]
    assert (blue == 0).all()


def test_images_to_start_from_have_the_range_of_training(run_cli, tmp_path):
    images = write_stacks(tmp_path / "images", [stack(i, dtype=np.float32) for i in range(8)])
    run = fitted(run_cli, tmp_path / "run", images, "--data.value_range", "[1000, 40000]")
    denoiser = ud.load(run)
    kept = denoiser.sample(1, image=images / "3.tif", mask=_left_half(tmp_path), num_inference_steps=2)
    expected = (stack(3).astype(np.float64) - 1000) / 19500 - 1
    np.testing.assert_allclose(kept[0, :, :, 4:].numpy(), expected[:, :, 4:], atol=1e-6)


def _left_half(folder):
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder / "mask.png"


def test_resumed_run_of_another_range_is_refused(run_cli, tmp_path):
    images = write_stacks(tmp_path / "images", [stack(i, dtype=np.float32) for i in range(8)])
    run = fitted(run_cli, tmp_path / "run", images, "--data.value_range", "[1000, 40000]")
    status, _, err = run_cli("fit", "--config", "folder", *SMALL, *FIVE, "--data.root", images, "--trainer.max_steps",
                             3, "--trainer.default_root_dir", tmp_path / "other", "--data.value_range", "[0, 40000]",
                             "--ckpt_path", run / "checkpoints" / "last.ckpt")  # fmt: skip
    assert status == 1
    assert "set data.value_range to [1000" in err


def test_run_keeps_its_measured_range_and_an_image_beyond_it_is_told_and_can_be_left_out(run_cli, tmp_path):
    images = write_stacks(tmp_path / "images", [stack(i, dtype=np.float32) for i in range(8)])
    root = tmp_path / "run"
    run = fitted(run_cli, root, images, "--data.value_range", "measured")
    values = ud.load(run).values
    words = ["fit", "--config", "folder", *SMALL, *FIVE, "--data.root", images, "--trainer.default_root_dir", root,
             "--data.value_range", "measured", "--trainer.max_steps"]  # fmt: skip
    within = np.clip(stack(8, dtype=np.float32), values.low + 1, values.high - 1)
    tifffile.imwrite(images / "8.tif", within, photometric="minisblack", metadata={"axes": "CYX"})
    with pytest.warns(UserWarning, match=r"1 new \(8\.tif\)"):
        status, _, err = run_cli(*words, 3)
    assert status == 0, err
    assert ud.load(run).values == values
    beyond = within.copy()
    beyond[0, 0, 0] = values.high + 5
    tifffile.imwrite(images / "beyond.tif", beyond, photometric="minisblack", metadata={"axes": "CYX"})
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    status, _, err = run_cli(*words, 4)
    said = f"must be from {values.low:.6g} to {values.high:.6g}, the range that the model was trained on, and 1 of 10"
    assert (status, said in err, "beyond.tif (" in err, "--data.on_bad_file skip" in err) == (1, True, True, True), err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before
    with pytest.warns(UserWarning, match=r"beyond\.tif: numbers must be within"):
        status, _, err = run_cli(*words, 4, "--data.on_bad_file", "skip")  # the fix that the message names
    assert status == 0, err
    assert ud.load(run).values == values
    with pytest.warns(UserWarning, match=r"beyond\.tif: numbers must be within"):
        status, _, err = run_cli("validate", *words[1:-1], "--data.on_bad_file", "skip", "--ckpt_path", "last")
    assert status == 0, err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "32-bit floating-point numbers have no range that is known; save the image in 8 or 16 bits"),
        (["--data.value_range", "[2000, 40000]"], "numbers must be within value_range, 2000 to 40000, and go from 10"),
        (["--data.value_range", "[5, 5]"], "value_range must be two finite numbers, the lower first"),
        (["--data.value_range", "guessed"], "value_range"),
        (["--data.value_range", "measured", "--data.shown_channels", "[5]"], "shown_channels must be one to three"),
    ],
)
def test_missing_or_wrong_range_is_refused_before_training(run_cli, tmp_path, options, said):
    images = write_stacks(tmp_path / "images", [stack(i, dtype=np.float32) for i in range(4)])
    status, _, err = run_cli("fit", "--config", "folder", *SMALL, *FIVE, "--data.root", images,
                             "--trainer.default_root_dir", tmp_path / "run", *options)  # fmt: skip
    assert status != 0
    assert said in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_samples_of_five_channels_are_evaluated(run_cli, tmp_path):
    images = write_stacks(tmp_path / "images", [stack(i, dtype=np.float32) for i in range(44)])
    run = fitted(run_cli, tmp_path / "run", images, "--data.value_range", "measured", "--data.num_val", 20)
    brightest = max(images.iterdir(), key=lambda path: tifffile.imread(path).max())
    brightest.unlink()  # the range stays that of the run
    status, _, err = run_cli("evaluate", run, "--num_images", 20, "--num_inference_steps", 2, "--device", "cpu")
    assert status == 0, err
    assert len(list((run / "evaluation" / "samples").glob("*.tif"))) == 20
    assert (
        "samples.png" in " ".join(path.name for path in (run / "evaluation").rglob("*.png"))
        or (run / "evaluation" / "evaluation.html").exists()
    )


def test_latents_of_five_channels_are_drawn_as_files(run_cli, tmp_path):
    images = write_stacks(tmp_path / "images", [stack(i, (16, 16), np.float32) for i in range(8)])
    common = ["--trainer.max_steps", 2, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true",
              "--data.batch_size", 4, "--data.num_val", 2]  # fmt: skip
    status, _, err = run_cli(
        *("fit", "--config", "autoencoder_kl", "--data.root", images, "--data.image_size", 16, "--data.channels", 5),
        *("--data.value_range", "measured", "--model.autoencoder.in_channels", 5, "--model.autoencoder.channels"),
        *("[8, 8]", "--model.autoencoder.norm_num_groups", 4, *common),
        *("--trainer.default_root_dir", tmp_path / "autoencoder"),
    )
    assert status == 0, err
    status, _, err = run_cli(  # the autoencoder's range is not that of the data
        *("fit", "--config", "folder", "--data.root", images, "--data.image_size", 16, "--data.channels", 5, *common),
        *("--data.value_range", "[-1.0e+6, 1.0e+6]", "--model.codec.class_path", "LatentCodec"),
        *(
            "--model.codec.autoencoder",
            tmp_path / "autoencoder",
            "--model.unet.in_channels",
            4,
            "--model.speed",
            "plain",
        ),
        *("--model.codec.scaling_factor", 1.0, "--trainer.default_root_dir", tmp_path / "refused"),
    )
    assert (status, "as -1 to 1, and the data have -1e+06 to 1e+06; set data.value_range to" in err) == (1, True), err
    status, _, err = run_cli("encode", tmp_path / "autoencoder", images, "--output", tmp_path / "latents",
                             "--device", "cpu")  # fmt: skip
    assert status == 0, err
    status, _, err = run_cli(
        *("fit", "--config", "latents", "--data.root", tmp_path / "latents", *common, "--model.speed", "plain"),
        *("--model.unet.channels", "[8, 8]", "--model.unet.attention_levels", "[]"),
        *(
            "--model.unet.norm_num_groups",
            4,
            "--model.unet.head_channels",
            "null",
            "--data.horizontal_flip",
            "false",
            "--samples.num_images",
            4,
        ),
        *("--trainer.val_check_interval", 2, "--trainer.default_root_dir", tmp_path / "denoiser"),
    )
    assert status == 0, err
    drawn = np.stack(sampled(run_cli, tmp_path / "denoiser", tmp_path / "drawn"))
    assert (drawn.shape, drawn.dtype) == ((3, 5, 16, 16), np.float32)
    index = json.loads((tmp_path / "denoiser" / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"][-1] == "ConditionalPipeline"


@pytest.mark.parametrize(("dtype", "options"), [(np.uint16, []), (np.float32, ["--data.value_range", "measured"])])
def test_segmenter_of_five_channels(run_cli, tmp_path, dtype, options):
    arrays = [stack(i, (32, 32), dtype) for i in range(4)]
    images = write_stacks(tmp_path / "images", arrays)
    (tmp_path / "labels").mkdir()
    for i, array in enumerate(arrays):
        tifffile.imwrite(tmp_path / "labels" / f"{i}.tif", np.where(array[2] > 20000, 255, 0).astype(np.uint8))
    status, _, err = run_cli(
        *("fit", "--config", "isbi2012_modern", "--data.images", images, "--data.labels", tmp_path / "labels"),
        *("--data.channels", 5, "--model.unet.in_channels", 5, "--model.unet.channels", "[8, 8]"),
        *("--data.window_size", 32, "--data.batch_size", 2, "--data.num_val", 1, "--trainer.max_steps", 2),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--model.speed", "plain"),
        *("--trainer.val_check_interval", 2, "--trainer.default_root_dir", tmp_path / "run", *options),
    )
    assert status == 0, err
    status, _, err = run_cli("segment", tmp_path / "run", images, "--output", tmp_path / "masks", "--overlays",
                             "--instances", "--device", "cpu", "--precision", "float32")  # fmt: skip
    assert status == 0, err
    mask = tifffile.imread(tmp_path / "masks" / "2.tif")
    assert mask.shape == (32, 32)
    np.testing.assert_array_equal(mask, ud.load(tmp_path / "run").segment(images / "2.tif").classes)
    if dtype == np.uint16:
        np.testing.assert_array_equal(mask, ud.load(tmp_path / "run").segment(arrays[2]).classes)
