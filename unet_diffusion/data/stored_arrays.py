"""Arrays of NumPy as images: .npy, and .npz of one array; never pickled objects, which could run code.

See https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

import io
import math
import zipfile

import numpy as np

from unet_diffusion.data.stored_image import Stored, StoredImage, check_dimensions
from unet_diffusion.runtime.pixel_values import OF_COLOURS

NPY_SIGNATURE, NPZ_SIGNATURE = b"\x93NUMPY", b"PK\x03\x04"
NUMBERS = "biuf"  # kinds of types that are read: truth values, whole numbers and floating-point numbers
LONGEST_HEADER = 10_000  # bytes, as numpy.load allows
RULE = "an array must be (H, W), or with channels first (C, H, W) or last (H, W, C)"


def stored_in_array(data: bytes, channels: int | None) -> StoredImage:
    """The image in an .npy or .npz file.

    The side that is `channels` long holds the channels; with a label no side does.

    Args:
        data: The contents of the file.
        channels: The number of channels that images must have; None: the array is a label.

    Raises:
        ValueError: If the file is damaged, holds objects, several arrays or other sides, or if two sides may be that of
            the channels.
    """
    if data.startswith(NPZ_SIGNATURE):
        data = _only_member(data)
    shape, dtype = _header(data)
    axis = _channel_axis(shape, channels)
    sides = [side for i, side in enumerate(shape) if i != axis]
    num_samples = shape[axis] if axis is not None else 1
    check_dimensions(sides[0], sides[1], num_samples)

    def decode(reducible_to: int | None) -> Stored:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        array = array.astype(np.uint8) if array.dtype == np.bool_ else array
        return array[..., None] if axis is None else np.moveaxis(array, axis, -1)

    bits = 1 if dtype.kind == "b" else 8 * dtype.itemsize
    return StoredImage(
        file_format="NumPy",
        stored_size=(sides[0], sides[1]),
        kind="grey" if num_samples == 1 else "channels",
        num_samples=num_samples,
        dtype=np.dtype(np.uint8) if dtype.kind == "b" else dtype,
        bits=bits,
        decode=decode,
        white=2**bits - 1 if dtype.kind in "bu" and bits <= 16 else None,
    )


def _only_member(data: bytes) -> bytes:
    """The contents of the one array in an .npz file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) != 1 or not members[0].filename.endswith(".npy"):
                names = ", ".join(member.filename for member in members[:4])
                raise ValueError(f"an .npz file must hold one array, and this one has {len(members)} ({names}); save "
                                 "the image with numpy.save")  # fmt: skip
            with archive.open(members[0]) as member:
                head = member.read(len(NPY_SIGNATURE) + LONGEST_HEADER)
                shape, dtype = _header(head)
                check_dimensions(1, math.prod(shape) // OF_COLOURS[-1])  # no more is unpacked than an image may take
                return head + member.read(math.prod(shape) * dtype.itemsize)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"an .npz file must be a whole archive of one array ({error}); save it again") from error


def _header(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and type of an array, of which nothing but the header is read."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream, max_header_size=LONGEST_HEADER)
    except (ValueError, EOFError) as error:
        raise ValueError(f"the header of the array cannot be read ({error}); save it again with numpy.save") from error
    if dtype.kind not in NUMBERS:
        raise ValueError(f"an array must hold whole or floating-point numbers, and this one has {dtype}; convert it")
    return shape, dtype


def _channel_axis(shape: tuple[int, ...], channels: int | None) -> int | None:
    """The axis of the channels, 0 or 2; None: there is none."""
    sides = "x".join(map(str, shape))
    if len(shape) == 2 and min(shape) > 0:
        return None
    if channels is None:
        raise ValueError(f"a label must be (H, W), and this array is {sides}; save the label alone")
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"{RULE}, and this one is {sides}; save one image a file")
    axes = [axis for axis in (0, 2) if shape[axis] == channels]
    if len(axes) == 2:
        raise ValueError(f"{RULE}, and of {sides} both the first and the last side are {channels} long, as channels "
                         "is; save the image as TIFF, which says which they are")  # fmt: skip
    if not axes:
        raise ValueError(f"{RULE}, and of {sides} neither the first nor the last side is {channels} long, as channels "
                         "is; set channels to what the file holds")  # fmt: skip
    return axes[0]
