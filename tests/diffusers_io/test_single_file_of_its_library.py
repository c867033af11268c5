"""Files of networks that the libraries of the layouts build themselves: CompVis's and Stability's code, and OpenCLIP.

pip install --no-deps stable-diffusion-sdkit omegaconf einops && pip install open-clip-torch
"""

import copy

import pytest
import torch
from denoisers import randomise
from safetensors.torch import save_file
from single_files import FIRST_STAGE, UNET, clip_weights, tiny_text

import unet_diffusion as ud
from unet_diffusion.diffusers_io.importing import from_diffusers
from unet_diffusion.diffusers_io.single_file.text import open_clip_text

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SD1 = {"model_channels": 32, "num_heads": 8, "use_spatial_transformer": True, "context_dim": 64}
SD2 = {**SD1, "model_channels": 64, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True}
UPSCALER = {**SD1, "model_channels": 64, "in_channels": 7, "use_linear_in_transformer": True, "num_classes": 1000}
NETWORKS = {
    "sd1": SD1,
    "inpainting": {**SD1, "in_channels": 9},
    "sd2": SD2,
    "x4_upscaler": {**UPSCALER, "context_dim": 128, "disable_self_attentions": [True, False]},
    "unconditional": {"model_channels": 32, "num_head_channels": 32},
    "scale_shift": {"model_channels": 32, "num_head_channels": 32, "use_scale_shift_norm": True},
}
BESIDE = {"sd1": "clip", "inpainting": "clip", "sd2": "open_clip", "x4_upscaler": "open_clip"}


def network_of(name):
    library = pytest.importorskip("ldm.modules.diffusionmodules.openaimodel")
    torch.manual_seed(0)
    options = {"in_channels": 4, "out_channels": 4, "channel_mult": [1, 2], "transformer_depth": 1, **NETWORKS[name]}
    attended = [1, 2] if name == "x4_upscaler" else [2]
    return randomise(library.UNetModel(image_size=8, attention_resolutions=attended, num_res_blocks=2, **options), 0.03)


def beside(name):
    """Weights of a text encoder, by which the layout is known, and of an autoencoder."""
    if BESIDE.get(name) == "clip":
        return clip_weights(tiny_text("quick_gelu"), "cond_stage_model.transformer.")
    return {"cond_stage_model.model.ln_final.weight": torch.ones(64)} if name in BESIDE else {}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_network_gives_the_outputs_of_the_code_of_its_paper(name, tmp_path):
    theirs = network_of(name)
    weights = {UNET + key: value for key, value in theirs.state_dict().items()}
    first_stage = {f"{FIRST_STAGE}decoder.conv_in.weight": torch.ones(1)}
    save_file({**weights, **beside(name), **first_stage}, tmp_path / "model.safetensors")
    ours = from_diffusers(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, theirs.in_channels, 8, 8, generator=generator), torch.tensor([3, 700])
    labels = torch.tensor([20, 350]) if theirs.num_classes else None
    width = NETWORKS[name].get("context_dim")
    context = None if width is None else torch.randn(2, 5, width, generator=generator)
    torch.testing.assert_close(ours(x, t, labels, context=context), theirs(x, t, context, y=labels), **CLOSE)


@pytest.mark.parametrize("attn_resolutions", [[], [8]])
@torch.no_grad()
def test_autoencoder_gives_the_outputs_of_the_code_of_its_paper(attn_resolutions, tmp_path):
    library = pytest.importorskip("ldm.modules.diffusionmodules.model")
    torch.manual_seed(0)
    config = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 2, "attn_resolutions": attn_resolutions}
    config |= {"in_channels": 3, "resolution": 16, "z_channels": 4}
    parts = torch.nn.ModuleDict({
        "encoder": library.Encoder(**config, double_z=True),
        "decoder": library.Decoder(**config),
        "quant_conv": torch.nn.Conv2d(8, 8, 1),
        "post_quant_conv": torch.nn.Conv2d(4, 4, 1),
    })  # fmt: skip
    randomise(parts, 0.03)
    save_file(dict(parts.state_dict()), tmp_path / "vae.safetensors")
    ours = ud.load(tmp_path / "vae.safetensors", image_size=16)
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    moments = parts["quant_conv"](parts["encoder"](images))
    decoded = parts["decoder"](parts["post_quant_conv"](moments[:, :4]))
    torch.testing.assert_close(ours.encode(images), moments[:, :4], **CLOSE)
    torch.testing.assert_close(ours.autoencoder.decode(moments[:, :4]).sample, decoded, **CLOSE)


@torch.no_grad()
def test_captions_are_encoded_as_by_open_clip(tmp_path):
    """Stable Diffusion 2 takes the state before the last layer, after the last norm."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    words = tiny_text("gelu").tokenizer
    text = {"context_length": 12, "vocab_size": len(words), "width": 64, "heads": 1, "layers": 3}
    theirs = randomise(open_clip.CLIP(32, {"layers": 1, "width": 64, "patch_size": 8, "image_size": 16}, text))
    weights = {f"cond_stage_model.model.{key}": value for key, value in theirs.state_dict().items()}
    weights = {key: value for key, value in weights.items() if ".visual." not in key}
    words.save_pretrained(tmp_path)
    ours = open_clip_text(weights, tmp_path, dropout=0.0)
    ids = ours.token_ids(["a red cat"])
    x = theirs.token_embedding(ids) + theirs.positional_embedding
    for block in copy.deepcopy(theirs.transformer.resblocks)[:-1]:
        x = block(x, attn_mask=theirs.attn_mask)
    torch.testing.assert_close(ours(ids), theirs.ln_final(x), **CLOSE)
    assert ids[0, -1] == 0  # OpenCLIP pads so
