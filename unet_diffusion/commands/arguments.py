"""What several commands share: types of arguments, checks that take no time, and the claim on an output folder."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from unet_diffusion.diffusion.schedulers import SCHEDULERS
from unet_diffusion.runtime.addresses import missing_path
from unet_diffusion.runtime.folder_settings import ClaimedFolder
from unet_diffusion.runtime.messages import did_you_mean, printable, similar_paths

if TYPE_CHECKING:
    from unet_diffusion.runtime.processes import ProcessGroup

Checkpoint = Annotated[Path, "CHECKPOINT"]
File = Annotated[Path, "FILE"]
Folder = Annotated[Path, "DIR"]
Model = Annotated[Path | str, "CHECKPOINT"]  # str: a name on the hub
Pipeline = Annotated[Path | str, "PIPELINE"]
Size = Annotated[tuple[int, int], "H W"]
Speed = Literal["plain", "channels_last", "fused", "compiled", "graphed"]  # those of `speed.py`, which imports PyTorch
Precision = Literal["auto", "float32", "bfloat16", "float16"]  # those of `precision.py`, which imports it too, and auto
PredictionType = Literal["epsilon", "sample", "v_prediction"]  # those of `schedule.py`, which imports PyTorch
Normalization = Literal["imagenet", "unit"]  # those of `encoder_segmenters.py`, which imports it too
BadFiles = Literal["error", "skip"]


def check_exists(name: str, path: Path | str) -> None:
    """Refuse a path where there is nothing, before seconds are spent on imports; archives and addresses come later.

    Args:
        name: The argument, as the command line names it.
        path: The file or folder; or the name of a model on the hub, which is asked later.

    Raises:
        FileNotFoundError: If there is nothing.
    """
    if (missing := missing_path(path)) is not None:
        raise FileNotFoundError(
            f"{name} must exist, got {path}, looked for {missing.absolute()}{similar_paths(missing)}"
        )


def check_scheduler(scheduler: str) -> None:
    """Refuse an unknown scheduler, before seconds are spent on importing diffusers.

    Args:
        scheduler: The value of --scheduler.

    Raises:
        ValueError: If diffusers has no such scheduler.
    """
    if scheduler not in SCHEDULERS:
        similar = did_you_mean(scheduler, SCHEDULERS)
        raise ValueError(f"--scheduler must be one of {', '.join(SCHEDULERS)}, got {scheduler!r}{similar}")


def say_left_out(line: str) -> None:
    """Print which files are not used, if there are any.

    Args:
        line: The files in a line; empty, or "nothing", if there are none.
    """
    if line not in ("", "nothing"):
        print(printable(f"left out: {line}"), file=sys.stderr)


@contextmanager
def claimed(folder: Path, group: "ProcessGroup") -> Iterator[None]:
    """Keep other commands out of a folder while the processes of this one work there.

    Args:
        folder: The folder, which is made if it is not there.
        group: The processes of this command.

    Raises:
        FileExistsError: If another command is at work there.
    """
    claim = ClaimedFolder(folder) if group.rank == 0 else None
    try:
        yield
    finally:
        if claim is not None:
            claim.close()
