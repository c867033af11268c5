"""Batches of latents, drawn anew each time from what `unet-diffusion encode` kept."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.data.batches import Batch, ImageSet
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.latents.store import LatentSet, read_latents
from unet_diffusion.runtime.randomness import keyed_generator

LATENT_KEY = 1  # keeps the draws of latents apart from those of noise, which have the same seed


class LatentsDataModule(ImageDataModule):
    """Latents of images, for diffusion in place of the images.

    Batches are those of `ImageDataModule`, with normalised latents as "x0" in place of "images". To train on they are
    drawn from each image's distribution, to validate on they are its mean.

    Args:
        root: a folder that `unet-diffusion encode` wrote.
        batch_size: images a batch and process.
        num_val: images kept apart for validation, chosen by their names; None: about a tenth, at most 1000.
        horizontal_flip: use the mirror image of every second training image, drawn at random; it must have been
            encoded.
        scaling_factor: one scale for all channels in place of the measured moments, as a published model was trained
            with (0.18215 in Stable Diffusion 1); None: the measured moments.
        seed: of the order of the images, their mirroring, and the draws.

    Raises:
        ValueError: if a number is out of range.
    """

    kind = "latents"

    def __init__(
        self,
        root: str | Path,
        *,
        batch_size: int = 64,
        num_val: int | None = None,
        horizontal_flip: bool = False,
        scaling_factor: float | None = None,
        seed: int = 0,
    ) -> None:
        if scaling_factor is not None and not scaling_factor > 0:
            raise ValueError(f"scaling_factor must be above 0, got {scaling_factor}; null takes the measured moments")
        super().__init__(
            batch_size=batch_size, num_val=num_val, horizontal_flip=horizontal_flip, num_workers=0, seed=seed
        )
        self.root = root
        self.scaling_factor = scaling_factor
        self._codec: LatentCodec | None = None

    def load(self) -> ImageSet:
        """Read all latents.

        Raises:
            FileNotFoundError: if there are none, or they were not finished.
            ValueError: if mirror images are wanted and were not encoded.
        """
        self.latents = read_latents(self.root)
        if self.scaling_factor is not None:
            self.latents.space = self.latents.space.rescaled(self.scaling_factor)
        if self.horizontal_flip and not self.latents.has_mirrored:
            raise ValueError(
                f"horizontal_flip needs mirror images, and {self.root} has none; "
                "encode again with --horizontal_flip, or set it to false"
            )
        one_each = self.latents.mean[: len(self.latents)]
        latents = self.latents
        return ImageSet(one_each, latents.labels, latents.class_names, latents.captions, latents.names)

    @property
    def codec(self) -> LatentCodec:
        """What encoded the images, and decodes what is drawn."""
        if self._codec is None:
            self.image_set  # noqa: B018  # says what to do if they are not loaded yet
            self._codec = LatentCodec.of(self.latents.space)
        return self._codec

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Draw the latents, once their distribution is on the device, and normalise them."""
        mean, std = batch["images"].float(), batch["std"].float()
        if self.trainer is not None and self.trainer.training:
            step = self.trainer.fit_loop.total_batch_idx + 1  # of the batch that comes next
            generator = keyed_generator(self.seed, LATENT_KEY, step, self.trainer.global_rank, device=mean.device)
            mean = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
        rest = {key: value for key, value in batch.items() if key not in ("images", "std")}
        return {**rest, "x0": self.latents.space.normalise(mean)}

    def _loader_arguments(self) -> dict[str, Any]:
        return {**super()._loader_arguments(), "dataset": LatentBatches(self.latents)}


class LatentBatches(Dataset[Batch]):
    """Batches of latents by lists of indices; index + N stands for the mirror image of image `index`.

    Args:
        latents: of N images.
    """

    def __init__(self, latents: LatentSet) -> None:
        self.latents = latents

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, indices: list[int]) -> Batch:
        """{"images": means, "std": both (B, C, h, w) float16, "index": (B,) int64[, "labels": (B,) int64]}."""
        drawn = torch.tensor(indices)
        index = drawn % len(self)
        batch: dict[str, Tensor] = {
            "images": self.latents.mean.index_select(0, drawn),
            "std": self.latents.std.index_select(0, drawn),
            "index": index,
        }
        if self.latents.labels is not None:
            batch["labels"] = self.latents.labels[index]
        return batch
