import csv
import json
import os
import unicodedata
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from unet_diffusion.data import (
    Folder,
    ImageDataModule,
)
from unet_diffusion.data import (
    captions as captions_module,
)
from unet_diffusion.data.captions import read_captions
from unet_diffusion.data.files import find_images


@pytest.fixture
def images(tmp_path):
    """Three images, one of them in a folder below."""
    folder = tmp_path / "images"
    for name in ("a.png", "b.png", "more/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def captions(root) -> list[str]:
    files = find_images(root)
    return read_captions(files, files.names).texts


def test_captions_are_found_in_a_table(images):
    (images / "metadata.csv").write_text('file_name,text\nmore/c.png,"sea, blue"\na.png,ant\nb.png, bee \n')
    assert captions(images) == ["ant", "bee", "sea, blue"]


def test_each_folder_may_have_a_table(images):
    (images / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "ant"}\n{"file_name": "b.png", "text": "bee"}'
    )
    (images / "more" / "metadata.csv").write_text("\ufefffile_name,text\nc.png,cat\n")  # as Excel begins a file
    assert captions(images) == ["ant", "bee", "cat"]


def test_text_files_fill_in(images):
    (images / "metadata.csv").write_text("file_name,text\na.png,ant\nb.png,bee\n")
    (images / "more" / "c.txt").write_text("cat\n")
    assert captions(images) == ["ant", "bee", "cat"]


