"""Which settings of a run may change when it goes on."""

from unet_diffusion.commands.run_settings import changes


def test_addresses_are_compared_without_user_password_and_query():
    before = {"data": {"root": "https://me:secret@host/a.tar?set=1"}}
    assert changes(before, {"data": {"root": "https://other@host/a.tar?set=2"}}) == []
    assert changes(before, {"data": {"root": "https://me:secret@host/b.tar?set=1"}}) == [
        "data.root was https://host/a.tar, is https://host/b.tar"
    ]


def test_modules_that_are_allowed_are_not_compared():
    assert changes({"model": {"base": "run"}}, {"model": {"base": "run", "allow": []}}) == []
    assert changes({"model": {"allow": []}}, {"model": {"allow": ["mine"]}}) == []


def test_settings_that_name_secrets_are_compared_and_not_shown():
    assert changes({"data": {"token": "a"}}, {"data": {"token": "b"}}) == ["data.token is another"]
    before, now = ({"data": [{"pad_token": number}]} for number in (0, 1))
    assert changes(before, now) == ["data was [{'pad_token': '...'}], is [{'pad_token': '...'}]"]
