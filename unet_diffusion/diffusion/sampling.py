"""Sampling: images from noise, with a denoiser and one of diffusers' schedulers for variance-preserving diffusion.

The loop is that of diffusers' pipelines (Ho et al. 2020, algorithm 2, https://arxiv.org/abs/2006.11239, and the solvers
that followed), with three differences. Each image has its own generator, so image i of a seed does not depend on its
batch. The scheduler and its timesteps stay on the CPU, where reading them does not stall a GPU. And it refuses
combinations of scheduler, schedule and number of steps for which diffusers returns wrong images or fails.

With a denoiser that knows x0, every scheduler returns x0 up to rounding, except DEISMultistepScheduler: it ends at
timestep 0 and returns sqrt(a_0) x0 + sqrt(1 - a_0) noise, which is 1 % noise with the linear schedule. A single step
from noise amplifies rounding by 1 / sqrt(a_T), which is 160 for the linear schedule and 20 000 for the cosine schedule.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Inputs
from unet_diffusion.diffusion.guidance import Denoise, Guidance, Predictor, check_guidance, guide
from unet_diffusion.diffusion.image_to_image import InitImage, apply_keep_mask, begin, check_init_image, num_steps_from
from unet_diffusion.diffusion.linear_solver import LinearSolver, linear_steps
from unet_diffusion.diffusion.refusals import check_first_step_of_heun, check_num_inference_steps, refusal
from unet_diffusion.diffusion.schedule import NoiseSchedule, scheduler_config
from unet_diffusion.diffusion.schedulers import SCHEDULERS
from unet_diffusion.runtime.randomness import image_generators, keyed_generator

STOCHASTIC = (  # they add noise at each step
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
NO_GUIDANCE = Guidance()
Watch = Callable[[float, Tensor], object]
"""watch(t, x0) sees the x0, (B, C, H, W), that the denoiser takes a batch for at the timestep t."""

THRESHOLDING = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")  # fields of the solver, not the noise

BEYOND_DDPM: dict[str, dict[str, Any]] = {  # fields that DDPMScheduler lacks and whose defaults are wrong here
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},  # the default makes it set this with a warning
    "PNDMScheduler": {"set_alpha_to_one": True},  # the default stops at timestep 0, which is still noisy
}


def sample(
    denoiser: Denoise,
    schedule: NoiseSchedule,
    shape: Sequence[int],
    *,
    scheduler: Any = "DDIMScheduler",
    num_inference_steps: int = 50,
    seed: int = 0,
    indices: Iterable[int] | None = None,
    inputs: Inputs | None = None,
    unconditional: Inputs | None = None,
    guidance: Guidance = NO_GUIDANCE,
    noise: Tensor | None = None,
    init_image: InitImage | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    clip_sample: bool = True,
    thresholding: bool = False,
    progress: Callable[[int], object] | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Images drawn from noise, (N, C, H, W) float32 on the CPU, in the range of the x0 that the denoiser learned.

    Image i is a function of (seed, indices[i]) and its conditions, up to rounding. It depends neither on the batch size
    nor on the number of processes that share the indices.

    Args:
        denoiser: The denoiser, called as denoiser(x, t, **inputs) with float32 x (B, C, H, W) and t (B,).
        schedule: The noise schedule that the denoiser was trained with.
        shape: (N, C, H, W) of all images; H and W may differ from those of training.
        scheduler: A diffusers scheduler, or the name of its class, one of `supported_schedulers(schedule)`.
        num_inference_steps: Denoising steps, in [1, num_train_timesteps]. Second-order schedulers call the denoiser
            twice per step.
        seed: Seed of the noise, any integer.
        indices: Number of each image among those of this seed, N integers; None: 0 to N - 1.
        inputs: Inputs of the denoiser beside x and t, (N, ...) each, from `network_inputs`; None: there are none.
        unconditional: The inputs without conditions, from `unconditional_inputs`; None: the denoiser was not trained
            without conditions.
        guidance: The guidance; off by default.
        noise: Initial standard normal noise, (N, C, H, W); None: noise of the seed. Noise that a scheduler adds always
            comes from the seed.
        init_image: The image to start from or to paint into; None: start from noise alone.
        batch_size: Number of images drawn at once; guidance doubles the denoiser's batch.
        device: The device of the denoiser.
        clip_sample: Clip each estimate of x0 to [-1, 1], as DDPM, DDIM and Heun can; right for pixels, wrong for
            latents.
        thresholding: Clip it with solvers that do so only when they are asked, such as DPM-Solver++ and UniPC, too.
        progress: Called after each call of the denoiser with the number of images that took a step, as tqdm's update;
            the sum is N * num_network_steps(...).
        watch: Called after each call of the denoiser, guidance included, with the timestep and the x0 that the
            prediction stands for.

    Raises:
        ValueError: If the arguments do not fit each other (see `check_sampling`), before the denoiser is first called.
    """
    check_sampling(
        schedule,
        shape,
        scheduler=scheduler,
        num_inference_steps=num_inference_steps,
        inputs=inputs,
        unconditional=unconditional,
        guidance=guidance,
        init_image=init_image,
        clip_sample=clip_sample,
        thresholding=thresholding,
    )
    if noise is not None and noise.shape != tuple(shape):
        raise ValueError(f"noise must have the shape {tuple(shape)}, got {tuple(noise.shape)}")
    numbers = _image_numbers(shape[0], indices)
    on_step = None if progress is None else lambda t, x: progress(len(x))
    batches = []
    for part in _batches(shape[0], batch_size):
        part_inputs = {name: value[part].to(device) for name, value in (inputs or {}).items()}
        part_nulls = (
            None if unconditional is None else {name: value[part].to(device) for name, value in unconditional.items()}
        )
        predictor = guide(denoiser, part_inputs, part_nulls, guidance)
        images = denoise(
            predictor if watch is None else _watched(predictor, schedule, watch),
            build_scheduler(schedule, scheduler, clip_sample=clip_sample, thresholding=thresholding),
            image_generators(seed, numbers[part]),
            (len(numbers[part]), *shape[1:]),
            num_inference_steps=num_inference_steps,
            noise=None if noise is None else noise[part].to(device),
            init_image=None if init_image is None else init_image.part(part, device),
            device=device,
            on_step=on_step,
        )
        batches.append(images.cpu())
    return torch.cat(batches)


