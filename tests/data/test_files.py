import pickle
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from encoded import encode, encode_16_bit_png, random_pixels, write_images

from unet_diffusion.data import ImageFormat, check_images, find_images, load_images
from unet_diffusion.data import files as files_module

PNG = encode(random_pixels(8, 8, 3))


def write_zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, PNG)
    return path


NAMES = ["b/1.png", "a/deep/2.JPG", "0.webp"]
IGNORED = [".hidden.png", "__MACOSX/a/2.JPG", ".cache/3.png", "a/.DS_Store", "metadata.csv"]


def test_folder_is_walked_sorted_and_without_hidden_files(tmp_path):
    for name in NAMES + IGNORED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    files = find_images(tmp_path)
    assert files.names == ["0.webp", "a/deep/2.JPG", "b/1.png"]
    assert files.read("a/deep/2.JPG") == PNG


def test_zip_lists_what_a_folder_would(tmp_path):
    files = find_images(write_zip(tmp_path / "set.zip", NAMES + IGNORED))
    assert files.names == ["0.webp", "a/deep/2.JPG", "b/1.png"]
    assert files.read("a/deep/2.JPG") == PNG


@pytest.mark.parametrize("name", ["../1.png", "a/../../1.png", "/tmp/1.png", "..\\\\1.png", "C:\\\\1.png"])
def test_zip_with_names_that_lead_out_of_it_is_refused(tmp_path, name):
    archive = write_zip(tmp_path / "set.zip", ["0.png", name])
    with pytest.raises(ValueError, match=r"set\.zip must be paths within it, got .*1\.png"):
        find_images(archive)


def test_file_that_unpacks_to_too_much_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", PNG)
        archive.writestr("1.png", bytes(10**6))
    monkeypatch.setattr(files_module, "MAX_FILE_BYTES", 10**6 - 1)
    monkeypatch.setattr(zipfile.ZipExtFile, "read", reading := mock.Mock(return_value=PNG))
    checked = load_images(find_images(tmp_path / "set.zip"), ImageFormat(8, 8), progress=False)
    assert checked.names == ["0.png"]
    assert "1.png: 1.png in an archive must unpack to at most 999999 bytes, got 1000000" in checked.bad_files[0]
    assert reading.call_count == 1


def test_folder_inside_a_zip_is_a_root(tmp_path):
    files = find_images(write_zip(tmp_path / "set.zip", ["top/a/1.png", "top/b/2.png", "topmost/3.png"]) / "top")
    assert files.names == ["a/1.png", "b/2.png"]
    assert files.read("b/2.png") == PNG


def test_zip_can_be_sent_to_a_worker(tmp_path):
    files = pickle.loads(pickle.dumps(find_images(write_zip(tmp_path / "set.zip", ["top/1.png"]) / "top")))
    assert files.read("1.png") == PNG


def test_link_back_to_its_own_folder_is_not_followed(tmp_path):
    write_images(tmp_path / "a", 1)
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert find_images(tmp_path).names == ["a/000.png"]


def test_missing_root_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"existing folder or zip archive, got .*nowhere"):
        find_images(tmp_path / "nowhere")


def test_file_that_is_no_zip_is_named(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"set\.zip is no zip archive, or only a part of one"):
        find_images(tmp_path / "set.zip")


def test_missing_folder_in_a_zip_is_named_with_what_is_there(tmp_path):
    write_zip(tmp_path / "set.zip", ["top/1.png"])
    with pytest.raises(ValueError, match=r"no folder 'tip' in .*at its top are top"):
        find_images(tmp_path / "set.zip" / "tip")


@pytest.mark.parametrize("names", [[], ["notes.txt"]])
def test_root_without_images_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=r"found none below .*expected files that end in .*\.png"):
        find_images(tmp_path)


def test_streamed_images_equal_those_in_memory(tmp_path):
    files = find_images(write_images(tmp_path, 5, 12, 10))
    loaded = load_images(files, ImageFormat(8, 8), progress=False)
    streamed = check_images(files, ImageFormat(8, 8), progress=False)
    index = torch.tensor([4, 0, 2])
    assert streamed.names == loaded.names
    assert torch.equal(streamed.images.index_select(0, index), loaded.images[index])


@pytest.mark.parametrize("load", [load_images, check_images])
def test_set_with_one_16_bit_file_is_16_bit(tmp_path, load):
    pixels = random_pixels(8, 8, 1)
    (tmp_path / "a.png").write_bytes(encode(pixels))
    (tmp_path / "b.png").write_bytes(encode_16_bit_png(random_pixels(8, 8, 1, np.uint16)))
    images = load(find_images(tmp_path), ImageFormat(8, 8, 1), progress=False).images
    first = images.index_select(0, torch.tensor([0]))
    assert first.dtype == torch.uint16
    np.testing.assert_array_equal(first[0, 0].numpy(), pixels.astype(np.uint16) * 257)
