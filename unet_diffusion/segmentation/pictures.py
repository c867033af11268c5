"""Pictures of segmentations: classes in colours, outlines over images, and images beside labels and predictions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from unet_diffusion.runtime.pictures import GRID_GREY, GRID_PADDING, picture_of, to_uint8
from unet_diffusion.runtime.pixel_values import as_colours

# The colours of Okabe & Ito, which colour-blind people can distinguish, too, after black for background and white.
PALETTE = np.array(
    [(0, 0, 0), (255, 255, 255), (230, 159, 0), (86, 180, 233), (0, 158, 115),
     (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)], dtype=np.uint8,
)  # fmt: skip
OUTLINE = (1.0, 0.85, 0.0)
TILE = 256  # side of an image in a comparison, in pixels
HEADER = 16  # height of the line of titles


def colour_classes(classes: NDArray[Any]) -> NDArray[np.uint8]:
    """Return classes as colours, (H, W, 3); negative numbers, which stand for no class, become grey.

    Args:
        classes: Class indices, (H, W); more classes than colours repeat the colours after black and white.
    """
    repeated = np.where(classes < len(PALETTE), classes, 2 + (classes - 2) % (len(PALETTE) - 2))
    return np.where((classes < 0)[..., None], np.uint8(GRID_GREY), PALETTE[repeated.clip(min=0)])


def outlined(image: Tensor, objects: NDArray[Any]) -> Image.Image:
    """Return the image in RGB with the outline of each object or class.

    Args:
        image: The image, (C, H, W) float in [-1, 1]; of other channels than 1, 3 or 4 the first three are shown.
        objects: Instance numbers or class indices, (H, W).
    """
    pixels = np.asarray(picture_of(to_uint8(as_colours(image[None]))[0]).convert("RGB"))
    marked = skimage.segmentation.mark_boundaries(pixels, objects, color=OUTLINE, mode="inner")
    return Image.fromarray((marked * 255).round().astype(np.uint8))


def comparison(
    images: Sequence[Tensor], truths: Sequence[NDArray[Any]], predictions: Sequence[NDArray[Any]]
) -> Image.Image:
    """Return a picture with a row for each image: the image, its label, and the prediction.

    Args:
        images: Images, (C, H, W) float in [-1, 1] each.
        truths: True classes, (H, W) each.
        predictions: Predicted classes, (H, W) each.
    """
    columns, step = ("image", "label", "prediction"), TILE + GRID_PADDING
    picture = Image.new("RGB", (len(columns) * step, HEADER + len(images) * step), (GRID_GREY,) * 3)
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(columns):
        draw.text((column * step + 4, 2), title, fill="white")
    for row, (image, truth, prediction) in enumerate(zip(images, truths, predictions, strict=True)):
        tiles = [picture_of(to_uint8(as_colours(image[None]))[0]).convert("RGB")]
        tiles += [Image.fromarray(colour_classes(classes)) for classes in (truth, prediction)]
        for column, tile in enumerate(tiles):
            # Colours of classes must not be mixed.
            method = Image.Resampling.NEAREST if column else Image.Resampling.BICUBIC
            picture.paste(ImageOps.contain(tile, (TILE, TILE), method), (column * step, HEADER + row * step))
    return picture
