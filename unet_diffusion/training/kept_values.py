"""What a module keeps of the values of its data, so that new images are read, and drawn ones written, as they were."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from unet_diffusion.diffusers_io.values_file import read_values
from unet_diffusion.latents.codec import Codec
from unet_diffusion.runtime.pixel_values import PixelValues, default_shown


class KeepsValues(LightningModule):
    """A module that knows what the numbers in the files of its images mean.

    Attributes:
        values: The values of the data, or of a checkpoint; before either is known, of 8 bits.
    """

    record_key: str  # of the record in a checkpoint
    values = PixelValues()
    _has_values = False  # whether the data have said them

    def bind_values(self, datamodule: Any, channels: int, codec: Codec | None = None) -> None:
        """Take the values from the data; a data module of another kind gives images of 8 bits.

        Args:
            datamodule: The data module.
            channels: The number of channels of its images.
            codec: What encodes the images in training; None: nothing does.

        Raises:
            ValueError: If the autoencoder was trained on another range.
        """
        self._has_values = hasattr(datamodule, "values")
        self.values = getattr(datamodule, "values", PixelValues(shown=default_shown(channels)))
        folder = getattr(codec, "folder", None)
        of_autoencoder = self.values if folder is None else read_values(Path(folder), channels)
        if of_autoencoder.value_range != self.values.value_range:
            fix = None if of_autoencoder.value_range is None else [of_autoencoder.low, of_autoencoder.high]
            raise ValueError(
                f"{folder} was trained on numbers of {of_autoencoder.low:.6g} to {of_autoencoder.high:.6g} as -1 to 1, "
                f"and the data have {self.values.low:.6g} to {self.values.high:.6g}; set data.value_range to {fix}"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the values of a checkpoint, or see that the data have the same range.

        Raises:
            ValueError: If the range of the data is another.
        """
        if self.record_key not in checkpoint:
            return
        before = PixelValues.from_plain(checkpoint[self.record_key]["values"])
        if not self._has_values:
            self.values = before
        elif before.value_range != self.values.value_range:
            fix = None if before.value_range is None else [before.low, before.high]
            raise ValueError(
                f"the checkpoint was trained on numbers of {before.low:.6g} to {before.high:.6g} as -1 to 1, and the "
                f"data have {self.values.low:.6g} to {self.values.high:.6g}; set data.value_range to {fix}"
            )
