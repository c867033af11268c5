"""Settings of a run as others may see them: without the folders of this machine, and without what opens an address.

A card and a config.json say how a model was trained, and go wherever the model goes.
"""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

SCHEME = re.compile(r"([A-Za-z][\w+.-]+:/{1,2})")  # a Path drops a slash; a drive of Windows has one letter
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
        return {shareable(name): _of_name(name, value) for name, value in settings.items() if not _is_secret(name)}
    if isinstance(settings, list | tuple):
        return [shareable(value) for value in settings]
    return _shareable_text(str(settings)) if isinstance(settings, str | PurePath) else settings


def _is_secret(name: Any) -> bool:
    return isinstance(name, str) and name not in NO_SECRETS and SECRET.fullmatch(name) is not None


def _of_name(name: Any, value: Any) -> Any:
    shown = shareable(value)
    is_place = name in PLACES and isinstance(shown, str) and "://" not in shown
    return _last_part(shown) if is_place else shown


def _shareable_text(text: str) -> str:
    before, *addresses = SCHEME.split(text)
    shown = (
        _last_part(before) if PATH.fullmatch(before) else PATH_IN_TEXT.sub(lambda match: _last_part(match[0]), before)
    )
    return shown + "".join(map(_shareable_address, addresses[::2], addresses[1::2]))


def _shareable_address(scheme: str, rest: str) -> str:
    address, *after = re.split(r"(?=\s)", rest, maxsplit=1)
    text = "".join(after)
    if "@" in text:  # a password may hold spaces
        address, text = rest, ""
    return _shown_address(scheme, address) + PATH_IN_TEXT.sub(lambda match: _last_part(match[0]), text)


def _shown_address(scheme: str, rest: str) -> str:
    plain, *query = re.split(r"[?#]", rest, maxsplit=1)
    if ":" in plain and "@" in "".join(query):  # a ? of the password, or an @ of the query
        return scheme
    before, _, after = plain.rpartition("@")
    if ":" in before or "@" in plain.partition("/")[0]:
        plain = after
    host, slash, path = plain.partition("/")
    if scheme in OF_THIS_MACHINE or not (scheme.endswith("://") and host):
        return scheme + _last_part(plain)
    matched = HOST.fullmatch(host)
    path = PATH_IN_TEXT.sub(lambda match: _last_part(match[0]), path)
    return f"{scheme}{matched[1]}{slash}{path}" if matched else scheme


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
