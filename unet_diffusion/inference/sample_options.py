"""The options of a user's request to a denoiser, and their checks."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

if TYPE_CHECKING:
    from unet_diffusion.diffusion.parts import DenoiserParts

ImageLike = str | os.PathLike[str] | Image | NDArray[Any] | Tensor
"""A file, a PIL image, an array (H, W[, C]) of 8 or 16 bits or in [0, 1], or a tensor (C, H, W) in [-1, 1]."""

OVERLAP = 0.5  # default overlap of windows
MOST_IMAGES = 1_000_000


@dataclass(frozen=True)
class SampleOptions:
    """A user's request, with the arguments of `Denoiser.sample`. Sizes are in pixels; None is an option left out."""

    num_images: int = 1
    labels: Sequence[str | int] | str | int | None = None
    captions: Sequence[str] | str | None = None
    conditions: Mapping[str, Any] | None = None
    image: ImageLike | None = None
    mask: ImageLike | None = None
    strength: float | None = None
    noise_level: int | None = None
    scheduler: Any = "DPMSolverMultistepScheduler"
    num_inference_steps: int = 25
    thresholding: bool = False
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[int, int] | None = None
    autoguidance: Any = None
    image_size: tuple[int, int] | int | None = None
    window: int | None = None
    overlap: float | None = None
    interpolate: tuple[int, int] | None = None
    seed: int = 0
    batch_size: int = 64

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Self:
        """The options among the arguments of a function, which has a parameter for each.

        Args:
            arguments: The arguments by their names, as `locals()` gives them where the function begins.
        """
        return cls(**{option.name: arguments[option.name] for option in fields(cls)})

    @property
    def values(self) -> dict[str, Any]:
        """The user's values for conditions, by the name of the option."""
        own = {"labels": self.labels, "captions": self.captions, "noise_level": self.noise_level}
        return {name: value for name, value in own.items() if value is not None} | dict(self.conditions or {})

    @property
    def option_names(self) -> set[str]:
        """The names of the options in use that conditions may need or refuse."""
        others = {"image": self.image, "mask": self.mask, "strength": self.strength}
        return {*self.values, *(name for name, value in others.items() if value is not None)}

    def check(self, parts: "DenoiserParts") -> None:
        """Refuse numbers out of range, and options that do not fit the denoiser or each other.

        Raises:
            ValueError: If an option does not fit.
            FileNotFoundError: If a file is missing.
        """
        self.check_counts()
        if self.num_images > MOST_IMAGES:
            raise ValueError(f"num_images must be at most {MOST_IMAGES}, as file names have six digits, got "
                             f"{self.num_images}; draw more with another seed into another folder")  # fmt: skip
        if not isinstance(self.image_size, int | None) and len(self.image_size) != 2:
            raise ValueError(f"image_size must be a height and a width, got {self.image_size}")
        for name in ("seed", "num_inference_steps", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (name == "window" and value is None):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        for name in ("mask", "strength"):
            if name in self.option_names and self.image is None:
                raise ValueError(f"{name} needs an image; give image, too")
        check_file("image", self.image)
        check_file("mask", self.mask)
        self._check_overlap()
        self._check_conditions(parts)
        if self.interpolate is not None:
            self._check_interpolation(parts)

    def check_counts(self) -> None:
        """Refuse numbers of images that are not at least 1.

        Raises:
            ValueError: If one is less.
        """
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def _check_overlap(self) -> None:
        if self.overlap is not None and self.window is None:
            raise ValueError("overlap needs windows; give window, too")
        if self.overlap is not None and not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be in [0, 1), got {self.overlap}; {OVERLAP} is usual")

    def _check_conditions(self, parts: "DenoiserParts") -> None:
        conditions = parts.all_conditions
        provided = {entry for condition in conditions for entry in condition.provides}
        asked = [condition for condition in conditions if condition.provides or condition.batch_key not in provided]
        for condition in asked:
            for name in condition.needs:
                if name not in self.option_names:
                    needs = " and ".join(condition.needs)
                    how = "" if hasattr(self, name) else f", as conditions={{'{name}': ...}} or --condition {name}=..."
                    raise ValueError(f"this denoiser {condition.purpose}; give {needs}{how}")
            for name in condition.refuses:
                if name in self.option_names:
                    raise ValueError(f"{name} is not for a denoiser that {condition.purpose}; leave it out")
        options = {option for condition in asked for option in condition.options}
        for name in self.values:
            if name not in options:
                raise ValueError(f"this denoiser was trained without {name.replace('_', ' ')}; leave {name} out")

    def _check_interpolation(self, parts: "DenoiserParts") -> None:
        assert self.interpolate is not None
        first, last = self.interpolate
        if first == last:
            raise ValueError(f"interpolate must name two different seeds, got {first} twice")
        if self.num_images < 2:
            raise ValueError(f"interpolate needs at least 2 images, got num_images {self.num_images}; raise it")
        from unet_diffusion.diffusion.sampling import STOCHASTIC, name_of, supported_schedulers  # needs diffusers

        if (scheduler := name_of(self.scheduler)) in STOCHASTIC:
            smooth = ", ".join(name for name in supported_schedulers(parts.schedule) if name not in STOCHASTIC)
            raise ValueError(f"interpolate needs a scheduler that adds no noise, got {scheduler}; use one of {smooth}")
        for name, default in (("labels", parts.num_classes), ("captions", 1)):
            value = self.values.get(name)
            count = default if value is None else 1 if isinstance(value, str | int) else len(value)
            if count > 1:
                raise ValueError(f"interpolate draws a single class or caption, got {count} {name}; give one")


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn, without what they show.

    Args:
        scheduler: The name of a diffusers scheduler.
        num_inference_steps: The number of denoising steps.
        guidance_scale: How much closer images come to their label, caption or mask; 1 turns guidance off.
        seed: The seed of the noise, and of the order of labels or of the masks.
        batch_size: The number of images that are drawn at once.
        thresholding: Whether pixels are kept in their range at every step, also by solvers that do not do so by
            themselves.
    """

    scheduler: str = "DPMSolverMultistepScheduler"
    num_inference_steps: int = 25
    guidance_scale: float = 1.0
    seed: int = 0
    batch_size: int = 64
    thresholding: bool = False


def check_file(name: str, image: ImageLike | None) -> None:
    """Refuse a path without a file.

    Args:
        name: Name of the option in the error.
        image: The image; only a path is checked.

    Raises:
        FileNotFoundError: If there is no file at the path.
    """
    if isinstance(image, str | os.PathLike) and not Path(image).is_file():
        raise FileNotFoundError(f"{name} must be an image file, and there is none at {image}")
