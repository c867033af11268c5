import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from encoded import encode, encode_16_bit_png, random_pixels
from PIL import EpsImagePlugin, Image, ImageOps

from unet_diffusion.data import ImageFormat, decode_image
from unet_diffusion.data.decoding import decode_pages, to_depth
from unet_diffusion.data.label_decoding import decode_label_pages
from unet_diffusion.data.stored import stored_images

EXIF_ORIENTATION = 0x0112
DECODERS = {
    "image": lambda data: decode_image(data, ImageFormat(2, 2)),
    "pages": lambda data: decode_pages(data, 3),
    "labels": decode_label_pages,
    "size": lambda data: next(stored_images(data)).size,
}


def random_mid_tones(height, width):
    """Values that no filter takes beyond [0, 255], where Pillow would cut them off after each direction."""
    return 64 + random_pixels(height, width, 3) // 2


def to_array(tensor):
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_of_the_right_size_and_channels_keeps_every_value(channels):
    pixels = random_pixels(6, 10, channels)
    decoded = decode_image(encode(pixels), ImageFormat(6, 10, channels))
    assert decoded.dtype == torch.uint8
    np.testing.assert_array_equal(to_array(decoded), pixels.reshape(6, 10, channels))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_png_keeps_16_bits(channels):
    pixels = random_pixels(6, 10, channels, np.uint16)
    decoded = decode_image(encode_16_bit_png(pixels), ImageFormat(6, 10, channels))
    assert decoded.dtype == torch.uint16
    np.testing.assert_array_equal(to_array(decoded), pixels.reshape(6, 10, channels))


@pytest.mark.parametrize("dtype", [np.uint16, np.dtype(">u2")])
def test_16_bit_grey_tiff_keeps_16_bits(dtype):
    pixels = random_pixels(6, 10, 1, np.uint16)
    decoded = decode_image(encode(pixels.astype(dtype), "TIFF"), ImageFormat(6, 10, 1))
    np.testing.assert_array_equal(decoded[0].numpy(), pixels)


def test_16_bit_image_is_resized_in_16_bits():
    levels = np.linspace(1000, 1200, 32).round().astype(np.uint16)  # less than one level of 8 bits
    decoded = decode_image(encode_16_bit_png(np.tile(levels, (32, 1))), ImageFormat(8, 8, 1))
    means = levels.reshape(8, 4).mean(axis=1)
    # Away from the border, a symmetric filter over a ramp gives its mean; one level for rounding both.
    np.testing.assert_allclose(decoded[0, 4, 2:-2].int().numpy(), means[2:-2], atol=1)


@pytest.mark.parametrize(
    ("size", "target", "covering"),
    [
        ((40, 40), (16, 24), (24, 24)),
        ((40, 60), (16, 16), (16, 24)),
        ((90, 30), (20, 10), (30, 10)),
        ((64, 48), (32, 16), (32, 24)),
    ],
)
def test_resize_covers_the_target_and_cuts_its_centre_as_pillow_does(size, target, covering):
    image = Image.fromarray(random_mid_tones(*size))
    decoded = to_array(decode_image(encode(image), ImageFormat(*target)))
    resized = np.asarray(image.resize(covering[::-1], Image.Resampling.BICUBIC), dtype=int)
    top, left = (covering[0] - target[0]) // 2, (covering[1] - target[1]) // 2
    expected = resized[top : top + target[0], left : left + target[1]]
    assert np.abs(decoded.astype(int) - expected).max() <= 1  # Pillow rounds after each direction


@pytest.mark.parametrize("size", [(347, 260), (33, 97), (1000, 17)])
def test_sizes_that_do_not_divide_fit_exactly(size):
    flat = np.full((*size, 3), 100, dtype=np.uint8)
    decoded = decode_image(encode(flat), ImageFormat(16, 17))
    assert decoded.shape == (3, 16, 17)
    assert (decoded == 100).all()


