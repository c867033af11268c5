"""Modules whose weights were trained on one range of values refuse data of another."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from unet_diffusion.data import SegmentationDataModule, SyntheticCells
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.segmentation.labels import Targets
from unet_diffusion.training import AutoencoderModule, DiffusionModule, SegmentationModule

TWELVE_BITS = PixelValues("uint16", 0, 4095)
OTHER = PixelValues("uint16", 10, 4000)
SIZE = (1, 16, 16)


@pytest.fixture
def data_with(tiny_images):
    """Makes data of a task whose files have these values."""

    def make(task, values):
        if task == "segmenter":
            targets = Targets(label_format="instances")
            options = {"window_size": 32, "batch_size": 2, "windows_per_image": 2, "num_val": 2}
            data = SegmentationDataModule(SyntheticCells(num_images=5), targets, **options)
            data.setup("fit")
            data.images.values = values
            return data
        data = tiny_images(shape=SIZE)
        data.source.values = values
        return data

    return make


@pytest.fixture
def new_module(tiny_module):
    def make(task, **options):
        if task == "segmenter":
            return SegmentationModule(SegmentationUNet(1, 2, channels=(4, 8), padding="same"), **options)
        if task == "autoencoder":
            small = {"latent_channels": 2, "layers_per_block": 1, "norm_num_groups": 4, "mid_attention": False}
            return AutoencoderModule(kl_autoencoder(1, (8, 8), **small))
        return tiny_module(**options)

    return make


CLASSES = {"segmenter": SegmentationModule, "autoencoder": AutoencoderModule, "denoiser": DiffusionModule}


@pytest.fixture
def checkpoint_of(new_module, data_with, quiet_trainer, tmp_path):
    """Makes the checkpoint of a step on data of 12 bits."""

    def make(task):
        saving = ModelCheckpoint(tmp_path, filename=task, every_n_train_steps=1)
        trainer = quiet_trainer(max_steps=1, limit_val_batches=0, enable_checkpointing=True, callbacks=[saving])
        trainer.fit(new_module(task), data_with(task, TWELVE_BITS))
        return tmp_path / f"{task}.ckpt"

    return make


@pytest.mark.parametrize("task", CLASSES)
def test_loaded_module_refuses_data_of_another_range(checkpoint_of, data_with, quiet_trainer, task):
    module = CLASSES[task].load_from_checkpoint(checkpoint_of(task))
    assert module.values.value_range == (0, 4095)
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    message = r"was trained on numbers of 0 to 4095 as -1 to 1, and the data have 10 to 4000; set .* to \[0, 4095\]"
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, data_with(task, OTHER))
    with pytest.raises(ValueError, match=message):
        trainer.validate(module, data_with(task, OTHER))
    trainer.fit(module, data_with(task, TWELVE_BITS))
    assert trainer.global_step == 1


def test_module_that_was_trained_refuses_data_of_another_range(new_module, data_with, quiet_trainer):
    module = new_module("denoiser")
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(module, data_with("denoiser", PixelValues()))
    with pytest.raises(ValueError, match=r"numbers of 0 to 255 as -1 to 1.*have 0 to 4095; leave data.value_range out"):
        quiet_trainer(max_steps=1, limit_val_batches=0).fit(module, data_with("denoiser", TWELVE_BITS))


@pytest.mark.parametrize(
    ("trained", "data"),
    [
        (PixelValues(), PixelValues("uint16", 0, 255)),  # the same numbers in another type
        (PixelValues(), PixelValues("uint16", 0, 65535)),  # the whole range of both types
        (PixelValues(), PixelValues("float32", -1, 1)),  # a source of one's own, which scales
    ],
)
def test_ranges_that_scale_alike_are_one(trained, data):
    data.require_range_of(trained, "the model was trained on")
    trained.require_range_of(data, "the model was trained on")


def test_module_whose_training_did_not_begin_takes_data_of_any_range(new_module, data_with, quiet_trainer):
    module = new_module("denoiser")
    quiet_trainer(max_steps=0).fit(module, data_with("denoiser", OTHER))
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(module, data_with("denoiser", TWELVE_BITS))
    assert module.values == TWELVE_BITS


def test_initial_weights_of_another_range_are_told(checkpoint_of, new_module, data_with, quiet_trainer):
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    module = new_module("denoiser", init_from=str(checkpoint_of("denoiser")))
    with pytest.warns(UserWarning, match="init_from was trained on numbers of 0 to 4095 .* the data have 10 to 4000"):
        trainer.fit(module, data_with("denoiser", OTHER))
    assert module.values == OTHER
