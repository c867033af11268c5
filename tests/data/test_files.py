import json
import os
import pickle
import shutil
import unicodedata
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from encoded import encode, encode_16_bit_png, random_pixels, write_images
from PIL import Image

from unet_diffusion.data import ImageFormat, check_images, find_images, load_images
from unet_diffusion.data import files as files_module
from unet_diffusion.data.listing import ARRAY_EXTENSIONS, IMAGE_EXTENSIONS, MEDICAL_EXTENSIONS
from unet_diffusion.data.stored_pillow import FORMATS
from unet_diffusion.data.stores import Store
from unet_diffusion.runtime.folder_settings import RUN_HEADER

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


def test_folder_inside_a_zip_may_begin_with_a_dot(tmp_path):
    files = find_images(write_zip(tmp_path / "set.zip", [".cache/1.png", "cache/2.png"]) / ".cache")
    assert files.names == ["1.png"]


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


@pytest.mark.parametrize("place", ["simplecache::https://me:secret@host/x", "HTTPS://me:secret@host/x"])
@pytest.mark.parametrize("read", [find_images, Store])
def test_address_that_is_not_read_is_refused_without_its_password(read, place):
    with pytest.raises(ValueError, match=r"address that begins with one of file, http.*, got .*://host/x") as refused:
        read(place)
    assert "secret" not in str(refused.value)


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


# ------------------------------------------------------------------------------------------------- what is left out

SETS = Path(__file__).parent / "odd_files" / "sets"
OTHER_SPELLINGS = {".btf": "TIFF", ".tf2": "TIFF", ".tf8": "TIFF", ".jif": "JPEG", ".dib": "BMP", ".mpo": "JPEG"}
NO_IMAGES_TO_TRAIN_ON = {".pfm"}  # distances and other floats, beside images


def spellings() -> dict[str, str]:
    """Extensions of the formats that are read, by Pillow's own list and those that its list lacks."""
    registered = Image.registered_extensions()
    return {name: kind for name, kind in registered.items() if kind in FORMATS} | OTHER_SPELLINGS


def test_all_spellings_of_the_formats_that_are_read_are_images(tmp_path):
    of_pillow = {*IMAGE_EXTENSIONS} - {*ARRAY_EXTENSIONS, *MEDICAL_EXTENSIONS}
    assert {*spellings()} - NO_IMAGES_TO_TRAIN_ON == of_pillow
    for extension in of_pillow:
        encoded = encode(random_pixels(8, 8, 3), spellings()[extension])
        (tmp_path / f"a{extension.upper()}").write_bytes(encoded)
    checked = load_images(find_images(tmp_path), ImageFormat(8, 8), progress=False)
    assert checked.bad_files == []
    assert len(checked.names) == len(of_pillow)


def test_other_files_are_counted_by_extension(tmp_path):
    for name in ("a.png", "b.heic", "c.HEIC", "d.jp2", "e", "f.txt"):
        (tmp_path / name).write_bytes(PNG)
    files = find_images(tmp_path)
    assert files.names == ["a.png"]
    counts = files.left_out.described().split("; ")
    assert counts[0] == "2 .heic"  # the most
    assert sorted(counts[1:]) == ["1 .jp2", "1 .txt", "1 without an extension"]
    assert "txt" not in files.left_out.described(but=[".txt"])


def test_files_of_a_folder_are_used_or_counted():
    folder = SETS / "extensions"
    files = find_images(folder)
    assert files.names == ["a.png", "b.jfif", "c.jpe", "d.pnm"]
    assert sum(files.left_out.extensions.values()) == len(os.listdir(folder)) - len(files.names)


def test_no_images_at_all_is_an_error_that_says_what_is_there(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"heic")
    with pytest.raises(ValueError, match=r"found none below .* \(1 \.heic\); expected"):
        find_images(tmp_path)


