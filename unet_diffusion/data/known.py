"""Whether the images of a run that is continued are those that it was trained on.

A checkpoint holds, for each image, 8 bytes of a hash of its name and 8 of one of its contents, with its label image or
what else is known of it. A run that goes on by itself needs the images that it was trained on. New ones are allowed,
and the run says so. Images that were replaced or are missing are an error, and so is one that was trained on and would
be validated on now.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from unet_diffusion.data.fingerprints import content_hash, text_digest
from unet_diffusion.runtime.messages import first_few


class KnownImages(LightningDataModule):
    """A data module whose images are compared with those that a checkpoint was trained on.

    It defines `names_and_contents`, and has `val_indices` once it is set up.
    """

    must_be_same = False  # set for a run that goes on by itself: other images are an error, not a warning
    val_indices: Tensor
    _names: Sequence[str] = ()
    _hashes: dict[str, Tensor] | None = None

    def names_and_contents(self) -> tuple[Sequence[str], Sequence[str]] | None:
        """The name of each image, and a text that changes with what it holds; None: the images are streamed."""
        raise NotImplementedError(f"{type(self).__name__} must define names_and_contents()")

    def test_dataloader(self) -> Any:
        """The validation batches: `trainer.test` measures on them."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """The validation batches: `trainer.predict` predicts for them."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Hashes of names and of contents, (N,) int64 each, and which images are validated on, (N,) bool."""
        if self._hashes is None:
            names_and_contents = self.names_and_contents()
            if names_and_contents is None:
                return {}
            self._names = names_and_contents[0]
            names, contents = (torch.tensor([_number(text) for text in texts]) for texts in names_and_contents)
            is_val = torch.zeros(len(names), dtype=torch.bool)
            is_val[self.val_indices] = True
            self._hashes = {"names": names, "contents": contents, "is_val": is_val}
        return self._hashes

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the images with those of a checkpoint that is trained on, and say what is different.

        Raises:
            ValueError: If images have changed, are gone, or were trained on and would be validated on now, and
                `must_be_same` is set.
        """
        now = self.state_dict()
        if not now or (self.trainer is not None and not self.trainer.training):
            return
        changed, new, num_gone, moved = _differences(state, now, self._names)
        named = {"changed": changed, "new": new, "trained on that would be validated on now": moved}
        parts = [f"{len(names)} {change} ({first_few(names)})" for change, names in named.items() if names]
        parts += [f"{num_gone} gone"] if num_gone else []
        if not parts:
            return
        message = f"the images are not those that the checkpoint was trained on: {'; '.join(parts)}"
        if self.must_be_same and (changed or num_gone or moved):
            how = ", and set num_val so that the same images are validated on" if moved else ""
            raise ValueError(f"{message}. Bring them back, or train on with these by --ckpt_path CHECKPOINT{how}")
        if new or num_gone:
            message += ". The epoch that was begun goes on with these: some come twice in it, others not at all"
        rank_zero_warn(message)


def contents_of_pixels(images: Sequence[Tensor] | Tensor) -> list[str]:
    """A hash of each of the images that are in memory."""
    return [content_hash(image.numpy().tobytes()) for image in images]


def _differences(
    before: dict[str, Tensor], now: dict[str, Tensor], names: Sequence[str]
) -> tuple[list[str], list[str], int, list[str]]:
    """The names of images that have changed, that are new, how many are gone, and who moved to the validation."""
    then = dict(zip(before["names"].tolist(), before["contents"].tolist(), strict=True))
    numbers, contents = now["names"].tolist(), now["contents"].tolist()
    validated = set(before["contents"][before["is_val"]].tolist())
    trained = set(before["contents"].tolist()) - validated
    rows = list(zip(names, numbers, contents, now["is_val"].tolist(), strict=True))
    return (
        [name for name, number, content, _ in rows if then.get(number, content) != content],
        [name for name, number, _, _ in rows if number not in then],
        len(then.keys() - set(numbers)),
        [name for name, _, content, is_val in rows if is_val and content in trained],
    )


def _number(text: str) -> int:
    return int.from_bytes(text_digest(text)[:8], "little", signed=True)
