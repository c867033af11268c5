"""Plots of an evaluation, by matplotlib without a display."""

import io

import numpy as np
from PIL import Image

from unet_diffusion.evaluation.intervals import Values

SIZE, DPI = (4.8, 4.8), 110  # inches, and pixels of one
LINE, EVEN = "#0072b2", "#888888"


def reliability_plot(
    curves: dict[str, tuple[Values, Values, Values]], *, of: str, least_share: float = 1e-4
) -> Image.Image:
    """How often a probability came true, over the probability, above the share of pixels that have it.

    Args:
        curves: By name, of each bin: its share of pixels, their mean probability, and how often it came true.
        of: What is probable, such as "foreground".
        least_share: Bins with a smaller share of pixels are left out of the curve.
    """
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot((0, 1), (0, 1), "--", color=EVEN, label="as it should be")
    for name, (share, probability, true) in curves.items():
        is_shown = share >= least_share
        above.plot(probability[is_shown], true[is_shown], "o-", markersize=4, label=name)
    above.set(ylabel=f"share that is {of}", xlim=(0, 1), ylim=(0, 1))
    above.legend(fontsize="small")
    share = next(iter(curves.values()))[0]
    width = 1 / len(share)
    below.bar(np.arange(len(share)) * width, share, width, align="edge", color=LINE)
    below.set(xlabel=f"probability of {of}", ylabel="pixels", yscale="log", ylim=(1e-4, 1))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return Image.open(drawn).convert("RGB")
