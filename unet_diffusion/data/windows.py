"""Which windows a segmenter is trained on, batch by batch: of which image, and whether of a synthetic one."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from unet_diffusion.data.batches import ShuffledBatches
from unet_diffusion.data.labelled import SyntheticPairs
from unet_diffusion.runtime.randomness import keyed_generator

SYNTHETIC_KEY = 3  # with seed, epoch and number of the batch: which windows are of synthetic images, and of which

DrawnWindow = tuple[int, int, int]  # image, epoch, number of the draw


class WindowBatches(ShuffledBatches):
    """Lists of drawn windows, shuffled anew every epoch; see `ShuffledBatches`.

    Which of them are of synthetic images is a function of seed, epoch and the number of the batch. Their share is that
    of each batch on each process, so that one process with larger batches has them at other places.

    Args:
        indices: The numbers of an epoch's windows; window n is of the image at n modulo the number of images.
        batch_size: The number of windows per batch and process.
        images: The indices of the training images, (n,) int64.
        synthetic: How many windows of a batch are of synthetic images; None: none is.
        synthetic_images: The indices of the synthetic images, (m,) int64.
        seed: Seed of the order, and of the synthetic images.
        num_replicas: The number of processes that share an epoch.
        rank: The rank of this process, in [0, num_replicas).

    Attributes:
        in_epoch: The number of batches of an epoch that a run trains on; None: all.

    Raises:
        ValueError: If the share of synthetic images gives none in a batch.
    """

    in_epoch: int | None = None

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        *,
        images: Tensor,
        synthetic: SyntheticPairs | None = None,
        synthetic_images: Tensor | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(indices, batch_size, num_images=len(indices), seed=seed, num_replicas=num_replicas, rank=rank)
        self.images = images
        if synthetic is not None:
            synthetic.num_in(self.batch_size)  # refuses a share that gives none
        self.synthetic = synthetic
        self.synthetic_images = synthetic_images

    @property
    def order(self) -> dict[str, Any]:
        """What decides, with the images and the epoch, which windows a batch has; plain values."""
        return {**super().order, "windows_per_image": len(self.indices) // len(self.images)}

    def __iter__(self) -> Iterator[list[Any]]:
        before = self.epoch * (len(self) if self.in_epoch is None else self.in_epoch)
        for step, numbers in enumerate(super().__iter__(), start=self.first_batch):
            drawn = [(int(self.images[number % len(self.images)]), self.epoch, number) for number in numbers]
            may_be_synthetic = self.synthetic and before + step < self.synthetic.num_batches
            yield self._with_synthetic(drawn, step) if may_be_synthetic else drawn

    def _with_synthetic(self, drawn: list[DrawnWindow], step: int) -> list[DrawnWindow]:
        """The windows of a batch, with as many of synthetic images in place of others as their share is."""
        assert self.synthetic is not None
        assert self.synthetic_images is not None
        number_of_batch = step * self.num_replicas + self.rank
        generator = keyed_generator(self.seed, self.epoch, number_of_batch, SYNTHETIC_KEY)
        places = torch.randperm(len(drawn), generator=generator)[: self.synthetic.num_in(len(drawn))]
        chosen = torch.randint(len(self.synthetic_images), places.shape, generator=generator)
        for place, index in zip(places.tolist(), self.synthetic_images[chosen].tolist(), strict=True):
            drawn[place] = (index, *drawn[place][1:])
        return drawn


def within_limit(trainer: Trainer, batches_per_epoch: int) -> int:
    """The number of batches of an epoch that limit_train_batches leaves to a run.

    Args:
        trainer: The trainer of the run.
        batches_per_epoch: The number of batches of the loader.
    """
    limit = trainer.limit_train_batches
    return min(limit, batches_per_epoch) if isinstance(limit, int) else int(limit * batches_per_epoch)


def batches_of_run(trainer: Trainer, batches_per_epoch: int) -> float:
    """The number of training batches of a run that ends by max_steps or max_epochs; infinity if it ends by neither.

    Args:
        trainer: The trainer of the run.
        batches_per_epoch: The number of batches of the loader.
    """
    in_epoch, accumulated = within_limit(trainer, batches_per_epoch), trainer.accumulate_grad_batches
    ends = [math.inf]
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        ends.append(trainer.max_epochs * in_epoch)
    if trainer.max_steps > 0:
        epochs, steps = divmod(trainer.max_steps, max(math.ceil(in_epoch / accumulated), 1))  # an epoch ends on a step
        ends.append(epochs * in_epoch + steps * accumulated)
    return min(ends)


def ends_by_time(trainer: Trainer) -> bool:
    """Whether a run ends after max_time, if nothing else ends it before."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it where type checkers do not look
    return any(isinstance(one, Timer) and one.time_remaining() is not None for one in callbacks)
