"""Textual inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618): a new word for captions, learnt from images.

The vector of the word in the text encoder's embedding is all that is trained; everything else stays as it is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unet_diffusion.diffusion.adapters.adapter import Adapter
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.models.unet import PixelNetwork

FILE = "learned_embeds.safetensors"  # diffusers' name in a folder


class TextualInversion(Adapter):
    """A new word whose vector is trained. Captions of the data have to use it, as in "a photo of <toy>".

    Args:
        placeholder_token: The new word, such as "<toy>"; the tokenizer must not know it.
        initializer_token: A word of one token whose vector the new one starts with, such as "toy".

    Raises:
        ValueError: If the new word is empty, or has a space in it.
    """

    def __init__(self, placeholder_token: str, *, initializer_token: str) -> None:
        if not placeholder_token or placeholder_token.split() != [placeholder_token]:
            raise ValueError(f"placeholder_token must be one word without spaces, got {placeholder_token!r}")
        self.config = {"placeholder_token": placeholder_token, "initializer_token": initializer_token}

    def add(self, unet: PixelNetwork, conditions: nn.ModuleList) -> None:
        text, first = text_of(conditions), self.config["initializer_token"]
        _, *ids, _ = text.tokenize(first)
        if len(ids) != 1:
            raise ValueError(f"initializer_token must be one token of the tokenizer, got {first!r} of {len(ids)}")
        token_id = text.add_word(self.config["placeholder_token"])
        embeddings: Any = text.encoder.embeddings
        known = embeddings.token_embedding
        embeddings.token_embedding = WithNewWord(known, token_id, known.weight[ids[0]].detach().clone())

    def check_captions(self, captions: list[str]) -> None:
        """Check that captions use the word.

        Raises:
            ValueError: If none does.
        """
        word = self.config["placeholder_token"]
        if not any(word.lower() in caption.lower() for caption in captions):
            raise ValueError(f"no caption of the data has the new word {word}; write it into the captions, as in "
                             f'"a photo of {word}"')  # fmt: skip

    def merge(self, unet: PixelNetwork, conditions: nn.ModuleList) -> None:
        text = text_of(conditions)
        new = text.encoder.embeddings.token_embedding
        assert isinstance(new, WithNewWord)
        embeddings: Any = text.encoder.embeddings
        embeddings.token_embedding = new.embedding
        put_word(text, new.token_id, new.word.detach())

    def save_pretrained(self, unet: PixelNetwork, weights: Mapping[str, Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        (word,) = weights.values()
        save_file({self.config["placeholder_token"]: word[None].contiguous()}, folder / FILE)


class WithNewWord(nn.Module):
    """An embedding of tokens, and the vector of a token beyond its rows.

    Args:
        embedding: The embedding of the other tokens.
        token_id: The number of the new token.
        word: Its vector, (D,).
    """

    def __init__(self, embedding: nn.Embedding, token_id: int, word: Tensor):
        super().__init__()
        self.embedding, self.token_id = embedding, token_id
        self.word = nn.Parameter(word)

    def forward(self, token_ids: Tensor) -> Tensor:
        is_new = token_ids == self.token_id
        others = self.embedding(token_ids.masked_fill(is_new, 0))
        return torch.where(is_new[..., None], self.word.to(others.dtype), others)


def text_of(conditions: nn.ModuleList) -> TextTokens:
    """The condition of captions.

    Raises:
        ValueError: If there is none.
    """
    text = next((condition for condition in conditions if isinstance(condition, TextTokens)), None)
    if text is None:
        raise ValueError("a new word is for a denoiser of captions with one text encoder, and this one is none")
    return text


@torch.no_grad()
def put_word(text: TextTokens, token_id: int, vector: Tensor) -> None:
    """Give a token its vector, in place; the embedding gets further rows if it is beyond them.

    Args:
        text: The condition of captions.
        token_id: The number of the token, from `add_word`.
        vector: Its vector, (D,).
    """
    embeddings: Any = text.encoder.embeddings
    before = embeddings.token_embedding.weight
    rows = before.new_zeros(max(len(before), token_id + 1), before.shape[1])
    rows[: len(before)], rows[token_id] = before, vector
    embeddings.token_embedding = nn.Embedding.from_pretrained(rows)
    text.encoder.config.vocab_size = len(rows)
