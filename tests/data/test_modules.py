import os
import shutil
import zipfile
from itertools import chain

import numpy as np
import pytest
import torch
import yaml
from encoded import encode, encode_16_bit_png, image_data, random_pixels, write_images
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from unet_diffusion.data import (
    Digits,
    Folder,
    ImageDataModule,
    ShuffledBatches,
    Source,
    Torchvision,
    scale_to_unit_range,
    split_by_name,
    split_indices,
)

# Lightning's advice to raise num_workers; small sets in memory need none.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


class Recorder(LightningModule):
    """Keeps the batches it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches = []
        self.val_indices = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * batch["images"].mean()

    def validation_step(self, batch, batch_idx):
        self.val_indices += batch["index"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @property
    def indices(self):
        return [batch["index"].tolist() for batch in self.batches]


def fit(data_module, tmp_path, *, ckpt_path=None, **options):
    recorder = Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        **({"enable_checkpointing": False} | quiet | options),
    )
    trainer.fit(recorder, datamodule=data_module, ckpt_path=ckpt_path)
    return recorder


def folder_module(root, **options):
    return image_data(Folder, root, **{"image_size": 8, "batch_size": 4, "num_workers": 0} | options)


def set_up(data_module):
    data_module.setup("fit")
    return data_module


def batches_of(loader):
    return [{key: value.clone() for key, value in batch.items()} for batch in loader]


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_trainer_gets_float_images_in_unit_range(tmp_path):
    recorder = fit(ImageDataModule(Digits(), batch_size=16), tmp_path, max_steps=2)
    assert len(recorder.batches) == 2
    for batch in recorder.batches:
        assert batch["images"].shape == (16, 1, 8, 8)
        assert batch["images"].dtype == torch.float32
        assert batch["images"].min() == -1
        assert batch["images"].max() == 1
        assert batch["labels"].dtype == batch["index"].dtype == torch.int64


def test_trainer_shuffles_anew_every_epoch(tmp_path):
    recorder = fit(folder_module(write_images(tmp_path / "set", 14), num_val=2), tmp_path, max_epochs=2)
    first, second = recorder.indices[:3], recorder.indices[3:]
    assert sorted(chain(*first)) == sorted(chain(*second))
    assert first != second


def test_trainer_validates_on_every_kept_apart_image_once(tmp_path):
    data_module = folder_module(write_images(tmp_path / "set", 17), num_val=7)
    recorder = fit(data_module, tmp_path, max_epochs=1)
    assert recorder.val_indices == data_module.val_indices.tolist()


class IndexWriter(Recorder):
    """Writes what each process was given to a file: forked processes share no memory."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self):
        torch.save((self.indices, self.val_indices), self.folder / f"{self.global_rank}.pt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, to be quick")
def test_two_processes_share_an_epoch(tmp_path):
    data_module = folder_module(write_images(tmp_path / "set", 21), num_val=5)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, default_root_dir=tmp_path,
        num_sanity_val_steps=0, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(IndexWriter(tmp_path), datamodule=data_module)
    (train_0, val_0), (train_1, val_1) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    data_module.setup("fit")
    alone = ShuffledBatches(data_module.train_indices, 8, num_images=21)
    assert [a + b for a, b in zip(train_0, train_1, strict=True)] == list(alone)
    assert sorted(val_0 + val_1) == data_module.val_indices.tolist()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 6])
def test_resumed_run_sees_what_the_uninterrupted_one_would_have(tmp_path, num_steps):
    root = write_images(tmp_path / "set", 14)

    def data_module():
        return folder_module(root, num_val=2, horizontal_flip=True)

    whole = fit(data_module(), tmp_path, max_steps=9, max_epochs=-1).batches
    saving = [ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=1)]
    fit(data_module(), tmp_path, max_steps=num_steps, max_epochs=-1, callbacks=saving, enable_checkpointing=True)
    resumed = fit(
        data_module(), tmp_path, max_steps=9, max_epochs=-1, ckpt_path=tmp_path / "saved" / "last.ckpt"
    ).batches
    assert_same_batches(resumed, whole[num_steps:])


def test_position_can_be_saved_before_the_first_batch():
    state = set_up(ImageDataModule(Digits())).train_dataloader().state_dict()
    assert (state["epoch"], state["num_batches"], state["is_over"]) == (0, 0, False)


def test_trainer_that_overfits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="overfit_batches must be 0"):
        fit(ImageDataModule(Digits()), tmp_path, overfit_batches=1, max_steps=1)


