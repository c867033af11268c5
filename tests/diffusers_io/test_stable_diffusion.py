"""Models of captions, to StableDiffusionPipeline and from it."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from denoisers import (
    CAPTIONS,
    WIDTH,
    WORDS,
    inpainter,
    save_stable_diffusion,
    shorten,
    text_denoiser,
    text_tokens,
    upscaler,
)
from diffusers import (
    DDPMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
)
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint
from PIL import Image

from unet_diffusion.diffusers_io.exporting import export_pipeline, why_not_exported
from unet_diffusion.diffusers_io.importing import import_pipeline
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import CONDITION_KEY
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.guidance import Guidance
from unet_diffusion.diffusion.sampling import build_scheduler, image_generators, sample
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.loading import load_denoiser
from unet_diffusion.inference.reading import read_denoiser
from unet_diffusion.inference.record import denoiser_record, save_denoiser
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.runtime.randomness import keyed_generator

CONFIGS = Path(__file__).parents[2] / "configs"

pytest.importorskip("transformers")

SEED = 5


@pytest.fixture
def stable_diffusion(tmp_path):
    return save_stable_diffusion(tmp_path / "stable_diffusion")


@pytest.fixture
def stable_inpainting(tmp_path):
    folder = tmp_path / "stable_diffusion"
    return save_stable_diffusion(folder, StableDiffusionInpaintPipeline, {"in_channels": 9, "out_channels": 4})


@pytest.fixture
def stable_upscaling(tmp_path):
    network = {"in_channels": 7, "out_channels": 4, "num_class_embeds": 1000, "only_cross_attention": [True, False]}
    noise = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
    folder = tmp_path / "stable_diffusion"
    return save_stable_diffusion(folder, StableDiffusionUpscalePipeline, network, low_res_scheduler=noise)


@pytest.fixture
def load_quietly(caplog):
    """Loads a pipeline; what is warned of on the way is an error."""

    def load(folder, kind=StableDiffusionPipeline):
        caplog.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline = kind.from_pretrained(folder)
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def their_images(pipeline: StableDiffusionPipeline, guidance_scale=3.0) -> np.ndarray:
    return pipeline(
        CAPTIONS,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=image_generators(SEED, range(len(CAPTIONS))),
        output_type="np",
    ).images


def our_images(trained: Denoiser, guidance_scale=3.0) -> np.ndarray:
    text = trained.conditions[0]
    with torch.no_grad():
        inputs, unconditional = trained.inputs({"captions": text.token_ids(CAPTIONS)})
    options = {"inputs": inputs, "unconditional": unconditional, "guidance": Guidance(guidance_scale)}
    shape = (len(CAPTIONS), *trained.sample_shape)
    latents = sample(
        trained.unet, trained.schedule, shape, num_inference_steps=4, seed=SEED, clip_sample=False, **options
    )
    images = LatentCodec.of(trained.codec.space).decode(latents)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def assert_same_images(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.std() > 0.05  # not clipped to one value
    np.testing.assert_allclose(ours, theirs, atol=2e-4)  # float32 rounding over the steps, guided


# ---------------------------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("size", [(8, 8), (8, 4)])
@pytest.mark.parametrize("scaling_factor", [None, 0.5])
def test_exported_pipeline_draws_our_images(tmp_path, load_quietly, size, scaling_factor):
    trained = text_denoiser(tmp_path, size=size)
    if scaling_factor is not None:
        trained.codec.space = trained.codec.space.rescaled(scaling_factor)
    export_pipeline(trained, tmp_path / "pipeline")
    pipeline = load_quietly(tmp_path / "pipeline")
    assert pipeline.vae.config.scaling_factor == (scaling_factor or 1)
    assert_same_images(our_images(trained), their_images(pipeline))


def test_caption_and_guidance_of_the_exported_pipeline_do_something(tmp_path, load_quietly):
    export_pipeline(text_denoiser(tmp_path), tmp_path / "pipeline")
    pipeline = load_quietly(tmp_path / "pipeline")
    guided, plain = (their_images(pipeline, guidance_scale) for guidance_scale in (3.0, 1.0))
    assert np.abs(guided - plain).max() > 1e-3
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    one, other = (
        pipeline(caption, generator=torch.Generator().manual_seed(0), **options).images for caption in CAPTIONS
    )
    assert np.abs(one - other).max() > 1e-4


def test_scheduler_is_written_as_the_pipeline_has_it(tmp_path, load_quietly):
    export_pipeline(text_denoiser(tmp_path), tmp_path / "pipeline")
    written = json.loads((tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    loaded = load_quietly(tmp_path / "pipeline").scheduler
    assert {key: loaded.config[key] for key in written if key[0] != "_"} == {
        key: value for key, value in written.items() if key[0] != "_"
    }
    assert (written["steps_offset"], written["clip_sample"]) == (1, False)


@pytest.mark.parametrize(("dropout", "guidance"), [(0.1, "guidance_scale=3.0"), (0.0, "guidance_scale=1.0")])
def test_python_of_the_model_card_runs(tmp_path, dropout, guidance):
    export_pipeline(text_denoiser(tmp_path, conditions=[text_tokens(dropout=dropout)]), tmp_path / "pipeline")
    card = (tmp_path / "pipeline" / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    found = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "pipeline")), found)
    assert guidance in code
    assert found["images"][0].size == (16, 16)
    assert "UNet2DConditionModel" in card


def test_exported_pipeline_is_imported_again_as_it_was(tmp_path):
    trained = text_denoiser(tmp_path)
    export_pipeline(trained, tmp_path / "pipeline")
    again = load_denoiser(tmp_path / "pipeline")
    assert again.unet.config == trained.unet.config
    assert again.schedule.config == trained.schedule.config
    assert_same_images(our_images(trained), our_images(again))


def test_text_encoder_that_loads_as_another_is_not_exported(tmp_path, monkeypatch):
    trained = text_denoiser(tmp_path)
    monkeypatch.setattr(TextTokens, "token_ids", lambda text, captions: torch.zeros(len(captions), 12).long())
    with pytest.raises(RuntimeError, match=r"text encoder differ by .*nothing was exported"):
        export_pipeline(trained, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


# ------------------------------------------------------------------------------------------------------------- refused


class Words(TextTokens):
    """A condition of one's own."""


