"""Images in shards: tar archives of about a thousand images each, in a folder or behind an address, and an index.

`unet-diffusion pack` writes them. index.json says how many images each shard holds, what is known of them, and the
shard's checksum, so that an epoch is planned before anything is read. A shard is read whole, which is what object
stores are fast at; see `stores`. Nothing in a shard is run: its members are image files, each followed by its caption
and class as files of their own, which are for other libraries.
"""

import hashlib
import io
import json
import os
import tarfile
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.data.batches import Entries
from unet_diffusion.data.decoding import ImageFormat, decode_image, to_depth
from unet_diffusion.data.stores import Store
from unet_diffusion.runtime.cropping import Crop
from unet_diffusion.runtime.messages import printable

INDEX = "index.json"
CAPTION, CLASS = ".txt", ".cls"  # endings of members with what is known of an image, as the library webdataset has them
MAX_BAD_SHARDS = 8  # one after the other: then it is not the shards, but what they lie on


class ShardError(OSError):
    """A shard, or the index, cannot be read, or its contents are not those that were packed."""


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard_{number:05d}.tar"


@dataclass(frozen=True)
class Shard:
    """What the index says of a shard.

    Args:
        num_images: The number of images in it, possibly 0.
        sha256: The checksum of the whole file.
        entries: What is known of each image, a list of numbers or texts by name.
        crops: The part of its file that each image shows, as `Crop` has it. None: it is not known.
    """

    num_images: int
    sha256: str
    entries: dict[str, list[Any]] = field(default_factory=dict)
    crops: list[Any] | None = None


