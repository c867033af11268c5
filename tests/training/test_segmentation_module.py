"""The segmenter's training: what it minimises, what it validates, what it takes over, and that it resumes."""

import copy
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint

from unet_diffusion.data import (
    Digits,
    ImageDataModule,
    SegmentationDataModule,
    SyntheticCells,
)
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.evaluation.thresholds import SIZES, ScoresByThreshold
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.reading import read_denoiser, read_segmenter
from unet_diffusion.inference.record import save_denoiser
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.segmentation.augmentation import Augmentation
from unet_diffusion.segmentation.features import FeatureClassifier
from unet_diffusion.segmentation.labels import Targets, instances_from
from unet_diffusion.segmentation.object_scores import average_precision
from unet_diffusion.segmentation.scores import THRESHOLDS, dice, iou, pixel_error
from unet_diffusion.training import DiffusionModule, SegmentationModule, base
from unet_diffusion.training.joint import JointDenoising

SGD = functools.partial(torch.optim.SGD, lr=0.05)
ADAM = functools.partial(torch.optim.Adam, lr=1.0e-3)
SMALL = {"in_channels": 1, "channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}


def cells(**options) -> SegmentationDataModule:
    about_targets = {
        name: options.pop(name) for name in ("separate_borders", "affinities", "ignore_label") if name in options
    }
    targets = Targets(label_format="instances", **about_targets)
    settings = {"window_size": 32, "batch_size": 2, "windows_per_image": 2, "num_val": 2, **options}
    source = SyntheticCells(num_images=settings.pop("num_images", 5))
    return SegmentationDataModule(source, targets, **settings)


def network(out_channels=2, **options) -> SegmentationUNet:
    torch.manual_seed(0)
    return SegmentationUNet(1, out_channels, **{"channels": (4, 8), "padding": "same", **options})


def module(unet=None, **options) -> SegmentationModule:
    return SegmentationModule(unet or network(), **{"optimizer": SGD, **options})


def test_step_is_the_weighted_cross_entropy_of_the_predicted_part(quiet_trainer, monkeypatch):
    data = cells(window_size=36)
    made = module(network(padding="valid"))
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(made, data)
    assert data.margin == made.unet.margin == 8
    monkeypatch.setattr(made, "log", lambda *args, **options: None)  # there is no loop to log in
    batch = next(iter(data.train_dataloader()))
    loss = made.training_step(batch, 0)
    inside = batch["classes"][:, 8:-8, 8:-8]
    torch.testing.assert_close(loss, F.cross_entropy(made.unet(batch["images"]), inside))


def joint_module(weight=0.25, **options) -> SegmentationModule:
    unet = network(out_channels=3, norm="group", timestep_embedding=True, **options)
    return module(unet, timestep=0, joint=JointDenoising(NoiseSchedule(100, "linear"), weight=weight))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_joint_loss_is_the_weighted_sum_of_both_tasks(quiet_trainer, monkeypatch, padding):
    data = cells(window_size=36 if padding == "valid" else 32, num_train=1)
    made = joint_module(padding=padding)
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(made, data)
    logged = {}
    monkeypatch.setattr(made, "log", lambda name, value, **options: logged.update({name: value}))
    batch = next(iter(data.train_dataloader()))
    x0, side = batch["unlabelled"], batch["images"].shape[-1] - 2 * made.unet.margin
    assert x0.shape == batch["images"].shape
    drawn = {}
    monkeypatch.setattr(JointDenoising, "noised", spy := noised_spy(JointDenoising.noised, drawn))
    loss = made.training_step(batch, 0)
    assert spy.calls == 1

    x_t, t, noise = drawn["x_t"], drawn["t"], drawn["target"]
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100), dim=0)[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, a.sqrt() * x0 + (1 - a).sqrt() * noise)  # epsilon is predicted
    scores = made.unet(batch["images"], torch.zeros(len(x0), dtype=torch.int64))[:, :2]
    denoised = made.unet(x_t, t)[:, 2:]
    inner = slice(made.unet.margin, made.unet.margin + side)
    weights = batch["weights"][:, inner, inner]
    crossed = F.cross_entropy(scores, batch["classes"][:, inner, inner], reduction="none")
    segmented = (crossed * weights).sum() / weights.sum()
    squared = (denoised - noise[:, :, inner, inner]).square().mean()
    torch.testing.assert_close(loss, 0.75 * segmented + 0.25 * squared)
    torch.testing.assert_close(logged["train/denoising_loss"], squared)


