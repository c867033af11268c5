"""Training on Lightning: the modules that train, and the callbacks that show how it does."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapting": ["AdapterModule"],
        "autoencoder": ["AutoencoderModule"],
        "callbacks": ["RunProgressBar", "SampleGrid", "SegmentationGrid"],
        "module": ["DiffusionModule"],
        "segmentation": ["SegmentationModule"],
    },
)
