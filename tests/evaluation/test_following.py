"""Samples are drawn for the conditions of held-out images, and the evaluation says whether they follow them.

The denoisers here follow perfectly, or not at all, so that figures are known without them.
"""

import json

import numpy as np
import pytest
import torch
from denoisers import WIDTH, Vectors, text_tokens
from skimage.metrics import peak_signal_noise_ratio
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate
from torchmetrics.classification import BinaryJaccardIndex, MulticlassJaccardIndex

import unet_diffusion as ud
from unet_diffusion.data import ImageDataModule, ImageSet, Source
from unet_diffusion.diffusion.conditions.box_tokens import BoxTokens
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.evaluation import own_features as own
from unet_diffusion.evaluation.denoisers import evaluate_denoiser
from unet_diffusion.evaluation.following import following_section
from unet_diffusion.evaluation.following_scores import boxes_hit, filled_with_mean, others_of_another_kind
from unet_diffusion.evaluation.held_out import HeldOutConditions
from unet_diffusion.evaluation.image_quality import psnr
from unet_diffusion.evaluation.judge import Judge
from unet_diffusion.evaluation.scores_of_counts import mean_iou_of
from unet_diffusion.evaluation.selections import of_data, of_images
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.sample_options import Sampling
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.latents.codec import Codec
from unet_diffusion.models.segmentation_unet import SegmentationUNet
from unet_diffusion.training import DiffusionModule
from unet_diffusion.training.evaluating import EvaluateSamples

SIDE, NUM, NUM_VAL = 16, 60, 20
FEW = Sampling(num_inference_steps=2, batch_size=8)
PAIR = {"in_channels": 2, "out_channels": 1}


class Boxes(Source):
    """60 images of a bright box somewhere on dark noise; their negatives, boxes and maps are known of them."""

    def __init__(self, *known, classes=False):
        self.known, self.classes = known, classes

    def load(self, *, progress=True):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 40, size=(NUM, 1, SIDE, SIDE), dtype=np.uint8)
        maps, boxes = np.zeros_like(images), []
        for image, one in zip(images, maps, strict=True):
            width, height = rng.integers(5, 10, size=2)
            left, top = rng.integers(SIDE - width + 1), rng.integers(SIDE - height + 1)
            image[0, top : top + height, left : left + width] += 200
            one[0, top : top + height, left : left + width] = 1
            boxes.append(json.dumps([["box", int(left), int(top), int(width), int(height)]]))
        known = {
            "paired_image": torch.from_numpy(255 - images),
            "semantic_map": torch.from_numpy(maps),
            "boxes": boxes,
            "captions": [f"a red cat {number}" for number in range(NUM)],
            "labels": torch.arange(NUM) % 2,
        }
        names = ["even", "odd"] if self.classes else None
        return ImageSet(torch.from_numpy(images), {key: known[key] for key in self.known}, names)


def data_of(*known, **options):
    return ImageDataModule(Boxes(*known, **options), num_val=NUM_VAL, num_workers=0)


class Halving(Codec):
    """Latents are the means of 2 x 2 pixels."""

    def __init__(self):
        self.config = {}

    def sample_shape(self, image_shape):
        return image_shape[0], image_shape[1] // 2, image_shape[2] // 2

    def image_shape(self, sample_shape):
        return sample_shape[0], sample_shape[1] * 2, sample_shape[2] * 2

    def encode(self, images, generator=None):
        return avg_pool2d(images, 2)

    def decode(self, x0):
        return interpolate(x0, scale_factor=2).float().cpu()


