"""Training on Lightning: the module that trains a denoiser, and the callbacks that show how it does."""

from unet_diffusion.training.callbacks import RunProgressBar, SampleGrid
from unet_diffusion.training.module import DiffusionModule

__all__ = ["DiffusionModule", "RunProgressBar", "SampleGrid"]
