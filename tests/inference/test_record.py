import os
import zipfile

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.reading import read_denoiser
from unet_diffusion.inference.record import denoiser_record, save_denoiser
from unet_diffusion.models.denoiser_unet import DenoiserUNet

LEARNING_RATE = 0.125


def tiny_unet(seed: int = 0) -> DenoiserUNet:
    torch.manual_seed(seed)
    model = DenoiserUNet(1, (4, 8), norm_num_groups=2, layers_per_block=1, num_class_embeds=3, dropout=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_denoiser(seed: int = 0) -> Denoiser:
    return Denoiser(
        unet=tiny_unet(seed),
        schedule=NoiseSchedule(10, "scaled_linear", beta_end=0.3, prediction_type="v_prediction"),
        sample_shape=(1, 4, 6),
        null_label=2,
        class_names=["cat", "dog"],
        settings={"lr": 2.0e-4, "steps": [1, 2], "data": {"folder": "cats"}},
    )


class TinyModule(LightningModule):
    """Trains a network and keeps another, as checkpoints of this package have it."""

    def __init__(self, seed: int):
        super().__init__()
        self.unet, self.ema_unet = tiny_unet(seed), tiny_unet(seed + 1)

    def training_step(self, batch, batch_idx):
        return self.unet(batch, torch.zeros(len(batch)), torch.zeros(len(batch), dtype=torch.int64)).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.unet.parameters(), lr=LEARNING_RATE, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=100)]

    def on_save_checkpoint(self, checkpoint):
        trained = tiny_denoiser()
        trained.unet = self.ema_unet
        checkpoint["denoiser"] = denoiser_record(trained)


