"""What an image file says of itself, for images and labels alike: numbers as they are stored, and what they mean."""

from collections.abc import Iterator

from unet_diffusion.data.stored_arrays import NPY_SIGNATURE, NPZ_SIGNATURE, stored_in_array
from unet_diffusion.data.stored_image import StoredImage
from unet_diffusion.data.stored_medical import is_dicom, is_nifti, stored_in_dicom, stored_in_nifti
from unet_diffusion.data.stored_pillow import opened, stored_in_pillow
from unet_diffusion.data.stored_tiff import stored_in_tiff, why_several

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # + is BigTIFF


def stored_images(data: bytes, channels: int | None = None) -> Iterator[StoredImage]:
    """Each image of a file, one after the other.

    TIFF may have several: its pages, without reduced copies and masks of others. Pages may also be channels of an
    image, see `tiff_axes`. Of other formats the first image counts: further frames are previews or animations.

    Args:
        data: Contents of an image file.
        channels: The number of channels that images must have, by which channels are told from images. None: each
            plane is an image, as of labels.

    Raises:
        ValueError: If the file is none, has an image of more than PIL.Image.MAX_IMAGE_PIXELS, or one that cannot be
            read.
        Exception: If the file is damaged; its type is the decoder's.
    """
    if data[:4] in TIFF_SIGNATURES:
        yield from stored_in_tiff(data, channels)
    elif data.startswith((NPY_SIGNATURE, NPZ_SIGNATURE)):
        yield stored_in_array(data, channels)
    elif is_dicom(data):
        yield stored_in_dicom(data)
    elif is_nifti(data):
        yield stored_in_nifti(data, channels)
    else:
        image = opened(data)
        yield stored_in_pillow(image, data)


def only_image(data: bytes, channels: int) -> StoredImage:
    """The image of a file that holds one.

    Args:
        data: The contents of an image file.
        channels: The number of channels that the image must have.

    Raises:
        ValueError: If there are several images.
        Exception: If the file is damaged; its type is the decoder's.
    """
    image, *others = stored_images(data, channels)
    if others:
        raise ValueError(f"a file must hold one image, and this one has {why_several(data, 1 + len(others))}")
    return image
