"""What is read from image and label files of every depth and layout, against what was written by others."""

import io
import re
import struct
from pathlib import Path

import numpy as np
import PIL
import pytest
import tifffile
import torch
from encoded import encode, encode_png, random_pixels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode, decode_png

from unet_diffusion.data import ImageFormat, decode_image
from unet_diffusion.data.decoding import decode_pages
from unet_diffusion.data.label_decoding import decode_label_pages
from unet_diffusion.data.stored import stored_images

SIZE = st.tuples(st.integers(1, 9), st.integers(1, 9))
COMPRESSIONS = (None, "zlib", "lzw", "packbits", "zstd", "lzma")
# Files are made and read in milliseconds; what takes long is the first import of a codec.
quickly = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def tiff_of(numbers, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, numbers, **options)
    return buffer.getvalue()


def only(pages):
    (page,) = pages
    return np.asarray(page)


def brightness(numbers, bits):
    """On a scale of 8 or 16 bits, by exact arithmetic: half a level at most is lost to rounding."""
    white = 255 if bits <= 8 else 65535
    return numbers.astype(np.float64) * white / (2**bits - 1)


@st.composite
def grey_numbers(draw, bits):
    dtype = np.uint8 if bits <= 8 else np.uint16
    return draw(arrays(dtype, draw(SIZE), elements=st.integers(0, 2**bits - 1)))


@quickly
@given(st.data(), st.sampled_from([2, 4, 8, 10, 12, 14, 16]))
def test_grey_tiff_of_every_depth_is_read_as_written(data, bits):
    numbers = data.draw(grey_numbers(bits))
    photometric = data.draw(st.sampled_from(["minisblack", "miniswhite"]))
    is_packed = bits not in (8, 16)
    byteorder = "<" if is_packed else data.draw(st.sampled_from("<>"))  # tifffile packs swapped bytes otherwise
    content = tiff_of(
        numbers,
        photometric=photometric,
        byteorder=byteorder,
        bitspersample=bits if is_packed else None,
        compression=None if is_packed else data.draw(st.sampled_from(COMPRESSIONS)),
        bigtiff=data.draw(st.booleans()),
    )
    np.testing.assert_array_equal(only(decode_label_pages(content)), numbers)
    expected = brightness(numbers if photometric == "minisblack" else 2**bits - 1 - numbers, bits)
    image = only(decode_pages(content, 1))[0]
    assert image.dtype == (np.uint8 if bits <= 8 else np.uint16)
    np.testing.assert_allclose(image, expected, atol=0.501)


@quickly
@given(
    arrays(st.sampled_from([np.uint8, np.uint16]), st.tuples(st.integers(2, 9), st.integers(5, 9), st.integers(3, 4))),
    st.sampled_from(["contig", "separate"]),
    st.sampled_from("<>"),
    st.sampled_from(COMPRESSIONS),
    st.booleans(),
)
def test_colour_tiff_of_every_layout_is_read_as_written(numbers, planar, byteorder, compression, has_tiles):
    stored = numbers if planar == "contig" else numbers.transpose(2, 0, 1)
    content = tiff_of(
        stored,
        photometric="rgb",
        planarconfig=planar,
        byteorder=byteorder,
        compression=compression,
        extrasamples=["unassalpha"] if numbers.shape[2] == 4 else None,
        tile=(16, 16) if has_tiles else None,
    )
    image = only(decode_pages(content, numbers.shape[2]))
    assert image.dtype == numbers.dtype
    np.testing.assert_array_equal(image.transpose(1, 2, 0), numbers)
    grey = np.repeat(numbers[..., :1], numbers.shape[2], axis=2)
    stored = grey if planar == "contig" else grey.transpose(2, 0, 1)
    same_number = tiff_of(stored, photometric="rgb", planarconfig=planar, byteorder=byteorder, compression=compression)
    np.testing.assert_array_equal(only(decode_label_pages(same_number)), numbers[..., 0])