def fit(module: LightningModule, folder, max_steps: int, ckpt_path=None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.randn(4, 1, 4, 6), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def assert_same_but_weights(one: Denoiser, other: Denoiser) -> None:
    assert denoiser_record(one) == denoiser_record(other)
    assert isinstance(other.sample_shape, tuple)


def test_checkpoint_of_a_training_is_read_with_its_averaged_weights(tmp_path):
    module = TinyModule(seed=0)
    fit(module, tmp_path, max_steps=1).save_checkpoint(tmp_path / "last.ckpt")
    trained = read_denoiser(tmp_path / "last.ckpt")
    assert_same_weights(trained.unet, module.ema_unet)
    assert_same_but_weights(tiny_denoiser(), trained)
    assert not trained.unet.training


def test_initial_checkpoint_is_read_as_it_was_written(tmp_path):
    save_denoiser(tiny_denoiser(), tmp_path / "new" / "initial.ckpt")
    trained = read_denoiser(tmp_path / "new" / "initial.ckpt")
    assert_same_weights(trained.unet, tiny_denoiser().unet)
    assert_same_but_weights(tiny_denoiser(), trained)


def test_read_network_does_not_change_with_its_file(tmp_path):
    path = tmp_path / "initial.ckpt"
    save_denoiser(tiny_denoiser(0), path)
    trained = read_denoiser(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # in place: a memory map would see it
    assert_same_weights(trained.unet, tiny_denoiser(0).unet)


def test_training_continues_from_an_initial_checkpoint_with_a_fresh_optimiser(tmp_path):
    save_denoiser(tiny_denoiser(7), tmp_path / "initial.ckpt")
    module = WatchingModule(seed=0)
    trainer = fit(module, tmp_path, max_steps=3, ckpt_path=tmp_path / "initial.ckpt")
    expected = tiny_denoiser(7).unet.state_dict()
    torch.testing.assert_close(module.at_start["unet"], expected, rtol=0, atol=0)
    torch.testing.assert_close(module.at_start["ema_unet"], expected, rtol=0, atol=0)
    assert module.at_start["step"] == 0
    assert not module.at_start["optimizer_state"]
    assert trainer.global_step == 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == LEARNING_RATE


class WatchingModule(TinyModule):
    """Notes its state after the checkpoint has been restored."""

    def on_train_start(self):
        self.at_start = {
            "unet": {key: value.clone() for key, value in self.unet.state_dict().items()},
            "ema_unet": {key: value.clone() for key, value in self.ema_unet.state_dict().items()},
            "step": self.trainer.global_step,
            "optimizer_state": dict(self.trainer.optimizers[0].state),
        }


def test_initial_checkpoint_overwrites_nothing_and_leaves_no_partial_file(tmp_path):
    path = tmp_path / "initial.ckpt"
    save_denoiser(tiny_denoiser(0), path)
    with pytest.raises(FileExistsError, match=r"initial\.ckpt"):
        save_denoiser(tiny_denoiser(1), path)
    assert_same_weights(read_denoiser(path).unet, tiny_unet(0))
    assert os.listdir(tmp_path) == ["initial.ckpt"]


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(checkpoint, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save_denoiser(tiny_denoiser(), tmp_path / "initial.ckpt")
    assert os.listdir(tmp_path) == []


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        read_denoiser(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_denoiser(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n", b"PK\x03\x04 and no more"])
def test_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt is no checkpoint"):
        read_denoiser(tmp_path / "x.ckpt")


def test_zip_file_of_another_kind_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(ValueError, match=r"x\.ckpt is damaged"):
        read_denoiser(tmp_path / "x.ckpt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "x.ckpt"
    save_denoiser(tiny_denoiser(), path)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match="only a part of one"):
        read_denoiser(path)


def test_checkpoint_with_code_is_refused_and_the_code_not_run(tmp_path, code):
    torch.save({"denoiser": code(tmp_path / "ran")}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt was not loaded.*could run code"):
        read_denoiser(tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


def test_compressed_checkpoint_is_refused_before_it_fills_the_memory(tmp_path):
    save_denoiser(tiny_denoiser(), tmp_path / "x.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "x.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match=r"bomb\.ckpt was not loaded: it must be uncompressed"):
        read_denoiser(tmp_path / "bomb.ckpt")


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3), {"denoiser": 3}])
def test_checkpoint_of_another_program_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="not written by unet_diffusion"):
        read_denoiser(tmp_path / "x.ckpt")


def write_changed(path, change) -> None:
    """A checkpoint that was changed after it had been written."""
    original = path.with_name("original.ckpt")
    save_denoiser(tiny_denoiser(), original)
    checkpoint = torch.load(original, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def test_one_flipped_bit_is_refused(tmp_path):
    """In a weight, where the file stays a checkpoint, and the weight a number."""
    path = tmp_path / "x.ckpt"
    save_denoiser(tiny_denoiser(), path)
    weight = tiny_denoiser().unet.mid_block.resnets[0].conv1.weight.detach().numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight) + 1] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["denoiser"]
    with pytest.raises(ValueError, match=r"x\.ckpt is damaged \(the checksum of .* is wrong\)"):
        read_denoiser(path)


WRONG_FIELDS = {
    "weights must be finite, and ema_unet.conv_in.bias is not": lambda checkpoint: checkpoint["state_dict"][
        "ema_unet.conv_in.bias"
    ].fill_(torch.nan),
    "class_names must name each of the 2 classes, got 1 names": lambda checkpoint: checkpoint["denoiser"].update(
        class_names=["cat"]
    ),
    "speed must be one of plain, .*, got 'warp'": lambda checkpoint: checkpoint.update(speed="warp"),
    "null_label must be one of the network's 3 labels, got 3": lambda checkpoint: checkpoint["denoiser"].update(
        null_label=3
    ),
}


@pytest.mark.parametrize("message", WRONG_FIELDS)
def test_checkpoint_with_a_wrong_field_is_refused(tmp_path, message):
    write_changed(tmp_path / "x.ckpt", WRONG_FIELDS[message])
    with pytest.raises(ValueError, match=message):
        read_denoiser(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "class_path",
    [
        "os.system",
        "torch.nn.Linear",
        "unet_diffusion_evil.unet.DenoiserUNet",
        "unet_diffusion.inference.record.Denoiser",
        "unet_diffusion.models.unet.nn",
        "unet_diffusion.models.unet.Missing",
        "unet_diffusion.missing.DenoiserUNet",
        "DenoiserUNet",
        "",
    ],
)
def test_class_outside_the_networks_of_this_package_is_refused(tmp_path, class_path):
    def change(checkpoint):
        checkpoint["denoiser"]["unet"]["class_path"] = class_path

    write_changed(tmp_path / "x.ckpt", change)
    with pytest.raises(ValueError, match="class_path"):
        read_denoiser(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    ("missing", "change"),
    [
        ("colour", lambda checkpoint: checkpoint["denoiser"]["unet"]["init_args"].update(colour="red")),
        ("schedule", lambda checkpoint: checkpoint["denoiser"].pop("schedule")),
        ("state_dict", lambda checkpoint: checkpoint.pop("state_dict")),
        (r"conv_out\.bias", lambda checkpoint: checkpoint["state_dict"].pop("ema_unet.conv_out.bias")),
    ],
)
def test_incomplete_checkpoint_says_what_does_not_fit(tmp_path, missing, change):
    write_changed(tmp_path / "x.ckpt", change)
    with pytest.raises(ValueError, match=missing):
        read_denoiser(tmp_path / "x.ckpt")
