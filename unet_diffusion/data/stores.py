"""Folders by path or address, read by fsspec: disks, http, s3 and many more.

See https://filesystem-spec.readthedocs.io.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import fsspec

from unet_diffusion.runtime.addresses import shown_place
from unet_diffusion.runtime.messages import in_words
from unet_diffusion.runtime.shareable import PROTOCOLS, without_secrets

T = TypeVar("T")

FIRST_WAIT = 0.5  # seconds before a read is tried again, doubled each time: four retries take 7.5 s
SILENCE = 30  # seconds without a byte over http, after which a read has failed
WHOLE = 300  # seconds of a whole read over http: 200 MB at less than a megabyte a second


class Store:
    """A folder, by its path or address. Each process that reads makes its own connections.

    Args:
        root: A path, or an address that fsspec knows: http://..., s3://...
        num_retries: How often a read is tried again.

    Raises:
        ModuleNotFoundError: If a package for such addresses is missing.
        ValueError: If such addresses are not known.
    """

    shown: str  # the place for messages, without secrets
    error: type[OSError] = OSError  # what is raised once a read has failed each time

    def __init__(self, root: str | Path, *, num_retries: int = 4) -> None:
        self.root = str(root).rstrip("/")
        self.shown = shown_place(self.root)
        self.num_retries = num_retries
        self._connect()

    def __reduce__(self) -> tuple[Any, ...]:
        return _store, (type(self), self.root, self.num_retries)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """The contents of a file, or its bytes from start to end.

        Raises:
            Exception: Of the file system, if the file cannot be read.
        """
        self._connect_once()
        return self._files.cat_file(f"{self._path}/{name}", start=start, end=end)

    def open(self, name: str) -> IO[bytes]:
        """A file to read from.

        Raises:
            Exception: Of the file system, if the file cannot be read.
        """
        self._connect_once()
        return cast(IO[bytes], self._files.open(f"{self._path}/{name}", "rb"))

    def names(self, pattern: str) -> list[str]:
        """The sorted names of files directly in the folder, such as "*.tar"; http needs a server that lists them.

        Raises:
            Exception: Of the file system, if the folder cannot be listed.
        """
        self._connect_once()
        return sorted(str(path).rpartition("/")[2] for path in self._files.glob(f"{self._path}/{pattern}"))

    def tried(self, read: Callable[[], T], place: str) -> T:
        """What a function reads, which is called again if it fails.

        Args:
            read: The function.
            place: What it reads, for messages.

        Raises:
            OSError: If it fails each time.
        """
        for left in range(self.num_retries, -1, -1):
            try:
                return read()
            except Exception as error:  # of any file system, and whatever lies there
                if not left:
                    raise self.error(f"{shown_place(place)} cannot be read: {_said(error)}") from error
                time.sleep(FIRST_WAIT * 2 ** (self.num_retries - left))
        raise AssertionError("num_retries is 0 or more")

    def _connect_once(self) -> None:
        if self._process != os.getpid():  # connections of a process do not work in those it forks
            self._connect()

    def _connect(self) -> None:
        protocol, has_protocol, _ = self.root.partition("://")
        if "::" in self.root or (has_protocol and protocol not in PROTOCOLS):
            raise ValueError(
                f"root must be a path, or an address that begins with one of {', '.join(PROTOCOLS)} and holds no ::, "
                f"got {self.shown}"
            )
        try:
            self._files, self._path = fsspec.core.url_to_fs(self.root, **_options(self.root))
        except ImportError as error:
            raise ModuleNotFoundError(
                f"to read {self.shown}: {error}; for s3 that is pip install 'unet-diffusion[stream]'"
            ) from error
        except ValueError as error:
            reason = without_secrets(str(error))
            raise ValueError(
                f"root must be a path, or an address that fsspec knows, got {self.shown} ({reason})"
            ) from error
        self._process = os.getpid()


def _store(kind: type[Store], root: str, num_retries: int) -> Store:
    return kind(root, num_retries=num_retries)


def _options(root: str) -> dict[str, Any]:
    """Options of fsspec's file systems: a connection for this process alone, and over http an end to waiting."""
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if root.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"timeout": ClientTimeout(total=WHOLE, sock_connect=SILENCE, sock_read=SILENCE)}
    return options


def _said(error: Exception) -> str:
    return "it is not there" if isinstance(error, FileNotFoundError) else without_secrets(in_words(error))
