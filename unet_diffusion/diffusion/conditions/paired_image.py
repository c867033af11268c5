"""Another image of the same scene as a condition, for image to image in pairs.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, section 3.3) concatenate it, encoded, with the noised image;
Brooks et al. 2023 (https://arxiv.org/abs/2211.09800) do so for edits by a text.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.condition import Encode, Request, by_turns, mirrored_like_images
from unet_diffusion.diffusion.conditions.encoded import EncodedCondition
from unet_diffusion.runtime.pictures import in_unit_range


class PairedImage(EncodedCondition):
    """The x0 of a second image, (B, C, h, w), beside the noised one; the null is 0.

    The data hold these images as "paired_image", see `data.Folder`. In latent space the codec of the images encodes
    them, too. To sample, a user gives an image, or a folder of them.

    Args:
        channels: C, the number of channels of x0.
        dropout: Probability of the null in training; 0: there is no null.
    """

    batch_key, network_argument = "paired_image", "concat"
    options = needs = files = ("paired_image",)
    purpose = "draws from a paired image"
    pipeline_role, pipeline_part = "paired_image", "maps"

    def __init__(self, channels: int, *, dropout: float = 0.1):
        from unet_diffusion.diffusion.conditions.paired_image_encoder import PairedImageEncoder  # imports diffusers

        super().__init__(dropout)
        self.config = {"channels": channels, "dropout": dropout}
        self.encoder = PairedImageEncoder(channels)

    def example(self, batch_size: int, sample_shape: tuple[int, int, int]) -> Tensor:
        return torch.zeros(batch_size, self.config["channels"], *sample_shape[1:])

    def bind_sample_shape(self, sample_shape: tuple[int, int, int]) -> None:
        if self.config["channels"] != sample_shape[0]:
            raise ValueError(f"channels of PairedImage must be {sample_shape[0]}, as of what is denoised, got "
                             f"{self.config['channels']}")  # fmt: skip

    def bind_data(self, datamodule: Any) -> None:
        self.numbers_of(datamodule)

    def read(self, batch: Mapping[str, Any], encode: Encode = lambda images: images) -> Tensor:
        pixels = _as_shown(super().read(batch))
        return encode(mirrored_like_images(batch, pixels, pixels.flip(-1)))

    def seen(self, batch: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> Tensor:
        return _as_shown(batch[self.batch_key])

    def from_user(self, request: Request) -> dict[str, Tensor]:
        assert request.read_pictures is not None
        assert request.image_shape is not None
        pictures = request.read_pictures("paired_image", request.values["paired_image"], request.image_shape)
        return {self.batch_key: by_turns(request.encode(pictures), request.num_images)}


def _as_shown(pixels: Tensor) -> Tensor:
    """Images of uint8 or uint16 as float32 in [-1, 1]; floats are there already."""
    return in_unit_range(pixels)
