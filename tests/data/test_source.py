"""Sources of one's own: small classes, whose mistakes are named by item and rule."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from denoisers import Vectors
from PIL import Image

from unet_diffusion.data import ImageDataModule, LabelledSource, SegmentationDataModule, Source, source
from unet_diffusion.segmentation.labels import Targets

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")

PIXELS = np.random.default_rng(0).integers(256, size=(10, 6, 8, 3), dtype=np.uint8)


class Mine(Source):
    """Items that a test makes."""

    def __init__(self, make=lambda index: {"image": PIXELS[index]}, num=10, class_names=None):
        self.make, self.num, self.class_names = make, num, class_names

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return self.make(index)


def loaded(make, **options) -> ImageDataModule:
    data = ImageDataModule(Mine(make, **options), num_val=3, batch_size=4)
    data.setup()
    return data


def known(**values):
    return lambda index: {"image": PIXELS[index], **values}


FORMS = {
    "PIL": Image.fromarray,
    "PIL RGBA of opaque pixels, as its own format": lambda pixels: Image.fromarray(pixels).convert("RGB"),
    "(H, W, C)": lambda pixels: pixels,
    "(C, H, W)": lambda pixels: pixels.transpose(2, 0, 1),
    "tensor (C, H, W)": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
    "tensor (H, W, C)": torch.from_numpy,
}


@pytest.mark.parametrize("form", FORMS)
def test_images_of_every_form_come_out_the_same(form):
    images = loaded(lambda index: {"image": FORMS[form](PIXELS[index])}).image_set.images
    assert images.dtype == torch.uint8
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), PIXELS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_are_scaled_as_the_bytes_that_they_were(dtype):
    """Floats keep 16 bits, of which 257 stand for one of 8; scaling rounds float32 near one."""
    floats = loaded(lambda index: {"image": PIXELS[index].astype(dtype) / 255})
    batch = next(iter(floats.val_dataloader()))
    expected = torch.from_numpy(PIXELS[batch["index"].numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(floats.on_after_batch_transfer(batch, 0)["images"], expected, rtol=0, atol=2e-7)


def test_grey_images_have_one_channel_and_16_bits_are_kept():
    deep = np.random.default_rng(0).integers(65536, size=(10, 6, 8), dtype=np.uint16)
    assert loaded(lambda index: {"image": PIXELS[index, ..., 0]}).image_shape == (1, 6, 8)
    big_endian = loaded(lambda index: {"image": deep[index].astype(">u2")}).image_set.images
    assert big_endian.dtype == torch.uint16
    np.testing.assert_array_equal(big_endian[:, 0].numpy(), deep)
    mixed = loaded(lambda index: {"image": deep[index] if index == 9 else PIXELS[index, ..., 0]}).image_set.images
    np.testing.assert_array_equal(mixed[0, 0].numpy(), PIXELS[0, ..., 0].astype(np.uint16) * 257)


def test_between_channels_first_and_last_arrays_are_taken_as_arrays_are_and_tensors_as_tensors():
    cube = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    assert loaded(lambda index: {"image": cube}).image_shape == (3, 3, 4)
    assert loaded(lambda index: {"image": torch.from_numpy(cube)}).image_shape == (3, 4, 3)


def test_labels_captions_and_names_reach_the_data_module():
    def make(index):
        return {"image": PIXELS[index], "label": index % 2, "caption": f"a {index}", "name": f"{index}.png"}

    data = loaded(make, class_names=["cat", "dog"])
    assert (data.class_names, data.num_classes) == (["cat", "dog"], 2)
    assert data.entries["captions"] == [f"a {index}" for index in range(10)]
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].tolist() == [index % 2 for index in batch["index"].tolist()]
    assert data.image_set.names == [f"{index}.png" for index in range(10)]
    assert loaded(lambda index: {"image": PIXELS[index], "label": np.int64(index % 3)}).class_names == ["0", "1", "2"]


def test_what_else_an_item_holds_is_an_entry_of_the_batch_or_a_text_of_the_data(monkeypatch):
    boxes = torch.rand(10, 3, 4, dtype=torch.float64)
    values = {
        "age": lambda index: 20 + index,
        "weight": lambda index: 0.5 * index,
        "is_old": lambda index: index > 5,
        "vector": lambda index: np.arange(index, index + 3, dtype=">u2"),
        "boxes": lambda index: boxes[index],
        "pair": lambda index: [index, -index],
        "place": lambda index: f"place {index}",
    }

    def make(index):
        return {"image": PIXELS[index], "label": index % 2, **{key: value(index) for key, value in values.items()}}

    data = loaded(make)
    dtypes = {"labels": torch.int64, "age": torch.int64, "weight": torch.float32, "is_old": torch.bool}
    dtypes |= {"vector": torch.uint16, "boxes": torch.float32, "pair": torch.int64}
    assert list(data.entries) == [*dtypes, "place"]
    assert data.entries["place"] == [f"place {index}" for index in range(10)]
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        assert batch.keys() == {"images", "index", "is_mirrored", *dtypes}
        for key, dtype in dtypes.items():
            rows = [index % 2 if key == "labels" else values[key](index) for index in batch["index"].tolist()]
            expected = torch.from_numpy(np.stack([np.asarray(row) for row in rows]).astype(np.float64))
            assert batch[key].dtype == dtype
            torch.testing.assert_close(batch[key].double(), expected, rtol=1e-7, atol=0)  # float32 of float64
        assert data.on_after_batch_transfer(batch, 0).keys() == batch.keys()
    assert "classes of 5 to 5; age from 20 to 29; weight from 0 to 4.5; is_old from 0 to 1" in data.summary()[0]
    assert data.summary()[0].endswith("pair from -9 to 9; place, 10 of them different")


def test_mirrored_images_keep_what_is_known_of_them():
    data = ImageDataModule(Mine(known(age=3)), num_val=3, batch_size=7, horizontal_flip=True)
    data.setup()
    assert [batch["age"].tolist() for batch in data.train_dataloader()] == [[3] * 7]


@pytest.mark.parametrize("key", ["age", "vector", "place"])
def test_image_of_which_something_else_is_known_now_has_other_contents(key):
    def contents(changed):
        values = {"age": 30, "vector": np.zeros(3), "place": "Graz"}
        others = {"age": 31, "vector": np.eye(3)[0], "place": "Linz"}
        return loaded(at(4, known(**(values | ({key: others[key]} if changed else {}))), known(**values))).state_dict()

    before, now = contents(changed=False)["contents"], contents(changed=True)["contents"]
    assert (before != now).nonzero().flatten().tolist() == [4]


def vectors(index):
    return {"image": np.full((8, 8), 20 * index, np.uint8), "feature": np.full(3, index / 10), "place": f"{index}"}


@pytest.mark.filterwarnings("ignore:nothing that is trained reads")
def test_condition_reads_an_entry_of_ones_own_and_data_without_it_are_refused(tiny_module, tiny_unet, quiet_trainer):
    module = tiny_module(unet=tiny_unet(vector_dim=3), conditions=[Vectors()])
    quiet_trainer(max_steps=1).fit(module, loaded(vectors))
    for key, given in (("age", "feature, place (texts)"), ("place", "feature, place (texts)")):
        module = tiny_module(unet=tiny_unet(vector_dim=3), conditions=[Vectors(key)])
        said = (
            f"the data must give numbers as '{key}', which the condition Vectors reads, and give {given}; let the items"
        )
        with pytest.raises(ValueError, match=re.escape(said)):
            quiet_trainer(max_steps=1).fit(module, loaded(vectors))
    module = tiny_module(unet=tiny_unet(vector_dim=3), conditions=[Vectors()])
    with pytest.raises(ValueError, match="and give images alone"):
        quiet_trainer(max_steps=1).fit(module, loaded(lambda index: {"image": vectors(index)["image"]}))


@pytest.mark.filterwarnings("ignore:nothing that is trained reads")
def test_condition_reads_an_entry_once_in_training_as_in_sampling(tiny_module, tiny_unet, quiet_trainer):
    seen = []

    class Tenths(Vectors):
        def read(self, batch, encode=None):
            return batch["feature"] / 10

        def forward(self, entry):
            seen.append(entry.detach().clone())
            return entry

    data = loaded(vectors)
    module = tiny_module(unet=tiny_unet(vector_dim=3), conditions=[Tenths()])
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(module, data)
    largest = max(entry.max().item() for entry in seen)
    assert 0.05 < largest <= 0.09 + 1e-6  # of features up to 0.9


def test_key_that_nothing_reads_is_warned_about(tiny_module, quiet_trainer):
    with pytest.warns(UserWarning, match="nothing that is trained reads 'lable'.*label"):
        quiet_trainer(max_steps=1).fit(
            tiny_module(), loaded(lambda index: {"image": np.zeros((8, 8), np.uint8), "lable": 1})
        )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_that_are_too_many_for_memory_are_read_again_and_are_the_same(monkeypatch, num_workers):
    def batches(**options):
        data = ImageDataModule(Mine(), num_val=3, batch_size=4, horizontal_flip=True, seed=1, **options)
        data.setup()
        return data, [{**batch} for batch in data.train_dataloader()]

    in_memory, expected = batches()
    monkeypatch.setattr(source, "IN_MEMORY_BYTES", 0)
    read_again, found = batches(num_workers=num_workers)
    assert isinstance(read_again.image_set.images, source.SourceImages)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert torch.equal(read_again.state_dict()["contents"], in_memory.state_dict()["contents"])


def test_item_that_changes_while_training_is_an_error(monkeypatch):
    monkeypatch.setattr(source, "IN_MEMORY_BYTES", 0)
    data = loaded(lambda index: {"image": PIXELS[index]})
    data.source.make = lambda index: {"image": PIXELS[index, :5]}
    with pytest.raises(ValueError, match=r"item \d of Mine had the shape \(3, 6, 8\) before and has \(3, 5, 8\) now"):
        list(data.train_dataloader())


def at(index, wrong, right=None):
    """Makes items of which one is wrong."""
    return lambda i: wrong(i) if i == index else (right or (lambda i: {"image": PIXELS[i]}))(i)


def labelled(label):
    return lambda index: {"image": PIXELS[index], "label": label}


MISTAKES = {
    "item 2 of Mine must be a dict with an image, such as dict(image=..., label=...), got a tuple": at(
        2, lambda i: (PIXELS[i], 0)
    ),
    "item 2 of Mine must be a dict with an image, such as dict(image=..., label=...), got a dict with pixel_values": at(
        2, lambda i: {"pixel_values": PIXELS[i]}
    ),
    "the image of item 3 of Mine must be a PIL image, an array or a tensor, got a str": at(3, lambda i: {"image": "x"}),
    "all images must have one size, and item 0 of Mine is 3x6x8 and item 4 of Mine 3x5x8 (C x H x W)": at(
        4, lambda i: {"image": PIXELS[i, :5]}
    ),
    "the image of item 1 of Mine has floats from 0 to 255, and floats must be in [0, 1]": at(
        1, lambda i: {"image": np.array([[0.0, 255.0]])}
    ),
    "the image of item 1 of Mine has floats from nan to nan, and floats must be in [0, 1]": at(
        1, lambda i: {"image": np.full((6, 8, 3), np.nan)}
    ),
    "the image of item 0 of Mine must hold uint8, uint16, or floats in [0, 1], got int64": lambda i: {
        "image": PIXELS[i].astype(np.int64)
    },
    "the image of item 0 of Mine must be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, or": (
        lambda i: {"image": PIXELS[i, ..., :2]}
    ),
    "item 5 of Mine cannot be read: KeyError: 'gone'": at(5, lambda i: {}["gone"]),
    "the label of item 0 of Mine must be a whole number from 0, got 'cat'": labelled("cat"),
    "the label of item 0 of Mine must be a whole number from 0, got -1": labelled(-1),
    "the label of item 0 of Mine must be a whole number from 0, got True": labelled(True),
    "label must be of one type and shape in all items, and is there in item 0 of Mine and missing in item 7": at(
        7, lambda i: {"image": PIXELS[i]}, labelled(0)
    ),
    "caption must be of one type and shape in all items, and is missing in item 0 of Mine and a text in item 7": at(
        7, lambda i: {"image": PIXELS[i], "caption": "x"}
    ),
    "caption of item 0 of Mine must be text, got 3": lambda i: {"image": PIXELS[i], "caption": 3},
    "age must be of one type and shape in all items, and is int64 of the shape () in item 0 of Mine and missing in "
    "item 6 of Mine; make them alike in __getitem__": at(
        6, known(age=None), known(age=3)
    ),
    "age must be of one type and shape in all items, and is int64 of the shape () in item 0 of Mine and float32 of the "
    "shape () in item 2 of Mine; make them alike in __getitem__": at(2, known(age=3.5), known(age=3)),
    "boxes must be of one type and shape in all items, and is float32 of the shape (2, 4) in item 0 of Mine and "
    "float32 of the shape (1, 4) in item 9 of Mine": at(9, known(boxes=np.ones((1, 4))), known(boxes=np.ones((2, 4)))),
    "place must be of one type and shape in all items, and is a text in item 0 of Mine and int64 of the shape () in "
    "item 1 of Mine": at(1, known(place=3), known(place="Graz")),
    "words of item 4 of Mine must be a number, an array or a tensor of numbers, or a text, got a list; convert it": at(
        4, known(words=["a", "b"]), known(words=1)
    ),
    "age of item 0 of Mine must be a number, an array or a tensor of numbers, or a text, got a dict": known(age={}),
    "age of item 0 of Mine must be a number, an array or a tensor of numbers, or a text, got float32": known(
        age=torch.empty(0)
    ),
    "a key of item 0 of Mine must be a text, and none of images, index, x0, std, replaced, labels, captions, which "
    "batches have for what the data module makes, got 'index'; rename it": known(index=3),
    "got 'labels'; rename it": known(labels=3),
    "got 7; rename it": lambda i: {"image": PIXELS[i], 7: 7},
    "names of the items of Mine must differ, and x occurs twice": lambda i: {"image": PIXELS[i], "name": "x"},
}  # fmt: skip


@pytest.mark.parametrize("said", MISTAKES)
def test_mistake_is_named_by_item_and_rule(said):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the whole message is compared
        loaded(MISTAKES[said])
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_label_beyond_the_class_names_and_names_without_labels_are_refused():
    with pytest.raises(ValueError, match="whole number from 0 below 2, the number of class_names, got 2"):
        loaded(labelled(2), class_names=["cat", "dog"])
    with pytest.raises(ValueError, match="item 0 of Mine must have a label, as its source has class_names"):
        loaded(at(99, None), class_names=["cat", "dog"])


def test_source_without_items_or_methods_is_refused():
    with pytest.raises(ValueError, match="Mine must hold images, and its length is 0"):
        loaded(None, num=0)
    with pytest.raises(NotImplementedError, match="Source must define __len__ and __getitem__, or load"):
        ImageDataModule(Source()).setup()
    with pytest.raises(NotImplementedError, match="LabelledSource must define __len__ and __getitem__, or load"):
        SegmentationDataModule(LabelledSource(), Targets("0/1")).setup()


# ------------------------------------------------------------------------------------------------------------ labelled


class Pairs(LabelledSource):
    """Images of two sizes, with label images that a test makes."""

    def __init__(self, make=lambda index: np.eye(20 + index, 20, dtype=np.uint8)):
        self.make = make

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {
            "image": np.full((20 + index, 20), index, np.uint8),
            "label": self.make(index),
            "name": f"slice {index}",
        }


def test_labelled_source_of_ones_own_is_trained_on():
    data = SegmentationDataModule(Pairs(), Targets("classes", num_classes=2), window_size=16, batch_size=2, num_val=1)
    data.setup()
    assert data.images.names == [f"slice {index}" for index in range(4)]
    whole = data.whole(3)
    assert whole["images"].shape == (1, 23, 20)
    assert torch.equal(whole["classes"], torch.eye(23, 20).long())
    assert next(iter(data.train_dataloader()))["classes"].shape == (2, 16, 16)


def test_labelled_item_with_another_key_is_refused():
    class Others(Pairs):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"age": 3}

    with pytest.raises(
        ValueError, match="item 0 of Others must hold no keys but image, label and name, got age; remove"
    ):
        SegmentationDataModule(Others(), Targets("0/1")).setup()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda index: np.zeros((20, 20)), "label of item 0 of Pairs must be (H, W) of whole numbers, got float64"),
        (lambda index: 3, "must be (H, W) of whole numbers, got int64 of the shape ()"),
        (lambda index: None, "item 0 of Pairs must have a label, an image of whole numbers"),
        (lambda index: np.eye(20, dtype=int), "item 1 of Pairs must be as large as its label, and has 21x20 pixels"),
        (lambda index: np.full((20, 20), 2**40), "must hold numbers below 2**31"),
    ],
)  # fmt: skip
def test_mistake_of_a_label_image_is_named(make, said):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the whole message is compared
        SegmentationDataModule(Pairs(make), Targets("0/1")).setup()
    assert said in str(raised.value)


# --------------------------------------------------------------------------------------------------------- command line

MINE = """
import numpy as np

