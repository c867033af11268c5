"""Two conditions at once, of maps beside the noised image, boxes and classes: from fit to sample to export.

Pairs with captions, and those of which diffusers has a pipeline, are in the tests beside this one.
"""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from denoisers import WIDTH, latent_space, randomise
from elsewhere import draw_elsewhere
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn

from unet_diffusion.data import ImageDataModule, Source
from unet_diffusion.diffusers_io.exporting import _build_pipeline, export_pipeline
from unet_diffusion.diffusers_io.importing import import_pipeline
from unet_diffusion.diffusion.conditions.box_tokens import BoxTokens
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import CONDITION_KEY
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.diffusion.sampling import image_generators
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.record import denoiser_record
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.training import DiffusionModule

SEED, STEPS, SIZE, SMALL = 5, 4, 16, 8  # images of 16x16 pixels, latents of 8x8
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
LABELS, BOXES, NOISE_LEVEL = [1, 0], [["dog", 1, 2, 8, 9]], 30
CONCAT = torch.randn(2, 2, SMALL, SMALL, generator=torch.Generator().manual_seed(3))
KINDS = {
    "map": lambda: SemanticMap(2, 3, downsampling=2),
    "pair": lambda: PairedImage(4),
    "small": lambda: LowResolution(3),
    "mask": lambda: MaskedImage(5),
    "maps": lambda: Concat(2, dropout=0.1),
    "boxes": lambda: randomise(BoxTokens(WIDTH, 3, max_boxes=2, num_heads=2)),
    "classes": lambda: randomise(ClassTokens(WIDTH, 2)),
}
TOGETHER = [
    *combinations(("map", "pair", "small", "mask", "maps"), 2),
    *(("pair", "map"), ("mask", "small")),  # in the other order of channels
    *(("small", "classes"), ("small", "boxes"), ("boxes", "mask"), ("boxes", "pair"), ("classes", "boxes")),
    ("mask", "map", "small", "pair", "classes"),
]
PAIRS = {" and ".join(kinds): kinds for kinds in TOGETHER}


class Known(Source):
    """Images of noise, with what conditions read."""

    def __init__(self, keys: set[str]):
        self.keys = {"image", *keys}
        self.class_names = ["cat", "dog"] if "labels" in keys else None

    def __len__(self):
        return 6

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        picture, paired = random.integers(256, size=(2, SIZE, SIZE, 3), dtype=np.uint8)
        known = {
            "image": picture,
            "labels": index % 2,
            "paired_image": torch.from_numpy(paired).permute(2, 0, 1),
            "semantic_map": torch.from_numpy(random.integers(3, size=(1, SIZE, SIZE), dtype=np.uint8)),
            "boxes": json.dumps([["cat", 0, 0, 4, 5], ["dog", 3, 3, 8, 8]]),
            "concat": torch.from_numpy(random.standard_normal((2, SMALL, SMALL), dtype=np.float32)),
        }
        return {{"labels": "label"}.get(key, key): value for key, value in known.items() if key in self.keys}


def conditions_of(kinds) -> nn.ModuleList:
    torch.manual_seed(0)
    conditions = [KINDS[kind]() for kind in kinds]
    if {"mask", "small"} <= {*kinds}:
        conditions[kinds.index("small")] = LowResolution(3, option="small_image")
    return nn.ModuleList(conditions)


def fitted(folder, kinds) -> Denoiser:
    """A denoiser after two steps of training, of another place in weights than where it began."""
    conditions = conditions_of(kinds)
    beside = sum(one.config["channels"] for one in conditions if one.network_argument == "concat")
    attends = {"context_dim": WIDTH, "num_heads": 2} if {"boxes", "classes"} & {*kinds} else {}
    unet = DenoiserUNet(
        4 + beside,
        (8, 16),
        out_channels=4,
        num_class_embeds=1000 if "small" in kinds else None,
        attention_levels=(1,),
        norm_num_groups=4,
        layers_per_block=1,
        **attends,
    )
    module = DiffusionModule(
        randomise(unet),
        NoiseSchedule(100, prediction_type="v_prediction"),
        conditions=list(conditions),
        codec=LatentCodec.of(latent_space(folder / "autoencoder")),
    )
    data = ImageDataModule(Known({one.batch_key for one in conditions}), batch_size=2, num_val=2)
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=folder, max_steps=2, **QUIET)
    trainer.fit(module.train(), data)
    assert trainer.callback_metrics["val/loss"].isfinite()
    return module.trained


