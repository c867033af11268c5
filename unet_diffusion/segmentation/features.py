"""A pixel classifier on the maps of a frozen denoiser (Baranchuk et al. 2022, https://arxiv.org/abs/2112.03126).

The image is noised to a few timesteps; the maps of the denoiser's expanding path, enlarged to the size of the image,
are the features of each pixel. The paper's code stores the features of all images; here each batch computes its own, so
that memory does not grow with the number of images.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.double_conv import DoubleConv
from unet_diffusion.models.residual_blocks import UpBlock
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.models.unet import PixelNetwork
from unet_diffusion.runtime.randomness import keyed_generator

NOISE_SEED = 0  # every image gets the same noise, as in the paper


class FeatureClassifier(PixelNetwork):
    """Class scores of each pixel from the features of a denoiser that is not trained.

    Args:
        denoiser: A network with a timestep embedding and without classes; its weights are frozen.
        schedule: The noise schedule that it was trained with.
        out_channels: Number of classes.
        timesteps: Timesteps to which the image is noised; 50, 150 and 250 of 1000 in the paper.
        levels: Levels of the expanding path whose maps are features, 0 is full resolution; the paper takes those in the
            middle. A SegmentationUNet has one level less than `channels`, as its path begins above the bottom.
        hidden_channels: Widths of the pixel classifier's two hidden layers.

    Raises:
        ValueError: If a timestep or level does not exist, there are not two hidden layers, or the denoiser takes no
            timestep, changes the size or has classes.
    """

    def __init__(
        self,
        denoiser: DenoiserUNet | SegmentationUNet,
        schedule: NoiseSchedule,
        *,
        out_channels: int = 2,
        timesteps: Sequence[int] = (50, 150, 250),
        levels: Sequence[int] = (0, 1, 2),
        hidden_channels: Sequence[int] = (128, 32),
    ):
        super().__init__()
        _check_arguments(denoiser, schedule, timesteps, levels, hidden_channels)
        self.denoiser = denoiser.requires_grad_(False).eval()
        self.schedule = schedule
        self.timesteps = list(timesteps)
        self.levels = sorted(levels)
        first, second = hidden_channels
        widths = [_width_of(denoiser.up_blocks[-1 - level]) for level in self.levels] * len(self.timesteps)
        # The paper's first layer takes all maps, enlarged and concatenated. It is linear: it may come before enlarging.
        self.projections = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, first, 1)) for width in widths
        )
        self.classifier = nn.Sequential(
            nn.ReLU(), nn.Conv2d(first, second, 1), nn.ReLU(), nn.Conv2d(second, out_channels, 1)
        )
        self.size_step = denoiser.size_step
        self.config: dict[str, Any] = {
            "denoiser": {
                "class_path": f"{type(denoiser).__module__}.{type(denoiser).__qualname__}",
                "init_args": denoiser.config,
            },
            "schedule": schedule.config,
            "out_channels": out_channels,
            "timesteps": self.timesteps,
            "levels": self.levels,
            "hidden_channels": list(hidden_channels),
        }

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.denoiser.in_channels

    def train(self, mode: bool = True) -> "FeatureClassifier":
        """Set the training mode of the classifier; the denoiser stays in eval mode."""
        super().train(mode)
        self.denoiser.eval()
        return self

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Return class scores before the softmax, (B, out_channels, H, W).

        Args:
            x: Images in [-1, 1], (B, in_channels, H, W), of a size that `check_size` accepts.
            t: Ignored: the classifier has timesteps of its own.

        Raises:
            ValueError: If the denoiser does not take the size.
        """
        projections = iter(self.projections)
        projected = [
            [next(projections)(features) for features in self.maps(x, timestep)] for timestep in self.timesteps
        ]
        # Enlarged maps take most of the memory and time, so maps of one size are added first.
        sums = [sum(same_size) for same_size in zip(*projected, strict=True)]
        hidden = sum(F.interpolate(maps, size=x.shape[-2:], mode="bilinear") for maps in sums)
        return self.classifier(hidden)

    @torch.no_grad()
    def maps(self, x: Tensor, timestep: int) -> list[Tensor]:
        """Return the maps of the denoiser's expanding path on `levels`, finest first, for images that are noised.

        Args:
            x: Images in [-1, 1], (B, C, H, W).
            timestep: Timestep to which they are noised, in [0, num_train_timesteps).
        """
        maps: dict[int, Tensor] = {}
        hooks = [
            _before_enlarging(self.denoiser.up_blocks[-1 - level]).register_forward_hook(
                lambda *call, at=level: maps.update({at: call[2]})
            )
            for level in self.levels
        ]
        generator = keyed_generator(NOISE_SEED)  # on the CPU, so that every device gets the same noise
        noise = torch.randn(x.shape[1:], generator=generator).to(x.device, x.dtype).expand_as(x)
        t = torch.full((len(x),), timestep, device=x.device)
        try:
            self.denoiser(self.schedule.add_noise(x, noise, t), t)
        finally:
            for hook in hooks:
                hook.remove()
        return [maps[level] for level in self.levels]


def _before_enlarging(block: nn.Module) -> nn.Module:
    """The module whose output is the map of a level; a level of a SegmentationUNet enlarges first."""
    return cast(nn.Module, block.attentions[-1]) if isinstance(block, UpBlock) else block


def _width_of(block: nn.Module) -> int:
    """The channels of the map of a level."""
    last = block.resnets[-1].conv2 if isinstance(block, UpBlock) else cast(DoubleConv, block.double_conv).conv2
    return cast(nn.Conv2d, last).out_channels


def _check_arguments(
    denoiser: DenoiserUNet | SegmentationUNet,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    levels: Sequence[int],
    hidden_channels: Sequence[int],
) -> None:
    num_levels = len(denoiser.up_blocks)
    if denoiser.time_embedding is None or denoiser.margin:
        raise ValueError("the denoiser must take a timestep and keep height and width; set its timestep_embedding to "
                         "true, and its padding to same")  # fmt: skip
    if denoiser.class_embedding is not None:
        raise ValueError(
            f"the denoiser must have no classes, as images to segment have none, got {denoiser.num_class_embeds} class "
            "embeddings; train a denoiser without classes"
        )
    if any(not 0 <= t < schedule.num_train_timesteps for t in timesteps) or not timesteps:
        raise ValueError(f"timesteps must be in [0, {schedule.num_train_timesteps}), got {list(timesteps)}")
    if any(not 0 <= level < num_levels for level in levels) or not levels:
        raise ValueError(f"levels must be in [0, {num_levels}), got {list(levels)}")
    if len(hidden_channels) != 2:
        raise ValueError(f"hidden_channels must be the widths of two layers, got {list(hidden_channels)}")
