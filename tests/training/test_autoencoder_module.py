"""The autoencoder's training: what it minimises and counts, what it says of itself, and that it resumes."""

import copy
import functools
import json
import warnings

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel, VQModel
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.distributions import Normal, kl_divergence
from torchvision.models import squeezenet1_1

from unet_diffusion.evaluation.image_quality import PERCEPTUAL_FILES, psnr, ssim
from unet_diffusion.inference.reading import read_autoencoder, read_denoiser
from unet_diffusion.models.autoencoders import kl_autoencoder, pretrained_autoencoder, reconstruct, vq_autoencoder
from unet_diffusion.models.discriminator import PatchDiscriminator, hinge_loss
from unet_diffusion.training import AutoencoderModule, adversarial, latent_terms, symptoms
from unet_diffusion.training import autoencoder as training
from unet_diffusion.training.adversarial import AdversarialLoss

SMALL = {"layers_per_block": 1, "norm_num_groups": 4, "mid_attention": False}
ADAM = functools.partial(torch.optim.Adam, lr=1.0e-2)
SHAPE = (1, 16, 16)


def kl_net(**options) -> AutoencoderKL:
    torch.manual_seed(0)
    return kl_autoencoder(1, (8, 8), **{"latent_channels": 2, **SMALL, **options})


def vq_net(**options) -> VQModel:
    torch.manual_seed(0)
    return vq_autoencoder(1, (8, 8), **{"num_codes": 16, "latent_channels": 2, **SMALL, **options})


def critic() -> PatchDiscriminator:
    torch.manual_seed(1)
    return PatchDiscriminator(1, channels=32, num_layers=1)


def module(autoencoder=None, **options) -> AutoencoderModule:
    return AutoencoderModule(autoencoder or kl_net(), **{"optimizer": ADAM, **options})


def adversary(discriminator=None, **options) -> AdversarialLoss:
    return AdversarialLoss(discriminator or critic(), **{"optimizer": ADAM, **options})


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def test_kl_divergence_is_that_of_torch_and_of_diffusers():
    mean, std = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1).exp()
    ours = latent_terms.kl_divergence(mean, std)
    torch.testing.assert_close(ours, kl_divergence(Normal(mean, std), Normal(0.0, 1.0)))
    posterior = kl_net().encode(noise(2, *SHAPE)).latent_dist
    torch.testing.assert_close(latent_terms.kl_divergence(posterior.mean, posterior.std).sum((1, 2, 3)), posterior.kl())


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_fidelity_is_the_likelihood_of_an_image_under_the_learned_variance(kind, power):
    made = module(reconstruction=kind, learn_variance=True)
    with torch.no_grad():
        made.log_variance.fill_(0.3)
    images, others = noise(2, *SHAPE), noise(2, *SHAPE, seed=1)
    errors = (images - others).abs() ** power
    expected = (errors * torch.exp(torch.tensor(-0.3)) + 0.3).flatten(1).sum(1).mean()
    torch.testing.assert_close(made._fidelity(images, others), expected)


def test_adversarial_weight_makes_gradients_at_the_last_layer_equal(monkeypatch):
    made = module(adversarial=adversary(weight=0.8))
    images = noise(2, *SHAPE)
    reconstructions = made.autoencoder(images).sample
    fidelity = made._fidelity(images, reconstructions)
    adversarial = -made.discriminator(reconstructions).mean()
    last = made.autoencoder.decoder.conv_out.weight
    wanted, got = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (fidelity, adversarial))
    weight = made.adversarial.adaptive_weight(fidelity, adversarial, last)
    torch.testing.assert_close(weight, 0.8 * wanted / (got + 1e-4))
    monkeypatch.setattr("unet_diffusion.training.adversarial.MAX_ADAPTIVE_WEIGHT", 0.5)
    weight = made.adversarial.adaptive_weight(fidelity, adversarial, last)
    torch.testing.assert_close(weight, torch.tensor(0.8 * 0.5))