@torch.no_grad()
def denoise(
    predictor: Predictor,
    scheduler: Any,
    generators: Sequence[torch.Generator],
    shape: Sequence[int],
    *,
    num_inference_steps: int = 50,
    noise: Tensor | None = None,
    init_image: InitImage | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[Tensor, Tensor], object] | None = None,
) -> Tensor:
    """One batch of images denoised from noise, (B, C, H, W) float32 on the device.

    Args:
        predictor: The denoiser, called as predictor(x, t) with float32 x (B, C, H, W) and t (B,). t is int64, or float
            for schedulers that visit fractional timesteps.
        scheduler: A new diffusers scheduler for this batch alone.
        generators: B generators, one per image, for the initial noise and the noise that a stochastic scheduler adds.
        shape: (B, C, H, W) of the images.
        num_inference_steps: Denoising steps, in [1, num_train_timesteps].
        noise: Initial standard normal noise, (B, C, H, W) on the device; None: noise of the generators.
        init_image: The image to start from, on the device; None: start from noise alone.
        device: The device of the predictor.
        on_step: Called as on_step(t, x) after each call of the predictor, with the timestep (0-d, on the CPU) and the
            state after the step. Schedulers in terms of sigma have x = image + sigma * noise.

    Raises:
        ValueError: If the scheduler cannot take this number of steps, or shapes do not agree.
    """
    if len(generators) != shape[0]:
        raise ValueError(f"generators must be {shape[0]}, one per image, got {len(generators)}")
    check_num_inference_steps(scheduler, num_inference_steps)
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    if noise is None:
        noise = randn_tensor(tuple(shape), generator=list(generators), device=torch.device(device), dtype=torch.float32)
    first, x = begin(scheduler, noise, init_image, num_inference_steps)
    options = _step_options(scheduler, generators)
    solver = _linear_solver(scheduler, num_inference_steps) if init_image is None and x.is_cuda else None
    for number, t in enumerate(scheduler.timesteps[first:], start=first + 1):
        x = _step(predictor, scheduler, t, x, options) if solver is None else _linear_step(predictor, solver, t, x)
        if init_image is not None:
            x = apply_keep_mask(x, init_image, noise, scheduler, number)
        if on_step is not None:
            on_step(t, x)
    return x


def build_scheduler(
    schedule: NoiseSchedule, scheduler: Any = "DDIMScheduler", *, clip_sample: bool = True, thresholding: bool = False
) -> Any:
    """A new diffusers scheduler for this schedule, with timesteps not yet set.

    Args:
        schedule: The noise schedule.
        scheduler: The name of a diffusers scheduler, or a scheduler object. The object's solver settings are used, with
            its thresholding; the noise schedule, prediction type and timestep spacing come from `schedule`.
        clip_sample: Clip each estimate of x0 to [-1, 1], if the scheduler has this option.
        thresholding: Clip it also if the scheduler has only diffusers' thresholding, which clips to the largest value
            that it allows, here 1.

    Raises:
        ValueError: If there is no such scheduler, it is not valid for the schedule, or it cannot clip and has to; the
            message says why.
    """
    name, own = name_of(scheduler), {} if isinstance(scheduler, str) else dict(getattr(scheduler, "config", {}))
    valid = ", ".join(supported_schedulers(schedule))
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {valid}, got {name!r}")
    reason = refusal(schedule, name)
    if reason is not None:
        raise ValueError(f"{name} cannot sample this model: {reason}; use one of {valid}")
    of_object = {field: own[field] for field in THRESHOLDING if field in own}
    fields = own | scheduler_config(schedule, clip_sample=clip_sample) | of_object | BEYOND_DDPM.get(name, {})
    if thresholding:
        fields |= _thresholding_fields(schedule, name, clip_sample)
    return getattr(diffusers, name)(**{field: value for field, value in fields.items() if field in _fields_of(name)})


