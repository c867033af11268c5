import contextlib
import copy
import csv
import functools
import re

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from unet_diffusion.data import (
    Digits,
    ImageDataModule,
)
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.reading import read_denoiser
from unet_diffusion.models.speed import SPEEDS
from unet_diffusion.training import DiffusionModule

SGD = functools.partial(torch.optim.SGD, lr=0.1)
ADAM = functools.partial(torch.optim.Adam, lr=1.0e-3)


class WeightRecord(Callback):
    """Copies the raw and the averaged weights before training and after every batch."""

    def __init__(self):
        self.raw, self.ema = [], []

    def on_train_start(self, trainer, module):
        self.raw.append(copy.deepcopy(module.unet.state_dict()))
        self.ema.append(copy.deepcopy(module.ema_unet.state_dict()))

    def on_train_batch_end(self, trainer, module, *args):
        self.on_train_start(trainer, module)


class DrawRecord(Callback):
    """Records the noise and the timesteps of every training step, by way of the schedule's add_noise."""

    def __init__(self):
        self.noise, self.t = [], []

    def on_fit_start(self, trainer, module):
        add_noise = module.schedule.add_noise

        def recorded(x0, noise, t):
            self.noise.append(noise.clone())
            self.t.append(t.clone())
            return add_noise(x0, noise, t)

        module.schedule.add_noise = recorded


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def assert_equal(one, other) -> None:
    """Everything in two nested states is exactly the same."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        assert_equal(list(one.values()), [other[key] for key in one])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    else:
        assert one == other


# ------------------------------------------------------------------------------------------------------------- average


def test_average_is_the_recursion_over_the_raw_weights(tiny_module, tiny_images, quiet_trainer):
    record = WeightRecord()
    module = tiny_module(optimizer=SGD, ema_decay=0.2)
    quiet_trainer(max_steps=6, callbacks=[record]).fit(module, tiny_images(class_names=None))
    expected = {key: value.double() for key, value in record.raw[0].items()}
    for n, (raw, ema) in enumerate(zip(record.raw[1:], record.ema[1:], strict=True)):
        decay = min(0.2, (1 + n) / (10 + n))  # 1/10, 2/11, then 0.2
        expected = {key: decay * expected[key] + (1 - decay) * raw[key].double() for key in raw}
        actual = {key: value.double() for key, value in ema.items()}
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)  # float32


def test_average_moves_once_an_optimiser_step_under_accumulation(tiny_module, tiny_images, quiet_trainer):
    record = WeightRecord()
    trainer = quiet_trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[record])
    trainer.fit(tiny_module(optimizer=SGD), tiny_images(class_names=None))
    moved = [not equal(before, after) for before, after in zip(record.ema, record.ema[1:], strict=False)]
    assert moved == [False, True, False, True, False, True]


def test_average_is_never_trained_nor_in_training_mode(tiny_module, tiny_images, quiet_trainer):
    module = tiny_module()
    quiet_trainer(max_steps=1).fit(module, tiny_images(class_names=None))
    module.train()
    assert module.unet.training
    assert not any(part.training for part in module.ema_unet.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in module.ema_unet.parameters())


def test_optimiser_holds_the_raw_parameters_only(tiny_module, tiny_images, quiet_trainer):
    module, trainer = tiny_module(), quiet_trainer(max_steps=1)
    trainer.fit(module, tiny_images(class_names=None))
    held = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.unet.parameters()}


# ---------------------------------------------------------------------------------------------------------- validation


def validate(module, data, trainer) -> dict[str, float]:
    return trainer.validate(module, data, verbose=False)[0]


def test_validation_loss_repeats_exactly(tiny_module, tiny_images, quiet_trainer):
    module, data = tiny_module(), tiny_images(class_names=None)
    assert validate(module, data, quiet_trainer()) == validate(module, data, quiet_trainer())


def test_validation_loss_does_not_depend_on_the_batch_size(tiny_module, tiny_images, quiet_trainer):
    module = tiny_module()
    losses = [
        validate(module, tiny_images(class_names=None, num_val=10, batch_size=size), quiet_trainer())
        for size in (3, 10)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32 sums in another order


def test_validation_loss_is_the_mean_over_all_images_of_the_averaged_network(tiny_module, tiny_images, quiet_trainer):
    module, data = tiny_module(prediction_type="epsilon"), tiny_images(class_names=None, num_val=10)
    with torch.no_grad():
        for parameter in module.unet.parameters():
            parameter.zero_()  # the raw network is not what is validated
        for parameter in module.ema_unet.conv_out.parameters():
            parameter.fill_(0.0)
        module.ema_unet.conv_out.bias.fill_(100.0)  # against which noise is little
    assert validate(module, data, quiet_trainer())["val/loss"] == pytest.approx(100.0**2, rel=1e-2)


def test_validation_timesteps_are_spread_over_the_whole_range(tiny_module):
    t = tiny_module().fixed_timesteps(torch.arange(1000))
    counts = torch.bincount(t, minlength=100)
    assert len(counts) == 100
    assert 8 <= int(counts.min()) <= int(counts.max()) <= 12


def test_quarters_of_the_validation_loss_are_logged(tiny_module, tiny_images, quiet_trainer):
    metrics = validate(tiny_module(), tiny_images(class_names=None, num_val=18), quiet_trainer())
    assert set(metrics) == {"val/loss", *(f"val/loss_q{i}" for i in (1, 2, 3, 4))}


# --------------------------------------------------------------------------------------------------------------- draws


@pytest.fixture
def draws(tiny_module, tiny_images, quiet_trainer):
    def record(**options) -> DrawRecord:
        record = DrawRecord()
        trainer = quiet_trainer(max_steps=3, limit_val_batches=0, callbacks=[record])
        trainer.fit(tiny_module(**options), tiny_images(class_names=None))
        return record

    return record


def test_training_draws_differ_between_steps(draws):
    record = draws()
    assert not torch.equal(record.noise[0], record.noise[1])
    assert not torch.equal(record.t[0], record.t[1])


def test_training_draws_differ_between_epochs(tiny_module, tiny_images, quiet_trainer):
    record = DrawRecord()
    trainer = quiet_trainer(max_steps=5, limit_val_batches=0, callbacks=[record])  # an epoch is 4
    trainer.fit(tiny_module(), tiny_images(class_names=None))
    assert not torch.equal(record.noise[0], record.noise[4])


def test_training_draws_are_the_same_for_the_same_seed(draws):
    one = draws(seed=0)
    torch.manual_seed(123)  # the global generator is of no consequence
    other = draws(seed=0)
    assert_equal(one.noise, other.noise)
    assert_equal(one.t, other.t)


def test_training_draws_differ_between_seeds(draws):
    assert not torch.equal(draws(seed=0).noise[0], draws(seed=1).noise[0])


def test_training_draws_differ_between_ranks(draws, monkeypatch):
    first = draws()
    monkeypatch.setattr(DiffusionModule, "global_rank", property(lambda module: 1))
    assert not torch.equal(first.noise[0], draws().noise[0])


def test_training_draws_differ_between_accumulated_batches(tiny_module, tiny_images, quiet_trainer):
    record = DrawRecord()
    trainer = quiet_trainer(max_steps=1, accumulate_grad_batches=2, limit_val_batches=0, callbacks=[record])
    trainer.fit(tiny_module(), tiny_images(class_names=None))
    assert not torch.equal(record.noise[0], record.noise[1])


# ------------------------------------------------------------------------------------------------------------ training


def test_loss_falls_on_the_digits(tiny_module, quiet_trainer):
    module = tiny_module(optimizer=functools.partial(torch.optim.AdamW, lr=4.0e-3), ema_decay=0.9)
    data = ImageDataModule(Digits(), batch_size=64)
    before = validate(module, data, quiet_trainer())["val/loss"]
    quiet_trainer(max_steps=50, limit_val_batches=0).fit(module, data)
    assert validate(module, data, quiet_trainer())["val/loss"] < 0.6 * before


class LossRecord(Callback):
    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, module, *args):
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_logged_losses_are_numbers_however_small_the_batch(tiny_module, tiny_images, quiet_trainer, batch_size):
    record = LossRecord()
    trainer = quiet_trainer(max_steps=5, limit_val_batches=0, log_every_n_steps=1, callbacks=[record])
    trainer.fit(tiny_module(), tiny_images(class_names=None, batch_size=batch_size))
    assert all(value == value for metrics in record.metrics for value in metrics.values())


def test_quarters_are_logged_though_an_epoch_is_shorter_than_the_log_interval(tiny_module, tiny_images, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        accelerator="cpu", max_steps=7, log_every_n_steps=3, limit_val_batches=0, logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(tiny_module(), tiny_images(class_names=None, batch_size=8))  # two batches an epoch
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train/loss_q1"] and row["train/loss_q4"]] == ["2", "5"]


@pytest.mark.filterwarnings("ignore:trainer.precision bf16-mixed is not in this machine")
@pytest.mark.parametrize("fused", [False, True])
def test_clipped_gradients_bound_the_step_in_bfloat16(tiny_module, tiny_images, quiet_trainer, fused):
    record = WeightRecord()
    trainer = quiet_trainer(max_steps=1, precision="bf16-mixed", gradient_clip_val=0.01, callbacks=[record])
    trainer.fit(
        tiny_module(optimizer=functools.partial(torch.optim.SGD, lr=1.0, fused=fused)), tiny_images(class_names=None)
    )
    before, after = record.raw
    step = torch.stack([(after[key] - before[key]).norm() for key in before]).norm()
    assert step == pytest.approx(0.01, rel=1e-2)  # the gradient of an untrained network is longer than that


@pytest.mark.filterwarnings("ignore:trainer.precision bf16-mixed is not in this machine")
def test_weights_stay_float32_in_mixed_precision(tiny_module, tiny_images, quiet_trainer):
    module = tiny_module()
    quiet_trainer(max_steps=1, precision="bf16-mixed").fit(module, tiny_images(class_names=None))
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}


def test_learning_rate_follows_warm_up_and_decay(tiny_module, tiny_images, quiet_trainer):
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = tiny_module(optimizer=SGD, lr_warmup_steps=2, lr_decay="cosine")
    quiet_trainer(max_steps=6, callbacks=[Rates()]).fit(module, tiny_images(class_names=None))
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.08535533, 0.05, 0.01464466])  # 0.1 (1 + cos(k pi / 4)) / 2


def test_cosine_decay_without_an_end_is_refused(tiny_module, tiny_images, quiet_trainer):
    with pytest.raises(ValueError, match=r"lr_decay cosine needs an end: set trainer\.max_steps"):
        quiet_trainer(max_epochs=-1).fit(tiny_module(lr_decay="cosine"), tiny_images(class_names=None))


def test_compiled_network_trains_as_the_plain_one_under_plain_names(
    tiny_module, tiny_images, quiet_trainer, monkeypatch
):
    monkeypatch.setattr("unet_diffusion.models.speed.speeds_for", lambda device: SPEEDS)
    plain, compiled = tiny_module(optimizer=SGD), tiny_module(optimizer=SGD, speed="compiled")
    calls = []

    def backend(graph, example_inputs):  # runs what was traced as it is: no C++ compiler is needed
        calls.append(graph)
        return graph.forward

    compiled.unet.compile = functools.partial(compiled.unet.compile, backend=backend)
    for module in (plain, compiled):
        quiet_trainer(max_steps=2, limit_val_batches=0).fit(module, tiny_images(class_names=None))
    assert calls
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- labels


def changed_rows(module, data, trainer) -> list[bool]:
    before = module.unet.class_embedding.weight.detach().clone()
    trainer.fit(module, data)
    return (module.unet.class_embedding.weight != before).any(1).tolist()


def test_label_dropout_trains_the_null_label(tiny_module, tiny_images, quiet_trainer):
    module = tiny_module(num_class_embeds=3, label_dropout=0.5, optimizer=SGD)
    assert changed_rows(module, tiny_images(), quiet_trainer(max_steps=4)) == [True, True, True]
    assert module.null_label == 2


def test_null_label_counts_as_no_class(tiny_module):
    module = tiny_module(num_class_embeds=3, label_dropout=0.5)
    module.sample_shape = (1, 8, 8)
    assert module.trained.num_classes == 2


def test_without_label_dropout_there_is_no_null_label(tiny_module, tiny_images, quiet_trainer):
    module = tiny_module(num_class_embeds=2, optimizer=SGD)
    quiet_trainer(max_steps=1).fit(module, tiny_images())
    assert module.trained.null_label is None
    assert module.trained.num_classes == 2


def test_only_dropped_labels_become_the_null_label(tiny_module, tiny_images, quiet_trainer):
    seen = []
    module = tiny_module(num_class_embeds=3, label_dropout=0.5)
    module.unet.register_forward_pre_hook(
        lambda unet, args, inputs: seen.append(inputs["labels"].clone()), with_kwargs=True
    )
    quiet_trainer(max_steps=8, limit_val_batches=0).fit(module, tiny_images())
    share = (torch.cat(seen) == 2).float().mean()
    assert 0.2 < share < 0.8  # of 32 labels, 0.5 +- 0.09


# ------------------------------------------------------------------------------------------------------ wrong settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_dropout": 1.0, "num_class_embeds": 3}, r"label_dropout must be in \[0, 1\), got 1.0"),
        ({"label_dropout": -0.1, "num_class_embeds": 3}, r"label_dropout must be in \[0, 1\), got -0.1"),
        ({"label_dropout": 0.1}, r"label_dropout 0.1 needs a network with classes; set num_class_embeds"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"loss_weighting": "minsnr"}, r"loss_weighting must be one of uniform, min_snr, got 'minsnr'"),
        ({"lr_decay": "linear"}, r"lr_decay must be one of constant, cosine, got 'linear'"),
        ({"lr_warmup_steps": -1}, r"lr_warmup_steps must be 0 or more, got -1"),
    ],
)
def test_wrong_setting_is_refused_with_its_value(tiny_module, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_module(**options)


def test_min_snr_with_zero_terminal_snr_is_refused(tiny_unet):
    schedule = NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"min_snr .* rescale_betas_zero_snr .*; use loss_weighting uniform"):
        DiffusionModule(tiny_unet(), schedule, loss_weighting="min_snr")


@pytest.mark.parametrize(
    ("module_options", "data_options", "message"),
    [
        (
            {},
            {"class_names": None, "shape": (3, 8, 8)},
            r"images have 3 channels and the network takes 1; set .*in_channels",
        ),
        (
            {},
            {"class_names": None, "shape": (1, 9, 8)},
            r"multiples of 2, got 9 x 8; the next size that fits is 10 x 8",
        ),
        (
            {"num_class_embeds": 2},
            {"class_names": None},
            r"2 class embeddings and the data have no classes; set .*class_l",
        ),
        ({"num_class_embeds": 3}, {}, r"num_class_embeds must be 2 \(2 classes and 0 null labels.*got 3"),
        (
            {"num_class_embeds": 2, "label_dropout": 0.1},
            {},
            r"num_class_embeds must be 3 \(2 classes and 1 null.*got 2",
        ),
    ],
)
def test_data_that_do_not_fit_the_network_are_refused_before_training(
    tiny_module, tiny_images, quiet_trainer, module_options, data_options, message
):
    record = LossRecord()
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_steps=1, callbacks=[record]).fit(tiny_module(**module_options), tiny_images(**data_options))
    assert not record.metrics


def test_what_was_trained_is_not_known_before_the_data_are(tiny_module):
    with pytest.raises(ValueError, match="sample shape is not known before training"):
        _ = tiny_module().trained


# -------------------------------------------------------------------------------------------------- checkpoint, resume


@pytest.fixture
def fit_with_checkpoints(tiny_module, tiny_images, quiet_trainer, tmp_path):
    """Fits 6 steps, an epoch and a half, with a checkpoint a step; from one of them if asked to."""

    def fit(name, ckpt_path=None, trainer_options=None, **options):
        save = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer_options = {"max_steps": 6, **(trainer_options or {})}
        trainer = quiet_trainer(**trainer_options, enable_checkpointing=True, callbacks=[save])
        module = tiny_module(num_class_embeds=3, label_dropout=0.3, optimizer=ADAM, ema_decay=0.5, **options)
        trainer.fit(module, tiny_images(horizontal_flip=True), ckpt_path=ckpt_path)
        return torch.load(tmp_path / name / "step=6.ckpt", weights_only=True)

    return fit


@pytest.mark.parametrize(
    ("lr_decay", "trainer_options"),
    [("constant", {}), ("cosine", {}), ("cosine", {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 3})],
    ids=["constant", "cosine", "cosine over epochs"],
)
def test_resumed_run_is_the_uninterrupted_one(fit_with_checkpoints, tmp_path, lr_decay, trainer_options):
    options = {"lr_decay": lr_decay, "lr_warmup_steps": 2, "trainer_options": trainer_options}
    straight = fit_with_checkpoints("straight", **options)
    for step in (1, 4, 5):  # within an epoch of 4, at its end and within the next
        resumed = fit_with_checkpoints(f"resumed_{step}", tmp_path / "straight" / f"step={step}.ckpt", **options)
        for entry in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_equal(resumed[entry], straight[entry])


def test_checkpoint_holds_plain_values_and_no_hyper_parameters(fit_with_checkpoints):
    checkpoint = fit_with_checkpoints("plain")  # was loaded with weights_only=True
    assert "hyper_parameters" not in checkpoint
    assert checkpoint["denoiser"]["sample_shape"] == [1, 8, 8]
    assert checkpoint["denoiser"]["class_names"] == ["cat", "dog"]
    assert checkpoint["denoiser"]["null_label"] == 2


def test_checkpoint_is_read_with_the_averaged_weights(fit_with_checkpoints, tmp_path):
    checkpoint = fit_with_checkpoints("averaged")
    weights = read_denoiser(tmp_path / "averaged" / "step=6.ckpt").unet.state_dict()
    assert_equal(weights, {key: checkpoint["state_dict"][f"ema_unet.{key}"] for key in weights})
    assert not equal(weights, {key: checkpoint["state_dict"][f"unet.{key}"] for key in weights})


def test_checkpoint_of_another_network_is_refused_with_what_differs(tiny_module, tiny_images, quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(tiny_module(), tiny_images(class_names=None))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = tiny_module(num_class_embeds=2)
    with pytest.raises(ValueError, match="num_class_embeds was None, is 2") as error:
        quiet_trainer(max_steps=2).fit(other, tiny_images(), ckpt_path=tmp_path / "one.ckpt")
    assert not re.search(r"size mismatch|Missing key", str(error.value))


@pytest.mark.parametrize("lr_warmup_steps", [0, 4])
def test_continued_run_takes_the_optimisers_new_settings(
    tiny_module, tiny_images, quiet_trainer, tmp_path, lr_warmup_steps
):
    """Twice the rate takes a step twice as long, as gradients and moments are the same."""

    def fitted(max_steps, lr, checkpoint=None, **options):
        optimizer = functools.partial(torch.optim.SGD, lr=lr, **options)
        module = tiny_module(optimizer=optimizer, lr_warmup_steps=lr_warmup_steps)
        trainer = quiet_trainer(max_steps=max_steps, limit_val_batches=0)
        trainer.fit(module, tiny_images(class_names=None), ckpt_path=checkpoint, weights_only=True)
        return trainer, torch.cat([parameter.detach().flatten() for parameter in module.unet.parameters()])

    trainer, before = fitted(2, 0.1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    as_before, twice = (fitted(3, lr, tmp_path / "x.ckpt")[1] - before for lr in (0.1, 0.2))
    torch.testing.assert_close(twice, 2 * as_before, rtol=1e-3, atol=1e-6)  # differences of float32 weights near 1
    assert as_before.abs().max() > 1e-3
    (group,) = fitted(3, 0.1, tmp_path / "x.ckpt", weight_decay=0.5)[0].optimizers[0].param_groups
    assert group["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.Adam,
         "has the options dampening, momentum, nesterov, unlike Adam of the settings"),
        (torch.optim.AdamW, torch.optim.NAdam, "has the options amsgrad, fused, unlike NAdam"),
        (torch.optim.Adam, functools.partial(torch.optim.Adam, amsgrad=True), "has no moments for amsgrad"),
        (torch.optim.Adam, torch.optim.AdamW, None),  # whose moments are the same
        (functools.partial(torch.optim.SGD, lr=0.1), torch.optim.Adam, None),  # there are none
    ],
)  # fmt: skip
def test_moments_of_another_optimiser_are_refused_before_training(
    tiny_module, tiny_images, quiet_trainer, tmp_path, before, after, said
):
    data = tiny_images(class_names=None)
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(tiny_module(optimizer=before), data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = quiet_trainer(max_steps=2, limit_val_batches=0)
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        other.fit(tiny_module(optimizer=after), data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert other.global_step == (2 if said is None else 0)


def test_checkpoint_of_other_classes_is_refused(tiny_module, tiny_images, quiet_trainer, tmp_path):
    """A folder of a class that was renamed: its images would be trained as another class."""
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(tiny_module(num_class_embeds=3), tiny_images(class_names=["cat", "dog", "owl"]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = quiet_trainer(max_steps=2, limit_val_batches=0)
    data = tiny_images(class_names=["ant", "cat", "owl"])
    with pytest.raises(
        ValueError, match="classes of the checkpoint are cat, dog, owl, and those of the data ant, cat, "
    ):
        other.fit(tiny_module(num_class_embeds=3), data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)


def test_checkpoint_of_another_prediction_type_is_refused(tiny_module, tiny_images, quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(tiny_module(), tiny_images(class_names=None))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module = tiny_module()
    module.schedule = NoiseSchedule(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type was v_prediction, is sample"):
        quiet_trainer(max_steps=2).fit(module, tiny_images(class_names=None), ckpt_path=tmp_path / "one.ckpt")


def test_checkpoint_of_another_program_is_refused(tiny_module, tiny_images, quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(tiny_module(), tiny_images(class_names=None))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    del checkpoint["denoiser"]
    torch.save(checkpoint, tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="the checkpoint holds no denoiser: another task or another program"):
        quiet_trainer(max_steps=2).fit(tiny_module(), tiny_images(class_names=None), ckpt_path=tmp_path / "one.ckpt")
