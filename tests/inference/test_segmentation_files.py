"""Segmenters in files of the layout inc, down, up, outc, beside a network of these names that is written here."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from denoisers import randomise
from safetensors.torch import load_file, save_file
from torch import nn

import unet_diffusion as ud


class DoubleConv(nn.Module):
    def __init__(self, channels, mid, out, bias):
        super().__init__()
        self.double_conv = nn.Sequential(
            *(nn.Conv2d(channels, mid, 3, padding=1, bias=bias), nn.BatchNorm2d(mid), nn.ReLU()),
            *(nn.Conv2d(mid, out, 3, padding=1, bias=bias), nn.BatchNorm2d(out), nn.ReLU()),
        )

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, channels, out, bias):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(channels, out, out, bias))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, channels, out, bilinear, bias):
        super().__init__()
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up = nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)
        self.conv = DoubleConv(channels, channels // 2 if bilinear else out, out, bias)

    def forward(self, below, skip):
        return self.conv(torch.cat([skip, self.up(below)], dim=1))


class Out(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv = nn.Conv2d(channels, classes, 1)


class Net(nn.Module):
    """Four levels down, with the names of the layout."""

    def __init__(self, channels=3, classes=2, *, bilinear=False, bias=False, width=4):
        super().__init__()
        half = 2 if bilinear else 1
        self.inc = DoubleConv(channels, width, width, bias)
        for level in range(1, 5):
            out = width * 2**level // (half if level == 4 else 1)
            setattr(self, f"down{level}", Down(width * 2 ** (level - 1), out, bias))
        for level in range(1, 5):
            below = width * 2 ** (5 - level)
            out = below // 2 // (half if level < 4 else 1)
            setattr(self, f"up{level}", Up(below, out, bilinear, bias))
        self.outc = Out(width, classes)

    def forward(self, x):
        maps = [self.inc(x)]
        for level in range(1, 5):
            maps.append(getattr(self, f"down{level}")(maps[-1]))
        x = maps.pop()
        for level in range(1, 5):
            x = getattr(self, f"up{level}")(x, maps.pop())
        return self.outc.conv(x)


def tiny(**options) -> Net:
    torch.manual_seed(0)
    net = randomise(Net(**options).train())
    with torch.no_grad():
        net.train()(torch.rand(4, options.get("channels", 3), 32, 32))  # running statistics of its own
    return net.eval()


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("channels", "classes"), [(3, 2), (1, 5)])
@torch.no_grad()
def test_network_gives_the_scores_of_the_layout(bilinear, bias, channels, classes, tmp_path):
    net = tiny(bilinear=bilinear, bias=bias, channels=channels, classes=classes)
    torch.save({**net.state_dict(), "mask_values": [0, 1]}, tmp_path / "net.pth")
    ours = ud.load(tmp_path / "net.pth")
    x = torch.rand(2, channels, 32, 48)
    torch.testing.assert_close(ours.unet(2 * x - 1), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["model.", "net.", "module.model.", "_orig_mod."])
def test_prefix_of_a_training_program_is_taken_off_with_a_note(prefix, tmp_path):
    net = tiny(classes=1)
    weights = {f"{prefix}{key}": value for key, value in net.state_dict().items()}
    lightning = {"state_dict": {**weights, "loss.weight": torch.ones(2)}, "pytorch-lightning_version": "2.5.0"}
    torch.save(lightning, tmp_path / "last.ckpt")
    save_file(net.state_dict(), tmp_path / "plain.safetensors")
    with pytest.warns(UserWarning, match=f"{prefix} was taken off the names of the weights, and loss.weight left out"):
        ours = ud.load(tmp_path / "last.ckpt")
    expected = ud.load(tmp_path / "plain.safetensors")
    assert ours.record() == expected.record()
    assert all(torch.equal(value, expected.unet.state_dict()[key]) for key, value in ours.unet.state_dict().items())


@torch.no_grad()
def test_probabilities_are_those_of_the_network(tmp_path):
    net = tiny(classes=3)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    segmenter = ud.load(tmp_path / "net.safetensors")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    expected = net(x).softmax(dim=1)[0].numpy()
    np.testing.assert_allclose(segmenter.segment(image).probabilities, expected, atol=1e-5)
    assert (segmenter.kind, segmenter.class_names) == ("classes", ["0", "1", "2"])


@torch.no_grad()
def test_one_score_is_the_logit_of_the_foreground(tmp_path):
    net = tiny(classes=1)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    segmenter = ud.load(tmp_path / "net.safetensors")
    image = torch.rand(3, 32, 32)
    expected = net(image[None]).sigmoid()[0, 0].numpy()
    result = segmenter.segment(2 * image - 1)
    np.testing.assert_allclose(result.probabilities[1], expected, atol=1e-5)
    np.testing.assert_array_equal(result.classes > 0, expected > 0.5)


@pytest.mark.parametrize("bilinear", [False, True])
def test_imported_segmenter_is_a_checkpoint(bilinear, tmp_path, run_cli):
    save_file(tiny(bilinear=bilinear).state_dict(), tmp_path / "net.safetensors")
    status, out, err = run_cli("import", tmp_path / "net.safetensors", tmp_path / "net.ckpt", "--image_size", "64")
    assert status == 0, err
    assert "windows of 64 pixels" in out
    image = torch.rand(3, 40, 40) * 2 - 1
    expected = ud.load(tmp_path / "net.safetensors", image_size=64).segment(image).probabilities
    np.testing.assert_array_equal(ud.load(tmp_path / "net.ckpt").segment(image).probabilities, expected)


def without_norm(weights):
    return {key: value for key, value in weights.items() if "running" not in key}


def with_other_names(weights):
    return {key.replace(".double_conv", ".conv"): value for key, value in weights.items()}


def without_an_end(weights):
    return {key: value for key, value in weights.items() if not key.startswith("outc")}


def without_last_bias(weights):
    return {key: value for key, value in weights.items() if key != "outc.conv.bias"}


def without_bias_of_one(weights):
    return {key: value for key, value in tiny(bias=True).state_dict().items() if key != "inc.double_conv.3.bias"}


def twice(weights):
    copied = {key: value.clone() for key, value in weights.items()}
    return {f"{name}.{key}": value for name, one in (("model", weights), ("teacher", copied))
            for key, value in one.items()}  # fmt: skip


def with_more(weights):
    return {**weights, "attention.weight": torch.ones(1)}


def with_a_hole(weights):
    return {key: value for key, value in weights.items() if not key.startswith("up2")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_norm, r"must have batch norm after each convolution"),
        (with_other_names, r"has the layout inc, down, up, outc, but lacks inc.double_conv.0.weight"),
        (without_an_end, r"has the layout inc, down, up, outc, but lacks outc.conv.weight"),
        (with_more, r"has the layout inc, down, up, outc, but .*attention.weight"),
        (
            with_a_hole,
            r"has the layout inc, down, up, outc, but lacks up2.conv.double_conv.0.weight, .*; save the whole",
        ),
        (
            without_last_bias,
            r"but lacks outc.conv.bias; save the whole state_dict .*, or, if its .* add zeros",
        ),
        (without_bias_of_one, r"has the layout inc, down, up, outc, but lacks inc.double_conv.3.bias; save the whole"),
        (twice, r"must hold one network of .* and holds several, model., teacher.; save the state_dict of one"),
    ],
)
def test_other_weights_are_refused(change, message, tmp_path):
    save_file(change(tiny().state_dict()), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=message):
        ud.load(tmp_path / "net.safetensors")


@torch.no_grad()
def test_counts_of_batches_may_be_missing(tmp_path):
    weights = tiny().state_dict()
    save_file(weights, tmp_path / "net.safetensors")
    save_file({key: value for key, value in weights.items() if "num_batches" not in key}, tmp_path / "bare.safetensors")
    whole, bare = (ud.load(tmp_path / f"{name}.safetensors").unet for name in ("net", "bare"))
    images = torch.rand(1, whole.in_channels, 64, 64)
    assert torch.equal(whole(images), bare(images))


def test_options_of_denoisers_are_refused(tmp_path):
    save_file(tiny().state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"num_heads is for another program's weights .* leave it out"):
        ud.load(tmp_path / "net.safetensors", num_heads=8)


def test_bilinear_upsampling_needs_two_equal_widths():
    with pytest.raises(ValueError, match=r"the last two channels must be equal for bilinear upsampling, got \[4, 8\]"):
        ud.SegmentationUNet(1, 2, channels=(4, 8), padding="same", upsampling="bilinear")


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
@torch.no_grad()
def test_exported_file_is_that_of_the_layout(bilinear, classes, tmp_path, run_cli):
    net = tiny(bilinear=bilinear, classes=classes, bias=True)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    segmenter = replace(ud.load(tmp_path / "net.safetensors", image_size=64), threshold=0.4, min_size=3)
    if classes == 5:
        segmenter = replace(segmenter, class_names=["ground", "road", "car", "tree", "sky"])
    segmenter.save(tmp_path / "net.ckpt")
    status, out, err = run_cli("export", tmp_path / "net.ckpt", tmp_path / "again.safetensors")
    assert status == 0, err
    assert "read again, they are the same" in out
    exported = load_file(tmp_path / "again.safetensors")
    assert exported.keys() == net.state_dict().keys()
    assert all(torch.equal(exported[key], value) for key, value in net.state_dict().items())
    again = ud.load(tmp_path / "again.safetensors")
    assert again.record() | {"settings": {}} == segmenter.record() | {"settings": {}}


def unlike_the_layout() -> dict[str, tuple[ud.Segmenter, str]]:
    names = ["background", "foreground"]
    plain = {"padding": "same", "norm": "batch", "channels": (4, 8)}

    def binary(unet, **fields):
        return ud.Segmenter(unet, **{"kind": "binary", "class_names": names, "timestep": None, "stretch": False,
                                     "window_size": 32, **fields})  # fmt: skip

    fitting = ud.SegmentationUNet(1, 2, unit_range=True, **plain)
    return {
        "range": (binary(ud.SegmentationUNet(1, 2, **plain)), "network with unit_range True, got False"),
        "norm": (binary(ud.SegmentationUNet(1, 2, unit_range=True, padding="same")), "norm batch, got None"),
        "stretch": (binary(fitting, stretch=True), "neither stretched nor scaled"),
        "objects": (
            binary(ud.SegmentationUNet(1, 4, unit_range=True, **plain), kind="instances", class_names=[*names, "edge"]),
            "of kind instances gives 4 maps",
        ),
    }


@pytest.mark.parametrize("why", unlike_the_layout())
def test_segmenter_that_the_layout_cannot_hold_is_refused(why, tmp_path):
    segmenter, words = unlike_the_layout()[why]
    with pytest.raises(ValueError, match=rf"{words}.*; export a folder"):
        segmenter.export(tmp_path / "file.safetensors")
    assert not list(tmp_path.iterdir())


def test_network_without_python_is_no_file_of_weights(tmp_path):
    segmenter, _ = unlike_the_layout()["range"]
    with pytest.raises(ValueError, match="format onnx makes a folder"):
        segmenter.export(tmp_path / "file.safetensors", format="onnx")


@pytest.mark.parametrize(("name", "value"), [("kind", "distance"), ("image_size", True), ("class_names", [1, 2])])
def test_settings_that_are_none_are_refused(name, value, tmp_path):
    metadata = {"unet_diffusion": json.dumps({name: value})}
    save_file(tiny().state_dict(), tmp_path / "net.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"{name} in the metadata of .* must be .*; export it again"):
        ud.load(tmp_path / "net.safetensors")
