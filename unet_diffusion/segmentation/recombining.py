"""Masks recombined from real ones: windows of label images, with objects of other images at new free places.

Objects keep the shapes that they really have, and the distances between most of them, which a random generator of masks
would have to learn first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import skimage
from numpy.typing import NDArray

from unet_diffusion.runtime.messages import first_few
from unet_diffusion.runtime.randomness import keyed_generator

MASK_KEY = 4  # keeps the random numbers of masks apart from noise, which has the same seed
SCALE = 1.2  # windows and objects are enlarged or reduced up to this factor
MOST_PASTED = 6  # objects of other images in a mask
TRIES = 20  # places tried for an object before it is left out
LIKE_SIZE = 2.0  # pasted objects are up to this many times as large, or small, as the median of the window's image


@dataclass(frozen=True)
class Mask:
    """A recombined mask.

    Args:
        labels: The number of the object at each pixel, (H, W): from 1 without gaps, 0 is background.
        places: The number of the label image that each pixel is from, and its row and column there, (3, H, W).
    """

    labels: NDArray[np.int32]
    places: NDArray[np.int64]


class RecombinedMasks:
    """Masks by number; mask i is a function of the label images, the size, the seed and i.

    A mask is a window around an object, turned by quarters, mirrored and a little enlarged or reduced. Up to
    MOST_PASTED whole objects of about the same size, from other images, are added at free places; they may touch.

    Args:
        labels: Label images with a number for each object, (H, W) each.
        size: Height and width of the masks.
        seed: Seed of the masks.
        names: The name of each label image, for errors.
        kinds: A number for each label image: objects are added to images of the same number alone. None: to all.

    Raises:
        ValueError: If a label image is smaller than the longer side of a mask, or none holds an object.
    """

    def __init__(
        self,
        labels: Sequence[NDArray[np.int32]],
        size: tuple[int, int],
        *,
        seed: int,
        names: Sequence[str],
        kinds: Sequence[int] | None = None,
    ) -> None:
        side = max(size)
        if small := [f"{name} ({one.shape[0]}x{one.shape[1]})" for name, one in zip(names, labels, strict=True)
                     if min(one.shape) < side]:  # fmt: skip
            raise ValueError(
                f"label images must have at least {side}x{side} pixels, the longer side of a mask, and {len(small)} of "
                f"{len(labels)} are smaller: {first_few(small)}; set image_size to less, or leave them out"
            )
        self.labels = [_pieces(one) for one in labels]
        self.size, self.seed = size, seed
        self._kinds = np.array([0] * len(labels) if kinds is None else kinds)
        boxes = [scipy.ndimage.find_objects(one) for one in self.labels]
        self._boxes = np.array([
            (image, number, *(bound for side in box for bound in (side.start, side.stop - side.start)))
            for image, objects in enumerate(boxes)
            for number, box in enumerate(objects, start=1)
        ]).reshape(-1, 6)  # fmt: skip
        if not len(self._boxes):
            raise ValueError(f"{len(labels)} label images hold no object; give label images with a number for each")
        self._areas = np.concatenate([np.bincount(one.ravel())[1:] for one in self.labels])
        self._is_whole = np.array([self._lies_inside(box) for box in self._boxes])

    def __getitem__(self, index: int) -> Mask:
        rng = np.random.default_rng(keyed_generator(self.seed, MASK_KEY, index).initial_seed())
        image = rng.choice(np.unique(self._boxes[:, 0]))
        places = self._window(image, rng)
        labels = _pieces(self.labels[image][places[1], places[2]])
        donors = self._donors(image)
        for _ in range(rng.integers(MOST_PASTED + 1) if len(donors) else 0):
            self._paste(labels, places, rng.choice(donors), rng)
        return Mask(_pieces(labels), places)  # an object that was reduced may have fallen into pieces

    def _window(self, image: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The places of the pixels of a window of an image that holds at least the middle of one of its objects."""
        _, _, *box = rng.choice(self._boxes[self._boxes[:, 0] == image])
        turns = int(rng.integers(4))
        sides = self.size if turns % 2 == 0 else self.size[::-1]
        full = self.labels[image].shape
        scale = max(SCALE ** rng.uniform(-1, 1), *(side / most for side, most in zip(sides, full, strict=True)))
        window = []
        for (start, length), side, most in zip((box[:2], box[2:]), sides, full, strict=True):
            length_there, middle = min(max(round(side / scale), 1), most), start + length // 2
            first, last = max(middle - length_there + 1, 0), min(middle, most - length_there)
            window += [rng.integers(first, last + 1), length_there]
        return _places(image, window, self.size, turns, is_mirrored=rng.random() < 0.5)

    def _donors(self, image: int) -> NDArray[np.int64]:
        """The numbers of the whole objects of other images of the kind that are about as large as those of an image."""
        images = self._boxes[:, 0]
        ratio = self._areas / np.median(self._areas[images == image])
        is_alike = (ratio <= LIKE_SIZE) & (ratio >= 1 / LIKE_SIZE) & (self._kinds[images] == self._kinds[image])
        return np.flatnonzero((images != image) & self._is_whole & is_alike)

    def _paste(
        self, labels: NDArray[np.int32], places: NDArray[np.int64], donor: int, rng: np.random.Generator
    ) -> None:
        """Add an object to a mask, in place, where it covers no other object; if no such place is found, do not."""
        image, number, *box = self._boxes[donor]
        turns, scale = int(rng.integers(4)), SCALE ** rng.uniform(-1, 1)
        height, width = (max(round(length * scale), 1) for length in (box[1::2] if turns % 2 == 0 else box[3::-2]))
        there = _places(image, box, (height, width), turns, is_mirrored=rng.random() < 0.5)
        is_object = self.labels[image][there[1], there[2]] == number
        if height > self.size[0] or width > self.size[1] or not is_object.any():
            return
        for _ in range(TRIES):
            top, left = (
                int(rng.integers(side - part + 1)) for side, part in zip(self.size, (height, width), strict=True)
            )
            part = (slice(top, top + height), slice(left, left + width))
            if not labels[part][is_object].any():
                labels[part][is_object] = labels.max() + 1
                places[(slice(None), *part)][:, is_object] = there[:, is_object]
                return

    def _lies_inside(self, box: NDArray[np.int64]) -> bool:
        """Whether an object keeps off the border of its image, which may cut through it."""
        image, _, top, height, left, width = box
        bottom, right = self.labels[image].shape
        return bool(top > 0 and left > 0 and top + height < bottom and left + width < right)


