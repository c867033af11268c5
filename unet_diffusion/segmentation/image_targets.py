"""What a network learns of a labelled image, and of a deformed window of it."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unet_diffusion.segmentation.affinities import APART
from unet_diffusion.segmentation.augmentation import sample_at
from unet_diffusion.segmentation.labels import REACH, Targets


@dataclass(frozen=True)
class ImageTargets:
    """The targets of an image, maps (H, W) as `Targets` makes them.

    Args:
        classes: The class of each pixel, int16.
        weights: The weight of each pixel, float32.
        distances: The distance of each pixel from the edge of its object, float32; None: it is not learnt.
        partners: The object of each pixel, see `Targets.partners`; None: affinities are not learnt.
        objects: The places of the pixels of objects in the image as a row, (n,) int32.
    """

    classes: Tensor
    weights: Tensor
    distances: Tensor | None
    partners: Tensor | None
    objects: Tensor

    @classmethod
    def of(cls, targets: Targets, labels: NDArray[np.int32], balance: NDArray[np.float32]) -> Self:
        """The targets of a label image.

        Args:
            targets: The meaning of the labels, and what is learnt of them.
            labels: The label image, whose values were checked.
            balance: The weight of each class.
        """
        classes = torch.from_numpy(targets.classes(labels))
        return cls(
            classes=classes,
            weights=torch.from_numpy(targets.weights(labels, balance)),
            distances=torch.from_numpy(targets.distances(labels)) if targets.separate_borders else None,
            partners=torch.from_numpy(targets.partners(labels)) if targets.affinities else None,
            objects=(classes > 0).flatten().nonzero().flatten().int(),
        )

    def sampled(self, coordinates: Tensor) -> dict[str, Tensor]:
        """The targets at places in the image: entries of a batch of `SegmentationDataModule`, (h, w) each.

        Args:
            coordinates: Rows and columns, (2, h, w); beyond the image is its mirror image.
        """
        targets = {"classes": self.classes.float(), "weights": self.weights}
        if self.distances is not None:
            targets["distances"] = self.distances
        maps = sample_at(torch.stack([*targets.values()]), coordinates, mode="nearest")
        sampled = dict(zip(targets, maps, strict=True))
        sampled["classes"] = sampled["classes"].long()
        if self.distances is not None:
            across = (coordinates[:, :, -1] - coordinates[:, :, 0]).norm(dim=0).mean()  # of the window, in the image
            scale = (coordinates.shape[-1] - 1) / across
            sampled["distances"] = (sampled["distances"] * (scale / REACH)).clamp(max=1)
        if self.partners is not None:
            instances = sample_at(self.partners[None], coordinates, mode="nearest")[0]
            places, last = coordinates.round(), torch.tensor(self.partners.shape)[:, None, None] - 1
            # Beyond the image mirror images touch, which are no object together.
            sampled["instances"] = torch.where(((places >= 0) & (places <= last)).all(dim=0), instances, APART)
        return sampled
