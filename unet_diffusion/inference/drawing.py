"""The drawing of a user's request: it is read and checked once, then images are drawn batch by batch."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from unet_diffusion.diffusion.conditions.class_labels import label_numbers
from unet_diffusion.diffusion.conditions.condition import Condition, Request
from unet_diffusion.diffusion.guidance import Denoise, Guidance
from unet_diffusion.diffusion.image_to_image import InitImage, interpolated_noise
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.diffusion.sampling import check_sampling, num_network_steps, sample
from unet_diffusion.diffusion.tiling import windowed
from unet_diffusion.inference.init_images import UserImage, read_user_image, size_of
from unet_diffusion.inference.sample_options import OVERLAP, SampleOptions
from unet_diffusion.inference.user_files import check_same_images, read_label_images, read_pictures
from unet_diffusion.models.unet import PixelNetwork

MOST_PIXELS = 2**26  # 8192 x 8192: a float32 channel takes 256 MiB, and a layer of a network many times as much
STRENGTH = 0.8  # default without a mask, as in diffusers' image-to-image pipeline


class Drawing:
    """A denoiser and a request for images.

    Args:
        parts: The denoiser.
        options: The request.
        device: The device of the networks.
        entries: The entries that the conditions read, (N, ...) each, as in a batch of the data; None: the entries
            follow from the options.
        numbers: The number of each of the N images, from which its noise is drawn; None: 0 to N - 1.
        context: Function that gives the context in which networks are called, such as autocast.

    Raises:
        ValueError: If options do not fit each other or the denoiser.
        FileNotFoundError: If a file is missing.
    """

    def __init__(
        self,
        parts: DenoiserParts,
        options: SampleOptions,
        *,
        device: torch.device | str = "cpu",
        entries: Mapping[str, Tensor] | None = None,
        numbers: Sequence[int] | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.parts, self.options, self.device, self.context = parts, options, device, context
        self.numbers = range(options.num_images) if numbers is None else numbers
        if entries is None:
            options.check(parts)
        else:
            options.check_counts()
        if options.autoguidance is not None:
            check_autoguidance(options.autoguidance, parts)
        self.sample_shape = self._sample_shape()
        self.image = self._user_image()
        parts.codec.check()
        parts.codec.to(device)
        self.entries = dict(entries) if entries is not None else self._entries()
        self.init_image = self._init_image()
        shape = (1, *self.sample_shape)
        check_sampling(parts.schedule, shape, init_image=self.init_image, **self._inputs([0]), **self._settings)

    @property
    def classes(self) -> list[str] | None:
        """The number and name of each class to draw, in turn; None for a denoiser without classes."""
        if not self.parts.num_classes:
            return None
        names = self.parts.class_names or []
        numbers = label_numbers(self.options.labels, self.parts.num_classes, names)
        return [f"{number}: {names[number]}" if names else str(number) for number in numbers]

    @property
    def num_steps(self) -> int:
        """The number of calls of the network per batch."""
        options = self.options
        return num_network_steps(self.parts.schedule, options.scheduler, options.num_inference_steps, self.init_image)

    def draw(
        self,
        indices: Sequence[int],
        progress: Callable[[int], object] | None = None,
        watch: Callable[[float, Tensor], object] | None = None,
    ) -> Tensor:
        """The images with these numbers, (N, C, H, W) float32 on the CPU, in about [-1, 1].

        Args:
            indices: N numbers of images of the request.
            progress: Called with the number of images that took a step.
            watch: Called at each step with the timestep and the x0 that the network takes a batch for, (B, C, h, w).
        """
        options, codec = self.options, self.parts.codec
        with self.context():
            x0 = sample(
                self._seen_through_windows(self.parts.unet),
                self.parts.schedule,
                (len(indices), *self.sample_shape),
                seed=options.seed,
                indices=[self.numbers[index] for index in indices],
                noise=self._noise(indices),
                init_image=self.init_image,
                batch_size=options.batch_size,
                device=self.device,
                progress=progress,
                watch=watch,
                **self._inputs(indices),
                **self._settings,
            )
            images = codec.decode(x0)
        return images if self.image is None else self.image.pasted(images)

    @property
    def _conditions(self) -> list[Condition]:
        """The conditions that need a user's values, without those whose entry another condition provides."""
        conditions = self.parts.all_conditions
        provided = {entry for condition in conditions for entry in condition.provides}
        return [condition for condition in conditions if condition.provides or condition.batch_key not in provided]

    @property
    def _image_condition(self) -> Condition | None:
        """The condition that reads the user's image; None: sampling starts from the image."""
        return next((condition for condition in self._conditions if "image" in condition.needs), None)

    @property
    def _enlarges(self) -> bool:
        """Whether the user's image is a small image to enlarge."""
        return self._image_condition is not None and "mask" not in self._image_condition.needs

    @property
    def _scale_factor(self) -> int:
        """The height of x0 divided by that of a small image to enlarge; 1 where there is none."""
        return max([1, *(condition.scale_factor for condition in self._conditions)])

    def _sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of x0 for the request; an image to enlarge is cut to the largest size that the network takes."""
        options, parts = self.options, self.parts
        channels, height, width = parts.sample_shape
        if options.image_size is not None:
            size = options.image_size
            height, width = self._network_sizes("image_size", [size, size] if isinstance(size, int) else size)
        elif self._enlarges and options.image is not None:
            sides = size_of("image", options.image, parts.image_shape[0])
            height, width = (_largest_size(side, self._scale_factor, parts.unet) for side in sides)
        if height % self._scale_factor or width % self._scale_factor:
            multiple = self._scale_factor * parts.codec.downsampling
            raise ValueError(f"image_size must be multiples of {multiple} pixels for this denoiser, which enlarges, "
                             f"got {options.image_size}")  # fmt: skip
        if options.window is not None:
            self._network_sizes("window", [options.window])
        if height * width > MOST_PIXELS:
            raise ValueError(f"images must have at most {MOST_PIXELS} pixels where the network sees them, got "
                             f"{height} x {width}; draw smaller images with image_size")  # fmt: skip
        return channels, height, width

    def _network_sizes(self, name: str, sides: Sequence[int]) -> list[int]:
        """The sides of x0 for sides in pixels."""
        unet, factor = self.parts.unet, self.parts.codec.downsampling
        fitting = [unet.next_size(-(-side // factor)) * factor for side in sides]
        if min(sides) < 1 or fitting != list(sides):
            got, next_fit = " ".join(map(str, sides)), " ".join(map(str, fitting))
            raise ValueError(
                f"{name} must be {unet.smallest_size * factor} pixels plus a multiple of {unet.size_step * factor} "
                f"for this denoiser, got {got}; the next size that fits is {next_fit}"
            )
        return [side // factor for side in sides]

    def _user_image(self) -> UserImage | None:
        """The user's image and mask at the size to draw, or to enlarge."""
        options = self.options
        if options.image is None:
            return None
        channels, height, width = self.parts.codec.image_shape(self.sample_shape)
        if self._enlarges:
            height, width = (side // self._scale_factor for side in self.sample_shape[1:])
        shape = (channels, height, width)
        return read_user_image(options.image, options.mask, shape, self.parts.values.value_range)

    def _entries(self) -> dict[str, Tensor]:
        """The entries that the conditions read, (num_images, ...) each."""
        options, image = self.options, self.image
        check_same_images(self._conditions, options.values)
        request = Request(
            num_images=options.num_images,
            seed=options.seed,
            values=options.values,
            class_names=self.parts.class_names,
            image=None if image is None else image.pixels,
            mask=None if image is None or image.keep_mask is None else (~image.keep_mask).float(),
            encode=self._encode,
            image_shape=self.parts.codec.image_shape(self.sample_shape),
            sample_size=self.sample_shape[1:],
            read_pictures=partial(read_pictures, value_range=self.parts.values.value_range),
            read_label_images=read_label_images,
        )
        return {name: entry for condition in self._conditions for name, entry in condition.from_user(request).items()}

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.parts.codec.encode(pixels.to(self.device)).cpu()

    def _init_image(self) -> InitImage | None:
        """The x0 of the user's image to start from; a latent is kept if all its pixels are.

        An inpainting denoiser reads the mask itself, and with full strength starts from noise alone.
        """
        if self.image is None or self._enlarges:
            return None
        keep_mask, strength = self.image.keep_mask, self.options.strength
        if strength is None:
            strength = STRENGTH if keep_mask is None else 1.0
        x0 = self._encode(self.image.pixels)
        if self._image_condition is not None:
            return None if strength == 1 else InitImage(x0, strength)
        if keep_mask is not None:
            keep_mask = avg_pool2d(keep_mask.float(), self.parts.codec.downsampling) == 1
        return InitImage(x0, strength, keep_mask)

    def _noise(self, indices: Sequence[int]) -> Tensor | None:
        """The noise of frames between two seeds, (N, C, h, w); None: noise of the seed."""
        if self.options.interpolate is None:
            return None
        last = self.options.num_images - 1
        return interpolated_noise(self.options.interpolate, [index / last for index in indices], self.sample_shape)

    @torch.no_grad()
    def _inputs(self, indices: Sequence[int]) -> dict[str, Any]:
        """The network's inputs, and those for the prediction that guidance leads away from."""
        part = {name: entry[list(indices)].to(self.device) for name, entry in self.entries.items()}
        inputs, unconditional = self.parts.inputs(part)
        worse = self.options.autoguidance
        return {"inputs": inputs, "unconditional": unconditional if worse is None else worse.inputs(part)[0]}

    @cached_property
    def _settings(self) -> dict[str, Any]:
        options, worse = self.options, self.options.autoguidance
        guidance = Guidance(
            options.guidance_scale,
            options.guidance_rescale,
            options.guidance_interval,
            None if worse is None else self._seen_through_windows(worse.unet),
        )
        return {
            "scheduler": options.scheduler,
            "num_inference_steps": options.num_inference_steps,
            "guidance": guidance,
            "clip_sample": self.parts.codec.clip_sample,
            "thresholding": options.thresholding,
        }

    def _seen_through_windows(self, network: PixelNetwork) -> Denoise:
        options = self.options
        if options.window is None:
            return network
        (side,) = self._network_sizes("window", [options.window])
        overlap = OVERLAP if options.overlap is None else options.overlap
        return windowed(network, (side, side), overlap=overlap, batch_size=options.batch_size)


def check_autoguidance(worse: DenoiserParts, parts: DenoiserParts) -> None:
    """Refuse autoguidance by a denoiser of other images or conditions.

    Args:
        worse: The denoiser to guide away from.
        parts: The denoiser that draws.

    Raises:
        ValueError: If the image shapes, noise schedules or conditions differ.
    """
    if worse.sample_shape != parts.sample_shape or worse.schedule.config != parts.schedule.config:
        raise ValueError("autoguidance must be a denoiser of the same image shape and noise schedule; use an earlier "
                         "checkpoint of the run")  # fmt: skip
    if _meanings(worse) != _meanings(parts):
        raise ValueError("autoguidance must be a denoiser of the same classes and words; use an earlier checkpoint "
                         "of the run")  # fmt: skip


def _meanings(parts: DenoiserParts) -> list[Any]:
    """Plain values that decide the meaning of a batch's entries for the conditions."""
    return [parts.class_names, [condition.meaning() for condition in parts.all_conditions]]


def _largest_size(side: int, scale_factor: int, network: PixelNetwork) -> int:
    """The size of x0 of the largest small image up to `side` that the network takes; the smallest one if none is.

    Args:
        side: Height or width of the user's small image.
        scale_factor: The height of x0 divided by that of the small image; x0 of some sizes has such a small image.
        network: The network.
    """
    smallest = next(size for size in count(scale_factor, scale_factor) if network.next_size(size) == size)
    step = math.lcm(scale_factor, network.size_step)
    return smallest + max(side * scale_factor - smallest, 0) // step * step
