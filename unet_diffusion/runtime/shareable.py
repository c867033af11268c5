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
ABSOLUTE = r"(?:~\w*|[A-Za-z]:)?[\\/]"  # how a path begins: at the root, at home or at a drive of Windows
PATH = re.compile(rf"{ABSOLUTE}.*", re.DOTALL)
PATH_IN_TEXT = re.compile(rf"(?<=[\s=,;:'\"(\[{{]){ABSOLUTE}[^\s=,;:'\")\]}}]+")


def shareable(settings: Any) -> Any:
    """Return plain settings with absolute paths cut to their last part, and addresses cut to scheme, host and path.

    /home/me/cells becomes cells, and https://me:password@host:8000/cells?sig=secret becomes https://host/cells. Where a
    password holds characters that end a host, what cannot be told from the password is left out too.

    Args:
        settings: A value, or lists and mappings of values, at any depth.
    """
    if isinstance(settings, Mapping):
        return {shareable(name): shareable(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [shareable(value) for value in settings]
    return _shareable_text(str(settings)) if isinstance(settings, str | PurePath) else settings


def _shareable_text(text: str) -> str:
    before, *addresses = SCHEME.split(text)
    shown = (
        _last_part(before) if PATH.fullmatch(before) else PATH_IN_TEXT.sub(lambda match: _last_part(match[0]), before)
    )
    return shown + "".join(map(_shareable_address, addresses[::2], addresses[1::2]))


def _shareable_address(scheme: str, rest: str) -> str:
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
    return f"{scheme}{matched[1]}{slash}{path}" if matched else scheme


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
