"""What trained models share: the device, precision and speed of their networks, and their export."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from unet_diffusion.models.speed import Speed, keep_freed_memory, set_speed, speed_for_use
from unet_diffusion.runtime.precision import Precision, autocast, chosen_precision
from unet_diffusion.runtime.processes import own_device
from unet_diffusion.runtime.tensor_files import check_format

StrPath = str | os.PathLike[str]
ExportFormat = Literal["pipeline", "adapter", "onnx", "torch"]


class Running:
    """Base class of trained models: `to` sets their device, precision and speed, and `export` writes them for others.

    A loaded model runs on the CPU in float32 until `to` is called.

    Attributes:
        device: The device of the model.
        precision: The precision of computation; None: that of the weights, or of the surrounding autocast.
        formats: The formats that `export` has for the model.
    """

    formats: ClassVar[tuple[ExportFormat, ...]] = ("pipeline", "onnx", "torch")
    device = torch.device("cpu")
    precision: Precision | None = None

    def to(
        self,
        device: torch.device | str = "auto",
        *,
        precision: Precision | Literal["auto"] = "auto",
        speed: Speed | None = None,
    ) -> Self:
        """The model itself, moved to a device.

        Args:
            device: A device such as "cuda", "cuda:1", "mps" or "cpu"; "auto": a GPU, if there is one.
            precision: Precision of computation; "auto": 16 bits if the hardware supports it, otherwise float32.
            speed: Speed of the network, see `models.speed`; None: as in training, but without torch.compile.

        Raises:
            ValueError: If there is no such device, or it does not support the precision.
        """
        self.device = torch.device(own_device(str(device)))
        self.precision = chosen_precision(precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        for module in self._modules_to_move():
            module.to(self.device)
        for network, trained_at in self._networks():
            set_speed(network, speed or speed_for_use(trained_at, self.device))
        return self

    def export(self, folder: StrPath, *, format: ExportFormat = "pipeline", overwrite: bool = False) -> None:
        """Write a folder or file that needs this package no more, except for a folder of a segmenter.

        Args:
            folder: The folder to make. A name that ends in .safetensors makes one file of weights: for a denoiser or an
                autoencoder in the layout of latent diffusion or Stable Diffusion, for a segmenter with the names inc,
                down1 ..., up1 ..., outc. It appears whole or not at all.
            format: "pipeline" is the whole model: a pipeline of diffusers, with an adapter merged into its weights; an
                autoencoder of diffusers, with the latents' scale if it is known; or the folder of `save_pretrained` of
                a segmenter, for which diffusers has no pipeline. "adapter" is the adapter of a denoiser alone, which
                the pipeline of its base loads. "onnx" and "torch" are networks for ONNX and by torch.export, for any
                batch and size: that of a denoiser and the decoder of its latents, the decoder of an autoencoder, or
                that of a segmenter, whose ONNX `load` and `segment` read, too.
            overwrite: Replace the folder, if everything in it was exported there, or the file.

        Raises:
            FileExistsError: If the folder exists and overwrite is False, or if it holds other files.
            ImportError: If a package that the format needs is missing.
            ValueError: If the model has no such format, or does not fit it; the message says why.
        """
        check_format(folder, format, self.formats)
        self._export(folder, format, overwrite=overwrite)

    def _export(self, folder: StrPath, format: ExportFormat, *, overwrite: bool) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define _export()")

    def _context(self) -> AbstractContextManager[Any]:
        """The autocast context for the precision."""
        return nullcontext() if self.precision is None else autocast(self.device.type, getattr(torch, self.precision))

    def _modules_to_move(self) -> list[nn.Module]:
        raise NotImplementedError(f"{type(self).__name__} must define _modules_to_move()")

    def _networks(self) -> list[tuple[nn.Module, Speed]]:
        """The networks that have a speed, each with the speed of its training."""
        return []
