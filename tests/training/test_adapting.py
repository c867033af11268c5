"""Fine-tuning of a tiny Stable Diffusion of the real build with adapters, from `fit` to stock diffusers."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from denoisers import CAPTIONS, WIDTH, WORDS, save_stable_diffusion, shorten
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import unet_diffusion as ud
import unet_diffusion.data as ud_data
from unet_diffusion.diffusers_io.adapter_files import LORA_FILE
from unet_diffusion.diffusers_io.values_file import write_values
from unet_diffusion.diffusion.adapters.adapter import TrainedAdapter
from unet_diffusion.diffusion.sampling import build_scheduler, image_generators
from unet_diffusion.inference import reading
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.training.adapting import AdapterModule

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, SEED = 4, 5


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("base") / "stable_diffusion")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """24 images of noise with captions."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = ["file_name,text"]
    for number in range(24):
        Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
        rows.append(f"{number:02d}.png,{WORDS[number % len(WORDS)]}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def fit(run_cli, base, images, tmp_path):
    """Fine-tunes the base by a recipe for a few steps, with further options, and returns the run folder."""

    def run(name: str, *options, steps: int = 3) -> Path:
        recipe = yaml.safe_load((CONFIGS / "adapters" / f"{name}.yaml").read_text())
        recipe["model"] |= {"base": str(base), "ema_decay": 0.5}
        recipe["model"]["optimizer"]["init_args"]["lr"] = 0.05
        recipe["data"]["init_args"]["source"]["init_args"] |= {"root": str(images), "image_size": 16}
        recipe["data"]["init_args"] |= {"batch_size": 4, "num_val": 2}
        shorten(recipe, tmp_path / "run", steps=steps)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        status, _, err = run_cli("fit", "--config", tmp_path / "recipe.yaml", *options)
        assert status == 0, err
        return tmp_path / "run"

    return run


def pipeline_of(folder: Path) -> StableDiffusionPipeline:
    """The stock pipeline in a folder, with the sampler that we draw with."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = build_scheduler(ud.load(folder).schedule, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_images(pipeline: StableDiffusionPipeline, captions=CAPTIONS) -> np.ndarray:
    generators = image_generators(SEED, range(len(captions)))
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "generator": generators, "output_type": "np"}
    return pipeline(captions, **options).images


def our_images(denoiser: ud.Denoiser, captions=CAPTIONS) -> np.ndarray:
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "scheduler": "DDIMScheduler", "seed": SEED}
    images = denoiser.sample(len(captions), captions=captions, **options)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def assert_same_images(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.std() > 0.05  # not clipped to one value
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- LoRA

LORA = ("--model.adapter", "lora", "--model.adapter.rank", "3", "--model.adapter.alpha", "6")


def test_run_of_lora_draws_in_stock_diffusers_what_it_draws_here(fit, base, tmp_path, run_cli):
    run = fit("lora", *LORA, "--model.adapter.text_encoder", "true")
    ours = our_images(ud.load(run))
    assert np.abs(ours - our_images(ud.load(base))).max() > 0.05  # it has learnt something
    attached = pipeline_of(base)
    attached.load_lora_weights(run / "adapter")
    assert_same_images(ours, their_images(attached))
    status, _, err = run_cli("export", run, tmp_path / "merged")
    assert status == 0, err
    assert_same_images(ours, their_images(pipeline_of(tmp_path / "merged")))
    status, _, err = run_cli("export", run, tmp_path / "adapter", "--format", "adapter")
    assert status == 0, err
    at_the_end, exported = (load_file(one / "adapter" / LORA_FILE) for one in (run, tmp_path))
    assert at_the_end.keys() == exported.keys()
    assert all(torch.equal(value, exported[name]) for name, value in at_the_end.items())


def test_checkpoint_of_lora_holds_the_adapter_and_its_average_alone(fit):
    run = fit("lora", *LORA)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    assert all(".lora_A.default.weight" in name or ".lora_B.default.weight" in name for name in names)
    assert {name for name in names if name.startswith("ema_")} == {
        f"ema_{name}" for name in names if not name.startswith("ema_")
    }
    raw = checkpoint["state_dict"]
    moved = [not torch.equal(raw[name], raw[f"ema_{name}"]) for name in names if not name.startswith("ema_")]
    assert any(moved)
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 300_000  # the base has 1.4 MB


def test_weights_of_a_run_are_those_of_the_base_plus_alpha_over_rank_b_a(fit, base):
    run = fit("lora", *LORA)
    averaged = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    before, after = ud.load(base).unet.state_dict(), ud.load(run).unet.state_dict()
    num_changed = 0
    for name, weight in before.items():
        a = averaged.get(f"ema_unet.{name.removesuffix('.weight')}.lora_A.default.weight")
        if a is None:
            assert torch.equal(after[name], weight), name
            continue
        b = averaged[f"ema_unet.{name.removesuffix('.weight')}.lora_B.default.weight"]
        torch.testing.assert_close(after[name], weight + 6 / 3 * b @ a)
        num_changed += 1
    assert num_changed == 4 * 2 * 4  # projections, attentions, transformers


def test_adapter_beside_the_weights_draws_what_it_draws_in_them(base):
    torch.manual_seed(0)
    module = AdapterModule(str(base), ud.LoRA(2))
    with torch.no_grad():
        for name, parameter in module.ema_unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    module.sample_shape = (4, 8, 8)
    attached = module.trained
    assert attached.merged().unet.state_dict().keys() == ud.load(base).unet.state_dict().keys()
    np.testing.assert_allclose(our_images(attached), our_images(attached.merged()), atol=1e-4)  # of float32 sums
    assert attached.unet is module.ema_unet


def test_run_of_lora_goes_on_bit_for_bit(check_resuming, base, images):
    def make_module():
        torch.manual_seed(0)
        return AdapterModule(str(base), ud.LoRA(2, dropout=0.1), ema_decay=0.5)

    def make_data():
        source = ud_data.Folder(images, image_size=16, channels=3, captions=True)
        return ud.ImageDataModule(source, batch_size=4, num_val=2, num_workers=0)

    check_resuming(make_module, make_data)


def test_run_of_lora_goes_on_by_the_same_command_and_is_evaluated(fit, tmp_path, run_cli):
    run = fit("lora", *LORA)
    again = ["fit", "--config", tmp_path / "recipe.yaml", *LORA, "--trainer.max_steps", "5"]
    evaluate = ["evaluate", run, "--num_images", "10", "--device", "cpu", "--output", tmp_path / "evaluation"]
    for arguments in (again, evaluate, ["check", "--config", tmp_path / "recipe.yaml", *LORA]):
        status, _, err = run_cli(*arguments)
        assert status == 0, err
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


def test_gradient_checkpointing_trains_the_same_adapter(base, images, quiet_trainer):
    trained = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        module = AdapterModule(str(base), ud.LoRA(2), gradient_checkpointing=recomputes)
        data = ud.ImageDataModule(
            ud_data.Folder(images, image_size=16, channels=3, captions=True), batch_size=4, num_val=2, num_workers=0
        )
        quiet_trainer(max_steps=2, limit_val_batches=0).fit(module, data)
        trained.append(module.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_module_is_loaded_from_its_checkpoint(fit):
    run = fit("lora", *LORA)
    module = AdapterModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert module.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    assert module.adapter.config["rank"] == 3


def test_value_range_is_that_of_the_base(fit, base, tmp_path, run_cli):
    shutil.copytree(base, tmp_path / "base")
    for folder in (tmp_path / "base", tmp_path / "base" / "vae"):
        write_values(PixelValues("uint8", 0, 200), folder)
    (tmp_path / "dark").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(200, size=(16, 16, 3), dtype=np.uint8)).save(tmp_path / "dark" / f"{number}.png")
        (tmp_path / "dark" / f"{number}.txt").write_text("a caption")
    places = ["--model.base", tmp_path / "base", "--data.root", tmp_path / "dark"]
    run = fit("lora", *LORA, *places, "--data.value_range", "[0,200]")
    module = AdapterModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert module.values.value_range == ud.load(run).values.value_range == (0, 200)
    others = [*LORA, *places, "--trainer.default_root_dir", tmp_path / "other"]
    status, _, err = run_cli("fit", "--config", tmp_path / "recipe.yaml", *others)
    assert (status, "and the data have 0 to 255; set data.value_range to [0" in err) == (1, True), err


def test_missing_and_changed_bases_are_named(fit, base, tmp_path, run_cli):
    shutil.copytree(base, tmp_path / "moved")
    run = fit("lora", *LORA, "--model.base", tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"last.ckpt holds an adapter of .*moved, which is needed too"):
        ud.load(run)
    (tmp_path / "away").rename(tmp_path / "moved")
    ud.load(run)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "moved" / "unet")
    with torch.no_grad():
        unet.conv_in.bias[0] += 1e-3
    unet.save_pretrained(tmp_path / "moved" / "unet")
    with pytest.raises(ValueError, match=r"an adapter of .*moved, which was trained further or replaced since"):
        ud.load(run)
    status, _, err = run_cli("fit", "--config", tmp_path / "recipe.yaml", *LORA, "--model.base", tmp_path / "moved",
                             "--trainer.max_steps", "5")  # fmt: skip
    assert status != 0
    assert "base was" in err


def test_base_on_the_hub_is_read_by_its_name(base, images, monkeypatch, tmp_path, quiet_trainer):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "download", lambda name: asked.append(str(name)) or base)
    module = AdapterModule("hf://someone/model", ud.LoRA(rank=2), ema_decay=0)
    assert module.base_record["path"] == "hf://someone/model"
    source = ud_data.Folder(str(images), image_size=16, captions=True)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, ud_data.ImageDataModule(source, batch_size=4, num_val=2))
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    assert ud.load(tmp_path / "adapter.ckpt").adapter is not None
    assert asked == ["hf://someone/model"] * 2


def test_card_names_a_base_on_the_hub_with_its_owner(base, images, monkeypatch, tmp_path, quiet_trainer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "download", lambda name: base)
    module = AdapterModule("someone/model", ud.LoRA(rank=2), ema_decay=0)
    source = ud_data.Folder(str(images), image_size=16, captions=True)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, ud_data.ImageDataModule(source, batch_size=4, num_val=2))
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    (tmp_path / "someone" / "model").mkdir(parents=True)  # by now the bare name would be a folder
    ud.load(tmp_path / "adapter.ckpt").export(tmp_path / "pipeline")
    assert "base: hf://someone/model\n" in (tmp_path / "pipeline" / "README.md").read_text()


def test_run_of_a_base_on_the_hub_takes_its_bare_name(fit, base, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "download", lambda name: base)
    run = fit("lora", *LORA, "--model.base", "someone/model")
    ud.load(run).export(tmp_path / "pipeline")
    assert "base: hf://someone/model\n" in (tmp_path / "pipeline" / "README.md").read_text()


MY_NETWORK = """
from unet_diffusion import DenoiserUNet

class Mine(DenoiserUNet):
    pass
"""


@pytest.fixture
def own_base(tmp_path, monkeypatch) -> Path:
    """The checkpoint of a denoiser whose network is a class of the user's module `my_network`."""
    (tmp_path / "my_network.py").write_text(MY_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_network", raising=False)
    from my_network import Mine

    torch.manual_seed(0)
    unet = Mine(3, (8, 16), attention_levels=(1,), norm_num_groups=4, layers_per_block=1)
    ud.Denoiser(unet, ud.NoiseSchedule(100), (3, 16, 16)).save(tmp_path / "base.ckpt")
    return tmp_path / "base.ckpt"


def test_base_of_classes_of_ones_own_is_read_if_their_module_is_allowed(own_base, images, quiet_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"allow it with --allow my_network, or allow=\['my_network'\]"):
        AdapterModule(str(own_base), ud.LoRA(2))
    module = AdapterModule(str(own_base), ud.LoRA(2), allow=["my_network"])
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, ud_data.ImageDataModule(ud_data.Folder(str(images), image_size=16), batch_size=4, num_val=2))
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    assert type(ud.load(tmp_path / "adapter.ckpt", allow=["my_network"]).unet).__name__ == "Mine"


def test_option_allow_of_a_run_is_also_for_the_classes_of_its_base(fit, own_base, run_cli, tmp_path):
    mine = ["--model.base", own_base, "--data.captions", "false"]
    run = fit("lora", *LORA, *mine, "--allow", "my_network")
    assert type(ud.load(run, allow=["my_network"]).unet).__name__ == "Mine"
    status, _, err = run_cli("fit", "--config", tmp_path / "recipe.yaml", *mine, "--model.allow", "[my_network]")
    assert status != 0
    assert "a configuration may not allow modules; if you trust it, add --allow my_network" in err


def damage(folder: Path) -> None:
    """Make the change in a file smaller, as a scale that is lost would."""
    file = folder / LORA_FILE
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: value * 0.7 for name, value in load_file(file).items()}, file, metadata)


