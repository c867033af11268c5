"""The adversarial loss of an autoencoder: a discriminator that makes reconstructions look sharp.

As in Esser et al. 2021 (https://arxiv.org/abs/2012.09841, section 3.1) and Rombach et al. 2022
(https://arxiv.org/abs/2112.10752, appendix G).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from unet_diffusion.models.discriminator import PatchDiscriminator
from unet_diffusion.training.hyperparameters import scalar_arguments
from unet_diffusion.training.optimizers import adam_of_gans

MAX_ADAPTIVE_WEIGHT = 1e4  # Esser et al.'s code, as the next one
GRADIENT_FLOOR = 1e-4
TELLS_ALL_APART, CANNOT_TELL = 0.02, 0.99  # of the hinge loss, which is 1 for a discriminator that says nothing
NOT_JUDGED = 0.5  # of the same, between the two
MEMORY = 0.98  # share of the average of that loss that stays at each step: it is of about 50 steps


@dataclass
class AdversarialLoss:
    """A discriminator, and how it is trained and counts.

    Args:
        discriminator: The network that tells images from reconstructions.
        start: The step at which it begins to be trained and to count.
        weight: The weight of the loss, beside the ratio of gradients at the decoder's last layer.
        optimizer: A function that makes the discriminator's optimiser from its parameters.

    Raises:
        ValueError: If start or weight is negative.
    """

    discriminator: PatchDiscriminator
    start: int = 0
    weight: float = 0.5
    optimizer: OptimizerCallable = adam_of_gans

    def __post_init__(self) -> None:
        if self.start < 0 or self.weight < 0:
            raise ValueError(f"adversarial.start and weight must be 0 or more, got {self.start} and {self.weight}")
        self._average: Tensor | None = None  # of the discriminator's loss, on the device

    def check_images(self, channels: int, height: int, width: int) -> None:
        """Refuse images that the discriminator cannot look at.

        Raises:
            ValueError: If their channels or sides do not fit.
        """
        if self.discriminator.in_channels != channels:
            raise ValueError(
                f"the images have {channels} channels and the discriminator takes {self.discriminator.in_channels}; "
                "set in_channels of model.adversarial.discriminator"
            )
        smallest = self.discriminator.smallest_size
        if min(height, width) < smallest:
            raise ValueError(
                f"the discriminator needs images of {smallest} pixels, got {height} x {width}; give it fewer layers "
                "(num_layers)"
            )

    def adaptive_weight(self, fidelity: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
        """The weight that makes the adversarial gradient as large as the other (Esser et al., eq. 7), times `weight`.

        Args:
            fidelity: The other loss, ().
            adversarial: The adversarial loss, ().
            last_layer: The weights of the decoder's last layer, at which the gradients are compared.
        """
        losses = (fidelity, adversarial)
        wanted, got = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in losses)
        ratio = (wanted / (got + GRADIENT_FLOOR)).clamp(0, MAX_ADAPTIVE_WEIGHT).detach()
        return self.weight * ratio

    def count(self, loss: Tensor) -> Tensor:
        """The average of the discriminator's loss over the last steps, (), with that of this step."""
        if self._average is None:  # also where a run continues, which the first step must not judge
            self._average = torch.full_like(loss, NOT_JUDGED)
        self._average = self._average.lerp(loss.detach(), 1 - MEMORY)
        return self._average


def adversarial_in(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> AdversarialLoss | None:
    """The adversarial loss of a checkpoint, with a discriminator of the shape of its weights; None if it has none.

    Args:
        checkpoint: The checkpoint of an AutoencoderModule.
        settings: The settings in its record.
    """
    prefix = "discriminator.layers."
    weights = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)}
    convolutions = [value for value in weights.values() if value.ndim == 4]  # one a layer, and the first and the last
    if not convolutions:
        return None
    channels, in_channels = convolutions[0].shape[:2]
    discriminator = PatchDiscriminator(in_channels, channels=channels, num_layers=len(convolutions) - 2)
    known = settings.get("model", {}).get("adversarial") or {}
    return AdversarialLoss(discriminator, **scalar_arguments(AdversarialLoss, known))


def problem_of(loss: float) -> str | None:
    """A warning about a discriminator that teaches nothing, as it has won or lost; None for one that is right at times.

    Args:
        loss: The average of its hinge loss.
    """
    if loss < TELLS_ALL_APART:
        return (
            "the discriminator tells all reconstructions from images, and teaches nothing; lower its learning rate or "
            "raise adversarial.start"
        )
    if loss > CANNOT_TELL:
        return (
            "the discriminator cannot tell reconstructions from images (its loss is about 1, as if it said nothing), "
            "and teaches nothing; raise its learning rate or its channels, or lower adversarial.weight"
        )
    return None
