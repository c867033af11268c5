"""Batch norms of averages: their statistics are those of training batches, and training does not notice."""

import copy
import functools
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from unet_diffusion.data import SegmentationDataModule, SyntheticCells
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.segmentation.augmentation import Augmentation
from unet_diffusion.segmentation.features import FeatureClassifier
from unet_diffusion.segmentation.labels import Targets
from unet_diffusion.training import SegmentationModule
from unet_diffusion.training.batch_norms import FIRST_EPOCH, AverageStatistics
from unet_diffusion.training.checkpointing import LAST, RunCheckpoint
from unet_diffusion.training.stopping import StopOnSignal

ADAM = functools.partial(torch.optim.Adam, lr=1.0e-2)


def cells(**options) -> SegmentationDataModule:
    settings = {"window_size": 32, "batch_size": 2, "windows_per_image": 2, "num_val": 2, **options}
    return SegmentationDataModule(SyntheticCells(num_images=5), Targets(label_format="instances"), **settings)


def network(**options) -> SegmentationUNet:
    torch.manual_seed(0)
    return SegmentationUNet(1, 2, **{"channels": (4, 8), "padding": "same", "norm": "batch", **options})


def module(unet=None, **options) -> SegmentationModule:
    return SegmentationModule(unet or network(), **{"optimizer": ADAM, "ema_decay": 0.9, **options})


def drawn_batches(data: SegmentationDataModule, num_batches: int) -> list[torch.Tensor]:
    """Windows of numbers in the order of epochs that no run gets to, as DataLoaders would not make them."""
    sampler, batches, epoch = data.train_dataloader().sampler, [], FIRST_EPOCH
    while len(batches) < num_batches:
        sampler.set_epoch(epoch)
        batches += [torch.stack([data.window(one)["images"] for one in drawn]) for drawn in sampler]
        epoch += 1
    return batches[:num_batches]


def moments_of(unet: nn.Module, batches: list[torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The mean over batches of mean and unbiased variance of what each batch norm gets where batches normalise."""
    unet, seen = copy.deepcopy(unet), {}
    for name, norm in unet.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = norm.running_var = None  # so that the batch normalises in eval mode, too
            norm.register_forward_pre_hook(lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            unet(batch)
    return {
        name: tuple(torch.stack([moment(x.double().transpose(0, 1).flatten(1)) for x in maps]).mean(dim=0)
                    for moment in (lambda rows: rows.mean(dim=1), lambda rows: rows.var(dim=1)))
        for name, maps in seen.items()
    }  # fmt: skip


def assert_own_statistics(unet: nn.Module, data: SegmentationDataModule, num_batches: int) -> None:
    moments = moments_of(unet, drawn_batches(data, num_batches))
    assert moments
    for name, (mean, variance) in moments.items():
        norm = unet.get_submodule(name)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_average_on_training_batches(quiet_trainer):
    data, made = cells(augmentation=Augmentation(noise=0.1)), module(network(dropout=0.5))
    quiet_trainer(max_steps=5, limit_val_batches=0).fit(made, data)
    assert_own_statistics(made.ema_unet, data, num_batches=5)  # more than an epoch has, and no more than the run
    raw = dict(made.unet.named_buffers())
    assert not any(torch.allclose(value, raw[name]) for name, value in made.ema_unet.named_buffers() if "mean" in name)
    assert not made.ema_unet.training
    assert all(norm.momentum == 0.1 for norm in made.ema_unet.modules() if isinstance(norm, nn.BatchNorm2d))


class AtValidation(Callback):
    def __init__(self, look):
        self.look = look

    def on_validation_batch_start(self, trainer, pl_module, *args):
        if not trainer.sanity_checking:
            self.look(trainer, pl_module)


def test_average_is_validated_with_statistics_of_its_own(quiet_trainer):
    data, validated_at = cells(), []

    def look(trainer, made):
        validated_at.append(trainer.global_step)
        assert_own_statistics(made.ema_unet, data, num_batches=trainer.global_step)

    trainer = quiet_trainer(max_steps=4, val_check_interval=2, limit_val_batches=1, callbacks=[AtValidation(look)],
                            check_val_every_n_epoch=None)  # fmt: skip
    trainer.fit(module(), data)
    assert validated_at == [2, 4]


def trained(quiet_trainer, folder, steps, *, ckpt_path=None, **options) -> dict[str, torch.Tensor]:
    keep = RunCheckpoint(folder, save_last=True, every_n_train_steps=2, enable_version_counter=False)
    options = {"limit_val_batches": 0, "callbacks": [keep], "enable_checkpointing": True, **options}
    made = module(network(dropout=0.2))
    trainer = quiet_trainer(max_steps=steps, **options)
    trainer.fit(made, cells(augmentation=Augmentation(noise=0.1)), ckpt_path=ckpt_path)
    return made.state_dict()


def test_resumed_run_is_the_uninterrupted_one(quiet_trainer, tmp_path):
    straight = trained(quiet_trainer, tmp_path / "straight", 5)
    trained(quiet_trainer, tmp_path / "stopped", 2)  # where it computes statistics, and the other run does not
    resumed = trained(quiet_trainer, tmp_path / "stopped", 5, ckpt_path=tmp_path / "stopped" / LAST)
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def test_statistics_that_a_step_made_infinite_are_put_back_alike_after_a_validation(quiet_trainer, tmp_path):
    class Overflows(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 2:
                next(norm for norm in pl_module.unet.modules() if isinstance(norm, nn.BatchNorm2d)).running_mean.fill_(
                    torch.inf
                )

    validates = {"limit_val_batches": 1, "check_val_every_n_epoch": None, "val_check_interval": 2}
    states = [
        trained(quiet_trainer, tmp_path / name, 3, callbacks=[Overflows()], enable_checkpointing=False, **options)
        for name, options in {"validates": validates, "does not": {}}.items()
    ]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


ENDS = {
    "steps": {"max_steps": 4},
    "epochs": {"max_epochs": 1},
    "epochs, between two checkpoints": {"max_epochs": 1, "limit_train_batches": 1},
    "validation": {"max_steps": 4, "limit_val_batches": 1, "check_val_every_n_epoch": None, "val_check_interval": 2},
    "accumulated": {"max_steps": 2, "accumulate_grad_batches": 2},
}


class StopsEarly(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 2


class IsAskedToStop(Callback):
    """Gets a signal in the last step, of a run that ends by itself."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == trainer.max_steps - 1:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("end", [*ENDS, "stopped", "asked to stop"])
def test_checkpoint_at_the_end_holds_the_statistics_of_the_average(quiet_trainer, tmp_path, end):
    keep = RunCheckpoint(tmp_path, save_last=True, every_n_train_steps=2, enable_version_counter=False)
    more = {"stopped": [StopsEarly()], "asked to stop": [StopOnSignal(), IsAskedToStop()]}
    callbacks = [keep, *more.get(end, [])]
    options = {"limit_val_batches": 0, "max_epochs": 3, **ENDS.get("steps" if end == "asked to stop" else end, {})}
    made, data = module(), cells(windows_per_image=4)
    trainer = quiet_trainer(enable_checkpointing=True, callbacks=callbacks, **options)
    trainer.fit(made, data)
    held = torch.load(tmp_path / LAST, weights_only=True)
    assert held["global_step"] == trainer.global_step
    torch.testing.assert_close(held["state_dict"], made.state_dict(), rtol=0, atol=0)
    num_batches = trainer.global_step * options.get("accumulate_grad_batches", 1)
    assert_own_statistics(made.ema_unet, data, num_batches)


@pytest.mark.filterwarnings("ignore:the frozen denoiser has random weights")
def test_norms_of_a_frozen_denoiser_stay_as_they_are(quiet_trainer):
    denoiser = SegmentationUNet(1, 1, channels=(4, 8), padding="same", norm="batch", timestep_embedding=True)
    for norm in denoiser.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    unet = FeatureClassifier(denoiser, NoiseSchedule(100, "linear"), timesteps=[10], levels=[0], hidden_channels=[4, 4])
    before, data, made = copy.deepcopy(denoiser.state_dict()), cells(), module(unet)
    quiet_trainer(max_steps=3, limit_val_batches=0).fit(made, data)
    for part in (made.unet, made.ema_unet):
        torch.testing.assert_close(part.denoiser.state_dict(), before, rtol=0, atol=0)
    maps = [made.ema_unet.maps(batch, 10)[0].double() for batch in drawn_batches(data, 3)]
    norm = made.ema_unet.projections[0][0]
    mean = torch.stack([one.mean(dim=(0, 2, 3)) for one in maps]).mean(dim=0)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"unet": network(norm="group")}, {"ema_decay": 0.0}], ids=["group norm", "no EMA"])
