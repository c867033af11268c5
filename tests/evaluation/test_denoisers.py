"""What an evaluation says of samples: of a tiny denoiser, and of digits that are spoilt in known ways."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from denoisers import WIDTH, text_tokens
from PIL import Image
from torch import nn

import unet_diffusion as ud
from unet_diffusion.data import ImageDataModule, ImageSet, Source
from unet_diffusion.data.standard import Digits
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.evaluation import own_features as own
from unet_diffusion.evaluation import samples
from unet_diffusion.evaluation.denoisers import evaluate_denoiser
from unet_diffusion.evaluation.selections import of_data, of_images
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.sample_options import Sampling
from unet_diffusion.runtime.pictures import save_images
from unet_diffusion.runtime.pixel_values import PixelValues

FEW = Sampling(num_inference_steps=2, batch_size=8)


class Waves(Source):
    """60 images of waves, of any number of channels; two classes, or none."""

    def __init__(self, shape=(1, 8, 8), *, classes=True, captions=False):
        self._shape, self.classes, self.captions = shape, classes, captions

    def load(self, *, progress=True):
        generator = torch.Generator().manual_seed(0)
        channels, height, width = self._shape
        phase = torch.rand(60, channels, 1, 1, generator=generator) * 6
        labels = (torch.arange(60) % 3 == 0).long()  # 40 and 20
        across = torch.arange(width).expand(1, 1, height, width) * (1 + labels[:, None, None, None])
        images = ((torch.sin(across + phase) + 1) * 127.5).round().to(torch.uint8)
        entries = {"labels": labels} if self.classes else {}
        entries |= {"captions": [f"wave {i}" for i in range(60)]} if self.captions else {}
        return ImageSet(images, entries, ["slow", "fast"] if self.classes else None)


def waves(*arguments, **options):
    return ImageDataModule(Waves(*arguments, **options), num_val=20, num_workers=0)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setitem(own.SETTINGS, "num_steps", 3)


@pytest.fixture
def denoiser(tiny_unet):
    return Denoiser(tiny_unet(num_class_embeds=2), NoiseSchedule(10), (1, 8, 8), class_names=["slow", "fast"])


def evaluated(model, output, data=None, **options):
    options = {"num_images": 24, "sampling": FEW, **options}
    return evaluate_denoiser(model, data or waves(), output=output, **options)


def figures_of(evaluation):
    return json.loads(json.dumps({**evaluation.plain(), "protocol": None}))


def test_samples_of_a_denoiser_are_evaluated(few_steps, denoiser, tmp_path):
    evaluation = evaluated(denoiser, tmp_path, subject="waves")
    keys = {"fd", "kid", "precision", "recall", "density", "coverage", "fd_all", "class_agreement", "class_imbalance"}
    assert keys < set(evaluation.figures)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 24
    assert evaluation.protocol["samples"] == 24
    assert evaluation.protocol["held-out images"] == 20
    assert evaluation.protocol["features"].startswith("own: 64")
    assert (evaluation.protocol["scheduler"], evaluation.protocol["num_inference_steps"]) == (FEW.scheduler, 2)
    alone = {key for key, figure in evaluation.figures.items() if figure.real is None and not np.isnan(figure.value)}
    assert alone == {"fd_all", "class_imbalance"}  # of the first, real images are among those that it compares with
    assert "24 samples are compared with 36 training images" in evaluation.sections[0].about
    assert "20 held out and 4 training images" in evaluation.sections[0].about
    assert [section.title for section in evaluation.sections] == [
        "Are the samples like the real images?", "Are the classes right?", "Is it memorised?",
    ]  # fmt: skip
    evaluation.save(tmp_path)
    assert (tmp_path / "evaluation.html").stat().st_size > 10_000


def test_classes_are_drawn_as_often_as_there_are_training_images_of_them(few_steps, denoiser, tmp_path):
    data = waves()
    rows = evaluated(denoiser, tmp_path, data, num_images=40).tables["classes"].rows
    labels = data.entries["labels"][data.train_indices]
    assert [row[1] for row in rows] == [row[2] for row in rows] == torch.bincount(labels).tolist()


def test_evaluation_that_was_cut_off_goes_on_and_says_the_same(few_steps, denoiser, tmp_path, monkeypatch):
    whole = evaluated(denoiser, tmp_path / "whole")
    with monkeypatch.context() as patch:
        calls = []
        forward = type(denoiser.unet).forward

        def dies(self, *arguments, **inputs):
            calls.append(1)
            if len(calls) > 5:
                raise KeyboardInterrupt
            return forward(self, *arguments, **inputs)

        patch.setattr(type(denoiser.unet), "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluated(denoiser, tmp_path / "cut")
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "samples").glob("*.png")}
    assert 0 < len(there) < 24
    continued = evaluated(denoiser, tmp_path / "cut")
    assert figures_of(continued) == figures_of(whole)
    assert there.items() <= {path.name: path.stat().st_mtime_ns
                             for path in (tmp_path / "cut" / "samples").glob("*.png")}.items()  # fmt: skip
    again = evaluated(denoiser, tmp_path / "cut", num_images=30)  # six more, and the others are kept
    assert again.protocol["samples"] == 30
    assert len(list((tmp_path / "cut").glob("features-*"))) == 1


def test_samples_of_other_settings_are_replaced_only_when_asked(few_steps, denoiser, tmp_path, tiny_unet):
    evaluated(denoiser, tmp_path)
    with torch.no_grad():
        denoiser.unet.conv_out.bias += 0.5
    with pytest.raises(FileExistsError, match=r"samples of an evaluation.*other settings.*--overwrite"):
        evaluated(denoiser, tmp_path)
    with pytest.raises(FileExistsError, match="num_inference_steps: 2 there, 3 here"):
        evaluated(denoiser, tmp_path, sampling=Sampling(num_inference_steps=3))
    evaluated(denoiser, tmp_path, overwrite=True)


def test_samples_that_were_drawn_with_another_thresholding_are_refused(few_steps, denoiser, tmp_path):
    asked = Sampling(num_inference_steps=2, batch_size=8, thresholding=True)
    assert evaluated(denoiser, tmp_path, sampling=asked).protocol["thresholding"] is True
    with pytest.raises(FileExistsError, match="thresholding: True there, False here"):
        evaluated(denoiser, tmp_path)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12), (4, 8, 8)])
def test_images_of_any_kind_without_classes_are_evaluated(few_steps, tiny_unet, tmp_path, shape):
    channels = shape[0]
    denoiser = Denoiser(tiny_unet(in_channels=channels), NoiseSchedule(10), shape)
    evaluation = evaluated(denoiser, tmp_path, waves(shape, classes=False))
    assert "class_agreement" not in evaluation.figures
    assert evaluation.protocol["image size"] == "x".join(map(str, shape))


def test_data_of_another_range_of_values_than_the_model_are_refused(few_steps, denoiser, tmp_path):
    data = waves()
    data.source.values = PixelValues("uint16", 0, 4095)
    message = r"denoiser was trained on numbers of 0 to 255 as -1 to 1, and .* 0 to 4095; leave data.value_range out"
    with pytest.raises(ValueError, match=message):
        evaluated(denoiser, tmp_path, data)
    assert not (tmp_path / "samples").exists()


def test_data_that_measure_their_range_keep_that_of_the_model(few_steps, denoiser, tmp_path):
    class Measured(Waves):
        value_range = "measured"

        def load(self, *, progress=True):
            low, high = self.kept_range or (10, 20)
            self.values = PixelValues("float32", low, high)
            return super().load()

    data = ImageDataModule(Measured(), num_val=20, num_workers=0)
    few = {"num_images": 12, "sampling": FEW}
    assert ud.evaluate(denoiser, data, output=tmp_path, **few).protocol["held-out images"] == 20
    assert data.values.value_range == (denoiser.values.low, denoiser.values.high) == (0, 255)


def test_real_images_in_the_order_of_their_classes_are_as_good_as_in_any_other(few_steps, tmp_path):
    class Sorted(Waves):
        def load(self, *, progress=True):
            loaded = super().load()
            order = loaded.entries["labels"].argsort(stable=True)
            return ImageSet(loaded.images[order], {"labels": loaded.entries["labels"][order]}, loaded.class_names)

    data = ImageDataModule(Sorted(), num_val=20, num_workers=0)
    data.setup("fit")
    folder = tmp_path / "images"
    save_images(of_images(data.image_set.images).take(data.val_indices[::2].sort().values), folder)
    evaluation = evaluate_denoiser(folder, data, output=tmp_path / "out")
    assert evaluation.figures["fd"].real < 10 * max(evaluation.figures["fd"].value, 0.1)


def test_denoiser_of_captions_is_evaluated_with_those_of_the_data(few_steps, tiny_unet, tmp_path):
    unet = tiny_unet(context_dim=WIDTH, num_heads=2, attention_levels=[0])
    denoiser = Denoiser(unet, NoiseSchedule(10), (1, 8, 8), conditions=nn.ModuleList([text_tokens()]))
    evaluation = evaluated(denoiser, tmp_path, waves(classes=False, captions=True), num_images=12)
    assert evaluation.protocol["samples"] == 12


def test_captions_that_are_drawn_are_those_of_held_out_images():
    data = waves(classes=False, captions=True)
    data.setup("fit")
    drawn = samples._captions_to_draw(data, 0)
    assert sorted(drawn) == sorted(f"wave {i}" for i in data.val_indices.tolist())
    assert drawn != samples._captions_to_draw(data, 1)
    without = waves(classes=False)
    without.setup("fit")
    with pytest.raises(ValueError, match="the data must have captions"):
        samples._captions_to_draw(without, 0)


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (waves((1, 16, 16)), {}, "the size that the model draws, 1x8x8, and are 1x16x16; set data.image_size"),
        (waves(classes=False), {}, "the data must have the 2 classes .* have none; set data.class_labels"),
        (waves(), {"num_images": 5}, "num_images must be at least 10, got 5"),
        (waves(), {"features_weights": "x"}, "features_weights is for pretrained features"),
    ],
)
def test_what_does_not_fit_is_said(few_steps, denoiser, tmp_path, data, options, said):
    with pytest.raises(ValueError, match=said):
        evaluated(denoiser, tmp_path, data, **options)


def test_folder_of_images_of_anybody_is_evaluated_and_its_classes_are_folders(few_steps, tmp_path):
    data = waves()
    train, _ = of_data(data)
    for number, name in enumerate(["slow", "fast"]):
        save_images(train.take(torch.nonzero(train.labels == number)[:12, 0]), tmp_path / "images" / name)
    evaluation = evaluated(tmp_path / "images", tmp_path / "out", data)
    agreement = evaluation.figures["class_agreement"]
    assert agreement.value > 0.5
    margin = 1.96 * (agreement.value * (1 - agreement.value) / 24) ** 0.5  # of a share
    assert agreement.interval[1] - agreement.interval[0] == pytest.approx(2 * margin, rel=0.3)
    assert "classes" in [picture.key for picture in evaluation.sections[1].pictures]
    assert "scheduler" not in evaluation.protocol
    assert not (tmp_path / "out" / "samples").exists()


def test_folder_that_sample_left_is_refused_where_the_data_have_another_range(denoiser, tmp_path, run_cli):
    denoiser.values = PixelValues("uint16", 0, 4095)
    denoiser.save(tmp_path / "model.ckpt")
    status, _, err = run_cli("sample", tmp_path / "model.ckpt", "--num_images", 12, "--num_inference_steps", 1,
                             "--output", tmp_path / "drawn", "--device", "cpu")  # fmt: skip
    assert status == 0, err
    message = (
        r"the images in .*drawn were drawn with numbers of 0 to 4095 .* the data have 0 to 255; set .* to \[0, 4095\]"
    )
    with pytest.raises(ValueError, match=message):
        evaluate_denoiser(tmp_path / "drawn", waves(), output=tmp_path / "out")


def test_folder_that_sample_left_keeps_its_classes_and_leaves_out_the_grid(few_steps, denoiser, tmp_path, run_cli):
    denoiser.save(tmp_path / "model.ckpt")
    drawn = tmp_path / "drawn"
    arguments = ("--num_images=20", "--labels=fast", "--num_inference_steps=2", "--device=cpu", "--precision=float32")
    status, _, err = run_cli("sample", tmp_path / "model.ckpt", *arguments, "--output", drawn)
    assert status == 0, err
    assert (drawn / "grid.png").is_file()
    evaluation = evaluated(drawn, tmp_path / "out")
    assert evaluation.protocol["samples"] == 20
    assert [row[1] for row in evaluation.tables["classes"].rows] == [0, 20]


def test_images_of_another_size_are_scaled_to_that_of_the_data(few_steps, tmp_path):
    for i in range(12):
        pixels = np.random.default_rng(i).integers(256, size=(20, 30, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    evaluation = evaluated(tmp_path / "images", tmp_path / "out")
    assert evaluation.protocol["samples"] == 12
    assert "class_agreement" not in evaluation.figures  # nobody says what they are of


def test_too_few_images_are_refused(few_steps, tmp_path):
    save_images(torch.zeros(3, 1, 8, 8), tmp_path / "images")
    with pytest.raises(ValueError, match="must hold at least 10 images, got 3"):
        evaluated(tmp_path / "images", tmp_path / "out")


def test_latents_are_evaluated_as_the_images_of_their_autoencoder(few_steps, tmp_path, monkeypatch):
    data = waves(classes=False)
    data.setup("fit")

    class Doubling:
        def decode(self, x0):
            return x0 * 2

    monkeypatch.setattr(data.source, "on_device", lambda batch, generator: {"x0": batch["images"].float() / 1000})
    data.codec = Doubling()
    train, _ = of_data(data)
    expected = data.image_set.images[data.train_indices[:2]].float() / 500
    torch.testing.assert_close(train.take([0, 1]), expected)


def test_public_function_takes_paths_and_objects(few_steps, denoiser, tmp_path):
    denoiser.save(tmp_path / "model.ckpt")
    of_path = ud.evaluate(tmp_path / "model.ckpt", waves(), output=tmp_path / "a", num_images=12, sampling=FEW)
    of_object = ud.evaluate(denoiser, waves(), output=tmp_path / "b", num_images=12, sampling=FEW)
    assert of_path.subject == str(tmp_path / "model.ckpt")
    assert of_object.subject.startswith("Denoiser of 1 x 8 x 8 images")
    assert figures_of(of_path)["figures"] == figures_of(of_object)["figures"]
    with pytest.raises(FileNotFoundError, match="there is no model at"):
        ud.evaluate(tmp_path / "none", waves())


# --------------------------------------------------------------------------------- real digits, spoilt in known ways


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Evaluates 200 digits that were not trained on, after a function spoilt them."""
    folder = tmp_path_factory.mktemp("digits")
    data = ImageDataModule(Digits(), num_val=400)
    _, held_out = of_data(data)
    every_second = torch.arange(len(held_out)) % 2 == 0  # neighbours are of one writer
    good = held_out.select(torch.nonzero(every_second)[:, 0])
    data.val_indices = held_out.indices[~every_second]  # the other half of what is not trained on

    def evaluate(name, spoil):
        images, labels = spoil(torch.cat(list(good.batches())), good.labels)
        for number in labels.unique().tolist():
            save_images(images[labels == number], folder / name / str(number))
        return evaluate_denoiser(folder / name, data, output=folder, subject=name)

    evaluate.good = evaluate("good", lambda images, labels: (images, labels))
    return evaluate


