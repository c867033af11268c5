"""explore: a page in the browser over trained models."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from signal import SIGINT, SIGTERM
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

from unet_diffusion.commands.arguments import Checkpoint, Precision, check_exists
from unet_diffusion.runtime.imports import import_lightning, quick_imports
from unet_diffusion.runtime.messages import UsageError
from unet_diffusion.runtime.signals import Interrupted, handled

if TYPE_CHECKING:
    from unet_diffusion.data.base import ImageDataModule
    from unet_diffusion.inference.autoencoder import Autoencoder
    from unet_diffusion.inference.denoiser import Denoiser
    from unet_diffusion.inference.segmenter import Segmenter

LOCAL = "127.0.0.1"
SIGNALS = (SIGINT, SIGTERM)  # that end the page, also where a shell has put it into the background and ignores SIGINT
LARGEST_PORT = 65535


def explore(
    runs: Annotated[list[Path], "RUN"],
    *,
    port: int | None = None,
    host: str = LOCAL,
    open_browser: bool = False,
    allow: Annotated[list[str], "MODULE"] | None = None,
    autoencoder: Checkpoint | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Open a page in the browser over what a run has learned.

        unet-diffusion explore runs/digits
        unet-diffusion explore runs/digits runs/other_digits --open_browser

    Denoisers draw by class or caption, from noise or into an image that you drop, and show how images form, how they
    changed over training, which training images are nearest, and where words were looked for. Segmenters outline the
    objects of an image that you drop, with a threshold to slide. Several runs of one kind lie side by side, on the same
    seeds and images. Curves, the page of `evaluate` and the configuration are there, and tabs show the command that
    does the same. The page is for this machine alone, and nothing is sent out. Ctrl-C ends it.

    Args:
        runs: The run folders, checkpoints or diffusers folders.
        port: The port of the page. The default is the first one from 7860 that is free.
        host: The address that the page listens at. Another one than 127.0.0.1, such as 0.0.0.0, lets everybody in who
            can reach this machine, without a password.
        open_browser: Open the page in the browser of this machine.
        allow: The modules of your own, or of somebody you trust, that the files may name.
        autoencoder: The folder of the autoencoder of a denoiser of latents, if it is not where it was in training.
        device: The device, such as cpu, cuda, cuda:1 or mps; "auto" takes a GPU if there is one.
        precision: The number format that the network computes in; "auto" takes 16 bits where the hardware has them,
            else float32.

    Raises:
        UsageError: If a run is named twice, or gradio is missing.
        FileNotFoundError: If there is no such model.
        ValueError: If a model cannot be read, or runs cannot be shown side by side.
        OSError: If the port is taken.
    """
    for run in runs:
        check_exists("RUN", run)
    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError(f"each RUN must be named once, got {' '.join(map(str, runs))}")
    if port is not None and not 1 <= port <= LARGEST_PORT:
        raise UsageError(f"--port must be from 1 to {LARGEST_PORT}, got {port}")
    if find_spec("gradio") is None:
        raise UsageError('explore needs the package gradio; install it with pip install "unet-diffusion[explore]"')
    with quick_imports():
        import_lightning()
        from unet_diffusion.commands.run_data import config_of, data_of
        from unet_diffusion.explore.page import served
        from unet_diffusion.explore.runs import Run
        from unet_diffusion.inference.loading import load

    def loaded(path: Path) -> "Denoiser | Segmenter | Autoencoder":
        return load(path, allow=allow or (), autoencoder=autoencoder).to(device, precision=precision)

    def data_of_run(path: Path) -> "ImageDataModule":
        if (config := config_of(path)) is None:
            raise ValueError(f"{path} does not say what it was trained on, as it has no config.yaml")
        return cast("ImageDataModule", data_of(config, [], allow or [], "denoise"))

    chosen: dict[str, Any] = {"allow": allow, "device": device, "precision": precision, "autoencoder": autoencoder}
    options = {name: value for name, value in chosen.items() if value not in (None, "auto")}
    opened: list[Run[Any]] = [Run(run, loaded(run), loaded, partial(data_of_run, run), options) for run in runs]
    with served(opened, host=host, port=port, open_browser=open_browser) as address, handled(SIGNALS, _end):
        print(f"open {address} in a browser; Ctrl-C ends the page", flush=True)
        Event().wait()


def _end(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)
