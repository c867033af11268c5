"""check: what will be trained on what, and what is likely to waste hours, before they are spent."""

from collections.abc import Sequence

from unet_diffusion.commands.fit_arguments import check_arguments
from unet_diffusion.runtime.imports import import_lightning, quick_imports


def check(arguments: Sequence[str]) -> None:
    """Look at data and settings before training: check --config RECIPE.

    It takes the arguments of `fit`, reads the data as `fit` does, tries a few steps, and writes nothing. What would
    make training fail is an error, and everything else a note, advice or a warning with the option that mends it.

    Args:
        arguments: The arguments of the command line, as for `fit`.

    Raises:
        UsageError: If there is no such recipe or option, or a value does not fit.
        FileNotFoundError: If a file or folder is missing.
        ValueError: If training would fail.
    """
    checked = check_arguments(["fit", *arguments])
    with quick_imports():
        import_lightning()
        from unet_diffusion.commands.check_run import CheckCLI

    CheckCLI.run(checked)
