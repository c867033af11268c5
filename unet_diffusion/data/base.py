"""Data modules: everything of training on a source's images that does not depend on where they come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.data import suggested_max_num_workers
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from unet_diffusion.data.batches import Batch, Entries, ImageSet
from unet_diffusion.data.groups import Groups, split_by_group
from unet_diffusion.data.items import Items, ItemSource
from unet_diffusion.data.known import KnownImages, contents_of_pixels
from unet_diffusion.data.source import Source
from unet_diffusion.latents.codec import Codec
from unet_diffusion.runtime.addresses import shown_place
from unet_diffusion.runtime.messages import did_you_mean
from unet_diffusion.runtime.pixel_values import PixelValues, default_shown
from unet_diffusion.runtime.randomness import keyed_generator

MAX_NUM_WORKERS = 8  # by default, for each process
DRAW_KEY = 1  # keeps a source's random draws apart from those of noise, which have the same seed


class SourceDataModule(KnownImages):
    """What the data modules of images and of labelled images share; see `ImageDataModule` for the arguments."""

    def __init__(
        self, source: ItemSource, *, batch_size: int, num_val: int | None, num_workers: int | None, seed: int
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}; 0 loads in the training process")
        self.source = source
        self.batch_size = batch_size
        self.num_val = num_val
        self.num_workers = num_workers
        self.seed = seed

    def prepare_data(self) -> None:
        """Download what the source lacks, if it does that; Lightning calls this in one process only."""
        self.source.prepare()

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows progress bars."""
        return self.trainer is None or self.trainer.is_global_zero

    def order(self) -> dict[str, Any]:
        """The arguments of a sampler: the batch size, and which of how many processes this one is."""
        distributed = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return {"batch_size": self.batch_size, **(distributed or {"num_replicas": 1, "rank": 0})}

    def refuse_overfit_batches(self) -> None:
        """Raises ValueError if the trainer is to overfit batches, for which Lightning would replace the sampler."""
        overfit_batches = getattr(self.trainer, "overfit_batches", 0)
        if overfit_batches:
            raise ValueError(
                f"overfit_batches must be 0, got {overfit_batches}; to overfit, train on a folder with a few images"
            )

    def bound_batch_size(self, num_images: int) -> None:
        """Lower the batch size to the number of training images if that is smaller, which a run tells."""
        if self.batch_size > num_images and self.trainer is not None:
            rank_zero_info(
                f"batch_size is {self.batch_size}, and a batch has all {num_images} images that there are to train on"
            )
        self.batch_size = min(self.batch_size, num_images)


