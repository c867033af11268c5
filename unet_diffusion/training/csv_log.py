"""The CSV file of a run's losses, which is there at each moment with all the rows before it."""

import csv
import os
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from unet_diffusion.runtime.atomic_files import atomic_write


class RunCSVLogger(CSVLogger):
    """Lightning's CSVLogger, with its arguments; a process that is killed loses no row."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = WholeRows(log_dir=self.log_dir)
        return self._experiment


class WholeRows(ExperimentWriter):
    """A file with more columns takes the place of the one before in one step."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        with atomic_write(self.metrics_file_path) as partial, open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)
