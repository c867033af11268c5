"""A picture of what a segmenter got right and wrong in an image: outlines of its objects in two colours."""

import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from unet_diffusion.evaluation.segmented_images import ObjectMatches, Predicted, Truth
from unet_diffusion.runtime.pictures import GRID_GREY, GRID_PADDING, picture_of, to_uint8
from unet_diffusion.runtime.pixel_values import as_colours

SIDE = 448  # of an image, in pixels
HEADER = 16  # height of the line of titles
RIGHT, WRONG = (30, 144, 255), (255, 110, 0)  # seen on black and on white, and told apart by colour-blind people
COLUMNS = ("image", "label: found blue, missed orange", "prediction: right blue, wrong orange")


def outlined_errors(image: Tensor, truth: Truth, predicted: Predicted) -> Image.Image:
    """The image, its label and the prediction: matched objects have a blue outline, others an orange one.

    Args:
        image: The channels of the image that pictures show, (C, H, W) float in [-1, 1].
        truth: What it shows.
        predicted: What the segmenter sees in it.
    """
    matches = ObjectMatches.of(truth, predicted)
    shown = picture_of(to_uint8(as_colours(image[None]))[0]).convert("RGB")
    scale = SIDE / max(shown.size)
    width, height = (max(round(side * scale), 1) for side in shown.size)
    pixels = np.asarray(shown.resize((width, height), Image.Resampling.BICUBIC))
    tiles = [pixels, *(_outlined(pixels, one, ious) for one, ious in
             ((truth.objects, matches.true_ious), (predicted.objects, matches.ious)))]  # fmt: skip
    picture = Image.new("RGB", (3 * width + 2 * GRID_PADDING, HEADER + height), (GRID_GREY,) * 3)
    draw = ImageDraw.Draw(picture)
    for column, (title, tile) in enumerate(zip(COLUMNS, tiles, strict=True)):
        left = column * (width + GRID_PADDING)
        draw.text((left + 4, 2), title, fill="white")
        picture.paste(Image.fromarray(tile), (left, HEADER))
    return picture


def _outlined(pixels: NDArray[np.uint8], objects: NDArray[np.int32], ious: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Pixels with the outline of each object, in colours by whether its IoU is above 0; numbers are scaled to them."""
    numbers = np.asarray(Image.fromarray(objects).resize(pixels.shape[1::-1], Image.Resampling.NEAREST))
    edges = skimage.segmentation.find_boundaries(numbers, mode="inner")
    edges = skimage.morphology.dilation(edges) & (numbers > 0)  # two pixels wide
    is_matched = np.zeros(int(objects.max(initial=0)) + 1, dtype=bool)
    is_matched[np.unique(objects[objects > 0])] = ious > 0
    colours = np.where(is_matched[numbers][..., None], RIGHT, WRONG)
    return np.where(edges[..., None], colours, pixels).astype(np.uint8)
