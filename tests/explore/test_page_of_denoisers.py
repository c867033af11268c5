"""The page of denoisers in a real browser: each tab, on digits, captions, latents and images of two channels."""

import shlex
import shutil
import time

import numpy as np
import pytest
import torch
from denoisers import inpainter, text_denoiser, text_tokens, upscaler
from PIL import Image

from unet_diffusion.data import Digits, ImageDataModule
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.explore.runs import Run
from unet_diffusion.explore.views import in_rows, picture
from unet_diffusion.inference.loading import load
from unet_diffusion.inference.record import save_denoiser
from unet_diffusion.runtime.pictures import read_images

pytestmark = pytest.mark.slow


@pytest.fixture
def digits(digits_run, run_of):
    return run_of(digits_run, ImageDataModule(Digits(), num_val=20, seed=0))


def test_classes_of_a_seed_are_drawn_as_by_sample_and_the_command_draws_the_same(visit, digits, run_cli, tmp_path):
    visitor = visit(digits)
    visitor.choose("labels", "3")
    visitor.set_number("seed", 7)
    visitor.set_number("num_images", 4)
    visitor.set_number("steps", 6)
    visitor.press("Draw")
    visitor.status("4 images in")
    images = digits.model.sample(4, labels=[3], seed=7, num_inference_steps=6, batch_size=4)
    assert np.array_equal(visitor.picture("drawn_0"), np.asarray(picture(images)))
    visitor.press("Command line")
    program, *words = shlex.split(visitor.code())
    assert program == "unet-diffusion"
    words[words.index("generated")] = str(tmp_path / "generated")
    assert run_cli(*words, "--device", "cpu")[0] == 0
    assert torch.equal(
        read_images(sorted((tmp_path / "generated").glob("0*.png"))), read_images(_saved(images, tmp_path))
    )


def test_images_form_step_by_step(visit, digits):
    visitor = visit(digits)
    visitor.window.evaluate(
        """() => {
            window.lines = []; window.sources = new Set();
            new MutationObserver(() => {
                window.lines.push(document.querySelector('.status').innerText);
                window.sources.add(document.querySelector('#drawn_0 img')?.src);
            }).observe(document.body, {childList: true, subtree: true, characterData: true, attributes: true});
        }"""
    )
    visitor.set_number("steps", 100)
    visitor.set_number("num_images", 64)
    visitor.press("Draw")
    visitor.status("64 images in")
    lines = visitor.window.evaluate("window.lines")
    steps = [int(line.split("step ")[1].split(" of 100")[0]) for line in lines if " of 100, timestep" in line]
    assert len(set(steps)) > 3
    assert steps == sorted(steps)
    assert visitor.window.evaluate("window.sources.size") > 3  # x0 as it forms


@pytest.fixture
def slow_digits(digits):
    """The digits, whose network takes a tenth of a second more; and its calls."""
    calls = []

    def slow(module, inputs):
        calls.append(1)
        time.sleep(0.1)

    hook = digits.model.unet.register_forward_pre_hook(slow)
    yield digits, calls
    hook.remove()


def test_long_work_can_be_stopped_and_the_network_rests_then(visit, slow_digits):
    digits, calls = slow_digits
    visitor = visit(digits)
    visitor.set_number("steps", 250)
    visitor.press("Draw")
    visitor.status("step ")
    visitor.press("Stop")
    visitor.status("Stopped.")
    visitor.window.wait_for_timeout(500)
    num_calls = len(calls)
    visitor.window.wait_for_timeout(1000)
    assert len(calls) == num_calls < 250
    visitor.set_number("steps", 2)
    visitor.press("Draw")  # the page is as before
    visitor.status("images in")


def test_who_presses_again_gets_the_new_request(visit, slow_digits):
    digits, calls = slow_digits
    visitor = visit(digits)
    visitor.set_number("steps", 200)
    visitor.press("Draw")
    visitor.status("of 200")
    visitor.press("Stop")
    visitor.set_number("steps", 7)
    visitor.set_number("num_images", 2)
    visitor.press("Draw")
    visitor.status("2 images in")
    assert len(calls) < 150
    expected = digits.model.sample(2, num_inference_steps=7, batch_size=2)
    assert np.array_equal(visitor.picture("drawn_0"), np.asarray(picture(expected)))


