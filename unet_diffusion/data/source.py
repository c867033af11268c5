"""A source says which images there are, and reads them; `ImageDataModule` does the rest.

A source of your own is one small class in a file of yours, here mine.py, which a recipe names as `data.source:
mine.Flowers` and the command line allows by `--allow mine`:

    class Flowers(unet_diffusion.data.Source):
        class_names = ["daisy", "rose"]

        def __init__(self, root: str):
            self.paths = sorted(Path(root).glob("*.jpg"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> dict:
            path = self.paths[index]
            return dict(image=Image.open(path).resize((64, 64)), label=int("rose" in path.name))
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unet_diffusion.data.batches import (
    Batch,
    Entries,
    ImageBatches,
    ImageSet,
    OrderedBatches,
    ResumableLoader,
    ShuffledBatches,
)
from unet_diffusion.data.decoding import to_depth
from unet_diffusion.data.fingerprints import content_hash
from unet_diffusion.data.items import Item, ItemSource, num_items, read_item, read_items
from unet_diffusion.data.split import split_by_name, split_indices
from unet_diffusion.latents.codec import Codec
from unet_diffusion.runtime.cropping import Crop
from unet_diffusion.runtime.pictures import in_unit_range
from unet_diffusion.runtime.pixel_values import PixelValues

IN_MEMORY_BYTES = 2 * 1024**3  # a set up to 2 GiB is kept in memory: at 8 bits 170,000 RGB images of 64x64


class Source(ItemSource):
    """Images by number, and what is known of each.

    A subclass defines `__len__`, and `__getitem__(index)`, which returns a dict with

    - `image`: A PIL image, or an array or tensor (H, W), (H, W, C) or (C, H, W) of uint8, uint16, or floats in [0, 1],
      with 1, 3 or 4 channels; a tensor (C, H, W) may have others. All images have one size.
    - `label`: The number of the class, where images have classes.
    - Any further key, in all items or in none: What else is known of the image, for the condition whose `batch_key` is
      that key. A number, or an array or tensor of one shape and type over all items, becomes an entry of a batch, (B,
      ...). A text, such as `caption`, which `TextTokens` reads as "captions", does not: the condition finds it by the
      "index" of a batch in `datamodule.entries`. Images that are mirrored keep what is known of them.
    - `name`: What tells the image from others, such as its path. The names decide which images are validated on, so
      that images which are added move none that was trained on. Without names the numbers decide.

    Each item is read once before training, so that a mistake is found at once. Images that take up to 2 GiB stay in
    memory; otherwise workers read them again in every epoch.

    The sources of this package define `load` instead, which reads all images faster, and some of the methods below it,
    each of which has a default that suits images in memory.

    Attributes:
        class_names: The name of each class. None takes the numbers of the classes.
        kind: What the run calls the images when it tells what it found.
        image_shape: (C, H, W) of every image, if that is known before they are loaded.
        codec: What encoded the images, if the items are latents; None if they are images.
        values: What the numbers in the files mean, once they are loaded. None: they are those of the images.
        crops: The part of its file that each image shows, such as `runtime.cropping.Crop.centred((20, 28), (16, 16))`,
            once they are loaded, for `XLText`. None: it is not known.
    """

    class_names: Sequence[str] | None = None
    kind: str = "images"
    image_shape: tuple[int, int, int] | None = None
    codec: Codec | None = None
    values: PixelValues | None = None
    crops: Sequence[Crop] | None = None

    def load(self, *, progress: bool = True) -> ImageSet:
        """All images with what is known of them; `ImageDataModule` calls it once.

        Args:
            progress: Whether a progress bar is shown.

        Raises:
            ValueError: If an item is not as it must be.
        """
        number = num_items(self)
        first = read_item(self, 0)
        shape = first.image.shape
        in_memory = number * first.image.nbytes <= IN_MEMORY_BYTES
        images = torch.empty(number if in_memory else 0, *shape, dtype=torch.uint8)
        items, contents = list[Item](), list[str]()
        for index, item in enumerate(read_items(self, progress)):
            _check_alike(item, first)
            if item.image.dtype == torch.uint16:
                images = to_depth(images, torch.uint16)
            if in_memory:
                images[index] = to_depth(item.image, images.dtype)
            contents.append(content_hash(item.image.numpy().tobytes()))
            items.append(replace(item, image=torch.empty(0)))
        rows = {key: [item.values[key] for item in items] for key in first.values}
        names, labels = rows.pop("name", None), rows.pop("label", None)
        if names and len(set(names)) < len(names):
            raise ValueError(
                f"names of the items of {type(self).__name__} must differ, and {_twice(names)} occurs twice"
            )
        stored = images if in_memory else SourceImages(self, (number, *shape), images.dtype)
        entries, class_names = _classes(items, labels, self.class_names)
        for key, values in rows.items():
            is_text = isinstance(values[0], str)
            entries["captions" if key == "caption" else key] = values if is_text else torch.stack(values)
        return ImageSet(stored, entries, class_names, names, contents)

    def left_out(self) -> str:
        """A line about what there is beside the images; "" if that is not known."""
        return ""

    def changed(self) -> str:
        """A line about what of the images does not come into batches; "" if that is not known."""
        return ""

    def check(self, *, horizontal_flip: bool, num_workers: int | None) -> None:
        """Refuse settings of the data module that this source cannot serve, once it is loaded.

        Args:
            horizontal_flip: Whether training images are mirrored at random.
            num_workers: The number of processes that load batches. None leaves it to `num_workers`.

        Raises:
            ValueError: If there is such a setting.
        """

    def split(self, image_set: ImageSet, num_val: int | None) -> tuple[Tensor, Tensor]:
        """Sorted indices to train on and to validate on.

        Args:
            image_set: All images.
            num_val: The number of validation images. None takes about a tenth.
        """
        if image_set.names is None:
            return split_indices(len(image_set.images), num_val)
        return split_by_name(image_set.names, num_val)

    def num_workers(self, image_set: ImageSet, most: int) -> int:
        """The number of processes that load batches, unless the user says it.

        Args:
            image_set: All images.
            most: The number that the processor cores suffice for.
        """
        return 0 if isinstance(image_set.images, Tensor) else most

    def batches(self, image_set: ImageSet) -> Dataset[Batch]:
        """The data set that makes a batch of a list of indices."""
        return ImageBatches(image_set)

    def train_loader(
        self, image_set: ImageSet, indices: Tensor, order: dict[str, Any], options: dict[str, Any]
    ) -> DataLoader[Batch]:
        """The training batches, in another order every epoch; see `ShuffledBatches`.

        Args:
            image_set: All images.
            indices: The images to train on.
            order: The arguments batch_size, horizontal_flip, seed, num_replicas and rank of the sampler.
            options: Arguments of the loader.
        """
        sampler = ShuffledBatches(indices, num_images=len(image_set.images), **order)
        return ResumableLoader(dataset=self.batches(image_set), sampler=sampler, **options)

    def val_loader(
        self, image_set: ImageSet, indices: Tensor, order: dict[str, Any], options: dict[str, Any]
    ) -> DataLoader[Batch]:
        """The validation batches, always in the same order and never mirrored; see `OrderedBatches`.

        Args:
            image_set: All images.
            indices: The images to validate on.
            order: The arguments batch_size, num_replicas and rank of the sampler.
            options: Arguments of the loader.
        """
        return DataLoader(dataset=self.batches(image_set), sampler=OrderedBatches(indices, **order), **options)

    def on_device(self, batch: Batch, generator: torch.Generator | None) -> Batch:
        """A batch for the network, once it is on the device. By default its images are scaled to [-1, 1] here.

        Args:
            batch: A batch as `batches` made it.
            generator: Makes the random draws of this training step, on the device of the batch; None in validation.
        """
        return {**batch, "images": in_unit_range(batch["images"])}


class SourceImages:
    """Images that a source reads when a batch asks for them.

    Args:
        source: The source, whose items have been read once.
        shape: (N, C, H, W).
        dtype: torch.uint8, or torch.uint16 if any image has 16 bits.
    """

    def __init__(self, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.source = source
        self.shape = shape
        self.dtype = dtype

    def __len__(self) -> int:
        return self.shape[0]

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """The images at index (B,), (B, C, H, W). The signature is that of a tensor, and dim must be 0."""
        assert dim == 0
        return torch.stack([to_depth(self._image(i), self.dtype) for i in index.tolist()])

    def _image(self, index: int) -> Tensor:
        item = read_item(self.source, index)
        if item.image.shape != self.shape[1:]:
            raise ValueError(f"{item.where} had the shape {tuple(self.shape[1:])} before and has "
                             f"{tuple(item.image.shape)} now; an item must stay the same")  # fmt: skip
        return item.image


def _check_alike(item: Item, first: Item) -> None:
    """Refuse an item whose image is of another size than that of the first one, or that holds something else."""
    if item.image.shape != first.image.shape:
        sizes = ["x".join(map(str, one.shape)) for one in (first.image, item.image)]
        raise ValueError(f"all images must have one size, and {first.where} is {sizes[0]} and {item.where} {sizes[1]} "
                         "(C x H x W); scale or cut them in __getitem__")  # fmt: skip
    for key in {**first.values, **item.values}:
        kinds = [_kind(key, one.values.get(key)) for one in (first, item)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{key} must be of one type and shape in all items, and is {kinds[0]} in {first.where} "
                             f"and {kinds[1]} in {item.where}; make them alike in __getitem__")  # fmt: skip


def _kind(key: str, value: Any) -> str:
    if value is None:
        return "missing"
    if key == "label":  # a whole number in any form
        return "there"
    return "a text" if isinstance(value, str) else f"{str(value.dtype)[6:]} of the shape {tuple(value.shape)}"


def _classes(
    items: Sequence[Item], labels: list[Any] | None, class_names: Sequence[str] | None
) -> tuple[Entries, list[str] | None]:
    """The labels of the items as an entry, if they have them, and the name of each class."""
    if labels is None:
        if class_names is not None:
            raise ValueError(f"{items[0].where} must have a label, as its source has class_names; or remove these")
        return {}, None
    numbers = [_label(label, item.where, class_names) for label, item in zip(labels, items, strict=True)]
    names = list(class_names) if class_names is not None else [str(number) for number in range(max(numbers) + 1)]
    return {"labels": torch.tensor(numbers)}, names


def _label(label: Any, where: str, class_names: Sequence[str] | None) -> int:
    label = label.item() if hasattr(label, "item") and getattr(label, "ndim", 1) == 0 else label
    most = f" below {len(class_names)}, the number of class_names" if class_names is not None else ""
    if not isinstance(label, int) or isinstance(label, bool) or label < 0 or (
        class_names is not None and label >= len(class_names)
    ):  # fmt: skip
        raise ValueError(f"the label of {where} must be a whole number from 0{most}, got {label!r}")
    return label


def _twice(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
