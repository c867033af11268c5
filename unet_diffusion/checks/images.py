"""What is wrong with images: their range, their channels, images of one colour, and what scaling and cutting leave."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unet_diffusion.checks.findings import Finding, percent
from unet_diffusion.runtime.messages import first_few

LEAST_RANGE = 1 / 8  # of the values that a type of number has; fewer, and the network sees almost one grey
MANY_CONSTANT = 0.1  # of the images
MUCH_CUT = 0.15  # of an image
MANY_CUT = 0.05  # of the images


def value_facts(images: Sequence[Tensor] | Tensor) -> list[str]:
    """A line about the values of images.

    Args:
        images: The images, uint8, uint16 or floats in [-1, 1], (C, H, W) each, or all as one tensor (N, C, H, W).
    """
    lows, highs = zip(*value_ends(images), strict=True)
    if images[0].is_floating_point():
        return [f"values: {min(lows):.3g} to {max(highs):.3g}, where -1 and 1 are the ends of value_range"]
    return [f"values: {min(lows):,} to {max(highs):,} of 0 to {torch.iinfo(images[0].dtype).max:,}"]


def image_findings(images: Sequence[Tensor] | Tensor, names: Sequence[str] | None = None) -> list[Finding]:
    """What is wrong with the values of images.

    Args:
        images: The images, uint8, uint16 or floats in [-1, 1], (C, H, W) each, or all as one tensor (N, C, H, W).
        names: The name of each; None: they are numbered.
    """
    names = names or [str(number) for number in range(len(images))]
    ends = value_ends(images)
    return [*_of_range(images, ends), *_of_constants(ends, names), *_of_channels(images)]


def value_ends(images: Sequence[Tensor] | Tensor) -> list[tuple[float, float]]:
    """The least and the largest value of each image, by NumPy, as torch finds none of 16 bits."""
    if isinstance(images, Tensor):
        rows = images.flatten(1).numpy()
        return list(zip(rows.min(axis=1).tolist(), rows.max(axis=1).tolist(), strict=True))
    return [(image.numpy().min().item(), image.numpy().max().item()) for image in images]


def _of_range(images: Sequence[Tensor] | Tensor, ends: Sequence[tuple[float, float]]) -> list[Finding]:
    if images[0].is_floating_point():  # the range was declared or measured
        return []
    white = torch.iinfo(images[0].dtype).max
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if low == high or (high - low) / white >= LEAST_RANGE:
        return []
    text = (
        f"values are {low:,} to {high:,} of 0 to {white:,}, {percent((high - low) / white)} of the range, so that a "
        "network sees almost one grey"
    )
    return [Finding("warning", text, "--data.stretch true, where the data have it; else scale the files")]


def _of_constants(ends: Sequence[tuple[float, float]], names: Sequence[str]) -> list[Finding]:
    constant = [name for name, (low, high) in zip(names, ends, strict=True) if low == high]
    if not constant:
        return []
    text = f"{len(constant)} of {len(names)} images are of one colour ({first_few(constant)}): nothing is to be learnt"
    return [Finding("advice" if len(constant) > MANY_CONSTANT * len(names) else "note", text, "remove them")]


def _of_channels(images: Sequence[Tensor] | Tensor) -> list[Finding]:
    channels = len(images[0])
    if (
        channels == 4
        and not images[0].is_floating_point()
        and all(bool((image[3].numpy() == torch.iinfo(image.dtype).max).all()) for image in images)
    ):
        return [Finding("note", "no image has a transparent pixel; three channels hold as much", "--data.channels 3")]
    if channels == 3 and all(bool((image.numpy() == image[:1].numpy()).all()) for image in images):
        return [Finding("note", "all images are grey; one channel holds as much", "--data.channels 1")]
    return []


def crop_findings(sizes: Sequence[tuple[int, int]], size: tuple[int, int]) -> list[Finding]:
    """How much of tall and wide images the cut to their centre leaves out.

    Args:
        sizes: Height and width of each image before it was scaled and cut.
        size: Height and width after it.
    """
    cut = {"tall": list[float](), "wide": list[float]()}
    for height, width in sizes:
        ratio = (height / width) / (size[0] / size[1])
        cut["tall" if ratio > 1 else "wide"].append(1 - min(ratio, 1 / ratio))
    findings = []
    for kind, ends, other in (("tall", "top and bottom, where heads are", "HEIGHT"), ("wide", "both sides", "WIDTH")):
        much = [share for share in cut[kind] if share > MUCH_CUT]
        if much:
            text = (
                f"{len(much)} of {len(sizes)} images are {kind}, and lose {percent(sum(much) / len(much))} on average "
                f"at {ends}, by the cut to {size[0]}x{size[1]}"
            )
            option = f"--data.image_size HEIGHT WIDTH with a larger {other}, or crop the files around what matters"
            findings.append(Finding("advice" if len(much) > MANY_CUT * len(sizes) else "note", text, option))
    return findings