def test_who_waits_for_a_turn_can_give_it_up(visit, slow_digits):
    digits, calls = slow_digits
    first, second = visit(digits, visitors=2)
    first.set_number("steps", 30)
    second.set_number("steps", 200)
    first.press("Draw")
    first.status("step ")
    second.press("Draw")
    second.window.wait_for_timeout(300)
    second.press("Stop")
    first.status("images in")
    second.status("Stopped.")
    assert len(calls) < 60


def test_a_window_that_is_closed_ends_its_work_and_others_go_on(visit, slow_digits):
    digits, calls = slow_digits
    first, second = visit(digits, visitors=2)
    first.set_number("steps", 250)
    first.press("Draw")
    first.status("step ")
    first.window.close()
    second.set_number("steps", 3)
    second.press("Draw")
    second.status("images in")
    assert len(calls) < 250


def test_two_visitors_at_once_get_their_own_images(visit, digits):
    visitors = visit(digits, visitors=2)
    for seed, visitor in enumerate(visitors):
        visitor.set_number("seed", seed)
        visitor.set_number("num_images", 3)
        visitor.set_number("steps", 40)
    for visitor in visitors:
        visitor.press("Draw")
    for seed, visitor in enumerate(visitors):
        visitor.status("3 images in")
        expected = picture(digits.model.sample(3, seed=seed, num_inference_steps=40, batch_size=3))
        assert np.array_equal(visitor.picture("drawn_0"), np.asarray(expected))


def test_guidance_and_its_interval_reach_the_images_and_the_command(visit, digits):
    visitor = visit(digits)
    visitor.set_number("num_images", 2)
    visitor.set_number("steps", 5)
    visitor.set_number("guidance", 3)
    visitor.window.get_by_text("Guide only some timesteps").click()
    visitor.window.get_by_label("number input for To timestep").fill("400")
    visitor.window.keyboard.press("Tab")
    visitor.press("Draw")
    visitor.status("2 images in")
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "guidance_interval": (0, 400), "batch_size": 2}
    assert np.array_equal(visitor.picture("drawn_0"), np.asarray(picture(digits.model.sample(2, **options))))
    visitor.press("Command line")
    assert "--guidance_scale 3.0 --guidance_interval 0 400" in visitor.code()


def test_an_upload_is_painted_into_and_the_rest_stays(visit, digits, tmp_path):
    image = digits.model.sample(1, labels=5, seed=3)
    path = _saved(image, tmp_path)[0]
    visitor = visit(digits)
    visitor.set_number("num_images", 1)
    visitor.set_number("steps", 5)
    visitor.open_tab("From an image")
    visitor.upload(path)
    _paint(visitor)
    visitor.press("Draw from it")
    visitor.status("1 images in")
    drawn, given = (
        part[2:-2, 2:-2] for part in (visitor.picture("from_image"), np.asarray(picture(read_images([path]))))
    )
    same = (drawn == given).all(2)[6::12, 6::12]  # pixels of 8 x 8 are squares of 12 x 12
    assert 40 < same.sum() < 64  # the brush is wider than a pixel of 8 x 8
    visitor.press("Command line")
    assert "--image image.png --mask mask.png" in visitor.code()
    visitor.window.locator(".file-preview a", has_text="").nth(1).wait_for()
    assert {"image.png", "mask.png"} <= set(visitor.downloads())