def blurred(images, labels):
    return F.avg_pool2d(F.pad(images, [1] * 4, mode="replicate"), 3, 1), labels


def noisy(images, labels):
    return images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), labels


def collapsed(images, labels):
    return images[torch.arange(len(images)) % 20], labels[torch.arange(len(images)) % 20]


def without_threes(images, labels):
    rows = torch.nonzero(labels != 3)[:, 0]
    rows = rows[torch.arange(len(images)) % len(rows)]
    return images[rows], labels[rows]


@pytest.mark.slow
def test_good_digits_are_as_good_as_real_ones(digits):
    figures = digits.good.figures
    assert figures["fd"].value < 1.5 * figures["fd"].real
    assert figures["kid"].interval[0] < figures["kid"].real
    assert figures["precision"].value > 0.9 * figures["precision"].real
    assert figures["recall"].value > 0.9 * figures["recall"].real
    assert figures["class_agreement"].value > 0.9
    assert digits.good.warnings == []


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "falls", "stays"), [
    (noisy, ["precision", "density"], ["recall"]),
    (blurred, ["precision", "recall", "density", "coverage"], []),
    (collapsed, ["recall", "coverage"], ["precision", "class_agreement"]),
    (without_threes, ["recall", "coverage"], ["precision", "class_agreement"]),
])  # fmt: skip
def test_each_fault_moves_its_figures(digits, spoil, falls, stays):
    evaluation = digits(spoil.__name__, spoil)
    figures, good = evaluation.figures, digits.good.figures
    assert figures["fd"].value > 1.3 * good["fd"].value
    assert figures["kid"].value > good["kid"].value + 0.01
    for key in falls:
        assert figures[key].value < good[key].value - 0.03, key
    for key in stays:
        assert figures[key].value > 0.9 * good[key].value, key


@pytest.mark.slow
def test_missing_class_is_named(digits):
    evaluation = digits("missing", without_threes)
    assert any("hardly any samples of 3," in warning for warning in evaluation.warnings)
    assert evaluation.tables["classes"].rows[3][1] == 0
    assert evaluation.figures["class_imbalance"].value > digits.good.figures["class_imbalance"].value + 0.03
