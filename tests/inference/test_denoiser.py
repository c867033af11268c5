"""What a user holds: a denoiser that was loaded draws what our sampler draws, and comes back as it was saved."""

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image

import unet_diffusion as ud
from unet_diffusion.commands.sample import sample_images
from unet_diffusion.diffusion.image_to_image import InitImage
from unet_diffusion.inference.sample_options import SampleOptions
from unet_diffusion.inference.segmenter import Segmenter

SCHEDULE = ud.NoiseSchedule(100, "squaredcos_cap_v2", prediction_type="v_prediction")


@pytest.fixture
def denoiser(tiny_unet) -> ud.Denoiser:
    """Of 8x8 grey images of two classes, with weights that make a difference."""
    unet = tiny_unet(num_class_embeds=3).eval()
    torch.manual_seed(1)
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return ud.Denoiser(unet, SCHEDULE, (1, 8, 8), null_label=2, class_names=["cat", "dog"])


def test_names_and_numbers_of_classes_are_drawn_in_turn(denoiser):
    images = denoiser.sample(3, labels=["dog", 0], guidance_scale=2.0, num_inference_steps=3, seed=5)
    labels = {"labels": torch.tensor([1, 0, 1])}
    expected = ud.sample(
        denoiser.unet, SCHEDULE, (3, 1, 8, 8), scheduler="DPMSolverMultistepScheduler", num_inference_steps=3, seed=5,
        inputs=labels, unconditional={"labels": torch.full((3,), 2)}, guidance=ud.Guidance(2.0),
    )  # fmt: skip
    assert torch.equal(images, expected)


def test_images_are_numbered_whatever_is_drawn_of_them(denoiser):
    options = {"num_inference_steps": 2, "seed": 3}
    images = denoiser.sample(4, **options)
    torch.testing.assert_close(denoiser.sample(4, indices=[3, 1], **options), images[[3, 1]])


def test_labels_are_numbers_of_any_kind(denoiser):
    expected = denoiser.sample(2, labels=[1, 0], num_inference_steps=2)
    for labels in (torch.tensor([1, 0]), np.array([1, 0]), [np.int64(1), np.int64(0)]):
        assert torch.equal(denoiser.sample(2, labels=labels, num_inference_steps=2), expected)


def test_one_number_is_both_sides(denoiser):
    square = denoiser.sample(image_size=16, num_inference_steps=2)
    assert torch.equal(square, denoiser.sample(image_size=(16, 16), num_inference_steps=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": [5]}, r"indices must be from 0 to 0, got \[5\]; raise num_images"),
        ({"labels": []}, "labels must hold at least one class"),
        ({"image_size": (8, 8, 8)}, "image_size must be a height and a width"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"seed": 1.7}, "seed must be a whole number, got 1.7"),
        ({"window": (8, 8)}, "window must be a whole number"),
    ],
)
def test_odd_arguments_get_a_sentence(denoiser, options, message):
    with pytest.raises(ValueError, match=message):
        denoiser.sample(**options)


def test_scheduler_object_keeps_its_solver_and_takes_our_schedule(denoiser):
    by_name = denoiser.sample(2, scheduler="DPMSolverMultistepScheduler", num_inference_steps=4)
    same = denoiser.sample(2, scheduler=DPMSolverMultistepScheduler(beta_end=0.5), num_inference_steps=4)
    assert torch.equal(same, by_name)
    first_order = denoiser.sample(2, scheduler=DPMSolverMultistepScheduler(solver_order=1), num_inference_steps=4)
    assert (first_order - by_name).abs().max() > 1e-3
    euler = denoiser.sample(2, scheduler=EulerDiscreteScheduler(), num_inference_steps=4)
    assert torch.equal(euler, denoiser.sample(2, scheduler="EulerDiscreteScheduler", num_inference_steps=4))
    with pytest.raises(ValueError, match=r"scheduler must be one of DDIMScheduler, .*, got 'float'"):
        denoiser.sample(2, scheduler=0.5)


