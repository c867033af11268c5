"""A tiny Stable Diffusion XL: imported, drawn from, trained on with its sizes, and exported again."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from denoisers import CAPTIONS, WORDS, randomise, shorten
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file

from unet_diffusion.data import Folder, ImageDataModule, Latents, Shards
from unet_diffusion.diffusers_io.adapter_files import LORA_FILE
from unet_diffusion.diffusers_io.exporting import export_pipeline
from unet_diffusion.diffusers_io.importing import import_pipeline
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.conditions.xl_text import XLText, size_waves, sizes_of
from unet_diffusion.diffusion.sampling import image_generators
from unet_diffusion.inference.loading import load_denoiser
from unet_diffusion.runtime.cropping import Crop

transformers = pytest.importorskip("transformers")

CONFIGS = Path(__file__).parents[2] / "configs"
SEED, STEPS = 5, 4
WIDTHS, PROJECTION = (8, 16), 12
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def encoder_of(width: int, act: str) -> TextTokens:
    text = TextTokens(width, vocab_size=600, max_length=12, num_layers=3, num_heads=2, hidden_act=act)
    text.learn_words(WORDS)
    return randomise(text)


@pytest.fixture(scope="module")
def stable_diffusion_xl(tmp_path_factory):
    """A folder of the build of Stable Diffusion XL: two encoders, of which the second is projected, and sizes."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("xl") / "pipeline"
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=[1, 2, 4],
        transformer_layers_per_block=[1, 2, 3],
        use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=PROJECTION + 6 * 256,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    )
    first, second = encoder_of(WIDTHS[0], "quick_gelu"), encoder_of(WIDTHS[1], "gelu")
    config = second.encoder.config
    config.projection_dim = PROJECTION
    projected = transformers.CLIPTextModelWithProjection(config)
    projected.text_model.load_state_dict(second.encoder.state_dict())
    StableDiffusionXLPipeline(
        vae=randomise(vae),
        text_encoder=first.encoder,
        text_encoder_2=projected,
        tokenizer=first.tokenizer,
        tokenizer_2=second.tokenizer,
        unet=randomise(unet),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def drawn_by_diffusers(folder, scale: float, lora=None) -> np.ndarray:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.scheduler = DDIMScheduler(**{**SCHEDULE, "clip_sample": False}, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    generator = image_generators(SEED, range(2))
    options = {"num_inference_steps": STEPS, "guidance_scale": scale, "output_type": "np"}
    return pipeline(CAPTIONS, generator=generator, **options).images


def drawn_here(denoiser, scale: float) -> np.ndarray:
    options = {"scheduler": "DDIMScheduler", "num_inference_steps": STEPS, "guidance_scale": scale, "seed": SEED}
    images = denoiser.sample(2, captions=CAPTIONS, **options)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_imported_folder_draws_the_images_of_diffusers(stable_diffusion_xl, scale):
    ours = drawn_here(load_denoiser(stable_diffusion_xl), scale)
    assert ours.std() > 0.05  # not clipped to one value
    np.testing.assert_allclose(ours, drawn_by_diffusers(stable_diffusion_xl, scale), atol=2e-4)


def test_exported_folder_draws_the_same_images(stable_diffusion_xl, tmp_path):
    denoiser = load_denoiser(stable_diffusion_xl)
    export_pipeline(denoiser, tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert (index["_class_name"], index["force_zeros_for_empty_prompt"]) == ("StableDiffusionXLPipeline", True)
    np.testing.assert_allclose(drawn_by_diffusers(tmp_path / "pipeline", 4.0), drawn_here(denoiser, 4.0), atol=2e-4)
    assert "StableDiffusionXLPipeline.from_pretrained" in (tmp_path / "pipeline" / "README.md").read_text()


def test_folder_whose_null_is_another_is_refused(stable_diffusion_xl, tmp_path):
    (tmp_path / "xl").symlink_to(stable_diffusion_xl)
    index = json.loads((stable_diffusion_xl / "model_index.json").read_text())
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in stable_diffusion_xl.iterdir():
        if path.name != "model_index.json":
            (changed / path.name).symlink_to(path)
    (changed / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    with pytest.raises(ValueError, match=r"force_zeros_for_empty_prompt must be true in model_index.json, got false"):
        import_pipeline(changed)


def test_sizes_are_those_of_the_file_of_the_cut_and_of_the_image():
    assert sizes_of(Crop.centred((40, 60), (20, 20)), (20, 20)) == (40, 60, 0, 5, 20, 20)
    assert sizes_of(Crop.centred((16, 16), (16, 16)), (16, 16)) == (16, 16, 0, 0, 16, 16)
    assert size_waves(torch.tensor([[1, 2, 3, 4, 5, 6]])).shape == (1, 6 * 256)


def test_null_is_zero_but_for_the_sizes(stable_diffusion_xl):
    (text,) = import_pipeline(stable_diffusion_xl).conditions
    entry = text.entry_of(CAPTIONS, [(40, 60, 0, 5, 16, 16)] * 2)
    given, null = text(entry), text(text.null(entry))
    assert given["context"].shape == (2, 12, sum(WIDTHS))
    assert null["context"].abs().max() == null["vector"][:, :PROJECTION].abs().max() == 0
    assert torch.equal(null["vector"][:, PROJECTION:], given["vector"][:, PROJECTION:])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """8 images of noise with captions."""
    folder = tmp_path_factory.mktemp("images")
    lines = ["file_name,text"]
    for number in range(8):
        noise = np.random.default_rng(number).integers(256, size=(20, 28, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{CAPTIONS[number % 2]}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def bound(pipeline, source) -> tuple[XLText, ImageDataModule]:
    (text,) = import_pipeline(pipeline).conditions
    data = ImageDataModule(source, num_val=2)
    data.setup()
    text.bind_data(data)
    return text, data


def sizes_read(pipeline, source, *, is_mirrored=False) -> list[list[int]]:
    """The six numbers that training takes for each image of a source."""
    text, data = bound(pipeline, source)
    assert text.notes() == []
    index = torch.arange(len(data.image_set.images))
    return text.read({"index": index, "is_mirrored": torch.full_like(index, is_mirrored).bool()})[:, -6:].tolist()


def test_sizes_are_those_of_the_files_by_whatever_way_images_come(stable_diffusion_xl, images, tmp_path, run_cli):
    """Latents are of images cut by one column more on the right than on the left, which mirroring turns round."""
    Image.effect_noise((17, 16), 99).convert("RGB").save(images / "odd.png")
    captions = (images / "metadata.csv").read_text()
    (images / "metadata.csv").write_text(f"{captions}\nodd.png,{CAPTIONS[0]}")
    try:
        files = {"of the file": [20, 28, 0, 3, 16, 16], "of the odd one": [16, 17, 0, 0, 16, 16]}
        expected = [files["of the file"]] * 8 + [files["of the odd one"]]
        mirrored = [files["of the file"]] * 8 + [[16, 17, 0, 1, 16, 16]]
        encode = ["encode", stable_diffusion_xl / "vae", images, "--output", tmp_path / "latents", "--horizontal_flip"]
        status, _, err = run_cli(*encode, "--captions", "--image_size", 16, 16, "--device", "cpu")
        assert status == 0, err
        folder, latents = Folder(images, image_size=16, captions=True), Latents(tmp_path / "latents")
        for source in (folder, latents):
            assert sizes_read(stable_diffusion_xl, source) == expected
            assert sizes_read(stable_diffusion_xl, source, is_mirrored=True) == mirrored
        for name, options in {"as they are": [], "scaled": ["--image_size", 16, 16]}.items():
            status, _, err = run_cli("pack", images, tmp_path / name, "--captions", *options)
            assert status == 0, err
            shards = Shards(tmp_path / name, image_size=16, captions=True)
            assert sorted(sizes_read(stable_diffusion_xl, shards)) == sorted(expected)
        archives = Folder(tmp_path / "as they are", image_size=16, captions=True)
        assert sorted(sizes_read(stable_diffusion_xl, archives)) == sorted(expected)
        scaled = Folder(tmp_path / "scaled", image_size=16, captions=True)  # whose archives alone do not tell
        (note,) = bound(stable_diffusion_xl, scaled)[0].notes()
        assert "the data do not hold those of their files" in note
        # Packed as 16x16, then cut to 8x16: what both cuts took off, in pixels of a file of the scale of the image.
        twice = sizes_read(stable_diffusion_xl, Shards(tmp_path / "scaled", image_size=(8, 16), captions=True))
        assert sorted(twice) == sorted([[20, 28, 4, 3, 8, 16]] * 8 + [[16, 17, 4, 0, 8, 16]])
    finally:
        (images / "odd.png").unlink()
        (images / "metadata.csv").write_text(captions)


def test_data_that_do_not_hold_the_sizes_of_files_are_told_of(stable_diffusion_xl):
    (text,) = import_pipeline(stable_diffusion_xl).conditions
    text.bind_data(SimpleNamespace(entries={"captions": CAPTIONS}, source=SimpleNamespace(), image_shape=(4, 8, 8),
                                   codec=SimpleNamespace(image_shape=lambda shape: (3, 16, 16)),
                                   train_indices=torch.arange(2)))  # fmt: skip
    assert text.read({"index": torch.tensor([1])})[:, -6:].tolist() == [[16, 16, 0, 0, 16, 16]]
    (note,) = text.notes()
    assert "do not hold those of their files, so each is taken for a file of 16x16 of which nothing was cut" in note


def test_imported_folder_is_trained_on_with_captions_and_sizes(
    stable_diffusion_xl, images, tmp_path, run_cli, monkeypatch
):
    imported = tmp_path / "xl.ckpt"
    status, _, err = run_cli("import", stable_diffusion_xl, imported)
    assert status == 0, err
    encode = ["encode", stable_diffusion_xl / "vae", images, "--output", tmp_path / "latents"]
    status, _, err = run_cli(*encode, "--captions", "--image_size", 16, 16, "--device", "cpu")
    assert status == 0, err
    recipe = yaml.safe_load((CONFIGS / "latents.yaml").read_text())
    recipe["data"]["init_args"]["source"]["init_args"]["root"] = str(tmp_path / "latents")
    recipe["data"]["init_args"] |= {"horizontal_flip": False, "batch_size": 4, "num_val": 2}
    shorten(recipe, tmp_path / "run", steps=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipes = ["--config", tmp_path / "recipe.yaml", "--config", tmp_path / "xl.yaml"]
    seen, forward = [], XLText.forward
    monkeypatch.setattr(XLText, "forward", lambda text, entry: (seen.extend(entry.tolist()), forward(text, entry))[1])
    status, _, err = run_cli("fit", *recipes, "--ckpt_path", imported)
    assert status == 0, err
    in_training = [tuple(entry[-6:]) for entry in seen]
    assert in_training.count((20, 28, 0, 3, 16, 16)) >= 2 * 4  # two steps of a batch
    before, after = import_pipeline(stable_diffusion_xl), import_pipeline(tmp_path / "run" / "pipeline")
    weights = after.unet.state_dict()
    assert any(not torch.equal(value, weights[name]) for name, value in before.unet.state_dict().items())
    torch.testing.assert_close(before.conditions.state_dict(), after.conditions.state_dict())  # frozen
    sample = ["sample", tmp_path / "run", "--captions", CAPTIONS[0], "--num_images", 1, "--device", "cpu"]
    status, _, err = run_cli(*sample, "--num_inference_steps", 2, "--output", tmp_path / "drawn")
    assert status == 0, err


def test_lora_of_both_text_encoders_draws_in_stock_diffusers_what_it_draws_here(
    stable_diffusion_xl, images, tmp_path, run_cli
):
    pytest.importorskip("peft")
    recipe = yaml.safe_load((CONFIGS / "adapters" / "lora.yaml").read_text())
    recipe["model"] |= {"base": str(stable_diffusion_xl), "ema_decay": 0.5}
    recipe["model"]["optimizer"]["init_args"]["lr"] = 0.05
    recipe["data"]["init_args"]["source"]["init_args"] |= {"root": str(images), "image_size": 16}
    recipe["data"]["init_args"] |= {"batch_size": 4, "num_val": 2}
    shorten(recipe, tmp_path / "run", steps=3)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    adapter = ["--model.adapter", "lora", "--model.adapter.rank", "3", "--model.adapter.text_encoder", "true"]
    status, _, err = run_cli("fit", "--config", tmp_path / "recipe.yaml", *adapter)
    assert status == 0, err
    weights = load_file(tmp_path / "run" / "adapter" / LORA_FILE)
    # The network attends to the state before the last layer; the pooled state of the second encoder is after it.
    for encoder, layers in {"text_encoder": {0, 1}, "text_encoder_2": {0, 1, 2}}.items():
        changes = {name: value for name, value in weights.items() if name.startswith(f"{encoder}.")}
        assert {int(name.split(".layers.")[1][0]) for name in changes} == layers
        assert all(value.abs().max() > 0 for value in changes.values())  # all were trained
    ours = drawn_here(load_denoiser(tmp_path / "run"), 4.0)
    base = load_denoiser(stable_diffusion_xl)
    assert np.abs(ours - drawn_here(base, 4.0)).max() > 0.05
    np.testing.assert_allclose(
        drawn_by_diffusers(stable_diffusion_xl, 4.0, tmp_path / "run" / "adapter"), ours, atol=2e-4
    )
    base.load_lora_weights(tmp_path / "run" / "adapter")
    np.testing.assert_allclose(drawn_here(base, 4.0), ours, atol=1e-5)


def test_sizes_of_the_files_are_those_of_the_data(stable_diffusion_xl):
    (text,) = import_pipeline(stable_diffusion_xl).conditions
    source = SimpleNamespace(crops=[Crop.centred(size, (16, 16)) for size in ((40, 60), (16, 16))])
    data = SimpleNamespace(entries={"captions": CAPTIONS}, source=source, image_shape=(3, 16, 16), codec=None,
                           train_indices=torch.arange(2))  # fmt: skip
    text.bind_data(data)
    entry = text.read({"index": torch.tensor([0, 1])})
    assert entry[:, -6:].tolist() == [[40, 60, 0, 4, 16, 16], [16, 16, 0, 0, 16, 16]]
    source.crops.append(source.crops[0])
    with pytest.raises(ValueError, match="must be one for each image, got 3 for 2 images"):
        text.bind_data(data)
    source.crops.append(source.crops[0])
    data.entries = {"captions": CAPTIONS * 2}
    text.bind_data(data)  # other data than before, of another number


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context_dim": 25}, "context_dim of XLText must be the sum of its encoders', 8 and 16, got 25"),
        ({"second": {"context_dim": 16, "max_length": 9}}, "must take captions of one length, got max_length 12 and 9"),
    ],
)
def test_encoders_that_do_not_go_together_are_refused(change, said):
    arguments = {"first": {"context_dim": 8, "max_length": 12}, "second": {"context_dim": 16, "max_length": 12}}
    with pytest.raises(ValueError, match=said):
        XLText(**{"context_dim": 24, "projection_dim": 12, **arguments, **change})
