"""Slices of NIfTI and DICOM, against what nibabel and pydicom read of the same files."""

import gzip
import io
import sys

import numpy as np
import pytest
import torch

from unet_diffusion.data import Folder, ImageFormat, PairedFiles, decode_image
from unet_diffusion.data.decoding import decode_pages
from unet_diffusion.data.label_decoding import decode_label_pages
from unet_diffusion.data.stored import stored_images

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

RNG = np.random.default_rng(0)
HU = (-1024.0, 3071.0)


def nifti_of(array, *, kind=nibabel.Nifti1Image, scale=(None, None), compress=False):
    image = kind(array, np.eye(4))
    image.header.set_slope_inter(*scale)
    content = image.to_bytes()
    return gzip.compress(content) if compress else content


def dicom_of(array, *, photometric="MONOCHROME2", bits=12, slope=None, intercept=None, **fields):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = array.shape[-2:] if array.ndim < 3 or photometric != "RGB" else array.shape[:2]
    dataset.SamplesPerPixel = 3 if photometric == "RGB" else 1
    if photometric == "RGB":
        dataset.PlanarConfiguration = 0
    if array.ndim == 3 and photometric != "RGB":
        dataset.NumberOfFrames = len(array)
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * array.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    if slope is not None:
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    for name, value in fields.items():
        setattr(dataset, name, value)
    dataset.PixelData = array.tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def numbers_in(content):
    (image,) = stored_images(content, 1)
    return image, image.numbers()[..., 0]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(12, 9), (12, 9, 1)])
def test_nifti_slice_is_read_as_nibabel_reads_it(shape, dtype, kind, compress):
    content = nifti_of(RNG.integers(0, 200, size=shape).astype(dtype), kind=kind, compress=compress)
    stored, numbers = numbers_in(content)
    plain = gzip.decompress(content) if compress else content
    expected = np.asanyarray(kind.from_bytes(plain).dataobj).reshape(12, 9).T
    assert stored.size == (9, 12)
    assert numbers.dtype == stored.dtype == expected.dtype
    np.testing.assert_array_equal(numbers, expected)


def test_slope_and_intercept_of_nifti_are_applied():
    content = nifti_of(RNG.integers(-900, 900, size=(12, 9)).astype(np.int16), scale=(0.5, -3))
    _, numbers = numbers_in(content)
    np.testing.assert_array_equal(numbers, nibabel.Nifti1Image.from_bytes(content).get_fdata().T)


def test_vectors_of_nifti_are_channels():
    array = RNG.integers(0, 255, size=(12, 9, 1, 1, 5)).astype(np.uint8)
    image = decode_image(nifti_of(array), ImageFormat(9, 12, 5)).numpy()
    np.testing.assert_array_equal(image, array[:, :, 0, 0].transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (nifti_of(np.zeros((12, 9, 5), np.int16)), "must hold one slice, and this one is 12x9x5; cut it, by nibabel"),
        (nifti_of(np.zeros((12, 9, 1, 4), np.int16)), "this one is 12x9x1x4"),
        (nifti_of(np.zeros((12, 9), np.complex64)), "whole or floating-point numbers"),
        (nifti_of(np.zeros((12, 9), np.float32)), "32-bit floating-point numbers have no range"),
        (dicom_of(np.zeros((5, 9, 12), np.uint16)), "must hold one slice, and this one has 5 frames"),
        (dicom_of(np.zeros((9, 12), np.uint16), photometric="PALETTE COLOR"), "got PALETTE COLOR of 1 samples"),
        (dicom_of(np.zeros((9, 12), np.int16)), "signed 12-bit integers have no range"),
    ],
)
def test_what_is_no_slice_or_has_no_range_is_refused(content, said):
    with pytest.raises(ValueError, match=said):
        decode_image(content, ImageFormat(9, 9, 1))


