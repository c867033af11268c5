"""Data sets of the library datasets: read as the same images in a folder are, bit for bit."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import hub
import nibabel
import numpy as np
import pandas
import pytest
import torch
from encoded import encode, encode_16_bit_png, image_data, random_pixels
from PIL import Image

from unet_diffusion.data import Folder, ImageFormat, check_images, find_images
from unet_diffusion.data.described import Table
from unet_diffusion.data.tables import unique_names

LABELS = [0, 1] * 6
SIZE = {"image_size": 8}
JPEG = b"\xff\xd8"


pytestmark = pytest.mark.usefixtures("cache_of_datasets")


@pytest.fixture
def images(tmp_path) -> Path:
    """Twelve images in two classes with captions: 8 and 16 bits, alpha, grey, and turned by EXIF."""
    turned = Image.Exif()
    turned[0x0112] = 6
    contents = [
        *(encode(random_pixels(10, 12, channels, seed=channels)) for channels in (1, 3, 4)),
        encode_16_bit_png(random_pixels(10, 12, 3, np.uint16)),
        encode(random_pixels(10, 12, 3), "JPEG", quality=90, exif=turned),
        *(encode(random_pixels(10, 12, 3, seed=seed)) for seed in range(7)),
    ]
    rows = ["file_name,text"]
    for number, content in enumerate(contents):
        ending = "jpg" if content.startswith(JPEG) else "png"
        name = f"{'cat' if LABELS[number] == 0 else 'dog'}/{number:02d}.{ending}"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(content)
        rows.append(f"{name},caption {number}")
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(rows))
    return tmp_path / "images"


def table_of(images: Path, **columns) -> datasets.Dataset:
    """The same as a table, its rows in another order."""
    paths = sorted(images.glob("*/*.*"), key=lambda path: path.name, reverse=True)
    numbers = [int(path.stem) for path in paths]
    names = {"image": "image", "label": "label", "caption": "caption", **columns}
    content = {
        names["image"]: [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        names["label"]: [LABELS[number] for number in numbers],
        names["caption"]: [f" caption {number}\n" for number in numbers],
        "age": numbers,
    }
    features = {
        names["image"]: datasets.Image(),
        names["label"]: datasets.ClassLabel(names=["cat", "dog"]),
        names["caption"]: datasets.Value("string"),
        "age": datasets.Value("int64"),
    }
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def saved(table, folder):
    table.save_to_disk(folder)
    return folder


def splits(table, folder):
    datasets.DatasetDict(train=table, test=table.select(range(3))).save_to_disk(folder)
    return folder


def parquet(table, folder):
    table.to_parquet(folder / "one.parquet")
    return folder / "one.parquet"


def parquets(table, folder):
    for number in range(2):
        table.shard(2, number).to_parquet(folder / f"data/train-{number:05d}-of-00002.parquet")
    table.select(range(3)).to_parquet(folder / "data/test-00000-of-00001.parquet")
    return folder


def arrow(table, folder):
    table.save_to_disk(folder / "saved")
    (path,) = (folder / "saved").glob("*.arrow")
    return path


def plain_parquet(table, folder):
    """Written by pandas: nothing says that the bytes are images."""
    paths = [path for path in table.cast_column("image", datasets.Image(decode=False))["image"]]
    frame = pandas.DataFrame({"image": [one["bytes"] for one in paths],
                              "label": ["cat" if one == 0 else "dog" for one in table["label"]],
                              "caption": list(table["caption"])})  # fmt: skip
    frame.to_parquet(folder / "plain.parquet")
    return folder / "plain.parquet"


FORMS = {form.__name__: form for form in (saved, splits, parquet, parquets, arrow, plain_parquet)}


def entries_by_image(data):
    """What is known of each image, in an order that does not depend on names."""
    rows = zip(data.image_set.images.flatten(1).tolist(), data.entries["labels"].tolist(), data.entries["captions"],
               strict=True)  # fmt: skip
    return sorted(rows)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_read_as_the_folder_of_the_same_images(images, tmp_path, form):
    (tmp_path / "set").mkdir()
    place = FORMS[form](table_of(images), tmp_path / "set")
    options = {**SIZE, "class_labels": True, "captions": True, "background": "red"}
    data, expected = image_data(Folder, place, **options), image_data(Folder, images, **options)
    for one in (data, expected):
        one.setup()
    assert data.image_set.images.dtype == expected.image_set.images.dtype == torch.uint16
    assert data.class_names == expected.class_names == ["cat", "dog"]
    assert entries_by_image(data) == entries_by_image(expected)


def test_only_names_that_come_again_are_numbered(images, tmp_path):
    table = table_of(images).cast_column("image", datasets.Image(decode=False))
    before = image_data(Folder, saved(table, tmp_path / "set"), num_val=3, **SIZE)
    rows = [*table, *(table[number] for number in (3, 5, 3)), table[4]]
    rows[-1] = {**rows[-1], "image": {"bytes": rows[-1]["image"]["bytes"], "path": None}}
    after = image_data(Folder, saved(datasets.Dataset.from_list(rows, features=table.features), tmp_path / "more"),
                       num_val=3, **SIZE)  # fmt: skip
    for one in (before, after):
        one.setup()
    names = [Path(row["image"]["path"]).stem for row in table]
    again = {f"{names[3]}_2", f"{names[3]}_3", f"{names[5]}_2"}
    found = {Path(name).stem for name in after.image_set.names}
    assert found == {*names, *again, "000000015"}
    assert f"3 names of images that come again, and are numbered ({names[5]}_2" in after.source.left_out()
    kept = [after.image_set.names.index(name) for name in before.image_set.names]
    assert torch.equal(after.image_set.images[kept], before.image_set.images)
    names = ["a.png", "a.png", "b.png", "a_2.png", "a_4.png", "a.png", "a.png", "a_2.png"]
    unique, again = unique_names(names)
    assert unique == ["a.png", "a_2.png", "b.png", "a_2_2.png", "a_4.png", "a_3.png", "a_5.png", "a_2_3.png"]
    assert again == ["a_2.png", "a_2_2.png", "a_3.png", "a_5.png", "a_2_3.png"]
    for number in range(len(names)):  # others that are appended rename none
        assert unique_names(names[:number])[0] == unique[:number]


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_names_of_files_make_the_same_split_as_in_a_folder(images, tmp_path, form):
    for path in images.glob("*/*.*"):
        path.rename(images / path.name)
    (images / "metadata.csv").unlink()
    folder = {"saved": tmp_path / "set", "parquet": images.parent}[form]  # Parquet names files, which lie beside it
    table = datasets.Dataset.from_dict(
        {"image": [str(path) for path in images.glob("*.*")]}, features=datasets.Features({"image": datasets.Image()})
    )
    data = image_data(Folder, FORMS[form](table, folder), num_val=3, batch_size=4, seed=7, **SIZE)
    expected = image_data(Folder, images, num_val=3, batch_size=4, seed=7, **SIZE)
    for one in (data, expected):
        one.setup()
    torch.testing.assert_close([*data.train_dataloader()], [*expected.train_dataloader()], rtol=0, atol=0)
    torch.testing.assert_close(data.val_indices, expected.val_indices, rtol=0, atol=0)


def test_images_without_names_are_numbered_and_read_by_workers_in_spawned_processes_too(images, tmp_path):
    table = table_of(images)
    pixels = [np.asarray(image.convert("RGB")) for image in table["image"] if image.size == (12, 10)]
    datasets.Dataset.from_dict({"image": [Image.fromarray(one) for one in pixels]}).save_to_disk(tmp_path / "set")
    files = pickle.loads(pickle.dumps(find_images(tmp_path / "set")))
    assert files.names == [f"{number:09d}" for number in range(len(pixels))]
    read = check_images(files, ImageFormat(10, 12), progress=False).images
    for number, expected in enumerate(pixels):
        image = read.index_select(0, torch.tensor([number]))[0]
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_columns_and_split_are_chosen_by_name(images, tmp_path):
    table = table_of(images, image="photo", label="kind", caption="prompt")
    other = table.add_column("mask", list(table.cast_column("photo", datasets.Image(decode=False))["photo"]))
    other = other.cast_column("mask", datasets.Image())
    place = splits(other, tmp_path / "set")
    named = Table(image="photo", label="kind", caption="prompt", split="test")
    data = image_data(Folder, place, class_labels=True, captions=True, table=named, num_val=1, **SIZE)
    data.setup()
    assert len(data.image_set.images) == 3
    assert data.entries["captions"] == ["caption 9", "caption 10", "caption 11"]


WRONG = {
    "set.image to": (
        Table(image="photo"),
        {},
        "has no column photo, but image .Image., label .ClassLabel., caption .s",
    ),
    "image": (
        Table(image="age"),
        {},
        "the column age of .* must hold images, in the bytes of their files, and holds i",
    ),
    "label": (Table(label="kind"), {"class_labels": True}, "has no column kind, but image .*; set table.label to"),
    "caption": (Table(caption="prompt"), {"captions": True}, "has no column prompt, but image .*; set table.caption"),
    "no text": (Table(caption="age"), {"captions": True}, "age of .* must hold a text for every image, and 12 of 12"),
    "split": (Table(split="val"), {}, "has no split val, but train, test; set table.split to one of them"),
    "not asked for": (Table(caption="caption"), {}, "table.caption is caption, and captions is false; set captions"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_there_is_named_with_what_is(images, tmp_path, wrong):
    table, options, said = WRONG[wrong]
    place = splits(table_of(images), tmp_path / "set")
    with pytest.raises(ValueError, match=said):
        Folder(place, table=table, **options, **SIZE).load(progress=False)


def test_rows_without_an_image_or_a_class_are_named(images, tmp_path):
    table = table_of(images)
    rows = [{**row, "image": None if number == 1 else row["image"]} for number, row in enumerate(table)]
    place = saved(datasets.Dataset.from_list(rows, features=table.features), tmp_path / "set")
    with pytest.raises(ValueError, match=r"1 of 12 image files cannot be used:\s+000000001: its row holds no image"):
        Folder(place, **SIZE).load(progress=False)
    with pytest.warns(UserWarning, match="1 of 12 image files cannot be used"):
        assert len(Folder(place, on_bad_file="skip", **SIZE).load(progress=False).images) == 11
    rows[0]["label"] = -1
    place = saved(datasets.Dataset.from_list(rows, features=table.features), tmp_path / "unlabelled")
    with pytest.raises(ValueError, match=r"the number of a class, from 0 to 1, .* for 1: 000000000 \(-1\); correct"):
        Folder(place, class_labels=True, **SIZE).load(progress=False)


def test_table_that_is_cut_off_is_one_message(images, tmp_path):
    path = parquet(table_of(images), tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"one\.parquet cannot be read as a data set: "):
        find_images(path)


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"the package datasets is needed; install it with .*unet-diffusion\[datas"):
        find_images("hf://owner/name")


def test_scripts_of_data_sets_are_not_run(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "set" / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read as a data set"):
        find_images(tmp_path / "set")
    assert not (tmp_path / "ran").exists()


def test_run_on_a_table_is_resumed_bit_for_bit(images, tmp_path, tiny_module, check_resuming):
    place = saved(table_of(images), tmp_path / "set")

    def data():
        return image_data(Folder, place, channels=1, batch_size=4, num_val=2, in_memory=False, num_workers=0, **SIZE)

    check_resuming(tiny_module, data)


def test_continued_run_notices_that_a_row_has_changed(images, tmp_path):
    table = table_of(images)
    before = image_data(Folder, saved(table, tmp_path / "set"), **SIZE)
    before.setup()
    (images / "cat/10.png").write_bytes(encode(random_pixels(10, 12, 3, seed=99)))
    after = image_data(Folder, saved(table_of(images), tmp_path / "other"), **SIZE)
    after.setup()
    after.must_be_same = True
    with pytest.raises(ValueError, match=r"1 changed \(10\.png\)"):
        after.load_state_dict(before.state_dict())


HUB = """
import hashlib, os, sys
from unet_diffusion.data.described import Table
from unet_diffusion.data.tables import unique_names
from unet_diffusion.data.files import find_images
files = find_images(sys.argv[1], Table(split=os.environ.get("SPLIT"), config=os.environ.get("CONFIG")))
print(*(hashlib.sha256(files.read(name)).hexdigest() for name in files.names), *files.classes(files.names)[1])
"""


def from_the_hub(place, home, endpoint, **variables):
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", **variables}
    command = [sys.executable, "-c", HUB, place]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_data_set_of_the_hub_is_read_and_found_in_the_cache_without_it(images, tmp_path):
    paths = sorted(images.glob("*/*.*"), key=lambda path: path.name)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    buffer = io.BytesIO()
    table_of(images).to_parquet(buffer)
    with hub.serve() as server:
        sha = server.commit("me/set", {"data/train-00000-of-00001.parquet": buffer.getvalue()})
        read = from_the_hub(f"hf://me/set@{sha}", tmp_path / "home", server.endpoint)
        assert read.stdout.split() == [*hashes, "cat", "dog"], read.stderr
        missing = from_the_hub("hf://me/other", tmp_path / "home", server.endpoint)
        assert "hf://me/other cannot be had from the hub: Dataset 'me/other' doesn't exist" in missing.stderr
    again = from_the_hub("hf://me/set", tmp_path / "home", server.endpoint, HF_HUB_OFFLINE="1")
    assert again.stdout == read.stdout, again.stderr
    gone = from_the_hub("hf://me/set", tmp_path / "elsewhere", server.endpoint, HF_HUB_OFFLINE="1")
    assert "the hub cannot be reached for hf://me/set" in gone.stderr


@pytest.mark.slow
@pytest.mark.parametrize("told_by", ["names", "short names", "card"])
def test_only_the_files_of_the_split_are_downloaded(images, tmp_path, told_by):
    names = {"train": "data/train-00000-of-00001.parquet", "test": "data/test-00000-of-00001.parquet"}
    if told_by == "short names":  # of which the library makes splits of a class of its own
        names = {"train": "train.parquet", "test": "test.parquet"}
    if told_by == "card":
        names = {"train": "one.parquet", "test": "two.parquet"}
    files = {}
    for split, rows in (("train", range(12)), ("test", range(3))):
        buffer = io.BytesIO()
        table_of(images).select(rows).to_parquet(buffer)
        files[names[split]] = buffer.getvalue()
    splits = "".join(f"  - split: {split}\n    path: {path}\n" for split, path in names.items())
    sizes = "".join(f"  - name: {split}\n    num_bytes: 1\n    num_examples: {number}\n"
                    for split, number in (("train", 12), ("test", 3)))  # fmt: skip
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}dataset_info:\n  splits:\n{sizes}---\n"
    if told_by == "card":
        files["README.md"] = card.encode()
    with hub.serve() as server:
        server.commit("me/set", files)
        for split, other, number in (("test", "train", 3), ("train", "test", 12)):
            server.seen.clear()
            home = tmp_path / split
            read = from_the_hub("hf://me/set", home, server.endpoint, SPLIT=split)
            assert len(read.stdout.split()) == number + 2, read.stderr
            downloaded = [line for line in server.seen if line.startswith("GET") and line.endswith(".parquet")]
            assert any(names[split] in line for line in downloaded)
            assert not any(names[other] in line for line in downloaded)
            again = from_the_hub("hf://me/set", home, server.endpoint, SPLIT=split, HF_HUB_OFFLINE="1")
            assert again.stdout == read.stdout, again.stderr
        both = from_the_hub("hf://me/set", tmp_path / "test", server.endpoint)  # the usual split, with the other there
        assert both.stdout == read.stdout, both.stderr
        server.seen.clear()
        missing = from_the_hub("hf://me/set", tmp_path / "missing", server.endpoint, SPLIT="val")
        said = ": hf://me/set has no split val, but train, test; set table.split to one of them"
        assert said in missing.stderr
        assert "cannot be read" not in missing.stderr
        assert not any(line.startswith("GET") and line.endswith(".parquet") for line in server.seen)
    gone = from_the_hub("hf://me/set", tmp_path / "train", server.endpoint, SPLIT="test", HF_HUB_OFFLINE="1")
    assert gone.returncode


@pytest.mark.slow
def test_classes_of_folders_are_numbered_alike_in_all_splits(images, tmp_path):
    contents = [path.read_bytes() for path in sorted(images.glob("dog/*.*"))]
    kinds = {"train": ["cat", "dog", "horse"], "test": ["dog"]}
    files = {f"{split}/{kind}/{number}.png": content for split, names in kinds.items() for kind in names
             for number, content in enumerate(contents[:2])}  # fmt: skip
    with hub.serve() as server:
        server.commit("me/set", files)
        for offline in "01":
            read = from_the_hub("hf://me/set", tmp_path, server.endpoint, SPLIT="test", HF_HUB_OFFLINE=offline)
            assert read.stdout.split()[2:] == ["cat", "dog", "horse"], read.stderr


@pytest.mark.slow
def test_cache_of_one_configuration_hides_no_other_that_is_there_as_a_whole(images, tmp_path):
    buffer = io.BytesIO()
    table_of(images).to_parquet(buffer)
    card = "".join(f"- config_name: {name}\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {name}-{split}.parquet\n" for split in splits)
        for name, splits in {"two": ["train", "test"], "one": ["train"]}.items())  # fmt: skip
    files = {f"{name}.parquet": buffer.getvalue() for name in ("two-train", "two-test", "one-train")}
    with hub.serve() as server:
        server.commit("me/set", {**files, "README.md": f"---\nconfigs:\n{card}---\n".encode()})
        for config in ("two", "one"):
            read = from_the_hub("hf://me/set", tmp_path, server.endpoint, SPLIT="train", CONFIG=config)
            assert len(read.stdout.split()) == 14, read.stderr
    for config in ("two", "one"):
        again = from_the_hub("hf://me/set", tmp_path, server.endpoint, CONFIG=config, HF_HUB_OFFLINE="1")
        assert again.stdout == read.stdout, again.stderr


def test_number_without_a_class_is_refused(images, tmp_path):
    import pyarrow as pa

    table = table_of(images)
    rows = table.data.table
    numbers = pa.array([0, 1, 2] * 4)
    rows = rows.set_column(rows.column_names.index("label"), "label", numbers)
    place = saved(datasets.Dataset(rows, info=table.info), tmp_path / "set")
    with pytest.raises(ValueError, match=r"from 0 to 1, for every image, and does not for 4: .* \(2\)"):
        Folder(place, class_labels=True, **SIZE).load(progress=False)


def test_format_that_a_table_was_saved_with_changes_nothing(images, tmp_path):
    place = saved(table_of(images).with_format("torch", columns=["label"]), tmp_path / "set")
    files = find_images(place)
    assert files.classes(files.names)[0] == [LABELS[int(Path(name).stem)] for name in files.names]
    assert len(files.read(files.names[0])) > 0


def test_folder_of_tables_is_read_by_the_names_of_its_files_alone(images, tmp_path):
    table = table_of(images)
    (tmp_path / "set").mkdir()
    table.select(range(4)).to_parquet(tmp_path / "set/one.parquet")
    table.select(range(4, 12)).to_parquet(tmp_path / "set/two.parquet")
    table.to_parquet(tmp_path / "elsewhere.parquet")
    (tmp_path / "set/README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: ../elsewhere.parquet\n---\n"
    )
    for number in range(3):
        (tmp_path / f"set/{number}.json").write_text("{}")
    files = find_images(tmp_path / "set")
    assert len(files.names) == 12
    assert files.left_out.described() == "3 .json; 1 .md"
    table.to_parquet(tmp_path / "set/cells-test.parquet")
    with pytest.raises(
        ValueError, match=r"files of the splits test, and others whose names tell none: one\.parquet, two"
    ):
        find_images(tmp_path / "set")
    saved(table, tmp_path / "both/a")
    saved(table, tmp_path / "both/b")
    with pytest.raises(ValueError, match="data sets that were saved each by itself: a, b; give one"):
        find_images(tmp_path / "both")


def test_table_names_no_files_outside_of_its_folder(images, tmp_path):
    (tmp_path / "set").mkdir()
    for path in (str(next(images.glob("*/*.*"))), "../secret.png", "missing.png"):
        rows = [{"image": {"bytes": None, "path": path}}]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set/a.parquet")
        files = find_images(tmp_path / "set/a.parquet", Table(image="image"))
        said = "there is no such file" if path == "missing.png" else "must lie below"
        with pytest.raises(ValueError, match=f"its row names .*{said}"):
            files.read(files.names[0])


def test_table_may_name_files_beside_it(images):
    paths = sorted(str(path) for path in images.glob("*/*.*"))
    table = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(images.parent / "named.parquet")
    files = find_images(images.parent / "named.parquet")
    assert [files.read(name) for name in files.names] == [Path(path).read_bytes() for path in
                                                          sorted(paths, key=lambda path: Path(path).name)]  # fmt: skip


def test_arrays_and_slices_in_a_table_get_the_extension_of_their_format(tmp_path, run_cli):
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, pixels)
    np.savez(npz, pixels)
    nifti = nibabel.Nifti1Image(pixels, np.eye(4)).to_bytes()
    contents = [npy.getvalue(), npz.getvalue(), nifti, gzip.compress(nifti)]
    pandas.DataFrame({"image": contents}).to_parquet(tmp_path / "set.parquet")
    status, _, err = run_cli("pack", tmp_path / "set.parquet", tmp_path / "shards", "--channels", 1)
    assert status == 0, err
    with tarfile.open(next((tmp_path / "shards").glob("*.tar"))) as archive:
        endings = {name.partition(".")[2] for name in archive.getnames()}
    assert endings == {"npy", "npz", "nii", "nii.gz"}


def test_pack_takes_a_table(images, tmp_path, run_cli):
    place = parquet(table_of(images, caption="prompt"), tmp_path)
    shutil.rmtree(images)
    options = ["--class_labels", "--captions", "--table.caption", "prompt", "--shard_images", 5]
    status, _, err = run_cli("pack", place, tmp_path / "shards", *options)
    assert status == 0, err
    again, _, err = run_cli("pack", place, tmp_path / "shards", *options)  # goes on, and finds all done
    assert again == 0, err
    status, _, err = run_cli("pack", place, tmp_path / "others", "--captions")
    assert status == 1
    assert "set table.caption to the one that holds them" in err
    assert not (tmp_path / "others").exists()
