"""Whole batches by index: which images make up a batch, in which order, and which of them are mirrored.

A sampler yields lists of indices and the dataset answers each with a batch, so a set in memory costs one indexing a
batch instead of a Python call an image. The order and the mirroring are a function of (seed, epoch) alone: workers
decide nothing, and R processes with batches of B see in each step what one process with batches of R * B sees.
The samplers are DistributedSamplers, which tells Lightning to call `set_epoch` and to replace nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from unet_diffusion.data.checking import StreamedImages
from unet_diffusion.data.shards import ShardedImages
from unet_diffusion.runtime.randomness import keyed_generator

Batch = dict[str, Tensor]


@dataclass
class ImageSet:
    """All images of a data set, before they are split.

    Args:
        images: uint8 or uint16 (N, C, H, W), in memory, or decoded when they are asked for.
        labels: class of each image, (N,) int64, or None.
        class_names: name of each class, or None.
        captions: of each image, or None.
        names: Of each image's file, by which the set is split; None: images have numbers only.
        contents: A hash of each image's file; None: not known.
    """

    images: Tensor | StreamedImages | ShardedImages
    labels: Tensor | None = None
    class_names: list[str] | None = None
    captions: list[str] | None = None
    names: list[str] | None = None
    contents: list[str] | None = None


class ImageBatches(Dataset[Batch]):
    """Batches of an image set by lists of indices; index + N stands for image `index` mirrored left to right.

    Args:
        image_set: N images.
    """

    def __init__(self, image_set: ImageSet) -> None:
        self.image_set = image_set

    def __len__(self) -> int:
        return len(self.image_set.images)

    def __getitem__(self, indices: list[int]) -> Batch:
        """The batch {"images": uint8 or uint16 (B, C, H, W), "index": (B,) int64[, "labels": (B,) int64]}."""
        drawn = torch.tensor(indices)
        index = drawn % len(self)
        # index_select copies whole images, and is many times faster than images[index].
        images = self.image_set.images.index_select(0, index)
        mirrored = (drawn >= len(self)).numpy()
        pixels = images.numpy()  # the same memory; torch does not write to parts of uint16 tensors
        pixels[mirrored] = pixels[mirrored][..., ::-1]
        batch = {"images": images, "index": index}
        if self.image_set.labels is not None:
            batch["labels"] = self.image_set.labels[index]
        return batch


class ShuffledBatches(DistributedSampler[list[int]]):
    """Lists of indices to train on, shuffled anew every epoch; no index comes twice in an epoch.

    Images that do not fill a last batch on every process are left out, others in each epoch. If there are too few for
    even one, a single smaller batch is made of all that can be shared out evenly. Nothing is repeated or padded.

    Args:
        indices: the images to train on, (n,) int64.
        batch_size: images a batch and process.
        num_images: N, size of the whole set; added to the index of a mirrored image.
        horizontal_flip: mirror every second image, drawn at random.
        seed: of the order and the mirroring.
        num_replicas: processes that share an epoch.
        rank: of this process, in [0, num_replicas).

    Raises:
        ValueError: if there are fewer images than processes.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        *,
        num_images: int,
        horizontal_flip: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if len(indices) < num_replicas:
            raise ValueError(
                f"there must be an image to train on for each of {num_replicas} processes, got {len(indices)}; "
                "use fewer devices or more images"
            )
        super().__init__(indices, num_replicas, rank, seed=seed)  # type: ignore[arg-type]  # needs a length only
        self.indices = indices
        self.batch_size = min(batch_size, len(indices) // num_replicas)
        self.num_images = num_images
        self.horizontal_flip = horizontal_flip
        self._resume_at = (0, 0)  # epoch, batch

    @property
    def first_batch(self) -> int:
        """The batch that the current epoch begins with: 0 unless it is resumed."""
        epoch, batch = self._resume_at
        return batch if epoch == self.epoch else 0

    def __len__(self) -> int:
        return len(self.indices) // (self.batch_size * self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order().split(self.batch_size)
        for step in range(self.first_batch, len(self)):
            yield order[step * self.num_replicas + self.rank].tolist()

    def resume_at(self, epoch: int, num_batches: int) -> None:
        """Leave out the first batches of one epoch, which a run before this one has trained on."""
        self._resume_at = (epoch, num_batches)

    def _order(self) -> Tensor:
        """This epoch's indices for all processes, those of mirrored images raised by num_images."""
        generator = keyed_generator(self.seed, self.epoch)
        order = self.indices[torch.randperm(len(self.indices), generator=generator)]
        if self.horizontal_flip:
            order = order + self.num_images * torch.randint(2, order.shape, generator=generator)
        return order


class OrderedBatches(DistributedSampler[list[int]]):
    """Lists of indices to validate on: always the same, in order, and each index on one process only.

    Every process gets the same number of batches, of sizes that differ by at most one: an uneven number would hang a
    process that waits for another.

    Args:
        indices: the images to validate on, (n,) int64.
        batch_size: most images a batch and process.
        num_replicas: processes that share the images.
        rank: of this process, in [0, num_replicas).

    Raises:
        ValueError: if there are fewer images than processes.
    """

    def __init__(self, indices: Tensor, batch_size: int, *, num_replicas: int = 1, rank: int = 0) -> None:
        if len(indices) < num_replicas:
            raise ValueError(
                f"num_val must be at least the number of processes, {num_replicas}, got {len(indices)}; raise num_val"
            )
        super().__init__(indices, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]  # needs a length only
        self.indices = indices
        fewest, most = len(indices) // num_replicas, -(-len(indices) // num_replicas)
        # With batch_size 1 and an uneven split, one batch holds two images.
        self.num_batches = min(-(-most // batch_size), fewest)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.indices[self.rank :: self.num_replicas].tensor_split(self.num_batches):
            yield batch.tolist()


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader over ShuffledBatches whose position is saved in Lightning's checkpoints.

    A run that resumes within an epoch goes on with the batch after the last one it trained on.
    Its arguments are those of DataLoader.
    """

    sampler: ShuffledBatches
    _num_handed_out = 0  # may be saved before the first batch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator, to count what was handed out
        self._num_handed_out = self.sampler.first_batch
        for batch in super().__iter__():
            self._num_handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the number of its batches that were handed out."""
        return {"epoch": self.sampler.epoch, "num_batches": self._num_handed_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called."""
        self.sampler.resume_at(state["epoch"], state["num_batches"])
