"""The conditions of held-out images, which a denoiser draws for in an evaluation."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.diffusion.conditions.condition import CONDITION_KEY, Encode
from unet_diffusion.diffusion.conditions.low_resolution import NOISE_LEVEL, LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage, draw_masks
from unet_diffusion.diffusion.conditions.of_images import Draws, bind_conditions, draws_of_images, entries_of_images
from unet_diffusion.evaluation.selections import BATCH, classes_of, images_of
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.sample_options import SampleOptions, Sampling
from unet_diffusion.runtime.randomness import keyed_generator


class HeldOutConditions:
    """What a denoiser's conditions read of the held-out images, which are drawn for by turns in a random order.

    Small images have the noise level that `sample` gives them by default. Masks are those of training, without those
    that cover a whole image and leave nothing to follow.

    Args:
        denoiser: The denoiser, whose conditions learn of the data.
        data: The data, loaded.
        sampling: How samples are drawn; its seed decides the order, the masks and the noise.

    Attributes:
        numbers: The numbers of the held-out images in the data, (n,) int64, in the order in which they are drawn for.
        num_steps: The number of calls of the network per batch.

    Raises:
        ValueError: If the data lack what a condition reads, or the samples cannot be drawn like this.
    """

    def __init__(self, denoiser: Denoiser, data: ImageDataModule, sampling: Sampling) -> None:
        self.denoiser, self.data, self.sampling = denoiser, data, sampling
        self.conditions = denoiser.all_conditions
        self._bind()
        order = torch.randperm(len(data.val_indices), generator=keyed_generator(sampling.seed))
        self.numbers = data.val_indices[order]
        self._batches = data.source.batches(data.image_set)
        self.num_steps: int = self._drawing([0]).num_steps  # refuses options that do not fit

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def labels(self) -> Tensor | None:
        """The class of each held-out image, (n,) int64, in their order; None if there are no classes."""
        labels = classes_of(self.data)
        return None if labels is None else labels[self.numbers]

    @property
    def contents(self) -> str:
        """A hash of the held-out images and all that conditions read of them, in their order."""
        digest = hashlib.sha256()
        entries, keys = self.data.entries, {"images", *(one.batch_key for one in self.conditions)}
        for numbers in self.numbers.split(BATCH):
            batch = self._batches[numbers.tolist()]
            for key in sorted(keys & {*batch, *entries}):
                rows = entries.get(key)
                texts = [rows[number] for number in numbers.tolist()] if isinstance(rows, list) else None
                digest.update(batch[key].numpy().tobytes() if texts is None else repr(texts).encode())
        return digest.hexdigest()

    def numbers_of(self, rows: Sequence[int] | Tensor) -> Tensor:
        """The number in the data of the held-out image of each sample, (B,) int64.

        Args:
            rows: The numbers of B samples.
        """
        return self.numbers[torch.as_tensor(rows) % len(self.numbers)]

    def batch(self, rows: Sequence[int] | Tensor) -> dict[str, Any]:
        """The held-out images of samples with what conditions read of them, as pixels, on the CPU.

        Args:
            rows: The numbers of B samples.

        Returns:
            "images" (B, C, H, W) in [-1, 1], the entries of the conditions and the random numbers behind these; where
            conditions encode images, the images themselves.
        """
        batch = self._read(rows)
        batch["images"] = images_of(self.data, batch)
        return self._with_entries(batch, lambda images: images)

    def draw(self, rows: Sequence[int], progress: Callable[[int], object] | None = None) -> Tensor:
        """Samples, (B, C, H, W) float32 on the CPU, in about [-1, 1]; what a mask leaves of an image is pasted.

        Args:
            rows: The numbers of B samples; those beyond the batch size of sampling are read when their batch is drawn.
            progress: Called with the number of images that took a step.
        """
        parts = torch.as_tensor(rows).split(self.sampling.batch_size)
        return torch.cat([self._batch_drawn(part.tolist(), progress) for part in parts])

    def _batch_drawn(self, rows: Sequence[int], progress: Callable[[int], object] | None) -> Tensor:
        images = self._drawing(rows).draw(range(len(rows)), progress)
        if self.denoiser.condition(MaskedImage) is None:
            return images
        batch = self.batch(rows)
        return torch.where(batch["mask"] == 1, images, batch["images"])

    def _bind(self) -> None:
        """Have the conditions learn of the data, and refuse data that do not fit them."""
        if self.data.codec is not None:
            for condition in self.conditions:
                if condition.provides:
                    raise ValueError(f"{type(condition).__name__} needs images, and the data hold latents; give the "
                                     "images, with --data.source Folder --data.root DIR")  # fmt: skip
        bind_conditions(self.conditions, self.denoiser.sample_shape, self.data)

    def _read(self, rows: Sequence[int] | Tensor) -> dict[str, Any]:
        return dict(self.data.source.on_device(self._batches[self.numbers_of(rows).tolist()], None))

    def _with_entries(self, batch: dict[str, Any], encode: Encode) -> dict[str, Any]:
        return entries_of_images(self.conditions, batch, self._draws(batch), encode=encode)

    def _draws(self, batch: dict[str, Any]) -> Draws:
        """The random numbers behind provided entries."""
        if not any(one.provides for one in self.conditions):
            return []
        images, numbers, seed = batch["images"], batch["index"].tolist(), self.sampling.seed
        draws = draws_of_images(self.conditions, images, numbers, seed)
        for condition, drawn in draws:
            if isinstance(condition, LowResolution) and condition.config["noise"]:
                drawn["level"] = torch.full_like(drawn["level"], NOISE_LEVEL)
            if isinstance(condition, MaskedImage):
                keys = [keyed_generator(seed, CONDITION_KEY, number) for number in numbers]
                drawn["mask"] = torch.cat([_mask_of_a_part((images.shape[2], images.shape[3]), key) for key in keys])
        return draws

    def _drawing(self, rows: Sequence[int]) -> Any:
        """The drawing of samples for what the conditions read, on the CPU."""
        batch = self._with_entries(self._read(rows), self.denoiser.encode)
        entries = {one.batch_key: batch[one.batch_key] for one in self.conditions}
        options = SampleOptions(num_images=len(rows), **asdict(self.sampling))
        return self.denoiser.drawing(options, numbers=list(rows), entries=entries)


def _mask_of_a_part(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A mask as in training that leaves something of the image, (1, 1, H, W) float32."""
    mask = draw_masks(1, size, generator)
    while mask.all():
        mask = draw_masks(1, size, generator)
    return mask
