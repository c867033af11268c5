"""Adapters in diffusers' formats: written for the pipeline of their base, and read into a denoiser."""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unet_diffusion.diffusers_io.exporting import to_diffusers
from unet_diffusion.diffusion.adapters.adapter import Adapter, merge_trained
from unet_diffusion.diffusion.adapters.lora import merge_layers, peft_package
from unet_diffusion.diffusion.adapters.textual_inversion import FILE as WORD_FILE
from unet_diffusion.diffusion.adapters.textual_inversion import put_word, text_of
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.conditions.xl_text import XLText
from unet_diffusion.diffusion.parts import DenoiserParts
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.runtime.atomic_files import check_replaceable, put_folder
from unet_diffusion.runtime.messages import in_words
from unet_diffusion.runtime.tensor_files import read_safetensors

StrPath = str | os.PathLike[str]

ROUNDING = 1e-5  # of weights of order 1
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name in a folder


def export_adapter(parts: DenoiserParts, folder: StrPath, *, overwrite: bool = False) -> None:
    """Write the adapter of a denoiser alone, in a folder that the pipeline of its base loads.

    Args:
        parts: The denoiser.
        folder: The folder to make; it appears whole or not at all.
        overwrite: Replace the folder, if everything in it was exported there.

    Raises:
        FileExistsError: If the folder exists and overwrite is False, or if it holds other files.
        ValueError: If the denoiser has no adapter, or no pipeline of diffusers loads it (see
            `why_adapter_not_exported`).
        RuntimeError: If the folder gives another change than the adapter when it is read.
    """
    if reason := why_adapter_not_exported(parts):
        raise ValueError(reason)
    assert parts.adapter is not None
    folder = Path(folder).resolve()
    check_replaceable(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        parts.adapter.adapter.save_pretrained(parts.unet, parts.adapter.weights, partial)
        _check_same(parts, partial)
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def why_adapter_not_exported(parts: DenoiserParts) -> str | None:
    """The reason why no pipeline of diffusers loads the adapter of a denoiser, and what to do; None if one does."""
    if parts.adapter is None:
        return "the denoiser was trained whole and has no adapter; export the pipeline"
    kind = type(parts.adapter.adapter)
    if kind.save_pretrained is Adapter.save_pretrained:
        return f"{kind.__name__} does not define save_pretrained(); export the whole pipeline, which includes it"
    takes_captions = any(condition.pipeline_role in ("prompt", "xl_prompt") for condition in parts.all_conditions)
    if not takes_captions or not isinstance(parts.codec, LatentCodec):
        return ("only pipelines of captions to latents load an adapter of diffusers; export the whole pipeline, which "
                "includes it")  # fmt: skip
    return None


def _check_same(parts: DenoiserParts, folder: Path) -> None:
    """Read the adapter in a folder and compare what it does with the adapter itself; other formats are not read."""
    assert parts.adapter is not None
    adapter, weights, whole = parts.adapter.adapter, parts.adapter.weights, parts.merged()
    if (folder / WORD_FILE).is_file():
        ((word, vector),) = load_file(folder / WORD_FILE).items()
        (ours,) = weights.values()
        is_same = word == adapter.config["placeholder_token"] and torch.equal(vector.flatten(), ours.cpu())
    elif (folder / LORA_FILE).is_file():  # it is put onto the same weights, once by diffusers and once by itself
        read, expected = (
            replace(whole, unet=copy.deepcopy(whole.unet).cpu(), conditions=copy.deepcopy(whole.conditions).cpu())
            for _ in range(2)
        )
        merge_lora(read, folder)
        adapter.attach(expected.unet, expected.conditions)
        merge_trained(adapter, weights, expected.unet, expected.conditions)
        is_same = all(
            torch.allclose(value, ours.state_dict()[name], rtol=ROUNDING, atol=ROUNDING)
            for ours, theirs in ((expected.unet, read.unet), (expected.conditions, read.conditions))
            for name, value in theirs.state_dict().items()
            if not name.endswith("_extra_state")
        )
    else:
        is_same = True
    if not is_same:
        raise RuntimeError("the adapter must be read as it was written, and is not; nothing was exported")


def merge_lora(parts: DenoiserParts, path: StrPath, *, scale: float = 1.0) -> None:
    """Add a LoRA to the weights of a denoiser, in place; diffusers reads the file, also in the formats of others.

    Args:
        parts: The denoiser, on the CPU.
        path: The .safetensors file, or a folder with pytorch_lora_weights.safetensors.
        scale: Factor of the change.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the package peft is missing.
        ValueError: If the file holds no LoRA, or changes parts that the denoiser lacks; then nothing is changed.
    """
    peft_package()
    from diffusers.loaders import StableDiffusionLoraLoaderMixin  # which needs transformers

    file = Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file() or file.suffix != ".safetensors":
        raise FileNotFoundError(f"a LoRA must be a .safetensors file, or a folder with {LORA_FILE}, got {path}")
    unet = to_diffusers(parts.unet)
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(file.parent),
        weight_name=file.name,
        local_files_only=True,
        use_safetensors=True,
        return_lora_metadata=True,
        unet_config=unet.config,
    )
    read = {"network_alphas": alphas, "metadata": metadata, "adapter_name": "default"}
    encoders = _text_encoders(parts)
    _check_lora(file, state, ("unet.", *encoders))
    networks: list[tuple[nn.Module, nn.Module]] = []  # each with the LoRA in its weights, and the original
    try:
        if any(name.startswith("unet.") for name in state):
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, unet=unet, **read)
            unet.set_adapters("default", scale)
            networks.append((_merged(unet, state, "unet."), parts.unet))
        load: Any = StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder
        for prefix, original in encoders.items():
            if any(name.startswith(prefix) for name in state):
                encoder = copy.deepcopy(original)
                load(state, text_encoder=encoder, prefix=prefix[:-1], lora_scale=scale, **read)
                networks.append((_merged(encoder, state, prefix), original))
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be put into this denoiser: {in_words(error)}") from error
    for merged, original in networks:
        original.load_state_dict(merged.state_dict())


