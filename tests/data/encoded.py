"""Image files to decode, made without the code under test, and data modules of them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from unet_diffusion.commands.fit_arguments import OWN_ARGUMENTS
from unet_diffusion.data import ImageDataModule

PNG_COLOUR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # by number of channels; PNG specification, table 11.1


def random_pixels(height, width, channels, dtype=np.uint8, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def encode(image, file_format="PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def encode_16_bit_png(pixels) -> bytes:
    """Pillow cannot write 16-bit colour."""
    return encode_png(pixels, 16)


def encode_png(pixels, bits, *, palette=None, transparent=None, orientation=None) -> bytes:
    """A PNG of any depth, as its specification has it (https://www.w3.org/TR/png-3).

    Args:
        pixels: numbers, (H, W) or (H, W, C).
        bits: 1, 2, 4, 8 or 16 a sample.
        palette: colours (N, 3), of which pixels are indices.
        transparent: a colour, or with a palette the alpha of its first colours.
        orientation: of EXIF.
    """
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, channels = pixels.shape

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    colour_type = 3 if palette is not None else PNG_COLOUR_TYPE[channels]
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))]
    if palette is not None:
        chunks.append(chunk(b"PLTE", np.asarray(palette, np.uint8).tobytes()))
    if transparent is not None:
        size = ">u1" if palette is not None else ">u2"
        chunks.append(chunk(b"tRNS", np.asarray(transparent, size).tobytes()))
    rows = b"".join(b"\0" + _packed(row.ravel(), bits) for row in pixels)
    chunks.append(chunk(b"IDAT", zlib.compress(rows)))
    if orientation is not None:  # one entry: tag, type SHORT, count, value
        chunks.append(
            chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHHI", 0x0112, 3, 1, orientation, 0, 0))
        )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def _packed(row, bits) -> bytes:
    """Numbers of so many bits each, the first in the highest bits."""
    digits = np.unpackbits(row.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)
    return np.packbits(digits[:, 16 - bits :].ravel()).tobytes()


def write_images(folder: Path, num_images, height=8, width=8, channels=3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_images):
        (folder / f"{i:03}.png").write_bytes(encode(random_pixels(height, width, channels, seed=i)))
    return folder


def image_data(kind, root, **options) -> ImageDataModule:
    """A data module of a source of that class; each option goes to whichever of them takes it."""
    own = {name: options.pop(name) for name in OWN_ARGUMENTS["ImageDataModule"] if name in options}
    return ImageDataModule(kind(root, **options), **own)