@st.composite
def whole_numbers(draw):
    """Of any type, within 32 bits."""
    dtype = draw(st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64, "f4", "f8"]))
    limits = np.iinfo(dtype if np.dtype(dtype).kind != "f" else np.int16)
    numbers = st.integers(max(limits.min, -(2**31)), min(limits.max, 2**31 - 1))
    return draw(arrays(np.int64, draw(SIZE), elements=numbers)).astype(dtype)


@quickly
@given(whole_numbers(), st.sampled_from("<>"), st.sampled_from((None, "zlib", "lzw", "zstd")), st.booleans())
def test_label_of_every_type_of_number_is_read_as_written(numbers, byteorder, compression, has_predictor):
    content = tiff_of(
        numbers,
        byteorder=byteorder,
        compression=compression,
        predictor=has_predictor and compression is not None and numbers.dtype.itemsize < 8,
        photometric="minisblack",
    )
    np.testing.assert_array_equal(only(decode_label_pages(content)), numbers)


@quickly
@given(st.data(), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 8))
def test_grey_png_of_every_depth_is_read_as_written(data, bits, orientation):
    numbers = data.draw(grey_numbers(bits))
    key = data.draw(st.none() | st.integers(0, 2**bits - 1))
    content = encode_png(numbers, bits, transparent=key, orientation=orientation)
    picture = Image.fromarray(numbers.astype(np.int32))
    picture.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(picture))
    np.testing.assert_array_equal(only(decode_label_pages(content)), expected)
    image = only(decode_pages(content, 4))
    np.testing.assert_allclose(image[0], brightness(expected, bits), atol=0.501)
    white = 255 if bits <= 8 else 65535
    np.testing.assert_array_equal(image[3], np.where(expected == key, 0, white) if key is not None else white)
    assert next(stored_images(content)).size == expected.shape


@quickly
@given(
    arrays(st.sampled_from([np.uint8, np.uint16]), st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(2, 4))),
    st.booleans(),
)
def test_colour_png_of_every_depth_is_read_as_written(numbers, has_transparent_colour):
    bits, channels = 8 * numbers.itemsize, numbers.shape[2]
    key = numbers[0, 0] if has_transparent_colour and channels == 3 else None
    image = only(decode_pages(encode_png(numbers, bits, transparent=key), 4))
    colour = numbers[..., :3] if channels > 2 else numbers[..., :1].repeat(3, axis=2)
    white = np.full(numbers.shape[:2], 2**bits - 1)
    alpha = numbers[..., -1] if channels != 3 else white
    alpha = np.where((numbers == key).all(axis=-1), 0, alpha) if key is not None else alpha
    np.testing.assert_array_equal(image.transpose(1, 2, 0), np.dstack([colour, alpha]))
    same_number = np.repeat(numbers[..., :1], channels, axis=2)
    np.testing.assert_array_equal(only(decode_label_pages(encode_png(same_number, bits))), numbers[..., 0])


