"""The conditions in a file of latent diffusion or Stable Diffusion: CLIP's text encoders, and tokens of classes.

Such a file holds no words: the tokenizer is that of CLIP, in a folder that the user names. Both CLIPs have attention
heads of 64 channels; CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020) pads a caption with its end token,
and OpenCLIP (https://github.com/mlfoundations/open_clip) with the token of number 0.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
from torch import Tensor

from unet_diffusion.diffusers_io.weights import load_weights
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.text import TextTokens, import_transformers
from unet_diffusion.diffusion.conditions.xl_text import XLText
from unet_diffusion.runtime.initial_weights import WithoutInitialWeights

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

HiddenAct = Literal["quick_gelu", "gelu"]
StrPath = str | os.PathLike[str]
HEAD_CHANNELS = 64  # of all published text encoders
XL_PREFIX, OPEN_PREFIX = "conditioner.embedders.1.model.", "cond_stage_model.model."
PUBLISHED_CLASSES = {1001: 1000, 1000: 1000}  # rows -> classes: cin256-v2 has a null, and cin-ldm-vq-f8 has none
PROJECTION = "text_projection.weight"
MOST_USED_LAYERS = 23  # of OpenCLIP's 24 in Stable Diffusion 2, which takes the state before the last layer


def clip_text(tensors: Mapping[str, Tensor], tokenizer: StrPath | None, *, dropout: float) -> TextTokens:
    """The condition of CLIP's text encoder in a file of Stable Diffusion 1.

    Args:
        tensors: The tensors in the file by name.
        tokenizer: Folder of CLIP's tokenizer.
        dropout: Probability of the empty caption in training.

    Raises:
        ValueError: If the tokenizer is not given, or does not fit the encoder.
    """
    words = tokenizer_of(tokenizer)
    converted = _without_prefix(convert_ldm_clip_checkpoint(dict(tensors)))
    return _text(converted, words, hidden_act="quick_gelu", dropout=dropout)


def open_clip_text(tensors: Mapping[str, Tensor], tokenizer: StrPath | None, *, dropout: float) -> TextTokens:
    """The condition of OpenCLIP's text encoder in a file of Stable Diffusion 2, without its last layer.

    The arguments and errors are those of `clip_text`.
    """
    words = _padded_by_number_0(tokenizer_of(tokenizer))
    converted, _ = _open_clip(tensors, OPEN_PREFIX)
    blocks = f"{OPEN_PREFIX}transformer.resblocks."
    num_layers = len({key.removeprefix(blocks).split(".")[0] for key in tensors if key.startswith(blocks)})
    if f"{OPEN_PREFIX}text_projection" in tensors or num_layers > MOST_USED_LAYERS:  # all of OpenCLIP
        converted = {key: value for key, value in converted.items() if f"layers.{num_layers - 1}." not in key}
    return _text(converted, words, hidden_act="gelu", dropout=dropout)


def xl_text(tensors: Mapping[str, Tensor], tokenizer: StrPath | None, *, dropout: float) -> XLText:
    """The condition of both text encoders in a file of Stable Diffusion XL.

    The arguments and errors are those of `clip_text`.
    """
    first = _text(
        _without_prefix(convert_ldm_clip_checkpoint(dict(tensors))),
        tokenizer_of(tokenizer),
        hidden_act="quick_gelu",
        dropout=0.0,
    )
    converted, projection = _open_clip(tensors, XL_PREFIX)
    second = _text(converted, _padded_by_number_0(tokenizer_of(tokenizer)), hidden_act="gelu", dropout=0.0)
    assert projection is not None
    with WithoutInitialWeights():
        text = XLText(
            first.config["context_dim"] + second.config["context_dim"],
            projection.shape[0],
            first=first.config,
            second=second.config,
            dropout=dropout,
        )
    for ours, read in ((text.first, first), (text.second, second)):
        ours.load_state_dict(read.state_dict())
    with torch.no_grad():
        text.projection.weight.copy_(projection)
    return text


def class_tokens(
    tensors: Mapping[str, Tensor], num_classes: int | None, path: StrPath, *, dropout: float
) -> ClassTokens:
    """The condition of classes in a file of latent diffusion; a row beyond those of the classes is the null.

    Args:
        tensors: The tensors in the file by name.
        num_classes: Number of classes; None: that of the published models, which is known by the number of rows.
        path: Path of the file, for errors.
        dropout: Probability of the null in training, if there is a null.

    Raises:
        ValueError: If the number of classes is not known, or does not fit the number of rows.
    """
    weight = tensors["cond_stage_model.embedding.weight"].float()
    rows = len(weight)
    known = PUBLISHED_CLASSES.get(rows) if num_classes is None else num_classes
    if known not in (rows - 1, rows):
        raise ValueError(
            f"num_classes must be given for {path}, {rows - 1} or {rows}: its embedding has {rows} rows, and no weight "
            f"says whether the last is the null, which stands for no class; got {num_classes}"
        )
    has_null = known < rows
    tokens = ClassTokens(weight.shape[1], known, dropout=dropout if has_null else 0.0)
    unused = weight.new_zeros(0 if has_null else 1, weight.shape[1])  # the row of a null that was not trained
    load_weights(tokens, {"embedding.weight": torch.cat([weight, unused])})
    return tokens


def tokenizer_of(folder: StrPath | None) -> "CLIPTokenizer":
    """CLIP's tokenizer in a folder.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder is not given.
    """
    if folder is None:
        raise ValueError("tokenizer must name the folder of CLIP's tokenizer, with vocab.json and merges.txt, as a "
                         "file of weights holds no words; every folder of Stable Diffusion has it. unet-diffusion "
                         "import takes it, and so does ud.load")  # fmt: skip
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"tokenizer must be a local folder with vocab.json and merges.txt, got {folder}")
    return import_transformers().CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _padded_by_number_0(tokenizer: "CLIPTokenizer") -> "CLIPTokenizer":
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _text(
    weights: dict[str, Tensor], tokenizer: "CLIPTokenizer", *, hidden_act: HiddenAct, dropout: float
) -> TextTokens:
    """The frozen condition of a text encoder of these weights, by the names of transformers."""
    vocab_size, width = weights["embeddings.token_embedding.weight"].shape
    if width % HEAD_CHANNELS:
        raise ValueError(f"the width of a text encoder must be a multiple of {HEAD_CHANNELS}, got {width}")
    if len(tokenizer) < vocab_size:
        warnings.warn(f"the tokenizer has {len(tokenizer)} tokens of the text encoder's {vocab_size}; make sure that "
                      "it is the encoder's own", stacklevel=2)  # fmt: skip
    with WithoutInitialWeights():
        text = TextTokens(
            width,
            vocab_size=vocab_size,
            max_length=len(weights["embeddings.position_embedding.weight"]),
            num_layers=len(_layers(weights)),
            num_heads=width // HEAD_CHANNELS,
            hidden_act=hidden_act,
            frozen=True,
            dropout=dropout,
        )
    load_weights(text.encoder, weights)
    text.take_tokenizer(tokenizer)
    return text


def _open_clip(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """The weights of OpenCLIP's text encoder by the names of transformers, and its projection, (out, in), if any."""
    width = tensors[f"{prefix}token_embedding.weight"].shape[1]
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))  # diffusers reads nothing else of it
    projection = tensors.get(f"{prefix}text_projection")
    without = {key: value for key, value in tensors.items() if key != f"{prefix}text_projection"}
    converted = _without_prefix(convert_open_clip_checkpoint(model, without, prefix=prefix))
    return converted, None if projection is None else projection.float().T.contiguous()


def _without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names of transformers 5, without the buffer that its older versions saved."""
    named = {key.removeprefix("text_model."): value for key, value in weights.items()}
    return {key: value for key, value in named.items() if not key.endswith("position_ids")}


def _layers(weights: Mapping[str, Any]) -> set[int]:
    return {int(key.split(".")[2]) for key in weights if key.startswith("encoder.layers.")}
