"""Small images without noise: from training to diffusers' LDMSuperResolutionPipeline and back."""

import json

import numpy as np
import pytest
import torch
from denoisers import SMALL, latent_space, randomise
from diffusers import AutoencoderKL, DDIMScheduler, LDMSuperResolutionPipeline, UNet2DModel, VQModel
from elsewhere import draw_elsewhere
from PIL import Image
from torch import nn

from unet_diffusion.diffusers_io.exporting import _build_pipeline, export_pipeline
from unet_diffusion.diffusers_io.importing import import_pipeline
from unet_diffusion.diffusers_io.normalising import normalised_autoencoder, takes_scale
from unet_diffusion.diffusion.conditions.condition import CONDITION_KEY
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.sampling import image_generators
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.record import denoiser_record
from unet_diffusion.latents.codec import LatentCodec, PixelCodec
from unet_diffusion.latents.space import LatentSpace, fingerprint
from unet_diffusion.models.autoencoders import kl_autoencoder, vq_autoencoder
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.runtime.randomness import keyed_generator

SEED, STEPS, SIDE = 5, 4, 32
MOMENTS = {
    "kl": ((0.1, 0.2, -0.3), (0.5, 2.0, 1.0)),
    "codes": ((0.0,) * 3, (0.5,) * 3),
    "codes of another mean": ((0.1, 0.2, -0.3), (2.0,) * 3),
}


def space_of(folder, name) -> LatentSpace:
    torch.manual_seed(0)
    options = {"latent_channels": 3, **SMALL}
    made = kl_autoencoder(3, (8, 8), **options) if name == "kl" else vq_autoencoder(3, (8, 8), num_codes=64, **options)
    randomise(made).save_pretrained(folder)
    mean, std = MOMENTS[name]
    return LatentSpace(str(folder), fingerprint(made, made.config), (3, 2 * SIDE, 2 * SIDE), 2, mean, std)


def enlarger(codec, *, channels=3, size=(SIDE, SIDE), condition=None, **options) -> Denoiser:
    torch.manual_seed(1)
    condition = condition or LowResolution(3, noise=False)
    network = {"out_channels": channels, "layers_per_block": 1, "norm_num_groups": 4, **options}
    return Denoiser(
        unet=randomise(DenoiserUNet(channels + condition.config["channels"], (8, 16), **network)),
        schedule=NoiseSchedule(100, prediction_type="v_prediction"),
        sample_shape=(channels, *size),
        codec=codec,
        conditions=nn.ModuleList([condition]),
    )


def of_space(folder, name) -> Denoiser:
    return enlarger(LatentCodec.of(space_of(folder / "autoencoder", name)))


def of_classes(folder) -> Denoiser:
    """Of latents with a channel more than images, of two classes."""
    codec = LatentCodec.of(latent_space(folder / "autoencoder"))
    denoiser = enlarger(codec, channels=4, num_class_embeds=3)
    denoiser.null_label, denoiser.class_names = 2, ["cat", "dog"]
    return denoiser


def of_pixels(folder, **options) -> Denoiser:
    condition = LowResolution(3, scale_factor=2, **{"noise": False, **options})
    return enlarger(PixelCodec(), size=(2 * SIDE, 2 * SIDE), condition=condition)


OWN = {"classes": of_classes, "pixels": of_pixels}  # a pipeline of our own draws them


