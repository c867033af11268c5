"""Codecs turn images into x0, which is denoised, and back: the identity for pixels, or an autoencoder.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, section 3.1): diffusion takes place in the latents of an
autoencoder that was trained before. Training, sampling and export call a codec and need not know which one it is.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unet_diffusion.latents.space import MOMENTS, LatentSpace, fingerprint
from unet_diffusion.models.unet import check_config

if TYPE_CHECKING:  # it imports diffusers, which takes seconds and which pixels do not need
    from unet_diffusion.models.autoencoders import AutoencoderNetwork

Shape = tuple[int, int, int]
DECODED_AT_ONCE = 16  # images per batch; a decoder takes more memory than a denoiser


class Codec:
    """Turns images into x0, and x0 into images.

    For a codec of your own, write a subclass in a file of your own and name it in the configuration. Define
    `sample_shape`, `image_shape`, `encode` and `decode`, and set `config`, from which a checkpoint builds the codec.

    Attributes:
        config: The constructor's arguments by name, as plain values. It is None for pixels and autoencoders, which a
            checkpoint describes by `space`.
        clip_sample: Whether sampling may clip each estimate of x0 to [-1, 1], because x0 lies in that range.
        space: The latent space of an autoencoder, which checkpoints store; None for all other codecs.
        name: The word for x0 in a sentence: "images" or "latents".
        is_random: Whether `encode` draws x0 from a distribution in training.
    """

    config: dict[str, Any] | None = None
    clip_sample: bool = False
    space: LatentSpace | None = None
    name: str = "latents"
    is_random: bool = True

    def sample_shape(self, image_shape: Shape) -> Shape:
        """The shape (C, h, w) of x0 for images of a shape (C, H, W).

        Raises:
            ValueError: If the codec cannot encode images of this shape.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sample_shape()")

    def image_shape(self, sample_shape: Shape) -> Shape:
        """The shape (C, H, W) of images for x0 of a shape (C, h, w)."""
        raise NotImplementedError(f"{type(self).__name__} must define image_shape()")

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The x0 of images, (B, C, h, w) float32, on their device.

        Args:
            images: Images, (B, C, H, W) in [-1, 1].
            generator: Generator that samples x0 from its distribution, as in training; None: the mean.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode()")

    def decode(self, x0: Tensor) -> Tensor:
        """The images of x0, (N, C, H, W) float32 on the CPU, in about [-1, 1].

        Args:
            x0: Denoised images or latents, (N, C, h, w), on any device.
        """
        raise NotImplementedError(f"{type(self).__name__} must define decode()")

    def to(self, device: torch.device | str) -> None:
        """Encode and decode on this device from now on."""

    def check(self) -> None:
        """Raise an error if a file that the codec needs is missing or was replaced."""

    def release(self) -> None:
        """Free the memory of networks that were loaded only to decode; they load again when needed."""

    def check_config(self) -> None:
        """Check that a checkpoint can build the codec again.

        Raises:
            ValueError: If a user's own codec has a `config` that does not hold its constructor's arguments.
        """
        if self.config is None and type(self) in (PixelCodec, LatentCodec):
            return
        check_config(self)

    @property
    def space_record(self) -> dict[str, Any] | None:
        """The latent space as plain values, for checkpoints; None if there is none."""
        return None if self.space is None else self.space.plain()

    @property
    def downsampling(self) -> int:
        """The height of an image divided by the height of its x0."""
        return self.image_shape((1, 1, 1))[1]


class PixelCodec(Codec):
    """The identity: x0 is the image itself."""

    clip_sample = True
    name = "images"
    is_random = False

    def sample_shape(self, image_shape: Shape) -> Shape:
        return image_shape

    def image_shape(self, sample_shape: Shape) -> Shape:
        return sample_shape

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return images

    def decode(self, x0: Tensor) -> Tensor:
        return x0.float().cpu()


