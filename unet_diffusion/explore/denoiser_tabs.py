"""Tabs of a denoiser: what it draws from noise and between two seeds, and how it came to draw so."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import gradio as gr
from PIL import Image
from torch import Tensor

from unet_diffusion.explore.attention import WordMaps, has_words, word_maps
from unet_diffusion.explore.components import Controls, Values, bind, bind_work, command_box, progress_line
from unet_diffusion.explore.drawing_live import drawn, grid
from unet_diffusion.explore.image_tab import ImageTab
from unet_diffusion.explore.live import Update, live
from unet_diffusion.explore.nearest import NearestImages, TrainingPixels
from unet_diffusion.explore.request_form import RequestForm, needed_images, sample_command
from unet_diffusion.explore.runs import Run
from unet_diffusion.explore.views import heat_over, in_rows, picture
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.sample_options import SampleOptions
from unet_diffusion.runtime.pictures import CHANNELS

MOST_COMPARED = 8  # images of each checkpoint, and samples whose nearest images are looked for

Chosen = Callable[[Values], Run[Denoiser]]
"""chosen(values) is the run that a visitor has chosen; its input is among those of the form."""


def denoiser_tabs(runs: Sequence[Run[Denoiser]], form: RequestForm, chosen: Chosen) -> None:
    """The tabs of denoisers, of which the first shows all runs and the others the chosen one.

    Args:
        runs: The runs, which take the same conditions.
        form: The form of the request.
        chosen: Function that gives the run that a visitor has chosen.
    """
    needs = needed_images(form.denoiser)
    if not needs:
        _draw_tab(runs, form)
    if form.denoiser.image_shape[0] in CHANNELS:
        ImageTab(form, chosen)
    if not needs:
        _interpolate_tab(form, chosen)
        _training_tab(form, chosen)
        _nearest_tab(form, chosen)
    if not needs and has_words(form.denoiser):
        _attention_tab(form, chosen)


def _draw_tab(runs: Sequence[Run[Denoiser]], form: RequestForm) -> None:
    with gr.Tab("Draw", id="draw"):
        controls = Controls.named("Draw")
        with gr.Row():
            places = [grid(run.name, elem_id=f"drawn_{number}") for number, run in enumerate(runs)]

        def draw(values: Values) -> Generator[Update, None, None]:
            options = form.options(values)
            for run, place in zip(runs, places, strict=True):
                yield from drawn(run.model, options, controls.status, place)

        def commands(values: Values) -> str:
            folders = ["generated"] if len(runs) == 1 else [f"generated_{number + 1}" for number in range(len(runs))]
            options = form.options(values)
            lines = (sample_command(run, options, folder) for run, folder in zip(runs, folders, strict=True))
            return "\n".join(lines)

        bind_work(controls, draw, form.inputs, places)
        command_box(form.inputs, commands)


def _interpolate_tab(form: RequestForm, chosen: Chosen) -> None:
    with gr.Tab("Interpolate", id="interpolate"):
        gr.Markdown("From the first image of the form's seed to that of another seed. Choose one class or caption.")
        with gr.Row():
            to_seed = gr.Number(1, precision=0, label="To seed")
            frames = gr.Slider(2, 32, 12, step=1, label="Frames")
        controls, place = Controls.named("Interpolate"), grid("Frames", elem_id="frames")

        def request(values: Values) -> SampleOptions:
            options = form.options(values, num_images=int(values[frames]))
            return replace(options, interpolate=(options.seed, int(values[to_seed] or 0)), seed=0)

        def draw(values: Values) -> Generator[Update, None, None]:
            yield from drawn(chosen(values).model, request(values), controls.status, place)

        inputs = [*form.inputs, to_seed, frames]
        bind_work(controls, draw, inputs, [place])
        command_box(inputs, lambda values: sample_command(chosen(values), request(values)))


def _training_tab(form: RequestForm, chosen: Chosen) -> None:
    with gr.Tab("Over training", id="training") as tab:
        gr.Markdown("### Drawn while it trained")
        gallery = gr.Gallery(
            columns=3,
            object_fit="contain",
            height="auto",
            show_label=False,
            buttons=["download", "fullscreen"],
            interactive=False,
            elem_classes="pixels",
            elem_id="drawn_in_training",
        )
        gr.Markdown(
            "### The same images by each checkpoint\n"
            "`fit --checkpoint.save_top_k -1` keeps one every `checkpoint.every_n_train_steps`."
        )
        controls, strip = Controls.named("Draw with each checkpoint"), grid(elem_id="strip")

    def from_training(values: Values) -> Update:
        pictures = [(Image.open(path), f"step {step}") for step, path in chosen(values).pictures.items()]
        return {gallery: gr.Gallery(pictures, visible=bool(pictures))}

    def draw(values: Values) -> Generator[Update, None, None]:
        run = chosen(values)
        checkpoints = run.checkpoints
        if not checkpoints:
            raise ValueError(f"{run.name} must be a run folder to show its training, and has no checkpoints")
        number = min(form.options(values).num_images, MOST_COMPARED)
        options, rows = form.options(values, num_images=number), dict[str, Tensor]()
        for step, path in checkpoints.items():
            yield {controls.status: progress_line(len(rows) / len(checkpoints), f"loading step {step}")}
            rows[f"step {step}"] = yield from drawn(run.load(path), options, controls.status)
            yield {strip: in_rows(rows)}

    bind([tab.select, form.which.change], from_training, form.inputs, [gallery])
    bind_work(controls, draw, form.inputs, [strip])


def _nearest_tab(form: RequestForm, chosen: Chosen) -> None:
    with gr.Tab("Nearest", id="nearest"):
        gr.Markdown("Does it draw, or does it remember? Below each image are the training images nearest to it.")
        controls, place = Controls.named("Draw and compare"), grid(elem_id="nearest_images")
        words = gr.Markdown()
    read_once: dict[str, TrainingPixels] = {}  # by the name of the run; only one visitor at a time has a model

    def compare(values: Values) -> Generator[Update, None, None]:
        run = chosen(values)
        options = form.options(values, num_images=min(form.options(values).num_images, MOST_COMPARED))
        images = yield from drawn(run.model, options, controls.status)

        def search(say: Callable[[Update], None]) -> NearestImages:
            def progress(share: float) -> None:
                say({controls.status: progress_line(share, "reading the training images")})

            progress(0)
            if run.name not in read_once:
                run.data.values.require_range_of(run.model.values, "the denoiser was trained on")
                read_once[run.name] = TrainingPixels(run.data, progress)
            return read_once[run.name].nearest_to(images)

        nearest = yield from live(search)
        yield {place: nearest.picture, words: nearest.words, controls.status: ""}

    bind_work(controls, compare, form.inputs, [place, words])


def _attention_tab(form: RequestForm, chosen: Chosen) -> None:
    with gr.Tab("Attention", id="attention"):
        gr.Markdown("Where each word of the first caption was looked for, bright to dark, on average over all steps.")
        controls = Controls.named("Draw and look")
        gallery = gr.Gallery(
            label="The image, and its words",
            columns=4,
            object_fit="contain",
            height="auto",
            elem_classes="pixels",
            elem_id="words",
            buttons=["download", "fullscreen"],
            interactive=False,
        )

    def look(values: Values) -> Generator[Update, None, None]:
        denoiser, options = chosen(values).model, form.options(values, num_images=1)

        def work(say: Callable[[Update], None]) -> WordMaps:
            num_done, total = 0, denoiser.drawing(options).num_steps

            def progress(count: int) -> None:
                nonlocal num_done
                num_done += 1
                say({controls.status: progress_line(num_done / total, f"step {num_done} of {total}")})

            return word_maps(denoiser, options, progress)

        seen = yield from live(work)
        image = seen.image.clamp(-1, 1)
        tiles = [(heat_over(image, heat), word) for word, heat in zip(seen.words, seen.maps, strict=True)]
        yield {gallery: [(picture(image[None]), "image"), *tiles], controls.status: ""}

    bind_work(controls, look, form.inputs, [gallery])
