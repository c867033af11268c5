"""fit and validate: Lightning's command line, where every argument of the module, data and trainer is an option."""

from collections.abc import Sequence

from unet_diffusion.commands.fit_arguments import check_arguments
from unet_diffusion.runtime.imports import import_lightning, quick_imports


def fit(arguments: Sequence[str]) -> None:
    """Train a denoiser, segmenter or autoencoder: fit --config digits.

    The run folder is `--trainer.default_root_dir`. The same call again continues from the last checkpoint there.

    Args:
        arguments: The arguments of the command line, such as ["--config", "digits", "--trainer.max_steps", "1000"].

    Raises:
        UsageError: If there is no such recipe or option, or a value does not fit.
        FileNotFoundError: If a file or folder is missing.
        FileExistsError: If the run folder holds a run with other settings.
    """
    _train(["fit", *arguments])


def validate(arguments: Sequence[str]) -> None:
    """Compute the validation loss: validate --config RECIPE --ckpt_path CHECKPOINT.

    Args:
        arguments: The arguments of the command line, as for `fit`; `--ckpt_path` must be among them.

    Raises:
        UsageError: If there is no such recipe or option, or a value does not fit.
        FileNotFoundError: If a file or folder is missing.
    """
    _train(["validate", *arguments])


def _train(words: list[str]) -> None:
    checked = check_arguments(words)
    with quick_imports():  # the training stack takes seconds to import; the other commands do without it
        import_lightning()
        from unet_diffusion.commands.training_cli import TrainingCLI

    TrainingCLI.run(checked)
