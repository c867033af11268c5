"""`sample` into a folder of images of the other kind, PNG or TIFF: no image of another model stays among its own."""

import pytest

from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.runtime.pixel_values import PixelValues

KINDS = {"png": PixelValues(), "tif": PixelValues("uint16", 0, 4095)}


@pytest.fixture
def draw(tiny_unet, tmp_path, run_cli):
    """Draws as PNG or TIFF into one folder, and returns the status, the error, and the names of the images there."""
    for kind, values in KINDS.items():
        Denoiser(tiny_unet(), NoiseSchedule(10), (1, 8, 8), values=values).save(tmp_path / f"{kind}.ckpt")

    def drawn(kind, num_images, *options):
        folder = tmp_path / "drawn"
        status, _, err = run_cli("sample", tmp_path / f"{kind}.ckpt", "--num_images", num_images, "--device", "cpu",
                                 "--num_inference_steps", 1, "--output", folder, *options)  # fmt: skip
        return status, err, sorted(path.name for path in folder.glob("0*"))

    return drawn


@pytest.mark.parametrize(("first", "second"), [("png", "tif"), ("tif", "png")])
def test_overwrite_removes_images_of_the_other_kind(draw, first, second):
    three = [f"00000{number}.{first}" for number in range(3)]
    status, err, names = draw(first, 3)
    assert (status, names) == (0, three), err
    for options in ([], ["--resume"]):
        status, err, names = draw(second, 2, *options)
        assert (status, names) == (1, three)
        assert "--overwrite" in err
    status, err, names = draw(second, 2, "--overwrite")
    assert (status, names) == (0, [f"00000{number}.{second}" for number in range(2)]), err


@pytest.mark.parametrize(("first", "second"), [("png", "tif"), ("tif", "png")])
def test_images_of_somebody_else_stay_whatever_their_kind(draw, tmp_path, first, second):
    draw(first, 1)
    mine = tmp_path / "drawn" / f"000004.{second}"
    mine.write_bytes(b"mine")
    status, err, _ = draw(second, 5, "--overwrite")
    assert (status, f"{mine.name}, which was not drawn there by sample" in err) == (1, True), err
    assert mine.read_bytes() == b"mine"
    assert (tmp_path / "drawn" / f"000000.{first}").exists()
