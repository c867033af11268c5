"""Tiny one-file checkpoints of the layouts of latent diffusion and Stable Diffusion, made of diffusers' models.

The names of the weights are written here by hand, from those of the networks of the papers' code; where that code is
installed (`stable-diffusion-sdkit` without its dependencies, `omegaconf`, `einops`), tests build its networks, too.
"""

import re
from types import SimpleNamespace

import torch
from denoisers import WORDS, randomise
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from safetensors.torch import save_file
from torch import Tensor, nn

from unet_diffusion.diffusion.conditions.text import TextTokens

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
LINEAR = {"use_linear_projection": True, "attention_head_dim": [1, 2], "block_out_channels": (64, 128)}
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
PLACE = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_weights(unet: UNet2DModel | UNet2DConditionModel) -> dict[str, Tensor]:
    """The weights of a U-Net of diffusers by the names of latent diffusion."""
    weights = {UNET + unet_name(key, unet): value for key, value in unet.state_dict().items()}
    return _with_qkv(weights, unet.config["attention_head_dim"]) if isinstance(unet, UNet2DModel) else weights


def unet_name(key: str, unet: UNet2DModel | UNet2DConditionModel) -> str:
    module, _, parameter = key.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{parameter}"
    each = unet.config["layers_per_block"] + 1
    if match := PLACE.fullmatch(module):
        side, level, kind, number, rest = match.groups()
        position = int(level) * each + int(number)
        if kind == "resnets":
            place = f"input_blocks.{1 + position}" if side == "down" else f"output_blocks.{position}"
            return f"{place}.0.{RESIDUAL[rest]}.{parameter}"
        if kind == "attentions":
            place = f"input_blocks.{1 + position}" if side == "down" else f"output_blocks.{position}"
            return f"{place}.1.{rest}.{parameter}"
        if kind == "downsamplers":
            return f"input_blocks.{(int(level) + 1) * each}.0.op.{parameter}"
        after = 2 if "Attn" in unet.config["up_block_types"][int(level)] else 1
        return f"output_blocks.{(int(level) + 1) * each - 1}.{after}.conv.{parameter}"
    block, number, rest = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module).groups()
    if block == "attentions":
        return f"middle_block.1.{rest}.{parameter}"
    return f"middle_block.{2 * int(number)}.{RESIDUAL[rest]}.{parameter}"


def _with_qkv(weights: dict[str, Tensor], head_channels: int) -> dict[str, Tensor]:
    """Query, key and value of each head in one 1x1 convolution, as attention without a context has it."""
    joined = {}
    for key, value in weights.items():
        if match := re.fullmatch(r"(.+)\.to_q\.(weight|bias)", key):
            parts = [weights[f"{match[1]}.to_{part}.{match[2]}"] for part in "qkv"]
            heads = [part.unflatten(0, (-1, head_channels)) for part in parts]
            both = torch.stack(heads, dim=1).flatten(0, 2)
            joined[f"{match[1]}.qkv.{match[2]}"] = both[..., None] if both.ndim == 2 else both
        elif ".to_out.0." in key:
            joined[key.replace("to_out.0", "proj_out")] = value[..., None] if value.ndim == 2 else value
        elif not re.search(r"\.to_[kv]\.", key):
            joined[key.replace(".group_norm.", ".norm.")] = value
    return joined


def autoencoder_weights(autoencoder: AutoencoderKL | VQModel, prefix: str = FIRST_STAGE) -> dict[str, Tensor]:
    """The weights of an autoencoder of diffusers by the names of latent diffusion."""
    last = len(autoencoder.config["block_out_channels"]) - 1
    named = {}
    for key, value in autoencoder.state_dict().items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{last - int(match[1])}", name)
        name = name.replace(".resnets.", ".block.").replace(".attentions.", ".attn.")
        name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
        if ".attn" in name:
            for theirs, ours in VAE_ATTENTION.items():
                name = name.replace(f".{theirs}.", f".{ours}.")
            value = value[..., None, None] if value.ndim == 2 else value
        named[prefix + name] = value
    return named


