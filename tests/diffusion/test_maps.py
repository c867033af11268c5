"""Masks, and what they leave of images, in training, in validation and in pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from unet_diffusion.data import ImagesWithMaps, InpaintingDataModule, UpscalingDataModule, scale_to_unit_range
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage, draw_masks, masked_image_maps
from unet_diffusion.diffusion.sampling import sample
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.runtime.pictures import image_grid, read_images
from unet_diffusion.training import SampleGrid

SMALL = {"layers_per_block": 1, "mid_attention": False, "norm_num_groups": 4}


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("size", [(8, 8), (32, 20)])
def test_masks_are_boxes_somewhere_or_cover_all(size):
    masks = draw_masks(2000, size, generator())
    assert masks.shape == (2000, 1, *size)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    shares = masks.mean(dim=(1, 2, 3))
    assert shares.min() > 0
    assert (shares == 1).float().mean() == pytest.approx(0.25, abs=0.04)  # four standard errors
    some = masks[shares < 1]
    assert 0.2 < some.mean() < 0.6
    assert some.mean(dim=0).min() > 0.05  # no pixel is left out
    # a row or column through a single box changes twice at most; through four, eight times
    assert some[:, 0].diff(dim=1).abs().sum(dim=1).max() <= 8


def test_masks_are_a_function_of_the_generator():
    one, again, other = (draw_masks(5, (8, 8), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_maps_hold_the_mask_and_nothing_of_what_it_covers():
    images, mask = torch.rand(2, 3, 8, 8) * 2 - 1, draw_masks(2, (8, 8), generator(3))
    maps = masked_image_maps(images, mask, lambda pixels: pixels)
    assert torch.equal(maps[:, :1], mask)
    assert torch.equal(maps[:, 1:], torch.where(mask == 1, 0.0, images))
    changed = torch.where(mask == 1, -images, images)
    assert torch.equal(masked_image_maps(changed, mask, lambda pixels: pixels), maps)


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def autoencoder_folder(tmp_path):
    torch.manual_seed(0)
    made = kl_autoencoder(1, (8, 8), latent_channels=2, **SMALL)
    made.register_to_config(scaling_factor=0.5)
    made.save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


@pytest.fixture
def painter(tiny_module, tiny_unet):
    """Makes a module that paints images of that many channels."""

    def make(channels=1, **options):
        unet = tiny_unet(in_channels=2 * channels + 1, out_channels=channels)
        return tiny_module(unet=unet, conditions=[MaskedImage(1 + channels)], **options)

    return make


class Batches(Callback):
    """Keeps what is trained and validated on."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.trained.append(batch)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.validated.append(batch)


def fitted(trainer, module, data) -> Batches:
    seen = Batches()
    trainer.callbacks.append(seen)
    trainer.fit(module, data)
    return seen


def test_maps_in_training_are_of_the_images_and_drawn_anew(painter, tiny_images, quiet_trainer):
    data = InpaintingDataModule(tiny_images(class_names=None, horizontal_flip=True))
    seen = fitted(quiet_trainer(max_steps=8, limit_val_batches=0), painter(), data).trained
    masks = torch.cat([batch["concat"][:, :1] for batch in seen])
    for batch in seen:
        mask, rest = batch["concat"].split([1, 1], dim=1)
        assert torch.equal(rest, batch["images"] * (1 - mask))
    assert len({mask.numpy().tobytes() for mask in masks if mask.mean() < 1}) > 16  # of 32


@torch.no_grad()
def test_images_become_latents_and_so_do_masked_images(painter, tiny_images, quiet_trainer, autoencoder_folder):
    data = InpaintingDataModule(tiny_images(class_names=None), autoencoder=autoencoder_folder)
    module = painter(2)
    seen = Batches()
    quiet_trainer(callbacks=[seen]).validate(module, data, verbose=False)
    (batch,) = seen.validated
    encode = data._autoencoder.encode
    pixels = scale_to_unit_range(data.image_set.images[batch["index"]])
    torch.testing.assert_close(batch["images"], 0.5 * encode(pixels).latent_dist.mean)
    mask, latents = batch["concat"].split([1, 2], dim=1)
    assert mask.shape == (4, 1, 4, 4)
    full_size = torch.cat([data.draw((1, 1, 8, 8), key)["mask"] for key in map(data_key, batch["index"].tolist())])
    assert torch.equal(mask, full_size[..., ::2, ::2])
    torch.testing.assert_close(latents, 0.5 * encode(pixels * (full_size == 0)).latent_dist.mean)
    assert (module.image_shape, module.codec.space.std) == ((2, 4, 4), (2.0, 2.0))


def data_key(index):
    from unet_diffusion.data.maps import MAPS_KEY

    from unet_diffusion.runtime.randomness import keyed_generator

    return keyed_generator(0, MAPS_KEY, index)