def test_resize_of_a_whole_image_equals_pillow():
    image = Image.fromarray(random_mid_tones(48, 32))
    decoded = decode_image(encode(image), ImageFormat(12, 8))
    expected = np.asarray(image.resize((8, 12), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(to_array(decoded).astype(int) - expected).max() <= 1  # Pillow rounds after each direction


def test_crop_without_scaling_does_not_blur():
    pixels = random_pixels(8, 11, 3)
    decoded = decode_image(encode(pixels), ImageFormat(8, 8))
    np.testing.assert_array_equal(to_array(decoded), pixels[:, 1:9])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    quadrants = np.zeros((16, 32), dtype=np.uint8)
    quadrants[:8, :16], quadrants[:8, 16:], quadrants[8:, :16] = 80, 160, 240
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = encode(quadrants, "JPEG", exif=exif, quality=100)
    upright = {  # what a viewer does, from the EXIF standard 2.3, tag Orientation
        1: quadrants,
        2: quadrants[:, ::-1],
        3: quadrants[::-1, ::-1],
        4: quadrants[::-1],
        5: quadrants.T,
        6: np.rot90(quadrants, -1),
        7: np.rot90(quadrants.T, 2),
        8: np.rot90(quadrants, 1),
    }[orientation]
    decoded = decode_image(data, ImageFormat(*upright.shape, channels=1))
    np.testing.assert_allclose(decoded[0].numpy().astype(int), upright.astype(int), atol=3)  # JPEG is lossy


def test_transparency_is_put_on_the_background():
    pixels = random_pixels(6, 6, 4)
    decoded = to_array(decode_image(encode(pixels), ImageFormat(6, 6, 3, background="#ff8000")))
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + np.array([255, 128, 0]) * (1 - alpha)
    np.testing.assert_allclose(decoded, expected, atol=0.51)  # half a level of rounding


def test_transparent_16_bit_pixels_are_put_on_the_background():
    pixels = random_pixels(6, 6, 4, np.uint16)
    decoded = to_array(decode_image(encode_16_bit_png(pixels), ImageFormat(6, 6, 3, background="white")))
    alpha = pixels[..., 3:] / 65535
    np.testing.assert_allclose(decoded, pixels[..., :3] * alpha + 65535 * (1 - alpha), atol=0.6)


def test_colour_under_transparent_pixels_does_not_bleed():
    pixels = np.full((16, 16, 4), (0, 255, 0, 0), dtype=np.uint8)
    pixels[:, :9] = (255, 0, 0, 255)  # opaque red beside transparent green
    decoded = to_array(decode_image(encode(pixels), ImageFormat(4, 4, 4)))
    visible = decoded[decoded[..., 3] > 0]
    assert (visible[:, :3] == (255, 0, 0)).all()
    assert 0 < decoded[0, 2, 3] < 255


def test_opaque_image_gets_full_alpha():
    decoded = decode_image(encode(random_pixels(6, 6, 3)), ImageFormat(6, 6, 4))
    assert (decoded[3] == 255).all()


def test_colour_becomes_grey_as_in_pillow():
    image = Image.fromarray(random_pixels(6, 6, 3))
    decoded = decode_image(encode(image), ImageFormat(6, 6, 1))
    assert np.abs(decoded[0].numpy().astype(int) - np.asarray(image.convert("L"), dtype=int)).max() <= 1


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("P", "PNG"), ("P", "GIF"), ("1", "PNG"), ("L", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF")],
)
def test_every_opaque_mode_is_read_as_pillow_converts_it(mode, file_format):
    data = encode(Image.fromarray(random_pixels(8, 8, 3)).convert(mode), file_format)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(to_array(decode_image(data, ImageFormat(8, 8))), expected)


def test_grey_with_alpha_keeps_both():
    pixels = random_pixels(6, 6, 2)
    decoded = to_array(decode_image(encode(Image.fromarray(pixels, "LA")), ImageFormat(6, 6, 4)))
    np.testing.assert_array_equal(decoded[..., :3], pixels[..., :1].repeat(3, axis=-1))
    np.testing.assert_array_equal(decoded[..., 3], pixels[..., 1])


def test_transparent_palette_colour_is_put_on_the_background():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    decoded = decode_image(encode(image, transparency=0), ImageFormat(4, 4, 3, background="black"))
    assert decoded[:, 0, 0].tolist() == [0, 0, 0]
    assert decoded[:, 1, 1].tolist() == [40, 50, 60]


def test_large_jpeg_differs_little_from_its_full_decoding():
    image = Image.fromarray(random_pixels(6, 6, 3)).resize((512, 512), Image.Resampling.BICUBIC)
    decoded = decode_image(encode(image, "JPEG", quality=95), ImageFormat(32, 32))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(to_array(decoded).astype(int) - expected).mean() < 2  # levels; JPEG itself loses about one


@pytest.mark.parametrize("size", [(7, 20), (20, 7)])
def test_image_smaller_than_asked_for_is_refused(size):
    with pytest.raises(ValueError, match=f"too small: {size[0]}x{size[1]}, must be at least 8x8"):
        decode_image(encode(random_pixels(*size, 3)), ImageFormat(8, 8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_image(orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = encode(random_pixels(8, 16, 3), "JPEG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert next(stored_images(data)).size == (expected.height, expected.width)


def test_too_small_is_judged_after_the_exif_rotation():
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    data = encode(random_pixels(8, 16, 3), "JPEG", exif=exif)
    assert decode_image(data, ImageFormat(16, 8)).shape == (3, 16, 8)
    with pytest.raises(ValueError, match="too small: 16x8"):
        decode_image(data, ImageFormat(8, 16))


def test_absurd_dimensions_are_refused(monkeypatch):
    data = encode(random_pixels(10, 11, 1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # Pillow itself refuses twice that
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match="must have at most 60 pixels, got 10x11"),
    ):
        decode_image(data, ImageFormat(2, 2))


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_file_of_a_few_bytes_that_decodes_to_gigabytes_is_refused_by_its_header(decode, file_format):
    side = 200_000
    with pytest.raises(ValueError, match=r"must have at most \d+ pixels, got (200000x200000|more than twice as many)"):
        decode({"PNG": png_of_size, "TIFF": tiff_of_size}[file_format](side))


def png_of_size(side) -> bytes:
    """A PNG file with that width and height in its header, and pixels of another."""
    data = bytearray(encode(np.zeros((4, 4), np.uint8)))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def tiff_of_size(side) -> bytes:
    """The same of a TIFF file: entries 256 and 257 of its directory."""
    data = encode(np.zeros((4, 4), np.uint8), "TIFF")
    for tag in (256, 257):
        entry = struct.pack("<HHI", tag, 4, 1)  # one number of 32 bits
        assert data.count(entry) == 1
        data = data.replace(entry + struct.pack("<I", 4), entry + struct.pack("<I", side))
    return data


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
def test_postscript_is_not_run(decode, tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looks for it again
    postscript = encode(random_pixels(8, 8, 3), "EPS")
    with pytest.raises(ValueError, match="begins with b'%!PS-Ado'"):
        decode(postscript)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(OSError):
        Image.open(io.BytesIO(postscript)).load()
    assert (tmp_path / "ran").exists()  # what Pillow does by itself


def test_numbers_without_a_range_are_refused():
    with pytest.raises(ValueError, match="save the image in 8 or 16 bits"):
        decode_image(encode(np.zeros((8, 8), dtype=np.float32), "TIFF"), ImageFormat(8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "at least 1"),
        ((8, 8, 0), "got 0"),
        ((8, 8, 3, "nope"), "nope"),
        ((8, 8, 3, None), "background must be"),
    ],
)
def test_impossible_format_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageFormat(*arguments)


def test_8_bit_values_become_16_bit_values_of_the_same_brightness():
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_depth(levels, torch.uint16).tolist() == [257 * level for level in range(256)]
