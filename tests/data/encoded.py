"""Image files to decode, made without the code under test."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

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
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, channels = pixels.shape

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOUR_TYPE[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def write_images(folder: Path, num_images, height=8, width=8, channels=3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_images):
        (folder / f"{i:03}.png").write_bytes(encode(random_pixels(height, width, channels, seed=i)))
    return folder
