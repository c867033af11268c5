"""The range of values of image files: declared, or measured over all of them, and kept with what is trained on them.

Numbers of 8 and 16 bits have a range by themselves. Others do not, such as floating-point numbers: which of them become
-1 and 1 must be known, and be the same in training, for new images, and where images are written.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from unet_diffusion.data.checking import CheckedImages, decoded, in_threads
from unet_diffusion.data.decoding import ImageFormat, ValueRange, check_range, plain_numbers
from unet_diffusion.data.files import ImageFiles
from unet_diffusion.data.items import ItemSource
from unet_diffusion.data.stored import stored_images
from unet_diffusion.runtime.messages import first_few
from unet_diffusion.runtime.pixel_values import LARGEST, PixelValues, default_shown

MEASURED: Literal["measured"] = "measured"
DeclaredRange = ValueRange | Literal["measured"] | None  # an option of sources


def check_declared(value_range: DeclaredRange) -> None:
    """Refuse what is no range of values.

    Args:
        value_range: The option.

    Raises:
        ValueError: If it is neither two numbers, the lower first, nor "measured", nor None.
    """
    if isinstance(value_range, str) and value_range != MEASURED:
        raise ValueError(f'value_range must be two numbers, or "{MEASURED}", got {value_range!r}')
    if value_range is not None and not isinstance(value_range, str):
        check_range(value_range)


def keep_range(datamodule: Any, values: PixelValues) -> None:
    """Have data whose range would be measured keep that of a model, whatever images there are now.

    Data that stretch each image by itself have no need of it: they take any range.

    Args:
        datamodule: A data module that is not set up yet.
        values: The values that the model was trained on.
    """
    if getattr(datamodule, "stretch", False):
        return
    source = getattr(datamodule, "source", None)
    if isinstance(source, ItemSource) and getattr(source, "value_range", None) == MEASURED:
        source.kept_range = values.low, values.high


def settled_range(
    value_range: DeclaredRange,
    files: Iterable[ImageFiles],
    channels: int,
    *,
    progress: bool,
    kept_range: ValueRange | None = None,
    on_bad_file: str | None = None,
) -> ValueRange | None:
    """The range of values of files: the declared one, or the least and the largest number in them.

    Files that cannot be read do not count; who decodes them says so.

    Args:
        value_range: The option.
        files: The files, in one or several places.
        channels: The number of channels that images must have.
        progress: Whether a progress bar is shown.
        kept_range: The range of the model that is trained further, which takes the place of a measured one.
        on_bad_file: The option of the source: with "skip" images beyond the range of the model are left out by who
            decodes them, and are no error here. None: the source has no such option.

    Raises:
        ValueError: If it is to be measured, and no file can be read, or all numbers are equal; or if images are beyond
            the range of the model.
    """
    if value_range is None or not isinstance(value_range, str):
        return value_range if value_range is None else (value_range[0], value_range[1])
    if kept_range is not None and on_bad_file == "skip":
        return kept_range
    ends = list[tuple[str, ValueRange]]()  # names of two places may be alike
    for place in files:

        def ends_of(name: str, place: ImageFiles = place) -> ValueRange | str:
            return decoded(lambda data: _ends(data, channels), place, name)

        outcomes = in_threads(ends_of, place.names, "measuring values", progress)
        ends += [(name, outcome) for name, outcome in outcomes if not isinstance(outcome, str)]
    if kept_range is not None:
        _refuse_beyond(kept_range, ends, can_skip=on_bad_file is not None)
        return kept_range
    low, high = min((low for _, (low, _) in ends), default=0.0), max((high for _, (_, high) in ends), default=0.0)
    if not low < high:
        held = f"all of their numbers are {low:.6g}" if ends else "none of the files can be read"
        raise ValueError(f"value_range must be measured over images of different numbers, and {held}; declare it")
    return low, high


def _refuse_beyond(kept_range: ValueRange, ends: Sequence[tuple[str, ValueRange]], *, can_skip: bool) -> None:
    low, high = kept_range
    beyond = [f"{name} ({least:.6g} to {most:.6g})" for name, (least, most) in ends if least < low or most > high]
    if beyond:
        skip = "leave them out by --data.on_bad_file skip, " if can_skip else ""
        raise ValueError(
            f"numbers must be from {low:.6g} to {high:.6g}, the range that the model was trained on, and "
            f"{len(beyond)} of {len(ends)} images have others: {first_few(beyond)}; take them away, {skip}"
            "or begin another run, which measures the range anew"
        )


def range_of_shards(value_range: DeclaredRange, dtype: str, ends: Sequence[float] | None) -> ValueRange | None:
    """The range of values of shards, whose numbers pack has looked at.

    Args:
        value_range: The option.
        dtype: The type of the numbers.
        ends: The least and the largest of them; None: images have alpha or colours by index.

    Raises:
        ValueError: If a range is needed, or cannot be, or numbers are beyond it.
    """
    if value_range is None:
        if dtype not in LARGEST:
            raise ValueError(f'value_range must be two numbers, or "{MEASURED}", for images of {dtype}, got None')
        return None
    if ends is None:
        raise ValueError("value_range must be None, as the images were packed with alpha or with colours by index")
    low, high = ends if isinstance(value_range, str) else value_range
    check_range((low, high))
    if not low <= ends[0] <= ends[1] <= high:
        raise ValueError(f"numbers must be within value_range, {low:.6g} to {high:.6g}, and those of the shards go "
                         f'from {ends[0]:.6g} to {ends[1]:.6g}; widen it, or set it to "{MEASURED}"')  # fmt: skip
    return low, high


def _ends(data: bytes, channels: int) -> ValueRange:
    numbers = [plain_numbers(image) for image in stored_images(data, channels)]
    return min(float(one.min()) for one in numbers), max(float(one.max()) for one in numbers)


def values_of(checked: CheckedImages, image_format: ImageFormat, shown_channels: tuple[int, ...] | None) -> PixelValues:
    """The values of images that were decoded, and the channels that pictures of them show.

    Args:
        checked: The images.
        image_format: The format that they were converted to.
        shown_channels: The channels that pictures show; None: the first three, unless the channels are colours.

    Raises:
        ValueError: If the type of the files cannot hold the range of values.
    """
    shown = shown_channels or shown_of(image_format.channels, checked.are_colours)
    return pixel_values(checked.dtypes, image_format.value_range, PixelValues.of_images(checked.images.dtype, shown))


def shown_of(channels: int, are_colours: bool) -> tuple[int, ...] | None:
    """The channels that pictures show if nobody chooses; None: all, as they are grey, RGB, or RGB and alpha.

    Args:
        channels: The number of channels.
        are_colours: Whether the files say that they are colours. Four that are none would be taken for RGB and alpha.
    """
    shown = default_shown(channels)
    return (0, 1, 2) if shown is None and not are_colours and channels > 3 else shown


def pixel_values(dtypes: Iterable[np.dtype], value_range: ValueRange | None, values: PixelValues) -> PixelValues:
    """The values of files of these types with a range of values; without one, they are those of the images.

    Args:
        dtypes: The types of the numbers in the files.
        value_range: The range.
        values: The values of the images as they are in memory.

    Raises:
        ValueError: If the type of the files cannot hold the range of values.
    """
    if value_range is None:
        return values
    dtype = np.result_type(*dtypes)
    if dtype.kind in "ui" and not np.iinfo(dtype).min <= value_range[0] < value_range[1] <= np.iinfo(dtype).max:
        ends = f"{value_range[0]:.6g} to {value_range[1]:.6g}"
        raise ValueError(f"value_range must be within the numbers of {dtype.name}, as the files hold, got {ends}; "
                         "images are written with that type")  # fmt: skip
    return replace(values, dtype=dtype.name, low=value_range[0], high=value_range[1])


def check_shown(shown_channels: tuple[int, ...] | None, channels: int) -> None:
    """Refuse channels to show that images do not have.

    Args:
        shown_channels: The option; None: nobody has chosen.
        channels: The number of channels of the images.

    Raises:
        ValueError: If there are not one to three, or one is not there.
    """
    if shown_channels is None:
        return
    if not 1 <= len(shown_channels) <= 3 or not all(0 <= one < channels for one in shown_channels):
        raise ValueError(f"shown_channels must be one to three numbers from 0 to {channels - 1}, got "
                         f"{list(shown_channels)}")  # fmt: skip