def pixels_at(images: Sequence[NDArray[np.uint8]], mask: Mask) -> NDArray[np.uint8]:
    """The pixels of the real images that a mask's pixels are from, (C, H, W).

    Args:
        images: The images that the label images belong to, (C, H, W) each.
        mask: The mask.
    """
    numbers, rows, columns = mask.places
    pixels = np.empty((len(images[0]), *mask.labels.shape), dtype=np.uint8)
    for number in np.unique(numbers):
        is_here = numbers == number
        pixels[:, is_here] = images[number][:, rows[is_here], columns[is_here]]
    return pixels


def _pieces(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """The number of each connected piece of equal numbers, also diagonally connected, from 1; 0 stays background."""
    return skimage.measure.label(labels, connectivity=2, background=0).astype(np.int32)


def _places(
    image: int, box: Sequence[int], size: tuple[int, int], turns: int, *, is_mirrored: bool
) -> NDArray[np.int64]:
    """The place of each pixel of a view of a box, (3, *size): the nearest one, as in `Mask`.

    Args:
        image: The number of the image.
        box: Top, height, left and width of the box there.
        size: Height and width of the view.
        turns: By how many quarters the view is turned.
        is_mirrored: Whether it is then mirrored.
    """
    height, width = size if turns % 2 == 0 else size[::-1]
    rows = box[0] + ((np.arange(height) + 0.5) * box[1] / height).astype(np.int64)
    columns = box[2] + ((np.arange(width) + 0.5) * box[3] / width).astype(np.int64)
    places = np.stack([np.full((height, width), image), *np.meshgrid(rows, columns, indexing="ij")])
    turned = np.rot90(places, turns, axes=(1, 2))
    return (turned[..., ::-1] if is_mirrored else turned).copy()