def test_hinge_loss_of_a_closed_case():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, fake) == 0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2)
    assert hinge_loss(torch.zeros(3), torch.zeros(3)) == 1


def test_discriminator_sees_patches_of_the_stated_size():
    network, image = PatchDiscriminator(3, channels=32), torch.zeros(1, 3, 128, 128, requires_grad=True)
    for layer in network.layers:  # norms look at the whole image
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x
    network(image)[0, 0, 7, 7].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70
    assert network(torch.zeros(1, 3, network.smallest_size, network.smallest_size)).shape[2:] == (1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, network.smallest_size - 1, network.smallest_size - 1))


def test_steps_are_those_of_the_autoencoder_and_the_discriminator_starts_at_one(quiet_trainer, tiny_images):
    made = module(adversarial=adversary(start=3))
    before, changed = copy.deepcopy(made.discriminator.state_dict()), []

    def has_changed():
        return any(not torch.equal(before[key], value) for key, value in made.discriminator.state_dict().items())

    trainer = quiet_trainer(max_steps=5, limit_val_batches=0)
    made.on_train_batch_end = lambda *args: changed.append((trainer.global_step, has_changed()))
    trainer.fit(made, tiny_images(shape=SHAPE))
    assert changed == [(1, False), (2, False), (3, False), (4, True), (5, True)]


def test_discriminator_learns_to_tell_images_from_reconstructions(quiet_trainer, tiny_images):
    frozen = functools.partial(torch.optim.SGD, lr=0.0)  # the autoencoder
    made, data = module(adversarial=adversary(), optimizer=frozen), tiny_images(shape=SHAPE)
    quiet_trainer(max_steps=30, limit_val_batches=0).fit(made, data)
    images = data.image_set.images[data.train_indices].float() / 127.5 - 1
    with torch.no_grad():
        real, fake = (made.discriminator(x).mean() for x in (images, reconstruct(made.autoencoder, images)))
    assert real > fake + 0.5


def test_autoencoder_moves_towards_what_the_discriminator_takes_for_real(quiet_trainer, tiny_images, monkeypatch):
    frozen = functools.partial(torch.optim.SGD, lr=0.0)  # the discriminator
    made = module(adversarial=adversary(optimizer=frozen), kl_weight=0.0)
    monkeypatch.setattr(made.adversarial, "adaptive_weight", lambda *losses: 1e6)  # nothing else counts
    data = tiny_images(shape=SHAPE)
    data.setup()
    images = data.image_set.images[data.train_indices].float() / 127.5 - 1

    def realness():
        with torch.no_grad():
            return made.discriminator(reconstruct(made.autoencoder, images)).mean().item()

    before = realness()
    quiet_trainer(max_steps=20, limit_val_batches=0).fit(made, data)
    assert realness() > before + 0.01


def test_whole_loss_is_the_sum_of_its_weighted_parts(quiet_trainer, tiny_images):
    sgd = functools.partial(torch.optim.SGD, lr=1.0e-4)
    vq = module(vq_net(), codebook_weight=0.7, optimizer=sgd)
    expected = copy.deepcopy(vq.autoencoder)
    data = tiny_images(shape=SHAPE, batch_size=16)
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(vq, data)
    images = data.image_set.images[data.train_indices].float() / 127.5 - 1  # all of them are in the one batch
    latents = expected.encode(images).latents
    codes = expected.quantize(latents)[0].detach() - latents.detach() + latents  # straight through
    distance = (expected.quantize(latents)[0].detach() - latents).square().mean()
    back = (expected.quantize.embedding(nearest(expected, latents)).movedim(-1, 1) - latents.detach()).square().mean()
    reconstructions = expected.decoder(expected.post_quant_conv(codes))
    loss = (images - reconstructions).abs().sum() / 16 + 0.7 * 256 * (distance + 0.25 * back)
    with torch.no_grad():
        for parameter, gradient in zip(
            expected.parameters(), torch.autograd.grad(loss, list(expected.parameters())), strict=True
        ):
            parameter -= 1.0e-4 * gradient
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(vq.autoencoder.state_dict()[key], value, atol=1e-5, rtol=1e-4)


