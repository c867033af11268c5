"""A trained autoencoder, which turns images into latents and latents into images."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unet_diffusion.inference.record import write_checkpoint
from unet_diffusion.inference.running import ExportFormat, Running, StrPath
from unet_diffusion.runtime.pixel_values import PixelValues
from unet_diffusion.runtime.tensor_files import is_single_file_name

if TYPE_CHECKING:  # it imports diffusers, which takes seconds
    from unet_diffusion.models.autoencoders import AutoencoderNetwork


@dataclass(repr=False)
class Autoencoder(Running):
    """A trained autoencoder. `unet_diffusion.load` reads one from files.

    Args:
        autoencoder: An AutoencoderKL or VQModel of diffusers with its averaged (EMA) weights.
        image_shape: (C, H, W) of the images that it was trained on, in pixels.
        latent_std: Standard deviation of the latents of its validation images; None: it is not known. That is so for a
            checkpoint, which may be older or newer than the last validation.
        settings: The settings of its training as plain values.
        values: What the numbers in the files of its images mean, and which channels pictures show.
    """

    autoencoder: "AutoencoderNetwork"
    image_shape: tuple[int, int, int]
    latent_std: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    values: PixelValues = field(default_factory=PixelValues)

    def encode(self, images: Tensor) -> Tensor:
        """The latents of images, (B, c, h, w) float32 on the CPU: the means of their distributions, not normalised.

        Args:
            images: Images, (B, C, H, W) in [-1, 1]; H and W must be multiples of the downsampling.
        """
        return self.latent_moments(images)[0]

    @torch.no_grad()
    def latent_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents' distributions, (B, c, h, w) float32 on the CPU; codes have deviation 0.

        Args:
            images: As in `encode`.
        """
        from unet_diffusion.models.autoencoders import latent_moments

        with self._context():
            mean, std = latent_moments(self.autoencoder, images.to(self.device))
            return mean.float().cpu(), std.float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents, (B, C, H, W) float32 on the CPU, in about [-1, 1].

        Args:
            latents: Latents from `encode`, (B, c, h, w).
        """
        with self._context():
            return self.autoencoder.decode(latents.to(self.device)).sample.float().cpu()

    def save(self, path: StrPath) -> None:
        """Write a checkpoint file that `load` reads.

        Raises:
            FileExistsError: If the file exists; nothing is overwritten.
        """
        write_checkpoint(path, "autoencoder", self.record(), {"autoencoder": self.autoencoder})

    def record(self) -> dict[str, Any]:
        """The plain values that a checkpoint holds beside the weights."""
        config = json.loads(self.autoencoder.to_json_string())
        return {
            "class_name": type(self.autoencoder).__name__,
            "config": {name: value for name, value in config.items() if name[0] != "_"},
            "image_shape": list(self.image_shape),
            "settings": self.settings,
            "values": self.values.plain(),
        }

    def _export(self, folder: StrPath, format: ExportFormat, *, overwrite: bool) -> None:
        if format in ("onnx", "torch"):
            from unet_diffusion.inference.portable import export_decoder
            from unet_diffusion.models.autoencoders import downsampling, num_latent_channels

            shape = num_latent_channels(self.autoencoder), downsampling(self.autoencoder)
            export_decoder(self.autoencoder, *shape, folder, format=format, overwrite=overwrite)
            return
        if is_single_file_name(folder):
            from unet_diffusion.diffusers_io.single_file.exporting import check_values, export_autoencoder_file

            check_values(self.values)
            export_autoencoder_file(
                self.autoencoder,
                folder,
                image_shape=self.image_shape,
                latent_std=self.latent_std,
                overwrite=overwrite,
            )
            return
        from unet_diffusion.diffusers_io.exporting import export_autoencoder

        export_autoencoder(
            self.autoencoder,
            folder,
            image_shape=self.image_shape,
            latent_std=self.latent_std,
            settings=self.settings,
            values=self.values,
            overwrite=overwrite,
        )

    def __repr__(self) -> str:
        weights = sum(parameter.numel() for parameter in self.autoencoder.parameters())
        size = " x ".join(map(str, self.image_shape))
        return (
            f"Autoencoder of {size} images, {type(self.autoencoder).__name__} of {weights / 1e6:.2f} M weights; on "
            f"{self.device} in {self.precision or 'float32'}"
        )

    def _modules_to_move(self) -> list[nn.Module]:
        return [self.autoencoder]
