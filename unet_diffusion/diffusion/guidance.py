"""Guidance: a wrapper around the denoiser that pulls samples towards their conditions.

Classifier-free diffusion guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598): a network that was trained
with dropout of its conditions predicts with and without them, and guidance amplifies the difference. As in diffusers,
scale 1 is the conditional prediction itself; the paper's w is scale - 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Inputs

MAX_GUIDANCE = 100.0  # a larger scale yields noise
Denoise = Callable[..., Tensor]
"""denoiser(x, t, **inputs) gives the network's prediction (B, C, H, W) for x (B, C, H, W) and t (B,)."""

Predictor = Callable[[Tensor, Tensor], Tensor]
"""predictor(x, t) is a denoiser with its inputs bound, as the sampling loop calls it."""

MIN_STD = 1e-8  # keeps the rescaling from dividing by 0


@dataclass(frozen=True)
class Guidance:
    """The strength of guidance, and the timesteps at which it acts.

    Args:
        scale: The guidance scale, in [-100, 100]: 1 is off, 0 ignores the conditions, more than 1 amplifies them.
        rescale: Share in [0, 1] of the way back to the standard deviation of the prediction without guidance; it
            prevents washed-out and glaring images (Lin et al. 2023, https://arxiv.org/abs/2305.08891, section 3.4).
        interval: Lowest and highest timestep that is guided; None: all timesteps (Kynkäänniemi et al. 2024,
            https://arxiv.org/abs/2404.07724).
        autoguidance: A worse denoiser with the same conditions, such as an earlier checkpoint of the run, that
            replaces the prediction without conditions (Karras et al. 2024, https://arxiv.org/abs/2406.02507).

    Raises:
        ValueError: If a number is out of range.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[int, int] | None = None
    autoguidance: Denoise | None = None

    def __post_init__(self) -> None:
        if not abs(self.scale) <= MAX_GUIDANCE:  # this form refuses nan, too
            raise ValueError(
                f"guidance_scale must be in [{-MAX_GUIDANCE}, {MAX_GUIDANCE}], got {self.scale}; 1 to 15 is usual"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], got {self.rescale}; 0.7 is usual")
        if self.interval is not None and not 0 <= self.interval[0] <= self.interval[1]:
            low, high = self.interval
            raise ValueError(f"guidance_interval must be two timesteps, the lower one first, got {low} and {high}")


def guide(denoiser: Denoise, inputs: Inputs, unconditional: Inputs | None, guidance: Guidance) -> Predictor:
    """A predictor of worse + scale * (better - worse) for these inputs, float32.

    Both predictions come from one doubled batch, conditional half first, or with autoguidance from two passes. With
    scale 1, or outside the interval, there is a single conditional pass.

    Args:
        denoiser: The denoiser, called as denoiser(x, t, **inputs).
        inputs: The denoiser's inputs for a batch, (B, ...) each on its device.
        unconditional: The inputs without conditions, or those of the autoguidance denoiser; None: there are none.
        guidance: The strength of guidance, and where it acts.

    Raises:
        ValueError: If there is no second prediction to guide away from; see `check_guidance`.
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
            guided_std, std = (prediction.std(dim=(1, 2, 3), keepdim=True) for prediction in (guided, better))
            guided = guided * (1 - guidance.rescale + guidance.rescale * std / guided_std.clamp(min=MIN_STD))
        return guided

    return guided_everywhere if guidance.interval is None else _within(guidance.interval, guided_everywhere, plain)


def _within(interval: tuple[int, int], inside: Predictor, outside: Predictor) -> Predictor:
    """A predictor that is `inside` within an interval of timesteps and `outside` elsewhere, float32."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        is_inside = (t >= interval[0]) & (t <= interval[1])
        flags = is_inside.tolist()  # waits for a GPU, which costs less than a doubled batch
        if all(flags) or not any(flags):
            return (inside if all(flags) else outside)(x, t).float()
        return torch.where(is_inside.view(-1, 1, 1, 1), inside(x, t), outside(x, t).float())

    return predict


def check_guidance(inputs: Inputs, unconditional: Inputs | None, guidance: Guidance) -> None:
    """Refuse guidance that has no second prediction to guide away from.

    Raises:
        ValueError: If the scale is not 1 and there are no conditions, or no null; or if the scale is 1 and another
            setting of guidance is not at its default.
    """
    if guidance.scale == 1:
        if guidance.rescale or guidance.interval or guidance.autoguidance:
            raise ValueError(
                "guidance is off while guidance_scale is 1; raise it, or leave out the other options of guidance"
            )
        return
    if guidance.autoguidance is None and not inputs:
        raise ValueError(
            f"guidance_scale must be 1 without conditions (labels, texts, ...), got {guidance.scale}; give one"
        )
    if unconditional is None and inputs:
        raise ValueError(
            f"guidance_scale must be 1 for a network that was trained without dropout of its conditions, got "
            f"{guidance.scale}"
        )


def _pair(
    denoiser: Denoise, inputs: Inputs, unconditional: Inputs | None, autoguidance: Denoise | None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function that gives the better and the worse prediction, in float32: bfloat16 would round their difference."""
    unconditional = unconditional or {}
    if autoguidance is not None:
        return lambda x, t: (denoiser(x, t, **inputs).float(), autoguidance(x, t, **unconditional).float())
    doubled = {name: torch.cat([value, unconditional[name]]) for name, value in inputs.items()}

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        better, worse = denoiser(torch.cat([x, x]), torch.cat([t, t]), **doubled).float().chunk(2)
        return better, worse

    return pair
