"""Images that a visitor sees as they form."""

from collections.abc import Callable, Generator
from time import perf_counter
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from unet_diffusion.explore.components import progress_line
from unet_diffusion.explore.live import Previews, Update, live
from unet_diffusion.explore.views import picture
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.sample_options import SampleOptions


def grid(label: str | None = None, **options: Any) -> gr.Image:
    """A place for a grid of images, whose pixels are not blurred.

    Args:
        label: What it shows; None: the place has no label.
        options: Further options of gradio's Image.
    """
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


def drawn(
    denoiser: Denoiser,
    options: SampleOptions,
    status: gr.HTML,
    place: gr.Image | None = None,
    *,
    columns: int | None = None,
) -> Generator[Update, None, Tensor]:
    """Draw images and return them, (N, C, H, W), yielding how far it is and, now and then, what x0 looks like.

    Args:
        denoiser: What draws them.
        options: The request.
        status: The line that says how far it is.
        place: Where the images appear; None: nowhere.
        columns: Number of images in a row.
    """
    began = perf_counter()
    images = yield from live(lambda say: _draw(denoiser, options, status, place, columns, say))
    update: Update = {status: f"{len(images)} images in {perf_counter() - began:.1f} s"}
    yield update if place is None else update | {place: picture(images, columns)}
    return images


def _draw(
    denoiser: Denoiser,
    options: SampleOptions,
    status: gr.HTML,
    place: gr.Image | None,
    columns: int | None,
    say: Callable[[Update], None],
) -> Tensor:
    drawing, previews = denoiser.drawing(options), Previews()
    batches = torch.arange(options.num_images).split(options.batch_size)
    num_done, num_steps = 0, drawing.num_steps * len(batches)

    def watch(t: float, x0: Tensor) -> None:
        nonlocal num_done
        num_done += 1
        words = f"step {num_done} of {num_steps}, timestep {t:.0f}"
        update: Update = {status: progress_line(num_done / num_steps, words)}
        if place is not None:
            preview = previews.make(lambda: picture(denoiser.decode(x0), columns))
            update |= {} if preview is None else {place: preview}
        say(update)

    return torch.cat([drawing.draw(batch.tolist(), watch=watch) for batch in batches])
