"""Tar archives in the form of WebDataset: its library writes what is read here, and reads what pack writes."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from encoded import encode, encode_16_bit_png, image_data, random_pixels
from PIL import Image
from shard_servers import FaultyServer

from unet_diffusion.data import Folder, Shards, find_images, stores
from unet_diffusion.data.described import Table

SIZE = {"image_size": 8}
NAMES = [f"{number:04d}" for number in range(12)]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)


def content_of(number: int) -> tuple[str, bytes]:
    """An image file and its ending: 8 and 16 bits, alpha, grey, JPEG."""
    pixels = random_pixels(10, 12, {1: 1, 2: 4}.get(number, 3), seed=number)
    if number == 3:
        return "png", encode_16_bit_png(random_pixels(10, 12, 3, np.uint16))
    return ("jpg", encode(pixels, "JPEG", quality=90)) if number % 4 == 0 else ("png", encode(pixels))


def folder_of(root: Path) -> Path:
    """The images as a folder with captions."""
    rows = ["file_name,text"]
    for number, name in enumerate(NAMES):
        ending, content = content_of(number)
        path = root / str(number % 3) / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        rows.append(f"{path.relative_to(root).as_posix()},caption {number}")
    (root / "metadata.csv").write_text("\n".join(rows))
    return root


def sample(number: int, **fields) -> dict:
    ending, content = content_of(number)
    known = {"txt": f"caption {number}\n", "cls": number % 3, **fields}
    return {"__key__": NAMES[number], ending: content, **known}


def write(path: Path, numbers, make=sample) -> Path:
    """An archive that the library writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number in numbers:
            writer.write(make(number))
    return path


def archives(root: Path, make=sample) -> Path:
    for shard in range(3):
        write(root / f"set-{shard:03d}.tar", range(shard * 4, shard * 4 + 4), make)
    return root


def loaded(place, **options):
    data = image_data(Folder, place, class_labels=True, captions=True, num_val=2, **{**SIZE, **options})
    data.setup()
    return data


def assert_same(data, expected):
    """The same images with the same classes and captions, by their captions."""
    order, others = (torch.tensor(np.argsort(one.entries["captions"])) for one in (data, expected))
    assert data.image_set.images.dtype == expected.image_set.images.dtype
    assert torch.equal(data.image_set.images.int()[order], expected.image_set.images.int()[others])
    assert torch.equal(data.entries["labels"][order], expected.entries["labels"][others])
    assert sorted(data.entries["captions"]) == sorted(expected.entries["captions"])
    assert data.class_names == expected.class_names


@pytest.mark.parametrize("place", ["one.tar", "many", "many/set-{000..002}.tar"])
def test_archives_of_the_library_are_read_as_the_folder_of_the_same_images(tmp_path, place):
    write(tmp_path / "one.tar", range(12))
    archives(tmp_path / "many")
    assert_same(loaded(tmp_path / place), loaded(folder_of(tmp_path / "images")))


