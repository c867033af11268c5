"""The layouts of files of latent diffusion and Stable Diffusion, known by the names of their weights.

Shapes say all sizes of a network. What they do not say (the number of heads, what the network predicts, the size of its
images, the scale of latents) is in `LAYOUTS`, from the published configurations of each model; what differs between
models of one layout is None there and must be given.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from torch import Tensor

from unet_diffusion.diffusion.schedule import PredictionType

READ_TYPES = ("v1", "v2", "inpainting", "inpainting_v2", "instruct-pix2pix", "upscale", "xl_base")  # diffusers' words
MISSING_PART = 0.25  # a part that is missing counts as much as this share of keys that do not fit
UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
_PARAMETER = r"(?:weight|bias)"
_RESIDUAL = rf"(?:in_layers\.[02]|emb_layers\.1|out_layers\.[03]|skip_connection)\.{_PARAMETER}"
_TRANSFORMER = (
    rf"(?:norm|proj_in|proj_out)\.{_PARAMETER}|transformer_blocks\.\d+\.(?:norm[123]\.{_PARAMETER}"
    rf"|attn[12]\.(?:to_[qkv]\.weight|to_out\.0\.{_PARAMETER})|ff\.net\.(?:0\.proj|2)\.{_PARAMETER})"
)
_ATTENTION = rf"(?:norm|qkv|proj_out)\.{_PARAMETER}"
UNET_KEYS = {  # by whether its attention has a context
    attends: re.compile(
        rf"{re.escape(UNET)}(?:time_embed\.[02]\.{_PARAMETER}|input_blocks\.0\.0\.{_PARAMETER}|out\.[02]\.{_PARAMETER}"
        rf"|(?:input_blocks\.\d+|middle_block|output_blocks\.\d+)(?:\.\d)?\."
        rf"(?:{_RESIDUAL}|{attention}|(?:op|conv)\.{_PARAMETER}))"
    )
    for attends, attention in ((True, _TRANSFORMER), (False, _ATTENTION))
}
LEFT_OUT = re.compile(  # tables of the noise schedule, and what training alone needs
    r"(?:sqrt_|log_|posterior_|lvlb_)\w+|betas|alphas_cumprod(?:_prev)?|scale_factor|logvar|denoiser\.sigmas|global_step"
    r"|v_pred|ztsnr|first_stage_model\.(?:loss|model_ema)\..*|low_scale_model\..*"
    r"|.*\.(?:position_ids|logit_scale|attn_mask)|model_ema\..*"
)


@dataclass(frozen=True)
class Layout:
    """A layout and what its weights do not say of a model.

    Args:
        name: The name of its models.
        parts: Patterns of the names of weights, beside those of the U-Net and the autoencoder.
        betas: Variance at the first and the last timestep; their roots are evenly spaced.
        scaling_factor: Scale of the latents of its autoencoder; None: it is in the file, or 1 with a codebook.
        image_size: Side of its images in pixels; None: it depends on the model.
        prediction_type: What the network predicts; None: it depends on the model.
        head_channels: Channels of each attention head; None: see num_heads.
        num_heads: Number of attention heads; None, with head_channels None: it depends on the model.
        attends: Whether the network attends to a context.
        reason: The reason why its models are not imported; None: they are.
    """

    name: str
    parts: tuple[str, ...]
    betas: tuple[float, float] = (0.00085, 0.012)
    scaling_factor: float | None = 0.18215
    image_size: int | None = 512
    prediction_type: PredictionType | None = "epsilon"
    head_channels: int | None = None
    num_heads: int | None = None
    attends: bool = True
    reason: str | None = None


CLIP = r"cond_stage_model\.transformer\.(?:text_model\.)?(?:embeddings|encoder|final_layer_norm)\."
OPEN_CLIP = r"cond_stage_model\.model\."
XL_CLIP, XL_OPEN_CLIP = r"conditioner\.embedders\.0\.transformer\.", r"conditioner\.embedders\.1\.model\."
SD1 = Layout("Stable Diffusion 1", (CLIP,), num_heads=8)
SD2 = Layout("Stable Diffusion 2", (OPEN_CLIP,), image_size=None, prediction_type=None, head_channels=64)
UPSCALER = Layout(
    "Stable Diffusion x4 upscaler",
    (OPEN_CLIP, rf"{re.escape(UNET)}label_emb\.weight"),
    betas=(1.0e-4, 0.02),
    scaling_factor=0.08333,
    prediction_type="v_prediction",
    num_heads=8,
)
XL = Layout(
    "Stable Diffusion XL",
    (XL_CLIP, XL_OPEN_CLIP, rf"{re.escape(UNET)}label_emb\.0\."),
    scaling_factor=0.13025,
    image_size=1024,
    head_channels=64,
)
UNCONDITIONAL = Layout(
    "latent diffusion without conditions",
    (),
    betas=(0.0015, 0.0195),
    scaling_factor=None,
    image_size=256,
    head_channels=32,
    attends=False,
)
CLASSES = Layout(
    "latent diffusion by classes",
    (r"cond_stage_model\.embedding\.weight",),
    betas=(0.0015, 0.0195),
    scaling_factor=None,
    image_size=256,
)
BERT = Layout(
    "latent diffusion by captions",
    (r"cond_stage_model\.transformer\.(?:token_emb|pos_emb|attn_layers|norm|to_logits)\.",),
    image_size=256,
    num_heads=8,
    reason="its text encoder is BERT's, and captions here are read by CLIP's; from_diffusers reads its U-Net alone",
)
REFINER = Layout(
    "Stable Diffusion XL refiner",
    (r"conditioner\.embedders\.0\.model\.", rf"{re.escape(UNET)}label_emb\.0\."),
    head_channels=64,
    reason="it continues from the latents of another model; from_diffusers reads its U-Net alone",
)
LAYOUTS = (SD1, SD2, UPSCALER, XL, UNCONDITIONAL, CLASSES, BERT, REFINER)


def holds_unet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a U-Net is among tensors by name."""
    return any(key.startswith(UNET) for key in tensors)