from unet_diffusion.data import Source


class Squares(Source):
    class_names = ["dark", "bright"]

    def __init__(self, size: int = 8):
        self.size = size

    def __len__(self):
        return 12

    def __getitem__(self, index):
        label = index % 2
        return dict(image=np.full((self.size, self.size), 50 + 150 * label, np.uint8), label=label)
"""


def test_source_of_ones_own_is_named_in_a_recipe_and_allowed_on_the_command_line(
    run_cli, tiny_digits, tmp_path, monkeypatch
):
    (tmp_path / "squares_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = {"data": {"init_args": {"source": "squares_of_mine.Squares", "num_val": 2, "batch_size": 4}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [*tiny_digits, "--config", tmp_path / "recipe.yaml", "--model.unet.num_class_embeds", 3]
    arguments += ["--samples.num_images", 2, "--trainer.default_root_dir", tmp_path / "run"]
    status, _, err = run_cli("fit", *arguments)
    assert (status != 0, "add --allow squares_of_mine to the command line" in err) == (True, True), err
    status, _, err = run_cli("fit", *arguments, "--allow", "squares_of_mine")
    assert status == 0, err
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()
    status, _, err = run_cli(
        "fit", *arguments, "--allow", "squares_of_mine", "--trainer.max_steps", 6, "--data.size", 8
    )  # goes on
    assert status == 0, err


def test_source_of_the_page_on_extending_trains_by_the_command_there(run_cli, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text().partition("## A source of data")[2]
    code, command = (page.partition(f"```{language}\n")[2].partition("```")[0] for language in ("python", "bash"))
    (tmp_path / "flowers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for index, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{'rose' if index % 2 else 'daisy'}_{index}.png")
    smaller = "--data.source.size 16 --data.batch_size 4 --data.num_val 2 --model.unet.channels [8,8,8,8]"
    smaller += " --model.unet.norm_num_groups 4 --model.unet.head_channels 4 --model.speed plain --trainer.max_steps 1"
    smaller += " --trainer.accelerator cpu --samples.num_images 2 --samples.num_inference_steps 2"
    status, _, err = run_cli(*shlex.split(command)[1:], *smaller.split(), "--trainer.default_root_dir", "run")
    assert status == 0, err
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()
