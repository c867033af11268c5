"""Boxes around objects in a file of the form of COCO, moved to images that are scaled and cut.

The file (https://cocodataset.org/#format-data) is JSON with "images" (id, file_name, width, height), "categories" (id,
name) and "annotations" (image_id, category_id, bbox: left, top, width, height in pixels).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unet_diffusion.runtime.cropping import Size, centred_box

Box = tuple[str, float, float, float, float]  # name, left, top, width, height in pixels
LEAST_VISIBLE = 0.25  # share of a box's area: with less of it left by the cut, the object is not to be recognised
ROUNDING = 1.0  # pixels that a box may reach beyond its image: annotations are rounded


@dataclass
class CocoBoxes:
    """The boxes of images by the names of their files, and what is wrong with them.

    Args:
        boxes: The boxes of each image.
        sizes: The height and width of each image.
        wrong: A line for each annotation that cannot be used, and for each image or class that is not told apart.
    """

    boxes: dict[str, list[Box]] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def coco_boxes(table: Mapping[str, Any]) -> CocoBoxes:
    """The boxes in a table of COCO's form; annotations of crowds are left out.

    Args:
        table: The contents of the file.

    Raises:
        ValueError: If it has another form.
    """
    found = CocoBoxes()
    try:
        found.wrong += [
            *_listed_twice(table, "images", "id", "file_name"),
            *_listed_twice(table, "images", "file_name", "width", "height"),
            *_listed_twice(table, "categories", "id", "name"),
        ]
        classes = {one["id"]: str(one["name"]) for one in table["categories"]}
        names = {one["id"]: str(one["file_name"]) for one in table["images"]}
        found.sizes = {str(one["file_name"]): (int(one["height"]), int(one["width"])) for one in table["images"]}
        found.boxes = {name: [] for name in found.sizes}
        for number, one in enumerate(table["annotations"]):
            where = f"annotation {one.get('id', number)}"
            if one["image_id"] not in names or one["category_id"] not in classes:
                key = "category_id" if one["image_id"] in names else "image_id"
                found.wrong.append(f"{where} has the {key} {one[key]!r}, which the file does not list")
                continue
            if one.get("iscrowd"):
                continue
            name = names[one["image_id"]]
            left, top, width, height = (float(side) for side in one["bbox"])
            box = (classes[one["category_id"]], left, top, width, height)
            if why := why_not_inside(box, found.sizes[name]):
                found.wrong.append(f"{where} of {name}: {why}")
            else:
                found.boxes[name].append(box)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            "boxes must be of COCO's form: images with id, file_name, width and height, categories with id and name, "
            f"annotations with image_id, category_id and bbox of four numbers; got {type(error).__name__}: {error}"
        ) from error
    return found


def _listed_twice(table: Mapping[str, Any], part: str, key: str, *values: str) -> list[str]:
    """A line for each value of a key that rows of a part give different other values, as in files put together."""
    values_of: dict[Any, list[str]] = {}
    for row in table[part]:
        text = " x ".join(str(row[value]) for value in values)
        if text not in values_of.setdefault(row[key], []):
            values_of[row[key]].append(text)
    return [
        f"{part}: the {key} {name!r} stands for {' and '.join(texts)}; give each its own"
        for name, texts in values_of.items()
        if len(texts) > 1
    ]


def why_not_inside(box: Box, size: Size) -> str | None:
    """The reason why a box cannot be one of an image; None if it can.

    Args:
        box: The box.
        size: Height and width of the image.
    """
    name, left, top, width, height = box
    ends = ((left, left + width, size[1]), (top, top + height, size[0]))
    is_inside = all(start >= -ROUNDING and end <= side + ROUNDING for start, end, side in ends)
    if is_inside and width > 0 and height > 0:
        return None
    sides = f"left {left:g}, top {top:g}, width {width:g}, height {height:g}"
    return f"the box of {name!r} at {sides} must lie within the image of {size[1]} x {size[0]} (width x height)"


def fitted_boxes(boxes: Sequence[Box], size: Size, fitted: Size) -> list[Box]:
    """The boxes in an image that was scaled and cut; those of which less than a quarter is left are left out.

    Args:
        boxes: The boxes.
        size: Height and width of the image.
        fitted: Height and width of what was scaled and cut from its centre.
    """
    box_top, box_left, box_height, box_width = centred_box(size, fitted)
    scales = fitted[1] / box_width, fitted[0] / box_height
    moved = []
    for name, left, top, width, height in boxes:
        x0, x1 = ((x - box_left) * scales[0] for x in (left, left + width))
        y0, y1 = ((y - box_top) * scales[1] for y in (top, top + height))
        whole = (x1 - x0) * (y1 - y0)
        (x0, x1), (y0, y1) = _within(x0, x1, fitted[1]), _within(y0, y1, fitted[0])
        if x1 > x0 and y1 > y0 and (x1 - x0) * (y1 - y0) >= LEAST_VISIBLE * whole:
            moved.append((name, x0, y0, x1 - x0, y1 - y0))
    return moved


def _within(start: float, end: float, side: float) -> tuple[float, float]:
    return min(max(start, 0.0), side), min(max(end, 0.0), side)
