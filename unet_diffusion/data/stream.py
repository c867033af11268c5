"""A source of images that are streamed: more of them than fit into memory, or on a disk.

An epoch is a plan, made from the seed, the epoch and the index of the shards alone, so that a run that is resumed needs
no state of its loader but the number of batches that were handed out. docs/streaming.md says what other libraries lack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from unet_diffusion.data.batches import Batch, ImageBatches, ImageSet, OrderedBatches, ResumableLoader, ShuffledBatches
from unet_diffusion.data.decoding import ImageFormat
from unet_diffusion.data.shards import ShardedImages, ShardError, ShardStore
from unet_diffusion.data.source import Source
from unet_diffusion.data.split import check_split, default_num_val
from unet_diffusion.data.value_ranges import (
    DeclaredRange,
    check_declared,
    check_shown,
    pixel_values,
    range_of_shards,
    shown_of,
)
from unet_diffusion.runtime.addresses import shown_place
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.runtime.randomness import keyed_generator

OnBadShard = Literal["error", "skip"]

OPTIONS = {"labels": "class_labels", "captions": "captions"}  # that ask for entries
SHARDS_KEY, WITHIN_KEY, WINDOW_KEY = 0, 1, 2  # what is drawn: the order of shards, within a shard, of a window


class Shards(Source):
    """Images from shards that `unet-diffusion pack` wrote, on a disk or behind an address, read as they are needed.

    The first images of the first shards, which pack drew at random, are kept for validation. The order of the others is
    a function of seed, epoch, window, num_lanes and the number of processes, see `ShuffledShards`; num_workers does not
    change it. num_lanes must be a multiple of num_workers, unless that is 0; by default it is as many as there are
    processor cores for, at most num_lanes.

    Args:
        root: A folder, or its address: http://..., s3://... (keys and endpoint come from the environment, as AWS
            names them).
        image_size: Height and width in pixels, or one number for both; no image may be smaller.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha), to which colours are converted; or the number that files hold.
        value_range: As in `Folder`; pack has measured it.
        shown_channels: As in `Folder`.
        class_labels: Whether images have classes; they must have been packed.
        captions: Whether images have captions; they must have been packed.
        background: The colour behind transparent pixels, a name or "#rrggbb"; it is not used if channels is 4.
        window: The number of shards whose images are shuffled together.
        num_lanes: The number of lanes of a process, each of which reads shards of its own; batches come from them by
            turns. In training, a process holds up to 2 * window * num_lanes shards in memory, as files, and one more
            for each worker; in validation, each worker holds the shards that its images lie in, at most as many again.
        on_bad_shard: What happens with a shard that is damaged or has vanished, once it has been tried again: "error",
            or "skip", which trains on images of other shards in its place for the rest of the epoch, and counts them
            as train/replaced_images. Validation images are never replaced.
        num_retries: How often a shard that is needed is tried again, after 0.5, 1, 2, ... seconds.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int | tuple[int, int] = (64, 64),
        channels: int = 3,
        value_range: DeclaredRange = None,
        shown_channels: tuple[int, ...] | None = None,
        class_labels: bool = False,
        captions: bool = False,
        background: str = "white",
        window: int = 2,
        num_lanes: int = 4,
        on_bad_shard: OnBadShard = "error",
        num_retries: int = 4,
    ) -> None:
        if on_bad_shard not in get_args(OnBadShard):
            raise ValueError(f'on_bad_shard must be "error" or "skip", got {on_bad_shard!r}')
        for name, value, least in (("window", window, 1), ("num_lanes", num_lanes, 1), ("num_retries", num_retries, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        check_declared(value_range)
        check_shown(shown_channels, channels)
        self.root, self.shown = root, shown_place(root)
        self.value_range, self.shown_channels = value_range, shown_channels
        self.image_format = ImageFormat.of_size(image_size, channels, background)
        self.image_shape = self.image_format.shape
        self.class_labels = class_labels
        self.captions = captions
        self.window = window
        self.num_lanes = num_lanes
        self.on_bad_shard = on_bad_shard
        self.num_retries = num_retries
        self.num_replaced = 0  # images, in this process since it began; see CountReplaced

    def load(self, *, progress: bool = True) -> ImageSet:
        """Read the index.

        Args:
            progress: The index is read at once, without a progress bar.

        Raises:
            FileNotFoundError: If there is no index.
            ModuleNotFoundError: If a package for such addresses is missing.
            ShardError: If the index cannot be read.
            ValueError: If it is no index, or the images are not as asked for.
        """
        store = ShardStore(self.root, num_retries=self.num_retries)
        index = store.index()
        self._check_size(index.smallest, index.channels)
        value_range = range_of_shards(self.value_range, index.dtype, index.ends)
        self.image_format = replace(self.image_format, value_range=value_range)
        if index.crops is not None:
            size = self.image_format.height, self.image_format.width
            # Files that are kept as they are have sizes of their own.
            packed = [crop.size if index.channels is None else index.smallest for crop in index.crops]
            self.crops = [crop.again(before, size) for crop, before in zip(index.crops, packed, strict=True)]
        entries = dict(index.entries)
        for key, name in OPTIONS.items():
            if not getattr(self, name):
                entries.pop(key, None)
            elif key not in entries:
                raise ValueError(
                    f"{self.shown} was packed without {name}; pack again with --{name}, or set it to false"
                )
        images = ShardedImages(store, index, self.image_format, self._num_kept(num_workers=0))
        shown = self.shown_channels or shown_of(self.image_format.channels, index.are_colours)
        values = PixelValues.of_images(images.dtype, shown)
        self.values = pixel_values([np.dtype(index.dtype)], value_range, values)
        return ImageSet(images, entries, index.class_names if self.class_labels else None)

    def check(self, *, horizontal_flip: bool, num_workers: int | None) -> None:
        if num_workers and self.num_lanes % num_workers:
            raise ValueError(
                f"num_lanes must be a multiple of num_workers, got {self.num_lanes} and {num_workers}, so that each "
                f"worker serves as many; set num_lanes to {-(-self.num_lanes // num_workers) * num_workers}"
            )

    def split(self, image_set: ImageSet, num_val: int | None) -> tuple[Tensor, Tensor]:
        """The first images to validate on, which lie in few shards, and the others to train on."""
        num_images = len(image_set.images)
        num_val = default_num_val(num_images) if num_val is None else num_val
        check_split(num_images, num_val)
        return torch.arange(num_val, num_images), torch.arange(num_val)

    def num_workers(self, image_set: ImageSet, most: int) -> int:
        return max(number for number in range(1, min(most, self.num_lanes) + 1) if self.num_lanes % number == 0)

    def train_loader(
        self, image_set: ImageSet, indices: Tensor, order: dict[str, Any], options: dict[str, Any]
    ) -> DataLoader[Batch]:
        """The training batches, in another order every epoch; see `ShuffledShards`."""
        images = self._sharded(image_set, options["num_workers"])
        first = int(indices[0])
        sampler = ShuffledShards(images.starts, first=first, window=self.window, num_lanes=self.num_lanes, **order)
        batches = StreamBatches(image_set, first if self.on_bad_shard == "skip" else None)
        loader = StreamLoader(dataset=batches, sampler=sampler, **options)
        loader.source, loader.fingerprint = self, images.index.fingerprint
        return loader

    def val_loader(
        self, image_set: ImageSet, indices: Tensor, order: dict[str, Any], options: dict[str, Any]
    ) -> DataLoader[Batch]:
        self._sharded(image_set, options["num_workers"])
        return PlainSpokenLoader(dataset=ImageBatches(image_set), sampler=OrderedBatches(indices, **order), **options)

    def _sharded(self, image_set: ImageSet, num_workers: int) -> ShardedImages:
        """The images, which keep as many shards in memory as a loader with that many workers needs."""
        images = image_set.images
        assert isinstance(images, ShardedImages)
        images.num_kept = self._num_kept(num_workers)
        return images

    def _num_kept(self, num_workers: int) -> int:
        lanes = -(-self.num_lanes // max(num_workers, 1))  # that a worker serves
        return 2 * self.window * lanes + 1  # those of each lane, the next ones, and one that takes another's place

    def _check_size(self, smallest: tuple[int, int], channels: int | None) -> None:
        height, width = self.image_format.height, self.image_format.width
        if height > smallest[0] or width > smallest[1]:
            raise ValueError(
                f"image_size must be at most {smallest[0]}x{smallest[1]}, as small as images in {self.shown} are, got "
                f"{height}x{width}; lower it, or pack again with --image_size {height} {width} --on_bad_file skip"
            )
        if channels not in (None, self.image_format.channels):
            raise ValueError(
                f"channels must be {channels}, as the images in {self.shown} were packed, got "
                f"{self.image_format.channels}; change it, or pack again with --channels {self.image_format.channels}"
            )


class CountReplaced(Callback):
    """Logs how many streamed images were replaced by others, in all processes since they began, if that is allowed."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        every = trainer.log_every_n_steps or 1  # type: ignore[attr-defined]  # Lightning sets it at runtime
        source = getattr(trainer.datamodule, "source", None)  # type: ignore[attr-defined]
        if isinstance(source, Shards) and source.on_bad_shard == "skip" and trainer.global_step % every == 0:
            pl_module.log("train/replaced_images", float(source.num_replaced), sync_dist=True, reduce_fx="sum")


class LaneBatch(list[int]):
    """Indices of a batch, its epoch, the shards its lane reads next, and those it is done with after this batch."""

    epoch: int = 0
    upcoming: Sequence[int] = ()
    past: Sequence[int] = ()


class ShuffledShards(ShuffledBatches):
    """Lists of indices to train on, which lie in few shards at a time; no index comes twice in an epoch.

    The shards are put in order at random, and so are the images in each. That sequence is cut into equal parts, one for
    each lane of each process, whatever the sizes of the shards: all processes make the same number of steps. A shard at
    a cut is read by both lanes; every other one by one of them. A lane shuffles the images of `window` shards, one
    window after the other. Batch s of a process comes from its lane s modulo num_lanes, and so from the worker that
    serves it, if their number divides num_lanes. Images that do not fill a last batch on every process are left out,
    others in each epoch.

    Args:
        starts: The number of the first image of each shard, and at the end the number of all images.
        batch_size: The number of images per batch and process.
        first: The first image to train on.
        window: The number of shards that are shuffled together.
        num_lanes: The number of lanes of a process.
        horizontal_flip: Whether every second image, drawn at random, is mirrored.
        seed: Seed of the order and the mirroring.
        num_replicas: The number of processes that share an epoch.
        rank: The rank of this process, in [0, num_replicas).

    Raises:
        ValueError: If there are fewer images than processes.
    """

    def __init__(
        self,
        starts: Sequence[int],
        batch_size: int,
        *,
        first: int = 0,
        window: int = 1,
        num_lanes: int = 1,
        horizontal_flip: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(
            torch.arange(first, starts[-1]),
            batch_size,
            num_images=starts[-1],
            horizontal_flip=horizontal_flip,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        )
        ranges = ((max(first, low), high) for low, high in pairwise(starts))
        self.ranges = {shard: (low, high) for shard, (low, high) in enumerate(ranges) if low < high}
        self.window = window
        self.num_lanes = num_lanes

    @property
    def order(self) -> dict[str, Any]:
        """What decides, with the images and the epoch, which images a batch has; plain values."""
        return {**super().order, "window": self.window, "num_lanes": self.num_lanes}

    def __iter__(self) -> Iterator[LaneBatch]:
        parts = self._parts()
        lanes = [self._lane(parts, lane) for lane in range(self.num_lanes)]
        for step in range(self.first_batch, len(self)):
            yield next(lanes[step % self.num_lanes])

    def _parts(self) -> list[list[tuple[int, int, int]]]:
        """For each lane of this process the parts of shards that it reads: shard, first and last + 1 in its order."""
        shards = list(self.ranges)
        order = torch.randperm(len(shards), generator=keyed_generator(self.seed, self.epoch, SHARDS_KEY)).tolist()
        sizes = [self.batch_size * len(range(lane, len(self), self.num_lanes)) for lane in range(self.num_lanes)]
        start = self.rank * self.batch_size * len(self)
        parts = []
        for size in sizes:
            parts.append(_cut([shards[i] for i in order], self.ranges, start, start + size))
            start += size
        return parts

    def _lane(self, parts: list[list[tuple[int, int, int]]], lane: int) -> Iterator[LaneBatch]:
        """The batches of a lane, without those before the first one."""
        reads = parts[lane]
        windows = [reads[i : i + self.window] for i in range(0, len(reads), self.window)]
        num_done = self.batch_size * len(range(lane, self.first_batch, self.num_lanes))  # images
        rest: list[int] = []
        for number, window in enumerate(windows):
            size = sum(stop - start for _, start, stop in window)
            if num_done < size:
                rest += self._shuffled(window)[num_done:]
            num_done = max(num_done - size, 0)
            before, after = windows[max(number - 1, 0) : number], windows[number + 1 : number + 2]
            past, upcoming = ([shard for reads in near for shard, _, _ in reads] for near in (before, after))
            while len(rest) >= self.batch_size:
                batch, rest = LaneBatch(rest[: self.batch_size]), rest[self.batch_size :]
                batch.epoch, batch.upcoming, batch.past, past = self.epoch, upcoming, past, []
                yield batch

    def _shuffled(self, window: list[tuple[int, int, int]]) -> list[int]:
        images = []
        for shard, start, stop in window:
            low, high = self.ranges[shard]
            generator = keyed_generator(self.seed, self.epoch, WITHIN_KEY, shard)
            images.append(low + torch.randperm(high - low, generator=generator)[start:stop])
        order = torch.cat(images)
        generator = keyed_generator(self.seed, self.epoch, WINDOW_KEY, *window[0])
        order = order[torch.randperm(len(order), generator=generator)]
        if self.horizontal_flip:
            order = order + self.num_images * torch.randint(2, order.shape, generator=generator)
        return order.tolist()


class StreamBatches(ImageBatches):
    """Batches of images in shards; meanwhile the next shards are read.

    Args:
        image_set: The N images.
        first: Images from this one on take the place of those that cannot be read, and "replaced", int64 (), counts
            them. None makes such images an error.
    """

    def __init__(self, image_set: ImageSet, first: int | None = None) -> None:
        super().__init__(image_set)
        self.first = first

    def __getitem__(self, indices: list[int]) -> Batch:
        images = self.image_set.images
        assert isinstance(images, ShardedImages)
        if isinstance(indices, LaneBatch):
            images.begin_epoch(indices.epoch)
        images.expect(dict.fromkeys(images.shard_of(i % len(self)) for i in indices))  # all at once
        if self.first is None:
            batch = super().__getitem__(indices)
        else:
            readable = [i - i % len(self) + images.readable(i % len(self), self.first) for i in indices]
            batch = super().__getitem__(readable)
            batch["replaced"] = torch.tensor(sum(a != b for a, b in zip(indices, readable, strict=True)))
        if isinstance(indices, LaneBatch):
            images.release(indices.past)
            images.read_ahead(indices.upcoming)
        return batch


class PlainSpokenLoader(DataLoader[Batch]):
    """A DataLoader whose errors about shards are one message, not a worker's traceback."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator, to see the errors
        try:
            yield from super().__iter__()
        except ShardError as error:
            raise ShardError(str(error).rpartition("ShardError: ")[2].strip()) from None


class StreamLoader(ResumableLoader, PlainSpokenLoader):
    """A ResumableLoader that counts the images that were replaced, and goes on with the same shards only.

    Attributes:
        source: Where the shards come from.
        fingerprint: The checksum of all shards.
    """

    source: Shards
    fingerprint: str

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator, to count
        for batch in super().__iter__():
            self.source.num_replaced += int(batch.pop("replaced", 0))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the number of its batches that were handed out, and which shards they are from."""
        return {**super().state_dict(), "shards": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Raises:
            ValueError: If the shards are others.
        """
        # Checkpoints of before this was kept do not have it.
        if state.get("shards", self.fingerprint) != self.fingerprint:
            raise ValueError(
                f"the run was trained on other shards than those in {self.source.shown}, which were packed anew or are "
                "of other images: validation images would be trained on. Give it the shards it began with, or begin "
                "another run"
            )
        super().load_state_dict(state)


def _cut(
    shards: Sequence[int], ranges: dict[int, tuple[int, int]], start: int, stop: int
) -> list[tuple[int, int, int]]:
    """The parts of shards, one after the other, that images start to stop of the sequence lie in."""
    parts, before = [], 0
    for shard in shards:
        low, high = ranges[shard]
        first, last = max(start - before, 0), min(stop - before, high - low)
        if first < last:
            parts.append((shard, first, last))
        before += high - low
    return parts
