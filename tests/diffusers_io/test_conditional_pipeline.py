"""Denoisers that no pipeline of diffusers draws the same from, to a folder with a pipeline of its own and from it."""

import json
import shutil
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
    latent_space,
    randomise,
    shorten,
    text_denoiser,
    text_tokens,
    upscaler,
)
from diffusers import AutoencoderKL
from elsewhere import draw_elsewhere
from PIL import Image

from unet_diffusion.diffusers_io import exporting
from unet_diffusion.diffusers_io.exporting import export_pipeline
from unet_diffusion.diffusers_io.importing import import_pipeline
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import CONDITION_KEY
from unet_diffusion.diffusion.conditions.low_resolution import LOW_RES_SCHEDULE, LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage, masked_image_maps
from unet_diffusion.diffusion.guidance import Guidance
from unet_diffusion.diffusion.sampling import image_generators, sample
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.reading import read_denoiser
from unet_diffusion.inference.record import denoiser_record, save_denoiser
from unet_diffusion.latents.codec import LatentCodec, PixelCodec, decode_latents
from unet_diffusion.latents.space import LatentSpace, fingerprint
from unet_diffusion.models.autoencoders import latent_moments
from unet_diffusion.runtime.randomness import keyed_generator

pytest.importorskip("transformers")

CONFIGS = Path(__file__).parents[2] / "configs"
SEED = 5
STEPS = 4
LABELS = [1, 0]
NO_TOKENS = {"context_dim": None, "num_heads": None}
NOISE_LEVEL = 30
SMALL_SIZE = (6, 8)  # of a picture to enlarge


def class_tokens(**options) -> ClassTokens:
    torch.manual_seed(0)
    return randomise(ClassTokens(WIDTH, 2, **options))


def pixels(folder, conditions, *, num_maps=0, **network) -> Denoiser:
    """A denoiser of grey images."""
    trained = text_denoiser(folder, conditions=conditions, in_channels=1 + num_maps, out_channels=1, **network)
    trained.codec, trained.sample_shape = PixelCodec(), (1, 8, 8)
    return trained


def with_classes(trained: Denoiser, null_label=2) -> Denoiser:
    trained.null_label = null_label
    trained.class_names = ["cat", "dog"] if trained.num_classes == 2 else None  # not of an upscaler's levels of noise
    return trained


def of_codes(folder) -> LatentSpace:
    return latent_space(folder / "vq", "vq", mean=(0.0,) * 4, std=(0.5,) * 4)


def without_convolutions(folder) -> LatentSpace:
    """Of an autoencoder that cannot take in what each channel's mean and deviation are."""
    torch.manual_seed(0)
    sides = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    bare = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
    made = AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8, 8), **sides, **bare)
    randomise(made).save_pretrained(folder / "bare")
    moments = {"mean": (0.1, 0.2, -0.3, 0.0), "std": (0.5, 2.0, 1.0, 0.7)}
    return LatentSpace(str(folder / "bare"), fingerprint(made, made.config), (3, 16, 16), 1, **moments)


MADE = {
    "captions of pixels": lambda folder: pixels(folder, [text_tokens()]),
    "class tokens of pixels": lambda folder: pixels(folder, [class_tokens()]),
    "captions dropped, class tokens not": lambda folder: text_denoiser(
        folder, conditions=[text_tokens(), class_tokens(dropout=0.0)]
    ),
    "classes and captions": lambda folder: with_classes(text_denoiser(folder, num_class_embeds=3)),
    "classes and class tokens, never dropped": lambda folder: with_classes(
        text_denoiser(folder, conditions=[class_tokens(dropout=0.0)], num_class_embeds=2), null_label=None
    ),
    "captions of codes": lambda folder: text_denoiser(folder, space=of_codes(folder)),
    "captions, no convolutions": lambda folder: text_denoiser(folder, space=without_convolutions(folder)),
    "nothing, not square": lambda folder: text_denoiser(folder, conditions=[], size=(8, 4), **NO_TOKENS),
    "mask of pixels": lambda folder: pixels(folder, [MaskedImage(2)], num_maps=2, **NO_TOKENS),
    "mask and classes of codes": lambda folder: with_classes(
        text_denoiser(
            folder,
            conditions=[MaskedImage(5)],
            space=of_codes(folder),
            in_channels=9,
            out_channels=4,
            num_class_embeds=3,
            **NO_TOKENS,
        )
    ),
    "mask and captions, not square": lambda folder: inpainter(folder, size=(8, 4)),
    "small picture": lambda folder: upscaler(folder, conditions=[LowResolution(3)], **NO_TOKENS),
    "small picture and captions, level dropped": lambda folder: with_classes(upscaler(folder), null_label=999),
    "maps and captions": lambda folder: text_denoiser(
        folder, conditions=[text_tokens(), Concat(2, dropout=0.1)], in_channels=6, out_channels=4
    ),
}


