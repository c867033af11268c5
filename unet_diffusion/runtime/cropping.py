"""The part of an image that is scaled to another size."""

Size = tuple[int, int]  # height and width


def centred_box(size: Size, fitted: Size) -> tuple[float, float, float, float]:
    """Top, left, height and width of the largest centred part of an image with the aspect of another size.

    Its corner lies at a whole pixel where that part is only cut out and not scaled.

    Args:
        size: Height and width of the image.
        fitted: Height and width that the part is scaled to.
    """
    scale = min(side / target for side, target in zip(size, fitted, strict=True))
    height, width = (min(target * scale, side) for side, target in zip(size, fitted, strict=True))  # where rounded up
    top, left = (size[0] - height) / 2, (size[1] - width) / 2
    return (int(top), int(left), height, width) if scale == 1 else (top, left, height, width)