def drawn_here(denoiser: Denoiser, image, count=1, **options) -> np.ndarray:
    scheduler = "DDPMScheduler" if denoiser.codec.space is None else "DDIMScheduler"
    settings = {"scheduler": scheduler, "num_inference_steps": STEPS, "seed": SEED, **options}
    images = denoiser.sample(count, image=image, **settings)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.std() > 0.05  # not clipped to one value
    np.testing.assert_allclose(ours, theirs, atol=2e-4)  # float32 rounding over the steps


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("exported"), {}
    for name in (*MOMENTS, *OWN):
        (root / name).mkdir()
        made[name] = OWN[name](root / name) if name in OWN else of_space(root / name, name)
        for file, width in (("image", SIDE), ("wide", 2 * SIDE)):
            pixels = np.random.default_rng(width).integers(256, size=(SIDE, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{file}.png")
        export_pipeline(made[name], root / name / "pipeline")
    return root, made


def test_folder_draws_our_images_without_this_package(exported):
    root, made = exported
    options = {name: {"labels": ["dog"], "guidance_scale": 2.0} if name == "classes" else {} for name in made}
    calls = {
        name: {file: {"num_inference_steps": STEPS, "image": f"{file}.png"} for file in ("image", "wide")}
        for name in made
    }
    for call in calls["classes"].values():
        call |= {"class_labels": ["dog"], "guidance_scale": 2.0}
    elsewhere = draw_elsewhere(root, calls, [one.initial_seed() for one in image_generators(SEED, [0])])
    for name, denoiser in made.items():
        index = json.loads((root / name / "pipeline" / "model_index.json").read_text())
        kind = ["pipeline", "ConditionalPipeline"] if name in OWN else "LDMSuperResolutionPipeline"
        assert index["_class_name"] == kind
        for file in ("image", "wide"):
            assert_same(drawn_here(denoiser, root / name / f"{file}.png", **options[name]), elsewhere[name][file])
        assert elsewhere[name]["card"].shape[1:] == (2 * SIDE, 2 * SIDE, 3)


@pytest.mark.parametrize("name", [*MOMENTS, *OWN])
def test_folder_is_imported_as_it_was_and_goes_out_again(exported, tmp_path, name):
    root, made = exported
    again = Denoiser(**vars(import_pipeline(root / name / "pipeline")))
    assert denoiser_record(again)["conditions"] == denoiser_record(made[name])["conditions"]
    assert_same(*(drawn_here(one, root / name / "image.png", 2) for one in (made[name], again)))
    export_pipeline(again, tmp_path / "pipeline")
    index, index_again = (folder / "model_index.json" for folder in (root / name / "pipeline", tmp_path / "pipeline"))
    assert json.loads(index.read_text()) == json.loads(index_again.read_text())


def test_folder_of_diffusers_is_imported_without_the_scale_that_its_pipeline_ignores(tmp_path):
    torch.manual_seed(2)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    vqvae = VQModel(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, num_vq_embeddings=64,
        **blocks,
    )  # fmt: skip
    unet = UNet2DModel(
        SIDE, 6, 3, down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, layers_per_block=1, **blocks
    )
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0155, "clip_sample": False}
    scheduler = DDIMScheduler(**schedule, timestep_spacing="trailing")
    pipeline = LDMSuperResolutionPipeline(randomise(vqvae), randomise(unet), scheduler)
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert vqvae.config.scaling_factor == 0.18215
    pipeline.set_progress_bar_config(disable=True)
    small = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs = [
        pipeline(one[None], num_inference_steps=STEPS, generator=generator, output_type="np").images[0]
        for one, generator in zip(small, image_generators(SEED, range(2)), strict=True)
    ]
    denoiser = Denoiser(**vars(import_pipeline(tmp_path / "pipeline")))
    for index in range(2):
        assert_same(drawn_here(denoiser, small[index], 2)[index], theirs[index])


# ------------------------------------------------------------------------------------------- where it is another's work


def test_what_the_stock_pipeline_does_not_draw_has_a_pipeline_of_its_own_that_says_why(tmp_path):
    space, of_four = space_of(tmp_path / "kl", "kl"), latent_space(tmp_path / "four")
    cases = {
        "it adds no noise": enlarger(LatentCodec.of(space), condition=LowResolution(3), num_class_embeds=1000),
        "multiples of 32 pixels, and these are 8 x 32": enlarger(LatentCodec.of(space), size=(8, 32)),
        "channels as images have, 3, and these have 4": enlarger(LatentCodec.of(of_four), channels=4),
        "it does not enlarge the small image for the network": enlarger(
            LatentCodec.of(space), condition=LowResolution(3, noise=False, scale_factor=2)
        ),
    }
    for number, (reason, denoiser) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        export_pipeline(denoiser, folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == ["pipeline", "ConditionalPipeline"]
        assert reason in (folder / "README.md").read_text().replace("\n", " ")


def test_small_image_with_noise_is_enlarged_with_it(tmp_path):
    denoiser = of_pixels(tmp_path, noise=True)
    pixels = np.random.default_rng(0).integers(256, size=(8, 12, 3), dtype=np.uint8)
    pipeline = _build_pipeline(denoiser)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    start = [torch.randn(3, 16, 24, generator=one) for one in image_generators(SEED, range(2))]
    theirs = pipeline(
        image=[Image.fromarray(pixels)] * 2,
        noise_level=30,
        latents=torch.stack(start),
        generator=[keyed_generator(SEED, CONDITION_KEY, index) for index in range(2)],  # of the small image's noise
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    assert_same(drawn_here(denoiser, pixels, 2, scheduler="DDIMScheduler", noise_level=30), theirs)


def test_noise_level_is_for_small_images_with_noise(exported):
    root, made = exported
    with pytest.raises(ValueError, match="this denoiser was trained without noise level; leave noise_level out"):
        drawn_here(made["classes"], root / "classes" / "image.png", noise_level=20)
    pipeline = _build_pipeline(made["classes"])
    with pytest.raises(ValueError, match="noise_level must be left out for this model, which adds no noise, got 20"):
        pipeline(image=Image.open(root / "classes" / "image.png"), class_labels="cat", noise_level=20)


# ------------------------------------------------------------------------------------------------------ autoencoders


@torch.no_grad()
@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_autoencoder_absorbs_what_normalises_its_latents(tmp_path, name, scale):
    space = space_of(tmp_path / name, name)
    plain = LatentCodec.of(space).autoencoder
    theirs = normalised_autoencoder(plain, space, scale)
    images, latents = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 8, 8)
    encoded = [one.encode(images).latent_dist.mean if name == "kl" else one.encode(images).latents
               for one in (plain, theirs)]  # fmt: skip
    torch.testing.assert_close(scale * encoded[1], space.normalise(encoded[0]))
    decoded = theirs.decode(latents / scale).sample
    torch.testing.assert_close(decoded, plain.decode(space.denormalise(latents)).sample, atol=1e-5, rtol=1e-4)
    assert theirs.config.scaling_factor == scale


def test_codes_with_a_scale_for_each_channel_or_spatial_norms_absorb_none(tmp_path):
    space = space_of(tmp_path / "codes", "codes")
    spatial = VQModel(norm_type="spatial", latent_channels=3)
    assert not takes_scale(spatial, space, 1.0)
    uneven = LatentSpace(**{**space.plain(), "std": (0.5, 0.5, 2.0), "mean": (0.0,) * 3})
    autoencoder = LatentCodec.of(space).autoencoder
    assert not takes_scale(autoencoder, uneven, None)
    with pytest.raises(ValueError, match="or codes that take one scale"):
        normalised_autoencoder(autoencoder, uneven)
    assert not takes_scale(AutoencoderKL(use_quant_conv=False), space, 1.0)
