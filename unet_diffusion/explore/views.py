"""Pictures for a page: images of any number of channels, curves of metrics, and maps of heat over an image."""

import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from unet_diffusion.explore.runs import History
from unet_diffusion.runtime.pictures import CHANNELS, image_grid, over_white

MIN_TILE = 96  # least side of an image on the page, in pixels
PANEL = (4.2, 2.6)  # width and height of the plot of one metric, in inches
MOST_PANELS = 30  # plots; a run may log a metric for each of a thousand classes
MOST_LETTERS = 16  # of a run's name in a legend: the end of its path
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of Okabe & Ito
HEAT_SIDE = 256  # least side of an image below heat, in pixels
FONT, GAP = ImageFont.load_default(size=14), 8  # of the names of rows, and the space around them in pixels
IMAGE_SHARE = 0.35  # of the image in a map of heat over it


def picture(images: Tensor, columns: int | None = None) -> Image.Image:
    """A grid of images, enlarged by whole factors; channels lie side by side if they are not grey, RGB or RGBA.

    Args:
        images: Images, (N, C, H, W) in about [-1, 1].
        columns: Number of images in a row.
    """
    if images.shape[1] not in CHANNELS:
        images, columns = images.flatten(0, 1)[:, None], images.shape[1] * (columns or 1)
    return image_grid(images.float().nan_to_num(0.0), columns, MIN_TILE)


def curves(histories: Mapping[str, History]) -> Image.Image | None:
    """Plots of up to 30 metrics over steps: training and validation together, and each run in a colour of its own.

    Args:
        histories: The metrics of each run, by its name.
    """
    from matplotlib.figure import Figure  # takes a second

    names = {name for history in histories.values() for name in history}
    panels = sorted({name.split("/", 1)[-1] for name in names}, key=lambda panel: (panel != "loss", panel))
    panels = panels[:MOST_PANELS]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for panel, axis in zip(panels, axes, strict=False):
        for (run, history), colour in zip(histories.items(), COLOURS * len(histories), strict=False):
            for name, points in history.items():
                if name.split("/", 1)[-1] == panel:
                    stage, label = name.split("/")[0], name if len(histories) == 1 else f"{run[-MOST_LETTERS:]} {name}"
                    steps, values = zip(*points, strict=True)
                    style = "--" if stage == "train" else "-"
                    marker = "o" if len(points) < 12 else ""
                    axis.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=3)
        axis.set_title(panel, fontsize="medium")
        axis.tick_params(labelsize="small")
        axis.legend(fontsize="x-small")
    for axis in list(figure.axes)[len(panels) :]:
        axis.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return Image.open(drawn).convert("RGB")


def heat_over(image: Tensor, heat: Tensor) -> Image.Image:
    """An image below a map of heat, dark to bright from its least to its largest value.

    Args:
        image: The image, (C, H, W) in [-1, 1].
        heat: The map, (h, w).
    """
    import matplotlib

    height, width = image.shape[1:]
    factor = math.ceil(HEAT_SIDE / min(height, width))
    size = (height * factor, width * factor)
    colours = over_white(image[None]) if image.shape[0] in CHANNELS else image[None].mean(1, keepdim=True)
    below = interpolate(colours.expand(-1, 3, -1, -1), size, mode="nearest")[0].clamp(-1, 1) / 2 + 0.5
    spread = interpolate(heat[None, None].float(), size, mode="bilinear")[0, 0]
    spread = (spread - spread.min()) / (spread.max() - spread.min()).clamp(min=1e-12)
    above = torch.from_numpy(matplotlib.colormaps["inferno"](spread.numpy())[..., :3]).permute(2, 0, 1)
    mixed = IMAGE_SHARE * below + (1 - IMAGE_SHARE) * above
    return Image.fromarray((mixed.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def in_rows(rows: Mapping[str, Tensor]) -> Image.Image:
    """A picture with a row for each tensor of images, and its name to the left of it.

    Args:
        rows: Images by the name of their row, (N, C, H, W) in about [-1, 1].
    """
    pictures = {name: picture(images, len(images)) for name, images in rows.items()}
    margin = max(int(FONT.getlength(name)) for name in rows) + 2 * GAP
    width = margin + max(drawn.width for drawn in pictures.values())
    sheet = Image.new("RGB", (width, sum(drawn.height for drawn in pictures.values())), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for name, drawn in pictures.items():
        pen.text((margin - GAP, top + drawn.height // 2), name, fill="black", font=FONT, anchor="rm")
        sheet.paste(drawn, (margin, top))
        top += drawn.height
    return sheet
