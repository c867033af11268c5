"""Whether the runs of `two-stages` can begin: both are built, and nothing is trained or written.

In a process of its own, as the stages are, so that nothing stays in the memory of the one that waits for them:

    python -m unet_diffusion.training.check_runs '{"autoencoder": [WORDS OF fit], "denoiser": [WORDS OF fit]}'
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from unet_diffusion.cli import exit_status
from unet_diffusion.codecs import downsampling, num_latent_channels
from unet_diffusion.data import LatentsDataModule
from unet_diffusion.fit_arguments import check_arguments
from unet_diffusion.training.cli import TrainingCLI, check_settings
from unet_diffusion.usage import UsageError, in_words

TASKS = {"autoencoder": "autoencode", "denoiser": "denoise"}  # of the stages


class BuildOnly(TrainingCLI):
    """fit, but it ends when everything is built."""

    def before_instantiate_classes(self) -> None:
        check_settings(self.config, self.modules)
        config = self.config[self.subcommand]
        config.trainer.logger = False
        self.written = self.config.clone()

    def _run_subcommand(self, subcommand: str) -> None:
        """Trains nothing."""


def check_runs(runs: dict[str, Sequence[str]]) -> None:
    """Build what the stages would train, and see whether they fit each other.

    Args:
        runs: The arguments of fit, its name first, of each of TASKS.

    Raises:
        UsageError: If a recipe is wrong; it names the stage.
    """
    built = {stage: _built(stage, words) for stage, words in runs.items()}
    autoencoder, unet = built["autoencoder"].model.autoencoder, built["denoiser"].model.unet
    _, height, width = built["autoencoder"].datamodule.image_shape
    factor, channels = downsampling(autoencoder), num_latent_channels(autoencoder)
    if unet.in_channels != channels:
        raise UsageError(
            f"the recipe of the denoiser must have in_channels {channels}, as latents of the autoencoder have, got "
            f"{unet.in_channels}"
        )
    try:
        unet.check_size(height // factor, width // factor)
    except ValueError as error:
        raise UsageError(f"the denoiser must take latents of images of {height} x {width}: {error}") from error


def _built(stage: str, words: Sequence[str]) -> Any:
    checked = check_arguments(words)
    if checked.task != TASKS[stage]:
        raise UsageError(f"the recipe of the {stage} must have task {TASKS[stage]}, got {checked.task}")
    try:
        built: Any = BuildOnly.run(checked.words, checked.task, checked.modules)
    except (Exception, SystemExit) as error:
        raise UsageError(f"recipe of the {stage}: {in_words(error)}") from error
    if stage == "denoiser" and not isinstance(built.datamodule, LatentsDataModule):
        raise UsageError(f"the recipe of the denoiser must have data of latents, got {type(built.datamodule).__name__}")
    return built


if __name__ == "__main__":
    sys.exit(exit_status(lambda: check_runs(json.loads(sys.argv[1])), show_traceback="--traceback" in sys.argv))
