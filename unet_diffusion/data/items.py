"""Items of a user's own source: an image and what is known of it, with each mistake named by item and rule."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from unet_diffusion.runtime.pixel_values import OF_COLOURS

RESERVED = ("images", "index", "x0", "std", "replaced", "labels", "captions")  # what batches hold by these names
LAYOUTS = "(H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, or a tensor (C, H, W) with others"
AS_THEY_ARE = ("L", "RGB", "RGBA")  # modes of PIL images; others are converted
WHITE_16_BIT = 65535


@runtime_checkable
class Items(Protocol):
    """What a source of one's own defines."""

    def __len__(self) -> int:
        """The number of items."""

    def __getitem__(self, index: int) -> Any:
        """Item `index`, a dict with an "image"."""


class ItemSource:
    """What sources of images and of labelled images share: items by number, unless a subclass defines `load`.

    Attributes:
        kept_range: The range of values of a model that is trained further or evaluated, which takes the place of a
            measured one. None: there is none.
    """

    kept_range: tuple[float, float] | None = None

    def prepare(self) -> None:
        """Download what is missing. One process calls it, before all of them load."""


@dataclass(frozen=True)
class Item:
    """An item after its checks.

    Args:
        where: The number of the item and the class of its source, for messages.
        image: The image, uint8 or uint16 (C, H, W).
        values: What else the item holds: "label" as the source gave it, numbers as a tensor, and texts.
    """

    where: str
    image: Tensor
    values: dict[str, Any]


def num_items(source: object) -> int:
    """The number of items of a source.

    Raises:
        NotImplementedError: If the class of the source lacks a method.
        ValueError: If there are no items.
    """
    kind = type(source).__name__
    if not isinstance(source, Items):
        raise NotImplementedError(f"{kind} must define __len__ and __getitem__, or load")
    if len(source) < 1:
        raise ValueError(f"{kind} must hold images, and its length is {len(source)}")
    return len(source)


def read_items(source: object, progress: bool) -> Iterator[Item]:
    """All items of a source, one after the other.

    Args:
        source: The source, whose class defines `__len__` and `__getitem__`.
        progress: Whether a progress bar is shown.
    """
    for index in tqdm(range(num_items(source)), "reading items", unit="item", disable=not progress):
        yield read_item(source, index)


def read_item(source: Any, index: int) -> Item:
    """One item of a source after its checks.

    Raises:
        ValueError: If the item cannot be read or is not as it must be.
    """
    where = f"item {index} of {type(source).__name__}"
    try:
        item = source[index]
    except Exception as error:  # of whatever a user's source reads
        raise ValueError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(item, Mapping) or "image" not in item:
        held = f"a dict with {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
        raise ValueError(f"{where} must be a dict with an image, such as dict(image=..., label=...), got {held}")
    known = {key: value for key, value in item.items() if key != "image" and value is not None}
    image = pixels_of(item["image"], f"the image of {where}")
    return Item(where, image, {key: _value(key, one, where) for key, one in known.items()})


def _value(key: object, value: Any, where: str) -> Any:
    """A value of an item: the label and texts as they are, and numbers as a tensor, float32 where they have fractions.

    Raises:
        ValueError: If batches use the key for something else, or the value is neither numbers nor text.
    """
    if not isinstance(key, str) or key in RESERVED:
        raise ValueError(f"a key of {where} must be a text, and none of {', '.join(RESERVED)}, which batches have for "
                         f"what the data module makes, got {key!r}; rename it (of an item: image, label, caption, name)"
        )  # fmt: skip
    if key == "label" or isinstance(value, str):
        return value
    if key in ("caption", "name"):
        raise ValueError(f"{key} of {where} must be text, got {value!r}")
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        numbers = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except (TypeError, ValueError):
        numbers = torch.empty(0)
    if not numbers.numel() or numbers.is_complex():
        raise ValueError(f"{key} of {where} must be a number, an array or a tensor of numbers, or a text, got "
                         f"{_kind(value)}; convert it in __getitem__")  # fmt: skip
    return numbers.float() if numbers.is_floating_point() else numbers


def pixels_of(image: object, name: str, channels: int | None = None) -> Tensor:
    """An image as uint8 or uint16 (C, H, W); floats in [0, 1] become uint16.

    Args:
        image: A PIL image, an array or a tensor.
        name: Name of the image in errors.
        channels: The number of channels that it must have, by which their side is told. None: it is not known.

    Raises:
        ValueError: If the image has another type, layout or range.
    """
    prefers_last = not isinstance(image, Tensor)  # where both the first and the last side could be channels
    if isinstance(image, Image.Image):
        image = _array_of(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
    if not isinstance(image, Tensor):
        raise ValueError(f"{name} must be a PIL image, an array or a tensor, got {_kind(image)}")
    pixels = _channels_first(image.detach().cpu(), prefers_last, name, channels)
    if pixels.is_floating_point():
        low, high = (float(end) for end in pixels.aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"{name} has floats from {low:.4g} to {high:.4g}, and floats must be in "
                             "[0, 1]; scale them, or give uint8 or uint16")  # fmt: skip
        return (pixels.double() * WHITE_16_BIT).round().to(torch.uint16)
    if pixels.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(f"{name} must hold uint8, uint16, or floats in [0, 1], got {_kind(pixels)}")
    return pixels.contiguous()


def _array_of(image: Image.Image) -> np.ndarray:
    """The pixels of a PIL image, upright."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return np.asarray(upright)  # refused or accepted like other arrays of that type
    if upright.mode == "La":
        upright = upright.convert("LA")  # Pillow converts it to nothing else
    if upright.mode not in AS_THEY_ARE:
        has_alpha = upright.has_transparency_data
        upright = upright.convert("L" if upright.mode == "1" else "RGBA" if has_alpha else "RGB")
    return np.asarray(upright)


def _channels_first(image: Tensor, prefers_last: bool, name: str, channels: int | None) -> Tensor:
    shape = tuple(image.shape)
    if image.ndim == 2 and image.numel():
        return image[None]
    if image.ndim == 3 and image.numel():
        possible = OF_COLOURS if channels in (None, *OF_COLOURS) else (channels,)
        first, last = shape[0] in possible, shape[2] in possible
        if last and (prefers_last or not first):
            return image.permute(2, 0, 1)
        if first or (channels is None and not prefers_last):
            return image
    raise ValueError(f"{name} must be {LAYOUTS}, got the shape {shape}")


def _kind(value: object) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else f"a {type(value).__name__}"
