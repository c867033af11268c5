"""Boxes around objects as tokens to attend to, for layout to image.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752, section 4.3.1) give each box three words of a vocabulary, for its
class and two quantised corners, in an order. Here a box is one token, of its class and of waves of its sides as in
GLIGEN (Li et al. 2023, https://arxiv.org/abs/2301.07093), so that near boxes have near tokens and need no order.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_diffusion.diffusion.conditions.coco import coco_boxes, fitted_boxes
from unet_diffusion.diffusion.conditions.condition import (
    Condition,
    Encode,
    Request,
    by_turns,
    mirrored_like_images,
)
from unet_diffusion.diffusion.conditions.encoded import EncodedCondition
from unet_diffusion.runtime.cropping import Size
from unet_diffusion.runtime.messages import did_you_mean, first_few


class BoxTokens(EncodedCondition):
    """Boxes with names, (B, max_boxes, 5), as tokens, (B, max_boxes, context_dim); the null is no box.

    The data hold the boxes of each image as a text in their entry "boxes": JSON of [name, left, top, width, height] in
    pixels; `data.Folder` makes it of a file of COCO's form. The names are learnt from the data. To sample, a user gives
    a list of such boxes, a list of lists, or a JSON file of these or of COCO's form, whose images take turns by name.

    Args:
        context_dim: Width of a token, which must be the network's context_dim.
        num_classes: Largest number of different names.
        max_boxes: Number of tokens; of more boxes in an image, the largest are taken.
        num_layers: Number of layers of the transformer.
        num_heads: Number of attention heads of the transformer.
        dropout: Probability of the null in training; 0: there is no null.

    Raises:
        ValueError: If context_dim is not a multiple of num_heads.
    """

    batch_key, network_argument = "boxes", "context"
    options = needs = files = ("boxes",)
    purpose = "draws from boxes"
    pipeline_role, pipeline_part = "boxes", "tokens"

    def __init__(
        self,
        context_dim: int,
        num_classes: int,
        *,
        max_boxes: int = 30,
        num_layers: int = 2,
        num_heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__(dropout)
        if context_dim % num_heads:
            raise ValueError(f"context_dim must be a multiple of num_heads, got {context_dim} and {num_heads}")
        from unet_diffusion.diffusion.conditions.box_tokens_encoder import BoxTokensEncoder  # imports diffusers

        network = {"context_dim": context_dim, "num_classes": num_classes, "max_boxes": max_boxes}
        network |= {"num_layers": num_layers, "num_heads": num_heads}
        self.config = {**network, "dropout": dropout}
        self.encoder = BoxTokensEncoder(**network)
        self._data: list[tuple[str, list[Any]]] = []  # name and boxes of each image of the data, after bind_data
        self._image_size = (0, 0)
        self._boxes_of_data: Tensor | None = None  # (N, max_boxes, 5), on the device

    @classmethod
    def of_pipeline(cls, arguments: Mapping[str, Any], dropout: float) -> "BoxTokens":
        condition = cls(**{name: value for name, value in arguments.items() if name != "names"}, dropout=dropout)
        condition.take_names(arguments["names"])
        return condition

    @property
    def names(self) -> list[str]:
        """The names of the classes; none before they are learnt."""
        return list(self.encoder.config["names"] or [])

    def example(self, batch_size: int, sample_shape: tuple[int, int, int]) -> Tensor:
        whole_image = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
        return whole_image.expand(batch_size, self.config["max_boxes"], -1).clone()

    def bind_data(self, datamodule: Any) -> None:
        """Keep the boxes of the data, and learn their names, if none are known.

        Raises:
            ValueError: If the data have no boxes, too many names or unknown ones, or boxes outside their image.
        """
        texts = getattr(datamodule, "entries", {}).get(self.batch_key)
        if not isinstance(texts, list):
            raise ValueError(
                "the model is conditioned on boxes, and the data have none; set data.boxes to a JSON file of COCO's "
                "form, or let the items of the source hold them as JSON"
            )
        image_names = getattr(datamodule.image_set, "names", None) or [f"image {index}" for index in range(len(texts))]
        self._data = [(name, _parsed(text, name)) for text, name in zip(texts, image_names, strict=True)]
        codec, shape = getattr(datamodule, "codec", None), datamodule.image_shape
        height, width = (shape if codec is None else codec.image_shape(shape))[1:]
        self._image_size = (height, width)
        self.take_names(self.names or sorted({str(box[0]) for _, boxes in self._data for box in boxes}))

    def take_names(self, names: Sequence[str]) -> None:
        """Have these names for the classes from 0.

        Raises:
            ValueError: If they are too many, or do not include those of the data, or a box lies outside of its image.
        """
        if len(names) > self.config["num_classes"]:
            raise ValueError(f"num_classes of BoxTokens must be at least {len(names)}, as many as the names in the "
                             f"data, got {self.config['num_classes']}")  # fmt: skip
        images = {str(box[0]): image for image, boxes in self._data for box in boxes}
        if unknown := [f"{name} ({image})" for name, image in sorted(images.items()) if name not in names]:
            raise ValueError(f"boxes of the data must have names that the checkpoint knows ({first_few(names)}), got "
                             f"{first_few(unknown)}; rename them, or train anew")  # fmt: skip
        self.encoder.register_to_config(names=list(names))
        self._boxes_of_data = None
        if self._data:
            self._boxes_of_data = torch.stack(
                [self.encoder.entry_of(boxes, self._image_size) for _, boxes in self._data]
            )

    def copy_learned(self, other: Condition) -> None:
        self.set_extra_state(other.get_extra_state())

    def notes(self) -> list[str]:
        if not self._data:
            return []
        most = self.config["max_boxes"]
        num_cut = sum(len(boxes) > most for _, boxes in self._data)
        cut = f"; of {num_cut} images only the {most} largest boxes" if num_cut else ""
        return [f"boxes: {len(self.names)} names ({first_few(self.names)}){cut}"]

    def read(self, batch: Mapping[str, Any], encode: Encode = lambda images: images) -> Tensor:
        """The boxes of a batch, (B, max_boxes, 5): its "boxes", or those of the images that its "index" names."""
        if self.batch_key in batch or self._boxes_of_data is None or "index" not in batch:
            return super().read(batch)
        self._boxes_of_data = self._boxes_of_data.to(batch["index"].device)
        boxes = self._boxes_of_data[batch["index"]]
        classes, left, top, right, bottom = boxes.unbind(-1)
        mirrored = torch.stack([classes, 1 - right, top, 1 - left, bottom], dim=-1)
        return mirrored_like_images(batch, boxes, mirrored)

    def seen(self, batch: Mapping[str, Tensor], entries: Mapping[str, Tensor]) -> Tensor:
        """The outlines of the boxes on black, brighter for later names."""
        channels, height, width = batch["images"].shape[1:]
        boxes, num_classes = entries[self.batch_key].cpu(), self.config["num_classes"]
        pictures = torch.full((len(boxes), channels, height, width), -1.0)
        for picture, rows in zip(pictures, boxes, strict=True):
            for label, left, top, right, bottom in rows.tolist():
                if label == num_classes:
                    continue
                x0, x1 = int(left * (width - 1)), round(right * (width - 1))
                y0, y1 = int(top * (height - 1)), round(bottom * (height - 1))
                grey = (label + 1) / num_classes
                picture[:, [y0, y1], x0 : x1 + 1] = grey
                picture[:, y0 : y1 + 1, [x0, x1]] = grey
        if channels == 4:
            pictures[:, -1] = 1.0  # opaque
        return pictures

    def meaning(self) -> Any:
        return self.names

    def image_names(self, value: Any) -> list[str]:
        value = _content(value)
        return sorted(coco_boxes(value).boxes) if isinstance(value, dict) else []

    def from_user(self, request: Request) -> dict[str, Tensor]:
        assert request.image_shape is not None
        size = request.image_shape[1:]
        boxes = _of_user(request.values["boxes"], size)
        names = {str(box[0]) for one in boxes for box in one}
        if unknown := sorted(names - {*self.names}):
            raise ValueError(f"boxes must have names among {', '.join(self.names)}, got {unknown[0]!r}"
                             f"{did_you_mean(unknown[0], self.names)}")  # fmt: skip
        return {"boxes": by_turns(self.encoder.prepare(boxes, size), request.num_images)}

    def get_extra_state(self) -> Tensor:
        """The names as the bytes of their JSON, uint8, for a checkpoint."""
        return torch.frombuffer(bytearray(json.dumps(self.names).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the names from `get_extra_state`."""
        self.take_names(json.loads(bytes(state.tolist())))