def has_null(trained: Denoiser) -> bool:
    return any(one.has_null for one in trained.all_conditions)


def image_size(trained: Denoiser) -> tuple[int, int]:
    factor = 1 if trained.codec.space is None else 2
    return factor * trained.sample_shape[1], factor * trained.sample_shape[2]


def write_files(trained: Denoiser, folder) -> None:
    """The pictures and tensors that calls and model cards name."""
    enlarges = trained.condition(LowResolution) is not None
    height, width = SMALL_SIZE if enlarges else image_size(trained)
    shape = (height, width, 3) if trained.codec.space else (height, width)
    random = np.random.default_rng(7)
    Image.fromarray(random.integers(256, size=shape, dtype=np.uint8)).save(folder / "image.png")
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[3:7, 1:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    np.save(folder / "maps.npy", random.standard_normal((2, 2, 8, 8), dtype=np.float32))
    size = SMALL_SIZE if enlarges else trained.sample_shape[1:]
    noise = [torch.randn(trained.sample_shape[0], *size, generator=one) for one in image_generators(SEED, range(2))]
    np.save(folder / "latents.npy", torch.stack(noise).numpy())


def call_of(trained: Denoiser) -> dict:
    """What a pipeline is called with, but for guidance."""
    call: dict = {"num_inference_steps": STEPS, "batch_size": 2}
    if trained.condition(LowResolution):
        seeds = [
            keyed_generator(SEED, CONDITION_KEY, index).initial_seed() for index in range(2)
        ]  # of the picture's noise
        call |= {"image": "image.png", "noise_level": NOISE_LEVEL, "latents": "latents.npy", "seeds": seeds}
    elif trained.num_classes:
        call["class_labels"] = LABELS
    if trained.condition(MaskedImage):
        call |= {"image": "image.png", "mask_image": "mask.png"}
    elif trained.condition(Concat) and not trained.condition(LowResolution):
        call["concat"] = "maps.npy"
    return call | ({"prompt": CAPTIONS} if any(one.batch_key == "captions" for one in trained.all_conditions) else {})


@torch.no_grad()
def drawn_here(trained: Denoiser, folder, guidance_scale: float) -> np.ndarray:
    """What our sampler draws, in the range and layout of a pipeline's arrays."""
    picture, mask = (torch.from_numpy(np.asarray(Image.open(folder / name)) / 255).float() for name in
                     ("image.png", "mask.png"))  # fmt: skip
    picture = (picture[..., None] if picture.ndim == 2 else picture).permute(2, 0, 1)[None] * 2 - 1
    space, paints = trained.codec.space, trained.condition(MaskedImage) is not None
    autoencoder = None if space is None else LatentCodec.of(space).autoencoder
    given, noise = {"labels": torch.tensor(LABELS), "concat": torch.from_numpy(np.load(folder / "maps.npy"))}, None
    if any(one.batch_key == "captions" for one in trained.all_conditions):
        given["captions"] = next(one for one in trained.conditions if one.batch_key == "captions").token_ids(CAPTIONS)
    if paints:
        maps = masked_image_maps(
            picture,
            mask[None, None],
            lambda images: images if space is None else space.normalise(latent_moments(autoencoder, images)[0]),
        )
        given["masked_image"] = maps.expand(2, -1, -1, -1)
    if trained.condition(LowResolution):
        generators = [keyed_generator(SEED, CONDITION_KEY, index) for index in range(2)]
        small_noise = torch.stack([torch.randn(picture.shape[1:], generator=one) for one in generators])
        levels = given["noise_level"] = torch.full((2,), NOISE_LEVEL)
        given["low_res"] = LOW_RES_SCHEDULE.add_noise(picture.expand_as(small_noise), small_noise, levels)
        noise = torch.from_numpy(np.load(folder / "latents.npy"))
    inputs, unconditional = trained.inputs(given)
    images = sample(
        trained.unet,
        trained.schedule,
        (2, *trained.sample_shape) if noise is None else noise.shape,
        scheduler="DDPMScheduler" if space is None else "DDIMScheduler",
        num_inference_steps=STEPS,
        seed=SEED,
        inputs=inputs,
        unconditional=unconditional,
        guidance=Guidance(guidance_scale),
        noise=noise,
        clip_sample=space is None,
    )
    if space is not None:
        images = decode_latents(autoencoder, space, images)
    images = torch.where(mask == 1, images, picture) if paints else images
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def assert_same_images(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.std() > 0.05  # not clipped to one value
    np.testing.assert_allclose(ours, theirs, atol=2e-4)  # float32 rounding over the steps, guided


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder that holds each denoiser's pipeline and files, and the denoiser."""
    root, made = tmp_path_factory.mktemp("exported"), {}
    for name, make in MADE.items():
        (root / name).mkdir()
        made[name] = make(root / name)
        write_files(made[name], root / name)
        export_pipeline(made[name], root / name / "pipeline")
    return root, made


@pytest.fixture(scope="module")
def elsewhere(exported):
    """What their pipelines draw in a process without this package."""
    root, made = exported
    calls = {}
    for name, trained in made.items():
        calls[name] = {"plain": call_of(trained)}
        if has_null(trained):
            calls[name]["guided"] = {**call_of(trained), "guidance_scale": 3.0}
    seeds = [generator.initial_seed() for generator in image_generators(SEED, range(2))]
    return draw_elsewhere(root, calls, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_folder_draws_our_images_without_this_package(exported, elsewhere, name):
    root, made = exported
    assert_same_images(drawn_here(made[name], root / name, 1.0), elsewhere[name]["plain"])
    if has_null(made[name]):
        guided = drawn_here(made[name], root / name, 3.0)
        assert_same_images(guided, elsewhere[name]["guided"])
        assert np.abs(guided - elsewhere[name]["plain"]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_python_of_the_model_card_draws(elsewhere, exported, name):
    trained = exported[1][name]
    size = (12, 16) if trained.condition(LowResolution) else image_size(trained)
    assert elsewhere[name]["card"].shape[1:3] == size


@pytest.mark.parametrize("name", MADE)
def test_folder_is_imported_as_it_was_and_goes_out_again(exported, tmp_path, name):
    root, made = exported
    again = import_pipeline(root / name / "pipeline")
    assert {type(one) for one in again.all_conditions} == {type(one) for one in made[name].all_conditions}
    assert (again.null_label, again.class_names) == (made[name].null_label, made[name].class_names)
    scales = {scale for scale in (1.0, 3.0) if scale == 1 or has_null(made[name])}
    for scale in scales:
        assert_same_images(drawn_here(made[name], root / name, scale), drawn_here(again, root / name, scale))
    export_pipeline(again, tmp_path / "pipeline")
    ours, theirs = (denoiser_record(one) for one in (again, import_pipeline(tmp_path / "pipeline")))
    moved = {"autoencoder": str(tmp_path / "pipeline" / "vae")}
    assert theirs == ours | ({"latent_space": ours["latent_space"] | moved} if ours["latent_space"] else {})


def test_autoencoder_that_cannot_take_in_moments_keeps_them_beside_it(exported):
    root, made = exported
    name = "captions, no convolutions"
    before, after = made[name].codec.space, import_pipeline(root / name / "pipeline").codec.space
    assert (after.mean, after.std, after.fingerprint) == (before.mean, before.std, before.fingerprint)


def test_imported_folder_is_trained_on_with_other_images(exported, tmp_path, run_cli):
    root, _ = exported
    folder = root / "classes and captions" / "pipeline"
    for number in range(8):
        image = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.with_suffix(".txt").write_text(CAPTIONS[0])
        noise = np.random.default_rng(number).integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image)
    latents, imported = tmp_path / "latents", tmp_path / "imported.ckpt"
    recipe = yaml.safe_load((CONFIGS / "latents_text.yaml").read_text())
    recipe["data"]["init_args"]["source"]["init_args"]["root"] = str(latents)
    recipe["data"]["init_args"] |= {"horizontal_flip": False, "batch_size": 4, "num_val": 2}
    shorten(recipe, tmp_path / "run", steps=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipes = ["--config", tmp_path / "recipe.yaml", "--config", tmp_path / "imported.yaml"]
    encode = ["encode", folder / "vae", tmp_path / "images", "--output", latents, "--device=cpu"]
    encode += ["--image_size", 16, 16]
    for command in (
        [*encode, "--captions", "--class_labels"],
        ["import", folder, imported],
        ["fit", *recipes, "--ckpt_path", imported],
    ):
        status, _, err = run_cli(*command)
        assert status == 0, err
    after = import_pipeline(tmp_path / "run" / "pipeline")
    assert (after.null_label, after.class_names) == (2, ["cat", "dog"])
    before = import_pipeline(folder).unet.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in after.unet.state_dict().items())


def test_imported_checkpoint_is_what_was_imported(exported, tmp_path):
    root, _ = exported
    imported = import_pipeline(root / "captions dropped, class tokens not" / "pipeline")
    save_denoiser(imported, tmp_path / "imported.ckpt")
    read = read_denoiser(tmp_path / "imported.ckpt")
    assert denoiser_record(read) == denoiser_record(imported)
    torch.testing.assert_close(read.conditions.state_dict(), imported.conditions.state_dict())


def test_code_of_a_folder_is_not_run_by_import(exported, tmp_path):
    root, _ = exported
    export_pipeline(import_pipeline(root / "class tokens of pixels" / "pipeline"), tmp_path / "pipeline")
    for file in ("pipeline.py", "class_tokens/class_tokens.py"):
        assert (tmp_path / "pipeline" / file).is_file()
        (tmp_path / "pipeline" / file).write_text("raise RuntimeError('run')")
    import_pipeline(tmp_path / "pipeline")


@pytest.mark.parametrize("listed", [{}, {"class_tokens": "ClassTokens"}, None, ["mask"]])
def test_folder_of_an_earlier_version_is_refused(exported, tmp_path, listed):
    root, _ = exported
    index = json.loads((root / "class tokens of pixels" / "pipeline" / "model_index.json").read_text())
    shutil.copytree(root / "class tokens of pixels" / "pipeline", tmp_path / "pipeline")
    index = {name: value for name, value in (index | {"conditions": listed}).items() if value is not None}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"an earlier version wrote this folder: export the run again"):
        import_pipeline(tmp_path / "pipeline")


def test_class_tokens_that_load_as_others_are_not_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "unet_diffusion.diffusion.conditions.class_token_embedding.ClassTokenEmbedding.load_state_dict", lambda *_: None
    )
    with pytest.raises(RuntimeError, match=r"tokens of classes differ by .*nothing was exported"):
        export_pipeline(pixels(tmp_path, [class_tokens()]), tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_folder_that_takes_a_mask_must_have_a_network_that_does(exported, tmp_path):
    root, _ = exported
    export_pipeline(import_pipeline(root / "maps and captions" / "pipeline"), tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    listed = [["mask", name] if role == "concat" else [role, name] for role, name in index["conditions"]]
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index | {"conditions": listed}))
    with pytest.raises(ValueError, match=r"in_channels must be 9, for 4 channels of x and 5 of the maps .*, got 6"):
        import_pipeline(tmp_path / "pipeline")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("captions of pixels", {}, "prompt must be given to this model, which takes prompt"),
        ("mask of pixels", {"image": "image"}, "mask_image must be given to this model, which takes image, mask_image"),
        (
            "mask of pixels",
            {"image": torch.zeros(1, 3, 8, 8), "mask_image": torch.ones(1, 1, 8, 8)},
            "image must have 1 channels, got 3",
        ),
        ("small picture", {"image": "image", "class_labels": 3}, "class_labels must be left out .* which takes image"),
        ("small picture", {"image": "image", "noise_level": 351}, r"noise_level must be in \[0, 350\], got 351"),
        ("small picture", {"image": "image", "height": 32}, "height and width must be left out, because image"),
        ("small picture", {"image": "odd"}, "2 times those of image, must be multiples of 4, got 10 and 12"),
        (
            "maps and captions",
            {"prompt": "x", "concat": torch.zeros(1, 1, 8, 8)},
            r"concat must be \(N, 2, 8, 8\), got",
        ),
        ("nothing, not square", {"guidance_scale": 2.0}, "guidance_scale must be 1, got 2.0"),
    ],
)
def test_what_a_pipeline_does_not_take_is_refused(exported, name, options, message):
    pictures = {"image": Image.new("RGB", (8, 8)), "odd": Image.new("RGB", (6, 5))}
    options = {key: pictures.get(value, value) if key == "image" else value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        exporting._build_pipeline(exported[1][name])(**options)


def recipe_for_captions() -> dict:
    """configs/folder.yaml for images with captions."""
    recipe = yaml.safe_load((CONFIGS / "folder.yaml").read_text())
    captions = {"context_dim": WIDTH, "vocab_size": 600, "max_length": 12, "num_layers": 1, "num_heads": 2}
    recipe["model"]["conditions"] = [
        {"class_path": "unet_diffusion.diffusion.conditions.text.TextTokens", "init_args": captions}
    ]
    recipe["model"]["unet"]["init_args"]["context_dim"] = WIDTH
    recipe["data"]["init_args"]["source"]["init_args"]["captions"] = True
    return recipe


def recipe_for_masks() -> dict:
    """configs/inpainting.yaml for images without captions, and without an autoencoder."""
    recipe = yaml.safe_load((CONFIGS / "inpainting.yaml").read_text())
    recipe["model"]["conditions"] = [
        {"class_path": "unet_diffusion.diffusion.conditions.masked_image.MaskedImage", "init_args": {"channels": 4}}
    ]
    recipe["model"]["unet"]["init_args"] |= {"in_channels": 7, "out_channels": 3, "context_dim": None}
    del recipe["model"]["codec"]
    recipe["data"]["init_args"]["source"]["init_args"]["captions"] = False
    return recipe


def recipe_for_masks_and_small_images() -> dict:
    recipe = recipe_for_masks()
    small = {"channels": 3, "option": "small_image", "scale_factor": 4}
    recipe["model"]["conditions"].append(
        {"class_path": "unet_diffusion.diffusion.conditions.low_resolution.LowResolution", "init_args": small}
    )
    recipe["model"]["unet"]["init_args"] |= {"in_channels": 10, "num_class_embeds": 1000}
    return recipe


def write_images(folder) -> None:
    """12 images of noise with captions, and a mask beside them."""
    (folder / "images").mkdir()
    rows = ["file_name,text", *(f"{number:02d}.png,{WORDS[number % 3]}" for number in range(12))]
    (folder / "images" / "metadata.csv").write_text("\n".join(rows))
    for number in range(12):
        noise = np.random.default_rng(number).integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{number:02d}.png")
    Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(folder / "mask.png")


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (recipe_for_captions, ["--captions", "a red cat", "--guidance_scale", "3"]),
        (recipe_for_masks, ["--image", "{folder}/images/03.png", "--mask", "{folder}/mask.png"]),
        (
            recipe_for_masks_and_small_images,
            [
                *("--image", "{folder}/images/03.png", "--mask", "{folder}/mask.png"),
                *("--condition", "small_image={folder}/images/04.png", "--noise_level", "10"),
            ],
        ),
    ],
)
def test_run_ends_with_a_pipeline_that_is_drawn_from_as_the_run(tmp_path, run_cli, make, options):
    write_images(tmp_path)
    recipe = make()
    network = {"channels": [8, 16], "attention_levels": [1], "head_channels": 8, "norm_num_groups": 4}
    recipe["model"]["unet"]["init_args"] |= network
    shorten(recipe, tmp_path / "run", steps=2)
    recipe["data"]["init_args"]["source"]["init_args"] |= {"root": str(tmp_path / "images"), "image_size": 16}
    recipe["data"]["init_args"] |= {"batch_size": 4, "num_val": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, _, err = run_cli("fit", "--config", tmp_path / "recipe.yaml")
    assert status == 0, err
    options = [option.format(folder=tmp_path) for option in options]
    drawn = []
    for name in ("run", "run/pipeline"):
        arguments = ["sample", tmp_path / name, "--num_images=2", "--num_inference_steps=4", "--device=cpu", *options]
        status, _, err = run_cli(*arguments, "--scheduler=DDIMScheduler", "--output", tmp_path / name / "drawn")
        assert status == 0, err
        drawn.append(np.asarray(Image.open(tmp_path / name / "drawn" / "000001.png")))
    assert drawn[0].std() > 1
    np.testing.assert_array_equal(*drawn)
