"""The evaluation of an autoencoder agrees with scikit-image and numpy, and sees collapsed channels and dead codes."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from halves import Half
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from unet_diffusion.data import ImageDataModule, ImageSet, Source
from unet_diffusion.evaluation import autoencoders, image_quality
from unet_diffusion.evaluation.autoencoder_sections import worst_section
from unet_diffusion.evaluation.autoencoders import evaluate_autoencoder
from unet_diffusion.evaluation.distances import frechet_distance
from unet_diffusion.evaluation.image_quality import PERCEPTUAL_FILES
from unet_diffusion.evaluation.latent_sums import LatentSums
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.models.autoencoders import kl_autoencoder, vq_autoencoder
from unet_diffusion.runtime.pixel_values import PixelValues

SHAPE = (1, 16, 16)
NUM_VAL = 40  # more than a batch
SMALL = {"channels": [4, 8], "layers_per_block": 1, "mid_attention": False, "norm_num_groups": 2}


class Blobs(Source):
    """100 smooth grey images."""

    def load(self, *, progress=True) -> ImageSet:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(100, 1, 4, 4, generator=generator)
        images = torch.nn.functional.interpolate(coarse, SHAPE[1:], mode="bicubic").clamp(0, 1)
        return ImageSet((images * 255).to(torch.uint8))


def data() -> ImageDataModule:
    return ImageDataModule(Blobs(), num_val=NUM_VAL, batch_size=8, num_workers=0)


def kl(**options) -> Autoencoder:
    torch.manual_seed(0)
    network = kl_autoencoder(1, **{**SMALL, "latent_channels": 3, **options}).eval()
    return Autoencoder(network, SHAPE)


def vq(num_codes: int) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(vq_autoencoder(1, **SMALL, latent_channels=2, num_codes=num_codes).eval(), SHAPE)


def validated() -> tuple[ImageDataModule, torch.Tensor]:
    """The data, and its validation images in [-1, 1]."""
    loaded = data()
    loaded.setup("fit")
    return loaded, loaded.image_set.images[loaded.val_indices].float() / 127.5 - 1


def test_quality_is_that_of_scikit_image():
    loaded, images = validated()
    autoencoder = kl()
    result = evaluate_autoencoder(autoencoder, loaded).figures
    reconstructions = autoencoder.decode(autoencoder.encode(images)).clamp(-1, 1)
    pairs = [(a[0].numpy(), b[0].numpy()) for a, b in zip(images, reconstructions, strict=True)]
    psnr = [peak_signal_noise_ratio(*pair, data_range=2) for pair in pairs]
    options = {"data_range": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    assert result["psnr_images"].value == pytest.approx(np.mean(psnr), abs=1e-3)
    whole = peak_signal_noise_ratio(images.numpy(), reconstructions.numpy(), data_range=2)
    assert result["psnr_pooled"].value == pytest.approx(whole, abs=1e-3)
    assert result["ssim"].value == pytest.approx(np.mean([structural_similarity(*pair, **options) for pair in pairs]),
                                                 abs=0.02)  # torchmetrics has another border  # fmt: skip


def test_moments_of_latents_are_those_of_numpy():
    loaded, images = validated()
    autoencoder = kl()
    table = evaluate_autoencoder(autoencoder, loaded).tables["latents"]
    mean, std = autoencoder.latent_moments(images)
    flat, noise = mean.movedim(1, 0).flatten(1).numpy(), std.square().movedim(1, 0).flatten(1).mean(dim=1).numpy()
    assert [row[1] for row in table.rows] == pytest.approx(flat.mean(axis=1), rel=1e-4)
    assert [row[2] for row in table.rows] == pytest.approx(np.sqrt(flat.var(axis=1) + noise), rel=1e-4)
    assert [row[3] for row in table.rows] == pytest.approx(flat.var(axis=1) / (flat.var(axis=1) + noise), rel=1e-3)
    correlation = np.corrcoef(flat)
    for channel, row in enumerate(table.rows):
        assert row[4] == pytest.approx(correlation[channel, int(row[5])], abs=1e-4)


@dataclass(repr=False)
class Changed(Autoencoder):
    """An autoencoder whose latents are changed."""

    change: object = None

    def latent_moments(self, images):
        return self.change(*super().latent_moments(images))


def collapsed(mean, std):
    mean, std = mean.clone(), std * 0.01
    mean[:, 1], std[:, 1] = mean[:, 1] * 0.01, 1.0
    return mean, std


def constant(mean, std):
    mean, std = mean.clone(), std.clone()
    mean[:, 2], std[:, 2] = 0.5, 0
    return mean, std


def twice(mean, std):
    mean = mean.clone()
    mean[:, 2] = -2 * mean[:, 0]
    return mean, std


@pytest.mark.parametrize(("change", "told"), [
    (collapsed, "Channel 1 of the latents: over 90% of the variance is noise"),
    (constant, "Channel 2 of the latents: hardly varies"),
    (twice, "Channels 0 and 2 say nearly the same (correlation -1.00)"),
])  # fmt: skip
def test_channels_that_are_no_use_are_told(change, told):
    autoencoder = Changed(kl().autoencoder, SHAPE, change=change)
    assert any(warning.startswith(told) for warning in evaluate_autoencoder(autoencoder, data()).warnings)


def test_dead_codes_are_counted():
    autoencoder = vq(64)
    with torch.no_grad():  # all codes but two are out of reach
        codes = autoencoder.autoencoder.quantize.embedding.weight
        codes[2:] += 1000
    result = evaluate_autoencoder(autoencoder, data())
    used = round(64 * result.figures["codes_used"].value)
    assert used in (1, 2)
    assert result.figures["codes_dead"].value == 64 - used
    assert 1 <= result.figures["code_perplexity"].value <= used
    assert any(f"Only {used} of 64 codes are used" in warning for warning in result.warnings)


def test_perplexity_is_the_number_of_codes_that_are_used_evenly():
    sums = LatentSums.of(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4), torch.arange(8) % 4, 16)
    figures = {figure.key: figure.value for figure in autoencoders.code_section(sums.codes).figures}
    assert figures == {"codes_used": 0.25, "codes_dead": 12, "code_perplexity": pytest.approx(4)}


def features(images: torch.Tensor) -> torch.Tensor:
    return images.unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(4, 5)).flatten(1)


def test_the_frechet_distance_is_that_of_all_images():
    loaded, images = validated()
    autoencoder = kl()
    result = evaluate_autoencoder(autoencoder, loaded, features=features, features_name="block means").figures["rfid"]
    reconstructions = autoencoder.decode(autoencoder.encode(images)).clamp(-1, 1)
    assert result.value == pytest.approx(frechet_distance(features(reconstructions), features(images)), rel=1e-4)
    assert result.real is not None
    assert result.real < result.value  # an untrained network is further off than other images
    assert "block means: 4 features of 40 images" in result.remark
    assert "too large" not in result.remark


def test_a_frechet_distance_of_few_images_is_said_to_be_too_large():
    figure = evaluate_autoencoder(kl(), data(), features=lambda images: images[:, 0, :5, :5].flatten(1)).figures["rfid"]
    assert "25 features of 40 images. Beside it: as many training images. It is too large" in figure.remark


@pytest.mark.parametrize("num_val", [1, 9])
def test_there_is_no_frechet_distance_of_hardly_any_images(num_val):
    few = ImageDataModule(Blobs(), num_val=num_val, batch_size=8, num_workers=0)
    figure = evaluate_autoencoder(kl(), few, features=features).figures["rfid"]
    assert np.isnan(figure.value)
    assert figure.remark == f"Not measured: there must be at least 10 images to validate on (num_val), got {num_val}."


def test_transparent_pixels_of_the_worst_images_are_shown_white():
    images = torch.full((1, 4, 96, 96), -1.0)  # black, and wholly transparent
    (picture,) = worst_section(images, -torch.ones(1, 4, 96, 96), np.array([100.0]), PixelValues()).pictures
    assert picture.image.getpixel((50, 50)) == (255, 255, 255)


def test_the_worst_images_are_shown_by_the_chosen_channels():
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    images = levels[None, :, None, None].expand(1, 5, 96, 96)
    (picture,) = worst_section(images, images, np.array([100.0]), PixelValues(shown=(4, 2, 0))).pictures
    assert picture.image.getpixel((50, 50)) == (255, 128, 0)


def test_images_of_another_range_of_values_are_refused():
    loaded = data()
    loaded.source.values = PixelValues("uint16", 0, 4095)
    message = r"autoencoder was trained on numbers of 0 to 255 as -1 to 1, and .* 0 to 4095; leave data.value_range out"
    with pytest.raises(ValueError, match=message):
        evaluate_autoencoder(kl(), loaded)
    autoencoder = kl()
    autoencoder.values = loaded.source.values
    assert np.isfinite(evaluate_autoencoder(autoencoder, loaded).figures["psnr_images"].value)


def test_a_frechet_distance_is_that_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    moved = first + torch.tensor([3.0, 0, 4])
    assert frechet_distance(moved, first) == pytest.approx(25)


def test_without_features_and_weights_nothing_is_made_up(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    result = evaluate_autoencoder(kl(), data()).figures
    assert "rfid" not in result
    assert np.isnan(result["lpips"].value)
    assert "grey or RGB images of 32 pixels" in result["lpips"].remark
    assert autoencoders._perceptual((3, 64, 64))[2] == autoencoders.NOWHERE.format(
        " or ".join(PERCEPTUAL_FILES[net] for net in ("alex", "vgg", "squeeze"))
    )


def test_lpips_is_measured_where_its_weights_are(monkeypatch, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / PERCEPTUAL_FILES["vgg"]).touch()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(autoencoders, "LPIPS_SIDE", 16)

    class Mean(torch.nn.Module):
        def forward(self, images, reconstructions):
            assert images.shape[1] == reconstructions.shape[1] == 3
            return (images - reconstructions).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setattr(autoencoders, "lpips", lambda net: Mean())
    figure = evaluate_autoencoder(kl(), data()).figures["lpips"]
    assert figure.title == "LPIPS (vgg)"
    assert figure.value > 0
    assert image_quality.perceptual_file("vgg").is_file()


def test_two_processes_give_what_one_gives():
    for autoencoder in (kl(), vq(16)):
        alone = evaluate_autoencoder(autoencoder, data(), features=features)
        first = Half(0, 2)
        evaluate_autoencoder(autoencoder, data(), features=features, group=first)
        both = evaluate_autoencoder(autoencoder, data(), features=features, group=Half(1, 2, first.own))
        for key, figure in alone.figures.items():
            assert both.figures[key].value == pytest.approx(figure.value, rel=1e-4, nan_ok=True), key
        for key, table in alone.tables.items():
            for row, expected in zip(both.tables[key].rows, table.rows, strict=True):
                assert row == [pytest.approx(x, rel=1e-3) if isinstance(x, float) else x for x in expected]


def test_the_worst_images_are_shown_with_their_errors_and_progress_is_told():
    seen = []
    result = evaluate_autoencoder(kl(), data(), progress=lambda done, total: seen.append((done, total)))
    (picture,) = [one for section in result.sections for one in section.pictures]
    assert picture.image.size == (8 * 98 + 2, 3 * 98 + 2)  # of 96 pixels and a line
    assert seen == [(32, NUM_VAL), (NUM_VAL, NUM_VAL)]


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"must be as those that the autoencoder was trained on, \(1, 8, 8\), got"):
        evaluate_autoencoder(Autoencoder(kl().autoencoder, (1, 8, 8)), data())