@pytest.mark.parametrize("form", ["path", "array", "pil", "tensor"])
def test_image_to_start_from_may_have_any_form(denoiser, tmp_path, form):
    pixels = np.random.default_rng(0).integers(256, size=(8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    tensor = torch.from_numpy(pixels)[None].float() / 127.5 - 1
    forms = {"path": tmp_path / "image.png", "array": pixels, "pil": Image.fromarray(pixels), "tensor": tensor}
    options = {"labels": 1, "num_inference_steps": 4, "scheduler": "DDIMScheduler"}
    images = denoiser.sample(2, image=forms[form], strength=0.5, **options)
    expected = ud.sample(
        denoiser.unet, SCHEDULE, (2, 1, 8, 8), num_inference_steps=4, inputs={"labels": torch.tensor([1, 1])},
        init_image=InitImage(tensor[None], 0.5),
    )  # fmt: skip
    torch.testing.assert_close(images, expected)


def test_mask_keeps_what_is_black(denoiser):
    image, mask = torch.linspace(-1, 1, 64).view(1, 8, 8), np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = 255
    images = denoiser.sample(2, image=image, mask=mask, num_inference_steps=3)
    assert torch.equal(images[..., :4], image[None, ..., :4].expand(2, -1, -1, -1))
    assert not torch.equal(images[..., 4:], image[None, ..., 4:].expand(2, -1, -1, -1))


def test_saved_denoiser_comes_back_and_is_not_written_over(denoiser, tmp_path):
    denoiser.save(tmp_path / "denoiser.ckpt")
    again = ud.load(tmp_path / "denoiser.ckpt")
    assert torch.equal(again.sample(2, num_inference_steps=2), denoiser.sample(2, num_inference_steps=2))
    assert repr(again) == repr(denoiser)
    with pytest.raises(FileExistsError, match=r"denoiser\.ckpt exists and is not overwritten"):
        denoiser.save(tmp_path / "denoiser.ckpt")


def test_exported_folder_is_loaded_as_the_same_denoiser(tiny_unet, tmp_path):
    denoiser = ud.Denoiser(tiny_unet().eval(), SCHEDULE, (1, 8, 8))
    denoiser.export(tmp_path / "pipeline")
    again = ud.load(tmp_path / "pipeline")
    torch.testing.assert_close(again.sample(2, num_inference_steps=2), denoiser.sample(2, num_inference_steps=2))


def test_saved_segmenter_comes_back_and_segments_files_arrays_and_tensors_alike(tmp_path):
    unet = ud.SegmentationUNet(1, 2, channels=(4, 8), padding="same").eval()
    segmenter = Segmenter(unet, "binary", ["background", "cell"], None, False, 32)
    segmenter.save(tmp_path / "cells.ckpt")
    again = ud.load(tmp_path / "cells.ckpt")
    pixels = np.random.default_rng(0).integers(256, size=(40, 50), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    tensor = torch.from_numpy(pixels)[None].float() / 127.5 - 1
    results = [again.segment(one) for one in (tmp_path / "image.png", pixels, Image.fromarray(pixels), tensor)]
    expected = segmenter.segment(tensor)
    assert expected.probabilities.shape == (2, 40, 50)
    for result in results:
        np.testing.assert_array_equal(result.probabilities, expected.probabilities)
        np.testing.assert_array_equal(result.classes, np.where(expected.probabilities[0] < 0.5, 255, 0))
    with pytest.raises(ValueError, match=r"must be \(1, H, W\), got \(3, 8, 8\)"):
        again.segment(torch.zeros(3, 8, 8))
    with pytest.raises(FileNotFoundError, match=r"there is none at none\.png"):
        again.segment("none.png")
    for wrong, message in ((tensor * 255, "must be in"), (torch.from_numpy(pixels)[None], "must hold floats in")):
        with pytest.raises(ValueError, match=f"^image as a tensor {message}"):
            again.segment(wrong)
    with pytest.raises(ValueError, match=r"must be \(1, H, W\), got \(1, 0, 8\)"):
        again.segment(torch.zeros(1, 0, 8))


REFUSED = {
    "trained without captions": {"captions": "a cat"},
    "numbers from 0 to 1, got 'bird'": {"labels": ["cat", "bird"]},
    "strength needs an image": {"strength": 0.5},
    "the next size that fits is 8 10": {"image_size": (8, 9)},
    "num_images must be at least 1, got 0": {"num_images": 0},
    "trained without moon": {"conditions": {"moon": 1}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(denoiser, message):
    with pytest.raises(ValueError, match=message):
        denoiser.sample(**{"num_images": 2, **REFUSED[message]})


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model at"):
        ud.load(tmp_path)


def test_sample_and_the_command_have_every_option():
    wanted = {option.name: option.default for option in fields(SampleOptions)}
    parameters = inspect.signature(ud.Denoiser.sample).parameters
    assert {name: parameters[name].default for name in wanted} == wanted
    assert wanted.keys() - {"conditions"} <= inspect.signature(sample_images).parameters.keys()
