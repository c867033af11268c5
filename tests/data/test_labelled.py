"""Images and labels are matched, read and checked; windows are drawn from them."""

import pickle
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from PIL import Image
from scipy import ndimage

from unet_diffusion.data import (
    ImageDataModule,
    PairedFiles,
    SegmentationDataModule,
    SyntheticCells,
    SyntheticPairs,
    Tiles,
)
from unet_diffusion.data.decoding import decode_pages
from unet_diffusion.data.folder import cut
from unet_diffusion.data.scaling import to_float
from unet_diffusion.data.windows import WindowBatches
from unet_diffusion.segmentation.affinities import APART
from unet_diffusion.segmentation.augmentation import Augmentation
from unet_diffusion.segmentation.labels import REACH, Targets

RNG = np.random.default_rng(0)


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def pairs(root, num=5, size=(24, 30), **options) -> PairedFiles:
    """Grey images, each with a square of its own number in the label."""
    for i in range(num):
        write(root / "image" / f"{i}.png", RNG.integers(256, size=size, dtype=np.uint8))
        label = np.zeros(size, dtype=np.uint8)
        label[4:12, 4 + i : 14 + i] = 255
        write(root / "label" / f"{i}.png", label)
    return PairedFiles(root / "image", root / "label", **options)


BINARY = Targets(label_format="0/255")


def data(source, targets=BINARY, **options) -> SegmentationDataModule:
    made = SegmentationDataModule(source, targets, **{"window_size": 16, "batch_size": 2, "num_val": 1, **options})
    made.setup()
    return made


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_images_keep_their_depth_and_values(tmp_path, suffix, dtype):
    pixels = RNG.integers(np.iinfo(dtype).max, size=(6, 7), dtype=dtype, endpoint=True)
    write(tmp_path / "image" / f"a.{suffix}", pixels)
    write(tmp_path / "label" / "a.png", np.zeros((6, 7), np.uint8))
    loaded = PairedFiles(tmp_path / "image", tmp_path / "label").load(progress=False)
    assert np.array_equal(loaded.images[0][0].numpy(), pixels)


def test_16_bit_instance_numbers_are_kept(tmp_path):
    numbers = np.array([[0, 1, 300], [60000, 2, 2]], dtype=np.uint16)
    write(tmp_path / "image" / "a.png", np.zeros((2, 3, 3), np.uint8))
    write(tmp_path / "label" / "a.png", numbers)
    loaded = PairedFiles(tmp_path / "image", tmp_path / "label", channels=3).load(progress=False)
    assert loaded.labels[0].tolist() == numbers.tolist()
    assert loaded.images[0].shape == (3, 2, 3)