def nearest(autoencoder, latents) -> torch.Tensor:
    tokens = latents.detach().movedim(1, -1)
    distances = torch.cdist(tokens.flatten(0, 2), autoencoder.quantize.embedding.weight)
    return distances.argmin(dim=1).view(tokens.shape[:-1])


def test_code_unused_for_so_many_steps_becomes_a_latent_and_the_others_stay(quiet_trainer, tiny_images):
    still = functools.partial(torch.optim.SGD, lr=0.0)
    made = module(vq_net(), restart_codes_after=2, optimizer=still)
    before = made.autoencoder.quantize.embedding.weight.clone()
    data, seen = tiny_images(shape=SHAPE, batch_size=16), []  # all images are in the one batch
    made.on_train_batch_end = lambda *args: seen.append(made.autoencoder.quantize.embedding.weight.clone())
    quiet_trainer(max_steps=3, limit_val_batches=0).fit(made, data)
    with torch.no_grad():
        latents = made.autoencoder.encode(data.image_set.images[data.train_indices].float() / 127.5 - 1).latents
    vectors = latents.movedim(1, -1).reshape(-1, 2)
    is_used = torch.zeros(16, dtype=torch.bool).scatter(0, torch.cdist(vectors, before).argmin(dim=1), True)
    assert 0 < is_used.sum() < 16
    assert torch.equal(seen[1], before)  # until then each code waits
    assert torch.equal(seen[2][is_used], before[is_used])
    restarted = seen[2][~is_used]
    distances = (restarted[:, None] - vectors).norm(dim=2)  # cdist's matrix product would lose digits
    assert distances.amin(dim=1).max() < 1e-5  # batches come in any order, which rounds
    assert len(restarted.unique(dim=0)) > 1
    assert torch.equal(made.ema_autoencoder.quantize.embedding.weight, seen[2])


def test_latents_that_are_not_finite_restart_no_code(quiet_trainer):
    made = module(vq_net(), restart_codes_after=1)
    made.latent_term.idle_steps += 1
    trainer, networks = quiet_trainer(max_steps=1), [made.autoencoder, made.ema_autoencoder]
    before = made.autoencoder.quantize.embedding.weight.clone()
    made.latent_term.restart_idle_codes(networks, torch.full((1, 2, 4, 4), torch.nan), trainer)
    assert torch.equal(made.autoencoder.quantize.embedding.weight, before)


def test_codes_out_of_reach_come_into_use(quiet_trainer):
    from unet_diffusion.data import Digits, ImageDataModule

    made = module(vq_net(num_codes=64), ema_decay=0.9, restart_codes_after=10)
    data = ImageDataModule(Digits(), batch_size=32)
    for autoencoder in (made.autoencoder, made.ema_autoencoder):
        autoencoder.quantize.embedding.weight.data[32:] += 1000
    trainer = quiet_trainer(max_steps=60)
    trainer.fit(made, data)
    assert trainer.validate(made, data, verbose=False)[0]["val/codes_used"] > 0.75


@pytest.mark.parametrize("learned", [True, False])
def test_learned_variance_is_in_the_optimiser(quiet_trainer, tiny_images, learned):
    made = module(learn_variance=learned)
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(made, tiny_images(shape=SHAPE))
    assert bool(made.log_variance != 0) == learned


