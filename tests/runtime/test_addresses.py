"""Roots of data as users and Path write them."""

from pathlib import Path

import pytest

from unet_diffusion.runtime.addresses import (
    absolute_place,
    is_address,
    is_hub_name,
    missing_path,
    numbered,
    place_of,
    shown_place,
)


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


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("simplecache::https://me:secret@host/x", "simplecache::https://host/x"),
        (Path("simplecache::https://me:secret@host/x"), "simplecache::https://host/x"),
        ("simplecache::other:/x", "simplecache::other://x"),
        ("zip://a::https://me:secret@host/x?sig=secret", "zip://host/x"),
        (Path("HTTPS://me:secret@host/x?sig=secret"), "HTTPS://host/x"),
    ],
)
def test_place_is_shown_without_secrets_and_read_as_an_address(address, shown):
    assert is_address(address)
    assert shown_place(address) == shown


def test_text_around_an_address_is_shown_without_its_secrets():
    assert shown_place("my https://me:secret@host/x") == "my https://host/x"
    assert shown_place("C:/cells/x?y@z") == "C:/cells/x?y@z"


@pytest.mark.parametrize(
    "ending", ["zip", "ZIP", "tar", "tar.gz", "parquet", "csv", "png", "tif", "ckpt", "safetensors"]
)
def test_name_that_ends_as_a_file_does_is_a_path_and_no_name_on_the_hub(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name(f"data/x.{ending}")
    assert missing_path(f"data/x.{ending}") == Path(f"data/x.{ending}")
    assert is_hub_name(f"hf://data/x.{ending}")
    assert is_hub_name("owner/model-v1.5")


def test_each_of_several_archives_must_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (8, 9, 10):
        Path(f"s-{number:02d}.tar").touch()
    assert missing_path("s-{08..10}.tar") is None
    assert missing_path(Path("s-{08..11}.tar")) == Path("s-11.tar")
    assert missing_path("s-08.tar/train") is None
    assert missing_path("http://host/s-{08..11}.tar") is missing_path(Path("s3://bucket/s-08.tar")) is None


@pytest.mark.parametrize("command", [["fit", "--config", "folder", "--data.root"], ["evaluate"]])
def test_numbers_that_go_down_are_refused(run_cli, tmp_path, command):
    status, _, err = run_cli(*command, tmp_path / "s-{10..9}.tar")
    said = "numbers in braces must not go down, got {10..9}; write the lower one first"
    assert (status, said in err) == (1, True), err
    with pytest.raises(ValueError, match="must not go down"):
        list(numbered("http://host/{0..1}/s-{1..0}.tar"))


@pytest.mark.parametrize("words", ["sample {}", "segment {} images --output out", "import {} out.ckpt", "pack {} out",
                                   "fit --config folder --data.root {}"])  # fmt: skip
def test_missing_file_is_told_without_asking_the_hub(run_cli, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", None)  # calling it is an error of another kind
    status, _, err = run_cli(*words.format("data/x.zip").split())
    assert (status, "exist" in err, "hub" in err) == (1, True, False), err
