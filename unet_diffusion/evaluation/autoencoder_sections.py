"""The sections of an autoencoder's evaluation: what was counted becomes figures, and what they mean."""

from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor

from unet_diffusion.evaluation.image_quality import RANGE, errors_as_sums, pooled_psnr
from unet_diffusion.evaluation.intervals import FEW_IMAGES, Values, interval, interval_of_mean, mean
from unet_diffusion.evaluation.latent_sums import LatentSums
from unet_diffusion.evaluation.result import Figure, Picture, Section, Table
from unet_diffusion.latents.collapse import collapsed_channels, unused_codes
from unet_diffusion.runtime.pictures import image_grid, over_white
from unet_diffusion.runtime.pixel_values import PixelValues

SHOWN_SIDE = 96  # of an image in a picture, at least
NEARLY_THE_SAME = 0.95  # correlation of two channels
LATENTS_FOR_A_CODE = 10  # fewer may leave a code unused by chance

ABOUT_RECONSTRUCTIONS = (
    "Images are encoded and decoded again, without noise. PSNR (decibels) and SSIM compare pixels and reward blur. "
    "LPIPS and the Fréchet distance (rFID) compare features, and see what people miss. A latent model draws no better "
    "images than these reconstructions."
)
ABOUT_LATENTS = (
    "Diffusion wants latents that vary with the image in every channel, about as much in each, and no two channels "
    "that say the same. The share of signal is the part of a channel's variance that comes from the images. The rest "
    "is noise, which training adds."
)
ABOUT_CODES = (
    "Each position of the latents becomes the nearest code. The perplexity is the number of codes that, used equally "
    "often, would be as varied: a few favourites make it small although all codes are used."
)
ABOUT_WORST = "The validation images with the lowest PSNR: what the latents cannot hold, a latent model cannot draw."


@dataclass(frozen=True)
class Qualities:
    """How near the reconstruction of each image is, (N,) each; NaN where there is no such figure.

    Args:
        number: Number of the image in the data.
        psnr: In decibels.
        ssim: Structural similarity.
        lpips: Distance of features.
    """

    number: Values
    psnr: Values
    ssim: Values
    lpips: Values


def reconstruction_section(
    qualities: Qualities, perceptual_remark: str, perceptual_name: str, distance: Figure | None
) -> Section:
    """How near reconstructions are.

    Args:
        qualities: The qualities of each image.
        perceptual_remark: Why there is no LPIPS.
        perceptual_name: The network of LPIPS.
        distance: The Fréchet distance; None: there is none.
    """
    errors = errors_as_sums(qualities.psnr)
    small = "" if np.isfinite(qualities.ssim).any() else "Images are too small for its window of 11 pixels."
    figures = [
        Figure("psnr_images", "PSNR in dB, mean over images", mean(qualities.psnr), "higher",
               interval_of_mean(qualities.psnr)),
        Figure("psnr_pooled", "PSNR in dB, pooled", float(pooled_psnr(errors.sum(axis=0))), "higher",
               interval(pooled_psnr, errors)),
        Figure("ssim", "SSIM", mean(qualities.ssim), "higher", interval_of_mean(qualities.ssim), remark=small),
        Figure("lpips", f"LPIPS ({perceptual_name})" if perceptual_name else "LPIPS", mean(qualities.lpips), "lower",
               interval_of_mean(qualities.lpips), remark=perceptual_remark),
    ]  # fmt: skip
    count = len(qualities.psnr)
    few = f"There are only {count} images to validate on: figures and intervals are rough. Validate on more (num_val)."
    warnings = [few] if count < FEW_IMAGES else []
    figures += [distance] if distance else []
    return Section("How near are reconstructions?", ABOUT_RECONSTRUCTIONS, figures, warnings=warnings)


