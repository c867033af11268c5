"""The tab of an autoencoder: an image, what comes back, what is lost, and the latents between."""

from collections.abc import Callable, Generator, Sequence
from functools import partial

import gradio as gr
import torch

from unet_diffusion.explore.components import Controls, Values, bind_work, progress_line
from unet_diffusion.explore.live import Update, live
from unet_diffusion.explore.runs import Run
from unet_diffusion.explore.views import picture
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.init_images import read_user_image
from unet_diffusion.runtime.pictures import CHANNELS, over_white

Column = tuple[gr.Image, gr.Image, gr.Markdown]
AMPLIFIED = 4  # times the difference is shown


def autoencoder_tab(runs: Sequence[Run[Autoencoder]]) -> None:
    """The tab of autoencoders, side by side on the same image.

    Args:
        runs: The runs.
    """
    with gr.Tab("Reconstruct", id="reconstruct"):
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                upload = gr.File(label="Image: drop a file here", type="filepath", elem_id="upload", height=110)
                controls = Controls.named("Reconstruct")
            with gr.Column(scale=3):
                columns = [_column(run, number) for number, run in enumerate(runs)]

        def reconstruct(values: Values) -> Generator[Update, None, None]:
            if values[upload] is None:
                raise ValueError("an image must be given; drop a file above")
            for run, column in zip(runs, columns, strict=True):
                yield {controls.status: progress_line(0, run.name)}
                yield (yield from live(partial(_reconstructed, run.model, values[upload], column)))
            yield {controls.status: ""}

        bind_work(controls, reconstruct, [upload], [component for column in columns for component in column])


def _reconstructed(autoencoder: Autoencoder, path: str, column: Column, say: Callable[[Update], None]) -> Update:
    """What is shown of an image."""
    place, latents, words = column
    image = read_user_image(path, None, autoencoder.image_shape, autoencoder.values.value_range).pixels
    codes = autoencoder.encode(image)
    back = autoencoder.decode(codes).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (back - image).square().mean().clamp(min=1e-12))
    size = " x ".join(map(str, codes.shape[1:]))
    seen = [over_white(one) if one.shape[1] in CHANNELS else one for one in (image, back)]
    difference = ((seen[1] - seen[0]) * AMPLIFIED).clamp(-1, 1)
    return {
        place: picture(torch.cat([*seen, difference]), 3),
        latents: picture((codes / codes.abs().amax().clamp(min=1e-12)).transpose(0, 1), len(codes[0])),
        words: f"PSNR {psnr:.2f} dB; latents of {size}, deviation {codes.std():.2f}",
    }


def _column(run: Run[Autoencoder], number: int) -> Column:
    options = {"type": "pil", "format": "png", "interactive": False, "elem_classes": "pixels", "buttons": ["download"]}
    return (
        gr.Image(label=f"{run.name}: image, what comes back, {AMPLIFIED} times the difference",
                 elem_id=f"reconstructed_{number}", **options),
        gr.Image(label="Latents, channel by channel", **options),
        gr.Markdown(),
    )  # fmt: skip