def test_adapter_is_read_again_before_it_gets_its_name(fit, tmp_path, monkeypatch):
    denoiser = ud.load(fit("lora", *LORA, "--model.adapter.text_encoder", "true"))
    denoiser.export(tmp_path / "adapter", format="adapter")
    write = ud.LoRA.save_pretrained

    def write_wrongly(self, unet, weights, folder):
        write(self, unet, weights, folder)
        damage(folder)

    monkeypatch.setattr(ud.LoRA, "save_pretrained", write_wrongly)
    with pytest.raises(RuntimeError, match="must be read as it was written"):
        denoiser.export(tmp_path / "damaged", format="adapter")
    assert not (tmp_path / "damaged").exists()


def test_error_of_the_last_export_of_a_run_is_not_hidden(fit, monkeypatch):
    def broken(*arguments):
        raise ValueError("the disk has a hole")

    monkeypatch.setattr(ud.LoRA, "save_pretrained", broken)
    with pytest.raises(AssertionError, match="the disk has a hole"):
        fit("lora", *LORA)


def test_adapter_that_no_pipeline_loads_is_exported_whole(tmp_path, tiny_unet):
    unet = ud.DenoiserUNet(3, (8, 16), attention_levels=(1,), norm_num_groups=4)
    denoiser = ud.Denoiser(unet, ud.NoiseSchedule(), (3, 8, 8))
    denoiser.adapter = TrainedAdapter(ud.LoRA(), {})
    with pytest.raises(ValueError, match=r"only pipelines of captions to latents load an adapter .* export the whole"):
        denoiser.export(tmp_path / "adapter", format="adapter")


