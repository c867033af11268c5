"""From the bytes of a label file to its numbers, whatever the file calls white."""

import numpy as np
from numpy.typing import NDArray

from unet_diffusion.data.stored import stored_images
from unet_diffusion.data.stored_image import Stored, StoredImage, colours_of
from unet_diffusion.runtime.cropping import centred_box

MOST_SAMPLES = 4  # numbers a pixel of a label: RGB and alpha


def decode_label_pages(data: bytes) -> list[NDArray[np.int32]]:
    """Every page of a label image, (H, W) each: the numbers as they are stored, whatever the file calls white.

    Of a file with a palette they are the indices, unless all colours of the palette are grey: then a grey picture was
    stored that way, and its greys count. Alpha is left out.

    Args:
        data: The contents of an image file: grey, with a palette, or colour with equal channels, of any depth.

    Raises:
        ValueError: If pixels are colours or no whole numbers of 32 bits, or the file is of a kind that changes them.
        Exception: If the file is damaged; its type is the decoder's.
    """
    return [_label(image) for image in stored_images(data)]


def fitted_label(label: NDArray[np.int32], height: int, width: int) -> NDArray[np.int32]:
    """A label image (H, W), scaled and cut as `decode_image` does it; each pixel is the nearest one of the file.

    Args:
        label: The label image.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
    """
    full_height, full_width = label.shape
    top, left, box_height, box_width = centred_box((full_height, full_width), (height, width))
    rows = (top + (np.arange(height) + 0.5) * box_height / height).astype(int)
    columns = (left + (np.arange(width) + 0.5) * box_width / width).astype(int)
    return label[rows[:, None], columns]


def _label(image: StoredImage) -> NDArray[np.int32]:
    if image.is_lossy:
        raise ValueError(
            f"a label must be of a format that keeps each number, and {image.file_format} blurs them; save it as PNG"
        )
    if image.is_inverted and image.bits == 1:
        raise ValueError(
            "a label of 1 bit must say that 1 is white, and in this file 0 is, so that objects might be either; "
            "save it in 8 bits"
        )
    if image.num_samples > MOST_SAMPLES:
        raise ValueError(f"a label must be one number a pixel, and this file has {image.num_samples}; save one of them")
    numbers = image.numbers()[..., : image.num_channels]
    if image.palette is not None and (image.palette[:, :3] == image.palette[:, :1]).all():
        numbers = colours_of(numbers[..., 0], image.palette)[..., :1]
    if numbers.shape[-1] > 1 and (numbers != numbers[..., :1]).any():
        raise ValueError(
            "a label must be one number a pixel, and this file holds colours; save class indices or a palette image"
        )
    return _as_int32(numbers[..., 0])


def _as_int32(numbers: Stored) -> NDArray[np.int32]:
    if numbers.dtype.kind == "c" or (numbers.dtype.kind == "f" and not (numbers == np.rint(numbers)).all()):
        raise ValueError("a label must be a whole number, and this file holds fractions; save it in 8 or 16 bits")
    limits = np.iinfo(np.int32)
    for end in (numbers.min().item(), numbers.max().item()):
        if not limits.min <= end <= limits.max:
            raise ValueError(f"a label must be from {limits.min} to {limits.max}, got {end}; number the objects anew")
    return numbers.astype(np.int32)
