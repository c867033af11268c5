"""Whole batches by index: which images make up a batch, in which order, and which of them are mirrored.

A sampler yields lists of indices and the data set answers each list with a batch, so a set in memory costs one indexing
per batch instead of one Python call per image. The order and the mirroring are a function of (seed, epoch) alone:
workers decide nothing, and R processes with batches of B see in each step what one process with batches of R * B sees.
The samplers are DistributedSamplers, which tells Lightning to call `set_epoch` and to replace nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from unet_diffusion.data.groups import balanced_order
from unet_diffusion.runtime.randomness import keyed_generator

Batch = dict[str, Tensor]

Entries = dict[str, Tensor | list[str]]
"""What is known of N images beside their pixels, a row each: numbers (N, ...), or texts."""


class Images(Protocol):
    """What batches need of images: a tensor has it, and so do images that are read when a batch asks for them."""

    @property
    def dtype(self) -> torch.dtype:
        """torch.uint8 or torch.uint16; latents have torch.float16."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, C, H, W)."""

    def __len__(self) -> int:
        """N."""

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The images at index (B,), (B, C, H, W); dim is 0."""


@dataclass
class ImageSet:
    """All images of a source, before they are split.

    Args:
        images: The images (N, C, H, W), uint8 or uint16, in memory or read when a batch asks for them.
        entries: What is known of each image: "labels", its class, (N,) int64, and whatever else conditions read.
            Batches hold the numbers; texts stay here, and are found by the "index" of a batch.
        class_names: The name of each class, or None.
        names: The name of each image's file, which decides the split. None says that images have numbers only.
        contents: A hash of each image's file. None says that they are not known.
    """

    images: Images
    entries: Entries = field(default_factory=dict)
    class_names: list[str] | None = None
    names: list[str] | None = None
    contents: list[str] | None = None


class ImageBatches(Dataset[Batch]):
    """Batches of an image set by lists of indices; index + N stands for image `index` mirrored left to right.

    Args:
        image_set: The N images.
    """

    def __init__(self, image_set: ImageSet) -> None:
        self.image_set = image_set

    def __len__(self) -> int:
        return len(self.image_set.images)

    def __getitem__(self, indices: list[int]) -> Batch:
        """The batch {"images": uint8 or uint16 (B, C, H, W), "index": (B,) int64, and the numbers of the entries}.

        "is_mirrored", (B,) bool, says which images are mirrored; what is known of them is that of the image as it is.
        """
        drawn = torch.tensor(indices)
        index = drawn % len(self)
        # index_select copies whole images, and is many times faster than images[index].
        images = self.image_set.images.index_select(0, index)
        mirrored = (drawn >= len(self)).numpy()
        pixels = images.numpy()  # the same memory; torch does not write to parts of uint16 tensors
        pixels[mirrored] = pixels[mirrored][..., ::-1]
        known = numbers_of(self.image_set.entries, index)
        return {"images": images, "index": index, "is_mirrored": drawn >= len(self), **known}


def numbers_of(entries: Entries, index: Tensor) -> Batch:
    """The entries of a batch: the numbers of the images at index (B,); batches hold no texts."""
    return {key: rows.index_select(0, index) for key, rows in entries.items() if isinstance(rows, Tensor)}


class ShuffledBatches(DistributedSampler[list[int]]):
    """Lists of indices to train on, shuffled anew every epoch; without groups, no index comes twice in an epoch.

    Images that do not fill a last batch on every process are left out, others in each epoch. If the images are too few
    for one batch per process, the epoch is one smaller batch of all images that can be shared out evenly. Nothing is
    repeated or padded.

    Args:
        indices: The images to train on, (n,) int64.
        batch_size: The number of images per batch and process.
        num_images: N, the size of the whole set, which is added to the index of a mirrored image.
        horizontal_flip: Whether every second image, drawn at random, is mirrored.
        seed: Seed of the order and the mirroring.
        groups: The number of the group of each image to train on, (n,) int64, for an epoch that shows all groups
            equally often, see `balanced_order`. None shows each image once.
        num_replicas: The number of processes that share an epoch.
        rank: The rank of this process, in [0, num_replicas).

    Raises:
        ValueError: If there are fewer images than processes.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        *,
        num_images: int,
        horizontal_flip: bool = False,
        seed: int = 0,
        groups: Tensor | None = None,
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
        self.groups = groups
        self._resume_at = (0, 0)  # epoch, batch

    @property
    def first_batch(self) -> int:
        """The batch that the current epoch begins with: 0 unless the epoch is resumed."""
        epoch, batch = self._resume_at
        return batch if epoch == self.epoch else 0

    def __len__(self) -> int:
        return len(self.indices) // (self.batch_size * self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order().split(self.batch_size)
        for step in range(self.first_batch, len(self)):
            yield order[step * self.num_replicas + self.rank].tolist()

    @property
    def order(self) -> dict[str, Any]:
        """What decides, with the images and the epoch, which images a batch has; plain values."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "horizontal_flip": self.horizontal_flip,
            "groups.balanced": self.groups is not None,
            "processes": self.num_replicas,
        }

    def resume_at(self, epoch: int, num_batches: int) -> None:
        """Leave out the first batches of one epoch, which the run has trained on before it was interrupted."""
        self._resume_at = (epoch, num_batches)

    def _order(self) -> Tensor:
        """This epoch's indices for all processes, those of mirrored images raised by num_images."""
        generator = keyed_generator(self.seed, self.epoch)
        if self.groups is None:
            order = self.indices[torch.randperm(len(self.indices), generator=generator)]
        else:
            order = self.indices[balanced_order(self.groups, generator)]
        if self.horizontal_flip:
            order = order + self.num_images * torch.randint(2, order.shape, generator=generator)
        return order


class OrderedBatches(DistributedSampler[list[int]]):
    """Lists of indices to validate on: always the same, in order, and each index on one process only.

    Every process gets the same number of batches, and their sizes differ by at most one: with an uneven number one
    process would wait for another for ever.

    Args:
        indices: The images to validate on, (n,) int64.
        batch_size: The largest number of images per batch and process.
        num_replicas: The number of processes that share the images.
        rank: The rank of this process, in [0, num_replicas).

    Raises:
        ValueError: If there are fewer images than processes.
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

    A run that resumes within an epoch goes on with the batch after the last one it trained on. The arguments are those
    of DataLoader.
    """

    sampler: ShuffledBatches
    _num_handed_out = 0  # a checkpoint may be saved before the first batch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator, to count what was handed out
        self._num_handed_out = self.sampler.first_batch
        for batch in super().__iter__():
            self._num_handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the number of batches of it that were handed out, and what decides their order."""
        return {
            "epoch": self.sampler.epoch,
            "num_batches": self._num_handed_out,
            "is_over": self._num_handed_out == len(self.sampler),
            "order": self.sampler.order,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, and say if the epoch that was begun goes on in another order."""
        before, now = state.get("order", {}), self.sampler.order
        has_begun = state["num_batches"] > 0 and not state.get("is_over", False)
        differ = [f"{name} was {before[name]}, is {now[name]}" for name in before if before[name] != now[name]]
        if has_begun and differ:
            from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # which packing does without

            rank_zero_warn(
                f"the data have another order than in the checkpoint ({'; '.join(differ)}). The epoch that was begun "
                "goes on in this order: some images come twice in it, others not at all"
            )
        self.sampler.resume_at(state["epoch"], state["num_batches"])
