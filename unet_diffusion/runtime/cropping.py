"""The part of an image that is scaled to another size."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

Size = tuple[int, int]  # height and width
Box = tuple[float, float, float, float]  # top, left, height and width


class Crop(NamedTuple):
    """The part of a file that an image shows.

    Args:
        size: Height and width of the file's upright image in pixels.
        box: Top, left, height and width of the part, in pixels of the file.
    """

    size: Size
    box: Box

    @classmethod
    def centred(cls, size: Size, fitted: Size) -> Self:
        """The crop of an image that was scaled to cover another size and cut to its centre.

        Args:
            size: Height and width of the file.
            fitted: Height and width of the image.
        """
        return cls(size, centred_box(size, fitted))

    @classmethod
    def from_plain(cls, fields: Sequence[Sequence[Any]]) -> Self:
        """The crop of nested lists, as JSON has them.

        Raises:
            ValueError: If there are other lists.
        """
        (file_height, file_width), (top, left, height, width) = fields
        return cls((int(file_height), int(file_width)), (float(top), float(left), float(height), float(width)))

    def again(self, size: Size, fitted: Size) -> Self:
        """The crop of an image of this crop that is scaled and cut to its centre once more.

        Args:
            size: Height and width of the image.
            fitted: Height and width that it is scaled and cut to.
        """
        top, left, height, width = self.box
        down, right, inner_height, inner_width = centred_box(size, fitted)
        vertical, horizontal = height / size[0], width / size[1]  # pixels of the file in one of the image
        inner = (inner_height * vertical, inner_width * horizontal)
        return self._replace(box=(top + down * vertical, left + right * horizontal, *inner))

    @property
    def mirrored(self) -> Self:
        """The crop of the mirror image, in the mirrored file."""
        top, left, height, width = self.box
        return self._replace(box=(top, self.size[1] - left - width, height, width))


def centred_box(size: Size, fitted: Size) -> Box:
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
