"""Latents on disk, in training and in sampling, and the pipeline that comes of them."""

import json

import numpy as np
import pytest
import torch
from denoisers import Vectors
from diffusers import DDIMScheduler, LDMPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from unet_diffusion.data import (
    Folder,
    ImageDataModule,
    Latents,
    scale_to_unit_range,
)
from unet_diffusion.diffusers_io.exporting import export_pipeline
from unet_diffusion.diffusers_io.importing import import_pipeline
from unet_diffusion.diffusers_io.normalising import normalised_autoencoder
from unet_diffusion.diffusers_io.values_file import write_values
from unet_diffusion.diffusion.image_to_image import InitImage
from unet_diffusion.diffusion.sampling import image_generators, sample
from unet_diffusion.inference.reading import read_denoiser
from unet_diffusion.latents import store as latents_module
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.latents.space import fingerprint
from unet_diffusion.latents.store import read_latents
from unet_diffusion.models.autoencoders import kl_autoencoder, latent_moments, pretrained_autoencoder, vq_autoencoder
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.runtime.randomness import keyed_generator
from unet_diffusion.training import AutoencoderModule, SampleGrid

NUM_IMAGES = 10
SMALL = {"layers_per_block": 1, "mid_attention": False, "norm_num_groups": 4}


@torch.no_grad()
def autoencoder(kind="kl"):
    torch.manual_seed(0)
    made = kl_autoencoder(3, (8, 8), latent_channels=4, **SMALL)
    if kind == "vq":
        made = vq_autoencoder(3, (8, 8), num_codes=64, latent_channels=4, **SMALL)
    for parameter in made.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    made.register_to_config(sample_size=16)
    return made.eval()


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(NUM_IMAGES // 2):
            pixels = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def encoded(run_cli, tmp_path, images, monkeypatch):
    """Encodes the images with a small autoencoder, in shards of four; gives the folder."""
    monkeypatch.setattr(latents_module, "SHARD_IMAGES", 4)

    def make(*options, kind="kl"):
        if not (tmp_path / "autoencoder").exists():
            autoencoder(kind).save_pretrained(tmp_path / "autoencoder")
        arguments = [tmp_path / "autoencoder", images, "--output", tmp_path / "latents", "--batch_size=3", *options]
        status, _, err = run_cli("encode", *arguments, "--device=cpu")
        assert status == 0, err
        return tmp_path / "latents"

    return make


def pixels_of(images, **options):
    data = ImageDataModule(Folder(images, image_size=16, **options))
    data.setup()
    return scale_to_unit_range(data.image_set.images)


@torch.no_grad()
def test_latents_are_those_of_the_images_and_of_their_mirror_images(encoded, images):
    found = read_latents(encoded("--horizontal_flip"))
    pixels = pixels_of(images)
    mean, std = latent_moments(autoencoder(), torch.cat([pixels, pixels.flip(3)]))
    assert len(found) == NUM_IMAGES
    torch.testing.assert_close(found.mean.float(), mean, atol=2e-3, rtol=2e-3)  # float16 has 11 bits
    torch.testing.assert_close(found.std.float(), std, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_scale_is_that_of_all_images_a_channel(encoded, images):
    space = read_latents(encoded()).space
    posterior = autoencoder().encode(pixels_of(images)).latent_dist
    drawn = torch.stack([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(200)])
    assert space.mean == pytest.approx(drawn.mean(dim=(0, 1, 3, 4)).tolist(), abs=0.01)  # 200 draws
    assert space.std == pytest.approx(drawn.std(dim=(0, 1, 3, 4)).tolist(), rel=0.01)
    normalised = space.normalise(drawn.flatten(0, 1))
    assert normalised.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=0.02)
    torch.testing.assert_close(space.denormalise(normalised), drawn.flatten(0, 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_codes_have_one_scale_and_no_shift(encoded, images):
    space = read_latents(encoded(kind="vq")).space
    assert space.mean == (0, 0, 0, 0)
    expected = autoencoder("vq").encode(pixels_of(images)).latents.std(correction=0)
    assert space.std == pytest.approx([expected.item()] * 4, rel=1e-3)


def test_encoding_goes_on_where_it_was_cut_off(encoded):
    folder = encoded()
    whole = read_latents(folder)
    first, second = sorted(folder.glob("latents_*.safetensors"))[:2]
    written = first.stat().st_mtime_ns
    second.unlink()
    (folder / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="were not finished"):
        read_latents(folder)
    again = read_latents(encoded())
    assert torch.equal(again.mean, whole.mean)
    assert again.space == whole.space
    assert first.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("option", "reason"),
    [("--horizontal_flip", "has_mirrored: False there, True here"), ("--background=black", "background")],
)
def test_latents_made_with_other_settings_are_refused_with_the_reason(
    encoded, tmp_path, images, run_cli, option, reason
):
    folder = encoded()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    arguments = [tmp_path / "autoencoder", images, "--output", folder, "--device=cpu", option]
    status, _, err = run_cli("encode", *arguments)
    assert (status, reason in err) == (1, True), err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_latents_of_another_autoencoder_are_refused(encoded, tmp_path, images, run_cli):
    folder = encoded()
    other = autoencoder()
    other.decoder.conv_out.bias.data += 1
    other.save_pretrained(tmp_path / "autoencoder")
    status, _, err = run_cli("encode", tmp_path / "autoencoder", images, "--output", folder, "--device=cpu")
    assert (status, "fingerprint" in err) == (1, True), err
    with pytest.raises(ValueError, match="must hold the autoencoder that made the latents"):
        LatentCodec.of(read_latents(folder).space).check()


def replace_image(path, seed) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)


@torch.no_grad()
def latents_now(images) -> torch.Tensor:
    return latent_moments(autoencoder(), pixels_of(images))[0]


def test_latents_of_an_image_that_was_replaced_are_made_again_and_said(encoded, images, run_cli, tmp_path):
    folder = encoded("--class_labels")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("latents_*.safetensors")}
    replace_image(images / "dog" / "0.png", 5)
    arguments = [tmp_path / "autoencoder", images, "--output", folder, "--device=cpu", "--class_labels"]
    status, out, err = run_cli("encode", *arguments)
    assert (status, "latents_00001.safetensors is made again, because images in it have changed" in out) == (0, True), (
        err
    )
    recipe = f"fit --config latents --data.root {folder} --data.horizontal_flip false"  # as there are no mirror images
    assert f"{recipe} --model.unet.num_class_embeds 3 --model.label_dropout 0.1\n" in out
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob("latents_*.safetensors")}
    assert [name for name in sorted(now) if now[name] != kept[name]] == ["latents_00001.safetensors"]
    torch.testing.assert_close(read_latents(folder).mean.float(), latents_now(images), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_encoding_that_is_cut_off_and_goes_on_with_other_images_is_that_of_the_others(
    encoded, images, run_cli, tmp_path, monkeypatch, done
):
    """Cut off when so many files of latents are there; then classes change their names, and an image is replaced."""
    save, written = latents_module.save_file, []

    def cut_off(tensors, path, metadata):
        if len(written) == done:
            raise KeyboardInterrupt
        written.append(path)
        save(tensors, path, metadata)

    autoencoder().save_pretrained(tmp_path / "autoencoder")
    folder = tmp_path / "latents"
    arguments = [tmp_path / "autoencoder", images, "--output", folder, "--device=cpu", "--class_labels"]
    monkeypatch.setattr(latents_module, "save_file", cut_off)
    assert run_cli("encode", *arguments)[0] == 130
    monkeypatch.setattr(latents_module, "save_file", save)
    replace_image(images / "cat" / "0.png", 5)
    for old, new in (("cat", "new"), ("dog", "cat"), ("new", "dog")):
        (images / old).rename(images / new)
    encoded("--class_labels")
    found = read_latents(folder)
    torch.testing.assert_close(found.mean.float(), latents_now(images), atol=2e-3, rtol=2e-3)
    assert found.names == [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(5)]


def test_image_and_caption_that_are_others_are_named(encoded, images, run_cli, tmp_path):
    for path in list(images.rglob("*.png")):
        path.with_suffix(".txt").write_text(f"{path.parent.name} number {path.stem}")
    folder = encoded("--captions")
    (images / "dog" / "4.txt").write_text("a wolf")
    (images / "cat" / "2.png").rename(images / "cat" / "7.png")
    (images / "cat" / "2.txt").rename(images / "cat" / "7.txt")
    arguments = [tmp_path / "autoencoder", images, "--output", folder, "--device=cpu", "--captions"]
    status, _, err = run_cli("encode", *arguments)
    said = "were made with other settings (captions: a wolf, dog number 4; names: cat/2.png, cat/7.png)"
    assert (status, said in err) == (1, True), err


def test_latents_are_not_kept_under_the_old_name_of_a_class(encoded, images, run_cli, tmp_path):
    folder = encoded("--class_labels")
    (images / "cat").rename(images / "tiger")
    arguments = [tmp_path / "autoencoder", images, "--output", folder, "--device=cpu", "--class_labels"]
    status, _, err = run_cli("encode", *arguments)
    assert (status, "class_names: ['cat', 'dog'] there, ['dog', 'tiger'] here" in err) == (1, True), err


# ------------------------------------------------------------------------------------- what else is known of the images


ENTRIES = {
    "labels": torch.arange(NUM_IMAGES) % 2,
    "feature": torch.rand(NUM_IMAGES, 3, generator=torch.Generator().manual_seed(0)),
    "mean": torch.arange(NUM_IMAGES) > 3,  # a name that a file of latents has for something else
    "place": [f"place {number}" for number in range(NUM_IMAGES)],
}


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Writes latents of a source with entries of its own, in shards of four; gives the folder."""
    monkeypatch.setattr(latents_module, "SHARD_IMAGES", 4)

    def make(**entries):
        settings = {"autoencoder": "", "fingerprint": "", "image_shape": (3, 16, 16), "num_images": NUM_IMAGES}
        settings |= {"has_mirrored": True, "has_codes": False, "class_names": ["cat", "dog"], "names": None}
        latents_module.encode_images(
            tmp_path / "known",
            lambda numbers: torch.stack([torch.full((4, 8, 8), float(number)) for number in numbers]),
            lambda images: (images, torch.ones_like(images)),
            settings=settings,
            entries=ENTRIES | entries,
        )
        return tmp_path / "known"

    return make


def test_latents_keep_what_is_known_of_the_images_and_a_condition_reads_it(
    known, tiny_module, tiny_unet, quiet_trainer
):
    data = ImageDataModule(Latents(known()), num_val=2, batch_size=4, horizontal_flip=True)
    data.setup()
    assert data.entries.keys() == ENTRIES.keys()
    assert data.entries["place"] == ENTRIES["place"]
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        assert batch.keys() == {"images", "std", "index", "is_mirrored", "labels", "feature", "mean"}
        assert torch.equal(batch["images"][:, 0, 0, 0], batch["index"].half())  # a mirror image is of the same image
        for key in ("labels", "feature", "mean"):
            assert batch[key].dtype == ENTRIES[key].dtype
            assert torch.equal(batch[key], ENTRIES[key][batch["index"]])
    unet = tiny_unet(in_channels=4, vector_dim=3)
    quiet_trainer(max_steps=2).fit(tiny_module(unet=unet, conditions=[Vectors()]), data)


def test_other_numbers_take_the_place_of_those_before_and_other_texts_are_refused(known):
    known()
    other = torch.zeros(NUM_IMAGES, 2)
    assert torch.equal(read_latents(known(feature=other)).entries["feature"], other)
    with pytest.raises(FileExistsError, match=r"other settings \(place: place 0, y\)"):
        known(place=["y", *ENTRIES["place"][1:]])


def test_damaged_entries_are_refused(known):
    folder = known()
    save_file({"feature": torch.zeros(NUM_IMAGES - 1)}, folder / "entries.safetensors")
    with pytest.raises(ValueError, match="must hold feature of 10 images, and holds those of 9; encode again"):
        read_latents(folder)
    known()
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"texts": {"place": ["a"]}}))
    with pytest.raises(ValueError, match="must hold place of 10 images, and holds those of 1; encode again"):
        read_latents(folder)
    (folder / "index.json").write_text(json.dumps(index | {"texts": None}))
    with pytest.raises(ValueError, match=r"texts in .*index\.json must be a list for each name; remove the file"):
        read_latents(folder)
    crop = [[20, 28], [0, 4, 20, 20]]
    (folder / "index.json").write_text(json.dumps(index | {"crops": [crop] * 9}))
    with pytest.raises(ValueError, match="must hold crops of 10 images, and holds those of 9; encode again"):
        read_latents(folder)
    (folder / "index.json").write_text(json.dumps(index | {"crops": [crop[:1]] * 10}))
    with pytest.raises(ValueError, match=r"crops in .*index\.json are not as encode writes them; encode again"):
        read_latents(folder)
    (folder / "entries.safetensors").write_bytes(b"x")
    known()
    assert torch.equal(read_latents(folder).entries["feature"], ENTRIES["feature"])
    (folder / "entries.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"entries\.safetensors is damaged or no safetensors .* encode again"):
        read_latents(folder)


def test_stale_latents_are_refused_before_training(encoded, tmp_path, quiet_trainer, tiny_module, tiny_unet):
    folder = encoded()
    (tmp_path / "autoencoder" / "config.json").rename(tmp_path / "config.json")
    trainer = quiet_trainer(max_steps=1, callbacks=[SampleGrid(num_images=1, num_inference_steps=2)])
    module = latent_module(tiny_module, tiny_unet)
    with pytest.raises(FileNotFoundError, match=r"autoencoder must be a local diffusers folder"):
        trainer.fit(module, ImageDataModule(Latents(folder), num_val=2))
    assert trainer.global_step == 0


def test_latents_of_another_range_than_their_autoencoder_are_refused(
    encoded, tmp_path, quiet_trainer, tiny_module, tiny_unet
):
    folder = encoded()
    write_values(PixelValues("uint16", 0, 4095), tmp_path / "autoencoder")
    message = r"autoencoder was trained on numbers of 0 to 4095 as -1 to 1, and the data have 0 to 255; encode the im"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_steps=1).fit(
            latent_module(tiny_module, tiny_unet), ImageDataModule(Latents(folder), num_val=2)
        )


def test_bad_files_end_encoding_or_are_left_out(encoded, tmp_path, images, run_cli):
    (images / "cat" / "damaged.png").write_bytes(b"no image")
    autoencoder().save_pretrained(tmp_path / "autoencoder")
    arguments = [tmp_path / "autoencoder", images, "--output", tmp_path / "latents", "--device=cpu"]
    status, _, err = run_cli("encode", *arguments)
    assert (status, "cat/damaged.png" in err) == (1, True), err
    assert 'Mend or remove them, or set on_bad_file to "skip".' in err
    with pytest.warns(UserWarning, match="cat/damaged.png"):
        status, _, err = run_cli("encode", *arguments, "--on_bad_file", "skip")
    assert status == 0, err
    assert len(read_latents(tmp_path / "latents")) == NUM_IMAGES


def test_files_that_are_no_latents_are_left_alone(encoded, tmp_path, images, run_cli):
    autoencoder().save_pretrained(tmp_path / "autoencoder")
    status, _, err = run_cli("encode", tmp_path / "autoencoder", images, "--output", images, "--device=cpu")
    assert (status, "holds files that are no latents" in err) == (1, True), err


def test_size_that_the_autoencoder_cannot_halve_is_refused(tmp_path, images, run_cli):
    autoencoder().save_pretrained(tmp_path / "a")
    arguments = [tmp_path / "a", images, "--output", tmp_path / "b", "--image_size", "15", "16"]
    status, _, err = run_cli("encode", *arguments)
    assert (status, "multiples of 2, got 15 16" in err) == (1, True), err
    assert not (tmp_path / "b").exists()


def test_fingerprint_changes_with_weights_and_configuration_and_not_with_the_scale(tmp_path):
    made = autoencoder()
    prints = [fingerprint(made, made.config)]
    made.register_to_config(scaling_factor=0.5)
    made.save_pretrained(tmp_path)
    loaded = pretrained_autoencoder(tmp_path)
    assert fingerprint(loaded, loaded.config) == prints[0]
    made.decoder.conv_out.bias.data[0] += 1e-6
    prints.append(fingerprint(made, made.config))
    made.register_to_config(norm_num_groups=2)
    prints.append(fingerprint(made, made.config))
    assert len(set(prints)) == 3


def batches(data, trainer, module) -> list[torch.Tensor]:
    """What the module was trained on."""
    seen = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: (seen.append(batch["x0"].clone()), step(batch, batch_idx))[1]
    trainer.fit(module, data)
    return seen


def latent_module(tiny_module, tiny_unet, **options):
    return tiny_module(unet=tiny_unet(in_channels=4, **options))


def test_latents_are_drawn_anew_in_training_from_their_distribution(encoded, quiet_trainer, tiny_module, tiny_unet):
    folder = encoded()
    found = read_latents(folder)
    data = ImageDataModule(Latents(folder), num_val=2, batch_size=8)
    seen = batches(data, quiet_trainer(max_steps=40, limit_val_batches=0), latent_module(tiny_module, tiny_unet))
    raw = found.space.denormalise(torch.cat(seen))
    expected = found.mean[data.train_indices].float()
    torch.testing.assert_close(raw.mean(dim=0), expected.mean(dim=0), atol=0.25, rtol=0)  # 320 draws of std 1 or so
    assert not torch.equal(seen[0], seen[1])
    spread = raw.std(dim=0) ** 2 - expected.var(dim=0, correction=0)
    torch.testing.assert_close(spread.mean(), found.std[data.train_indices].float().square().mean(), rtol=0.1, atol=0)


def test_validation_takes_the_mean_of_the_latents(encoded, quiet_trainer, tiny_module, tiny_unet):
    data = ImageDataModule(Latents(encoded()), num_val=2, batch_size=2)
    module, seen = latent_module(tiny_module, tiny_unet), []
    step = module.validation_step
    module.validation_step = lambda batch, batch_idx: (seen.append(batch["x0"].clone()), step(batch, batch_idx))[1]
    quiet_trainer().validate(module, data, verbose=False)
    space = data.codec.space
    expected = space.normalise(data.source.latents.mean[data.val_indices].float())
    torch.testing.assert_close(torch.cat(seen), expected)


def test_mirrored_images_are_trained_on_and_must_have_been_encoded(encoded, quiet_trainer, tiny_module, tiny_unet):
    folder = encoded("--horizontal_flip")
    data = ImageDataModule(Latents(folder), num_val=2, batch_size=8, horizontal_flip=True)
    data.setup()
    assert data.image_shape == (4, 8, 8)
    drawn = [index for batch in data_batches(data) for index in batch]
    assert any(index >= NUM_IMAGES for index in drawn)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "has_mirrored": False}))
    with pytest.raises(ValueError, match="encode again with --horizontal_flip"):
        ImageDataModule(Latents(folder), horizontal_flip=True).setup()


def data_batches(data) -> list[list[int]]:
    loader = data.train_dataloader()
    return list(loader.sampler)


def test_resumed_run_draws_the_latents_of_the_uninterrupted_one(encoded, check_resuming, tiny_module, tiny_unet):
    folder = encoded()
    check_resuming(
        lambda: latent_module(tiny_module, tiny_unet),
        lambda: ImageDataModule(Latents(folder), num_val=2, batch_size=2),
    )


@pytest.fixture
def trained(encoded, quiet_trainer, tiny_module, tiny_unet, tmp_path):
    def make(*, kind="kl", **options):
        folder = encoded("--class_labels", kind=kind)
        module = latent_module(tiny_module, tiny_unet, **options)
        trainer = quiet_trainer(max_steps=4, limit_val_batches=0)
        trainer.fit(module, ImageDataModule(Latents(folder), num_val=2, batch_size=4))
        trainer.save_checkpoint(tmp_path / "latent.ckpt")
        return tmp_path / "latent.ckpt"

    return make


def test_checkpoint_knows_the_space_and_holds_no_autoencoder(trained, tmp_path):
    path = trained()
    read = read_denoiser(path)
    assert read.codec.space == read_latents(tmp_path / "latents").space
    assert read.sample_shape == (4, 8, 8)
    keys = torch.load(path, weights_only=True)["state_dict"]
    assert not [key for key in keys if "encoder" in key or "decoder" in key]


def test_latents_of_another_run_do_not_continue_it(trained, tmp_path, quiet_trainer, tiny_module, tiny_unet):
    path = trained()
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    index["space"]["std"] = [2.0] * 4
    (tmp_path / "latents" / "index.json").write_text(json.dumps(index))
    module = latent_module(tiny_module, tiny_unet)
    data = ImageDataModule(Latents(tmp_path / "latents"), num_val=2, batch_size=4)
    with pytest.raises(ValueError, match="latent std"):
        quiet_trainer(max_steps=5).fit(module, data, ckpt_path=path)


def test_sampled_images_are_decoded_latents(trained, run_cli, tmp_path):
    path = trained()
    arguments = [path, "--num_images=3", "--num_inference_steps=2", "--device=cpu", "--output", tmp_path / "out"]
    status, _, err = run_cli("sample", *arguments, "--thresholding")
    assert status == 1
    assert "thresholding is for pixels, whose x0 lies in [-1, 1], and this denoiser draws latents" in err
    status, _, err = run_cli("sample", *arguments)
    assert status == 0, err
    read = read_denoiser(path)
    options = {"scheduler": "DPMSolverMultistepScheduler", "num_inference_steps": 2, "clip_sample": False}
    latents = sample(read.unet, read.schedule, (3, 4, 8, 8), **options)
    with torch.no_grad():
        expected = autoencoder().decode(read.codec.space.denormalise(latents)).sample
    for number in range(3):
        drawn = np.asarray(Image.open(tmp_path / "out" / f"{number:06d}.png")).astype(int)
        wanted = ((expected[number] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(drawn - wanted).max() <= 1


def test_painting_of_latents_keeps_the_picture_where_the_mask_is_black(trained, run_cli, tmp_path):
    path = trained()
    picture = np.random.default_rng(1).integers(256, size=(16, 24, 3), dtype=np.uint8)
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[:, 13:] = 255  # an odd column: the latent there has a known pixel and an unknown one
    Image.fromarray(picture).save(tmp_path / "init.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = [path, "--num_images=2", "--num_inference_steps=2", "--device=cpu", "--output", tmp_path / "out"]
    start = ["--image", tmp_path / "init.png", "--mask", tmp_path / "mask.png", "--image_size", 16, 24]
    status, _, err = run_cli("sample", *arguments, *start)
    assert status == 0, err
    read = read_denoiser(path)
    pixels = scale_to_unit_range(torch.from_numpy(picture).permute(2, 0, 1)[None])
    with torch.no_grad():
        latents = read.codec.space.normalise(autoencoder().encode(pixels).latent_dist.mean)
    known = torch.zeros(1, 1, 8, 12, dtype=torch.bool)
    known[..., :6] = True
    options = {"scheduler": "DPMSolverMultistepScheduler", "num_inference_steps": 2, "clip_sample": False}
    drawn = sample(read.unet, read.schedule, (2, 4, 8, 12), init_image=InitImage(latents, 1.0, known), **options)
    with torch.no_grad():
        decoded = autoencoder().decode(read.codec.space.denormalise(drawn)).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    for number in range(2):
        image = np.asarray(Image.open(tmp_path / "out" / f"{number:06d}.png"))
        np.testing.assert_array_equal(image[:, :13], picture[:, :13])
        assert np.abs(image[:, 13:].astype(int) - expected[number, :, 13:]).max() <= 1  # rounding to bytes


def test_size_of_images_of_latents_is_in_pixels(trained, run_cli, tmp_path):
    arguments = [trained(), "--num_images=1", "--num_inference_steps=2", "--device=cpu", "--output", tmp_path / "out"]
    status, _, err = run_cli("sample", *arguments, "--image_size", 20, 32, "--window", 16)
    assert status == 0, err
    assert Image.open(tmp_path / "out" / "000000.png").size == (32, 20)
    status, _, err = run_cli("sample", *arguments, "--image_size", 18, 32)
    assert (status, "got 18 32; the next size that fits is 20" in err) == (1, True), err


def test_sampling_says_where_the_autoencoder_should_be(trained, run_cli, tmp_path):
    path = trained()
    (tmp_path / "autoencoder").rename(tmp_path / "moved")
    arguments = [path, "--num_images=1", "--num_inference_steps=2", "--device=cpu", "--output", tmp_path / "out"]
    status, _, err = run_cli("sample", *arguments)
    assert (status, "--autoencoder DIR" in err) == (1, True), err
    assert not (tmp_path / "out").exists()
    status, _, err = run_cli("sample", *arguments, "--autoencoder", tmp_path / "moved")
    assert status == 0, err


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_normalised_autoencoder_is_the_autoencoder_between_the_scales(encoded, images, kind):
    space = read_latents(encoded(kind=kind)).space
    plain = autoencoder(kind)
    theirs, pixels = normalised_autoencoder(plain, space), pixels_of(images)[:2]
    factor = theirs.config.scaling_factor
    latents = torch.randn(2, 4, 8, 8, generator=keyed_generator(0))
    images_of = plain.decode(space.denormalise(latents)).sample
    torch.testing.assert_close(theirs.decode(latents / factor).sample, images_of, atol=1e-4, rtol=1e-4)
    mean, std = latent_moments(plain, pixels)
    their_mean, their_std = latent_moments(theirs, pixels)
    torch.testing.assert_close(their_mean * factor, space.normalise(mean), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(their_std * factor, std / torch.tensor(space.std)[:, None, None], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_exported_pipeline_draws_our_images_without_this_package(trained, tmp_path, kind):
    path = trained(kind=kind)
    read = read_denoiser(path)
    export_pipeline(read, tmp_path / "pipeline")
    pipeline = LDMPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    theirs = pipeline(2, generator=image_generators(3, range(2)), num_inference_steps=4, output_type="np").images
    latents = sample(read.unet, read.schedule, (2, 4, 8, 8), num_inference_steps=4, seed=3, clip_sample=False)
    ours = LatentCodec.of(read.codec.space).decode(latents)
    np.testing.assert_allclose((ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), theirs, atol=2e-4)
    assert "LDMPipeline" in (tmp_path / "pipeline" / "README.md").read_text()
    again = import_pipeline(tmp_path / "pipeline")
    latents = sample(again.unet, again.schedule, (2, 4, 8, 8), num_inference_steps=4, seed=3, clip_sample=False)
    torch.testing.assert_close(LatentCodec.of(again.codec.space).decode(latents), ours, atol=4e-4, rtol=0)


def test_one_scale_takes_the_place_of_the_moments(encoded, quiet_trainer, tiny_module, tiny_unet):
    data = ImageDataModule(Latents(encoded(), scaling_factor=0.18215), num_val=2, batch_size=2)
    module, seen = latent_module(tiny_module, tiny_unet), []
    step = module.validation_step
    module.validation_step = lambda batch, batch_idx: (seen.append(batch["x0"].clone()), step(batch, batch_idx))[1]
    quiet_trainer().validate(module, data, verbose=False)
    torch.testing.assert_close(torch.cat(seen), 0.18215 * data.source.latents.mean[data.val_indices].float())
    assert data.codec.space.scaling_factor == 0.18215
    assert module.trained.codec.space == data.codec.space


@pytest.mark.parametrize("scaling_factor", [0.0, -1.0, float("nan")])
def test_scale_that_is_none_is_refused(scaling_factor):
    with pytest.raises(ValueError, match=r"scaling_factor must be above 0, got"):
        ImageDataModule(Latents("latents", scaling_factor=scaling_factor))


def test_autoencoder_of_an_unfinished_run_is_exported_from_its_checkpoint(
    tmp_path, quiet_trainer, tiny_images, run_cli
):
    torch.manual_seed(0)
    module = AutoencoderModule(kl_autoencoder(1, (8, 8), **SMALL))
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module, tiny_images(shape=(1, 16, 16)))
    trainer.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(FileNotFoundError, match="unet-diffusion export"):
        pretrained_autoencoder(tmp_path / "run")
    status, _, err = run_cli("export", tmp_path / "run", tmp_path / "run" / "autoencoder")
    assert status == 0, err
    loaded = pretrained_autoencoder(tmp_path / "run")
    assert fingerprint(loaded, {}) == fingerprint(module.ema_autoencoder.cpu(), {})


def test_autoencoder_with_missing_weights_is_refused(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del weights["quant_conv.bias"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"missing_keys: quant_conv\.bias"):
        pretrained_autoencoder(tmp_path)


def test_index_cannot_name_files_elsewhere(encoded, tmp_path):
    folder = encoded()
    expected = read_latents(folder).mean
    torch.save({"mean": torch.zeros(1)}, tmp_path / "evil.safetensors")
    index = json.loads((folder / "index.json").read_text())
    index |= {"shards": ["../evil.safetensors"], "weight_map": {"mean": "../evil.safetensors"}}
    (folder / "index.json").write_text(json.dumps(index))
    assert torch.equal(read_latents(folder).mean, expected)


def test_latents_that_are_a_pickle_are_refused_and_its_code_not_run(encoded, tmp_path, code):
    shard = encoded() / "latents_00000.safetensors"
    torch.save({"mean": code(tmp_path / "ran")}, shard)
    with pytest.raises(ValueError, match=r"latents_00000\.safetensors is damaged or no safetensors"):
        read_latents(shard.parent)
    assert not (tmp_path / "ran").exists()
