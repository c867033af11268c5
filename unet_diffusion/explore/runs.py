"""What there is to look at in a run: its model, checkpoints, pictures, metrics, configuration and evaluation."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from unet_diffusion.data.value_ranges import keep_range
from unet_diffusion.inference.autoencoder import Autoencoder
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.runtime.safe_loading import step_of

if TYPE_CHECKING:
    from unet_diffusion.data.base import ImageDataModule

Model = TypeVar("Model", Denoiser, Segmenter, Autoencoder)
History = dict[str, list[tuple[int, float]]]
"""For each metric its steps and values."""


@dataclass(frozen=True)
class Run(Generic[Model]):
    """A model and the run folder that it comes from.

    Args:
        path: Run folder, checkpoint or diffusers folder, as the user named it.
        model: The model.
        load: Function that loads a model from a path and moves it to the device.
        read_data: Function that gives the data of the run, not yet set up.
        options: The options of the command that opened the run, which other commands need, too.
    """

    path: Path
    model: Model
    load: Callable[[Path], Model]
    read_data: "Callable[[], ImageDataModule]"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The path as the user named it."""
        return str(self.path)

    @property
    def folder(self) -> Path:
        """The folder of checkpoints, metrics and pictures; for an exported or imported model there are none in it."""
        in_checkpoints = self.path.is_file() and self.path.parent.name == "checkpoints"
        return self.path.parents[1] if in_checkpoints else self.path

    @cached_property
    def data(self) -> "ImageDataModule":
        """The data of the run, ready to read.

        Raises:
            OSError: If they are not where they were.
            ValueError: If the run does not say what they are.
        """
        data = self.read_data()
        keep_range(data, self.model.values)
        data.setup("fit")  # without prepare_data, which may download
        return data

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints of the run by their step, in order; one for each step."""
        paths = sorted((self.folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.name == "last.ckpt")
        steps = {step_of(path): path for path in paths}
        return {int(step): steps[step] for step in sorted(steps) if step != float("inf")}

    @property
    def pictures(self) -> dict[int, Path]:
        """The pictures that were drawn in training, by their step."""
        paths = sorted((self.folder / "samples").glob("step_*.png"))
        return {_number(path.stem): path for path in paths if _number(path.stem) >= 0}

    @property
    def configuration(self) -> str:
        """The text of the configuration; empty if there is none."""
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @property
    def evaluation_page(self) -> Path | None:
        """The page that `evaluate` wrote; None if there is none."""
        path = self.folder / "evaluation" / "evaluation.html"
        return path if path.is_file() else None

    @property
    def history(self) -> History:
        """The metrics of the run, of all its continuations."""
        history: History = {}
        logs = (self.folder / "logs").glob("version_*/metrics.csv")
        for path in sorted(logs, key=lambda path: _number(path.parent.name)):
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file, restkey="more"):  # of a row that is still being written
                    step, more = row.pop("step", None), row.pop("more", None)
                    for name, value in row.items() if step and more is None else ():
                        if name != "epoch" and value:
                            history.setdefault(name, []).append((int(step), float(value)))
        return {name: sorted(dict(points).items()) for name, points in history.items()}


def _number(name: str) -> int:
    """The number at the end of a name such as version_10 or step_0000300; -1 without one."""
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1
