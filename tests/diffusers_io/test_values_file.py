"""The range of values goes with each folder that diffusers reads: a pipeline, its autoencoder, that of a run."""

import json
import shutil
from dataclasses import replace

import pytest
from denoisers import save_autoencoder, text_denoiser

import unet_diffusion as ud
from unet_diffusion.diffusers_io.values_file import FILE, read_values, write_values
from unet_diffusion.runtime.pixel_values import PixelValues

TWELVE_BITS = PixelValues("uint16", 0, 4095, (2, 0))


def test_autoencoder_of_an_exported_pipeline_knows_the_range(tmp_path):
    denoiser = replace(text_denoiser(tmp_path), values=TWELVE_BITS)
    denoiser.export(tmp_path / "pipeline")
    kept = {"dtype": "uint16", "low": 0, "high": 4095, "shown": [2, 0]}
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        assert json.loads((folder / FILE).read_text()) == kept
    assert ud.load(tmp_path / "pipeline").values == TWELVE_BITS
    alone = shutil.copytree(tmp_path / "pipeline" / "vae", tmp_path / "alone")
    assert ud.load(alone).values == TWELVE_BITS


def test_range_is_found_in_a_run_folder_and_its_absence_means_8_bits(tmp_path):
    save_autoencoder(tmp_path / "run" / "autoencoder")
    assert read_values(tmp_path / "run", 3) == PixelValues()
    assert read_values(tmp_path / "run", 5) == PixelValues(shown=(0, 1, 2))
    write_values(TWELVE_BITS, tmp_path / "run" / "autoencoder")
    assert read_values(tmp_path / "run", 3) == TWELVE_BITS


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"dtype": "uint16", "low": 5, "high": 5, "shown": null}'])
def test_damaged_file_is_refused(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=r"pixel_values.json .*export the folder again"):
        read_values(tmp_path, 3)