def test_cut_nifti_is_refused():
    with pytest.raises(Exception, match=r".+"):
        decode_image(nifti_of(np.zeros((12, 9), np.uint8))[:-20], ImageFormat(9, 12, 1))


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"), [(1, -1024, np.int16), (2, 0, np.uint16), (0.5, 0.25, np.float64)]
)
def test_rescaled_numbers_of_dicom_are_those_of_pydicom(slope, intercept, dtype):
    from pydicom.pixels import apply_rescale

    content = dicom_of(RNG.integers(0, 4096, size=(9, 12)).astype(np.uint16), slope=slope, intercept=intercept)
    stored, numbers = numbers_in(content)
    dataset = pydicom.dcmread(io.BytesIO(content))
    assert numbers.dtype == stored.dtype == dtype
    np.testing.assert_array_equal(numbers, apply_rescale(dataset.pixel_array, dataset))


@pytest.mark.parametrize(("dtype", "bits", "total"), [(np.uint16, 12, 4095), (np.uint8, 8, 255), (np.int16, 16, -1)])
def test_monochrome1_is_inverted(dtype, bits, total):
    array = RNG.integers(0, 200, size=(9, 12)).astype(dtype)
    _, numbers = numbers_in(dicom_of(array, photometric="MONOCHROME1", bits=bits))
    np.testing.assert_array_equal(numbers, total - array.astype(int))


def test_range_of_the_stored_bits_is_that_of_the_image():
    array = RNG.integers(0, 4096, size=(9, 12)).astype(np.uint16)
    image = decode_image(dicom_of(array), ImageFormat(9, 12, 1))[0].numpy()
    np.testing.assert_array_equal(image, np.rint(array * (65535 / 4095)))


def test_colours_of_dicom_are_those_of_pydicom():
    array = RNG.integers(0, 256, size=(9, 12, 3)).astype(np.uint8)
    content = dicom_of(array, photometric="RGB", bits=8)
    (image,) = decode_pages(content, 3)
    expected = pydicom.dcmread(io.BytesIO(content)).pixel_array
    np.testing.assert_array_equal(image.numpy().transpose(1, 2, 0), expected)


def test_folder_of_hounsfield_units_has_the_range_that_is_declared(tmp_path):
    arrays = [RNG.integers(0, 4096, size=(9, 12)).astype(np.uint16) for _ in range(3)]
    for i, array in enumerate(arrays):
        (tmp_path / f"{i}.dcm").write_bytes(dicom_of(array, slope=1, intercept=-1024))
    source = Folder(tmp_path, image_size=(9, 12), channels=1, value_range=HU)
    images = source.load(progress=False).images
    assert isinstance(images, torch.Tensor)
    expected = (np.stack(arrays).astype(float) - 1024 - HU[0]) / (HU[1] - HU[0]) * 2 - 1
    np.testing.assert_allclose(images[:, 0].numpy(), expected, atol=2e-7)
    assert source.values.dtype == "int16"
    np.testing.assert_array_equal(source.values.numbers(images)[:, 0], np.stack(arrays).astype(int) - 1024)


def test_labels_in_nifti_belong_to_images_of_the_same_name(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    image, label = (
        RNG.integers(0, 255, size=(12, 9)).astype(np.uint8),
        RNG.integers(0, 5, size=(12, 9)).astype(np.int32),
    )
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.nii.gz").write_bytes(nifti_of(image, compress=True))
        (tmp_path / "labels" / f"{name}.nii").write_bytes(nifti_of(label))
    loaded = PairedFiles(tmp_path / "images", tmp_path / "labels").load(progress=False)
    assert loaded.names == ["a", "b"]
    np.testing.assert_array_equal(loaded.labels[1], label.T)
    np.testing.assert_array_equal(decode_label_pages(nifti_of(label))[0], label.T)


@pytest.mark.parametrize(("package", "content"), [
    ("nibabel", nifti_of(np.zeros((12, 9), np.uint8))), ("pydicom", dicom_of(np.zeros((9, 12), np.uint16)))
])  # fmt: skip
def test_missing_package_is_named_with_its_extra(monkeypatch, package, content):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}; install .*unet-diffusion\[medical\]"):
        decode_image(content, ImageFormat(9, 12, 1))
