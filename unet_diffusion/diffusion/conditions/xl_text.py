"""Captions and sizes as Stable Diffusion XL takes them (Podell et al. 2023, https://arxiv.org/abs/2307.01952).

Two CLIP text encoders read the caption. The states before their last layers, side by side, are the tokens to attend to.
The pooled state of the second one, and the sinusoids of six numbers, are a vector beside the timestep: the size of the
image's file, how much of it was cut off at the top and at the left, and the size of the image.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from unet_diffusion.diffusion.conditions.condition import Condition, Encode, Request, by_turns
from unet_diffusion.diffusion.conditions.text import TextTokens, load_frozen, text_config
from unet_diffusion.models.embeddings import sinusoids
from unet_diffusion.runtime.atomic_files import read_json
from unet_diffusion.runtime.cropping import Crop, Size
from unet_diffusion.runtime.initial_weights import WithoutInitialWeights

NUM_SIZES = 6  # height and width of the file, top and left of the cut, height and width of the image
SIZE_WAVES = 256  # sinusoids of each


class XLText(Condition):
    """A caption for each image, and sizes: token ids and sizes (B, 2 L + 6) int64 become tokens and a vector.

    The encoders and tokenizers are those of a Stable Diffusion XL folder and are not trained; see `pretrained_xl_text`.
    The null is zero in the tokens and in the caption's part of the vector.

    Args:
        context_dim: Width of a token, which must be the network's context_dim: the sum of those of the encoders.
        projection_dim: Width of the pooled state; the network's vector_dim is 6 * 256 more.
        first: Arguments of the first encoder, as of `TextTokens`.
        second: Arguments of the second encoder.
        dropout: Probability of the null in training; 0: there is no null.

    Raises:
        ValueError: If the widths do not fit, or the encoders take captions of different lengths.
    """

    batch_key, network_argument = "captions", "context"
    options = needs = ("captions",)
    purpose = "draws from captions"
    pipeline_role = "xl_prompt"

    def __init__(
        self,
        context_dim: int,
        projection_dim: int,
        first: dict[str, Any],
        second: dict[str, Any],
        dropout: float = 0.1,
    ):
        super().__init__(dropout)
        self.config = {
            **{"context_dim": context_dim, "projection_dim": projection_dim},
            **{"first": first, "second": second, "dropout": dropout},
        }
        if context_dim != first["context_dim"] + second["context_dim"]:
            raise ValueError(f"context_dim of XLText must be the sum of its encoders', {first['context_dim']} and "
                             f"{second['context_dim']}, got {context_dim}")  # fmt: skip
        if first["max_length"] != second["max_length"]:
            raise ValueError(f"both encoders of XLText must take captions of one length, got max_length "
                             f"{first['max_length']} and {second['max_length']}")  # fmt: skip
        self.first, self.second = TextTokens(**first), TextTokens(**second)
        self.projection = nn.Linear(second["context_dim"], projection_dim, bias=False)
        self.requires_grad_(False)
        self.captions: list[str] | None = None  # of all images of the data, after bind_data
        self._crops: Sequence[Crop] | None = None  # of each of them; None: not known
        self._image_size: Size = (0, 0)  # of all of them
        self._tokens_of_data: Tensor | None = None  # (N, 2 L), on the device
        self._sizes_of_data = torch.empty(0, NUM_SIZES)  # (2 N, 6), there too; those of the mirror images come last
        self._tokenizers: tuple[Any, Any] = (None, None)  # that it was made with

    @property
    def network_arguments(self) -> tuple[str, ...]:
        return "context", "vector"

    @property
    def max_length(self) -> int:
        """L, the number of tokens of a caption."""
        return int(self.config["first"]["max_length"])

    def null(self, entry: Tensor) -> Tensor:
        null = torch.full_like(entry, -1)
        null[:, -NUM_SIZES:] = entry[:, -NUM_SIZES:]
        return null

    def forward(self, entry: Tensor) -> Any:  # "context" and "vector"
        ids, sizes = entry[:, :-NUM_SIZES].view(len(entry), 2, -1), entry[:, -NUM_SIZES:]
        is_known = (ids[:, 0, :1] >= 0).to(self.projection.weight.dtype)  # (B, 1)
        first = self.first.encoder(input_ids=ids[:, 0].clamp(min=0), output_hidden_states=True)
        second = self.second.encoder(input_ids=ids[:, 1].clamp(min=0), output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=2) * is_known[..., None]
        end = (ids[:, 1] == cast(int, self.second.encoder.config.eos_token_id)).int().argmax(dim=1)
        pooled = self.projection(second.last_hidden_state[torch.arange(len(end), device=end.device), end]) * is_known
        return {"context": context, "vector": torch.cat([pooled, size_waves(sizes)], dim=1)}

    def example(self, batch_size: int, sample_shape: tuple[int, int, int]) -> Tensor:
        return torch.zeros(batch_size, 2 * self.max_length + NUM_SIZES, dtype=torch.int64)

    def entry_of(self, captions: Sequence[str], sizes: Sequence[Sequence[float]]) -> Tensor:
        """The entry of captions and sizes, (N, 2 L + 6) int64.

        Raises:
            RuntimeError: If there are no tokenizers.
        """
        return torch.cat([self._token_ids(captions), _rounded(sizes)], dim=1)

    def _token_ids(self, captions: Sequence[str]) -> Tensor:
        return torch.cat([self.first.token_ids(captions), self.second.token_ids(captions)], dim=1)

    def bind_data(self, datamodule: Any) -> None:
        """Keep the captions and sizes of the data.

        Raises:
            ValueError: If the data have no captions, or crops of another number of images.
        """
        captions = getattr(datamodule, "entries", {}).get(self.batch_key)
        if captions is None:
            raise ValueError("the model is conditioned on captions, and the data have none; set data.captions to true")
        for text in (self.first, self.second):  # until those of a checkpoint are loaded
            text.learn_words([captions[i] for i in datamodule.train_indices.tolist()])
        codec, shape = getattr(datamodule, "codec", None), datamodule.image_shape
        self._image_size = (shape if codec is None else codec.image_shape(shape))[1:]
        self._crops = getattr(getattr(datamodule, "source", None), "crops", None)
        if self._crops is not None and len(self._crops) != len(captions):
            raise ValueError(f"crops of the source must be one for each image, got {len(self._crops)} for "
                             f"{len(captions)} images; let the source define them anew")  # fmt: skip
        self.captions, self._tokens_of_data = captions, None

    def notes(self) -> list[str]:
        if self.captions is None or self._crops is not None:
            return []
        return [f"sizes of images: the data do not hold those of their files, so each is taken for a file of "
                f"{'x'.join(map(str, self._image_size))} of which nothing was cut; train on the folder, encode or "
                "pack it again, or let a source of your own define crops"]  # fmt: skip

    def copy_learned(self, other: Condition) -> None:
        assert isinstance(other, XLText)
        self.first.copy_learned(other.first)
        self.second.copy_learned(other.second)

    def read(self, batch: Mapping[str, Any], encode: Encode = lambda images: images) -> Tensor:
        """The entry of a batch, (B, 2 L + 6): its "captions", or those of the images that its "index" names."""
        if self.batch_key in batch or self.captions is None or "index" not in batch:
            return super().read(batch)
        index, tokenizers = batch["index"], (self.first.tokenizer, self.second.tokenizer)
        if self._tokens_of_data is None or self._tokenizers != tokenizers:  # a checkpoint has brought others
            self._tokenizers = tokenizers
            self._tokens_of_data = self._token_ids(self.captions).to(index.device)
            self._sizes_of_data = self._sizes_with_mirrored(self.captions).to(index.device)
        mirrored = len(self.captions) * batch.get("is_mirrored", torch.zeros_like(index))
        return torch.cat([self._tokens_of_data[index], self._sizes_of_data[index + mirrored]], dim=1)

    def _sizes_with_mirrored(self, captions: Sequence[str]) -> Tensor:
        """The sizes of all images, then those of their mirror images, (2 N, 6) int64."""
        crops = self._crops or [Crop.centred(self._image_size, self._image_size)] * len(captions)
        both = [*crops, *(crop.mirrored for crop in crops)]
        return _rounded([sizes_of(crop, self._image_size) for crop in both])

    def meaning(self) -> Any:
        return [self.first.meaning(), self.second.meaning()]

    def values_of(self, indices: Sequence[int]) -> dict[str, Any]:
        return {} if self.captions is None else {"captions": [self.captions[i] for i in indices]}

    def from_user(self, request: Request) -> dict[str, Tensor]:
        assert request.image_shape is not None
        captions = request.values["captions"]
        captions = [captions] if isinstance(captions, str) else list(captions)
        size = request.image_shape[1:]
        whole = sizes_of(Crop.centred(size, size), size)
        return {"captions": by_turns(self.entry_of(captions, [whole] * len(captions)), request.num_images)}

    def pipeline_parts(self) -> dict[str, Any]:
        from transformers import CLIPTextModelWithProjection

        config = copy.deepcopy(self.second.encoder.config)
        config.projection_dim = self.config["projection_dim"]
        second = CLIPTextModelWithProjection(config)
        second.text_model.load_state_dict(self.second.encoder.state_dict())
        second.text_projection.load_state_dict(self.projection.state_dict())
        return {**self.first.pipeline_parts(), "text_encoder_2": second.eval(), "tokenizer_2": self.second.tokenizer}

    @property
    def pipeline_null(self) -> Any:
        return None

    def pipeline_outputs(self, pipeline: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """The tokens and the pooled state for a caption, each with its own tokenizers."""
        caption = "A caption of 7 words, and more"
        ours = copy.deepcopy(self).cpu().float().eval()
        given = ours(ours.entry_of([caption], [(8, 8, 0, 0, 8, 8)]))
        tokens, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        return {
            "tokens of captions": (given["context"], tokens),
            "pooled state": (given["vector"][:, : pooled.shape[1]], pooled),
        }


def size_waves(sizes: Tensor) -> Tensor:
    """The sinusoids of sizes, (B, 6) to (B, 6 * 256) float32."""
    return sinusoids(sizes.flatten(), SIZE_WAVES).view(len(sizes), -1)


def sizes_of(crop: Crop, image_size: Size) -> tuple[float, ...]:
    """The six numbers of an image: its file's size, top and left of the cut in pixels of the image, its size.

    Args:
        crop: The part of the file that the image shows.
        image_size: Height and width of the image.
    """
    top, left, height, _ = crop.box
    scale = image_size[0] / height
    return (*crop.size, top * scale, left * scale, *image_size)


def _rounded(sizes: Sequence[Sequence[float]]) -> Tensor:
    """Sizes as whole numbers, (N, 6) int64."""
    return torch.tensor([[round(side) for side in row] for row in sizes])


def pretrained_xl_text(folder: str | Path, *, dropout: float = 0.1) -> XLText:
    """The condition of the text encoders and tokenizers in a local Stable Diffusion XL folder.

    Args:
        folder: Folder with text_encoder/, text_encoder_2/, tokenizer/ and tokenizer_2/.
        dropout: Probability of the null in training.

    Raises:
        FileNotFoundError: If a subfolder is missing, or the weights are not safetensors.
        ValueError: If an encoder does not have CLIP's architecture.
    """
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder = Path(folder)
    first, second = (text_config(folder / name) for name in ("text_encoder", "text_encoder_2"))
    projection_dim = read_json(folder / "text_encoder_2" / "config.json")["projection_dim"]
    widths = {"context_dim": first["context_dim"] + second["context_dim"], "projection_dim": projection_dim}
    with WithoutInitialWeights():
        text = XLText(**widths, first=first, second=second, dropout=dropout)
    load_frozen(text.first, CLIPTextModel, folder / "text_encoder", folder / "tokenizer")
    config = copy.deepcopy(text.second.encoder.config)
    config.projection_dim = projection_dim
    loaded = load_frozen(
        text.second, CLIPTextModelWithProjection, folder / "text_encoder_2", folder / "tokenizer_2", config=config
    )
    text.projection.load_state_dict(loaded.text_projection.state_dict())
    return text