def denoiser_of(unet, *conditions, predict, codec=None, **options):
    """A denoiser whose network predicts the x0 that a function makes of its inputs."""
    unet.forward = lambda x, t, **inputs: predict(x, inputs)
    codec = {} if codec is None else {"codec": codec}
    shape = (1, SIDE // 2, SIDE // 2) if codec else (1, SIDE, SIDE)
    schedule = NoiseSchedule(50, prediction_type="sample")
    return Denoiser(unet, schedule, shape, conditions=nn.ModuleList(conditions), **codec, **options)


def follows(unet):
    """A denoiser of paired images that draws exactly the image whose negative it is shown."""
    return denoiser_of(unet, PairedImage(1), predict=lambda x, inputs: -inputs["concat"])


def ignores(unet):
    return denoiser_of(unet, PairedImage(1), predict=lambda x, inputs: torch.zeros_like(x))


def held_out_of(denoiser, data, seed=0):
    data.setup("fit")
    return HeldOutConditions(denoiser, data, Sampling(num_inference_steps=2, seed=seed))


def real_images(held_out, count=NUM_VAL):
    whole = of_data(held_out.data)[1]
    return whole.read(held_out.numbers_of(range(count)).tolist())


class Thresholded(Segmenter):
    """Takes the bright pixels for the foreground."""

    def maps(self, image, **options):
        is_bright = (image.mean(dim=0) > 0).float()
        return torch.stack([1 - is_bright, is_bright])


def segmenter(kind="binary", names=("background", "box"), channels=1):
    unet = SegmentationUNet(channels, len(names), channels=(4, 8), padding="same")
    return Thresholded(unet, kind, list(names), None, False, SIDE)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setitem(own.SETTINGS, "num_steps", 3)


def evaluated(denoiser, data, output, **options):
    return evaluate_denoiser(denoiser, data, output=output, **{"num_images": 24, "sampling": FEW, **options})


# --------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("kinds", [torch.arange(7), torch.arange(30) % 3, torch.tensor([0] * 5 + [1] * 3 + [2] * 2)])
def test_each_image_has_a_partner_of_another_kind_and_no_partner_serves_twice(kinds):
    places, others = others_of_another_kind(kinds)
    assert places.tolist() == list(range(len(kinds)))
    assert sorted(others.tolist()) == places.tolist()
    assert (kinds[places] != kinds[others]).all()


def test_images_of_a_kind_of_more_than_half_are_left_out_where_partners_are_of_their_own_kind():
    assert len(others_of_another_kind(torch.tensor([0] * 8 + [1] * 2))[0]) == 4  # two of each kind, for one another
    assert others_of_another_kind(torch.zeros(5, dtype=torch.int64))[0].tolist() == []


def test_psnr_within_a_mask_is_that_of_its_pixels():
    images = torch.rand(3, 2, 8, 8) * 2 - 1
    mask = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:5, 1:7] = True
    other = (images + torch.where(mask, 0.05 * torch.randn(images.shape), torch.tensor(9.0))).clamp(-1, 1)
    expected = [
        peak_signal_noise_ratio(one[:, 2:5, 1:7].numpy(), two[:, 2:5, 1:7].numpy(), data_range=2)
        for one, two in zip(images, other, strict=True)
    ]
    np.testing.assert_allclose(psnr(images, other, mask), expected, rtol=1e-5)
    assert psnr(images, other, torch.zeros_like(mask)).isnan().all()


def test_hole_is_filled_with_the_mean_of_the_rest():
    images, mask = torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[:, :, :4] = True
    filled = filled_with_mean(images, mask)
    assert torch.equal(filled[:, :, 4:], images[:, :, 4:])
    torch.testing.assert_close(
        filled[:, :, :4], images[:, :, 4:].mean(dim=(2, 3))[..., None, None].expand(-1, -1, 4, 8)
    )


def test_box_is_hit_from_an_iou_of_a_half():
    objects = np.zeros((20, 20), dtype=np.int32)
    objects[2:8, 4:10] = 1  # 6 x 6 pixels
    objects[3:7, 5:9] = 0  # a hole, which the box around it covers
    objects[15:18, 15:18] = 2
    shifted = [4, 4, 10, 10]  # two pixels down: 24 of 48
    missed = [4, 5, 10, 11]  # three pixels: 18 of 54
    hits = boxes_hit(objects, [[4, 2, 10, 8], shifted, missed, [15, 15, 18, 18], [0, 0, 20, 20]])
    assert hits.tolist() == [True, True, False, True, False]
    assert boxes_hit(np.zeros((4, 4), dtype=np.int32), [[0, 0, 4, 4]]).tolist() == [False]
    assert boxes_hit(objects, []).tolist() == []


