"""How near reconstructions are to their images: PSNR, SSIM and LPIPS."""

from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from unet_diffusion.evaluation.intervals import Values, as_sums, mean_of_sums
from unet_diffusion.runtime.safe_loading import load_plain

PerceptualNet = Literal["vgg", "alex", "squeeze"]

PERCEPTUAL_FILES = {  # torchvision's, on which the linear heads that torchmetrics brings were trained
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
RANGE = 2.0  # of images in [-1, 1]
SSIM_SIDE = 11  # pixels of its window (Wang et al. 2004)


def psnr(images: Tensor, reconstructions: Tensor, where: Tensor | None = None) -> Tensor:
    """10 log10(4 / mean squared error) of each image in [-1, 1], (B,) float32, in decibels; 100 at most.

    Args:
        images: The images, (B, C, H, W).
        reconstructions: What is compared with them, of the same shape.
        where: The pixels that are compared, (B, 1, H, W) bool; None: all are. Without any, the result is NaN.
    """
    errors = (images.float() - reconstructions.float().clamp(-1, 1)).square()
    weights = torch.ones_like(errors) if where is None else where.expand_as(errors).float()
    means = (errors * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1)
    return 10 * torch.log10(RANGE**2 / means.clamp(min=RANGE**2 * 1e-10))


def errors_as_sums(psnr: Values) -> Values:
    """The mean squared errors that the PSNR of images, (N,), stand for, as counts that add up, (N, 2)."""
    return as_sums(RANGE**2 / 10 ** (psnr / 10))


def pooled_psnr(sums: Values) -> Values:
    """The PSNR of the mean of squared errors, of sums of `errors_as_sums`, (..., 2) -> (...).

    Few images with hardly any error raise it less than they raise the mean of PSNR.
    """
    return 10 * np.log10(RANGE**2 / mean_of_sums(sums))


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), (B,) float32; NaN for images too small for its window."""
    if min(images.shape[-2:]) < SSIM_SIDE:
        return torch.full((len(images),), torch.nan, device=images.device)
    pair = reconstructions.float().clamp(-1, 1), images.float()
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would lose the small differences of moments
        return cast(Tensor, structural_similarity_index_measure(*pair, data_range=RANGE, reduction="none"))


def lpips(net: PerceptualNet) -> nn.Module:
    """The network of LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924), frozen.

    Raises:
        FileNotFoundError: If torchvision's weights are not in torch's cache.
        ValueError: If they are damaged, or could run code.
    """
    path = perceptual_file(net)
    if not path.is_file():
        raise FileNotFoundError(
            f"perceptual_weight needs {path}, the weights of torchvision's network, and nothing is downloaded here; "
            "put the file there, or set perceptual_weight to 0"
        )
    load_plain(path)  # refuses code in it, which torchvision would run
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type=net).net.requires_grad_(False).eval()


def perceptual_file(net: PerceptualNet) -> Path:
    """Where torch's cache has the weights of a network of LPIPS, if it has them."""
    return Path(torch.hub.get_dir()) / "checkpoints" / PERCEPTUAL_FILES[net]
