"""What the page is made of, without a browser: live work, requests and their commands, attention, pictures, runs."""

import copy
import csv
import shlex
import time
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from denoisers import WIDTH, inpainter, text_denoiser, text_tokens, upscaler
from torch.nn.functional import scaled_dot_product_attention

from unet_diffusion.commands import explore as command
from unet_diffusion.commands.parsing import parsed
from unet_diffusion.data import Digits, Folder, ImageDataModule
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.explore.attention import has_words, word_maps
from unet_diffusion.explore.components import StopFlag, message_of
from unet_diffusion.explore.live import Previews, StoppedError, live
from unet_diffusion.explore.nearest import TrainingPixels
from unet_diffusion.explore.page import check_alike, page_of
from unet_diffusion.explore.request_form import sample_command
from unet_diffusion.explore.runs import Run
from unet_diffusion.explore.views import curves, heat_over, in_rows, picture
from unet_diffusion.inference.sample_options import SampleOptions
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.segmentation_unet import SegmentationUNet


def result_of(generator):
    said = []
    while True:
        try:
            said.append(next(generator))
        except StopIteration as end:
            return said, end.value


# -------------------------------------------------------------------------------------------------------------- live


def test_work_says_things_in_order_and_returns():
    def work(say):
        for number in range(5):
            say({"number": number})
            time.sleep(0.02)
        return "done"

    said, result = result_of(live(work))
    numbers = [update["number"] for update in said if update]
    assert result == "done"
    assert numbers == sorted(numbers)
    assert numbers[-1] == 4


def test_updates_that_nobody_has_fetched_yet_are_merged():
    is_asked = Event()

    def work(say):
        say({"status": 1, "picture": "first"})
        is_asked.wait()
        say({"status": 2, "picture": "second"})
        say({"status": 3})

    generator = live(work)
    while next(generator) != {"status": 1, "picture": "first"}:
        pass
    is_asked.set()
    time.sleep(0.2)
    assert next(generator) == {"status": 3, "picture": "second"}
    assert list(generator) == []


def test_an_error_of_the_work_comes_through():
    def work(say):
        say({"status": 1})
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        list(live(work))


def test_work_ends_when_nobody_listens_and_only_then_other_work_begins():
    events, slow_step = [], Event()

    def endless(say):
        try:
            while True:
                say({"status": 1})
                slow_step.wait()
        except StoppedError:
            events.append("ended")
            raise

    generator = live(endless)
    next(generator)
    generator.close()
    assert events == []  # who closes does not wait for a slow step
    slow_step.set()
    list(live(lambda say: events.append("other")))
    assert events == ["ended", "other"]


def test_previews_take_a_fifth_of_the_time():
    previews, began, in_previews = Previews(), time.perf_counter(), 0.0
    while time.perf_counter() - began < 1.5:
        if previews.make(lambda: time.sleep(0.05) or True):
            in_previews += 0.05
        time.sleep(0.005)
    assert in_previews <= 0.25 * (time.perf_counter() - began)
    assert in_previews > 0


def test_each_visitor_has_a_stop_flag_of_their_own():
    flag = StopFlag()
    other = copy.deepcopy(flag)
    flag.set()
    assert not other.is_set()


# ------------------------------------------------------------------------------------------------ requests and commands


def test_the_command_of_a_request_is_read_back_as_the_request(tmp_path):
    options = SampleOptions(
        num_images=3,
        labels=[0, 7],
        captions=["red heart", "it's", "-not an option"],
        seed=5,
        num_inference_steps=7,
        guidance_scale=2.5,
        guidance_interval=(0, 50),
        interpolate=(5, 9),
        conditions={"age": "34"},
        batch_size=3,
    )
    run = Run(tmp_path / "a run", None, None, None, {"device": "cpu", "autoencoder": tmp_path / "kl"})
    line = sample_command(run, options, image="my image.png")
    program, name, *words = shlex.split(line)
    assert (program, name) == ("unet-diffusion", "sample")
    values = parsed("sample", words)[1]
    assert values["labels"] == ["0", "7"]
    assert values["condition"] == ["age=34"]
    assert str(values["image"]) == "my image.png"
    assert (values["device"], values["autoencoder"]) == ("cpu", tmp_path / "kl")
    for option in ("num_images", "captions", "seed", "num_inference_steps", "guidance_scale", "scheduler"):
        assert values[option] == getattr(options, option)
    for option in ("guidance_interval", "interpolate"):
        assert tuple(values[option]) == getattr(options, option)


@pytest.mark.parametrize("folder", ["uploads", "link"])
def test_messages_name_an_upload_as_the_visitor_did(tmp_path, monkeypatch, folder):
    (tmp_path / "uploads").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "uploads")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / folder))
    for place in (tmp_path / folder, (tmp_path / folder).resolve()):
        error = ValueError(f"image {place}/0a1b2c/my cells.png cannot be read")
        assert message_of(error) == "image my cells.png cannot be read"


