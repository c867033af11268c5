"""What all data modules share: the split and the batches, whose images are scaled to [-1, 1] here and nowhere else."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from unet_diffusion.data.batches import Batch, ImageBatches, ImageSet, OrderedBatches, ResumableLoader, ShuffledBatches
from unet_diffusion.data.fingerprints import text_digest
from unet_diffusion.data.known import KnownImages, contents_of_pixels
from unet_diffusion.data.scaling import scale_to_unit_range
from unet_diffusion.runtime.randomness import keyed_generator

MAX_NUM_VAL = 1000  # by default: enough for a validation loss that is stable to about 1 %
VAL_SHARE = 0.1  # by default
MAX_NUM_WORKERS = 8  # by default, a process
SPLIT_KEY = 0  # not the seed: runs that differ in their seed are validated on the same images


class ImageDataModule(KnownImages):
    """Batches of images and class labels. A subclass says where the images come from, in `load`.

    Batches are {"images": float32 (B, C, H, W) in [-1, 1], "index": int64 (B,), position in the whole set} and, if
    there are classes, "labels": int64 (B,).

    Args:
        batch_size: images a batch and process; no more than there are to train on.
        num_val: images kept apart for validation, the same for every seed; None: about a tenth, at most 1000. Of
            files the name decides, see `split_by_name`, so that files which are added move nobody.
        horizontal_flip: mirror every second training image, drawn at random.
        num_workers: processes that load batches; None: 0 if the images are in memory, otherwise one a processor core,
            at most 8.
        seed: of the order of the training images and their mirroring.

    Raises:
        ValueError: if a number is out of range.
    """

    kind = "images"  # as they are called in `summary`

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_val: int | None = None,
        horizontal_flip: bool = False,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}; 0 loads in the training process")
        self.batch_size = batch_size
        self.num_val = num_val
        self.horizontal_flip = horizontal_flip
        self.num_workers = num_workers
        self.seed = seed
        self._image_set: ImageSet | None = None

    def load(self) -> ImageSet:
        """All images and their labels; called once."""
        raise NotImplementedError(f"{type(self).__name__} must define load()")

    def split(self, image_set: ImageSet) -> tuple[Tensor, Tensor]:
        """Indices to train and to validate on, sorted."""
        if image_set.names is None:
            return split_indices(len(image_set.images), self.num_val)
        return split_by_name(image_set.names, self.num_val)

    def names_and_contents(self) -> tuple[Sequence[str], Sequence[str]] | None:
        """As `KnownImages` has it, with class and caption; None of images that are streamed, and known by shards."""
        found = self.image_set
        contents = found.contents
        if contents is None:
            if not isinstance(found.images, Tensor):
                return None
            contents = contents_of_pixels(found.images)
        labels = [""] * len(contents)
        if found.class_names is not None and found.labels is not None:
            labels = [found.class_names[i] for i in found.labels.tolist()]
        texts = zip(contents, labels, found.captions or labels, strict=True)
        return found.names or [str(i) for i in range(len(contents))], ["\n".join(text) for text in texts]

    def setup(self, stage: str | None = None) -> None:
        """Load the images, once, and split them.

        Args:
            stage: of no consequence; Lightning passes it.

        Raises:
            ValueError: if the images are too few for the split.
        """
        if self._image_set is None:
            image_set = self.load()
            self.train_indices, self.val_indices = self.split(image_set)
            self.batch_size = bounded_batch_size(self.batch_size, len(self.train_indices), self.trainer)
            self._image_set = image_set

    def summary(self) -> list[str]:
        """What was found, what is left out and what is changed of it, and how it is split, a line each."""
        lines = {
            "found": self._found(),
            "left out": self.left_out(),
            "changed": self.changed(),
            "split": f"{len(self.train_indices)} to train on, {len(self.val_indices)} to validate on",
        }
        return [f"{name}: {line}" for name, line in lines.items() if line]

    def left_out(self) -> str:
        """What there is beside the images, in a line; "" if that is not known."""
        return ""

    def changed(self) -> str:
        """What of the images does not come into batches, in a line; "" if that is not known."""
        return ""

    def _found(self) -> str:
        images, labels, captions = self.image_set.images, self.image_set.labels, self.captions
        size, depth = "x".join(map(str, images.shape[1:])), str(images.dtype).removeprefix("torch.")
        where = f" in {self.root}" if hasattr(self, "root") else ""
        parts = [f"{len(images)} {self.kind} of {size} ({depth}){where}"]
        if labels is not None and self.class_names is not None:
            counts = torch.bincount(labels, minlength=len(self.class_names))
            parts.append(f"{len(self.class_names)} classes of {counts.min()} to {counts.max()}")
        if captions is not None:
            empty = sum(not text for text in captions)
            parts.append(f"captions, {len(set(captions))} of them different" + (f", {empty} empty" if empty else ""))
        return "; ".join(parts)

    @property
    def image_set(self) -> ImageSet:
        """The whole set, before the split."""
        if self._image_set is None:
            raise RuntimeError('the images are not loaded yet; call setup("fit") first')
        return self._image_set

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.image_set.images.shape
        return channels, height, width

    @property
    def class_names(self) -> list[str] | None:
        """The name of each class, or None if there are no classes."""
        return self.image_set.class_names

    @property
    def captions(self) -> list[str] | None:
        """The caption of each image of the whole set, or None if there are none."""
        return self.image_set.captions

    @property
    def num_classes(self) -> int | None:
        """How many classes there are, or None if there are none."""
        return None if self.class_names is None else len(self.class_names)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training batches, shuffled anew every epoch; see `ShuffledBatches`.

        Raises:
            ValueError: if the trainer is to overfit batches, for which Lightning would replace the sampler.
        """
        refuse_overfit_batches(self.trainer)
        sampler = ShuffledBatches(
            self.train_indices,
            self.batch_size,
            num_images=len(self.image_set.images),
            horizontal_flip=self.horizontal_flip,
            seed=self.seed,
            **replica(self.trainer),
        )
        return ResumableLoader(sampler=sampler, **self._loader_arguments())

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation batches, in order and never mirrored; see `OrderedBatches`."""
        sampler = OrderedBatches(self.val_indices, self.batch_size, **replica(self.trainer))
        return DataLoader(sampler=sampler, **self._loader_arguments())

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Scale the images, once they are on the device: a quarter of the bytes is copied."""
        return {**batch, "images": scale_to_unit_range(batch["images"])}

    def _loader_arguments(self) -> dict[str, Any]:
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = 0 if isinstance(self.image_set.images, Tensor) else self._suggested_num_workers()
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "dataset": ImageBatches(self.image_set),
            "batch_size": None,  # the sampler makes the batches
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "pin_memory": on_gpu,
        }

    def _suggested_num_workers(self) -> int:
        num_processes = self.trainer.num_devices if self.trainer is not None else 1
        return min(suggested_max_num_workers(num_processes), MAX_NUM_WORKERS)