def test_adapter_is_no_base(fit, tmp_path):
    run = fit("lora", *LORA)
    with pytest.raises(ValueError, match="holds an adapter, and a base must be a whole denoiser"):
        AdapterModule(str(run), ud.LoRA())


def test_lora_of_diffusers_draws_here_what_it_draws_there(base, tmp_path):
    pipeline = pipeline_of(base)
    torch.manual_seed(0)
    targets = ["to_q", "to_v", "ff.net.0.proj", "conv1", "proj_in"]  # more than we train
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights="gaussian"))
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj", "fc1"]), pipeline.text_encoder)
    with torch.no_grad():
        for network in (pipeline.unet, pipeline.text_encoder):
            for name, parameter in network.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
        **_collate_lora_metadata({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}),
    )
    fresh = pipeline_of(base)
    fresh.load_lora_weights(tmp_path)
    denoiser = ud.load(base)
    denoiser.load_lora_weights(tmp_path)
    assert_same_images(our_images(denoiser), their_images(fresh))
    assert np.abs(our_images(denoiser) - our_images(ud.load(base))).max() > 0.05
    none = ud.load(base)
    none.load_lora_weights(tmp_path, scale=0)
    np.testing.assert_allclose(our_images(none), our_images(ud.load(base)), atol=1e-5)


