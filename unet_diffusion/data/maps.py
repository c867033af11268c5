"""Data modules for networks with maps beside the noised image: parts to paint, and small images to enlarge.

Concat are drawn anew in each step, so that what is denoised is encoded in each step too, with the autoencoder in
memory.
"""

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unet_diffusion.data.base import ImageDataModule
from unet_diffusion.data.batches import Batch, ImageBatches
from unet_diffusion.data.scaling import scale_to_unit_range
from unet_diffusion.data.stream import Shards
from unet_diffusion.diffusion.conditions.concat import MAPS_KEY, Concat, Encode
from unet_diffusion.diffusion.conditions.low_resolution import LOW_RES_SCHEDULE, MAX_NOISE_LEVEL, LowResolution, shrink
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage, draw_masks, masked_image_maps
from unet_diffusion.runtime.randomness import keyed_generator

if TYPE_CHECKING:  # it imports diffusers, which the other data modules do without
    from unet_diffusion.models.autoencoders import Autoencoder


class ImagesWithMaps(ImageDataModule):
    """Images of another data module, and maps made of them; of latents, if there is an autoencoder.

    Batches are those of `ImageDataModule`, with normalised latents as "images", and "concat" (B, K, h, w). To train on,
    maps and latents are drawn in each step; to validate on, each image's maps stay the same and latents are means.
    A subclass defines `draw`, `entries` and `seen`.

    Args:
        images: where images come from, and how many make a batch.
        autoencoder: a run folder or a diffusers folder; None: images are denoised, not latents.
        scaling_factor: scale of the latents; None: that of the autoencoder's configuration.

    Attributes:
        gives: the condition that takes its maps.

    Raises:
        ValueError: if the scale is out of range, or the images are streamed.
    """

    gives: ClassVar[type[Concat]]

    def __init__(
        self,
        images: ImageDataModule,
        *,
        autoencoder: str | os.PathLike[str] | None = None,
        scaling_factor: float | None = None,
    ) -> None:
        if scaling_factor is not None and not scaling_factor > 0:
            raise ValueError(f"scaling_factor must be above 0, got {scaling_factor}; null takes the autoencoder's")
        if isinstance(images.source, Shards):
            raise ValueError("images must be in a folder or archive, got those of a stream, which have no maps yet")
        super().__init__(
            images.source,
            batch_size=images.batch_size,
            num_val=images.num_val,
            horizontal_flip=images.horizontal_flip,
            num_workers=images.num_workers,
            seed=images.seed,
        )
        self.images = images
        self.autoencoder_folder = autoencoder
        self.scaling_factor = scaling_factor
        self._autoencoder: Autoencoder | None = None

    def draw(self, shape: torch.Size, generator: torch.Generator) -> dict[str, Tensor]:
        """What is random in the maps of images of a shape (B, C, H, W): (B, ...) each, on the generator's device."""
        raise NotImplementedError(f"{type(self).__name__} must define draw()")

    def entries(self, images: Tensor, drawn: dict[str, Tensor], encode: Encode) -> dict[str, Tensor]:
        """Entries of a batch: "concat", and what else comes of images (B, C, H, W) in [-1, 1] and of what was drawn."""
        raise NotImplementedError(f"{type(self).__name__} must define entries()")

    def seen(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """What the network is shown of images (B, C, H, W), as images of the same size to look at."""
        raise NotImplementedError(f"{type(self).__name__} must define seen()")

    def setup(self, stage: str | None = None) -> None:
        """Load the images and the autoencoder.

        Raises:
            FileNotFoundError: If there are no images or no autoencoder.
            ValueError: If images cannot be used, or the autoencoder does not take them.
        """
        super().setup(stage)
        if self.autoencoder_folder is not None and self._autoencoder is None:
            from unet_diffusion.latents.codec import latent_space_of
            from unet_diffusion.models.autoencoders import pretrained_autoencoder

            self._autoencoder = pretrained_autoencoder(self.autoencoder_folder).eval()
            _, *image_shape = self.image_set.images.shape
            self.latent_space = latent_space_of(
                self._autoencoder, self.autoencoder_folder, image_shape, scaling_factor=self.scaling_factor
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is denoised."""
        channels, height, width = super().image_shape
        if self._autoencoder is None or self.latent_space is None:
            return channels, height, width
        from unet_diffusion.models.autoencoders import downsampling

        factor = downsampling(self._autoencoder)
        return len(self.latent_space.std), height // factor, width // factor

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Scale the images, draw what is random, and encode, once they are on the device."""
        if self.trainer is None or not self.trainer.training:
            return self._as_validated(batch)
        step = self.trainer.fit_loop.total_batch_idx + 1  # of the batch that comes next
        images = batch["images"]
        generator = keyed_generator(self.seed, MAPS_KEY, step, self.trainer.global_rank, device=images.device)
        return self._with_maps(batch, self.draw(images.shape, generator), generator)

    def examples(self, num: int, device: torch.device) -> Batch:
        """A batch of the first images that are kept apart, by turns, as they are validated on, and "seen" of them."""
        numbers = self.val_indices[torch.arange(num) % len(self.val_indices)].tolist()
        found = ImageBatches(self.image_set)
        parts = [found[numbers[i : i + self.batch_size]] for i in range(0, num, self.batch_size)]
        parts = [{name: one.to(device) for name, one in part.items()} for part in parts]
        shown = [self.seen(scale_to_unit_range(part["images"]), self._fixed(part)) for part in parts]
        done = [{**self._as_validated(part), "seen": one} for part, one in zip(parts, shown, strict=True)]
        return {name: torch.cat([one[name] for one in done]) for name in done[0]}

    def _as_validated(self, batch: Batch) -> Batch:
        return self._with_maps(batch, self._fixed(batch), None)

    def _fixed(self, batch: Batch) -> dict[str, Tensor]:
        """What is drawn for each image whenever it is validated on."""
        images = batch["images"]
        shape = torch.Size([1, *images.shape[1:]])
        each = [self.draw(shape, keyed_generator(self.seed, MAPS_KEY, index)) for index in batch["index"].tolist()]
        return {name: torch.cat([one[name] for one in each]).to(images.device) for name in each[0]}

    def _with_maps(self, batch: Batch, drawn: dict[str, Tensor], generator: torch.Generator | None) -> Batch:
        images = scale_to_unit_range(batch["images"])

        def encode(pixels: Tensor) -> Tensor:
            return self._encode(pixels, generator)

        return {**batch, "images": encode(images), **self.entries(images, drawn, encode)}

    @torch.no_grad()
    def _encode(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Normalised latents, (B, c, h, w) float32: drawn from their distribution, or without a generator its mean."""
        if self._autoencoder is None or self.latent_space is None:
            return pixels
        from unet_diffusion.models.autoencoders import latent_moments

        with nullcontext() if self.trainer is None else self.trainer.precision_plugin.forward_context():
            mean, std = (one.float() for one in latent_moments(self._autoencoder.to(pixels.device), pixels))
        if generator is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
        return self.latent_space.normalise(mean)


class InpaintingDataModule(ImagesWithMaps):
    """Images, and what masks leave of them, for a network that paints the rest; see `maps.MaskedImage`.

    Masks are one to four boxes, and in a quarter of the cases everything.

    Args:
        images: where images come from, and how many make a batch.
        autoencoder: a run folder or a diffusers folder; None: images are denoised, not latents.
        scaling_factor: scale of the latents; None: that of the autoencoder's configuration.

    Raises:
        ValueError: if the scale is out of range.
    """

    gives = MaskedImage

    def draw(self, shape: torch.Size, generator: torch.Generator) -> dict[str, Tensor]:
        return {"mask": draw_masks(shape[0], (shape[2], shape[3]), generator)}

    def entries(self, images: Tensor, drawn: dict[str, Tensor], encode: Encode) -> dict[str, Tensor]:
        return {"concat": masked_image_maps(images, drawn["mask"], encode)}

    def seen(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        return images * (1 - drawn["mask"])


class UpscalingDataModule(ImagesWithMaps):
    """Images, and small ones of the latents' size, for a network that enlarges; see `maps.LowResolution`.

    How far it enlarges is what the autoencoder divides by, 4 in Stable Diffusion. "labels" are levels of noise, 0 to
    350; classes of the images are left out.

    Args:
        images: where images come from, and how many make a batch.
        autoencoder: a run folder or a diffusers folder.
        scaling_factor: scale of the latents; None: that of the autoencoder's configuration.

    Raises:
        ValueError: if the scale is out of range.
    """

    gives = LowResolution

    def __init__(
        self,
        images: ImageDataModule,
        *,
        autoencoder: str | os.PathLike[str],
        scaling_factor: float | None = None,
    ) -> None:
        super().__init__(images, autoencoder=autoencoder, scaling_factor=scaling_factor)

    @property
    def class_names(self) -> None:
        """Levels of noise have none."""

    @property
    def num_classes(self) -> int:
        """Levels of noise that the network's class embedding has, whether they are used or not."""
        return LOW_RES_SCHEDULE.num_train_timesteps

    def draw(self, shape: torch.Size, generator: torch.Generator) -> dict[str, Tensor]:
        device, size = generator.device, (*shape[:2], *self.image_shape[1:])
        return {
            "level": torch.randint(MAX_NOISE_LEVEL + 1, shape[:1], generator=generator, device=device),
            "noise": torch.randn(size, generator=generator, device=device),
        }

    def entries(self, images: Tensor, drawn: dict[str, Tensor], encode: Encode) -> dict[str, Tensor]:
        return {"labels": drawn["level"], "concat": self._small(images, drawn)}

    def seen(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        return interpolate(self._small(images, drawn), images.shape[2:])

    def _small(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        _, height, width = self.image_shape
        return LOW_RES_SCHEDULE.add_noise(shrink(images, (height, width)), drawn["noise"], drawn["level"])
