"""Slices of NIfTI and DICOM files as images: numbers after the rescaling that the file says.

NIfTI is read by nibabel (https://nifti.nimh.nih.gov/nifti-1), DICOM by pydicom
(https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.7.6.3.html), which are installed with
`unet-diffusion[medical]`. A file holds one slice; a volume is refused, as nobody says which slices are to be used.
"""

import gzip
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from unet_diffusion.data.stored_image import Stored, StoredImage, check_dimensions

if TYPE_CHECKING:
    from pydicom import Dataset

GZIP_SIGNATURE = b"\x1f\x8b"
NIFTI_HEADER = 544  # bytes: the longer of the two headers, and the flags of extensions after it
LARGEST_OFFSET = 2**24  # bytes of a NIfTI header with its extensions
DICOM_SIGNATURE, DICOM_PREFIX = b"DICM", 128  # and bytes before it
# Compressions that may change numbers: JPEG baseline and extended, JPEG-LS near-lossless, JPEG 2000, HTJ2K.
LOSSY_SYNTAXES = ("1.2.4.50", "1.2.4.51", "1.2.4.81", "1.2.4.91", "1.2.4.203")
SYNTAX_ROOT = "1.2.840.10008."
WHOLE = (np.uint8, np.uint16, np.int16, np.int32, np.int64)  # types of whole numbers, the smallest first
INSTALL = 'install it with pip install "unet-diffusion[medical]"'


def is_nifti(data: bytes) -> bool:
    """Whether a file is NIfTI in one file, compressed or not; nothing but its header is read."""
    head = _begin(data)
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def is_dicom(data: bytes) -> bool:
    """Whether a file is DICOM with its usual preamble."""
    return data[DICOM_PREFIX : DICOM_PREFIX + len(DICOM_SIGNATURE)] == DICOM_SIGNATURE


def stored_in_nifti(data: bytes, channels: int | None) -> StoredImage:
    """The image in a NIfTI file of one slice: its row r and column c are the voxel (c, r).

    Numbers are as the file's slope and intercept make them. A fifth dimension holds channels, as the standard says of
    vectors.

    Args:
        data: The contents of the file.
        channels: The number of channels that the image must have; None: it is a label.

    Raises:
        ValueError: If the file is damaged, or holds a volume or colours, or nibabel is missing.
    """
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise ValueError(f"a NIfTI file needs the package nibabel; {INSTALL}") from error
    head = _begin(data)
    kind = nibabel.Nifti1Image if head[344:348] == b"n+1\0" else nibabel.Nifti2Image
    header = kind.header_class(head[: kind.header_class.sizeof_hdr], check=False)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise ValueError(
            f"a NIfTI file must hold whole or floating-point numbers, and this one has {dtype}; convert it"
        )
    if len(shape) < 2 or min(shape) < 1 or math.prod(shape[2:4]) > 1 or len(shape) > 5:
        sides = "x".join(map(str, shape))
        raise ValueError(f"a file must hold one slice, and this one is {sides}; cut it, by nibabel.save(image.slicer"
                         "[:, :, k : k + 1], path) for slice k, into a file for each slice")  # fmt: skip
    num_samples = shape[4] if len(shape) == 5 else 1
    check_dimensions(shape[1], shape[0], num_samples)
    size = math.prod(shape) * dtype.itemsize + LARGEST_OFFSET
    content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(size) if data.startswith(GZIP_SIGNATURE) else data
    voxels: Any = kind.from_bytes(content).dataobj
    is_plain = (voxels.slope, voxels.inter) == (1, 0)

    def decode(reducible_to: int | None) -> Stored:
        numbers = np.asanyarray(voxels).reshape(shape[0], shape[1], num_samples)
        return numbers.transpose(1, 0, 2)  # (x, y, C) -> (H, W, C)

    stored = dtype if is_plain else np.dtype(np.float64)
    return StoredImage(
        file_format="NIfTI",
        stored_size=(shape[1], shape[0]),
        kind="grey" if num_samples == 1 else "channels",
        num_samples=num_samples,
        dtype=stored,
        bits=8 * stored.itemsize,
        decode=decode,
        white=_white(stored) if is_plain else None,
    )


