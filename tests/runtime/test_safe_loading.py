"""Files that are no checkpoints, or damaged, are refused in words."""

import io
import math

import pytest
import torch

from unet_diffusion.runtime.safe_loading import load_plain, step_of


@pytest.mark.parametrize(
    "content",
    [b"", b"some text", b".", b"1, 2, 3", b"G", b"Jx", b"}q\x01X\x05\x00\x00\x00", b"PK\x03\x04 cut"],
)
def test_file_that_is_no_checkpoint_is_refused_and_has_no_step(tmp_path, content):
    path = tmp_path / "notes.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes.ckpt is no checkpoint, or only a part of one"):
        load_plain(path)
    assert step_of(path) == math.inf


def test_old_checkpoint_whose_tensors_are_not_its_own_is_refused_and_has_no_step(tmp_path):
    written = io.BytesIO()
    saved = {"global_step": 3, "state_dict": {"weight": torch.zeros(2)}}
    torch.save(saved, written, _use_new_zipfile_serialization=False)
    path = tmp_path / "old.ckpt"
    path.write_bytes(written.getvalue())
    assert load_plain(path)["global_step"] == step_of(path) == 3
    storage = str(saved["state_dict"]["weight"].untyped_storage()._cdata).encode()
    listed = written.getvalue().rfind(storage)  # after the pickle, in the list of what the file holds
    damaged = written.getvalue()[:listed] + b"9" * len(storage) + written.getvalue()[listed + len(storage) :]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"old.ckpt is no checkpoint, or only a part of one"):
        load_plain(path)
    assert step_of(path) == math.inf