def _text_encoders(parts: DenoiserParts) -> dict[str, nn.Module]:
    """The text encoders of a denoiser, by what begins the names of their weights in a file."""
    if (text := parts.condition(XLText)) is not None:
        return {"text_encoder.": text.first.encoder, "text_encoder_2.": text.second.encoder}
    tokens = parts.condition(TextTokens)
    return {} if tokens is None else {"text_encoder.": tokens.encoder}


def _check_lora(file: Path, state: dict[str, Tensor], prefixes: tuple[str, ...]) -> None:
    if others := [name for name in state if not name.startswith(prefixes)]:
        raise ValueError(f"{file} must change {' and '.join(prefix[:-1] for prefix in prefixes)} alone, and holds "
                         f"{others[0]}")  # fmt: skip
    if not any("lora" in name for name in state):
        raise ValueError(f"{file} holds no LoRA; its names must begin with {' or '.join(prefixes)}")


def _merged(network: nn.Module, state: dict[str, Tensor], prefix: str) -> nn.Module:
    """The network with the LoRA that diffusers has put beside its weights in them; all of the file must be there."""
    expected = sum(name.startswith(prefix) and not name.endswith("alpha") for name in state)
    placed = sum(".lora_" in name for name, _ in network.named_parameters())
    if placed != expected:
        raise ValueError(f"it has {expected} matrices for {prefix[:-1]}, of which {placed} have a place here")
    merge_layers(network)
    return network


def add_word(parts: DenoiserParts, path: StrPath) -> str:
    """Add the word of a file to the text encoder of a denoiser, in place, and return it.

    Args:
        parts: The denoiser, on the CPU.
        path: The .safetensors file, or a folder with learned_embeds.safetensors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the denoiser takes no captions, the file does not hold one vector of its text encoder's width, or
            the tokenizer knows the word; nothing is changed.
    """
    file = Path(path) / WORD_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file() or file.suffix != ".safetensors":
        raise FileNotFoundError(f"a word must be a .safetensors file, or a folder with {WORD_FILE}, got {path}")
    text, words = text_of(parts.conditions), read_safetensors(file)
    width = text.config["context_dim"]
    if len(words) != 1 or next(iter(words.values())).shape not in ((width,), (1, width)):
        shapes = {name: tuple(value.shape) for name, value in words.items()}
        raise ValueError(f"{file} must hold the vector of one word, (1, {width}) for this text encoder, got {shapes}")
    ((word, vector),) = words.items()
    put_word(text, text.add_word(word), vector.flatten())
    return word