def _thresholding_fields(schedule: NoiseSchedule, name: str, clip_sample: bool) -> dict[str, Any]:
    """The fields with which a scheduler that does not clip by itself clips each x0 to [-1, 1]."""
    if not clip_sample:
        raise ValueError("thresholding is for pixels, whose x0 lies in [-1, 1], and this denoiser draws latents, which "
                         "are not clipped; leave it out")  # fmt: skip
    if "clip_sample" in _fields_of(name):
        return {}
    able = [one for one in supported_schedulers(schedule) if _fields_of(one) & {"clip_sample", "thresholding"}]
    if name not in able:
        raise ValueError(f"thresholding needs a scheduler that can clip x0, got {name}; use one of {', '.join(able)}")
    return {"thresholding": True, "sample_max_value": 1.0}


def _fields_of(name: str) -> set[str]:
    """The names of a scheduler's fields."""
    return {*inspect.signature(getattr(diffusers, name)).parameters}


def name_of(scheduler: Any) -> str:
    """The class name of a scheduler, which may be an object or the name itself."""
    return scheduler if isinstance(scheduler, str) else type(scheduler).__name__


def supported_schedulers(schedule: NoiseSchedule) -> list[str]:
    """The names of the schedulers that are valid for this schedule, in alphabetical order."""
    return [name for name in SCHEDULERS if refusal(schedule, name) is None]


def num_network_steps(
    schedule: NoiseSchedule, scheduler: Any, num_inference_steps: int, init_image: InitImage | None = None
) -> int:
    """The number of calls of the denoiser per batch, for arguments of `sample`.

    It is num_inference_steps, or up to twice that with second-order schedulers, and less for an image with strength
    below 1.

    Raises:
        ValueError: If the scheduler is not valid or cannot take this number of steps.
    """
    built = build_scheduler(schedule, scheduler)
    check_num_inference_steps(built, num_inference_steps)
    built.set_timesteps(num_inference_steps, device="cpu")
    skipped = num_inference_steps - num_steps_from(init_image, num_inference_steps)
    return len(built.timesteps) - skipped * built.order


