"""What the options of `unet-diffusion sample` mean for a checkpoint: size, windows, a picture to start from, frames.

Options are in pixels; a denoiser of latents sees them divided by what its autoencoder divides by. A given picture is
scaled and cut to the size to draw, as pictures are for training, and its mask with it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from unet_diffusion.data.checking import decoded
from unet_diffusion.data.decoding import ImageFormat, decode_image, upright_size
from unet_diffusion.data.files import OneFile
from unet_diffusion.data.scaling import scale_to_unit_range
from unet_diffusion.diffusion.conditions.concat import MAPS_KEY
from unet_diffusion.diffusion.conditions.low_resolution import LOW_RES_SCHEDULE, MAX_NOISE_LEVEL, LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage, masked_image_maps
from unet_diffusion.diffusion.image_to_image import InitImage, interpolated_noise
from unet_diffusion.diffusion.sampling import STOCHASTIC, supported_schedulers
from unet_diffusion.inference.record import TrainedDenoiser
from unet_diffusion.models.autoencoders import Autoencoder, latent_moments
from unet_diffusion.runtime.randomness import keyed_generator

NOISE_LEVEL = 20  # of a picture to enlarge, as in diffusers' pipeline for that
OVERLAP = 0.5  # of windows
MOST_IMAGES = 1_000_000
MOST_PIXELS = 2**26  # 8192 x 8192: a float32 channel takes 256 MiB, and a layer of a network many times as much
STRENGTH = 0.8  # of a picture without a mask, as in diffusers' image-to-image pipeline


@dataclass(frozen=True)
class Picture:
    """A given picture, (1, C, H, W) in [-1, 1], and where it is to stay, (1, 1, H, W) bool, or None for nowhere."""

    pixels: Tensor
    keep_mask: Tensor | None

    def pasted(self, images: Tensor) -> Tensor:
        """The images, (N, C, H, W), with what is known as it is in the picture."""
        return images if self.keep_mask is None else torch.where(self.keep_mask, self.pixels, images)


def check_options(options: argparse.Namespace, trained: TrainedDenoiser) -> None:
    """Refuses numbers out of range, and options that need others.

    Raises:
        ValueError: if there are such.
    """
    for name in ("num_images", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.num_images > MOST_IMAGES:
        raise ValueError(f"--num_images must be at most {MOST_IMAGES}, whose names have six digits, got "
                         f"{options.num_images}; draw more with another --seed into another --output")  # fmt: skip
    for name in ("mask", "strength"):
        if getattr(options, name) is not None and options.init is None:
            raise ValueError(f"--{name} must come with a picture to start from; add --init FILE")
    _check_overlap(options)
    if _paints(trained) and options.mask is None:
        raise ValueError("--init and --mask must be given, as the model paints into a picture; add --init and --mask")
    if _enlarges(trained):
        _check_enlarging(options)
    elif options.noise_level is not None:
        raise ValueError("--noise_level is for a model that enlarges pictures, and this one does not; leave it out")
    if options.interpolate is not None:
        _check_interpolation(options, trained)


def image_shape(options: argparse.Namespace, trained: TrainedDenoiser) -> tuple[int, int, int]:
    """(C, H, W) of what the network draws; of latents, where it draws those.

    A picture is enlarged whole, but for a border that the network does not take.

    Raises:
        ValueError: if the network does not take that size; it names the next one.
    """
    if options.image_size is None and not _enlarges(trained):
        height, width = trained.image_shape[1:]
    elif options.image_size is None:
        height, width = (_largest_size(side, trained) for side in _size_of("init", options.init))
    else:
        height, width = _network_sizes("image_size", options.image_size, trained)
    if height * width > MOST_PIXELS:
        raise ValueError(f"images must have at most {MOST_PIXELS} values a channel where the network sees them, got "
                         f"{height} x {width}; draw smaller ones with --image_size")  # fmt: skip
    return trained.image_shape[0], height, width


def window_size(options: argparse.Namespace, trained: TrainedDenoiser) -> int | None:
    """Side of the network's windows, in what it draws; None: it sees all at once.

    Raises:
        ValueError: if the network does not take that size; it names the next one.
    """
    return None if options.window is None else _network_sizes("window", [options.window], trained)[0]


def window_overlap(options: argparse.Namespace) -> float:
    """Share of a window that it has in common with the next, at least."""
    return OVERLAP if options.overlap is None else options.overlap


def read_picture(options: argparse.Namespace, trained: TrainedDenoiser, shape: tuple[int, int, int]) -> Picture | None:
    """The picture to start from, and its mask, where they are given.

    Args:
        options: of the command.
        trained: the denoiser.
        shape: of what it draws, see `image_shape`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file does not fit.
    """
    if options.init is None:
        return None
    space, factor = trained.latent_space, 1 if _enlarges(trained) else _factor(trained)
    channels = shape[0] if space is None else space.image_shape[0]
    height, width = shape[1] * factor, shape[2] * factor
    pixels = _read("init", options.init, (channels, height, width))
    if options.mask is None:
        return Picture(pixels, None)
    keep_mask = _read("mask", options.mask, (1, height, width)) < 0
    wanted, got = ("{}x{}".format(*_size_of(name, getattr(options, name))) for name in ("init", "mask"))
    if got != wanted:
        raise ValueError(f"--mask must be as large as --init, {wanted}, got {got}; resize it")
    if keep_mask.all():
        raise ValueError(f"--mask must be white where the picture is to be painted, and {options.mask} has no white")
    return Picture(pixels, keep_mask)


def maps_from(
    picture: Picture | None, options: argparse.Namespace, trained: TrainedDenoiser, autoencoder: Autoencoder | None
) -> dict[str, Tensor]:
    """What the picture is to a denoiser with maps beside the noise, (N, ...) each of N images; without maps {}.

    Args:
        picture: as `read_picture` gives it.
        options: of the command.
        trained: the denoiser.
        autoencoder: of its latents, if it denoises latents.

    Raises:
        ValueError: if its maps are of a kind that no option gives.
    """
    if not any(one.batch_key == "concat" for one in trained.all_conditions):
        return {}
    if picture is not None and _enlarges(trained):
        return _noised_copies(picture.pixels, options)
    if picture is None or picture.keep_mask is None or not _paints(trained):
        raise ValueError("this model has maps beside the noise that no option gives; call sampling.sample")

    def encode(pixels: Tensor) -> Tensor:
        return _encoded(pixels, trained, autoencoder)

    maps = masked_image_maps(picture.pixels, (~picture.keep_mask).float(), encode)
    return {"concat": maps.expand(options.num_images, -1, -1, -1)}


def _noised_copies(small: Tensor, options: argparse.Namespace) -> dict[str, Tensor]:
    """A small picture for each image to draw, with noise of its own, and the level of the noise."""
    levels = torch.full((options.num_images,), NOISE_LEVEL if options.noise_level is None else options.noise_level)
    generators = [keyed_generator(options.seed, MAPS_KEY, index) for index in range(options.num_images)]
    noise = torch.stack([torch.randn(small.shape[1:], generator=one) for one in generators])
    return {"labels": levels, "concat": LOW_RES_SCHEDULE.add_noise(small.expand_as(noise), noise, levels)}


def start_from(
    picture: Picture | None, options: argparse.Namespace, trained: TrainedDenoiser, autoencoder: Autoencoder | None
) -> InitImage | None:
    """The picture as what the denoiser draws; of latents, those are known whose pixels all are.

    A denoiser that has the mask as a map is left to paint by it, and with full strength begins with noise alone.

    Args:
        picture: as `read_picture` gives it.
        options: of the command.
        trained: the denoiser.
        autoencoder: of its latents, if it denoises latents.

    Raises:
        ValueError: if strength is out of range.
    """
    if picture is None or _enlarges(trained):
        return None
    default = STRENGTH if picture.keep_mask is None else 1.0
    strength = default if options.strength is None else options.strength
    latents = _encoded(picture.pixels, trained, autoencoder)
    if _paints(trained):
        return None if strength == 1 else InitImage(latents, strength)
    keep_mask = None if picture.keep_mask is None else avg_pool2d(picture.keep_mask.float(), _factor(trained)) == 1
    return InitImage(latents, strength, keep_mask)


def frames_noise(options: argparse.Namespace, indices: list[int], shape: tuple[int, int, int]) -> Tensor | None:
    """The noise of these frames from one seed to the other, (N, C, H, W); None: there are no frames."""
    if options.interpolate is None:
        return None
    seeds, last = tuple(options.interpolate), options.num_images - 1
    return interpolated_noise(seeds, [index / last for index in indices], shape)


def _check_overlap(options: argparse.Namespace) -> None:
    if options.overlap is not None and options.window is None:
        raise ValueError("--overlap must come with windows that have one; add --window N")
    if options.overlap is not None and not 0 <= options.overlap < 1:
        raise ValueError(f"--overlap must be in [0, 1), got {options.overlap}; {OVERLAP} is usual")


def _check_enlarging(options: argparse.Namespace) -> None:
    if options.init is None:
        raise ValueError("--init must be given, as the model enlarges a picture; add --init FILE")
    for name in ("mask", "strength", "labels"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is not for a model that enlarges a picture; leave it out")
    if options.noise_level is not None and not 0 <= options.noise_level <= MAX_NOISE_LEVEL:
        raise ValueError(f"--noise_level must be in [0, {MAX_NOISE_LEVEL}], got {options.noise_level}; "
                         f"{NOISE_LEVEL} is usual")  # fmt: skip


def _check_interpolation(options: argparse.Namespace, trained: TrainedDenoiser) -> None:
    first, last = options.interpolate
    if first == last:
        raise ValueError(f"--interpolate must be two different seeds, got {first} twice")
    if options.num_images < 2:
        raise ValueError(f"--interpolate needs at least 2 images, the ends, got --num_images {options.num_images}")
    if options.scheduler in STOCHASTIC:
        smooth = ", ".join(name for name in supported_schedulers(trained.schedule) if name not in STOCHASTIC)
        raise ValueError(f"--interpolate needs a scheduler that adds no noise, got {options.scheduler}; use {smooth}")
    num_labels = 1 if _enlarges(trained) else len(options.labels or range(trained.num_classes))
    if num_labels > 1 or len(options.captions or []) > 1:
        raise ValueError("--interpolate draws one class or caption; give one --labels, or one of --captions")


def _paints(trained: TrainedDenoiser) -> bool:
    """Whether it was trained to paint what a mask covers."""
    return trained.condition(MaskedImage) is not None


def _enlarges(trained: TrainedDenoiser) -> bool:
    """Whether it was trained to enlarge a small image."""
    return trained.condition(LowResolution) is not None


def _size_of(name: str, path: str) -> tuple[int, int]:
    """Height and width of the image in a file, upright."""
    _check_file(name, path)
    file = OneFile(Path(path))
    size = decoded(upright_size, file, file.names[0])
    if isinstance(size, str):
        raise ValueError(f"--{name} {path} cannot be read as an image: {size}")
    return size


def _largest_size(side: int, trained: TrainedDenoiser) -> int:
    """The largest side up to that one that the network takes; its smallest, if that is larger."""
    smallest, step = trained.unet.smallest_size, trained.unet.size_step
    return smallest + max(side - smallest, 0) // step * step


@torch.no_grad()
def _encoded(pixels: Tensor, trained: TrainedDenoiser, autoencoder: Autoencoder | None) -> Tensor:
    """Pictures as what the denoiser draws, (N, C, h, w) on the CPU; of latents, their means."""
    if trained.latent_space is None or autoencoder is None:
        return pixels
    device = next(autoencoder.parameters()).device
    return trained.latent_space.normalise(latent_moments(autoencoder, pixels.to(device))[0]).cpu()


def _factor(trained: TrainedDenoiser) -> int:
    """Pixels along a side for one of what the denoiser draws."""
    return 1 if trained.latent_space is None else trained.latent_space.image_shape[1] // trained.image_shape[1]


def _network_sizes(name: str, sides: list[int], trained: TrainedDenoiser) -> list[int]:
    """Sides in pixels as sides of what the network draws."""
    factor = _factor(trained)
    fitting = [trained.unet.next_size(-(-side // factor)) * factor for side in sides]
    if min(sides) < 1 or fitting != sides:
        got, next_fit = (" ".join(map(str, one)) for one in (sides, fitting))
        raise ValueError(
            f"--{name} must be {trained.unet.smallest_size * factor} pixels plus a multiple of "
            f"{trained.unet.size_step * factor} for this model, got {got}; the next that fits is {next_fit}"
        )
    return [side // factor for side in sides]


def _check_file(name: str, path: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--{name} must be an image file, and there is none at {path}")


def _read(name: str, path: str, shape: tuple[int, int, int]) -> Tensor:
    """The image in a file, scaled and cut to that shape, (1, C, H, W) in [-1, 1]."""
    _check_file(name, path)
    channels, height, width = shape
    image_format, file = ImageFormat(height, width, channels), OneFile(Path(path))
    image = decoded(lambda data: decode_image(data, image_format), file, file.names[0])
    if isinstance(image, str):
        raise ValueError(f"--{name} {path} cannot be read as an image of the size to draw: {image}")
    return scale_to_unit_range(image[None])