@pytest.mark.parametrize("root", ["", "/set-{000..002}.tar"])
def test_archives_are_read_over_http_and_from_s3_as_from_the_disk(tmp_path, monkeypatch, root):
    expected = loaded(archives(tmp_path / "buckets/bucket/many"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with FaultyServer(tmp_path / "buckets") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        for place in (f"{server.address}/bucket/many{root}", f"s3://bucket/many{root}"):
            data = loaded(place, in_memory=False, num_workers=2, batch_size=4)
            assert_same_batches(data, expected)


def assert_same_batches(data, expected):
    images = [image for batch in data.train_dataloader() for image in zip(batch["index"].tolist(), batch["images"],
                                                                         strict=True)]  # fmt: skip
    for index, image in images:
        torch.testing.assert_close(image, expected.image_set.images[index], rtol=0, atol=0)
    assert len(images) == 8
    assert data.entries["captions"] == expected.entries["captions"]


def test_faults_that_pass_leave_no_trace_and_others_are_named(tmp_path):
    archives(tmp_path / "many")
    with FaultyServer(tmp_path / "many") as server:
        files = find_images(f"{server.address}/set-{{000..002}}.tar")
        expected = files.read(files.names[0])
        server.faults = {"set-000.tar": ["refuse", "hang_up"]}
        assert files.read(files.names[0]) == expected
        server.faults = {"set-000.tar": ["refuse"] * 5}
        with pytest.raises(OSError, match=r"set-000\.tar cannot be read: "):
            files.read(files.names[0])
        server.faults = {"set-000.tar": ["refuse"]}
        with pytest.raises(OSError, match=r"set-000\.tar cannot be read: "):  # not waited for again
            files.read(files.names[0])
        assert files.read(files.names[0]) == expected
    with pytest.raises(OSError, match=r"http://127.0.0.1:9/x/a\.tar cannot be read"):
        find_images("http://127.0.0.1:9/x/a.tar")


def test_signed_address_is_read_and_its_secrets_are_in_no_message(tmp_path, run_cli, caplog):
    archives(tmp_path / "many")
    with FaultyServer(tmp_path / "many") as server:
        address = server.address.replace("://", "://me:hidden@")
        place = f"{address}/set-{{000..002}}.tar?sig=hidden/x"
        files = find_images(place)
        assert files.names == find_images(tmp_path / "many").names
        assert len(files.read(files.names[0])) > 0
        words = {
            "gone": ["pack", f"{address}/none.tar?sig=hidden", tmp_path / "out"],
            "no captions": ["pack", place, tmp_path / "out", "--captions", "--table.caption", "none"],
            "compressed": ["pack", f"{address}/set.tar.gz?sig=hidden", tmp_path / "out"],
            "no index": ["fit", "--config", "stream", "--data.root", address, "--trainer.default_root_dir", tmp_path],
            "too large": ["check", "--config", "folder", "--data.root", place, "--data.image_size", 64],
        }
        for wrong, command in words.items():
            status, out, err = run_cli(*command)
            said = out + err + caplog.text
            assert (status, "hidden" in said, server.address[7:] in said) == (1, False, wrong != "too large"), said
        for wrong in (f"{address}/none.tar?sig=hidden", f"{address}/none/?sig=hidden", "oci://me:hidden@x/y"):
            with pytest.raises((OSError, ValueError, ImportError)) as error:
                find_images(wrong)
            assert "hidden" not in str(error.value)


def test_signed_address_of_a_folder_is_refused():
    said = r"must have no query, such as a signature, got one after https://host/many; name .*name-\{000\.\.127\}"
    with pytest.raises(ValueError, match=said) as error:
        find_images("https://me:hidden@host/many/?sig=hidden")
    assert "hidden" not in str(error.value)


def test_run_on_a_signed_address_goes_on_and_its_logs_hold_no_secrets(tmp_path, run_cli, caplog):
    archives(tmp_path / "many")
    small = ["--model.unet.channels", "[8, 8]", "--model.unet.attention_levels", "[]", "--model.speed", "plain"]
    small += ["--model.unet.head_channels", "null", "--model.unet.norm_num_groups", 4, "--data.image_size", 8]
    small += ["--data.batch_size", 4, "--data.num_val", 2, "--trainer.val_check_interval", 1]
    small += ["--trainer.accelerator", "cpu", "--samples.num_images", 2, "--trainer.default_root_dir", tmp_path / "run"]
    with FaultyServer(tmp_path / "many") as server:
        place = f"{server.address.replace('://', '://me:hidden@')}/set-{{000..002}}.tar?sig=hidden"
        words = ["fit", "--config", "folder", *small, "--trainer.max_steps"]
        for steps in (1, 2):  # signed anew
            status, out, err = run_cli(*words, steps, "--data.root", f"{place}{steps}")
            assert status == 0, err
            assert "hidden" not in out + err + caplog.text
        status, _, err = run_cli(*words, 3, "--data.root", place.replace("002", "001"))
        assert (status, "holds a run of other settings (" in err, "hidden" in err) == (1, True, False), err
    logged = [path for path in (tmp_path / "run/logs").rglob("*") if path.is_file()]
    assert any(server.address[7:] in path.read_text() for path in logged)
    assert not any("hidden" in path.read_text() for path in logged)


def test_server_without_ranges_is_an_error_and_no_wrong_image(tmp_path):
    archives(tmp_path / "many")
    with (
        FaultyServer(tmp_path / "many", ranges=False) as server,
        pytest.raises(OSError, match=r"set-000\.tar cannot be read: "),
    ):
        find_images(f"{server.address}/set-000.tar").read("0000.jpg")


def test_captions_and_classes_may_be_fields_of_json_and_texts(tmp_path):
    def make(number):
        ending, content = content_of(number)
        known = {"prompt": f"caption {number}", "kind": ["bee", "ant", "cow"][number % 3], "more": [1, 2]}
        return {"__key__": NAMES[number], ending: content, "json": known}

    data = loaded(archives(tmp_path / "many", make), table=Table(caption="prompt", label="kind"))
    assert data.class_names == ["ant", "bee", "cow"]
    expected = [data.class_names.index(["bee", "ant", "cow"][number % 3]) for number in range(12)]
    assert data.entries["labels"].tolist() == expected
    assert data.entries["captions"] == [f"caption {number}" for number in range(12)]


def test_image_of_several_is_chosen_by_its_ending(tmp_path):
    def make(number):
        return {"__key__": NAMES[number], "input.png": content_of(1)[1], "target.png": encode(random_pixels(10, 12, 1))}

    write(tmp_path / "pairs.tar", range(3), make)
    with pytest.raises(ValueError, match=r"sample 0000 of pairs\.tar must have one image, and has input\.png, target"):
        find_images(tmp_path / "pairs.tar")
    files = find_images(tmp_path / "pairs.tar", Table(image="target.png"))
    assert files.names == [f"{name}.target.png" for name in NAMES[:3]]
    assert files.read(files.names[0]) == encode(random_pixels(10, 12, 1))


def test_samples_without_an_image_and_other_members_are_left_out_and_told(tmp_path):
    def make(number):
        whole = sample(number, pth=b"no image")
        return {"__key__": NAMES[number], "txt": "alone"} if number == 1 else whole

    files = find_images(write(tmp_path / "a.tar", range(3), make))
    assert len(files.names) == 2
    assert files.left_out.described() == "2 .pth; 1 samples without an image (0001)"
    data = image_data(Folder, archives(tmp_path / "many"), **SIZE)
    data.setup()
    assert "left out: nothing" in data.summary()


def members(path: Path, *contents: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in contents:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


PNG = encode(random_pixels(10, 12, 3))
WRONG = {
    r"a\.png comes twice": [("a.png", PNG), ("a.png", PNG)],
    r"names must be paths within it, got '\.\./a\.png'": [("../a.png", PNG)],
    r"must hold images, and hold none \(1 samples without an image \(a\)\)": [("a.txt", b"alone")],
    r"a\.json must be JSON, and is not": [("a.png", PNG), ("a.json", b"{")],
    r"a\.txt must be text in UTF-8, and is not": [("a.png", PNG), ("a.txt", b"\xff")],
}


@pytest.mark.parametrize("said", WRONG)
def test_archive_that_cannot_be_used_is_one_message(tmp_path, said):
    with pytest.raises(ValueError, match=said):
        find_images(members(tmp_path / "a.tar", *WRONG[said]))


def test_damaged_compressed_and_missing_archives_are_told(tmp_path):
    path = write(tmp_path / "a.tar", range(4))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.tar cannot be used: it must be a whole tar archive, uncompressed, and"):
        find_images(path)
    with pytest.raises(ValueError, match="tar archives must be uncompressed, as images in others cannot be read"):
        find_images(tmp_path / "a.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"there is no tar archive .*b\.tar, .*; did you mean .*a\.tar\?"):
        find_images(tmp_path / "b.tar")
    with pytest.raises(ValueError, match="address that begins with one of file, http"):
        find_images("reference://x/a.tar")


def flipped(whole: bytes, headers: list[int]) -> bytes:
    place = headers[5] + 20  # in the name of a member, of which the header has a checksum
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


DAMAGE = {
    "a bit of a header": flipped,
    "cut between members": lambda whole, headers: whole[: headers[5]],
    "cut within a header": lambda whole, headers: whole[: headers[5] + 100],
    "another archive behind": lambda whole, headers: whole + whole,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_archive_whose_rest_tarfile_would_not_read_is_refused(tmp_path, damage):
    path = members(tmp_path / "a.tar", *((f"{number}.png", PNG) for number in range(10)))
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive]
    path.write_bytes(DAMAGE[damage](path.read_bytes(), headers))
    with pytest.raises(ValueError, match=r"a\.tar cannot be used: after (5|10) members it is cut off or damaged, or"):
        find_images(path)


def test_all_archives_below_a_folder_are_read_and_hidden_members_are_not(tmp_path):
    (tmp_path / "set/deeper").mkdir(parents=True)
    members(tmp_path / "set/a.tar", ("0.PNG", PNG), ("0.TXT", b"a caption"), ("._0.png", b"of a system"))
    members(tmp_path / "set/deeper/b.TAR", ("1.png", PNG), ("1.txt", b"another"), ("__MACOSX/1.png", b"of a system"))
    (tmp_path / "set/notes.md").write_text("notes")
    files = find_images(tmp_path / "set", Table(image="png"))
    assert files.names == ["a.tar/0.png", "deeper/b.TAR/1.png"]
    assert files.captions(files.names) == ["a caption", "another"]
    assert files.left_out.described().startswith("1 .md; ")
    assert "._0.png" in files.left_out.described()


def test_members_of_an_archive_of_the_folder_itself_have_the_names_of_its_files(tmp_path):
    path = members(tmp_path / "a.tar", ("./0.png", PNG), ("./0.txt", b"a caption"), ("./b/1.png", PNG), ("./._0", b""))
    files = find_images(path)
    assert files.names == ["0.png", "b/1.png"]
    assert files.captions(["0.png"]) == ["a caption"]
    assert files.left_out.described() == "1 hidden or of the system (._0)"


def test_classes_that_are_empty_or_missing_are_told_and_no_others(tmp_path):
    classes = [b"cat", b"", b" dog\n", b"cat"]
    content = [one for number, text in enumerate(classes) for one in ((f"{number}.png", PNG), (f"{number}.cls", text))]
    files = find_images(members(tmp_path / "a.tar", *content, ("4.png", PNG)))
    assert files.classes(["0.png", "2.png", "3.png"]) == ([0, 1, 0], ["cat", "dog"])
    with pytest.raises(ValueError, match=r"does not for 2: 1\.png \(\), 4\.png \(None\); correct it"):
        files.classes(files.names)


def test_missing_classes_and_captions_are_told(tmp_path):
    def make(number):
        ending, content = content_of(number)
        return {"__key__": NAMES[number], ending: content, "json": {"prompt": "x"}}

    place = write(tmp_path / "a.tar", range(3), make)
    with pytest.raises(ValueError, match=r"have nothing that is known to be the label, but prompt; set table\.label"):
        Folder(place, class_labels=True, **SIZE).load(progress=False)
    with pytest.raises(ValueError, match="have no caption named title, but prompt"):
        Folder(place, captions=True, table=Table(caption="title"), **SIZE).load(progress=False)
    place = write(tmp_path / "b.tar", range(3), lambda number: sample(number) if number else make(number))
    with pytest.raises(ValueError, match=r"must hold a text for every image, and 1 of 3 have none: 0000\.jpg has noth"):
        Folder(place, captions=True, **SIZE).load(progress=False)


def test_run_on_archives_is_resumed_bit_for_bit(tmp_path, tiny_module, check_resuming):
    place = archives(tmp_path / "many")
    options = {"channels": 1, "batch_size": 4, "num_val": 2, "in_memory": False, "num_workers": 0}
    check_resuming(tiny_module, lambda: image_data(Folder, place, **options, **SIZE))


def test_archives_are_read_in_spawned_processes_and_known_by_their_stamp(tmp_path):
    files = pickle.loads(pickle.dumps(find_images(archives(tmp_path / "many"))))
    name = files.names[0]
    assert files.read(name) == content_of(0)[1]
    before = files.stamp(name)
    write(tmp_path / "many/set-000.tar", range(4))
    assert find_images(tmp_path / "many").stamp(name) != before != ""


def test_pack_takes_archives_and_the_library_reads_what_it_writes(tmp_path, run_cli):
    place = archives(tmp_path / "many")
    expected = loaded(place)
    words = ["--class_labels", "--captions", "--shard_images", 5]
    assert run_cli("pack", place, tmp_path / "shards", *words)[0] == 0
    urls = sorted(str(path) for path in (tmp_path / "shards").glob("*.tar"))
    samples = [*webdataset.WebDataset(urls, shardshuffle=False)]
    assert len(samples) == 12
    by_caption = {one["txt"].decode(): one for one in samples}
    index = json.loads((tmp_path / "shards/index.json").read_text())
    for number in range(12):
        ending, content = content_of(number)
        read = by_caption[f"caption {number}"]
        assert read[ending] == content
        assert int(read["cls"]) == number % 3
        assert index["class_names"][int(read["cls"])] == str(number % 3)
    # Shards are archives of that form, too: a folder of them, without its index, is read as any other.
    assert_same(loaded(tmp_path / "shards"), expected)
    data = image_data(Shards, tmp_path / "shards", class_labels=True, captions=True, num_val=2, batch_size=4,
                      num_workers=0, **SIZE)  # fmt: skip
    data.setup()
    order = np.argsort(data.entries["captions"])
    images = data.image_set.images.index_select(0, torch.tensor(order))
    assert torch.equal(images.int(), expected.image_set.images.int()[np.argsort(expected.entries["captions"])])


def test_commands_take_several_archives_by_their_numbers(tmp_path, run_cli):
    place = archives(tmp_path / "many") / "set-{000..002}.tar"
    status, _, err = run_cli("pack", place, tmp_path / "shards")
    assert status == 0, err
    assert len(webdataset_keys(tmp_path / "shards/shard_00000.tar")) == 12
    (tmp_path / "many/set-001.tar").unlink()
    for words in (["pack", place, tmp_path / "others"], ["fit", "--config", "folder", "--data.root", place]):
        status, _, err = run_cli(*words)
        assert (status, "set-001.tar" in err, "set-000.tar, looked" in err) == (1, True, False), err
    assert not (tmp_path / "others").exists()


def webdataset_keys(archive: Path) -> set[str]:
    return {one["__key__"] for one in webdataset.WebDataset(str(archive), shardshuffle=False)}


def test_packed_pixels_are_decoded_by_the_library_as_by_pillow(tmp_path, run_cli):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encode(random_pixels(10, 12, 3, seed=number)))
    assert run_cli("pack", folder, tmp_path / "shards", "--image_size", 10, 12)[0] == 0
    read = [*webdataset.WebDataset(str(tmp_path / "shards/shard_00000.tar"), shardshuffle=False).decode("pil")]
    pictures = {np.asarray(one["png"]).tobytes() for one in read}
    assert pictures == {np.asarray(Image.open(path)).tobytes() for path in folder.iterdir()}


def test_command_line_names_archives_and_their_fields(tmp_path, run_cli):
    def make(number):
        ending, content = content_of(number)
        return {"__key__": NAMES[number], ending: content, "json": {"kind": number % 3}}

    place = archives(tmp_path / "many", make)
    words = ["--config", "folder", "--data.root", place, "--data.image_size", 32, "--data.class_labels", "true"]
    words += ["--model.unet.num_class_embeds", 4, "--model.label_dropout", 0.1]
    status, out, err = run_cli("check", *words, "--data.table.label", "title")
    assert status == 1
    assert "have no label named title, but kind; set table.label to one of them" in out + err
    status, out, err = run_cli("check", *words, "--data.table.label", "kind")
    assert "too small: 10x12, must be at least 32x32" in out + err  # all images are looked at, with their classes