def test_palette_labels_are_their_indices_and_grey_in_rgb_is_its_value(tmp_path):
    indices = np.array([[0, 1], [2, 1]], dtype=np.uint8)
    palette = Image.fromarray(indices).convert("L").convert("P")
    palette.putdata(indices.ravel().tolist())
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for name in ("a", "b"):
        write(tmp_path / "image" / f"{name}.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "label").mkdir()
    palette.save(tmp_path / "label" / "a.png")
    write(tmp_path / "label" / "b.png", np.stack([indices] * 3, axis=-1))
    loaded = PairedFiles(tmp_path / "image", tmp_path / "label").load(progress=False)
    assert [label.tolist() for label in loaded.labels] == [indices.tolist()] * 2


def test_pages_of_two_stacks_are_images_and_labels(tmp_path):
    pages = [Image.fromarray(RNG.integers(256, size=(8, 9), dtype=np.uint8)) for _ in range(3)]
    for name in ("train-volume.tif", "train-labels.tif"):  # as in the challenge
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    loaded = PairedFiles(tmp_path / "train-volume.tif", tmp_path / "train-labels.tif").load(progress=False)
    assert loaded.names == ["train-volume_0000", "train-volume_0001", "train-volume_0002"]
    for page, image, label in zip(pages, loaded.images, loaded.labels, strict=True):
        assert np.array_equal(image[0].numpy(), np.asarray(page))
        assert np.array_equal(label, np.asarray(page))


def test_label_suffix_matches_labels_beside_their_images(tmp_path):
    write(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    write(tmp_path / "a_mask.png", np.ones((4, 4), np.uint8))
    with pytest.raises(ValueError, match="1 images have no label"):
        PairedFiles(tmp_path, tmp_path, label_suffix="_mask").load(progress=False)  # the mask is an image too
    write(tmp_path / "masks" / "a_mask.png", np.ones((4, 4), np.uint8))
    (tmp_path / "a_mask.png").unlink()
    write(tmp_path / "images" / "a.jpg", np.zeros((4, 4), np.uint8))
    loaded = PairedFiles(tmp_path / "images", tmp_path / "masks", label_suffix="_mask").load(progress=False)
    assert loaded.names == ["a"]


def test_missing_partners_are_listed_on_both_sides(tmp_path):
    source = pairs(tmp_path)
    (tmp_path / "label" / "3.png").unlink()
    write(tmp_path / "label" / "9.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"(?s)1 images have no label:\n  3.png.*1 labels have no image:\n  9.png"):
        source.load(progress=False)


def test_mis_sized_partners_are_listed(tmp_path):
    source = pairs(tmp_path)
    write(tmp_path / "label" / "2.png", np.zeros((24, 31), np.uint8))
    with pytest.raises(ValueError, match="1 of 5 images cannot be used:\n  2: 24x30 pixels, and 24x31 in its label"):
        source.load(progress=False)


def test_damaged_files_are_listed_with_the_reason(tmp_path):
    source = pairs(tmp_path)
    (tmp_path / "image" / "1.png").write_bytes(b"no image")
    (tmp_path / "label" / "2.png").write_bytes((tmp_path / "label" / "2.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"(?s)2 of 5 images cannot be used:\n  1: .*\n  2: its label 2.png: "):
        source.load(progress=False)


def test_images_without_labels_are_read_and_damaged_ones_listed(tmp_path):
    source = pairs(tmp_path / "pairs", unlabelled=tmp_path / "more")
    pixels = RNG.integers(256, size=(20, 22), dtype=np.uint8)
    write(tmp_path / "more" / "a.png", pixels)
    (without,) = source.load(progress=False).unlabelled
    assert np.array_equal(without[0].numpy(), pixels)
    (tmp_path / "more" / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"1 of 2 images without labels cannot be used:\n  b.png: "):
        source.load(progress=False)


def test_coloured_labels_are_refused(tmp_path):
    source = pairs(tmp_path)
    write(tmp_path / "label" / "0.png", RNG.integers(256, size=(24, 30, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="this file holds colours; save class indices or a palette image"):
        source.load(progress=False)


def test_wrong_values_are_shown_with_the_file_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"5 of 5 label images do not fit targets:\n  0: .* got 0, 255\n"):
        data(pairs(tmp_path), Targets(label_format="0/1"))


def test_anti_aliased_numbers_are_refused_with_the_file(tmp_path):
    source = pairs(tmp_path, size=(64, 64))
    y, x = np.mgrid[:64, :64]
    disc = (10.5 - np.hypot(y - 32, x - 32)).clip(0, 1)
    write(tmp_path / "label" / "2.png", (255 * disc).round().astype(np.uint8))
    with pytest.raises(ValueError, match=r"1 of 5 label .*\n  2: with label_format instances each number must be an"):
        data(source, Targets(label_format="instances"))


def set_labels(source, labels):
    for number, label in labels.items():
        write(source.labels / f"{number}.png", label)


@pytest.mark.parametrize(("value", "name"), [(0, "background"), (255, "cell")])
def test_labels_of_one_class_are_refused_before_training(tmp_path, value, name):
    source = pairs(tmp_path)
    set_labels(source, dict.fromkeys(range(4), np.full((24, 30), value, np.uint8)))  # all but the one to validate on
    with pytest.raises(ValueError, match=f"two classes or more, and all pixels of the 4 are of class {name}; check"):
        data(source)


@pytest.mark.parametrize(("numbers", "what"), [(range(4), "4 labels to train"), ([4], "1 labels to validate")])
def test_labels_that_are_ignored_as_a_whole_are_refused(tmp_path, numbers, what):
    source = pairs(tmp_path)
    set_labels(source, dict.fromkeys(numbers, np.full((24, 30), 7, np.uint8)))
    with pytest.raises(ValueError, match=f"all pixels of the {what} on are of ignore_label 7; leave it out"):
        data(source, Targets(label_format="0/255", ignore_label=7))


def test_summary_says_what_labels_hold_and_what_is_left_out(tmp_path):
    source = pairs(tmp_path, num=6)
    set_labels(source, {1: np.zeros((24, 30), np.uint8), 3: np.full((24, 30), 7, np.uint8)})
    write(tmp_path / "image" / "0.png", RNG.integers(65536, size=(30, 40), dtype=np.uint16))
    write(tmp_path / "label" / "0.png", np.zeros((30, 40), np.uint8))
    (tmp_path / "label" / "notes.txt").write_text("labels")
    made = data(source, Targets(label_format="0/255", ignore_label=7), num_train=3)
    known = sum(24 * 30 for number in range(6) if number not in (0, 3)) + 30 * 40
    cell = 100 * 3 * 8 * 10 / known  # squares of 8 by 10 in 2, 4 and 5
    assert made.summary() == [
        "found: 6 labelled images, 1 channels, 24x30 to 30x40 pixels, 8 and 16 bits",
        "left out: 1 .txt beside the labels",
        f"labels: background {100 - cell:.3g} %, cell {cell:.3g} %; 2 hold background alone (0, 1); "
        "1 hold nothing but ignore_label (3)",
        "cut: windows of 16x16 pixels, 16 an image and epoch; whole images to validate on",
        "split: 5 to train on, 3 of them, the last 1 by name to validate on",
    ]


def test_images_that_are_no_labels_by_their_suffix_are_counted(tmp_path):
    write(tmp_path / "images" / "a.png", np.zeros((4, 4), np.uint8))
    for name in ("a_mask.png", "a_edges.png"):
        write(tmp_path / "labels" / name, np.ones((4, 4), np.uint8))
    loaded = PairedFiles(tmp_path / "images", tmp_path / "labels", label_suffix="_mask").load(progress=False)
    assert loaded.left_out == "1 images without _mask among the labels"


# ------------------------------------------------------------------------------------------------------------- windows


def test_window_without_augmentation_is_a_piece_of_image_and_label(tmp_path):
    made = data(pairs(tmp_path))
    window = made.window((2, 0, 7))
    image, classes = made.whole(2)["images"][0], made.whole(2)["classes"]
    places = image.unfold(0, 16, 1).unfold(1, 16, 1)  # all windows
    (found,) = (places == window["images"][0]).all(dim=(2, 3)).nonzero()
    assert torch.equal(window["classes"], classes.unfold(0, 16, 1).unfold(1, 16, 1)[tuple(found)])


def test_windows_are_spread_over_the_image(tmp_path):
    made = data(pairs(tmp_path, num=2, size=(20, 18)))
    windows = [made.window((0, epoch, 0))["images"] for epoch in range(200)]
    assert len({tuple(window.flatten().tolist()) for window in windows}) == 5 * 3  # every place


def test_prediction_of_a_valid_network_lies_within_the_image(tmp_path):
    made = data(pairs(tmp_path), window_size=40)
    made.margin = 14
    for epoch in range(50):
        window = made.window((0, epoch, 0))
        inside = window["images"][0, 14:-14, 14:-14]
        places = made.whole(0)["images"][0].unfold(0, 12, 1).unfold(1, 12, 1)
        assert (places == inside).all(dim=(2, 3)).any()  # no mirrored pixels


def test_window_larger_than_the_image_is_mirrored(tmp_path):
    made = data(pairs(tmp_path, size=(10, 10)), window_size=30)
    expected = np.pad(made.whole(0)["images"][0].numpy(), 10, mode="reflect")  # twice around in places
    np.testing.assert_allclose(made.window((0, 0, 0))["images"][0].numpy(), expected, atol=1e-6)


def test_deformed_windows_keep_the_values_of_labels_and_weights(tmp_path):
    targets = Targets(label_format="0/255", class_balance=True)
    made = data(pairs(tmp_path), targets, augmentation=Augmentation(scale=0.2, noise=0.1))
    balance = set(made.targets.balance([made.images.labels[i] for i in made.train_images.tolist()]).tolist())
    for epoch in range(5):
        window = made.window((0, epoch, 0))
        assert set(window["classes"].unique().tolist()) <= {0, 1}
        assert set(window["weights"].unique().tolist()) <= balance


def test_draws_are_a_function_of_seed_epoch_and_number(tmp_path):
    made = data(pairs(tmp_path), augmentation=Augmentation())
    again = data(PairedFiles(tmp_path / "image", tmp_path / "label"), augmentation=Augmentation())
    other = data(PairedFiles(tmp_path / "image", tmp_path / "label"), augmentation=Augmentation(), seed=1)
    drawn = (1, 4, 9)
    assert torch.equal(made.window(drawn)["images"], again.window(drawn)["images"])
    assert not torch.equal(made.window(drawn)["images"], other.window(drawn)["images"])
    assert not torch.equal(made.window(drawn)["images"], made.window((1, 5, 9))["images"])


def test_epoch_draws_each_image_as_often_as_told(tmp_path):
    made = data(pairs(tmp_path), windows_per_image=3)
    batches = list(made.train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [2] * 6
    assert torch.cat([batch["index"] for batch in batches]).bincount().tolist() == [3, 3, 3, 3]


def test_resumed_epoch_of_another_number_of_windows_is_told(tmp_path):
    source = pairs(tmp_path)
    begun = data(source, windows_per_image=3).train_dataloader()
    next(iter(begun))
    with pytest.warns(UserWarning, match=r"another order than in the checkpoint \(windows_per_image was 3, is 2\)"):
        data(source, windows_per_image=2).train_dataloader().load_state_dict(begun.state_dict())


def test_validation_images_are_the_last_and_whole(tmp_path):
    made = data(pairs(tmp_path), num_val=2)
    batches = list(made.val_dataloader())
    assert [[one["index"].item() for one in batch] for batch in batches] == [[3], [4]]
    assert batches[0][0]["images"].shape == (1, 24, 30)


def test_workers_draw_what_the_training_process_would(tmp_path):
    source = pairs(tmp_path)
    options = {"augmentation": Augmentation(), "stretch": True, "windows_per_image": 2}
    alone, helped = data(source, **options), data(source, **options, num_workers=2)
    for mine, theirs in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_data_can_be_sent_to_a_process_without_their_trainer(tmp_path):
    made = data(pairs(tmp_path))
    made.trainer = Trainer(logger=False, accelerator="cpu")
    sent = pickle.loads(pickle.dumps(made))
    torch.testing.assert_close(sent.window((0, 0, 0)), made.window((0, 0, 0)), rtol=0, atol=0)


def test_only_tiff_files_have_pages(tmp_path):
    frames = [Image.fromarray(RNG.integers(256, size=(8, 9), dtype=np.uint8)) for _ in range(2)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    assert len(decode_pages((tmp_path / "a.webp").read_bytes(), 1)) == 1


def test_few_labelled_images_are_among_more(tmp_path):
    source = pairs(tmp_path, num=9)
    subsets = [set(data(source, num_train=n, seed=3).train_images.tolist()) for n in (2, 5, 8)]
    assert subsets[0] < subsets[1] < subsets[2] == set(range(8))
    assert subsets[0] != set(data(source, num_train=2, seed=4).train_images.tolist())


def test_images_to_fit_thresholds_on_are_not_trained_or_validated_on(tmp_path):
    made = data(pairs(tmp_path, num=9), num_train=6, num_fit=2)
    assert (len(made.train_images), len(made.fit_indices), len(made.val_indices)) == (4, 2, 1)
    assert not {*made.train_images.tolist(), *made.val_indices.tolist()} & {*made.fit_indices.tolist()}
    assert "6 of them, 2 of which thresholds are fitted on" in made.summary()[-1]


def sparse(tmp_path, **options):
    """A data module of an image with one small object near a corner."""
    source = pairs(tmp_path, size=(64, 64))
    label = np.zeros((64, 64), dtype=np.uint8)
    label[50:53, 5:8] = 255
    for path in (tmp_path / "label").iterdir():
        Image.fromarray(label).save(path)
    return data(source, window_size=16, windows_per_image=50, **options)


def drawn_windows(made, num_epochs):
    """The images of the windows of each batch of so many epochs."""
    loader = made.train_dataloader()
    batches = []
    for epoch in range(num_epochs):
        loader.sampler.set_epoch(epoch)
        batches += [[index for index, *_ in drawn] for drawn in loader.sampler]
    return batches


@pytest.mark.parametrize(("share", "batch_size", "num"), [(0.5, 4, 2), (0.5, 5, 2), (0.25, 4, 1), (0.29, 100, 29)])
def test_synthetic_windows_have_their_share_of_each_of_the_first_batches(tmp_path, share, batch_size, num):
    source = pairs(tmp_path / "real")
    pairs(tmp_path / "drawn", num=3, size=(20, 20))
    per_epoch = 400 // batch_size  # of 4 x 100 windows
    first = per_epoch + per_epoch // 2
    synthetic = SyntheticPairs(tmp_path / "drawn", num_batches=first, share=share)
    options = {"windows_per_image": 100, "batch_size": batch_size}
    made, real = (data(source, **options, synthetic=one) for one in (synthetic, None))
    said = f"synthetic: 3 images, {num} of {batch_size} windows in each of the first {first} batches"
    assert said in made.summary()
    with_synthetic, without = np.array(drawn_windows(made, 2)), np.array(drawn_windows(real, 2))
    assert with_synthetic.shape == without.shape == (2 * per_epoch, batch_size)
    assert (with_synthetic[first:] == without[first:]).all()
    is_synthetic = with_synthetic > 4
    assert (is_synthetic[:first].sum(axis=1) == num).all()
    assert ((with_synthetic == without) | is_synthetic).all()
    assert {*with_synthetic[is_synthetic].tolist()} == {5, 6, 7}
    if batch_size < 100:  # enough batches for each place
        assert is_synthetic[:first].mean(axis=0) == pytest.approx(num / batch_size, abs=0.15)


def test_processes_put_synthetic_windows_at_places_of_their_own(tmp_path):
    synthetic = SyntheticPairs(tmp_path, num_batches=10**6)
    options = {"images": torch.arange(4), "synthetic": synthetic, "synthetic_images": torch.arange(4, 8)}
    samplers = [WindowBatches(torch.arange(400), 4, num_replicas=2, rank=rank, **options) for rank in (0, 1)]
    drawn = np.array([[[index > 3 for index, *_ in batch] for batch in sampler] for sampler in samplers])
    assert drawn.shape == (2, 50, 4)
    assert (drawn.sum(axis=2) == 2).all()
    assert (drawn[0] != drawn[1]).any(axis=1).mean() > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, r"0.5 of 1 is less than one; raise data.batch_size to 2, with as many windows in an epoch"),
        ({"batch_size": 3, "share": 0.3}, r"0.3 of 3 is less .*batch_size to 4, .*, or data.synthetic.share to 0.334$"),
        ({"batch_size": 100, "share": 0.3}, r"0.3 of 2 is less than one"),  # of the windows that there are
    ],
)
def test_share_without_a_synthetic_window_in_a_batch_is_refused(tmp_path, options, message):
    pairs(tmp_path / "drawn", size=(20, 20))
    synthetic = SyntheticPairs(tmp_path / "drawn", num_batches=2, share=options.pop("share", 0.5))
    with pytest.raises(ValueError, match="share of synthetic must give a window in each batch, and " + message):
        data(pairs(tmp_path / "real", num=3), windows_per_image=1, synthetic=synthetic, **options).train_dataloader()


def test_position_in_a_resumed_epoch_decides_what_may_be_synthetic(tmp_path):
    source = pairs(tmp_path / "real")
    pairs(tmp_path / "drawn", size=(20, 20))
    made = data(source, windows_per_image=50, synthetic=SyntheticPairs(tmp_path / "drawn", num_batches=150))
    whole = drawn_windows(made, 2)
    loader = made.train_dataloader()
    loader.load_state_dict({"epoch": 1, "num_batches": 30})
    loader.sampler.set_epoch(1)
    assert [[index for index, *_ in drawn] for drawn in loader.sampler] == whole[130:]


def test_batches_that_are_left_out_of_an_epoch_do_not_count_as_the_first_ones(tmp_path):
    pairs(tmp_path / "drawn", size=(20, 20))
    made = data(pairs(tmp_path / "real"), synthetic=SyntheticPairs(tmp_path / "drawn", num_batches=14))
    limits = {"max_epochs": 3, "limit_train_batches": 5}
    made.trainer = Trainer(**limits, accelerator="cpu", logger=False, enable_checkpointing=False)
    sampler = made.train_dataloader().sampler
    is_synthetic = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        is_synthetic += [any(index > 4 for index, *_ in drawn) for drawn in islice(sampler, 5)]
    assert is_synthetic == [True] * 14 + [False]


def test_synthetic_images_are_taken_as_they_were_drawn(tmp_path):
    source = pairs(tmp_path / "real")
    pairs(tmp_path / "drawn", num=3, size=(20, 20))
    made = data(source, synthetic=SyntheticPairs(tmp_path / "drawn", num_batches=5), stretch=True)
    window = made.window((6, 0, 0))
    assert window["classes"].shape == (16, 16)
    pixels = np.asarray(Image.open(tmp_path / "drawn" / "image" / "1.png")).astype(np.float32) / 127.5 - 1
    assert np.isin(window["images"].numpy().round(4), pixels.round(4)).all()


def test_synthetic_images_that_cannot_be_used_are_told(tmp_path):
    source = pairs(tmp_path / "real")
    pairs(tmp_path / "small", num=1, size=(15, 20))
    with pytest.raises(
        ValueError, match=r"at least 16x16 pixels.* 1 of 1 are smaller: 0 \(15x20\); make them with --im"
    ):
        data(source, synthetic=SyntheticPairs(tmp_path / "small", num_batches=5))
    pairs(tmp_path / "numbered", num=1, size=(20, 20))
    write(tmp_path / "numbered" / "label" / "0.png", np.eye(20, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"^synthetic .*numbered: 1 of 1 label images do not fit targets"):
        data(source, synthetic=SyntheticPairs(tmp_path / "numbered", num_batches=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_batches": 5, "share": 0.6}, "above 0 and at most 0.5, got 0.6"),
        ({"num_batches": 5, "share": 0.0}, "above 0 and at most 0.5, got 0.0"),
        ({"num_batches": 0}, "num_batches of synthetic must be at least 1"),
    ],
)
def test_synthetic_pairs_beside_real_ones_are_needed(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticPairs("x", **options)


def test_training_ends_on_real_images(tmp_path):
    pairs(tmp_path / "drawn", size=(20, 20))
    made = data(pairs(tmp_path / "real"), synthetic=SyntheticPairs(tmp_path / "drawn", num_batches=6))
    made.trainer = Trainer(max_steps=3, accumulate_grad_batches=2, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"less than the 6 batches of the run.*got 6; 4 is two thirds"):
        made.train_dataloader()


@pytest.mark.parametrize(
    ("ends", "num_batches"),
    [
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2}, 64),  # of 4 x 16 windows in twos
        ({"max_epochs": 2, "max_steps": 1000}, 64),
        ({"max_epochs": 100, "max_steps": 7}, 7),
        ({"max_epochs": 3, "limit_train_batches": 5}, 15),
        ({"max_epochs": 2, "limit_train_batches": 0.25}, 16),
        (
            {"max_steps": 5, "accumulate_grad_batches": 4, "limit_train_batches": 6},
            16,
        ),  # steps of 4, 2, 4, 2, 4 batches
    ],
)
def test_run_ends_on_real_images_however_it_ends(tmp_path, ends, num_batches):
    pairs(tmp_path / "drawn", size=(20, 20))
    source = pairs(tmp_path / "real")
    for number, ends_well in ((num_batches - 1, True), (num_batches, False)):
        made = data(source, synthetic=SyntheticPairs(tmp_path / "drawn", num_batches=number))
        made.trainer = Trainer(**ends, accelerator="cpu", logger=False, enable_checkpointing=False)
        if ends_well:
            made.train_dataloader()
        else:
            with pytest.raises(ValueError, match=f"less than the {num_batches} batches of the run"):
                made.train_dataloader()


def test_run_that_ends_by_time_is_refused_with_synthetic_images(tmp_path):
    pairs(tmp_path / "drawn", size=(20, 20))
    made = data(pairs(tmp_path / "real"), synthetic=SyntheticPairs(tmp_path / "drawn", num_batches=2))
    options = {"max_time": "00:01:00:00", "max_steps": 50, "accelerator": "cpu"}
    made.trainer = Trainer(**options, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"max_time must be left out with synthetic .* set trainer.max_steps or"):
        made.train_dataloader()


def test_synthetic_images_are_loaded_to_train_on_alone(tmp_path, monkeypatch):
    pairs(tmp_path / "drawn", size=(20, 20))
    source, synthetic = pairs(tmp_path / "real"), SyntheticPairs(tmp_path / "drawn", num_batches=6)
    loaded, load = [], SyntheticPairs.load
    monkeypatch.setattr(
        SyntheticPairs, "load", lambda self, *args, **rest: loaded.append(1) or load(self, *args, **rest)
    )
    expected = data(source, synthetic=synthetic).state_dict()
    made = SegmentationDataModule(source, BINARY, window_size=16, batch_size=2, num_val=1, synthetic=synthetic)
    loaded.clear()
    for stage in ("validate", "test", "predict"):
        made.setup(stage)
    list(made.val_dataloader())
    made.state_dict()
    assert loaded == []
    assert not any("synthetic" in line for line in made.summary())
    for _ in range(2):
        made.setup("fit")
    assert loaded == [1]
    assert any(index > 4 for drawn in drawn_windows(made, 1) for index in drawn)
    assert all(torch.equal(value, expected[name]) for name, value in made.state_dict().items())


def test_changed_images_beside_the_labelled_ones_are_noticed(tmp_path):
    pairs(tmp_path / "drawn", size=(20, 20))
    options = {"synthetic": SyntheticPairs(tmp_path / "drawn", num_batches=6)}
    before = data(pairs(tmp_path / "real"), **options).state_dict()
    write(tmp_path / "drawn" / "image" / "2.png", np.zeros((20, 20), np.uint8))
    made = data(PairedFiles(tmp_path / "real" / "image", tmp_path / "real" / "label"), **options)
    made.must_be_same = True
    with pytest.raises(ValueError, match=r"1 changed \(beside the labelled images, 2\)"):
        made.load_state_dict(before)


def test_copies_of_images_that_are_held_out_are_not_denoised(tmp_path):
    source = pairs(tmp_path, unlabelled=tmp_path / "image")
    made = data(source, num_fit=1)
    made.draws_unlabelled = True
    held_out = [made.images.images[i] for i in [*made.fit_indices.tolist(), *made.val_indices.tolist()]]
    denoised = [made._pixels[i] for i in made._to_denoise]
    assert len(denoised) == 6  # three that are trained on, twice
    assert not any(torch.equal(one, other) for one in denoised for other in held_out)


def test_windows_to_denoise_are_of_all_images_that_are_not_held_out(tmp_path):
    for i in range(8):  # of one grey value each, so that it tells the image
        folder = "image" if i < 6 else "more"
        write(tmp_path / folder / f"{i}.png", np.full((24, 30), 30 * i, np.uint8))
        if i < 6:
            write(tmp_path / "label" / f"{i}.png", np.eye(24, 30, dtype=np.uint8) * 255)
    source = PairedFiles(tmp_path / "image", tmp_path / "label", unlabelled=tmp_path / "more")
    made = data(source, num_train=3, num_fit=1)
    assert "unlabelled" not in made.window((int(made.train_images[0]), 0, 0))
    made.draws_unlabelled = True

    def image_of(number):
        window = made.window((int(made.train_images[0]), 0, number))["unlabelled"]
        assert window.shape == (1, 16, 16)
        (value,) = window.unique().tolist()
        return round((value + 1) / 2 * 255 / 30)

    drawn = [image_of(number) for number in range(80)]
    assert set(drawn) == set(range(8)) - {5, *made.fit_indices.tolist()}
    assert drawn == [image_of(number) for number in range(80)]


@pytest.mark.parametrize(("share", "least"), [(1.0, 1.0), (0.5, 0.4)])
def test_windows_hold_objects_as_often_as_told(tmp_path, share, least):
    made = sparse(tmp_path, object_share=share)
    holds = [bool((made.window((0, 0, number))["classes"] > 0).any()) for number in range(100)]
    assert least <= np.mean(holds) <= share + 0.2  # windows that are drawn anywhere may hold it, too


def test_an_object_is_at_any_place_of_a_window(tmp_path):
    made = sparse(tmp_path, object_share=1.0)
    windows = torch.stack([made.window((0, 0, number))["classes"] for number in range(200)])
    is_seen = (windows > 0).any(dim=0)
    assert is_seen[2:, :8].all()
    assert not is_seen[:2].any()
    assert not is_seen[:, 8:].any()


def test_distances_are_in_pixels_of_the_window_however_it_is_scaled(tmp_path):
    targets = Targets(label_format="instances", separate_borders=True)
    augmentation = Augmentation(elastic_sd=0.0, scale=1.0)
    source = pairs(tmp_path, size=(64, 64))
    for path in (tmp_path / "label").iterdir():
        Image.fromarray(np.pad(np.ones((24, 24), dtype=np.uint8), 20)).save(path)
    made = data(source, targets, window_size=48, augmentation=augmentation, object_share=1.0)
    windows = [made.window((0, 0, number)) for number in range(20)]
    distances = REACH * torch.stack([window["distances"] for window in windows]).numpy()
    classes = [window["classes"].numpy() for window in windows]
    expected = np.stack([ndimage.distance_transform_edt(one) for one in classes]).clip(max=REACH)
    assert (distances[expected == 0] == 0).all()
    assert np.abs(distances - expected)[expected > 0].mean() < 0.4


def test_objects_of_a_window_are_those_of_the_image_and_none_beyond_it(tmp_path):
    targets = Targets(label_format="instances", affinities=True)
    source = pairs(tmp_path, size=(64, 64))
    for path in (tmp_path / "label").iterdir():
        Image.fromarray(np.pad(np.ones((24, 64), dtype=np.uint8), ((20, 20), (0, 0)))).save(path)
    made = data(source, targets, window_size=48, augmentation=Augmentation(elastic_sd=4.0, rotation=45.0))
    windows = [made.window((0, 0, number)) for number in range(20)]
    instances, classes = (torch.stack([window[key] for window in windows]) for key in ("instances", "classes"))
    is_beyond = instances == APART
    assert torch.equal(instances[~is_beyond].long(), classes[~is_beyond])
    assert 0.01 < is_beyond.float().mean() < 0.5
    one = data(source, targets, window_size=96).window((0, 0, 0))["instances"]  # larger than the image
    assert torch.equal(one != APART, F.pad(torch.ones(64, 64), (16,) * 4) > 0)


def test_generated_cells_are_a_source_without_files():
    made = data(SyntheticCells(num_images=3), Targets(label_format="instances", separate_borders=True), window_size=64)
    assert made.image_shape == (1, 64, 64)
    assert set(made.whole(0)["classes"].unique().tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be 0 or more"),
        ({"num_val": 5}, "num_val must be at least 1 and less than the 5 images, got 5"),
        ({"num_train": 5}, "num_train must be from 1 to 4"),
        ({"num_fit": 4}, "num_fit must be from 0 to 3, which leaves an image to train on, got 4"),
        ({"object_share": 1.5}, "object_share must be from 0 to 1, got 1.5"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        data(pairs(tmp_path), **options)


def test_no_image_is_kept_to_fit_thresholds_of_classes_which_have_none(tmp_path):
    classes = Targets(label_format="classes", num_classes=256)
    with pytest.raises(ValueError, match="num_fit must be 0 with label_format classes, which has no threshold, got 2"):
        data(pairs(tmp_path), classes, num_fit=2)
    assert data(pairs(tmp_path), classes).train_images.tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------ stretch, tiles


def test_stretch_maps_the_percentiles_to_the_ends_and_clips_nothing():
    image = torch.arange(1000, 2001, dtype=torch.int32).to(torch.uint16).reshape(1, 7, 143)
    stretched = to_float(image, stretch=True)
    expected = 2 * (np.arange(1000, 2001) - 1010) / 988 - 1  # also beyond the ends
    np.testing.assert_allclose(stretched.flatten().numpy(), expected, atol=1e-6)  # float32


def test_stretch_of_one_colour_is_no_division_by_zero():
    assert torch.isfinite(to_float(torch.full((1, 4, 4), 7, dtype=torch.uint8), stretch=True)).all()


def test_tiles_cover_the_image_at_the_size_of_its_pixels():
    image = torch.arange(11 * 9).reshape(1, 11, 9)
    tiles = cut(image, 4)
    assert tiles.shape == (9, 1, 4, 4)
    assert set(tiles.unique().tolist()) == set(range(99))


def test_tiles_of_a_folder_are_a_data_set(tmp_path):
    for i, size in enumerate([(16, 16), (16, 40), (20, 16)]):
        write(tmp_path / f"{i}.png", RNG.integers(256, size=size, dtype=np.uint8))
    made = ImageDataModule(Tiles(tmp_path, tile_size=16, channels=1), batch_size=2, num_val=1)
    made.setup()
    assert made.image_shape == (1, 16, 16)
    assert len(made.image_set.images) == 1 + 3 + 2
    first = ImageDataModule(Tiles(tmp_path, tile_size=16, channels=1, num_images=2), num_val=1)
    first.setup()
    assert len(first.image_set.images) == 4
    assert first.summary()[1:3] == [
        "left out: 1 images beyond num_images",
        "changed: 2 images are cut into 4 tiles, which overlap where they must",
    ]


def test_images_smaller_than_a_tile_are_listed(tmp_path):
    write(tmp_path / "a.png", np.zeros((15, 30), np.uint8))
    with pytest.raises(ValueError, match=r"a\.png: too small: 15x30, must be at least 16x16"):
        ImageDataModule(Tiles(tmp_path, tile_size=16)).setup()