def open_clip_weights(text: TextTokens, prefix: str, projection: Tensor | None = None) -> dict[str, Tensor]:
    """The weights of a text encoder by the names of OpenCLIP."""
    weights, named = text.encoder.state_dict(), {}
    for key, value in weights.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", key):
            parts = [weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            named[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            name = key.replace("encoder.layers.", "transformer.resblocks.").replace("layer_norm", "ln_")
            name = name.replace("self_attn", "attn").replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
            name = name.replace("embeddings.token_embedding", "token_embedding").replace("final_ln_", "ln_final")
            named[name.replace("embeddings.position_embedding.weight", "positional_embedding")] = value
    if projection is not None:
        named["text_projection"] = projection.T.contiguous()
    return {prefix + name: value for name, value in named.items()}


def clip_weights(text: TextTokens, prefix: str) -> dict[str, Tensor]:
    """The weights of a text encoder by the names of transformers 4, which the layouts keep."""
    return {f"{prefix}text_model.{key}": value for key, value in text.encoder.state_dict().items()}


def tiny_text(act: str, num_layers: int = 3) -> TextTokens:
    """A condition of captions with heads of 64 channels, as all published ones have."""
    torch.manual_seed(0)
    text = TextTokens(64, vocab_size=600, max_length=12, num_layers=num_layers, num_heads=1, hidden_act=act)
    text.learn_words(WORDS)
    words = text.tokenizer
    return _resized(randomise(text), len(words))


def _resized(text: TextTokens, vocab_size: int) -> TextTokens:
    """The same with just as many rows as its tokenizer has words."""
    exact = TextTokens(**{**text.config, "vocab_size": vocab_size})
    weights = text.encoder.state_dict()
    name = next(key for key in weights if key.endswith("token_embedding.weight"))
    exact.encoder.load_state_dict({**weights, name: weights[name][:vocab_size]})
    exact.take_tokenizer(text.tokenizer)
    return exact.eval()


def tiny_vae(kind: str = "kl", latent_channels: int = 4, attended: bool = False) -> AutoencoderKL | VQModel:
    torch.manual_seed(2)
    options = {
        "block_out_channels": (32, 32),
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D" if attended else "DownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D" if attended else "UpDecoderBlock2D", "UpDecoderBlock2D"],
        "latent_channels": latent_channels,
        "layers_per_block": 1,
    }
    if kind == "vq":
        return randomise(VQModel(**options, num_vq_embeddings=16, vq_embed_dim=latent_channels, scaling_factor=1.0))
    return randomise(AutoencoderKL(**options, scaling_factor=0.18215))


def tiny_condition_unet(**changes) -> UNet2DConditionModel:
    """A U-Net of the build of Stable Diffusion 1, with changes."""
    torch.manual_seed(1)
    options = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
    }
    return randomise(UNet2DConditionModel(**{**options, **changes}), 0.03)


def tiny_unet() -> UNet2DModel:
    """A U-Net of the build of latent diffusion without conditions."""
    torch.manual_seed(1)
    return randomise(
        UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=32,
        ),
        0.03,
    )


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in model.state_dict().items()}


def sd1(**changes):
    unet, vae, text = tiny_condition_unet(**changes), tiny_vae(), tiny_text("quick_gelu")
    tensors = {**unet_weights(unet), **autoencoder_weights(vae), **clip_weights(text, CLIP)}
    tensors[f"{CLIP}text_model.embeddings.position_ids"] = torch.arange(12)[None]
    return SimpleNamespace(tensors=tensors, unet=unet, vae=vae, texts=[text], told={})


def inpainting():
    return sd1(in_channels=9)


def pix2pix():
    return sd1(in_channels=8)


