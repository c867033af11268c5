"""Attention maps of the words of a caption: from pixels to tokens, while an image is drawn.

As in DAAM (Tang et al. 2022, https://arxiv.org/abs/2210.04885), the probabilities are averaged over heads, layers and
steps, each layer scaled to the size of x0; the map of a word is the mean of its tokens' maps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.sample_options import SampleOptions
from unet_diffusion.models.attention import CrossAttention, TransformerBlock


@dataclass(frozen=True)
class WordMaps:
    """An image, and where the words of its caption were looked for.

    Args:
        image: The image, (C, H, W) in about [-1, 1].
        words: The words of the caption that were read; words after the cut are left out.
        maps: The attention to each word, (len(words), h, w) float32.
    """

    image: Tensor
    words: list[str]
    maps: Tensor


def has_words(denoiser: Denoiser) -> bool:
    """Whether the denoiser attends to the words of a caption.

    Args:
        denoiser: The denoiser.
    """
    return denoiser.condition(TextTokens) is not None and bool(_layers(denoiser.unet))


def word_maps(denoiser: Denoiser, options: SampleOptions, progress: Callable[[int], object] | None = None) -> WordMaps:
    """The first image of a request, and the attention to each word of its caption.

    Args:
        denoiser: A denoiser that attends to captions.
        options: The request.
        progress: Called after each step.

    Raises:
        ValueError: If the options do not fit the denoiser, or the caption has no words.
    """
    text = denoiser.condition(TextTokens)
    assert text is not None
    captions = options.captions
    caption = captions if isinstance(captions, str) else (captions or [""])[0]
    words, tokens = _tokens_of_words(denoiser, text, caption)
    if not words:
        raise ValueError("captions must have a word to look for, got an empty one")
    drawing = denoiser.drawing(replace(options, num_images=1, captions=[caption]))
    with _recorded(denoiser.unet, drawing.sample_shape[1:]) as maps:
        image = drawing.draw([0], progress)[0]
    mean = torch.stack(list(maps.values())).mean(0)  # over layers, (M, h, w)
    return WordMaps(image, words, torch.stack([mean[places].mean(0) for places in tokens]))


def _tokens_of_words(denoiser: Denoiser, text: TextTokens, caption: str) -> tuple[list[str], list[list[int]]]:
    """The words of a caption, and the places of each one's tokens in the context; cut words are left out."""
    assert text.tokenizer is not None
    encoded = text.tokenizer(caption, truncation=True)
    places: dict[int, list[int]] = {}
    for place, word in enumerate(encoded.word_ids(), start=_num_tokens_before(denoiser, text)):
        if word is not None:  # start and end are of no word
            places.setdefault(word, []).append(place)
    spans = [encoded.word_to_chars(word) for word in places]
    return [caption[span.start : span.end] for span in spans], list(places.values())


def _num_tokens_before(denoiser: Denoiser, text: TextTokens) -> int:
    """The number of tokens of other conditions that stand before the caption's in the context."""
    others = takewhile(lambda condition: condition is not text, denoiser.all_conditions)
    examples = [
        condition(condition.example(1, denoiser.sample_shape).to(denoiser.device))
        for condition in others
        if condition.network_argument == text.network_argument
    ]
    return sum(example.shape[1] for example in examples)


def _layers(unet: nn.Module) -> dict[str, CrossAttention]:
    """The layers that attend to the context, by their names."""
    blocks = {name: module for name, module in unet.named_modules() if isinstance(module, TransformerBlock)}
    return {name: block.attn2 for name, block in blocks.items()}


@contextmanager
def _recorded(unet: nn.Module, size: tuple[int, ...]) -> Iterator[dict[str, Tensor]]:
    """Within the block, the sum over steps of each layer's attention for the first image of a batch, (M, h, w).

    Args:
        unet: The network.
        size: (h, w) of x0.
    """
    maps, queries, hooks = dict[str, Tensor](), dict[str, Tensor](), list[Any]()

    def note_queries(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        queries[name] = output

    def add_map(name: str, num_heads: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        # The first image of the batch is the conditional one, with guidance too.
        q, k = (x[0].float().unflatten(1, (num_heads, -1)).transpose(0, 1) for x in (queries.pop(name), output))
        scores = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1).mean(0)  # (L, M)
        scale = (scores.shape[0] / (size[0] * size[1])) ** 0.5
        height = max(round(size[0] * scale), 1)
        level = scores.T.unflatten(1, (height, -1))[None]  # (1, M, height, width)
        spread = interpolate(level, tuple(size), mode="bilinear")[0].cpu()
        maps[name] = maps[name] + spread if name in maps else spread

    for name, layer in _layers(unet).items():
        hooks.append(layer.to_q.register_forward_hook(partial(note_queries, name)))
        hooks.append(layer.to_k.register_forward_hook(partial(add_map, name, layer.num_heads)))
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