def tokens_from_nowhere(folder):
    return text_denoiser(folder, conditions=[])


def a_condition_of_ones_own(folder):
    return text_denoiser(folder, conditions=[Words(WIDTH, num_heads=2)])


def maps_twice(folder):
    return text_denoiser(folder, conditions=[text_tokens(), Concat(2), Concat(5)])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            tokens_from_nowhere,
            r"this denoiser has no condition for them; .*unet-diffusion sample",
        ),
        (a_condition_of_ones_own, r"no pipeline of diffusers takes the condition Words"),
        (maps_twice, r"one condition of each kind, and this denoiser has several for 'concat'"),
        (lambda folder: text_denoiser(folder, vector_dim=8), r"a network with vector_dim, got 8"),
        (
            lambda folder: text_denoiser(folder, mid_attention=False),
            r"mid_attention must be True.*-diffusion sample",
        ),
    ],
)
def test_denoiser_without_a_pipeline_is_refused_with_the_reason(tmp_path, make, reason):
    trained = make(tmp_path)
    with pytest.raises(ValueError, match=reason):
        export_pipeline(trained, tmp_path / "pipeline")
    assert why_not_exported(trained) is not None
    assert not (tmp_path / "pipeline").exists()


# ----------------------------------------------------------------------------------------------------------------- in


def test_stable_diffusion_draws_its_own_images_here(stable_diffusion, load_quietly):
    trained = import_pipeline(stable_diffusion)
    pipeline = load_quietly(stable_diffusion)
    pipeline.scheduler = build_scheduler(trained.schedule, clip_sample=False)
    assert_same_images(our_images(trained), their_images(pipeline))


def test_stable_diffusion_is_imported_with_all_its_parts(stable_diffusion, load_quietly):
    trained, theirs = import_pipeline(stable_diffusion), load_quietly(stable_diffusion)
    torch.testing.assert_close(trained.schedule.alphas_cumprod, theirs.scheduler.alphas_cumprod)
    assert trained.schedule.prediction_type == "epsilon"
    assert trained.sample_shape == (4, 8, 8)
    space = trained.codec.space
    assert (space.image_shape, space.mean, space.std) == ((3, 16, 16), (0.0,) * 4, (1 / 0.18215,) * 4)
    (text,) = trained.conditions
    assert not any(parameter.requires_grad for parameter in text.parameters())
    their_ids = theirs.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(text.token_ids(CAPTIONS), their_ids)