def test_lora_of_another_model_changes_nothing(base, tmp_path):
    weights = {"unet.nowhere.to_q.lora_A.weight": torch.ones(2, 8), "unet.nowhere.to_q.lora_B.weight": torch.ones(8, 2)}
    save_file(weights, tmp_path / "other.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "no.safetensors")
    denoiser, before = ud.load(base), ud.load(base)
    with pytest.raises(ValueError, match=r"other.safetensors cannot be put into this denoiser: .*nowhere.to_q"):
        denoiser.load_lora_weights(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds x"):
        denoiser.load_lora_weights(tmp_path / "no.safetensors")
    with pytest.raises(FileNotFoundError, match=r"a folder with pytorch_lora_weights.safetensors, got .*missing"):
        denoiser.load_lora_weights(tmp_path / "missing")
    for name, value in denoiser.unet.state_dict().items():
        assert torch.equal(value, before.unet.state_dict()[name]), name


def test_sample_draws_with_a_lora(fit, base, tmp_path, run_cli):
    run = fit("lora", *LORA)
    options = ["--captions", *CAPTIONS, "--num_images", "2", "--num_inference_steps", "2", "--device", "cpu"]
    for name, arguments in {"run": [run], "file": [base, "--lora", run / "adapter"], "plain": [base]}.items():
        status, _, err = run_cli("sample", *arguments, *options, "--output", tmp_path / name)
        assert status == 0, err
    pixels = {
        name: np.asarray(Image.open(tmp_path / name / "000000.png")).astype(int) for name in ("run", "file", "plain")
    }
    assert np.abs(pixels["run"] - pixels["file"]).max() <= 1
    assert np.abs(pixels["run"] - pixels["plain"]).max() > 5


def test_missing_peft_names_the_extra(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "unet-diffusion\[lora\]"'):
        AdapterModule(str(base), ud.LoRA())


def test_denoiser_without_attention_takes_no_lora(tmp_path, tiny_unet):
    network = tiny_unet(mid_attention=False)
    ud.Denoiser(network, ud.NoiseSchedule(10), (1, 8, 8)).save(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="DenoiserUNet has no attention, which LoRA changes"):
        AdapterModule(str(tmp_path / "plain.ckpt"), ud.LoRA())


# ------------------------------------------------------------------------------------------------- textual inversion

WORD = ("--model.adapter", "textual_inversion", "--model.adapter.placeholder_token", "<toy>",
        "--model.adapter.initializer_token", "cat")  # fmt: skip
CAPTIONS_WITH_WORD = ["a red <toy>", "two <toy> on a sofa"]


@pytest.fixture
def word_run(fit, images, tmp_path) -> Path:
    """A run whose captions say <toy> for cat."""
    shutil.copytree(images, tmp_path / "toys")
    table = tmp_path / "toys" / "metadata.csv"
    table.write_text(table.read_text().replace("cat", "<toy>"))
    return fit("textual_inversion", *WORD, "--data.root", tmp_path / "toys")


def test_run_of_textual_inversion_draws_in_stock_diffusers_what_it_draws_here(word_run, base, tmp_path, run_cli):
    ours = our_images(ud.load(word_run), CAPTIONS_WITH_WORD)
    with_word = pipeline_of(base)
    with_word.load_textual_inversion(word_run / "adapter")
    assert_same_images(ours, their_images(with_word, CAPTIONS_WITH_WORD))
    cats = [caption.replace("<toy>", "cat") for caption in CAPTIONS_WITH_WORD]
    assert np.abs(ours - our_images(ud.load(word_run), cats)).max() > 1e-3  # it is no cat any more
    assert_same_images(our_images(ud.load(base), cats), our_images(ud.load(word_run), cats))  # and other words stay
    status, _, err = run_cli("export", word_run, tmp_path / "whole")
    assert status == 0, err
    assert_same_images(ours, their_images(pipeline_of(tmp_path / "whole"), CAPTIONS_WITH_WORD))
    read = ud.load(base)
    assert read.load_textual_inversion(word_run / "adapter") == "<toy>"
    assert_same_images(ours, our_images(read, CAPTIONS_WITH_WORD))
    with pytest.raises(ValueError, match="the tokenizer has a token '<toy>' already"):
        read.load_textual_inversion(word_run / "adapter")


def test_checkpoint_of_textual_inversion_holds_one_vector_and_its_average(word_run, base):
    state = torch.load(word_run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        f"{prefix}conditions.0.encoder.embeddings.token_embedding.word": (WIDTH,) for prefix in ("", "ema_")
    }
    for name, value in ud.load(base).unet.state_dict().items():
        assert torch.equal(value, ud.load(word_run).unet.state_dict()[name]), name


def test_run_of_textual_inversion_is_saved_whole(word_run, tmp_path):
    ud.load(word_run).save(tmp_path / "whole.ckpt")
    drawn = (our_images(ud.load(path), CAPTIONS_WITH_WORD) for path in (word_run, tmp_path / "whole.ckpt"))
    assert_same_images(*drawn)


def test_captions_without_the_word_and_unknown_first_words_are_refused(fit, base, images, run_cli, tmp_path):
    with pytest.raises(AssertionError, match="no caption of the data has the new word <toy>"):
        fit("textual_inversion", *WORD)
    with pytest.raises(ValueError, match=r"initializer_token must be one token of the tokenizer, got 'zebra' of"):
        AdapterModule(str(base), ud.TextualInversion("<toy>", initializer_token="zebra"))


def test_speed_auto_times_a_network_that_is_frozen_as_a_whole(word_run, tmp_path, run_cli):
    arguments = ["--config", tmp_path / "recipe.yaml", *WORD, "--data.root", tmp_path / "toys", "--model.speed", "auto"]
    status, _, err = run_cli("fit", *arguments, "--trainer.default_root_dir", tmp_path / "timed")
    assert status == 0, err  # a trial that fails at every speed is an error
