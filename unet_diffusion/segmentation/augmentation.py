"""Deformed views of labelled images: image and label are sampled at the same places.

Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597, section 3.1) shift and rotate images, change their grey
values, and deform them elastically by random displacements on a coarse 3x3 grid, with bicubic interpolation.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The deformation of training windows.

    The same random numbers are drawn whether a deformation is on or off, so turning one off does not change the others.

    Args:
        flip: Whether to mirror each axis with probability 1/2.
        rotation: Largest angle of rotation in degrees, in both directions; 0 is off.
        scale: Largest relative change of size, in both directions: 0.2 means from 1/1.2 to 1.2; 0 is off.
        elastic_sd: Standard deviation of the elastic displacements, in pixels; 0 is off.
        elastic_grid: Number of grid points along a side at which displacements are drawn.
        brightness: Standard deviation of the number that is added to an image in [-1, 1]; 0 is off.
        contrast: Standard deviation of the logarithm of the factor that stretches grey values about the image's mean;
            0 is off.
        noise: Standard deviation of the noise that is added to each pixel; 0 is off.
        colour: Standard deviation of brightness, and of the logarithm of contrast, of each channel by itself; 0 is off.
        shuffle: Share of the windows whose channels come in another order; 0 is off.
        inversion: Share of the windows in which bright becomes dark; 0 is off.

    Raises:
        ValueError: If a number is out of its range.
    """

    flip: bool = True
    rotation: float = 180.0
    scale: float = 0.0
    elastic_sd: float = 10.0
    elastic_grid: int = 3
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    colour: float = 0.0
    shuffle: float = 0.0
    inversion: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rotation", "scale", "elastic_sd", "brightness", "contrast", "noise", "colour"):
            if not 0 <= getattr(self, name) < math.inf:  # nor NaN
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}; 0 turns it off")
        for name in ("shuffle", "inversion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share of windows from 0 to 1, got {getattr(self, name)}")
        if self.elastic_grid < 2:
            raise ValueError(f"elastic_grid must be at least 2 points a side, got {self.elastic_grid}")

    def coordinates(self, size: tuple[int, int], centre: tuple[float, float], generator: torch.Generator) -> Tensor:
        """Return the place in the image at which each pixel of a window is sampled, (2, H, W): y and x in pixels.

        Args:
            size: Height and width of the window.
            centre: The window's centre in the image, y and x in pixels.
            generator: Generator of the random numbers.
        """
        height, width = size
        y = torch.arange(height, dtype=torch.float32) - (height - 1) / 2
        x = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
        offsets = torch.stack(torch.meshgrid(y, x, indexing="ij"))
        places = torch.einsum("ij,jhw->ihw", self._matrix(generator), offsets)
        places = places + elastic_displacement(size, sd=self.elastic_sd, grid=self.elastic_grid, generator=generator)
        return places + torch.tensor(centre, dtype=torch.float32)[:, None, None]

    def grey_values(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Return the image with other contrast, brightness and colours, and noise, (C, H, W), without clipping.

        Args:
            image: The image, (C, H, W) float in [-1, 1].
            generator: Generator of the random numbers.
        """
        contrast, brightness = torch.randn(2, generator=generator)
        noise = torch.randn(image.shape, generator=generator).to(image)
        if self.contrast:  # even a factor of 1 would round
            mean = image.mean()
            image = mean + (image - mean) * torch.exp(self.contrast * contrast)
        return self._colours(image + self.brightness * brightness + self.noise * noise, generator)

    def _colours(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Return the image with channels that are changed one by one and shuffled, and inverted, (C, H, W)."""
        factor, shift = torch.randn(2, len(image), 1, 1, generator=generator).to(image)
        order = torch.randperm(len(image), generator=generator)
        shuffle, inversion = torch.rand(2, generator=generator).tolist()
        if self.colour:
            image = image * torch.exp(self.colour * factor) + self.colour * shift
        if shuffle < self.shuffle:
            image = image[order]
        return -image if inversion < self.inversion else image

    def _matrix(self, generator: torch.Generator) -> Tensor:
        """Return the matrix that mirrors, rotates and scales offsets in the window to offsets in the image, (2, 2)."""
        mirror_y, mirror_x, turn, size = torch.rand(4, generator=generator).tolist()
        signs = [-1.0 if self.flip and draw < 0.5 else 1.0 for draw in (mirror_y, mirror_x)]
        angle = math.radians(self.rotation) * (2 * turn - 1)
        factor = (1 + self.scale) ** (2 * size - 1)
        cos, sin = factor * math.cos(angle), factor * math.sin(angle)
        return torch.tensor([[cos * signs[0], -sin * signs[1]], [sin * signs[0], cos * signs[1]]])


def elastic_displacement(
    size: tuple[int, int], *, sd: float = 10.0, grid: int = 3, generator: torch.Generator
) -> Tensor:
    """Return a smooth random displacement of each pixel, (2, H, W) float32: dy and dx in pixels.

    Displacements are normal at grid x grid points that span the window from corner to corner, and interpolated
    bicubically in between.

    Args:
        size: Height and width of the window.
        sd: Standard deviation at the points, in pixels.
        grid: Number of points along a side.
        generator: Generator of the random numbers.
    """
    coarse = sd * torch.randn(1, 2, grid, grid, generator=generator)
    return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)[0]


def sample_at(image: Tensor, coordinates: Tensor, *, mode: Literal["bicubic", "bilinear", "nearest"]) -> Tensor:
    """Sample an image, (C, H, W); beyond its border it is mirrored, without repeating the last pixel.

    Args:
        image: The image, (C, H0, W0) float32.
        coordinates: Places to sample, y and x in pixels, (2, H, W).
        mode: Interpolation; "nearest" keeps the values of labels.
    """
    sides = image.shape[1:]
    if mode == "nearest":
        y, x = (_mirrored(places.round(), side).long() for places, side in zip(coordinates, sides, strict=True))
        return image[:, y, x]
    # grid_sample's own padding mirrors; it takes x before y, on a scale where -1 and 1 are the centres of end pixels.
    y, x = (2 * places / max(side - 1, 1) - 1 for places, side in zip(coordinates, sides, strict=True))
    places = torch.stack([x, y], dim=2)[None]
    return F.grid_sample(image[None], places, mode=mode, padding_mode="reflection", align_corners=True)[0]


def _mirrored(positions: Tensor, side: int) -> Tensor:
    """Fold positions beyond the ends of a side back into it."""
    if side == 1:
        return torch.zeros_like(positions)
    period = 2 * (side - 1)
    folded = positions.remainder(period)
    return torch.minimum(folded, period - folded)
