"""A solver's steps as precomputed weighted sums, so that a GPU need not wait for the scheduler's arithmetic.

A scheduler that neither adds noise nor clips is linear in the initial state and the predictions. So each of its steps
is a weighted sum of the last few states and predictions, with weights that do not depend on the images. To find the
weights, the scheduler runs once with unit vectors as initial state and predictions; each new state is then fitted as a
sum of the last states and predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MAX_CALLS = 128  # the work to find the weights grows with the square of the predictor's calls
TOLERANCE = 1e-6  # relative error of the fit; schedulers compute in float32
# Numbers of last states and predictions that a sum may use, fewest first; longer sums would lose digits.
REACHES = ((1, 1), (1, 2), (1, 3), (2, 2), (1, 4), (2, 3), (3, 3))
MAX_REACH = max(max(reach) for reach in REACHES)


@dataclass(frozen=True)
class LinearStep:
    """The weights of one step.

    Args:
        input_scale: Factor between the state and the predictor's input.
        states: Weights of the last states, newest first.
        predictions: Weights of the last predictions, newest first.
    """

    input_scale: float
    states: tuple[float, ...]
    predictions: tuple[float, ...]


class LinearSolver:
    """A stand-in for a scheduler in one trajectory from the first timestep on.

    Args:
        steps: The steps from `linear_steps`.
    """

    def __init__(self, steps: Sequence[LinearStep]):
        self._steps = steps
        self._number = 0
        self._states: list[Tensor] = []
        self._predictions: list[Tensor] = []

    def scaled(self, x: Tensor) -> Tensor:
        """The predictor's input for a state."""
        return x * self._steps[self._number].input_scale

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        """The next state: the weighted sum of the last states and predictions."""
        step = self._steps[self._number]
        self._number += 1
        self._states = [x, *self._states][:MAX_REACH]
        self._predictions = [prediction, *self._predictions][:MAX_REACH]
        # Not strict: there may be more states and predictions than weights.
        states = zip(self._states, step.states, strict=False)
        predictions = zip(self._predictions, step.predictions, strict=False)
        terms = [*states, *predictions]
        total = terms[0][0] * terms[0][1]
        for tensor, weight in terms[1:]:
            total.add_(tensor, alpha=weight)
        return total


def linear_steps(scheduler: Any, num_inference_steps: int) -> tuple[LinearStep, ...] | None:
    """The steps of a scheduler as weighted sums, or None if they are not known to be linear.

    Args:
        scheduler: A diffusers scheduler; it is not changed.
        num_inference_steps: Denoising steps of the trajectory.
    """
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    if config.get("clip_sample") or config.get("thresholding") or config.get("trained_betas") is not None:
        return None  # it clips, or its table of betas would be part of the cache's key
    fields = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in config.items())
    return _fitted_steps(type(scheduler), fields, num_inference_steps)  # type: ignore[arg-type]  # types are hashable


@lru_cache(maxsize=64)
def _fitted_steps(
    scheduler_class: type[Any], fields: tuple[tuple[str, Any], ...], num_inference_steps: int
) -> tuple[LinearStep, ...] | None:
    scheduler: Any = scheduler_class(**dict(fields))
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    num_calls = len(scheduler.timesteps)
    if num_calls > MAX_CALLS:
        return None
    unit = torch.eye(1 + num_calls, dtype=torch.float64)  # the initial state, then each prediction
    states, scales = [unit[0]], []
    for t, prediction in zip(scheduler.timesteps, unit[1:], strict=True):
        x = states[-1].view(1, 1, 1, -1)
        scales.append(float(scheduler.scale_model_input(x, t).norm() / x.norm()))
        states.append(scheduler.step(prediction.view_as(x), t, x).prev_sample.double().flatten())
        if not states[-1].isfinite().all():
            return None
    steps = [_step_to(states, unit, number, scale) for number, scale in enumerate(scales)]
    return None if None in steps else tuple(step for step in steps if step is not None)


def _step_to(states: Sequence[Tensor], unit: Tensor, number: int, input_scale: float) -> LinearStep | None:
    """The shortest sum that gives the state after this step; None if no sum does."""
    target = states[number + 1]
    for num_states, num_predictions in REACHES:
        last_states = list(reversed(states[: number + 1]))[:num_states]
        last_predictions = list(reversed(unit[1 : number + 2]))[:num_predictions]
        seen = torch.stack([*last_states, *last_predictions], dim=1)
        weights = torch.linalg.lstsq(seen, target[:, None]).solution[:, 0]
        if (seen @ weights - target).norm() <= TOLERANCE * target.norm():
            values = weights.tolist()
            return LinearStep(input_scale, tuple(values[: len(last_states)]), tuple(values[len(last_states) :]))
    return None
