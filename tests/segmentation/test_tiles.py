"""Tiles give what one pass over the whole image gives."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.segmentation.tiles import mirror, predict_tiled, predict_views


def whole_numbers(model: SegmentationUNet) -> SegmentationUNet:
    """Weights of -1, 0 and 1: sums of such products are exact in float64, in whatever order they are added."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).double()
    return model.eval()


def network(**options) -> SegmentationUNet:
    return whole_numbers(SegmentationUNet(1, 3, **{"channels": (2, 3, 4), **options}))


def image(height: int, width: int) -> torch.Tensor:
    return torch.randint(-3, 4, (1, height, width), generator=torch.Generator().manual_seed(1)).double()


def in_one_pass(model: SegmentationUNet, picture: torch.Tensor) -> torch.Tensor:
    """Mirrored by numpy, predicted at once, cut to size."""
    sides = [model.next_size(side + 2 * model.margin) for side in picture.shape[1:]]
    before = model.margin
    pads = [(before, side - n - before) for side, n in zip(sides, picture.shape[1:], strict=True)]
    padded = torch.from_numpy(np.pad(picture[0].numpy(), pads, mode="reflect"))
    with torch.no_grad():
        return model(padded[None, None])[0, :, : picture.shape[1], : picture.shape[2]]


@pytest.mark.parametrize("window_size", [1, 60, 64, 77, 100])
@pytest.mark.parametrize("size", [(50, 50), (97, 31), (1, 70), (5, 3)])
def test_tiles_of_valid_convolutions_equal_the_whole_exactly(size, window_size):
    model, picture = network(), image(*size)
    with torch.no_grad():
        tiled = predict_tiled(model, picture, model, window_size=window_size)
    assert torch.equal(tiled.double(), in_one_pass(model, picture))  # whole numbers: exact in float32 too


def test_tiles_are_no_larger_than_as_many_of_them_need():
    with torch.device("meta"):
        paper = SegmentationUNet(1, 2)
    seen = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[-1])
        return x[:, :, 92:-92, 92:-92]

    predict_tiled(predict, image(512, 512), paper, window_size=572)
    assert seen == [440 + 4] * 4  # 16 k + 188, for two times 256 pixels a side


def test_network_of_the_paper_sees_several_tiles_without_a_seam():
    model = SegmentationUNet(1, 2, channels=(4, 4, 4, 4, 4)).eval().double()  # its depth and margin
    picture = image(100, 230)
    with torch.no_grad():
        tiled = predict_tiled(model, picture, model, window_size=252)  # gives 68 pixels: steps of 64
    torch.testing.assert_close(tiled.double(), in_one_pass(model, picture), rtol=1e-4, atol=1e-4)  # float32 output


def test_padded_network_sees_an_image_that_fits_in_one_pass():
    model, picture = network(padding="same"), image(24, 32)
    with torch.no_grad():
        tiled = predict_tiled(model, picture, model, window_size=64)
    torch.testing.assert_close(tiled.double(), model(picture[None])[0].detach(), rtol=1e-6, atol=1e-6)  # float32


def test_windows_of_a_padded_network_blend_to_the_whole_away_from_their_borders():
    """Where padding does not reach, every window predicts the same, and so does their mean."""

    def local(x: torch.Tensor) -> torch.Tensor:
        return x.square()

    picture = image(70, 90)
    tiled = predict_tiled(local, picture, network(padding="same"), window_size=32)
    torch.testing.assert_close(tiled.double(), picture.square(), rtol=1e-6, atol=1e-6)  # float32


def test_blending_leaves_no_seam():
    """Windows that disagree by 1 change over along a ramp, by little from pixel to pixel."""
    calls = iter(range(100))

    def disagreeing(x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, float(next(calls) % 2))

    tiled = predict_tiled(disagreeing, image(8, 200), network(padding="same"), window_size=64)
    assert (tiled[0, 4].diff().abs() < 0.1).all()
    assert tiled[0, 4].max() > 0.9
    assert tiled[0, 4].min() < 0.1


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_mirror_is_numpys_reflection(length):
    row = np.arange(length)
    expected = np.pad(row, (10, 12), mode="reflect")
    assert mirror(-10, length + 12, length).tolist() == expected.tolist()


def test_views_of_a_symmetric_prediction_agree():
    picture = image(9, 13)
    torch.testing.assert_close(predict_views(torch.square, picture), picture.square())


def test_views_are_turned_back_before_they_are_averaged():
    """The mean over the views of a shift is the mean of shifts in all four directions, each twice."""
    picture = image(6, 6).roll(0)

    def shifted(view: torch.Tensor) -> torch.Tensor:
        return view.roll(1, dims=2)

    expected = sum(picture.roll(step, dims=dim) for step in (1, -1) for dim in (1, 2)) / 4
    torch.testing.assert_close(predict_views(shifted, picture), expected)


MEMORY = """
import resource, torch
from unet_diffusion.segmentation.tiles import predict_tiled
from unet_diffusion.models.segmentation_unet import SegmentationUNet
torch.set_num_threads(2)
model = SegmentationUNet(1, 2, channels=(8, 8, 8)).eval()
def peak(side):
    with torch.inference_mode():
        output = predict_tiled(model, torch.zeros(1, side, side), model, window_size=300)
    assert output.shape == (2, side, side)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = peak(300)
print(peak(2048) - small)
"""


@pytest.mark.slow
def test_memory_of_a_large_image_is_that_of_a_tile_and_the_image():
    """2048 x 2048: 16 MiB of image, 32 of output, 16 of weights; the maps of one pass would be 1.2 GiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200, done.stdout  # MiB
