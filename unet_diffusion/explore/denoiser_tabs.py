"""Tabs of a denoiser: what it draws, from noise, from an image and between two seeds, and how it came to draw so."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.explore.attention import WordMaps, has_words, word_maps
from unet_diffusion.explore.components import (
    Controls,
    Update,
    Values,
    bind,
    bind_work,
    command_box,
    command_code,
    download_folder,
    progress_line,
)
from unet_diffusion.explore.live import Previews, live
from unet_diffusion.explore.nearest import nearest_images
from unet_diffusion.explore.request_form import RequestForm, sample_command
from unet_diffusion.explore.runs import Run
from unet_diffusion.explore.views import heat_over, in_rows, picture
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.init_images import read_user_image
from unet_diffusion.inference.sample_options import SampleOptions
from unet_diffusion.runtime.pictures import CHANNELS, picture_of, to_uint8

EDITOR_SIDE = 384  # least side of an image to paint on, in pixels
PAINT = "#e69f00"
MOST_COMPARED = 8  # images of each checkpoint, and samples whose nearest images are looked for


def denoiser_tabs(runs: Sequence[Run[Denoiser]], form: RequestForm, chosen: Callable[[Values], Run[Denoiser]]) -> None:
    """The tabs of denoisers, of which some show all runs and the others the chosen one.

    Args:
        runs: The runs, which take the same conditions.
        form: The form of the request.
        chosen: Function that gives the run that a visitor has chosen; its input is among the form's.
    """
    needs = needed_images(form.denoiser)
    if not needs:
        _draw_tab(runs, form)
    if form.denoiser.image_shape[0] in CHANNELS:
        _image_tab(form, chosen, needs)
    if not needs:
        _interpolate_tab(form, chosen)
        _training_tab(form, chosen)
        _nearest_tab(form, chosen)
    if not needs and has_words(form.denoiser):
        _attention_tab(form, chosen)


def needed_images(denoiser: Denoiser) -> set[str]:
    """Those of image and mask that the denoiser needs; other files are fields of the form."""
    return {"image", "mask"} & {need for condition in denoiser.all_conditions for need in condition.needs}


def _image(label: str | None = None, **options: Any) -> gr.Image:
    return gr.Image(
        label=label,
        show_label=label is not None,
        type="pil",
        format="png",
        interactive=False,
        elem_classes="pixels",
        buttons=["download", "fullscreen"],
        **options,
    )


def _drawn(
    denoiser: Denoiser,
    options: SampleOptions,
    status: gr.HTML,
    shown: gr.Image | None = None,
    *,
    columns: int | None = None,
) -> Generator[Update, None, Tensor]:
    """Draw images and return them, (N, C, H, W), yielding how far it is and, now and then, what x0 looks like.

    Args:
        denoiser: What draws them.
        options: The request.
        status: The line that says how far it is.
        shown: Where the images appear; None: nowhere.
        columns: Number of images in a row.
    """
    drawing, began = denoiser.drawing(options), perf_counter()

    def work(say: Callable[[Update], None]) -> Tensor:
        previews, num_done = Previews(), 0

        def watch(t: float, x0: Tensor) -> None:
            nonlocal num_done
            num_done += 1
            words = f"step {num_done} of {drawing.num_steps}, timestep {t:.0f}"
            update: Update = {status: progress_line(num_done / drawing.num_steps, words)}
            if shown is not None:
                preview = previews.make(lambda: picture(denoiser.decode(x0), columns))
                update |= {} if preview is None else {shown: preview}
            say(update)

        return drawing.draw(range(options.num_images), watch=watch)

    images = yield from live(work)
    yield {status: f"{len(images)} images in {perf_counter() - began:.1f} s"}
    if shown is not None:
        yield {shown: picture(images, columns)}
    return images


def _draw_tab(runs: Sequence[Run[Denoiser]], form: RequestForm) -> None:
    with gr.Tab("Draw", id="draw"):
        controls = Controls.named("Draw")
        with gr.Row():
            shown = [_image(run.name, elem_id=f"drawn_{number}") for number, run in enumerate(runs)]

        def draw(values: Values) -> Generator[Update, None, None]:
            options = form.options(values)
            for run, image in zip(runs, shown, strict=True):
                yield from _drawn(run.model, options, controls.status, image)

        bind_work(controls, draw, form.inputs, shown)
        command_box(
            form.inputs,
            lambda values: "\n".join(sample_command(run.path, form.options(values)) for run in runs),
        )


def _image_tab(form: RequestForm, chosen: Callable[[Values], Run[Denoiser]], needs: set[str]) -> None:
    """From an uploaded image, or painting into it; for a denoiser that enlarges, the image to enlarge."""
    paints, enlarges = needs == {"image", "mask"}, needs == {"image"}
    verb = "Enlarge" if enlarges else "Fill" if paints else "Draw from it"
    with gr.Tab("From an image", id="image"):
        with gr.Row():
            with gr.Column():
                upload = gr.File(label="Image: drop a file here", type="filepath", elem_id="upload", height=110)
                editor = gr.ImageEditor(
                    label="Paint over what is to be drawn anew" + ("" if paints else ", or paint nothing"),
                    type="numpy",
                    image_mode="RGBA",
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=40, colors=[PAINT], color_mode="fixed"),
                    visible=False,
                    elem_id="editor",
                )
                strength = gr.Slider(0.05, 1, 0.8, step=0.05, label="Strength", visible=not needs,
                                     info="Less keeps more of the image, where nothing is painted.")  # fmt: skip
            with gr.Column():
                controls = Controls.named(verb)
                shown = _image("Drawn", elem_id="from_image")
        files = gr.File(label="The image and the mask of the command", visible=False, interactive=False)
        button = gr.Button("Command line", size="sm")
        box = command_code()

    def shape() -> tuple[int, int, int]:
        return form.denoiser.image_shape

    def uploaded(values: Values) -> Update:
        if values[upload] is None or enlarges:
            return {editor: gr.ImageEditor(None, visible=False)}
        pixels = read_user_image(values[upload], None, shape()).pixels
        return {editor: gr.ImageEditor(_enlarged(pixels[0]), visible=True)}

    def request(values: Values) -> SampleOptions:
        if values[upload] is None:
            raise ValueError("an image must be given; drop a file above")
        if enlarges:
            return form.options(values, image=values[upload])
        image = read_user_image(values[upload], None, shape()).pixels[0]
        mask = _painted(values[editor], shape())
        if mask is None and paints:
            raise ValueError("some of the image must be painted over; this model fills what is painted")
        if mask is None:
            return form.options(values, image=image, strength=float(values[strength]))
        return form.options(values, image=image, mask=mask)

    def draw(values: Values) -> Generator[Update, None, None]:
        options = request(values)
        yield from _drawn(chosen(values).model, options, controls.status, shown)

    def command(values: Values) -> Update:
        options = request(values)
        if enlarges:
            line = sample_command(chosen(values).path, options, image=Path(values[upload]).name)
            return {box: gr.Code(line, visible=True)}
        paths = _written({"image": options.image, "mask": options.mask})
        line = sample_command(chosen(values).path, options, **{name: path.name for name, path in paths.items()})
        return {box: gr.Code(line, visible=True), files: gr.File([str(path) for path in paths.values()], visible=True)}

    inputs = [*form.inputs, upload, editor, strength]
    bind(upload.change, uploaded, inputs, [editor])
    bind_work(controls, draw, inputs, [shown])
    bind(button.click, command, inputs, [box, files])


def _enlarged(image: Tensor) -> Image.Image:
    """The picture of an image, (C, H, W), large enough to paint on; each pixel becomes a square."""
    factor = -(-EDITOR_SIDE // min(image.shape[1:]))
    picture = picture_of(to_uint8(image[None])[0]).convert("RGBA")
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _painted(edited: Any, shape: tuple[int, int, int]) -> Tensor | None:
    """The mask that a visitor has painted, (1, H, W) bool; a pixel counts if any of its square is painted."""
    layers = [] if edited is None else edited["layers"]
    if not layers:
        return None
    _, height, width = shape
    factor = -(-EDITOR_SIDE // min(height, width))
    alpha = Image.fromarray(np.maximum.reduce([layer[..., 3] for layer in layers]))
    alpha = alpha.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    squares = torch.from_numpy(np.array(alpha) > 0).view(height, factor, width, factor)
    mask = squares.any(3).any(1)[None]
    return mask if mask.any() else None


def _written(tensors: dict[str, Any]) -> dict[str, Path]:
    """PNG files of an image in [-1, 1] and of a mask, those that are there, by their names."""
    folder, paths = download_folder(), dict[str, Path]()
    for name, tensor in tensors.items():
        if tensor is not None:
            pixels = tensor.float() * 2 - 1 if tensor.dtype == torch.bool else tensor
            paths[name] = folder / f"{name}.png"
            picture_of(to_uint8(pixels[None])[0]).save(paths[name])
    return paths


def _interpolate_tab(form: RequestForm, chosen: Callable[[Values], Run[Denoiser]]) -> None:
    with gr.Tab("Interpolate", id="interpolate"):
        gr.Markdown(
            "From the first image of the form's seed to the first image of another. Choose one class or caption."
        )
        with gr.Row():
            to_seed = gr.Number(1, precision=0, label="To seed")
            frames = gr.Slider(2, 32, 12, step=1, label="Frames")
        controls = Controls.named("Interpolate")
        shown = _image("Frames", elem_id="frames")

        def request(values: Values) -> SampleOptions:
            count = int(values[frames])
            options = form.options(values, num_images=count, batch_size=count)
            return replace(options, interpolate=(options.seed, int(values[to_seed] or 0)), seed=0)

        def draw(values: Values) -> Generator[Update, None, None]:
            yield from _drawn(chosen(values).model, request(values), controls.status, shown)

        inputs = [*form.inputs, to_seed, frames]
        bind_work(controls, draw, inputs, [shown])
        command_box(inputs, lambda values: sample_command(chosen(values).path, request(values)))


def _training_tab(form: RequestForm, chosen: Callable[[Values], Run[Denoiser]]) -> None:
    with gr.Tab("Over training", id="training") as tab:
        gr.Markdown("### Drawn while it trained")
        drawn = gr.Gallery(
            columns=3,
            object_fit="contain",
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
        controls = Controls.named("Draw with each checkpoint")
        strip = _image(elem_id="strip")

    def from_training(values: Values) -> Update:
        pictures = [(Image.open(path), f"step {step}") for step, path in chosen(values).pictures.items()]
        return {drawn: gr.Gallery(pictures, visible=bool(pictures))}

    def draw(values: Values) -> Generator[Update, None, None]:
        run = chosen(values)
        checkpoints = run.checkpoints
        if not checkpoints:
            raise ValueError(f"{run.name} must be a run folder to show its training, and has no checkpoints")
        number = min(form.options(values).num_images, MOST_COMPARED)
        options = form.options(values, num_images=number, batch_size=number)
        rows = dict[str, Tensor]()
        for step, path in checkpoints.items():
            rows[f"step {step}"] = yield from _drawn(run.load(path), options, controls.status)
            yield {strip: in_rows(rows)}

    bind(tab.select, from_training, form.inputs, [drawn])
    bind_work(controls, draw, form.inputs, [strip])


def _nearest_tab(form: RequestForm, chosen: Callable[[Values], Run[Denoiser]]) -> None:
    with gr.Tab("Nearest", id="nearest"):
        gr.Markdown(
            "Does it draw, or does it remember? Below each image that it draws are the training images nearest to it."
        )
        controls = Controls.named("Draw and compare")
        shown = _image("Drawn above, nearest below", elem_id="nearest_images")
        words = gr.Markdown()

    def compare(values: Values) -> Generator[Update, None, None]:
        run = chosen(values)
        number = min(form.options(values).num_images, MOST_COMPARED)
        options = form.options(values, num_images=number, batch_size=number)

        images = yield from _drawn(run.model, options, controls.status)
        yield {controls.status: progress_line(1, "looking through the training images")}
        nearest = nearest_images(images, run.data)
        yield {shown: nearest.picture, words: nearest.words, controls.status: ""}

    bind_work(controls, compare, form.inputs, [shown, words])


def _attention_tab(form: RequestForm, chosen: Callable[[Values], Run[Denoiser]]) -> None:
    with gr.Tab("Attention", id="attention"):
        gr.Markdown("Where each word of the first caption was looked for, bright to dark, on average over all steps.")
        controls = Controls.named("Draw and look")
        shown = gr.Gallery(label="The image, and its words", columns=4, object_fit="contain", elem_classes="pixels",
                           elem_id="words", buttons=["download", "fullscreen"], interactive=False)  # fmt: skip

    def look(values: Values) -> Generator[Update, None, None]:
        denoiser, options = chosen(values).model, form.options(values)

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
        yield {shown: [(picture(image[None]), "image"), *tiles], controls.status: ""}

    bind_work(controls, look, form.inputs, [shown])