def test_average_moves_once_a_step_with_warm_up(quiet_trainer, tiny_images):
    made, raw = module(adversarial=adversary(), ema_decay=0.5), []
    expected = made.autoencoder.decoder.conv_out.bias.detach().clone()
    made.on_train_batch_end = lambda *args: raw.append(made.autoencoder.decoder.conv_out.bias.detach().clone())
    quiet_trainer(max_steps=4, limit_val_batches=0).fit(made, tiny_images(shape=SHAPE))
    for n, value in enumerate(raw, start=1):
        expected = torch.lerp(expected, value, 1 - min(0.5, (1 + n) / (10 + n)))
    torch.testing.assert_close(made.ema_autoencoder.decoder.conv_out.bias, expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", [kl_net, vq_net])
def test_training_brings_reconstructions_nearer(quiet_trainer, make):
    from unet_diffusion.data import Digits, ImageDataModule

    made, data = module(make(), ema_decay=0.9), ImageDataModule(Digits(), batch_size=32, num_val=64)
    trainer = quiet_trainer(max_steps=250)
    before = trainer.validate(made, data, verbose=False)[0]["val/psnr"]
    trainer.fit(made, data)
    assert trainer.validate(made, data, verbose=False)[0]["val/psnr"] > before + 5


def test_scores_of_images_are_those_of_scikit_image():
    images, others = noise(2, 3, 24, 24), (noise(2, 3, 24, 24) + 0.2 * noise(2, 3, 24, 24, seed=1)).clamp(-1, 1)
    for i in range(2):
        pair = images[i].numpy(), others[i].numpy()
        assert psnr(images, others)[i].item() == pytest.approx(peak_signal_noise_ratio(*pair, data_range=2), abs=1e-4)
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0}
        # theirs leaves out the border, which ours mirrors
        padded = (np.pad(one, ((0, 0), (5, 5), (5, 5)), mode="reflect") for one in pair)
        expected = structural_similarity(*padded, data_range=2, **options)
        assert ssim(images, others)[i].item() == pytest.approx(expected, abs=1e-4)
        with torch.autocast("cpu", torch.bfloat16):  # as in validation
            assert ssim(images, others)[i].item() == pytest.approx(expected, abs=1e-4)
    assert psnr(images, images).tolist() == [100, 100]
    assert ssim(images, images).tolist() == pytest.approx([1, 1])
    assert ssim(images[..., :10], others[..., :10]).isnan().all()  # narrower than its window


def validated(made, data, quiet_trainer) -> tuple[dict, torch.Tensor]:
    logged = quiet_trainer().validate(made, data, verbose=False)[0]
    return logged, data.image_set.images[data.val_indices].float() / 127.5 - 1


def test_validation_tells_the_moments_of_the_latents(quiet_trainer, tiny_images):
    made, data = module(), tiny_images(shape=SHAPE, batch_size=3)
    logged, images = validated(made, data, quiet_trainer)
    with torch.no_grad():
        posterior = made.ema_autoencoder.encode(images).latent_dist
        expected = psnr(images, reconstruct(made.ema_autoencoder, images)).mean()
    signal, noise_share = posterior.mean.var(dim=(0, 2, 3), correction=0).mean(), posterior.var.mean()
    std = (posterior.mean.var(correction=0) + noise_share).sqrt()
    assert logged["val/latent_mean"] == pytest.approx(posterior.mean.mean().item(), abs=1e-5)
    assert logged["val/latent_std"] == pytest.approx(std.item(), rel=1e-4)
    assert logged["val/latent_signal"] == pytest.approx((signal / (signal + noise_share)).item(), rel=1e-3)
    assert logged["val/psnr"] == pytest.approx(expected.item(), abs=1e-3)
    assert made.latent_std == pytest.approx(logged["val/latent_std"])


def test_validation_tells_how_many_codes_are_used(quiet_trainer, tiny_images):
    made, data = module(vq_net()), tiny_images(shape=SHAPE, batch_size=3)
    logged, images = validated(made, data, quiet_trainer)
    autoencoder = made.ema_autoencoder
    with torch.no_grad():
        latents = autoencoder.encode(images).latents.movedim(1, -1).reshape(-1, 2)
        numbers = torch.cdist(latents, autoencoder.quantize.embedding.weight).argmin(dim=1)
    shares = torch.bincount(numbers, minlength=16) / len(numbers)
    assert logged["val/codes_used"] == pytest.approx((shares > 0).float().mean().item())
    perplexity = torch.distributions.Categorical(shares).entropy().exp().item()
    assert logged["val/code_perplexity"] == pytest.approx(perplexity, rel=1e-4)


