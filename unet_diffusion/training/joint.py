"""Denoising beside segmenting: one network that learns both at once, so that images without labels help.

Buchholz et al. 2020 (https://arxiv.org/abs/2005.02987) found it to help most where labels are few, and more than to
denoise first and segment then. Here noise is added as in diffusion, and the network is told how much.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.diffusion.losses import squared_error
from unet_diffusion.diffusion.schedule import NoiseSchedule, stratified_timesteps
from unet_diffusion.training.hyperparameters import scalar_arguments


@dataclass(frozen=True)
class JointDenoising:
    """What a segmenter denoises in training, from additional outputs of its network, one for each channel of an image.

    Args:
        schedule: The noise schedule. The first tenth of the usual one, `num_train_timesteps` 100 with `beta_end`
            0.0021, has low noise only, which leaves the fine structure that segmenting needs to be seen.
        weight: The weight a of the error of denoising: the loss is (1 - a) times that of segmenting, and a times this.

    Raises:
        ValueError: If the weight is out of range.
    """

    schedule: NoiseSchedule
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.weight < 1:
            raise ValueError(f"weight of joint must be above 0 and below 1, got {self.weight}; 0.5 is usual")

    def noised(self, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images at random timesteps, (B, C, H, W), the timesteps, (B,), and what the network is to predict.

        Args:
            x0: Images in [-1, 1], (B, C, H, W).
            generator: Generator of the noise and the timesteps, on the device of the images.
        """
        t = stratified_timesteps(len(x0), self.schedule.num_train_timesteps, generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=torch.float32)
        return self.schedule.add_noise(x0, noise, t), t, self.schedule.target(x0, noise, t)

    def loss(self, segmentation_loss: Tensor, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of both tasks, and that of denoising by itself.

        Args:
            segmentation_loss: The loss of the labelled windows.
            prediction: What the network predicts of the noised windows, (B, C, H, W).
            target: What it is to predict.
        """
        denoising_loss = squared_error(prediction, target).mean()
        return (1 - self.weight) * segmentation_loss + self.weight * denoising_loss, denoising_loss


def joint_in(settings: Mapping[str, Any]) -> JointDenoising | None:
    """What a segmenter denoised in training; None if it segmented only.

    Args:
        settings: The settings in the record of its checkpoint.
    """
    known = settings.get("model", {}).get("joint")
    if known is None:
        return None
    return JointDenoising(NoiseSchedule(**known["schedule"]["init_args"]), **scalar_arguments(JointDenoising, known))