@quickly
@given(st.data(), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_png_with_a_palette_gives_colours_of_images_and_indices_of_labels(data, bits, has_alpha):
    numbers = data.draw(grey_numbers(bits))
    palette = random_pixels(1, 2**bits, 3)[0]
    palette[0] = (1, 2, 3)  # no grey picture
    alpha = random_pixels(1, 2**bits, 1, seed=1)[0] if has_alpha else None
    content = encode_png(numbers, bits, palette=palette, transparent=alpha)
    np.testing.assert_array_equal(only(decode_label_pages(content)), numbers)
    image = only(decode_pages(content, 4)).transpose(1, 2, 0)
    np.testing.assert_array_equal(image[..., :3], palette[numbers])
    np.testing.assert_array_equal(image[..., 3], alpha[numbers] if has_alpha else 255)


@quickly
@given(st.data(), st.sampled_from([1, 3]), st.integers(2, 65535), st.booleans())
def test_netpbm_with_every_number_of_white_is_read_as_written(data, channels, white, is_plain):
    size = (*data.draw(SIZE), channels)
    numbers = data.draw(arrays(np.uint16, size, elements=st.integers(0, white)))
    kind = {(1, True): 2, (3, True): 3, (1, False): 5, (3, False): 6}[channels, is_plain]
    header = f"P{kind}\n# a comment\n{size[1]} {size[0]} {white}\n".encode()
    binary = numbers.astype(">u2" if white > 255 else "u1").tobytes()
    content = header + (" ".join(map(str, numbers.ravel())).encode() + b"\n" if is_plain else binary)
    image = only(decode_pages(content, channels)).transpose(1, 2, 0)
    assert image.dtype == (np.uint16 if white > 255 else np.uint8)
    np.testing.assert_allclose(image, numbers * ((65535 if white > 255 else 255) / white), atol=0.501)
    if channels == 1:
        np.testing.assert_array_equal(only(decode_label_pages(content)), numbers[..., 0])


@quickly
@given(st.integers(1, 8), st.sampled_from([np.uint8, np.uint16]), st.integers(1, 7), st.integers(1, 7))
def test_orientation_of_a_tiff_turns_image_label_and_size_alike(orientation, dtype, height, width):
    numbers = np.arange(height * width, dtype=dtype).reshape(height, width)
    content = tiff_of(numbers, photometric="minisblack", extratags=[(274, "H", 1, orientation, True)])
    with Image.open(io.BytesIO(content)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened)) if orientation > 1 else numbers
    np.testing.assert_array_equal(only(decode_pages(content, 1))[0], expected)
    np.testing.assert_array_equal(only(decode_label_pages(content)), expected)
    assert next(stored_images(content)).size == expected.shape
    np.testing.assert_array_equal(decode_image(content, ImageFormat(*expected.shape, 1))[0].numpy(), expected)


@pytest.mark.parametrize("kind", ["pages", "imagej", "ome"])
def test_pages_are_never_taken_for_one_image(kind):
    axes = {"metadata": {"axes": "ZYX"}}
    options = {"pages": {}, "imagej": {"imagej": True, **axes}, "ome": {"ome": True, **axes}}[kind]
    content = tiff_of(np.zeros((5, 8, 12), np.uint16), photometric="minisblack", **options)
    said = (
        "5 pages and does not say what they are" if kind == "pages" else rf"5 images along Z \(depth\), as its {kind}"
    )
    with pytest.raises(ValueError, match=rf"^a file must hold one image, and this one has {said}"):
        decode_image(content, ImageFormat(8, 12, 1))
    assert len(decode_pages(content, 1)) == 5


ODD_FILES = Path(__file__).parent / "odd_files"


def odd(name):
    return (ODD_FILES / name).read_bytes()


def read_by_tifffile(name, **options):
    return tifffile.imread(ODD_FILES / name, **options)


def read_by_pillow(name, mode=None):
    with Image.open(ODD_FILES / name) as image:
        return np.asarray(image.convert(mode) if mode else image)


def read_by_torchvision(name):
    content = torch.frombuffer(bytearray(odd(name)), dtype=torch.uint8)
    return decode_png(content, ImageReadMode.UNCHANGED).numpy()


def read_netpbm(name, channels):
    """Of binary kind: the numbers come last."""
    count = 48 * 64 * channels
    return np.frombuffer(odd(name)[-2 * count :], ">u2").reshape(48, 64, channels)


