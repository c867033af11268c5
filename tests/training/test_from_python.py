"""Modules as any Lightning project uses them, without the command line: load, test, predict, and what loggers get."""

import functools
import inspect

import pytest
import torch
import yaml
from denoisers import CAPTIONS, text_denoiser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from unet_diffusion.data import SegmentationDataModule, SyntheticCells
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.autoencoders import kl_autoencoder, reconstruct, vq_autoencoder
from unet_diffusion.models.discriminator import PatchDiscriminator
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.segmentation.labels import Targets
from unet_diffusion.training import AutoencoderModule, DiffusionModule, SegmentationModule
from unet_diffusion.training.adversarial import AdversarialLoss

SHAPE = (1, 16, 16)
SMALL = {"latent_channels": 2, "layers_per_block": 1, "norm_num_groups": 4, "mid_attention": False}
ADAM = functools.partial(torch.optim.Adam, lr=1.0e-2)


def cells() -> SegmentationDataModule:
    targets = Targets(label_format="instances")
    options = {"window_size": 32, "batch_size": 2, "windows_per_image": 2, "num_val": 2}
    return SegmentationDataModule(SyntheticCells(num_images=5), targets, **options)


@pytest.fixture
def made(tiny_module, tiny_images):
    """Makes a module of a task, and its data."""

    def make(task: str):
        torch.manual_seed(0)
        if task == "segmenter":
            unet = SegmentationUNet(1, 2, channels=(4, 8), padding="same")
            return SegmentationModule(unet, optimizer=ADAM, ema_decay=0.5, loss="both"), cells()
        if task == "denoiser":
            module = tiny_module(num_class_embeds=3, label_dropout=0.2, optimizer=ADAM, ema_decay=0.5)
            return module, tiny_images()
        adversarial = None
        if task == "kl":
            adversarial = AdversarialLoss(PatchDiscriminator(1, channels=32, num_layers=1), start=1)
        autoencoder = kl_autoencoder if task == "kl" else functools.partial(vq_autoencoder, num_codes=16)
        options = {"optimizer": ADAM, "ema_decay": 0.5, "learn_variance": True, "restart_codes_after": 2}
        module = AutoencoderModule(autoencoder(1, (8, 8), **SMALL), adversarial=adversarial, **options)
        return module, tiny_images(shape=SHAPE)

    return make


@pytest.fixture
def fitted(made, quiet_trainer, tmp_path):
    """Trains a module of a task for two steps; the module, its data and its checkpoint."""

    def fit(task: str, **options):
        module, data = made(task)
        trainer = quiet_trainer(max_steps=2, limit_val_batches=0, **options)
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module, data, tmp_path / "last.ckpt"

    return fit


TASKS = ["segmenter", "vq", "denoiser"]


@pytest.mark.parametrize("task", TASKS)
def test_module_comes_from_a_checkpoint_alone_with_raw_and_averaged_weights(fitted, task):
    module, _, path = fitted(task)
    loaded = type(module).load_from_checkpoint(path)
    assert type(loaded) is type(module)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    raw, average = loaded.network.state_dict(), loaded.ema_network.state_dict()
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    assert loaded.network.training
    assert not loaded.ema_network.training
    assert loaded.record() == module.record()
    assert (loaded.ema_decay, loaded.lr_decay, loaded.seed) == (0.5, "constant", 0)


def test_settings_of_a_task_come_from_the_checkpoint_or_from_the_call(fitted):
    segmenter, _, path = fitted("segmenter")
    assert SegmentationModule.load_from_checkpoint(path).loss == segmenter.loss == "both"
    assert SegmentationModule.load_from_checkpoint(path, loss="dice", ema_decay=0.25).loss == "dice"
    _, _, path = fitted("denoiser")
    denoiser = DiffusionModule.load_from_checkpoint(path, optimizer=ADAM)
    assert (denoiser.label_dropout, denoiser.null_label, denoiser.class_names) == (0.2, 2, ["cat", "dog"])
    assert denoiser.optimizer_factory is ADAM