def edit_index(folder, **changes) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_import_says_which_parts_of_the_pipeline_are_not_kept(stable_diffusion, recwarn):
    import_pipeline(stable_diffusion)
    assert not [one for one in recwarn if "not kept" in str(one.message)]
    edit_index(stable_diffusion, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with pytest.warns(UserWarning, match="that are not imported: safety_checker"):
        import_pipeline(stable_diffusion)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder_3": ["transformers", "CLIPTextModel"]}, "got also text_encoder_3"),
        ({"text_encoder": [None, None], "tokenizer": [None, None]}, "from noise to images must have a UNet2DModel"),
    ],
)
def test_pipeline_of_another_build_is_refused(stable_diffusion, changes, message):
    edit_index(stable_diffusion, **changes)
    with pytest.raises(ValueError, match=message):
        import_pipeline(stable_diffusion)


def write_images(folder) -> None:
    """12 images of noise with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["file_name,text"]
    for number in range(12):
        Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
        rows.append(f"{number:02d}.png,{WORDS[number % len(WORDS)]}")
    (folder / "metadata.csv").write_text("\n".join(rows))


def fine_tuning_recipe(path, latents, run) -> None:
    """configs/latents.yaml for captions, in a second."""
    recipe = yaml.safe_load((CONFIGS / "latents.yaml").read_text())
    recipe["data"]["init_args"]["source"]["init_args"]["root"] = str(latents)
    recipe["data"]["init_args"] |= {"horizontal_flip": False, "batch_size": 4, "num_val": 2}
    shorten(recipe, run, steps=3)
    path.write_text(yaml.safe_dump(recipe))


@pytest.fixture
def fine_tuned(stable_diffusion, tmp_path, run_cli):
    """The run folder of a fine-tuned Stable Diffusion."""
    write_images(tmp_path / "images")
    encode = ["encode", stable_diffusion / "vae", tmp_path / "images", "--captions", "--device=cpu"]
    status, _, err = run_cli(*encode, "--output", tmp_path / "latents")
    assert status == 0, err
    fine_tuning_recipe(tmp_path / "recipe.yaml", tmp_path / "latents", tmp_path / "run")
    status, _, err = run_cli("import", stable_diffusion, tmp_path / "imported.ckpt")
    assert status == 0, err
    arguments = ["--config", tmp_path / "recipe.yaml", "--config", tmp_path / "imported.yaml"]
    status, _, err = run_cli("fit", *arguments, "--ckpt_path", tmp_path / "imported.ckpt")
    assert status == 0, err
    return tmp_path / "run"


def test_fine_tuned_stable_diffusion_goes_out_as_it_came_in(fine_tuned, stable_diffusion, load_quietly):
    trained, before = read_denoiser(fine_tuned / "checkpoints" / "last.ckpt"), import_pipeline(stable_diffusion)
    pipeline = load_quietly(fine_tuned / "pipeline")
    assert pipeline.vae.config.scaling_factor == pytest.approx(0.18215)
    assert_same_images(our_images(trained), their_images(pipeline))
    changed = [not torch.equal(a, b) for a, b in zip(trained.unet.parameters(), before.unet.parameters(), strict=True)]
    assert all(changed)
    for key, value in trained.conditions.state_dict().items():  # frozen
        assert torch.equal(value, before.conditions.state_dict()[key]), key


def test_imported_checkpoint_is_what_was_imported(stable_diffusion, tmp_path, run_cli):
    run_cli("import", stable_diffusion, tmp_path / "imported.ckpt")
    read, expected = read_denoiser(tmp_path / "imported.ckpt"), import_pipeline(stable_diffusion)
    assert denoiser_record(read) == denoiser_record(expected)
    assert_same_images(our_images(read), our_images(expected))


# ---------------------------------------------------------------------------------------------------------- inpainting


@pytest.fixture
def picture(tmp_path):
    """A picture, and a mask that begins at an odd column: files, and as PIL has them."""
    pixels = np.random.default_rng(7).integers(256, size=(16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[3:12, 5:] = 255
    paths = (tmp_path / "init.png", tmp_path / "mask.png")
    for path, one in zip(paths, (pixels, mask), strict=True):
        Image.fromarray(one).save(path)
    return paths, tuple(Image.open(path) for path in paths)


@pytest.fixture
def assert_painted_alike(picture, run_cli, tmp_path, monkeypatch):
    """Compares what `sample` makes of a model with what a pipeline of diffusers does, but for what it draws of latents.

    It draws them from their distribution, where we take the mean.
    """
    monkeypatch.setattr(
        pipeline_stable_diffusion_inpaint, "retrieve_latents", lambda output, **_: output.latent_dist.mean
    )

    def check(path, pipeline, strength=1.0) -> None:
        (init, mask), (image, mask_image) = picture
        options = ["--num_inference_steps=4", "--scheduler=DDIMScheduler", "--guidance_scale=3", f"--seed={SEED}"]
        options += ["--strength", strength, "--num_images=2", "--device=cpu", "--captions", *CAPTIONS]
        out = tmp_path / f"painted_{strength}"
        status, _, err = run_cli("sample", path, *options, "--image", init, "--mask", mask, "--output", out)
        assert status == 0, err
        ours = np.stack([np.asarray(Image.open(out / f"{i:06d}.png")) / 255 for i in range(2)])
        generators = image_generators(SEED, range(2))
        common = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": generators, "output_type": "np"}
        theirs = pipeline(CAPTIONS, image, mask_image, strength=strength, **common).images
        painted = np.asarray(mask_image)[None, :, :, None] > 0
        theirs = np.where(painted, theirs, np.asarray(image) / 255)
        assert ours[:, 3:12, 5:].std() > 0.05
        np.testing.assert_allclose(ours, theirs, atol=0.6 / 255)  # rounding to bytes

    return check


def test_exported_inpainting_pipeline_paints_as_we_do(tmp_path, load_quietly, assert_painted_alike):
    trained = inpainter(tmp_path)
    save_denoiser(trained, tmp_path / "inpainter.ckpt")
    export_pipeline(trained, tmp_path / "pipeline")
    pipeline = load_quietly(tmp_path / "pipeline", StableDiffusionInpaintPipeline)
    for strength in (1.0, 0.5):
        assert_painted_alike(tmp_path / "inpainter.ckpt", pipeline, strength)


def test_stable_diffusion_for_inpainting_paints_here_as_there(stable_inpainting, load_quietly, assert_painted_alike):
    trained = import_pipeline(stable_inpainting)
    assert denoiser_record(trained)["conditions"][1]["init_args"] == {"channels": 5}
    pipeline = load_quietly(stable_inpainting, StableDiffusionInpaintPipeline)
    pipeline.scheduler = build_scheduler(trained.schedule, clip_sample=False)
    assert_painted_alike(stable_inpainting, pipeline)


def train_on(folder, recipe_name, tmp_path, run_cli) -> None:
    """Trains what is imported from the folder for three steps, by a recipe with maps; all weights change."""
    write_images(tmp_path / "images")
    run_cli("import", folder, tmp_path / "imported.ckpt")
    recipe = yaml.safe_load((CONFIGS / f"{recipe_name}.yaml").read_text())
    recipe["data"]["init_args"]["source"]["init_args"] |= {"root": str(tmp_path / "images"), "image_size": 16}
    recipe["data"]["init_args"] |= {"batch_size": 4, "num_val": 2}
    recipe["model"]["codec"]["init_args"]["autoencoder"] = str(folder / "vae")
    shorten(recipe, tmp_path / "run", steps=3)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--config", tmp_path / "recipe.yaml", "--config", tmp_path / "imported.yaml"]
    status, _, err = run_cli("fit", *arguments, "--ckpt_path", tmp_path / "imported.ckpt")
    assert status == 0, err
    before, after = import_pipeline(folder), read_denoiser(tmp_path / "run" / "checkpoints" / "last.ckpt")
    changed = [not torch.equal(a, b) for a, b in zip(after.unet.parameters(), before.unet.parameters(), strict=True)]
    assert all(changed)
    assert after.settings["data"]["init_args"]["batch_size"] == 4
    assert str(tmp_path) not in (tmp_path / "run" / "pipeline" / "README.md").read_text()  # no path of this machine


def test_stable_diffusion_for_inpainting_is_trained_on(
    stable_inpainting, tmp_path, run_cli, load_quietly, assert_painted_alike
):
    train_on(stable_inpainting, "inpainting", tmp_path, run_cli)
    pipeline = load_quietly(tmp_path / "run" / "pipeline", StableDiffusionInpaintPipeline)
    assert pipeline.vae.config.scaling_factor == pytest.approx(0.18215)
    assert_painted_alike(tmp_path / "run", pipeline)


def test_a_model_for_inpainting_wants_a_picture_and_a_mask(tmp_path, run_cli, picture):
    save_denoiser(inpainter(tmp_path), tmp_path / "inpainter.ckpt")
    arguments = ["sample", tmp_path / "inpainter.ckpt", "--captions", "x", "--output", tmp_path / "out"]
    for more in ([], ["--image", picture[0][0]]):
        status, _, err = run_cli(*arguments, *more)
        assert (status, "paints into an image; give image and mask" in err) == (1, True), err
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- upscaling


@pytest.fixture
def assert_enlarged_alike(run_cli, tmp_path):
    """Compares what `sample` makes of a model with what a pipeline of diffusers does, noise of the small image too."""
    pixels = np.random.default_rng(8).integers(256, size=(8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")

    def check(path, pipeline, noise_level) -> None:
        options = ["--num_inference_steps=4", "--scheduler=DDIMScheduler", "--guidance_scale=3", f"--seed={SEED}"]
        options += ["--num_images=2", "--device=cpu", "--captions", *CAPTIONS, "--noise_level", noise_level]
        out = tmp_path / f"enlarged_{noise_level}"
        status, _, err = run_cli("sample", path, *options, "--image", tmp_path / "small.png", "--output", out)
        assert status == 0, err
        ours = np.stack([np.asarray(Image.open(out / f"{i:06d}.png")) / 255 for i in range(2)])
        assert ours.shape == (2, 16, 24, 3)
        start = torch.stack([torch.randn(4, 8, 12, generator=one) for one in image_generators(SEED, range(2))])
        theirs = pipeline(
            CAPTIONS,
            [Image.open(tmp_path / "small.png")] * 2,
            noise_level=noise_level,
            generator=[keyed_generator(SEED, CONDITION_KEY, index) for index in range(2)],  # of the small image's noise
            latents=start,
            num_inference_steps=4,
            guidance_scale=3.0,
            output_type="np",
        ).images
        assert ours.std() > 0.05
        np.testing.assert_allclose(ours, theirs, atol=0.6 / 255)  # rounding to bytes

    return check


@pytest.mark.parametrize("scaling_factor", [None, 0.5, 0.08333])
def test_exported_upscaling_pipeline_enlarges_as_we_do(tmp_path, load_quietly, assert_enlarged_alike, scaling_factor):
    trained = upscaler(tmp_path)
    if scaling_factor is not None:
        trained.codec.space = trained.codec.space.rescaled(scaling_factor)
    save_denoiser(trained, tmp_path / "upscaler.ckpt")
    export_pipeline(trained, tmp_path / "pipeline")
    pipeline = load_quietly(tmp_path / "pipeline", StableDiffusionUpscalePipeline)
    assert pipeline.vae.config.scaling_factor == 0.08333
    for noise_level in (20, 350):
        assert_enlarged_alike(tmp_path / "upscaler.ckpt", pipeline, noise_level)


def test_stable_diffusion_for_upscaling_enlarges_here_as_there(stable_upscaling, load_quietly, assert_enlarged_alike):
    trained = import_pipeline(stable_upscaling)
    pipeline = load_quietly(stable_upscaling, StableDiffusionUpscalePipeline)
    pipeline.scheduler = build_scheduler(trained.schedule, clip_sample=False)
    assert_enlarged_alike(stable_upscaling, pipeline, 20)


def test_stable_diffusion_for_upscaling_is_trained_on(
    stable_upscaling, tmp_path, run_cli, load_quietly, assert_enlarged_alike
):
    train_on(stable_upscaling, "upscaling", tmp_path, run_cli)
    pipeline = load_quietly(tmp_path / "run" / "pipeline", StableDiffusionUpscalePipeline)
    assert_enlarged_alike(tmp_path / "run", pipeline, 20)


@pytest.mark.parametrize(
    ("kind", "in_channels", "message"),
    [
        (StableDiffusionInpaintPipeline, 8, "must be 4, as out_channels, or with captions 9, .* got 8"),
        (StableDiffusionUpscalePipeline, 4, "must be more than out_channels 4, for a small image, got 4"),
    ],
)
def test_network_that_does_not_take_the_maps_of_its_pipeline_is_refused(tmp_path, kind, in_channels, message):
    noise = {"low_res_scheduler": DDPMScheduler()} if kind is StableDiffusionUpscalePipeline else {}
    network = {"in_channels": in_channels, "out_channels": 4}
    with pytest.raises(ValueError, match=message):
        import_pipeline(save_stable_diffusion(tmp_path / "folder", kind, network, **noise))


def test_upscaler_of_other_noise_is_refused(stable_upscaling):
    path = stable_upscaling / "low_res_scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.012}))
    with pytest.raises(ValueError, match="must have the noise schedule of Stable Diffusion's upscaler"):
        import_pipeline(stable_upscaling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "this denoiser enlarges an image; give image"),
        (["--image", "{tmp}/none.png"], "image must be an image file, and there is none at"),
        (["--image", "{tmp}/small.png", "--noise_level", "351"], r"noise_level must be in [0, 350], got 351"),
        (["--image", "{tmp}/small.png", "--strength", "0.5"], "strength is not for a denoiser that enlarges"),
        (["--image", "{tmp}/small.png", "--labels", "3"], "this denoiser was trained without labels"),
    ],
)
def test_what_an_upscaler_does_not_take_is_refused(tmp_path, run_cli, options, message):
    save_denoiser(upscaler(tmp_path), tmp_path / "upscaler.ckpt")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "small.png")
    options = [option.format(tmp=tmp_path) for option in options]
    arguments = ["sample", tmp_path / "upscaler.ckpt", "--captions", "x", "--output", tmp_path / "out"]
    status, _, err = run_cli(*arguments, *options)
    assert (status, message in err) == (1, True), err


def test_noise_level_is_for_upscalers(tmp_path, run_cli):
    save_denoiser(text_denoiser(tmp_path), tmp_path / "text.ckpt")
    arguments = ["sample", tmp_path / "text.ckpt", "--captions", "x", "--output", tmp_path / "out"]
    status, _, err = run_cli(*arguments, "--noise_level", 20)
    assert (status, "this denoiser was trained without noise level" in err) == (1, True), err


# ------------------------------------------------------------------------------------------------ folders from anyone


WEIGHTS = {"vae": "diffusion_pytorch_model", "text_encoder": "model"}  # stem of the names, by part


@pytest.mark.parametrize(
    ("part", "pickle"), [("vae", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")]
)
def test_pickle_in_a_folder_is_refused_and_its_code_not_run(stable_diffusion, tmp_path, part, pickle, code):
    (stable_diffusion / part / f"{WEIGHTS[part]}.safetensors").unlink()
    torch.save({"weight": code(tmp_path / "ran")}, stable_diffusion / part / pickle)
    with pytest.raises(FileNotFoundError, match=rf"{part} must hold {WEIGHTS[part]}\.safetensors.*can run code"):
        import_pipeline(stable_diffusion)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("name", ["../evil.safetensors", "/evil.safetensors", "evil.bin"])
def test_index_of_weights_names_files_beside_it(stable_diffusion, tmp_path, part, name, code):
    folder = stable_diffusion / part
    (folder / f"{WEIGHTS[part]}.safetensors").unlink()
    torch.save({"weight": code(tmp_path / "ran")}, folder / "evil.bin")
    index = {"metadata": {}, "weight_map": {"weight": name}}
    (folder / f"{WEIGHTS[part]}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"must name \.safetensors files in its folder, got '{name}'"):
        import_pipeline(stable_diffusion)
    assert not (tmp_path / "ran").exists()


def test_python_in_a_pipeline_folder_is_not_run(stable_diffusion, tmp_path):
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Evil: pass\n"
    automatic = {"auto_map": {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}}
    for part in ("", "unet", "vae", "scheduler", "text_encoder", "tokenizer"):
        (stable_diffusion / part / "evil.py").write_text(code)
        (stable_diffusion / part / f"{part or 'pipeline'}.py").write_text(code)
        for file in (stable_diffusion / part).glob("*config.json"):
            content = json.loads(file.read_text())
            asked = {**automatic, "trust_remote_code": True, "attn_implementation": "evil/kernel"}
            file.write_text(json.dumps({**content, **(asked if part in ("text_encoder", "tokenizer") else automatic)}))
    index = json.loads((stable_diffusion / "model_index.json").read_text())
    index |= {"_class_name": ["pipeline", "Evil"], "unet": ["unet", "Evil"], "tokenizer": ["evil", "Evil"]}
    (stable_diffusion / "model_index.json").write_text(json.dumps(index))
    with pytest.warns(UserWarning, match="auto_map"):
        trained = import_pipeline(stable_diffusion)
    assert isinstance(trained.conditions[0], TextTokens)
    assert trained.conditions[0].encoder.config._attn_implementation == "sdpa"
    assert not (tmp_path / "ran").exists()