ODD_IMAGES = {
    "planar_rgb16.tif": lambda name: read_by_tifffile(name),
    "planar_rgb16_be.tif": lambda name: read_by_tifffile(name),
    "miniswhite16.tif": lambda name: 65535 - read_by_tifffile(name)[None],
    "miniswhite16_zlib.tif": lambda name: 65535 - read_by_tifffile(name)[None],
    "grey12_packed.tif": lambda name: np.round(read_by_tifffile(name)[None] * (65535 / 4095)),
    "grey16.pgm": lambda name: read_netpbm(name, 1).transpose(2, 0, 1),
    "rgb16.ppm": lambda name: read_netpbm(name, 3).transpose(2, 0, 1),
    "uint16_be_bigtiff.tif": lambda name: read_by_tifffile(name)[None],
    "bmp_565.bmp": lambda name: read_by_pillow(name, "RGB").transpose(2, 0, 1),
    "orient6.tif": lambda name: np.rot90(read_by_tifffile(name), -1).transpose(2, 0, 1),
    "imagej_truncated4.tif": lambda name: read_by_tifffile(name)[:, None],
    "pyramid_pages.tif": lambda name: read_by_tifffile(name, key=0)[None],
    "mask_page.tif": lambda name: read_by_tifffile(name, key=0)[None],
}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_image_is_read_as_another_reader_does(name):
    expected = ODD_IMAGES[name](f"images/{name}")
    pages = decode_pages(odd(f"images/{name}"), 3 if expected.shape[-3] == 3 else 1)
    np.testing.assert_array_equal(np.squeeze(np.stack([page.numpy() for page in pages])), np.squeeze(expected))
    assert next(stored_images(odd(f"images/{name}"))).size == expected.shape[-2:]


@pytest.mark.parametrize(
    ("name", "key", "scale"), [("grey16_trns.png", 10200, 1), ("grey2_trns1.png", 1, 85)]
)  # Pillow scales 2 bits to 8
def test_odd_png_has_its_transparent_pixels_on_the_background(name, key, scale):
    stored = read_by_pillow(f"images/{name}")
    white = np.iinfo(stored.dtype).max
    image = decode_image(odd(f"images/{name}"), ImageFormat(*stored.shape, 1, background="white"))
    expected = np.where(stored == key * scale, white, stored)
    np.testing.assert_array_equal(image[0].numpy(), expected)
    assert (stored == key * scale).any()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("int8.tif", "signed 8-bit integers have no range"),
        ("int16.tif", "signed 16-bit integers have no range"),
        ("two_channels.tif", "this file has 2 channels; set channels"),
    ],
)
def test_odd_image_that_is_no_picture_is_refused_by_what_it_is(name, said):
    for decode in (lambda data: decode_image(data, ImageFormat(8, 8)), lambda data: decode_pages(data, 1)):
        with pytest.raises(ValueError, match=said):
            decode(odd(f"images/{name}"))


ODD_LABELS = {
    **dict.fromkeys(["png_rgb16eq.png", "png_la16.png", "png_rgba16.png"], lambda name: read_by_torchvision(name)[0]),
    "tif_rgb16_le.tif": lambda name: read_by_tifffile(name)[..., 0],
    **dict.fromkeys(
        [
            *("miniswhite8.tif", "int8.tif", "tif_g2.tif", "tif_g4.tif"),
            *("float32_whole.tif", "int64.tif", "uint32_be.tif"),
        ],
        lambda name: read_by_tifffile(name),
    ),
    "png_g2.png": lambda name: read_by_pillow(name) // 85,  # Pillow scales to 8 bits
    "png_g4.png": lambda name: read_by_pillow(name) // 17,
    "pgm_max3.pgm": lambda name: read_by_pillow(name) // 85,
    "png_exif3.png": lambda name: read_by_pillow(name)[::-1, ::-1],
    "la8.png": lambda name: read_by_pillow(name)[..., 0],
    "mask_palette.png": lambda name: read_by_pillow(name, "L"),
}


@pytest.mark.parametrize("name", ODD_LABELS)
def test_odd_label_is_read_as_another_reader_does(name):
    (label,) = decode_label_pages(odd(f"labels/{name}"))
    expected = ODD_LABELS[name](f"labels/{name}")
    np.testing.assert_array_equal(label, expected)
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize("name", [path.name for path in sorted((ODD_FILES / "images").iterdir())])
def test_size_and_pages_are_those_of_the_pixels(name):
    images = list(stored_images(odd(f"images/{name}")))
    assert [image.numbers().shape for image in images] == [(*image.size, image.num_samples) for image in images]


