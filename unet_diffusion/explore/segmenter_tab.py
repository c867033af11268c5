"""The tab of a segmenter: an image, its outlines and objects, a threshold to slide, the mask and the table to keep."""

import csv
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unet_diffusion.data.scaling import to_float
from unet_diffusion.data.stored import stored_images
from unet_diffusion.explore.components import (
    Controls,
    Update,
    Values,
    bind,
    bind_work,
    command_box,
    command_line,
    download_folder,
    progress_line,
)
from unet_diffusion.explore.live import live
from unet_diffusion.explore.runs import Run
from unet_diffusion.inference.init_images import read_at_its_own_size
from unet_diffusion.inference.objects import COLUMNS, intensities, object_rows, pixel_size
from unet_diffusion.inference.segmenter import Segmentation, Segmenter
from unet_diffusion.segmentation.labels import MIN_SIZE, THRESHOLD
from unet_diffusion.segmentation.pictures import colour_classes, outlined

MIN_SIDE = 512  # least side of the picture with outlines, in pixels
LARGEST_MIN_SIZE = 500  # pixels of an object, at the end of the slider
OF_OBJECTS = COLUMNS[2:]  # columns of the table; those before name the file


@dataclass(frozen=True)
class Segmented:
    """The segmentation of a visitor's image.

    Args:
        path: The uploaded file.
        image: The image as the network sees it, (C, H, W) in about [-1, 1].
        segmentation: Its segmentation.
    """

    path: Path
    image: Tensor
    segmentation: Segmentation


@dataclass(frozen=True)
class _Column:
    """What is shown of a run."""

    picture: gr.Image
    words: gr.Markdown
    table: gr.Dataframe
    files: gr.File


def segmenter_tab(runs: Sequence[Run[Segmenter]]) -> None:
    """The tab of segmenters, side by side on the same image.

    Args:
        runs: The runs.
    """
    with gr.Tab("Segment", id="segment"):
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                upload = gr.File(label="Image: drop a file here", type="filepath", elem_id="upload", height=110)
                views = gr.Checkbox(False, label="Average over eight views", info="Takes eight times as long.")
                controls = Controls.named("Segment")
                has_threshold = any(run.model.kind != "classes" for run in runs)
                threshold = gr.Slider(0.05, 0.95, THRESHOLD, step=0.01, label="Threshold", visible=has_threshold,
                                      info="A pixel is an object's where its probability is larger.",
                                      elem_id="threshold")  # fmt: skip
                min_size = gr.Slider(1, LARGEST_MIN_SIZE, MIN_SIZE, step=1, label="Least size", visible=has_threshold,
                                     info="Objects of fewer pixels are left out.", elem_id="min_size")  # fmt: skip
            with gr.Column(scale=3):
                with gr.Row():
                    columns = [_column(run, number) for number, run in enumerate(runs)]
                state = gr.State({})  # Segmented by the name of the run; each visitor has one of their own
        inputs = [upload, views, threshold, min_size, state]
        shown = [component for column in columns for component in vars(column).values()]

        def present(values: Values, segmented: dict[str, Segmented]) -> Update:
            update: Update = {}
            for run, column in zip(runs, columns, strict=True):
                if run.name in segmented:
                    update |= _presented(segmented[run.name], column, values[threshold], int(values[min_size]))
            return update

        def segment(values: Values) -> Generator[Update, None, None]:
            if values[upload] is None:
                raise ValueError("an image must be given; drop a file above")
            segmented: dict[str, Segmented] = {}
            for run in runs:
                segmented[run.name] = yield from _segmented(run.model, values[upload], values[views], controls.status)
            yield {state: segmented, controls.status: "", **present(values, segmented)}

        bind_work(controls, segment, inputs, [*shown, state])
        for slider in (threshold, min_size):
            bind(slider.release, lambda values: present(values, values[state]), inputs, shown)
        command_box(inputs, lambda values: "\n".join(_command(run, values, *inputs[:4]) for run in runs))


def _column(run: Run[Segmenter], number: int) -> _Column:
    with gr.Column():
        picture = gr.Image(label=run.name, type="pil", format="png", interactive=False, elem_classes="pixels",
                           buttons=["download", "fullscreen"], elem_id=f"outlines_{number}")  # fmt: skip
        return _Column(
            picture=picture,
            words=gr.Markdown(elem_id=f"found_{number}"),
            table=gr.Dataframe(visible=False, interactive=False, max_height=300, label="Objects", show_label=True),
            files=gr.File(visible=False, interactive=False, label="Mask and table"),
        )