def noised_spy(noised, drawn):
    def spy(self, x0, generator):
        spy.calls += 1
        drawn["x_t"], drawn["t"], drawn["target"] = found = noised(self, x0, generator)
        return found

    spy.calls = 0
    return spy


def test_segmenter_that_learnt_to_denoise_gives_the_maps_alone(quiet_trainer, tmp_path):
    made = joint_module()
    path = fit_and_save(made, cells(), quiet_trainer(max_steps=2, limit_val_batches=0), tmp_path / "x.ckpt")
    image = torch.rand(1, 32, 32) * 2 - 1
    with torch.no_grad():
        scores = made.ema_unet.eval()(image[None], torch.tensor([0]))[0, :2]
    torch.testing.assert_close(read_segmenter(path).maps(image), scores.softmax(dim=0))


def test_checkpoint_of_joint_training_is_trained_further(quiet_trainer, tmp_path):
    path = fit_and_save(joint_module(), cells(), quiet_trainer(max_steps=1, limit_val_batches=0), tmp_path / "x.ckpt")
    again, made = SegmentationModule.load_from_checkpoint(path), joint_module()
    assert again.joint.weight == made.joint.weight
    assert again.joint.schedule.config == made.joint.schedule.config
    trainer = quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(again, cells(), ckpt_path=path)
    assert "train/denoising_loss" in trainer.callback_metrics


def test_training_lowers_the_loss_and_finds_the_cells(quiet_trainer):
    data = cells(augmentation=Augmentation(elastic_sd=2.0), window_size=64, batch_size=4)
    made = module(network(norm="batch", channels=(8, 16)), optimizer=functools.partial(torch.optim.Adam, lr=1.0e-2))
    trainer = quiet_trainer(max_steps=40)
    trainer.fit(made, data)
    assert trainer.callback_metrics["val/dice"] > 0.9


@pytest.mark.parametrize("ignore_label", [None, 1])
def test_validation_scores_are_those_of_the_whole_images(quiet_trainer, ignore_label):
    data, made = cells(window_size=128, ignore_label=ignore_label), module()  # the images in one window each
    logged = quiet_trainer().validate(made, data, verbose=False)[0]
    truths, predictions = [], []
    for i in data.val_indices.tolist():
        classes = data.whole(i)["classes"].numpy()
        with torch.no_grad():
            predicted = made.ema_unet(data.whole(i)["images"][None])[0].argmax(dim=0).numpy()
        assert (classes == -1).any() == (ignore_label is not None)
        truths.append(classes[classes != -1] == 1)
        predictions.append(predicted[classes != -1] == 1)
    truth, predicted = np.concatenate(truths)[None], np.concatenate(predictions)[None]  # pooled, as one row
    assert logged["val/dice"] == pytest.approx(dice(truth, predicted))
    assert logged["val/iou"] == pytest.approx(iou(truth, predicted))
    assert logged["val/pixel_error"] == pytest.approx(pixel_error(truth, predicted))


def test_threshold_is_the_best_on_images_that_are_kept_for_it(quiet_trainer, tmp_path, monkeypatch):
    fitted_on = []
    noted = SimpleNamespace(of=lambda index, *rest: fitted_on.append(index) or ScoresByThreshold.of(index, *rest))
    monkeypatch.setattr("unet_diffusion.training.segmentation.ScoresByThreshold", noted)
    data, made = cells(num_fit=1, window_size=64), module(network(norm="batch"), optimizer=ADAM)
    trained = read_segmenter(fit_and_save(made, data, quiet_trainer(max_steps=10), tmp_path / "cells.ckpt"))
    assert {*fitted_on} == {*data.fit_indices.tolist()}
    whole = data.whole(int(data.fit_indices))
    foreground, truth = trained.maps(whole["images"])[1].numpy(), whole["classes"].numpy() > 0
    scores = {threshold: dice(truth, foreground > threshold) for threshold in THRESHOLDS}
    assert scores[trained.threshold] == pytest.approx(max(scores.values()))
    assert trained.segment(whole["images"]).threshold == trained.threshold


