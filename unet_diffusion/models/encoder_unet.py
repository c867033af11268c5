"""The U-Net of segmentation_models_pytorch, whose contracting path is a network for classification.

Its package (https://github.com/qubvel-org/segmentation_models.pytorch) builds it; nothing is downloaded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.messages import did_you_mean

DEPTH = 5  # of the encoders of the package: how often they halve height and width


class EncoderUNet(PixelNetwork):
    """Class scores of each pixel, (B, out_channels, H, W), from segmentation_models_pytorch's Unet.

    Args:
        in_channels: Channels of the image.
        out_channels: Number of classes.
        encoder_name: Name of the encoder in the package, such as "resnet34".
        options: Further arguments of the package's Unet, as plain values; None: its defaults.
        mean: What is subtracted from images in [0, 1], for all channels or for each.
        std: What they are divided by afterwards.

    Raises:
        ImportError: If the package is missing.
        ValueError: If the package has no such encoder.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        encoder_name: str,
        *,
        options: dict[str, Any] | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ):
        super().__init__()
        package = import_segmentation_models()
        _check_encoder_name(encoder_name, package)
        options = options or {}
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "encoder_name": encoder_name,
            "options": options,
            "mean": list(mean),
            "std": list(std),
        }
        self.unet = package.Unet(
            encoder_name, encoder_weights=None, in_channels=in_channels, classes=out_channels, **options
        )
        self.size_step = 2 ** options.get("encoder_depth", DEPTH)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor, t: None = None) -> Tensor:
        """Return the scores before the softmax, (B, out_channels, H, W), of images (B, in_channels, H, W) in [-1, 1].

        Raises:
            ValueError: If the network does not take the size.
        """
        self.check_size(*x.shape[-2:])
        return self.unet(((x + 1) / 2 - self.mean) / self.std)


def _check_encoder_name(name: str, package: Any) -> None:
    """Refuse an encoder that the package does not know: it would ask a server for some names."""
    import timm  # the package depends on it, and builds its networks by names with a prefix

    prefix, _, model = name.partition("-")
    is_of_timm = prefix in ("tu", "timm") and any(timm.is_model(known) for known in (model, f"tf_{model}"))
    if name not in package.encoders.encoders and not (is_of_timm and not set(model) & {":", "/"}):
        known = [*package.encoders.encoders, *(f"tu-{model}" for model in timm.list_models())]
        raise ValueError(f"encoder_name must be one of segmentation_models_pytorch's, got {name!r}"
                         f"{did_you_mean(name, known)}")  # fmt: skip


def import_segmentation_models() -> Any:
    """The package segmentation_models_pytorch.

    Raises:
        ImportError: If it is missing; the message names the extra that installs it.
    """
    try:
        import segmentation_models_pytorch
    except ImportError as error:
        raise ImportError(
            "this network needs the package segmentation_models_pytorch; pip install unet-diffusion[encoders]"
        ) from error
    return segmentation_models_pytorch
