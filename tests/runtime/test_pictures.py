"""Pictures: bytes as diffusers rounds them, files that round-trip, grids that can be looked at."""

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from unet_diffusion.runtime.pictures import (
    GRID_GREY,
    GRID_PADDING,
    image_grid,
    read_images,
    save_grid,
    save_images,
    to_uint8,
)


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_bytes_are_those_of_diffusers_image_processor():
    images = noise(4, 3, 16, 16) * 1.2  # some beyond the range
    expected = VaeImageProcessor().postprocess(images, output_type="pil")
    for bytes_, picture in zip(to_uint8(images), expected, strict=True):
        assert torch.equal(bytes_, pil_to_tensor(picture))


def test_ends_of_the_range_are_black_and_white():
    images = torch.tensor([-1.0, 0.0, 1.0, -5.0, 5.0, 0.999, -0.999]).view(1, 1, 1, 7)
    assert to_uint8(images).flatten().tolist() == [0, 128, 255, 0, 255, 255, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_is_taken(dtype):
    levels = torch.tensor([-1.0, -0.5, 0.5, 1.0], dtype=dtype).view(1, 1, 1, 4)
    assert to_uint8(levels).flatten().tolist() == [0, 64, 191, 255]


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 8, 8).byte()])
def test_what_is_no_batch_of_images_is_refused(images):
    with pytest.raises(ValueError, match=r"float \(N, C, H, W\) with C of 1, 3 or 4"):
        to_uint8(images)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_holds_the_bytes_and_reads_back(tmp_path, channels, mode):
    images = noise(2, channels, 5, 7)
    paths = save_images(images, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["000000.png", "000001.png"]
    with Image.open(paths[1]) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", mode, (7, 5))
        assert torch.equal(pil_to_tensor(picture), to_uint8(images)[1])
    back = read_images(paths)
    assert torch.equal(to_uint8(back), to_uint8(images))
    torch.testing.assert_close(back, images, rtol=0, atol=0.5 / 127.5 + 1e-6)  # half a level


def test_files_are_named_by_index(tmp_path):
    paths = save_images(noise(3, 1, 4, 4), tmp_path, indices=[7, 3, 1234567])
    assert [path.name for path in paths] == ["000007.png", "000003.png", "1234567.png"]
    with pytest.raises(ValueError, match="each of 3 images, got 2"):
        save_images(noise(3, 1, 4, 4), tmp_path / "other", indices=[1, 2])
    assert not (tmp_path / "other").exists()


def test_existing_image_is_never_replaced_unasked(tmp_path):
    first, second = noise(2, 1, 4, 4), -noise(2, 1, 4, 4)
    save_images(first, tmp_path, indices=[0, 1])
    with pytest.raises(FileExistsError, match=r"1 of 2 exist, such as .*000001\.png; choose another folder"):
        save_images(second, tmp_path, indices=[1, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "000001.png"]
    assert torch.equal(to_uint8(read_images([tmp_path / "000001.png"])), to_uint8(first)[1:])
    save_images(second, tmp_path, indices=[1, 2], overwrite=True)
    assert torch.equal(to_uint8(read_images([tmp_path / "000001.png"])), to_uint8(second)[:1])


def test_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    save_grid(noise(1, 1, 4, 4), path)
    before = path.read_bytes()

    def half_written(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_grid(-noise(1, 1, 4, 4), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_images_of_different_shapes_are_not_read_together(tmp_path):
    paths = [*save_images(noise(1, 1, 4, 4), tmp_path), *save_images(noise(1, 1, 4, 5), tmp_path, indices=[1])]
    with pytest.raises(ValueError, match=r"\(1, 4, 4\) in .* and \(1, 4, 5\) in"):
        read_images(paths)
    with pytest.raises(ValueError, match="at least one image"):
        read_images([])


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_each_pixel_of_small_images_as_a_square(channels):
    images = noise(6, channels, 8, 8)
    grid = pil_to_tensor(image_grid(images, columns=3))
    assert grid.shape == (3, 2 * (64 + GRID_PADDING) + GRID_PADDING, 3 * (64 + GRID_PADDING) + GRID_PADDING)
    for i, image in enumerate(to_uint8(images)):
        top, left = (GRID_PADDING + (64 + GRID_PADDING) * place for place in divmod(i, 3))
        tile = grid[:, top : top + 64, left : left + 64]
        for y in range(8):
            for x in range(8):
                square = tile[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                assert torch.equal(square, image[:, y, x].expand(3).view(3, 1, 1).expand(3, 8, 8))
    assert (grid[:, :, 0] == GRID_GREY).all()


@pytest.mark.parametrize(("side", "tile"), [(8, 64), (28, 84), (64, 64), (65, 65), (128, 128)])
def test_only_small_images_are_enlarged(side, tile):
    assert image_grid(noise(2, 1, side, side), columns=1).width == tile + 2 * GRID_PADDING


def test_grid_is_about_square_unless_told():
    assert image_grid(noise(9, 1, 64, 64)).size == (3 * 66 + 2, 3 * 66 + 2)
    assert image_grid(noise(5, 1, 64, 64)).size == (3 * 66 + 2, 2 * 66 + 2)


def test_transparency_shows_a_checkerboard():
    images = torch.full((2, 4, 8, 8), 0.0)
    images[0, 3], images[1, 3] = -1.0, 1.0
    grid = pil_to_tensor(image_grid(images, columns=2))
    clear, solid = grid[:, 2:66, 2:66], grid[:, 2:66, 68:132]
    assert set(clear.unique().tolist()) == {224, 255}
    assert clear[0, 0, 0] != clear[0, 0, 8]
    assert set(solid.unique().tolist()) == {128}


def test_save_grid_makes_its_folder_and_replaces(tmp_path):
    path = tmp_path / "samples" / "step_0000001.png"
    for images in (noise(1, 1, 4, 4), noise(4, 1, 4, 4)):
        save_grid(images, path, columns=2)
    with Image.open(path) as picture:
        assert picture.size == (2 * 66 + 2, 2 * 66 + 2)


@pytest.mark.parametrize(("count", "columns"), [(0, None), (1, 0)])
def test_empty_grid_is_refused(count, columns):
    with pytest.raises(ValueError, match="at least one image and one column"):
        image_grid(noise(count, 1, 4, 4), columns)
