"""Pictures of what samples were drawn for, and of the samples."""

from collections.abc import Iterable, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unet_diffusion.evaluation.selections import Selection
from unet_diffusion.runtime.pictures import GRID_GREY, image_grid, over_white

TILE, HEADER = 96, 16  # pixels of the least side of a tile, and of the line of titles
MOST_NAMES, MOST_DRAWN = 10, 3  # columns, and samples in each


def side_by_side(columns: dict[str, Tensor]) -> Image.Image:
    """A picture with a row for each image and a column for each title, which is cut where it is too long.

    Args:
        columns: Images by title, (N, C, H, W) in [-1, 1] each.
    """
    tiles = torch.stack([over_white(images.cpu().float()) for images in columns.values()], dim=1)
    grid = image_grid(tiles.flatten(0, 1), columns=len(columns), min_tile=TILE)
    picture = Image.new("RGB", (grid.width, grid.height + HEADER), (GRID_GREY,) * 3)
    picture.paste(grid, (0, HEADER))
    draw, step = ImageDraw.Draw(picture), grid.width / len(columns)
    for column, title in enumerate(columns):
        title = " ".join(title.split())  # a caption may have several lines
        while draw.textlength(title) > step - 8:
            title = title[:-1]
        draw.text((column * step + 4, 2), title, fill="white")
    return picture


def picture_by_name(
    names: Iterable[str],
    held_out: Selection,
    names_of_held_out: Sequence[str],
    samples: Selection,
    names_of_samples: Sequence[str],
) -> Image.Image | None:
    """A picture with a column for each of up to ten names: a held-out image, and up to three samples below.

    All columns have as many samples as that with the fewest.

    Args:
        names: The names, such as classes or captions, in their order; those without images or samples are left out.
        held_out: Real images.
        names_of_held_out: The name of each.
        samples: The samples.
        names_of_samples: The name that each was drawn for.

    Returns:
        The picture; None: no name has an image and a sample.
    """
    rows: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in names}
    for place, names_of_images in enumerate((names_of_held_out, names_of_samples)):
        for row, name in enumerate(names_of_images):
            if name in rows:
                rows[name][place].append(row)
    both = {name: (real, drawn) for name, (real, drawn) in rows.items() if real and drawn}
    shown = dict(list(both.items())[:MOST_NAMES])
    if not shown:
        return None
    count = min(MOST_DRAWN, *(len(drawn) for _, drawn in shown.values()))
    columns = {
        name: torch.cat([held_out.seen(real[:1]), samples.seen(drawn[:count])]) for name, (real, drawn) in shown.items()
    }
    return side_by_side(columns)
