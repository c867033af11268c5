"""Generated images of cells that touch, with instance numbers: labelled data without a download."""

import numpy as np
import scipy
import skimage
from numpy.typing import NDArray

SMALLEST_SIDE = 32  # least height and width of an image, in pixels
SMALLEST_CELL = 30  # least area of a cell, in pixels
RADII = (7.0, 14.0)  # smallest and largest radius of a cell, in pixels
HARMONICS = 4  # number of harmonics in a cell's outline
WOBBLE = 0.12  # amplitude of the first harmonic, relative to the radius
REACH = round(2 * RADII[1])  # pixels from a cell's centre within which its whole outline lies
TRIES = 60  # places tried for a cell before it is left out
MAX_COVERED = 0.25  # share of a cell that earlier cells may hide


def synthetic_cells(
    size: tuple[int, int], *, num_cells: int = 20, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return an image of cells, (H, W) uint8, and their instance numbers, (H, W) int32: 0 is background, then 1, 2, ...

    Cells are brighter than the background, by about as much as the uneven light varies. Many cells touch, with only a
    faint dark line between them.

    Args:
        size: Height and width, at least 32 pixels each.
        num_cells: Largest number of cells; there are fewer where there is no room.
        seed: Seed of the image; the same seed gives the same image.

    Raises:
        ValueError: If the size or the number of cells is too small.
    """
    if min(size) < SMALLEST_SIDE or num_cells < 1:
        raise ValueError(
            f"size must be at least {SMALLEST_SIDE} pixels a side and num_cells at least 1, got {size} and {num_cells}"
        )
    rng = np.random.default_rng(seed)
    instances = _placed_cells(size, num_cells, rng)
    return _picture(instances, rng), instances


def _placed_cells(size: tuple[int, int], num_cells: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Place cells one after the other, each only where there is no earlier cell."""
    instances = np.zeros(size, dtype=np.int32)
    for _ in range(num_cells):
        for _ in range(TRIES):
            outline = _blob(size, rng)
            free = outline & (instances == 0)
            neighbours = scipy.ndimage.binary_dilation(outline, iterations=2) & (instances > 0)
            is_crowded = free.sum() < (1 - MAX_COVERED) * outline.sum()
            # The first cell may lie anywhere; later cells preferably lie next to an earlier one.
            is_lonely = instances.any() and not neighbours.any() and rng.random() < 0.7
            if not is_crowded and not is_lonely:
                instances[_largest_part(free)] = instances.max() + 1
                break
    return _without_small(instances)


def _blob(size: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return a filled outline whose radius varies with the angle."""
    height, width = size
    centre_y, centre_x = rng.uniform(0, height), rng.uniform(0, width)
    rows, columns = (slice(max(int(centre) - REACH, 0), int(centre) + REACH) for centre in (centre_y, centre_x))
    y, x = np.ogrid[:height, :width]
    y, x = y[rows], x[:, columns]
    stretch, tilt = rng.uniform(0.75, 1.0), rng.uniform(0, np.pi)
    dy, dx = y - centre_y, x - centre_x
    along, across = dx * np.cos(tilt) + dy * np.sin(tilt), (dy * np.cos(tilt) - dx * np.sin(tilt)) / stretch
    angle, distance = np.arctan2(across, along), np.hypot(across, along)
    radius = np.full(angle.shape, rng.uniform(*RADII))
    for order in range(2, 2 + HARMONICS):
        radius *= 1 + rng.normal(0, WOBBLE / order) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    outline = np.zeros(size, dtype=bool)
    outline[rows, columns] = distance < radius
    return outline


def _largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    parts = skimage.measure.label(mask, connectivity=1)
    return parts == 1 + np.bincount(parts.ravel())[1:].argmax()


def _without_small(instances: NDArray[np.int32]) -> NDArray[np.int32]:
    sizes = np.bincount(instances.ravel())
    sizes[0] = 0
    large = np.flatnonzero(sizes >= SMALLEST_CELL)
    renumber = np.zeros(len(sizes), dtype=np.int32)
    renumber[large] = np.arange(1, len(large) + 1)
    return renumber[instances]


def _picture(instances: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return grey values: bright cells with texture and darker rims, in uneven light, blurred and noisy."""
    size = instances.shape
    brightness = np.concatenate([[0.0], rng.uniform(60, 110, instances.max())])[instances]
    depth = np.zeros(size)  # distance to the cell's own edge
    for number, box in enumerate(scipy.ndimage.find_objects(instances), start=1):
        wide = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
        inside = instances[wide] == number
        depth[wide] += scipy.ndimage.distance_transform_edt(inside)
    texture = scipy.ndimage.gaussian_filter(rng.normal(0, 1, size), 1.5) * 25 * (instances > 0)
    rim = np.where(instances > 0, np.clip(0.55 + 0.15 * depth, 0, 1), 0)
    light = scipy.ndimage.gaussian_filter(rng.normal(0, 1, size), min(size) / 4, mode="reflect")
    light = 20 * light / max(np.abs(light).max(), 1e-9)
    clean = 45 + light + rim * (brightness + texture)
    noisy = scipy.ndimage.gaussian_filter(clean, 0.8) + rng.normal(0, 5, size)
    return np.clip(noisy.round(), 0, 255).astype(np.uint8)
