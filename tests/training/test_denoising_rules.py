"""What may be trained together, and what a run keeps."""

import pytest

from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.training.denoising_rules import check_conditions, conditions_identity


class Sketch(Concat):
    """A condition of one's own that refuses a mask."""

    batch_key = "sketch"
    refuses = ("mask",)

    def __init__(self, channels: int):
        super().__init__(channels)
        self.config = {"channels": channels}


def test_conditions_of_ones_own_that_refuse_each_other_are_told_so():
    unet = DenoiserUNet(9, (8, 16), out_channels=3, norm_num_groups=4)
    with pytest.raises(ValueError, match=r"Sketch draws .* the mask that MaskedImage needs; remove one of them$"):
        check_conditions(unet, [MaskedImage(4), Sketch(2)])


def test_run_may_go_on_with_another_dropout_but_not_with_another_image():
    record = {"class_path": "LowResolution", "init_args": {"channels": 3, "option": "image", "dropout": 0.1}}
    dropped, other = ({**record, "init_args": record["init_args"] | change} for change in
                      ({"dropout": 0.2}, {"option": "small_image"}))  # fmt: skip
    assert conditions_identity([record]) == conditions_identity([dropped]) != conditions_identity([other])