# ------------------------------------------------------------------------------------------------------------ figures


def test_paired_image_is_followed_by_a_denoiser_that_draws_the_partner(few_steps, tiny_unet, tmp_path):
    evaluation = evaluated(follows(tiny_unet(**PAIR)), data_of("paired_image"), tmp_path)
    assert {"fd", "kid", "precision", "recall", "paired_image_psnr"} < set(evaluation.figures)
    figure = evaluation.figures["paired_image_psnr"]
    assert figure.value == pytest.approx(100)  # the most there is: no pixel differs
    assert figure.beside["shuffled"] < 20
    assert evaluation.warnings == []
    titles = [section.title for section in evaluation.sections]
    assert titles[:2] == ["Are the samples like the real images?", "Does it follow its condition?"]
    assert evaluation.protocol["drawn for"] == f"what is known of {NUM_VAL} held-out images, by turns"
    evaluation.save(tmp_path)
    stored = json.loads((tmp_path / "evaluation.json").read_text())["figures"]["paired_image_psnr"]
    assert stored["beside"] == figure.beside
    page = (tmp_path / "evaluation.html").read_text()
    assert "shuffled: " in page
    assert "paired image, real image, drawn image, from left to right" in page
    assert "shuffled: " in str(evaluation)


def test_figures_of_paired_images_are_those_of_another_library(tiny_unet):
    held_out = held_out_of(follows(tiny_unet(**PAIR)), data_of("paired_image"))
    real = real_images(held_out)
    drawn = (real + 0.1 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    (figure,) = following_section(of_images(drawn), held_out).figures
    places, others = others_of_another_kind(torch.arange(NUM_VAL))
    expected = peak_signal_noise_ratio(real.numpy(), drawn.numpy(), data_range=2)
    of_others = peak_signal_noise_ratio(real[others].numpy(), drawn[places].numpy(), data_range=2)
    assert figure.value == pytest.approx(expected, rel=1e-5)
    assert figure.beside["shuffled"] == pytest.approx(of_others, rel=1e-5)


def test_more_samples_of_the_same_held_out_images_do_not_narrow_the_interval(tiny_unet):
    held_out = held_out_of(follows(tiny_unet(**PAIR)), data_of("paired_image"))
    real = real_images(held_out)
    drawn = (real + 0.1 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    (few,), (many,) = (
        following_section(of_images(images), held_out).figures for images in (drawn, drawn.repeat(5, 1, 1, 1))
    )
    assert many.value == pytest.approx(few.value)
    assert many.interval == pytest.approx(few.interval)


def test_partners_are_of_another_class_only_where_the_held_out_images_have_several(tiny_unet):
    def section_of(data):
        held_out = held_out_of(ignores(tiny_unet(**PAIR)), data)
        return following_section(of_images(torch.zeros(NUM_VAL, 1, SIDE, SIDE)), held_out)

    data = data_of("paired_image", "labels", classes=True)
    assert "of another image, of another class;" in section_of(data).about
    data.val_indices = torch.nonzero(data.entries["labels"] == 0)[:NUM_VAL, 0]  # the rest have two classes
    section = section_of(data)
    assert "of another image;" in section.about
    assert "shuffled" in section.figures[0].beside
    assert section.warnings
    data.val_indices = data.val_indices[:1]
    section = section_of(data)
    assert "Nothing is shuffled, as all samples are drawn for the same held-out image" in section.about
    assert (section.figures[0].beside, section.warnings) == ({}, [])


def test_denoiser_that_ignores_its_condition_is_warned_of(few_steps, tiny_unet, tmp_path):
    evaluation = evaluated(ignores(tiny_unet(**PAIR)), data_of("paired_image"), tmp_path)
    figure = evaluation.figures["paired_image_psnr"]
    assert figure.value == pytest.approx(figure.beside["shuffled"], abs=0.5)
    assert any("do not follow the paired image measurably" in warning for warning in evaluation.warnings)


def test_hole_is_compared_inside_and_the_rest_is_pasted(tiny_unet):
    unet = tiny_unet(in_channels=3, out_channels=1)
    denoiser = denoiser_of(unet, MaskedImage(2), predict=lambda x, inputs: torch.zeros_like(x))
    held_out = held_out_of(denoiser, data_of())
    batch = held_out.batch(range(NUM_VAL))
    shares = batch["mask"].mean(dim=(1, 2, 3))
    assert shares.max() < 1  # something of each image is left
    drawn = held_out.draw(range(NUM_VAL)).clamp(-1, 1)
    is_hole = batch["mask"] == 1
    torch.testing.assert_close(drawn, torch.where(is_hole, 0.0, batch["images"]))
    (figure,) = following_section(of_images(drawn), held_out).figures
    errors = [image[mask].square().mean() for image, mask in zip(batch["images"], is_hole, strict=True)]
    assert figure.value == pytest.approx(10 * np.log10(4 / np.mean(errors)), rel=1e-5)
    rest = [(image[mask] - image[~mask].mean()).square().mean()
            for image, mask in zip(batch["images"], is_hole, strict=True)]  # fmt: skip
    expected = 10 * np.log10(4 / np.mean(rest))
    assert figure.beside["mean of the rest"] == pytest.approx(expected, rel=1e-5)


def test_hole_that_is_filled_without_a_look_at_the_rest_is_warned_of(tiny_unet):
    unet = tiny_unet(in_channels=3, out_channels=1)
    denoiser = denoiser_of(unet, MaskedImage(2), predict=lambda x, inputs: torch.full_like(x, -0.6))
    held_out = held_out_of(denoiser, data_of())
    batch = held_out.batch(range(NUM_VAL))
    section = following_section(of_images(held_out.draw(range(NUM_VAL)).clamp(-1, 1)), held_out)
    places, others = others_of_another_kind(torch.arange(NUM_VAL))
    errors = [
        (-0.6 - batch["images"][other][batch["mask"][place] == 1]).square().mean()
        for place, other in zip(places, others, strict=True)
    ]
    expected = 10 * np.log10(4 / np.mean(errors))
    assert section.figures[0].beside["shuffled"] == pytest.approx(expected, rel=1e-5)
    assert any("do not follow the masked image measurably" in warning for warning in section.warnings)


def test_pair_beside_a_mask_is_compared_in_the_hole_alone(tiny_unet):
    unet = tiny_unet(in_channels=4, out_channels=1)
    denoiser = denoiser_of(unet, MaskedImage(2), PairedImage(1), predict=lambda x, inputs: torch.zeros_like(x))
    held_out = held_out_of(denoiser, data_of("paired_image"))
    section = following_section(of_images(held_out.draw(range(NUM_VAL)).clamp(-1, 1)), held_out)
    of_mask, of_pair = section.figures
    assert of_pair.value == pytest.approx(of_mask.value)  # what is pasted would raise it
    assert "PSNR is that in the hole of the mask" in section.about


def test_small_image_of_a_codec_is_enlarged_at_the_noise_level_of_sample(few_steps, tiny_unet, tmp_path):
    unet = tiny_unet(in_channels=2, out_channels=1, num_class_embeds=1000)
    seen = []

    def predict(x, inputs):
        seen.append(inputs["labels"])
        return inputs["concat"]

    denoiser = denoiser_of(unet, LowResolution(1), predict=predict, codec=Halving())
    evaluation = evaluated(denoiser, data_of(), tmp_path)
    assert torch.cat(seen).unique().tolist() == [20]
    figure = evaluation.figures["small_image_psnr"]
    assert figure.beside["shuffled"] + 3 < figure.value < figure.beside["bicubic"]  # pixels are repeated


def test_small_image_of_pixels_that_is_only_enlarged_is_as_good_as_bicubic_interpolation(
    few_steps, tiny_unet, tmp_path
):
    condition = LowResolution(1, noise=False, scale_factor=2)
    denoiser = denoiser_of(tiny_unet(**PAIR), condition, predict=lambda x, inputs: inputs["concat"])
    figure = evaluated(denoiser, data_of(), tmp_path, num_images=NUM_VAL).figures["small_image_psnr"]
    assert figure.value == pytest.approx(figure.beside["bicubic"], abs=0.02)  # samples are of 8 bits
    assert figure.beside["shuffled"] + 3 < figure.value
    held_out = held_out_of(denoiser, data_of())
    (figure,) = following_section(of_images(held_out.draw(range(5)).clamp(-1, 1)), held_out).figures
    assert figure.value == pytest.approx(figure.beside["bicubic"], rel=1e-5)  # of the same five images


def test_map_is_compared_with_what_a_segmenter_sees(few_steps, tiny_unet, tmp_path):
    unet = tiny_unet(in_channels=3, out_channels=1)
    condition = SemanticMap(2, label_format="0/1")
    denoiser = denoiser_of(unet, condition, predict=lambda x, inputs: inputs["concat"][:, 1:] * 2 - 1)
    figures = evaluated(denoiser, data_of("semantic_map"), tmp_path, segmenter=segmenter()).figures
    figure = figures["semantic_map_iou"]
    assert (figure.value, figure.real) == (1, 1)
    held_out = held_out_of(denoiser, data_of("semantic_map"))
    maps = held_out.batch(range(24))["semantic_map"]
    places, others = others_of_another_kind(torch.arange(24) % NUM_VAL)
    assert figure.beside["shuffled"] == pytest.approx(float(BinaryJaccardIndex()(maps[places], maps[others])), rel=1e-5)


def test_without_a_segmenter_the_evaluation_says_what_it_lacks(few_steps, tiny_unet, tmp_path):
    unet = tiny_unet(in_channels=3, out_channels=1)
    denoiser = denoiser_of(unet, SemanticMap(2, label_format="0/1"), predict=lambda x, inputs: torch.zeros_like(x))
    evaluation = evaluated(denoiser, data_of("semantic_map"), tmp_path)
    assert np.isnan(evaluation.figures["semantic_map_iou"].value)
    assert "Left out, as it needs a segmenter of such images: give --segmenter RUN" in str(evaluation)


def test_classes_of_a_map_count_alike_and_unknown_pixels_do_not(tiny_unet):
    condition = SemanticMap(3, 3, ignore_label=255)
    denoiser = denoiser_of(tiny_unet(in_channels=4, out_channels=1), condition, predict=lambda x, inputs: x)
    generator = torch.Generator().manual_seed(0)
    labels, seen = (torch.randint(high, (5, 1, 8, 8), generator=generator) for high in (4, 3))
    labels[labels == 3] = 255
    judge = Judge(segmenter("classes", ("sky", "sea", "sand")), denoiser)

    class Seen:
        def __init__(self, classes):
            self.classes = classes.numpy().astype(np.uint8)

    counts = judge.counts_of_maps([Seen(one[0]) for one in seen], condition, condition.encoder.entry_of(labels))
    expected = MulticlassJaccardIndex(3, ignore_index=255)(seen, labels)
    assert float(mean_iou_of(counts.sum(axis=0))) == pytest.approx(float(expected), rel=1e-5)


def box_denoiser(unet):
    condition = BoxTokens(WIDTH, 1, max_boxes=2, num_layers=1, num_heads=2)
    return denoiser_of(unet, condition, predict=lambda x, inputs: torch.zeros_like(x))


@pytest.mark.parametrize("kind", ["binary", "classes"])
def test_boxes_are_hit_by_objects_that_lie_in_them(tiny_unet, kind):
    unet = tiny_unet(context_dim=WIDTH, num_heads=2, attention_levels=[0])
    denoiser = box_denoiser(unet)
    held_out = held_out_of(denoiser, data_of("boxes"))
    judge = Judge(segmenter(kind), denoiser)
    real = real_images(held_out)
    real[:5] = -1  # without an object
    section = following_section(of_images(real), held_out, judge)
    figure = section.figures[0]
    assert (figure.value, figure.real) == (0.75, 1)
    assert figure.beside["shuffled"] < 0.5
    assert ("as what the box names" in figure.remark) == (kind == "classes")


def test_segmenter_that_sees_nothing_is_warned_of_and_not_the_samples(tiny_unet):
    denoiser = box_denoiser(tiny_unet(context_dim=WIDTH, num_heads=2, attention_levels=[0]))
    held_out = held_out_of(denoiser, data_of("boxes"))
    judge = Judge(segmenter(), denoiser)
    judge.segmenter.maps = lambda image, **options: torch.stack([torch.ones_like(image[0]), image[0] * 0])
    section = following_section(of_images(real_images(held_out)), held_out, judge)
    assert section.figures[0].value == section.figures[0].real == 0
    (warning,) = section.warnings
    assert "says nothing of the samples: it is 0 for real images" in warning
    assert "Either the segmenter does not see the boxes in such images" in warning


def test_objects_of_another_name_do_not_hit_a_box(tiny_unet):
    denoiser = box_denoiser(tiny_unet(context_dim=WIDTH, num_heads=2, attention_levels=[0]))
    held_out = held_out_of(denoiser, data_of("boxes"))
    judge = Judge(segmenter("classes", ("background", "other", "box")), denoiser)
    judge.segmenter.maps = lambda image, **options: torch.stack(
        [(image[0] <= 0).float(), (image[0] > 0).float(), torch.zeros_like(image[0])]
    )
    assert following_section(of_images(real_images(held_out)), held_out, judge).figures[0].value == 0


# ---------------------------------------------------------------------------------------------------- what is drawn for


def test_two_conditions_and_the_class_are_of_the_same_held_out_image(few_steps, tiny_unet, tmp_path):
    unet = tiny_unet(in_channels=4, out_channels=1, num_class_embeds=2)
    seen = []

    def predict(x, inputs):
        seen.append(inputs)
        return -inputs["concat"][:, 2:]

    conditions = SemanticMap(2, label_format="0/1"), PairedImage(1)
    denoiser = denoiser_of(unet, *conditions, predict=predict, class_names=["even", "odd"])
    data = data_of("semantic_map", "paired_image", "labels", classes=True)
    evaluation = evaluated(denoiser, data, tmp_path, segmenter=segmenter())
    figures = evaluation.figures
    assert (figures["semantic_map_iou"].value, figures["paired_image_psnr"].value) == (1, pytest.approx(100))
    assert "shuffled" in figures["class_agreement"].beside
    held_out = held_out_of(denoiser, data)
    numbers = held_out.numbers_of(range(8))
    drawn = next(inputs for inputs in seen if len(inputs["labels"]) == 8)
    assert torch.equal(drawn["labels"], numbers % 2)
    assert torch.equal(drawn["concat"][:, 1], held_out.batch(range(8))["semantic_map"][:, 0].float())
    assert sorted(held_out.numbers.tolist()) == sorted(data.val_indices.tolist())
    assert held_out_of(denoiser, data, seed=1).numbers.tolist() != held_out.numbers.tolist()
    drawn_classes = [row[1] for row in evaluation.tables["classes"].rows]
    assert drawn_classes == torch.bincount(held_out.numbers_of(range(24)) % 2).tolist()


def test_captions_beside_a_pair_are_those_of_the_image_and_maps_of_ones_own_have_no_figure(
    few_steps, tiny_unet, tmp_path
):
    unet = tiny_unet(**PAIR, context_dim=WIDTH, num_heads=2, attention_levels=[0])
    denoiser = denoiser_of(unet, text_tokens(), PairedImage(1), predict=lambda x, inputs: -inputs["concat"])
    held_out = held_out_of(denoiser, data_of("captions", "paired_image"))
    evaluation = evaluated(denoiser, data_of("captions", "paired_image"), tmp_path)
    assert evaluation.figures["paired_image_psnr"].value == pytest.approx(100)
    batch = held_out.batch([0, 1])
    captions = [f"a red cat {number}" for number in held_out.numbers_of([0, 1]).tolist()]
    assert torch.equal(batch["captions"], denoiser.condition(type(denoiser.conditions[0])).token_ids(captions))

    class Maps(Boxes):
        def load(self, *, progress=True):
            loaded = super().load()
            loaded.entries["concat"] = loaded.images.float() / 255
            return loaded

    own_maps = denoiser_of(tiny_unet(**PAIR), Concat(1), predict=lambda x, inputs: inputs["concat"] * 2 - 1)
    data = ImageDataModule(Maps(), num_val=NUM_VAL, num_workers=0)
    found = evaluated(own_maps, data, tmp_path / "own")
    assert "There is no figure for concat." in found.sections[1].about
    drawn = held_out_of(own_maps, data).draw(range(4))
    torch.testing.assert_close(drawn, real_images(held_out_of(own_maps, data), 4))


def test_evaluation_that_was_cut_off_goes_on_and_other_conditions_are_refused(few_steps, tiny_unet, tmp_path):
    def found(output, data, **options):
        return evaluated(follows(tiny_unet(**PAIR)), data, output, **options).plain()["figures"]

    whole = found(tmp_path / "whole", data_of("paired_image"))
    assert found(tmp_path / "cut", data_of("paired_image"), num_images=13) != whole
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "samples").glob("*.png")}
    assert found(tmp_path / "cut", data_of("paired_image")) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in there.items())

    class Brighter(Boxes):
        def load(self, *, progress=True):
            loaded = super().load()
            loaded.entries["paired_image"] += 1
            return loaded

    data = ImageDataModule(Brighter("paired_image"), num_val=NUM_VAL, num_workers=0)
    with pytest.raises(FileExistsError, match=r"samples of an evaluation.*other settings"):
        found(tmp_path / "cut", data)