def test_latents_are_drawn_from_their_distribution_in_training(painter, tiny_images, quiet_trainer, autoencoder_folder):
    data = InpaintingDataModule(tiny_images(class_names=None, batch_size=16), autoencoder=autoencoder_folder)
    seen = fitted(quiet_trainer(max_steps=60, limit_val_batches=0), painter(2), data).trained
    drawn = torch.stack([batch["images"][batch["index"].argsort()] for batch in seen])
    with torch.no_grad():
        pixels = scale_to_unit_range(data.image_set.images[data.train_indices])
        posterior = data._autoencoder.encode(pixels).latent_dist
    torch.testing.assert_close(drawn.mean(dim=0), 0.5 * posterior.mean, atol=0.4, rtol=0)  # 60 draws of std 0.5
    spread = drawn.var(dim=0).mean() / (0.25 * posterior.var).mean()
    assert spread == pytest.approx(1, abs=0.1)


def test_validation_maps_stay_the_same_whatever_the_batches(painter, tiny_images, quiet_trainer):
    maps = []
    for batch_size in (2, 4):
        data = InpaintingDataModule(tiny_images(class_names=None, batch_size=batch_size))
        seen = Batches()
        quiet_trainer(callbacks=[seen]).validate(painter(), data, verbose=False)
        maps.append(torch.cat([batch["concat"] for batch in seen.validated]))
    assert torch.equal(*maps)
    assert torch.equal(data.examples(3, "cpu")["concat"], maps[0][:3])
    assert torch.equal(data.examples(6, "cpu")["concat"][4:], maps[0][:2])


def test_resumed_run_draws_the_masks_of_the_uninterrupted_one(painter, tiny_images, quiet_trainer, tmp_path):
    def fit(max_steps, **options):
        module = painter()
        saving = ModelCheckpoint(tmp_path / str(max_steps), every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = quiet_trainer(max_steps=max_steps, limit_val_batches=0, enable_checkpointing=True, callbacks=[saving])
        trainer.fit(module, InpaintingDataModule(tiny_images(class_names=None)), **options)
        return module.state_dict()

    expected = fit(6)
    fit(3)
    got = fit(6, ckpt_path=tmp_path / "3" / "step=3.ckpt")
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


def test_network_learns_to_copy_what_the_mask_leaves(painter, tiny_images, quiet_trainer):
    """Where nothing is covered the maps hold the answer, which noise alone does not."""
    module = painter(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01), ema_decay=0.0)
    data = InpaintingDataModule(tiny_images(class_names=None, batch_size=16))
    quiet_trainer(max_steps=150, limit_val_batches=0).fit(module, data)
    images = scale_to_unit_range(data.image_set.images[data.val_indices])
    mask = torch.zeros(4, 1, 8, 8)
    mask[..., :4] = 1
    inputs = {"concat": masked_image_maps(images, mask, lambda pixels: pixels)}
    error = (
        sample(module.ema_unet, module.schedule, images.shape, num_inference_steps=10, inputs=inputs) - images
    ).abs()
    assert error[..., 4:].mean() < 0.5 * error[..., :4].mean()


# ----------------------------------------------------------------------------------------------------------- upscaling


@pytest.fixture
def enlarger(tiny_module, tiny_unet):
    """Makes a module that enlarges grey images by two, and its latents have two channels."""

    def make(**options):
        unet = tiny_unet(in_channels=3, out_channels=2, num_class_embeds=1000)
        return tiny_module(unet=unet, conditions=[LowResolution(1)], **options)

    return make


def test_small_images_are_noised_to_the_level_that_is_their_label(
    enlarger, tiny_images, quiet_trainer, autoencoder_folder
):
    data = UpscalingDataModule(tiny_images(batch_size=16, horizontal_flip=True), autoencoder=autoencoder_folder)
    seen = fitted(quiet_trainer(max_steps=40, limit_val_batches=0), enlarger(), data).trained
    levels = torch.cat([batch["labels"] for batch in seen])
    assert (levels.min() >= 0, levels.max() <= 350, levels.float().mean()) == (True, True, pytest.approx(175, abs=16))
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
    noise = []
    for batch in seen:
        pixels = data.image_set.images[batch["index"]]
        small = F.interpolate(scale_to_unit_range(pixels), (4, 4), mode="bicubic", antialias=True).clamp(-1, 1)
        a = theirs.alphas_cumprod[batch["labels"]].view(-1, 1, 1, 1)
        candidates = [(batch["concat"] - a.sqrt() * one) / (1 - a).sqrt() for one in (small, small.flip(3))]
        # of the image and its mirror image, the one that it is leaves noise
        noise += [min(pair, key=lambda one: one.square().sum()) for pair in zip(*candidates, strict=True)]
    flat = torch.stack(noise).flatten()
    assert (flat.mean(), flat.std()) == (pytest.approx(0, abs=0.05), pytest.approx(1, abs=0.05))
    assert len({one.numpy().tobytes() for one in noise}) == len(noise)


