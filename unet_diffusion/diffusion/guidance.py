"""Guidance: samples are pulled towards their conditions by a denoiser wrapped around the denoiser.

Classifier-free diffusion guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598): a network trained with some
of its conditions replaced by their null predicts with and without them; the difference, amplified, pulls towards the
conditions. As in diffusers, and unlike in the paper, scale 1 is the conditional prediction itself: theirs is 1 + w.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Inputs

MAX_GUIDANCE = 100.0  # more than that is noise
Denoise = Callable[..., Tensor]
"""denoiser(x, t, **inputs): the network's prediction (B, C, H, W) for x (B, C, H, W) and t (B,)."""

Predictor = Callable[[Tensor, Tensor], Tensor]
"""predictor(x, t): a denoiser whose conditions are settled, as the sampling loop calls it."""

TINY = 1e-8  # of a standard deviation


@dataclass(frozen=True)
class Guidance:
    """How far samples are pulled towards their conditions, and where.

    Args:
        scale: 1 is off, 0 ignores the conditions, more than 1 amplifies them.
        rescale: share in [0, 1] by which the prediction gets back the standard deviation that it has without guidance,
            against washed-out or glaring pictures (Lin et al. 2023, https://arxiv.org/abs/2305.08891, section 3.4).
        interval: lowest and highest timestep that is guided; None: all (Kynkäänniemi et al. 2024,
            https://arxiv.org/abs/2404.07724).
        autoguidance: a worse denoiser, such as an earlier checkpoint of the run, to be led away from with its
            conditions, in place of the same denoiser without conditions (Karras et al. 2024,
            https://arxiv.org/abs/2406.02507).

    Raises:
        ValueError: if a number is out of range.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[int, int] | None = None
    autoguidance: Denoise | None = None

    def __post_init__(self) -> None:
        if not abs(self.scale) <= MAX_GUIDANCE:  # nan neither
            raise ValueError(
                f"the scale of guidance must be at most {MAX_GUIDANCE}, got {self.scale}; 1 to 15 is usual"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"the rescale of guidance must be in [0, 1], got {self.rescale}; 0.7 is usual")
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1]:
            raise ValueError(
                f"the interval of guidance must be two timesteps from low to high, got {self.interval[0]} to "
                f"{self.interval[1]}"
            )


def guide(denoiser: Denoise, inputs: Inputs, unconditional: Inputs | None, guidance: Guidance) -> Predictor:
    """A predictor of worse + scale * (better - worse) for these conditions, float32.

    Both predictions come from one doubled batch, the conditioned half first; from two passes where there is a
    autoguidance denoiser. Where the scale is 1, or no timestep is in the interval, there is a single pass.

    Args:
        denoiser: called as denoiser(x, t, **inputs).
        inputs: for the batches to come, on the denoiser's device.
        unconditional: the same without conditions, or those of the autoguidance denoiser; None if there are none.
        guidance: how much, and where.

    Raises:
        ValueError: if there is nothing to guide between.
    """
    check_guidance(inputs, unconditional, guidance)

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t, **inputs)

    if guidance.scale == 1:
        return plain
    pair = _pair(denoiser, inputs, unconditional, guidance.autoguidance)

    def guided_everywhere(x: Tensor, t: Tensor) -> Tensor:
        better, worse = pair(x, t)
        guided = worse + guidance.scale * (better - worse)
        if guidance.rescale > 0:
            spread, before = (one.std(dim=(1, 2, 3), keepdim=True) for one in (guided, better))
            guided = guided * (1 - guidance.rescale + guidance.rescale * before / spread.clamp(min=TINY))
        return guided

    return guided_everywhere if guidance.interval is None else _within(guidance.interval, guided_everywhere, plain)


def _within(interval: tuple[int, int], inside: Predictor, outside: Predictor) -> Predictor:
    """The one predictor at the timesteps of an interval and the other elsewhere, each called only where it counts."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        is_inside = (t >= interval[0]) & (t <= interval[1])
        at = is_inside.tolist()  # waits for a GPU, which costs less than a doubled batch
        if all(at) or not any(at):
            return (inside if all(at) else outside)(x, t).float()
        return torch.where(is_inside.view(-1, 1, 1, 1), inside(x, t), outside(x, t).float())

    return predict


def check_guidance(inputs: Inputs, unconditional: Inputs | None, guidance: Guidance) -> None:
    """Refuses guidance without a pair of predictions to guide between.

    Raises:
        ValueError: if the scale is not 1, and there are no conditions or no null; or if the scale is 1 and something
            else is asked for.
    """
    if guidance.scale == 1:
        if guidance.rescale or guidance.interval or guidance.autoguidance:
            raise ValueError(
                "guidance is off where guidance_scale is 1; set it to another value, or leave the rest out"
            )
        return
    if guidance.autoguidance is None and not inputs:
        raise ValueError(f"guidance_scale must be 1 without conditions, got {guidance.scale}; give them")
    if unconditional is None and inputs:
        raise ValueError(
            f"guidance_scale must be 1 without a null, got {guidance.scale}; "
            "guidance needs a network that was trained with dropout of its conditions"
        )


def _pair(
    denoiser: Denoise, inputs: Inputs, unconditional: Inputs | None, autoguidance: Denoise | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gives the better and the worse prediction, float32: bfloat16 would round their difference."""
    unconditional = unconditional or {}
    if autoguidance is not None:
        return lambda x, t: (denoiser(x, t, **inputs).float(), autoguidance(x, t, **unconditional).float())
    doubled = {name: torch.cat([value, unconditional[name]]) for name, value in inputs.items()}

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        better, worse = denoiser(torch.cat([x, x]), torch.cat([t, t]), **doubled).float().chunk(2)
        return better, worse

    return pair
