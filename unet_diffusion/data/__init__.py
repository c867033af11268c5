"""Data modules: images from a folder, an archive, shards, torchvision or scikit-learn; labelled
images; latents."""

from unet_diffusion.data.base import ImageDataModule, scale_to_unit_range, split_indices
from unet_diffusion.data.batches import ImageBatches, ImageSet, OrderedBatches, ResumableLoader, ShuffledBatches
from unet_diffusion.data.checking import StreamedImages, check_images, load_images
from unet_diffusion.data.decoding import ImageFormat, decode_image
from unet_diffusion.data.files import find_images
from unet_diffusion.data.folder import FolderDataModule, TilesDataModule
from unet_diffusion.data.labelled import LabelledImages, LabelledSource, PairedFiles, SyntheticCells
from unet_diffusion.data.latents import LatentBatches, LatentsDataModule
from unet_diffusion.data.maps import ImagesWithMaps, InpaintingDataModule, UpscalingDataModule
from unet_diffusion.data.packing import pack_images
from unet_diffusion.data.segmentation import SegmentationDataModule
from unet_diffusion.data.shards import ShardedImages, ShardError, ShardIndex, ShardStore
from unet_diffusion.data.standard import DigitsDataModule, TorchvisionDataModule
from unet_diffusion.data.stream import CountReplaced, ShuffledShards, StreamDataModule

__all__ = [
    "CountReplaced",
    "DigitsDataModule",
    "FolderDataModule",
    "ImageBatches",
    "ImageDataModule",
    "ImageFormat",
    "ImageSet",
    "ImagesWithMaps",
    "InpaintingDataModule",
    "LabelledImages",
    "LabelledSource",
    "LatentBatches",
    "LatentsDataModule",
    "OrderedBatches",
    "PairedFiles",
    "ResumableLoader",
    "SegmentationDataModule",
    "ShardError",
    "ShardIndex",
    "ShardStore",
    "ShardedImages",
    "ShuffledBatches",
    "ShuffledShards",
    "StreamDataModule",
    "StreamedImages",
    "SyntheticCells",
    "TilesDataModule",
    "TorchvisionDataModule",
    "UpscalingDataModule",
    "check_images",
    "decode_image",
    "find_images",
    "load_images",
    "pack_images",
    "scale_to_unit_range",
    "split_indices",
]
