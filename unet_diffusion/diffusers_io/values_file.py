"""What the numbers in image files mean, in a file beside a pipeline or an autoencoder, which diffusers leaves alone."""

import json
from pathlib import Path

from unet_diffusion.runtime.atomic_files import read_json
from unet_diffusion.runtime.pixel_values import PixelValues, default_shown

FILE = "pixel_values.json"


def write_values(values: PixelValues, folder: Path) -> None:
    """Write the file.

    Args:
        values: What the numbers mean.
        folder: The folder of the pipeline or autoencoder.
    """
    (folder / FILE).write_text(json.dumps(values.plain(), indent=1) + "\n", encoding="utf-8")


def read_values(folder: Path, channels: int) -> PixelValues:
    """What the file says; in a folder without it images are of 8 bits.

    Args:
        folder: The folder of the pipeline or autoencoder, or a run folder with one of an autoencoder.
        channels: The number of channels of its images.

    Raises:
        ValueError: If the file is damaged.
    """
    file = next((one for one in (folder / FILE, folder / "autoencoder" / FILE) if one.is_file()), None)
    if file is None:
        return PixelValues(shown=default_shown(channels))
    try:
        return PixelValues.from_plain(read_json(file))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); export the folder again") from error
