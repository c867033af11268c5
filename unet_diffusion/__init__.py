"""One U-Net, from segmentation to latent diffusion.

Names are imported when they are first used: importing the package by itself takes no time, and no PyTorch.
"""

_MODULES = {  # where each name of a user comes from
    "AdapterModule": "training.adapting",
    "Autoencoder": "inference.autoencoder",
    "AutoencoderModule": "training.autoencoder",
    "Condition": "diffusion.conditions.condition",
    "Denoiser": "inference.denoiser",
    "DenoiserUNet": "models.denoiser_unet",
    "DiffusionModule": "training.module",
    "Guidance": "diffusion.guidance",
    "ImageDataModule": "data.base",
    "LoRA": "diffusion.adapters.lora",
    "NoiseSchedule": "diffusion.schedule",
    "Sampling": "inference.sample_options",
    "SegmentationModule": "training.segmentation",
    "SegmentationUNet": "models.segmentation_unet",
    "Segmenter": "inference.segmenter",
    "TextualInversion": "diffusion.adapters.textual_inversion",
    "copy_paste": "inference.synthesis",
    "evaluate": "evaluation.evaluation",
    "from_diffusers": "diffusers_io.importing",
    "load": "inference.loading",
    "sample": "diffusion.sampling",
    "synthesize": "inference.synthesis",
    "to_diffusers": "diffusers_io.exporting",
}

__all__ = [*_MODULES, "__version__"]  # names, all of them


def __getattr__(name: str) -> object:
    """The name, imported when it is first used."""
    # Imported here: `python -m unet_diffusion` may begin in a folder that has a typing.py of somebody's.
    if name == "__version__":
        from importlib.metadata import version

        return version("unet-diffusion")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
