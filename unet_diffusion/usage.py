"""What is wrong with a command line, in one message, without a page of usage."""

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

MOST_NAMED = 5  # in a line


class UsageError(Exception):
    """A command line that cannot be carried out: what was given, what is expected, and what to do."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are raised, and not printed after all of its usage."""

    def error(self, message: str) -> NoReturn:
        """As argparse calls it.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message}; {self.prog} --help says more")


def printable(text: str) -> str:
    """The text with what a terminal would obey, such as escapes in the name of a file, spelt out: \\x1b[2J."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def first_few(names: Sequence[str]) -> str:
    """The first five names, and dots if there are more: a, b, c, d, e, ..."""
    return ", ".join([*names[:MOST_NAMED], "..."] if len(names) > MOST_NAMED else names)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known words that look like a misspelt one, as the end of an error message; "" without any."""
    close = get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def similar_paths(path: Path) -> str:
    """The paths beside a missing one whose names look like its own, as the end of an error message; "" without any."""
    beside = [neighbour.name for neighbour in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, beside, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