def _parsed(text: str, image: str) -> list[Any]:
    try:
        boxes = json.loads(text)
    except ValueError:
        boxes = None
    if not _is_list_of_boxes(boxes):
        raise ValueError(f"boxes of {image} must be JSON of [name, left, top, width, height], got {text[:80]!r}")
    return boxes


def _of_user(value: Any, size: Size) -> list[list[Any]]:
    """The boxes of each image that a user asks for, in an image of this size.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the value is of another form.
    """
    value = _content(value)
    if isinstance(value, dict):
        found = coco_boxes(value)
        if found.wrong:
            raise ValueError(f"boxes cannot be used: {first_few(found.wrong)}")
        return [fitted_boxes(one, found.sizes[name], size) for name, one in sorted(found.boxes.items())]
    if _is_list_of_boxes(value):
        return [value]
    if isinstance(value, list | tuple) and value and all(map(_is_list_of_boxes, value)):
        return list(value)
    raise ValueError(f"boxes must be a list of (name, left, top, width, height) in pixels, or a list of such lists, "
                     f"got {str(value)[:80]}")  # fmt: skip


def _content(value: Any) -> Any:
    """What a JSON file holds, or the value itself if it is no path."""
    if not isinstance(value, str | Path):
        return value
    path = Path(value).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"boxes must be a JSON file, and there is none at {path}")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"boxes must be a JSON file, and {path} holds something else: {error}") from error


def _is_list_of_boxes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(box, list | tuple) and len(box) == 5 and isinstance(box[0], str)
        and all(isinstance(side, int | float) for side in box[1:])
        for box in value
    )  # fmt: skip
