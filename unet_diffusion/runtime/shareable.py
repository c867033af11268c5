"""Settings of a run as others may see them: without the folders of this machine, and without what opens an address.

A card and a config.json say how a model was trained, and go wherever the model goes.
"""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

# Addresses come from configurations: of fsspec's file systems plain stores. Others, and those chained by ::, take
# templates and settings from what they read, or run code of the place.
PROTOCOLS = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "hf", "ftp", "sftp", "ssh", "smb",
             "hdfs", "webhdfs", "webdav", "oss", "oci", "memory")  # fmt: skip
# A Path drops a slash; a drive of Windows has one letter. An address ends where white space begins, so that one within
# the query of another belongs to the query.
ADDRESS = re.compile(r"([A-Za-z][\w+.-]+:/{1,2})(\S*)")
WITH_SECRETS = re.compile(  # of addresses with one slash those of PROTOCOLS, and those with a user and a password
    rf"([a-z][\w+.-]+://|(?<![a-z\d])(?:{'|'.join(PROTOCOLS)}):/|[a-z][\w+.-]+:/(?=[^\s:]*:\S*@))(\S*)", re.IGNORECASE
)
CLOSING = ",;:.)]}>'\""  # of the text around an address
PAGE = re.compile(r"[^@?#:]+\.(?:md|html)#[a-z-]+")  # an anchor of a page is no secret
OF_THIS_MACHINE = ("file://", "local://")  # fsspec's schemes of a path
HOST = re.compile(r"(\[[\da-fA-F:.]+\]|[^:]*)(:\d*)?")  # and port
ABSOLUTE = (
    r"(?:(?:~\w*)?/|[A-Za-z]:[\\/]|\\\\)"  # how a path begins: at the root, at home, at a drive or a server of Windows
)
PATH = re.compile(rf"{ABSOLUTE}.*")
PATH_IN_TEXT = re.compile(rf"(?:^|(?<=[\s=,;:|<>'\"(\[{{])){ABSOLUTE}[^\s=,;:|<>'\")\]}}]+[\\/][^\s=,;:|<>'\")\]}}]+")
PLACES = {  # settings that are paths, also relative ones
    *("root", "images", "labels", "unlabelled", "semantic_map", "paired_image", "boxes", "init_from", "base"),
    *("autoencoder", "folder", "default_root_dir", "ckpt_path"),
}
SECRET = re.compile(
    r"(?:.*_)?(?:secret|password|passwd|passphrase|authorization|headers|credentials?|sas|sig|signature"
    r"|(?:api|access|account|secret|private|auth|session)_?(?:key|token)|token)",
    re.IGNORECASE,
)
HIDDEN = "..."
NO_SECRETS = ("placeholder_token", "initializer_token")  # words of textual inversion


def shareable(settings: Any) -> Any:
    """Return plain settings with absolute paths cut to their last part, and addresses cut to scheme, host and path.

    /home/me/cells becomes cells, and https://me:password@host:8000/cells?sig=secret becomes https://host/cells.
    Settings that name places, such as root, are cut to their last part also where they are relative, and those that
    name secrets, such as token, are left out. Where it is not certain which part of an address is the password, as in
    s3://user:pass?word@host/cells, only the scheme stays.

    Args:
        settings: A value, or lists and mappings of values, at any depth.
    """
    if isinstance(settings, Mapping):
        return {shareable(name): _of_name(name, value) for name, value in settings.items() if not is_secret(name)}
    if isinstance(settings, list | tuple):
        return [shareable(value) for value in settings]
    return _shareable_text(str(settings)) if isinstance(settings, str | PurePath) else settings


def without_secrets(settings: Any, *, named: bool = True) -> Any:
    """Return a message, or plain settings for a log, in which addresses have neither user and password nor query.

    Paths and ports are kept, unlike in what `shareable` gives. Settings that name secrets, such as token, become "...".
    Where it is not certain which part of an address is the password, more than the password goes.

    Args:
        settings: A value, or lists and mappings of values, at any depth.
        named: Whether settings that name secrets are hidden; if not, only addresses are.
    """
    if isinstance(settings, Mapping):
        return {
            name: HIDDEN if named and is_secret(name) else without_secrets(value, named=named)
            for name, value in settings.items()
        }
    if isinstance(settings, list | tuple):
        return [without_secrets(value, named=named) for value in settings]
    if not isinstance(settings, str | PurePath):
        return settings
    before, *addresses = WITH_SECRETS.split(str(settings))
    return before + "".join(map(_address_in_text, addresses[::3], addresses[1::3], addresses[2::3]))