def test_samples_in_training_are_drawn_for_held_out_images_too(few_steps, tiny_unet, quiet_trainer, monkeypatch):
    made, drawn = [], []

    class Recording(HeldOutConditions):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def draw(self, rows, progress=None):
            drawn.append(super().draw(rows, progress))
            return drawn[-1]

    monkeypatch.setattr("unet_diffusion.evaluation.samples.HeldOutConditions", Recording)
    monkeypatch.setattr("unet_diffusion.training.evaluating.MOST_SHARE", 1.0)
    schedule = NoiseSchedule(50, "squaredcos_cap_v2")
    module = DiffusionModule(tiny_unet(**PAIR), schedule, conditions=[PairedImage(1)])
    evaluate = EvaluateSamples(2, num_images=12, num_inference_steps=2)
    trainer = quiet_trainer(max_steps=4, callbacks=[evaluate], limit_val_batches=0)
    trainer.fit(module, data_of("paired_image"))
    assert trainer.callback_metrics["eval/fd"] > 0
    assert len(made) == 1  # the data are read and checked once
    first, second = drawn
    assert not torch.equal(first, second)  # the averaged network goes on


@pytest.mark.parametrize(("thresholding", "expected"), [(False, 1.7), (True, 1.0)])
def test_samples_keep_their_range_when_it_is_asked_for(tiny_unet, thresholding, expected):
    denoiser = denoiser_of(tiny_unet(**PAIR), PairedImage(1), predict=lambda x, inputs: torch.full_like(x, 1.7))
    data = data_of("paired_image")
    data.setup("fit")
    sampling = Sampling("DPMSolverMultistepScheduler", num_inference_steps=3, thresholding=thresholding)
    drawn = HeldOutConditions(denoiser, data, sampling).draw(range(4))
    torch.testing.assert_close(drawn, torch.full((4, 1, SIDE, SIDE), expected))


