"""A data module for one's own images, in a folder or a zip archive."""

import math
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.data.batches import ImageSet
from unet_diffusion.data.checking import CheckedImages, bad_files_message, check_images, load_images
from unet_diffusion.data.decoding import ImageFormat
from unet_diffusion.data.files import find_images

OnBadFile = Literal["error", "skip"]

IN_MEMORY_BYTES = 2 * 1024**3  # a set up to 2 GiB, at 8 bits, is kept in memory: 170,000 RGB images of 64x64


class FolderDataModule(ImageDataModule):
    """Images from a folder (and those in it), a zip archive, or a folder inside one.

    Every image is scaled to cover image_size and cut to its centre; transparency is put on the background colour unless
    channels is 4. Files with 16 bits a channel keep them. Every file is decoded once before training starts.

    Args:
        root: a folder, archive.zip, or archive.zip/folder.
        image_size: height and width in pixels, or one number for both; no image may be smaller.
        channels: 1 (grey), 3 (RGB) or 4 (RGB and alpha).
        class_labels: whether the folder directly below root that a file lies in is its class.
        background: colour behind transparent pixels, a name or "#rrggbb"; not used if channels is 4.
        on_bad_file: what to do about files that cannot be decoded or are too small: "error", or "skip" with a warning.
        in_memory: keep the decoded images in memory; None: if they take up to 2 GiB. Otherwise they are decoded
            again every epoch.
        batch_size: images a batch and process.
        num_val: images kept apart for validation, the same for every seed; None: a tenth, at most 1000.
        horizontal_flip: mirror every second training image, drawn at random.
        num_workers: processes that load batches; None: 0 if the images are in memory, otherwise one a processor core,
            at most 8.
        seed: of the order of the training images and their mirroring.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int | tuple[int, int] = (64, 64),
        channels: int = 3,
        class_labels: bool = False,
        background: str = "white",
        on_bad_file: OnBadFile = "error",
        in_memory: bool | None = None,
        batch_size: int = 64,
        num_val: int | None = None,
        horizontal_flip: bool = False,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_val=num_val, horizontal_flip=horizontal_flip, num_workers=num_workers, seed=seed
        )
        if on_bad_file not in get_args(OnBadFile):
            raise ValueError(f'on_bad_file must be "error" or "skip", got {on_bad_file!r}')
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.root = root
        self.image_format = ImageFormat(height, width, channels, background)
        self.class_labels = class_labels
        self.on_bad_file = on_bad_file
        self.in_memory = in_memory
        self.file_names: list[str] = []

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image; known before they are loaded."""
        return self.image_format.channels, self.image_format.height, self.image_format.width

    def load(self) -> ImageSet:
        """Find and check all images.

        Raises:
            FileNotFoundError: if root does not exist.
            ValueError: if root holds no images, files that cannot be used, or, with class_labels, no classes.
        """
        files = find_images(self.root)
        if self.class_labels:
            _class_names(files.names, self.root)  # fails before the files are decoded, not after
        in_memory = self.in_memory
        if in_memory is None:
            in_memory = len(files.names) * math.prod(self.image_shape) <= IN_MEMORY_BYTES
        progress = self.trainer is None or self.trainer.is_global_zero
        checked = (load_images if in_memory else check_images)(files, self.image_format, progress=progress)
        self._report(checked)
        self.file_names = checked.names
        if not self.class_labels:
            return ImageSet(checked.images)
        class_names = _class_names(checked.names, self.root)
        return ImageSet(checked.images, _labels(checked.names, class_names), class_names)

    def _report(self, checked: CheckedImages) -> None:
        if not checked.bad_files:
            return
        message = bad_files_message(checked.bad_files, len(checked.names) + len(checked.bad_files))
        if self.on_bad_file == "error" or not checked.names:
            raise ValueError(f'{message}\nRemove them, lower image_size, or set on_bad_file to "skip".')
        rank_zero_warn(f"{message}\nTraining goes on without them.")


def _class_names(names: list[str], root: str | Path) -> list[str]:
    """The folders directly below root, sorted."""
    loose = [name for name in names if "/" not in name]
    if loose:
        raise ValueError(
            f"with class_labels every image must lie in the folder of its class, but {len(loose)} lie directly in "
            f"{root}: {', '.join(loose[:3])}; move them or set class_labels to false"
        )
    class_names = sorted({name.split("/")[0] for name in names})
    if len(class_names) < 2:
        raise ValueError(
            f"with class_labels there must be at least 2 class folders below {root}, found {class_names[0]!r} only; "
            f"is the root {root}/{class_names[0]}?"
        )
    return class_names


def _labels(names: list[str], class_names: list[str]) -> Tensor:
    number = {name: i for i, name in enumerate(class_names)}
    return torch.tensor([number[name.split("/")[0]] for name in names])
