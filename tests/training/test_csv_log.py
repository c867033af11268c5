import csv

import pytest

from unet_diffusion.training.csv_log import RunCSVLogger


def rows(logger):
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def log(logger, step, **metrics):
    logger.log_metrics(metrics, step)
    logger.save()


def test_rows_are_there_when_a_new_column_cannot_be_written(tmp_path, monkeypatch):
    logger = RunCSVLogger(tmp_path, flush_logs_every_n_steps=1)
    log(logger, 0, loss=1.5)
    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            log(logger, 1, loss=0.5, val=2.0)
    assert rows(logger) == [{"loss": "1.5", "step": "0"}]


def test_new_column_keeps_the_rows_before(tmp_path):
    logger = RunCSVLogger(tmp_path, flush_logs_every_n_steps=1)
    log(logger, 0, loss=1.5)
    log(logger, 1, val=2.0)
    assert rows(logger) == [{"loss": "1.5", "step": "0", "val": ""}, {"loss": "", "step": "1", "val": "2.0"}]