def test_conditions_are_encoded_batch_by_batch(tiny_unet):
    class Counting(Halving):
        sizes = ()

        def encode(self, images, generator=None):
            self.sizes += (len(images),)
            return super().encode(images)

    codec = Counting()
    denoiser = denoiser_of(tiny_unet(**PAIR), PairedImage(1), predict=lambda x, inputs: -inputs["concat"], codec=codec)
    data = data_of("paired_image")
    data.setup("fit")
    held_out = HeldOutConditions(denoiser, data, FEW)
    codec.sizes = ()
    drawn = held_out.draw(range(NUM_VAL))
    assert codec.sizes == (8, 8, 4)
    torch.testing.assert_close(drawn, Halving().decode(avg_pool2d(real_images(held_out), 2)))


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (PairedImage(1), "the data must give numbers as 'paired_image', which the condition PairedImage reads"),
        (SemanticMap(1, label_format="0/1"), "the data must give numbers as 'semantic_map'"),
        (Vectors(), "the data must give numbers as 'feature'"),
    ],
)
def test_data_that_lack_what_a_condition_reads_are_refused(tiny_unet, tmp_path, condition, message):
    with pytest.raises(ValueError, match=message):
        evaluated(denoiser_of(tiny_unet(**PAIR), condition, predict=None), data_of(), tmp_path)
    assert not (tmp_path / "samples").exists()


