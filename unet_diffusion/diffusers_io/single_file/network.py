"""The U-Net in a file of latent diffusion or Stable Diffusion: its sizes from the shapes, its weights by new names."""

import os
from collections.abc import Mapping
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from unet_diffusion.diffusers_io.configurations import SDXL_TIME_DIM, config_from_diffusers
from unet_diffusion.diffusers_io.single_file.layouts import UNET, UPSCALER, Layout, layout_of
from unet_diffusion.diffusers_io.weights import load_weights
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.runtime.initial_weights import WithoutInitialWeights
from unet_diffusion.runtime.tensor_files import read_tensors

CONTEXT = "1.transformer_blocks.0.attn2.to_k.weight"


def read_unet(path: str | os.PathLike[str]) -> DenoiserUNet:
    """The DenoiserUNet in a .safetensors or .ckpt file of latent diffusion or Stable Diffusion.

    Raises:
        OSError: If the file is missing or cannot be opened.
        ValueError: If its layout is not known, or its network has no counterpart here.
    """
    tensors = read_tensors(path)
    return single_file_unet(tensors, layout_of(tensors, path))


def single_file_unet(
    tensors: Mapping[str, Tensor], layout: Layout, *, num_heads: int | None = None, head_channels: int | None = None
) -> DenoiserUNet:
    """The DenoiserUNet in a file, float32 on the CPU and in eval mode.

    Args:
        tensors: The tensors in the file by name.
        layout: Their layout.
        num_heads: Number of attention heads; None: that of the layout.
        head_channels: Channels of each attention head; None: those of the layout.

    Raises:
        ValueError: If the network has no counterpart here, or the number of heads is not known.
    """
    weights = {key.removeprefix(UNET): value for key, value in tensors.items() if key.startswith(UNET)}
    config = unet_config(weights, layout, num_heads=num_heads, head_channels=head_channels)
    converted = convert_ldm_unet_checkpoint({UNET + key: value for key, value in weights.items()}, config)
    if config["_class_name"] == "UNet2DModel":
        converted = _self_attention(converted, config["attention_head_dim"])
    with WithoutInitialWeights():
        model = DenoiserUNet(**config_from_diffusers(config))
    load_weights(model, converted)
    return model.eval()


