"""A mask and the part of an image outside it, as a condition for inpainting.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, section 4.5), laid out as in Stable Diffusion's inpainting
network.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.condition import Encode, Request

MOST_BOXES = 4  # boxes per mask
SMALLEST_SIDE, LARGEST_SIDE = 0.2, 0.6  # sides of a box as shares of the image's
COVERS_ALL = 0.25  # share of masks that cover the image, as in the training of Stable Diffusion's inpainting


class MaskedImage(Concat):
    """A mask, 1 where to paint, and the x0 of the masked image, (B, 1 + C, h, w).

    Each training step draws new masks: one to four boxes, or in a quarter of the cases the whole image. To sample, a
    user gives an image and a mask.

    Args:
        channels: 1 + C, for the mask and x0.
    """

    batch_key = "masked_image"
    provides = ("masked_image",)
    needs = ("image", "mask")
    purpose = "paints into an image"
    pipeline_role = "mask"

    def __init__(self, channels: int):
        super().__init__(channels)
        self.config = {"channels": channels}

    def draw(self, shape: torch.Size, generator: torch.Generator) -> dict[str, Tensor]:
        return {"mask": draw_masks(shape[0], (shape[2], shape[3]), generator)}

    def entries(self, images: Tensor, drawn: Mapping[str, Tensor], encode: Encode) -> dict[str, Tensor]:
        return {self.batch_key: masked_image_maps(images, drawn["mask"], encode)}

    def seen(self, batch: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> Tensor:
        return batch["images"] * (1 - entries["mask"])

    def from_user(self, request: Request) -> dict[str, Tensor]:
        assert request.image is not None
        assert request.mask is not None
        maps = masked_image_maps(request.image, request.mask, request.encode)
        return {self.batch_key: maps.expand(request.num_images, -1, -1, -1)}


def masked_image_maps(images: Tensor, mask: Tensor, encode: Encode) -> Tensor:
    """The entry of `MaskedImage`, (B, 1 + C, h, w): the mask at the size of x0, and the x0 of the masked images.

    As in diffusers, the masked area is grey (0), and a latent is masked if its first pixel is.

    Args:
        images: Images, (B, C, H, W) in [-1, 1].
        mask: Masks, (B, 1, H, W) float32, 1 where to paint and 0 elsewhere.
        encode: Function that gives the x0 of images.
    """
    latents = encode(images * (1 - mask))
    return torch.cat([interpolate(mask, latents.shape[2:]), latents], dim=1)


def draw_masks(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random masks for training, (count, 1, H, W) float32: 1 in one to four boxes or everywhere, 0 elsewhere.

    Boxes may reach beyond the border, so that the network learns to paint there, too.

    Args:
        count: The number of masks.
        size: H and W.
        generator: Generator of the boxes; the masks are on its device.
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
    """Whether boxes cover each pixel of a side, (..., side) bool.

    Args:
        centre: Centre of each box as a share of the side, (..., 1).
        share: Size of each box in [0, 1], between SMALLEST_SIDE and LARGEST_SIDE, (..., 1).
        side: Length of the side in pixels.
    """
    extent = SMALLEST_SIDE + (LARGEST_SIDE - SMALLEST_SIDE) * share
    pixels = (torch.arange(side, device=centre.device) + 0.5) / side
    return (pixels - centre).abs() <= extent / 2
