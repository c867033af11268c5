"""The CSV file of a run's losses, which has all rows so far at each moment."""

import csv

from unet_diffusion.runtime.atomic_files import atomic_write
from unet_diffusion.training.lightning_internals import OpenCSVLogger, OpenCSVWriter


class WholeRows(OpenCSVWriter):
    """Writes a file with more columns beside the one before, and puts it in its place in one step."""

    def widen(self, columns: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        with atomic_write(self.metrics_file_path) as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)


class RunCSVLogger(OpenCSVLogger):
    """Lightning's CSVLogger, with its arguments; a process that is killed loses no row."""

    writer = WholeRows