def test_captions_in_a_zip_archive(images, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in images.rglob("*.png"):
            archive.write(path, f"top/{path.relative_to(images)}")
        archive.writestr("top/metadata.csv", "file_name,text\na.png,ant\nb.png,bee\nmore/c.png,cat\n")
    assert captions(tmp_path / "images.zip") == captions(tmp_path / "images.zip" / "top") == ["ant", "bee", "cat"]


def test_images_without_a_caption_are_listed(images):
    (images / "metadata.csv").write_text("file_name,text\na.png,ant\n")
    with pytest.raises(ValueError, match=r"2 of 3 images have no caption: b\.png, more/c\.png; each needs a row"):
        captions(images)


@pytest.mark.parametrize(("table", "content"), [("metadata.csv", "name,text\na.png,ant\n"), ("metadata.jsonl", "{}")])
def test_a_table_of_other_columns_is_refused(images, table, content):
    (images / table).write_text(content)
    with pytest.raises(ValueError, match=r"must have file_name and text in each row, and line [12] has"):
        captions(images)


def test_data_module_has_the_captions_of_its_images(images):
    (images / "metadata.csv").write_text("file_name,text\na.png,ant\nb.png,bee\nmore/c.png,cat\n")
    data = ImageDataModule(Folder(images, image_size=8, captions=True))
    data.setup()
    assert dict(zip(data.image_set.names, data.entries["captions"], strict=True)) == {
        "a.png": "ant",
        "b.png": "bee",
        "more/c.png": "cat",
    }
    without = ImageDataModule(Folder(images, image_size=8))
    without.setup()
    assert "captions" not in without.entries


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "must be text in UTF-8"), (b'\n{"file_name": ', "line 2 does not"), (b"3", "has 3")],
)
def test_damaged_tables_are_refused_with_their_line(images, content, message):
    (images / "metadata.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        captions(images)


def write_table(folder, rows, head=("file_name", "text")):
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def test_table_is_read_as_pythons_csv_module_writes_it(images):
    texts = ['red, "dark"\nand old', "semi;colon", "it's 5\" long", ""]
    (images / "d.png").write_bytes((images / "a.png").read_bytes())
    names = ["a.png", "b.png", "d.png", "more/c.png"]
    write_table(images, zip(names, texts, strict=True))
    assert captions(images) == texts
    (images / "metadata.csv").write_text(
        'file_name, text\r\na.png, "ant, red"\r\nb.png,bee\r\n\r\n\nd.png,\nmore/c.png,cat'
    )
    assert captions(images) == ["ant, red", "bee", "", "cat"]


UNQUOTED = "file_name,text\na.png,ant\nb.png,red, round\nmore/c.png,cat\n"
BAD_TABLES = {
    "comma": (UNQUOTED, r"metadata\.csv line 3 has 3 fields for 2 columns; put double quotes around"),
    "never closed": ('file_name,text\na.png,ant\n\nb.png,"bee\nmore/c.png,cat\n', "line 4 has a double quote"),
    "closed by the next": ('file_name,text\na.png,"ant\nb.png,"bee"\nmore/c.png,cat\n', "line 2 has a double quote"),
    "closed at the end": ('file_name,text\na.png,"ant\nb.png,bee 5"\nmore/c.png,cat\n', "line 2 has a quote that goes"),
    "longer than a field": ('file_name,text\na.png,"' + "ant\n" * 40000, "line 2 has a double quote"),
    "a column twice": ("file_name,text,text\na.png,ant,x\n", "one column file_name and one column text, got"),
    "absolute": ("file_name,text\n/data/a.png,ant\n", r"line 2 must have the path of an image .*, got /data/a\.png"),
    "of Windows": ("file_name,text\nC:\\data\\a.png,ant\n", r"line 2 must have the path of .*, got C:"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_table_that_would_lose_text_is_refused_with_its_line(images, content, message):
    (images / "metadata.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        captions(images)


def test_rows_for_one_image_that_differ_are_refused_with_both_lines(images):
    write_table(images, [("a.png", "ant"), ("b.png", "bee"), ("more/c.png", "cat"), ("a.png", "aunt")])
    with pytest.raises(ValueError, match=r"a\.png has one in metadata\.csv line 2 and another in metadata\.csv line 5"):
        captions(images)
    write_table(images, [("a.png", "ant"), ("b.png", "bee"), ("more/c.png", "cat"), ("./a.png", "ant")])
    write_table(images / "more", [("c.png", "cat")])
    assert captions(images) == ["ant", "bee", "cat"]  # the same, said twice
    (images / "more" / "metadata.jsonl").write_text(json.dumps({"file_name": "c.png", "text": "dog"}))
    with pytest.raises(ValueError, match=r"metadata\.csv line 4 and another in more/metadata\.jsonl line 1"):
        captions(images)


def test_names_with_backslashes_and_of_other_encodings_are_those_of_images(images):
    (images / unicodedata.normalize("NFD", "Caf\u00e9.png")).write_bytes((images / "a.png").read_bytes())
    rows = [("more\\c.png", "cat"), ("more/../a.png", "ant"), ("./b.png", "bee")]
    write_table(images, [*rows, (unicodedata.normalize("NFC", "Caf\u00e9.png"), "coffee")])
    assert captions(images) == ["coffee", "ant", "bee", "cat"]


def test_rows_without_an_image_are_told(images):
    write_table(images, [("a.png", "ant"), ("b.png", "bee"), ("gone.png", "x"), ("more/c.png", "cat")])
    files = find_images(images)
    read = read_captions(files, files.names)
    assert (read.num_unused, read.unused) == (1, ["metadata.csv line 4: gone.png"])
    write_table(images, [*((f"{number}.png", "x") for number in range(9)), ("a.png", "ant"), ("b.png", "bee")])
    write_table(images / "more", [("c.png", "cat")])
    read = read_captions(files, files.names)
    assert (read.num_unused, read.unused) == (9, [f"metadata.csv line {n + 2}: {n}.png" for n in range(5)])


def test_table_that_is_too_large_is_refused_before_it_is_read(images, tmp_path, monkeypatch):
    monkeypatch.setattr(captions_module, "MAX_TEXT_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(images / "a.png", "a.png")
        archive.writestr("metadata.csv", bytes(10**6 + 1))
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    with pytest.raises(ValueError, match=r"metadata\.csv must be at most 1000000 bytes, got 1000001; split it"):
        captions(tmp_path / "images.zip")
    with open(images / "metadata.csv", "wb") as file:
        file.truncate(10**6 + 1)
    with pytest.raises(ValueError, match=r"metadata\.csv must be at most 1000000 bytes, got 1000001; split it"):
        captions(images)


def test_table_without_end_is_refused_before_it_is_read(images):
    (images / "metadata.csv").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"metadata\.csv must be a file, and is a folder, a pipe or a device"):
        captions(images)
    (images / "metadata.csv").unlink()
    os.mkfifo(images / "metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\.csv must be a file, and is a folder, a pipe or a device"):
        captions(images)


@pytest.mark.parametrize(
    ("name", "message"),
    [("comma", "metadata.csv line 2 has 3 fields"), ("two_captions", "a.png has one in metadata.csv line 2")],
)
def test_tables_as_people_have_them_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        captions(Path(__file__).parent / "odd_files" / "sets" / name)