class LatentCodec(Codec):
    """An autoencoder and the normalisation of its latents to mean 0 and standard deviation 1 per channel.

    Checkpoints hold the path and a fingerprint of the autoencoder, not its weights.

    Args:
        autoencoder: Folder of the autoencoder: a run folder or a diffusers folder.
        scaling_factor: One scale for all channels, such as 0.18215 in Stable Diffusion 1; None: the normalisation in
            the autoencoder's configuration.

    Raises:
        ValueError: If scaling_factor is not above 0.
    """

    def __init__(self, autoencoder: str | os.PathLike[str], *, scaling_factor: float | None = None) -> None:
        if scaling_factor is not None and not scaling_factor > 0:
            raise ValueError(
                f"scaling_factor must be above 0, got {scaling_factor}; leave it out to use the autoencoder's own"
            )
        self.folder = autoencoder
        self.scaling_factor = scaling_factor
        self._autoencoder: AutoencoderNetwork | None = None
        self._device = torch.device("cpu")
        self._is_only_to_decode = False

    @classmethod
    def of(cls, space: LatentSpace, autoencoder: str | os.PathLike[str] | None = None) -> "LatentCodec":
        """The codec of existing latents; it loads the autoencoder when first needed.

        Args:
            space: The latent space.
            autoencoder: Current folder of the autoencoder; None: the folder that `space` names.
        """
        codec = cls(space.autoencoder if autoencoder is None else autoencoder)
        codec.space, codec._is_only_to_decode = space, True
        return codec

    @property
    def autoencoder(self) -> "AutoencoderNetwork":
        """The autoencoder, in eval mode.

        Raises:
            FileNotFoundError: If the autoencoder is not in its folder.
            ValueError: If the folder holds another autoencoder.
        """
        if self._autoencoder is None:
            if self.space is None:
                from unet_diffusion.models.autoencoders import pretrained_autoencoder

                autoencoder = pretrained_autoencoder(self.folder).eval()
            else:
                autoencoder = _autoencoder_of(self.space, self.folder)
            self._autoencoder = autoencoder.to(self._device)
        return self._autoencoder

    def sample_shape(self, image_shape: Shape) -> Shape:
        if self.space is None:  # the autoencoder is still on the CPU, as its fingerprint requires
            self.space = latent_space_of(self.autoencoder, self.folder, image_shape, scaling_factor=self.scaling_factor)
        factor = self.space.downsampling
        _check_image_shape(image_shape, self.space.image_shape[0], factor, self.folder)
        return len(self.space.std), image_shape[1] // factor, image_shape[2] // factor

    def image_shape(self, sample_shape: Shape) -> Shape:
        factor = self.downsampling
        return self._space.image_shape[0], sample_shape[1] * factor, sample_shape[2] * factor

    @property
    def downsampling(self) -> int:
        return self._space.downsampling

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        from unet_diffusion.models.autoencoders import latent_moments

        self.to(images.device)
        mean, std = (moment.float() for moment in latent_moments(self.autoencoder, images))
        if generator is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
        return self._space.normalise(mean)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        return decode_latents(self.autoencoder, self._space, x0)

    def to(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        if self._autoencoder is not None:
            self._autoencoder.to(self._device)

    def check(self) -> None:
        self.autoencoder  # noqa: B018  # loads it

    def release(self) -> None:
        if self._is_only_to_decode:
            self._autoencoder = None

    @property
    def _space(self) -> LatentSpace:
        assert self.space is not None, "sample_shape must be called with the shape of the images first"
        return self.space


def latent_space_of(
    autoencoder: "AutoencoderNetwork",
    folder: str | os.PathLike[str],
    image_shape: Sequence[int],
    *,
    scaling_factor: float | None = None,
) -> LatentSpace:
    """The latent space of an autoencoder, normalised as its configuration says, or by one scale for all channels.

    Args:
        autoencoder: The autoencoder, float32 and on the CPU.
        folder: Folder of the autoencoder.
        image_shape: (C, H, W) of the images.
        scaling_factor: The scale; None: the scale, means and deviations in the autoencoder's configuration.

    Raises:
        ValueError: If the autoencoder does not take images of this shape, or its scale is not known.
    """
    from unet_diffusion.models.autoencoders import downsampling, num_latent_channels

    channels, height, width = image_shape
    factor, in_channels = downsampling(autoencoder), autoencoder.config["in_channels"]
    _check_image_shape(image_shape, in_channels, factor, folder)
    count = num_latent_channels(autoencoder)
    space = LatentSpace(
        autoencoder=str(Path(folder).resolve()),
        fingerprint=fingerprint(autoencoder, autoencoder.config),
        image_shape=(channels, height, width),
        downsampling=factor,
        mean=(0.0,) * count,
        std=(1.0,) * count,
    )
    if scaling_factor is not None:
        return space.rescaled(scaling_factor)
    # diffusers' pipelines for Stable Diffusion XL decode latents * latents_std / scaling_factor + latents_mean.
    mean, std = (autoencoder.config.get(name) for name in MOMENTS)
    scale = autoencoder.config["scaling_factor"]
    if scale is None:
        raise ValueError(
            f"{folder} does not say by which scaling_factor its latents are divided; set it: 0.18215 for autoencoders "
            "of Stable Diffusion 1 and 2, 0.13025 for those of XL"
        )
    return replace(space, mean=tuple(mean or space.mean), std=tuple(value / scale for value in std or space.std))


def _check_image_shape(
    image_shape: Sequence[int], in_channels: int, factor: int, folder: str | os.PathLike[str]
) -> None:
    channels, height, width = image_shape
    if channels != in_channels or height % factor or width % factor:
        raise ValueError(
            f"images must have {in_channels} channels and multiples of {factor} pixels for the autoencoder in "
            f"{folder}, got {channels} channels of {height}x{width}; set channels and image_size of the images"
        )


@torch.no_grad()
def decode_latents(autoencoder: "AutoencoderNetwork", space: LatentSpace, latents: Tensor) -> Tensor:
    """The images of normalised latents, (N, C, H, W) float32 on the CPU, in about [-1, 1].

    Args:
        autoencoder: The autoencoder, on any device.
        space: The latent space.
        latents: Normalised latents, (N, c, h, w), on any device.
    """
    device = next(autoencoder.parameters()).device
    raw = space.denormalise(latents.float())
    parts = raw.split(DECODED_AT_ONCE)
    return torch.cat([autoencoder.decode(part.to(device)).sample.float().cpu() for part in parts])


def _autoencoder_of(space: LatentSpace, folder: str | os.PathLike[str]) -> "AutoencoderNetwork":
    """The autoencoder of a latent space, on the CPU and in eval mode.

    Raises:
        FileNotFoundError: If the autoencoder is not in the folder.
        ValueError: If the folder holds another autoencoder.
    """
    from unet_diffusion.models.autoencoders import pretrained_autoencoder

    try:
        autoencoder = pretrained_autoencoder(folder).eval()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; name its current folder with --autoencoder DIR (autoencoder= in Python)"
        ) from error
    if fingerprint(autoencoder, autoencoder.config) != space.fingerprint:
        raise ValueError(
            f"{folder} must hold the autoencoder that made the latents, and it was trained further or replaced since; "
            "restore it, or encode the images and train the denoiser again"
        )
    return autoencoder