@pytest.fixture
def judged_at_once(monkeypatch):
    monkeypatch.setattr(training, "MIN_STEPS_TO_JUDGE", 0)
    monkeypatch.setattr(symptoms.warn_of, "__kwdefaults__", {"after": 0})


def test_collapsed_posterior_is_warned_about(quiet_trainer, tiny_images, judged_at_once):
    made = module(kl_weight=10.0)
    torch.nn.init.zeros_(made.ema_autoencoder.quant_conv.weight)  # mean and variance say nothing of the image
    with pytest.warns(UserWarning, match=r"of the latents: over 90% of the variance is noise.*Lower kl_weight"):
        quiet_trainer().validate(made, tiny_images(shape=SHAPE), verbose=False)


def test_unused_codes_are_warned_about(quiet_trainer, tiny_images, judged_at_once):
    made = module(vq_net(num_codes=64))
    torch.nn.init.zeros_(made.ema_autoencoder.quant_conv.weight)
    with pytest.warns(UserWarning, match=r"Only 1 of 64 codes are used"):
        quiet_trainer().validate(made, tiny_images(shape=SHAPE), verbose=False)


def fit_with_critic_loss(losses, quiet_trainer, tiny_images, monkeypatch):
    """Trains as if the discriminator had these losses, a step each."""
    given = iter(losses)
    monkeypatch.setattr(training, "hinge_loss", lambda real, fake: 0 * (real.mean() + fake.mean()) + next(given))
    trainer = quiet_trainer(max_steps=len(losses), limit_val_batches=0, log_every_n_steps=1)
    trainer.fit(module(adversarial=adversary()), tiny_images(shape=SHAPE))


@pytest.mark.parametrize(
    ("loss", "message"),
    [(0.01, "tells all reconstructions from images"), (1.0, "cannot tell reconstructions .* raise its")],
)
def test_discriminator_that_has_won_or_lost_is_warned_about(
    quiet_trainer, tiny_images, judged_at_once, monkeypatch, loss, message
):
    monkeypatch.setattr(adversarial, "MEMORY", 0.1)
    with pytest.warns(UserWarning, match=message):
        fit_with_critic_loss([loss] * 3, quiet_trainer, tiny_images, monkeypatch)


def test_average_loss_of_a_discriminator_begins_undecided():
    made = adversary()
    for step in range(1, 300):
        average = made.count(torch.zeros(())).item()
        assert average == pytest.approx(0.5 * 0.98**step, rel=1e-4)
        assert (adversarial.problem_of(average) is None) == (step < 160)  # log(0.02 / 0.5) / log(0.98) is 159.3


@pytest.mark.parametrize("losses", [[0.5, 0.5], [0.5, 0.0, 1.2], [0.0], [1.2]])
def test_discriminator_that_is_right_at_times_is_not_warned_about(
    quiet_trainer, tiny_images, judged_at_once, monkeypatch, losses
):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*discriminator")
        fit_with_critic_loss(losses, quiet_trainer, tiny_images, monkeypatch)