def write_files(kinds, folder) -> None:
    random = np.random.default_rng(7)
    image = SMALL if "small" in kinds and "mask" not in kinds else SIZE
    for name, side in (("image", image), ("small_image", SMALL), ("paired", SIZE)):
        Image.fromarray(random.integers(256, size=(side, side, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(random.integers(3, size=(SIZE, SIZE), dtype=np.uint8)).save(folder / "map.png")
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[3:7, 1:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    np.save(folder / "maps.npy", CONCAT.numpy())
    noise = [torch.randn(4, SMALL, SMALL, generator=one) for one in image_generators(SEED, range(2))]
    np.save(folder / "latents.npy", torch.stack(noise).numpy())


def drawn_here(trained: Denoiser, kinds, folder, scale: float) -> np.ndarray:
    """What a user draws with our sampler."""
    own = {"map": ("semantic_map", folder / "map.png"), "pair": ("paired_image", folder / "paired.png"),
           "boxes": ("boxes", BOXES)}  # fmt: skip
    conditions = dict(own[kind] for kind in kinds if kind in own)
    options: dict = {"image": folder / "image.png"} if {"small", "mask"} & {*kinds} else {}
    options |= {"mask": folder / "mask.png"} if "mask" in kinds else {}
    options |= {"noise_level": NOISE_LEVEL} if "small" in kinds else {}
    options |= {"labels": LABELS} if "classes" in kinds else {}
    if {"small", "mask"} <= {*kinds}:
        conditions["small_image"] = folder / "small_image.png"
    settings = {"scheduler": "DDIMScheduler", "num_inference_steps": STEPS, "seed": SEED, "guidance_scale": scale}
    images = trained.sample(2, conditions=conditions, **options, **settings)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def call_of(kinds, scale: float) -> dict:
    """What the pipeline is called with for the same images."""
    call = {"num_inference_steps": STEPS, "batch_size": 2, "guidance_scale": scale, "latents": "latents.npy"}
    own = {"map": {"semantic_map": "map.png"}, "pair": {"paired_image": "paired.png"}, "boxes": {"boxes": BOXES},
           "maps": {"concat": "maps.npy"}, "classes": {"class_labels": LABELS},
           "mask": {"image": "image.png", "mask_image": "mask.png"}}  # fmt: skip
    for kind in kinds:
        call |= own.get(kind, {})
    if "small" not in kinds:
        return call
    seeds = [keyed_generator(SEED, CONDITION_KEY, index).initial_seed() for index in range(2)]
    name = "small_image" if "mask" in kinds else "image"
    return {**call, name: f"{name}.png", "noise_level": NOISE_LEVEL, "seeds": seeds}


def has_null(kinds) -> bool:
    return not {*kinds} <= {"small", "mask"}


@pytest.fixture(autouse=True)
def maps_of_a_user(monkeypatch):
    """Has `Concat`, which takes maps of the data alone, take these maps."""
    monkeypatch.setattr(Concat, "from_user", lambda self, request: {"concat": CONCAT})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("exported"), {}
    for name, kinds in PAIRS.items():
        (root / name).mkdir()
        made[name] = fitted(root / name, kinds)
        write_files(kinds, root / name)
        export_pipeline(made[name], root / name / "pipeline")
    return root, made


@pytest.fixture(scope="module")
def elsewhere(exported):
    """What the pipelines draw in a process without this package."""
    calls = {
        name: {str(scale): call_of(kinds, scale) for scale in ((1.0, 3.0) if has_null(kinds) else (1.0,))}
        for name, kinds in PAIRS.items()
    }
    return draw_elsewhere(exported[0], calls, [one.initial_seed() for one in image_generators(SEED, range(2))])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kinds"), [*PAIRS.items()], ids=PAIRS)
def test_folder_draws_our_images_without_this_package(exported, elsewhere, name, kinds):
    root, made = exported
    for scale in (1.0, 3.0) if has_null(kinds) else (1.0,):
        ours = drawn_here(made[name], kinds, root / name, scale)
        assert ours.std() > 0.05  # not clipped to one value
        np.testing.assert_allclose(ours, elsewhere[name][str(scale)], atol=2e-4)  # float32 rounding over the steps
    assert elsewhere[name]["card"].shape[1:3] == (SIZE, SIZE)


@pytest.mark.parametrize(("name", "kinds"), [*PAIRS.items()], ids=PAIRS)
def test_folder_is_imported_as_it_was_and_goes_out_again(exported, tmp_path, name, kinds):
    root, made = exported
    again = Denoiser(**vars(import_pipeline(root / name / "pipeline")))
    assert denoiser_record(again)["conditions"] == denoiser_record(made[name])["conditions"]
    before, after = (drawn_here(one, kinds, root / name, 1.0) for one in (made[name], again))
    np.testing.assert_allclose(before, after, atol=2e-4)
    export_pipeline(again, tmp_path / "pipeline")
    index, index_again = (folder / "model_index.json" for folder in (root / name / "pipeline", tmp_path / "pipeline"))
    assert json.loads(index.read_text()) == json.loads(index_again.read_text())


@pytest.mark.parametrize(("name", "kinds"), [*PAIRS.items()], ids=PAIRS)
def test_each_condition_decides_what_is_drawn(exported, tmp_path, name, kinds):
    root, made = exported
    before = drawn_here(made[name], kinds, root / name, 1.0)
    files = {"map": "map.png", "pair": "paired.png", "mask": "image.png",
             "small": "small_image.png" if "mask" in kinds else "image.png"}  # fmt: skip
    for kind in {*kinds} & {*files}:
        write_files(kinds, tmp_path)
        shifted = np.roll(np.asarray(Image.open(tmp_path / files[kind])), 1, axis=1)
        Image.fromarray(shifted).save(tmp_path / files[kind])
        assert np.abs(before - drawn_here(made[name], kinds, tmp_path, 1.0)).max() > 1e-3, kind


def test_two_conditions_that_would_take_the_same_image_are_refused_with_the_fix():
    unet = DenoiserUNet(12, (8, 16), out_channels=4, norm_num_groups=4, num_class_embeds=1000)
    with pytest.raises(
        ValueError, match="draws without the mask that MaskedImage needs; set its option to small_image"
    ):
        DiffusionModule(unet, NoiseSchedule(100), conditions=[MaskedImage(5), LowResolution(3)])


def test_small_image_beside_a_mask_must_have_the_size_of_what_is_denoised(exported):
    name = "small and mask"
    pipeline = _build_pipeline(exported[1][name])
    picture = Image.new("RGB", (SIZE, SIZE))
    with pytest.raises(ValueError, match=r"small_image must be \(N, 3, 8, 8\), got \(1, 3, 16, 16\)"):
        pipeline(image=picture, mask_image=picture.convert("L"), small_image=picture)
