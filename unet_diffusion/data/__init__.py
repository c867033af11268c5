"""Data modules: images from a folder, an archive, shards, torchvision or scikit-learn; labelled
images; latents."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["ImageDataModule", "split_by_name", "split_indices"],
        "batches": ["ImageBatches", "ImageSet", "OrderedBatches", "ResumableLoader", "ShuffledBatches"],
        "checking": ["StreamedImages", "check_images", "load_images"],
        "decoding": ["ImageFormat", "decode_image"],
        "files": ["find_images"],
        "folder": ["FolderDataModule", "TilesDataModule"],
        "labelled": ["LabelledImages", "LabelledSource", "PairedFiles", "SyntheticCells"],
        "latents": ["LatentBatches", "LatentsDataModule"],
        "packing": ["pack_images"],
        "scaling": ["scale_to_unit_range"],
        "segmentation": ["SegmentationDataModule"],
        "shards": ["ShardError", "ShardIndex", "ShardStore", "ShardedImages"],
        "standard": ["DigitsDataModule", "TorchvisionDataModule"],
        "stream": ["CountReplaced", "ShuffledShards", "StreamDataModule"],
    },
)
