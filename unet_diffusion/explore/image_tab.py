"""The tab that begins with a visitor's image: draw from it, fill what is painted over, or enlarge it."""

import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unet_diffusion.explore.components import (
    Controls,
    Values,
    bind,
    bind_work,
    command_code,
    download_folder,
)
from unet_diffusion.explore.drawing_live import drawn, grid
from unet_diffusion.explore.live import Update
from unet_diffusion.explore.request_form import RequestForm, needed_images, sample_command
from unet_diffusion.explore.runs import Run
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.init_images import read_user_image, size_of
from unet_diffusion.inference.sample_options import SampleOptions
from unet_diffusion.runtime.pictures import in_unit_range, picture_of, to_uint8, write_png
from unet_diffusion.runtime.pixel_values import LARGEST, PixelValues
from unet_diffusion.runtime.tiff_files import write_tiff

EDITOR_SIDE = 384  # least side of an image to paint on, in pixels
PAINT, BRUSH = "#e69f00", 40  # colour, and width in pixels


class ImageTab:
    """The tab.

    Args:
        form: The form of the request.
        chosen: Function that gives the run that a visitor has chosen; its input is among the form's.
    """

    def __init__(self, form: RequestForm, chosen: Callable[[Values], Run[Denoiser]]) -> None:
        self.form, self.chosen = form, chosen
        self.needs = needed_images(form.denoiser)
        self.enlarges, self.paints = self.needs == {"image"}, "mask" in self.needs
        verb = "Enlarge" if self.enlarges else "Fill" if self.paints else "Draw from it"
        with gr.Tab("From an image", id="image"):
            with gr.Row():
                with gr.Column():
                    self._add_inputs()
                with gr.Column():
                    controls, place = Controls.named(verb), grid("Drawn", elem_id="from_image")
            files = gr.File(label="The files of the command", visible=False, interactive=False)
            button, code = gr.Button("Command line", size="sm"), command_code()
        self.controls, self.place, self.code, self.files = controls, place, code, files
        inputs = [*form.inputs, self.upload, self.editor, self.strength]
        bind([self.upload.change], self._shown, inputs, [self.editor])
        bind([button.click], self._command, inputs, [code, files])
        bind_work(controls, self._draw, inputs, [place])

    def _add_inputs(self) -> None:
        self.upload = gr.File(label="Image: drop a file here", type="filepath", elem_id="upload", height=110)
        self.editor = gr.ImageEditor(
            label="Paint over what is to be drawn anew" + ("" if self.paints else ", or paint nothing"),
            type="numpy",
            image_mode="RGBA",
            sources=(),
            transforms=(),
            layers=False,
            brush=gr.Brush(default_size=BRUSH, colors=[PAINT], color_mode="fixed"),
            visible=False,
            elem_id="editor",
        )
        self.strength = gr.Slider(
            0.05,
            1,
            0.8,
            step=0.05,
            label="Strength",
            info="Less keeps more of the image, where nothing is painted.",
            visible=not self.needs,
        )

    def _shown(self, values: Values) -> Update:
        """The uploaded image, to paint on."""
        if values[self.upload] is None or self.enlarges:
            return {self.editor: gr.ImageEditor(None, visible=False)}
        return {self.editor: gr.ImageEditor(_enlarged(self._image(values)), visible=True)}

    def _draw(self, values: Values) -> Generator[Update, None, None]:
        yield from drawn(self.chosen(values).model, self._request(values), self.controls.status, self.place)

    def _command(self, values: Values) -> Update:
        options, run = self._request(values), self.chosen(values)
        if self.enlarges:
            line = sample_command(run, options, image=Path(values[self.upload]).name)
            return {self.code: gr.Code(line, visible=True)}
        paths = _files(options, Path(values[self.upload]), run.model)
        line = sample_command(run, options, **{name: path.name for name, path in paths.items()})
        files = gr.File([str(path) for path in paths.values()], visible=True)
        return {self.code: gr.Code(line, visible=True), self.files: files}

    def _request(self, values: Values) -> SampleOptions:
        """The request of a visitor.

        Raises:
            ValueError: If there is no image, or nothing is painted for a model that fills.
        """
        if values[self.upload] is None:
            raise ValueError("an image must be given; drop a file above")
        if self.enlarges:
            return self.form.options(values, image=values[self.upload])
        image = self._image(values)
        mask = _painted(values[self.editor], image.shape[1], image.shape[2])
        if mask is None and self.paints:
            raise ValueError("some of the image must be painted over; this model fills what is painted")
        if mask is None:
            return self.form.options(values, image=image, strength=float(values[self.strength]))
        return self.form.options(values, image=image, mask=mask)

    def _image(self, values: Values) -> Tensor:
        """The uploaded image at the size to draw, (C, H, W) in [-1, 1]."""
        model = self.chosen(values).model
        return read_user_image(values[self.upload], None, model.image_shape, model.values.value_range).pixels[0]


def _enlarged(image: Tensor) -> Image.Image:
    """The picture of an image, (C, H, W), large enough to paint on; each pixel becomes a square."""
    factor = _factor(*image.shape[1:])
    pixels = picture_of(to_uint8(image[None])[0]).convert("RGBA")
    return pixels.resize((pixels.width * factor, pixels.height * factor), Image.Resampling.NEAREST)


def _painted(edited: Any, height: int, width: int) -> Tensor | None:
    """The mask that a visitor has painted, (1, H, W) bool; a pixel counts if any of its square is painted."""
    layers = [] if edited is None else edited["layers"]
    if not layers:
        return None
    factor = _factor(height, width)
    alpha = Image.fromarray(np.maximum.reduce([layer[..., 3] for layer in layers]))
    alpha = alpha.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    squares = torch.from_numpy(np.array(alpha) > 0).view(height, factor, width, factor)
    mask = squares.any(3).any(1)[None]
    return mask if mask.any() else None


def _factor(height: int, width: int) -> int:
    return -(-EDITOR_SIDE // min(height, width))


def _files(options: SampleOptions, upload: Path, model: Denoiser) -> dict[str, Path]:
    """Files of the image and of the mask, if there is one, by their names; `sample` reads what the page draws from.

    An upload of the size to draw is kept as it is. One that was scaled or cropped is written at the size of the mask,
    with all that it holds: as PNG of 8 bits if that is exact.
    """
    folder, (channels, *size) = download_folder(), model.image_shape
    image, paths = options.image, dict[str, Path]()
    assert isinstance(image, Tensor)
    if size_of("image", upload, channels) == tuple(size):
        paths["image"] = folder / f"image{''.join(upload.suffixes)}"
        shutil.copyfile(upload, paths["image"])
    elif model.values.value_range is None and torch.equal(in_unit_range(to_uint8(image[None])[0]), image):
        paths["image"] = folder / "image.png"
        write_png(picture_of(to_uint8(image[None])[0]), paths["image"])
    else:
        paths["image"] = folder / "image.tif"
        values = PixelValues("uint16", 0, LARGEST["uint16"])
        if model.values.value_range is not None:
            values = replace(model.values, dtype="float64")
        write_tiff(values.numbers(image[None])[0], paths["image"], are_colours=model.values.shown is None)
    if isinstance(options.mask, Tensor):
        paths["mask"] = folder / "mask.png"
        write_png(picture_of(options.mask.to(torch.uint8) * 255), paths["mask"])
    return paths
