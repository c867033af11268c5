"""Data modules for well-known sets: handwritten digits, which come with scikit-learn, and those of torchvision."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.data.batches import ImageSet

TorchvisionName = Literal["MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100"]

DIGITS_WHITE = 16  # brightest value in scikit-learn's digits


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits, 1x8x8, 10 classes (Alpaydin & Kaynak 1998, in scikit-learn). Nothing is downloaded.

    Args:
        batch_size: images a batch and process.
        num_val: images kept apart for validation, the same for every seed; None: a tenth.
        num_workers: processes that load batches; None: 0, the images are in memory.
        seed: of the order of the training images.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self, *, batch_size: int = 64, num_val: int | None = None, num_workers: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_val=num_val, num_workers=num_workers, seed=seed)

    def load(self) -> ImageSet:
        """The digits, from 0..16 stretched to 0..255."""
        spec = find_spec("sklearn")  # its file without itself, which takes a second to import
        assert spec is not None
        assert spec.origin is not None
        table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
        images = torch.from_numpy(table[:, :-1]).mul(255 / DIGITS_WHITE).round().to(torch.uint8)
        class_names = [str(digit) for digit in range(10)]
        return ImageSet(images.reshape(-1, 1, 8, 8), torch.from_numpy(table[:, -1]).long(), class_names)


class TorchvisionDataModule(ImageDataModule):
    """The training images of one of torchvision's sets, with class labels. Its test images are not touched.

    MNIST, FashionMNIST and KMNIST are 60,000 images 1x28x28, CIFAR10 and CIFAR100 50,000 images 3x32x32.

    Args:
        dataset: name of the set in torchvision.datasets.
        root: folder that holds the set as torchvision lays it out, such as root/FashionMNIST/raw.
        download: fetch the set into root if it is not there.
        batch_size: images a batch and process.
        num_val: images kept apart for validation, the same for every seed; None: 1000.
        horizontal_flip: mirror every second training image, drawn at random.
        num_workers: processes that load batches; None: 0, the images are in memory.
        seed: of the order of the training images and their mirroring.

    Raises:
        ValueError: if an argument is out of range or the set is not known.
    """

    def __init__(
        self,
        dataset: TorchvisionName,
        root: str | Path,
        *,
        download: bool = False,
        batch_size: int = 64,
        num_val: int | None = None,
        horizontal_flip: bool = False,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, num_val=num_val, horizontal_flip=horizontal_flip, num_workers=num_workers, seed=seed
        )
        if dataset not in get_args(TorchvisionName):
            raise ValueError(f"dataset must be one of {', '.join(get_args(TorchvisionName))}, got {dataset!r}")
        self.dataset = dataset
        self.root = Path(root).expanduser()
        self.download = download

    def prepare_data(self) -> None:
        """Download the set if asked to; Lightning calls this in one process only."""
        if self.download:
            self._dataset_class()(self.root, train=True, download=True)

    def load(self) -> ImageSet:
        """The training images.

        Raises:
            FileNotFoundError: if the set is not in root.
        """
        try:
            dataset = self._dataset_class()(self.root, train=True)
        except RuntimeError as error:  # torchvision's own message names no place
            raise FileNotFoundError(
                f"{self.dataset} must be in {self._expected_folder()}, but is not there or damaged; set root to the "
                "folder above, or set download to true to fetch it (the trainer then does; else call prepare_data())"
            ) from error
        images = torch.as_tensor(dataset.data)  # (N, H, W), or (N, H, W, C) in CIFAR
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.as_tensor(dataset.targets), list(dataset.classes))

    def left_out(self) -> str:
        return "the test images of the set"

    def _expected_folder(self) -> Path:
        return self.root / getattr(self._dataset_class(), "base_folder", f"{self.dataset}/raw")

    def _dataset_class(self) -> Any:
        from torchvision import datasets  # a second to import, which other data do without

        return getattr(datasets, self.dataset)