def replica(trainer: Any) -> dict[str, int]:
    """Which of how many processes this one is, as samplers take it."""
    distributed = trainer.distributed_sampler_kwargs if trainer is not None else None
    return distributed or {"num_replicas": 1, "rank": 0}


def bounded_batch_size(batch_size: int, num_images: int, trainer: Any) -> int:
    """The size of a batch that is asked for, but no more than there are images to train on, which is said in a run."""
    if batch_size > num_images and trainer is not None:
        rank_zero_info(
            f"batch_size is {batch_size}, and a batch has all {num_images} images that there are to train on"
        )
    return min(batch_size, num_images)


def refuse_unused(datamodule: Any, taken: set[str]) -> None:
    """Refuse data that are asked for and that nothing would be made of.

    Args:
        datamodule: May have the attributes class_labels and has_captions.
        taken: What is used, of "class_labels" and "captions".

    Raises:
        ValueError: If there are such.
    """
    for option, attribute in (("class_labels", "class_labels"), ("captions", "has_captions")):
        if getattr(datamodule, attribute, False) and option not in taken:
            raise ValueError(
                f"data.init_args.{option} is true, and what is trained takes no {option}; set it to false, or train a "
                "network that takes them (num_class_embeds for classes, model.conditions for captions)"
            )


def refuse_overfit_batches(trainer: Any) -> None:
    """Raises ValueError if the trainer is to overfit batches, for which Lightning would replace the sampler."""
    overfit_batches = getattr(trainer, "overfit_batches", 0)
    if overfit_batches:
        raise ValueError(
            f"overfit_batches must be 0, got {overfit_batches}; to overfit, train on a folder with a few images"
        )


def split_by_name(names: Sequence[str], num_val: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices to train and to validate on; sorted. A hash of its name gives each image a number in [0, 1).

    The num_val images of the lowest numbers are validated on, by default those below 0.1. So none that was trained on
    is validated on because others are added, though these may take the places of some that were validated on.

    Args:
        names: Of the images, each below the root.
        num_val: Images to validate on; None: those below 0.1, at least 1 and at most 1000.

    Raises:
        ValueError: If that leaves none for either.
    """
    numbers = [_number_of(name) for name in names]
    if num_val is None:
        num_val = min(max(sum(number < VAL_SHARE for number in numbers), 1), MAX_NUM_VAL, max(len(names) - 1, 1))
    _check_split(len(names), num_val)
    ranked = torch.tensor(sorted(range(len(names)), key=numbers.__getitem__))
    return ranked[num_val:].sort().values, ranked[:num_val].sort().values


def _number_of(name: str) -> float:
    """In [0, 1), of a name that systems spell with letters and accents apart or together."""
    text = f"{SPLIT_KEY} {unicodedata.normalize('NFC', name)}"
    return int.from_bytes(text_digest(text)[:8], "big") / 2**64


def split_indices(num_images: int, num_val: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices to train and to validate on, of images without names, a function of the two numbers alone; sorted.

    Args:
        num_images: size of the whole set.
        num_val: images to validate on; None: a tenth, at most 1000. A larger number keeps the images of a smaller one.

    Raises:
        ValueError: if that leaves none for either.
    """
    if num_val is None:
        num_val = min(max(num_images // 10, 1), MAX_NUM_VAL)
    _check_split(num_images, num_val)
    order = torch.randperm(num_images, generator=keyed_generator(SPLIT_KEY))
    return order[num_val:].sort().values, order[:num_val].sort().values


def _check_split(num_images: int, num_val: int) -> None:
    if num_images < 2:
        raise ValueError(f"there must be at least 2 images, to train and to validate on, got {num_images}; add images")
    if not 1 <= num_val < num_images:
        raise ValueError(
            f"num_val must be at least 1 and less than the {num_images} images, got {num_val}; "
            "leave it out to keep a tenth apart"
        )