class ImageDataModule(SourceDataModule):
    """Batches of a source's images: the split, the order, the workers and the scaling.

    Batches are {"images": float32 (B, C, H, W) in [-1, 1], "index": int64 (B,), the position in the whole set} and what
    else is known of the images in numbers: "labels", int64 (B,), if there are classes, and the source's own entries.

    Args:
        source: Where the images come from, such as `Folder`, or a class of your own; see `Source`.
        batch_size: The number of images per batch and process; no more than there are to train on.
        num_val: The number of images kept for validation, the same ones for every seed. None takes about a tenth, at
            most 1000. The names of files decide which, see `split_by_name`, so that files which are added move none
            that was trained on.
        horizontal_flip: Whether every second training image, drawn at random, is mirrored.
        groups: Which images belong together by their names: they are kept on one side of the split. None: each image
            stands for itself.
        num_workers: The number of processes that load batches. None takes 0 if the images are in memory, and otherwise
            one per processor core, at most 8.
        seed: Seed of the order of the training images and of their mirroring.

    Attributes:
        codec: What encoded the images, once they are loaded, if the source has latents; otherwise None.

    Raises:
        ValueError: If a number is out of range.
    """

    source: Source

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int = 64,
        num_val: int | None = None,
        horizontal_flip: bool = False,
        groups: Groups | None = None,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(source, batch_size=batch_size, num_val=num_val, num_workers=num_workers, seed=seed)
        self.horizontal_flip = horizontal_flip
        self.groups = groups
        self.codec: Codec | None = None
        self._image_set: ImageSet | None = None

    def names_and_contents(self) -> tuple[Sequence[str], Sequence[str]] | None:
        """The names and contents that `KnownImages` asks for; contents include the entries.

        None stands for images in shards, which are known by the checksums of the shards.
        """
        image_set = self.image_set
        contents = image_set.contents
        if contents is None:
            if not isinstance(image_set.images, Tensor):
                return None
            contents = contents_of_pixels(image_set.images)
        texts = [contents]
        for key, rows in sorted(image_set.entries.items()):
            if not isinstance(rows, Tensor):
                texts.append(rows)
            elif key == "labels" and image_set.class_names is not None:
                texts.append([image_set.class_names[i] for i in rows.tolist()])
            else:
                texts.append(contents_of_pixels(rows))
        names = image_set.names or [str(i) for i in range(len(contents))]
        return names, ["\n".join(parts) for parts in zip(*texts, strict=True)]

    def setup(self, stage: str | None = None) -> None:
        """Load the images, once, and split them.

        Args:
            stage: Lightning passes it; it changes nothing.

        Raises:
            ValueError: If the images are too few for the split, or the source cannot serve the settings.
        """
        if self._image_set is None:
            image_set = self.source.load(progress=self.shows_progress)
            self.source.check(horizontal_flip=self.horizontal_flip, num_workers=self.num_workers)
            self.train_indices, self.val_indices = self._split(image_set)
            self.bound_batch_size(len(self.train_indices))
            self.codec = self.source.codec
            self._image_set = image_set

    def _split(self, image_set: ImageSet) -> tuple[Tensor, Tensor]:
        if self.groups is None:
            return self.source.split(image_set, self.num_val)
        if image_set.names is None:
            raise ValueError(f"groups need the names of images, and those of {type(self.source).__name__} have none; "
                             "leave groups out, or train on the folder of the images, or on their latents")  # fmt: skip
        names = self.groups.of(image_set.names)
        self._groups = torch.tensor([*map({name: i for i, name in enumerate(dict.fromkeys(names))}.get, names)])
        return split_by_group(names, self.num_val)

    def summary(self) -> list[str]:
        """A line each about what was found, what is left out, what is changed, and how the images are split."""
        lines = {
            "found": self._found(),
            "left out": self.source.left_out(),
            "changed": self.source.changed(),
            "split": self._split_described(),
        }
        return [f"{name}: {line}" for name, line in lines.items() if line]

    def _split_described(self) -> str:
        sides = {"train on": self.train_indices, "validate on": self.val_indices}
        if self.groups is None:
            return ", ".join(f"{len(indices)} to {purpose}" for purpose, indices in sides.items())
        counts = {purpose: (len(indices), len(self._groups[indices].unique())) for purpose, indices in sides.items()}
        parts = [f"{images} to {purpose} (groups: {groups})" for purpose, (images, groups) in counts.items()]
        return ", ".join(parts) + ("; each epoch shows all groups equally often" if self.groups.balanced else "")

    def _found(self) -> str:
        images = self.image_set.images
        size, depth = "x".join(map(str, images.shape[1:])), str(images.dtype).removeprefix("torch.")
        where = f" in {shown_place(self.source.root)}" if hasattr(self.source, "root") else ""
        if self.codec is None and self.values.value_range is not None:
            depth = f"{self.values.dtype} from {self.values.low:.6g} to {self.values.high:.6g}"
        parts = [f"{len(images)} {self.source.kind} of {size} ({depth}){where}"]
        return "; ".join([*parts, *(self._about(key, rows) for key, rows in self.entries.items())])

    def _about(self, key: str, rows: Tensor | list[str]) -> str:
        """What a user should see of an entry."""
        if not isinstance(rows, Tensor):
            empty = sum(not text for text in rows)
            return f"{key}, {len(set(rows))} of them different" + (f", {empty} empty" if empty else "")
        if key == "labels" and self.class_names is not None:
            counts = torch.bincount(rows, minlength=len(self.class_names))
            return f"{len(self.class_names)} classes of {counts.min()} to {counts.max()}"
        low, high = (rows if rows.dtype == torch.uint8 else rows.double()).aminmax()
        return f"{key} from {low:.4g} to {high:.4g}"

    @property
    def image_set(self) -> ImageSet:
        """All images, before the split."""
        if self._image_set is None:
            raise RuntimeError('the images are not loaded yet; call setup("fit") first')
        return self._image_set

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image; sources that scale images know it before they are loaded."""
        if self.source.image_shape is not None:
            return self.source.image_shape
        _, channels, height, width = self.image_set.images.shape
        return channels, height, width

    @property
    def values(self) -> PixelValues:
        """What the numbers in the files mean, and which channels pictures show."""
        shown = default_shown(self.image_shape[0])
        return self.source.values or PixelValues.of_images(self.image_set.images.dtype, shown)

    @property
    def class_names(self) -> list[str] | None:
        """The name of each class, or None if there are no classes."""
        return self.image_set.class_names

    @property
    def entries(self) -> Entries:
        """What is known of each image of the whole set beside its pixels, by name: numbers (N, ...), or N texts."""
        return self.image_set.entries

    @property
    def num_classes(self) -> int | None:
        """The number of classes, or None if there are none."""
        return None if self.class_names is None else len(self.class_names)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training batches, in another order every epoch.

        Raises:
            ValueError: If the trainer is to overfit batches, for which Lightning would replace the sampler.
        """
        self.refuse_overfit_batches()
        order = {"horizontal_flip": self.horizontal_flip, "seed": self.seed, **self.order()}
        if self.groups is not None and self.groups.balanced:
            order["groups"] = self._groups[self.train_indices]
        return self.source.train_loader(self.image_set, self.train_indices, order, self._loader_options())

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation batches, always in the same order and never mirrored."""
        return self.source.val_loader(self.image_set, self.val_indices, self.order(), self._loader_options())

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Have the source finish a batch on the device, where scaling copies a quarter of the bytes."""
        generator = None
        if self.trainer is not None and self.trainer.training:
            step = self.trainer.fit_loop.total_batch_idx + 1  # of the batch that comes next
            device = batch["images"].device
            generator = keyed_generator(self.seed, DRAW_KEY, step, self.trainer.global_rank, device=device)
        return self.source.on_device(batch, generator)

    def _loader_options(self) -> dict[str, Any]:
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = self.source.num_workers(self.image_set, self._most_workers())
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "batch_size": None,  # the sampler makes the batches
            "num_workers": num_workers,
            "persistent_workers": num_workers > 0,
            "pin_memory": on_gpu,
        }

    def _most_workers(self) -> int:
        num_processes = self.trainer.num_devices if self.trainer is not None else 1
        return min(suggested_max_num_workers(num_processes), MAX_NUM_WORKERS)


def refuse_unused(datamodule: Any, taken: set[str]) -> None:
    """Refuse entries that the user asked for by an option of the source, and that the model does not use.

    Other entries that it does not use, such as of a mistyped key of an item, give a warning.

    Args:
        datamodule: A data module. An option of its source has the name of its entry; that of "labels" is class_labels.
        taken: The entries that the model reads.

    Raises:
        ValueError: If there are such.
    """
    for key in getattr(datamodule, "entries", {}):
        option = "class_labels" if key == "labels" else key
        value = getattr(getattr(datamodule, "source", None), option, None)
        if (value is True or isinstance(value, str | Path)) and key not in taken:
            raise ValueError(
                f"data.{option} is {str(value).lower() if value is True else value}, and what is trained takes no "
                f"{option}; {'set it to false' if value is True else 'leave it out'}, or train a network that takes "
                "them (num_class_embeds for classes, model.conditions for others)"
            )
        if key not in (*taken, "labels") and isinstance(getattr(datamodule, "source", None), Items):
            similar = did_you_mean(key, [one for one in ("label", "caption", "name") if one != key])
            rank_zero_warn(f"nothing that is trained reads {key!r}, which the data hold for each image{similar}")
