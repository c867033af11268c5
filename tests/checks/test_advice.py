"""Each advice is given for a plan that deserves it, and none for one that does not."""

import math

import pytest
from plans import plan

from unet_diffusion.checks.advice import advice

DESERVED = {  # changes of a good plan, and a part of the advice
    "batch norm with batches of one": {"has_batch_norm": True, "batch_size": 1},
    "learning rate of 0.1 is high for AdamW": {"learning_rate": 0.1},
    "learning rate of 1e-06 is low for AdamW": {"learning_rate": 1.0e-6},
    "of 2e-05 is low for AdamW at 4096 images": {"learning_rate": 2.0e-5, "images_a_step": 4096, "num_steps": 2000},
    "learning rate of 0.1 is high for SGD": {"learning_rate": 0.1, "optimizer": "SGD", "momentum": 0.99},
    "over 100 steps, and the run has 50": {"num_steps": 50, "num_train": 300, "ema_decay": 0.9, "task": "autoencode"},
    "each image is shown 1.6 times, 16,000 in all": {"num_steps": 500, "ema_decay": 0.99},
    "each image is shown 6,400 times": {"num_train": 100},
    "averages over about 100,000 steps, and the run has 20,000": {"ema_decay": 0.99999},
    "the mean of a 256x256 image is still 2.6 times": {"last_snr": 4.0e-5, "image_shape": (3, 256, 256)},
    "digits are mirrored": {"class_names": [str(digit) for digit in range(10)]},
    "of directions or signs": {"captions": ["left arrow", "a red heart"]},
    "never left out in training": {"can_be_guided": False},
    "with only 4 validation images the loss is mostly chance": {"num_val": 4},
    "200,000 images are shown in all": {"num_steps": 6250},
}
NOT_DESERVED = [
    {},
    {"has_batch_norm": True},
    {"batch_size": 1},
    {"learning_rate": 1.0e-3, "optimizer": "SGD", "momentum": 0.9},
    {"learning_rate": 5.0e-3, "images_a_step": 256},
    {"learning_rate": 1.0, "optimizer": "Prodigy"},
    {"learning_rate": 1.0e-2, "optimizer": "Adafactor"},
    {"num_steps": math.inf},
    {"num_train": 10_000_000},  # shown less than once, and yet many images
    {"num_train": 300},
    {"ema_decay": 0.0},
    {"last_snr": 4.0e-5, "image_shape": (3, 64, 64)},
    {"last_snr": 0.0, "image_shape": (3, 512, 512)},
    {"class_names": ["cat", "dog"]},
    {"class_names": [str(digit) for digit in range(10)], "horizontal_flip": False},
    {"captions": ["a leftover", "a red heart"]},
    {"captions": ["left arrow"], "horizontal_flip": False},
    {"can_be_guided": True},
    {"num_val": 4, "task": "segment"},
    {"num_steps": 6250, "task": "autoencode"},
]


@pytest.mark.parametrize("words", DESERVED)
def test_advice_is_given_where_it_is_deserved(words):
    (finding,) = advice(plan(**DESERVED[words]))
    assert words in finding.text
    assert finding.option


@pytest.mark.parametrize("changes", NOT_DESERVED, ids=str)
def test_no_advice_is_given_where_none_is_deserved(changes):
    assert advice(plan(**changes)) == []


@pytest.mark.parametrize(("changes", "rate"), [
    ({"images_a_step": 16}, "2.0e-04"),
    ({"images_a_step": 64}, "4.0e-04"),
    ({"optimizer": "SGD", "momentum": 0.9}, "1.0e-02"),
])  # fmt: skip
def test_the_rate_that_is_advised_is_one_of_the_optimiser_and_needs_no_advice(changes, rate):
    (finding,) = advice(plan(learning_rate=10.0, **changes))
    assert finding.option.startswith(f"--model.optimizer.lr {rate}")
    assert advice(plan(learning_rate=float(rate), **changes)) == []


def test_digits_of_torchvision_are_digits_too():
    names = ["0 - zero", "1 - one", "2 - two", "3 - three", "4 - four", "5 - five", "6 - six", "7 - seven"]
    assert advice(plan(class_names=[*names, "8 - eight", "9 - nine"]))
