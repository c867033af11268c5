"""The peers: their networks, as large as ours, and their training steps, as shipped and tuned.

diffusers' UNet2DModel takes our weights, and equality of the two is asserted. denoising-diffusion-pytorch has another
architecture, of about as many parameters, with operations of its own that are counted apart.

"As shipped" is what their own training programs do with their defaults: float32, eager, the optimiser and average that
they build, the loss read in each step. "Tuned" is what their users can have without changing them: autocast in bfloat16
where the hardware has it, channels_last, compilation, fused optimiser, foreach average, and the loss left on the
device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from measure import fastest_autocast
from torch import Tensor, nn

from unet_diffusion.diffusers_io.exporting import to_diffusers
from unet_diffusion.models.unet import DenoiserUNet

TOLERANCE = 1e-5  # of equal networks in float32, relative to the largest output


@dataclass(frozen=True)
class Network:
    """A U-Net, and how large denoising-diffusion-pytorch's must be to have about as many parameters.

    Args:
        image_shape: (C, H, W).
        build: makes ours.
        dim: width of theirs at full resolution.
        dim_mults: widths of their levels, in units of dim.
        batch_size: to train with on a CPU.
    """

    image_shape: tuple[int, int, int]
    build: Callable[[], DenoiserUNet]
    dim: int
    dim_mults: Sequence[int]
    batch_size: int


NETWORKS = {
    # Ho et al. 2020 on CIFAR-10: 35.7 M parameters, theirs 35.7 M
    "cifar10": Network(
        (3, 32, 32),
        partial(
            DenoiserUNet,
            3,
            [128, 256, 256, 256],
            attention_levels=[1],
            downsample_padding=0,
            norm_eps=1e-6,
            flip_sin_to_cos=False,
            freq_shift=1,
        ),
        dim=64,
        dim_mults=(1, 2, 4, 8),
        batch_size=16,
    ),
    # 1.6 M, theirs 1.5 M
    "small": Network(
        (1, 28, 28),
        partial(DenoiserUNet, 1, [32, 64, 64], attention_levels=[2]),
        dim=24,
        dim_mults=(1, 2, 4),
        batch_size=64,
    ),
    # 8.9 M, theirs 8.7 M
    "medium": Network(
        (1, 28, 28),
        partial(DenoiserUNet, 1, [64, 128, 224], layers_per_block=1, attention_levels=[2]),
        dim=60,
        dim_mults=(1, 2, 4),
        batch_size=64,
    ),
    # Stable Diffusion 1 without text, on the latents of 256x256 pixels: 642 M, theirs 630 M
    "sd1": Network(
        (4, 32, 32),
        partial(DenoiserUNet, 4, [320, 640, 1280, 1280], attention_levels=[0, 1, 2], head_channels=64),
        dim=272,
        dim_mults=(1, 2, 4, 8),
        batch_size=4,
    ),
    # to try a benchmark in seconds; its times mean nothing
    "tiny": Network(
        (1, 8, 8),
        partial(DenoiserUNet, 1, [8, 16], layers_per_block=1, norm_num_groups=4),
        dim=8,
        dim_mults=(1, 2),
        batch_size=2,
    ),
}


# ------------------------------------------------------------------------------------------------------------ networks


def our_network(name: str) -> DenoiserUNet:
    """Ours with the same weights at each call; none is zero, as many are at first, which would hide differences."""
    torch.manual_seed(0)
    unet = NETWORKS[name].build()
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return unet


def diffusers_network(name: str) -> UNet2DModel:
    """diffusers' network with the weights of `our_network`."""
    return to_diffusers(our_network(name), sample_size=NETWORKS[name].image_shape[1:])


def ddpm_pytorch_network(name: str) -> nn.Module:
    """denoising-diffusion-pytorch's network of about as many parameters."""
    from denoising_diffusion_pytorch import Unet  # optional, and slow to import

    network = NETWORKS[name]
    return Unet(network.dim, dim_mults=network.dim_mults, channels=network.image_shape[0])


def random_images(name: str, batch_size: int, device: torch.device) -> Tensor:
    """Uniform in [-1, 1]: what is in the images does not change the time."""
    return torch.rand(batch_size, *NETWORKS[name].image_shape, device=device) * 2 - 1


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def assert_equal_networks(name: str) -> float:
    """The largest difference of our output and diffusers' in float32 on the CPU, relative to the largest output.

    Raises:
        AssertionError: if it is above TOLERANCE.
    """
    ours, theirs = our_network(name).eval(), diffusers_network(name)
    x, t = random_images(name, 2, torch.device("cpu")), torch.tensor([7, 900])
    expected = theirs(x, t).sample
    difference = ((ours(x, t) - expected).abs().max() / expected.abs().max()).item()
    assert difference < TOLERANCE, f"{name}: ours and diffusers' network differ by {difference:.1e}"
    return difference