@pytest.mark.parametrize(("num_fit", "num_images"), [(0, 2), (3, 3)])
def test_few_trained_images_are_divided_by_the_mutex_watershed_which_is_told(
    quiet_trainer, monkeypatch, caplog, num_fit, num_images
):
    fitted_on = []
    noted = SimpleNamespace(of=lambda index, *rest: fitted_on.append(index) or ScoresByThreshold.of(index, *rest))
    monkeypatch.setattr("unet_diffusion.training.segmentation.ScoresByThreshold", noted)
    monkeypatch.setattr("unet_diffusion.training.segmentation.MOST_DIVIDED", 2 * 128 * 128 + 1)
    data, made = cells(affinities=True, num_fit=num_fit, num_images=7), module(network(out_channels=12, norm="group"))
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    quiet_trainer(max_steps=1, limit_val_batches=1, val_check_interval=1).fit(made, data)
    assert len(fitted_on) == num_images
    assert {*fitted_on} <= {*(data.fit_indices if num_fit else data.train_images).tolist()}
    assert "mutex watershed" not in caplog.text  # three images of cells are soon divided
    monkeypatch.setattr("unet_diffusion.training.segmentation.LONG", 1)
    quiet_trainer(max_steps=1, limit_val_batches=1, val_check_interval=1).fit(made, data)
    seconds = round(num_images * 128**2 * 9 * 5e-6)
    assert f"divides {num_images} images at 9 thresholds, which takes about {seconds} seconds" in caplog.text
    assert ("a smaller data.num_fit" in caplog.text) == (num_fit > 0)


def test_least_size_is_fitted_to_specks_and_kept_in_the_checkpoint(quiet_trainer, tmp_path, monkeypatch):
    data = cells(separate_borders=True, num_fit=2, num_images=7)
    made = module(network(out_channels=4, norm="group"))

    def with_specks(self, image):
        """Maps in which all cells are right, and specks of 20 pixels stand beside them, of equal probability."""
        (index,) = [i for i in range(len(data.images.images)) if torch.equal(data.whole(i)["images"], image)]
        foreground = data.images.labels[index] > 0
        free = scipy.ndimage.distance_transform_edt(~foreground) > 4
        specks = np.zeros_like(foreground)
        for row, column in np.ndindex(12, 12):
            place = (slice(10 * row, 10 * row + 4), slice(10 * column, 10 * column + 5))
            specks[place] = free[place].all()
        assert specks.sum() >= 10 * 20
        distances = scipy.ndimage.distance_transform_edt(foreground | specks)
        foreground = (foreground | specks).astype(np.float32)
        maps = [1 - foreground, foreground, np.zeros_like(foreground), np.minimum(distances / 10, 1)]
        return torch.from_numpy(np.stack(maps).astype(np.float32))

    monkeypatch.setattr(SegmentationModule, "maps", with_specks)
    assert made.min_size < 20
    path = fit_and_save(made, data, quiet_trainer(max_steps=1, val_check_interval=1), tmp_path / "cells.ckpt")
    sizes = [size for size in SIZES if size > 20]
    assert read_segmenter(path).min_size in sizes
    assert SegmentationModule.load_from_checkpoint(path).min_size in sizes