@pytest.mark.parametrize("in_memory", [True, False])
def test_workers_give_the_batches_of_none(tmp_path, in_memory):
    root = write_images(tmp_path / "set", 13, 12, 10)
    archive = shutil.make_archive(str(tmp_path / "set"), "zip", root)
    options = {"num_val": 3, "horizontal_flip": True, "in_memory": in_memory}
    alone = set_up(folder_module(archive, **options)).train_dataloader()
    workers = set_up(folder_module(archive, **options, num_workers=2)).train_dataloader()
    for epoch in (0, 1):
        alone.sampler.set_epoch(epoch)
        workers.sampler.set_epoch(epoch)
        assert_same_batches(batches_of(workers), batches_of(alone))


def test_streamed_batches_equal_those_from_memory(tmp_path):
    root = write_images(tmp_path, 9, 12, 10)
    loaders = [
        set_up(folder_module(root, horizontal_flip=True, in_memory=in_memory)).train_dataloader()
        for in_memory in (True, False)
    ]
    assert_same_batches(*map(batches_of, loaders))


def test_split_is_a_function_of_the_numbers_and_disjoint():
    train, val = split_indices(50, 10)
    torch.manual_seed(3)
    again = split_indices(50, 10)
    assert torch.equal(train, again[0])
    assert torch.equal(val, again[1])
    assert sorted(train.tolist() + val.tolist()) == list(range(50))
    assert set(val.tolist()) <= set(split_indices(50, 20)[1].tolist())


def test_split_does_not_depend_on_the_seed():
    first, second = (set_up(ImageDataModule(Digits(), seed=seed)) for seed in (0, 1))
    assert torch.equal(first.val_indices, second.val_indices)


@pytest.mark.parametrize(("num_images", "num_val"), [(2, 1), (15, 1), (100, 10), (60_000, 1000)])
def test_a_tenth_at_most_1000_is_kept_apart_by_default(num_images, num_val):
    assert len(split_indices(num_images)[1]) == num_val


@pytest.mark.parametrize("num_val", [0, 5, 6, -1])
def test_impossible_split_is_refused(num_val):
    for split in (lambda: split_indices(5, num_val), lambda: split_by_name(list("abcde"), num_val)):
        with pytest.raises(ValueError, match=f"less than the 5 images, got {num_val}"):
            split()


def sides(names, num_val=None) -> tuple[set[str], set[str]]:
    """The names that are trained on, and those that are validated on."""
    train, val = split_by_name(names, num_val)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(names)))
    return {names[i] for i in train.tolist()}, {names[i] for i in val.tolist()}