def test_an_error_that_was_not_foreseen_is_logged_with_its_traceback(caplog):
    with pytest.raises(KeyError) as raised:
        raise KeyError("x")
    assert "not foreseen" in message_of(raised.value)
    assert "Traceback" in caplog.text


# ---------------------------------------------------------------------------------------------------------- attention


def test_maps_of_words_are_the_probabilities_of_attention(tmp_path):
    denoiser = text_denoiser(tmp_path, layers_per_block=1)
    denoiser.unet.eval()
    options = SampleOptions(captions="red heart", num_inference_steps=1, scheduler="DDIMScheduler")
    layers = [module for module in denoiser.unet.modules() if type(module).__name__ == "TransformerBlock"]
    seen = []

    def look(block, inputs):
        tokens, context = inputs
        normed = block.norm1(tokens)
        tokens = tokens + block.attn1(normed, normed)
        layer, heads = block.attn2, block.attn2.num_heads
        q = layer.to_q(block.norm2(tokens)).unflatten(2, (heads, -1)).transpose(1, 2)
        k = layer.to_k(context).unflatten(2, (heads, -1)).transpose(1, 2)
        eye = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
        seen.append(scaled_dot_product_attention(q, k, eye)[0].mean(0))  # (pixels, tokens)

    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    with torch.no_grad():
        denoiser.sample(1, captions="red heart", num_inference_steps=1, scheduler="DDIMScheduler")
    for hook in hooks:
        hook.remove()
    maps = word_maps(denoiser, options)
    assert maps.words == ["red", "heart"]
    size = denoiser.sample_shape[1:]
    spread = []
    for probabilities in seen:
        side = round(len(probabilities) ** 0.5)
        level = probabilities.T.reshape(1, -1, side, side)
        spread.append(torch.nn.functional.interpolate(level, size, mode="bilinear")[0])
    expected = torch.stack(spread).mean(0)
    lengths = [text_tokens().num_tokens([word])[0] - 2 for word in ("red", "heart")]
    first = slice(1, 1 + lengths[0])
    second = slice(1 + lengths[0], 1 + sum(lengths))
    torch.testing.assert_close(maps.maps, torch.stack([expected[first].mean(0), expected[second].mean(0)]))
    torch.testing.assert_close(maps.image[None], denoiser.sample(1, captions="red heart", num_inference_steps=1,
                                                                 scheduler="DDIMScheduler"))  # fmt: skip


def test_guidance_does_not_change_which_prediction_is_looked_at(tmp_path):
    denoiser = text_denoiser(tmp_path)
    one_step = {"captions": "red heart", "num_inference_steps": 1, "scheduler": "DDIMScheduler"}
    plain = word_maps(denoiser, SampleOptions(**one_step))
    guided = word_maps(denoiser, SampleOptions(**one_step, guidance_scale=4.0))
    torch.testing.assert_close(plain.maps, guided.maps)


def test_words_are_found_behind_the_tokens_of_other_conditions(tmp_path):
    torch.manual_seed(0)
    denoiser = text_denoiser(tmp_path, conditions=[ClassTokens(WIDTH, 3), text_tokens()])
    options = SampleOptions(captions="red heart", num_inference_steps=1)
    with_class = word_maps(denoiser, options)
    assert with_class.words == ["red", "heart"]
    assert with_class.maps.shape == (2, *denoiser.sample_shape[1:])


def test_words_behind_the_cut_are_left_out(tmp_path):
    maps = word_maps(text_denoiser(tmp_path), SampleOptions(captions="red " * 40, num_inference_steps=1))
    assert 0 < len(maps.words) < 12
    with pytest.raises(ValueError, match="must have a word"):
        word_maps(text_denoiser(tmp_path / "other"), SampleOptions(captions=" ", num_inference_steps=1))


def test_denoisers_without_captions_have_no_words(digits_run, run_of):
    assert not has_words(run_of(digits_run).model)


# ------------------------------------------------------------------------------------------------- pictures and runs


def test_other_channels_lie_side_by_side():
    images = torch.rand(3, 5, 8, 8) * 2 - 1
    side = 96 + 2
    assert picture(images).size == (5 * side + 2, 3 * side + 2)


def test_rows_bear_their_names():
    rows = in_rows({"step 2": torch.zeros(2, 1, 8, 8), "step 4": torch.ones(2, 1, 8, 8)})
    assert np.asarray(rows)[:, :40].min() < 128  # letters on white


def test_heat_is_bright_where_the_map_is_large():
    heat = torch.zeros(4, 4)
    heat[0, 0] = 1
    pixels = np.asarray(heat_over(torch.zeros(1, 8, 8), heat)).sum(2)
    assert pixels[0, 0] > pixels[-1, -1] + 200


