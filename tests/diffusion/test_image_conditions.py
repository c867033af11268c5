"""Masks, what they leave of images, and small images: in training, in validation and in pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from unet_diffusion.data import ImageDataModule, Latents, scale_to_unit_range
from unet_diffusion.diffusion.conditions.condition import CONDITION_KEY
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage, draw_masks, masked_image_maps
from unet_diffusion.diffusion.sampling import sample
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.models.autoencoders import kl_autoencoder
from unet_diffusion.runtime.pictures import image_grid, read_images
from unet_diffusion.runtime.randomness import keyed_generator
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
def codec(tmp_path) -> LatentCodec:
    """Of an autoencoder of grey images that divides by two, whose latents have two channels."""
    torch.manual_seed(0)
    made = kl_autoencoder(1, (8, 8), latent_channels=2, **SMALL)
    made.register_to_config(scaling_factor=0.5)
    made.save_pretrained(tmp_path / "autoencoder")
    return LatentCodec(tmp_path / "autoencoder")


@pytest.fixture
def painter(tiny_module, tiny_unet):
    """Makes a module that paints images of that many channels."""

    def make(channels=1, **options):
        unet = tiny_unet(in_channels=2 * channels + 1, out_channels=channels)
        return tiny_module(unet=unet, conditions=[MaskedImage(1 + channels)], **options)

    return make


class Batches:
    """Keeps what a module trains and validates on: x0, and what the conditions read."""

    def __init__(self, module):
        self.trained, self.validated = [], []
        encoded = module._encoded

        def kept(batch, step):
            x0, entries = encoded(batch, step)
            (self.validated if step is None else self.trained).append({**entries, "x0": x0})
            return x0, entries

        module._encoded = kept


def fitted(trainer, module, data) -> Batches:
    seen = Batches(module)
    trainer.fit(module, data)
    return seen


def validated(trainer, module, data) -> Batches:
    seen = Batches(module)
    trainer.validate(module, data, verbose=False)
    return seen


def test_maps_in_training_are_of_the_images_and_drawn_anew(painter, tiny_images, quiet_trainer):
    data = tiny_images(class_names=None, horizontal_flip=True)
    seen = fitted(quiet_trainer(max_steps=8, limit_val_batches=0), painter(), data).trained
    masks = torch.cat([batch["masked_image"][:, :1] for batch in seen])
    for batch in seen:
        mask, rest = batch["masked_image"].split([1, 1], dim=1)
        assert torch.equal(rest, batch["x0"] * (1 - mask))
    assert len({mask.numpy().tobytes() for mask in masks if mask.mean() < 1}) > 16  # of 32


@torch.no_grad()
def test_images_become_latents_and_so_do_masked_images(painter, tiny_images, quiet_trainer, codec):
    data = tiny_images(class_names=None)
    module = painter(2, codec=codec)
    (batch,) = validated(quiet_trainer(), module, data).validated
    encode = codec.autoencoder.encode
    pixels = scale_to_unit_range(data.image_set.images[batch["index"]])
    torch.testing.assert_close(batch["x0"], 0.5 * encode(pixels).latent_dist.mean)
    mask, latents = batch["masked_image"].split([1, 2], dim=1)
    assert mask.shape == (4, 1, 4, 4)
    keys = [keyed_generator(0, CONDITION_KEY, index) for index in batch["index"].tolist()]
    full_size = torch.cat([draw_masks(1, (8, 8), key) for key in keys])
    assert torch.equal(mask, full_size[..., ::2, ::2])
    torch.testing.assert_close(latents, 0.5 * encode(pixels * (full_size == 0)).latent_dist.mean)
    assert (module.sample_shape, codec.space.std) == ((2, 4, 4), (2.0, 2.0))


@pytest.mark.parametrize("masked", [True, False])
def test_latents_are_drawn_from_their_distribution_in_training(
    painter, tiny_module, tiny_unet, tiny_images, quiet_trainer, codec, masked
):
    data = tiny_images(class_names=None, batch_size=16)
    module = painter(2, codec=codec) if masked else tiny_module(unet=tiny_unet(in_channels=2), codec=codec)
    seen = fitted(quiet_trainer(max_steps=60, limit_val_batches=0), module, data).trained
    drawn = torch.stack([batch["x0"][batch["index"].argsort()] for batch in seen])
    with torch.no_grad():
        pixels = scale_to_unit_range(data.image_set.images[data.train_indices])
        posterior = codec.autoencoder.encode(pixels).latent_dist
    torch.testing.assert_close(drawn.mean(dim=0), 0.5 * posterior.mean, atol=0.4, rtol=0)  # 60 draws of std 0.5
    spread = drawn.var(dim=0).mean() / (0.25 * posterior.var).mean()
    assert spread == pytest.approx(1, abs=0.1)


def test_validation_maps_stay_the_same_whatever_the_batches(painter, tiny_images, quiet_trainer):
    maps = []
    for batch_size in (2, 4):
        data, module = tiny_images(class_names=None, batch_size=batch_size), painter()
        trainer = quiet_trainer()
        maps.append(torch.cat([batch["masked_image"] for batch in validated(trainer, module, data).validated]))
    assert torch.equal(*maps)
    for num, shown in ((3, maps[0][:3]), (6, torch.cat([maps[0], maps[0][:2]]))):
        entries, _ = SampleGrid(num_images=num).examples(trainer, module)
        assert torch.equal(entries["masked_image"], shown)


def test_resumed_run_draws_the_masks_of_the_uninterrupted_one(painter, tiny_images, quiet_trainer, tmp_path):
    def fit(max_steps, **options):
        module = painter()
        saving = ModelCheckpoint(tmp_path / str(max_steps), every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = quiet_trainer(max_steps=max_steps, limit_val_batches=0, enable_checkpointing=True, callbacks=[saving])
        trainer.fit(module, tiny_images(class_names=None), **options)
        return module.state_dict()

    expected = fit(6)
    fit(3)
    got = fit(6, ckpt_path=tmp_path / "3" / "step=3.ckpt")
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


def test_network_learns_to_copy_what_the_mask_leaves(painter, tiny_images, quiet_trainer):
    """Where nothing is covered the maps hold the answer, which noise alone does not."""
    module = painter(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01), ema_decay=0.0)
    data = tiny_images(class_names=None, batch_size=16)
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
def enlarger(tiny_module, tiny_unet, codec):
    """Makes a module that enlarges grey images by two, and its latents have two channels."""

    def make(**options):
        unet = tiny_unet(in_channels=3, out_channels=2, **{"num_class_embeds": 1000, **options})
        return tiny_module(unet=unet, conditions=[LowResolution(1)], codec=codec)

    return make


def test_small_images_are_noised_to_the_level_that_is_their_label(enlarger, tiny_images, quiet_trainer):
    data = tiny_images(batch_size=16, horizontal_flip=True)
    seen = fitted(quiet_trainer(max_steps=40, limit_val_batches=0), enlarger(), data).trained
    levels = torch.cat([batch["noise_level"] for batch in seen])
    assert (levels.min() >= 0, levels.max() <= 350, levels.float().mean()) == (True, True, pytest.approx(175, abs=16))
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
    noise = []
    for batch in seen:
        pixels = data.image_set.images[batch["index"]]
        small = F.interpolate(scale_to_unit_range(pixels), (4, 4), mode="bicubic", antialias=True).clamp(-1, 1)
        a = theirs.alphas_cumprod[batch["noise_level"]].view(-1, 1, 1, 1)
        candidates = [(batch["low_res"] - a.sqrt() * one) / (1 - a).sqrt() for one in (small, small.flip(3))]
        # of the image and its mirror image, the one that it is leaves noise
        noise += [min(pair, key=lambda one: one.square().sum()) for pair in zip(*candidates, strict=True)]
    flat = torch.stack(noise).flatten()
    assert (flat.mean(), flat.std()) == (pytest.approx(0, abs=0.05), pytest.approx(1, abs=0.05))
    assert len({one.numpy().tobytes() for one in noise}) == len(noise)


@pytest.fixture
def pixel_enlarger(tiny_module, tiny_unet):
    """Makes a module that enlarges grey images themselves, without noise."""

    def make(scale_factor=2, **options):
        unet = tiny_unet(in_channels=2, out_channels=1)
        return tiny_module(unet=unet, conditions=[LowResolution(1, noise=False, scale_factor=scale_factor)], **options)

    return make


def shrunk(images, side=4):
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


@pytest.mark.parametrize("scale_factor", [2, 4])
def test_small_images_without_noise_come_to_the_size_of_the_images(
    pixel_enlarger, tiny_images, quiet_trainer, scale_factor
):
    data = tiny_images(class_names=None)
    (batch,) = validated(quiet_trainer(), pixel_enlarger(scale_factor), data).validated
    assert "noise_level" not in batch
    images = scale_to_unit_range(data.image_set.images[batch["index"]])
    small = shrunk(images, 8 // scale_factor)
    torch.testing.assert_close(batch["low_res"], F.interpolate(small, (8, 8), mode="bicubic"))


def test_small_images_that_are_not_smaller_are_refused(pixel_enlarger, tiny_images, quiet_trainer):
    data = tiny_images(class_names=None)
    with pytest.raises(ValueError, match=r"scale_factor of LowResolution must be above 1 .* got 1, which enlarges"):
        quiet_trainer(max_steps=1).fit(pixel_enlarger(1), data)
    with pytest.raises(ValueError, match="must be multiples of the scale_factor 3 of LowResolution, got 8 x 8"):
        quiet_trainer(max_steps=1).fit(pixel_enlarger(3), data)
    with pytest.raises(ValueError, match="scale_factor must be at least 1, got 0"):
        LowResolution(1, scale_factor=0)


def test_enlarged_images_shrink_to_the_small_ones(pixel_enlarger, tiny_images, quiet_trainer):
    module = pixel_enlarger(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01), ema_decay=0.0)
    data = tiny_images(class_names=None, batch_size=16)
    quiet_trainer(max_steps=150, limit_val_batches=0).fit(module, data)
    small = shrunk(scale_to_unit_range(data.image_set.images[data.val_indices]))
    drawn = torch.cat([module.trained.sample(image=one, num_inference_steps=10) for one in small])
    assert drawn.shape == (4, 1, 8, 8)
    error, of_another = ((shrunk(drawn) - one).abs().mean() for one in (small, small.roll(1, 0)))
    assert error < 0.5 * of_another


def test_user_gives_small_images_of_other_sizes(pixel_enlarger, tiny_images, quiet_trainer, tmp_path, run_cli):
    module = pixel_enlarger(4)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, tiny_images(class_names=None))
    trainer.save_checkpoint(tmp_path / "enlarger.ckpt")
    Image.new("L", (7, 5)).save(tmp_path / "small.png")
    options = ["--image", tmp_path / "small.png", "--num_inference_steps=2", "--device=cpu", "--num_images=1"]
    status, _, err = run_cli("sample", tmp_path / "enlarger.ckpt", *options, "--output", tmp_path / "out")
    assert status == 0, err
    assert Image.open(tmp_path / "out" / "000000.png").size == (28, 20)
    options += ["--image_size", 10, 12, "--output", tmp_path / "other"]
    status, _, err = run_cli("sample", tmp_path / "enlarger.ckpt", *options)
    assert (status != 0, "image_size must be multiples of 4 pixels" in err) == (True, True), err


def test_grid_of_an_upscaler_is_of_validation_images(enlarger, tiny_images, quiet_trainer, tmp_path):
    grid = SampleGrid(0, num_images=6, num_inference_steps=2)
    module = enlarger()
    trainer = quiet_trainer(max_steps=1, callbacks=[grid])
    seen = fitted(trainer, module, tiny_images()).validated
    assert (tmp_path / "samples.png").is_file()
    entries, shown = grid.examples(trainer, module)
    fixed = {name: torch.cat([seen[0][name], seen[0][name][:2]]) for name in ("low_res", "noise_level")}
    assert torch.equal(entries["low_res"], fixed["low_res"])
    assert torch.equal(entries["noise_level"], fixed["noise_level"])
    small = entries["low_res"].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(shown, small)  # at twice its size


def test_network_of_an_upscaler_has_a_class_for_each_level(enlarger, tiny_images, quiet_trainer):
    with pytest.raises(ValueError, match="num_class_embeds must be 1000, a class for each level of noise, got 10"):
        quiet_trainer(max_steps=1).fit(enlarger(num_class_embeds=10), tiny_images())


def test_grid_of_a_painter_shows_what_the_mask_leaves_above_what_is_painted(
    painter, tiny_images, quiet_trainer, tmp_path
):
    module, grid = painter(), SampleGrid(0, num_images=10, num_inference_steps=2)
    data = tiny_images(class_names=None, num_val=10)
    trainer = quiet_trainer(max_steps=1, callbacks=[grid])
    trainer.fit(module, data)
    entries, shown = grid.examples(trainer, module)
    mask, masked = entries["masked_image"].split([1, 1], dim=1)
    images = scale_to_unit_range(data.image_set.images[data.val_indices])
    assert torch.equal(shown, masked)
    assert torch.equal(masked, images * (1 - mask))
    painted, _ = grid.sample(trainer, module)
    fill = torch.zeros(6, 1, 8, 8)  # the second row has two pairs
    rows = [masked[:8], painted[:8], masked[8:], fill, painted[8:], fill]
    expected = np.asarray(image_grid(torch.cat(rows), columns=8))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples.png")), expected)


# --------------------------------------------------------------------------------------------------- pictures, refusals


def test_grid_and_command_paint_into_pictures(painter, tiny_images, quiet_trainer, tmp_path, run_cli):
    module, grid = painter(), SampleGrid(0, num_images=6, num_inference_steps=2)
    trainer = quiet_trainer(max_steps=2, callbacks=[grid])
    trainer.fit(module, tiny_images(class_names=None))
    assert (tmp_path / "samples.png").is_file()
    trainer.save_checkpoint(tmp_path / "painter.ckpt")
    pixels = np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8)
    mask = np.repeat([[0] * 4 + [255] * 4], 8, axis=0).astype(np.uint8)
    for name, one in (("image", pixels), ("mask", mask)):
        Image.fromarray(one).save(tmp_path / f"{name}.png")
    options = ["--num_images=2", "--num_inference_steps=2", "--scheduler=DDIMScheduler", "--device=cpu"]
    options += ["--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "--output", tmp_path / "out"]
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


def test_autoencoder_that_does_not_take_the_images_is_refused(painter, tiny_images, quiet_trainer, codec):
    for shape in ((3, 8, 8), (1, 8, 7)):
        images = tiny_images(class_names=None, shape=shape)
        with pytest.raises(ValueError, match=f"1 channels and multiples of 2 pixels .*got {shape[0]} channels of 8x"):
            quiet_trainer(max_steps=1).fit(painter(2, codec=LatentCodec(codec.folder)), images)
    with pytest.raises(ValueError, match="scaling_factor must be above 0, got 0"):
        LatentCodec(codec.folder, scaling_factor=0)


def test_masks_need_images_and_not_their_latents(painter, quiet_trainer, codec, tmp_path, run_cli):
    images = np.random.default_rng(0).integers(256, size=(8, 8, 8), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    options = ["--output", tmp_path / "latents", "--image_size", 8, 8, "--device=cpu"]
    status, _, err = run_cli("encode", codec.folder, tmp_path / "images", *options)
    assert status == 0, err
    with pytest.raises(ValueError, match="MaskedImage needs images, and the data hold latents"):
        quiet_trainer(max_steps=1).fit(painter(2), ImageDataModule(Latents(tmp_path / "latents"), num_val=2))