def sd2(**changes):
    """With a further layer, which Stable Diffusion 2 does not use, and the projection, as its files have it."""
    unet, vae = tiny_condition_unet(**{**LINEAR, **changes}), tiny_vae()
    whole, used = tiny_text("gelu", num_layers=4), tiny_text("gelu", num_layers=3)
    weights = whole.encoder.state_dict()
    used.encoder.load_state_dict({key: weights[key] for key in used.encoder.state_dict()})
    tensors = {
        **unet_weights(unet),
        **autoencoder_weights(vae),
        **open_clip_weights(whole, OPEN_CLIP, torch.randn(64, 64)),
        f"{OPEN_CLIP}logit_scale": torch.ones(()),
    }
    told = {"prediction_type": "v_prediction"}
    return SimpleNamespace(tensors=tensors, unet=unet, vae=vae, texts=[used], told=told)


def sd2_inpainting():
    return SimpleNamespace(**{**vars(sd2(in_channels=9)), "told": {}})


def x4_upscaler():
    network = {"in_channels": 7, "out_channels": 4, "num_class_embeds": 1000, "only_cross_attention": [True, False]}
    made = sd2(**network, attention_head_dim=8, block_out_channels=(64, 64))
    return SimpleNamespace(**{**vars(made), "told": {}})


def sdxl():
    first, second = tiny_text("quick_gelu"), tiny_text("gelu")
    projection = torch.randn(48, 64)
    unet = tiny_condition_unet(
        block_out_channels=(64, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[1, 1, 2],
        transformer_layers_per_block=[1, 2, 3],
        use_linear_projection=True,
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=48 + 6 * 256,
    )
    vae = tiny_vae()
    alphas_cumprod = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    tensors = {
        **unet_weights(unet),
        **autoencoder_weights(vae),
        **clip_weights(first, "conditioner.embedders.0.transformer."),
        **open_clip_weights(second, "conditioner.embedders.1.model.", projection),
        "denoiser.sigmas": ((1 - alphas_cumprod) / alphas_cumprod).sqrt(),
    }
    return SimpleNamespace(tensors=tensors, unet=unet, vae=vae, texts=[first, second], told={}, projection=projection)


def unconditional():
    unet, vae = tiny_unet(), tiny_vae("vq", 3, attended=True)
    tensors = {**unet_weights(unet), **autoencoder_weights(vae)}
    return SimpleNamespace(tensors=tensors, unet=unet, vae=vae, texts=[], told={})


def unconditional_kl():
    unet, vae = tiny_unet(), tiny_vae("kl", 3)
    tensors = {**unet_weights(unet), **autoencoder_weights(vae), "scale_factor": torch.tensor(0.5)}
    return SimpleNamespace(tensors=tensors, unet=unet, vae=vae, texts=[], told={})


def classes():
    unet = tiny_condition_unet(in_channels=3, out_channels=3, attention_head_dim=1)
    vae, embedding = tiny_vae("vq", 3), torch.randn(11, 64)  # the last row is the null
    tensors = {**unet_weights(unet), **autoencoder_weights(vae), "cond_stage_model.embedding.weight": embedding}
    return SimpleNamespace(
        tensors=tensors, unet=unet, vae=vae, texts=[], told={"num_heads": 1, "num_classes": 10}, embedding=embedding
    )


LAYOUTS = [sd1, inpainting, pix2pix, sd2, sd2_inpainting, x4_upscaler, sdxl, unconditional, unconditional_kl, classes]


def saved(make, folder) -> SimpleNamespace:
    """A tiny checkpoint in a file of a folder, with what must be said of it."""
    made = make()
    made.name, made.file = make.__name__, folder / "model.safetensors"
    save_file({key: value.contiguous() for key, value in made.tensors.items()}, made.file)
    if made.texts:
        made.texts[0].tokenizer.save_pretrained(folder / "tokenizer")
        made.told = {**made.told, "tokenizer": folder / "tokenizer"}
    return made
