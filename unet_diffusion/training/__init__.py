"""Training on Lightning: the modules that train, and the callbacks that show how it does."""

from unet_diffusion.training.autoencoder import AutoencoderModule
from unet_diffusion.training.callbacks import RunProgressBar, SampleGrid, SegmentationGrid
from unet_diffusion.training.module import DiffusionModule
from unet_diffusion.training.segmentation import SegmentationModule

__all__ = [
    "AutoencoderModule",
    "DiffusionModule",
    "RunProgressBar",
    "SampleGrid",
    "SegmentationGrid",
    "SegmentationModule",
]