def test_no_collapse_is_seen_before_there_was_time_to_learn(quiet_trainer, tiny_images):
    made = module()
    torch.nn.init.zeros_(made.ema_autoencoder.quant_conv.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*many workers|.*in eval mode")
        quiet_trainer().validate(made, tiny_images(shape=SHAPE), verbose=False)


@pytest.mark.parametrize("make", [kl_net, vq_net])
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(check_resuming, tiny_images, make):
    options = {"restart_codes_after": 2, "lr_warmup_steps": 3, "learn_variance": True}
    check_resuming(lambda: module(make(), adversarial=adversary(start=1), **options), lambda: tiny_images(shape=SHAPE))


@pytest.fixture
def trained_file(quiet_trainer, tiny_images, tmp_path):
    def make(autoencoder):
        made = module(autoencoder, ema_decay=0.5)
        trainer = quiet_trainer(max_steps=2)
        trainer.fit(made, tiny_images(shape=SHAPE))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return made, tmp_path / "last.ckpt"

    return make


@pytest.mark.parametrize("make", [kl_net, vq_net])
def test_checkpoint_is_read_with_its_averaged_weights(trained_file, make):
    made, path = trained_file(make())
    trained = read_autoencoder(path)
    assert type(trained.autoencoder) is type(made.autoencoder)
    assert not trained.autoencoder.training
    assert trained.image_shape == SHAPE
    x = noise(2, *SHAPE)
    with torch.no_grad():
        # the one is channels last in memory, and the other is not
        torch.testing.assert_close(reconstruct(trained.autoencoder, x), reconstruct(made.ema_autoencoder, x))
    with pytest.raises(ValueError, match="holds an autoencoder, not a denoiser; use unet-diffusion encode or export"):
        read_denoiser(path)


@pytest.mark.parametrize("make", [kl_net, vq_net])
def test_exported_folder_is_loaded_by_diffusers_with_the_scale_of_the_latents(trained_file, tmp_path, make):
    made, _ = trained_file(make())
    made.latent_std = 2.5
    made.trained.export(tmp_path / "out")
    loaded = type(made.autoencoder).from_pretrained(tmp_path / "out")
    assert loaded.config.scaling_factor == pytest.approx(1 / 2.5)
    x = noise(2, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(reconstruct(loaded, x), reconstruct(made.ema_autoencoder, x), atol=1e-5, rtol=1e-5)
    with pytest.raises(FileExistsError, match="is not overwritten"):
        made.trained.export(tmp_path / "out")
    made.trained.export(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(("make", "tag", "std"), [(kl_net, "KL", 2.5), (vq_net, "16 codes", None)])
def test_card_of_an_exported_autoencoder_says_how_to_use_it_and_its_python_runs(trained_file, tmp_path, make, tag, std):
    made, _ = trained_file(make())
    made.latent_std, made.settings = std, {"model": {"lr": 0.5}, "note": "größer"}
    made.ema_autoencoder.register_to_config(scaling_factor=0.5)  # as an imported one may have, until it is measured
    made.trained.export(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    front_matter = yaml.safe_load(card.split("---")[1])
    assert front_matter == {"library_name": "diffusers", "tags": ["autoencoder", tag, "unet-diffusion"]}
    assert yaml.safe_load(card.split("Settings:\n```yaml\n")[1].split("```")[0]) == made.settings
    assert ("standard deviation of 2.5 to 1" if std else "was not measured; `scaling_factor` stays 0.5") in card
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "out")), names)
    assert names["latents"].shape == (1, 2, 8, 8)
    assert "latents of 2 x 8 x 8" in card
    with torch.no_grad():
        expected = reconstruct(made.ema_autoencoder, names["images"])
    torch.testing.assert_close(names["reconstructions"], expected, atol=1e-5, rtol=1e-5)


def test_pretrained_folder_works_in_its_place(quiet_trainer, tiny_images, tmp_path):
    theirs = kl_net()
    theirs.save_pretrained(tmp_path / "pipeline" / "vae")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        ours = pretrained_autoencoder(folder)
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    quiet_trainer(max_steps=1).fit(module(ours), tiny_images(shape=SHAPE))


def test_folder_without_autoencoder_or_with_another_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pretrained_autoencoder(tmp_path)
    blocks = {"num_encoder_blocks": (1,), "num_decoder_blocks": (1,)}
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,), decoder_block_out_channels=(8,), **blocks)
    tiny.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds AutoencoderTiny"):
        pretrained_autoencoder(tmp_path)


def test_published_autoencoder_has_its_published_number_of_parameters():
    with torch.device("meta"):
        model = kl_autoencoder(3, (128, 256, 512, 512))  # kl-f8 of Rombach et al. 2022
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863


