"""Pictures: tensors as PNG files, and grids of images to look at.

torchvision takes a second to import, so only the functions that use it import it.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.runtime.pixel_values import OF_COLOURS, as_colours

CHANNELS = OF_COLOURS  # of pictures: grey, RGB, RGBA
GRID_PADDING = 2  # pixels between tiles
GRID_GREY = 128  # grey level of the padding, which stands out against black digits and white sprites
CHECKERBOARD = (255, 224)  # the two grey levels behind transparent pixels


def to_uint8(images: Tensor) -> Tensor:
    """Return images as bytes, (N, C, H, W) uint8: -1 becomes 0 and 1 becomes 255, rounded like diffusers' pipelines.

    Args:
        images: Images, (N, C, H, W) float with C of 1, 3 or 4; values outside [-1, 1] are clipped.

    Raises:
        ValueError: If the images have another type or shape.
    """
    if images.ndim != 4 or images.shape[1] not in CHANNELS or not images.is_floating_point():
        raise ValueError(
            f"images must be float (N, C, H, W) with C of 1, 3 or 4, got {images.dtype} {tuple(images.shape)}"
        )
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def scale_to_unit_range(images: Tensor) -> Tensor:
    """Images as float32 in [-1, 1]: x / 127.5 - 1 for uint8, x / 32767.5 - 1 for uint16.

    Raises:
        ValueError: If the images have another dtype, such as when they were scaled before.
    """
    if images.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(f"images must be uint8 or uint16 to be scaled, got {images.dtype}; scale them only once")
    half = 127.5 if images.dtype == torch.uint8 else 32767.5
    return images.float().div_(half).sub_(1.0)


def in_unit_range(images: Tensor) -> Tensor:
    """Images as float32 in [-1, 1]: those of 8 or 16 bits are scaled, and floats have been before.

    Args:
        images: Images, uint8, uint16 or floats.
    """
    return images.float() if images.is_floating_point() else scale_to_unit_range(images)


def over_white(images: Tensor) -> Tensor:
    """Return images in colour, (N, 3, H, W): grey ones with three equal channels, and RGBA ones over white.

    Args:
        images: Images, (N, C, H, W) float in [-1, 1]; of other channels than 1, 3 or 4 the first three are shown.
    """
    images = as_colours(images)
    if images.shape[1] == 4:
        alpha = (images[:, 3:] + 1) / 2
        return alpha * images[:, :3] + (1 - alpha)
    return images.expand(-1, 3, -1, -1)


def picture_of(pixels: Tensor) -> Image.Image:
    """Return the picture of the bytes of an image, (C, H, W) with C of 1, 3 or 4."""
    from torchvision.transforms.functional import to_pil_image

    return to_pil_image(pixels)


def save_images(
    images: Tensor, folder: str | Path, *, indices: Iterable[int] | None = None, overwrite: bool = False
) -> list[Path]:
    """Write images as folder/000000.png and so on, and return the paths of the files.

    A file appears whole or not at all.

    Args:
        images: Images, (N, C, H, W) float in [-1, 1] with C of 1, 3 or 4.
        folder: Folder to write to; it is created if it does not exist.
        indices: N numbers for the file names; the default is 0 to N - 1.
        overwrite: Whether files that exist are replaced.

    Raises:
        FileExistsError: If a file exists and may not be replaced; nothing is written then.
        ValueError: If the images have another type or shape, or there are not N indices.
    """
    pixels = to_uint8(images).cpu()
    names = [f"{index:06d}.png" for index in (range(len(images)) if indices is None else indices)]
    paths = free_paths(Path(folder), names, len(images), overwrite)
    for image, path in zip(pixels, paths, strict=True):
        write_png(picture_of(image), path)
    return paths


def free_paths(folder: Path, names: Sequence[str], num_images: int, overwrite: bool) -> list[Path]:
    """The paths of files to write, once none of them is there.

    Args:
        folder: The folder of the files.
        names: The name of each.
        num_images: The number of images to write.
        overwrite: Whether files that exist may be replaced.

    Raises:
        FileExistsError: If a file exists and may not be replaced.
        ValueError: If there is not a name for each image.
    """
    paths = [folder / name for name in names]
    if len(paths) != num_images:
        raise ValueError(f"indices must number each of {num_images} images, got {len(paths)}")
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"images must not replace others, and {len(existing)} of {len(paths)} exist, such as {existing[0]}; "
            "choose another folder or set overwrite"
        )
    return paths


def read_images(paths: Sequence[str | Path]) -> Tensor:
    """Return the images in PNG files, (N, C, H, W) float32 in [-1, 1]: the inverse of `save_images`.

    Raises:
        ValueError: If there are no paths, or the images differ in size or channels.
    """
    from torchvision.transforms.functional import pil_to_tensor

    if not paths:
        raise ValueError("paths must name at least one image, got none")
    pixels = []
    for path in paths:
        with Image.open(path, formats=["PNG"]) as image:
            pixels.append(pil_to_tensor(image))
        if pixels[-1].shape != pixels[0].shape:
            shapes = f"{tuple(pixels[0].shape)} in {paths[0]} and {tuple(pixels[-1].shape)} in {path}"
            raise ValueError(f"images must have the same (C, H, W), got {shapes}; read them separately")
    return torch.stack(pixels).float() / 127.5 - 1


def image_grid(images: Tensor, columns: int | None = None, min_tile: int = 64) -> Image.Image:
    """Return an RGB picture of the images side by side, row by row.

    Small images are enlarged by a whole factor, so that each of their pixels is a square. Behind transparent pixels
    lies a light checkerboard. Of other channels than 1, 3 or 4 the first three are red, green and blue.

    Args:
        images: Images, (N, C, H, W) float in [-1, 1], N at least 1.
        columns: Number of images in a row; the default makes about as many columns as rows.
        min_tile: Least side of an image in the grid, in pixels.

    Raises:
        ValueError: If the images have another type or shape, or there are none.
    """
    from torchvision.utils import make_grid

    pixels = to_uint8(as_colours(images)).cpu()
    if not len(pixels) or (columns is not None and columns < 1):
        raise ValueError(f"a grid must have at least one image and one column, got {len(pixels)} and {columns}")
    factor = max(1, math.ceil(min_tile / min(pixels.shape[2:])))
    pixels = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    if pixels.shape[1] == 4:
        pixels = _over_checkerboard(pixels, square=max(1, min(pixels.shape[2:]) // 8))
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    return picture_of(make_grid(pixels, nrow=columns, padding=GRID_PADDING, pad_value=GRID_GREY))


def save_grid(images: Tensor, path: str | Path, *, columns: int | None = None, min_tile: int = 64) -> None:
    """Write the picture of `image_grid` to a PNG file, replacing an earlier file; its folder is created if needed."""
    write_png(image_grid(images, columns, min_tile), Path(path))


def write_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all, replacing an earlier file."""
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")


def _over_checkerboard(pixels: Tensor, square: int) -> Tensor:
    """Blend images with an alpha channel over a checkerboard: (N, 4, H, W) -> (N, 3, H, W) uint8.

    Args:
        pixels: Images, (N, 4, H, W) uint8.
        square: Side of a square of the checkerboard, in pixels.
    """
    height, width = pixels.shape[2:]
    odd = (torch.arange(height)[:, None] // square + torch.arange(width) // square) % 2  # (H, W)
    board = torch.tensor(CHECKERBOARD, dtype=torch.float32)[odd]
    alpha = pixels[:, 3:].float() / 255
    return (alpha * pixels[:, :3] + (1 - alpha) * board).round().to(torch.uint8)
