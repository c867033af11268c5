"""The tokens of boxes; an exported folder has them and this file in `tokens/`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

NUM_FREQUENCIES = 8  # of each side of a box, as in GLIGEN: the finest wave is 1/128 of the image long
ROUNDING = 1.0  # pixels that a box may reach beyond its image: annotations are rounded


class BoxTokensEncoder(ModelMixin, ConfigMixin):
    """A token for each box, of its class and its four sides; the tokens attend to each other, and have no order.

    Args:
        context_dim: Width of a token.
        num_classes: The largest number of classes; index num_classes stands for no box.
        max_boxes: The number of tokens, M; of more boxes, the largest are taken.
        num_layers: Number of layers of the transformer.
        num_heads: Number of attention heads of the transformer.
        names: The name of each class; None: they are not known yet.
    """

    argument = "boxes"

    @register_to_config
    def __init__(
        self,
        context_dim: int,
        num_classes: int,
        max_boxes: int = 30,
        num_layers: int = 2,
        num_heads: int = 4,
        names: list[str] | None = None,
    ):
        super().__init__()
        self.class_embedding = nn.Embedding(num_classes + 1, context_dim)
        sides = nn.Linear(8 * NUM_FREQUENCIES, context_dim)  # sine and cosine of four sides
        self.side_embedding = nn.Sequential(sides, nn.SiLU(), nn.Linear(context_dim, context_dim))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                context_dim, num_heads, 4 * context_dim, dropout=0.0, activation="gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(context_dim)

    @property
    def usage(self) -> str:
        """Python that makes boxes to draw from."""
        name = (self.config["names"] or ["name"])[0]
        return f"boxes = [({name!r}, 0, 0, 8, 8)]  # name, left, top, width and height in pixels"

    def forward(self, boxes: Tensor) -> Tensor:
        """The tokens, (B, M, context_dim), of boxes, (B, M, 5): class, left, top, right and bottom in [0, 1]."""
        classes, sides = boxes[..., 0].long(), boxes[..., 1:]
        waves = sides[..., None] * (2.0 ** torch.arange(NUM_FREQUENCIES, device=boxes.device) * math.pi)
        waves = torch.cat([waves.sin(), waves.cos()], dim=-1).flatten(-2).to(self.norm.weight.dtype)
        is_box = (classes < self.config["num_classes"])[..., None]
        tokens = self.class_embedding(classes) + self.side_embedding(waves) * is_box
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)

    def null(self, boxes: Tensor) -> Tensor:
        """No boxes at all, of the shape of `boxes`."""
        none = torch.zeros_like(boxes)
        none[..., 0] = self.config["num_classes"]
        return none

    def entry_of(self, boxes: Sequence[Sequence[Any]], size: tuple[int, int]) -> Tensor:
        """The boxes of one image as numbers, (M, 5), largest first.

        Args:
            boxes: (name, left, top, width, height) of each box in pixels.
            size: Height and width of the image.

        Raises:
            ValueError: If a name is not known, or a box does not lie within the image.
        """
        names, (image_height, image_width) = self.config["names"] or [], size
        entry = self.null(torch.zeros(self.config["max_boxes"], 5))
        largest_first = sorted(boxes, key=lambda box: -float(box[3]) * float(box[4]))
        for row, (name, left, top, width, height) in enumerate(largest_first):
            if name not in names:
                raise ValueError(f"boxes must have names among {', '.join(names)}, got {name!r}")
            ends = ((left, left + width, image_width), (top, top + height, image_height))
            is_inside = all(start >= -ROUNDING and end <= side + ROUNDING for start, end, side in ends)
            if not (is_inside and width > 0 and height > 0):
                raise ValueError(f"boxes must lie within the image of {image_width} x {image_height} (width x height), "
                                 f"got {name!r} at left {left:g}, top {top:g}, width {width:g}, height {height:g}"
                )  # fmt: skip
            if row < len(entry):
                sides = torch.tensor([left, top, left + width, top + height], dtype=torch.float32)
                shares = sides / torch.tensor([image_width, image_height, image_width, image_height])
                entry[row] = torch.cat([torch.tensor([float(names.index(name))]), shares.clamp(0, 1)])
        return entry

    def prepare(self, boxes: Any, size: tuple[int, int], encode: Any = None) -> Tensor:
        """The boxes of N images as numbers, (N, M, 5).

        Args:
            boxes: A list of (name, left, top, width, height) in pixels for one image, or N such lists.
            size: Height and width of the images.
            encode: Not used: boxes are not encoded.

        Raises:
            ValueError: If a name is not known, or a box does not lie within the image.
        """
        is_one = not boxes or isinstance(boxes[0][0] if boxes[0] else None, str)
        return torch.stack([self.entry_of(one, size) for one in ([boxes] if is_one else boxes)])
