"""Roots of data as users and Path write them."""

from pathlib import Path

import pytest

from unet_diffusion.runtime.addresses import absolute_place, place_of


@pytest.mark.parametrize("address", ["s3://bucket/set", "file:///data/a.tar", "http://host:80/a//b.tar"])
def test_address_stays_as_it_is_and_is_made_whole_again_after_a_path(address):
    assert place_of(address) == address
    assert place_of(Path(address)) == address.replace("a//b", "a/b")


def test_path_stays_a_path():
    assert place_of("data/x.tar") == "data/x.tar"
    assert place_of("~/x") == str(Path.home() / "x")


def test_settings_hold_no_secrets_of_an_address():
    assert absolute_place("https://me:secret@host/set.tar?sig=secret") == "https://host/set.tar"
    assert absolute_place("s3://bucket/set") == "s3://bucket/set"
    assert absolute_place("data") == str(Path("data").absolute())