@pytest.mark.parametrize("folder", ["@eaDir", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", ".thumbnails"])
def test_folders_of_systems_are_skipped_and_named(tmp_path, folder):
    (tmp_path / "images" / "sub" / folder).mkdir(parents=True)
    for name in ("a.png", f"sub/{folder}/a.png", f"sub/{folder}/b.png", "Thumbs.db"):
        (tmp_path / "images" / name).write_bytes(PNG)
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "images")
    for root in (tmp_path / "images", tmp_path / "set.zip"):
        files = find_images(root)
        assert files.names == ["a.png"]
        assert files.left_out.described() == f"2 hidden or of the system (Thumbs.db, sub/{folder})"


RECORDS = {
    "run": ("config.yaml", RUN_HEADER + "\nmodel: {}"),
    "run of no settings": ("checkpoints/last.ckpt", ""),
    "samples": ("settings.json", json.dumps({"seed": 0, "num_drawn": 4})),
    "masks": ("settings.json", json.dumps({"probabilities": "False", "overlays": "True", "instances": "False"})),
    "pipeline": ("model_index.json", json.dumps({"_class_name": "DDPMPipeline"})),
}


@pytest.mark.parametrize(("file", "content"), RECORDS.values(), ids=RECORDS)
def test_outputs_among_the_images_are_not_read(tmp_path, file, content):
    images = write_images(tmp_path / "images", 2)
    write_images(images / "mine" / "samples", 2)
    (images / "mine" / file).parent.mkdir(exist_ok=True)
    (images / "mine" / file).write_text(content)
    (images / "mine" / ".hidden.json").write_text("{}")
    (images / "mine" / "pipeline").mkdir()
    (images / "mine" / "pipeline" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    shutil.make_archive(str(tmp_path / "set"), "zip", images)
    for root in (images, tmp_path / "set.zip"):
        files = find_images(root)
        assert files.names == ["000.png", "001.png"]
        assert files.left_out.described() == "1 written by unet-diffusion (mine)"


def test_images_that_were_drawn_are_read_without_the_sheet_that_shows_them(tmp_path):
    folder = write_images(tmp_path / "drawn", 2)
    (folder / "grid.png").write_bytes((folder / "000.png").read_bytes())
    assert find_images(folder).names == ["000.png", "001.png", "grid.png"]  # which sample did not write
    (folder / "settings.json").write_text(json.dumps({"num_drawn": 2}))
    files = find_images(folder)
    assert files.names == ["000.png", "001.png"]
    assert "1 written by unet-diffusion (grid.png)" in files.left_out.described()


def test_folder_whose_settings_are_of_another_program_is_read(tmp_path):
    images = write_images(tmp_path / "images" / "photos", 2)
    (images / "settings.json").write_text(json.dumps({"window": [3, 4]}))
    (images / "config.yaml").write_text("model: {}")
    (images / "model_index.json").write_text("[]")
    assert find_images(tmp_path / "images").names == ["photos/000.png", "photos/001.png"]


def test_folder_of_a_run_is_no_root(tmp_path):
    write_images(tmp_path / "samples", 2)
    (tmp_path / "config.yaml").write_text(RUN_HEADER)
    with pytest.raises(ValueError, match="is the folder of a run; give theirs"):
        find_images(tmp_path)
    assert len(find_images(tmp_path / "samples").names) == 2  # asked for by name


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    (tmp_path / "d.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "e.png").symlink_to(tmp_path / "e.png")
    (tmp_path / "f.png").symlink_to(tmp_path / "a.png")
    files = find_images(tmp_path)
    assert files.names == ["a.png", "f.png"]
    assert "4 no files: pipes, devices or broken links (b.png, c.png, d.png, e.png)" in files.left_out.described()
    with pytest.raises(ValueError, match=r"b\.png must be a file, and is a folder, a pipe or a device"):
        files.read("b.png")


def test_links_to_what_holds_the_root_are_not_followed(tmp_path):
    root = write_images(tmp_path / "around" / "images", 1)
    write_images(tmp_path / "around" / "others", 1)
    write_images(tmp_path / "elsewhere", 1)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)
    for name, target in (("all", "/"), ("up", root.parent), ("self", root), ("else", tmp_path / "elsewhere")):
        (root / name).symlink_to(target, target_is_directory=True)
    files = find_images(root)
    assert files.names == ["000.png", "else/000.png"]
    assert "4 links to a folder that they lie in (all, else/back, self, up)" in files.left_out.described()


# -------------------------------------------------------------------------------------------------------------- names

COMPOSED, APART = (unicodedata.normalize(form, "Caf\u00e9") for form in ("NFC", "NFD"))


def test_names_are_composed_and_read_however_they_are_stored(tmp_path):
    (tmp_path / "images" / APART).mkdir(parents=True)
    (tmp_path / "images" / APART / f"{APART}.png").write_bytes(PNG)
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "images")
    for root in (tmp_path / "images", tmp_path / "set.zip", tmp_path / "set.zip" / COMPOSED):
        files = pickle.loads(pickle.dumps(find_images(root)))
        assert files.names[0].removeprefix(f"{COMPOSED}/") == f"{COMPOSED}.png"
        assert files.read(files.names[0]) == PNG


def test_names_that_differ_only_in_their_encoding_are_refused(tmp_path):
    for name in (COMPOSED, APART):
        (tmp_path / f"{name}.png").write_bytes(PNG)
    if len(os.listdir(tmp_path)) == 1:
        pytest.skip("this file system takes them for one name")
    with pytest.raises(ValueError, match=rf"holds two files named {COMPOSED}\.png, or names that differ only in how"):
        find_images(tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile's
@pytest.mark.parametrize("again", ["top/a.png", "top\\a.png"])
def test_name_twice_in_a_zip_is_refused(tmp_path, again):
    archive = write_zip(tmp_path / "set.zip", ["top/a.png", "b.png", again])
    with pytest.raises(ValueError, match=r"set\.zip holds two files named top/a\.png"):
        find_images(archive)


def test_backslashes_in_a_zip_are_slashes(tmp_path):
    files = find_images(write_zip(tmp_path / "set.zip", ["top\\a.png", "top\\deep\\b.png"]))
    assert files.names == ["top/a.png", "top/deep/b.png"]
    assert files.read("top/deep/b.png") == PNG


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["set/big.parquet"], "1 .parquet files"),
        (["saved/data.arrow", "saved/more.ARROW"], "2 .arrow files"),
        (["a.tar", "b.tar", "c.parquet"], "1 .parquet and 2 .tar files"),
    ],
)
def test_pictures_beside_a_data_set_are_refused_not_taken_for_it(tmp_path, others, said):
    for name in ("logo.png", "docs/plot.png", *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name, "PNG")
    message = rf"holds 2 image files \(docs/plot.png, logo.png\) and {said}, and only one kind .*give the path of a"
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path)
    for name in others:
        (tmp_path / name).unlink()
    (tmp_path / "metadata.parquet").touch()  # as datasets has captions beside image files
    assert len(find_images(tmp_path).names) == 2
