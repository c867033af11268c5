"""A solver's steps as sums of what it has seen, found once, so that a GPU need not wait for the solver's arithmetic.

Without noise of its own and without clipping, what a scheduler returns is linear in the state that it began with and in
the predictions that it was given. So each step is a weighted sum of the last few states and predictions, and its
weights do not depend on the images. They are found by running the scheduler on the unit vectors of the space that the
beginning and the predictions span: each state's coordinates there are a sum of those of its predecessors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MAX_CALLS = 128  # of the predictor; the work to find the weights grows with their square
TOLERANCE = 1e-6  # of a state's coordinates; schedulers compute in float32
# How many of the last states and predictions a step may need, fewest first; longer sums would lose digits.
REACHES = ((1, 1), (1, 2), (1, 3), (2, 2), (1, 4), (2, 3), (3, 3))
MAX_REACH = max(max(reach) for reach in REACHES)


@dataclass(frozen=True)
class LinearStep:
    """A call of the predictor, and the step that follows.

    Args:
        input_scale: of what the predictor sees, in units of the state.
        states: weights of the last states, the newest first.
        predictions: weights of the last predictions, the newest first.
    """

    input_scale: float
    states: tuple[float, ...]
    predictions: tuple[float, ...]


class LinearSolver:
    """Does what a scheduler does in one trajectory, from its first timestep on.

    Args:
        steps: of `linear_steps`.
    """

    def __init__(self, steps: Sequence[LinearStep]):
        self._steps = steps
        self._number = 0
        self._states: list[Tensor] = []
        self._predictions: list[Tensor] = []

    def scaled(self, x: Tensor) -> Tensor:
        """What the predictor is to see of the state."""
        return x * self._steps[self._number].input_scale

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        """The next state."""
        step = self._steps[self._number]
        self._number += 1
        self._states = [x, *self._states][:MAX_REACH]
        self._predictions = [prediction, *self._predictions][:MAX_REACH]
        # As many of the last ones as have weights.
        states = zip(self._states, step.states, strict=False)
        predictions = zip(self._predictions, step.predictions, strict=False)
        terms = [*states, *predictions]
        total = terms[0][0] * terms[0][1]
        for tensor, weight in terms[1:]:
            total.add_(tensor, alpha=weight)
        return total


def linear_steps(scheduler: Any, num_inference_steps: int) -> tuple[LinearStep, ...] | None:
    """The steps of a scheduler, or None if they are not known to be linear.

    Args:
        scheduler: of diffusers; it is not changed, and another one is run in its place.
        num_inference_steps: of the trajectory.
    """
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    if config.get("clip_sample") or config.get("thresholding") or config.get("trained_betas") is not None:
        return None  # it clips, or the table of its own betas would be the key of the cache
    fields = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in config.items())
    return _found_steps(type(scheduler), fields, num_inference_steps)  # type: ignore[arg-type]  # types are hashable


@lru_cache(maxsize=64)
def _found_steps(
    scheduler_class: type[Any], fields: tuple[tuple[str, Any], ...], num_inference_steps: int
) -> tuple[LinearStep, ...] | None:
    scheduler: Any = scheduler_class(**dict(fields))
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    num_calls = len(scheduler.timesteps)
    if num_calls > MAX_CALLS:
        return None
    unit = torch.eye(1 + num_calls, dtype=torch.float64)  # the beginning, then each prediction
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
    """The shortest sum that makes the state after the call of this number; None if none does."""
    wanted = states[number + 1]
    for num_states, num_predictions in REACHES:
        last_states = list(reversed(states[: number + 1]))[:num_states]
        last_predictions = list(reversed(unit[1 : number + 2]))[:num_predictions]
        seen = torch.stack([*last_states, *last_predictions], dim=1)
        weights = torch.linalg.lstsq(seen, wanted[:, None]).solution[:, 0]
        if (seen @ weights - wanted).norm() <= TOLERANCE * wanted.norm():
            values = weights.tolist()
            return LinearStep(input_scale, tuple(values[: len(last_states)]), tuple(values[len(last_states) :]))
    return None