def check_sampling(
    schedule: NoiseSchedule,
    shape: Sequence[int],
    *,
    scheduler: Any = "DDIMScheduler",
    num_inference_steps: int = 50,
    inputs: Inputs | None = None,
    unconditional: Inputs | None = None,
    guidance: Guidance = NO_GUIDANCE,
    init_image: InitImage | None = None,
    clip_sample: bool = True,
    thresholding: bool = False,
) -> None:
    """Refuse arguments that `sample` cannot serve, within half a second and without the denoiser.

    Raises:
        ValueError: If the scheduler is not valid for the schedule or the number of steps, if the inputs or init_image
            do not fit, if guidance lacks conditions or a null or starts beyond the last timestep, or if thresholding
            is asked for and the scheduler cannot clip, or x0 must not be clipped.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"shape must be (N, C, H, W), each at least 1, got {tuple(shape)}")
    _check_inputs(inputs or {}, unconditional if guidance.autoguidance is None else None, shape[0])
    check_guidance(inputs or {}, unconditional, guidance)
    last = schedule.num_train_timesteps - 1
    if guidance.interval is not None and guidance.interval[0] > last:
        low, high = guidance.interval
        raise ValueError(f"guidance_interval must start at a timestep in [0, {last}], got {low} and {high}; lower it")
    if init_image is not None:
        check_init_image(init_image, shape, name_of(scheduler), num_inference_steps)
    if thresholding:
        build_scheduler(schedule, scheduler, clip_sample=clip_sample, thresholding=True)
    _check_finite(schedule, scheduler, num_inference_steps)
    starts_from_noise = num_steps_from(init_image, num_inference_steps) == num_inference_steps
    if name_of(scheduler) == "HeunDiscreteScheduler" and starts_from_noise:
        check_first_step_of_heun(build_scheduler(schedule, scheduler), num_inference_steps)


def _image_numbers(count: int, indices: Iterable[int] | None) -> list[int]:
    numbers = list(range(count) if indices is None else indices)
    if len(numbers) != count:
        raise ValueError(f"indices must have one number for each of {count} images, got {len(numbers)}")
    return numbers


def _batches(count: int, batch_size: int) -> list[slice]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return [slice(start, start + batch_size) for start in range(0, count, batch_size)]


def _watched(predictor: Predictor, schedule: NoiseSchedule, watch: Watch) -> Predictor:
    def predict(x: Tensor, t: Tensor) -> Tensor:
        prediction = predictor(x, t)
        watch(float(t[0]), schedule.predict_x0(prediction.float(), x, t.round().long()))
        return prediction

    return predict


def _step(predictor: Predictor, scheduler: Any, t: Tensor, x: Tensor, options: dict[str, Any]) -> Tensor:
    """The state after one call of the predictor and one step of the scheduler, (B, C, H, W) float32."""
    prediction = _prediction(predictor, scheduler.scale_model_input(x, t), t)
    with torch.autocast(x.device.type, enabled=False):  # autocast would round the einsum of some solvers
        return scheduler.step(prediction, t, x, **options).prev_sample


def _linear_step(predictor: Predictor, solver: LinearSolver, t: Tensor, x: Tensor) -> Tensor:
    """As `_step`, with a LinearSolver in place of the scheduler."""
    return solver.step(_prediction(predictor, solver.scaled(x), t), x)


def _prediction(predictor: Predictor, x: Tensor, t: Tensor) -> Tensor:
    """The prediction at a timestep (0-d, on the CPU), (B, C, H, W) float32."""
    prediction = predictor(x, torch.full((len(x),), t.item(), dtype=t.dtype, device=x.device))
    if prediction.shape != x.shape:  # some other shapes would broadcast silently
        raise ValueError(
            f"the denoiser's prediction must have the shape of x, {tuple(x.shape)}, got {tuple(prediction.shape)}"
        )
    return prediction.float()


def _linear_solver(scheduler: Any, num_inference_steps: int) -> LinearSolver | None:
    """A replacement of the scheduler that never makes a GPU wait; None if the scheduler has none."""
    steps = None if type(scheduler).__name__ in STOCHASTIC else linear_steps(scheduler, num_inference_steps)
    return None if steps is None else LinearSolver(steps)


def _step_options(scheduler: Any, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Arguments of `scheduler.step` that draw each image's noise from the image's own generator."""
    if hasattr(scheduler, "noise_sampler_seed"):  # DPMSolverSDE draws a Brownian path for each seed in the list
        scheduler.noise_sampler_seed = [int(torch.randint(2**62, (), generator=g)) for g in generators]
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": list(generators)} if takes_generator else {}


def _check_inputs(inputs: Inputs, unconditional: Inputs | None, count: int) -> None:
    for name, value in inputs.items():
        if len(value) != count:
            raise ValueError(f"{name} must have one entry for each of {count} images, got shape {tuple(value.shape)}")
        if unconditional is not None and (name not in unconditional or unconditional[name].shape != value.shape):
            got = tuple(unconditional[name].shape) if name in unconditional else "none"
            raise ValueError(f"unconditional {name} must have the shape of {name}, {tuple(value.shape)}, got {got}")
    if "labels" in inputs:
        _check_labels(inputs["labels"], None if unconditional is None else int(unconditional["labels"].max()))


def _check_labels(labels: Tensor, null_label: int | None) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape (N,), got {labels.dtype} of shape {tuple(labels.shape)}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or (null_label is not None and highest > null_label):
        rule = "at least 0" if null_label is None else f"in [0, {null_label}], where {null_label} is the null label"
        raise ValueError(f"labels must be {rule}, got {lowest if lowest < 0 else highest}")


@lru_cache(maxsize=64)  # this trajectory takes as long as sampling one image on a GPU
def _check_finite(schedule: NoiseSchedule, name: Any, num_steps: int) -> None:
    """Refuse a number of steps for which a scheduler's own coefficients are not finite.

    It runs a trajectory of one pixel whose prediction is always zero. Ancestral schedulers split the noise of a step by
    the root of a difference, which rounding can make negative if the step spans a large range of noise.
    """
    scheduler, generators = build_scheduler(schedule, name), [keyed_generator(0)]
    try:
        pixel = denoise(_predict_zero, scheduler, generators, (1, 1, 1, 1), num_inference_steps=num_steps)
        finite = bool(pixel.isfinite())
    except IndexError:  # KDPM2Ancestral looks up the timestep of a noise level that is nan
        finite = False
    if not finite:
        raise ValueError(
            f"num_inference_steps must keep {name_of(name)} finite on this schedule, got {num_steps}, for which "
            "float32 rounding makes it nan; use another number, or EulerDiscreteScheduler"
        )


def _predict_zero(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)