def test_what_was_fitted_is_kept_until_it_is_fitted_again(quiet_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("unet_diffusion.training.segmentation.kept_threshold", lambda *args: (0.3, 40))
    fitted = quiet_trainer(max_steps=1, limit_val_batches=1, val_check_interval=1)
    first = fit_and_save(module(), cells(), fitted, tmp_path / "first.ckpt")
    resumed, trainer = module(), quiet_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(resumed, cells(), ckpt_path=first)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    again = read_segmenter(tmp_path / "second.ckpt")
    assert (again.threshold, again.min_size) == (0.3, 40)
    validated = module()
    quiet_trainer(limit_val_batches=1).validate(validated, cells(), ckpt_path=first, verbose=False)
    assert (validated.threshold, validated.min_size) == (0.3, 40)


def test_network_of_affinities_learns_to_tell_touching_cells_apart(quiet_trainer, tmp_path):
    data = cells(affinities=True, num_fit=1, window_size=64, batch_size=4, num_images=12)
    torch.manual_seed(0)
    unet = SegmentationUNet(1, 12, channels=(8, 16, 32), padding="same", norm="group")
    made = module(unet, loss="both", optimizer=functools.partial(torch.optim.Adam, lr=1.0e-2))
    trained = read_segmenter(fit_and_save(made, data, quiet_trainer(max_steps=100), tmp_path / "cells.ckpt"))
    assert (trained.kind, trained.threshold, trained.min_size) == ("affinities", made.threshold, made.min_size)
    by_pairs, by_parts = [], []
    for index in data.val_indices.tolist():
        segmented = trained.segment(data.whole(index)["images"], views=True)
        assert segmented.probabilities.shape[0] == 2
        assert segmented.affinities.shape[0] == 10
        truth = data.images.labels[index].astype(np.int32)
        by_pairs.append(average_precision(truth, segmented.instances, 0.5))
        parts = instances_from(segmented.probabilities, "binary", threshold=trained.threshold)
        by_parts.append(average_precision(truth, parts, 0.5))
    assert np.mean(by_pairs) > np.mean(by_parts)


def test_average_without_decay_is_the_raw_network_batch_norms_too(quiet_trainer):
    made = module(network(norm="batch"))
    quiet_trainer(max_steps=3, limit_val_batches=0).fit(made, cells())
    for name, value in made.unet.state_dict().items():
        torch.testing.assert_close(made.ema_unet.state_dict()[name], value, rtol=1e-6, atol=1e-7)  # x + (y - x)


@pytest.mark.parametrize("is_joint", [False, True])
def test_speed_is_timed_at_the_batch_of_a_step(quiet_trainer, monkeypatch, is_joint):
    made = joint_module() if is_joint else module(network())
    made.speed, timed, stepped = "auto", [], []

    def fastest(trainer, network, x, inputs, *, speeds, precisions):
        timed.append(x.shape)
        network.register_forward_pre_hook(lambda network, inputs: stepped.append(inputs[0].shape))
        return "plain", torch.float32

    monkeypatch.setattr(base, "fastest", fastest)
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(made, cells())
    assert timed == stepped


@pytest.mark.parametrize("is_joint", [False, True])
def test_resumed_run_is_the_uninterrupted_one(quiet_trainer, tmp_path, is_joint):
    def train(folder, steps, **options):
        keep = ModelCheckpoint(tmp_path / folder, save_last=True, every_n_train_steps=2, enable_version_counter=False)
        made = joint_module() if is_joint else module(network(norm="batch"), optimizer=ADAM, ema_decay=0.9)
        trainer = quiet_trainer(max_steps=steps, callbacks=[keep], enable_checkpointing=True, limit_val_batches=0)
        trainer.fit(made, cells(augmentation=Augmentation(noise=0.1)), **options)
        return made.state_dict()

    straight = train("straight", 5)
    train("stopped", 2)  # of the three batches of an epoch
    resumed = train("stopped", 5, ckpt_path=tmp_path / "stopped" / "last.ckpt")
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def fit_and_save(made, data, trainer, path):
    trainer.fit(made, data)
    trainer.save_checkpoint(path)
    return path


@pytest.mark.filterwarnings("ignore:the frozen denoiser has random weights")
@pytest.mark.parametrize("kind", ["2015", "denoiser", "features"])
def test_checkpoint_is_read_back_as_the_averaged_network(quiet_trainer, tmp_path, kind):
    torch.manual_seed(0)
    schedule = NoiseSchedule(100, "linear")
    unet = {
        "2015": network,
        "denoiser": lambda: DenoiserUNet(**SMALL, out_channels=2),
        "features": lambda: FeatureClassifier(
            DenoiserUNet(**SMALL), schedule, timesteps=[10], levels=[0, 1], hidden_channels=[4, 4]
        ),
    }[kind]()
    made = module(unet, timestep=5 if kind == "denoiser" else None, ema_decay=0.5)
    path = fit_and_save(made, cells(), quiet_trainer(max_steps=2, limit_val_batches=0), tmp_path / "x.ckpt")
    trained = read_segmenter(path)
    assert (trained.kind, trained.class_names, trained.window_size) == ("binary", ["background", "cell"], 32)
    assert trained.timestep == made.timestep
    x = torch.randn(1, 1, 16, 16)
    t = None if made.timestep is None else torch.tensor([5])
    with torch.no_grad():
        assert torch.equal(trained.unet(x, t), made.ema_unet.eval()(x, t))


@pytest.mark.filterwarnings("ignore:the frozen denoiser has random weights")
def test_frozen_denoiser_is_in_a_checkpoint_once(quiet_trainer, tmp_path):
    big = {**SMALL, "channels": [32, 64]}
    unet = FeatureClassifier(DenoiserUNet(**big), NoiseSchedule(100, "linear"), levels=[0], hidden_channels=[4, 4],
                             timesteps=[10])  # fmt: skip
    path = fit_and_save(module(unet), cells(), quiet_trainer(max_steps=1, limit_val_batches=0), tmp_path / "x.ckpt")
    weights = 4 * sum(parameter.numel() for parameter in unet.denoiser.parameters())
    assert path.stat().st_size < 1.5 * weights


def test_segmenter_is_no_denoiser_and_the_other_way_round(quiet_trainer, tmp_path):
    path = fit_and_save(module(), cells(), quiet_trainer(max_steps=1, limit_val_batches=0), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds a segmenter, not a denoiser; use unet-diffusion segment"):
        read_denoiser(path)


@pytest.fixture
def denoiser(tmp_path):
    """The path of a denoiser's checkpoint, and its network."""
    torch.manual_seed(3)
    trained = Denoiser(DenoiserUNet(**SMALL), NoiseSchedule(100, "linear"), (1, 8, 8))
    save_denoiser(trained, tmp_path / "denoiser.ckpt")
    return tmp_path / "denoiser.ckpt", trained.unet


def test_denoiser_is_where_training_starts_from(quiet_trainer, denoiser):
    path, unet = denoiser
    made = module(
        DenoiserUNet(**SMALL, out_channels=2), timestep=0, init_from=str(path),
        optimizer=functools.partial(torch.optim.SGD, lr=0.0),
    )  # fmt: skip
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(made, cells())
    for part in (made.unet, made.ema_unet):
        for name, value in unet.state_dict().items():
            if not name.startswith("conv_out."):
                torch.testing.assert_close(part.state_dict()[name], value, rtol=1e-6, atol=1e-7)  # averaged once


def test_pretrained_weights_learn_at_their_share_of_the_rate(quiet_trainer, denoiser):
    path, unet = denoiser
    moved = {}
    for scale in (1.0, 0.25):
        made = module(
            DenoiserUNet(**SMALL, out_channels=2), timestep=0, init_from=str(path), pretrained_lr_scale=scale,
            optimizer=functools.partial(torch.optim.SGD, lr=0.5),
        )  # fmt: skip
        torch.nn.init.constant_(made.unet.conv_out.weight[:1], 0.1)  # a head of zeros passes no gradient on
        before = {name: value.clone() for name, value in made.unet.state_dict().items()}
        before |= {name: value for name, value in unet.state_dict().items() if not name.startswith("conv_out.")}
        quiet_trainer(max_steps=1, limit_val_batches=0).fit(made, cells())
        moved[scale] = {name: value - before[name] for name, value in made.unet.state_dict().items()}
    assert any(value.abs().max() > 1e-3 for name, value in moved[1.0].items() if not name.startswith("conv_out."))
    for name, value in moved[1.0].items():
        share = 1 if name.startswith("conv_out.") else 0.25
        torch.testing.assert_close(moved[0.25][name], share * value, rtol=1e-3, atol=1e-6)


def test_share_of_the_rate_is_kept_over_a_checkpoint(quiet_trainer, denoiser, tmp_path):
    def made(scale):
        return module(DenoiserUNet(**SMALL, out_channels=2), timestep=0, init_from=str(denoiser[0]),
                      pretrained_lr_scale=scale)  # fmt: skip

    path = fit_and_save(made(0.25), cells(), quiet_trainer(max_steps=1, limit_val_batches=0), tmp_path / "x.ckpt")
    again = SegmentationModule.load_from_checkpoint(path)
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(again, cells(), ckpt_path=path)
    head, pretrained = (group["lr"] for group in again.trainer.optimizers[0].param_groups)
    assert pretrained == 0.25 * head > 0
    with pytest.raises(ValueError, match="optimiser has 2 groups of weights, and that of the settings 1; set model"):
        quiet_trainer(max_steps=2, limit_val_batches=0).fit(made(1.0), cells(), ckpt_path=path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pretrained_lr_scale": 0.0, "init_from": "x"}, "above 0 and at most 1, got 0.0"),
        ({"pretrained_lr_scale": 2.0, "init_from": "x"}, "above 0 and at most 1, got 2.0"),
        ({"pretrained_lr_scale": 0.1}, "must be 1 where no weights from init_from are trained, got 0.1; set init_from"),
    ],
)
def test_share_of_the_rate_without_meaning_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        module(DenoiserUNet(**SMALL, out_channels=2), timestep=0, **options)


def test_run_that_is_continued_needs_its_denoiser_no_more(quiet_trainer, denoiser, tmp_path):
    path, _ = denoiser

    def made():
        return module(DenoiserUNet(**SMALL, out_channels=2), timestep=0, init_from=str(path))

    stopped = fit_and_save(made(), cells(), quiet_trainer(max_steps=1, limit_val_batches=0), tmp_path / "x.ckpt")
    path.unlink()
    again = made()
    again.is_continued = True
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(again, cells(), ckpt_path=stopped)
    assert again.trainer.global_step == 2


def test_2015_network_with_a_timestep_denoises_digits(quiet_trainer, tmp_path):
    torch.manual_seed(0)
    unet = SegmentationUNet(
        1, 1, channels=(16, 32), padding="same", norm="group", timestep_embedding=True, num_class_embeds=11
    )
    made = DiffusionModule(
        unet, NoiseSchedule(100, "squaredcos_cap_v2", prediction_type="v_prediction"), optimizer=ADAM, ema_decay=0.9,
        label_dropout=0.1,
    )  # fmt: skip
    trainer = quiet_trainer(max_steps=60)
    data = ImageDataModule(Digits(), batch_size=64, num_val=100)
    before = quiet_trainer().validate(copy.deepcopy(made), data, verbose=False)[0]["val/loss"]
    path = fit_and_save(made, data, trainer, tmp_path / "x.ckpt")
    assert trainer.callback_metrics["val/loss"] < 0.7 * before
    assert isinstance(read_denoiser(path).unet, SegmentationUNet)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: module(loss="focal"), "loss must be one of cross_entropy, dice, both, got 'focal'"),
        (lambda: module(timestep=3), "it has no timestep embedding, got 3"),
        (lambda: module(DenoiserUNet(**SMALL)), "it has a timestep embedding, got None"),
        (lambda: module(DenoiserUNet(**SMALL, num_class_embeds=3), timestep=0), "must have no class embedding"),
        (lambda: JointDenoising(NoiseSchedule(), weight=1.0), "above 0 and below 1, got 1.0"),
        (
            lambda: module(
                network(norm="batch", timestep_embedding=True), timestep=0, joint=JointDenoising(NoiseSchedule())
            ),
            "joint needs a network without batch norm",
        ),
        (lambda: module(joint=JointDenoising(NoiseSchedule())), "joint needs a network that takes a timestep"),
        (lambda: DiffusionModule(network(), NoiseSchedule()), "a denoiser needs a timestep"),
        (
            lambda: DiffusionModule(network(padding="valid", timestep_embedding=True), NoiseSchedule()),
            "takes 8 pixels off each side; set padding to same",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("unet", "options", "message"),
    [
        (lambda: SegmentationUNet(3, 2, channels=(4, 8)), {}, "the images have 1 channels and the network takes 3"),
        (lambda: network(), {"separate_borders": True}, "out_channels must be 4, one a class \\(background, cell, bor"),
        (lambda: network(), {"affinities": True}, "out_channels must be 12, one a class .*, and one for each offset"),
        (lambda: network(), {"window_size": 33}, "the next size that fits is 34 x 34"),
        (lambda: network(padding="valid"), {}, "the next size that fits is"),
    ],
)
def test_network_that_does_not_fit_the_data_is_refused_before_training(quiet_trainer, unet, options, message):
    if "next size" in message and not options:
        options = {"window_size": 31}
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_steps=1).fit(module(unet()), cells(**options))


def test_joint_needs_outputs_to_denoise_and_images_without_labels_need_joint(quiet_trainer, monkeypatch):
    unet = network(norm="group", timestep_embedding=True)
    joint = JointDenoising(NoiseSchedule(100, "linear"))
    message = r"out_channels must be 3, one a class \(background, cell\), and 1 to denoise, got 2"
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_steps=1).fit(module(unet, timestep=0, joint=joint), cells())
    data = cells()
    data.setup()
    data.images.unlabelled.append(data.images.images[0])
    with pytest.raises(ValueError, match=r"data.unlabelled is for a network that denoises, too; set model.joint"):
        quiet_trainer(max_steps=1).fit(module(), data)
