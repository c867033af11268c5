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


def test_run_whose_records_do_not_name_the_usual_option_goes_on_with_it():
    record = {"class_path": "LowResolution", "init_args": {"channels": 3}}
    usual, other = ({**record, "init_args": {"channels": 3, "option": name}} for name in ("image", "small_image"))
    assert conditions_identity([record]) == conditions_identity([usual]) != conditions_identity([other])
