"""Denoisers of semantic maps, paired images and boxes: drawn from by a user, exported, and drawn from elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from denoisers import CAPTIONS, WIDTH, latent_space, randomise, text_denoiser, text_tokens
from diffusers import StableDiffusionInstructPix2PixPipeline
from elsewhere import draw_elsewhere
from PIL import Image

from unet_diffusion.diffusers_io.exporting import export_pipeline, why_not_exported
from unet_diffusion.diffusers_io.importing import import_pipeline
from unet_diffusion.diffusion.conditions.box_tokens import BoxTokens
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.diffusion.sampling import image_generators
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.loading import load_denoiser
from unet_diffusion.inference.record import denoiser_record
from unet_diffusion.latents.codec import PixelCodec

pytest.importorskip("transformers")

SEED, STEPS, SIZE = 5, 4, 16
PLAIN = {"context_dim": None, "num_heads": None}
LABELS = [1, 0]
BOXES = [[["dog", 1, 2, 8, 9]], [["cat", 0, 0, 16, 12], ["dog", 4, 4, 5, 6], ["dog", 0, 0, 1, 1]]]


def pixels(folder, conditions, num_maps=0, **network) -> Denoiser:
    """A denoiser of colour images."""
    channels = {"in_channels": 3 + num_maps, "out_channels": 3}
    trained = text_denoiser(folder, conditions=conditions, size=(SIZE, SIZE), **channels, **network)
    trained.codec, trained.sample_shape = PixelCodec(), (3, SIZE, SIZE)
    return trained


def of_classes(trained: Denoiser) -> Denoiser:
    trained.null_label, trained.class_names = 2, ["cat", "dog"]
    return trained


def of_tokens(folder) -> Denoiser:
    torch.manual_seed(0)
    conditions = [randomise(ClassTokens(WIDTH, 2)), PairedImage(4, dropout=0.0)]
    return text_denoiser(folder, conditions=conditions, in_channels=8, out_channels=4)


def map_of(channels: int, *arguments, **options) -> SemanticMap:
    torch.manual_seed(0)
    return SemanticMap(channels, *arguments, **options)


def boxes_of(names, **options) -> BoxTokens:
    torch.manual_seed(0)
    boxes = BoxTokens(WIDTH, 3, max_boxes=2, num_heads=2, **options)
    boxes.take_names(names)
    return randomise(boxes)


MADE = {
    "map": lambda folder: pixels(folder, [map_of(3, 3)], 3, **PLAIN),
    "map of objects and classes": lambda folder: of_classes(
        pixels(folder, [map_of(2, label_format="instances", ignore_label=2)], 2, num_class_embeds=3, **PLAIN)
    ),
    "map of objects with distances": lambda folder: pixels(
        folder, [map_of(4, label_format="instances", max_distance=6)], 4, **PLAIN
    ),
    "map and captions of latents": lambda folder: text_denoiser(
        folder, conditions=[text_tokens(), map_of(2, 3, downsampling=2, dropout=0.0)], in_channels=6, out_channels=4
    ),
    "boxes": lambda folder: pixels(folder, [boxes_of(["cat", "dog"])]),
    "boxes and captions of latents": lambda folder: text_denoiser(
        folder, conditions=[text_tokens(), boxes_of(["cat", "dog"], dropout=0.0)]
    ),
    "boxes and map": lambda folder: pixels(folder, [boxes_of(["cat", "dog"]), map_of(3, 3)], 3),
    "paired image": lambda folder: pixels(folder, [PairedImage(3)], 3, **PLAIN),
    "paired image and class tokens of latents": of_tokens,
    "paired image and captions of latents": lambda folder: text_denoiser(
        folder, conditions=[text_tokens(), PairedImage(4)], in_channels=8, out_channels=4
    ),
    "paired image and captions, scaled alike": lambda folder: text_denoiser(
        folder,
        conditions=[text_tokens(), PairedImage(4)],
        in_channels=8,
        out_channels=4,
        space=latent_space(folder / "autoencoder", mean=(0.0,) * 4, std=(0.5,) * 4),
    ),
    "paired image always, captions": lambda folder: text_denoiser(
        folder, conditions=[text_tokens(), PairedImage(4, dropout=0.0)], in_channels=8, out_channels=4
    ),
}
INSTRUCTED = [name for name in MADE if name.startswith("paired image") and "captions" in name]


def write_files(folder) -> None:
    random = np.random.default_rng(7)
    Image.fromarray(random.integers(3, size=(SIZE, SIZE), dtype=np.uint8)).save(folder / "map.png")
    Image.fromarray(random.integers(256, size=(SIZE, SIZE, 3), dtype=np.uint8)).save(folder / "image.png")


def values_of(trained: Denoiser, folder) -> dict:
    """What a user gives to draw."""
    files = {"semantic_map": "map.png", "paired_image": "image.png"}
    own = {name: folder / file for name, file in files.items() if any(name in c.options for c in trained.conditions)}
    if any("boxes" in one.options for one in trained.conditions):
        own["boxes"] = BOXES
    given: dict = {"conditions": own}
    if trained.num_classes:
        given["labels"] = LABELS
    if any("captions" in one.options for one in trained.conditions):
        given["captions"] = CAPTIONS
    return given


def call_of(name: str, trained: Denoiser, scale: float) -> dict:
    """What a pipeline is called with for the same images."""
    given = values_of(trained, Path())
    own = {key: str(one) if isinstance(one, Path) else one for key, one in given.pop("conditions").items()}
    renamed = {"labels": "class_labels", "captions": "prompt"}
    call = {**{renamed[key]: value for key, value in given.items()}, "num_inference_steps": STEPS}
    if name in INSTRUCTED:
        has_null = trained.condition(PairedImage).has_null
        return {**call, "image": own["paired_image"], "guidance_scale": scale,
                "image_guidance_scale": scale if has_null else 1.0}  # fmt: skip
    return {**call, **own, "guidance_scale": scale, "batch_size": 2}


def drawn_here(trained: Denoiser, folder, scale: float) -> np.ndarray:
    scheduler = "DDPMScheduler" if trained.codec.space is None else "DDIMScheduler"
    settings = {"scheduler": scheduler, "num_inference_steps": STEPS, "seed": SEED, "guidance_scale": scale}
    images = trained.sample(2, **values_of(trained, folder), **settings)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("exported"), {}
    for name, make in MADE.items():
        (root / name).mkdir()
        made[name] = make(root / name)
        write_files(root / name)
        export_pipeline(made[name], root / name / "pipeline")
    return root, made


@pytest.fixture(scope="module")
def elsewhere(exported):
    """What the pipelines draw in a process without this package."""
    root, made = exported
    calls = {name: {str(scale): call_of(name, one, scale) for scale in (1.0, 3.0)} for name, one in made.items()}
    return draw_elsewhere(root, calls, [one.initial_seed() for one in image_generators(SEED, range(2))])


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_folder_draws_our_images_without_this_package(exported, elsewhere, name):
    root, made = exported
    for scale in (1.0, 3.0):
        ours = drawn_here(made[name], root / name, scale)
        assert ours.std() > 0.05  # not clipped to one value
        np.testing.assert_allclose(ours, elsewhere[name][str(scale)], atol=2e-4)  # float32 rounding over the steps
    assert elsewhere[name]["card"].shape[1:3] == (SIZE, SIZE)


@pytest.mark.parametrize("name", MADE)
def test_folder_is_imported_as_it_was_and_goes_out_again(exported, tmp_path, name):
    root, made = exported
    again = load_denoiser(root / name / "pipeline")
    assert {type(one) for one in again.all_conditions} == {type(one) for one in made[name].all_conditions}
    for scale in (1.0,) if "always" in name else (1.0, 3.0):  # a stock folder does not say what was dropped
        before, after = (drawn_here(one, root / name, scale) for one in (made[name], again))
        np.testing.assert_allclose(before, after, atol=2e-4)
    export_pipeline(again, tmp_path / "pipeline")
    records = [denoiser_record(one) for one in (again, import_pipeline(tmp_path / "pipeline"))]
    assert records[0]["conditions"] == records[1]["conditions"]


@pytest.mark.parametrize("name", INSTRUCTED)
def test_captions_and_paired_image_are_a_stock_pipeline(exported, name):
    index = (exported[0] / name / "pipeline" / "model_index.json").read_text()
    assert '"_class_name": "StableDiffusionInstructPix2PixPipeline"' in index
    assert not (exported[0] / name / "pipeline" / "pipeline.py").exists()


def test_stock_folder_whose_autoencoder_has_a_scale_draws_as_diffusers_draws(exported, tmp_path):
    root, made = exported
    name = INSTRUCTED[0]
    folder, image = root / name, Image.open(root / name / "image.png")
    stock = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder / "pipeline", safety_checker=None)
    stock.vae.register_to_config(scaling_factor=2.0)
    stock.save_pretrained(tmp_path / "scaled")
    stock.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "image_guidance_scale": 3.0, "output_type": "np"}
    generators = image_generators(SEED, range(2))
    theirs = stock(CAPTIONS, image=[image] * 2, generator=generators, **options).images
    np.testing.assert_allclose(drawn_here(load_denoiser(tmp_path / "scaled"), folder, 3.0), theirs, atol=2e-4)
    assert np.abs(drawn_here(made[name], folder, 3.0) - theirs).max() > 1e-3


@pytest.mark.parametrize("name", MADE)
def test_condition_decides_what_is_drawn(exported, tmp_path, monkeypatch, name):
    root, made = exported
    write_files(tmp_path)
    for file in ("map.png", "image.png"):
        shifted = np.roll(np.asarray(Image.open(tmp_path / file)), 1, axis=1)
        Image.fromarray(shifted).save(tmp_path / file)
    before = drawn_here(made[name], root / name, 1.0)
    monkeypatch.setattr(f"{__name__}.BOXES", BOXES[::-1])
    after = drawn_here(made[name], tmp_path, 1.0)
    assert np.abs(before - after).max() > 1e-3


class SecondMap(SemanticMap):
    """A map of another file."""

    batch_key, pipeline_role = "second_map", "second_map"


def test_three_encoders_of_maps_have_no_pipeline_and_say_so(tmp_path):
    three = pixels(tmp_path, [map_of(3, 3), PairedImage(3), SecondMap(2, 2)], 8, **PLAIN)
    reason = "a pipeline takes at most 2 conditions that give maps, got SemanticMap, PairedImage, SecondMap"
    assert reason in why_not_exported(three)
