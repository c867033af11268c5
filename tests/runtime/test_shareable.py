"""What of the settings of a run others may see."""

from pathlib import Path

import pytest

from unet_diffusion.runtime.shareable import shareable, without_secrets


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("/home/me/cells", "cells"),
        ("/home/me/my data/", "my data"),
        ("~/data/cells", "cells"),
        (Path("/home/me/cells.zip"), "cells.zip"),
        (r"C:\Users\me\cells", "cells"),
        (r"\\server\share\cells", "cells"),
        ("file:///home/me/cells", "file://cells"),
        ("zcat /home/me/cells.gz --into=/home/me/cells", "zcat cells.gz --into=cells"),
        ("out:/home/me/cells", "out:/cells"),
        (Path("s3://user:pass/word@host/b/cells?sig=secret"), "s3:/cells"),
        ("s3://lab/a,/home/anna/clinic7", "s3://lab/a,clinic7"),
        ("https://arxiv.org/abs/1 and /home/me/cells", "https://arxiv.org/abs/1 and cells"),
        ("a|/home/me/x", "a|x"),
        ("/home/me/cells\n/home/me/others", "cells\nothers"),
        ("see https://x.org/a is it nice? yes, very", "see https://x.org/a is it nice? yes, very"),
        ("1 /2 of a cell", "1 /2 of a cell"),
        (r"a \beta phase", r"a \beta phase"),
        (r"\d+_mask\.png", r"\d+_mask\.png"),
        ("data/cells", "data/cells"),
        ("owner/name", "owner/name"),
        ("a red/blue heart, N / A", "a red/blue heart, N / A"),
        ("s3://bucket/cells", "s3://bucket/cells"),
        ("s3://user:password@host/cells", "s3://host/cells"),
        ("s3://user:pass/word@host/cells", "s3://host/cells"),
        ("s3://us/er:pass@word@host/cells", "s3://host/cells"),
        ("s3://user:pass word@host/cells", "s3://host/cells"),
        ("s3://user:pass?word@host/cells", "s3://"),  # where the host begins cannot be told
        ("s3://user:password/cells", "s3://"),
        ("https://token@host/cells", "https://host/cells"),
        ("https://host:8000/cells?sig=secret", "https://host/cells"),
        ("https://host/cells?token=sec@ret", "https://host/cells"),
        ("https://host/cells#secret", "https://host/cells"),
        ("https://host/cells?X-Amz-Signature=secret&X-Amz-Credential=key", "https://host/cells"),
        ("http://[::1]:8000/cells", "http://[::1]/cells"),
        ("hf://datasets/owner/name@main/cells", "hf://datasets/owner/name@main/cells"),
        ("simplecache::s3://user:password@host/cells", "simplecache::s3://host/cells"),
        ("https://proxy/x.tar?url=https://store/a.tar&sig=secret", "https://proxy/x.tar"),
        ("{'root': 'https://host/cells?sig=secret'}, 1", "{'root': 'https://host/cells'}, 1"),
        ("HTTPS:/me:secret@host/cells", "HTTPS:/cells"),
        ("https://a/cells https://user:password@b/cells?sig=secret", "https://a/cells https://b/cells"),
    ],
)
def test_paths_keep_their_last_part_and_addresses_scheme_host_and_path(setting, shown):
    assert shareable(setting) == shown
    assert shareable(shown) == shown


def test_other_settings_stay_at_any_depth():
    settings = {"model": {"lr": 0.001, "betas": (0.9, 0.999), "unet": {"class_path": "a.b.C"}}, "seed": None, 3: True}
    assert shareable(settings) == {**settings, "model": {**settings["model"], "betas": [0.9, 0.999]}}
    assert shareable({"/home/me": [{"root": "/home/me/cells"}]}) == {"me": [{"root": "cells"}]}


def test_places_lose_their_folders_and_secrets_are_left_out():
    settings = {"data": {"root": "data/patients/John_Smith", "image_size": 64}, "init_from": "../me/private/run"}
    assert shareable(settings) == {"data": {"root": "John_Smith", "image_size": 64}, "init_from": "run"}
    assert shareable({"root": "hf://owner/name"}) == {"root": "hf://owner/name"}
    secrets = {"token": "hf_x", "headers": {"Authorization": "Bearer x"}, "aws_secret_access_key": "x", "api_key": "x"}
    words = {"placeholder_token": "<toy>", "num_tokens": 3, "max_length": 77}
    assert shareable({**secrets, **words}) == words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:80/a.tar?sig=secret cannot be read: 404", "http://host:80/a.tar cannot be read: 404"),
        ("data.root was s3://k:secret@b/x, is /home/me/x", "data.root was s3://b/x, is /home/me/x"),
        ("file:///home/me/a.tar and hf://owner/name@main", "file:///home/me/a.tar and hf://owner/name@main"),
        ("got https:/me:secret@host/x", "got https:/host/x"),
        ("(s3://b/x; give http://host:80, or 'http://host'.)", "(s3://b/x; give http://host:80, or 'http://host'.)"),
        ("see http://k:secret sec@host/x: it is gone", "see http://...host/x: it is gone"),
        ("see http://k:secret sec@host/x?sig=secret: it is gone", "see http://...host/x: it is gone"),
        ("https://me:12 secret@host", "https://...host"),
        ("https://my name:secret@host/x", "https://...host/x"),
        ("https://me:sec@ret secret@host/x", "https://...host/x"),
        ("https://proxy/x.tar?url=https://store/a.tar&sig=secret is gone", "https://proxy/x.tar is gone"),
        ("file:///a?url=https://me:secret@h/x", "file:///a?url=https://h/x"),
        ("HTTPS:/me:secret@host/x", "HTTPS:/host/x"),
        ("az:/me:secret@host/x and logs:/home/me/x?y", "az:/host/x and logs:/home/me/x?y"),
        ("other:/me:secret@host/x", "other:/host/x"),
        ("{'root': 'https://host/x?sig=secret'}", "{'root': 'https://host/x'}"),
        ("see https://host/guide.md#data-sets; https://host/x#secret", "see https://host/guide.md#data-sets; https://host/x"),
        ({"token": "secret", "size": 1}, {"token": "...", "size": 1}),
        ("https://me:sec?ret@host/x", "https://..."),
        ("no address: a:/b/c, x@y, /home/me/x?y", "no address: a:/b/c, x@y, /home/me/x?y"),
        (Path("/home/me/cells"), "/home/me/cells"),
        ({"root": ["http://t:secret@h/x#token=secret"], "size": 64}, {"root": ["http://h/x"], "size": 64}),
    ],
)  # fmt: skip
def test_messages_keep_paths_and_hide_what_opens_an_address(text, shown):
    assert without_secrets(text) == shown
