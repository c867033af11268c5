"""Images of any number of channels: which axis of a file holds them, against what tifffile and NumPy read of it."""

import io
import zipfile

import numpy as np
import pytest
import tifffile
import torch

from unet_diffusion.data import Folder, ImageFormat, PairedFiles, Tiles, decode_image, find_images, load_images
from unet_diffusion.data.decoding import decode_pages
from unet_diffusion.data.label_decoding import decode_label_pages
from unet_diffusion.data.packing import pack_images
from unet_diffusion.data.stream import Shards

RNG = np.random.default_rng(0)


def numbers(*shape, dtype=np.uint16):
    return RNG.integers(0, np.iinfo(dtype).max, size=shape, endpoint=True, dtype=dtype)


def tiff_of(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def array_of(array, save=np.save):
    buffer = io.BytesIO()
    save(buffer, array)
    return buffer.getvalue()


LAYOUTS = {
    "pages of OME": {"ome": True, "metadata": {"axes": "CYX"}},
    "pages of ImageJ": {"imagej": True, "metadata": {"axes": "CYX"}},
    "pages that tifffile names": {"photometric": "minisblack", "metadata": {"axes": "CYX"}},
    "pages of which nothing is said": {"photometric": "minisblack", "metadata": None},
    "planes": {"photometric": "minisblack", "planarconfig": "separate"},
    "planes of OME": {"photometric": "minisblack", "planarconfig": "separate", "ome": True},
    "tiles": {"photometric": "minisblack", "planarconfig": "separate", "tile": (16, 16), "compression": "zlib"},
    "beside RGB": {"photometric": "rgb", "planarconfig": "separate"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_five_channels_are_read_as_tifffile_reads_them(layout, dtype):
    content = tiff_of(numbers(5, 9, 12, dtype=dtype), **LAYOUTS[layout])
    expected = tifffile.imread(io.BytesIO(content))
    image = decode_image(content, ImageFormat(9, 12, 5)).numpy()
    assert image.dtype == dtype
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("channels", [2, 3, 4, 6])
def test_samples_of_a_pixel_are_channels(channels):
    content = tiff_of(numbers(9, 12, channels), photometric="minisblack", planarconfig="contig")
    image = decode_image(content, ImageFormat(9, 12, channels)).numpy()
    np.testing.assert_array_equal(image.transpose(1, 2, 0), tifffile.imread(io.BytesIO(content)))


@pytest.mark.parametrize(("axes", "shape"), [("ZCYX", (2, 3, 9, 12)), ("CZYX", (3, 2, 9, 12)), ("TCYX", (2, 3, 9, 12))])
def test_stack_of_several_channels_is_as_many_images(axes, shape):
    content = tiff_of(numbers(*shape), ome=True, metadata={"axes": axes})
    expected = np.moveaxis(tifffile.imread(io.BytesIO(content)), axes.index("C"), 1)
    np.testing.assert_array_equal(torch.stack(decode_pages(content, 3)).numpy(), expected)
    with pytest.raises(ValueError, match=r"this one has 2 images along [ZT] .* save each as a file"):
        decode_image(content, ImageFormat(9, 12, 3))


def test_pages_that_the_first_one_speaks_for_have_channels_too():
    array = numbers(3, 9, 12)
    content = tiff_of(array, metadata={"axes": "CYX"}, photometric="minisblack", truncate=True)
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        assert len(tiff.pages) == 1
    np.testing.assert_array_equal(decode_image(content, ImageFormat(9, 12, 3)).numpy(), array)


@pytest.mark.parametrize(
    ("array", "options", "channels", "said"),
    [
        ((5, 9, 12), {"imagej": True, "metadata": {"axes": "ZYX"}}, 5, r"5 images along Z \(depth\), as its imagej"),
        ((5, 9, 12), {"ome": True, "metadata": {"axes": "TYX"}}, 5, r"5 images along T \(time\), as its ome"),
        ((4, 9, 12), {"photometric": "minisblack", "metadata": None}, 4, "4 pages and does not say what they are.*CYX"),
        ((5, 9, 12), {"photometric": "minisblack", "metadata": None}, 1, "are channels, set channels to 5"),
        ((6, 9, 12), {"photometric": "minisblack", "metadata": None}, 5, "are channels, set channels to 6"),
        ((5, 9, 12), {"ome": True, "metadata": {"axes": "CYX"}}, 3, "have 3 channels, .* this file has 5 channels"),
        ((5, 9, 12), {"ome": True, "metadata": {"axes": "CYX"}}, 1, "have 1 channels, .* this file has 5 channels"),
        ((9, 12), {}, 5, "this file has 1 grey channel;"),
        ((9, 12, 3), {"photometric": "rgb"}, 5, "this file has 3 RGB channels"),
        ((9, 12, 4), {"photometric": "rgb", "extrasamples": ["unspecified"]}, 4, "has 4 RGB channels; save it with"),
        ((9, 12, 2), {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}, 2,
         "this file has 1 grey channel and alpha"),
    ],
)  # fmt: skip
def test_what_is_not_said_to_be_channels_is_refused_with_the_fix(array, options, channels, said):
    with pytest.raises(ValueError, match=said):
        decode_image(tiff_of(numbers(*array), **options), ImageFormat(9, 12, channels))


def test_channels_of_different_types_are_refused():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as tiff:
        for dtype in [np.uint8] * 4 + [np.uint16]:
            tiff.write(numbers(9, 12, dtype=dtype), photometric="minisblack")
    with pytest.raises(ValueError, match="must be grey and alike, and this file has 5 pages of 2 kinds"):
        decode_image(buffer.getvalue(), ImageFormat(9, 12, 5))


def test_channels_of_a_label_stay_pages():
    content = tiff_of(numbers(5, 9, 12), ome=True, metadata={"axes": "CYX"})
    assert len(decode_label_pages(content)) == 5


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, ">u2"])
@pytest.mark.parametrize(("shape", "channels"), [((9, 12), 1), ((5, 9, 12), 5), ((9, 12, 5), 5), ((1, 9, 12), 1)])
def test_array_is_read_as_numpy_wrote_it(save, dtype, shape, channels):
    array = numbers(*shape, dtype=np.dtype(dtype).newbyteorder("=")).astype(dtype)
    image = decode_image(array_of(array, save), ImageFormat(9, 12, channels)).numpy()
    expected = array if array.ndim == 3 else array[None]
    np.testing.assert_array_equal(image, expected if expected.shape[0] == channels else expected.transpose(2, 0, 1))


def test_label_in_an_array_keeps_its_numbers():
    label = RNG.integers(-5, 2**31 - 1, size=(9, 12))
    np.testing.assert_array_equal(decode_label_pages(array_of(label))[0], label)


class Opened:
    """What runs if a pickle is loaded."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (array_of(numbers(5, 9, 5)), "both the first and the last side are 5 long"),
        (array_of(numbers(3, 9, 12)), "neither the first nor the last side is 5 long"),
        (array_of(numbers(2, 5, 9, 12)), "this one is 2x5x9x12; save one image a file"),
        (array_of(np.array([Opened()])), "must hold whole or floating-point numbers, and this one has object"),
        (array_of(np.zeros((9, 12), dtype="c8")), "this one has complex64"),
        (array_of({"a": numbers(9, 12), "b": numbers(9, 12)}, lambda file, both: np.savez(file, **both)), "has 2"),
        (array_of(numbers(5, 9, 12), np.savez)[:-30], "must be a whole archive of one array"),
        (array_of(numbers(5, 9, 12))[:40], "the header of the array cannot be read"),
    ],
)
def test_array_that_is_no_image_is_refused_by_what_it_is(content, said):
    with pytest.raises(ValueError, match=said):
        decode_image(content, ImageFormat(5, 5, 5))


def test_cut_array_is_refused():
    with pytest.raises(ValueError, match=r".+"):
        decode_image(array_of(numbers(5, 9, 12))[:-30], ImageFormat(9, 12, 5))


def test_archive_that_says_more_than_an_image_may_take_is_refused_before_it_is_unpacked():
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (200000, 200000)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.npy", header.getvalue())
    for content in (header.getvalue(), buffer.getvalue()):
        with pytest.raises(ValueError, match="must have at most"):
            decode_image(content, ImageFormat(9, 12, 1))


@pytest.fixture
def stacks(tmp_path):
    for i in range(6):
        content = tiff_of(numbers(5, 20, 24), imagej=True, metadata={"axes": "CYX"})
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{i}.tif").write_bytes(content)
    return tmp_path / "images"


def test_folder_of_five_channels_is_scaled_plane_by_plane(stacks):
    loaded = Folder(stacks, image_size=(10, 12), channels=5).load(progress=False).images
    assert loaded.shape == (6, 5, 10, 12)
    assert loaded.dtype == torch.uint16
    streamed = Folder(stacks, image_size=(10, 12), channels=5, in_memory=False).load(progress=False).images
    np.testing.assert_array_equal(streamed.index_select(0, torch.arange(6)).numpy(), loaded.numpy())
    plane = tifffile.imread(stacks / "2.tif")[3]
    alone = decode_image(tiff_of(plane), ImageFormat(10, 12, 1))[0]
    np.testing.assert_array_equal(loaded[2, 3].numpy(), alone.numpy())


def test_wrong_number_of_channels_is_listed_by_file(stacks):
    with pytest.raises(
        ValueError, match=r"6 of 6 image files cannot be used:\n  0\.tif: an image must have 3 channels"
    ):
        Folder(stacks, image_size=8, channels=3).load(progress=False)


def test_labelled_images_have_five_channels(stacks, tmp_path):
    (tmp_path / "labels").mkdir()
    for i in range(6):
        tifffile.imwrite(tmp_path / "labels" / f"{i}.tif", numbers(20, 24, dtype=np.uint8))
    loaded = PairedFiles(stacks, tmp_path / "labels", channels=5).load(progress=False)
    np.testing.assert_array_equal(loaded.images[4].numpy(), tifffile.imread(stacks / "4.tif"))


@pytest.mark.parametrize("size", [None, (10, 12)])
def test_shards_of_five_channels_are_those_of_the_folder(stacks, tmp_path, size):
    image_format = None if size is None else ImageFormat(*size, 5)
    bad = pack_images(find_images(stacks), tmp_path / "shards", root=stacks, image_format=image_format, channels=5)
    assert bad == []
    packed = Shards(tmp_path / "shards", image_size=(10, 12), channels=5).load(progress=False).images
    of_folder = load_images(find_images(stacks), ImageFormat(10, 12, 5), progress=False).images
    read = packed.index_select(0, torch.arange(6)).numpy().tolist()
    assert sorted(read) == sorted(of_folder.numpy().tolist())


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_of_other_channels_are_not_packed(tmp_path, dtype):
    (tmp_path / "images").mkdir()
    for number in range(2):
        pixels = np.full((8, 9, 2), number, dtype=dtype)
        tifffile.imwrite(tmp_path / "images" / f"{number}.tif", pixels, photometric="minisblack", planarconfig="contig")
    bad = pack_images(find_images(tmp_path / "images"), tmp_path / "shards", root="images", channels=3)
    assert len(bad) == 2
    assert "an image must have 3 channels, as channels says, and this file has 2 channels" in bad[0]


@pytest.mark.parametrize(("photometric", "shown"), [("minisblack", (0, 1, 2)), ("rgb", None)])
def test_four_channels_that_are_no_colours_are_not_shown_as_rgb_and_alpha(tmp_path, photometric, shown):
    for place in ("images", "labels"):
        (tmp_path / place).mkdir()
    extra = {"extrasamples": ["unassalpha"]} if photometric == "rgb" else {}
    for i in range(3):
        pixels = numbers(16, 16, 4, dtype=np.uint8)
        tifffile.imwrite(tmp_path / f"images/{i}.tif", pixels, photometric=photometric, planarconfig="contig", **extra)
        tifffile.imwrite(tmp_path / f"labels/{i}.tif", numbers(16, 16, dtype=np.uint8))
    pack_images(find_images(tmp_path / "images"), tmp_path / "shards", root="images", channels=4)
    scaled = ImageFormat(8, 8, 4)
    pack_images(find_images(tmp_path / "images"), tmp_path / "scaled", root="images", image_format=scaled)
    options = {"image_size": 8, "channels": 4}
    sources = [Folder(tmp_path / "images", **options), Tiles(tmp_path / "images", tile_size=8, channels=4)]
    sources += [Shards(tmp_path / place, **options) for place in ("shards", "scaled")]
    for source in sources:
        source.load(progress=False)
        assert source.values.shown == shown, type(source).__name__
    paired = PairedFiles(tmp_path / "images", tmp_path / "labels", channels=4).load(progress=False)
    assert paired.values.shown == shown


def test_twelve_bits_are_packed_as_the_folder_reads_them(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = RNG.integers(4096, size=(16, 16), dtype=np.uint16).astype(">u2").tobytes()
        (tmp_path / "images" / f"{number}.pgm").write_bytes(b"P5 16 16 4095\n" + pixels)
    files = find_images(tmp_path / "images")
    pack_images(files, tmp_path / "shards", root="images", channels=1)
    of_folder = load_images(files, ImageFormat(16, 16, 1), progress=False).images
    packed = Shards(tmp_path / "shards", image_size=16, channels=1).load(progress=False).images
    assert packed.dtype == of_folder.dtype == torch.uint16
    read = packed.index_select(0, torch.arange(3)).numpy().tolist()
    assert sorted(read) == sorted(of_folder.numpy().tolist())


def test_two_axes_without_a_name_are_no_channels():
    stack = tiff_of(numbers(5, 3, 9, 12), photometric="minisblack")
    with pytest.raises(ValueError, match="15 pages and does not say what they are"):
        decode_image(stack, ImageFormat(9, 12, 15))
