"""The tab of a segmenter: an image, its outlines and objects, a threshold to slide, the mask and the table to keep."""

import csv
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    FILE_LIFETIME,
    Controls,
    Values,
    bind,
    bind_work,
    command_box,
    command_line,
    download_folder,
    progress_line,
)
from unet_diffusion.explore.live import Update, live
from unet_diffusion.explore.runs import Run
from unet_diffusion.inference.init_images import read_at_its_own_size
from unet_diffusion.inference.objects import COLUMNS, intensities, object_rows, pixel_size
from unet_diffusion.inference.segment_files import sixteen_bits
from unet_diffusion.inference.segmenter import Segmentation, Segmenter
from unet_diffusion.runtime.pictures import to_uint8
from unet_diffusion.segmentation.pictures import colour_classes, outlined

LEAST_SIDE, MOST_SIDE = 512, 1600  # longer side of the picture with outlines, in pixels
LARGEST_MIN_SIZE = 500  # pixels of an object, at the end of the slider
OF_OBJECTS = COLUMNS[2:]  # columns of the table; those before name the file


@dataclass(frozen=True)
class Segmented:
    """The segmentation of a visitor's image, with all that is shown of it.

    Args:
        path: The visitor's file.
        pixels: The image as the network sees it, (C, H, W) uint8.
        segmentation: Its segmentation.
        intensities: The numbers that the file stores, (H, W).
        pixel_size: Height and width of a pixel in micrometres; "" where they are not known.
    """

    path: Path
    pixels: Tensor
    segmentation: Segmentation
    intensities: NDArray[np.float32]
    pixel_size: tuple[str, str]


@dataclass(frozen=True)
class Column:
    """Where the segmentation by a run is shown.

    Args:
        threshold: The slider of the threshold.
        min_size: The slider of the least size.
        picture: The image with outlines.
        words: How many objects there are.
        table: The objects.
        files: The mask and the table as files.
    """

    threshold: gr.Slider
    min_size: gr.Slider
    picture: gr.Image
    words: gr.Markdown
    table: gr.Dataframe
    files: gr.File

    @property
    def outputs(self) -> list[gr.components.Component]:
        """What changes with the segmentation."""
        return [self.picture, self.words, self.table, self.files]


class SegmenterTab:
    """The tab of segmenters, side by side on the same image.

    Args:
        runs: The runs.
    """

    def __init__(self, runs: Sequence[Run[Segmenter]]) -> None:
        self.runs = runs
        with gr.Tab("Segment", id="segment"):
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self._add_inputs()
                with gr.Column(scale=3), gr.Row():
                    self.columns = [_column(run, number) for number, run in enumerate(runs)]
            # Segmented by the name of the run: each visitor has a state of their own
            self.state = gr.State({}, time_to_live=FILE_LIFETIME)
            sliders = [slider for column in self.columns for slider in (column.threshold, column.min_size)]
            inputs = [self.upload, self.views, *sliders, self.state]
            shown = [component for column in self.columns for component in column.outputs]
            bind_work(self.controls, self._segment, inputs, [*shown, self.state])
            bind([self.upload.change], self._cleared, [self.upload, self.state], [*shown, self.state])
            for slider in sliders:
                bind([slider.change], lambda values: self._presented(values, values[self.state]), inputs, shown)
            command_box(inputs, self._commands)

    def _add_inputs(self) -> None:
        self.upload = gr.File(label="Image: drop a file here", type="filepath", elem_id="upload", height=110)
        self.views = gr.Checkbox(False, label="Average over eight views", info="Takes eight times as long.")
        self.controls = Controls.named("Segment")

    def _segment(self, values: Values) -> Generator[Update, None, None]:
        if values[self.upload] is None:
            raise ValueError("an image must be given; drop a file above")
        segmented: dict[str, Segmented] = {}
        for run in self.runs:
            work = partial(_segmented, run.model, values[self.upload], values[self.views], self.controls.status)
            segmented[run.name] = yield from live(work)
        yield {self.state: segmented, self.controls.status: "", **self._presented(values, segmented)}

    def _presented(self, values: Values, segmented: dict[str, Segmented]) -> Update:
        """What is shown at the threshold and the least size of the sliders."""
        update: Update = {}
        for run, column in zip(self.runs, self.columns, strict=True):
            if run.name in segmented:
                threshold, min_size = values[column.threshold], int(values[column.min_size])
                update |= _presented(segmented[run.name], column, threshold, min_size)
        return update

    def _cleared(self, values: Values) -> Update:
        """Nothing, where the image is another one; what comes after its image was segmented changes nothing."""
        path = values[self.upload]
        if path is not None and any(segmented.path == Path(path) for segmented in values[self.state].values()):
            return {}
        update: Update = {self.state: {}}
        for column in self.columns:
            hidden = {column.table: gr.Dataframe(visible=False), column.files: gr.File(visible=False)}
            update |= {column.picture: None, column.words: "", **hidden}
        return update

    def _commands(self, values: Values) -> str:
        folders = ["masks"] if len(self.runs) == 1 else [f"masks_{number + 1}" for number in range(len(self.runs))]
        name = Path(values[self.upload]).name if values[self.upload] else "IMAGE"
        lines = []
        for run, column, folder in zip(self.runs, self.columns, folders, strict=True):
            options = self._options(run.model, column, values) | {"output": folder, **run.options}
            lines.append(command_line("segment", run.path, options, name))
        return "\n".join(lines)

    def _options(self, segmenter: Segmenter, column: Column, values: Values) -> dict[str, Any]:
        options: dict[str, Any] = {"views": True} if values[self.views] else {}
        if segmenter.kind != "classes":
            threshold, min_size = values[column.threshold], int(values[column.min_size])
            options["instances"] = True
            options |= {} if threshold == segmenter.threshold else {"threshold": threshold}
            options |= {} if min_size == segmenter.min_size else {"min_size": min_size}
        return options