def test_checkpoint_of_another_autoencoder_is_refused(trained_file, quiet_trainer, tiny_images):
    _, path = trained_file(kl_net())
    other = module(kl_net(latent_channels=3))
    with pytest.raises(ValueError, match="latent_channels was 2, is 3"):
        quiet_trainer(max_steps=4).fit(other, tiny_images(shape=SHAPE), ckpt_path=path)


@pytest.fixture
def squeezenet(tmp_path, monkeypatch):
    """Random weights where torchvision's would be, as a stand-in."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    path = tmp_path / "cache" / "hub" / "checkpoints" / PERCEPTUAL_FILES["squeeze"]
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), path)
    return path


def test_perceptual_error_is_added_to_each_pixel_and_its_network_is_in_no_checkpoint(squeezenet):
    plain, made = module(), module(perceptual_weight=2.0, perceptual_net="squeeze")
    assert made.state_dict().keys() == plain.state_dict().keys()
    images, others = noise(2, 3, 64, 64), noise(2, 3, 64, 64, seed=1)
    perceptual = made._perceptual[0](images, others)
    assert (perceptual > 0).all()
    expected = plain._fidelity(images, others) + 2 * perceptual.mean() * images[0].numel()
    torch.testing.assert_close(made._fidelity(images, others), expected)
    assert made._fidelity(images, images) < made._fidelity(images, others)


def test_code_in_the_weights_of_the_perceptual_network_is_refused_and_not_run(squeezenet, tmp_path, code):
    torch.save({"weight": code(tmp_path / "ran")}, squeezenet)
    with pytest.raises(ValueError, match=r"squeezenet.*could run code"):
        module(perceptual_weight=2.0, perceptual_net="squeeze")
    assert not (tmp_path / "ran").exists()


def test_missing_weights_of_the_perceptual_network_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth.*set perceptual_weight to 0"):
        module(perceptual_weight=1.0)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("reconstruction must be one of l1, l2", {"reconstruction": "l3"}),
        ("kl_weight must be 0 or more, got -1", {"kl_weight": -1.0}),
        ("restart_codes_after must be 0 or more", {"restart_codes_after": -1}),
        ("ema_decay", {"ema_decay": 1.0}),
        (
            "got UNet2DModel",
            {
                "autoencoder": UNet2DModel(
                    block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
                )
            },
        ),
    ],
)
def test_impossible_settings_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        module(**options)


@pytest.mark.parametrize(
    ("message", "made", "shape"),
    [
        ("the images have 3 channels and the autoencoder takes 1", lambda: module(), (3, 16, 16)),
        ("multiples of 2, got 15 x 16", lambda: module(), (1, 15, 16)),
        (
            "the discriminator takes 3",
            lambda: module(adversarial=adversary(PatchDiscriminator(3, num_layers=1))),
            SHAPE,
        ),
        ("images of 24 pixels", lambda: module(adversarial=adversary(PatchDiscriminator(1, channels=32))), SHAPE),
    ],
)
def test_what_does_not_fit_is_refused_before_training(quiet_trainer, tiny_images, message, made, shape):
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_epochs=1).fit(made(), tiny_images(shape=shape))


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("multiple of norm_num_groups 32, got 8", lambda: kl_autoencoder(1, (8,))),
        (r"attention_levels must be in \[0, 2\), got 2", lambda: kl_net(attention_levels=[2])),
        ("multiple of 32, got 8", lambda: PatchDiscriminator(1, channels=8)),
        ("num_layers must be at least 1", lambda: PatchDiscriminator(1, num_layers=0)),
        ("adversarial.start and weight must be 0 or more, got -1 and 0.5", lambda: adversary(start=-1)),
    ],
)
def test_impossible_networks_are_refused(message, make):
    with pytest.raises(ValueError, match=message):
        make()


def test_record_is_plain_json(trained_file):
    _, path = trained_file(vq_net())
    record = torch.load(path, weights_only=True)["autoencoder"]
    assert json.loads(json.dumps(record)) == record