def layout_of(tensors: Mapping[str, Tensor], path: object) -> Layout:
    """The layout of a file whose weights all fit it.

    Args:
        tensors: The tensors in the file by name.
        path: Path of the file, for errors.

    Raises:
        ValueError: If weights fit no layout; the message names the nearest layout and a few weights that do not fit.
    """
    keys = [key for key in tensors if not LEFT_OUT.fullmatch(key)]
    nearest = min(LAYOUTS, key=lambda layout: (_distance(layout, keys), -len(layout.parts)))
    misfits, missing = _misfits(nearest, keys), _missing(nearest, keys)
    if not misfits and not missing:
        return nearest
    known = infer_diffusers_model_type(tensors)
    if known not in READ_TYPES:
        raise ValueError(f"{path} has the layout {known} of diffusers, which is not imported; of those that are, the "
                         f"nearest is that of {nearest.name}, without {_few(misfits)}")  # fmt: skip
    problems = [f"it also has {_few(misfits)}"] if misfits else []
    problems += [f"it lacks {_few(missing)}"] if missing else []
    raise ValueError(
        f"{path} has no known layout; the nearest is that of {nearest.name}, but {', and '.join(problems)}"
    )


def _distance(layout: Layout, keys: Collection[str]) -> float:
    """How badly keys fit a layout, from 0: by the share of keys that it lacks, and by its parts that are missing."""
    return len(_misfits(layout, keys)) / max(1, len(keys)) + MISSING_PART * len(_missing(layout, keys))


def _misfits(layout: Layout, keys: Collection[str]) -> list[str]:
    parts = [re.compile(part) for part in layout.parts]
    return [
        key
        for key in keys
        if not UNET_KEYS[layout.attends].fullmatch(key)
        and not key.startswith(FIRST_STAGE)
        and not any(part.match(key) for part in parts)
    ]


def _missing(layout: Layout, keys: Collection[str]) -> list[str]:
    """The parts of a layout that no key belongs to, as the beginnings of keys."""
    needed = (re.escape(UNET), re.escape(FIRST_STAGE), *layout.parts)
    return [re.sub(r"\\|\(\?:.*\)\??", "", part) for part in needed if not any(re.match(part, key) for key in keys)]


def _few(keys: Collection[str]) -> str:
    shown = sorted(keys)[:3]
    return ", ".join(shown) + (f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else "")