def _column(run: Run[Segmenter], number: int) -> Column:
    segmenter = run.model
    with gr.Column():
        picture = gr.Image(
            label=run.name,
            type="pil",
            format="png",
            interactive=False,
            elem_classes="pixels",
            buttons=["download", "fullscreen"],
            elem_id=f"outlines_{number}",
        )
        words = gr.Markdown(elem_id=f"counted_{number}")
        with gr.Row(visible=segmenter.kind != "classes"):
            threshold = gr.Slider(
                0.05,
                0.95,
                segmenter.threshold,
                step=0.01,
                label="Threshold",
                info="A pixel is an object's where its probability is larger.",
                elem_id=f"threshold_{number}",
            )
            min_size = gr.Slider(
                1,
                max(LARGEST_MIN_SIZE, segmenter.min_size),
                segmenter.min_size,
                step=1,
                label="Least size",
                info="Objects of fewer pixels are left out.",
                elem_id=f"min_size_{number}",
            )
        table = gr.Dataframe(visible=False, interactive=False, max_height=300, label="Objects", show_label=True)
        files = gr.File(visible=False, interactive=False, label="Mask and table")
        return Column(threshold, min_size, picture, words, table, files)


def _segmented(
    segmenter: Segmenter, path: str, views: bool, status: gr.HTML, say: Callable[[Update], None]
) -> Segmented:
    """Segment a file, saying how far it is."""
    channels, values = segmenter.unet.in_channels, segmenter.values
    image = to_float(read_at_its_own_size(path, channels, values.value_range), stretch=segmenter.stretch)

    def progress(share: float) -> None:
        say({status: progress_line(share, f"{share:.0%} of the image")})

    segmentation = segmenter.segment(image, views=views, progress=progress)
    data = Path(path).read_bytes()
    stored = intensities(next(iter(stored_images(data, channels)))).astype(np.float32)
    height, width = ("" if size is None else f"{size:.6g}" for size in pixel_size(data))
    shown = to_uint8(values.seen(image.clamp(-1, 1)[None]))[0]
    return Segmented(Path(path), shown, segmentation, stored, (height, width))


def _presented(segmented: Segmented, column: Column, threshold: float, min_size: int) -> Update:
    """The picture, the table and the files of a segmentation."""
    if segmented.segmentation.kind == "classes":
        return _presented_classes(segmented, column)
    segmentation = replace(segmented.segmentation, threshold=threshold, min_size=min_size)
    objects, sizes = segmentation.instances, segmented.pixel_size
    rows = [[*row, *sizes] for row in object_rows(objects, segmented.intensities)]
    folder, stem = download_folder(), segmented.path.stem
    paths = [folder / f"{stem}_{name}" for name in ("mask.png", "objects.png", "objects.csv")]
    Image.fromarray(segmentation.classes).save(paths[0])
    Image.fromarray(sixteen_bits(objects)).save(paths[1])
    with paths[2].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *([segmented.path.name, 0, *row] for row in rows)])
    headers = OF_OBJECTS if any(sizes) else OF_OBJECTS[: -len(sizes)]
    areas = sorted(int(row[1]) for row in rows)
    middle = f", of {areas[len(areas) // 2]} pixels in the middle ({areas[0]} to {areas[-1]})" if areas else ""
    return {
        column.picture: _with_outlines(segmented.pixels, objects),
        column.words: f"**{len(rows)} objects**{middle}",
        column.table: gr.Dataframe([row[: len(headers)] for row in rows], headers=list(headers), visible=True),
        column.files: gr.File([str(path) for path in paths], visible=True),
    }


def _presented_classes(segmented: Segmented, column: Column) -> Update:
    """The picture, the shares and the mask of a segmentation into classes."""
    classes, names = segmented.segmentation.classes, segmented.segmentation.class_names
    counts = np.bincount(classes.ravel(), minlength=len(names))
    rows = [[name, int(count), f"{count / classes.size:.1%}"] for name, count in zip(names, counts, strict=True)]
    path = download_folder() / f"{segmented.path.stem}_mask.png"
    Image.fromarray(classes).save(path)
    enlarged, step = _factor(classes.shape), _step(classes.shape)
    shown = classes[::step, ::step].repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    return {
        column.picture: Image.fromarray(colour_classes(shown)),
        column.words: f"**{len(names)} classes**",
        column.table: gr.Dataframe(rows, headers=["class", "pixels", "share"], visible=True),
        column.files: gr.File([str(path)], visible=True),
    }


def _with_outlines(pixels: Tensor, objects: NDArray[Any]) -> Image.Image:
    """The image, enlarged or thinned out to the size of the page before outlines of one pixel are drawn."""
    factor, step = _factor(objects.shape), _step(objects.shape)
    shown = pixels[:, ::step, ::step].repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    numbers = objects[::step, ::step].repeat(factor, axis=0).repeat(factor, axis=1)
    return outlined(shown.float() / 127.5 - 1, numbers)


def _factor(size: Sequence[int]) -> int:
    return max(1, -(-LEAST_SIDE // max(size)))


def _step(size: Sequence[int]) -> int:
    return -(-max(size) // MOST_SIDE)
