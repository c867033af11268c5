"""What a module keeps of the values of its data, so that new images are read, and drawn ones written, as they were."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from unet_diffusion.diffusers_io.values_file import read_values
from unet_diffusion.latents.codec import Codec
from unet_diffusion.runtime.pixel_values import PixelValues, default_shown


class KeepsValues(LightningModule):
    """A module that knows what the numbers in the files of its images mean.

    Attributes:
        values: The values of the data, or of a checkpoint; before either is known, of 8 bits.
        initial_values: The values of another model, whose weights training begins with; None: there is none.
    """

    record_key: str  # of the record in a checkpoint
    values = PixelValues()
    initial_values: PixelValues | None = None
    _trained_on: PixelValues | None = None  # the values that the weights were trained on; None: they are new
    _has_values = False  # whether the data have said them

    def keep_values(self, values: PixelValues) -> None:
        """Keep the values that the weights were trained on, so that data of another range are refused.

        Args:
            values: The values.
        """
        self.values = self._trained_on = values

    def bind_values(self, datamodule: Any, channels: int, codec: Codec | None = None) -> None:
        """Take the values from the data; a data module of another kind leaves those that were known before.

        Args:
            datamodule: The data module.
            channels: The number of channels of its images.
            codec: What encodes the images in training, or encoded them before; None: nothing does.

        Raises:
            ValueError: If the weights or the autoencoder were trained on another range.
        """
        self._has_values = hasattr(datamodule, "values")
        unknown = self._trained_on or PixelValues(shown=default_shown(channels))
        self.values = getattr(datamodule, "values", unknown)
        if self._trained_on is not None:
            self.values.require_range_of(self._trained_on, "the model was trained on")
        self._warn_of_initial_range()
        folder = getattr(codec, "folder", None)
        are_latents = getattr(datamodule, "codec", None) is not None
        if folder is not None and (
            not are_latents or Path(folder).is_dir()
        ):  # latents do without it until they are decoded
            fix = "encode the images again with `unet-diffusion encode`, which reads them so" if are_latents else ""
            self.values.require_range_of(read_values(Path(folder), channels), f"{folder} was trained on", fix)

    def _warn_of_initial_range(self) -> None:
        before = self.initial_values
        if before is not None and before.value_range != self.values.value_range:
            rank_zero_warn(f"model.init_from was trained on numbers of {before.ends} as -1 to 1, and the data have "
                           f"{self.values.ends}. For images of the same kind set data.value_range as there; otherwise "
                           "the network has to learn the new range")  # fmt: skip

    def on_train_start(self) -> None:
        self.keep_values(self.values)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the values of a checkpoint, or see that the data have the same range.

        Raises:
            ValueError: If the range of the data is another.
        """
        if self.record_key not in checkpoint:
            return
        before = PixelValues.from_plain(checkpoint[self.record_key]["values"])
        if not self._has_values:
            self.keep_values(before)
        self.values.require_range_of(before, "the checkpoint was trained on")
