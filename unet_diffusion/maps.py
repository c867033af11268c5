"""Maps beside the noised image: what a mask leaves of it, to paint the rest; a small image, to be enlarged.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, sections 4.4 and 4.5), laid out as in Stable Diffusion's networks
for inpainting and for upscaling. A small image is noised, and the network told how much (Ho et al. 2021,
https://arxiv.org/abs/2106.15282, section 4.2), so that its errors are not taken for detail.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unet_diffusion.conditioning import Maps
from unet_diffusion.schedule import NoiseSchedule

Encode = Callable[[Tensor], Tensor]
"""encode(images): what is denoised for images (B, C, H, W) in [-1, 1]: their normalised latents, or they themselves."""

MOST_BOXES = 4  # of a mask
SMALLEST_SIDE, LARGEST_SIDE = 0.2, 0.6  # of a box, as a share of the image's
COVERS_ALL = 0.25  # share of the masks, as in the training of Stable Diffusion's networks for inpainting
LOW_RES_SCHEDULE = NoiseSchedule(1000, "scaled_linear", beta_start=1.0e-4, beta_end=0.02)  # of a small image, as in
MAX_NOISE_LEVEL = 350  # Stable Diffusion's upscaler; and the highest timestep of it that is used
MAPS_KEY = 2  # keeps what is drawn here apart from noise, which has the same seed


class MaskedImage(Maps):
    """A mask, 1 where to paint, and the image or its latents without what it covers: (B, 1 + C, H, W).

    Args:
        channels: 1 + C.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.config = {"channels": channels}


class LowResolution(Maps):
    """A small image of the latents' size, noised to the level that is the network's class: (B, C, h, w).

    The network has a class for each level, `LOW_RES_SCHEDULE.num_train_timesteps`.

    Args:
        channels: of the image.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.config = {"channels": channels}


def masked_image_maps(images: Tensor, mask: Tensor, encode: Encode) -> Tensor:
    """What `MaskedImage` is given, (B, 1 + C, h, w): the mask at the latents' size, and those of the image under it.

    What is covered is grey, 0, and a latent is covered where its first pixel is, both as in diffusers.

    Args:
        images: (B, C, H, W) in [-1, 1].
        mask: 1 where to paint, 0 elsewhere, (B, 1, H, W) float32.
        encode: of images.
    """
    latents = encode(images * (1 - mask))
    return torch.cat([interpolate(mask, latents.shape[2:]), latents], dim=1)


def draw_masks(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Masks to train on, (count, 1, H, W) float32: 1 in one to four boxes, or everywhere, 0 elsewhere.

    Boxes may reach beyond the border, or nothing would be learnt of it.

    Args:
        count: how many.
        size: H and W.
        generator: of the boxes; the masks are on its device.
    """
    device = generator.device
    y, x, height, width = torch.rand(4, count, MOST_BOXES, 1, generator=generator, device=device)
    rows, columns = _within(y, height, size[0]), _within(x, width, size[1])  # (count, boxes, H) and (count, boxes, W)
    num_boxes = torch.randint(1, MOST_BOXES + 1, (count, 1), generator=generator, device=device)
    is_used = torch.arange(MOST_BOXES, device=device) < num_boxes
    boxes = rows[..., :, None] & columns[..., None, :] & is_used[..., None, None]
    covers_all = torch.rand(count, 1, 1, 1, generator=generator, device=device) < COVERS_ALL
    return (boxes.any(dim=1, keepdim=True) | covers_all).float()


def _within(centre: Tensor, share: Tensor, side: int) -> Tensor:
    """Which pixels of a side boxes cover, (..., side) bool, where centre and share, in [0, 1], say where they lie."""
    extent = SMALLEST_SIDE + (LARGEST_SIDE - SMALLEST_SIDE) * share
    pixels = (torch.arange(side, device=centre.device) + 0.5) / side
    return (pixels - centre).abs() <= extent / 2


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images at a smaller size, (B, C, *size) in [-1, 1], bicubic and antialiased."""
    return interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
