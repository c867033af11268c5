import zipfile

import pytest
from PIL import Image

from unet_diffusion.data import FolderDataModule
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
    return read_captions(files, files.names)


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
    data = FolderDataModule(images, image_size=8, captions=True)
    data.setup()
    assert dict(zip(data.file_names, data.captions, strict=True)) == {
        "a.png": "ant",
        "b.png": "bee",
        "more/c.png": "cat",
    }
    without = FolderDataModule(images, image_size=8)
    without.setup()
    assert without.captions is None


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "must be text in UTF-8"), (b'\n{"file_name": ', "line 2 does not"), (b"3", "has 3")],
)
def test_damaged_tables_are_refused_with_their_line(images, content, message):
    (images / "metadata.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        captions(images)
