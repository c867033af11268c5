"""When a file counts as another one, and what a journal of outputs tells after its writer was killed."""

import os
import shutil
import unicodedata
import zipfile

import pytest

from unet_diffusion.data.files import find_images
from unet_diffusion.data.fingerprints import MadeOf, changes, fingerprint, fingerprints, is_of


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_text(f"of {name}")  # equally long
    return tmp_path / "images"


def put(path, text):
    """Another file in the place, as editors and rsync do it."""
    path.with_name("new").write_text(text)
    os.replace(path.with_name("new"), path)


def test_file_is_another_if_its_contents_are_whatever_its_size_and_time(folder):
    before = fingerprint(find_images(folder), "a.png")
    times = (folder / "a.png").stat()
    put(folder / "a.png", "of c.png")
    os.utime(folder / "a.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not is_of(find_images(folder), "a.png", before)


def test_file_with_other_times_and_the_same_contents_is_the_same(folder, tmp_path):
    before = fingerprint(find_images(folder), "a.png")
    copy = find_images(shutil.copytree(folder, tmp_path / "copy"))
    assert copy.stamp("a.png") != before[0]
    assert is_of(copy, "a.png", before)


def test_files_that_change_places_are_found_though_written_at_the_same_moment(folder):
    for name in ("a.png", "b.png"):
        os.utime(folder / name, ns=(0, 0))
    before = fingerprints(find_images(folder), {})
    (folder / "a.png").rename(folder / "c.png")
    (folder / "b.png").rename(folder / "a.png")
    (folder / "c.png").rename(folder / "b.png")
    assert changes(before, fingerprints(find_images(folder), before)) == ["a.png", "b.png"]


def test_member_of_an_archive_that_cannot_be_unpacked_has_no_hash(folder, tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.png", "content " * 100)
        begin = packed.getinfo("a.png").header_offset + zipfile.sizeFileHeader + len("a.png")
    damaged = bytearray(archive.read_bytes())
    damaged[begin : begin + 8] = b"\xff" * 8  # not the archive, but what is packed
    archive.write_bytes(damaged)
    before = fingerprint(find_images(archive), "a.png")
    assert before[1] == ""
    assert is_of(find_images(archive), "a.png", before)


def test_changes_are_the_names_of_new_gone_and_other_files(folder):
    before = fingerprints(find_images(folder), {})
    assert changes(before, fingerprints(find_images(folder), before)) == []
    (folder / "a.png").rename(folder / "c.png")
    put(folder / "b.png", "others")
    assert changes(before, fingerprints(find_images(folder), before)) == ["a.png", "b.png", "c.png"]


def test_nothing_is_read_while_stamps_are_the_same(folder, monkeypatch):
    before = fingerprints(find_images(folder), {})
    monkeypatch.setattr("unet_diffusion.data.files.FolderFiles.read", None)
    assert fingerprints(find_images(folder), before) == before


def test_members_of_an_archive_are_told_apart_by_their_checksums(folder, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    before = fingerprints(find_images(archive), {})
    put(folder / "a.png", "of c.png")
    shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    assert changes(before, fingerprints(find_images(archive), before)) == ["a.png"]


def test_journal_tells_the_last_of_each_output_and_passes_over_what_was_cut_off(tmp_path):
    journal = MadeOf(tmp_path / "inputs.jsonl")
    assert journal.read() == {}
    journal.note("a.png", None)
    journal.note("a.png", ["stamp", "hash"])
    journal.note("b.png", None)
    with open(journal.path, "a") as file:
        file.write('\n["b.png", ["st')  # a process was killed
    journal.note("c.png", ["stamp", "hash"])
    assert journal.read() == {"a.png": ["stamp", "hash"], "b.png": None, "c.png": ["stamp", "hash"]}
    journal.doubt()
    assert journal.read() == {"a.png": None, "b.png": None, "c.png": None}


@pytest.mark.parametrize("in_archive", [False, True])
def test_file_whose_name_is_stored_otherwise_is_known_by_content(tmp_path, in_archive):
    stored = unicodedata.normalize("NFD", "caf\u00e9.png")  # as macOS writes it
    root = tmp_path / "images.zip" if in_archive else tmp_path / "images"

    def write(text):
        if in_archive:
            with zipfile.ZipFile(root, "w") as archive:
                archive.writestr(f"in\\{stored}", text)  # as some programs of Windows write it
        else:
            root.mkdir(exist_ok=True)
            put(root / stored, text)

    write("one")
    files = find_images(root)
    before = fingerprints(files, {})
    (name,) = files.names
    assert is_of(files, name, before[name])
    write("two")
    files = find_images(root)
    assert not is_of(files, name, before[name])
    assert changes(before, fingerprints(files, before)) == [name]


def test_file_that_cannot_be_read_is_of_nothing(folder):
    files = find_images(folder)
    (folder / "a.png").unlink()
    gone = fingerprint(files, "a.png")
    assert not is_of(files, "a.png", gone)
