"""A network of your own, outside the package: ten lines are enough, and errors say in words what is missing."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_diffusion.models.embeddings import TimestepEmbedding
from unet_diffusion.models.speed import fastest_setting, set_speed
from unet_diffusion.models.unet import PixelNetwork


class Stack(PixelNetwork):
    def __init__(self, in_channels: int, width: int = 32):
        super().__init__()
        self.config = {"in_channels": in_channels, "width": width}
        self.time_embedding = TimestepEmbedding(width, width)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv_in(x) + self.time_embedding(t)[:, :, None, None]
        return self.conv_out(F.silu(h))


def test_it_is_the_network_of_the_documentation():
    documented = PixelNetwork.__doc__.split("any size::\n")[1].split("`forward(x, t, **inputs)`")[0]
    own = [line.strip() for line in Path(__file__).read_text().splitlines() if line.strip()]
    start = own.index("class Stack(PixelNetwork):")
    assert own[start:][:10] == [line.strip() for line in documented.splitlines() if line.strip()]


def test_it_is_built_again_from_its_config():
    torch.manual_seed(0)
    network = Stack(2, width=8).eval()
    network.check_config()
    again = type(network)(**network.config).eval()
    again.load_state_dict(network.state_dict())
    x, t = torch.randn(3, 2, 5, 7), torch.tensor([0, 10, 999])
    assert torch.equal(again(x, t), network(x, t))


def test_it_takes_any_size_no_labels_and_no_context():
    network = Stack(2)
    network.check_size(5, 7)
    assert (network.next_size(13), network.smallest_size, network.margin) == (13, 1, 0)
    assert (network.in_channels, network.out_channels) == (2, 2)
    assert (network.num_class_embeds, network.context_dim, network.vector_dim) == (None, None, None)


def test_it_runs_at_every_speed_that_needs_no_compiler():
    network, x, t = Stack(2, width=8), torch.randn(2, 2, 4, 4), torch.tensor([3, 700])
    expected = network(x, t)
    set_speed(network, "channels_last")
    torch.testing.assert_close(network(x, t), expected)
    speed, _, _ = fastest_setting(
        network, x, inputs={}, num_steps=10, speeds=["plain", "channels_last"], precisions=[torch.float32]
    )
    assert speed in ("plain", "channels_last")


def test_sizes_that_it_takes_follow_from_its_step():
    network = Stack(2)
    network.size_step = 8
    assert [network.next_size(side) for side in (1, 8, 9)] == [8, 8, 16]
    with pytest.raises(ValueError, match="must be multiples of 8, got 8 x 12; the next size that fits is 8 x 16"):
        network.check_size(8, 12)


def with_config(config: object) -> Stack:
    network = Stack(2)
    network.config = config
    return network


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "Stack must set self.config to a dict of its constructor's arguments, got nothing"),
        ([2, 32], "to a dict of its constructor's arguments, got a list"),
        ({"in_channels": 2}, r"exactly the arguments of its constructor \(in_channels, width\), got in_channels$"),
        ({"in_channels": 2, "width": 8, "depth": 1}, "got in_channels, width, depth$"),
        ({"in_channels": 2, "width": torch.tensor(8)}, "width in the config of Stack must be a plain value.*a Tensor"),
        ({"in_channels": 2, "width": {"of": [8, object()]}}, "width in the config of Stack must be a plain value"),
    ],
)
def test_a_config_that_cannot_build_it_again_is_refused_in_words(config, message):
    with pytest.raises(ValueError, match=message):
        with_config(config).check_config()


class NoChannels(PixelNetwork):
    def __init__(self, width: int = 8):
        super().__init__()
        self.config = {"width": width}


class Grey(NoChannels):
    in_channels = 1


def test_channels_are_an_argument_or_an_attribute():
    with pytest.raises(ValueError, match="NoChannels must have an argument in_channels, or define the attribute"):
        NoChannels().check_config()
    Grey().check_config()
    assert Grey().out_channels == 1