@dataclass(frozen=True)
class ShardIndex:
    """What `unet-diffusion pack` wrote.

    Args:
        shards: The shards in order.
        class_names: The name of each class, or None.
        smallest: Height and width in pixels that no image falls below.
        bits: The largest number of bits per channel: 8, or more if any image needs 16.
        channels: The number of channels that images were converted to. None says that files were kept as they are.
        dtype: The type of the numbers in all files, as NumPy names it.
        ends: The least and the largest number in them. None says that images have alpha or colours by index.
        are_colours: Whether the channels of all images are grey, RGB, or RGB and alpha.
    """

    shards: list[Shard]
    class_names: list[str] | None
    smallest: tuple[int, int]
    bits: int
    channels: int | None = None
    dtype: str = "uint8"
    ends: list[float] | None = None
    are_colours: bool = True

    @classmethod
    def from_json(cls, text: bytes, place: str) -> "ShardIndex":
        """The index that `pack_images` wrote.

        Raises:
            ValueError: If the text is no index.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is no index of shards (it is no JSON); pack the images again") from error
        try:
            height, width = map(int, fields.pop("smallest"))
            index = cls(shards=[Shard(**one) for one in fields.pop("shards")], smallest=(height, width), **fields)
            for shard in index.shards:
                if any(len(rows) != shard.num_images for rows in shard.entries.values()):
                    raise ValueError("a shard has not as many entries as images")
                if shard.crops is not None and len(shard.crops) != shard.num_images:
                    raise ValueError("a shard has not as many crops as images")
                if shard.entries.keys() != index.shards[0].entries.keys():
                    raise ValueError("shards have not the same entries")
            index.crops  # noqa: B018  # refuses rows that are none
            if "labels" not in index.entries and index.class_names is not None:
                raise ValueError("there are class_names, but no labels")
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            reason = error if type(error) is ValueError else "its fields are not those that pack writes"
            raise ValueError(f"{place} is no index of shards ({reason}); pack the images again") from error
        return index

    @property
    def fingerprint(self) -> str:
        """A checksum of all shards: with the same one, the number of an image stands for the same image."""
        return hashlib.sha256("\n".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @property
    def starts(self) -> list[int]:
        """Number of the first image of each shard, and of all images."""
        return list(accumulate((shard.num_images for shard in self.shards), initial=0))

    @cached_property
    def entries(self) -> Entries:
        """What is known of each image: numbers (N, ...), whole ones as int64, or texts."""
        rows = {key: [row for shard in self.shards for row in shard.entries[key]] for key in self.shards[0].entries}
        is_text = {key: all(isinstance(row, str) for row in values) for key, values in rows.items()}
        return {key: values if is_text[key] else torch.tensor(values) for key, values in rows.items()}

    @cached_property
    def crops(self) -> list[Crop] | None:
        """The part of its file that each image shows; None: it is not known of all."""
        rows = [shard.crops for shard in self.shards]
        return None if None in rows else [Crop.from_plain(row) for crops in rows for row in crops or ()]


class ShardStore(Store):
    """A folder of shards, by its path or address; see `Store`."""

    error = ShardError

    def index(self) -> ShardIndex:
        """What the store holds.

        Raises:
            FileNotFoundError: If there is no index.
            ShardError: If it cannot be read.
            ValueError: If it is no index.
        """
        place = f"{self.shown}/{INDEX}"

        def read() -> bytes | None:
            try:
                return self.read(INDEX)
            except FileNotFoundError:  # not tried again: more likely a path that is wrong
                return None

        content = self.tried(read, place)
        if content is None:
            raise FileNotFoundError(
                f"there is no {INDEX} in {self.shown}; give what unet-diffusion pack wrote, and if it was cut off, run "
                "it again first. Tar archives that others wrote are read by --config folder, or packed first"
            )
        return ShardIndex.from_json(content, place)

    def images_of(self, number: int, shard: Shard) -> list[bytes]:
        """The contents of the image files in a shard; tried again if they are not what was packed.

        Raises:
            ShardError: If the shard still cannot be read.
        """

        def read() -> list[bytes]:
            content = self.read(shard_name(number))
            if hashlib.sha256(content).hexdigest() != shard.sha256:
                raise ValueError(f"its {len(content)} bytes do not have the checksum that is in {INDEX}")
            files = _images(content)
            if len(files) != shard.num_images:
                raise ValueError(f"it holds {len(files)} images, not {shard.num_images} as {INDEX} has it")
            return files

        return self.tried(read, f"{self.shown}/{shard_name(number)}")


@dataclass(frozen=True)
class Reading:
    """A shard that is being read in a thread, or was.

    Args:
        files: The future image files of the shard.
        ahead: Whether the shard was not needed yet; if the read fails, it is tried again when the shard is needed.
    """

    files: "Future[list[bytes]]"
    ahead: bool

    @property
    def must_be_tried_again(self) -> bool:
        """Whether what was read ahead has failed: the store may be back."""
        return self.ahead and self.files.done() and self.files.exception() is not None


class ShardedImages:
    """Images that are decoded when a batch asks for them, from shards that are read ahead and kept while they are used.

    Args:
        store: The store of the shards.
        index: The index of the shards.
        image_format: The size and channels that each image is converted to.
        num_kept: The largest number of shards in memory, as files, in each process that reads.
    """

    def __init__(self, store: ShardStore, index: ShardIndex, image_format: ImageFormat, num_kept: int) -> None:
        self.store = store
        self.index = index
        self.image_format = image_format
        self.num_kept = num_kept
        self.starts = index.starts
        self._epoch = 0
        of_files = torch.uint16 if index.bits > 8 else torch.uint8
        self.dtype = of_files if image_format.value_range is None else image_format.dtype
        self._forget()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W), as of a tensor."""
        return len(self), self.image_format.channels, self.image_format.height, self.image_format.width

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The images at index (B,), (B, C, H, W). The signature is that of a tensor, and dim must be 0.

        Raises:
            ShardError: If a shard cannot be read.
        """
        assert dim == 0
        numbers = index.tolist()
        self.expect(dict.fromkeys(map(self.shard_of, numbers)))
        return torch.stack([to_depth(decode_image(self._content(i), self.image_format), self.dtype) for i in numbers])

    def shard_of(self, number: int) -> int:
        """The shard that an image lies in."""
        return bisect_right(self.starts, number) - 1

    def expect(self, shards: Iterable[int]) -> None:
        """Begin to read shards that are needed now, each in a thread, but for those known to be bad."""
        self._begin((shard for shard in shards if shard not in self._bad), ahead=False)

    def read_ahead(self, shards: Iterable[int]) -> None:
        """Begin to read shards that will be needed, each in a thread, but for those known to be bad."""
        self._begin((shard for shard in shards if shard not in self._bad), ahead=True)

    def release(self, shards: Iterable[int]) -> None:
        """Drop these shards first when room is needed."""
        for shard in shards:
            if shard in self._kept:
                self._kept.move_to_end(shard, last=False)

    def read(self, shard: int) -> list[bytes]:
        """The image files in a shard, waiting for them.

        Raises:
            ShardError: If it cannot be read now, whether or not it was read ahead.
        """
        while True:
            self._begin([shard], ahead=False)
            reading = self._kept[shard]
            try:
                return reading.files.result()
            except ShardError:
                if not reading.ahead:
                    del self._kept[shard]  # which would take another's room
                    raise

    def begin_epoch(self, epoch: int) -> None:
        """Try bad shards again, if this is another epoch than before."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._bad.clear()

    def readable(self, number: int, first: int) -> int:
        """The image itself, or, if its shard cannot be read, one of the next shard that can, which is told once.

        Which one it is follows from which shards cannot be read, and from nothing else.

        Args:
            number: The number of an image.
            first: Images before this one take no other image's place.

        Raises:
            ShardError: If many shards in a row cannot be read.
        """
        wanted, total = self.shard_of(number), len(self.index.shards)
        num_bad = 0
        for shard in (i % total for i in range(wanted, wanted + total)):
            low, high = max(first, self.starts[shard]), self.starts[shard + 1]
            if num_bad == MAX_BAD_SHARDS:
                break
            if low >= high:  # it has none to train on
                continue
            if self._can_be_read(shard):
                return number if shard == wanted else low + number % (high - low)
            num_bad += 1
        raise ShardError(
            f"{num_bad} shards of {self.store.shown} in a row cannot be read, too many to leave out; see whether it "
            "can be reached, and the same command goes on"
        )

    def _can_be_read(self, shard: int) -> bool:
        """Whether it can; one that cannot is remembered for the epoch, so that each batch need not wait for it."""
        if shard in self._bad:
            return False
        try:
            self.read(shard)
        except ShardError as error:
            self._bad.add(shard)
            if shard not in self._told:
                self._told.add(shard)
                warnings.warn(printable(f"{error}; images of other shards take the place of its own"), stacklevel=2)
            return False
        return True

    def _begin(self, shards: Iterable[int], *, ahead: bool) -> None:
        if self._process != os.getpid():  # threads are not forked
            self._forget()
        for shard in shards:
            if shard not in self._kept or (not ahead and self._kept[shard].must_be_tried_again):
                self._kept[shard] = Reading(self._begun(shard), ahead)
            self._kept.move_to_end(shard)
            while len(self._kept) > self.num_kept:
                self._kept.popitem(last=False)

    def _content(self, number: int) -> bytes:
        shard = self.shard_of(number)
        return self.read(shard)[number - self.starts[shard]]

    def _begun(self, shard: int) -> "Future[list[bytes]]":
        future: Future[list[bytes]] = Future()

        def run() -> None:
            try:
                future.set_result(self.store.images_of(shard, self.index.shards[shard]))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=run, daemon=True).start()  # not waited for at the end, as those of a pool would be
        return future

    def _forget(self) -> None:
        self._kept: OrderedDict[int, Reading] = OrderedDict()
        self._bad: set[int] = set()  # shards that cannot be read in this epoch
        self._told: set[int] = set()
        self._process = os.getpid()


def _images(content: bytes) -> list[bytes]:
    """The members of a shard that are images; others say what is known of these, as the index does."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        members = [member for member in archive if member.isfile() and not member.name.endswith((CAPTION, CLASS))]
        return [content[m.offset_data : m.offset_data + m.size] for m in members]