def test_grid_of_an_upscaler_is_of_validation_images(
    enlarger, tiny_images, quiet_trainer, autoencoder_folder, tmp_path
):
    grid = SampleGrid(0, num_images=6, num_inference_steps=2)
    data = UpscalingDataModule(tiny_images(), autoencoder=autoencoder_folder)
    module = enlarger()
    quiet_trainer(max_steps=1, callbacks=[grid]).fit(module, data)
    assert (tmp_path / "samples.png").is_file()
    given = grid.given(module.trainer, module, 1000)
    examples = data.examples(6, "cpu")
    assert torch.equal(given["concat"], examples["concat"])
    assert torch.equal(given["labels"], examples["labels"])
    small = examples["concat"].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(examples["seen"], small)  # at twice its size


def test_grid_of_a_painter_shows_what_the_mask_leaves_above_what_is_painted(
    painter, tiny_images, quiet_trainer, tmp_path
):
    module, grid = painter(), SampleGrid(0, num_images=10, num_inference_steps=2)
    data = InpaintingDataModule(tiny_images(class_names=None, num_val=10))
    trainer = quiet_trainer(max_steps=1, callbacks=[grid])
    trainer.fit(module, data)
    examples = data.examples(10, "cpu")
    mask, masked = examples["concat"].split([1, 1], dim=1)
    assert torch.equal(examples["seen"], masked)
    assert torch.equal(masked, examples["images"] * (1 - mask))
    painted = grid.sample(trainer, module, 0)
    fill = torch.zeros(6, 1, 8, 8)  # the second row has two pairs
    rows = [masked[:8], painted[:8], masked[8:], fill, painted[8:], fill]
    expected = np.asarray(image_grid(torch.cat(rows), columns=8))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples.png")), expected)


# --------------------------------------------------------------------------------------------------- pictures, refusals


def test_grid_and_command_paint_into_pictures(painter, tiny_images, quiet_trainer, tmp_path, run_cli):
    module, grid = painter(), SampleGrid(0, num_images=6, num_inference_steps=2)
    trainer = quiet_trainer(max_steps=2, callbacks=[grid])
    trainer.fit(module, InpaintingDataModule(tiny_images(class_names=None)))
    assert (tmp_path / "samples.png").is_file()
    trainer.save_checkpoint(tmp_path / "painter.ckpt")
    pixels = np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8)
    mask = np.repeat([[0] * 4 + [255] * 4], 8, axis=0).astype(np.uint8)
    for name, one in (("init", pixels), ("mask", mask)):
        Image.fromarray(one).save(tmp_path / f"{name}.png")
    options = ["--num_images=2", "--num_inference_steps=2", "--scheduler=DDIMScheduler", "--device=cpu"]
    options += ["--image", tmp_path / "init.png", "--mask", tmp_path / "mask.png", "--output", tmp_path / "out"]
    status, _, err = run_cli("sample", tmp_path / "painter.ckpt", *options)
    assert status == 0, err
    image, white = (torch.from_numpy(one)[None, None] for one in (pixels, mask))
    image, white = scale_to_unit_range(image), (white == 255).float()
    maps = torch.cat([white, image * (1 - white)], dim=1).expand(2, -1, -1, -1)
    inputs = {"concat": maps}
    images = sample(module.ema_unet, module.schedule, (2, 1, 8, 8), num_inference_steps=2, inputs=inputs)
    expected = torch.where(white == 1, images.clamp(-1, 1), image)
    drawn = read_images([tmp_path / "out" / f"{i:06d}.png" for i in range(2)])
    torch.testing.assert_close(drawn, expected, atol=1 / 127, rtol=0)  # 8 bits


def test_maps_of_the_data_must_be_those_of_the_model(painter, tiny_module, tiny_images, quiet_trainer):
    with pytest.raises(ValueError, match=r"conditioned on, MaskedImage, and give none; set data\.class_path"):
        quiet_trainer(max_steps=1).fit(painter(), tiny_images(class_names=None))
    with pytest.raises(ValueError, match="conditioned on, none, and give MaskedImage"):
        quiet_trainer(max_steps=1).fit(tiny_module(), InpaintingDataModule(tiny_images(class_names=None)))


def test_autoencoder_that_does_not_take_the_images_is_refused(tiny_images, autoencoder_folder):
    for shape in ((3, 8, 8), (1, 8, 7)):
        images = tiny_images(class_names=None, shape=shape)
        with pytest.raises(ValueError, match=f"1 channels and multiples of 2 pixels .*got {shape[0]} channels of 8x"):
            InpaintingDataModule(images, autoencoder=autoencoder_folder).setup()
    with pytest.raises(ValueError, match="scaling_factor must be above 0, got 0"):
        InpaintingDataModule(tiny_images(), scaling_factor=0)


def test_every_kind_of_maps_is_a_condition_on_maps():
    for module in ImagesWithMaps.__subclasses__():
        assert issubclass(module.gives, Concat)
        assert module.gives(3).network_argument == "concat"