def test_loaded_module_trains_on_bit_for_bit(made, quiet_trainer, tmp_path):
    saving = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"max_steps": 4, "limit_val_batches": 0, "enable_checkpointing": True}
    whole, data = made("denoiser")
    quiet_trainer(callbacks=[saving], **options).fit(whole, data)
    path = tmp_path / "steps" / "step=2.ckpt"
    loaded = DiffusionModule.load_from_checkpoint(path, optimizer=ADAM)
    quiet_trainer(**options).fit(loaded, made("denoiser")[1], ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_discriminator_is_there_again_with_its_settings(fitted):
    module, _, path = fitted("kl")
    loaded = AutoencoderModule.load_from_checkpoint(path)
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert (loaded.adversarial.start, loaded.adversarial.weight) == (1, 0.5)


def test_words_of_captions_are_there_again(tiny_unet, tiny_images, quiet_trainer, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    captions = [f"picture number {number}" for number in range(20)]
    monkeypatch.setattr(tiny_images, "entries", {"captions": captions})
    unet = tiny_unet(context_dim=8, attention_levels=[1], num_heads=2)
    text = TextTokens(context_dim=8, vocab_size=600, max_length=8, num_layers=1, num_heads=2)
    module, data = DiffusionModule(unet, NoiseSchedule(100), conditions=[text]), tiny_images(class_names=None)
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DiffusionModule.load_from_checkpoint(tmp_path / "last.ckpt")
    ids = [one.conditions[0].token_ids(["picture number 7"]) for one in (module, loaded)]
    torch.testing.assert_close(*ids, rtol=0, atol=0)


def test_checkpoint_of_another_task_or_with_code_is_refused(fitted, code, tmp_path):
    _, _, path = fitted("segmenter")
    with pytest.raises(ValueError, match="the checkpoint holds no denoiser"):
        DiffusionModule.load_from_checkpoint(path)
    torch.save({"denoiser": code(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="could run code"):
        DiffusionModule.load_from_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("task", TASKS)
def test_test_measures_what_validate_measures(fitted, quiet_trainer, task):
    module, data, path = fitted(task)
    validated = quiet_trainer().validate(module, data, verbose=False)[0]
    expected = {name.replace("val/", "test/"): score for name, score in validated.items()}
    loaded = type(module).load_from_checkpoint(path)
    for tested in (module, loaded):
        (scores,) = quiet_trainer().test(tested, data, verbose=False)
        assert scores == pytest.approx(expected)
    (scores,) = quiet_trainer().test(type(module).load_from_checkpoint(path), data, ckpt_path=path, verbose=False)
    assert scores.keys() == expected.keys()


def prepared(data):
    data.setup("fit")
    return data


def noise(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def test_segmenter_predicts_probabilities_of_images_of_any_size(fitted, quiet_trainer):
    _, _, path = fitted("segmenter")
    module = SegmentationModule.load_from_checkpoint(path)
    trainer = quiet_trainer()
    images = [{"images": noise(1, 40, 24)}, {"images": noise(1, 33, 33)}]
    batches = trainer.predict(module, DataLoader(images, batch_size=None))
    assert [[tuple(one.shape) for one in batch] for batch in batches] == [[(2, 40, 24)], [(2, 33, 33)]]
    torch.testing.assert_close(batches[0][0], module.maps(images[0]["images"]))
    torch.testing.assert_close(batches[0][0].sum(dim=0), torch.ones(40, 24))
    (whole,) = trainer.predict(module, DataLoader(TensorDataset(noise(2, 1, 32, 32)), batch_size=2))
    assert [tuple(one.shape) for one in whole] == [(2, 32, 32)] * 2
    (single,) = trainer.predict(module, DataLoader([images[0]["images"]], batch_size=None))
    assert torch.equal(single[0], batches[0][0])
    sizes = [noise(1, 40, 24), noise(1, 24, 32)]
    (listed,) = trainer.predict(module, DataLoader(sizes, batch_size=2, collate_fn=list))
    assert [tuple(one.shape[1:]) for one in listed] == [(40, 24), (24, 32)]
    (pairs,) = trainer.predict(module, DataLoader([(one, 0) for one in sizes], batch_size=2, collate_fn=list))
    assert all(torch.equal(*both) for both in zip(listed, pairs, strict=True))
    with pytest.raises(ValueError, match="a batch must be images, or a dict, list or tuple of them, got str"):
        trainer.predict(module, DataLoader(["image.png"], batch_size=None))
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), or \(C, H, W\) for one, got \(40, 24\)"):
        trainer.predict(module, DataLoader(images[0]["images"], batch_size=None))


@pytest.mark.parametrize("task", ["kl", "vq"])
def test_autoencoder_predicts_reconstructions(fitted, quiet_trainer, task):
    module, _, _ = fitted(task)
    images = noise(3, *SHAPE)
    (predicted,) = quiet_trainer().predict(module, DataLoader(images, batch_size=3))
    with torch.no_grad():
        expected = reconstruct(module.ema_autoencoder, images).clamp(-1, 1)
    torch.testing.assert_close(predicted, expected)


ASKED = [{"index": index, "labels": index % 2} for index in range(5)]


def test_denoiser_draws_the_images_of_sample(made, quiet_trainer):
    module, data = made("denoiser")
    module.bind_data(prepared(data))
    expected = module.trained.sample(5, labels=[0, 1]).clamp(-1, 1)
    (whole,) = quiet_trainer().predict(module, DataLoader(ASKED, batch_size=5))
    assert torch.equal(whole, expected)
    parts = quiet_trainer().predict(module, DataLoader(ASKED[3:] + ASKED[:3], batch_size=2))
    torch.testing.assert_close(torch.cat(parts), expected[[3, 4, 0, 1, 2]], rtol=0, atol=1e-5)  # rounding of batches
    names = [{"index": one["index"], "labels": ["cat", "dog"][one["labels"]]} for one in ASKED]
    (named,) = quiet_trainer().predict(module, DataLoader(names, batch_size=5))
    assert torch.equal(named, expected)


def test_denoiser_draws_for_a_loader_of_numbers(tiny_module, tiny_images, quiet_trainer):
    module = tiny_module(seed=3)
    module.bind_data(prepared(tiny_images(class_names=None)))
    (drawn,) = quiet_trainer().predict(module, DataLoader(range(4), batch_size=4))
    assert torch.equal(drawn, module.trained.sample(4, seed=3).clamp(-1, 1))


def test_denoiser_draws_captions_given_as_texts(tmp_path, quiet_trainer):
    pytest.importorskip("transformers")
    drawn_from = text_denoiser(tmp_path)
    module = DiffusionModule(
        drawn_from.unet, drawn_from.schedule, codec=drawn_from.codec, conditions=list(drawn_from.conditions)
    )
    module.sample_shape = drawn_from.sample_shape
    asked = [{"index": index, "captions": caption} for index, caption in enumerate(CAPTIONS)]
    (drawn,) = quiet_trainer().predict(module, DataLoader(asked, batch_size=2))
    assert torch.equal(drawn, module.trained.sample(2, captions=CAPTIONS).clamp(-1, 1))


def test_denoiser_that_paints_is_shown_the_images_of_the_batch(tiny_unet, tiny_images, quiet_trainer):
    unet = tiny_unet(in_channels=3, out_channels=1)
    module = DiffusionModule(unet, NoiseSchedule(100), conditions=[MaskedImage(2)])
    module.bind_data(prepared(tiny_images(class_names=None)))
    images = [{"index": index, "images": noise(1, 8, 8) * index} for index in range(3)]
    (whole,) = quiet_trainer().predict(module, DataLoader(images, batch_size=3))
    parts = quiet_trainer().predict(module, DataLoader(images, batch_size=1))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("items", "message"), [
    ([{"labels": 0}], 'must be a dict with "index" .* got entries labels'),
    ([noise(1, 8, 8)], 'must be a dict with "index" .* got a Tensor'),
    ([{"index": 0}], "must hold 'labels', which the condition ClassLabels reads"),
])  # fmt: skip
def test_batch_that_does_not_say_what_to_draw_is_refused(made, quiet_trainer, items, message):
    module, data = made("denoiser")
    module.bind_data(prepared(data))
    with pytest.raises(ValueError, match=message):
        quiet_trainer().predict(module, DataLoader(items))


@pytest.mark.parametrize("task", ["segmenter", "kl", "denoiser"])
def test_loggers_get_the_arguments_of_the_module_as_plain_values(fitted, tmp_path, task):
    logger = CSVLogger(tmp_path, name="logs")
    module, _, path = fitted(task, logger=logger)
    logged = yaml.safe_load((tmp_path / "logs" / "version_0" / "hparams.yaml").read_text())["model"]
    assert logged.keys() == inspect.signature(type(module)).parameters.keys() - {"codec"}  # which has no weights
    assert logged["ema_decay"] == 0.5
    assert logged["optimizer"]["class_path"] == "torch.optim.adam.Adam"
    assert logged["optimizer"]["init_args"]["lr"] == 0.01
    assert logged[module.network_name]["init_args"]["in_channels"] == 1
    if task == "kl":
        assert logged["adversarial"]["start"] == 1
    record = torch.load(path, weights_only=True)[module.record_key]
    assert record["settings"]["model"]["seed"] == logged["seed"]


def test_arguments_of_load_from_checkpoint_take_the_place_of_those_of_the_file(tiny_module, tiny_images, quiet_trainer):
    module = tiny_module()
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, tiny_images())
    path = f"{trainer.default_root_dir}/one.ckpt"
    trainer.save_checkpoint(path)
    other = NoiseSchedule(50, prediction_type="v_prediction")
    assert DiffusionModule.load_from_checkpoint(path, schedule=other).schedule is other
    assert DiffusionModule.load_from_checkpoint(path, map_location="cpu").schedule.config == module.schedule.config


def test_predicting_with_a_data_module_predicts_for_its_validation_images(made, quiet_trainer):
    for task in ("segmenter", "kl", "denoiser"):
        module, data = made(task)
        trainer = quiet_trainer(max_steps=2)
        trainer.fit(module, data)
        predictions = trainer.predict(module, datamodule=data)
        assert sum(map(len, predictions)) == len(data.val_indices)
