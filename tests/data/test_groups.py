import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from unet_diffusion.data import Digits, Folder, Groups, ImageDataModule, ShuffledBatches, split_by_group
from unet_diffusion.data.groups import balanced_order
from unet_diffusion.data.split import VAL_SHARE, number_of
from unet_diffusion.runtime.randomness import keyed_generator

SLICES = r"_slice\d+"


def names_of(patients, slices):
    return [f"p{patient:03}_slice{number:03}.png" for patient in patients for number in range(slices)]


def sides(names, num_val=None):
    train, val = split_by_group(Groups(SLICES).of(names), num_val)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(names)))
    return [{names[i].split("_")[0] for i in side.tolist()} for side in (train, val)], len(val)


@pytest.mark.parametrize("num_val", [None, 1, 7, 50])
def test_a_patient_is_on_one_side_of_the_split(num_val):
    (train, val), number = sides(names_of(range(60), 4), num_val)
    assert not train & val
    assert train
    assert num_val is None or num_val <= number < num_val + 4


@pytest.mark.parametrize("num_val", [None, 9])
def test_patients_who_are_added_move_none_who_was_trained_on(num_val):
    rng = np.random.default_rng(0)
    for _ in range(20):
        first = rng.permutation(100)[:30]
        more = np.union1d(first, rng.permutation(100)[:40])
        (trained, _), _ = sides(names_of(first, 3), num_val)
        (_, validated), _ = sides(names_of(more, 5), num_val)
        assert not trained & validated


def test_about_a_tenth_of_the_groups_is_validated_on_by_default():
    (train, val), _ = sides(names_of(range(400), 2))
    assert abs(len(val) - 40) < 4 * (400 * 0.1 * 0.9) ** 0.5  # of a binomial distribution
    assert len(train) + len(val) == 400


def test_no_more_than_1000_images_are_validated_on_by_default():
    _, number = sides(names_of(range(900), 20))
    assert 1000 <= number < 1020  # a group is kept whole


def test_epoch_shows_all_groups_equally_often():
    groups = torch.tensor([7] * 90 + [3] * 6 + [5] * 4)
    order = balanced_order(groups, keyed_generator(0))
    assert order.shape == groups.shape
    assert sorted(Counter(groups[order].tolist()).values()) == [33, 33, 34]
    large, *others = (Counter(order[groups[order] == group].tolist()) for group in (7, 3, 5))
    assert set(large.values()) == {1}
    for shown in others:
        assert max(shown.values()) - min(shown.values()) <= 1


def test_groups_of_one_image_make_an_order_in_which_each_comes_once():
    order = balanced_order(torch.arange(50), keyed_generator(1))
    assert sorted(order.tolist()) == list(range(50))


def test_order_is_a_function_of_seed_and_epoch():
    def drawn(seed, epoch):
        sampler = ShuffledBatches(torch.arange(40), 8, num_images=40, seed=seed, groups=torch.arange(40) // 7)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert drawn(0, 1) == drawn(0, 1)
    assert drawn(0, 1) != drawn(0, 2)
    assert drawn(0, 1) != drawn(1, 1)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"must be a regular expression, got '\('"),
        ("_z", "matches in none of 6, such as p000_slice000.png; correct it"),
        (".*", "leaves '' of every name; let it match less"),
    ],
)
def test_pattern_that_makes_no_groups_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        Groups(pattern).of(names_of(range(2), 3))


def test_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="num_val must leave a group to train on, and 4 takes all 2 groups of the 6"):
        sides(names_of(range(2), 3), 4)


def test_a_group_is_left_to_train_on_where_all_have_low_numbers():
    groups = ["p5", "p7", "p7"]
    assert all(number_of(group) < VAL_SHARE for group in groups)
    train, val = split_by_group(groups)
    assert {groups[i] for i in train.tolist()} | {groups[i] for i in val.tolist()} == {*groups}
    assert len(train)
    assert len(val)


def test_images_without_names_have_no_groups():
    data = ImageDataModule(Digits(), groups=Groups("a"))
    with pytest.raises(ValueError, match="groups need the names of images, and those of Digits have none"):
        data.setup("fit")


def test_resumed_epoch_in_another_order_is_told(tmp_path, tiny_module, quiet_trainer):
    for name in names_of(range(6), 4):
        Image.new("L", (8, 8), 50).save(tmp_path / name)

    def fit(max_steps, *, balanced=True, batch_size=2, ckpt_path=None):
        groups = Groups(SLICES, balanced=balanced)
        source = Folder(tmp_path, image_size=8, channels=1)
        data = ImageDataModule(source, batch_size=batch_size, num_val=1, groups=groups, num_workers=0)
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        options = {"enable_checkpointing": True, "callbacks": [saving], "limit_val_batches": 0}
        quiet_trainer(max_steps=max_steps, **options).fit(tiny_module(), data, ckpt_path=ckpt_path)
        return tmp_path / f"step={max_steps}.ckpt"

    checkpoint = fit(1)
    with pytest.warns(
        UserWarning, match=r"another order than in the checkpoint \(groups.balanced was True, is False\)"
    ):
        fit(2, balanced=False, ckpt_path=checkpoint)
    with pytest.warns(UserWarning, match=r"\(batch_size was 2, is 3\). The epoch that was begun goes on in this order"):
        fit(2, batch_size=3, ckpt_path=checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*another order than")
        fit(3, ckpt_path=checkpoint)


def test_epoch_that_is_over_has_no_order_to_keep():
    def loader(batch_size):
        data = ImageDataModule(Digits(), batch_size=batch_size, num_val=1797 - 10, num_workers=0)
        data.setup("fit")
        return data.train_dataloader()

    begun, over = loader(4), loader(4)
    next(iter(begun))
    assert len([*over]) == 2
    with pytest.warns(UserWarning, match=r"batch_size was 4, is 2"):
        loader(2).load_state_dict(begun.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*another order than")
        loader(2).load_state_dict(over.state_dict())


def test_folder_is_trained_on_by_groups(tmp_path):
    sizes = {0: 30, 1: 2, 2: 2, 3: 2}
    for patient, number in sizes.items():
        for name in names_of([patient], number):
            Image.new("L", (8, 8), 50 * patient).save(tmp_path / name)
    source = Folder(tmp_path, image_size=8, channels=1)
    data = ImageDataModule(source, batch_size=6, num_val=1, groups=Groups(SLICES, balanced=True), num_workers=0)
    data.setup("fit")
    patient_of = torch.tensor([patient for patient, number in sizes.items() for _ in range(number)])
    assert len(patient_of[data.val_indices].unique()) == 1
    drawn = torch.cat([patient_of[batch["index"]] for batch in data.train_dataloader()])
    counts = Counter(drawn.tolist())
    assert set(counts) == set(sizes) - set(patient_of[data.val_indices].tolist())
    assert max(counts.values()) - min(counts.values()) <= 6  # the images that fill no last batch are left out
    (split,) = (line for line in data.summary() if line.startswith("split"))
    assert split.endswith("to validate on (groups: 1); each epoch shows all groups equally often")
