"""Sources of well-known sets: handwritten digits, which come with scikit-learn, and sets of torchvision."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from unet_diffusion.data.batches import ImageSet
from unet_diffusion.data.source import Source

TorchvisionName = Literal["MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100"]

DIGITS_WHITE = 16  # brightest value in scikit-learn's digits


class Digits(Source):
    """1,797 handwritten digits, 1x8x8, 10 classes (Alpaydin & Kaynak 1998, in scikit-learn). Nothing is downloaded."""

    def load(self, *, progress: bool = True) -> ImageSet:
        """The digits, whose grey values 0 to 16 are stretched to 0 to 255.

        Args:
            progress: Nothing takes long enough for a progress bar.
        """
        spec = find_spec("sklearn")  # finds the file without importing scikit-learn, which takes a second
        assert spec is not None
        assert spec.origin is not None
        table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
        images = torch.from_numpy(table[:, :-1]).mul(255 / DIGITS_WHITE).round().to(torch.uint8)
        class_names = [str(digit) for digit in range(10)]
        return ImageSet(images.reshape(-1, 1, 8, 8), {"labels": torch.from_numpy(table[:, -1]).long()}, class_names)


class Torchvision(Source):
    """The training images of one of torchvision's sets, with class labels. Its test images are not touched.

    MNIST, FashionMNIST and KMNIST are 60,000 images 1x28x28, CIFAR10 and CIFAR100 50,000 images 3x32x32.

    Args:
        dataset: The name of the set in torchvision.datasets.
        root: The folder that holds the set as torchvision lays it out, such as root/FashionMNIST/raw.
        download: Whether the set is fetched into root if it is not there.

    Raises:
        ValueError: If the set is not known.
    """

    def __init__(self, dataset: TorchvisionName, root: str | Path, *, download: bool = False) -> None:
        if dataset not in get_args(TorchvisionName):
            raise ValueError(f"dataset must be one of {', '.join(get_args(TorchvisionName))}, got {dataset!r}")
        self.dataset = dataset
        self.root = Path(root).expanduser()
        self.download = download

    def prepare(self) -> None:
        """Download the set if asked to."""
        if self.download:
            self._dataset_class()(self.root, train=True, download=True)

    def load(self, *, progress: bool = True) -> ImageSet:
        """The training images.

        Args:
            progress: It is ignored, since torchvision reads a set at once, without a progress bar.

        Raises:
            FileNotFoundError: If the set is not in root.
        """
        try:
            dataset = self._dataset_class()(self.root, train=True)
        except RuntimeError as error:  # torchvision's own message does not say where
            raise FileNotFoundError(
                f"{self.dataset} must be in {self._expected_folder()}, but is not there or damaged; set root to the "
                "folder above, or set download to true to fetch it (the trainer then does; else call prepare_data())"
            ) from error
        images = torch.as_tensor(dataset.data)  # (N, H, W), or (N, H, W, C) in CIFAR
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, {"labels": torch.as_tensor(dataset.targets)}, list(dataset.classes))

    def left_out(self) -> str:
        return "the test images of the set"

    def _expected_folder(self) -> Path:
        return self.root / getattr(self._dataset_class(), "base_folder", f"{self.dataset}/raw")

    def _dataset_class(self) -> Any:
        from torchvision import datasets  # takes a second to import, which other sources are spared

        return getattr(datasets, self.dataset)