def address_without_secrets(address: str) -> str:
    """Return an address without user, password and query, which may hold spaces here.

    Args:
        address: The address alone, without a text around it.
    """
    before, scheme, rest, text = WITH_SECRETS.split(address, maxsplit=1)
    return before + scheme + _shown_rest(scheme, rest + text)


def is_secret(name: Any) -> bool:
    """Return whether the name of a setting says that its value is a secret, as token does."""
    return isinstance(name, str) and name not in NO_SECRETS and SECRET.fullmatch(name) is not None


def _address_in_text(scheme: str, rest: str, text: str) -> str:
    address = rest.rstrip(CLOSING)
    text = rest[len(address) :] + text
    if scheme.lower() in OF_THIS_MACHINE or not _goes_on(address, text):
        return scheme + (address if PAGE.fullmatch(address) else _shown_rest(scheme, address)) + text
    host = text.rpartition("@")[2]
    address = re.split(r"\s", host, maxsplit=1)[0].rstrip(CLOSING)
    return f"{scheme}{HIDDEN}{''.join(_parts(address) or '')}{host[len(address) :]}"


def _goes_on(address: str, text: str) -> bool:
    """Whether user or password may hold the white space behind what follows a scheme."""
    user, has_at, _ = text.rpartition("@")
    before_path, slash, _ = address.partition("/")
    return bool(has_at) and (_parts(address) is None or ":" in before_path or (not slash and ":" in user))


def _shown_rest(scheme: str, rest: str) -> str:
    return without_secrets(rest) if scheme.lower() in OF_THIS_MACHINE else "".join(_parts(rest) or HIDDEN)


def _of_name(name: Any, value: Any) -> Any:
    shown = shareable(value)
    is_place = name in PLACES and isinstance(shown, str) and "://" not in shown
    return _last_part(shown) if is_place else shown


def _shareable_text(text: str) -> str:
    before, *addresses = ADDRESS.split(text)
    shown = (
        _last_part(before) if PATH.fullmatch(before) else PATH_IN_TEXT.sub(lambda match: _last_part(match[0]), before)
    )
    return shown + "".join(map(_shareable_address, addresses[::3], addresses[1::3], addresses[2::3]))


def _shareable_address(scheme: str, rest: str, text: str) -> str:
    address = rest.rstrip(CLOSING)
    text = rest[len(address) :] + text
    if "@" in text:  # a password may hold spaces
        address, text = address + text, ""
    return _shown_address(scheme, address) + PATH_IN_TEXT.sub(lambda match: _last_part(match[0]), text)


def _shown_address(scheme: str, rest: str) -> str:
    if (plain := _without_user(rest)) is None:
        return scheme
    if scheme.lower() in OF_THIS_MACHINE or not (scheme.endswith("://") and plain.partition("/")[0]):
        return scheme + _last_part(plain)
    if (parts := _parts(plain)) is None:
        return scheme
    host, _, slash, path = parts
    return f"{scheme}{host}{slash}{PATH_IN_TEXT.sub(lambda match: _last_part(match[0]), path)}"


def _without_user(rest: str) -> str | None:
    """What follows a scheme, without user, password and query; None: it is not certain which part the password is."""
    plain, *query = re.split(r"[?#]", rest, maxsplit=1)
    if ":" in plain and "@" in "".join(query):  # a ? of the password, or an @ of the query
        return None
    before, _, after = plain.rpartition("@")
    return after if ":" in before or "@" in plain.partition("/")[0] else plain


def _parts(rest: str) -> tuple[str, str, str, str] | None:
    """Host, port, slash and path of what follows a scheme; None: that is not certain."""
    if (plain := _without_user(rest)) is None:
        return None
    host, slash, path = plain.partition("/")
    matched = HOST.fullmatch(host)
    return (matched[1], matched[2] or "", slash, path) if matched else None


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
