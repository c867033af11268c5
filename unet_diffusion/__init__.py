"""One U-Net, from segmentation to latent diffusion."""


def __getattr__(name: str) -> object:
    """`__version__`, looked up when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("unet-diffusion")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