def unet_config(
    weights: Mapping[str, Tensor], layout: Layout, *, num_heads: int | None = None, head_channels: int | None = None
) -> dict[str, Any]:
    """The configuration of the diffusers network of these weights, except sample_size.

    Args:
        weights: Weights by the names of latent diffusion, without a prefix.
        layout: Their layout.
        num_heads: Number of attention heads; None: that of the layout.
        head_channels: Channels of each attention head; None: those of the layout.

    Raises:
        ValueError: If levels differ in what diffusers has once, or the number of heads is not known.
    """
    levels = _levels(weights)
    widths = [weights[f"{blocks[0]}.0.out_layers.3.weight"].shape[0] for blocks in levels]
    if len({len(blocks) for blocks in levels}) > 1 or any(
        weights[f"{block}.0.out_layers.3.weight"].shape[0] != width
        for blocks, width in zip(levels, widths, strict=True)
        for block in blocks
    ):
        raise ValueError(
            "all levels must have as many residual blocks, of one width each, and convolutions between them, got "
            f"levels of {[len(blocks) for blocks in levels]} blocks; a network that resamples in residual blocks "
            "(resblock_updown) is not read"
        )
    if num_heads is None and head_channels is None:
        num_heads, head_channels = layout.num_heads, layout.head_channels
    if num_heads is None and head_channels is None:
        raise ValueError(
            f"num_heads or head_channels must be given for {layout.name}, as no weight says it: 1 head in the model of "
            "256 pixels with latents of 3 channels (cin256-v2), 32 channels in that with latents of 4 (cin-ldm-vq-f8)"
        )
    _check_heads(weights, levels, num_heads, head_channels)
    scale_shift = weights["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * widths[-1]
    shared = {
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
    }
    if not layout.attends:
        return {**shared, **_plain_config(weights, levels, num_heads, head_channels)}
    heads = num_heads if head_channels is None else [max(1, width // head_channels) for width in widths]
    return {**shared, **_condition_config(weights, levels, widths, layout), "attention_head_dim": heads}


def _check_heads(
    weights: Mapping[str, Tensor], levels: list[list[str]], num_heads: int | None, head_channels: int | None
) -> None:
    """Refuse heads that do not divide the width of a level with attention."""
    name, value = ("num_heads", num_heads) if head_channels is None else ("head_channels", head_channels)
    attended = [block for blocks in levels for block in blocks if f"{block}.1.norm.weight" in weights]
    for block in (*attended, "middle_block"):
        width = len(weights[f"{block}.1.norm.weight"])
        if value is not None and width % value:
            raise ValueError(f"{name} must divide the width of every level with attention, got {value} for {width}")


def _levels(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The input blocks with a residual block, by level from full resolution down."""
    levels: list[list[str]] = [[]]
    number = 1
    while any(key.startswith(f"input_blocks.{number}.") for key in weights):
        if f"input_blocks.{number}.0.op.weight" in weights:
            levels.append([])
        else:
            levels[-1].append(f"input_blocks.{number}")
        number += 1
    return levels


def _plain_config(
    weights: Mapping[str, Tensor], levels: list[list[str]], num_heads: int | None, head_channels: int | None
) -> dict[str, Any]:
    """The fields of a UNet2DModel, whose attention has no context."""
    attended = [f"{blocks[0]}.1.qkv.weight" in weights for blocks in levels]
    if num_heads not in (None, 1) and head_channels is None:
        raise ValueError(f"num_heads must be 1 for a network without a context, got {num_heads}; give head_channels")
    return {
        "_class_name": "UNet2DModel",
        "down_block_types": ["AttnDownBlock2D" if on else "DownBlock2D" for on in attended],
        "up_block_types": ["AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attended)],
        "attention_head_dim": head_channels,
        "attn_norm_num_groups": 32,
    }


def _condition_config(
    weights: Mapping[str, Tensor], levels: list[list[str]], widths: list[int], layout: Layout
) -> dict[str, Any]:
    """The fields of a UNet2DConditionModel."""
    depths = [_depth(weights, blocks[0]) for blocks in levels]
    mid_depth = _depth(weights, "middle_block")
    if depths[-1] not in (0, mid_depth):
        raise ValueError("the lowest level and the mid block must have transformers of one depth, got "
                         f"{depths[-1]} and {mid_depth}")  # fmt: skip
    layers = [*(max(depth, 1) for depth in depths[:-1]), mid_depth]
    attended = [depth > 0 for depth in depths]
    context_dim = weights[f"middle_block.{CONTEXT}"].shape[1]
    labels, vectors = weights.get("label_emb.weight"), weights.get("label_emb.0.0.weight")
    vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SDXL_TIME_DIM,
        "projection_class_embeddings_input_dim": None if vectors is None else vectors.shape[1],
    }
    return {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attended)],
        "cross_attention_dim": context_dim,
        "transformer_layers_per_block": layers if len({*layers}) > 1 else mid_depth,
        "use_linear_projection": weights["middle_block.1.proj_in.weight"].ndim == 2,
        "only_cross_attention": [
            on and _crosses_only(weights, blocks[0], width, is_last=level == len(levels) - 1, layout=layout)
            for level, (on, blocks, width) in enumerate(zip(attended, levels, widths, strict=True))
        ],
        "num_class_embeds": None if labels is None else labels.shape[0],
        **({} if vectors is None else vector),
    }


def _depth(weights: Mapping[str, Tensor], block: str) -> int:
    """The number of layers of a block's transformer; 0 without one."""
    prefix = f"{block}.1.transformer_blocks."
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})


def _crosses_only(weights: Mapping[str, Tensor], block: str, width: int, *, is_last: bool, layout: Layout) -> bool:
    """Whether the first attention of a transformer, too, attends to the context.

    Where the context is as wide as the level, shapes do not say it. In the upscaler only the lowest level attends to
    itself.
    """
    context_dim = weights[f"{block}.{CONTEXT}"].shape[1]
    if width == context_dim:
        return layout is UPSCALER and not is_last
    return weights[f"{block}.1.transformer_blocks.0.attn1.to_k.weight"].shape[1] == context_dim


def _self_attention(weights: Mapping[str, Tensor], head_channels: int | None) -> dict[str, Tensor]:
    """Weights of attention without a context by diffusers' names, where query, key and value are apart.

    In the file the three of a head stand together.
    """
    converted: dict[str, Tensor] = {}
    for key, value in weights.items():
        module, _, parameter = key.rpartition(".")
        parent, _, name = module.rpartition(".")
        if ".attentions." not in f".{parent}.":
            converted[key] = value
        elif name == "qkv":
            flat = value.flatten(1) if value.ndim > 1 else value
            by_head = flat.unflatten(0, (-1, 3, head_channels or len(flat) // 3))
            for index, part in enumerate(("to_q", "to_k", "to_v")):
                converted[f"{parent}.{part}.{parameter}"] = by_head[:, index].flatten(0, 1)
        elif name == "proj_out":
            converted[f"{parent}.to_out.0.{parameter}"] = value.flatten(1) if value.ndim > 1 else value
        else:
            converted[f"{parent}.group_norm.{parameter}"] = value
    return converted
