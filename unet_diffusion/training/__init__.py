"""Training on Lightning: the modules that train a denoiser or a segmenter, and the callbacks that show how it does."""

from unet_diffusion.training.callbacks import RunProgressBar, SampleGrid, SegmentationGrid
from unet_diffusion.training.module import DiffusionModule
from unet_diffusion.training.segmentation import SegmentationModule

__all__ = ["DiffusionModule", "RunProgressBar", "SampleGrid", "SegmentationGrid", "SegmentationModule"]
