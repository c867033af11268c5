"""Channels of noise, constant channels and unused codes are warned of, and others are not."""

import numpy as np
import pytest

from unet_diffusion.latents.collapse import collapsed_channels, unused_codes


@pytest.mark.parametrize(("signal", "noise", "told"), [
    ([1.0, 1.0], [0.1, 5.0], None),  # a sixth is signal
    ([1.0, 1.0], [0.0, 0.0], None),  # as with a codebook
    ([1.0, 0.05], [0.1, 1.0], "Channel 1 of the latents: over 90% of the variance is noise"),
    ([0.0, 0.0], [1.0, 1.0], "Channels 0, 1 of the latents: over 90% of the variance is noise"),
    ([1.0, 1.0e-6], [0.1, 1.0e-6], "Channel 1 of the latents: hardly varies"),
    ([0.0, 0.0], [0.0, 0.0], "Channels 0, 1 of the latents: hardly varies"),
])  # fmt: skip
def test_channels_that_say_nothing_of_the_image_are_told(signal, noise, told):
    warnings = collapsed_channels(np.array(signal), np.array(noise))
    assert len(warnings) == (told is not None)
    assert all(warning.startswith(told) for warning in warnings)


def test_noise_and_constants_are_told_together():
    noise, constant = collapsed_channels(np.array([1.0, 0.05, 0.0]), np.array([0.0, 1.0, 0.0]))
    assert noise.startswith("Channel 1 of the latents: over")
    assert constant.startswith("Channel 2 of the latents: hardly")


def test_a_codebook_of_which_a_tenth_is_used_is_not_warned_of():
    counts = np.zeros(20, dtype=np.int64)
    counts[:2] = 5
    assert unused_codes(counts) is None
    counts[1] = 0
    assert unused_codes(counts).startswith("Only 1 of 20 codes are used.")