def test_jpeg_is_no_label():
    with pytest.raises(ValueError, match="a label must be of a format that keeps each number, and JPEG blurs them"):
        decode_label_pages(odd("labels/jpeg_instances.jpg"))


@pytest.mark.parametrize(
    ("options", "is_label"), [({"lossless": True}, True), ({"quality": 80}, False)], ids=["lossless", "lossy"]
)
@pytest.mark.parametrize("has_metadata", [False, True])
def test_webp_is_a_label_only_without_loss(options, is_label, has_metadata):
    numbers = random_pixels(8, 8, 1)
    more = {"exif": Image.Exif()} if has_metadata else {}
    content = encode(Image.fromarray(numbers).convert("RGB"), "WEBP", **options, **more)
    if is_label:
        np.testing.assert_array_equal(only(decode_label_pages(content)), numbers)
    else:
        with pytest.raises(ValueError, match="WEBP blurs them"):
            decode_label_pages(content)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (np.array([[0.5, 1]], np.float32), "holds fractions"),
        (np.array([[np.nan, 1]]), "holds fractions"),
        (np.array([[2**32 - 1, 0]], np.uint32), "must be from -2147483648 to 2147483647, got 4294967295"),
        (np.array([[-(2**40), 0]], np.int64), "got -1099511627776"),
        (np.array([[0, 1]], np.complex64), "holds fractions"),
        (np.array([[0, np.inf]], np.float16), "got inf"),
    ],
)
def test_label_that_is_no_whole_number_of_32_bits_is_refused(numbers, said):
    with pytest.raises(ValueError, match=said):
        decode_label_pages(tiff_of(numbers, photometric="minisblack"))


def test_label_of_one_bit_where_white_is_zero_is_refused():
    mask = np.eye(8, dtype=bool)
    np.testing.assert_array_equal(only(decode_label_pages(tiff_of(mask, photometric="minisblack"))), mask)
    with pytest.raises(ValueError, match="a label of 1 bit must say that 1 is white"):
        decode_label_pages(tiff_of(mask, photometric="miniswhite"))


@pytest.mark.parametrize("scale", [1, 256, 257], ids=["8 bits", "shifted", "16 bits"])
def test_colour_map_of_a_tiff_may_have_8_or_16_bits(scale):
    indices = random_pixels(6, 7, 1)
    palette = random_pixels(3, 256, 1).astype(np.uint16)
    content = tiff_of(indices, photometric="palette", colormap=palette * np.uint16(scale))
    image = only(decode_pages(content, 3))
    np.testing.assert_array_equal(image, palette[:, indices])
    np.testing.assert_array_equal(only(decode_label_pages(content)), indices)


def test_colours_stored_multiplied_by_alpha_are_divided_by_it():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(50, 100, 25, 100), (0, 0, 0, 0), (10, 20, 30, 255)]
    image = only(decode_pages(tiff_of(rgba, photometric="rgb", extrasamples=["assocalpha"]), 4))
    expected = [(128, 255, 64, 100), (0, 0, 0, 0), (10, 20, 30, 255)]  # 50 * 255 / 100 is 127.5
    np.testing.assert_array_equal(image.transpose(1, 2, 0)[0], expected)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_colours_of_print_are_read_as_pillow_converts_them(mode):
    converted = Image.fromarray(random_pixels(6, 6, 3)).convert(mode)
    content = encode(converted, "TIFF")
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:  # which cannot read the file that it has written
        with pytest.raises(OSError, match="truncated"):
            decode_pages(content, 3)
    else:
        pixels = only(decode_pages(content, 3)).transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels, np.asarray(converted.convert("RGB")))


