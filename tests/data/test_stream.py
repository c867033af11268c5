"""Shards: what pack writes, in which order they are read, and what is done about those that cannot be."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import time
import warnings
from itertools import chain

import numpy as np
import pytest
import torch
from encoded import encode, encode_16_bit_png, image_data, random_pixels, write_images
from fsspec.registry import _registry as fsspec_implementations
from PIL import Image
from shard_servers import FaultyServer

from unet_diffusion.commands.main import main
from unet_diffusion.data import (
    Folder,
    ImageDataModule,
    ResumableLoader,
    ShardError,
    Shards,
    ShardStore,
    ShuffledShards,
    find_images,
    pack_images,
    shards,
    stores,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")

STARTS = [0, 10, 13, 13, 40, 47, 70, 71, 90, 100]  # of shards of 0 to 27 images


@pytest.fixture
def images(tmp_path):
    """40 images of noise in two classes, with captions."""
    rows = ["file_name,text"]
    for label in ("cat", "dog"):
        write_images(tmp_path / "images" / label, 20, height=10, width=12)
        rows += [f"{label}/{path.name},{label} {path.stem}" for path in (tmp_path / "images" / label).iterdir()]
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(rows))
    return tmp_path / "images"


@pytest.fixture
def packed(images, run_cli):
    """The images in six shards, the last of them smaller."""
    folder = images.parent / "shards"
    status, _, err = run_cli("pack", images, folder, "--shard_images", 7, "--class_labels", "--captions")
    assert status == 0, err
    return folder


def stream(root, **options) -> ImageDataModule:
    given = {"image_size": 8, "batch_size": 4, "num_val": 5, "num_workers": 0, "num_retries": 0}
    data = image_data(Shards, root, **given | options)
    data.setup()
    return data


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return batches_of(loader)


def batches_of(loader):
    """All of them; after an error, too, the workers end at once.

    What torch raises for a worker holds itself in a cycle, and the loader with it. Collected as garbage, the loader has
    lost the threads that tell its workers to end, and waits 5 s for each.
    """
    try:
        return list(loader)
    finally:
        if loader.num_workers and loader._iterator is not None:
            loader._iterator._shutdown_workers()


def lists(epoch=0, *, first_batch=0, **options):
    given = {"starts": STARTS, "batch_size": 3, "first": 4, "window": 2, "num_lanes": 4, "seed": 1}
    sampler = ShuffledShards(**(given | options))
    sampler.set_epoch(epoch)
    sampler.resume_at(epoch, first_batch)
    return list(sampler)


# ---------------------------------------------------------------------------------------------------------- the order


def test_order_is_a_function_of_seed_and_epoch():
    first = lists(3, horizontal_flip=True)
    torch.manual_seed(5)  # the global generator has no part in it
    assert lists(3, horizontal_flip=True) == first
    assert lists(4, horizontal_flip=True) != first
    assert lists(3, horizontal_flip=True, seed=2) != first


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
@pytest.mark.parametrize("num_lanes", [1, 2, 5])
@pytest.mark.parametrize("window", [1, 3])
def test_each_rank_makes_as_many_steps_and_no_image_comes_twice(num_replicas, num_lanes, window):
    options = {"num_lanes": num_lanes, "window": window, "num_replicas": num_replicas}
    for epoch in range(3):
        ranks = [lists(epoch, rank=rank, **options) for rank in range(num_replicas)]
        assert [len(rank) for rank in ranks] == [96 // (3 * num_replicas)] * num_replicas
        assert all(len(batch) == 3 for batch in chain(*ranks))
        drawn = list(chain(*chain(*ranks)))
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(range(4, 100))


def test_images_that_are_left_out_are_others_in_each_epoch():
    left_out = [set(range(4, 100)) - set(chain(*lists(epoch, batch_size=7))) for epoch in range(20)]
    assert {len(left) for left in left_out} == {96 % 7}
    assert len(set(chain(*left_out))) > 20


def test_resumed_epoch_goes_on_at_every_step():
    whole = lists(2, horizontal_flip=True)
    for step in range(len(whole) + 1):
        assert lists(2, first_batch=step, horizontal_flip=True) == whole[step:]


@pytest.mark.parametrize("name", ["window", "num_lanes"])
def test_epoch_that_goes_on_in_another_order_of_shards_is_told(name):
    def loader(**options):
        sampler = ShuffledShards(STARTS, 3, **{"window": 2, "num_lanes": 2, **options})
        return ResumableLoader(dataset=range(100), sampler=sampler, batch_size=None)

    state = {**loader().state_dict(), "num_batches": 1}
    with pytest.warns(UserWarning, match=rf"another order than in the checkpoint \({name} was 2, is 4\)"):
        loader(**{name: 4}).load_state_dict(state)


def test_run_does_not_go_on_with_shards_that_were_packed_anew(images, packed, run_cli):
    state = stream(packed).train_dataloader().state_dict()
    shutil.copytree(packed, images.parent / "copy")
    stream(images.parent / "copy").train_dataloader().load_state_dict(state)
    shutil.rmtree(packed)
    assert run_cli("pack", images, packed, "--shard_images", 6)[0] == 0
    with pytest.raises(ValueError, match=r"trained on other shards than those in .*/shards, which were packed anew"):
        stream(packed).train_dataloader().load_state_dict(state)


def test_lanes_read_shards_of_their_own_but_for_those_at_cuts():
    starts = list(range(0, 2001, 20))
    ranks = [lists(starts=starts, first=0, batch_size=5, num_replicas=2, rank=rank) for rank in range(2)]
    lanes = [{index // 20 for batch in rank[lane::4] for index in batch} for rank in ranks for lane in range(4)]
    assert len(set(chain(*lanes))) == 100
    assert sum(map(len, lanes)) <= 100 + len(lanes) - 1
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 2


def test_batches_mix_the_shards_of_a_window():
    starts = list(range(0, 2001, 100))
    batches = lists(starts=starts, first=0, batch_size=20, num_lanes=2)
    assert sum(len({index // 100 for index in batch}) >= 2 for batch in batches) > 0.9 * len(batches)
    assert max(len({index // 100 for index in batch}) for batch in batches) <= 4  # of two windows


def test_mirroring_is_drawn_for_half_of_the_images():
    plain, mirrored = (torch.tensor(lists(horizontal_flip=flip)) for flip in (False, True))
    assert torch.equal(mirrored % 100, plain)
    assert 20 < (mirrored >= 100).sum() < 76  # binomial(96, 1/2), six standard deviations


def test_fewer_images_than_a_batch_make_one_smaller_batch():
    (batch,) = lists(starts=[0, 3, 7], first=0, batch_size=64)
    assert sorted(batch) == list(range(7))


# --------------------------------------------------------------------------------------------------------------- pack


def test_every_image_is_read_as_from_its_folder_with_its_class_and_caption(images, packed):
    data = stream(packed, class_labels=True, captions=True)
    folder = ImageDataModule(Folder(images, image_size=8, class_labels=True, captions=True))
    folder.setup()
    expected = {caption: i for i, caption in enumerate(folder.entries["captions"])}
    assert data.class_names == folder.class_names
    seen = epoch_of(data) + list(data.val_dataloader())
    drawn = torch.cat([batch["index"] for batch in seen]).tolist()
    assert len(set(drawn)) == len(drawn) == 32 + 5
    for batch in seen:
        for image, label, index in zip(batch["images"], batch["labels"], batch["index"].tolist(), strict=True):
            other = expected[data.entries["captions"][index]]
            assert torch.equal(image, folder.image_set.images[other])
            assert label == folder.entries["labels"][other]


def test_shards_are_of_images_drawn_at_random_and_plain_tar_archives(packed):
    names = sorted(path.name for path in packed.glob("*.tar"))
    assert names == [f"shard_{number:05d}.tar" for number in range(6)]
    with tarfile.open(packed / names[0]) as archive:
        images = [member for member in archive if member.name.endswith(".png")]
        pictures = [Image.open(io.BytesIO(archive.extractfile(member).read())) for member in images]
    assert [picture.size for picture in pictures] == [(12, 10)] * 7
    labels = [one["entries"]["labels"] for one in json.loads((packed / "index.json").read_text())["shards"]]
    assert [len(one) for one in labels] == [7, 7, 7, 7, 7, 5]
    assert sum(0 < sum(one) < len(one) for one in labels) >= 5


def test_scaled_images_are_read_as_from_their_folder(images, run_cli):
    folder = images.parent / "scaled"
    status, _, err = run_cli("pack", images, folder, "--image_size", 6, 5, "--channels", 1)
    assert status == 0, err
    data, expected = (
        stream(folder, image_size=(6, 5), channels=1),
        ImageDataModule(Folder(images, image_size=(6, 5), channels=1)),
    )
    expected.setup()
    read, wanted = (one.image_set.images.index_select(0, torch.arange(40)) for one in (data, expected))
    assert sorted(map(bytes, map(np.asarray, read))) == sorted(map(bytes, map(np.asarray, wanted)))
    with pytest.raises(ValueError, match=r"image_size must be at most 6x5, .* got 8x8; .* --image_size 8 8"):
        stream(folder, channels=1)
    with pytest.raises(ValueError, match=r"channels must be 1, as the images in .* were packed, got 3"):
        stream(folder, image_size=5)


def test_no_image_is_enlarged_in_height_or_width(images, run_cli):
    for number, (height, width) in enumerate(((6, 30), (20, 7))):
        (images / "cat" / f"odd_{number}.png").write_bytes(encode(random_pixels(height, width, 3)))
    assert run_cli("pack", images, images.parent / "odd", "--shard_images", 7)[0] == 0
    stream(images.parent / "odd", image_size=(6, 7))
    for more in ((7, 7), (6, 8)):
        with pytest.raises(ValueError, match="image_size must be at most 6x7, as small as images in"):
            stream(images.parent / "odd", image_size=more)


def test_images_with_16_bits_keep_them(images, run_cli):
    deep = random_pixels(8, 8, 3, dtype=np.uint16)
    (images / "cat" / "deep.png").write_bytes(encode_16_bit_png(deep))
    status, _, err = run_cli("pack", images, images.parent / "deep")
    assert status == 0, err
    read = stream(images.parent / "deep").image_set.images.index_select(0, torch.arange(41))
    assert any(torch.equal(one.int(), torch.from_numpy(deep.astype(np.int32)).permute(2, 0, 1)) for one in read)
    status, _, err = run_cli("pack", images, images.parent / "scaled", "--image_size", 8, 8)
    assert status == 0, err
    scaled = stream(images.parent / "scaled").image_set.images.index_select(0, torch.arange(41))
    assert torch.equal(scaled.int(), read.int())  # files of 8x8 pixels


def test_bad_files_are_listed_and_then_mended_or_left_out(images, run_cli):
    folder = images.parent / "shards"
    good = (images / "dog" / "003.png").read_bytes()
    (images / "dog" / "003.png").write_bytes(good[:100])
    (images / "cat" / "005.png").write_text("no image")
    pack = ["pack", images, folder, "--shard_images", 7]
    status, _, err = run_cli(*pack)
    assert status == 1
    assert "2 of 40 image files cannot be used" in err
    assert "cat/005.png" in err
    assert "dog/003.png" in err
    with pytest.raises(FileNotFoundError, match=r"there is no index.json in .*; give what unet-diffusion pack wrote"):
        stream(folder)
    status, out, err = run_cli(*pack, "--on_bad_file", "skip")
    assert status == 0, err
    assert "38 images in" in out
    assert len(stream(folder).image_set.images) == 38
    (images / "dog" / "003.png").write_bytes(good)
    (images / "cat" / "005.png").write_bytes(encode(random_pixels(8, 8, 3)))
    status, _, err = run_cli(*pack)
    assert status == 0, err
    assert len(stream(folder).image_set.images) == 40


def test_index_never_outlives_the_shards_that_it_tells_of(images, run_cli):
    folder = images.parent / "shards"
    good = (images / "dog" / "003.png").read_bytes()
    for bad in ("dog/003.png", "cat/005.png"):
        (images / bad).write_text("no image")
    pack = ["pack", images, folder, "--shard_images", 7]
    assert run_cli(*pack, "--on_bad_file", "skip")[0] == 0
    status, _, err = run_cli(*pack)  # in which nothing is new
    assert status == 1
    assert "the index of an earlier call is still valid" in err
    epoch_of(stream(folder))
    (images / "dog" / "003.png").write_bytes(good)
    status, _, err = run_cli(*pack)
    assert status == 1
    assert "index.json is written once all are" in err
    assert not (folder / "index.json").exists()
    assert run_cli(*pack, "--on_bad_file", "skip")[0] == 0
    data = stream(folder)
    assert len(data.image_set.images) == 39
    epoch_of(data)


def test_pack_that_was_killed_while_it_wrote_its_settings_goes_on(images, run_cli):
    (images.parent / "shards").mkdir()
    (images.parent / "shards" / ".settings.json.999999999.partial").write_text('{"ima')
    status, _, err = run_cli("pack", images, images.parent / "shards")
    assert status == 0, err
    assert not list((images.parent / "shards").glob(".*.partial"))


def test_pack_goes_on_and_never_mixes(images, packed, run_cli, tmp_path):
    pack = ["pack", images, packed, "--shard_images", 7, "--class_labels", "--captions"]
    before = {path.name: path.read_bytes() for path in packed.glob("*.*")}
    kept = (packed / "shard_00001.tar").stat().st_mtime_ns
    for gone in ("index.json", "records/00003.json", "shard_00004.tar", "records/00004.json"):
        (packed / gone).unlink()
    (packed / ".shard_00004.tar.999999999.partial").touch()  # as a process that was killed would leave it
    status, _, err = run_cli(*pack)
    assert status == 0, err
    assert {path.name: path.read_bytes() for path in packed.glob("*.*")} == before
    assert (packed / "shard_00001.tar").stat().st_mtime_ns == kept
    for more, named in ((["--image_size", "8", "8"], "image_format: "), (["--shard_images", "8"], "shard_images: 7 ")):
        status, _, err = run_cli(*pack, *more)
        assert status == 1
        assert f"were made with other settings ({named}" in err
    (images / "cat" / "000.png").unlink()
    status, _, err = run_cli("pack", images, packed, "--shard_images", 7, "--class_labels")
    assert status == 1
    assert all(name in err for name in ("num_images: ", "contents of names", "contents of captions")), err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    status, _, err = run_cli("pack", images, tmp_path / "other")
    assert status == 1
    assert "holds files that are no shards" in err


def test_pack_that_is_killed_goes_on(images, run_cli, tmp_path):
    def pack(name):
        return ["pack", str(images), str(tmp_path / name), "--shard_images", "1"]

    process = multiprocessing.get_context("fork").Process(target=main, args=(pack("killed"),))
    process.start()
    while process.is_alive() and not (tmp_path / "killed" / "records" / "00002.json").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "index.json").exists()
    for name in ("killed", "untouched"):
        status, _, err = run_cli(*pack(name))
        assert status == 0, err
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("killed", "untouched")
    ]
    assert files[0] == files[1]


def files_in(folder) -> dict[str, bytes]:
    """But for what is noted of the times of images."""
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.name != "settings.json"}


def replace_image(path, seed) -> None:
    pixels = np.random.default_rng(seed).integers(256, size=(12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("scaled", [[], ["--image_size", 8, "8"]])
def test_shards_of_images_that_were_replaced_are_packed_again_and_said(images, run_cli, scaled):
    pack = ["--shard_images", 7, "--class_labels", "--captions", *scaled]
    assert run_cli("pack", images, images.parent / "shards", *pack)[0] == 0
    before = files_in(images.parent / "shards")
    replace_image(images / "cat" / "003.png", 100)
    status, out, err = run_cli("pack", images, images.parent / "shards", *pack)
    assert status == 0, err
    said = re.search(r"(shard_\d+\.tar) is packed again, because images in it have changed: cat/003\.png\n", out)
    assert said, out
    assert run_cli("pack", images, images.parent / "fresh", *pack)[0] == 0
    after = files_in(images.parent / "shards")
    assert after == files_in(images.parent / "fresh")
    assert {name for name in after if after[name] != before[name]} == {said[1], "index.json"}
    assert "packed again" not in run_cli("pack", images, images.parent / "shards", *pack)[1]


@pytest.mark.parametrize("after", [0, 1, 4, 9, 13])
def test_pack_that_is_cut_off_and_goes_on_with_other_images_is_a_fresh_one(images, run_cli, monkeypatch, after):
    """Cut off when so many files have taken their place; then images are replaced, and classes change their names."""
    pack, places, replace = ["--shard_images", 7, "--class_labels"], [], os.replace

    def cut_off(source, place):
        if len(places) == after:
            raise KeyboardInterrupt
        places.append(place)
        replace(source, place)

    monkeypatch.setattr("os.replace", cut_off)
    assert run_cli("pack", images, images.parent / "shards", *pack)[0] == 130
    monkeypatch.undo()
    replace_image(images / "cat" / "003.png", 100)
    (images / "cat").rename(images / "new")
    (images / "dog").rename(images / "cat")
    (images / "new").rename(images / "dog")
    status, _, err = run_cli("pack", images, images.parent / "shards", *pack)
    if status:
        assert "were made with other settings (" in err, err
        assert after > 0
        return
    assert run_cli("pack", images, images.parent / "fresh", *pack)[0] == 0
    assert files_in(images.parent / "shards") == files_in(images.parent / "fresh")


def test_pack_notices_that_a_class_folder_was_renamed(images, packed, run_cli):
    (images / "cat").rename(images / "tiger")
    status, _, err = run_cli("pack", images, packed, "--shard_images", 7, "--class_labels")
    assert (status, "contents of names; class_names: ['cat', 'dog'] there, ['dog', 'tiger'] here" in err) == (1, True)


def test_what_was_not_packed_is_refused(images, run_cli):
    run_cli("pack", images, images.parent / "plain")
    for name in ("class_labels", "captions"):
        with pytest.raises(ValueError, match=f"was packed without {name}; pack again with --{name}"):
            stream(images.parent / "plain", **{name: True})


def test_further_entries_are_packed_and_streamed(images, tmp_path):
    files = find_images(images)
    entries = {
        "age": torch.arange(40, dtype=torch.uint8),
        "vector": torch.rand(40, 3),
        "is_old": torch.arange(40) > 20,
        "name": files.names,
    }
    pack_images(files, tmp_path / "shards", root=images, shard_images=7, entries=entries)
    data = stream(tmp_path / "shards")
    names = data.entries["name"]
    order = [files.names.index(name) for name in names]
    assert sorted(names) == sorted(files.names)
    for batch in epoch_of(data) + list(data.val_dataloader()):
        assert batch.keys() == {"images", "index", "is_mirrored", "age", "vector", "is_old"}
        for key, dtype in {"age": torch.int64, "vector": torch.float32, "is_old": torch.bool}.items():
            assert batch[key].dtype == dtype
            assert torch.equal(batch[key], entries[key][order][batch["index"]].to(dtype))
    folder = image_data(Folder, images, image_size=8)
    folder.setup()
    read = data.image_set.images.index_select(0, torch.arange(40))
    assert torch.equal(read, folder.image_set.images[order])
    with pytest.raises(FileExistsError, match=r"other settings \(contents of age\)"):
        pack_images(files, tmp_path / "shards", root=images, shard_images=7, entries=entries | {"age": torch.zeros(40)})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_bad_shard": "ignore"}, 'on_bad_shard must be "error" or "skip"'),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"num_retries": -1}, "num_retries must be at least 0, got -1"),
        ({"num_workers": 3}, "num_lanes must be a multiple of num_workers, got 4 and 3.*set num_lanes to 6"),
        ({"num_val": 40}, "num_val must be at least 1 and less than the 40 images, got 40"),
    ],
)
def test_arguments_out_of_range_are_refused(packed, options, said):
    with pytest.raises(ValueError, match=said):
        stream(packed, **options)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"shards": 3}',
        '{"smallest": [1, 2], "shards": [{"file": "/etc/passwd"}]}',
        '{"smallest": [1, 2], "shards": [{"num_images": 1, "sha256": ""}], "class_names": ["cat"], "bits": 8}',
        '{"smallest": [1, 2], "shards": [], "class_names": null, "bits": 8}',
        *(
            '{"smallest": [1, 2], "class_names": null, "bits": 8, "shards": [{"num_images": 1, "sha256": "", '
            f'"entries": {{"age": [1]}}}}, {{"num_images": 1, "sha256": "", "entries": {entries}}}]}}'
            for entries in ("{}", '{"age": [1, 2]}', '{"age": ["x"]}', '{"age": [null]}', '{"age": [[1]]}', "3")
        ),
        *(
            '{"smallest": [1, 2], "class_names": null, "bits": 8, "shards": [{"num_images": 1, "sha256": "", '
            f'"crops": {crops}}}]}}'
            for crops in ("[]", "[3]", "[[[1, 2], [0, 0, 1]]]", '[[["x", 2], [0, 0, 1, 2]]]')
        ),
    ],
)
def test_damaged_index_is_refused(packed, content):
    (packed / "index.json").write_text(content)
    with pytest.raises(ValueError, match="is no index of shards"):
        stream(packed)


# ---------------------------------------------------------------------------------------------------- where they lie


def test_batches_come_over_http_as_from_the_disk(packed):
    expected = epoch_of(stream(packed, class_labels=True))
    with FaultyServer(packed) as server:
        for num_workers in (0, 2):
            read = epoch_of(stream(server.address, class_labels=True, num_workers=num_workers))
            torch.testing.assert_close(read, expected, rtol=0, atol=0)


def test_batches_come_from_s3_as_from_the_disk(packed, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    expected = epoch_of(stream(packed))
    shutil.copytree(packed, tmp_path / "buckets/bucket/shards")
    with FaultyServer(tmp_path / "buckets") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        read = epoch_of(stream("s3://bucket/shards", num_workers=2))
        torch.testing.assert_close(read, expected, rtol=0, atol=0)
        with pytest.raises(FileNotFoundError, match=r"there is no index\.json"):
            stream("s3://bucket/shards/elsewhere")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(fsspec_implementations, "s3", raising=False)  # of those that have been imported
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'unet-diffusion\[stream\]'"):
        ShardStore("s3://bucket/shards")


@pytest.mark.parametrize("root", ["nope://shards", "reference://x", "reference::/a/b", "http://a/b::reference://c"])
def test_addresses_but_of_plain_stores_are_refused(root):
    with pytest.raises(ValueError, match=r"address that begins with one of file, http, .* and holds no ::, got"):
        stream(root)


def test_server_that_is_not_there_is_one_message(packed):
    with pytest.raises(ShardError, match=r"http://127.0.0.1:9/shards/index.json cannot be read"):
        stream("http://127.0.0.1:9/shards")


def test_each_shard_is_read_once_an_epoch_but_for_cuts(packed):
    with FaultyServer(packed) as server:
        data = stream(server.address, num_lanes=2, window=1, num_workers=2)
        epoch_of(data)
        reads = [name for name in server.asked if name.startswith("shard")]
        assert len(reads) <= 6 + 1


# --------------------------------------------------------------------------------------------------------------- faults


def cut(path):
    path.write_bytes(path.read_bytes()[:-600])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


DAMAGES = {"checksum": flip_a_bit, "bytes do not have": cut, "it is not there": os.unlink}


@pytest.mark.parametrize("said", DAMAGES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_shard_is_an_error_of_one_line(packed, said, num_workers):
    DAMAGES[said](packed / "shard_00003.tar")
    with pytest.raises(ShardError, match=rf"^[^\n]*/shard_00003.tar cannot be read: [^\n]*{said}[^\n]*$"):
        epoch_of(stream(packed, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_shard_to_validate_on_is_an_error_of_one_line(packed, num_workers):
    flip_a_bit(packed / "shard_00000.tar")
    with pytest.raises(ShardError, match=r"^[^\n]*/shard_00000.tar cannot be read: [^\n]*$"):
        batches_of(stream(packed, num_workers=num_workers).val_dataloader())


def test_shard_with_fewer_images_than_the_index_has_is_an_error(packed):
    index = json.loads((packed / "index.json").read_text())
    crops = [[[12, 10], [0, 0, 12, 10]]] * 8
    index["shards"][3] |= {"num_images": 8, "entries": {"labels": [0] * 8, "captions": [""] * 8}, "crops": crops}
    (packed / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match=r"shard_00003.tar cannot be read: it holds 7 images, not 8 as index.json has"):
        epoch_of(stream(packed))


@pytest.mark.parametrize("said", DAMAGES)
def test_bad_shard_is_replaced_told_and_counted(packed, said):
    whole = epoch_of(stream(packed, class_labels=True))
    images = stream(packed, class_labels=True).image_set.images.index_select(0, torch.arange(40))
    DAMAGES[said](packed / "shard_00003.tar")
    data = stream(packed, class_labels=True, on_bad_shard="skip")
    with pytest.warns(UserWarning, match=rf"shard_00003.tar cannot be read: .*{said}.* take the place") as told:
        batches = epoch_of(data)
    assert len([one for one in told if "shard_00003" in str(one.message)]) == 1
    assert len(batches) == len(whole)
    for batch, before in zip(batches, whole, strict=True):
        bad = (before["index"] >= 21) & (before["index"] < 28)
        assert torch.equal(batch["index"][~bad], before["index"][~bad])
        assert ((batch["index"][bad] >= 28) & (batch["index"][bad] < 35)).all()  # the next shard
        assert torch.equal(batch["images"], images[batch["index"]])
    num_bad = sum(int(((before["index"] >= 21) & (before["index"] < 28)).sum()) for before in whole)
    assert data.source.num_replaced == num_bad > 0
    with pytest.warns(UserWarning, match="shard_00003"):
        again = epoch_of(stream(packed, class_labels=True, on_bad_shard="skip"))
    torch.testing.assert_close(again, batches, rtol=0, atol=0)


def test_no_image_to_validate_on_takes_a_place_or_is_replaced(packed):
    (packed / "shard_00005.tar").unlink()
    data = stream(packed, on_bad_shard="skip", num_val=9)
    with pytest.warns(UserWarning, match="shard_00005"):
        indices = torch.cat([batch["index"] for batch in epoch_of(data)])
    assert indices.min() >= 9
    (packed / "shard_00000.tar").unlink()
    with pytest.raises(ShardError, match="shard_00000"):
        list(stream(packed, on_bad_shard="skip", num_val=9).val_dataloader())


def test_store_that_is_gone_is_an_error_even_so(packed, monkeypatch):
    monkeypatch.setattr(shards, "MAX_BAD_SHARDS", 3)
    data = stream(packed, on_bad_shard="skip")
    for path in packed.glob("*.tar"):
        path.unlink()
    with (
        pytest.warns(UserWarning, match="take the place"),
        pytest.raises(ShardError, match=r"3 shards of .* in a row cannot be read, too many to leave out"),
    ):
        epoch_of(data)


def test_bad_neighbours_are_tried_once_ahead_and_once_in_use_an_epoch(packed):
    with FaultyServer(packed) as server:
        data = stream(server.address, on_bad_shard="skip", window=1, num_lanes=1)
        server.faults = {f"shard_{number:05d}.tar": ["refuse"] * 1000 for number in (1, 2, 3)}
        for epoch in (0, 1):
            server.asked.clear()
            before = data.source.num_replaced
            with warnings.catch_warnings(action="ignore"):
                epoch_of(data, epoch)
            assert data.source.num_replaced > before
            asked = [server.asked.count(name) for name in server.faults]
            assert all(1 <= number <= 2 for number in asked), asked  # 21 images of them in batches of 4


def test_shard_that_could_not_be_read_ahead_is_tried_again_when_it_is_needed(packed):
    with FaultyServer(packed) as server:
        images = stream(server.address).image_set.images
        server.faults = {"shard_00003.tar": ["refuse"], "shard_00004.tar": ["refuse"] * 2}
        images.read_ahead([3, 4])
        deadline = time.monotonic() + 60
        while len(server.asked) < 3:  # the index, too
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(images.read(3)) == 7
        with pytest.raises(ShardError, match="shard_00004"):
            images.read(4)
        assert len(images.read(4)) == 7


def test_shard_is_tried_again_if_reading_ahead_fails_while_it_is_waited_for(packed):
    with FaultyServer(packed) as server:
        images = stream(server.address, num_retries=1).image_set.images
        server.faults = {"shard_00003.tar": ["refuse"] * 2}  # half a second apart
        images.read_ahead([3])
        assert len(images.read(3)) == 7


SLOW_FAULTS = [pytest.param(fault, marks=pytest.mark.slow) for fault in ("truncate", "corrupt")]


@pytest.mark.parametrize("fault", ["refuse", "hang_up", *SLOW_FAULTS])
def test_faults_that_pass_leave_no_trace(packed, monkeypatch, fault):
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.01)
    expected = epoch_of(stream(packed))
    with FaultyServer(packed) as server:
        data = stream(server.address, num_workers=2, num_retries=2)
        server.faults = {f"shard_{number:05d}.tar": [fault, fault] for number in range(6)}
        torch.testing.assert_close(epoch_of(data), expected, rtol=0, atol=0)
        assert not any(server.faults.values())


def test_server_that_sends_a_byte_now_and_then_is_asked_again_and_then_given_up(packed, monkeypatch):
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(stores, "WHOLE", 0.5)  # seconds
    with FaultyServer(packed) as server:
        server.faults = {"index.json": ["trickle"], "shard_00000.tar": ["trickle"] * 3}
        store = ShardStore(server.address, num_retries=1)
        index = store.index()
        assert server.asked == ["index.json"] * 2
        with pytest.raises(ShardError, match=r"shard_00000\.tar cannot be read: "):
            store.images_of(0, index.shards[0])


def test_retries_wait_longer_each_time(packed, monkeypatch):
    waits = []
    monkeypatch.setattr(stores.time, "sleep", waits.append)
    (packed / "shard_00001.tar").unlink()
    store = ShardStore(packed, num_retries=3)
    with pytest.raises(ShardError):
        store.images_of(1, store.index().shards[1])
    assert waits == [0.5, 1.0, 2.0]


def test_shard_whose_members_are_no_images_runs_nothing(packed, code, tmp_path):
    content = pickle.dumps(code(tmp_path / "ran"))
    with tarfile.open(packed / "shard_00002.tar", "w") as archive:
        for number in range(7):
            member = tarfile.TarInfo(f"../../{number}.pkl")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    index = json.loads((packed / "index.json").read_text())
    index["shards"][2]["sha256"] = hashlib.sha256((packed / "shard_00002.tar").read_bytes()).hexdigest()
    (packed / "index.json").write_text(json.dumps(index))
    with pytest.raises(Exception, match="a file must be a whole image of one of"):
        epoch_of(stream(packed))
    assert not (tmp_path / "ran").exists()


def test_folder_can_be_moved(packed, tmp_path):
    expected = epoch_of(stream(packed))
    shutil.move(packed, tmp_path / "moved")
    torch.testing.assert_close(epoch_of(stream(tmp_path / "moved")), expected, rtol=0, atol=0)
