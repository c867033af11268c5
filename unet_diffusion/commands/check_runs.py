"""Checks that the runs of `two-stages` can begin: it builds both, and trains and writes nothing.

It runs in a process of its own, as the stages do, so that nothing stays in the memory of the process that waits:

    python -m unet_diffusion.commands.check_runs '{"autoencoder": [WORDS OF fit], "denoiser": [WORDS OF fit]}'
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from unet_diffusion.commands.fit_arguments import check_arguments
from unet_diffusion.commands.main import exit_status
from unet_diffusion.runtime.imports import import_lightning, quick_imports
from unet_diffusion.runtime.messages import UsageError, in_words


def check_runs(runs: dict[str, Sequence[str]]) -> None:
    """Build the networks and data of both stages, and check that they fit each other.

    Args:
        runs: The arguments of fit, its name first, of "autoencoder" and "denoiser".

    Raises:
        UsageError: If a recipe is wrong; it names the stage.
    """
    with quick_imports():
        import_lightning()
        from unet_diffusion.data import Latents
        from unet_diffusion.models.autoencoders import downsampling, num_latent_channels

    first, second = (_built(stage, runs[stage]) for stage in ("autoencoder", "denoiser"))
    autoencoder, unet = first.model.autoencoder, second.model.unet
    if not isinstance(second.datamodule.source, Latents):
        got = type(second.datamodule.source).__name__
        raise UsageError(f"the recipe of the denoiser must have Latents for its source of data, got {got}")
    if unet.in_channels != num_latent_channels(autoencoder):
        raise UsageError(
            f"the recipe of the denoiser must have in_channels {num_latent_channels(autoencoder)}, as latents of the "
            f"autoencoder have, got {unet.in_channels}"
        )
    _, height, width = first.datamodule.image_shape
    try:
        unet.check_size(height // downsampling(autoencoder), width // downsampling(autoencoder))
    except ValueError as error:
        raise UsageError(f"the denoiser must take latents of images of {height} x {width}: {error}") from error


def _built(stage: str, words: Sequence[str]) -> Any:
    from unet_diffusion.commands.training_cli import BuildOnly

    checked = check_arguments(words)
    try:
        return BuildOnly.run(checked)
    except (Exception, SystemExit) as error:
        raise UsageError(f"recipe of the {stage}: {in_words(error)}") from error


if __name__ == "__main__":
    sys.exit(exit_status(lambda: check_runs(json.loads(sys.argv[1])), show_traceback="--traceback" in sys.argv))