def test_reduced_first_page_is_not_the_image():
    buffer = io.BytesIO()
    pixels = random_pixels(32, 32, 1)
    with tifffile.TiffWriter(buffer) as tiff:
        tiff.write(pixels[::4, ::4], subfiletype=1, photometric="minisblack")
        tiff.write(pixels, photometric="minisblack")
    np.testing.assert_array_equal(only(decode_pages(buffer.getvalue(), 1))[0], pixels)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_cut_tiff_is_refused_and_not_filled_with_black(compression):
    content = tiff_of(random_pixels(64, 64, 1), compression=compression, rowsperstrip=8)
    for decode in (lambda data: decode_pages(data, 1), decode_label_pages):
        with pytest.raises(Exception, match=r".+"):
            decode(content[:-100])


@pytest.mark.parametrize(
    ("rest", "said"), [(b"", "cut off before it"), (b"\0\0" + struct.pack("<I", 8), "one leads back")]
)
def test_tiff_without_pages_or_with_pages_in_a_circle_is_refused(rest, said):
    with pytest.raises(ValueError, match=said):
        decode_pages(b"II*\0" + struct.pack("<I", 8) + rest, 1)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"not an image"])
def test_what_is_no_image_is_named_by_how_it_begins(content):
    begins = "is empty" if not content else f"begins with {content[:8]!r}"
    rule = "a file must be a whole image of one of AVIF, BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"
    with pytest.raises(ValueError, match=re.escape(f"{rule}, and this one {begins}")):
        decode_pages(content, 1)


def test_tiff_whose_width_is_a_text_is_refused_before_room_is_made_for_it():
    content = tiff_of(random_pixels(8, 8, 1), photometric="minisblack")
    width = struct.pack("<HHII", 256, 4, 1, 8)  # tag, type of 32 bits, count, value
    assert content.count(width) == 1
    text = struct.pack("<HHI4s", 256, 2, 4, b"wide")
    with pytest.raises(ValueError, match="height and width must be whole numbers, got 8 and 'wide'"):
        decode_pages(content.replace(width, text), 1)


def test_tiff_of_absurd_tiles_is_refused(monkeypatch):
    content = tiff_of(random_pixels(8, 8, 1), tile=(16, 16), photometric="minisblack")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="must have at most 100 pixels, got 16x16"):
        decode_pages(content, 1)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "jpegxl", "jpegxr", "webp"])
def test_label_in_a_compression_of_tiff_that_may_blur_it_is_refused(compression):
    content = tiff_of(random_pixels(16, 16, 3), photometric="rgb", compression=compression)
    assert len(decode_pages(content, 3)) == 1
    with pytest.raises(ValueError, match="in TIFF blurs them"):
        decode_label_pages(content)


def test_stack_that_says_more_images_than_it_holds_is_refused_before_they_are_listed():
    content = tiff_of(random_pixels(8, 8, 1), photometric="minisblack", description='{"shape": [2000000000, 8, 8]}')
    with pytest.raises(ValueError, match="the file is cut off: 128000000000 bytes"):
        list(stored_images(content))


def test_16_bit_colours_of_print_are_refused():
    content = tiff_of(random_pixels(8, 8, 4, np.uint16), photometric="separated")
    with pytest.raises(ValueError, match="CMYK and YCbCr must have 8 bits, got 16"):
        decode_pages(content, 3)


def test_cut_map_of_16_bit_colours_is_refused():
    with pytest.raises(ValueError, match="the file is cut off: 192 numbers of 16 bits"):
        decode_pages(b"P6 8 8 65535\n" + bytes(100), 3)


def test_label_of_many_samples_is_refused_before_it_is_decoded():
    content = tiff_of(np.zeros((8, 8, 9), np.uint8), photometric="minisblack", planarconfig="contig")
    with pytest.raises(ValueError, match="one number a pixel, and this file has 9"):
        decode_label_pages(content)
