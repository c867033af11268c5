"""A source of latents, which are drawn anew each time from the distributions that `unet-diffusion encode` kept."""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from unet_diffusion.data.batches import Batch, ImageSet, numbers_of
from unet_diffusion.data.source import Source
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.latents.store import LatentSet, read_latents


class Latents(Source):
    """Latents of images, for diffusion in place of the images.

    Batches hold normalised latents as "x0", in place of "images". In training they are drawn from each image's
    distribution, in validation they are its mean. The loader hands out the distributions, and they are drawn on the
    device.

    Args:
        root: A folder that `unet-diffusion encode` wrote.
        scaling_factor: One scale for all channels in place of the measured mean and deviation of each, as a published
            model was trained with (0.18215 in Stable Diffusion 1). None takes the measured ones.

    Raises:
        ValueError: If the scale is not above 0.
    """

    kind = "latents"

    def __init__(self, root: str | Path, *, scaling_factor: float | None = None) -> None:
        if scaling_factor is not None and not scaling_factor > 0:
            raise ValueError(f"scaling_factor must be above 0, got {scaling_factor}; null takes the measured moments")
        self.root = root
        self.scaling_factor = scaling_factor

    def load(self, *, progress: bool = True) -> ImageSet:
        """Read all latents.

        Args:
            progress: Latents are read at once, without a progress bar.

        Raises:
            FileNotFoundError: If there are none, or they were not finished.
        """
        self.latents = read_latents(self.root)
        if self.scaling_factor is not None:
            self.latents.space = self.latents.space.rescaled(self.scaling_factor)
        self.codec = LatentCodec.of(self.latents.space)
        latents, self.values, self.crops = self.latents, self.latents.values, self.latents.crops
        one_each = latents.mean[: len(latents)]  # without those of the mirrored images
        return ImageSet(one_each, latents.entries, latents.class_names, latents.names)

    def check(self, *, horizontal_flip: bool, num_workers: int | None) -> None:
        if horizontal_flip and not self.latents.has_mirrored:
            raise ValueError(
                f"horizontal_flip needs mirror images, and {self.root} has none; "
                "encode again with --horizontal_flip, or set it to false"
            )

    def batches(self, image_set: ImageSet) -> Dataset[Batch]:
        return LatentBatches(self.latents)

    def on_device(self, batch: Batch, generator: torch.Generator | None) -> Batch:
        """Draw the latents if there is a generator, and normalise them."""
        mean, std = batch["images"].float(), batch["std"].float()
        if generator is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
        rest = {key: value for key, value in batch.items() if key not in ("images", "std")}
        return {**rest, "x0": self.latents.space.normalise(mean)}


class LatentBatches(Dataset[Batch]):
    """Batches of latents by lists of indices; index + N stands for the mirror image of image `index`.

    Args:
        latents: The latents of N images.
    """

    def __init__(self, latents: LatentSet) -> None:
        self.latents = latents

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, indices: list[int]) -> Batch:
        """A batch {"images": means (B, C, h, w), "std": deviations, "index": (B,) int64, numbers of the entries}.

        "is_mirrored", (B,) bool, says which are latents of a mirror image.
        """
        drawn = torch.tensor(indices)
        index = drawn % len(self)
        return {
            "images": self.latents.mean.index_select(0, drawn),
            "std": self.latents.std.index_select(0, drawn),
            "index": index,
            "is_mirrored": drawn >= len(self),
            **numbers_of(self.latents.entries, index),
        }
