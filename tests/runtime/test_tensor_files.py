"""Checkpoints of other programs: weights lie a few entries deep, and no file makes the reader go on for ever."""

import pytest
import torch

from unet_diffusion.runtime.tensor_files import read_tensors

WEIGHTS = {"conv.weight": torch.arange(4.0), "conv.bias": torch.ones(1)}


def read(path, content):
    torch.save(content, path)
    return read_tensors(path)


@pytest.mark.parametrize("names", [(), ("state_dict",), ("state_dict", "state_dict"), ("model_state_dict",)])
def test_weights_are_found_in_the_entries_that_programs_use(tmp_path, names):
    content = WEIGHTS
    for name in names:
        content = {name: content, "epoch": 3}
    tensors = read(tmp_path / "weights.ckpt", content)
    assert tensors.keys() == WEIGHTS.keys()
    for name, expected in WEIGHTS.items():
        torch.testing.assert_close(tensors[name], expected, rtol=0, atol=0)


def test_entries_that_lie_deeper_are_not_searched(tmp_path):
    content = WEIGHTS
    for depth in range(20):
        content = {"state_dict": content, "depth": torch.tensor(depth)}
    assert read(tmp_path / "deep.ckpt", content) == {"depth": torch.tensor(17)}  # two below the outermost


def test_entry_that_holds_itself_ends(tmp_path):
    content = dict(WEIGHTS)
    content["state_dict"] = content
    assert read(tmp_path / "ring.ckpt", content).keys() == WEIGHTS.keys()