def test_an_upload_that_is_no_image_gets_a_message_with_its_name(visit, digits, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    visitor = visit(digits)
    visitor.open_tab("From an image")
    visitor.press("Draw from it")
    visitor.status("an image must be given")
    visitor.upload(tmp_path / "notes.png")
    toast = visitor.window.locator(".toast-body", has_text="notes.png")
    toast.wait_for(timeout=60_000)
    assert "/tmp" not in toast.inner_text()
    visitor.press("Draw from it")
    assert "gradio" not in visitor.status("notes.png cannot be read")


def test_frames_lead_from_one_seed_to_another(visit, digits):
    visitor = visit(digits)
    visitor.open_tab("Interpolate")
    visitor.press("Interpolate")
    visitor.status("interpolate draws a single class")
    visitor.choose("labels", "8")
    visitor.set_number("steps", 4)
    visitor.press("Interpolate")
    visitor.status("12 images in")
    expected = digits.model.sample(12, labels=[8], interpolate=(0, 1), num_inference_steps=4, batch_size=12)
    assert np.array_equal(visitor.picture("frames"), np.asarray(picture(expected)))


def test_checkpoints_draw_the_same_images_over_training(visit, digits):
    visitor = visit(digits)
    visitor.set_number("num_images", 3)
    visitor.set_number("steps", 3)
    visitor.open_tab("Over training")
    assert len(visitor.pictures("drawn_in_training")) == 2
    visitor.press("Draw with each checkpoint")
    visitor.status("3 images in")
    rows = {
        f"step {step}": load(path).sample(3, num_inference_steps=3, batch_size=3)
        for step, path in digits.checkpoints.items()
    }
    visitor.window.wait_for_timeout(3000)  # there are two checkpoints
    assert list(rows) == ["step 2", "step 4"]
    assert np.array_equal(visitor.picture("strip"), np.asarray(in_rows(rows)))


def test_nearest_curves_evaluation_and_configuration(visit, digits_run, run_of, tmp_path):
    run = run_of(shutil.copytree(digits_run, tmp_path / "run"), ImageDataModule(Digits(), num_val=20, seed=0))
    other = run_of(shutil.copytree(digits_run, tmp_path / "other"))
    (other.folder / "config.yaml").write_text("of: the other run")
    (run.folder / "evaluation").mkdir()
    page = "<h1>Good digits</h1><script>document.title = 'run'</script><img src='http://example.invalid/p.png'>"
    (run.folder / "evaluation" / "evaluation.html").write_text(page)
    visitor = visit(run, other)  # which fails if anything is fetched
    visitor.set_number("steps", 2)
    visitor.open_tab("Nearest")
    visitor.press("Draw and compare")
    visitor.picture("nearest_images")
    assert "Held-out images" in visitor.window.locator("text=Distance to the nearest").inner_text()
    visitor.open_tab("Curves")
    visitor.press("Read again")
    assert visitor.picture("plots").std() > 10
    visitor.open_tab("Evaluation")
    visitor.window.frame_locator("#evaluation_page iframe").get_by_role("heading", name="Good digits").wait_for()
    visitor.choose("which", other.name)
    visitor.window.locator("text=There is no evaluation yet").wait_for(timeout=60_000)
    visitor.open_tab("Configuration")
    text = visitor.window.locator("#configuration_text")
    text.filter(has_text="of: the other run").wait_for(timeout=60_000)
    visitor.choose("which", run.name)
    text.filter(has_text="seed_everything").wait_for(timeout=60_000)


def test_masks_are_filled_and_small_images_enlarged(visit, run_of, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    for make, button in ((inpainter, "Fill"), (upscaler, "Enlarge")):
        model = make(tmp_path / make.__name__)
        visitor = visit(Run(tmp_path / make.__name__, model, lambda path: path, lambda: None))
        visitor.set_number("num_images", 1)
        visitor.set_number("steps", 2)
        visitor.upload(tmp_path / "i.png")
        if make is inpainter:
            visitor.press(button)
            visitor.status("some of the image must be painted over")
            _paint(visitor)
        visitor.press(button)
        visitor.status("1 images in")
        assert visitor.picture("from_image").std() > 0


def test_runs_side_by_side_draw_from_the_same_seed(visit, digits, run_of):
    other = run_of(digits.checkpoints[2])
    visitor = visit(digits, other)
    visitor.set_number("num_images", 2)
    visitor.set_number("steps", 3)
    visitor.press("Draw")
    visitor.status("2 images in")
    visitor.window.wait_for_timeout(1000)
    visitor.status("2 images in")
    for number, run in enumerate((digits, other)):
        expected = picture(run.model.sample(2, num_inference_steps=3, batch_size=2))
        assert np.array_equal(visitor.picture(f"drawn_{number}"), np.asarray(expected))


def test_captions_and_latents_are_drawn_and_words_are_looked_for(visit, run_of, tmp_path):
    save_denoiser(text_denoiser(tmp_path), tmp_path / "text.ckpt")
    run = run_of(tmp_path / "text.ckpt")
    visitor = visit(run)
    visitor.window.locator("#captions textarea").fill("red heart\n\nface")
    visitor.set_number("num_images", 2)
    visitor.set_number("steps", 3)
    visitor.press("Draw")
    visitor.status("2 images in")
    options = {"captions": ["red heart", "face"], "num_inference_steps": 3, "batch_size": 2}
    assert np.array_equal(visitor.picture("drawn_0"), np.asarray(picture(run.model.sample(2, **options))))
    visitor.open_tab("Attention")
    visitor.press("Draw and look")
    visitor.window.locator("#words .caption-label", has_text="heart").first.wait_for(timeout=60_000)
    labels = visitor.window.locator("#words .grid-container .caption-label").all_inner_texts()
    assert labels == ["image", "red", "heart"]


def test_a_map_is_dropped_into_the_form_for_a_denoiser_that_draws_from_maps(visit, run_of, tmp_path):
    torch.manual_seed(0)
    conditions = [text_tokens(), SemanticMap(2, num_classes=2, downsampling=2)]
    denoiser = text_denoiser(tmp_path, conditions=conditions, in_channels=6, out_channels=4)
    save_denoiser(denoiser, tmp_path / "maps.ckpt")
    Image.fromarray((np.arange(256).reshape(16, 16) % 2).astype(np.uint8)).save(tmp_path / "map.png")
    run = run_of(tmp_path / "maps.ckpt")
    visitor = visit(run)
    visitor.set_number("num_images", 2)
    visitor.set_number("steps", 3)
    visitor.press("Draw")
    visitor.status("give semantic_map")
    visitor.window.locator("#option_semantic_map input[type=file]").set_input_files(str(tmp_path / "map.png"))
    visitor.window.locator("#option_semantic_map .file-preview").wait_for(timeout=60_000)
    visitor.press("Draw")
    visitor.status("2 images in")
    options = {"conditions": {"semantic_map": str(tmp_path / "map.png")}, "captions": [""], "num_inference_steps": 3}
    assert np.array_equal(visitor.picture("drawn_0"), np.asarray(picture(run.model.sample(2, **options, batch_size=2))))
    visitor.press("Command line")
    assert "--condition semantic_map=map.png" in visitor.code()


def test_images_of_two_channels_are_shown_channel_by_channel(
    visit, run_of, tiny_module, tiny_images, quiet_trainer, tmp_path
):
    torch.manual_seed(0)
    module = tiny_module(unet=_unet_of_two_channels())
    quiet_trainer(max_steps=1).fit(module, tiny_images(class_names=None, shape=(2, 8, 8)))
    module.trained.save(tmp_path / "two.ckpt")
    visitor = visit(run_of(tmp_path / "two.ckpt"))
    assert visitor.window.get_by_role("tab", name="From an image").count() == 0  # which nobody can drop
    visitor.set_number("num_images", 3)
    visitor.press("Draw")
    visitor.status("3 images in")
    height, width, _ = visitor.picture("drawn_0").shape
    assert width < height  # three rows of two channels


def _paint(visitor):
    """Paint a short stroke a little above the middle of the uploaded image."""
    canvas = visitor.window.locator("#editor canvas").first
    canvas.wait_for(timeout=60_000)
    visitor.window.wait_for_timeout(2000)  # the canvas is laid out
    box = canvas.bounding_box()
    middle = box["y"] + box["height"] * 0.45
    visitor.window.mouse.move(box["x"] + box["width"] * 0.5, middle)
    visitor.window.mouse.down()
    visitor.window.mouse.move(box["x"] + box["width"] * 0.52, middle, steps=4)
    visitor.window.mouse.up()
    visitor.window.wait_for_timeout(1000)


def _unet_of_two_channels():
    from unet_diffusion.models.denoiser_unet import DenoiserUNet

    return DenoiserUNet(2, [8, 16], layers_per_block=1, norm_num_groups=4)


def _saved(images, folder):
    from unet_diffusion.runtime.pictures import save_images

    return save_images(images, folder / "expected")
