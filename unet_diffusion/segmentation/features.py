"""A pixel classifier on the maps of a frozen denoiser (Baranchuk et al. 2022, https://arxiv.org/abs/2112.03126).

The image is noised to a few timesteps, and the maps that the denoiser's expanding path makes of it, enlarged to the
image's size, say what each pixel is. Unlike in the paper's code no features are kept: they are made anew for each
batch, so that memory is that of a batch, whatever the number of images.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.blocks import UpBlock
from unet_diffusion.models.unet import DenoiserUNet, PixelNetwork
from unet_diffusion.runtime.randomness import keyed_generator

NOISE_SEED = 0  # the same noise for every image, as in the paper


class FeatureClassifier(PixelNetwork):
    """Class scores of each pixel from the features of a denoiser that is not trained.

    Args:
        denoiser: a network without classes; its weights are frozen.
        schedule: the one that it was trained with.
        out_channels: classes.
        timesteps: at which the image is noised and looked at; 50, 150 and 250 of 1000 in the paper.
        levels: of the expanding path whose maps are taken, 0 is full resolution; those in the middle are the paper's.
        hidden_channels: widths of the pixel classifier's two hidden layers.

    Raises:
        ValueError: if a timestep or level does not exist, there are not two hidden layers, or the denoiser has classes.
    """

    time_embedding = None  # of its own: the timesteps are chosen here
    class_embedding = None

    def __init__(
        self,
        denoiser: DenoiserUNet,
        schedule: NoiseSchedule,
        *,
        out_channels: int = 2,
        timesteps: Sequence[int] = (50, 150, 250),
        levels: Sequence[int] = (0, 1, 2),
        hidden_channels: Sequence[int] = (128, 32),
    ):
        super().__init__()
        num_levels = len(denoiser.config["channels"])
        if denoiser.class_embedding is not None:
            raise ValueError("the denoiser must have no classes, as images to segment have none; train one without")
        if any(not 0 <= t < schedule.num_train_timesteps for t in timesteps) or not timesteps:
            raise ValueError(f"timesteps must be in [0, {schedule.num_train_timesteps}), got {list(timesteps)}")
        if any(not 0 <= level < num_levels for level in levels) or not levels:
            raise ValueError(f"levels must be in [0, {num_levels}), got {list(levels)}")
        if len(hidden_channels) != 2:
            raise ValueError(f"hidden_channels must be the widths of two layers, got {list(hidden_channels)}")
        self.denoiser = denoiser.requires_grad_(False)
        self.schedule = schedule
        self.timesteps = list(timesteps)
        self.levels = sorted(levels)
        first, second = hidden_channels
        widths = [denoiser.config["channels"][level] for level in self.levels] * len(self.timesteps)
        # The paper's first layer, on all maps enlarged and concatenated; being linear, it is applied before enlarging.
        self.projections = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width, affine=False), nn.Conv2d(width, first, 1)) for width in widths
        )
        self.classifier = nn.Sequential(
            nn.ReLU(), nn.Conv2d(first, second, 1), nn.ReLU(), nn.Conv2d(second, out_channels, 1)
        )
        self.margin, self.smallest_size = denoiser.margin, denoiser.smallest_size
        self.config: dict[str, Any] = {
            "denoiser": {
                "class_path": f"{DenoiserUNet.__module__}.{DenoiserUNet.__qualname__}",
                "init_args": denoiser.config,
            },
            "schedule": schedule.config,
            "out_channels": out_channels,
            "timesteps": self.timesteps,
            "levels": self.levels,
            "hidden_channels": list(hidden_channels),
        }

    def train(self, mode: bool = True) -> "FeatureClassifier":
        """Switches the classifier; the denoiser is never in training mode."""
        super().train(mode)
        self.denoiser.eval()
        return self

    def forward(
        self, x: Tensor, t: Tensor | None = None, labels: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Class scores before the softmax, (B, out_channels, H, W).

        Args:
            x: images in [-1, 1], (B, in_channels, H, W), H and W as `next_size` gives them.
            t: not used, nor are labels and context.
            labels: see t.
            context: see t.

        Raises:
            ValueError: if the size does not fit.
        """
        projections = iter(self.projections)
        # Added up one by one: all maps of the image's size together would take most of the memory.
        hidden = sum(
            F.interpolate(next(projections)(features), size=x.shape[-2:], mode="bilinear")
            for timestep in self.timesteps
            for features in self.maps(x, timestep)
        )
        return self.classifier(hidden)

    @torch.no_grad()
    def maps(self, x: Tensor, timestep: int) -> list[Tensor]:
        """What the denoiser's expanding path makes of images noised to a timestep, finest level first.

        Args:
            x: images in [-1, 1], (B, C, H, W).
            timestep: in [0, num_train_timesteps).
        """
        found: dict[int, Tensor] = {}
        up_blocks = cast(list[UpBlock], list(reversed(self.denoiser.up_blocks)))  # by level
        hooks = [
            up_blocks[level].attentions[-1].register_forward_hook(lambda *call, at=level: found.update({at: call[2]}))
            for level in self.levels
        ]
        generator = keyed_generator(NOISE_SEED)  # on the CPU: the same on all devices
        noise = torch.randn(x.shape[1:], generator=generator).to(x.device, x.dtype).expand_as(x)
        t = torch.full((len(x),), timestep, device=x.device)
        try:
            self.denoiser(self.schedule.add_noise(x, noise, t), t)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[level] for level in self.levels]

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.denoiser.in_channels

    @property
    def stride(self) -> int:
        """Input pixels a pixel of the denoiser's lowest level."""
        return self.denoiser.stride