def test_data_without_boxes_are_refused(tiny_unet, tmp_path):
    denoiser = box_denoiser(tiny_unet(context_dim=WIDTH, num_heads=2, attention_levels=[0]))
    with pytest.raises(ValueError, match=r"conditioned on boxes, and the data have none; set data\.boxes"):
        evaluated(denoiser, data_of(), tmp_path)


def test_latents_do_not_do_for_a_condition_that_needs_images(tiny_unet):
    unet = tiny_unet(in_channels=3, out_channels=1)
    denoiser = denoiser_of(unet, MaskedImage(2), predict=lambda x, inputs: torch.zeros_like(x))
    data = data_of()
    data.setup("fit")
    data.codec = Halving()
    with pytest.raises(ValueError, match="MaskedImage needs images, and the data hold latents; give the images"):
        HeldOutConditions(denoiser, data, FEW)


def test_guidance_without_a_null_is_refused_before_work_starts(tiny_unet, tmp_path):
    denoiser = denoiser_of(tiny_unet(**PAIR), PairedImage(1, dropout=0), predict=None)
    with pytest.raises(ValueError, match="guidance_scale"):
        evaluated(denoiser, data_of("paired_image"), tmp_path, sampling=Sampling(guidance_scale=2.0))
    sampling = Sampling("EulerDiscreteScheduler", thresholding=True)
    with pytest.raises(ValueError, match="thresholding needs a scheduler that can clip x0, got EulerDiscreteScheduler"):
        evaluated(denoiser, data_of("paired_image"), tmp_path, sampling=sampling)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluated(denoiser, data_of("paired_image"), tmp_path, sampling=Sampling(batch_size=0))
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("judging", "message"),
    [
        (segmenter(channels=3), "must take images of 1 channels, as the denoiser draws, and takes 3"),
        (segmenter("classes"), "must see foreground and background, as the maps have the label_format 0/1"),
    ],
)
def test_segmenter_of_other_images_is_refused(tiny_unet, tmp_path, judging, message):
    unet = tiny_unet(in_channels=3, out_channels=1)
    denoiser = denoiser_of(unet, SemanticMap(2, label_format="0/1"), predict=None)
    with pytest.raises(ValueError, match=message):
        evaluated(denoiser, data_of("semantic_map"), tmp_path, segmenter=judging)


def test_segmenter_of_other_classes_or_without_use_is_refused(tiny_unet, tmp_path):
    denoiser = denoiser_of(tiny_unet(in_channels=4, out_channels=1), SemanticMap(3, 3), predict=None)
    with pytest.raises(
        ValueError, match="must see the 3 classes of the maps, in their order, and sees background, box"
    ):
        Judge(segmenter("classes"), denoiser)
    with pytest.raises(ValueError, match="judges semantic maps and boxes, and this denoiser draws by neither"):
        Judge(segmenter(), follows(tiny_unet(**PAIR)))
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"judges the samples of a denoiser, and .*images is none; leave it out"):
        ud.evaluate(tmp_path / "images", data_of(), output=tmp_path, segmenter=segmenter())