def _segmented(segmenter: Segmenter, path: str, views: bool, status: gr.HTML) -> Generator[Update, None, Segmented]:
    """Segment a file, yielding how far it is, and return it as Segmented."""
    image = to_float(read_at_its_own_size(path, segmenter.unet.in_channels), stretch=segmenter.stretch)

    def work(say: Callable[[Update], None]) -> Segmentation:
        def progress(share: float) -> None:
            say({status: progress_line(share, f"{share:.0%} of the image")})

        return segmenter.segment(image.clamp(-1, 1), views=views, progress=progress)

    segmentation = yield from live(work)
    return Segmented(Path(path), image, segmentation)


def _presented(segmented: Segmented, column: _Column, threshold: float, min_size: int) -> Update:
    """The picture, the table and the files of a segmentation."""
    if segmented.segmentation.kind == "classes":
        return _presented_classes(segmented, column)
    segmentation = replace(segmented.segmentation, threshold=threshold, min_size=min_size)
    data = segmented.path.read_bytes()
    objects, page = segmentation.instances, next(iter(stored_images(data)))
    sizes = ["" if size is None else f"{size:.6g}" for size in pixel_size(data)]
    rows = [[*row, *sizes] for row in object_rows(objects, intensities(page))]
    folder, stem = download_folder(), segmented.path.stem
    paths = [folder / f"{stem}_mask.png", folder / f"{stem}_objects.png", folder / f"{stem}_objects.csv"]
    Image.fromarray(segmentation.classes).save(paths[0])
    Image.fromarray(objects.astype(np.uint16)).save(paths[1])
    with paths[2].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *([segmented.path.name, 0, *row] for row in rows)])
    headers = OF_OBJECTS if any(sizes) else OF_OBJECTS[: -len(sizes)]
    shown = [row[: len(headers)] for row in rows]
    areas = sorted(int(row[1]) for row in rows)
    middle = f", of {areas[len(areas) // 2]} pixels in the middle ({areas[0]} to {areas[-1]})" if areas else ""
    return {
        column.picture: _with_outlines(segmented.image, objects),
        column.words: f"**{len(rows)} objects**{middle}",
        column.table: gr.Dataframe(shown, headers=list(headers), visible=True),
        column.files: gr.File([str(path) for path in paths], visible=True),
    }


def _presented_classes(segmented: Segmented, column: _Column) -> Update:
    """The picture, the shares and the mask of a segmentation into classes."""
    classes, names = segmented.segmentation.classes, segmented.segmentation.class_names
    counts = np.bincount(classes.ravel(), minlength=len(names))
    rows = [[name, int(count), f"{count / classes.size:.1%}"] for name, count in zip(names, counts, strict=True)]
    path = download_folder() / f"{segmented.path.stem}_mask.png"
    Image.fromarray(classes).save(path)
    return {
        column.picture: _enlarged(Image.fromarray(colour_classes(classes))),
        column.words: f"**{len(names)} classes**",
        column.table: gr.Dataframe(rows, headers=["class", "pixels", "share"], visible=True),
        column.files: gr.File([str(path)], visible=True),
    }


def _with_outlines(image: Tensor, objects: NDArray[Any]) -> Image.Image:
    """The image with outlines that are thin beside its pixels, where it is small."""
    factor = _factor(objects.shape)
    large = image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    return outlined(large.clamp(-1, 1), objects.repeat(factor, axis=0).repeat(factor, axis=1))


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = _factor(picture.size)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _factor(size: Sequence[int]) -> int:
    return max(1, -(-MIN_SIDE // max(size)))


def _command(run: Run[Segmenter], values: Values, *inputs: gr.components.Component) -> str:
    upload, views, threshold, min_size = (values[component] for component in inputs)
    options: dict[str, Any] = {"views": True} if views else {}
    if run.model.kind != "classes":
        options["instances"] = True
        options |= {} if threshold == THRESHOLD else {"threshold": threshold}
        options |= {} if min_size == MIN_SIZE else {"min_size": int(min_size)}
    return command_line("segment", run.path, options | {"output": "masks"}, Path(upload).name if upload else "IMAGE")
