"""A user's image and mask in whatever form: read alike, or refused with the rule."""

import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from unet_diffusion.inference.init_images import read_at_its_own_size, read_user_image, size_of

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(8, 12, 3), dtype=np.uint8)
GREY = torch.zeros(1, 4, 6)
EXIF_ORIENTATION = 0x0112


def opened(image, file_format="PNG", **options) -> Image.Image:
    """A PIL image as it comes from a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def read(image, channels=3, mask=None, size=(4, 6)):
    return read_user_image(image, mask, (channels, *size))


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


FROM_A_FILE = {
    "black and white": (Image.fromarray(RGB[..., 0]).convert("1"), {}),
    "grey": (Image.fromarray(RGB[..., 0]), {}),
    "grey of 16 bits": (Image.fromarray(RNG.integers(65536, size=(8, 12), dtype=np.uint16)), {}),
    "grey and alpha": (Image.fromarray(RGB).convert("RGBA").convert("LA"), {}),
    "palette": (Image.fromarray(RGB).quantize(16), {}),
    "transparent palette": (Image.fromarray(RGB).quantize(16), {"transparency": 3}),
    "transparent colour": (Image.fromarray(RGB), {"transparency": tuple(RGB[2, 2].tolist())}),
    "RGB": (Image.fromarray(RGB), {}),
    "RGBA": (Image.fromarray(RNG.integers(256, size=(8, 12, 4), dtype=np.uint8)), {}),
    "turned": (Image.fromarray(RGB), {"exif": exif_of(6)}),
}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", FROM_A_FILE)
def test_pil_image_is_read_as_the_file_that_it_came_from(tmp_path, name, channels):
    image, options = FROM_A_FILE[name]
    path = tmp_path / "image.png"
    image.save(path, **options)
    with Image.open(path) as same:
        assert size_of("image", same, 3) == size_of("image", path, 3)
        size = (6, 4) if name == "turned" else (4, 6)
        # Colours multiplied by alpha and rounded may fall to the other side of a half.
        atol = 2.1 / 255 if "alpha" in name else 0
        expected = read(path, channels, size=size).pixels
        torch.testing.assert_close(read(same, channels, size=size).pixels, expected, rtol=0, atol=atol)
        assert torch.equal(read_at_its_own_size(same, channels), read_at_its_own_size(path, channels))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "PA", "La", "RGBa", "RGBX", "I;16B"])
def test_every_mode_with_a_known_range_is_read(mode):
    image = Image.new(mode, (12, 8))
    assert read(image).pixels.isfinite().all()
    assert read_at_its_own_size(image, 3).shape == (3, 8, 12)


def test_cmyk_is_read_as_from_its_file(tmp_path):
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "image.tif")
    with Image.open(tmp_path / "image.tif") as image:
        expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(read_at_its_own_size(image, 3).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    "image",
    [RGB.astype(np.uint16) * 257, RGB / 255, (RGB / 255).astype(np.float32), RGB.astype(">u2") * 257],
    ids=["uint16", "float64", "float32", "big-endian"],
)
def test_arrays_of_16_bits_or_fractions_are_read_as_those_of_8(image):
    torch.testing.assert_close(read(image).pixels, read(RGB).pixels, rtol=0, atol=2.1 / 255)  # rounded to 8 bits
    np.testing.assert_array_equal(read_at_its_own_size(image, 3).permute(1, 2, 0).numpy(), RGB.astype(np.uint16) * 257)


def test_array_with_one_channel_is_grey():
    assert torch.equal(read(RGB[..., :1], 1).pixels, read(RGB[..., 0], 1).pixels)
    assert torch.equal(read_at_its_own_size(RGB[..., :1], 1)[0], torch.from_numpy(RGB[..., 0]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (RGB.astype(np.int64), r"^image must hold uint8, uint16, or floats in \[0, 1\], got int64"),
        (RGB.astype(np.float32), r"^image has floats from 0 to 255, and floats must be in \[0, 1\]; scale them"),
        (Image.new("I", (12, 8)), r"^image must hold uint8, uint16, or floats in \[0, 1\], got int32"),
        (Image.new("F", (12, 8), 7), "^image has floats from 7 to 7"),
        (np.zeros((8, 12, 5), dtype=np.uint8), r"^image must be \(H, W\), .*, got the shape \(8, 12, 5\)"),
        ([[0, 1]], "^image must be a PIL image, an array or a tensor, got a list"),
    ],
)
def test_what_has_no_known_range_or_layout_is_refused(image, message):
    for reader in (read, lambda image: read_at_its_own_size(image, 3), lambda image: size_of("image", image, 3)):
        with pytest.raises(ValueError, match=message):
            reader(image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 4, 6, dtype=torch.uint8), r"must hold floats in \[-1, 1\], got torch.uint8; scale it"),
        (torch.full((1, 4, 6), 255.0), r"must be in \[-1, 1\], got 255 to 255; scale it"),
        (torch.full((1, 4, 6), -1.5), "got -1.5 to -1.5"),
        (torch.full((1, 4, 6), torch.nan), "got nan to nan"),
    ],
)
def test_tensor_out_of_range_is_refused(image, message):
    with pytest.raises(ValueError, match=f"^image as a tensor .*{message}"):
        read(image, 1)
    if image.dtype != torch.uint8:
        with pytest.raises(ValueError, match=f"^mask as a tensor .*{message}"):
            read(GREY, 1, mask=image)


def left_half() -> torch.Tensor:
    return (torch.arange(6) < 3).expand(1, 4, 6)


@pytest.mark.parametrize(
    "mask",
    [~left_half(), (~left_half()).numpy()[0], (~left_half()).float() * 2 - 1, (~left_half()).numpy()[0] * 1.0],
    ids=["bool tensor", "bool array", "tensor", "float array"],
)
def test_mask_keeps_what_is_black_in_every_form(mask):
    # A tensor must have the size to draw, and here arrays have it, too.
    image = GREY if isinstance(mask, torch.Tensor) else np.zeros((4, 6), dtype=np.uint8)
    assert torch.equal(read(image, 1, mask=mask).keep_mask, left_half()[None])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((~left_half()).float(), r"and 1 where it is painted, got 0 to 1; give a mask of bool, or mask \* 2 - 1"),
        (torch.linspace(0.2, 0.9, 24).view(1, 4, 6), "got 0.2 to 0.9"),
        ((~left_half()).long(), r"must hold floats in \[-1, 1\], got torch.int64"),
    ],
)
def test_mask_from_0_to_1_is_refused(mask, message):
    with pytest.raises(ValueError, match=f"^mask as a tensor .*{message}"):
        read(GREY, 1, mask=mask)


def test_mask_of_ones_paints_everything():
    assert not read(GREY, 1, mask=torch.ones(1, 4, 6)).keep_mask.any()


def test_stack_is_refused_where_one_image_is_read(tmp_path):
    for num_pages in (1, 2):
        path = tmp_path / f"{num_pages}.tif"
        tifffile.imwrite(path, np.zeros((num_pages, 8, 12), dtype=np.uint8), photometric="minisblack")
    assert read_at_its_own_size(tmp_path / "1.tif", 1).shape == (1, 8, 12)
    with pytest.raises(
        ValueError, match=r"2\.tif cannot be read: a file must hold one image, and this one has 2 pages and"
    ):
        read_at_its_own_size(tmp_path / "2.tif", 1)


@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint8])
def test_array_is_read_as_its_file_where_numbers_have_a_range(tmp_path, dtype):
    array = np.random.default_rng(0).uniform(0, 100, size=(9, 12)).astype(dtype)
    np.save(tmp_path / "image.npy", array)
    of_file, of_array = (read_at_its_own_size(one, 1, (-50.0, 120.0)) for one in (tmp_path / "image.npy", array))
    assert torch.equal(of_file, of_array)
    expected = (torch.from_numpy(array.astype(np.float64)) + 50) / 85 - 1
    torch.testing.assert_close(of_array[0].double(), expected, rtol=0, atol=1e-6)
