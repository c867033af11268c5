import functools
import inspect
import json
import os
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from elsewhere import draw_elsewhere

from unet_diffusion.diffusers_io import exporting
from unet_diffusion.diffusers_io.exporting import export_pipeline
from unet_diffusion.diffusers_io.importing import from_diffusers, import_pipeline
from unet_diffusion.diffusers_io.pipelines.conditional import ConditionalPipeline
from unet_diffusion.diffusion.guidance import Guidance
from unet_diffusion.diffusion.sampling import image_generators, sample
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.loading import load_denoiser
from unet_diffusion.inference.record import denoiser_record, save_denoiser
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.latents.space import LatentSpace, fingerprint
from unet_diffusion.models.autoencoders import kl_autoencoder, vq_autoencoder
from unet_diffusion.models.denoiser_unet import DenoiserUNet

SEED = 3
NUM_IMAGES = 3
LABELS = [0, 1, 1]
NAMES = ["cat", "dog"]
NULL_LABEL = 2
BOTH = {"inputs": {"labels": torch.tensor(LABELS)}, "unconditional": {"labels": torch.full((3,), NULL_LABEL)}}


def tiny_denoiser(*, classes: bool, **options) -> Denoiser:
    torch.manual_seed(0)
    count = 3 if classes else None
    model = DenoiserUNet(
        1, (8, 16), norm_num_groups=4, layers_per_block=1, attention_levels=(1,), num_class_embeds=count, dropout=0.1
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Denoiser(
        unet=model.eval(),
        schedule=NoiseSchedule(100, "squaredcos_cap_v2", prediction_type="v_prediction"),
        sample_shape=(1, 8, 4),
        null_label=NULL_LABEL if classes else None,
        class_names=NAMES if classes else None,
        settings={"model": {"lr": 0.5}, "note": "größer"},
        **options,
    )


def latent_denoiser(folder, kind: str) -> Denoiser:
    """A denoiser of latents by classes, whose autoencoder is in the folder."""
    torch.manual_seed(0)
    options = {"latent_channels": 1, "layers_per_block": 1, "mid_attention": False, "norm_num_groups": 4}
    make = functools.partial(vq_autoencoder, num_codes=64) if kind == "vq" else kl_autoencoder
    autoencoder = make(3, (8, 8), **options)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    autoencoder.save_pretrained(folder / "autoencoder")
    space = LatentSpace(
        str(folder / "autoencoder"),
        fingerprint(autoencoder, autoencoder.config),
        image_shape=(3, 16, 8),
        downsampling=2,
        mean=(0.0 if kind == "vq" else 0.3,),
        std=(0.7,),
    )
    return tiny_denoiser(classes=True, codec=LatentCodec.of(space))


def images_elsewhere(trained: Denoiser, folder, calls: dict) -> dict:
    """Images that an exported folder makes in a process without this package, by name of the call."""
    export_pipeline(trained, folder / "one" / "pipeline")
    seeds = [generator.initial_seed() for generator in image_generators(SEED, range(NUM_IMAGES))]
    return draw_elsewhere(folder, {"one": calls}, seeds)["one"]


@pytest.fixture(scope="module")
def unconditional_elsewhere(tmp_path_factory) -> dict:
    calls = {"plain": {"batch_size": NUM_IMAGES, "num_inference_steps": 5}}
    return images_elsewhere(tiny_denoiser(classes=False), tmp_path_factory.mktemp("unconditional"), calls)


@pytest.fixture(scope="module")
def class_conditional_elsewhere(tmp_path_factory) -> dict:
    calls = {
        "numbers": {"class_labels": LABELS, "num_inference_steps": 5},
        "names": {"class_labels": [NAMES[label] for label in LABELS], "num_inference_steps": 5},
        "guided": {"class_labels": LABELS, "num_inference_steps": 5, "guidance_scale": 3.0},
    }
    return images_elsewhere(tiny_denoiser(classes=True), tmp_path_factory.mktemp("class_conditional"), calls)


def images_here(trained: Denoiser, **options) -> np.ndarray:
    """What our sampler makes, in the range and layout of a pipeline's arrays."""
    options = {"scheduler": "DDPMScheduler", "num_inference_steps": 5, "seed": SEED, **options}
    images = sample(trained.unet, trained.schedule, (NUM_IMAGES, *trained.sample_shape), **options)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def decoded_here(trained: Denoiser, **options) -> np.ndarray:
    """What our sampler and the autoencoder make, as `images_here`."""
    options = {"num_inference_steps": 5, "seed": SEED, "clip_sample": False, **options}
    latents = sample(trained.unet, trained.schedule, (NUM_IMAGES, *trained.sample_shape), **options)
    images = LatentCodec.of(trained.codec.space).decode(latents)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def assert_same_images(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.std() > 0.1  # not clipped to one value
    # float32 rounding over the steps, in batches of another layout
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_unconditional_folder_makes_our_images_without_this_package(unconditional_elsewhere):
    assert_same_images(images_here(tiny_denoiser(classes=False)), unconditional_elsewhere["plain"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "guidance_scale"), [("numbers", 1.0), ("guided", 3.0)])
def test_class_conditional_folder_makes_our_images_without_this_package(
    class_conditional_elsewhere, name, guidance_scale
):
    options = {**BOTH, "guidance": Guidance(guidance_scale)}
    assert_same_images(images_here(tiny_denoiser(classes=True), **options), class_conditional_elsewhere[name])


@pytest.mark.slow
def test_class_conditional_folder_takes_names_for_labels(class_conditional_elsewhere):
    assert np.array_equal(class_conditional_elsewhere["names"], class_conditional_elsewhere["numbers"])


@pytest.mark.slow
def test_guidance_of_the_class_conditional_folder_does_something(class_conditional_elsewhere):
    images = class_conditional_elsewhere
    assert np.abs(images["guided"] - images["numbers"]).max() > 1e-2


@pytest.mark.slow
def test_python_of_the_model_card_runs(unconditional_elsewhere, class_conditional_elsewhere):
    assert len(unconditional_elsewhere["card"]) == 4
    assert len(class_conditional_elsewhere["card"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_class_conditional_folder_of_latents_makes_our_images_without_this_package(tmp_path, kind):
    trained = latent_denoiser(tmp_path, kind)
    calls = {"guided": {"class_labels": LABELS, "num_inference_steps": 5, "guidance_scale": 3.0}}
    images = images_elsewhere(trained, tmp_path, calls)
    assert_same_images(decoded_here(trained, **BOTH, guidance=Guidance(3.0)), images["guided"])
    assert images["card"].shape == (2, 16, 8, 3)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_exported_folder_of_latents_is_imported_again(tmp_path, kind):
    trained = latent_denoiser(tmp_path, kind)
    export_pipeline(trained, tmp_path / "pipeline")
    again = import_pipeline(tmp_path / "pipeline")
    assert (again.null_label, again.class_names) == (NULL_LABEL, NAMES)
    assert again.codec.space.image_shape == (3, 16, 8)
    assert_same_images(decoded_here(trained, **BOTH), decoded_here(again, **BOTH))


def test_autoencoder_with_a_scale_for_each_channel_keeps_it_alone(tmp_path):
    autoencoder = kl_autoencoder(3, (8, 8), latent_channels=2, layers_per_block=1, norm_num_groups=4)
    moments = {"latents_mean": [0.5, -1.0], "latents_std": [2.0, 0.25]}
    autoencoder.register_to_config(scaling_factor=1.0, **moments)
    Autoencoder(autoencoder, (3, 16, 16)).export(tmp_path / "autoencoder")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "autoencoder")
    assert {name: again.config[name] for name in moments} == moments


def test_folder_whose_autoencoder_loads_as_another_does_not_get_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "normalised_autoencoder", lambda autoencoder, *_: autoencoder)
    trained = latent_denoiser(tmp_path, "kl")
    with pytest.raises(RuntimeError, match="decoded images differ by"):
        export_pipeline(trained, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_class_conditional_pipeline_makes_our_images_with_any_scheduler(tmp_path, scheduler):
    trained = tiny_denoiser(classes=True)
    trained.schedule = NoiseSchedule(100, prediction_type="v_prediction")
    export_pipeline(trained, tmp_path / "pipeline")
    pipeline = load_here(tmp_path / "pipeline")
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    generator = image_generators(SEED, range(NUM_IMAGES))
    options = {"num_inference_steps": 5, "generator": generator, "output_type": "np"}
    theirs = pipeline(class_labels=LABELS, guidance_scale=2.0, **options).images
    options = {"scheduler": scheduler, **BOTH, "guidance": Guidance(2.0)}
    assert_same_images(images_here(trained, **options), theirs)


def load_here(folder) -> ConditionalPipeline:
    """The pipeline from its components: in this process its class is importable, and no custom code is run."""
    index = json.loads((folder / "model_index.json").read_text())
    pipeline = ConditionalPipeline(
        UNet2DModel.from_pretrained(folder / "unet"),
        DDPMScheduler.from_pretrained(folder / "scheduler"),
        class_names=index["class_names"],
        unconditional=index["unconditional"],
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_pipeline(**changes) -> ConditionalPipeline:
    trained = tiny_denoiser(classes=True)
    options = {"unconditional": {"class_labels": NULL_LABEL}, "class_names": NAMES, **changes}
    unet = exporting.to_diffusers(trained.unet, sample_size=(8, 4))
    pipeline = ConditionalPipeline(unet, DDPMScheduler(**exporting.scheduler_config(trained.schedule)), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_pipeline_returns_what_is_asked_for():
    pipeline = tiny_pipeline()
    made = {
        kind: pipeline(
            class_labels="dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type=kind
        ).images
        for kind in ("pil", "np", "pt")
    }
    assert made["pt"].shape == (1, 1, 8, 4)
    assert np.array_equal(made["np"][0, ..., 0], made["pt"][0, 0].numpy())
    assert made["pil"][0].size == (4, 8)
    assert np.array_equal(np.asarray(made["pil"][0]), (255 * made["np"][0, ..., 0]).round().astype(np.uint8))
    assert isinstance(pipeline(class_labels=1, num_inference_steps=2, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("'bird'", {"class_labels": "bird"}),
        ("numbers from 0 to 1, got 7", {"class_labels": 7}),
        ("numbers from 0 to 1, got -1", {"class_labels": [0, -1]}),
        ("output_type.*'jpg'", {"class_labels": 0, "output_type": "jpg"}),
        ("class_labels must be given to this model, which takes class_labels", {}),
        ("prompt must be left out for this model, which takes class_labels", {"class_labels": 0, "prompt": "a cat"}),
        ("must have 1 or 3 values, got 2 of class_labels", {"class_labels": [0, 1], "batch_size": 3}),
        ("generator must be one, or a list of 2", {"class_labels": [0, 1], "generator": [torch.Generator()]}),
        ("multiples of 2, got 8 and 5", {"class_labels": 0, "width": 5}),
        (r"latents must have the shape \(1, 1, 8, 4\)", {"class_labels": 0, "latents": torch.zeros(1, 1, 4, 8)}),
    ],
)
def test_pipeline_refuses_what_it_does_not_know(message, options):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**options)


def test_pipeline_without_nulls_refuses_guidance():
    with pytest.raises(ValueError, match=r"guidance_scale must be 1, got 2\.0"):
        tiny_pipeline(unconditional=None)(class_labels=0, guidance_scale=2.0)


def test_pipeline_draws_other_sizes_and_many_of_one_class():
    options = {"num_inference_steps": 2, "output_type": "latent"}
    assert tiny_pipeline()(class_labels=0, batch_size=3, height=6, width=12, **options).images.shape == (3, 1, 6, 12)


@pytest.mark.parametrize("vae", [None, "kl", "vq"])
def test_pipeline_runs_in_bfloat16(tmp_path, vae):
    pipeline = tiny_pipeline(vae=vae and LatentCodec.of(latent_denoiser(tmp_path, vae).codec.space).autoencoder)
    pipeline.to(torch.bfloat16)
    images = pipeline(class_labels=LABELS, num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
    assert images.dtype == torch.float32
    assert images.isfinite().all()


@pytest.mark.parametrize("classes", [False, True])
def test_exported_folder_is_imported_again_as_it_was(tmp_path, classes):
    trained = tiny_denoiser(classes=classes)
    export_pipeline(trained, tmp_path / "pipeline")
    again = import_pipeline(tmp_path / "pipeline")
    # settings are for people, in the model card; dropout is for training
    assert denoiser_record(again) == denoiser_record(trained) | {"settings": {}}
    torch.testing.assert_close(again.unet.state_dict(), trained.unet.state_dict(), rtol=0, atol=0)


def test_import_says_which_settings_of_the_sampler_are_not_kept(tmp_path):
    export_pipeline(tiny_denoiser(classes=False), tmp_path / "folder")
    path = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "variance_type": "fixed_large"}))
    with pytest.warns(UserWarning, match="variance_type fixed_large"):
        import_pipeline(tmp_path / "folder")


def test_network_folder_holds_nothing_of_ours(tmp_path):
    export_pipeline(tiny_denoiser(classes=True), tmp_path / "pipeline")
    config = json.loads((tmp_path / "pipeline" / "unet" / "config.json").read_text())
    fields = inspect.signature(UNet2DModel.__init__).parameters
    assert {key for key in config if not key.startswith("_")} <= fields.keys()
    assert config["_class_name"] == "UNet2DModel"


def test_every_field_of_the_scheduler_is_written_out(tmp_path):
    export_pipeline(tiny_denoiser(classes=False), tmp_path / "pipeline")
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "pipeline").scheduler
    assert not scheduler.config.get("_use_default_values")


def test_model_card_says_how_to_load_and_how_it_was_trained(tmp_path):
    export_pipeline(tiny_denoiser(classes=True), tmp_path / "pipeline")
    card = (tmp_path / "pipeline" / "README.md").read_text(encoding="utf-8")
    front_matter = yaml.safe_load(card.split("---")[1])
    assert front_matter["library_name"] == "diffusers"
    assert "license" not in front_matter
    assert "trust_remote_code=True" in card
    assert "cat, dog" in card
    settings = card.split("Settings:\n```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(settings) == {"model": {"lr": 0.5}, "note": "größer"}


@pytest.mark.parametrize("names", [None, ["a", "b"], ["diffusers", "UNet2DModel"]])
def test_class_names_are_not_taken_for_a_component(tmp_path, names):
    trained = tiny_denoiser(classes=True)
    trained.class_names = names
    export_pipeline(trained, tmp_path / "pipeline")
    assert import_pipeline(tmp_path / "pipeline").class_names == names


def test_existing_folder_is_not_overwritten(tmp_path):
    folder = tmp_path / "pipeline"
    export_pipeline(tiny_denoiser(classes=False), folder)
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_pipeline(tiny_denoiser(classes=True), folder)
    assert import_pipeline(folder).class_names is None
    export_pipeline(tiny_denoiser(classes=True), folder, overwrite=True)
    assert import_pipeline(folder).class_names == NAMES
    assert os.listdir(tmp_path) == ["pipeline"]


def test_folder_with_files_of_others_is_never_overwritten(tmp_path):
    trained, folder = tiny_denoiser(classes=False), tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not exported there \(model_index\.json\)"):
        export_pipeline(trained, folder, overwrite=True)
    assert (folder / "model_index.json").read_text() == "mine"
    (folder / "model_index.json").unlink()
    export_pipeline(trained, folder, overwrite=True)
    (folder / "unet" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not exported there \(unet/notes\.txt\)"):
        export_pipeline(trained, folder, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="must be a folder to export to, and is a file"):
        export_pipeline(trained, tmp_path / "file", overwrite=True)


def test_exported_files_have_the_mode_of_all_files(tmp_path):
    before = os.umask(0o027)
    try:
        export_pipeline(tiny_denoiser(classes=False), tmp_path / "pipeline")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "pipeline").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_what_killed_exports_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = int(ended.stdout)
    for name in (f".pipeline.{dead}.partial", f".pipeline.{os.getppid()}.partial", f".pipelines.{dead}.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    (tmp_path / f".pipeline.replaced.{dead}.partial").mkdir()
    (tmp_path / f".pipeline.replaced.{dead}.partial" / "mine.txt").write_text("mine")  # killed between two renames
    with pytest.raises(FileExistsError, match=r"not exported there \(mine\.txt\)"):
        export_pipeline(tiny_denoiser(classes=False), tmp_path / "pipeline", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [
        f".pipeline.{os.getppid()}.partial", f".pipelines.{dead}.partial", "pipeline"
    ]  # fmt: skip


def test_folder_that_loads_as_something_else_does_not_get_its_name(tmp_path, monkeypatch):
    def to_other(model, sample_size):
        other = interop_to_diffusers(model, sample_size)
        with torch.no_grad():
            other.conv_out.bias.add_(1)
        return other

    interop_to_diffusers = exporting.to_diffusers
    monkeypatch.setattr(exporting, "to_diffusers", to_other)
    with pytest.raises(RuntimeError, match="nothing was exported"):
        export_pipeline(tiny_denoiser(classes=False), tmp_path / "pipeline")
    assert os.listdir(tmp_path) == []


def test_network_in_training_mode_is_exported_as_it_evaluates(tmp_path):
    trained = tiny_denoiser(classes=False)
    trained.unet.train()
    export_pipeline(trained, tmp_path / "pipeline")
    assert trained.unet.training
    assert not from_diffusers(tmp_path / "pipeline").training


def test_denoiser_is_loaded_from_checkpoint_run_folder_and_pipeline(tmp_path):
    trained = tiny_denoiser(classes=True)
    save_denoiser(trained, tmp_path / "run" / "checkpoints" / "last.ckpt")
    export_pipeline(trained, tmp_path / "run" / "pipeline")
    for path in ("run/checkpoints/last.ckpt", "run", "run/pipeline"):
        loaded = load_denoiser(tmp_path / path)
        torch.testing.assert_close(loaded.unet.state_dict(), trained.unet.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_path_without_denoiser_says_what_was_looked_for(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"{name}.*checkpoints/last\.ckpt.*model_index\.json"):
        load_denoiser(tmp_path / name)