def stored_in_dicom(data: bytes) -> StoredImage:
    """The image in a DICOM file of one frame.

    Numbers are as the rescale slope and intercept make them, such as Hounsfield units; a window of display changes
    nothing. Where the photometric interpretation is MONOCHROME1 they are inverted before, so that bright is bright.

    Args:
        data: The contents of the file.

    Raises:
        ValueError: If the file is damaged, or holds several frames, colours by index or a table of values, or pydicom
            is missing.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import pixel_array
    except ModuleNotFoundError as error:
        raise ValueError(f"a DICOM file needs the package pydicom; {INSTALL}") from error
    dataset = dcmread(io.BytesIO(data))
    _check_dicom(dataset)
    bits, num_samples = int(dataset.BitsStored), int(dataset.SamplesPerPixel)
    slope, intercept = (
        float(dataset.get(name, value)) for name, value in (("RescaleSlope", 1), ("RescaleIntercept", 0))
    )
    is_signed, is_inverted = bool(dataset.PixelRepresentation), dataset.PhotometricInterpretation == "MONOCHROME1"
    is_plain = (slope, intercept) == (1, 0)
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    stored = _rescaled_type(ends, slope, intercept)

    def decode(reducible_to: int | None) -> Stored:
        numbers = pixel_array(dataset)
        numbers = numbers[..., None] if num_samples == 1 else numbers
        if is_inverted:
            numbers = sum(ends) - numbers.astype(np.int64)
        return (numbers if is_plain else numbers * slope + intercept).astype(stored)

    syntax = str(dataset.file_meta.TransferSyntaxUID).removeprefix(SYNTAX_ROOT)
    return StoredImage(
        file_format="DICOM",
        stored_size=(int(dataset.Rows), int(dataset.Columns)),
        kind="grey" if num_samples == 1 else "RGB",
        num_samples=num_samples,
        dtype=stored,
        bits=bits if is_plain else 8 * stored.itemsize,
        decode=decode,
        white=ends[1] if is_plain and not is_signed and bits <= 16 else None,
        is_lossy=syntax in LOSSY_SYNTAXES,
    )


def _check_dicom(dataset: "Dataset") -> None:
    needed = ("Rows", "Columns", "BitsStored", "SamplesPerPixel", "PixelRepresentation", "PhotometricInterpretation")
    if missing := [name for name in (*needed, "PixelData") if name not in dataset]:
        raise ValueError(f"a DICOM file must hold an image, and this one has no {missing[0]}; leave it out")
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames != 1:
        raise ValueError(f"a file must hold one slice, and this one has {frames} frames; save each as a file")
    photometric = dataset.PhotometricInterpretation
    is_grey = dataset.SamplesPerPixel == 1 and photometric in ("MONOCHROME1", "MONOCHROME2")
    is_rgb = dataset.SamplesPerPixel == 3 and photometric.startswith(("RGB", "YBR"))
    if not is_grey and not is_rgb:
        raise ValueError(f"colours must be MONOCHROME1, MONOCHROME2, RGB or YBR, got {photometric} of "
                         f"{dataset.SamplesPerPixel} samples; save the image as RGB")  # fmt: skip
    if "ModalityLUTSequence" in dataset:
        raise ValueError("numbers must be rescaled by a slope and an intercept, and this file has a table of values "
                         "(ModalityLUTSequence); save the numbers after it")  # fmt: skip
    check_dimensions(int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel))


def _rescaled_type(ends: tuple[int, int], slope: float, intercept: float) -> np.dtype[Any]:
    """The smallest type that holds whole numbers after rescaling; float64 where they have fractions."""
    if not (slope.is_integer() and intercept.is_integer()):
        return np.dtype(np.float64)
    low, high = sorted(int(end * slope + intercept) for end in ends)
    holding = (one for one in WHOLE if np.iinfo(one).min <= low and high <= np.iinfo(one).max)
    return np.dtype(next(holding, np.float64))


def _white(dtype: np.dtype[Any]) -> int | None:
    return int(np.iinfo(dtype).max) if dtype.kind == "u" and dtype.itemsize <= 2 else None


def _begin(data: bytes) -> bytes:
    """The first bytes of a file, unpacked if it is compressed."""
    if not data.startswith(GZIP_SIGNATURE):
        return data[:NIFTI_HEADER]
    try:
        return gzip.GzipFile(fileobj=io.BytesIO(data)).read(NIFTI_HEADER)
    except (OSError, EOFError, ValueError):
        return b""