def latent_section(latents: LatentSums, *, has_codes: bool) -> Section:
    """Whether the latents are fit for diffusion.

    Args:
        latents: Sums over the latents of all images.
        has_codes: Whether codes take the place of the latents, so that these have no noise.
    """
    signal, noise = latents.signal, latents.noise
    deviations = np.sqrt(signal + noise)
    shares = signal / np.maximum(signal + noise, np.finfo(float).tiny)
    overall = float(np.sqrt((signal + noise).mean() + latents.mean.var()))
    others = np.abs(latents.correlation) - np.eye(len(signal)) * 2  # a channel is not compared with itself
    partners = others.argmax(axis=1)
    rows: list[list[str | float | int | None]] = []
    for channel, partner in enumerate(partners.tolist()):
        has_partner = partner != channel
        rows.append([str(channel), float(latents.mean[channel]), float(deviations[channel]),
                     None if has_codes else float(shares[channel]),
                     float(latents.correlation[channel, partner]) if has_partner else None,
                     str(partner) if has_partner else None])  # fmt: skip
    columns = ["channel", "mean", "std", "share of signal", "strongest correlation", "with channel"]
    figures = [Figure("latent_std", "Standard deviation of the latents", overall,
                      remark="1 / std is the scaling_factor of diffusers.")]  # fmt: skip
    if not has_codes:
        share = float(signal.mean() / max(signal.mean() + noise.mean(), np.finfo(float).tiny))
        figures.append(Figure("latent_signal", "Share of signal in the latents", share, "higher"))
    warnings = [
        *collapsed_channels(signal, noise),
        *(f"Channels {one} and {two} say nearly the same (correlation {latents.correlation[one, two]:.2f}); fewer "
          "latent_channels would do."
          for one, two in np.argwhere(np.triu(others > NEARLY_THE_SAME)).tolist()),
    ]  # fmt: skip
    tables = [Table("latents", "By channel of the latents", columns, rows)]
    return Section("Are the latents fit for diffusion?", ABOUT_LATENTS, figures, tables, warnings=warnings)


def code_section(counts: Values) -> Section:
    """Whether the codes are used.

    Args:
        counts: How often each code is used, (K,).
    """
    num_codes, num_latents = len(counts), int(counts.sum())
    used = int((counts > 0).sum())
    perplexity = float(np.exp(scipy.stats.entropy(counts)))
    few = num_latents < LATENTS_FOR_A_CODE * num_codes
    remark = f"Only {num_latents:,} latents: some of the {num_codes:,} codes may be unused by chance." if few else ""
    favourites = np.sort(counts)[::-1]
    rows: list[list[str | float | int | None]] = [
        [f"{share:.0%}", max(round(share * num_codes), 1), float(favourites[: max(round(share * num_codes), 1)].sum())
         / num_latents] for share in (0.01, 0.1, 0.5)
    ]  # fmt: skip
    table = Table("codes", "Which part of the latents has the codes that are used most",
                  ["most used", "codes", "share of latents"], rows)  # fmt: skip
    figures = [
        Figure("codes_used", "Share of codes that are used", used / num_codes, "higher", remark=remark),
        Figure("codes_dead", "Codes that are never used", num_codes - used, "lower", remark=f"Of {num_codes:,}."),
        Figure("code_perplexity", "Perplexity of the codes", perplexity, "higher"),
    ]
    warnings = [*filter(None, [unused_codes(counts)])]
    return Section("Are the codes used?", ABOUT_CODES, figures, [table], warnings=warnings)


def worst_section(images: Tensor, reconstructions: Tensor, values: Values, pixel_values: PixelValues) -> Section:
    """The images with the worst reconstructions.

    Args:
        images: The images, worst first, (N, C, H, W) in [-1, 1].
        reconstructions: Their reconstructions, likewise.
        values: Their PSNR, (N,).
        pixel_values: Which of their channels are shown; the errors are of all.
    """
    errors = (images - reconstructions).abs().mean(dim=1) / RANGE  # (N, H, W), in [0, 1]
    largest = max(errors.max().item(), float(np.finfo(np.float32).tiny))
    shown = [over_white(pixel_values.seen(batch)) for batch in (images, reconstructions)]
    pictures = [*shown, _coloured(errors / largest)]
    grid = image_grid(torch.cat(pictures), columns=len(images), min_tile=SHOWN_SIDE)
    caption = (
        "Images, their reconstructions, and the error of each pixel from black (none) to yellow "
        f"({largest:.0%} of the range of values). PSNR: {', '.join(f'{value:.1f}' for value in values)} dB."
    )
    return Section("Where does it fail?", ABOUT_WORST, pictures=[Picture("worst", caption, grid)])


def _coloured(values: Tensor) -> Tensor:
    """Numbers in [0, 1], (N, H, W), in matplotlib's colours from black to yellow, (N, 3, H, W) in [-1, 1]."""
    import matplotlib  # takes a second

    colours = matplotlib.colormaps["inferno"](values.numpy())[..., :3]
    return torch.from_numpy(colours).float().movedim(-1, 1) * 2 - 1
