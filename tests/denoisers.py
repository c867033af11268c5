"""Tiny denoisers of latents, by captions and by other conditions, what they are made of, and short runs of them.

And what several files ask of networks and schedulers of diffusers.
"""

import pytest
import torch
from diffusers import AutoencoderKL, ModelMixin, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from unet_diffusion.diffusers_io.configurations import config_from_diffusers
from unet_diffusion.diffusion.conditions.condition import Condition
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.text import TextTokens
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.latents.space import LatentSpace, fingerprint
from unet_diffusion.models.autoencoders import kl_autoencoder, vq_autoencoder
from unet_diffusion.models.denoiser_unet import DenoiserUNet

CAPTIONS = ["a red cat", "two blue dogs on a sofa"]
WORDS = [*CAPTIONS, "a green cat on a red sofa"]
WIDTH = 8  # of the text encoder
TINY_UNET = {"in_channels": 4, "channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
SMALL = {"layers_per_block": 1, "mid_attention": False, "norm_num_groups": 4}

STABLE_DIFFUSION_1_SCHEDULER = {  # scheduler_config.json of stable-diffusion-v1-5
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

SCHEDULER_WARNINGS = [  # of diffusers' schedulers
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),  # it calls numpy in ways numpy will stop
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning:torchsde"),  # float32 against float64 ends of a path
]


class Vectors(Condition):
    """Three numbers that are known of an image by a name, as a vector."""

    network_argument = "vector"

    def __init__(self, key="feature", dropout=0.0):
        super().__init__(dropout)
        self.batch_key, self.config = key, {"key": key, "dropout": dropout}

    def forward(self, entry):
        return entry

    def null(self, entry):
        return torch.zeros_like(entry)

    def example(self, batch_size, sample_shape):
        return torch.zeros(batch_size, 3)


@torch.no_grad()
def randomise(model: nn.Module, scale: float = 0.1) -> nn.Module:
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def text_tokens(**options) -> TextTokens:
    torch.manual_seed(0)
    text = TextTokens(WIDTH, vocab_size=600, max_length=12, num_layers=2, num_heads=2, **options)
    text.learn_words(WORDS)
    return randomise(text)


def save_autoencoder(folder, kind="kl"):
    torch.manual_seed(0)
    made = kl_autoencoder(3, (8, 8), **SMALL)
    if kind == "vq":
        made = vq_autoencoder(3, (8, 8), num_codes=64, latent_channels=4, **SMALL)
    randomise(made).save_pretrained(folder)
    return made


def latent_space(folder, kind="kl", **changes) -> LatentSpace:
    made = save_autoencoder(folder, kind)
    moments = {"mean": (0.1, 0.2, -0.3, 0.0), "std": (0.5, 2.0, 1.0, 0.7)}
    return LatentSpace(str(folder), fingerprint(made, made.config), (3, 16, 16), 2, **{**moments, **changes})


def text_denoiser(folder, *, conditions=None, space=None, size=(8, 8), **options) -> Denoiser:
    """A denoiser of latents by captions, whose autoencoder is in the folder."""
    torch.manual_seed(0)
    levels = {"attention_levels": (1,), "context_dim": WIDTH, "num_heads": 2}
    unet = DenoiserUNet(**{**TINY_UNET, **levels, **options})
    return Denoiser(
        unet=randomise(unet),
        schedule=NoiseSchedule(100, prediction_type="v_prediction"),
        sample_shape=(4, *size),
        codec=LatentCodec.of(latent_space(folder / "autoencoder") if space is None else space),
        conditions=nn.ModuleList([text_tokens()] if conditions is None else conditions),
    )


def save_stable_diffusion(folder, kind=StableDiffusionPipeline, network=None, **parts):
    """A folder of the build of Stable Diffusion 1.5, tiny, but for what else is told of its network and parts."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        **(network or {}),
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    text = text_tokens()
    kind(
        vae=randomise(vae),
        text_encoder=text.encoder,
        tokenizer=text.tokenizer,
        unet=randomise(unet),
        scheduler=PNDMScheduler(**STABLE_DIFFUSION_1_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        **(parts or {"requires_safety_checker": False}),
    ).save_pretrained(folder)
    return folder


def inpainter(folder, **options) -> Denoiser:
    return text_denoiser(folder, conditions=[text_tokens(), MaskedImage(5)], in_channels=9, out_channels=4, **options)


def upscaler(folder, **options) -> Denoiser:
    conditions = [text_tokens(), LowResolution(3)]
    network = {"in_channels": 7, "out_channels": 4, "num_class_embeds": 1000}
    return text_denoiser(folder, **{"conditions": conditions, **network, **options})


def assert_published(model: type[ModelMixin], config: dict, num_parameters: int) -> None:
    """Our network of a published configuration has as many parameters, and the keys and shapes of diffusers'."""
    with torch.device("meta"):
        ours, theirs = DenoiserUNet(**config_from_diffusers(config)), model(**config)
    assert sum(parameter.numel() for parameter in ours.parameters()) == num_parameters
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


def shorten(recipe: dict, run, steps: int) -> None:
    """So that it runs for a second, in the folder `run`."""
    recipe["model"]["speed"] = "plain"
    recipe["trainer"] |= {
        "default_root_dir": str(run),
        "accelerator": "cpu",
        "precision": "32-true",
        "max_steps": steps,
        "val_check_interval": min(2, steps),
        "enable_progress_bar": False,
    }
    recipe["samples"] = {"every_n_steps": 1000, "num_images": 2, "num_inference_steps": 2}
