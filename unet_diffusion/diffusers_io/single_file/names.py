"""Weights by the names of latent diffusion, from those of diffusers and transformers: the way out of this package."""

import re
from collections.abc import Mapping

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from torch import Tensor

from unet_diffusion.models.autoencoders import AutoencoderNetwork
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.single_file import ATTENTION_NAMES

RESIDUAL_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_weights(model: DenoiserUNet) -> dict[str, Tensor]:
    """The weights of a network by the names of latent diffusion, without a prefix.

    Args:
        model: The network, resampling by convolutions.
    """
    tables = DIFFUSERS_TO_LDM_MAPPING["unet"]
    names = {**tables["layers"], **tables["addition_embed_type"], "class_embedding.weight": "label_emb.weight"}
    places = _places(model)
    named: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key in names:
            named[names[key]] = value
            continue
        place = max((place for place in places if key.startswith(f"{place}.")), key=len)
        inner, _, parameter = key.removeprefix(f"{place}.").rpartition(".")
        inner = RESIDUAL_NAMES.get(inner, inner) if ".resnets." in place else inner
        named[".".join(part for part in (places[place], inner, parameter) if part)] = value
    return named if model.config["context_dim"] is not None else _with_qkv(named, model.config["head_channels"])


def _places(model: DenoiserUNet) -> dict[str, str]:
    """The name of each block of latent diffusion, by its name here."""
    layers, levels = model.config["layers_per_block"], len(model.config["channels"])
    attended = {*model.config["attention_levels"]}
    places = {f"mid_block.resnets.{half}": f"middle_block.{2 * half}" for half in (0, 1)}
    places["mid_block.attentions.0"] = "middle_block.1"
    number = 1
    for level in range(levels):
        for layer in range(layers):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for block, level in enumerate(reversed(range(levels))):
        for layer in range(layers + 1):
            places[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        after = 2 if level in attended else 1
        places[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv"
    return places


def _with_qkv(weights: Mapping[str, Tensor], head_channels: int | None) -> dict[str, Tensor]:
    """Attention without a context as in latent diffusion: query, key and value of each head in one 1x1 convolution."""
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        module, _, parameter = key.rpartition(".")
        parent, _, name = module.rpartition(".")
        if name == "to_q":
            three = [weights[f"{parent}.to_{part}.{parameter}"] for part in "qkv"]
            by_head = [part.unflatten(0, (-1, head_channels or len(part))) for part in three]
            named[f"{parent}.qkv.{parameter}"] = _as_convolution(torch.stack(by_head, dim=1).flatten(0, 2), 1)
        elif module.endswith(".to_out.0"):
            named[f"{module.removesuffix('.to_out.0')}.proj_out.{parameter}"] = _as_convolution(value, 1)
        elif name == "group_norm":
            named[f"{parent}.norm.{parameter}"] = value
        elif name not in ("to_k", "to_v"):
            named[key] = value
    return named


def _as_convolution(value: Tensor, dimensions: int) -> Tensor:
    """A linear weight as that of a 1x1 convolution; a bias stays."""
    return value[(..., *[None] * dimensions)] if value.ndim == 2 else value


def autoencoder_weights(autoencoder: AutoencoderNetwork) -> dict[str, Tensor]:
    """The weights of an autoencoder by the names of latent diffusion, without a prefix.

    Args:
        autoencoder: The autoencoder.
    """
    last = len(autoencoder.config["block_out_channels"]) - 1
    named: dict[str, Tensor] = {}
    for key, value in autoencoder.state_dict().items():
        name = DIFFUSERS_TO_LDM_MAPPING["vae"].get(key)
        if name is None:
            name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", key)
            name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name).replace("conv_shortcut", "nin_shortcut")
            name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(".attentions.", ".attn.")
            name = re.sub(r"(down|up)samplers\.0", r"\1sample", name.replace(".resnets.", ".block."))
        if ".attn" in name:
            for ours, theirs in ATTENTION_NAMES.items():
                name = name.replace(f".{theirs}.", f".{ours}.")
            value = _as_convolution(value, 2)
        named[name] = value
    return named


def open_clip_weights(weights: Mapping[str, Tensor], projection: Tensor | None = None) -> dict[str, Tensor]:
    """The weights of CLIP's text encoder by the names of OpenCLIP, without a prefix.

    Args:
        weights: The weights by the names of transformers.
        projection: The projection of its pooled state, (out, in); None: there is none.
    """
    heads = {
        new.removeprefix("text_model."): old for new, old in DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"].items()
    }
    inner = {"layer_norm": "ln_", ".fc1.": ".c_fc.", ".fc2.": ".c_proj.", "self_attn": "attn"}
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = heads.get(key, key.replace("encoder.layers.", "transformer.resblocks."))
        for new, old in inner.items():
            name = name.replace(new, old)
        if ".q_proj." in name:
            three = [weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            named[name.replace("q_proj.", "in_proj_")] = torch.cat(three)
        elif ".k_proj." not in name and ".v_proj." not in name:
            named[name] = value
    return named if projection is None else {**named, "text_projection": projection.T}