@pytest.mark.parametrize("num_val", [None, 1, 7])
def test_files_that_are_added_move_none_that_was_trained_on(num_val):
    rng = np.random.default_rng(0)
    names = [f"{folder}/{number:04}.png" for folder in ("cat", "dog") for number in range(700)]
    for size in (20, 40, 200, 1000):
        before = sides(sorted(rng.permutation(names)[:size].tolist()), num_val)
        more = sorted({*before[0], *before[1], *rng.permutation(names)[: size // 2].tolist()})
        _, val = sides(more, num_val)
        assert not before[0] & val
        assert num_val or before[1] <= val  # by default nobody moves at all


def test_about_a_tenth_at_most_1000_is_kept_apart_by_name():
    names = [str(number) for number in range(60_000)]
    assert len(sides(names)[1]) == 1000
    for size in (500, 5000):
        deviation = (size * 0.1 * 0.9) ** 0.5  # of a binomial distribution
        assert abs(len(sides(names[:size])[1]) - size / 10) < 4 * deviation
    assert [len(sides(names[:size])[1]) for size in (2, 3)] == [1, 1]


def test_num_val_is_kept_exactly_and_more_keep_those_of_fewer():
    names = [f"{number}.jpg" for number in range(100)]
    few, more = (sides(names, num_val)[1] for num_val in (20, 50))
    assert (len(few), len(more)) == (20, 50)
    assert few < more


def test_split_is_by_name_whatever_the_place_the_seed_and_the_spelling(tmp_path):
    root = write_images(tmp_path / "set", 30)
    (root / "000.png").rename(root / "caf\u00e9.png")
    shutil.make_archive(str(tmp_path / "packed"), "zip", root)
    (root / "caf\u00e9.png").rename(root / "cafe\u0301.png")  # as macOS has it
    kept = []
    for place, seed in ((root, 0), (tmp_path / "packed.zip", 1)):
        data = set_up(folder_module(place, num_val=15, seed=seed))
        names = [data.image_set.names[i].replace("e\u0301", "\u00e9") for i in data.val_indices.tolist()]
        kept.append(sorted(names))
    assert kept[0] == kept[1]


def test_validation_is_never_mirrored(tmp_path):
    root = write_images(tmp_path, 12)
    data_module = set_up(folder_module(root, num_val=8, horizontal_flip=True))
    batch = next(iter(data_module.val_dataloader()))
    for index, image in zip(batch["index"], batch["images"], strict=True):
        with Image.open(root / data_module.image_set.names[index]) as expected:
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_second_setup_loads_nothing(tmp_path):
    data_module = set_up(folder_module(write_images(tmp_path / "set", 4)))
    image_set = data_module.image_set
    shutil.rmtree(tmp_path / "set")
    data_module.setup("validate")
    assert data_module.image_set is image_set


@pytest.mark.parametrize(("dtype", "white"), [(torch.uint8, 255), (torch.uint16, 65535)])
def test_scaling_takes_black_to_minus_one_and_white_to_one(dtype, white):
    scaled = scale_to_unit_range(torch.tensor([0, white // 3, white], dtype=dtype))
    # White is divisible by three; one rounding of float32 near a third.
    torch.testing.assert_close(scaled, torch.tensor([-1, -1 / 3, 1.0]), rtol=0, atol=1e-7)


def test_images_are_not_scaled_twice():
    with pytest.raises(ValueError, match=r"got torch\.float32; scale them only once"):
        scale_to_unit_range(torch.zeros(1))


def test_classes_are_those_of_torchvisions_image_folder(tmp_path):
    for name, num_images in (("cat", 3), ("bird", 2), ("ant", 4)):
        write_images(tmp_path / name / "deeper", num_images)
    data_module = set_up(folder_module(tmp_path, class_labels=True))
    reference = datasets.ImageFolder(tmp_path)
    assert data_module.class_names == reference.classes
    assert data_module.num_classes == 3
    assert [str(tmp_path / name) for name in data_module.image_set.names] == [path for path, _ in reference.samples]
    assert data_module.entries["labels"].tolist() == reference.targets


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    names = [*map(str, range(12)), "010", "a2", "a10", "a10b"]
    for name in names:
        write_images(tmp_path / name, 1)
    data_module = set_up(folder_module(tmp_path, class_labels=True))
    assert data_module.class_names == [*map(str, range(10)), "010", "10", "11", "a2", "a10", "a10b"]
    folders = [name.split("/")[0] for name in data_module.image_set.names]
    assert [data_module.class_names[label] for label in data_module.entries["labels"]] == folders


def test_folder_without_classes_has_no_labels(tmp_path):
    data_module = set_up(folder_module(write_images(tmp_path, 5)))
    assert data_module.num_classes is data_module.class_names is None
    assert next(iter(data_module.train_dataloader())).keys() == {"images", "index", "is_mirrored"}


def test_image_lying_beside_the_class_folders_is_named(tmp_path):
    write_images(tmp_path / "cat", 2)
    (tmp_path / "stray.png").write_bytes(encode(random_pixels(8, 8, 3)))
    with pytest.raises(ValueError, match=r"1 lie directly in .*: stray\.png; move them"):
        folder_module(tmp_path, class_labels=True).setup("fit")


def test_root_one_level_too_high_is_told_from_the_only_class(tmp_path):
    write_images(tmp_path / "train" / "cat", 2)
    with pytest.raises(ValueError, match=r"found 'train' only; is the root .*/train\?"):
        folder_module(tmp_path, class_labels=True).setup("fit")


@pytest.fixture
def folder_with_bad_files(tmp_path):
    root = write_images(tmp_path / "set", 6, 16, 16)
    jpeg = encode(random_pixels(64, 64, 3), "JPEG")
    (root / "a_cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (root / "b_text.png").write_text("no image")
    (root / "c_small.png").write_bytes(encode(random_pixels(4, 16, 3)))
    png = encode_16_bit_png(random_pixels(16, 16, 3, np.uint16))
    (root / "d_cut.png").write_bytes(png[: len(png) // 2])
    (root / "e_empty.png").write_bytes(b"")
    (root / "f_small.png").write_bytes(encode(random_pixels(16, 4, 3)))
    return root


@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_files_are_listed_with_reason_count_and_fix(folder_with_bad_files, in_memory):
    with pytest.raises(ValueError, match="6 of 12 image files cannot be used") as raised:
        folder_module(folder_with_bad_files, in_memory=in_memory).setup("fit")
    message = str(raised.value)
    assert "a_cut.jpg: image file is truncated" in message
    assert "b_text.png: a file must be a whole image of one of" in message
    assert "c_small.png: too small: 4x16, must be at least 8x8" in message
    assert "d_cut.png: " in message
    assert "... and 1 more" in message
    assert 'set on_bad_file to "skip"' in message


@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_files_are_skipped_with_one_warning(folder_with_bad_files, in_memory):
    data_module = folder_module(folder_with_bad_files, on_bad_file="skip", in_memory=in_memory, num_val=2)
    with pytest.warns(UserWarning, match=r"6 of 12 image files cannot be used:\n  a_cut\.jpg") as warned:
        data_module.setup("fit")
    assert len([w for w in warned if "cannot be used" in str(w.message)]) == 1
    assert data_module.image_set.names == [f"{i:03}.png" for i in range(6)]
    assert len(next(iter(data_module.train_dataloader()))["images"]) == 4


# ------------------------------------------------------------------------------------------------------------ summary


def area_left(height, width, wanted_height, wanted_width) -> float:
    """The share of an image that the largest part of the wanted aspect covers."""
    ratio = (width / height) / (wanted_width / wanted_height)
    return min(ratio, 1 / ratio)


@pytest.mark.parametrize("in_memory", [True, False])
def test_summary_counts_what_is_found_left_out_and_changed(tmp_path, in_memory):
    sizes = [(8, 8), (8, 8), (16, 16), (8, 20), (40, 16)]
    for number, (height, width) in enumerate(sizes):
        path = tmp_path / ("cat" if number < 2 else "dog") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(random_pixels(height, width, 3)))
    rows = [f"{path.relative_to(tmp_path)},an animal" for path in sorted(tmp_path.rglob("*.png"))[1:]]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", "cat/0.png,", *rows, "gone.png,x"]))
    (tmp_path / "cat" / "x.heic").write_bytes(b"heic")
    (tmp_path / "cat" / "bad.png").write_bytes(b"no image")
    (tmp_path / "cat" / "bad.txt").write_text("a caption")
    data_module = folder_module(
        tmp_path, class_labels=True, captions=True, on_bad_file="skip", in_memory=in_memory, num_val=2
    )
    with pytest.warns(UserWarning, match="1 of 6 image files cannot be used"):
        data_module.setup("fit")
    lost = 100 * (1 - min(area_left(*size, 8, 8) for size in sizes))
    scale = max(min(height, width) / 8 for height, width in sizes)
    assert data_module.summary() == [
        f"found: 5 images of 3x8x8 (uint8) in {tmp_path}; 2 classes of 2 to 3; captions, 2 of them different, 1 empty",
        "left out: 1 .heic; 1 images that cannot be used; 1 captions of images that are not there "
        "(metadata.csv line 7: gone.png)",
        f"changed: 2 images scaled down, up to {scale:.3g} times, 2 cropped to their centre, which cuts off up to "
        f"{lost:.0f} %",
        "split: 3 to train on, 2 to validate on",
    ]


def test_summary_of_images_that_come_as_they_are_says_so(tmp_path):
    data_module = set_up(folder_module(write_images(tmp_path, 4)))
    assert data_module.summary()[1:3] == ["left out: nothing", "changed: nothing"]


def test_summary_of_the_digits_counts_its_classes():
    counts = np.bincount(load_digits().target)
    assert set_up(ImageDataModule(Digits(), num_val=97)).summary() == [
        f"found: 1797 images of 1x8x8 (uint8); 10 classes of {min(counts)} to {max(counts)}",
        "split: 1700 to train on, 97 to validate on",
    ]


def test_nothing_is_left_to_skip_to(tmp_path):
    with pytest.raises(ValueError, match="3 of 3 image files cannot be used"):
        folder_module(write_images(tmp_path, 3), image_size=9, on_bad_file="skip").setup("fit")


def test_single_image_is_too_few(tmp_path):
    with pytest.raises(ValueError, match="at least 2 images, to train and to validate on, got 1"):
        folder_module(write_images(tmp_path, 1)).setup("fit")


def test_images_asked_for_before_setup_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r'call setup\("fit"\) first'):
        _ = folder_module(tmp_path).class_names


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"num_workers": -1}, {"on_bad_file": "ignore"}, {"channels": 0}, {"image_size": 0}]
)
def test_argument_out_of_range_is_named(options):
    with pytest.raises(ValueError, match=f"got .?{next(iter(options.values()))}"):
        image_data(Folder, "anywhere", **options)


def test_base_class_says_what_to_define():
    with pytest.raises(NotImplementedError, match="Source must define __len__ and __getitem__, or load"):
        ImageDataModule(Source()).setup("fit")


def test_digits_span_all_levels():
    data_module = set_up(ImageDataModule(Digits()))
    images = data_module.image_set.images
    assert data_module.image_shape == (1, 8, 8)
    assert data_module.class_names == list("0123456789")
    np.testing.assert_allclose(images[:, 0].numpy() / 255 * 16, load_digits().images, atol=0.04)  # half of 16 / 255
    assert data_module.entries["labels"].tolist() == load_digits().target.tolist()


def test_missing_torchvision_set_says_where_it_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be in .*FashionMNIST/raw.*set download to true"):
        ImageDataModule(Torchvision("FashionMNIST", tmp_path)).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"must be in .*cifar-10-batches-py"):
        ImageDataModule(Torchvision("CIFAR10", tmp_path)).setup("fit")


def test_unknown_torchvision_set_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"one of MNIST, FashionMNIST, .*got 'ImageNet'"):
        ImageDataModule(Torchvision("ImageNet", tmp_path))


def test_cifar_is_laid_out_channels_first(tmp_path, monkeypatch):
    pixels = np.stack([random_pixels(32, 32, 3, seed=i) for i in range(4)])

    class FakeCifar:
        data, targets, classes = pixels, [0, 1, 1, 0], ["airplane", "automobile"]

        def __init__(self, root, train):
            assert train

    monkeypatch.setattr(datasets, "CIFAR10", FakeCifar)
    data_module = set_up(ImageDataModule(Torchvision("CIFAR10", tmp_path)))
    assert data_module.image_shape == (3, 32, 32)
    np.testing.assert_array_equal(data_module.image_set.images[2].permute(1, 2, 0).numpy(), pixels[2])


@pytest.mark.parametrize(
    ("class_name", "arguments"),
    [
        ("Folder", {"root": "images", "image_size": [32, 48], "on_bad_file": "skip", "in_memory": False}),
        ("Folder", {"root": "images.zip/train", "image_size": 32, "channels": 1}),
        ("Torchvision", {"dataset": "CIFAR10", "root": "data", "download": True}),
        ("Digits", {}),
    ],
)
def test_module_is_built_from_yaml(class_name, arguments):
    parser = ArgumentParser()
    parser.add_subclass_arguments(ImageDataModule, "data")
    source = {"class_path": f"unet_diffusion.data.{class_name}", "init_args": arguments}
    data = {"class_path": "unet_diffusion.data.ImageDataModule", "init_args": {"source": source, "batch_size": 32}}
    data_module = parser.instantiate(parser.parse_string(yaml.safe_dump({"data": data}))).data
    assert (type(data_module.source).__name__, data_module.batch_size) == (class_name, 32)
    if arguments.get("image_size") == [32, 48]:
        assert data_module.image_shape == (3, 32, 48)


def test_fashion_mnist_is_read_from_disk(shared_data):
    root = shared_data("FashionMNIST").parent
    data_module = set_up(ImageDataModule(Torchvision("FashionMNIST", root), batch_size=128))
    assert data_module.image_shape == (1, 28, 28)
    assert data_module.class_names[9] == "Ankle boot"
    assert len(data_module.train_indices) == 59_000
    batch = next(iter(data_module.train_dataloader()))
    image, label = datasets.FashionMNIST(root)[int(batch["index"][0])]
    np.testing.assert_array_equal(batch["images"][0, 0].numpy(), np.asarray(image))
    assert batch["labels"][0] == label


def test_real_archive_is_read_without_its_captions(shared_data, tmp_path):
    with zipfile.ZipFile(shared_data("emoji128.zip")) as archive, zipfile.ZipFile(tmp_path / "few.zip", "w") as few:
        for name in archive.namelist()[:20] + [name for name in archive.namelist() if name.endswith(".csv")]:
            few.writestr(name, archive.read(name))
    data_module = set_up(folder_module(tmp_path / "few.zip", image_size=64, channels=4))
    assert data_module.image_set.images.shape == (20, 4, 64, 64)
    corners = data_module.image_set.images[:, 3, 0, 0]
    assert (corners == 0).any()  # transparent


def test_name_that_is_no_text_is_split_and_known_like_others(tmp_path):
    write_images(tmp_path / "images", 6)
    os.rename(tmp_path / "images" / "000.png", os.fsencode(tmp_path / "images") + b"/caf\xe9.png")
    module = ImageDataModule(Folder(tmp_path / "images", image_size=8))
    module.setup("fit")
    assert len(module.train_indices) + len(module.val_indices) == 6
    assert len(module.state_dict()["names"]) == 6