def test_nothing_is_computed_without_batch_norms_or_without_an_average(quiet_trainer, options):
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(module(**options), cells())
    assert not any(isinstance(one, AverageStatistics) for one in trainer.callbacks)


def test_denoiser_with_batch_norm_has_statistics_of_its_average(quiet_trainer, tiny_module, tiny_images):
    unet = SegmentationUNet(1, 1, channels=(4, 8), padding="same", norm="batch", timestep_embedding=True)
    made, data = tiny_module(unet=unet, ema_decay=0.5), tiny_images()
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(made, data)
    seen = []
    first = next(name for name, one in made.ema_unet.named_modules() if isinstance(one, nn.BatchNorm2d))
    norm = made.ema_unet.get_submodule(first)
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean(dim=(0, 2, 3))))
    sampler = data.train_dataloader().sampler
    sampler.set_epoch(FIRST_EPOCH)
    for indices in [*sampler][:2]:
        images = data.image_set.images[torch.tensor(indices)] / 127.5 - 1
        made.pass_average({"images": images, "index": torch.tensor(indices)})
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(dim=0), rtol=1e-4, atol=1e-6)


class OwnLoaders(LightningDataModule):
    """The labelled images without the data module that knows how to draw other windows of them."""

    def __init__(self):
        super().__init__()
        self.cells = cells()

    def __getattr__(self, name):
        return getattr(self.cells, name)

    def train_dataloader(self):
        self.cells.setup("fit")
        windows = [self.cells.window((int(index), 0, n)) for n, index in enumerate(self.cells.train_images)]
        return DataLoader(windows, batch_size=2)


def test_data_that_cannot_be_drawn_again_are_told(quiet_trainer):
    data = OwnLoaders()
    data.cells.setup("fit")
    with pytest.warns(UserWarning, match="statistics of batch norms that are not its own.*or use group norm"):
        quiet_trainer(max_steps=1, limit_val_batches=0).fit(module(), data)