def test_the_nearest_image_of_a_training_image_is_itself():
    data = ImageDataModule(Digits(), num_val=20, seed=0)
    data.setup("fit")
    shares = []
    pixels = TrainingPixels(data, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    images = data.image_set.images[data.train_indices[:4]].float() / 127.5 - 1
    nearest = pixels.nearest_to(images)
    assert "all 1777 training images: 0.00, 0.00, 0.00, 0.00." in nearest.words
    tiles = np.asarray(nearest.picture)[:, -4 * 98 :]
    assert np.array_equal(tiles[2:98], tiles[102:198])  # drawn, and the nearest below


def test_mirrored_training_images_are_searched_where_training_mirrors():
    data = ImageDataModule(Digits(), num_val=20, horizontal_flip=True, seed=0)
    data.setup("fit")
    images = data.image_set.images[data.train_indices[:2]].float() / 127.5 - 1
    assert "all 1777 training images: 0.00, 0.00." in TrainingPixels(data).nearest_to(images.flip(-1)).words


def test_a_run_tells_its_checkpoints_pictures_and_metrics(digits_run, run_of):
    run = run_of(digits_run)
    assert list(run.checkpoints) == [2, 4]
    assert list(run.pictures) == [2, 4]
    with (digits_run / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = [(int(row["step"]), float(row["val/loss"])) for row in csv.DictReader(file) if row["val/loss"]]
    assert run.history["val/loss"] == rows
    assert curves({"run": run.history}).size[0] > 500
    assert curves({"run": {}}) is None
    assert curves({f"{'long/' * 40}{number}": run.history for number in range(3)}).size[0] > 500  # and no warning
    many = {f"val/class_{number}": [(1, 0.5)] for number in range(200)}
    assert curves({"run": many}).size[1] < 4000
    assert "seed_everything" in run.configuration
    assert run.evaluation_page is None


def test_metrics_of_a_continued_run_follow_each_other(tmp_path, digits_run, run_of):
    unfinished = "4,1,,,7"
    rows_of = {"version_2": "step,loss\n1,5\n2,4\n", "version_10": f"step,loss\n2,3\n3,2\n{unfinished}\n"}
    for version, rows in rows_of.items():
        (tmp_path / "logs" / version).mkdir(parents=True)
        (tmp_path / "logs" / version / "metrics.csv").write_text(rows)
    (tmp_path / "samples").mkdir()
    for name in ("step_0000002.png", "step_final.png"):
        (tmp_path / "samples" / name).touch()
    run = Run(tmp_path, None, None, None)
    assert list(run.pictures) == [2]
    assert run.history == {"loss": [(1, 5.0), (2, 3.0), (3, 2.0)]}


def test_data_that_measure_their_range_keep_that_of_the_model(tmp_path, digits_run, run_of):
    data = ImageDataModule(Folder(tmp_path, image_size=8, value_range="measured"))
    run = run_of(digits_run, data)
    with pytest.raises(ValueError, match="root must hold images"):
        run.data.setup()
    assert data.source.kept_range == (run.model.values.low, run.model.values.high)


def test_runs_that_one_form_does_not_fit_are_refused(tmp_path, digits_run, run_of):
    digits, text = run_of(digits_run), Run(tmp_path / "text", text_denoiser(tmp_path), None, None)
    network = SegmentationUNet(1, 2, channels=(4, 8))
    names = ["background", "cell"]
    segmenter = Segmenter(network, "binary", names, timestep=None, stretch=False, window_size=32)
    larger = replace(digits.model, sample_shape=(1, 16, 16))
    shorter = replace(digits.model, schedule=NoiseSchedule(10, prediction_type="v_prediction"))
    check_alike([digits, digits])
    for other, message in (
        (text, "same conditions, got ClassLabels"),
        (Run(tmp_path, segmenter, None, None), "same kind of model, got denoiser"),
        (Run(tmp_path, larger, None, None), "same image size, got 1x8x8"),
        (Run(tmp_path, shorter, None, None), "same number of timesteps"),
    ):
        with pytest.raises(ValueError, match=message):
            check_alike([digits, other])


def test_the_page_of_each_kind_of_denoiser_has_the_tabs_that_it_can_use(tmp_path):
    tabs = {}
    for make in (text_denoiser, inpainter, upscaler):
        folder = tmp_path / make.__name__
        page = page_of([Run(folder, make(folder), None, None)])
        tabs[make.__name__] = [block.label for block in page.blocks.values() if type(block).__name__ == "Tab"]
    always = ["Curves", "Evaluation", "Configuration"]
    assert tabs["inpainter"] == tabs["upscaler"] == ["From an image", *always]
    others = ["Interpolate", "Over training", "Nearest", "Attention"]
    assert tabs["text_denoiser"] == ["Draw", "From an image", *others, *always]


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_refuses_what_it_cannot_show(run_cli, tmp_path, digits_run, monkeypatch):
    assert "must exist" in run_cli("explore", tmp_path / "nothing")[2]
    assert "named once" in run_cli("explore", digits_run, digits_run)[2]
    assert "--port must be from 1" in run_cli("explore", digits_run, "--port", 0)[2]
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    status, _, err = run_cli("explore", digits_run)
    assert status == 2
    assert 'pip install "unet-diffusion[explore]"' in err