# ----------------------------------------------------------------------------------------------------------- diffusers


def diffusers_step(unet: UNet2DModel, x0: Tensor) -> Callable[[], float]:
    """A step of diffusers' examples/unconditional_image_generation/train_unconditional.py, with its EMA."""
    optimizer = torch.optim.AdamW(unet.parameters(), **DIFFUSERS_ADAMW)
    ema = EMAModel(unet.parameters(), **DIFFUSERS_EMA)
    step = _diffusers_step(unet.train(), x0, optimizer, ema, _float32(x0))
    return lambda: step().item()  # its progress bar shows the loss of every step


def tuned_diffusers_step(unet: UNet2DModel, x0: Tensor, mode: str = "default") -> Callable[[], Tensor]:
    """The same, tuned; mode is that of torch.compile."""
    unet.to(memory_format=torch.channels_last).train().compile(mode=mode)
    optimizer = torch.optim.AdamW(unet.parameters(), **DIFFUSERS_ADAMW, fused=True)
    ema = EMAModel(unet.parameters(), **DIFFUSERS_EMA, foreach=True)
    return _diffusers_step(
        unet, x0.to(memory_format=torch.channels_last), optimizer, ema, fastest_autocast(x0.device.type)
    )


# the defaults of its arguments
DIFFUSERS_ADAMW: dict[str, Any] = {"lr": 1.0e-4, "betas": (0.95, 0.999), "weight_decay": 1.0e-6, "eps": 1.0e-8}
DIFFUSERS_EMA: dict[str, Any] = {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}


def _diffusers_step(
    unet: UNet2DModel, x0: Tensor, optimizer: torch.optim.Optimizer, ema: EMAModel, autocast: torch.autocast
) -> Callable[[], Tensor]:
    scheduler = DDPMScheduler()

    def step() -> Tensor:
        noise = torch.randn_like(x0)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
        with autocast:
            prediction = unet(scheduler.add_noise(x0, noise, t), t).sample
        loss = F.mse_loss(prediction.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        return loss.detach()

    return step


# ----------------------------------------------------------------------------------------- denoising-diffusion-pytorch


def ddpm_pytorch_step(unet: nn.Module, x0: Tensor) -> Callable[[], float]:
    """A step of denoising-diffusion-pytorch's Trainer with its defaults."""
    diffusion = _gaussian_diffusion(unet, x0)
    optimizer = torch.optim.Adam(diffusion.parameters(), **DDPM_PYTORCH_ADAM)
    step = _ddpm_pytorch_step(diffusion, x0, optimizer, _ddpm_pytorch_ema(diffusion), _float32(x0))
    return lambda: step().item()  # it adds up the loss of every step, for its progress bar


def tuned_ddpm_pytorch_step(unet: nn.Module, x0: Tensor) -> Callable[[], Tensor]:
    """The same, tuned."""
    diffusion = _gaussian_diffusion(unet.to(memory_format=torch.channels_last), x0)
    ema = _ddpm_pytorch_ema(diffusion, use_foreach=True)
    unet.compile()
    optimizer = torch.optim.Adam(diffusion.parameters(), **DDPM_PYTORCH_ADAM, fused=True)
    return _ddpm_pytorch_step(
        diffusion, x0.to(memory_format=torch.channels_last), optimizer, ema, fastest_autocast(x0.device.type)
    )


DDPM_PYTORCH_ADAM: dict[str, Any] = {"lr": 1.0e-4, "betas": (0.9, 0.99)}  # the defaults of its Trainer


def _gaussian_diffusion(unet: nn.Module, x0: Tensor) -> nn.Module:
    from denoising_diffusion_pytorch import GaussianDiffusion

    return GaussianDiffusion(unet, image_size=tuple(x0.shape[-2:])).to(x0.device).train()


def _ddpm_pytorch_ema(diffusion: nn.Module, **options: bool) -> nn.Module:
    from ema_pytorch import EMA

    ema = EMA(diffusion, beta=0.995, update_every=10, **options)  # as its Trainer
    return ema.to(next(diffusion.parameters()).device)


def _ddpm_pytorch_step(
    diffusion: nn.Module, x0: Tensor, optimizer: torch.optim.Optimizer, ema: nn.Module, autocast: torch.autocast
) -> Callable[[], Tensor]:
    images = x0 / 2 + 0.5  # it takes [0, 1]

    def step() -> Tensor:
        with autocast:
            loss = diffusion(images)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return loss.detach()

    return step


def _float32(x0: Tensor) -> torch.autocast:
    return torch.autocast(x0.device.type, enabled=False)
