"""Sources of images, which say where they come from, and the data modules, which do the rest of
training on them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["ImageDataModule"],
        "batches": ["ImageBatches", "ImageSet", "OrderedBatches", "ResumableLoader", "ShuffledBatches"],
        "checking": ["StreamedImages", "check_images", "load_images"],
        "decoding": ["ImageFormat", "decode_image"],
        "files": ["find_images"],
        "folder": ["Folder", "Tiles"],
        "groups": ["Groups", "split_by_group"],
        "labelled": ["LabelledImages", "LabelledSource", "PairedFiles", "SyntheticCells", "SyntheticPairs"],
        "latents": ["LatentBatches", "Latents"],
        "packing": ["pack_images"],
        "scaling": ["scale_to_unit_range"],
        "segmentation": ["SegmentationDataModule"],
        "shards": ["ShardError", "ShardIndex", "ShardStore", "ShardedImages"],
        "source": ["Source", "SourceImages"],
        "split": ["split_by_name", "split_indices"],
        "standard": ["Digits", "Torchvision"],
        "stream": ["CountReplaced", "Shards", "ShuffledShards"],
    },
)
